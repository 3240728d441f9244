"""The four stages of `linear_logprob` on a GPU: products by the vendor's library, everything around them in Triton.

The same functions as `_linear_logprob_cpu`, whose docstrings say what each argument and result is; what the stages
share is in `_linear_logprob_triton_head`, the backward pass in `_linear_logprob_triton_backward`. Here:

* Products of 16-bit operands write float32 (`_products`), so logits are never rounded to 16 bit.
* The exponentials kept for the second and third product are bf16: it has float32's range, and its rounding is that of
  any 16-bit gradient. float16 operands have no such range to offer: their rows are summed once first and then
  normalised, which costs one more product, but no digits; and upstream gradients are scaled by their largest.
* Rows are processed in chunks, logits in tiles of constant area: see `_head_plan`.
* Nothing here waits for the GPU: rows that do not count are at the end, and kernels leave them out by `count`.
"""

# Pyright takes a kernel for the plain function below `@triton.jit`.
# pyright: reportIndexIssue=false

from __future__ import annotations

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.kernels import linear_logprob as kernels
from mopl.ops import _linear_logprob_choice as choice
from mopl.ops._head_plan import Plan
from mopl.ops._linear_logprob_triton_backward import backward
from mopl.ops._linear_logprob_triton_head import (
    Head,
    Sums,
    combine,
    kept_exponentials,
    on_its_device,
    wide_rows,
)
from mopl.ops._products import product
from mopl.ops._rows import rows_contiguous

__all__ = ["accumulate", "backward", "combine", "target_logits"]


@on_its_device
def target_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, column: Tensor, position: Tensor | None, temperature: Tensor,
    softcap: float, logit_scale: float,
) -> Tensor:  # fmt: skip
    """Return u at the targets (F,), 0 where column is -1."""
    out = torch.empty(column.shape, dtype=compute_dtype(hidden, weight), device=hidden.device)
    hidden, weight = rows_contiguous(hidden), rows_contiguous(weight)
    if column.numel():
        kernels.target_logit_kernel[(column.numel(),)](
            hidden, weight, bias, column, position, temperature, out, hidden.shape[1], hidden.stride(0),
            weight.stride(0), SOFTCAP=softcap, LOGIT_SCALE=logit_scale, **kernels.TARGET_TILE,
        )  # fmt: skip
    return out


@on_its_device
def accumulate(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, pivot: Tensor, shift: Tensor, temperature: Tensor,
    softcap: float, logit_scale: float, count: Tensor | None, moments: int, directions: int, cache: Tensor | None,
    keep_rows: int, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum over the vocabulary; see the CPU twin for arguments and results. `plan` replaces the chosen one."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    wanted = "frozen" if directions else "trained" if keep_rows else "scoring"
    plan = plan or choice.plan_for(hidden, weight, wanted, softcap > 0, buffers=max(directions, 1))
    head = Head(hidden, weight, bias, pivot, shift.clone(), temperature, softcap, logit_scale, count, plan)
    sums = Sums(rows, moments, head.dtype, hidden.device)
    weighted = torch.empty(rows if directions > 0 else 0, head.size, dtype=head.dtype, device=hidden.device)
    weighted_moment = torch.empty(rows if directions > 1 else 0, head.size, dtype=head.dtype, device=hidden.device)

    kept = None if cache is None or keep_rows == 0 else kept_exponentials(cache, keep_rows, vocabulary)
    first = 0
    if kept is not None:
        first = min(keep_rows, rows)
        # A trainable head needs e alone, and no directions: its backward pass multiplies by what it is given.
        for chunk in plan.chunks(0, first):
            head.exponentials(chunk, sums, kept[chunk], None, bent=False)
    if directions == 0:
        tiles = None if moments or first else choice.fused_tiles(plan)
        if tiles is not None:
            head.fused(sums, tiles)
            head.redo(slice(0, rows), sums)
        else:
            for chunk in plan.chunks(first, rows):
                head.scan(chunk, sums)
                head.redo(chunk, sums)
        if head.narrow:  # the backward pass may store these rows' exponentials
            sums.normalise(slice(first, rows), head.shift)
        return _results(head, sums, weighted, weighted_moment)
    height = min(plan.buffer_rows, rows - first)
    buffer = wide_rows(height, vocabulary, head.hidden)
    buffer_moment = wide_rows(height, vocabulary, head.hidden) if directions > 1 else None
    for chunk in plan.chunks(first, rows, buffered=True):
        part = slice(0, chunk.stop - chunk.start)
        moment = None if buffer_moment is None else buffer_moment[part]
        head.exponentials(chunk, sums, buffer[part], moment, bent=True)
        product(buffer[part], head.weight, weighted[chunk])
        if moment is not None:
            product(moment, head.weight, weighted_moment[chunk])
    return _results(head, sums, weighted, weighted_moment)


def _results(
    head: Head, sums: Sums, weighted: Tensor, weighted_moment: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return head.shift, sums.others, sums.moment1, sums.moment2, weighted, weighted_moment
