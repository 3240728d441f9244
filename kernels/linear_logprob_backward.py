"""What the backward pass of `linear_logprob` with a trainable head does beside its matrix products.

Off the pivot the gradient of the logits is a row factor times the stored exponentials, which then go into the products
as they are: 0 is stored at the pivot, whose entries are added to the results.
"""

import triton
import triton.language as tl

from .linear_logprob import LN2, padded

GRADIENT_TILE = {"BLOCK": 2048, "num_warps": 4}
COLUMN_SUM_TILE = {"ROWS": 32, "BLOCK": 128, "num_warps": 4}


def scale_tile(size: int) -> dict[str, int]:
    """Return the tile of `scale_kernel`."""
    return {"BLOCK": min(2048, triton.next_power_of_2(size)), "num_warps": 4}


@triton.jit(do_not_specialize=["first_row"])
def scale_kernel(
    x,  # (R, H)
    factor,  # (M,)
    out,  # (R, H)
    first_row,
    size,  # H
    x_stride,
    BLOCK: tl.constexpr,
):
    """One program a row and a block of columns: factor x, rounded once; 0 where the factor is, whatever x holds."""
    r = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(factor + first_row + r)
    value = tl.load(x + r * x_stride + j, mask=j < size, other=0.0).to(a.dtype)
    value = tl.where(a == 0.0, 0.0, a * value)
    tl.store(out + r * size + j, value.to(out.dtype.element_ty), mask=j < size)


@triton.jit(do_not_specialize=["first_row"])
def logit_gradient_kernel(
    stored,  # (R, C): e, as `exp_kernel` left it without BENT; rows are padded
    alpha,  # (M,)
    gamma,  # (M,) or None
    shift,  # (M,)
    temperature,  # (M,)
    out,  # (R, C): -e f (alpha + gamma (u - shift)); rows are padded
    first_row,
    columns,
    stored_stride,
    out_stride,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and a block of columns: what the row factor alone cannot say (entropy, softcap)."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < padded(columns)
    n = first_row + r
    a = tl.load(alpha + n)
    e = tl.load(stored + r * stored_stride + c, mask=inside, other=0.0).to(a.dtype)
    # A flushed e is one that no sum would have noticed; its logarithm is not asked for.
    x = tl.log2(tl.where(e > 0.0, e, 1.0)) * LN2
    f = tl.zeros_like(e) + 1.0
    if SOFTCAP != 0.0:
        bent = (x + tl.load(shift + n)) * (tl.load(temperature + n) / SOFTCAP)
        f = (1.0 - bent) * (1.0 + bent)
    if gamma is not None:
        a = a + tl.load(gamma + n) * x
    value = tl.where(e == 0.0, e * a, -e * f * a)  # a NaN stays one; f may be NaN in rows that do not count
    tl.store(out + r * out_stride + c, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_row", "rows"])
def column_sum_kernel(
    stored,  # (R, C); rows are padded
    factor,  # (M,)
    out,  # (C,): to which the sums are added
    first_row,
    rows,
    columns,
    stored_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for a block of columns: sum over rows of factor * stored, in a fixed order."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < padded(columns)
    total = tl.zeros([ROWS, BLOCK], dtype=out.dtype.element_ty)
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)
        a = tl.load(factor + first_row + r, mask=r < rows, other=0.0)
        place = r.to(tl.int64)[:, None] * stored_stride + c[None, :]
        e = tl.load(stored + place, mask=(r < rows)[:, None] & inside[None, :], other=0.0).to(total.dtype)
        total += tl.where(a == 0.0, 0.0, a)[:, None] * e
    before = tl.load(out + c, mask=c < columns, other=0.0)
    tl.store(out + c, before + tl.sum(total, axis=0), mask=c < columns)
