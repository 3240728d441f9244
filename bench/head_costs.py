"""What a plan of `linear_logprob` should cost on a GPU: its products, epilogues and passes over matrices, predicted."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.cards import Card
from mopl.ops.linear_logprob.plan import LIBRARY, Plan, Wanted, block_of

# Seconds between dependent kernels (3 to 4 microseconds in published traces of an H100), and of the host for
# one launch (half of the 55 microseconds of a tile, on a machine where kernels were counted and not run).
GAP, HOST = 3e-6, 27e-6


class Step(NamedTuple):
    """One kernel of a plan, and how often it runs."""

    name: str
    times: int
    rows: int
    columns: int
    inner: int  # 0: no product
    waves: int
    bytes: int  # read and written
    seconds: float


class Cost(NamedTuple):
    """What a plan claims, predicted and not measured."""

    steps: tuple[Step, ...]
    milliseconds: float

    @property
    def waves(self) -> int:
        return sum(step.times * step.waves for step in self.steps)

    @property
    def bytes(self) -> int:
        return sum(step.times * step.bytes for step in self.steps)

    @property
    def launches(self) -> int:
        return sum(step.times for step in self.steps)


def product_step(
    card: Card, dtype: torch.dtype, name: str, times: int, rows: int, columns: int, inner: int, added: bool = False
) -> Step:
    """Return a library's product (rows, inner) x (inner, columns) that writes the compute dtype.

    The rate of a large product is that of whole waves: the one it was measured with filled 97 % of its waves.
    """
    block, compute = block_of(card.plan, dtype), max(4, dtype.itemsize)
    blocks = -(-rows // block[0]) * -(-columns // block[1])
    waves = -(-blocks // card.plan.processors)
    moved = (rows + columns) * inner * dtype.itemsize + rows * columns * compute * (2 if added else 1)
    wave = 2 * block[0] * block[1] * inner * card.plan.processors / (card.rate(dtype.itemsize) / 0.97)
    last = min(blocks, card.plan.processors) * block[0] * block[1] * compute / card.bandwidth
    seconds = max(waves * wave + last, moved / card.bandwidth) + GAP
    return Step(name, times, rows, columns, inner, waves, moved, seconds)


def pass_step(card: Card, name: str, times: int, moved: int) -> Step:
    """Return a kernel whose time is that of moving `moved` bytes."""
    return Step(name, times, 0, 0, 0, 0, moved, moved / card.bandwidth + GAP)


def cost_of(
    plan: Plan, card: Card, dtype: torch.dtype, rows: int, size: int, vocabulary: int, wanted: Wanted, keep: int = 0
) -> Cost:
    """Return what a plan should cost, forward and backward: products, epilogues, and passes over matrices.

    What is proportional to N or to N H alone is left out.

    Args:
        plan: of `make_plan`, or an alternative to it.
        card: the GPU.
        dtype: of the operands.
        rows: N.
        size: H.
        vocabulary: V.
        wanted: as for `make_plan`.
        keep: rows of a trained head whose exponentials are kept; ignored otherwise.
    """
    compute, narrow = max(4, dtype.itemsize), dtype == torch.float16
    steps: list[Step] = []

    def scan(chunk: slice, stored: bool) -> None:
        many = chunk.stop - chunk.start
        wide = plan.columns(many, vocabulary)
        for times, columns in ((vocabulary // wide, wide), (1, vocabulary % wide)):
            if times and columns:
                moved = many * columns * (compute + stored * dtype.itemsize)
                steps.append(product_step(card, dtype, "logits", times, many, columns, size))
                steps.append(pass_step(card, "exp", times, moved))

    def exponentials(chunk: slice) -> None:
        if narrow:
            scan(chunk, False)
        scan(chunk, True)

    if plan.algorithm != LIBRARY:
        # One kernel: it reads the head once, or multiplies at nine tenths of the library's rate.
        moved = (rows + vocabulary) * size * dtype.itemsize
        flop = 2 * rows * vocabulary * size / (0.9 * card.rate(dtype.itemsize))
        steps.append(Step("fused", 1, rows, vocabulary, size, 0, moved, max(flop, moved / card.bandwidth) + GAP))
    elif wanted == "scoring":
        for chunk in plan.chunks(0, rows):
            scan(chunk, False)
    elif wanted == "frozen":
        for chunk in plan.chunks(0, rows, buffered=True):
            exponentials(chunk)
            many = chunk.stop - chunk.start
            steps.append(product_step(card, dtype, "direction", 1, many, size, vocabulary))
    else:
        keep = min(keep, rows)
        for chunk in plan.chunks(0, keep):
            exponentials(chunk)
        for chunk in plan.chunks(keep, rows):
            scan(chunk, False)
        parts = [slice(0, keep)] if keep else []
        for chunk in [*parts, *plan.chunks(keep, rows, buffered=True)]:
            many = chunk.stop - chunk.start
            if chunk.start >= keep:
                scan(chunk, True)
            steps.append(product_step(card, dtype, "dX", 1, many, size, vocabulary))
            steps.append(product_step(card, dtype, "dW", 1, vocabulary, size, many, added=chunk.start > 0))
        if dtype.itemsize == 2:
            steps.append(pass_step(card, "dW in 16 bit", 1, vocabulary * size * (compute + dtype.itemsize)))
    seconds = sum(step.times * step.seconds for step in steps)
    return Cost(tuple(steps), 1e3 * max(seconds, HOST * sum(step.times for step in steps)))
