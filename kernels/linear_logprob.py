"""Everything around the matrix products of `linear_logprob`: epilogues, and one product with its epilogue fused.

Products belong to the vendor's library, which runs them near the chip's rate; what remains is one pass over each chunk
of logits. For a row n with pivot q and shift s the pass turns a = <h, W_v> into

    u = softcap tanh(logit_scale (a + bias) / softcap) / T        (logit_scale (a + bias) / T without softcap)
    e = exp(u - s), 0 at the pivot

adds e, e (u - s) and e (u - s)^2 up per row, and stores e, or e f with f = 1 - tanh^2 under a softcap, in the dtype of
the next product. No maximum is needed, because s is known beforehand: the logit of the row's target. Where another
token is more than exp(68) times likelier than the target the row is *flagged* (its exponents are clamped, so that no
inf can spread through a product), and `redo_kernel` computes it again with its true maximum.

One program owns a row, columns are added in a fixed order: the same bits at every run, no atomics.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LIMIT = 68.0  # nats above the shift from which a row is flagged: e < 2^98, and sums of 2^20 of them < 2^118


@triton.jit
def _logit(a, warmth, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr):
    """Return u and f = 1 - tanh^2 for the head's output a (bias included) and temperatures that broadcast to it."""
    a = a * LOGIT_SCALE
    if SOFTCAP == 0.0:
        return a / warmth, tl.zeros_like(a) + 1.0
    else:
        # tanh through exp(-2|x|): f = 4 t / (1 + t)^2 keeps its digits where tanh is flat.
        t = tl.exp(-2.0 * tl.abs(a) / SOFTCAP)
        bent = (1.0 - t) / (1.0 + t)
        bent = tl.where(a < 0, -bent, bent)
        # Near 0 the difference 1 - t has lost digits; x - x^3/3 has not.
        x = a / SOFTCAP
        bent = tl.where(tl.abs(x) < 1e-2, x * (1.0 - x * x * (1.0 / 3.0 - x * x * (2.0 / 15.0))), bent)
        return SOFTCAP * bent / warmth, 4.0 * t / ((1.0 + t) * (1.0 + t))


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
    k = tl.program_id(0).to(tl.int64)
    v = tl.load(column + k)
    n = k
    if position is not None:
        n = tl.load(position + k)
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
    u, _ = _logit(a, tl.load(temperature + n), SOFTCAP, LOGIT_SCALE)
    tl.store(out + k, tl.where(live, u, 0.0))


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
    flag,  # (M,) int8: set to 1 where the shift is too small
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
    q = tl.load(pivot + n, mask=live, other=-1)
    s = tl.load(shift + n, mask=live, other=0.0)
    warmth = tl.load(temperature + n, mask=live, other=1.0)
    total = tl.zeros([ROWS], dtype=others.dtype.element_ty)
    total1 = tl.zeros([ROWS], dtype=others.dtype.element_ty)
    total2 = tl.zeros([ROWS], dtype=others.dtype.element_ty)
    highest = tl.full([ROWS], float("-inf"), dtype=others.dtype.element_ty)
    row = r.to(tl.int64)[:, None]
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = inside_row[:, None] & (c < columns)[None, :]
        used = live[:, None] & (c < columns)[None, :]
        a = tl.load(tile + row * tile_stride + c[None, :], mask=used, other=0.0).to(total.dtype)
        v = first_column + c
        if bias is not None:
            a += tl.load(bias + v, mask=c < columns, other=0.0).to(total.dtype)[None, :]
        u, f = _logit(a, warmth[:, None], SOFTCAP, LOGIT_SCALE)
        used = used & (v[None, :] != q[:, None])
        x = tl.where(used, u - s[:, None], float("-inf"))
        # tl.maximum drops NaN; a NaN logit must reach the sums, so only numbers are clamped.
        highest = tl.maximum(highest, tl.max(x, axis=1))
        x = tl.where(x > LIMIT, LIMIT, x)
        e = tl.exp2(x * LOG2E)
        total += tl.sum(e, axis=1)
        if moment1 is not None:
            moment = tl.where(e == 0.0, 0.0, e * x)
            total1 += tl.sum(moment, axis=1)
            if moment2 is not None:
                total2 += tl.sum(tl.where(e == 0.0, 0.0, moment * x), axis=1)
        if stored is not None:
            place = row * stored_stride + c[None, :]
            kept = e * f if BENT else e
            tl.store(stored + place, kept.to(stored.dtype.element_ty), mask=inside)
            if stored_moment is not None:
                product = tl.where(e == 0.0, 0.0, e * f * x)
                tl.store(stored_moment + place, product.to(stored_moment.dtype.element_ty), mask=inside)
    tl.store(others + n, tl.load(others + n, mask=live, other=0.0) + total, mask=live)
    if moment1 is not None:
        tl.store(moment1 + n, tl.load(moment1 + n, mask=live, other=0.0) + total1, mask=live)
    if moment2 is not None:
        tl.store(moment2 + n, tl.load(moment2 + n, mask=live, other=0.0) + total2, mask=live)
    # A shift of -inf (a target with logit -inf) or NaN makes every difference useless; the row is redone.
    bad = (highest > LIMIT) | (s == float("-inf"))
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
            warmth = tl.load(temperature + n)
            top = tl.full([BV], float("-inf"), dtype=others.dtype.element_ty)
            for start in range(0, vocabulary, BV):
                v = (start + tl.arange(0, BV)).to(tl.int64)
                inside = v < vocabulary
                a = _row_product(
                    hidden, weight, n, v, inside, size, hidden_stride, weight_stride, others.dtype.element_ty, BV, BH
                )
                if bias is not None:
                    a += tl.load(bias + v, mask=inside, other=0.0).to(a.dtype)
                u, _ = _logit(a, warmth, SOFTCAP, LOGIT_SCALE)
                top = tl.maximum(top, tl.where(inside & (v != q), u, float("-inf")))
            s = tl.max(top, axis=0)
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
                u, f = _logit(a, warmth, SOFTCAP, LOGIT_SCALE)
                x = tl.where(inside & (v != q), u - s, float("-inf"))
                e = tl.exp2(x * LOG2E)
                total += e
                moment = tl.where(e == 0.0, 0.0, e * x)
                total1 += moment
                total2 += tl.where(e == 0.0, 0.0, moment * x)
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
    x = tl.log(tl.where(e > 0.0, e, 1.0))
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
    BLOCK: tl.constexpr,
):
    """One program for a block of columns: sum over rows of factor * stored, in the order of the rows."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    total = tl.load(out + c, mask=inside, other=0.0)
    wide = tl.full([], 0, tl.int64)
    for r in range(0, rows):
        a = tl.load(factor + first_row + r)
        e = tl.load(stored + (wide + r) * stored_stride + c, mask=inside, other=0.0).to(total.dtype)
        total += tl.where(a == 0.0, 0.0, a * e)
    tl.store(out + c, total, mask=inside)


@triton.jit
def fused_sum_kernel(
    hidden,  # (M, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    pivot,
    shift,
    temperature,
    count,
    partial,  # (tiles, M) sums of a tile of the vocabulary
    flag,  # (tiles, M) int8
    rows,  # M
    size,  # H
    vocabulary,  # V
    hidden_stride,
    weight_stride,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    LIMIT: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The product and its epilogue in one kernel, for scoring without gradient: nothing of [M, V] is written.

    Tiles of the vocabulary run slowly and tiles of rows fast within a group, so that a tile of the head is read from
    DRAM once for GROUP tiles of rows.
    """
    row_tiles = tl.cdiv(rows, BM)
    column_tiles = tl.cdiv(vocabulary, BV)
    index = tl.program_id(0)
    per_group = GROUP * column_tiles
    group = index // per_group
    first = group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    row_tile = first + (index % per_group) % height
    column_tile = (index % per_group) // height
    n = row_tile * BM + tl.arange(0, BM)
    v = column_tile * BV + tl.arange(0, BV)
    live = n < rows
    if count is not None:
        live = live & (n < tl.load(count))
    # Rows and columns past the end read row 0: in range, and dropped below. Loads without a mask pipeline best.
    n_read = tl.where(n < rows, n, 0).to(tl.int64)
    v_read = tl.where(v < vocabulary, v, 0).to(tl.int64)
    a = tl.zeros([BM, BV], dtype=partial.dtype.element_ty)
    for start in range(0, size, BH):
        j = start + tl.arange(0, BH)
        h = tl.load(hidden + n_read[:, None] * hidden_stride + j[None, :], mask=(j < size)[None, :], other=0.0)
        w = tl.load(weight + v_read[None, :] * weight_stride + j[:, None], mask=(j < size)[:, None], other=0.0)
        if UPCAST:  # the interpreter multiplies the bit patterns of bf16
            h, w = h.to(partial.dtype.element_ty), w.to(partial.dtype.element_ty)
        a = tl.dot(h, w, acc=a, input_precision="ieee")
    if bias is not None:
        a += tl.load(bias + v, mask=v < vocabulary, other=0.0).to(a.dtype)[None, :]
    warmth = tl.load(temperature + n, mask=live, other=1.0)
    s = tl.load(shift + n, mask=live, other=0.0)
    q = tl.load(pivot + n, mask=live, other=-1)
    u, _ = _logit(a, warmth[:, None], SOFTCAP, LOGIT_SCALE)
    used = live[:, None] & (v < vocabulary)[None, :] & (v[None, :] != q[:, None])
    x = tl.where(used, u - s[:, None], float("-inf"))
    highest = tl.max(x, axis=1)
    x = tl.where(x > LIMIT, LIMIT, x)
    place = column_tile.to(tl.int64) * rows + n
    tl.store(partial + place, tl.sum(tl.exp2(x * LOG2E), axis=1), mask=n < rows)
    bad = (highest > LIMIT) | (s == float("-inf"))
    tl.store(flag + place, (live & bad).to(tl.int8), mask=n < rows)
