"""Scores of sequences from log-probabilities of tokens: sums or means over the tokens of each sequence.

Packed tokens are summed in float64 and in a fixed order: thousands of terms of one sign lose no digit, and the same
input gives the same bits. Made of differentiable PyTorch functions; nothing is saved but the grouping.
"""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch
from torch import Tensor

from mopl._arguments import check_device, check_floating, check_mask, compute_dtype, shape_of
from mopl.ops._logprob import as_index


def sequence_logprob(
    logprob: Tensor,  # (..., T), or packed (T,)
    segment: Tensor | None = None,  # logprob's shape
    *,
    mask: Tensor | None = None,  # logprob's shape, bool
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    sequences: int | None = None,
    average: bool = False,
) -> Tensor:
    """Return one score a sequence, the sum of the log-probabilities of its tokens.

    How tokens belong to sequences is said in one of three ways. Without `segment` and `cu_seqlens` the last dimension
    is a sequence: (..., T) gives (...). With either, tokens are packed and the result is (S,).

    Args:
        logprob: log-probabilities of tokens in nats, any floating dtype.
        segment: the number of the sequence that each token belongs to, from 0; negative: to none.
        mask: true where a token counts; usable with each way. What it leaves out is not read, be it NaN.
        cu_seqlens: packed tokens (T,) of sequence s are those from cu_seqlens[s] up to cu_seqlens[s + 1], as in
            variable-length attention. Tokens outside of all belong to none.
        sequences: the number S of sequences, with `segment` only. None: one more than the largest number found, which
            synchronises on a GPU and cannot be compiled. Tokens of sequences from S on give NaN everywhere.
        average: divide each sum by the number of tokens that count. An empty sequence gives 0 either way.

    Returns:
        Scores in nats (per token with `average`): float32, float64 for float64. Differentiable in `logprob`.

    Raises:
        TypeError: wrong dtypes, or `sequences` that is no whole number.
        ValueError: shapes that do not fit, more than one grouping, or a negative number of sequences.
    """
    check_floating(logprob, "logprob", "(..., T)")
    if logprob.ndim < 1:
        raise ValueError("logprob has shape () but must be (..., T); pass logprob[None] for a single token")
    if segment is not None and cu_seqlens is not None:
        raise ValueError("segment and cu_seqlens both say which sequence a token belongs to; pass one of them")
    if sequences is not None and segment is None:
        raise ValueError("sequences is the number of sequences that segment speaks of; pass it with segment only")
    if sequences is not None and not isinstance(sequences, torch.SymInt):
        sequences = _whole(sequences)
        if sequences < 0:
            raise ValueError(f"sequences is {sequences} but must not be negative; leave it out to count them")
    check_mask(mask, logprob, "logprob", "token")
    values = logprob.to(compute_dtype(logprob))
    if mask is not None:
        values = torch.where(mask, values, 0)
    if segment is None and cu_seqlens is None:
        total = values.sum(-1)
        if not average:
            return total
        count = values.shape[-1] if mask is None else mask.sum(-1)
        return total / torch.as_tensor(count, dtype=total.dtype, device=total.device).clamp(min=1)

    if segment is not None:
        place = as_index(segment, "segment", "sequence numbers")
        if place.shape != logprob.shape:
            raise ValueError(
                f"segment has shape {shape_of(place)} but logprob has {shape_of(logprob)}; "
                "pass the number of one sequence a token"
            )
        check_device(place, "segment", logprob, "logprob")
        found = sequences if sequences is not None else int(place.max()) + 1 if place.numel() else 0
        size = max(found, 0)
    else:
        place, size = _segments(cu_seqlens, logprob)
    place, values = place.reshape(-1), values.reshape(-1)
    keep = place >= 0
    if mask is not None:
        keep = keep & mask.reshape(-1)
    # One slot more for tokens of no sequence, one for numbers that are too large.
    slot = torch.where(keep, place.clamp(max=size + 1), size)
    slot = torch.where(keep & (place >= size), size + 1, slot)
    total = segment_sum(torch.where(keep, values, 0).double(), slot, size + 2)[:size]
    counts = segment_sum(keep.double(), slot, size + 2)
    if average:
        total = total / counts[:size].clamp(min=1)
    lost = counts[size + 1] > 0
    return torch.where(lost, torch.nan, total).to(values.dtype)


def _whole(sequences: SupportsIndex) -> int:
    """Return the number of sequences as an int of Python: two more than a uint8 of 255, or a tensor of it, is 1."""
    if type(sequences) is int:
        return sequences
    try:
        if isinstance(sequences, bool):
            raise TypeError
        return operator.index(sequences)
    except TypeError:
        raise TypeError(
            f"sequences is {sequences!r} but must be an int, how many sequences there are; or leave it out"
        ) from None


def _segments(cu_seqlens: Tensor | None, logprob: Tensor) -> tuple[Tensor, int]:
    """Return the sequence number of each packed token (T,), -1 for none, and the number of sequences."""
    bounds = as_index(cu_seqlens, "cu_seqlens", "token offsets")  # type: ignore[arg-type]
    if bounds.ndim != 1 or len(bounds) == 0 or logprob.ndim != 1:
        raise ValueError(
            f"cu_seqlens has shape {shape_of(bounds)} and logprob {shape_of(logprob)}, but they must be (S + 1,) and "
            "packed (T,); for padded (B, T) pass mask instead"
        )
    check_device(bounds, "cu_seqlens", logprob, "logprob")
    size = len(bounds) - 1
    token = torch.arange(len(logprob), device=logprob.device)
    place = torch.searchsorted(bounds, token, right=True) - 1
    return torch.where(place < size, place, -1), size


def segment_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return sums of `values` over equal `index` along dim 0, the same bits at every call.

    On a CPU `index_add` adds in order; on a GPU it uses atomics, while an accumulating `index_put` sorts first.
    """
    result = values.new_zeros((size, *values.shape[1:]))
    if values.is_cuda:
        return result.index_put_((index,), values, accumulate=True)
    return result.index_add_(0, index, values)
