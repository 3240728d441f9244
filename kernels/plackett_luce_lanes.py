"""What threads that hold a list together tell each other: neighbours, largest values, linear recurrences.

Every thread holds ROWS consecutive positions, one tensor (LANES, LISTS) for each; LANES threads hold a list. `BEHIND`
asks for what comes from the positions behind a thread instead of those before it.
"""

import triton
import triton.language as tl

from ._list_rows import compose


@triton.jit
def rows_of_lanes(tile, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Return ROWS tensors (LANES, LISTS) of a tile (LISTS, LANES * ROWS) that was read along its lists.

    Read position by position, with ROWS items between neighbouring threads, each sector would be asked for ROWS times.
    """
    tl.static_assert(ROWS <= 8)
    tile = tl.permute(tl.reshape(tile, (tile.shape[0], LANES, ROWS)), (1, 0, 2))
    if ROWS == 1:
        return (tl.reshape(tile, (LANES, tile.shape[1])),)
    elif ROWS == 2:
        first, second = tl.split(tile)
        return (first, second)
    else:
        lists: tl.constexpr = tile.shape[1]
        even, odd = tl.split(tl.reshape(tile, (LANES, lists, ROWS // 2, 2)))
        if ROWS == 4:
            a, c = tl.split(even)
            b, d = tl.split(odd)
            return (a, b, c, d)
        else:
            a, c = tl.split(tl.reshape(even, (LANES, lists, 2, 2)))
            b, d = tl.split(tl.reshape(odd, (LANES, lists, 2, 2)))
            a, e = tl.split(a)
            b, f = tl.split(b)
            c, g = tl.split(c)
            d, h = tl.split(d)
            return (a, b, c, d, e, f, g, h)


@triton.jit
def _remember(a_value, a_beside, a_several, b_value, b_beside, b_several):
    return b_value, tl.where(b_several != 0, b_beside, a_value), a_several | b_several | 1


@triton.jit
def _apart(values, lane, DISTANCE: tl.constexpr, LANES: tl.constexpr, BEHIND: tl.constexpr):
    """Return what the thread at a distance has; at the end of the list, what the last one there has."""
    other = tl.minimum(lane + DISTANCE, LANES - 1) if BEHIND else tl.maximum(lane - DISTANCE, 0)
    return tl.gather(values, tl.broadcast_to(other, values.shape), 0)


@triton.jit
def neighbour(values, default, lane, LANES: tl.constexpr, BEHIND: tl.constexpr):
    """Return what the thread before this one has, or that BEHIND it; `default` where the list has none there."""
    edge = LANES - 1 if BEHIND else 0
    if LANES == 1:
        found = tl.zeros(values.shape, values.dtype)
    elif LANES <= 32:
        found = _apart(values, lane, 1, LANES, BEHIND)
    else:
        # A gather beyond a warp would give each warp the whole list.
        none = tl.zeros(values.shape, tl.int32)
        _, found, _ = tl.associative_scan((values, values, none), 0, _remember, reverse=BEHIND)
    return tl.where(lane == edge, default, found)


@triton.jit
def _larger_before(a_value, a_before, b_value, b_before):
    return tl.maximum(a_value, b_value), tl.maximum(a_value, b_before)


@triton.jit
def largest_of_others(values, default, lane, LANES: tl.constexpr, BEHIND: tl.constexpr):
    """Return the largest of the threads before this one, or of those BEHIND it; `default`, the least, for none."""
    if LANES <= 32:  # a scan backwards of Triton's mirrors the warp before and after, in five exchanges each
        values = neighbour(values, default, lane, LANES, BEHIND)
        for step in tl.static_range(5):
            if 2**step < LANES:
                values = tl.maximum(values, _apart(values, lane, 2**step, LANES, BEHIND))
        return values
    else:  # over warps one scan of pairs costs less than a scan and an exchange
        least = tl.zeros(values.shape, values.dtype) + default
        _, found = tl.associative_scan((values, least), 0, _larger_before, reverse=BEHIND)
        return found


@triton.jit
def _compose_before(a, b, a_before, b_before, then_a, then_b, then_a_before, then_b_before):
    # What stands before the second run is all of the first and what stands before within the second.
    factor, constant = compose(a, b, then_a, then_b)
    before_factor, before_constant = compose(a, b, then_a_before, then_b_before)
    return factor, constant, before_factor, before_constant


@triton.jit
def chain(factors, constants, lane, ROWS: tl.constexpr, LANES: tl.constexpr, BEHIND: tl.constexpr):
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
        if LANES > 32:
            one = tl.zeros(factor.shape, factor.dtype) + 1
            nothing = tl.zeros(factor.shape, factor.dtype)
            _, _, _, constant = tl.associative_scan(
                (factor, constant, one, nothing), 0, _compose_before, reverse=BEHIND
            )
        else:
            # Shifted by one first: what the end of the list has, and all beyond it find, is the identity.
            factor = neighbour(factor, 1.0, lane, LANES, BEHIND)
            constant = neighbour(constant, 0.0, lane, LANES, BEHIND)
            for step in tl.static_range(5):
                if 2**step < LANES:
                    constant = factor * _apart(constant, lane, 2**step, LANES, BEHIND) + constant
                    factor *= _apart(factor, lane, 2**step, LANES, BEHIND)
    return constant
