"""Everything around the matrix products of `linear_logprob`: what turns a tile of logits into sums and gradients.

Products belong to the vendor's library, which runs them near the chip's rate; what remains is one pass over each chunk
of logits. For a row n with pivot q and shift s the pass turns a = <h, W_v> into

    u = softcap tanh(logit_scale (a + bias) / softcap) / T        (logit_scale (a + bias) / T without softcap)
    e = exp(u - s), 0 at the pivot

adds e, e (u - s) and e (u - s)^2 up per row, and stores e, or e f with f = 1 - tanh^2 under a softcap, in the dtype of
the next product. No maximum is needed, because s is known beforehand: the logit of the row's target. Where other
tokens together are more than `LIMIT` times likelier than the target, the row is *flagged*, and `redo_kernel` computes
it again with its true maximum before anything else reads it.

One program owns a row, columns are added in a fixed order: the same bits at every run, no atomics. The pass must cost
few instructions to stay small beside the product (about 10 an element are 3 % of it at H = 4096 on an H100): lanes keep
sums of their own and meet once, the pivot is masked only in the tile that holds it, nothing is divided by T.
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
GRADIENT_TILE = {"BLOCK": 2048, "num_warps": 4}
COLUMN_SUM_TILE = {"ROWS": 32, "BLOCK": 128, "num_warps": 4}


def exp_tile(itemsize: int) -> dict[str, int]:
    """Return the tile of `exp_kernel` for logits of `itemsize` bytes: 16 bytes a lane, four rows."""
    return {"ROWS": 4, "BLOCK": 2048 // itemsize, "num_warps": 4}


def redo_tile(itemsize: int) -> dict[str, int]:
    """Return the tile of `redo_kernel`."""
    return {"BV": 256 // itemsize, "BH": 256 // itemsize, "num_warps": 4}


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
def exp_kernel(
    tile,  # (R, C): <hidden, weight> for R rows and C columns of the vocabulary, of float32 (float64)
    bias,  # (V,) or None
    pivot,  # (M,) int64
    shift,  # (M,)
    temperature,  # (M,)
    count,  # () int64 or None: rows from this one on hold no data
    stored,  # (R, *) at the tile's first column: e f if BENT, else e; or None
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
    if count is not None:
        live = inside_row & (n < tl.load(count))
    s = tl.load(shift + n, mask=live, other=0.0)
    k = scale_of(tl.load(temperature + n, mask=live, other=1.0), SOFTCAP, LOGIT_SCALE)
    q = tl.load(pivot + n, mask=live, other=-1) - first_column
    holds_pivot = tl.max(((q >= 0) & (q < columns)).to(tl.int32), axis=0) > 0
    q = q.to(tl.int32)
    total = tl.zeros([ROWS, BLOCK], dtype=others.dtype.element_ty)
    total1 = tl.zeros([ROWS, BLOCK], dtype=others.dtype.element_ty)
    total2 = tl.zeros([ROWS, BLOCK], dtype=others.dtype.element_ty)
    row = r.to(tl.int64)[:, None]
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        used = live[:, None] & (c < columns)[None, :]
        # What is not read stands as -inf, which needs no mask later on.
        a = tl.load(tile + row * tile_stride + c[None, :], mask=used, other=float("-inf")).to(total.dtype)
        if bias is not None:
            a += tl.load(bias + first_column + c, mask=c < columns, other=0.0).to(total.dtype)[None, :]
        b, f = bent(a, SOFTCAP, LOGIT_SCALE)
        x = exponent(b, k[:, None], s[:, None])
        if SOFTCAP != 0.0:  # the cap of -inf is finite
            x = tl.where(used, x, float("-inf"))
        if holds_pivot:
            x = tl.where(c[None, :] == q[:, None], float("-inf"), x)
        e = tl.exp2(x * LOG2E)
        total += e
        if moment1 is not None:
            x = tl.maximum(x, FLOOR)
            total1 += e * x
            if moment2 is not None:
                total2 += e * x * x
        if stored is not None:
            place = row * stored_stride + c[None, :]
            inside = inside_row[:, None] & (c < columns)[None, :]
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


@triton.jit
def logit_gradient_kernel(
    stored,  # (R, C): e, as `exp_kernel` left it without BENT
    alpha,  # (M,)
    gamma,  # (M,) or None
    shift,  # (M,)
    temperature,  # (M,)
    out,  # (R, C): -e f (alpha + gamma (u - shift))
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
    inside = c < columns
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
    value = tl.where(e > 0.0, -e * f * a, 0.0)
    tl.store(out + r * out_stride + c, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def column_sum_kernel(
    stored,  # (R, C)
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
    inside = c < columns
    total = tl.zeros([ROWS, BLOCK], dtype=out.dtype.element_ty)
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)
        a = tl.load(factor + first_row + r, mask=r < rows, other=0.0)
        place = r.to(tl.int64)[:, None] * stored_stride + c[None, :]
        e = tl.load(stored + place, mask=(r < rows)[:, None] & inside[None, :], other=0.0).to(total.dtype)
        total += tl.where(a == 0.0, 0.0, a)[:, None] * e
    before = tl.load(out + c, mask=inside, other=0.0)
    tl.store(out + c, before + tl.sum(total, axis=0), mask=inside)
