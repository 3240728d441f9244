"""Rows of `linear_logprob` whose target was next to impossible, computed again with their largest logit as shift."""

import triton
import triton.language as tl

from .linear_logprob import FLOOR, LOG2E, bent, exponent, scale_of


def redo_tile(itemsize: int) -> dict[str, int]:
    """Return the tile of `redo_kernel`."""
    return {"BV": 256 // itemsize, "BH": 256 // itemsize, "num_warps": 4}


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
def redo_kernel(
    hidden,  # (M, H)
    weight,  # (V, H)
    bias,
    pivot,
    shift,  # (M,): replaced for flagged rows
    temperature,
    count,
    stored,  # (R, *) from column 0, or None
    stored_moment,
    others,  # (M,), replaced for flagged rows, as the moments are
    moment1,
    moment2,
    flag,  # (M,) int8
    first_row,
    rows,  # R
    size,  # H
    vocabulary,  # V
    hidden_stride,
    weight_stride,
    stored_stride,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BENT: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """Compute flagged rows again with their largest logit as shift; leave at once where there are none.

    A fixed number of programs walks over the rows, so that nobody has to know on the host whether any is flagged.
    """
    for r in range(tl.program_id(0), rows, tl.num_programs(0)):
        # A sum with a tensor: the loop variable is a plain number in the interpreter.
        r_wide = tl.full([], 0, tl.int64) + r
        n = first_row + r_wide
        if tl.load(flag + n) != 0:
            q = tl.load(pivot + n)
            k = scale_of(tl.load(temperature + n), SOFTCAP, LOGIT_SCALE)
            top = tl.full([BV], float("-inf"), dtype=others.dtype.element_ty)
            for start in range(0, vocabulary, BV):
                v = (start + tl.arange(0, BV)).to(tl.int64)
                inside = v < vocabulary
                a = _row_product(
                    hidden, weight, n, v, inside, size, hidden_stride, weight_stride, others.dtype.element_ty, BV, BH
                )
                if bias is not None:
                    a += tl.load(bias + v, mask=inside, other=0.0).to(a.dtype)
                b, _f = bent(a, SOFTCAP, LOGIT_SCALE)
                top = tl.maximum(top, tl.where(inside & (v != q), b, float("-inf")))
            s = tl.max(top, axis=0) * k
            total = tl.zeros([BV], dtype=others.dtype.element_ty)
            total1 = tl.zeros([BV], dtype=others.dtype.element_ty)
            total2 = tl.zeros([BV], dtype=others.dtype.element_ty)
            for start in range(0, vocabulary, BV):
                v = (start + tl.arange(0, BV)).to(tl.int64)
                inside = v < vocabulary
                a = _row_product(
                    hidden, weight, n, v, inside, size, hidden_stride, weight_stride, others.dtype.element_ty, BV, BH
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
                        tl.store(stored_moment + place, (moment * f).to(stored_moment.dtype.element_ty), mask=inside)
            tl.store(shift + n, s)
            tl.store(others + n, tl.sum(total, axis=0))
            if moment1 is not None:
                tl.store(moment1 + n, tl.sum(total1, axis=0))
            if moment2 is not None:
                tl.store(moment2 + n, tl.sum(total2, axis=0))
