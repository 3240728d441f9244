"""Batches of whole lists: tokens for the model, labels and masks for the losses, and how scores become lists.

A batch has N sequences of B lists, K_b of list b, in the order of the lists and of their responses. The tokens go to
`score_sequences(model, batch.inputs)`, whose scores (N,) become (B, K) through `to_lists(scores, batch)`; from there on
every loss is the same as for ranking.

Missing labels are masked, never guessed. `labels` are 0 where no label is, and

* `objective_mask` (B, m) is false where an objective has no say in a list. Multiply the weights by it:
  `loss(scores, batch.labels, weights=weights * batch.objective_mask)`. Its loss and gradient are then exactly 0 in
  every loss; in those that normalise labels by their sum they are 0 without it.
* An objective that labels only some responses of a list cannot share the list's mask. `partial="drop"` (the default)
  treats it as missing in that list; `partial="keep"` keeps its labels, and `by_objective` gives every objective of
  every list as a list of its own, over the labelled responses only. Labels that were kept must go through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mopl._arguments import check_choice, shape_of
from mopl.language_models.tokenization import TokenizedList
from mopl.training.batches import to_device

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class ListBatch:
    """B whole lists; masked places hold zeros.

    Attributes:
        inputs: what `score_sequences` takes. Padded: `input_ids`, `labels` (-100 on prompt and padding) and
            `attention_mask`, int64 (N, T), with `position_ids` if padded on the left. Packed: `input_ids`, `labels`,
            `position_ids` (restarting with each sequence) and `segment` (the number of each token's sequence), int64
            (1, T), and the number `sequences` = N, so that nothing waits for a GPU to count them.
        labels: (B, m, K) float32 preference labels, 0 where missing.
        mask: (B, K) bool, true where a response exists.
        label_mask: (B, m, K) bool, true where a label counts.
        objective_mask: (B, m) bool, true where an objective counts in a list.
        index: (N, 2) int64, the list in the batch and the place in it of each sequence.
        lists: (B,) int64, which lists of the data these are.
        order: (B, m, K) int64, responses sorted by label, best first, equal labels in the order of the data, then those
            without a label, then masked places; None unless asked for.
    """

    inputs: dict[str, Any]
    labels: Tensor  # (B, m, K)
    mask: Tensor  # (B, K)
    label_mask: Tensor  # (B, m, K)
    objective_mask: Tensor  # (B, m)
    index: Tensor  # (N, 2)
    lists: Tensor  # (B,)
    order: Tensor | None = None  # (B, m, K)

    def __len__(self) -> int:
        return self.mask.shape[0]

    def to(self, device: torch.device | str) -> ListBatch:
        """Return the batch on `device`."""
        return ListBatch(**to_device(vars(self), device))


def to_lists(scores: Tensor, batch: ListBatch) -> Tensor:
    """Arrange scores of sequences as lists.

    Args:
        scores: (N,), one a sequence of the batch, any floating-point dtype.
        batch: the batch.

    Returns:
        (B, K), 0 where `batch.mask` is false; differentiable.

    Raises:
        ValueError: if there is not one score a sequence.
    """
    count = batch.index.shape[0]
    if scores.shape != (count,):
        raise ValueError(f"scores has shape {shape_of(scores)} but the batch has {count} sequences; pass ({count},)")
    lists, width = batch.mask.shape
    # Every place is written at most once, so this needs no atomics and its backward is a plain gather.
    flat = (batch.index[:, 0] * width + batch.index[:, 1]).to(scores.device)
    return scores.new_zeros(lists * width).index_copy(0, flat, scores).view(lists, width)


def by_objective(scores: Tensor, batch: ListBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Give every objective of every list as a list of its own, with the labelled responses only.

    Exact for every loss, whatever labels are missing. The loss of the three has shape (B m, 1); `.view(B, m)` is the
    loss vector. Temperatures and weights (B, m) go in as `.reshape(B * m, 1)`, references (B, K) through this function.

    Args:
        scores: (B, K).
        batch: the batch; one that was collated with `partial="keep"` has all labels.

    Returns:
        scores (B m, K), labels (B m, 1, K), mask (B m, K).

    Raises:
        ValueError: if scores are not (B, K).
    """
    if scores.shape != batch.mask.shape:
        raise ValueError(f"scores has shape {shape_of(scores)} but must be {shape_of(batch.mask)}; see to_lists")
    lists, objectives, width = batch.labels.shape
    repeated = scores[:, None].expand(lists, objectives, width).reshape(-1, width)
    return repeated, batch.labels.reshape(-1, 1, width), batch.label_mask.reshape(-1, width)


class ListCollator:
    """Makes batches of tokenised lists; the `collate_fn` of a DataLoader, too.

    Args:
        packed: one row without padding in place of one row a sequence. Attention must keep sequences apart by
            `position_ids`, as transformers does for batches of one row without `attention_mask`.
        padding_side: "right" or "left".
        pad_id: token of the padding, which is masked; `ListTokenizer.pad_id`.
        pad_to_multiple_of: pad rows to a multiple of this many tokens.
        partial: what becomes of objectives that label only a part of a list: "drop" or "keep"; see the module's text.
        order: give the presorted order of each objective with every batch.
        width: pad lists to this many responses; default the longest list of the batch.

    Raises:
        ValueError: if an option is unknown, or packing is asked for together with padding.
    """

    def __init__(
        self,
        *,
        packed: bool = False,
        padding_side: Literal["right", "left"] = "right",
        pad_id: int = 0,
        pad_to_multiple_of: int | None = None,
        partial: Literal["drop", "keep"] = "drop",
        order: bool = False,
        width: int | None = None,
    ) -> None:
        check_choice(padding_side, ("right", "left"), "padding_side")
        check_choice(partial, ("drop", "keep"), "partial")
        if packed and (pad_to_multiple_of is not None or padding_side != "right"):
            raise ValueError("packed batches have no padding; leave out pad_to_multiple_of and padding_side")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of} but must be at least 1")
        self.packed, self.padding_side, self.pad_id = packed, padding_side, pad_id
        self.pad_to_multiple_of, self.partial, self.order, self.width = pad_to_multiple_of, partial, order, width

    def __call__(self, lists: Sequence[TokenizedList]) -> ListBatch:
        """Make a batch of these lists.

        Raises:
            ValueError: if there is no list, their numbers of objectives differ, or one has more than `width` responses.
        """
        if len(lists) == 0:
            raise ValueError("there is no list to make a batch of; take fewer parts than lists")
        objectives = {item.labels.shape[0] for item in lists}
        if len(objectives) > 1:
            raise ValueError(f"lists of one batch have {sorted(objectives)} objectives; collate lists of one data set")
        longest = max(len(item.responses) for item in lists)
        width = longest if self.width is None else self.width
        if longest > width:
            raise ValueError(f"a list has {longest} responses but width is {width}; pass width={longest} or None")
        labels = np.full((len(lists), objectives.pop(), width), np.nan, dtype=np.float32)
        mask = np.zeros((len(lists), width), dtype=bool)
        for number, item in enumerate(lists):
            labels[number, :, : len(item.responses)] = item.labels
            mask[number, : len(item.responses)] = True
        label_mask = ~np.isnan(labels)
        enough = label_mask.sum(-1) >= 2  # one labelled response alone prefers nothing
        if self.partial == "drop":
            enough &= (label_mask == mask[:, None]).all(-1)
        label_mask &= enough[..., None]
        # Infinity sorts what has no label after every label; padding stays behind it because the sort is stable.
        order = np.argsort(np.where(label_mask, -labels, np.inf), axis=-1, kind="stable") if self.order else None
        index = [(number, slot) for number, item in enumerate(lists) for slot in range(len(item.responses))]
        pairs = [(lists[number].prompt_of(slot), lists[number].responses[slot]) for number, slot in index]
        left, multiple = self.padding_side == "left", self.pad_to_multiple_of or 1
        return ListBatch(
            inputs=packed(pairs) if self.packed else padded(pairs, self.pad_id, left=left, multiple=multiple),
            labels=torch.from_numpy(np.where(label_mask, labels, np.float32(0))),
            mask=torch.from_numpy(mask),
            label_mask=torch.from_numpy(label_mask),
            objective_mask=torch.from_numpy(enough),
            index=torch.tensor(index, dtype=torch.long),
            lists=torch.tensor([item.index for item in lists], dtype=torch.long),
            order=None if order is None else torch.from_numpy(order),
        )


def token_batches(lists: Sequence[TokenizedList], budget: int, *, padded: bool) -> list[np.ndarray]:
    """Return which lists make up each batch: whole lists of like length, as many as fit a budget of tokens.

    Args:
        lists: the tokenised lists; only their lengths are read.
        budget: most tokens of a batch; a longer list is a batch of its own.
        padded: count what padding adds: number of sequences times the longest one.

    Returns:
        int64 arrays of places in `lists`, each of which is in one of them.

    Raises:
        ValueError: if the budget is below 1.
    """
    if budget < 1:
        raise ValueError(f"budget is {budget} but must be at least 1 token")
    lengths = [item.lengths for item in lists]
    batches: list[list[int]] = []
    sequences = tokens = 0
    for place in sorted(range(len(lists)), key=lambda place: lengths[place].max()):
        own = lengths[place]
        sequences, tokens = sequences + len(own), tokens + own.sum()
        if not batches or (sequences * own.max() if padded else tokens) > budget:
            batches.append([])
            sequences, tokens = len(own), own.sum()
        batches[-1].append(place)
    return [np.array(batch) for batch in batches]


Pair = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]  # the tokens of a prompt and of a response


def padded(
    sequences: Sequence[Pair], pad: int, *, left: bool = False, multiple: int = 1, length: int = 0
) -> dict[str, Tensor]:
    """Return the inputs of `score_sequences`, a row a sequence, at least `length` long; see `ListBatch`."""
    length = max(length, *(len(prompt) + len(response) for prompt, response in sequences))
    length = -(-length // multiple) * multiple
    input_ids = np.full((len(sequences), length), pad, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    attention_mask = np.zeros_like(input_ids)
    for row, (prompt, response) in enumerate(sequences):
        used = len(prompt) + len(response)
        start = length - used if left else 0
        input_ids[row, start : start + len(prompt)] = prompt
        input_ids[row, start + len(prompt) : start + used] = response
        labels[row, start + len(prompt) : start + used] = response
        attention_mask[row, start : start + used] = 1
    arrays = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    if left:
        # transformers counts positions from the left edge, padding included; models with learned positions would see
        # a shifted sequence.
        arrays["position_ids"] = np.maximum(attention_mask.cumsum(-1) - 1, 0)
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def packed(sequences: Sequence[Pair]) -> dict[str, Any]:
    """Return the inputs of `score_sequences`, all sequences in one row; see `ListBatch`."""
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    labels = [part for p, r in sequences for part in (np.full(len(p), IGNORE_INDEX, dtype=np.int64), r)]
    arrays = {
        "input_ids": np.concatenate([part for pair in sequences for part in pair]),
        "labels": np.concatenate(labels),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        "segment": np.repeat(np.arange(len(lengths)), lengths),
    }
    inputs: dict[str, Any] = {key: torch.from_numpy(value)[None] for key, value in arrays.items()}
    return inputs | {"sequences": len(lengths)}
