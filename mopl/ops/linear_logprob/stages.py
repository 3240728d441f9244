"""The order of the stages of `linear_logprob`, the same for every backend and for a vocabulary-parallel head.

What is computed, and why so, is explained in `function`; the stages are in `cpu` and `gpu`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.ops._backend import use_triton
from mopl.ops._logprob import Upstream, check_row_range, check_target_range, temperature_gradient
from mopl.ops.linear_logprob.formulas import (
    choose_pivots,
    entropy_direction,
    logit_gradient,
    logprob_direction,
    logsumexp_direction,
    over_ranks,
    scaled_by,
    statistics,
    target_logprob,
    variance,
)
from mopl.ops.linear_logprob.keeping import cache_layout, direction_dtype
from mopl.ops.linear_logprob.records import Batch, Coefficients, Forward, Head, Inputs, Need, Want
from mopl.ops.linear_logprob.rows import Selection, select
from mopl.ops.sequence_logprob import segment_sum


def backend_of(tensor: Tensor) -> ModuleType:
    """Return the module with the stages for tensors like this one."""
    if use_triton(tensor):
        from mopl.ops.linear_logprob import gpu as backend
    else:
        from mopl.ops.linear_logprob import cpu as backend
    return backend


def in_play(inputs: Inputs, want: Want) -> tuple[Selection, Batch]:
    """Return which rows and targets are in play, and what a backend takes of the rows."""
    hidden, temperature, target, row = inputs
    chosen = select(target, row, len(hidden), want.max_rows, not use_triton(hidden))
    rows = chosen.rows
    return chosen, Batch(rows.pick(hidden), rows.take(temperature, fill=1), None if rows.blank is None else ~rows.blank)


def run_forward(head: Head, inputs: Inputs, want: Want) -> Forward:
    """Run the stages of the forward pass, with the collectives of a vocabulary-parallel head where it is one."""
    hidden, shard = inputs.hidden, head.shard
    if want.check_targets:
        check_target_range(inputs.target, int(head.vocabulary))
        check_row_range(inputs.row, len(hidden))
    backend, operands = backend_of(hidden), (hidden, head.weight)
    dtype, narrow = compute_dtype(*operands), direction_dtype(*operands)
    columns, cache_dtype = cache_layout(*operands)
    chosen, batch = in_play(inputs, want)
    rows, entries = chosen.rows, chosen.entries

    column = head.local(chosen.column)
    logits = backend.target_logits(head, batch, column, chosen.position)
    logits = logits if shard is None else shard.sum(logits)
    logits = logits.masked_fill(chosen.column >= head.vocabulary, torch.nan)
    pivot, pivot_logit = choose_pivots(logits, chosen, len(batch.hidden))
    local_pivot = head.local(pivot)

    cache = hidden.new_empty(want.keep_rows * columns, dtype=cache_dtype)
    own = backend.accumulate(head, batch, local_pivot, pivot_logit, want, cache)
    sums = own if shard is None else over_ranks(own, shard)
    stats = statistics(sums, pivot_logit)
    scale, step = scaled_by(own.shift, stats.shift)

    def directions(part: Coefficients) -> Tensor:
        weighted, moment = part.weighted * scale, None
        if part.moment is not None:
            moment = part.moment * scale
            weighted = weighted + moment * step
        part = part._replace(weighted=weighted, moment=moment).without(rows.blank)
        return backend.combine(head, own.weighted, own.weighted_moment, local_pivot, part, narrow)

    def nothing(dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(0, dtype=dtype)

    entropy = stats.entropy() if want.moments else nothing()
    of_logprob, of_logsumexp, of_entropy = (nothing(narrow) for _ in range(3))
    if want.frozen:
        part = logprob_direction(stats, logits, pivot, chosen, batch.temperature, head)
        if chosen.position is not None:
            part = part._replace(column=column, position=chosen.position)
        # Rows that share a target's position with one that counts are not 0.
        of_logprob = entries.put(directions(part), blank=chosen.position is not None)
        if want.logsumexp:
            of_logsumexp = rows.put(directions(logsumexp_direction(stats, batch.temperature, head)), blank=False)
        if want.entropy:
            of_entropy = rows.put(directions(entropy_direction(stats, entropy, batch.temperature, head)), blank=False)
    return Forward(
        logprob=entries.put(target_logprob(stats, logits, chosen)),
        logsumexp=rows.put(stats.logsumexp),
        entropy=rows.put(entropy) if want.moments else entropy,
        variance=rows.put(variance(sums, pivot_logit)) if want.moments > 1 else nothing(),
        direction=of_logprob,
        direction_logsumexp=of_logsumexp,
        direction_entropy=of_entropy,
        shift=rows.put(own.shift),
        total=rows.put(stats.total / scale),
        pivot=nothing(torch.int64) if inputs.row is None else rows.put(pivot),
        pivot_logprob=nothing() if inputs.row is None else rows.put(stats.pivot_logprob),
        cache=cache,
    )


def run_backward(
    head: Head, inputs: Inputs, want: Want, saved: Forward, upstream: Upstream, need: Need
) -> list[Tensor | None]:
    """Return the gradients of hidden, weight, bias and temperature, None where not needed.

    With a frozen head, where neither hidden states nor weight are kept, the gradient of the hidden states can be in the
    compute dtype; autograd rounds it.
    """
    of_hidden = of_weight = of_bias = of_temperature = None
    if want.frozen and need.hidden:
        of_hidden = scale_directions(head, inputs, saved, upstream)
    elif need.hidden or need.weight or need.bias:
        of_hidden, of_weight, of_bias = trained_head(head, inputs, want, saved, upstream, need)
    if need.temperature:
        row, rows = inputs.row, len(saved.total)
        of_temperature = temperature_gradient(
            upstream, inputs.target, saved.logprob, lambda t: t if row is None else segment_sum(t, row, rows),
            inputs.temperature, saved.logsumexp, saved.entropy, saved.variance, saved.total == 0,
        )  # fmt: skip
    found = (of_hidden, of_weight, of_bias, of_temperature)
    return [g if needed else None for g, needed in zip(found, need, strict=True)]


def trained_head(
    head: Head, inputs: Inputs, want: Want, saved: Forward, upstream: Upstream, need: Need
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias of a trainable head; one that is not needed is empty."""
    hidden, shard = inputs.hidden, head.shard
    chosen, batch = in_play(inputs, want)
    rows, entries = chosen.rows, chosen.entries
    logprob = entries.take(saved.logprob)
    inner = saved._replace(
        logprob=logprob,
        logsumexp=rows.take(saved.logsumexp),
        entropy=saved.entropy if upstream.entropy is None else rows.take(saved.entropy),
        shift=rows.take(saved.shift),
        total=rows.take(saved.total, fill=1),
        pivot=chosen.column if inputs.row is None else rows.take(saved.pivot),
        pivot_logprob=logprob if inputs.row is None else rows.take(saved.pivot_logprob),
    )
    upstream = Upstream(
        logprob=None if upstream.logprob is None else entries.take(upstream.logprob),
        logsumexp=None if upstream.logsumexp is None else rows.take(upstream.logsumexp),
        entropy=None if upstream.entropy is None else rows.take(upstream.entropy),
    )
    gradient = logit_gradient(upstream, chosen, inner, batch.temperature, head)
    gradient = gradient._replace(entries=gradient.entries._replace(column=head.local(gradient.entries.column)))
    # What is summed over ranks is rounded once, after that.
    dtype = hidden.dtype if shard is None else saved.shift.dtype
    grad_hidden, grad_weight, grad_bias = backend_of(hidden).backward(
        head, batch, head.local(inner.pivot), inner.shift, gradient, saved.cache, want.keep_rows, need, dtype
    )
    if need.hidden:
        grad_hidden = grad_hidden if shard is None else shard.sum(grad_hidden)
        grad_hidden = rows.put(grad_hidden.to(hidden.dtype), blank=False)
    return grad_hidden, grad_weight, grad_bias


def scale_directions(head: Head, inputs: Inputs, saved: Forward, upstream: Upstream) -> Tensor:
    """Return the gradient of the hidden states (N, H) of a frozen head: in their dtype, or in the compute dtype."""
    rows, target, row = len(saved.shift), inputs.target, inputs.row
    if row is None and head.shard is None and upstream.logsumexp is None and upstream.entropy is None:
        if upstream.logprob is not None:  # the common case in one pass, rounded once
            return backend_of(saved.shift).scaled(saved.direction, upstream.logprob.masked_fill(target < 0, 0))
    result = saved.shift.new_zeros((rows, saved.direction.shape[-1]))
    if upstream.logprob is not None:
        scaled = saved.direction * upstream.logprob.masked_fill(target < 0, 0)[:, None]
        result = scaled if row is None else segment_sum(scaled, row, rows)
    for values, direction in (
        (upstream.logsumexp, saved.direction_logsumexp), (upstream.entropy, saved.direction_entropy)
    ):  # fmt: skip
        if values is not None:
            result.addcmul_(direction, values.masked_fill(saved.total == 0, 0)[:, None])
    return result if head.shard is None else head.shard.sum(result)
