"""Plackett-Luce likelihood of whole lists in registers, best first, for Breslow ties without position weights.

Notation and recurrences are those of `plackett_luce_sorted.py`. Every thread holds ROWS consecutive positions of a
list, one tensor (LANES, LISTS) for each; LANES threads hold a list, a program LISTS of them. A recurrence along the
list then takes three steps: what a thread's own positions do to it, a scan of one number a thread, and the recurrence
itself through the thread's registers, which needs no exchange at all. With a list's items spread over the threads one
by one, every step of every scan would be an exchange for every item.
"""

# ruff: noqa: RUF005 (Triton's compiler knows no unpacking of tuples)

import triton
import triton.language as tl

from ._list_rows import as_key, comparable, compose, distance_below, existing, key_at, larger, shrinkage
from ._math import log1p

# Above the number of any item: added to that of a masked one, and in place of one where there is none.
MASKED = tl.constexpr(1 << 20)
ABSENT = tl.constexpr(1 << 21)


@triton.jit
def _remember(a_value, a_beside, a_several, b_value, b_beside, b_several):
    return b_value, tl.where(b_several != 0, b_beside, a_value), a_several | b_several | 1


@triton.jit
def _neighbour(values, default, lane, LANES: tl.constexpr, BEHIND: tl.constexpr):
    """Return what the thread before this one has, or that BEHIND it; `default` where the list has none there."""
    edge = LANES - 1 if BEHIND else 0
    if LANES == 1:
        found = tl.zeros(values.shape, values.dtype)
    elif LANES <= 32:
        other = tl.minimum(lane + 1, edge) if BEHIND else tl.maximum(lane - 1, edge)
        found = tl.gather(values, tl.broadcast_to(other, values.shape), 0)
    else:
        # A gather beyond a warp would give each warp the whole list.
        none = tl.zeros(values.shape, tl.int32)
        _, found, _ = tl.associative_scan((values, values, none), 0, _remember, reverse=BEHIND)
    return tl.where(lane == edge, default, found)


@triton.jit
def _largest(values, default, lane, LANES: tl.constexpr, BEHIND: tl.constexpr):
    """Return the largest of the threads before this one, or of those BEHIND it."""
    if LANES > 1:
        values = tl.associative_scan(values, 0, larger, reverse=BEHIND)
    return _neighbour(values, default, lane, LANES, BEHIND)


@triton.jit
def _chain(factors, constants, lane, ROWS: tl.constexpr, LANES: tl.constexpr, BEHIND: tl.constexpr):
    """Return y where this thread begins, from 0 and with y = factor y + constant at every position before it.

    Or where it ends, the positions BEHIND it taken from the last one up.
    """
    constant = tl.zeros(factors[0].shape, factors[0].dtype)
    if LANES > 1:
        factor = factors[ROWS - 1 if BEHIND else 0]
        constant = constants[ROWS - 1 if BEHIND else 0]
        for step in tl.static_range(1, ROWS):
            factor *= factors[ROWS - 1 - step if BEHIND else step]
            constant = factors[ROWS - 1 - step if BEHIND else step] * constant
            constant += constants[ROWS - 1 - step if BEHIND else step]
        _, constant = tl.associative_scan((factor, constant), 0, compose, reverse=BEHIND)
    return _neighbour(constant, 0.0, lane, LANES, BEHIND)


@triton.jit
def _ahead(code, label, other_code, other_label):
    """Say whether an item belongs before another one."""
    higher = label > other_label
    if label.dtype.is_floating():
        higher = higher | ((label != label) & (other_label == other_label))
    return tl.where(tl.maximum(code, other_code) < MASKED, higher, code < other_code)


@triton.jit
def _step(code, label, SIZE: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Put rows r and r + STRIDE in order: best first, in every second run of SIZE rows last."""
    swap = ()
    for r in tl.static_range(ROWS):
        if (r & STRIDE) != 0:
            swap = swap + (swap[r ^ STRIDE],)
        elif (r & SIZE) == 0:
            swap = swap + (_ahead(code[r + STRIDE], label[r + STRIDE], code[r], label[r]),)
        else:
            swap = swap + (_ahead(code[r], label[r], code[r + STRIDE], label[r + STRIDE]),)
    codes = ()
    labels = ()
    for r in tl.static_range(ROWS):
        codes = codes + (tl.where(swap[r], code[r ^ STRIDE], code[r]),)
        labels = labels + (tl.where(swap[r], label[r ^ STRIDE], label[r]),)
    return codes, labels


@triton.jit
def _sorted(code, label, ROWS: tl.constexpr):
    """Return a list's rows best first, by a bitonic network: NaN, falling labels, masked items, absent ones."""
    for log_size in tl.static_range(1, 6):
        for step in tl.static_range(log_size):
            if 2**log_size <= ROWS:
                code, label = _step(code, label, 2**log_size, 2 ** (log_size - 1 - step), ROWS)
    return code, label


# No access is wider than an item, so no size needs to be a multiple of anything: one compilation a tile serves all.
@triton.jit(
    do_not_specialize=[
        "lists", "items", "top_k", "scores_stride", "labels_stride", "labels_objective_stride", "temperature_stride",
        "temperature_objective_stride", "mask_stride", "order_stride", "order_objective_stride",
    ]
)  # fmt: skip
def fused_kernel(
    scores,  # (B, K)
    labels,  # (B, M, K), any dtype
    temperature,  # (B, M); strides may be 0
    mask,  # (B, K) or None
    order,  # (B, M, K) integer
    loss,  # (B, M), the dtype of the arithmetic
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
    M: tl.constexpr,
    LAST_GROUP_FREE: tl.constexpr,
    ROWS: tl.constexpr,
    LISTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write the loss, and unless they are None both gradients, of LISTS lists, each with one objective."""
    dtype: tl.constexpr = loss.dtype.element_ty
    target = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    real = target < lists
    row, objective = target // M, target % M
    lane = tl.arange(0, LANES)[:, None]
    first = tl.broadcast_to(lane * ROWS, (LANES, LISTS))
    order_row = order if order is None else order + (row * order_stride + objective * order_objective_stride)[None, :]
    labels_row = labels + (row * labels_stride + objective * labels_objective_stride)[None, :]
    scores_row = scores + (row * scores_stride)[None, :]
    mask_row = mask if mask is None else mask + (row * mask_stride)[None, :]
    rate = tl.load(
        temperature + row * temperature_stride + objective * temperature_objective_stride, mask=real, other=1
    ).to(dtype)
    steep = tl.abs(rate)[None, :]

    item = ()
    label = ()
    for r in tl.static_range(ROWS):
        here = real[None, :] & (first + r < items)
        one = first + r
        if order is not None:
            one = tl.load(order_row + one, mask=here, other=-1).to(tl.int32)
            here = here & (one >= 0) & (one < items)
        one = tl.where(here, one, ABSENT)
        if mask is not None:
            here = existing(mask_row, one, here)
            one = tl.where(here, one, one | MASKED)
        item = item + (one,)
        label = label + (comparable(tl.load(labels_row + one, mask=here, other=0)),)
    if order is None:
        item, label = _sorted(item, label, ROWS)
    valid = ()
    key = ()
    for r in tl.static_range(ROWS):
        valid = valid + (item[r] < MASKED,)
        own_key = key_at(scores_row, item[r], valid[r], rate[None, :], dtype)
        key = key + (tl.where(valid[r], own_key, float("-inf")),)

    # Where each position's group of equal labels begins and ends. An invalid one is a group of its own.
    start = ()
    before = _neighbour(label[ROWS - 1], 0, lane, LANES, BEHIND=False)
    for r in tl.static_range(ROWS):
        changes = (label[r] != before) | (valid[r] == 0)
        if r == 0:
            changes = changes | (lane == 0)
        start = start + (changes,)
        before = label[r]
    close = ()
    for r in tl.static_range(1, ROWS):
        close = close + (start[r],)
    close = close + (_neighbour(start[0].to(tl.int32), 1, lane, LANES, BEHIND=True) != 0,)
    latest = tl.zeros((LANES, LISTS), tl.int32)
    soonest = tl.full((LANES, LISTS), -ROWS * LANES, tl.int32)
    if LANES > 1:
        for r in tl.static_range(ROWS):
            latest = tl.where(start[r], first + r, latest)
            soonest = tl.where(close[ROWS - 1 - r], -(first + (ROWS - r)), soonest)
    latest = _largest(latest, 0, lane, LANES, BEHIND=False)
    soonest = -_largest(soonest, -ROWS * LANES, lane, LANES, BEHIND=True)
    begin = ()
    end = ()  # from the last position up, as all that is built backwards
    for r in tl.static_range(ROWS):
        latest = tl.where(start[r], first + r, latest)
        begin = begin + (latest,)
        soonest = tl.where(close[ROWS - 1 - r], first + (ROWS - r), soonest)
        end = end + (soonest,)

    # The largest score of the items from p's group on.
    largest = key[0]
    for r in tl.static_range(1, ROWS):
        largest = tl.maximum(largest, key[r])
    highest = tl.max(largest, axis=0)[None, :]
    largest = _largest(largest, float("-inf"), lane, LANES, BEHIND=True)
    suffix = ()
    for r in tl.static_range(ROWS):
        largest = tl.maximum(largest, key[ROWS - 1 - r])
        suffix = suffix + (largest,)
    least = tl.full((LANES, LISTS), float("-inf"), dtype)
    if LANES > 1:
        for r in tl.static_range(ROWS):
            least = tl.where(start[r], -suffix[ROWS - 1 - r], least)
    least = -_largest(least, float("-inf"), lane, LANES, BEHIND=False)
    top = ()
    for r in tl.static_range(ROWS):
        least = tl.where(start[r], suffix[ROWS - 1 - r], least)
        top = top + (least,)

    # The mass of the items from p on, and of those behind it, in units of exp(top).
    shrink = ()
    own = ()
    down = ()
    below = _neighbour(top[0], float("-inf"), lane, LANES, BEHIND=True)
    for r in tl.static_range(ROWS):
        way = distance_below(top[r], key[r], steep)
        down = down + (way,)
        own = own + (tl.where(valid[r], tl.exp(-way), 0.0),)
        if r < ROWS - 1:
            shrink = shrink + (shrinkage(top[r], top[r + 1], steep),)
        else:
            shrink = shrink + (shrinkage(top[r], below, steep),)
    mass = _chain(shrink, own, lane, ROWS, LANES, BEHIND=True)
    rest = ()
    masses = ()
    for r in tl.static_range(ROWS):
        mass = shrink[ROWS - 1 - r] * mass
        rest = rest + (mass,)
        mass += own[ROWS - 1 - r]
        masses = masses + (mass,)

    # From here on `mass` is that at the group's start.
    mass = tl.zeros((LANES, LISTS), dtype)
    if LANES > 1:
        keep = tl.full((LANES, LISTS), 1.0, dtype)
        for r in tl.static_range(ROWS):
            mass = tl.where(start[r], masses[ROWS - 1 - r], mass)
            keep = tl.where(start[r], 0.0, keep)
        _, mass = tl.associative_scan((keep, mass), 0, compose)
    mass = _neighbour(mass, 0.0, lane, LANES, BEHIND=False)
    if LAST_GROUP_FREE:
        reach = tl.zeros((LANES, LISTS), tl.int32)
        for r in tl.static_range(ROWS):
            reach = tl.where(valid[r], first + r + 1, reach)
        reach = tl.max(reach, axis=0)[None, :]
    total = tl.zeros((LANES, LISTS), dtype)
    chance = ()
    direct = ()  # dloss/du of the item in its own group
    factor = ()
    passed = ()
    for r in tl.static_range(ROWS):
        mass = tl.where(start[r], masses[ROWS - 1 - r], mass)
        lower = rest[ROWS - 1 - r]
        size = end[ROWS - 1 - r] - begin[r]
        lone = size == 1
        charged = valid[r] & (begin[r] < top_k)
        if LAST_GROUP_FREE:
            charged = charged & (end[ROWS - 1 - r] < reach)
        # own - 1 is exactly 0 where a lone item is the largest: a tiny cost keeps every digit.
        cost = down[r] + log1p(tl.where(lone, lower + (own[r] - 1), mass - 1))
        total += tl.where(charged, cost, 0.0)
        if gradient is not None:
            inverse = 1 / tl.where(valid[r], mass, 1.0)
            stay = lower * inverse
            ours = own[r] * inverse
            n = size.to(dtype)
            chance = chance + (ours,)
            direct = direct + (tl.where(charged, tl.where(lone, -stay, n * ours - 1), 0.0),)
            last = valid[r] & close[r]
            factor = factor + (tl.where(last, stay, 1.0),)
            passed = passed + (tl.where(last & charged, n * stay, 0.0),)
    tl.store(loss + target, tl.sum(total, axis=0), mask=real)
    if gradient is not None:
        carried = _chain(factor, passed, lane, ROWS, LANES, BEHIND=False)
        gradient_row = gradient + (target * items)[None, :]
        drate = tl.zeros((LANES, LISTS), dtype)
        for r in tl.static_range(ROWS):
            du = tl.where(valid[r], chance[r] * carried + direct[r], 0.0)
            carried = factor[r] * carried + passed[r]
            if mask is None:
                tl.store(gradient_row + item[r], du, mask=valid[r])
            else:
                tl.store(gradient_row + (item[r] & ~MASKED), du, mask=item[r] < ABSENT)
            drate += tl.where(du == 0, 0.0, du * (key[r] - highest))
        change = tl.sum(drate, axis=0)
        tl.store(temperature_gradient + target, as_key(change, rate), mask=real)
