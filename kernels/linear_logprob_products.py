"""The first and the last product of `linear_logprob`, each with all that is made of its results, in one kernel.

The first gives exp(u - shift) and its sums, so that no logits are written; the last adds the entries of the pivots to
the gradient of the head and rounds it once, so that it is never held in float32. Operands come by descriptors, which
Hopper's copy engine (TMA) takes; a program for each processor goes through the tiles.

Measured on an H200 (2026-11-27, N = 16384, H = 4096, V = 128256, bf16, tens of milliseconds without a pause, by a
script that is not kept): the first product takes 23 to 26 ms here, with or without storing, as runs differ; the
library's with float32 logits 26 to 28, and 28 to 31 with the pass over them. Tiles of 256 x 128, groups of 4 to 32, one
program a tile, columns before rows, four stages: the same within that spread. 128 columns of the operands at a time, or
the loops flattened into one, which Triton would pipeline: 15 to 40 % slower. For the product of exponentials and head
the library is as fast as this. `python -m bench.logprob` measures the whole.
"""

import triton
import triton.language as tl

from .fused_logprob import exponentials, tile_at

TILE = {"BM": 128, "BV": 256, "BH": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3}
GRADIENT_TILE = {"BV": 128, "BH": 256, "BM": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3}


def pivot_tile(size: int) -> dict[str, int]:
    """Return the tile of `pivot_kernel`: some entries at a time, and a block of columns.

    Most columns have one entry, and a program waits for memory most of its time: few programs with wide blocks.
    """
    return {"ENTRIES": 2, "BLOCK": min(2048, triton.next_power_of_2(size)), "num_warps": 8}


# The number of rows varies from call to call.
@triton.jit(do_not_specialize=["rows"])
def exponential_kernel(
    hidden,  # descriptor of (M, H), blocks of BM x BH
    weight,  # descriptor of (V, H), blocks of BV x BH
    stored,  # descriptor of (M, V), blocks of BM x BV: exp(u - shift); or None
    bias,  # (V,) or None
    pivot,  # (M,) int64
    shift,  # (M,)
    temperature,  # (M,)
    counts,  # (M,) bool: whether a row counts; None: all do
    partial,  # (tiles, M) sums of a tile of the vocabulary
    flag,  # (tiles, M) int8: 1 where the shift is too small for the row
    rows,  # M
    size,  # H
    vocabulary,  # V
    LOGIT_SCALE: tl.constexpr,
    LIMIT: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write exp(u - shift) where it is wanted, 0 at pivots and in rows that do not count, and its sums a tile."""
    row_tiles, column_tiles = tl.cdiv(rows, BM), tl.cdiv(vocabulary, BV)
    for index in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_at(index, row_tiles, column_tiles, GROUP)
        a = tl.zeros([BM, BV], dtype=partial.dtype.element_ty)
        for j in range(0, size, BH):
            h, w = hidden.load([row_tile * BM, j]), weight.load([column_tile * BV, j])
            if UPCAST:  # the interpreter multiplies the bit patterns of bf16
                h, w = h.to(a.dtype), w.to(a.dtype)
            a = tl.dot(h, w.T, acc=a, input_precision="ieee")
        place = column_tile.to(tl.int64) * rows
        e = exponentials(
            a, row_tile * BM + tl.arange(0, BM), column_tile * BV, bias, pivot, shift, temperature, counts,
            flag + place, partial + place, rows, vocabulary, 0.0, LOGIT_SCALE, LIMIT,
        )  # fmt: skip
        if stored is not None:
            stored.store([row_tile * BM, column_tile * BV], e.to(stored.dtype))


@triton.jit(do_not_specialize=["rows"])
def weight_gradient_kernel(
    stored,  # descriptor of (M, V), blocks of BM x BV
    inner,  # descriptor of (M, H), blocks of BM x BH
    added,  # (F, H): what is added to some rows of the result
    place,  # (V,) int32: where in `added` a row's is; -1: nowhere
    unit,  # (), by which the result is multiplied; or None
    out,  # descriptor of (V, H), blocks of BV x BH
    rows,  # M
    size,  # H
    vocabulary,  # V
    UPCAST: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
    BM: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write (stored^T inner + added) unit, rounded once."""
    row_tiles, column_tiles = tl.cdiv(vocabulary, BV), tl.cdiv(size, BH)
    for index in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_at(index, row_tiles, column_tiles, GROUP)
        v = row_tile * BV + tl.arange(0, BV)
        j = column_tile * BH + tl.arange(0, BH)
        p = tl.load(place + v, mask=v < vocabulary, other=-1).to(tl.int64)
        # First, where registers are free: the sums begin with it.
        total = tl.load(added + p[:, None] * size + j[None, :], mask=(p >= 0)[:, None] & (j < size)[None, :], other=0.0)
        for n in range(0, rows, BM):
            e, h = stored.load([n, row_tile * BV]), inner.load([n, column_tile * BH])
            if UPCAST:
                e, h = e.to(total.dtype), h.to(total.dtype)
            total = tl.dot(e.T, h, acc=total, input_precision="ieee")
        if unit is not None:
            total *= tl.load(unit)
        out.store([row_tile * BV, column_tile * BH], total.to(out.dtype))


@triton.jit
def pivot_kernel(
    hidden,  # (M, H)
    column,  # (F,) int64 of entries in rising order; those from V on are left out
    position,  # (F,) int64: the row of an entry
    coefficient,  # (F,): of an entry
    stop,  # (F,) int64: where the entries with that column end
    place,  # (V,) int32: where in `out` a column's row is; None: `out` has a row for every column, which is added to
    out,  # (F, H), or (V, H)
    size,  # H
    vocabulary,  # V
    hidden_stride,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for the first entry of a column, and a block of columns of `hidden`: sum of coefficient hidden.

    In a fixed order: the same bits at every run. An entry whose coefficient is 0 adds 0, whatever its row holds.
    """
    first = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(column + first)
    before = tl.load(column + first - 1, mask=first > 0, other=-1)
    if (v < vocabulary) & (v != before):
        end = tl.load(stop + first).to(tl.int32)
        total = tl.zeros([ENTRIES, BLOCK], dtype=out.dtype.element_ty)
        for start in range(first, end, ENTRIES):
            i = start + tl.arange(0, ENTRIES)
            factor = tl.load(coefficient + i, mask=i < end, other=0.0)
            n = tl.load(position + i, mask=i < end, other=0)
            read = (factor != 0.0)[:, None] & (j < size)[None, :]
            h = tl.load(hidden + n[:, None] * hidden_stride + j[None, :], mask=read, other=0.0)
            total += factor[:, None] * h.to(total.dtype)
        value = tl.sum(total, axis=0)
        if place is None:
            target = out + v * size + j
            tl.store(target, tl.load(target, mask=j < size, other=0.0) + value, mask=j < size)
        else:
            tl.store(out + first.to(tl.int64) * size + j, value, mask=j < size)
            tl.store(place + v, first)
