"""Rows of lists as the kernels of their losses read them: where a list begins, which of its items exist, their order.

The *key* of an item is its score, or minus its score where the temperature (called `rate`) is negative, so that the
likeliest item has the largest key for either sign. Distances are taken between scores before they are multiplied by
the temperature: the difference of close floats is exact, so a common offset of all scores costs no digits.
"""

import triton
import triton.language as tl


@triton.jit
def program():
    """Return this program's number: `plackett_luce_plan.folded` cuts a grid of 2^31 programs, which is refused."""
    return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def existing(mask_row, item, within):
    """Return which items `within` a list exist: all of them without a mask."""
    if mask_row is None:
        return within
    else:
        return within & (tl.load(mask_row + item, mask=within, other=0) != 0)


@triton.jit
def item_at(order_row, mask_row, position, items):
    """Return the item at each position and whether there is one."""
    within = (position >= 0) & (position < items)
    item = tl.load(order_row + position, mask=within, other=-1).to(tl.int32)
    return item, existing(mask_row, item, within & (item >= 0) & (item < items))


@triton.jit
def label_at(labels_row, order_row, mask_row, position, items):
    """Return the label of the item at each position, comparable, and whether there is one."""
    item, valid = item_at(order_row, mask_row, position, items)
    return comparable(tl.load(labels_row + item, mask=valid, other=0)), valid


@triton.jit
def comparable(label):
    """Return labels in a dtype in which comparisons are exact wherever the kernel runs (16-bit floats are not)."""
    if label.dtype.is_floating() and label.dtype.primitive_bitwidth == 16:
        return label.to(tl.float32)
    elif label.dtype.primitive_bitwidth < 32:
        return label.to(tl.int32)
    else:
        return label


@triton.jit
def as_key(score, rate):
    """Return the key of a score, and the score of a key."""
    return tl.where(rate < 0, -score, score)


@triton.jit
def key_at(scores_row, item, valid, rate, dtype: tl.constexpr):
    """Return the key of each item."""
    return as_key(tl.load(scores_row + item, mask=valid, other=0).to(dtype), rate)


@triton.jit
def choosable(key):
    """Return a key, NaN where it is +inf: a sequence of choices has no likelihood then, unlike a softmax."""
    return tl.where(key == float("inf"), float("nan"), key)


@triton.jit
def distance_below(top, key, steep):
    """Return how far items are below the one with the key `top`, in nats; 0 for equal scores of -inf or +inf.

    `steep` is the size of the temperature.
    """
    return tl.where(key == top, 0.0, steep * (top - key))


@triton.jit
def change_with_rate(du, chance, key, highest):
    """Return what an item adds to the derivative in the temperature; dloss/du sums to 0, so its offset is free.

    Scores of -inf are equal, so what they add among each other, where they have a `chance` to be chosen, is 0 together.
    """
    still = (du == 0) | ((key == float("-inf")) & (chance != 0))
    return tl.where(still, 0.0, du * (key - highest))


@triton.jit
def shrinkage(top, top_below, steep):
    """Return the unit exp(top_below) in units of exp(top): finite also where nothing is below and the rate is 0."""
    return tl.exp(-tl.where(steep == 0, 0.0, distance_below(top, top_below, steep)))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def compose(a, b, then_a, then_b):
    """Return x -> then_a (a x + b) + then_b as (factor, constant)."""
    return a * then_a, then_a * b + then_b
