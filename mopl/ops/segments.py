"""Sums over the segments of a flat tensor."""

from __future__ import annotations

from torch import Tensor


def segment_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return sums of `values` over equal `index` along dim 0, the same bits at every call.

    On a CPU `index_add` adds in order; on a GPU it uses atomics, while an accumulating `index_put` sorts first.
    """
    result = values.new_zeros((size, *values.shape[1:]))
    if values.is_cuda:
        return result.index_put_((index,), values, accumulate=True)
    return result.index_add_(0, index, values)
