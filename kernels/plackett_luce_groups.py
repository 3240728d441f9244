"""The second step of `plackett_luce_sorted.py`: what each group of several tied items costs and hands down.

One program for every SPAN positions of a ranking; it takes the groups that start there one after the other.
"""

import triton
import triton.language as tl

from ._list_rows import choosable, distance_below, key_at, label_at, program, shrinkage
from ._math import log1p


@triton.jit
def _expm1_negative(t):
    """Return 1 - exp(-t) for t >= 0 in float64 to 1e-13 relative."""
    series = t * (1 - t / 2 * (1 - t / 3 * (1 - t / 4 * (1 - t / 5 * (1 - t / 6)))))
    return tl.where(t < 0.004, series, 1 - tl.exp(-t))


@triton.jit
def _factors(y, odds):
    """Return log(1 - exp(-t)) and phi = t / (exp(t) - 1) for t = exp(y + odds), (MEMBERS, NODES)."""
    z = tl.minimum(y[None, :] + odds[:, None], 6.5)  # exp(-exp(6.5)) is 0 in float64
    t = tl.exp(tl.maximum(z, -30.0))
    win = _expm1_negative(t)
    # 1 - exp(-t) = t where t would vanish.
    return tl.log(win) + tl.minimum(z + 30, 0.0), t * (1 - win) / win


@triton.jit
def _odds(ranking, position, stop):
    """Return u_i - log R of the members at `position` in float64, raised to at least -1e4, and by how much.

    Below that log(1 - exp(-t)) is y + odds to the last digit, so that raising the odds only moves the integrand's log.
    """
    scores_row, order_row, rate, top_below, log_below = ranking
    inside = position < stop
    item = tl.load(order_row + position, mask=inside, other=0).to(tl.int32)
    key = choosable(key_at(scores_row, item, inside, rate, tl.float64))
    odds = -distance_below(top_below, key, tl.abs(rate)) - log_below
    lift = tl.where(odds < -1e4, -1e4 - odds, tl.where(odds == odds, 0.0, odds))  # NaN stays NaN
    return tl.minimum(tl.maximum(odds, -1e4), 1e300), inside, lift


@triton.jit
def _log_product(y, ranking, start, stop, MEMBERS: tl.constexpr, NODES: tl.constexpr):
    """Return sum_i log(1 - exp(-t_i)) over the group for every node."""
    total = tl.zeros((NODES,), tl.float64)
    for first in range(start, stop, MEMBERS):
        odds, inside, _ = _odds(ranking, first + tl.arange(0, MEMBERS), stop)
        log_win, _ = _factors(y, odds)
        total += tl.sum(tl.where(inside[:, None], log_win, 0.0), axis=0)
    return total


@triton.jit
def _next_group(labels_row, order_row, mask_row, end_row, span, after, items, top_k, SPAN: tl.constexpr):
    """Return the first position of the span behind `after` where a charged group of several starts, or `items`."""
    position = span + tl.arange(0, SPAN)
    label, valid = label_at(labels_row, order_row, mask_row, position, items)
    before, follows = label_at(labels_row, order_row, mask_row, position - 1, items)
    several = tl.load(end_row + position, mask=valid, other=0) - position > 1
    opens = valid & ((follows == 0) | (label != before)) & several & (position < top_k) & (position > after)
    return tl.min(tl.where(opens, position, items), axis=0)


@triton.jit(
    do_not_specialize=[
        "programs", "top_k", "temperature_stride", "temperature_objective_stride",
        # How positions lie in registers, and so the order of sums over them, would depend on these.
        "scores_stride", "labels_stride", "labels_objective_stride", "mask_stride", "order_stride",
        "order_objective_stride", "weights_stride", "weights_objective_stride",
    ]
)  # fmt: skip
def group_kernel(
    scores,
    labels,
    temperature,
    mask,
    order,
    weights,  # (B, M, K) of positions, strides may be 0; or None
    top,  # (B, M, K), from `suffix_kernel`, as mass and end
    mass,
    end,
    cost,  # (B, M, K); this and the next four: written at the start of every group of several items; or None
    passed,  # (B, M, K) or None
    share,  # (B, M, K) or None: dN/du_i = share P_i - 1
    mean_weight,  # (B, M, K) or None
    phi,  # (B, M, K) or None: written for every item of such a group; dN/du_i = -phi_i
    programs,
    items,
    top_k,
    scores_stride,
    labels_stride,
    labels_objective_stride,
    temperature_stride,
    temperature_objective_stride,
    mask_stride,
    order_stride,
    order_objective_stride,
    weights_stride,
    weights_objective_stride,
    M: tl.constexpr,
    EFRON: tl.constexpr,
    EXACT: tl.constexpr,
    SPAN: tl.constexpr,
    MEMBERS: tl.constexpr,
    NODES: tl.constexpr,
):
    """Write what each group of several tied items costs that starts at one of this program's positions."""
    dtype: tl.constexpr = top.dtype.element_ty
    number = program()
    if number >= programs:
        return
    spans = tl.cdiv(items, SPAN)
    target = number // spans
    row, objective = target // M, target % M
    labels_row = labels + row * labels_stride + objective * labels_objective_stride
    order_row = order + row * order_stride + objective * order_objective_stride
    scores_row = scores + row * scores_stride
    mask_row = mask if mask is None else mask + row * mask_stride
    span = (number % spans).to(tl.int32) * SPAN
    start = _next_group(labels_row, order_row, mask_row, end + target * items, span, span - 1, items, top_k, SPAN)
    for _ in range(0, SPAN):  # of one turn where registers are scarce: a loop would spill
        if start < items:
            here = target * items + start
            stop = tl.load(end + here)
            size = stop - start
            if mean_weight is not None:
                weights_row = weights + row * weights_stride + objective * weights_objective_stride
                weight = tl.zeros((MEMBERS,), dtype)
                for first in range(start, stop, MEMBERS):
                    member = first + tl.arange(0, MEMBERS)
                    weight += tl.load(weights_row + member, mask=member < stop, other=0).to(dtype)
                tl.store(mean_weight + here, tl.sum(weight, axis=0) / size)
            rate = tl.load(temperature + row * temperature_stride + objective * temperature_objective_stride).to(dtype)
            top_here = tl.load(top + here)
            mass_here = tl.load(mass + here)
            top_below = tl.load(top + target * items + stop, mask=stop < items, other=float("-inf"))
            mass_below = tl.load(mass + target * items + stop, mask=stop < items, other=0)
            if EFRON:
                below = mass_below * shrinkage(top_here, top_below, tl.abs(rate))
                total = tl.zeros((MEMBERS,), dtype)
                inverse = tl.zeros((MEMBERS,), dtype)
                own = tl.zeros((MEMBERS,), dtype)
                for first in range(start, stop, MEMBERS):
                    member = first + tl.arange(0, MEMBERS)
                    inside = member < stop
                    item = tl.load(order_row + member, mask=inside, other=0).to(tl.int32)
                    key = choosable(key_at(scores_row, item, inside, rate, dtype))
                    part = 1 - (member - start).to(dtype) / size
                    # R + part * T as a sum of positive numbers: T itself would be a difference.
                    denominator = tl.where(inside, part * mass_here + (1 - part) * below, 1.0)
                    total += tl.where(inside, distance_below(top_here, key, tl.abs(rate)) + tl.log(denominator), 0.0)
                    inverse += tl.where(inside, mass_here / denominator, 0.0)
                    own += tl.where(inside, part * mass_here / denominator, 0.0)
                tl.store(cost + here, tl.sum(total, axis=0))
                tl.store(passed + here, tl.sum(inverse, axis=0) * below / mass_here)
                tl.store(share + here, tl.sum(own, axis=0))
            if EXACT:
                if mass_below != 0:
                    log_below = tl.log(mass_below.to(tl.float64))
                    ranking = (scores_row, order_row, rate.to(tl.float64), top_below.to(tl.float64), log_below)
                    _any_order(ranking, start, stop, cost + here, passed + here, phi + target * items, MEMBERS, NODES)
            start = _next_group(labels_row, order_row, mask_row, end + target * items, span, start, items, top_k, SPAN)


@triton.jit
def _any_order(ranking, start, stop, cost, passed, phi, MEMBERS: tl.constexpr, NODES: tl.constexpr):
    """Write -log P(the group's items come, in any order, before all items below), sum_i E[phi_i], and every E[phi_i].

    P = int exp(y - exp(y)) prod_i (1 - exp(-t_i)) dy with t_i = exp(y + u_i - log R) (Kalbfleisch and Prentice 1973).
    The integrand is entire, log-concave and falls exponentially to the left, doubly exponentially to the right: the
    trapezoid rule converges exponentially once it covers what lies above exp(-38) of the peak. In float64, because the
    logarithm of the integrand is a sum over the group and its rounding goes into E[phi].
    """
    node = tl.arange(0, NODES).to(tl.float64) / (NODES - 1)
    size = (stop - start).to(tl.float64)
    lowest = tl.full((MEMBERS,), float("inf"), tl.float64)
    raised = tl.zeros((MEMBERS,), tl.float64)
    for first in range(start, stop, MEMBERS):
        odds, inside, lift = _odds(ranking, first + tl.arange(0, MEMBERS), stop)
        lowest = tl.minimum(lowest, tl.where(inside, odds, float("inf")))
        raised += tl.where(inside, lift, 0.0)
    worst = tl.min(lowest, axis=0)

    # The peak is in [0, log(1 + n)], so this holds all that counts; the nodes above the threshold give the interval.
    right = tl.log(4 * (size + 38))
    y = -40 + (right + 40) * node
    value = y - tl.exp(y) + _log_product(y, ranking, start, stop, MEMBERS, NODES)
    counts = value > tl.max(value, axis=0) - 38
    step = (right + 40) / (NODES - 1)
    left = tl.min(tl.where(counts, y, float("inf")), axis=0) - step
    right = tl.max(tl.where(counts, y, float("-inf")), axis=0) + step
    # A group far above the rest: 1 - P and phi have their mass around y = -worst. Integrating those keeps every digit
    # of a tiny cost.
    far = worst > tl.log(size) + 2
    left = tl.where(far, -worst - 38, left)
    right = tl.where(far, tl.log(38 + tl.log(size)) - worst, right)
    y = left + (right - left) * node
    step = (right - left) / (NODES - 1)
    product = _log_product(y, ranking, start, stop, MEMBERS, NODES)
    value = y - tl.exp(y)
    miss = tl.sum(tl.exp(value) * _expm1_negative(-product), axis=0) * step
    value += product
    peak = tl.max(value, axis=0)
    log_p = peak + tl.log(tl.sum(tl.exp(value - peak), axis=0) * step)
    log_p = tl.where(far, log1p(-tl.where(far, miss, 0.0)), log_p)
    density = tl.exp(value - log_p) * step
    total = tl.zeros((MEMBERS,), tl.float64)
    for first in range(start, stop, MEMBERS):
        position = first + tl.arange(0, MEMBERS)
        odds, inside, _ = _odds(ranking, position, stop)
        _, factor = _factors(y, odds)
        expected = tl.sum(factor * density[None, :], axis=1)
        tl.store(phi + position, expected, mask=inside)
        total += tl.where(inside, expected, 0.0)
    # Where an item of score -inf is above others, the cost is infinite and the gradient its limit.
    tl.store(cost, tl.sum(raised, axis=0) - log_p)
    tl.store(passed, tl.sum(total, axis=0))
