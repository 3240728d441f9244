"""The ways of telling a model of transformers how rows are arranged."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require

# Names that models of transformers give to the module that embeds absolute positions.
POSITION_EMBEDDINGS = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed")


class UnsupportedModelError(RuntimeError):
    """A model does something that cannot be reproduced exactly."""


@dataclass(frozen=True)
class Style:
    """One way of saying how rows are arranged.

    A packed row has `"positions"` that start again alone, `"varlen"` keywords of flash-attention and of state-space
    kernels beside them, transformers' own `"masks"` of each kind of layer, or a `"block"` diagonal mask (1, 1, N, N).
    """

    first: int | None = None  # the position of a row's first token, passed as `position_ids`; None: none are passed
    packed: str | None = None


@dataclass(frozen=True)
class Finding:
    """What became of an arrangement."""

    style: Style | None  # how it is said; None if it cannot be
    left: bool = True  # whether rows may be padded on the left
    reason: str = ""  # why not, where something is refused


def embedding_of(model: Any) -> Any:
    """Return the module that embeds tokens."""
    return model.get_input_embeddings()


def compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype that a model computes in: that of its embeddings, or of autocast."""
    weight = embedding_of(model).weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def positions_of(mask: Tensor) -> Tensor:
    """Return positions (B, T) of the tokens that a mask (B, T) shows, counted from 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def packed_keywords(model: Any, style: Style, positions: Tensor) -> dict[str, Any]:
    """Return the keywords that tell a model about the sequences of a packed row, with positions (1, N) from 0."""
    keywords: dict[str, Any] = {} if style.first is None else {"position_ids": positions + style.first}
    segment = (positions[0] == 0).cumsum(-1) - 1
    if style.packed == "varlen":
        starts = torch.nn.functional.pad(positions[0, 1:] == 0, (1, 0), value=True).nonzero()[:, 0]
        ends = torch.cat([starts, starts.new_tensor([positions.shape[1]])]).int()
        longest = int(ends.diff().max())
        keywords |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        keywords["seq_idx"] = segment[None].int()
    elif style.packed in ("masks", "block"):
        weight, dtype = embedding_of(model).weight, compute_dtype(model)
        if style.packed == "masks":
            require("transformers")
            from transformers import masking_utils

            known = {
                "config": model.config.get_text_config(), "attention_mask": None, "past_key_values": None,
                "position_ids": positions, "inputs_embeds": weight.new_empty(1, positions.shape[1], 0, dtype=dtype),
            }  # fmt: skip
            keywords["attention_mask"] = {
                "full_attention": masking_utils.create_causal_mask(**known),
                "sliding_attention": masking_utils.create_sliding_window_causal_mask(**known),
            }
        else:
            unseen = ~(segment[:, None] == segment).tril().to(weight.device)
            seen = torch.zeros(unseen.shape, dtype=dtype, device=weight.device)
            keywords["attention_mask"] = seen.masked_fill(unseen, torch.finfo(dtype).min)[None, None]
    return keywords


def styles(model: Any, kind: str) -> list[Style]:
    """Return the ways to try, those of today's transformers first."""
    takes = "position_ids" in inspect.signature(type(model).forward).parameters
    starts = [0, *_padding_offset(model)] if takes else []
    if kind in ("padded", "generate"):
        return [Style(), *(Style(first) for first in starts if kind == "padded" or first)]
    if kind == "positioned":
        return [*(Style(first) for first in starts), Style()]
    if kind == "packed rows":  # several at once: other ways say where the sequences of one row are
        return [Style(first, "positions") for first in starts]
    ways = [Style(first, way) for way in ("positions", "varlen", "masks", "block") for first in starts or [None]]
    return [*ways, Style(None, "block")] if takes else [way for way in ways if way.packed != "positions"]


def _padding_offset(model: nn.Module) -> list[int]:
    """Return where positions may start that come behind the padding token's number (RoBERTa and its like)."""
    found = set()
    for name, module in model.named_modules():
        padding: Any = getattr(module, "padding_idx", None)
        if name.rpartition(".")[2] in POSITION_EMBEDDINGS and padding is not None:
            found.add(int(padding) + 1)
    return sorted(found)
