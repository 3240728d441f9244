"""Launches the Triton kernels of `mopl.ops.listnet`; the argument lists are those of its CPU twins."""

# Pyright takes a kernel for the plain function below `@triton.jit`.
# pyright: reportIndexIssue=false

import math

import torch
import triton
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.kernels import listnet as kernels
from mopl.ops._rows import list_strides, rows_contiguous


def statistics_shapes(labels: Tensor, beta: Tensor, itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of peak and rest, and that of mass and others, which only lists beyond the registers have.

    `itemsize` is that of the arithmetic.
    """
    batch, objectives, items = labels.shape
    if items <= kernels.registers_limit(itemsize):
        return (0,), (0,)
    return (batch, beta.shape[1]), (batch, objectives)


def launch_forward(
    scores: Tensor,  # (B, K)
    labels: Tensor,  # (B, m, K)
    beta: Tensor,  # (B, m) or (B, 1)
    mask: Tensor | None,  # (B, K)
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, peak, rest, mass, others); all but the loss are empty (0,) where backward computes them again."""
    batch, objectives, items = labels.shape
    loss = torch.empty((batch, objectives), dtype=compute_dtype(scores), device=scores.device)
    shared, own = statistics_shapes(labels, beta, loss.itemsize)
    peak, rest = loss.new_empty(shared, dtype=torch.int64), loss.new_empty(shared)
    mass, others = loss.new_empty(own), loss.new_empty(own)
    if batch == 0 or objectives == 0 or items == 0:
        return loss.zero_(), peak.zero_(), rest.zero_(), mass.zero_(), others.zero_()
    scores, labels, mask = map(rows_contiguous, (scores, labels, mask))
    tile = kernels.forward_tile(items, loss.itemsize)
    kernel, saved = kernels.forward_kernel, ()
    if items > kernels.registers_limit(loss.itemsize):
        kernel, saved = kernels.forward_loop_kernel, (peak, rest, mass, others)
    with torch.cuda.device_of(scores):
        kernel[(triton.cdiv(batch, tile["LISTS"]),)](
            scores, labels, beta, mask, loss, *saved, batch, items,
            *list_strides(scores, labels, beta, mask), M=objectives, COMMON=beta.shape[1] == 1, NORMALIZE=normalize,
            ALIGN=_alignment(scores, labels, mask), **tile,
        )  # fmt: skip
    return loss, peak, rest, mass, others


def launch_backward(
    grad_loss: Tensor, scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None, loss: Tensor,
    peak: Tensor, rest: Tensor, mass: Tensor, others: Tensor,
    normalize: bool, need_scores: bool, need_labels: bool, need_beta: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of scores, labels and beta; one that is not needed is empty."""
    batch, objectives, items = labels.shape
    dscores = scores.new_empty(scores.shape if need_scores else (0,))
    dlabels = labels.new_empty(labels.shape if need_labels else (0,))
    dbeta = beta.new_empty(beta.shape if need_beta else (0,))
    if not (need_scores or need_labels or need_beta):
        return dscores, dlabels, dbeta
    if batch == 0 or objectives == 0 or items == 0:
        return dscores.zero_(), dlabels.zero_(), dbeta.zero_()
    scores, labels, mask = map(rows_contiguous, (scores, labels, mask))
    tile = kernels.backward_tile(items, loss.itemsize)
    blocks = triton.cdiv(items, tile["BLOCK"])
    saved = (peak, rest, mass, others) if items > kernels.registers_limit(loss.itemsize) else (None,) * 4
    partial = loss.new_empty((blocks, *beta.shape)) if need_beta else None
    with torch.cuda.device_of(scores):
        kernels.backward_kernel[(triton.cdiv(batch, tile["LISTS"]) * blocks,)](
            grad_loss, scores, labels, beta, mask, loss, *saved,
            dscores if need_scores else None, dlabels if need_labels else None, partial, batch, items,
            *grad_loss.stride(), *list_strides(scores, labels, beta, mask),
            M=objectives, COMMON=beta.shape[1] == 1, NORMALIZE=normalize,
            ALIGN=_alignment(scores, labels, mask), **tile,
        )  # fmt: skip
    if partial is not None:
        dbeta = (partial[0] if blocks == 1 else partial.sum(0)).to(beta.dtype)
    return dscores, dlabels, dbeta


def _alignment(scores: Tensor, labels: Tensor, mask: Tensor | None) -> int:
    """Return the largest power of two, up to 16, that divides the number of items and every stride between lists.

    Triton itself looks for multiples of 16 alone: lists of 8, 120 or 1000 items would be read item by item.
    """
    strides = (scores.stride(0), *labels.stride()[:2], 0 if mask is None else mask.stride(0))
    return math.gcd(16, scores.shape[1], *strides)
