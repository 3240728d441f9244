"""The order of the stages of `linear_logprob`, the same for every backend and for a vocabulary-parallel head.

What is computed, and why so, is explained in `linear_logprob`; the stages are in `_linear_logprob_cpu` and
`linear_logprob_triton`.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.ops._backend import use_triton
from mopl.ops._linear_logprob_rows import (
    Coefficients,
    choose_pivots,
    entropy_direction,
    gather,
    gather_entries,
    logit_gradient,
    logprob_direction,
    logsumexp_direction,
    padded_columns,
    scaled_by,
    scatter_entries,
    scatter_rows,
    select,
    statistics,
    target_logprob,
    variance,
)
from mopl.ops.segments import segment_sum

if TYPE_CHECKING:
    from mopl.ops._vocab_parallel import VocabularyShard


def backend_of(tensor: Tensor) -> ModuleType:
    """Return the module with the four stages for tensors like this one."""
    if use_triton(tensor):
        from mopl.ops import linear_logprob_triton as backend
    else:
        from mopl.ops import _linear_logprob_cpu as backend
    return backend


class Forward(NamedTuple):
    """Results and saved tensors of the forward pass, rows and targets that do not count being 0 everywhere."""

    logprob: Tensor  # (E,)
    logsumexp: Tensor  # (N,)
    entropy: Tensor  # (N,) or empty
    variance: Tensor  # (N,) or empty: of u under p
    direction: Tensor  # (E, H) or empty: d logprob / d hidden
    direction_logsumexp: Tensor  # (N, H) or empty
    direction_entropy: Tensor  # (N, H) or empty
    shift: Tensor  # (N,)
    total: Tensor  # (N,)
    pivot: Tensor  # (N,) int64; empty without `row`: the target
    pivot_logprob: Tensor  # (N,); empty without `row`: logprob
    cache: Tensor  # (keep_rows * cache_columns,) in `cache_dtype`, or empty


def cache_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of the kept exponentials: where Triton runs, that of 16-bit operands, which then need no conversion."""
    narrow = use_triton(hidden) and hidden.dtype == weight.dtype and hidden.itemsize == 2
    return hidden.dtype if narrow else compute_dtype(hidden, weight)


def cache_columns(hidden: Tensor, weight: Tensor) -> int:
    """Return how many entries a row of kept exponentials takes: V, padded where Triton runs."""
    vocabulary = weight.shape[0]
    return padded_columns(vocabulary, cache_dtype(hidden, weight).itemsize) if use_triton(hidden) else vocabulary


def direction_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of saved directions: that of bfloat16 hidden states where Triton runs, whose place they take.

    Float16 has no range for the small directions of confident rows.
    """
    narrow = use_triton(hidden) and hidden.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if narrow else compute_dtype(hidden, weight)


def local_column(column: Tensor, weight: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Return indices into the rows of `weight`, -1 for what is not there: other ranks' tokens and mistakes."""
    return torch.where(column < len(weight), column, -1) if shard is None else shard.local(column)


def run_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row: Tensor | None, temperature: Tensor,
    softcap: float, logit_scale: float, want_entropy: bool, want_variance: bool, keep_direction: bool,
    keep_direction_logsumexp: bool, keep_direction_entropy: bool, keep_rows: int, max_rows: int,
    shard: VocabularyShard | None = None,
) -> Forward:  # fmt: skip
    """Run the stages of the forward pass; `shard` adds the collectives of a vocabulary-parallel head."""
    backend, dtype = backend_of(hidden), compute_dtype(hidden, weight)
    entries, rows = len(target), len(hidden)
    chosen = select(target, row, rows, max_rows, not use_triton(hidden))
    hidden = gather(hidden, chosen)
    temperature = gather(temperature, chosen, fill=1)
    head = (softcap, logit_scale)

    column = local_column(chosen.column, weight, shard)
    logits = backend.target_logits(hidden, weight, bias, column, chosen.position, temperature, *head)
    logits = logits if shard is None else shard.sum(logits)
    logits = logits.masked_fill(chosen.column >= (len(weight) if shard is None else shard.vocabulary), torch.nan)
    pivot, pivot_logit = choose_pivots(logits, chosen, len(hidden))
    local_pivot = local_column(pivot, weight, shard)

    cache = hidden.new_empty((keep_rows * cache_columns(hidden, weight),), dtype=cache_dtype(hidden, weight))
    sums = backend.accumulate(
        hidden, weight, bias, local_pivot, pivot_logit, temperature, *head, chosen.count,
        want_entropy + want_variance, keep_direction + keep_direction_entropy, cache, keep_rows,
    )  # fmt: skip
    local_shift, others, moment1, moment2, weighted, weighted_moment = sums
    shift = local_shift
    if shard is not None:
        shift, others, moment1, moment2 = shard.merge(local_shift, others, moment1, moment2)
    stats = statistics(shift, others, moment1, pivot_logit)
    scale, step = scaled_by(local_shift, stats.shift)

    def directions(part: Coefficients, column: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        weighted_part, moment_part = part.weighted * scale, None
        if part.moment is not None:
            moment_part = part.moment * scale
            weighted_part = weighted_part + moment_part * step
        return backend.combine(
            weight, weighted, weighted_moment, local_pivot, part.pivot, weighted_part, moment_part,
            column, position, part.own, direction_dtype(hidden, weight),
        )  # fmt: skip

    def nothing(dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(0, dtype=dtype)

    entropy = stats.entropy() if want_entropy else nothing()
    of_logprob, of_logsumexp, of_entropy = (nothing(direction_dtype(hidden, weight)) for _ in range(3))
    if keep_direction:
        part = logprob_direction(stats, logits, pivot, chosen, temperature, *head)
        own = (None, None) if chosen.position is None else (column, chosen.position)
        of_logprob = scatter_entries(directions(part, *own), chosen, entries)
    if keep_direction_logsumexp:
        of_logsumexp = scatter_rows(directions(logsumexp_direction(stats, temperature, *head)), chosen, rows)
    if keep_direction_entropy:
        part = entropy_direction(stats, entropy, temperature, *head)
        of_entropy = scatter_rows(directions(part), chosen, rows)

    def back(values: Tensor) -> Tensor:
        return scatter_rows(values, chosen, rows)

    return Forward(
        logprob=scatter_entries(target_logprob(stats, logits, chosen), chosen, entries),
        logsumexp=back(stats.logsumexp),
        entropy=back(entropy) if want_entropy else entropy,
        variance=back(variance(shift, others, moment1, moment2, pivot_logit)) if want_variance else nothing(),
        direction=of_logprob,
        direction_logsumexp=of_logsumexp,
        direction_entropy=of_entropy,
        shift=back(local_shift),
        total=back(stats.total / scale),
        pivot=nothing(torch.int64) if row is None else back(pivot),
        pivot_logprob=nothing() if row is None else back(stats.pivot_logprob),
        cache=cache,
    )


def run_backward(
    grad_logprob: Tensor | None, grad_logsumexp: Tensor | None, grad_entropy: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row: Tensor | None, temperature: Tensor,
    saved: Forward, softcap: float, logit_scale: float, keep_rows: int, max_rows: int,
    need_hidden: bool, need_weight: bool, need_bias: bool,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the backward pass of a trainable head; a gradient that is not needed is empty."""
    rows, full = len(hidden), hidden.dtype
    wide = compute_dtype(hidden, weight)
    chosen = select(target, row, rows, max_rows, not use_triton(hidden))
    hidden = gather(hidden, chosen)
    temperature = gather(temperature, chosen, fill=1)

    def inner(values: Tensor | None) -> Tensor | None:
        return None if values is None else gather(values, chosen)

    shift, logprob = gather(saved.shift, chosen), gather_entries(saved.logprob, chosen)
    pivot, pivot_logprob = chosen.column, logprob
    if row is not None:
        pivot, pivot_logprob = gather(saved.pivot, chosen), gather(saved.pivot_logprob, chosen)
    gradient = logit_gradient(
        None if grad_logprob is None else gather_entries(grad_logprob, chosen),
        inner(grad_logsumexp), inner(grad_entropy), chosen, pivot, pivot_logprob, logprob,
        gather(saved.logsumexp, chosen), None if grad_entropy is None else gather(saved.entropy, chosen),
        shift, gather(saved.total, chosen, fill=1), temperature, softcap, logit_scale,
    )  # fmt: skip
    grad_hidden, grad_weight, grad_bias = backend_of(hidden).backward(
        hidden, weight, bias, local_column(pivot, weight, shard), shift, temperature, softcap, logit_scale,
        chosen.count,
        gradient.alpha, gradient.gamma, local_column(gradient.column, weight, shard), gradient.position,
        gradient.coefficient,
        saved.cache, keep_rows, need_hidden, need_weight, need_bias,
        full if need_hidden and shard is None else wide,
    )  # fmt: skip
    if need_hidden:
        grad_hidden = grad_hidden if shard is None else shard.sum(grad_hidden)
        grad_hidden = scatter_rows(grad_hidden.to(full), chosen, rows)
    return grad_hidden, grad_weight, grad_bias


def scale_directions(
    grad_logprob: Tensor | None, grad_logsumexp: Tensor | None, grad_entropy: Tensor | None,
    target: Tensor, row: Tensor | None, rows: int, saved: Forward,
) -> Tensor:  # fmt: skip
    """Return the gradient of the hidden states (N, H) of a frozen head, in the compute dtype."""
    result = saved.shift.new_zeros((rows, saved.direction.shape[-1]))
    if grad_logprob is not None:
        scaled = saved.direction * grad_logprob.masked_fill(target < 0, 0)[:, None]
        result = scaled if row is None else segment_sum(scaled, row, rows)
    dead = idle_rows(saved)
    for upstream, direction in (
        (grad_logsumexp, saved.direction_logsumexp),
        (grad_entropy, saved.direction_entropy),
    ):
        if upstream is not None:
            result.addcmul_(direction, upstream.masked_fill(dead, 0)[:, None])
    return result


def idle_rows(saved: Forward) -> Tensor:
    """Return which rows (N,) took no part, whatever their upstream gradient is."""
    return saved.total == 0
