"""Plackett-Luce likelihood of m rankings, lists of any length: scans along the items in their order, best first.

Notation as in `plackett_luce.py`. At position p stands item order[p]; groups of equal labels are runs [start, end).
Masses are kept as (top, mass): sum exp(u) = mass * exp(u_top) with u_top the largest, so that mass lies in [1, K] and
every exponent is <= 0. Three steps:

    suffix   from the last position up: (top, mass) of the items from p on, and `end` of p's group
    groups   for every group of several items what its tie rule needs: cost, mean position weight and
             passed = R dN/dR, the part of a charge that falls on the items below (sum_i E[phi_i] for "exact")
    chain    from the first position down, with Q = R / (R + T) the chance that no item of the group is chosen:
             A = Q A + weight * passed        the charges of all groups so far, as a share of what lies below
             G_i = P_i A + weight * dN/du_i   with P_i = exp(u_i) / (R + T); a lone item has dN/du_i = -Q

Both recurrences are scans with the combine (a, b) after (a', b') = (a a', a b' + b), whose factors are <= 1: nothing
overflows, nothing cancels, and the result goes through `order` with one store an item.

`plackett_luce_fused.py` takes all steps of a list in registers, for Breslow ties without position weights, where
groups need no step of their own. Here each is a kernel (`groups` is in `plackett_luce_groups.py`) that goes through
its list in blocks; between them the state lies in memory.
"""

import triton
import triton.language as tl

from ._list_rows import (
    as_key,
    change_with_rate,
    choosable,
    compose,
    distance_below,
    item_at,
    key_at,
    label_at,
    larger,
    program,
    shrinkage,
)
from ._math import log1p, quotient


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _next(values, lane, last, BLOCK: tl.constexpr):
    """Return every lane's right neighbour; `last` for the last lane."""
    return tl.where(lane == BLOCK - 1, last, tl.gather(values, tl.minimum(lane + 1, BLOCK - 1), 0))


@triton.jit
def _previous(values, lane, first):
    """Return every lane's left neighbour; `first` for lane 0."""
    return tl.where(lane == 0, first, tl.gather(values, tl.maximum(lane - 1, 0), 0))


@triton.jit
def _suffix(key, valid, lane, rate, top_after, mass_after, BLOCK: tl.constexpr):
    """Return (top, mass) of the items from each lane on, given that of the items behind the block."""
    top = tl.associative_scan(tl.where(valid, key, float("-inf")), 0, larger, reverse=True)
    top = tl.maximum(top, top_after)
    shrink = shrinkage(top, _next(top, lane, top_after, BLOCK), rate)
    own = tl.where(valid, tl.exp(-distance_below(top, key, rate)), 0.0)
    factor, mass = tl.associative_scan((shrink, own), 0, compose, reverse=True)
    return top, factor * mass_after + mass


@triton.jit
def _terms(key, size, rate, top, mass, top_below, mass_below):
    """Return Q, P_i and the cost of an item: as a lone one if size is 1, else by Breslow's rule.

    (top, mass) is of all items from the group's start on, (top_below, mass_below) of those behind its end.
    """
    down = distance_below(top, key, rate)
    own = tl.exp(-down)
    below = mass_below * shrinkage(top, top_below, rate)
    # own - 1 is exactly 0 where a lone item is the largest: a tiny cost keeps every digit.
    aside = tl.where(size == 1, below + (own - 1), mass - 1)
    # A chance of 0 must leave a share of 1: a unit less, thousands of times over, is what the last digits are gone by.
    return quotient(below, mass), own / mass, down + log1p(aside)


@triton.jit(
    do_not_specialize=[
        "lists",
        "temperature_stride", "temperature_objective_stride",
        # How positions lie in registers, and so the order of a scan over them, would depend on these.
        "scores_stride", "labels_stride", "labels_objective_stride", "mask_stride", "order_stride",
        "order_objective_stride",
    ]
)  # fmt: skip
def suffix_kernel(
    scores,
    labels,
    temperature,
    mask,
    order,
    top,  # (B, M, K), in order of position, in the dtype of the arithmetic
    mass,  # like top; 0 where nothing is left
    end,  # like top, int32
    lists,  # B * M
    items,
    scores_stride,
    labels_stride,
    labels_objective_stride,
    temperature_stride,
    temperature_objective_stride,
    mask_stride,
    order_stride,
    order_objective_stride,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write (top, mass) of the items from each position on, and where the position's group ends."""
    dtype: tl.constexpr = top.dtype.element_ty
    target = program()
    if target >= lists:
        return
    row, objective = target // M, target % M
    labels_row = labels + row * labels_stride + objective * labels_objective_stride
    order_row = order + row * order_stride + objective * order_objective_stride
    mask_row = mask if mask is None else mask + row * mask_stride
    rate = tl.load(temperature + row * temperature_stride + objective * temperature_objective_stride).to(dtype)
    lane = tl.arange(0, BLOCK)
    top_after = tl.full((), float("-inf"), dtype)
    mass_after = tl.full((), 0.0, dtype)
    end_after = tl.full((), 2**31 - 1, tl.int32)
    blocks = tl.cdiv(items, BLOCK)
    for step in range(0, blocks):
        position = (blocks - 1 - step) * BLOCK + lane
        item, valid = item_at(order_row, mask_row, position, items)
        label, _ = label_at(labels_row, order_row, mask_row, position, items)
        after, more = label_at(labels_row, order_row, mask_row, position + 1, items)
        key = choosable(key_at(scores + row * scores_stride, item, valid, rate, dtype))
        top_here, mass_here = _suffix(key, valid, lane, tl.abs(rate), top_after, mass_after, BLOCK)
        closes = (more == 0) | (label != after)
        stop = tl.associative_scan(tl.where(closes, position + 1, 2**31 - 1), 0, _smaller, reverse=True)
        stop = tl.minimum(stop, end_after)
        within = position < items
        tl.store(top + target * items + position, top_here, mask=within)
        tl.store(mass + target * items + position, mass_here, mask=within)
        tl.store(end + target * items + position, stop, mask=within)
        top_after = tl.max(top_here, axis=0)
        mass_after = tl.sum(tl.where(lane == 0, mass_here, 0.0), axis=0)
        end_after = tl.sum(tl.where(lane == 0, stop, 0), axis=0)


@triton.jit(
    do_not_specialize=[
        "lists", "top_k",
        "temperature_stride", "temperature_objective_stride",
        # How positions lie in registers, and so the order of a scan over them, would depend on these.
        "scores_stride", "labels_stride", "labels_objective_stride", "mask_stride", "order_stride",
        "order_objective_stride", "weights_stride", "weights_objective_stride",
    ]
)  # fmt: skip
def chain_kernel(
    scores,
    labels,
    temperature,
    mask,
    order,
    weights,
    top,
    mass,
    end,
    cost,  # from `group_kernel`, as the next four; None under Breslow's rule
    passed,
    share,
    mean_weight,
    phi,
    loss,  # (B, M)
    gradient,  # (B, M, K) or None
    temperature_gradient,  # (B, M) or None
    lists,  # B * M
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
    BOTTOM_FREE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the loss, and unless they are None both gradients, of one list and objective."""
    dtype: tl.constexpr = loss.dtype.element_ty
    target = program()
    if target >= lists:
        return
    row, objective = target // M, target % M
    labels_row = labels + row * labels_stride + objective * labels_objective_stride
    order_row = order + row * order_stride + objective * order_objective_stride
    mask_row = mask if mask is None else mask + row * mask_stride
    rate = tl.load(temperature + row * temperature_stride + objective * temperature_objective_stride).to(dtype)
    steep = tl.abs(rate)
    base = target * items
    highest = tl.load(top + base)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype)
    drate = tl.zeros((BLOCK,), dtype)
    begin_before = tl.full((), 0, tl.int32)
    carried_before = tl.full((), 0.0, dtype)
    for offset in range(0, items, BLOCK):
        position = offset + lane
        item, valid = item_at(order_row, mask_row, position, items)
        label, _ = label_at(labels_row, order_row, mask_row, position, items)
        before, _ = label_at(labels_row, order_row, mask_row, position - 1, items)
        starts = (position == 0) | (label != before)
        begin = tl.associative_scan(tl.where(starts, position, 0), 0, larger)
        begin = tl.maximum(begin, begin_before)
        begin_before = tl.max(begin, axis=0)
        stop = tl.load(end + base + position, mask=valid, other=0)
        size = stop - begin
        last = valid & (stop == position + 1)
        lone = size == 1
        more = valid & (stop < items)
        top_here = tl.load(top + base + begin, mask=valid, other=0)
        mass_here = tl.load(mass + base + begin, mask=valid, other=1)
        top_below = tl.load(top + base + stop, mask=more, other=float("-inf"))
        mass_below = tl.load(mass + base + stop, mask=more, other=0)
        key = choosable(key_at(scores + row * scores_stride, item, valid, rate, dtype))
        stay, chance, price = _terms(key, size, steep, top_here, mass_here, top_below, mass_below)
        charge = tl.where(valid & (begin < top_k), 1.0, 0.0).to(dtype)
        if BOTTOM_FREE:
            charge = tl.where(mass_below != 0, charge, 0.0)
        tied = valid & (lone == 0) & (charge != 0)
        if weights is not None:
            weights_row = weights + row * weights_stride + objective * weights_objective_stride
            weight = tl.load(weights_row + position, mask=valid & lone, other=0).to(dtype)
            weight = tl.where(lone, weight, tl.load(mean_weight + base + begin, mask=tied, other=0))
            charge = tl.where(charge != 0, weight, 0.0)
        if cost is not None:
            price = tl.where(lone, price, tl.load(cost + base + begin, mask=tied & (begin == position), other=0))
        total += tl.where(charge == 0, 0.0, charge * price)
        if gradient is not None:
            if cost is not None:
                handed = tl.where(lone, stay, tl.load(passed + base + begin, mask=tied, other=0))
            else:
                handed = size * stay
            if phi is not None:
                own = -tl.load(phi + base + position, mask=tied, other=0)
            elif share is not None:
                own = tl.load(share + base + begin, mask=tied, other=0) * chance - 1
            else:
                own = size * chance - 1
            own = tl.where(lone, -stay, own)
            handed = tl.where(last & (charge != 0), charge * handed, 0.0)
            factor, carried = tl.associative_scan((tl.where(last, stay, 1.0), handed), 0, compose)
            carried += factor * carried_before
            arrived = _previous(carried, lane, carried_before)
            carried_before = tl.sum(tl.where(lane == BLOCK - 1, carried, 0.0), axis=0)
            du = tl.where(valid, chance * arrived + tl.where(charge == 0, 0.0, charge * own), 0.0)
            known = (position < items) & (item >= 0) & (item < items)
            tl.store(gradient + base + item, du, mask=known)
            drate += change_with_rate(du, chance, key, highest)
    tl.store(loss + target, tl.sum(total, axis=0))
    if temperature_gradient is not None:
        change = tl.sum(drate, axis=0)
        tl.store(temperature_gradient + target, as_key(change, rate))
