"""Listwise cross-entropy (ListNet): all m objectives of a list in one program, the scores read once.

The formulas, the saved statistics and the rules for special values are those of `mopl/ops/listnet/function.py`; keys
and distances are those of `_list_rows.py`.

Forward has two kernels: whole lists in registers (several short ones a program), which leaves nothing but the loss,
and a loop over blocks of one list for any length, which saves statistics. Backward computes those of a list that it
holds in registers again: it reads scores and labels anyway, and of short lists the statistics would be more bytes than
the difference to any other implementation. Given saved ones it is elementwise but for the gradient of the temperature,
so a program for every block of items serves all lengths; partial sums of that gradient are added in a fixed order.
"""

import triton
import triton.language as tl

from ._list_rows import as_key, distance_below, existing, key_at
from ._math import log1p

TILE = 512  # items that a program holds where lists are short


def registers_limit(itemsize: int) -> int:
    """Return the longest list that one program holds in registers, for arithmetic in `itemsize` bytes.

    Backward would spill registers for lists twice as long (Triton 3.6 for sm_90).
    """
    return 4096 if itemsize == 4 else 2048


def _tile(block: int, items_a_warp: int) -> dict[str, int]:
    """Return LISTS, BLOCK and num_warps.

    With fewer items a warp, more instructions would be those of a program and not of an item, and more lists would be
    added up across warps: with four times as many warps, lists of 256 items issue 1.4 times as many instructions on
    sm_90. With more items, too few warps would fit to hide loads.
    """
    # Past 16 bytes a lane the warps of a program would share each list.
    lists = (TILE if block <= 128 else max(block, items_a_warp)) // block
    return {"LISTS": lists, "BLOCK": block, "num_warps": min(max(lists * block // items_a_warp, 1), 16)}


def forward_tile(items: int, itemsize: int) -> dict[str, int]:
    """Return LISTS, BLOCK and num_warps of `forward_kernel` (or of `forward_loop_kernel` past the register limit)."""
    if items > registers_limit(itemsize):
        return {"LISTS": 1, "BLOCK": 16384 // itemsize, "num_warps": 8}
    return _tile(max(triton.next_power_of_2(items), 2), 2048 // itemsize)


def backward_tile(items: int, itemsize: int) -> dict[str, int]:
    """Return LISTS, BLOCK and num_warps of `backward_kernel`."""
    whole = items <= registers_limit(itemsize)
    return _tile(max(triton.next_power_of_2(items), 2) if whole else TILE, 1024 // itemsize)


@triton.jit
def _aligned(size, ALIGN: tl.constexpr):
    """Return `size`, a multiple of ALIGN, so that the compiler sees it and reads rows up to 16 bytes at a time.

    For lists of 8 or 120 items this halves the instructions of both passes. What the compiler would see by itself, that
    a stride is a multiple of 16, must not reach it: how a list's items lie in registers, and with that the order in
    which they are added, would depend on where lists lie in memory.
    """
    return size // ALIGN * ALIGN


@triton.jit
def _label(z, NORMALIZE: tl.constexpr):
    """Return labels, NaN where one is negative and has no share: the mass, and so all of the list, is NaN then."""
    if NORMALIZE:
        return tl.where(z < 0, float("nan"), z)
    else:
        return z


@triton.jit
def _add(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def _sums(a, b):
    """Return the sums of two tensors along their lists: together they cost a program of several warps one exchange."""
    return tl.reduce((a, b), 1, _add)


@triton.jit
def _peak(rates, real, score, valid):
    """Return the temperature and the peak's key (LISTS,), the items that have it, their distances, the rest (LISTS,).

    Where several items share the peak's key all are marked. Of the rest all but one count as what they are, 1; nothing
    that depends on which one it is matters then, because the rest is not below 1.
    """
    rate = tl.load(rates, mask=real, other=1).to(score.dtype)
    key = as_key(score, rate[:, None])
    top = tl.max(tl.where(valid, key, float("-inf")), axis=1)
    at_peak = valid & (key == top[:, None])
    distance = distance_below(top[:, None], key, tl.abs(rate)[:, None])
    beside = tl.where(valid & (key != top[:, None]), tl.exp(-distance), 0.0)
    ties, rest = _sums(tl.where(at_peak, 1.0, 0.0).to(score.dtype), beside)
    return rate, top, at_peak, distance, rest + tl.where(ties > 1, ties - 1, 0.0)


@triton.jit
def _mass(z, at_peak):
    """Return the sum of the labels (LISTS,), and of those off the peak."""
    off_peak, peak = _sums(tl.where(at_peak, 0.0, z), tl.where(at_peak, z, 0.0))
    return off_peak + peak, off_peak


@triton.jit
def _loss(mass, rest, spread, NORMALIZE: tl.constexpr):
    """Return mass * log1p(rest) + spread, divided by the mass if NORMALIZE; spread is sum_i z_i distance_i."""
    if NORMALIZE:
        empty = mass <= 0
        return tl.where(empty, 0.0, log1p(rest) + spread / tl.where(empty, 1.0, mass))
    else:
        return mass * log1p(rest) + spread


@triton.jit(
    do_not_specialize=[
        "batch", "scores_stride", "labels_stride", "labels_objective_stride", "temperature_stride",
        "temperature_objective_stride", "mask_stride",
    ]
)  # fmt: skip
def forward_kernel(
    scores,  # (B, K)
    labels,  # (B, M, K)
    temperature,  # (B, M), or (B, 1) if COMMON
    mask,  # (B, K) or None
    loss,  # (B, M); the dtype of the arithmetic
    batch,
    items,
    scores_stride,
    labels_stride,
    labels_objective_stride,
    temperature_stride,
    temperature_objective_stride,
    mask_stride,
    M: tl.constexpr,
    COMMON: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the loss of LISTS whole lists; ALIGN divides `items` and the strides between lists."""
    items, scores_stride = _aligned(items, ALIGN), _aligned(scores_stride, ALIGN)
    labels_stride, labels_objective_stride = _aligned(labels_stride, ALIGN), _aligned(labels_objective_stride, ALIGN)
    mask_stride = _aligned(mask_stride, ALIGN)
    dtype = loss.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    item = tl.arange(0, BLOCK)
    real = row < batch
    mask_rows = mask if mask is None else mask + row[:, None] * mask_stride
    valid = existing(mask_rows, item[None, :], real[:, None] & (item < items)[None, :])
    score = tl.load(scores + row[:, None] * scores_stride + item[None, :], mask=valid, other=0).to(dtype)

    if COMMON:
        _rate, _top, _at_peak, distance, total = _peak(temperature + row * temperature_stride, real, score, valid)

    source = row * labels_stride
    source_temperature = row * temperature_stride
    target = row * M
    for _ in range(M):
        if not COMMON:
            _rate, _top, _at_peak, distance, total = _peak(temperature + source_temperature, real, score, valid)
        z = _label(tl.load(labels + source[:, None] + item[None, :], mask=valid, other=0).to(dtype), NORMALIZE)
        mass, spread = _sums(z, tl.where(z == 0, 0.0, z * distance))
        tl.store(loss + target, _loss(mass, total, spread, NORMALIZE), mask=real)
        source += labels_objective_stride
        source_temperature += temperature_objective_stride
        target += 1


@triton.jit
def _keys(scores_row, mask_row, start, items, rate, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Return the items of a block, which of them exist, and their keys."""
    item = start + tl.arange(0, BLOCK)
    valid = existing(mask_row, item, item < items)
    return item, valid, key_at(scores_row, item, valid, rate, dtype)


@triton.jit
def _peak_of_blocks(scores_row, mask_row, items, rate, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Return the peak, its key and the rest of one list, reading it twice: once for the peak, once for the sum."""
    highest = tl.full((BLOCK,), float("-inf"), dtype)
    first = tl.full((BLOCK,), 2**31 - 1, tl.int32)
    for start in range(0, items, BLOCK):
        item, valid, key = _keys(scores_row, mask_row, start, items, rate, dtype, BLOCK)
        key = tl.where(valid, key, float("-inf"))
        # Also takes a first item of score -inf, so that a list of nothing else has a peak.
        better = (key > highest) | (valid & (key == highest) & (first > item))
        highest = tl.where(better, key, highest)
        first = tl.where(better, item, first)
    top = tl.max(highest, axis=0)
    peak = tl.min(tl.where(highest == top, first, 2**31 - 1), axis=0)
    total = tl.zeros((BLOCK,), dtype)
    for start in range(0, items, BLOCK):
        item, valid, key = _keys(scores_row, mask_row, start, items, rate, dtype, BLOCK)
        distance = distance_below(top, key, tl.abs(rate))
        total += tl.where(valid & (item != peak), tl.exp(-distance), 0.0)
    return peak, top, tl.sum(total, axis=0)


@triton.jit(
    do_not_specialize=[
        "batch", "scores_stride", "labels_stride", "labels_objective_stride", "temperature_stride",
        "temperature_objective_stride", "mask_stride",
    ]
)  # fmt: skip
def forward_loop_kernel(
    scores,
    labels,
    temperature,
    mask,
    loss,
    peak,  # like temperature, int64
    rest,  # like temperature, in the dtype of the loss; as mass and others
    mass,  # (B, M)
    others,  # (B, M)
    batch,
    items,
    scores_stride,
    labels_stride,
    labels_objective_stride,
    temperature_stride,
    temperature_objective_stride,
    mask_stride,
    M: tl.constexpr,
    COMMON: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write loss and statistics of one list of any length, block by block; arguments as for `forward_kernel`."""
    tl.static_assert(LISTS == 1)
    items, scores_stride = _aligned(items, ALIGN), _aligned(scores_stride, ALIGN)
    labels_stride, labels_objective_stride = _aligned(labels_stride, ALIGN), _aligned(labels_objective_stride, ALIGN)
    mask_stride = _aligned(mask_stride, ALIGN)
    dtype: tl.constexpr = loss.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    scores_row = scores + row * scores_stride
    mask_row = mask if mask is None else mask + row * mask_stride
    if COMMON:
        rate = tl.load(temperature + row * temperature_stride).to(dtype)
        peak_item, top, total = _peak_of_blocks(scores_row, mask_row, items, rate, dtype, BLOCK)
        tl.store(peak + row, tl.minimum(peak_item, items - 1))
        tl.store(rest + row, total)
    labels_row = labels + row * labels_stride
    temperature_row = temperature + row * temperature_stride
    target = row * M
    for _ in range(M):
        if not COMMON:
            rate = tl.load(temperature_row).to(dtype)
            peak_item, top, total = _peak_of_blocks(scores_row, mask_row, items, rate, dtype, BLOCK)
            tl.store(peak + target, tl.minimum(peak_item, items - 1))
            tl.store(rest + target, total)
        at_peak = tl.zeros((BLOCK,), dtype)
        off_peak = tl.zeros((BLOCK,), dtype)
        spread = tl.zeros((BLOCK,), dtype)
        for start in range(0, items, BLOCK):
            item, valid, key = _keys(scores_row, mask_row, start, items, rate, dtype, BLOCK)
            z = _label(tl.load(labels_row + item, mask=valid, other=0).to(dtype), NORMALIZE)
            distance = distance_below(top, key, tl.abs(rate))
            spread += tl.where(z == 0, 0.0, z * distance)
            at_peak += tl.where(item == peak_item, z, 0.0)
            off_peak += tl.where(item != peak_item, z, 0.0)
        aside = tl.sum(off_peak, axis=0)
        whole = aside + tl.sum(at_peak, axis=0)
        tl.store(loss + target, _loss(whole, total, tl.sum(spread, axis=0), NORMALIZE))
        tl.store(mass + target, whole)
        tl.store(others + target, aside)
        labels_row += labels_objective_stride
        temperature_row += temperature_objective_stride
        target += 1


@triton.jit(
    do_not_specialize=[
        "batch", "grad_stride", "grad_objective_stride", "scores_stride", "labels_stride", "labels_objective_stride",
        "temperature_stride", "temperature_objective_stride", "mask_stride",
    ]
)  # fmt: skip
def backward_kernel(
    grad_loss,  # (B, M)
    scores,  # (B, K)
    labels,  # (B, M, K)
    temperature,  # (B, M), or (B, 1) if COMMON
    mask,  # (B, K) or None
    loss,  # (B, M); as forward wrote it
    peak,  # this and the next three as `forward_loop_kernel` wrote them; None: BLOCK holds the whole list
    rest,
    mass,
    others,
    dscores,  # (B, K) or None
    dlabels,  # (B, M, K) or None
    dtemperature,  # (blocks of a list,) + the shape of temperature, in the dtype of the arithmetic; or None
    batch,
    items,
    grad_stride,
    grad_objective_stride,
    scores_stride,
    labels_stride,
    labels_objective_stride,
    temperature_stride,
    temperature_objective_stride,
    mask_stride,
    M: tl.constexpr,
    COMMON: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of one block of items of LISTS lists; ALIGN as for `forward_kernel`."""
    items, scores_stride = _aligned(items, ALIGN), _aligned(scores_stride, ALIGN)
    labels_stride, labels_objective_stride = _aligned(labels_stride, ALIGN), _aligned(labels_objective_stride, ALIGN)
    mask_stride = _aligned(mask_stride, ALIGN)
    dtype = loss.dtype.element_ty
    blocks = tl.cdiv(items, BLOCK)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    item = block * BLOCK + tl.arange(0, BLOCK)
    real = row < batch
    inside = real[:, None] & (item < items)[None, :]
    mask_rows = mask if mask is None else mask + row[:, None] * mask_stride
    valid = existing(mask_rows, item[None, :], inside)
    score = tl.load(scores + row[:, None] * scores_stride + item[None, :], mask=valid, other=0).to(dtype)

    if COMMON and peak is None:
        rate, top, at_peak, distance, total = _peak(temperature + row * temperature_stride, real, score, valid)

    dscore = tl.zeros((LISTS, BLOCK), dtype)
    dshared = tl.zeros((LISTS,), dtype)
    source = row * labels_stride
    source_temperature = row * temperature_stride
    source_grad = row * grad_stride
    target_labels = row * M * items
    target = row * M
    statistics = row if COMMON else target
    for _ in range(M):
        upstream = tl.load(grad_loss + source_grad, mask=real, other=0).to(dtype)
        z = tl.load(labels + source[:, None] + item[None, :], mask=valid, other=0).to(dtype)
        if peak is None:
            if not COMMON:
                rate, top, at_peak, distance, total = _peak(temperature + source_temperature, real, score, valid)
            whole, aside = _mass(_label(z, NORMALIZE), at_peak)
            top_score = as_key(top, rate)
        else:
            rate = tl.load(temperature + source_temperature, mask=real, other=1).to(dtype)
            top = tl.load(peak + statistics, mask=real, other=0)
            total = tl.load(rest + statistics, mask=real, other=0)
            whole = tl.load(mass + target, mask=real, other=0)
            aside = tl.load(others + target, mask=real, other=0)
            top_score = tl.load(scores + row * scores_stride + top, mask=real, other=0).to(dtype)
            key = as_key(score, rate[:, None])
            distance = distance_below(as_key(top_score, rate)[:, None], key, tl.abs(rate)[:, None])
            at_peak = item[None, :] == top[:, None]

        live = valid
        scale = whole
        if NORMALIZE:
            live = valid & (whole > 0)[:, None] | valid & (whole != whole)[:, None]
            divisor = tl.where(whole > 0, whole, 1.0)
            z = z / divisor[:, None]
            aside = aside / divisor
            scale = tl.where(whole != whole, whole, 1.0)
        share = scale / (1 + total)
        # At the peak of a confident list the plain difference would cancel.
        du = share[:, None] * tl.exp(-distance) - z
        du = tl.where(at_peak & (total < 1)[:, None], (aside - share * total)[:, None], du)
        if dscores is not None:
            dscore += tl.where(live, (upstream * rate)[:, None] * du, 0.0)
        if dtemperature is not None:
            # The item's distance from the peak's score stands for the score itself, because du sums to 0.
            moves = live & (score != top_score[:, None]) & (du != 0)
            drate = upstream * tl.sum(tl.where(moves, du * (score - top_score[:, None]), 0.0), axis=1)
            if COMMON:
                dshared += drate
            else:
                tl.store(dtemperature + block.to(tl.int64) * batch * M + target, drate, mask=real)
        if dlabels is not None:
            dz = log1p(total)[:, None] + distance
            if NORMALIZE:
                dz = (dz - tl.load(loss + target, mask=real, other=0)[:, None]) / divisor[:, None]
            dz = tl.where(live, upstream[:, None] * dz, 0.0)
            tl.store(dlabels + target_labels[:, None] + item[None, :], dz, mask=inside)
        source += labels_objective_stride
        source_grad += grad_objective_stride
        target_labels += items
        target += 1
        if not COMMON:
            source_temperature += temperature_objective_stride
            statistics += 1
    if dscores is not None:
        tl.store(dscores + row[:, None] * items + item[None, :], dscore, mask=inside)
    if dtemperature is not None and COMMON:
        tl.store(dtemperature + block.to(tl.int64) * batch + row, dshared, mask=real)
