"""Plackett-Luce likelihood of m rankings, short lists: every pair of a list in registers.

The formulas and the rules for special values are those of `mopl/ops/plackett_luce/function.py`. Item k is chosen from
its *risk set*, the items that rank no higher than k (a tied group included), which a comparison of ranks finds: no
sort, no scan and no gather. With t = the largest score of the risk set,

    D_k = sum_i a_ki exp(u_i - u_t),  a_ki = 1 for lower items; for tied ones 1 (Breslow) or 1 - r_k / n_k (Efron, with
          r_k the number of tied items in an earlier slot and n_k the size of the group); the item itself counts as tied
    loss = sum_k v_k [(u_t - u_k) + log D_k]
    P_ki = a_ki exp(u_i - u_t) / D_k,   G_i = dloss/du_i = sum_{k != i} v_k P_ki - v_i sum_{l != i} P_il

so that every exponent is <= 0, and no digit is lost where an item is nearly certain: log D_k is then log1p of the other
items' sum, and G has no difference of close numbers. v_k is the charge of k: the mean position weight of its group, or
0. Keys and distances are those of `_list_rows.py`.

The rank is the label, or with `order` the number of label changes before the item's position; items are then addressed
through `order`. `backward_kernel` at the end serves lists of any length; `plackett_luce_plan.py` says which kernel
serves which forward.
"""

import triton
import triton.language as tl

from ._list_rows import as_key, choosable, comparable, distance_below, existing
from ._math import log1p


@triton.jit
def _row_part(value, chosen):
    """Return (LISTS, ROWS): for every row the entry of `value` (LISTS, BLOCK) in the one slot that `chosen` marks."""
    return tl.sum(tl.where(chosen, value[:, None, :], 0), axis=2)


@triton.jit(do_not_specialize=["batch", "top_k", "temperature_stride", "temperature_objective_stride"])
def pairwise_kernel(
    scores,  # (B, K)
    labels,  # (B, M, K), any dtype
    temperature,  # (B, M); strides may be 0
    mask,  # (B, K) or None
    order,  # (B, M, K) integer, or None
    weights,  # (B, M, K) of positions, strides may be 0; or None
    loss,  # (B, M), the dtype of the arithmetic
    gradient,  # (B, M, K) or None
    temperature_gradient,  # (B, M) or None
    batch,
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
    LAST_GROUP_FREE: tl.constexpr,
    LISTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the loss, and unless they are None both gradients, of LISTS whole lists."""
    dtype = loss.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    slot = tl.arange(0, BLOCK)
    real = row < batch
    inside = real[:, None] & (slot < items)[None, :]
    mask_rows = mask if mask is None else mask + row[:, None] * mask_stride
    if order is None:
        item = tl.broadcast_to(slot[None, :], (LISTS, BLOCK))
        valid = existing(mask_rows, item, inside)
        score = tl.load(scores + row[:, None] * scores_stride + item, mask=valid, other=0).to(dtype)

    source_labels = row * labels_stride
    source_temperature = row * temperature_stride
    source_order = row * order_stride
    source_weights = row * weights_stride
    target = row * M
    for _ in range(M):
        if order is not None:
            places = order + source_order[:, None] + slot[None, :]
            item = tl.load(places, mask=inside, other=-1).to(tl.int32)
            valid = (item >= 0) & (item < items)
            before = tl.load(places - 1, mask=valid & (slot > 0)[None, :], other=-1).to(tl.int32)
            valid = existing(mask_rows, item, valid)
            score = tl.load(scores + row[:, None] * scores_stride + item, mask=valid, other=0).to(dtype)
            label = tl.load(labels + source_labels[:, None] + item, mask=valid, other=0)
            previous = tl.load(
                labels + source_labels[:, None] + before, mask=valid & (before >= 0) & (before < items), other=0
            )
            changes = (before < 0) | (comparable(label) != comparable(previous))
            rank = -tl.cumsum(changes.to(tl.int32), axis=1)
        else:
            rank = comparable(tl.load(labels + source_labels[:, None] + item, mask=valid, other=0))
        rate = tl.load(temperature + source_temperature, mask=real, other=1).to(dtype)
        key = choosable(as_key(score, rate[:, None]))
        steep = tl.abs(rate)[:, None]
        if weights is not None:
            weight = tl.load(weights + source_weights[:, None] + slot[None, :], mask=inside, other=0).to(dtype)

        total = tl.zeros((LISTS,), dtype)
        lost = tl.zeros((LISTS,), dtype)  # infinite where an item that cannot be chosen stands above one that can
        du = tl.zeros((LISTS, BLOCK), dtype)
        for start in range(0, BLOCK, ROWS):
            one = start + tl.arange(0, ROWS)
            same = one[None, :, None] == slot[None, None, :]
            if ROWS == BLOCK:
                row_key, row_rank, row_valid = key, rank, valid
            else:
                row_key = _row_part(key, same)
                row_rank = _row_part(rank, same)
                row_valid = _row_part(valid.to(tl.int32), same) != 0
            both = row_valid[:, :, None] & valid[:, None, :]
            tied = both & (row_rank[:, :, None] == rank[:, None, :])
            lower = both & (row_rank[:, :, None] > rank[:, None, :])
            higher = tl.sum((both & (row_rank[:, :, None] < rank[:, None, :])).to(tl.int32), axis=2)

            charge = tl.where(row_valid & (higher < top_k), 1.0, 0.0).to(dtype)
            if LAST_GROUP_FREE:
                charge = tl.where(tl.sum(lower.to(tl.int32), axis=2) > 0, charge, 0.0)
            if EFRON or weights is not None:
                size = tl.sum(tied.to(tl.int32), axis=2)
            if weights is not None:
                position = slot[None, None, :]
                held = (position >= higher[:, :, None]) & (position < (higher + size)[:, :, None])
                mean = tl.sum(tl.where(held, weight[:, None, :], 0.0), axis=2) / tl.maximum(size, 1).to(dtype)
                charge = tl.where(charge == 0, 0.0, mean)

            at_risk = tied | lower
            top = tl.max(tl.where(at_risk, key[:, None, :], float("-inf")), axis=2)
            down = distance_below(top, row_key, steep)
            own = tl.exp(-down)
            share = tl.where(at_risk, tl.exp(-distance_below(top[:, :, None], key[:, None, :], steep[:, :, None])), 0.0)
            if EFRON:
                earlier = tl.sum((tied & (slot[None, None, :] < one[None, :, None])).to(tl.int32), axis=2)
                part = 1 - earlier.to(dtype) / tl.maximum(size, 1).to(dtype)
                own *= part
                share *= tl.where(tied, part[:, :, None], 1.0)
            aside = tl.sum(tl.where(same, 0.0, share), axis=2)
            # own - 1 is exactly 0 where the item itself is the largest of its risk set (and alone in its group).
            total += tl.sum(tl.where(charge == 0, 0.0, charge * (down + log1p(aside + (own - 1)))), axis=1)
            if gradient is not None:
                if temperature_gradient is not None:
                    hopeless = (row_key == float("-inf")) & (top != float("-inf")) & (charge != 0)
                    lost += tl.sum(tl.where(hopeless, charge * float("inf"), 0.0), axis=1)
                factor = tl.where(charge == 0, 0.0, charge / (aside + own))
                du += tl.sum(factor[:, :, None] * tl.where(same, -aside[:, :, None], share), axis=1)

        tl.store(loss + target, total, mask=real)
        if gradient is not None:
            known = inside & (item >= 0) & (item < items)
            tl.store(gradient + (target * items)[:, None] + item, tl.where(valid, du, 0.0), mask=known)
            # The distance from the largest score stands for the score itself, because the gradient sums to 0.
            top_key = tl.max(tl.where(valid, key, float("-inf")), axis=1)
            moves = valid & (du != 0) & (key != float("-inf"))
            if temperature_gradient is not None:
                drate = lost + tl.sum(tl.where(moves, du * (key - top_key[:, None]), 0.0), axis=1)
                tl.store(temperature_gradient + target, as_key(drate, rate), mask=real)
        source_labels += labels_objective_stride
        source_temperature += temperature_objective_stride
        source_order += order_objective_stride
        source_weights += weights_objective_stride
        target += 1


@triton.jit(
    do_not_specialize=[
        "batch", "grad_stride", "grad_objective_stride", "temperature_stride", "temperature_objective_stride",
    ]
)  # fmt: skip
def backward_kernel(
    grad_loss,  # (B, M)
    temperature,  # (B, M); strides may be 0
    gradient,  # (B, M, K), contiguous
    dscores,  # (B, K), contiguous
    batch,
    items,
    grad_stride,
    grad_objective_stride,
    temperature_stride,
    temperature_objective_stride,
    M: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write dscores_bi = sum_j grad_loss_bj temperature_bj gradient_bji for one block of items of LISTS lists."""
    dtype = gradient.dtype.element_ty
    blocks = tl.cdiv(items, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    item = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    real = row < batch
    inside = real[:, None] & (item < items)[None, :]
    source = row * M * items
    source_grad = row * grad_stride
    source_temperature = row * temperature_stride
    total = tl.zeros((LISTS, BLOCK), dtype)
    for _ in range(M):
        upstream = tl.load(grad_loss + source_grad, mask=real, other=0).to(dtype)
        rate = tl.load(temperature + source_temperature, mask=real, other=0).to(dtype)
        du = tl.load(gradient + source[:, None] + item[None, :], mask=inside, other=0)
        total += tl.where(du == 0, 0.0, (upstream * rate)[:, None] * du)
        source += items
        source_grad += grad_objective_stride
        source_temperature += temperature_objective_stride
    tl.store(dscores + row[:, None] * items + item[None, :], total, mask=inside)
