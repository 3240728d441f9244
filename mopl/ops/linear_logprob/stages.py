"""The order of the stages of `linear_logprob`, the same for every backend and for a vocabulary-parallel head.

What is computed, and why so, is explained in `linear_logprob`; the stages are in `cpu` and
`gpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.ops._backend import use_triton
from mopl.ops._logprob import Upstream, temperature_gradient
from mopl.ops.linear_logprob.rows import (
    Batch,
    Coefficients,
    Forward,
    Head,
    Want,
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

# What has the derivatives that are refused here.
INSTEAD = (
    "take mopl.ops.gathered_logprob of the logits, logit_scale * (hidden @ weight.T + bias), or detach the operands"
)


def backend_of(tensor: Tensor) -> ModuleType:
    """Return the module with the four stages for tensors like this one."""
    if use_triton(tensor):
        from mopl.ops.linear_logprob import gpu as backend
    else:
        from mopl.ops.linear_logprob import cpu as backend
    return backend


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


def run_forward(
    head: Head, hidden: Tensor, target: Tensor, row: Tensor | None, temperature: Tensor, want: Want
) -> Forward:
    """Run the stages of the forward pass, with the collectives of a vocabulary-parallel head where it is one."""
    backend, shard, dtype = backend_of(hidden), head.shard, compute_dtype(hidden, head.weight)
    entries, rows = len(target), len(hidden)
    chosen = select(target, row, rows, want.max_rows, not use_triton(hidden))
    temperature = gather(temperature, chosen, fill=1)
    batch = Batch(gather(hidden, chosen), temperature, chosen.count)

    column = head.local(chosen.column)
    logits = backend.target_logits(head, batch, column, chosen.position)
    logits = logits if shard is None else shard.sum(logits)
    logits = logits.masked_fill(chosen.column >= head.vocabulary, torch.nan)
    pivot, pivot_logit = choose_pivots(logits, chosen, len(batch.hidden))
    local_pivot = head.local(pivot)

    columns, narrow = cache_columns(hidden, head.weight), direction_dtype(hidden, head.weight)
    cache = hidden.new_empty((want.keep_rows * columns,), dtype=cache_dtype(hidden, head.weight))
    local_shift, others, moment1, moment2, weighted, weighted_moment = backend.accumulate(
        head, batch, local_pivot, pivot_logit, want.entropy + want.variance, want.direction + want.direction_entropy,
        cache, want.keep_rows,
    )  # fmt: skip
    shift = local_shift
    if shard is not None:
        shift, others, moment1, moment2 = shard.merge(local_shift, others, moment1, moment2)
    stats = statistics(shift, others, moment1, pivot_logit)
    scale, step = scaled_by(local_shift, stats.shift)

    def directions(part: Coefficients, column: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        scaled, moment = part.weighted * scale, None
        if part.moment is not None:
            moment = part.moment * scale
            scaled = scaled + moment * step
        part = part._replace(weighted=scaled, moment=moment)
        return backend.combine(head, weighted, weighted_moment, local_pivot, part, column, position, narrow)

    def back(values: Tensor) -> Tensor:
        return scatter_rows(values, chosen, rows)

    def nothing(dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(0, dtype=dtype)

    entropy = stats.entropy() if want.entropy else nothing()
    of_logprob, of_logsumexp, of_entropy = (nothing(narrow) for _ in range(3))
    if want.direction:
        part = logprob_direction(stats, logits, pivot, chosen, temperature, head)
        own = (None, None) if chosen.position is None else (column, chosen.position)
        of_logprob = scatter_entries(directions(part, *own), chosen, entries)
    if want.direction_logsumexp:
        of_logsumexp = back(directions(logsumexp_direction(stats, temperature, head)))
    if want.direction_entropy:
        of_entropy = back(directions(entropy_direction(stats, entropy, temperature, head)))
    return Forward(
        logprob=scatter_entries(target_logprob(stats, logits, chosen), chosen, entries),
        logsumexp=back(stats.logsumexp),
        entropy=back(entropy) if want.entropy else entropy,
        variance=back(variance(shift, others, moment1, moment2, pivot_logit)) if want.variance else nothing(),
        direction=of_logprob,
        direction_logsumexp=of_logsumexp,
        direction_entropy=of_entropy,
        shift=back(local_shift),
        total=back(stats.total / scale),
        pivot=nothing(torch.int64) if row is None else back(pivot),
        pivot_logprob=nothing() if row is None else back(stats.pivot_logprob),
        cache=cache,
    )


def gradients(
    upstream: Upstream,
    head: Head,
    hidden: Tensor | None,  # None with a frozen head, whose weight is then not looked at
    target: Tensor,
    row: Tensor | None,
    temperature: Tensor,
    saved: Forward,
    keep_rows: int,
    max_rows: int,
    need: Sequence[bool],
    dtype: torch.dtype,  # of the hidden states
) -> list[Tensor | None]:
    """Return the gradients of hidden, weight, bias and temperature, None where not needed."""
    found: list[Tensor | None] = [None] * 4
    if hidden is not None and any(need[:3]):
        found[:3] = run_backward(upstream, head, hidden, target, row, temperature, saved, keep_rows, max_rows, need[:3])
    elif need[0]:
        grad_hidden = scale_directions(upstream, target, row, saved)
        found[0] = (grad_hidden if head.shard is None else head.shard.sum(grad_hidden)).to(dtype)
    if need[3]:
        found[3] = temperature_gradient(
            upstream, target, saved.logprob, lambda t: t if row is None else segment_sum(t, row, len(temperature)),
            temperature, saved.logsumexp, saved.entropy, saved.variance, saved.total == 0,
        )  # fmt: skip
    return [g if needed else None for g, needed in zip(found, need, strict=True)]


def run_backward(
    upstream: Upstream, head: Head, hidden: Tensor, target: Tensor, row: Tensor | None, temperature: Tensor,
    saved: Forward, keep_rows: int, max_rows: int, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the backward pass of a trainable head; a gradient that is not needed is empty."""
    rows, wide = len(hidden), compute_dtype(hidden, head.weight)
    chosen = select(target, row, rows, max_rows, not use_triton(hidden))
    temperature = gather(temperature, chosen, fill=1)
    logprob = gather_entries(saved.logprob, chosen)
    inner = saved._replace(
        logprob=logprob,
        logsumexp=gather(saved.logsumexp, chosen),
        entropy=saved.entropy if upstream.entropy is None else gather(saved.entropy, chosen),
        shift=gather(saved.shift, chosen),
        total=gather(saved.total, chosen, fill=1),
        pivot=chosen.column if row is None else gather(saved.pivot, chosen),
        pivot_logprob=logprob if row is None else gather(saved.pivot_logprob, chosen),
    )
    upstream = Upstream(
        None if upstream.logprob is None else gather_entries(upstream.logprob, chosen),
        *(None if values is None else gather(values, chosen) for values in upstream[1:]),
    )
    gradient = logit_gradient(upstream, chosen, inner, temperature, head)
    grad_hidden, grad_weight, grad_bias = backend_of(hidden).backward(
        head,
        Batch(gather(hidden, chosen), temperature, chosen.count),
        head.local(inner.pivot),
        inner.shift,
        gradient._replace(column=head.local(gradient.column)),
        saved.cache,
        keep_rows,
        need,
        hidden.dtype if need[0] and head.shard is None else wide,
    )
    if need[0]:
        grad_hidden = grad_hidden if head.shard is None else head.shard.sum(grad_hidden)
        grad_hidden = scatter_rows(grad_hidden.to(hidden.dtype), chosen, rows)
    return grad_hidden, grad_weight, grad_bias


def scale_directions(upstream: Upstream, target: Tensor, row: Tensor | None, saved: Forward) -> Tensor:
    """Return the gradient of the hidden states (N, H) of a frozen head, in the compute dtype."""
    rows = len(saved.shift)
    result = saved.shift.new_zeros((rows, saved.direction.shape[-1]))
    if upstream.logprob is not None:
        scaled = saved.direction * upstream.logprob.masked_fill(target < 0, 0)[:, None]
        result = scaled if row is None else segment_sum(scaled, row, rows)
    directions = (saved.direction_logsumexp, saved.direction_entropy)
    for values, direction in zip(upstream[1:], directions, strict=True):
        if values is not None:
            result.addcmul_(direction, values.masked_fill(saved.total == 0, 0)[:, None])
    return result
