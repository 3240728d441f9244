"""Log-probabilities of targets from logits: one read forward, one read and one write backward, for any upstream.

The formulas are those of `mopl/ops/gathered_logprob.py`. Both passes are bound by memory only while an element costs
few instructions (about 14 forward and 28 backward, for bf16 on an H100), which decides how they are written:

* Every lane of a tile keeps a maximum and sums of its own over the tiles of a row; lanes meet once, at the end.
* Loads are masked by the end of the row alone, so that they stay 16 bytes wide; where rows begin at multiples of 16
  columns but do not end at one (PADDED), in their last tile alone. The pivot (the row's likeliest target), which every
  sum leaves out, is masked in the one tile that holds it.
* No element is divided by the temperature. Exponents are differences of capped logits times log2(e) / temperature,
  formed by one fused multiply-add each, so that only the difference is rounded. What is subtracted was rounded, too:
  past `FARTHEST` by so much that exp2 could be 0 or infinite. There neighbouring numbers are 64 apart as exponents: a
  lane that lies below, as one of tokens that a mask has left at -1e10 or -3e38, adds nothing, and in a row whose
  largest logit lies beyond, only those that equal it have any probability.

Rows that do not count are not read; rows whose upstream gradients are all 0 neither.
"""

import triton
import triton.language as tl

from ._math import bend, log1p, quotient

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# exp2 is 0 from here on in either precision; a finite floor keeps 0 * exponent from being NaN where a logit is -inf.
FLOOR = tl.constexpr(-1e4)

# Exponents in units of log2 whose last digit, of float32 and of float64, is 128.
FARTHEST = tl.constexpr(2.0**30)
FARTHEST_WIDE = tl.constexpr(2.0**59)


def row_tile(vocabulary: int, itemsize: int, depth: int) -> dict[str, int]:
    """Return DEPTH, WIDTH and num_warps for rows of logits of `itemsize` bytes: 16 bytes a lane, `depth` times."""
    width = min(triton.next_power_of_2(max(vocabulary, 16)), 128 * 16 // itemsize)
    return {"DEPTH": min(triton.next_power_of_2(-(-vocabulary // width)), depth), "WIDTH": width, "num_warps": 4}


def forward_tile(vocabulary: int, itemsize: int, softcap: float) -> dict[str, int]:
    """Return the tile of `forward_kernel`; a softcap and float64 take registers."""
    return row_tile(vocabulary, itemsize, 2 if itemsize == 8 else 4 if softcap else 8)


def backward_tile(vocabulary: int, itemsize: int) -> dict[str, int]:
    """Return the tile of `backward_kernel`."""
    return row_tile(vocabulary, itemsize, 4)


def backward_parts(rows: int, vocabulary: int, tile: dict[str, int]) -> int:
    """Return among how many programs `backward_kernel` shares a row, so that few rows still fill a GPU."""
    tiles = -(-vocabulary // (tile["DEPTH"] * tile["WIDTH"]))
    return max(1, min(tiles, 1024 // max(rows, 1)))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _minus_expm1(x):
    """Return 1 - exp(x) for x <= 0 to full relative accuracy: Kahan's quotient undoes the rounding of exp."""
    y = tl.exp(x)
    near = y == 1.0
    far = y == 0.0
    safe = tl.where(near | far, 0.5, y)
    value = (1.0 - safe) * (x / tl.log(safe))
    return tl.where(near, -x, tl.where(far, 1.0, value))


@triton.jit
def _capped(x, SOFTCAP: tl.constexpr):
    """Return the logit after the softcap, before the temperature, and its slope."""
    if SOFTCAP == 0.0:
        return x, tl.full([], 1.0, x.dtype)
    else:
        y, slope = bend(x * (1.0 / SOFTCAP))
        return SOFTCAP * y, slope


@triton.jit
def _pivot(value, counts, j, TARGETS: tl.constexpr):
    """Return the place of the largest value that counts, the first of equal ones; of the first one if all are NaN."""
    best = tl.max(tl.where(counts & (value == value), value, float("-inf")), axis=0)
    first = tl.min(tl.where(counts & (value == best), j, TARGETS), axis=0)
    return tl.where(first == TARGETS, tl.min(tl.where(counts, j, TARGETS), axis=0), first)


@triton.jit
def _load(row, v, whole, vocabulary, other, PADDED: tl.constexpr):
    """Return the logits at columns `v`, all of them inside if `whole`, and `other` past the vocabulary."""
    if PADDED:
        if whole:
            x = tl.load(row + v)
        else:
            x = tl.load(row + v, mask=v < vocabulary, other=other)
    else:
        x = tl.load(row + v, mask=v < vocabulary, other=other)
    return x


@triton.jit
def _others(
    row, v, start, q, vocabulary, dtype: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr
):
    """Return the capped logits at columns `v`, from `start` on; -inf at the pivot and past the vocabulary."""
    x = _load(row, v, start + SIZE <= vocabulary, vocabulary, float("-inf"), PADDED).to(dtype)
    x, _slopes = _capped(x, SOFTCAP)
    if SOFTCAP != 0.0:  # the cap of -inf is finite
        x = tl.where(v < vocabulary, x, float("-inf"))
    if (q >= start) & (q < start + SIZE):
        x = tl.where(v == q, float("-inf"), x)
    return x


@triton.jit
def _store(out, v, value, whole, vocabulary, PADDED: tl.constexpr):
    """Write one tile of the gradient; see `_load`."""
    value = value.to(out.dtype.element_ty)
    if PADDED:
        if whole:
            tl.store(out + v, value)
        else:
            tl.store(out + v, value, mask=v < vocabulary)
    else:
        tl.store(out + v, value, mask=v < vocabulary)


@triton.jit
def forward_kernel(
    logits,  # (N, V)
    target,  # (N, J) int64, negative where it does not count
    temperature,  # (N,) in the dtype of the arithmetic, as everything below
    logprob,  # (N, J)
    logsumexp,  # (N,)
    entropy,  # (N,) or None
    variance,  # (N,) or None
    vocabulary,  # V
    targets,  # J
    logits_stride,
    SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,  # the stride of rows is a multiple of 16, V is not
    TARGETS: tl.constexpr,  # a power of two >= J
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row, in tiles of DEPTH x WIDTH columns."""
    n = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, TARGETS)
    y = tl.load(target + n * targets + j, mask=j < targets, other=-1)
    counts = y >= 0
    dtype: tl.constexpr = logsumexp.dtype.element_ty
    if tl.max(y, axis=0) < 0:
        tl.store(logprob + n * targets + j, tl.zeros([TARGETS], dtype=dtype), mask=j < targets)
        tl.store(logsumexp + n, 0.0)
        if entropy is not None:
            tl.store(entropy + n, 0.0)
        if variance is not None:
            tl.store(variance + n, 0.0)
    else:
        warmth = tl.load(temperature + n)
        rate = quotient(LOG2E, warmth)  # an exponent's units of log2 for one of a capped logit
        row = logits + n * logits_stride
        # A target past the vocabulary reads as NaN, which then stands in its result.
        at = tl.load(row + y, mask=counts & (y < vocabulary), other=float("nan")).to(dtype)
        at, _slope = _capped(at, SOFTCAP)
        first = _pivot(at, counts, j, TARGETS)
        q = tl.sum(tl.where(j == first, y, 0), axis=0)
        own = tl.sum(tl.where(j == first, at, 0.0), axis=0)

        place = tl.arange(0, DEPTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        farthest: tl.constexpr = FARTHEST_WIDE if dtype == tl.float64 else FARTHEST
        highest = tl.full([WIDTH], float("-inf"), dtype=dtype)  # capped logit
        anchor = tl.full([WIDTH], -farthest, dtype=dtype)  # the same as an exponent
        total = tl.zeros([WIDTH], dtype=dtype)
        moment1 = tl.zeros([WIDTH], dtype=dtype)
        moment2 = tl.zeros([WIDTH], dtype=dtype)
        for start in range(0, vocabulary, DEPTH * WIDTH):
            v = start + place
            x = _others(row, v, start, q, vocabulary, dtype, SOFTCAP, PADDED, DEPTH * WIDTH)
            highest = tl.maximum(highest, tl.max(x, axis=0))
            raised = tl.maximum(highest * rate, -farthest)
            down = anchor - raised
            scale = tl.exp2(down)
            anchor = raised
            d = tl.fma(x, tl.zeros_like(x) + rate, tl.zeros_like(x) - raised[None, :])
            e = tl.exp2(d)
            if entropy is not None:
                below = tl.maximum(d, FLOOR)
                drop = tl.maximum(down, FLOOR)
                if variance is not None:
                    moment2 = scale * (moment2 + drop * (2.0 * moment1 + drop * total))
                    moment2 += tl.sum(e * below * below, axis=0)
                moment1 = scale * (moment1 + drop * total) + tl.sum(e * below, axis=0)
            total = scale * total + tl.sum(e, axis=0)

        # The lanes meet at the largest maximum.
        top = tl.max(highest, axis=0)
        level = tl.maximum(top * rate, -farthest)
        down = anchor - level
        scale = tl.exp2(down)
        if entropy is not None:
            drop = tl.maximum(down, FLOOR)
            if variance is not None:
                moment2 = tl.sum(scale * (moment2 + drop * (2.0 * moment1 + drop * total)), axis=0) * (LN2 * LN2)
            moment1 = tl.sum(scale * (moment1 + drop * total), axis=0) * LN2
        total = tl.sum(scale * total, axis=0)
        gap = tl.fma(-own, rate, level) * LN2  # of the level over the pivot, in nats
        if tl.abs(own * rate) >= farthest:
            gap = level * LN2 - quotient(own, warmth)
        low = tl.fma(top, rate, -level) * LN2  # of top / T over the level, which is rounded
        if (tl.abs(top * rate) >= farthest) & (tl.abs(top) < float("inf")):
            ties = tl.zeros([WIDTH], dtype=dtype)
            for start in range(0, vocabulary, WIDTH):
                v = start + tl.arange(0, WIDTH)
                x = _others(row, v, start, q, vocabulary, dtype, SOFTCAP, PADDED, WIDTH)
                ties += tl.where(x == x, (x == top).to(dtype), x)
            total = tl.sum(ties, axis=0)
            gap, low = quotient(top - own, warmth), total * 0.0
            if entropy is not None:
                moment1 = total * 0.0
            if variance is not None:
                moment2 = total * 0.0

        # Everything relative to the pivot: a confident row keeps its digits.
        alone = total == 0.0
        log_total = tl.log(tl.where(alone, 1.0, total))
        odds = tl.where(alone, float("-inf"), gap + log_total)
        confident = -_softplus(odds)
        # The logsumexp from the larger of its two summands on, in one rounding of its size: the backward pass takes its
        # error for one of every probability, but not the rounding of top / T, which it forms alike.
        over_top = (log_total - low) + _softplus(-odds)
        lse = tl.where(odds > 0.0, quotient(top, warmth) + over_top, quotient(own, warmth) - confident)
        tl.store(logsumexp + n, lse)
        value = quotient(at - own, tl.zeros_like(at) + warmth) + confident
        value = tl.where(at == float("-inf"), float("-inf"), value)
        tl.store(logprob + n * targets + j, tl.where(counts, value, 0.0), mask=j < targets)
        if entropy is not None:
            rest = tl.exp(-_softplus(-odds))  # 1 - p_q
            share = tl.exp(confident)
            safe = tl.where(alone, 1.0, total)
            below = moment1 / safe
            mine = tl.where(share == 0.0, 0.0, share * confident)
            # log p of the others, averaged over them: the level lies log_total + softplus(-odds) under the logsumexp
            mean = below - (log_total + _softplus(-odds))
            others = tl.where(alone | (rest == 0.0), 0.0, rest * mean)
            # Every logit of the row is -inf, or the pivot is infinite or NaN: there is no distribution.
            impossible = (alone & (own == float("-inf"))) | ~(own < float("inf"))
            tl.store(entropy + n, tl.where(impossible, float("nan"), -mine - others))
            if variance is not None:
                apart = gap + below
                spread = moment2 / safe - below * below
                between = tl.where(share == 0.0, 0.0, share * apart * apart)
                value = tl.where(alone | (rest == 0.0), 0.0, rest * (spread + between))
                tl.store(variance + n, tl.where(impossible, float("nan"), value))


@triton.jit
def backward_kernel(
    grad_logprob,  # (N, J) or None
    grad_logsumexp,  # (N,) or None
    grad_entropy,  # (N,) or None
    logits,  # (N, V)
    target,  # (N, J) int64
    temperature,  # (N,)
    logprob,  # (N, J)
    logsumexp,  # (N,)
    entropy,  # (N,), read only with grad_entropy
    grad,  # (N, V), may be `logits`
    vocabulary,
    targets,
    logits_stride,
    grad_stride,
    part,  # columns of a program, a multiple of DEPTH * WIDTH
    SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,
    TARGETS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row and a part of the vocabulary.

    `grad` may be `logits` if a program has the whole row: it then reads the pivot, and every tile, before it writes.
    """
    n = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocabulary)
    j = tl.arange(0, TARGETS)
    y = tl.load(target + n * targets + j, mask=j < targets, other=-1)
    counts = y >= 0
    lse = tl.load(logsumexp + n)
    g = tl.zeros([TARGETS], dtype=lse.dtype)
    if grad_logprob is not None:
        g = tl.load(grad_logprob + n * targets + j, mask=counts, other=0.0).to(lse.dtype)
    l = tl.zeros([], dtype=lse.dtype)
    if grad_logsumexp is not None:
        l = tl.load(grad_logsumexp + n).to(lse.dtype)
    h = tl.zeros([], dtype=lse.dtype)
    if grad_entropy is not None:
        h = tl.load(grad_entropy + n).to(lse.dtype)
    silent = (tl.max(tl.where(g == 0.0, 0, 1), axis=0) == 0) & (l == 0.0) & (h == 0.0)
    place = tl.arange(0, DEPTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    out = grad + n * grad_stride
    if silent | (tl.max(y, axis=0) < 0):
        for start in range(begin, end, DEPTH * WIDTH):
            v = start + place
            zeros = tl.zeros([DEPTH, WIDTH], dtype=grad.dtype.element_ty)
            _store(out, v, zeros, start + DEPTH * WIDTH <= vocabulary, vocabulary, PADDED)
    else:
        known = tl.load(logprob + n * targets + j, mask=counts, other=float("-inf"))
        first = _pivot(known, counts, j, TARGETS)
        q = tl.sum(tl.where(j == first, y, 0), axis=0)
        confident = tl.sum(tl.where(j == first, known, 0.0), axis=0)
        at_pivot = counts & (y == q)
        mine = tl.sum(tl.where(at_pivot, g, 0.0), axis=0)
        others = tl.sum(tl.where(counts & (y != q), g, 0.0), axis=0) - l
        share = tl.exp(confident)
        row = logits + n * logits_stride
        warmth = tl.load(temperature + n)
        cold = quotient(1.0, warmth)
        # log p relative to the pivot's, because the logsumexp has lost digits to the size of the logits; but a pivot
        # that is unlikely has lost as many.
        base, _slope = _capped(tl.load(row + q, mask=q < vocabulary, other=float("nan")).to(lse.dtype), SOFTCAP)
        tl.debug_barrier()  # every warp has read it, so that in place none can have written over it
        near = confident >= -8.0
        base = tl.where(near, base, 0.0)
        offset = tl.where(near, confident, -lse)
        factor = -(mine + others) * cold
        peak = (mine * _minus_expm1(confident) - share * others) * cold
        peak = tl.where(lse == float("-inf"), float("nan"), peak)  # there is no distribution
        # A finite floor under log p, in units of a logit: p = 0 times log p = -inf would be NaN.
        floor = (FLOOR - offset) * warmth
        level = tl.zeros([], dtype=lse.dtype)
        if grad_entropy is not None:
            level = tl.load(entropy + n)
            peak -= tl.where(share == 0.0, 0.0, h * share * (confident + level)) * cold
            h = h * cold
        for start in range(begin, end, DEPTH * WIDTH):
            v = start + place
            whole = start + DEPTH * WIDTH <= vocabulary
            x = _load(row, v, whole, vocabulary, 0.0, PADDED).to(lse.dtype)
            x, slope = _capped(x, SOFTCAP)
            x = tl.maximum(x - base, floor)
            u = x * cold
            u = tl.fma(tl.fma(-u, tl.zeros_like(x) + warmth, x), tl.zeros_like(x) + cold, u)  # x / T to the last digit
            log_p = u + offset
            p = tl.exp2(log_p * LOG2E)
            if grad_entropy is not None:
                value = p * (factor - h * (log_p + level))
            else:
                value = p * factor
            if (q >= start) & (q < start + DEPTH * WIDTH):
                value = tl.where(v == q, peak, value)
            if targets > 1:
                for i in range(0, targets):
                    column = tl.load(target + n * targets + i)
                    if (column >= start) & (column < start + DEPTH * WIDTH) & (column != q):
                        if grad_logprob is not None:
                            one = tl.load(grad_logprob + n * targets + i).to(lse.dtype) * cold
                            value += tl.where(v == column, one, 0.0)
            _store(out, v, value * slope, whole, vocabulary, PADDED)
