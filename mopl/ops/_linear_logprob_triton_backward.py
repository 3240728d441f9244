"""The backward pass of `linear_logprob` with a trainable head on a GPU; see `linear_logprob_triton`."""

# Pyright takes a kernel for the plain function below `@triton.jit`.
# pyright: reportIndexIssue=false

from __future__ import annotations

import torch
from torch import Tensor

from mopl.kernels import linear_logprob as kernels
from mopl.ops import _linear_logprob_choice as choice
from mopl.ops._head_plan import Plan
from mopl.ops._linear_logprob_triton_head import Head, Sums, on_its_device, wide_rows
from mopl.ops._products import product


@on_its_device
def backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, pivot: Tensor, shift: Tensor, temperature: Tensor,
    softcap: float, logit_scale: float, count: Tensor | None, alpha: Tensor, gamma: Tensor | None, column: Tensor,
    position: Tensor, coefficient: Tensor, cache: Tensor | None, keep_rows: int, need_hidden: bool, need_weight: bool,
    need_bias: bool, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the products with the gradient of the logits; see the CPU twin. `plan` is for who measures several."""
    rows, (vocabulary, size) = hidden.shape[0], weight.shape
    plain = gamma is None and not softcap
    plan = plan or choice.plan_for(hidden, weight, "trained", softcap > 0, buffers=1 if plain else 2)
    head = Head(hidden, weight, bias, pivot, shift.clone(), temperature, softcap, logit_scale, count, plan)

    def zeros(wanted: bool, *shape: int) -> Tensor:
        return torch.zeros(shape if wanted else (0,), dtype=head.dtype, device=hidden.device)

    grad_hidden, grad_weight = zeros(need_hidden, rows, size), zeros(need_weight, vocabulary, size)
    grad_bias = zeros(need_bias, vocabulary)

    first = min(keep_rows, rows)
    # What is kept is one product, unless something has to be made of it row by row first.
    whole = [slice(0, first)] if first else []
    chunks = [(c, True) for c in (whole if plain else plan.chunks(0, first, buffered=True))]
    chunks += [(c, False) for c in plan.chunks(first, rows, buffered=True)]
    height = max((c.stop - c.start for c, kept in chunks if not kept), default=0)
    buffer = wide_rows(height, vocabulary, head.hidden)
    peak = None
    if head.narrow and rows:
        # Upstream gradients of a mean are small: multiplied by them, float16 operands would flush to zero.
        peak = alpha.abs().amax() if gamma is None else torch.maximum(alpha.abs().amax(), gamma.abs().amax())
        peak = torch.where((peak > 0) & peak.isfinite(), peak, 1)
        alpha, gamma = alpha / peak, None if gamma is None else gamma / peak
    scratch = None
    if not plain:
        tallest = max((c.stop - c.start for c, _ in chunks), default=0)
        scratch = wide_rows(tallest, vocabulary, head.hidden)
    factor, ones = -alpha, None
    for chunk, kept in chunks:
        part = slice(0, chunk.stop - chunk.start)
        if kept:
            assert cache is not None
            stored = cache.view(keep_rows, vocabulary)[chunk]
        else:
            stored = buffer[part]
            head.scan(chunk, Sums(rows, 0, head.dtype, hidden.device), stored)
        if plain:
            scale = factor
        else:
            assert scratch is not None
            columns = -(-vocabulary // kernels.GRADIENT_TILE["BLOCK"])
            kernels.logit_gradient_kernel[(part.stop, columns)](
                stored, alpha, gamma, head.shift, temperature, scratch[part], chunk.start, vocabulary,
                stored.stride(0), scratch.stride(0), SOFTCAP=softcap, **kernels.GRADIENT_TILE,
            )  # fmt: skip
            stored, scale = scratch[part], None
        if need_hidden:
            product(stored, head.weight.to(stored.dtype), grad_hidden[chunk])
            if scale is not None:
                grad_hidden[chunk] *= scale[chunk, None]
        if need_weight:
            inner = head.hidden[chunk]
            if scale is not None:
                inner = (inner.to(head.dtype) * scale[chunk, None]).to(stored.dtype)
            product(stored.T, inner.to(stored.dtype), grad_weight, add=True)
        if need_bias:
            if scale is None:
                ones = torch.ones(rows, dtype=head.dtype, device=hidden.device) if ones is None else ones
            kernels.column_sum_kernel[(-(-vocabulary // kernels.COLUMN_SUM_TILE["BLOCK"]),)](
                stored, scale if scale is not None else ones, grad_bias, chunk.start, part.stop, vocabulary,
                stored.stride(0), **kernels.COLUMN_SUM_TILE,
            )  # fmt: skip

    if peak is not None:
        for gradient in (grad_hidden, grad_weight, grad_bias):
            gradient *= peak
    _add_entries(grad_hidden, grad_weight, grad_bias, head, column, position, coefficient)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias if bias is None else grad_bias.to(bias.dtype)


def _add_entries(
    grad_hidden: Tensor, grad_weight: Tensor, grad_bias: Tensor, head: Head, column: Tensor, position: Tensor,
    coefficient: Tensor,
) -> None:  # fmt: skip
    """Add the single entries of the logits' gradient, at targets; accumulating `index_put_` sorts, so it repeats."""
    live = column >= 0
    coefficient = coefficient.masked_fill(~live, 0)
    # Entries that are off go, with coefficient 0, to columns of their own: all in one place would be added one by one.
    spread = torch.arange(len(column), device=column.device) % head.vocabulary
    column = torch.where(live, column, spread)
    if grad_hidden.numel():
        rows = len(head.pivot)
        # The first M entries are the pivots, one a row in order; only shared rows have more.
        for begin, end in ((0, min(rows, len(column))), (rows, len(column))):
            if end <= begin:
                continue
            values = coefficient[begin:end, None] * head.weight[column[begin:end]].to(head.dtype)
            values = values.masked_fill((coefficient[begin:end] == 0)[:, None], 0)
            if begin == 0:
                grad_hidden[:end] += values
            else:
                grad_hidden.index_put_((position[begin:end],), values, accumulate=True)
    if grad_weight.numel():
        values = coefficient[:, None] * head.hidden[position].to(head.dtype)
        grad_weight.index_put_((column,), values, accumulate=True)
    if grad_bias.numel():
        grad_bias.index_put_((column,), coefficient, accumulate=True)
