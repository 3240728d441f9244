"""How a causal language model takes rows of text: padded on either side, packed, as embeddings; measured on the model.

Families differ in what they make of a padded or packed row. Some count positions from the left edge, padding included;
some start them behind the number of the padding token; convolutions and recurrences run on through padding or from one
packed sequence into the next; some take positions and never look at them. No configuration says so. But every model
says what a row means: its outputs for that row alone. So the first time a model meets a kind of rows, two short ones go
through it alone and then in that arrangement (`probe.py`), in each way of saying it that transformers knows
(`styles.py`), and the first way that gives the outputs of the rows alone is used from then on. Where none does, the
arrangement is refused: a model is never scored wrongly.

What was found is kept on the model as plain values, so that it goes with deep copies and pickles. It depends on nothing
that training changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopl._rows.probe import measured
from mopl._rows.styles import Finding, Style, UnsupportedModelError, embedding_of, packed_keywords, positions_of
from mopl._sharded import whole_shape

__all__ = [
    "UnsupportedModelError", "arranged", "check_from_zero", "check_rows", "generation_keywords", "takes_left_padding",
]  # fmt: skip

_CACHE = "_mopl_rows"


def arranged(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a forward pass, changed so that each row has the outputs that it has alone.

    Positions count from 0, as everywhere in this package. Without a mask, a row with positions is packed: they start
    again at 0 with each sequence.

    Raises:
        UnsupportedModelError: If the model cannot take such rows.
        ValueError: If a mask has holes, or there is one and positions start again inside of what it shows.
    """
    embeds = kwargs.get("inputs_embeds") is not None
    content = kwargs.get("inputs_embeds" if embeds else "input_ids")
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if (
        not isinstance(content, Tensor)
        or not _measurable(model)
        or any(given is not None and given.ndim != 2 for given in (mask, positions))
    ):
        return kwargs
    without_positions = {name: value for name, value in kwargs.items() if name != "position_ids"}
    if mask is None:
        if positions is None or kwargs.get("past_key_values") is not None:
            _style(model, "alone", embeds)
            return kwargs
        if content.shape[0] != 1:
            if bool(_starts_again(positions).any()):
                style = _style(model, "packed rows", embeds)
                return without_positions | packed_keywords(model, style, positions)
            mask = torch.ones_like(positions).expand(content.shape[:2])
            told = _told(model, _style(model, "positioned", embeds), mask, positions)
            return without_positions | ({} if told is None else {"position_ids": told})
        if finding(model, "packed", embeds=embeds).style is None and not bool((positions[:, 1:] == 0).any()):
            return without_positions  # one sequence only
        without_positions.pop("attention_mask", None)
        style = _style(model, "packed", embeds)
        if style.packed in ("masks", "block"):
            without_positions |= _without_router_loss(model, kwargs)
        return without_positions | packed_keywords(model, style, positions)
    _check_holes(mask)
    if positions is not None:
        _check_one_text(mask[:, -content.shape[1] :], positions)
    style = _style(model, "padded" if positions is None else "positioned", embeds, mask)
    told = _told(model, style, mask, positions, content.shape[1])
    return without_positions if told is None else {**kwargs, "position_ids": told}


def check_rows(model: Any, *, packed: bool = False, virtual: bool = False, generates: bool = False) -> None:
    """Raise before a run is made where its rows would be refused in it, with the reason and the remedy.

    Rows are `packed`, or padded on the right; with `virtual` tokens in front, without which the model is its own
    reference.

    Raises:
        UnsupportedModelError: If one of them would be.
    """
    weight = embedding_of(model).weight
    if not _measurable(model) or weight.shape != whole_shape(weight):
        return  # measured in the first forward pass, which brings the weights
    of_rows = "packed" if packed else "positioned" if virtual else "padded"
    rows = [(of_rows, False), (of_rows, True)][: 1 + virtual]
    for kind, embeds in rows + [("generate", virtual)] * generates:
        _style(model, kind, embeds)


def generation_keywords(model: Any, attention_mask: Tensor, *, embeds: bool = False) -> dict[str, Tensor]:
    """Return what `generate` of transformers must be told besides a mask (B, T): nothing, or positions.

    Raises:
        UnsupportedModelError: If `generate` would not continue each row as it does alone.
    """
    if not _measurable(model):
        return {}
    first = _style(model, "generate", embeds, attention_mask).first
    return {} if first is None else {"position_ids": positions_of(attention_mask) + first}


def takes_left_padding(model: Any, *, embeds: bool = False) -> bool:
    """Say whether prompts of different lengths can be continued at once, or only one by one."""
    return not _measurable(model) or finding(model, "generate", embeds=embeds).left


def check_from_zero(model: Any) -> None:
    """Raise where positions that are passed with a text do not count from 0, so that nothing can stand at none."""
    if _measurable(model) and finding(model, "positioned", embeds=True).style != Style(first=0):
        raise ValueError(
            f"positions='paper' needs positions that count from 0, which those of {type(model).__name__} do not; "
            "use positions='hf'"
        )


def finding(model: Any, kind: str, *, embeds: bool = False) -> Finding:
    """Return what is known of an arrangement, measuring it the first time; with `embeds` texts come as embeddings.

    Kinds are `"alone"`, `"padded"` (a mask alone), `"positioned"` (a mask and positions), `"packed"` (one row),
    `"packed rows"` (several), `"generate"`.
    """
    key = (kind, embeds, getattr(model.config, "_attn_implementation", None), embedding_of(model).weight.device.type)
    known: dict[Any, Finding] | None = getattr(model, _CACHE, None)  # torch.compile of 2.11 follows no `setdefault`
    if known is None:
        known = model.__dict__[_CACHE] = {}
    if key not in known:
        known[key] = measured(model, kind, embeds)
    return known[key]


def _style(model: Any, kind: str, embeds: bool, mask: Tensor | None = None) -> Style:
    """Return how an arrangement is said; raise where it cannot be, or not with the padding that a mask has."""
    found = finding(model, kind, embeds=embeds)
    if found.style is None or (mask is not None and not found.left and bool((mask[:, 0] == 0).any())):
        raise UnsupportedModelError(f"{type(model).__name__} {found.reason}")
    return found.style


def _told(model: Any, style: Style, mask: Tensor, positions: Tensor | None, length: int | None = None) -> Tensor | None:
    """Return the positions of the last `length` tokens as a call says them, or None where it says none."""
    length = mask.shape[1] if length is None else length
    counted = positions_of(mask)[:, -length:]
    if style.first is not None:
        return (counted if positions is None else positions) + style.first
    if positions is not None and bool((positions.expand_as(counted) != counted)[mask[:, -length:] > 0].any()):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not heed position_ids; leave them out, and its own count is used"
        )
    return None


def _without_router_loss(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leave a router's loss out where a mask says how a row is packed; raise where a call asks for it.

    Models of transformers count tokens in the mask that they were called with, which must be (B, T) then.
    """
    if kwargs.get("output_router_logits"):
        raise UnsupportedModelError(
            f"{type(model).__name__} computes no router loss of packed rows, which it is told by masks of its own; "
            "pass router_aux_loss_coef=0.0, or leave packing off (padding_free=False)"
        )
    takes = getattr(model.config.get_text_config(), "output_router_logits", False)
    return {"output_router_logits": False} if takes else {}


def _check_holes(mask: Tensor) -> None:
    """Raise where tokens are masked between others: what predicts the one behind them is nothing that is there."""
    begins = (mask[:, 1:] > mask[:, :-1]).sum(-1) + (mask[:, 0] > 0)
    _check(
        begins <= 1,
        "attention_mask has holes, zeros between ones; take the tokens out of the row and mask padding only",
    )


def _starts_again(positions: Tensor) -> Tensor:  # (B, T) -> (B, T - 1)
    return (positions[:, 1:] == 0) & (positions[:, :-1] > 0)


def _check_one_text(mask: Tensor, positions: Tensor) -> None:
    """Raise where a row is packed and has a mask: it would let each of its sequences see those before it."""
    seen = (mask[:, 1:] > 0) & (mask[:, :-1] > 0)
    _check(
        ~(_starts_again(positions.to(mask.device)) & seen),
        "position_ids start again inside a row that has an attention_mask, by which its sequences would see one "
        "another; leave attention_mask out of packed rows",
    )


def _check(right: Tensor, message: str) -> None:
    if right.device.type == "cuda":
        torch._assert_async(right.all(), message)  # type: ignore[attr-defined]  # raises without a wait
    elif not bool(right.all()):
        raise ValueError(message)


def _measurable(model: Any) -> bool:
    """Say whether a model has weights to measure: not on the meta device."""
    embedding = embedding_of(model) if hasattr(model, "get_input_embeddings") else None
    return embedding is not None and hasattr(embedding, "weight") and not embedding.weight.is_meta
