"""The four stages of `linear_logprob` on a GPU: products by the vendor's library, everything around them in Triton.

The same functions as `cpu`, whose docstrings say what each argument and result is; what the stages
share is in `gpu_head`, the backward pass in `gpu_backward`. Here:

* Products of 16-bit operands write float32 (`_products`), so logits are never rounded to 16 bit.
* The exponentials kept for the second and third product are bf16: it has float32's range, and its rounding is that of
  any 16-bit gradient. float16 operands have no such range to offer: their rows are summed once first and then
  normalised, which costs one more product, but no digits; and upstream gradients are scaled by their largest.
* Rows are processed in chunks, logits in tiles of constant area: see `plan`.
* Nothing here waits for the GPU: rows that do not count are at the end, and kernels leave them out by `count`.
"""

# Pyright takes a kernel for the plain function below `@triton.jit`.
# pyright: reportIndexIssue=false

from __future__ import annotations

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.kernels import linear_logprob as kernels
from mopl.ops._products import product
from mopl.ops._rows import rows_contiguous
from mopl.ops.linear_logprob import choice
from mopl.ops.linear_logprob.gpu_backward import backward
from mopl.ops.linear_logprob.gpu_head import Kept, Scan, Sums, combine, kept_exponentials, on_its_device, wide_rows
from mopl.ops.linear_logprob.plan import Plan
from mopl.ops.linear_logprob.rows import Batch, Head

__all__ = ["accumulate", "backward", "combine", "target_logits"]


@on_its_device
def target_logits(head: Head, batch: Batch, column: Tensor, position: Tensor | None) -> Tensor:
    """Return u at the targets (F,), 0 where column is -1."""
    hidden, weight = rows_contiguous(batch.hidden), rows_contiguous(head.weight)
    out = torch.empty(column.shape, dtype=compute_dtype(hidden, weight), device=hidden.device)
    if column.numel():
        kernels.target_logit_kernel[(column.numel(),)](
            hidden, weight, head.bias, column, position, batch.temperature, out, hidden.shape[1], hidden.stride(0),
            weight.stride(0), SOFTCAP=head.softcap, LOGIT_SCALE=head.logit_scale, **kernels.TARGET_TILE,
        )  # fmt: skip
    return out


@on_its_device
def accumulate(
    head: Head, batch: Batch, pivot: Tensor, shift: Tensor, moments: int, directions: int, cache: Tensor,
    keep_rows: int, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum over the vocabulary; see the CPU twin for arguments and results. `plan` replaces the chosen one."""
    rows, (vocabulary, size) = len(batch.hidden), head.weight.shape
    wanted = "frozen" if directions else "trained" if keep_rows else "scoring"
    plan = plan or choice.plan_for(batch.hidden, head.weight, wanted, head.softcap > 0, buffers=max(directions, 1))
    scan = Scan(head, batch, pivot, shift, plan)
    sums = Sums(rows, moments, scan.dtype, shift.device)
    weighted = shift.new_empty(rows if directions > 0 else 0, size, dtype=scan.dtype)
    weighted_moment = shift.new_empty(rows if directions > 1 else 0, size, dtype=scan.dtype)

    first = min(keep_rows, rows)
    if keep_rows:
        kept = kept_exponentials(cache, keep_rows, vocabulary)
        # A trainable head needs e alone, and no directions: its backward pass multiplies by what it is given.
        for chunk in plan.chunks(0, first):
            scan.exponentials(chunk, sums, Kept(kept[chunk], None, False))
    if directions == 0:
        tiles = None if moments or first else choice.fused_tiles(plan)
        if tiles is not None:
            scan.fused(sums, tiles)
            scan.redo(slice(0, rows), sums)
        else:
            for chunk in plan.chunks(first, rows):
                scan.once(chunk, sums)
                scan.redo(chunk, sums)
        if scan.narrow:  # the backward pass may store these rows' exponentials
            sums.normalise(slice(first, rows), scan.shift)
    else:
        height = min(plan.buffer_rows, rows - first)
        buffer = wide_rows(height, vocabulary, scan.hidden)
        buffer_moment = wide_rows(height, vocabulary, scan.hidden) if directions > 1 else None
        for chunk in plan.chunks(first, rows, buffered=True):
            part = slice(0, chunk.stop - chunk.start)
            moment = None if buffer_moment is None else buffer_moment[part]
            scan.exponentials(chunk, sums, Kept(buffer[part], moment, True))
            product(buffer[part], scan.weight, weighted[chunk])
            if moment is not None:
                product(moment, scan.weight, weighted_moment[chunk])
    return scan.shift, sums.others, sums.moment1, sums.moment2, weighted, weighted_moment
