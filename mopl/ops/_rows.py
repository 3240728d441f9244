"""Rows: sums along them that are fast for short rows too, blocks of them that stay in cache, their memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

from mopl._arguments import (
    FINITE,
    Domain,
    as_value,
    check_device,
    check_labels,
    check_mask,
    check_scores,
    readable,
    shape_of,
)

Result = TypeVar("Result")
Given = TypeVar("Given", bound=Tensor | None)

# A float32 temporary of this many items is 512 KiB: a few fit in the nearer caches, and the fixed cost of a torch call
# (about 2 us) is 0.02 ns an item. Without blocks every temporary costs the page faults of fresh memory.
_BLOCK_ITEMS = 131072


def rows_contiguous(x: Given) -> Given:
    """Return a tensor whose last dimension is contiguous, None for None; kernels take any other stride as it is."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()  # pyright: ignore[reportReturnType]


def rows_aligned(x: Given, align: int) -> Given:
    """Return a tensor whose rows begin at multiples of `align` items of memory that begins at 16 bytes; None for None.

    The last dimension is contiguous, too. `align` is that of contiguous rows, so that what has it is taken as it is. A
    kernel can then do the same at any strides: read the items of a row together, and add them in the same order. Rows
    that are copied were read item by item otherwise; what is expanded stays so.
    """
    if x is None:
        return x
    x = rows_contiguous(x)
    if align == 1 or (x.data_ptr() % 16 == 0 and all(stride % align == 0 for stride in x.stride()[:-1])):
        return x
    one = x[tuple(slice(0, 1 if stride == 0 else None) for stride in x.stride()[:-1])]
    return one.clone(memory_format=torch.contiguous_format).expand(x.shape)  # pyright: ignore[reportReturnType]


def list_strides(scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    """Return the distances between lists and objectives, in the order in which kernels of lists take them."""
    return (scores.stride(0), *labels.stride()[:2], *beta.stride(), 0 if mask is None else mask.stride(0))


def slices(start: int, stop: int, step: int) -> list[slice]:
    """Cut [start, stop) into slices of `step`; the last one is what is left."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def blocks(lists: int, items_per_list: int) -> list[slice]:
    """Cut the lists of a batch into slices that the threads of this process can hold in their caches."""
    return slices(0, lists, block_lists(items_per_list))


def block_lists(items_per_list: int) -> int:
    """Return the number of lists in a block."""
    return max(1, _BLOCK_ITEMS * torch.get_num_threads() // max(1, items_per_list))


def row_sum(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x.sum(-1) of a contiguous tensor; `out` is contiguous, too."""
    size = x.shape[-1]
    if size > 64:
        return torch.sum(x, -1, out=out)
    # torch starts a reduction anew for each row, which costs more than the row; a product with ones does not.
    found = torch.mv(x.reshape(-1, size), x.new_ones(size), out=None if out is None else out.view(-1))
    return found.view(x.shape[:-1])


def is_number(x: Tensor) -> bool:
    """Say whether a tensor is one number expanded, so that no arithmetic has to go row by row."""
    return x.numel() > 0 and not any(x.stride())


def row_dot(x: Tensor, y: Tensor, out: Tensor, work: Tensor) -> Tensor:
    """Write (x * y).sum(-1) into `out` for x (n, m, K) and y (n, m, K) or (n, 1, K); `work` is room for products."""
    if y.shape[1] < x.shape[1] and x.shape[-1] <= 32:
        return torch.bmm(y, x.transpose(1, 2), out=out[:, None])
    return row_sum(torch.mul(x, y, out=work[: len(x)]), out=out)


def times(weight: Tensor, value: Tensor) -> Tensor:
    """Return weight * value, 0 where the weight is 0 even if the value is infinite or NaN."""
    return torch.where(weight == 0, 0, weight * value)


def merge(weights: Tensor, values: Tensor, out: Tensor | None = None) -> Tensor:
    """Return sum_j weights_j values_j (n, K) for weights (n, m) and values (n, m, K)."""
    objectives, size = values.shape[1:]
    if objectives > 1 and (size <= 4 or objectives * size >= 400):  # between them, torch's small-matrix loop is slow
        return torch.bmm(weights[:, None], values, out=None if out is None else out[:, None])[:, 0]
    total = torch.mul(values[:, 0], weights[:, :1], out=out)
    for j in range(1, objectives):
        total.addcmul_(values[:, j], weights[:, j, None])
    return total


# torch's fused softmax of rows takes a scalar path, about ten times slower, for rows shorter than a vector register.
_FUSED = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def log_softmax(x: Tensor, out: Tensor) -> Tensor:
    """Write log softmax along the rows of x into `out`; rows of two items keep every digit however unequal they are."""
    if x.shape[-1] == 2:
        d = x[..., 0] - x[..., 1]
        both = d.abs().neg_().exp_().log1p_()
        torch.sub(d.clamp(max=0), both, out=out[..., 0])
        torch.sub(d.clamp_(min=0).neg_(), both, out=out[..., 1])
        return out
    if x.shape[-1] >= _FUSED:
        return torch.log_softmax(x, -1, out=out)
    torch.sub(x, x.amax(-1, keepdim=True), out=out)
    return out.sub_(row_sum(out.exp()).log_()[..., None])


def log_softmax_backward(grad: Tensor, logp: Tensor, out: Tensor) -> Tensor:
    """Write grad - softmax sum(grad) along rows into `out`, and return it."""
    if logp.shape[-1] == 2:
        crossed = logp.exp().mul_(grad.flip(-1))  # (q_0 g_1, q_1 g_0): nothing cancels but what has to
        torch.sub(crossed[..., 1], crossed[..., 0], out=out[..., 0])
        torch.neg(out[..., 0], out=out[..., 1])
        return out
    if logp.shape[-1] >= _FUSED:
        return torch.ops.aten._log_softmax_backward_data(grad, logp, -1, logp.dtype, out=out)
    return torch.sub(grad, logp.exp().mul_(row_sum(grad)[..., None]), out=out)


def existing(mask: Tensor | None) -> Tensor | None:
    """Return the mask (n, K) with the items of lists that have fewer than two of them removed."""
    return None if mask is None else mask & (mask.sum(-1, keepdim=True) > 1)


def in_full_precision(function: Callable[..., Result]) -> Callable[..., Result]:
    """Keep autocast out of `function`: it would do the products with ones and of labels in 16 bits."""

    @wraps(function)
    def full_precision(*arguments) -> Result:
        if not torch.is_autocast_enabled("cpu"):
            return function(*arguments)
        with torch.autocast("cpu", enabled=False):
            return function(*arguments)

    return full_precision


def check_list_op(scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None, allowed: Domain) -> None:
    """Raise unless the arguments that the list ops share have their shapes and, where they can be read, numbers.

    The ops broadcast nothing. `allowed` says which labels the op has a meaning for; β may have either sign.
    """
    check_mask(mask, check_scores(scores))
    if labels.ndim != 3 or labels.shape[0] != scores.shape[0] or labels.shape[2] != scores.shape[1]:
        raise ValueError(
            f"labels has shape {shape_of(labels)} but scores are {shape_of(scores)}; pass (B, m, K), "
            "for one objective labels[:, None]"
        )
    check_device(labels, "labels", scores, "scores")
    if beta.shape not in (labels.shape[:2], (labels.shape[0], 1)) or not beta.is_floating_point():
        raise ValueError(
            f"beta is {beta.dtype} of shape {shape_of(beta)} but must be floating point of shape "
            f"(B, m) = {tuple(labels.shape[:2])}, or (B, 1) = {(labels.shape[0], 1)} for one β a list"
        )
    check_device(beta, "beta", scores, "scores")
    if readable(beta):  # on a GPU this would copy it to another dtype
        as_value(beta, "beta", beta, FINITE)
    check_labels(labels, mask, allowed)
