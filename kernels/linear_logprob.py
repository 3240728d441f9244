"""Everything around the matrix products of `linear_logprob`: what turns a tile of logits into sums and gradients.

Products belong to the vendor's library, which runs them near the chip's rate; what remains is one pass over each chunk
of logits. For a row n with pivot q and shift s the pass turns a = <h, W_v> into

    u = softcap tanh(logit_scale (a + bias) / softcap) / T        (logit_scale (a + bias) / T without softcap)
    e = exp(u - s), 0 at the pivot

adds e, e (u - s) and e (u - s)^2 up per row, and stores e, or e f with f = 1 - tanh^2 under a softcap, in the dtype of
the next product. No maximum is needed, because s is known beforehand: the logit of the row's target. Where other
tokens together are more than `LIMIT` times likelier than the target, the row is *flagged*, and the kernels of
`linear_logprob_flagged` compute it again with its true maximum before anything else reads it.

One program owns a row, columns are added in a fixed order: the same bits at every run, no atomics. The pass must cost
few instructions to stay small beside the product (about 10 an element are 3 % of it at H = 4096 on an H100): lanes keep
sums of their own and meet once, pivot and padding are masked only in the tile that holds them, nothing is divided by T.
"""

import triton
import triton.language as tl

from ._math import bend, quotient

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LIMIT = 2.0**98  # leaves room for 2^20 terms, and for their squared exponents, below the largest float32
# exp is 0 from here on in either precision; a finite floor keeps 0 * exponent from being NaN where a logit is -inf.
FLOOR = tl.constexpr(-1e4)

TARGET_TILE = {"BLOCK": 1024, "num_warps": 4}


def exp_tile(itemsize: int) -> dict[str, int]:
    """Return the tile of `exp_kernel` for logits of `itemsize` bytes: 16 bytes a lane, four rows."""
    return {"ROWS": 4, "BLOCK": 2048 // itemsize, "num_warps": 4}


def combine_tile(size: int) -> dict[str, int]:
    """Return the tile of `combine_kernel`."""
    return {"BLOCK": min(1024, triton.next_power_of_2(size)), "num_warps": 4}


@triton.jit
def scale_of(warmth, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr):
    """Return k of u = k b, for b of `bent`."""
    if SOFTCAP == 0.0:
        return quotient(LOGIT_SCALE, warmth)
    else:
        return quotient(SOFTCAP, warmth)


@triton.jit
def bent(a, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr):
    """Return b of u = k b, which is the head's output a (bias included) bent by the softcap, and f = 1 - tanh^2."""
    if SOFTCAP == 0.0:
        return a, tl.full([], 1.0, a.dtype)
    else:
        return bend(a * (LOGIT_SCALE / SOFTCAP))


@triton.jit
def exponent(b, k, s):
    """Return u - s = k b - s, rounded once."""
    return tl.fma(b, tl.zeros_like(b) + k, tl.zeros_like(b) - s)


@triton.jit
def target_logit_kernel(
    hidden,  # (M, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    column,  # (F,) int64, -1: no target
    position,  # (F,) int64, or None: target i belongs to row i
    temperature,  # (M,)
    out,  # (F,): u at the target, 0 without one
    size,  # H
    hidden_stride,
    weight_stride,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a target: the dot product of a hidden row with its target's row of the head."""
    i = tl.program_id(0).to(tl.int64)
    v = tl.load(column + i)
    n = i
    if position is not None:
        n = tl.load(position + i)
    live = v >= 0
    v = tl.maximum(v, 0)
    offset = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for start in range(0, size, BLOCK):
        inside = start + offset < size
        h = tl.load(hidden + n * hidden_stride + start + offset, mask=inside, other=0.0).to(total.dtype)
        w = tl.load(weight + v * weight_stride + start + offset, mask=inside, other=0.0).to(total.dtype)
        total += h * w
    a = tl.sum(total, axis=0)
    if bias is not None:
        a += tl.load(bias + v).to(total.dtype)
    b, _f = bent(a, SOFTCAP, LOGIT_SCALE)
    u = b * scale_of(tl.load(temperature + n), SOFTCAP, LOGIT_SCALE)
    tl.store(out + i, tl.where(live, u, 0.0))


@triton.jit
def padded(columns):
    """Return the columns up to a multiple of 16, which the compiler can see: accesses of 16 bytes need no other.

    For rows that begin at multiples of 128 bytes and have room for them, however ragged the vocabulary is.
    """
    return tl.cdiv(columns, 16) * 16


# What varies from call to call is not specialised: a new number of rows compiles nothing.
@triton.jit(do_not_specialize=["first_row", "rows", "columns"])
def exp_kernel(
    tile,  # (R, C): <hidden, weight> for R rows and C columns of the vocabulary, of float32 (float64); rows are padded
    bias,  # (V,) or None
    pivot,  # (M,) int64
    shift,  # (M,)
    temperature,  # (M,)
    counts,  # (M,) bool: whether a row counts; None: all do
    stored,  # (R, *) at the tile's first column: e f if BENT, else e; or None. Rows are padded, with 0
    stored_moment,  # the same for e f (u - s), or None
    others,  # (M,): sums to which this tile's are added
    moment1,  # (M,) or None
    moment2,  # (M,) or None
    flag,  # (M,) int8: set to 1 where the shift is too small for the row
    first_row,  # the tile's first row among the M
    rows,  # R
    first_column,
    columns,  # C
    tile_stride,
    stored_stride,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BENT: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for ROWS rows: their part of the vocabulary, block by block."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_row = r < rows
    n = first_row + r
    live = inside_row
    if counts is not None:
        live = inside_row & tl.load(counts + n, mask=inside_row, other=0)
    s = tl.load(shift + n, mask=live, other=0.0)
    k = scale_of(tl.load(temperature + n, mask=live, other=1.0), SOFTCAP, LOGIT_SCALE)
    q = tl.load(pivot + n, mask=live, other=-1) - first_column
    holds_pivot = tl.max(((q >= 0) & (q < columns)).to(tl.int32), axis=0) > 0
    q = q.to(tl.int32)
    total = tl.zeros([ROWS, BLOCK], dtype=others.dtype.element_ty)
    total1 = tl.zeros([ROWS, BLOCK], dtype=others.dtype.element_ty)
    total2 = tl.zeros([ROWS, BLOCK], dtype=others.dtype.element_ty)
    row = r.to(tl.int64)[:, None]
    wide = padded(columns)
    masked = holds_pivot | (wide != columns)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        read = live[:, None] & (c < wide)[None, :]
        # What is not read stands as -inf, which needs no mask later on.
        a = tl.load(tile + row * tile_stride + c[None, :], mask=read, other=float("-inf")).to(total.dtype)
        if bias is not None:
            a += tl.load(bias + first_column + c, mask=c < columns, other=0.0).to(total.dtype)[None, :]
        b, f = bent(a, SOFTCAP, LOGIT_SCALE)
        x = exponent(b, k[:, None], s[:, None])
        if SOFTCAP != 0.0:  # the cap of -inf is finite
            x = tl.where(live[:, None] & (c < columns)[None, :], x, float("-inf"))
        if masked:
            x = tl.where((c[None, :] == q[:, None]) | (c >= columns)[None, :], float("-inf"), x)
        e = tl.exp2(x * LOG2E)
        total += e
        if moment1 is not None:
            x = tl.maximum(x, FLOOR)
            total1 += e * x
            if moment2 is not None:
                total2 += e * x * x
        if stored is not None:
            place = row * stored_stride + c[None, :]
            inside = inside_row[:, None] & (c < wide)[None, :]
            kept = e * f if BENT else e
            tl.store(stored + place, kept.to(stored.dtype.element_ty), mask=inside)
            if stored_moment is not None:
                product = e * f * tl.maximum(x, FLOOR)
                tl.store(stored_moment + place, product.to(stored_moment.dtype.element_ty), mask=inside)
    added = tl.sum(total, axis=1)
    tl.store(others + n, tl.load(others + n, mask=live, other=0.0) + added, mask=live)
    if moment1 is not None:
        added1 = tl.sum(total1, axis=1)
        tl.store(moment1 + n, tl.load(moment1 + n, mask=live, other=0.0) + added1, mask=live)
    if moment2 is not None:
        added2 = tl.sum(total2, axis=1)
        tl.store(moment2 + n, tl.load(moment2 + n, mask=live, other=0.0) + added2, mask=live)
    # A shift of -inf (a target with logit -inf) makes every difference useless; NaN stays where it is.
    bad = (added > LIMIT) | (s == float("-inf"))
    tl.store(flag + n, tl.full([ROWS], 1, tl.int8), mask=live & bad)


@triton.jit
def combine_kernel(
    weight,  # (V, H)
    weighted,  # (M, H)
    weighted_moment,  # (M, H) or None
    pivot,  # (M,) int64
    pivot_coefficient,  # (M,), or (F,) with `position`
    weighted_coefficient,  # (M,)
    moment_coefficient,  # (M,) or None
    column,  # (F,) int64 or None
    position,  # (F,) int64 or None
    own_coefficient,  # (F,) or None
    out,  # (M, H), or (F, H) with `position`
    size,  # H
    weight_stride,
    weighted_stride,
    BLOCK: tl.constexpr,
):
    """One program a row of the result and a block of columns: a few rows of the head and of sums, added."""
    k = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < size
    n = k
    if position is not None:
        n = tl.load(position + k)
    # A coefficient of 0 must give 0 even where a row that does not count holds NaN.
    q = tl.load(pivot + n)
    factor = tl.load(pivot_coefficient + k)
    factor = tl.where(q >= 0, factor, 0.0)
    row = tl.load(weight + tl.maximum(q, 0) * weight_stride + j, mask=inside, other=0.0)
    value = tl.where(factor == 0.0, 0.0, factor * row.to(factor.dtype))
    factor = tl.load(weighted_coefficient + n)
    sums = tl.load(weighted + n * weighted_stride + j, mask=inside, other=0.0).to(factor.dtype)
    value += tl.where(factor == 0.0, 0.0, factor * sums)
    if moment_coefficient is not None:
        factor = tl.load(moment_coefficient + n)
        sums = tl.load(weighted_moment + n * weighted_stride + j, mask=inside, other=0.0).to(factor.dtype)
        value += tl.where(factor == 0.0, 0.0, factor * sums)
    if column is not None:
        v = tl.load(column + k)
        factor = tl.load(own_coefficient + k)
        factor = tl.where(v >= 0, factor, 0.0)
        row = tl.load(weight + tl.maximum(v, 0) * weight_stride + j, mask=inside, other=0.0)
        value += tl.where(factor == 0.0, 0.0, factor * row.to(factor.dtype))
    tl.store(out + k * size + j, value.to(out.dtype.element_ty), mask=inside)
