"""A small transformer over a list, and the folders that rankers are saved in.

Shapes: `B` lists of `K` items with `F` features. There is no positional encoding: items of a list are a set, so
permuting them permutes the scores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopl._arguments import shape_of
from mopl._bounds import check_bounds
from mopl._extras import require
from mopl._files import write_files
from mopl._records import DamagedFile, Kind, check, damaged, read_json
from mopl._tensor_files import check_fits, load_state

T = TypeVar("T")
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "model.json"


class _Block(nn.Module):
    """Self-attention and a feed-forward layer, each normalised first and added to its input."""

    def __init__(self, hidden: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.attention_out = nn.Linear(hidden, hidden)
        self.feedforward_norm = nn.LayerNorm(hidden)
        self.feedforward_in = nn.Linear(hidden, feedforward)
        self.feedforward_out = nn.Linear(feedforward, hidden)

    def forward(self, x: Tensor, attend: Tensor) -> Tensor:  # (B, K, H), (B, 1, 1, K) -> (B, K, H)
        batch, items, hidden = x.shape
        qkv = self.query_key_value(self.attention_norm(x)).view(batch, items, 3, self.heads, hidden // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attend, dropout_p=dropout)
        mixed = self.attention_out(mixed.transpose(1, 2).reshape(batch, items, hidden))
        x = x + F.dropout(mixed, self.dropout, self.training)
        inner = F.gelu(self.feedforward_in(self.feedforward_norm(x)))
        return x + F.dropout(self.feedforward_out(inner), self.dropout, self.training)


class ListTransformer(nn.Module):
    """Scores the items of a list, each in view of the others.

    Args:
        features: F.
        hidden: Width H; the number of heads must divide it.
        layers: Number of blocks.
        heads: Attention heads.
        feedforward: Width of the feed-forward layers; H by default.
        dropout: Probability of dropout.
        outputs: Number of scores of an item.
    """

    def __init__(
        self,
        features: int,
        hidden: int = 128,
        layers: int = 2,
        heads: int = 4,
        feedforward: int | None = None,
        dropout: float = 0.0,
        *,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        feedforward = feedforward or hidden
        self.settings: dict[str, Any] = {
            "features": features, "hidden": hidden, "layers": layers, "heads": heads,
            "feedforward": feedforward, "dropout": dropout,
        }  # fmt: skip
        check_bounds(self.settings)
        if outputs < 1:
            raise ValueError(f"outputs is {outputs} but must be at least 1, the number of scores of an item")
        if outputs > 1:  # files of models with one output do not name it
            self.settings["outputs"] = outputs
        if min(features, hidden, layers, heads, feedforward) < 1 or hidden % heads or not 0 <= dropout < 1:
            raise ValueError(
                f"features, hidden, layers, heads are {features}, {hidden}, {layers}, {heads}; all must be at least 1 "
                f"and heads must divide hidden; dropout is {dropout}, which must be at least 0 and below 1"
            )
        self.input = nn.Linear(features, hidden)
        self.blocks = nn.ModuleList(_Block(hidden, heads, feedforward, dropout) for _ in range(layers))
        self.output_norm = nn.LayerNorm(hidden)
        # No bias: every list loss ignores a shift of all scores, so nothing would ever train it.
        self.output = nn.Linear(hidden, outputs, bias=False)

    def forward(
        self,
        features: Tensor,  # (B, K, F)
        mask: Tensor | None = None,  # (B, K) bool
    ) -> Tensor:  # (B, K), or (B, K, outputs)
        """Score lists.

        Args:
            features: (B, K, F); what stands in masked places is ignored, NaN included.
            mask: (B, K), true where an item exists.

        Returns:
            Scores (B, K), or (B, K, outputs) of several outputs; finite everywhere and 0 in masked places, also for a
            list without items.

        Raises:
            ValueError: If a shape is wrong.
        """
        if features.ndim != 3 or features.shape[2] != self.settings["features"]:
            raise ValueError(
                f"features has shape {shape_of(features)} but must be (B, K, F) with F = {self.settings['features']}"
            )
        device = features.device
        exists: Tensor = torch.ones(features.shape[:2], dtype=torch.bool, device=device) if mask is None else mask
        if exists.shape != features.shape[:2] or exists.dtype != torch.bool:
            raise ValueError(
                f"mask is {exists.dtype} {shape_of(exists)} but must be torch.bool {shape_of(features[..., 0])}"
            )
        x = self.input(features.masked_fill(~exists[..., None], 0.0))
        # A softmax over nothing is NaN, so an empty list attends to its padding; its scores are discarded anyway.
        attend = (exists | ~exists.any(-1, keepdim=True))[:, None, None, :]
        for block in self.blocks:
            x = block(x, attend)
        scores = self.output(self.output_norm(x)).masked_fill(~exists[..., None], 0.0)
        return scores[..., 0] if scores.shape[-1] == 1 else scores

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` and `model.json` into a folder."""
        save_model_folder(self, {"kind": "ListTransformer", "network": self.settings}, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> ListTransformer:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: If the folder holds no model.
            ValueError: If it holds a model of another kind, or is damaged.
        """
        return load_model_folder(
            directory, "ListTransformer", _ListTransformerRecord, lambda record, _: cls(**record["network"])
        )


def save_model_folder(model: nn.Module, config: dict[str, Any], directory: str | os.PathLike[str]) -> None:
    """Write the weights of a model, and `config` as its record, into a folder."""
    require("safetensors", extra="demo")
    from safetensors.torch import save_model

    def fill(folder: Path) -> None:
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_model(model, str(folder / WEIGHTS_FILE))

    write_files(directory, fill, last=WEIGHTS_FILE)


class NetworkRecord(msgspec.Struct, forbid_unknown_fields=True):
    """What `model.json` says of a `ListTransformer`."""

    features: int
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    feedforward: int | None = None
    dropout: float = 0.0
    outputs: int = 1


class _ListTransformerRecord(msgspec.Struct):
    network: NetworkRecord


def load_model_folder(
    directory: str | os.PathLike[str], kind: str, schema: type, make: Callable[[dict[str, Any], Path], T]
) -> T:
    """Return the model of a folder, made by `make` from its record once the file of weights is known to fit."""
    folder = Path(directory)
    file, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    missing = [found.name for found in (file, weights) if not found.exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no {' and no '.join(missing)}; name the folder of a finished run, or one that "
            "save_pretrained wrote"
        )
    record = read_json(file, Kind)
    if record.get("kind") != kind:
        raise ValueError(f"{file} holds a {record.get('kind')} but a {kind} was asked for")
    check(record, schema, file)

    def build() -> Any:
        try:
            return make(record, file)
        except DamagedFile:
            raise
        except ValueError as error:
            raise damaged(file, str(error)) from None

    check_fits(weights, build)
    model = build()
    load_state(model, weights)
    return model.eval()
