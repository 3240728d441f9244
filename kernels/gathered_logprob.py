"""Log-probabilities of targets from logits: one read forward, one read and one write backward, for any upstream.

The formulas are those of `mopl/ops/gathered_logprob.py`. Forward: one program a row walks over the vocabulary with a
running maximum, the pivot (the row's likeliest target) left out of every sum. Backward: a program for every row and
block of columns. Rows that do not count are not read.
"""

import triton
import triton.language as tl

from ._math import log1p

LOG2E = tl.constexpr(1.4426950408889634)


def forward_tile(vocabulary: int, itemsize: int) -> dict[str, int]:
    """Return BLOCK and num_warps of `forward_kernel` for arithmetic in `itemsize` bytes."""
    block = min(triton.next_power_of_2(max(vocabulary, 16)), 8192 if itemsize == 4 else 2048)
    return {"BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


def backward_tile(vocabulary: int, itemsize: int) -> dict[str, int]:
    """Return BLOCK and num_warps of `backward_kernel`."""
    block = min(triton.next_power_of_2(max(vocabulary, 16)), 4096 if itemsize == 4 else 1024)
    return {"BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


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
def _cap(x, warmth, SOFTCAP: tl.constexpr):
    """Return u and the slope du/dlogit."""
    if SOFTCAP == 0.0:
        return x / warmth, tl.zeros_like(x) + 1.0 / warmth
    else:
        t = tl.exp(-2.0 * tl.abs(x) / SOFTCAP)
        bent = (1.0 - t) / (1.0 + t)
        small = x / SOFTCAP
        series = tl.abs(small) * (1.0 - small * small * (1.0 / 3.0 - small * small * (2.0 / 15.0)))
        bent = tl.where(tl.abs(small) < 1e-2, series, bent)
        return SOFTCAP * tl.where(x < 0, -bent, bent) / warmth, 4.0 * t / ((1.0 + t) * (1.0 + t)) / warmth


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
    TARGETS: tl.constexpr,  # a power of two >= J
    BLOCK: tl.constexpr,
):
    """One program a row."""
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
        row = logits + n * logits_stride
        # A target past the vocabulary reads as NaN, which then stands in its result.
        at = tl.load(row + y, mask=counts & (y < vocabulary), other=float("nan")).to(dtype)
        at, _ = _cap(at, warmth, SOFTCAP)
        best = tl.max(tl.where(counts & (at == at), at, float("-inf")), axis=0)
        first = tl.min(tl.where(counts & (at == best), j, TARGETS), axis=0)
        # No target equals the best one only if all are NaN: the first that counts will do.
        first = tl.where(first == TARGETS, tl.min(tl.where(counts, j, TARGETS), axis=0), first)
        q = tl.sum(tl.where(j == first, y, 0), axis=0)
        own = tl.sum(tl.where(j == first, at, 0.0), axis=0)

        top = tl.full([], float("-inf"), dtype=dtype)
        total = tl.zeros([], dtype=dtype)
        moment1 = tl.zeros([], dtype=dtype)
        moment2 = tl.zeros([], dtype=dtype)
        for start in range(0, vocabulary, BLOCK):
            v = start + tl.arange(0, BLOCK)
            used = (v < vocabulary) & (v != q)
            x = tl.load(row + v, mask=used, other=float("-inf")).to(dtype)
            u, _ = _cap(x, warmth, SOFTCAP)
            u = tl.where(used, u, float("-inf"))
            higher = tl.maximum(top, tl.max(u, axis=0))
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            down = tl.where(top == float("-inf"), 0.0, top - anchor)
            scale = tl.where(top == float("-inf"), 0.0, tl.exp2(down * LOG2E))
            d = u - anchor
            e = tl.exp2(d * LOG2E)
            if variance is not None:
                product = tl.where(e == 0.0, 0.0, e * d * d)
                moment2 = scale * (moment2 + down * (2.0 * moment1 + down * total)) + tl.sum(product, axis=0)
            if entropy is not None:
                product = tl.where(e == 0.0, 0.0, e * d)
                moment1 = scale * (moment1 + down * total) + tl.sum(product, axis=0)
            total = scale * total + tl.sum(e, axis=0)
            top = higher

        # Everything relative to the pivot: a confident row keeps its digits.
        alone = total == 0.0
        log_total = tl.log(tl.where(alone, 1.0, total))
        odds = tl.where(alone, float("-inf"), (top - own) + log_total)
        confident = -_softplus(odds)
        tl.store(logsumexp + n, tl.where(own == float("-inf"), top + log_total, own - confident))
        value = tl.where(at == float("-inf"), float("-inf"), (at - own) + confident)
        tl.store(logprob + n * targets + j, tl.where(counts, value, 0.0), mask=j < targets)
        if entropy is not None:
            rest = tl.exp(-_softplus(-odds))  # 1 - p_q
            share = tl.exp(confident)
            safe = tl.where(alone, 1.0, total)
            below = moment1 / safe
            mine = tl.where(share == 0.0, 0.0, share * confident)
            # log p of the others, averaged over them; (top - own) + confident = top - logsumexp
            level = tl.where(own == float("-inf"), -log_total, (top - own) + confident)
            others = tl.where(alone | (rest == 0.0), 0.0, rest * (level + below))
            tl.store(entropy + n, -mine - others)
            if variance is not None:
                gap = (top - own) + below
                spread = moment2 / safe - below * below
                between = tl.where(share == 0.0, 0.0, share * gap * gap)
                tl.store(variance + n, tl.where(alone | (rest == 0.0), 0.0, rest * (spread + between)))


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
    SOFTCAP: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and a block of columns; every entry is read before it is written, so `grad` may be `logits`."""
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < vocabulary
    j = tl.arange(0, TARGETS)
    y = tl.load(target + n * targets + j, mask=j < targets, other=-1)
    counts = y >= 0
    lse = tl.load(logsumexp + n)
    g = tl.zeros([TARGETS], dtype=lse.dtype)
    if grad_logprob is not None:
        g = tl.load(grad_logprob + n * targets + j, mask=counts, other=0.0).to(lse.dtype)
    l = lse * 0.0
    if grad_logsumexp is not None:
        l = tl.load(grad_logsumexp + n).to(lse.dtype)
    h = lse * 0.0
    if grad_entropy is not None:
        h = tl.load(grad_entropy + n).to(lse.dtype)
    silent = (tl.max(tl.where(g == 0.0, 0, 1), axis=0) == 0) & (l == 0.0) & (h == 0.0)
    if silent | (tl.max(y, axis=0) < 0):
        tl.store(grad + n * grad_stride + v, tl.zeros([BLOCK], dtype=grad.dtype.element_ty), mask=inside)
    else:
        known = tl.load(logprob + n * targets + j, mask=counts, other=float("-inf"))
        best = tl.max(tl.where(known == known, known, float("-inf")), axis=0)
        first = tl.min(tl.where(counts & (known == best), j, TARGETS), axis=0)
        first = tl.where(first == TARGETS, tl.min(tl.where(counts, j, TARGETS), axis=0), first)
        q = tl.sum(tl.where(j == first, y, 0), axis=0)
        confident = tl.sum(tl.where(j == first, known, 0.0), axis=0)
        at_pivot = counts & (y == q)
        mine = tl.sum(tl.where(at_pivot, g, 0.0), axis=0)
        others = tl.sum(tl.where(counts & (y != q), g, 0.0), axis=0) - l
        share = tl.exp(confident)

        warmth = tl.load(temperature + n)
        x = tl.load(logits + n * logits_stride + v, mask=inside, other=0.0).to(lse.dtype)
        u, slope = _cap(x, warmth, SOFTCAP)
        log_p = u - lse
        p = tl.exp2(log_p * LOG2E)
        factor = mine + others
        peak = mine * _minus_expm1(confident) - share * others
        if grad_entropy is not None:
            level = tl.load(entropy + n)
            factor += tl.where(p == 0.0, 0.0, h * (log_p + level))
            peak -= tl.where(share == 0.0, 0.0, h * share * (confident + level))
        value = -p * factor
        # A product with p = 0 is 0 whatever the upstream gradient: -inf logits of a vocabulary mask stay out.
        value = tl.where(p == 0.0, 0.0, value)
        for i in range(0, targets):
            column = tl.load(target + n * targets + i)
            if (column >= 0) & (column != q):
                if grad_logprob is not None:
                    one = tl.load(grad_logprob + n * targets + i).to(lse.dtype)
                    value += tl.where(v == column, one, 0.0)
        value = tl.where(v == q, peak, value)
        tl.store(grad + n * grad_stride + v, (value * slope).to(grad.dtype.element_ty), mask=inside)
