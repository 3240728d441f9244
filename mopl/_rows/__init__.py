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
    "UnsupportedModelError", "arranged", "check_from_zero", "check_rows", "check_sequences", "generation_keywords",
    "lengths_that_turn", "takes_left_padding",
]  # fmt: skip

_CACHE = "_mopl_rows"


def arranged(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a forward pass, changed so that each row has the outputs that it has alone.

    Positions count from 0, as everywhere in this package. Without a mask, a row with positions is packed: they start
    again at 0 with each sequence.

    Raises:
        UnsupportedModelError: If the model cannot take such rows.
        ValueError: If a mask has holes or other values than 0 and 1, or there is one and positions start again inside
            of what it shows; or there is none, and positions neither go on by 1 nor start again at 0.
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
            _check_lengths(model, torch.ones(content.shape[:2]))
            return kwargs
        _check_counting(positions)
        _check_lengths(model, positions=positions)
        if content.shape[0] != 1:
            if bool((positions[:, 1:] == 0).any()):
                style = _style(model, "packed rows", embeds)
                return without_positions | packed_keywords(model, style, positions.expand(content.shape[:2]))
            mask = torch.ones_like(positions).expand(content.shape[:2])
            told = _told(model, _style(model, "positioned", embeds), mask, positions)
            return without_positions | ({} if told is None else {"position_ids": told})
        found = finding(model, "packed", embeds=embeds).style
        if (found is None or found.first is None) and bool((positions[:, 0] != 0).any()):
            raise _unheeded(model)
        if found is None and not bool((positions[:, 1:] == 0).any()):
            return without_positions  # one sequence only
        without_positions.pop("attention_mask", None)
        style = _style(model, "packed", embeds)
        if style.packed in ("masks", "block"):
            without_positions |= _without_router_loss(model, kwargs)
        return without_positions | packed_keywords(model, style, positions)
    _check_mask(mask)
    if positions is not None:
        _check_one_text(mask[:, -content.shape[1] :], positions, embeds)
    style = _style(model, "padded" if positions is None else "positioned", embeds, mask)
    told = _told(model, style, mask, positions, content.shape[1])
    _check_lengths(model, mask, positions, counted=told is not None)
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
    _check_lengths(model, attention_mask, generates=True)
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
    known = _known(model)
    if key not in known:
        known[key] = measured(model, kind, embeds)
    return known[key]


def _known(model: Any) -> dict[Any, Any]:
    """Return what has been found out about a model."""
    if not hasattr(model, _CACHE):  # torch.compile of 2.11 follows no `setdefault`
        model.__dict__[_CACHE] = {}
    return getattr(model, _CACHE)


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
        raise _unheeded(model)
    return None


def _unheeded(model: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} does not heed position_ids; leave them out, and its own count is used"
    )


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


def check_sequences(segment: Tensor, positions: Tensor) -> None:
    """Raise unless positions count each sequence of packed rows from 0.

    Args:
        segment: (N, T), the number of each token's sequence; below 0 in padding.
        positions: (N, T) or (1, T).

    Raises:
        ValueError: If they start again elsewhere than the numbers change, or a number stands for two sequences.
    """
    positions, before = positions.to(segment.device).expand_as(segment), segment.roll(1, -1)
    begins, there = segment != before, segment >= 0
    begins[:, :1] = True
    _check(
        (positions == torch.where(begins, 0, positions.roll(1, -1) + 1)) | ~there,
        "position_ids and segment do not part a packed row in the same places; let position_ids start again at 0, and "
        "count on by 1, with each sequence that segment numbers",
    )
    ordered = segment.flatten().sort().values
    others = (ordered[1:] != ordered[:-1]) & (ordered[1:] >= 0)
    _check(
        (begins & there).sum() == others.sum() + (ordered[:1] >= 0).sum(),
        "segment has one number for several sequences, whose scores would be one sum; number the sequences of all rows "
        "of a batch 0, 1, 2, ...",
    )


def _check_lengths(
    model: Any,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    counted: bool = True,
    generates: bool = False,
) -> None:
    """Raise where the positions of a text are turned as another text has it, in the same call or before.

    Frequencies of the kind "longrope" are those of the longest text of a call. Those of "dynamic" are, too, and from
    some length on they stay what the longest text before has made of them.

    Args:
        model: The causal language model.
        mask: (B, T); None for packed rows.
        positions: (B, T) or (1, T), counted from 0; as the mask counts them if None.
        counted: Whether the model counts what the mask shows, and not padding, too.
        generates: Whether `generate` is called, whose positions are its own.
    """
    if not (limits := lengths_that_turn(model)):
        return
    if mask is None:
        assert positions is not None
        ends = torch.nn.functional.pad(positions[:, 1:] == 0, (0, 1), value=True)
        lengths = (positions + 1).masked_fill(~ends, 0)
    else:
        own = positions_of(mask) if positions is None else positions
        lengths = ((own + 1) * (mask[:, -own.shape[1] :].to(own.device) > 0)).amax(-1)
    longest = lengths.max() if counted or mask is None else lengths.new_tensor(mask.shape[1])
    for kind, limit in limits:
        if kind == "longrope":
            same, remedy = (
                lengths > limit,
                f"pass longer texts one at a time (batch size 1, no packing), or cut all to {limit}",
            )
        else:
            same, remedy = (lengths == longest) & generates, f"cut all to {limit}"
        _check(
            (longest <= limit) | same | (lengths == 0),
            f"{type(model).__name__} has rotary positions of the kind {kind!r}, whose frequencies are others for all "
            f"texts once one is longer than {limit} tokens; {remedy} tokens",
        )


def lengths_that_turn(model: Any) -> list[tuple[str, int]]:
    """Return the kinds of rotary positions that change with the length of a text, and beyond which length they do."""
    known = _known(model)
    if "limits" not in known:
        found: set[tuple[str, int]] = set()
        for module in model.modules():
            kinds = getattr(module, "rope_type", None)
            for layer, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
                if kind == "longrope":
                    settings = module.config.rope_parameters
                    settings = settings if layer is None else settings[layer]
                    found.add((kind, int(settings["original_max_position_embeddings"])))
                elif kind == "dynamic":
                    found.add((kind, int(module.original_max_seq_len)))
        known["limits"] = sorted(found)
    return known["limits"]


def _check_mask(mask: Tensor) -> None:
    """Raise where tokens are masked between others: what predicts the one behind them is nothing that is there."""
    begins = (mask[:, 1:] > mask[:, :-1]).sum(-1) + (mask[:, 0] > 0)
    _check(
        begins <= 1,
        "attention_mask has holes, zeros between ones; take the tokens out of the row and mask padding only",
    )
    if mask.dtype != torch.bool:
        _check(
            (mask == 0) | (mask == 1),
            "attention_mask has values other than 0 and 1, which models take for 1; pass 1 for tokens and 0 for "
            "padding, and say where the sequences of packed rows part by position_ids and segment, without a mask",
        )


def _check_counting(positions: Tensor) -> None:
    """Raise where a row without a mask goes on at another position, which families read in different ways."""
    after, before = positions[:, 1:], positions[:, :-1]
    _check(
        (after == before + 1) | (after == 0),
        "position_ids of rows without attention_mask neither go on by 1 nor start again at 0; count each sequence of a "
        "packed row from 0, or pass the attention_mask of padded rows",
    )


def _check_one_text(mask: Tensor, positions: Tensor, embeds: bool) -> None:
    """Raise where a row is packed and has a mask: it would let each of its sequences see those before it."""
    seen = (mask[:, 1:] > 0) & (mask[:, :-1] > 0)
    after, before = positions[:, 1:], positions[:, :-1]
    # Virtual tokens, which are embeddings, may all stand at 0 in front of a text.
    again = (after <= before) & (after >= 0) & (before >= int(embeds))
    _check(
        ~(again.to(mask.device) & seen),
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
