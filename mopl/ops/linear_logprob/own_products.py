"""Launches of `linear_logprob_products`: products with a head on GPUs whose copy engine takes descriptors."""

# Pyright takes a kernel for the plain function below `@triton.jit`.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mopl.kernels import linear_logprob as around
from mopl.kernels import linear_logprob_products as kernels
from mopl.ops._backend import INTERPRETED
from mopl.ops._products import is_fake
from mopl.ops.linear_logprob.records import Entries


def describable(x: Tensor) -> bool:
    """Say whether descriptors can hold a matrix and a copy of it.

    All rows have to begin at multiples of 16 bytes, and CUDA promises nothing for rows that share memory (`expand`).
    """
    size, copied = x.shape[1], x.stride(1) != 1
    if size * x.element_size() % 16 != 0:
        return False
    aligned = is_fake(x) or x.data_ptr() % 16 == 0
    return copied or (aligned and x.stride(0) >= size and x.stride(0) * x.element_size() % 16 == 0)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, columns])


def exponentials(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    stored: Tensor | None,  # (M, V)
    vectors: tuple[Tensor | None, ...],  # bias (V,), then pivot, shift, temperature and counts (M,)
    others: Tensor,  # (M,)
    flag: Tensor,  # (M,)
    logit_scale: float,
    processors: int,
) -> None:
    """Write the sums of exp(u - shift), what they flag and, if wanted, the exponentials themselves."""
    (rows, size), vocabulary, tile = hidden.shape, len(weight), kernels.TILE
    height, width = -(-rows // tile["BM"]), -(-vocabulary // tile["BV"])
    partial, flags = others.new_empty(width, rows), flag.new_empty(width, rows)
    kernels.exponential_kernel[(min(processors, height * width),)](
        _descriptor(hidden, tile["BM"], tile["BH"]), _descriptor(weight, tile["BV"], tile["BH"]),
        None if stored is None else _descriptor(stored, tile["BM"], tile["BV"]), *vectors, partial, flags, rows, size,
        vocabulary, LOGIT_SCALE=logit_scale, LIMIT=around.LIMIT, UPCAST=INTERPRETED, **tile,
    )  # fmt: skip
    torch.sum(partial, 0, out=others)
    torch.amax(flags, 0, out=flag)


def weight_gradient(
    stored: Tensor,  # (M, V)
    inner: Tensor,  # (M, H)
    hidden: Tensor,  # (M, H)
    entries: Entries,
    unit: Tensor | None,  # ()
    processors: int,
) -> Tensor:
    """Return (stored^T inner + the entries' coefficient * hidden) unit, (V, H) in the dtype of `inner`."""
    (rows, vocabulary), size, tile = stored.shape, inner.shape[1], kernels.GRADIENT_TILE
    out = torch.empty(vocabulary, size, dtype=inner.dtype, device=inner.device)
    added = entries.coefficient.new_empty(len(entries.column), size)
    place = torch.full((vocabulary,), -1, dtype=torch.int32, device=inner.device)
    add_entries(hidden, entries, added, place, vocabulary)
    tiles = -(-vocabulary // tile["BV"]) * -(-size // tile["BH"])
    kernels.weight_gradient_kernel[(min(processors, tiles),)](
        _descriptor(stored, tile["BM"], tile["BV"]), _descriptor(inner, tile["BM"], tile["BH"]), added, place, unit,
        _descriptor(out, tile["BV"], tile["BH"]), rows, size, vocabulary, UPCAST=INTERPRETED, **tile,
    )  # fmt: skip
    return out


def add_entries(hidden: Tensor, entries: Entries, out: Tensor, place: Tensor | None, vocabulary: int) -> None:
    """Add coefficient * hidden of each entry to its column's row of `out` (V, H).

    Or, with `place` (V,), write each column's sum where its first entry is in the order of columns: `out` is (F, H).
    """
    column, order = entries.column.sort(stable=True)
    stop = torch.searchsorted(column, column, right=True)
    size = hidden.shape[1]
    tile = kernels.pivot_tile(size)
    if len(column):
        kernels.pivot_kernel[(len(column), -(-size // tile["BLOCK"]))](
            hidden, column, entries.position[order], entries.coefficient[order], stop, place, out, size, vocabulary,
            hidden.stride(0), **tile,
        )  # fmt: skip
