"""A small transformer over a list, and the ranker conditioned on a trade-off that is built from it.

Shapes: `B` lists of `K` items with `F` features, `m` objectives. There is no positional encoding: items of a list are
a set, so permuting them permutes the scores.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopl import steering
from mopl._arguments import check_choice, check_positive, readable, shape_of
from mopl._bounds import check_bounds
from mopl._counted import counted
from mopl._extras import require
from mopl._files import write_files
from mopl._records import DamagedFile, Kind, check, damaged, read_json, settings_from
from mopl._renamed import renamed_attribute, renamed_in_methods
from mopl._tensor_files import check_fits, load_state
from mopl.conditioning import ConcatCondition, check_weights

Parametrisation = Literal["scratch", "augment"]
PARAMETRISATIONS = ("scratch", "augment")
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
    """

    def __init__(
        self,
        features: int,
        hidden: int = 128,
        layers: int = 2,
        heads: int = 4,
        feedforward: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        feedforward = feedforward or hidden
        self.settings: dict[str, Any] = {
            "features": features, "hidden": hidden, "layers": layers, "heads": heads,
            "feedforward": feedforward, "dropout": dropout,
        }  # fmt: skip
        check_bounds(self.settings)
        if min(features, hidden, layers, heads, feedforward) < 1 or hidden % heads or not 0 <= dropout < 1:
            raise ValueError(
                f"features, hidden, layers, heads are {features}, {hidden}, {layers}, {heads}; all must be at least 1 "
                f"and heads must divide hidden; dropout is {dropout}, which must be at least 0 and below 1"
            )
        self.input = nn.Linear(features, hidden)
        self.blocks = nn.ModuleList(_Block(hidden, heads, feedforward, dropout) for _ in range(layers))
        self.output_norm = nn.LayerNorm(hidden)
        # No bias: every list loss ignores a shift of all scores, so nothing would ever train it.
        self.output = nn.Linear(hidden, 1, bias=False)

    def forward(
        self,
        features: Tensor,  # (B, K, F)
        mask: Tensor | None = None,  # (B, K) bool
    ) -> Tensor:  # (B, K)
        """Score lists.

        Args:
            features: (B, K, F); what stands in masked places is ignored, NaN included.
            mask: (B, K), true where an item exists.

        Returns:
            Scores (B, K), finite everywhere and 0 in masked places; also for a list without items.

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
        return self.output(self.output_norm(x))[..., 0].masked_fill(~exists, 0.0)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` and `model.json` into a folder."""
        _save(self, {"kind": "ListTransformer", "network": self.settings}, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> ListTransformer:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: If the folder holds no model.
            ValueError: If it holds a model of another kind, or is damaged.
        """
        return _load(directory, "ListTransformer", _ListTransformerRecord, lambda record, _: cls(**record["network"]))


@renamed_in_methods("__init__", temperature="takes_beta")
@dataclass(frozen=True)
class RankingModelConfig:
    """Settings of a `RankingModel`.

    Args:
        features: F.
        objectives: Names of the m auxiliary objectives.
        hidden: Width of the network.
        layers: Number of its blocks.
        heads: Its attention heads.
        feedforward: Width of its feed-forward layers; `hidden` by default.
        dropout: Probability of dropout.
        parametrisation: `"scratch"`: the network gives the scores; `"augment"`: it gives what is added to the base
            model's scores, and starts at 0 (COS-DPO, appendix A.6.3).
        conditioned: Whether weights are appended to the features; false for a model of one fixed trade-off.
        takes_beta: Whether β / ‖β‖₁ is appended too.
    """

    features: int
    objectives: tuple[str, ...]
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    feedforward: int | None = None
    dropout: float = 0.0
    parametrisation: Parametrisation = "scratch"
    conditioned: bool = True
    takes_beta: bool = False

    temperature = renamed_attribute("RankingModelConfig.temperature", "takes_beta")

    def __post_init__(self) -> None:
        check_bounds(self)
        check_choice(self.parametrisation, PARAMETRISATIONS, "parametrisation")
        if self.takes_beta and not self.conditioned:
            raise ValueError("takes_beta=True needs conditioned=True: β is appended beside the weights")


@renamed_in_methods("forward", "score", temperature="beta")
class RankingModel(nn.Module):
    """A ranker that takes the trade-off as an input, together with the frozen base model that it stays close to.

    The weights (and β / ‖β‖₁) are appended to the features of every item, so the network has exactly
    m × hidden (2 m × hidden) parameters more than one without them (COS-DPO, section 4.1).

    Args:
        config: Settings.
        base: The base model, frozen here; its scores are the reference s0.
    """

    def __init__(self, config: RankingModelConfig, base: ListTransformer) -> None:
        super().__init__()
        if base.settings["features"] != config.features:
            raise ValueError(
                f"the base model was trained on {counted(base.settings['features'], 'feature')} but the data has "
                f"{config.features}; train a base model on this data"
            )
        self.config = config
        self.condition = (
            ConcatCondition(len(config.objectives), takes_beta=config.takes_beta) if config.conditioned else None
        )
        extra = 0 if self.condition is None else self.condition.extra_features
        self.network = ListTransformer(
            config.features + extra, config.hidden, config.layers, config.heads, config.feedforward, config.dropout
        )
        if extra:
            # Weights on a simplex are small beside normalised features; with the usual initialisation a change of the
            # trade-off would hardly move the first layer, and training would learn the average trade-off first.
            nn.init.normal_(self.network.input.weight[:, config.features :])
        if config.parametrisation == "augment":
            nn.init.zeros_(self.network.output.weight)  # training starts at the base model
        self.base = base.requires_grad_(False)

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters: the network without the frozen base model."""
        return sum(p.numel() for p in self.network.parameters())

    def train(self, mode: bool = True) -> RankingModel:
        """Set the mode of the network; the frozen base model stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def reference(self, features: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, K, F) -> (B, K)
        """Return the base model's scores s0, (B, K), without a gradient."""
        with torch.no_grad():
            return self.base(features, mask)

    def forward(
        self,
        features: Tensor,  # (B, K, F)
        weights: Tensor | None = None,  # (m,) or (B, m)
        *,
        beta: Tensor | None = None,  # (m,) or (B, m)
        mask: Tensor | None = None,  # (B, K) bool
        reference: Tensor | None = None,  # (B, K)
    ) -> Tensor:  # (B, K)
        """Return the scores that the training loss sees.

        Args:
            features: (B, K, F).
            weights: w on the simplex; required if and only if the model is conditioned.
            beta: β; only β / ‖β‖₁ reaches the network. Required if and only if it is conditioned on it.
            mask: (B, K), true where an item exists.
            reference: s0, if it is known already; it is computed where it is needed otherwise.

        Returns:
            Scores (B, K), 0 in masked places. A model conditioned on β gives the raw output of equation (15), the
            scores at a β that sums to 1; `score` gives those at β itself.

        Raises:
            ValueError: If weights or β are missing, not expected or of a wrong shape.
        """
        if self.condition is not None:
            if weights is None:
                raise ValueError(f"weights are missing; pass one for each of {', '.join(self.config.objectives)}")
            inputs = self.condition(features, weights, beta)
        elif beta is not None:
            raise ValueError("beta was passed to a model that is not conditioned on it")
        else:
            inputs = features
        scores = self.network(inputs, mask)
        if self.config.parametrisation == "scratch":
            return scores
        return scores + (self.reference(features, mask) if reference is None else reference)

    @torch.no_grad()
    def score(
        self,
        features: Tensor,  # (B, K, F)
        weights: Tensor | Sequence[float] | None = None,  # (m,) or (B, m)
        *,
        scale: float = 1.0,
        beta: Tensor | None = None,  # (m,) or (B, m)
        mask: Tensor | None = None,  # (B, K) bool
        reference: Tensor | None = None,  # (B, K)
    ) -> Tensor:  # (B, K)
        """Return the scores to rank by, with both knobs of post-training control.

        Args:
            features: (B, K, F).
            weights: w on the simplex, a tensor or numbers.
            scale: c of equation (14): above 1 closer to the base model, below 1 further away.
            beta: β, for a model conditioned on it (equation 15).
            mask: (B, K), true where an item exists.
            reference: s0, if it is known already.

        Returns:
            Scores (B, K); -inf in masked places.
        """
        kind = self.network.input.weight.dtype
        if features.dtype != kind and not torch.is_autocast_enabled(features.device.type):
            raise ValueError(f"features is {features.dtype} but must be {kind}, as the model; pass features.to({kind})")
        check_positive(scale, "scale", "above 1 is closer to the base model")
        if weights is not None and self.condition is not None:
            if not isinstance(weights, Tensor) or readable(weights):
                weights = check_weights(weights, len(self.config.objectives))
            weights = weights.to(features)
        reference = self.reference(features, mask) if reference is None else reference
        scores = self(features, weights, beta=beta, mask=mask, reference=reference)
        if beta is not None:
            scores = steering.beta_conditioned(scores, reference, beta)
        return steering.rescale(scores, reference, scale, mask=mask)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` (network and base model) and `model.json` into a folder."""
        network = dataclasses.asdict(self.config)
        network["temperature"] = network.pop("takes_beta")  # its first name, which the file keeps
        _save(self, {"kind": "RankingModel", "network": network, "base": self.base.settings}, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> RankingModel:
        """Load a model from a run directory or any folder that `save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: If the folder holds no model.
            ValueError: If it holds a model of another kind, or is damaged.
        """

        def make(record: dict[str, Any], file: Path) -> RankingModel:
            network = dict(record["network"])
            if "temperature" in network:
                network["takes_beta"] = network.pop("temperature")
            settings = settings_from(RankingModelConfig, network, file, "network")
            return cls(settings, ListTransformer(**record["base"]))

        return _load(directory, "RankingModel", _RankingModelRecord, make)


def _save(model: nn.Module, config: dict[str, Any], directory: str | os.PathLike[str]) -> None:
    require("safetensors", extra="demo")
    from safetensors.torch import save_model

    def fill(folder: Path) -> None:
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_model(model, str(folder / WEIGHTS_FILE))

    write_files(directory, fill, last=WEIGHTS_FILE)


class _Network(msgspec.Struct, forbid_unknown_fields=True):
    """What `model.json` says of a `ListTransformer`."""

    features: int
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    feedforward: int | None = None
    dropout: float = 0.0


class _ListTransformerRecord(msgspec.Struct):
    network: _Network


class _RankingModelRecord(msgspec.Struct):
    network: dict[str, Any]
    base: _Network


def _load(directory: str | os.PathLike[str], kind: str, schema: type, make: Callable[[dict[str, Any], Path], T]) -> T:
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
