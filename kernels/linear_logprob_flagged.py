"""Rows of `linear_logprob` whose target was next to impossible, computed again with their largest logit as shift.

The vocabulary is cut into `PARTS`, so that one flagged row has many programs: the largest logit of each part, then the
sums of each part, then the parts together, in their order. A program asks for the flags of `ROWS` rows at once and
leaves where none is set, so that nobody has to know on the host. Programs of one part run side by side, whatever their
rows, and find the part's rows of the head in the L2 cache where many rows are flagged.

One row reads the head twice: at V = 128256, H = 4096 in bf16 2.1 GB, at least 0.5 ms on an H200 at 4.3 TB/s (computed).
"""

import triton
import triton.language as tl

from .linear_logprob import FLOOR, LOG2E, bent, exponent, scale_of

# Predicted, not measured: about one block a processor. The estimate of 10 to 20 ms for a row by one program (2.1 GB),
# divided back, is at least 100 GB/s a block, of which 43 fill an H200's 4.3 TB/s.
PARTS = 128
ROWS = 128  # one byte a lane; 4096 rows are 32 x 128 programs, two to three microseconds where no row is flagged


def redo_tile(itemsize: int) -> dict[str, int]:
    """Return the tile of the first two kernels. 64 x 64 spill registers on an A100, rows of 256 bytes do not."""
    return {"ROWS": ROWS, "BV": 32, "BH": 128 if itemsize == 4 else 32, "num_warps": 4}


def merge_tile(parts: int) -> dict[str, int]:
    """Return the tile of `redo_merge_kernel`."""
    return {"ROWS": ROWS, "PARTS": triton.next_power_of_2(parts), "num_warps": 1}


def part_of(vocabulary: int, itemsize: int) -> int:
    """Return how many columns a part has: a multiple of a tile's."""
    width = redo_tile(itemsize)["BV"]
    return -(-vocabulary // (PARTS * width)) * width


@triton.jit
def _row_product(
    hidden,
    weight,
    n,
    v,
    inside,
    size,
    hidden_stride,
    weight_stride,
    total_dtype: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """Return <hidden_n, W_v> for one row and BV columns."""
    a = tl.zeros([BV], dtype=total_dtype)
    for start in range(0, size, BH):
        j = start + tl.arange(0, BH)
        h = tl.load(hidden + n * hidden_stride + j, mask=j < size, other=0.0).to(total_dtype)
        w = tl.load(
            weight + v[:, None] * weight_stride + j[None, :], mask=inside[:, None] & (j < size)[None, :], other=0.0
        ).to(total_dtype)
        a += tl.sum(w * h[None, :], axis=1)
    return a


@triton.jit
def _any_flag(flag, first_row, rows, ROWS: tl.constexpr):
    """Say whether one of this program's rows is flagged."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return tl.max(tl.load(flag + first_row + r, mask=r < rows, other=0).to(tl.int32), axis=0) != 0


@triton.jit(do_not_specialize=["first_row", "rows"])
def redo_top_kernel(
    hidden,  # (M, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    pivot,  # (M,) int64
    flag,  # (M,) int8
    partial,  # (parts, R): the largest b of each part, the pivot left out
    first_row,
    rows,  # R
    size,  # H
    vocabulary,  # V
    part,  # columns of a part
    hidden_stride,
    weight_stride,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """One program for ROWS rows and a part of the vocabulary."""
    if _any_flag(flag, first_row, rows, ROWS):
        begin = tl.program_id(1) * part
        for r in range(tl.program_id(0) * ROWS, tl.minimum(rows, tl.program_id(0) * ROWS + ROWS)):
            # A sum with a tensor: the loop variable is a plain number in the interpreter.
            r_wide = tl.full([], 0, tl.int64) + r
            n = first_row + r_wide
            if tl.load(flag + n) != 0:
                q = tl.load(pivot + n)
                top = tl.full([BV], float("-inf"), dtype=partial.dtype.element_ty)
                for start in range(begin, tl.minimum(vocabulary, begin + part), BV):
                    v = (start + tl.arange(0, BV)).to(tl.int64)
                    inside = v < vocabulary
                    a = _row_product(
                        hidden, weight, n, v, inside, size, hidden_stride, weight_stride, top.dtype, BV, BH
                    )
                    if bias is not None:
                        a += tl.load(bias + v, mask=inside, other=0.0).to(a.dtype)
                    b, _f = bent(a, SOFTCAP, LOGIT_SCALE)
                    top = tl.maximum(top, tl.where(inside & (v != q), b, float("-inf")))
                tl.store(partial + tl.program_id(1).to(tl.int64) * rows + r_wide, tl.max(top, axis=0))


@triton.jit
def _shift(partial, r, rows, parts, k, PARTS: tl.constexpr):
    """Return the largest u of a row, from the largest b of its parts."""
    p = tl.arange(0, PARTS)
    return tl.max(tl.load(partial + p.to(tl.int64) * rows + r, mask=p < parts, other=float("-inf")), axis=0) * k


@triton.jit(do_not_specialize=["first_row", "rows", "parts"])
def redo_sum_kernel(
    hidden,
    weight,
    bias,
    pivot,
    temperature,  # (M,)
    flag,
    partial,  # (parts, R), as `redo_top_kernel` left it
    stored,  # (R, *) from column 0, or None
    stored_moment,
    partial_others,  # (parts, R)
    partial_moment1,  # (parts, R) or None
    partial_moment2,
    first_row,
    rows,
    size,
    vocabulary,
    part,
    parts,
    hidden_stride,
    weight_stride,
    stored_stride,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BENT: tl.constexpr,
    ROWS: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program for ROWS rows and a part of the vocabulary: its sums, and what is stored of it."""
    if _any_flag(flag, first_row, rows, ROWS):
        begin = tl.program_id(1) * part
        for r in range(tl.program_id(0) * ROWS, tl.minimum(rows, tl.program_id(0) * ROWS + ROWS)):
            r_wide = tl.full([], 0, tl.int64) + r
            n = first_row + r_wide
            if tl.load(flag + n) != 0:
                q = tl.load(pivot + n)
                k = scale_of(tl.load(temperature + n), SOFTCAP, LOGIT_SCALE)
                s = _shift(partial, r_wide, rows, parts, k, PARTS)
                total = tl.zeros([BV], dtype=partial.dtype.element_ty)
                total1 = tl.zeros([BV], dtype=partial.dtype.element_ty)
                total2 = tl.zeros([BV], dtype=partial.dtype.element_ty)
                for start in range(begin, tl.minimum(vocabulary, begin + part), BV):
                    v = (start + tl.arange(0, BV)).to(tl.int64)
                    inside = v < vocabulary
                    a = _row_product(
                        hidden, weight, n, v, inside, size, hidden_stride, weight_stride, total.dtype, BV, BH
                    )
                    if bias is not None:
                        a += tl.load(bias + v, mask=inside, other=0.0).to(a.dtype)
                    b, f = bent(a, SOFTCAP, LOGIT_SCALE)
                    x = tl.where(inside & (v != q), exponent(b, k, s), float("-inf"))
                    e = tl.exp2(x * LOG2E)
                    total += e
                    moment = e * tl.maximum(x, FLOOR)
                    total1 += moment
                    total2 += moment * tl.maximum(x, FLOOR)
                    if stored is not None:
                        place = r_wide * stored_stride + v
                        kept = e * f if BENT else e
                        tl.store(stored + place, kept.to(stored.dtype.element_ty), mask=inside)
                        if stored_moment is not None:
                            product = (moment * f).to(stored_moment.dtype.element_ty)
                            tl.store(stored_moment + place, product, mask=inside)
                place = tl.program_id(1).to(tl.int64) * rows + r_wide
                tl.store(partial_others + place, tl.sum(total, axis=0))
                if partial_moment1 is not None:
                    tl.store(partial_moment1 + place, tl.sum(total1, axis=0))
                if partial_moment2 is not None:
                    tl.store(partial_moment2 + place, tl.sum(total2, axis=0))


@triton.jit(do_not_specialize=["first_row", "rows", "parts"])
def redo_merge_kernel(
    temperature,
    flag,
    partial,
    partial_others,
    partial_moment1,
    partial_moment2,
    shift,  # (M,): replaced for flagged rows, as the sums are
    others,
    moment1,
    moment2,
    first_row,
    rows,
    parts,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program for ROWS rows: the parts of each, added in their order."""
    if _any_flag(flag, first_row, rows, ROWS):
        p = tl.arange(0, PARTS)
        for r in range(tl.program_id(0) * ROWS, tl.minimum(rows, tl.program_id(0) * ROWS + ROWS)):
            r_wide = tl.full([], 0, tl.int64) + r
            n = first_row + r_wide
            if tl.load(flag + n) != 0:
                k = scale_of(tl.load(temperature + n), SOFTCAP, LOGIT_SCALE)
                place = p.to(tl.int64) * rows + r_wide
                tl.store(shift + n, _shift(partial, r_wide, rows, parts, k, PARTS))
                tl.store(others + n, tl.sum(tl.load(partial_others + place, mask=p < parts, other=0.0), axis=0))
                if moment1 is not None:
                    tl.store(moment1 + n, tl.sum(tl.load(partial_moment1 + place, mask=p < parts, other=0.0), axis=0))
                if moment2 is not None:
                    tl.store(moment2 + n, tl.sum(tl.load(partial_moment2 + place, mask=p < parts, other=0.0), axis=0))
