"""The GPU path of the listwise cross-entropy: launches of its kernels; arguments and results are those of `cpu.py`."""

# Pyright takes a kernel for the plain function below `@triton.jit`.
# pyright: reportIndexIssue=false

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.kernels import listnet as kernels
from mopl.ops._rows import list_strides, rows_aligned


def _beyond_registers(labels: Tensor, loss: Tensor) -> bool:
    return labels.shape[2] > kernels.registers_limit(loss.itemsize)


def new_saved(loss: Tensor, labels: Tensor, beta: Tensor) -> list[Tensor]:
    """Return peak, rest, mass, others and logp, not yet written; those are empty that backward computes again."""
    shared, own = (beta.shape, loss.shape) if _beyond_registers(labels, loss) else ((0,), (0,))
    peak, rest = loss.new_empty(shared, dtype=torch.int64), loss.new_empty(shared)
    return [peak, rest, loss.new_empty(own), loss.new_empty(own), loss.new_empty(0)]


def forward(
    scores: Tensor,  # (B, K)
    labels: Tensor,  # (B, m, K)
    beta: Tensor,  # (B, m) or (B, 1)
    mask: Tensor | None,  # (B, K)
    normalize: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss, and what `new_saved` says."""
    batch, objectives, items = labels.shape
    loss = torch.empty((batch, objectives), dtype=compute_dtype(scores), device=scores.device)
    saved = new_saved(loss, labels, beta)
    if labels.numel() == 0:
        return loss.zero_(), [x.zero_() for x in saved]
    align = math.gcd(16, items)
    scores, labels, mask = (rows_aligned(x, align) for x in (scores, labels, mask))
    tile = kernels.forward_tile(items, loss.itemsize)
    kernel, written = kernels.forward_kernel, ()
    if _beyond_registers(labels, loss):
        kernel, written = kernels.forward_loop_kernel, saved[:4]
    with torch.cuda.device_of(scores):
        kernel[(triton.cdiv(batch, tile["LISTS"]),)](
            scores, labels, beta, mask, loss, *written, batch, items,
            *list_strides(scores, labels, beta, mask), M=objectives, COMMON=beta.shape[1] == 1, NORMALIZE=normalize,
            ALIGN=align, **tile,
        )  # fmt: skip
    return loss, saved


def backward(
    grad_loss: Tensor, scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None, loss: Tensor,
    saved: Sequence[Tensor], normalize: bool, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of scores, labels and beta; one that is not needed is empty."""
    batch, objectives, items = labels.shape
    need_scores, need_labels, need_beta = need
    dscores = scores.new_empty(scores.shape if need_scores else (0,))
    dlabels = labels.new_empty(labels.shape if need_labels else (0,))
    dbeta = beta.new_empty(beta.shape if need_beta else (0,))
    if not any(need):
        return dscores, dlabels, dbeta
    if labels.numel() == 0:
        return dscores.zero_(), dlabels.zero_(), dbeta.zero_()
    align = math.gcd(16, items)
    scores, labels, mask = (rows_aligned(x, align) for x in (scores, labels, mask))
    tile = kernels.backward_tile(items, loss.itemsize)
    blocks = triton.cdiv(items, tile["BLOCK"])
    written = saved[:4] if _beyond_registers(labels, loss) else (None,) * 4
    partial = loss.new_empty((blocks, *beta.shape)) if need_beta else None
    with torch.cuda.device_of(scores):
        kernels.backward_kernel[(triton.cdiv(batch, tile["LISTS"]) * blocks,)](
            grad_loss, scores, labels, beta, mask, loss, *written,
            dscores if need_scores else None, dlabels if need_labels else None, partial, batch, items,
            *grad_loss.stride(), *list_strides(scores, labels, beta, mask),
            M=objectives, COMMON=beta.shape[1] == 1, NORMALIZE=normalize,
            ALIGN=align, **tile,
        )  # fmt: skip
    if partial is not None:
        dbeta = (partial[0] if blocks == 1 else partial.sum(0)).to(beta.dtype)
    return dscores, dlabels, dbeta
