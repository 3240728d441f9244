"""Which kernels serve a Plackett-Luce loss, and their tiles: pure functions of sizes, without a GPU and without Triton.

Warp instructions an item and objective in the machine code of Triton 3.6.0 for sm_90, float32, m = 1 without a mask
(counted from what `bench.instructions` compiles, in forward alone; backward adds 0.4 to 1.2). A program goes the way
of lists without ties if none of its lists has any. An H200 issues 0.9e12 a second: the 28 bytes of the loss with a
given order, 20 without, take as long as 6 and 4:

    K                       2     4     8    16    32    64   128   256   512  1024  2048  4096
    fused, order given    4.2   3.0   2.8   3.2   3.3   3.4   3.4   3.3   4.0   3.9   4.1   4.7
    the same, with ties   4.8   4.0   3.9   4.7   4.9   5.0   5.1   5.1   6.7   6.9   7.3   8.6
    fused, sorting itself 3.7   3.2   3.6
    the same, with ties   4.4   4.1   4.6
    order_kernel                          2.0   2.9   4.1   5.4   7.2   9.5  11.9  15.6  18.3
    pair by pair          7.3  12.6  24.4  64.3  96.8   287   537
"""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """How one loss is computed."""

    kernel: str  # "fused", "pairs" or "steps"
    sort: str  # who finds the order: "given", "nobody" (the kernel sorts or needs none), "kernel" or "argsort"
    tile: dict[str, int]  # the constants of the kernel, and num_warps


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def fused_limit(itemsize: int) -> int:
    """Return the longest list that `fused_kernel` holds in registers, for arithmetic in `itemsize` bytes."""
    return 4096 if itemsize == 4 else 2048


# The longest list that `order_kernel` sorts. Its instructions for 4096 items take as long as 80 bytes an item, about
# what an argsort reads and writes.
ORDER_ITEMS = 4096

# The longest list that goes pair by pair under Efron's rule or with position weights, which `fused_kernel` does not
# serve: from 17 items on the pairs are padded to 32, and cost more than the three kernels of the steps.
PAIRWISE_ITEMS = 16


def fused_tile(items: int, itemsize: int) -> dict[str, int]:
    """Return ROWS, LISTS, LANES and num_warps of `fused_kernel`: ROWS * LANES places for the items of each list.

    8 rows a thread take about 120 of its 255 registers, so that many warps hide the loads. 16 would save a third of the
    instructions of lists above 256, but take 10 to 13 s of one core to compile where 8 take 2 (Triton 3.6.0 for sm_90,
    nearly all in its pass TritonGPUCoalesce), in which the first call seems to hang. Numbers of double precision are
    twice as large: 4 rows, and 8 only for lists that would need many warps.
    """
    block = max(power_of_2(items), 2)
    rows = min(block, 8 if itemsize == 4 or block > 256 else 4)
    lanes = block // rows
    return {"ROWS": rows, "LISTS": max(128 // lanes, 1), "LANES": lanes, "num_warps": max(lanes // 32, 4)}


def order_tile(items: int) -> dict[str, int]:
    """Return LISTS, BLOCK and num_warps of `order_kernel`: 8 keys a thread, up to 16 for the longest."""
    block = max(power_of_2(items), 2)
    return {"LISTS": max(1024 // block, 1), "BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


def pairwise_tile(items: int, itemsize: int) -> dict[str, int]:
    """Return LISTS, ROWS, BLOCK and num_warps of `pairwise_kernel`: LISTS * ROWS * BLOCK pairs in registers at once."""
    block = max(power_of_2(items), 2)
    # Short lists need more registers a pair, because more of a program's numbers belong to a list.
    pairs = (1024 if block <= 16 else 2048) * 4 // itemsize
    rows = min(block, pairs // block)
    return {"LISTS": pairs // (rows * block), "ROWS": rows, "BLOCK": block, "num_warps": 4}


def scan_tile(items: int) -> dict[str, int]:
    """Return BLOCK and num_warps of `suffix_kernel` and `chain_kernel`."""
    return {"BLOCK": min(max(power_of_2(items), 32), 1024), "num_warps": 4}


def group_tile(items: int, exact: bool) -> dict[str, int]:
    """Return SPAN, MEMBERS, NODES and num_warps of `group_kernel`.

    The trapezoid rule of `_any_order` needs about 48 max(3, log2 n) nodes for n tied items; see there.
    """
    if not exact:
        return {"SPAN": min(power_of_2(items), 64), "MEMBERS": 64, "NODES": 1, "num_warps": 1}
    nodes = 256 if items <= 32 else 512 if items <= 1024 else 1024
    return {"SPAN": 1, "MEMBERS": 1024 // nodes, "NODES": nodes, "num_warps": 4}


def folded(programs: int, limit: int = 2**30) -> tuple[int, int]:
    """Return a grid of at least `programs`, no dimension of which reaches 2^31; the second one ends at 2^16 - 1."""
    return min(programs, limit), -(-programs // limit)


def backward_tile(items: int) -> dict[str, int]:
    """Return LISTS, BLOCK and num_warps of `backward_kernel`."""
    block = min(max(power_of_2(items), 2), 1024)
    return {"LISTS": 1024 // block, "BLOCK": block, "num_warps": 4}


def plan(items: int, itemsize: int, ties: str, weighted: bool, ordered: bool, label_itemsize: int) -> Plan:
    """Return the plan for lists of `items`.

    Args:
        items: K.
        itemsize: bytes of a number of the arithmetic, 4 or 8.
        ties: "breslow", "efron" or "exact".
        weighted: whether there are position weights.
        ordered: whether the order is given.
        label_itemsize: bytes of a label; keys of `order_kernel` hold no more than 4.
    """
    fused = ties == "breslow" and not weighted and items <= fused_limit(itemsize)
    if fused:
        kernel, tile = "fused", fused_tile(items, itemsize)
    elif ties != "exact" and items <= PAIRWISE_ITEMS:
        kernel, tile = "pairs", pairwise_tile(items, itemsize)
    else:
        kernel, tile = "steps", scan_tile(items)
    if ordered:
        sort = "given"
    elif kernel == "pairs" or (fused and tile["LANES"] == 1):
        sort = "nobody"
    else:
        sort = "kernel" if items <= ORDER_ITEMS and label_itemsize <= 4 else "argsort"
    return Plan(kernel, sort, tile)
