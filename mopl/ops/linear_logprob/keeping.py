"""What is kept from the forward to the backward pass: of how many rows, and in which dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.ops._backend import use_triton
from mopl.ops._products import operand_dtype
from mopl.ops.linear_logprob.device import default_workspace


def kept_rows(hidden: Tensor, weight: Tensor, rows: int, workspace: int | None, softcap: bool = False) -> int:
    """Return for how many rows the exponentials are kept between the forward and the backward pass.

    On a CPU at most half of them: in float32 that is a sixth of what autograd keeps of full logits, and costs half of
    one product of four.
    """
    columns, dtype = cache_layout(hidden, weight)
    row = max(1, columns * dtype.itemsize)
    fit = (default_workspace(hidden.device, rows * row) if workspace is None else workspace) // row
    if not hidden.is_cuda:
        return min((rows + 1) // 2, fit)
    if workspace is None and not torch.compiler.is_compiling():
        from mopl.ops.linear_logprob.choice import rows_worth_keeping

        rows = rows_worth_keeping(hidden, weight, rows, softcap)
    return min(rows, fit)


def cache_layout(hidden: Tensor, weight: Tensor) -> tuple[int, torch.dtype]:
    """Return how many entries a row of kept exponentials takes, and their dtype.

    Where Triton runs, rows of V are padded and their dtype is that of the products' operands: none is then converted.
    """
    vocabulary = weight.shape[0]
    if not use_triton(hidden):
        return vocabulary, compute_dtype(hidden, weight)
    dtype = operand_dtype(hidden, weight)
    return padded_columns(vocabulary, dtype.itemsize), dtype


def padded_columns(columns: int, itemsize: int) -> int:
    """Return how many entries a row of the kernels takes: it begins at a multiple of 128 bytes, a line of the cache."""
    step = 128 // itemsize
    return -(-columns // step) * step


def direction_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of saved directions: that of bfloat16 hidden states where Triton runs, whose place they take.

    Float16 has no range for the small directions of confident rows.
    """
    narrow = use_triton(hidden) and hidden.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if narrow else compute_dtype(hidden, weight)
