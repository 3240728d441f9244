"""The backward pass of `linear_logprob` with a trainable head on a GPU; see `gpu`.

Each chunk of rows gives two products with what is stored of it: the gradient of the hidden states, whose rows are then
finished by one pass (factor, pivot's row of the head, rounding), and that of the head, summed over chunks in float32.
The entries at the pivots are added to that sum, which is then rounded once: no product may write it in 16 bit, since
the pivots' entries among the stored exponentials would be rounded first (1.7 times the error of a float32 reference).
"""

# Pyright takes a kernel for the plain function below `@triton.jit`.
# pyright: reportIndexIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mopl.kernels import linear_logprob_backward as kernels
from mopl.ops._products import product
from mopl.ops.linear_logprob import choice
from mopl.ops.linear_logprob.gpu_head import Kept, Scan, Sums, combine, kept_exponentials, on_its_device, wide_rows
from mopl.ops.linear_logprob.plan import Plan
from mopl.ops.linear_logprob.rows import Batch, Coefficients, Head, LogitGradient


@on_its_device
def backward(
    head: Head, batch: Batch, pivot: Tensor, shift: Tensor, gradient: LogitGradient, cache: Tensor, keep_rows: int,
    need: Sequence[bool], dtype: torch.dtype, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the products with the gradient of the logits; see the CPU twin. `plan` replaces the chosen one."""
    alpha, gamma, column, position, coefficient = gradient
    need_hidden, need_weight, need_bias = need
    rows, (vocabulary, size) = len(batch.hidden), head.weight.shape
    plain = gamma is None and not head.softcap
    plan = plan or choice.plan_for(batch.hidden, head.weight, "trained", head.softcap > 0, buffers=1 if plain else 2)
    scan = Scan(head, batch, pivot, shift, plan)
    live = column >= 0
    coefficient = coefficient.masked_fill(~live, 0)

    first = min(keep_rows, rows)
    # What is kept is one product, unless something has to be made of it row by row first.
    whole = [slice(0, first)] if first else []
    chunks = [(c, True) for c in (whole if plain else plan.chunks(0, first, buffered=True))]
    chunks += [(c, False) for c in plan.chunks(first, rows, buffered=True)]
    height = max((c.stop - c.start for c, kept in chunks if not kept), default=0)
    buffer, sums = wide_rows(height, vocabulary, scan.hidden), Sums(rows, 0, scan.dtype, shift.device)
    scratch = None
    if not plain:
        tallest = max((c.stop - c.start for c, _ in chunks), default=0)
        scratch = wide_rows(tallest, vocabulary, scan.hidden)

    def new(wanted: bool, *shape: int) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=scan.dtype, device=shift.device)

    grad_hidden = new(need_hidden, rows, size)
    grad_weight = new(need_weight, vocabulary, size)
    grad_bias = new(need_bias, vocabulary).zero_()

    unit = alpha.new_ones(())
    if scan.narrow and rows:
        # Upstream gradients of a mean are small: multiplied by them, float16 operands would flush to zero.
        unit = alpha.abs().amax() if gamma is None else torch.maximum(alpha.abs().amax(), gamma.abs().amax())
        unit = torch.where((unit > 0) & unit.isfinite(), unit, 1)
        alpha, gamma = alpha / unit, None if gamma is None else gamma / unit
        coefficient = coefficient / unit
    # What multiplies the rows of `stored`.
    factor = -alpha if plain else alpha.new_ones(rows)
    for number, (chunk, kept) in enumerate(chunks):
        part = slice(0, chunk.stop - chunk.start)
        if kept:
            stored = kept_exponentials(cache, keep_rows, vocabulary)[chunk]
        else:
            stored = buffer[part]
            scan.once(chunk, sums, Kept(stored, None, False))
        if scratch is not None:
            columns = -(-vocabulary // kernels.GRADIENT_TILE["BLOCK"])
            kernels.logit_gradient_kernel[(part.stop, columns)](
                stored, alpha, gamma, scan.shift, scan.temperature, scratch[part], chunk.start, vocabulary,
                stored.stride(0), scratch.stride(0), SOFTCAP=head.softcap, **kernels.GRADIENT_TILE,
            )  # fmt: skip
            stored = scratch[part]
        if need_hidden:
            product(stored, scan.weight, grad_hidden[chunk])
        if need_weight:
            inner = _scaled(scan.hidden[chunk], factor, chunk.start) if plain else scan.hidden[chunk]
            product(stored.T, inner, grad_weight, add=number > 0)
        if need_bias:
            kernels.column_sum_kernel[(-(-vocabulary // kernels.COLUMN_SUM_TILE["BLOCK"]),)](
                stored, factor, grad_bias, chunk.start, part.stop, vocabulary, stored.stride(0),
                **kernels.COLUMN_SUM_TILE,
            )  # fmt: skip
    if not chunks:
        grad_weight.zero_()

    # Entries that are off go, with coefficient 0, to columns of their own: all in one place would be added one by one.
    column = torch.where(live, column, torch.arange(len(column), device=column.device) % vocabulary)
    if need_hidden and rows:
        # The first M entries are the pivots, one a row in order; only shared rows have more.
        apart = coefficient[rows:]
        grad_hidden = combine(
            head._replace(weight=scan.weight), grad_hidden, None, torch.where(live[:rows], column[:rows], -1),
            Coefficients(coefficient[:rows] * unit, factor * unit, None, None), None, None,
            scan.dtype if len(apart) else dtype,
        )  # fmt: skip
        if len(apart):
            values = (apart * unit)[:, None] * scan.weight[column[rows:]].to(scan.dtype)
            values = values.masked_fill((apart == 0)[:, None], 0)
            # Accumulating, it sorts first: the same bits at every call.
            grad_hidden.index_put_((position[rows:],), values, accumulate=True)
    if need_weight:
        values = coefficient[:, None] * scan.hidden[position].to(scan.dtype)
        grad_weight.index_put_((column,), values, accumulate=True)
    if need_bias:
        grad_bias.index_put_((column,), coefficient, accumulate=True)
    of_weight, of_bias = head.weight.dtype, scan.dtype if head.bias is None else head.bias.dtype
    if scan.narrow:
        grad_weight = torch.mul(grad_weight, unit, out=torch.empty_like(grad_weight, dtype=of_weight))
        grad_bias = grad_bias * unit
    return grad_hidden.to(dtype), grad_weight.to(of_weight), grad_bias.to(of_bias)


def _scaled(x: Tensor, factor: Tensor, first: int) -> Tensor:
    """Return rows (R, H) times their factors, which begin at `first`."""
    rows, size = x.shape
    out, tile = torch.empty_like(x, memory_format=torch.contiguous_format), kernels.scale_tile(size)
    kernels.scale_kernel[(rows, -(-size // tile["BLOCK"]))](x, factor, out, first, size, x.stride(0), **tile)
    return out
