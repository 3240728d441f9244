"""The order of the items of lists, best first, by a bitonic network in registers.

A label becomes an integer that grows as the label falls, and shares a key with the item's number: no two keys are
equal, so the order of equal labels, too, is always the same.
"""

import triton
import triton.language as tl

from ._list_rows import existing


@triton.jit
def _rank(label):
    """Return an integer that grows as the label falls, smallest for NaN: 19 bits where labels have 16, else 33."""
    if label.dtype.is_floating():
        value = label.to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        bits = tl.where(value == value, bits, 0x7FFFFFFF)
        if label.dtype.primitive_bitwidth <= 16:
            return -(bits >> 13)  # the last of the 13 digits that no 16-bit float has
        else:
            return -bits.to(tl.int64)
    elif label.dtype.primitive_bitwidth <= 16:
        return -label.to(tl.int32)
    else:
        return -label.to(tl.int64)


@triton.jit(do_not_specialize=["lists"])
def order_kernel(
    labels,  # (B, M, K), at most 32 bits each
    mask,  # (B, K) or None
    order,  # (B, M, K) integer, contiguous
    lists,  # B * M
    items,
    labels_stride,
    labels_objective_stride,
    mask_stride,
    M: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the items of LISTS lists best first: NaN, falling labels, masked items; at most 4096 items each."""
    target = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    real = target < lists
    row, objective = target // M, target % M
    item = tl.arange(0, BLOCK)[None, :]
    inside = real[:, None] & (item < items)
    mask_rows = mask if mask is None else mask + (row * mask_stride)[:, None]
    valid = existing(mask_rows, item, inside)
    labels_row = labels + (row * labels_stride + objective * labels_objective_stride)[:, None]
    rank = _rank(tl.load(labels_row + item, mask=valid, other=0))
    # 12 bits for the item's number; a masked item goes behind every rank.
    key = tl.where(valid, rank << 12, 1 << (30 if rank.dtype.primitive_bitwidth == 32 else 60)) | item
    place = (tl.sort(key, 1) & 0xFFF).to(order.dtype.element_ty)
    tl.store(order + (target * items)[:, None] + item, place, mask=inside)
