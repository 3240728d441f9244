"""Plackett-Luce likelihood of lists in registers in which no labels are tied: a third of the instructions.

With groups of one item, u_k the key at position k times the temperature, and t_k the largest u from k on,

    d_k = |u_k - t_(k+1)|,  e_k = exp(-d_k): one exponential an item
    u_k the largest:  own_k = 1,    shrink_k = e_k   (own_k is exp(u_k - t_k), shrink_k is exp(t_(k+1) - t_k))
    else:             own_k = e_k,  shrink_k = 1
    rest_k = shrink_k mass_(k+1),  mass_k = rest_k + own_k
    cost_k = (t_k - u_k) + log1p(rest_k + (own_k - 1)),  stay_k = rest_k / mass_k
    carried_(k+1) = shrink_k (carried_k + 1 / mass_k),  G_k = own_k carried_k - stay_k

own_k - 1 is exactly 0 where the item is the largest, so that a tiny cost keeps every digit, and G_k has no difference
of close numbers. `carried` is a sum of 1 / mass in units of exp(-t_k): nothing in it depends on whether rest / mass of
an item without a chance is 1 or a unit less, which in a product of thousands would count thousands of times.
"""

# ruff: noqa: RUF005 (Triton's compiler knows no unpacking of tuples)

import triton
import triton.language as tl

from ._list_rows import as_key, change_with_rate
from ._math import log1p
from .plackett_luce_lanes import chain, largest_of_others


@triton.jit
def untied(
    item,  # ROWS of (LANES, LISTS), as the next two
    valid,
    key,  # -inf where not valid
    rate,  # (LISTS,), not 0
    loss,
    gradient,  # of the program's first list, or None
    temperature_gradient,  # or None
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
    """Write the loss, and unless they are None both gradients; the arguments are those of `fused_kernel`."""
    dtype: tl.constexpr = loss.dtype.element_ty
    steep = tl.abs(rate)[None, :]
    first = tl.broadcast_to(lane * ROWS, (LANES, LISTS))
    largest = key[0]
    for r in tl.static_range(1, ROWS):
        largest = tl.maximum(largest, key[r])
    if temperature_gradient is not None:
        highest = tl.max(largest, axis=0)[None, :]
    largest = largest_of_others(largest, float("-inf"), lane, LANES, BEHIND=True)

    # From the last position up.
    own = ()
    shrink = ()
    total = tl.zeros((LANES, LISTS), dtype)
    if LAST_GROUP_FREE:
        reach = tl.zeros((LANES, LISTS), tl.int32)
        for r in tl.static_range(ROWS):
            reach = tl.where(valid[r], first + r + 1, reach)
        reach = tl.max(reach, axis=0)[None, :]
    charged = ()
    for r in tl.static_range(ROWS):
        here, exists, position = key[ROWS - 1 - r], valid[ROWS - 1 - r], first + (ROWS - 1 - r)
        leads = here >= largest
        way = tl.where(here == largest, 0.0, steep * tl.abs(here - largest))
        part = tl.exp2(way * -1.4426950408889634)
        own = own + (tl.where(exists, tl.where(leads, 1.0, part), 0.0),)
        shrink = shrink + (tl.where(leads, part, 1.0),)
        counts = exists
        if top_k is not None:
            counts = counts & (position < top_k)
        if LAST_GROUP_FREE:
            counts = counts & (position + 1 < reach)
        charged = charged + (counts,)
        total += tl.where(counts & (leads == 0), way, 0.0)
        largest = tl.maximum(largest, here)
    forward_shrink = ()
    forward_own = ()
    for r in tl.static_range(ROWS):
        forward_shrink = forward_shrink + (shrink[ROWS - 1 - r],)
        forward_own = forward_own + (own[ROWS - 1 - r],)
    mass = chain(forward_shrink, forward_own, lane, ROWS, LANES, BEHIND=True)
    # log1p of several costs at once: of the product of 1 + x, less 1, whose terms are not negative.
    product = tl.zeros((LANES, LISTS), dtype)
    stay = ()
    passed = ()
    for step in tl.static_range(ROWS):
        rest = shrink[step] * mass
        mass = rest + own[step]
        aside = tl.where(charged[step], rest + (own[step] - 1), 0.0)
        product = product * aside + (product + aside)
        if gradient is not None:
            inverse = tl.where(charged[step], 1 / mass, 0.0)
            stay = stay + (rest * inverse,)
            passed = passed + (shrink[step] * inverse,)
    total += log1p(product)
    tl.store(loss + target, tl.sum(total, axis=0), mask=real)
    if gradient is not None:
        forward_passed = ()
        for r in tl.static_range(ROWS):
            forward_passed = forward_passed + (passed[ROWS - 1 - r],)
        carried = chain(forward_shrink, forward_passed, lane, ROWS, LANES, BEHIND=False)
        gradient_row = tl.arange(0, LISTS)[None, :] * items
        drate = tl.zeros((LANES, LISTS), dtype)
        for r in tl.static_range(ROWS):
            du = forward_own[r] * carried - stay[ROWS - 1 - r]
            carried = forward_shrink[r] * carried + forward_passed[r]
            tl.store(gradient + (gradient_row + item[r]), du, mask=valid[r])
            if temperature_gradient is not None:
                drate += change_with_rate(du, forward_own[r], key[r], highest)
        if temperature_gradient is not None:
            tl.store(temperature_gradient + target, as_key(tl.sum(drate, axis=0), rate), mask=real)
