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

from ._list_rows import (
    as_key,
    change_with_rate,
    choosable,
    comparable,
    compose,
    distance_below,
    existing,
    key_at,
    shrinkage,
)
from ._math import log1p
from .plackett_luce_lanes import chain, largest_of_others, neighbour, rows_of_lanes
from .plackett_luce_untied import untied

# Above the number of any item: added to that of a masked one, and in place of one where there is none.
MASKED = tl.constexpr(1 << 20)
ABSENT = tl.constexpr(1 << 21)


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


@triton.jit
def _tied(
    item,  # ROWS of (LANES, LISTS), as the next three
    label,
    valid,
    key,  # -inf where not valid
    rate,  # (LISTS,)
    loss,
    gradient,
    temperature_gradient,
    target,
    real,
    items,
    top_k,
    lane,
    LAST_GROUP_FREE: tl.constexpr,
    ROWS: tl.constexpr,
    LISTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Do what `untied` does, whichever labels are equal; lists with a NaN among their labels get a loss of NaN."""
    dtype: tl.constexpr = loss.dtype.element_ty
    steep = tl.abs(rate)[None, :]
    first = tl.broadcast_to(lane * ROWS, (LANES, LISTS))
    unknown = tl.zeros((LANES, LISTS), tl.int32)
    if label[0].dtype.is_floating():
        for r in tl.static_range(ROWS):
            unknown = unknown | (valid[r] & (label[r] != label[r])).to(tl.int32)
    unknown = tl.max(unknown, axis=0)[None, :] != 0

    # Where each position's group of equal labels begins and ends. An invalid one is a group of its own.
    start = ()
    before = neighbour(label[ROWS - 1], 0, lane, LANES, BEHIND=False)
    for r in tl.static_range(ROWS):
        changes = (label[r] != before) | (valid[r] == 0)
        if r == 0:
            changes = changes | (lane == 0)
        start = start + (changes,)
        before = label[r]
    close = ()
    for r in tl.static_range(1, ROWS):
        close = close + (start[r],)
    close = close + (neighbour(start[0].to(tl.int32), 1, lane, LANES, BEHIND=True) != 0,)
    latest = tl.zeros((LANES, LISTS), tl.int32)
    soonest = tl.full((LANES, LISTS), -ROWS * LANES, tl.int32)
    if LANES > 1:
        for r in tl.static_range(ROWS):
            latest = tl.where(start[r], first + r, latest)
            soonest = tl.where(close[ROWS - 1 - r], -(first + (ROWS - r)), soonest)
    latest = largest_of_others(latest, 0, lane, LANES, BEHIND=False)
    soonest = -largest_of_others(soonest, -ROWS * LANES, lane, LANES, BEHIND=True)
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
    largest = largest_of_others(largest, float("-inf"), lane, LANES, BEHIND=True)
    suffix = ()
    for r in tl.static_range(ROWS):
        largest = tl.maximum(largest, key[ROWS - 1 - r])
        suffix = suffix + (largest,)
    least = tl.full((LANES, LISTS), float("-inf"), dtype)
    if LANES > 1:
        for r in tl.static_range(ROWS):
            least = tl.where(start[r], -suffix[ROWS - 1 - r], least)
    least = -largest_of_others(least, float("-inf"), lane, LANES, BEHIND=False)
    top = ()
    for r in tl.static_range(ROWS):
        least = tl.where(start[r], suffix[ROWS - 1 - r], least)
        top = top + (least,)

    # The mass of the items from p on, and of those behind it, in units of exp(top).
    shrink = ()
    own = ()
    down = ()
    below = neighbour(top[0], float("-inf"), lane, LANES, BEHIND=True)
    for r in tl.static_range(ROWS):
        way = distance_below(top[r], key[r], steep)
        down = down + (way,)
        own = own + (tl.where(valid[r], tl.exp(-way), 0.0),)
        if r < ROWS - 1:
            shrink = shrink + (shrinkage(top[r], top[r + 1], steep),)
        else:
            shrink = shrink + (shrinkage(top[r], below, steep),)
    mass = chain(shrink, own, lane, ROWS, LANES, BEHIND=True)
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
    mass = neighbour(mass, 0.0, lane, LANES, BEHIND=False)
    if LAST_GROUP_FREE:
        reach = tl.zeros((LANES, LISTS), tl.int32)
        for r in tl.static_range(ROWS):
            reach = tl.where(valid[r], first + r + 1, reach)
        reach = tl.max(reach, axis=0)[None, :]
    total = tl.zeros((LANES, LISTS), dtype)
    product = tl.zeros((LANES, LISTS), dtype)
    direct = ()  # dloss/du of the item in its own group
    passed = ()
    for r in tl.static_range(ROWS):
        mass = tl.where(start[r], masses[ROWS - 1 - r], mass)
        lower = rest[ROWS - 1 - r]
        size = end[ROWS - 1 - r] - begin[r]
        lone = size == 1
        charged = valid[r]
        if top_k is not None:
            charged = charged & (begin[r] < top_k)
        if LAST_GROUP_FREE:
            charged = charged & (end[ROWS - 1 - r] < reach)
        # own - 1 is exactly 0 where a lone item is the largest: a tiny cost keeps every digit.
        aside = tl.where(charged, tl.where(lone, lower + (own[r] - 1), mass - 1), 0.0)
        product = product * aside + (product + aside)
        total += tl.where(charged, down[r], 0.0)
        if gradient is not None:
            inverse = tl.where(charged, 1 / mass, 0.0)
            n = size.to(dtype)
            own_part = tl.where(lone, -lower * inverse, n * own[r] * inverse - 1)
            direct = direct + (tl.where(charged, own_part, 0.0),)
            passed = passed + (tl.where(close[r], shrink[r] * n * inverse, 0.0),)
    # log1p of several costs at once: see `untied`.
    total = tl.sum(total + log1p(product), axis=0)
    tl.store(loss + target, tl.where(tl.reshape(unknown, (LISTS,)), float("nan"), total), mask=real)
    if gradient is not None:
        carried = chain(shrink, passed, lane, ROWS, LANES, BEHIND=False)
        gradient_row = tl.arange(0, LISTS)[None, :] * items
        drate = tl.zeros((LANES, LISTS), dtype)
        for r in tl.static_range(ROWS):
            du = tl.where(unknown, 0.0, own[r] * carried + direct[r])
            carried = shrink[r] * carried + passed[r]
            tl.store(gradient + (gradient_row + item[r]), du, mask=valid[r])
            if temperature_gradient is not None:
                drate += change_with_rate(du, own[r], key[r], highest)
        if temperature_gradient is not None:
            tl.store(temperature_gradient + target, as_key(tl.sum(drate, axis=0), rate), mask=real)


# No access is wider than an item, so no size needs to be a multiple of anything: one compilation a tile serves all.
@triton.jit(
    do_not_specialize=[
        "lists", "items", "top_k", "scores_stride", "labels_stride", "labels_objective_stride", "temperature_stride",
        "temperature_objective_stride", "mask_stride",
    ]
)  # fmt: skip
def fused_kernel(
    scores,  # (B, K)
    labels,  # (B, M, K), any dtype
    temperature,  # (B, M); strides may be 0
    mask,  # (B, K) or None
    order,  # (B, M, K) integer, contiguous; or None: ROWS hold a list, which is sorted here
    loss,  # (B, M), the dtype of the arithmetic
    gradient,  # (B, M, K) or None
    temperature_gradient,  # (B, M) or None
    lists,  # B * M
    items,
    top_k,  # or None
    scores_stride,
    labels_stride,
    labels_objective_stride,
    temperature_stride,
    temperature_objective_stride,
    mask_stride,
    M: tl.constexpr,
    LAST_GROUP_FREE: tl.constexpr,
    FILL: tl.constexpr,
    ROWS: tl.constexpr,
    LISTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write the loss, and unless they are None both gradients, of LISTS lists, each with one objective.

    FILL: items are masked, or the order may leave some out: their gradients are 0.
    """
    dtype: tl.constexpr = loss.dtype.element_ty
    target = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    real = target < lists
    row, objective = target // M, target % M
    lane = tl.arange(0, LANES)[:, None]
    first = tl.broadcast_to(lane * ROWS, (LANES, LISTS))
    labels_row = labels + (row * labels_stride + objective * labels_objective_stride)[None, :]
    scores_row = scores + (row * scores_stride)[None, :]
    mask_row = mask if mask is None else mask + (row * mask_stride)[None, :]
    rate = tl.load(
        temperature + row * temperature_stride + objective * temperature_objective_stride, mask=real, other=1
    ).to(dtype)

    # Whole rows are addressed from the program's first list on, in 32 bits.
    begin = tl.program_id(0).to(tl.int64) * LISTS * items
    if order is not None or FILL:
        place = tl.arange(0, LANES * ROWS)[None, :]
        inside = real[:, None] & (place < items)
        place += tl.arange(0, LISTS)[:, None] * items
    if gradient is not None:
        gradient += begin
        if FILL:
            tl.store(gradient + place, tl.zeros((LISTS, LANES * ROWS), dtype), mask=inside)
            tl.debug_barrier()  # whoever writes an item's gradient comes after whoever has written its 0
    if order is not None:
        ranked = rows_of_lanes(tl.load(order + begin + place, mask=inside, other=-1).to(tl.int32), ROWS, LANES)
    item = ()
    label = ()
    valid = ()
    for r in tl.static_range(ROWS):
        here = real[None, :] & (first + r < items)
        one = first + r
        if order is not None:
            one = ranked[r]
            # A program's lists beyond the last one have no order: what stands for it may be an index in 8 bits.
            here = real[None, :] & (one >= 0) & (one < items)
        if order is None:
            one = tl.where(here, one, ABSENT)
        if mask is not None:
            here = existing(mask_row, one, here)
            if order is None:
                one = tl.where(here, one, one | MASKED)
        item = item + (one,)
        label = label + (comparable(tl.load(labels_row + one, mask=here, other=0)),)
        valid = valid + (here,)
    if order is None:
        item, label = _sorted(item, label, ROWS)
        valid = ()
        for r in tl.static_range(ROWS):
            valid = valid + (item[r] < MASKED,)
    key = ()
    for r in tl.static_range(ROWS):
        here = choosable(key_at(scores_row, item[r], valid[r], rate[None, :], dtype))
        key = key + (tl.where(valid[r], here, float("-inf")),)

    # Ties, unknown labels and a temperature of 0, under which all items are equal, are rare or cost what they cost.
    before = neighbour(label[ROWS - 1], 0, lane, LANES, BEHIND=False)
    special = tl.broadcast_to((rate == 0)[None, :], (LANES, LISTS)).to(tl.int32)
    for r in tl.static_range(ROWS):
        if r == 0:
            differs = (label[0] < before) | (label[0] > before) | ((lane == 0) & (label[0] == label[0]))
        else:
            differs = (label[r] < before) | (label[r] > before)
        special = tl.where(valid[r] & (differs == 0), 1, special)
        before = label[r]
    if tl.max(tl.max(special, axis=0), axis=0) == 0:
        untied(
            item, valid, key, rate, loss, gradient, temperature_gradient, target, real, items, top_k, lane,
            LAST_GROUP_FREE, ROWS, LISTS, LANES,
        )  # fmt: skip
    else:
        _tied(
            item, label, valid, key, rate, loss, gradient, temperature_gradient, target, real, items, top_k, lane,
            LAST_GROUP_FREE, ROWS, LISTS, LANES,
        )  # fmt: skip
