"""How `linear_logprob` cuts its work on a GPU: rows of a chunk, columns of a tile, and what that should cost.

Numbers only: nothing here asks a device, so a plan for any GPU can be made, and tested, on any machine.

**Waves.** A library's product computes its result in blocks, of 128 x 256 for 16-bit operands, as many at a time as
the GPU has processors. A product whose blocks do not fill its last wave wastes the rest of it, so chunks of rows are
multiples of 128 whose products fill whole waves: 4224 = 33 * 128 rows of 4096 columns are 33 * 16 blocks, four waves
of 132 processors. Rows are therefore not cut evenly: only the last chunk has what is left.

**Tiles of constant area.** Logits are made tile by tile. Between two kernels a GPU runs dry for some microseconds, and
at the end of a product the last wave's results are still to be written, so a tile should be large; its memory is
bounded by `Device.tile`. Few rows get wide tiles, and many rows narrow ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

Wanted = Literal["scoring", "frozen", "trained"]

# Seconds between dependent kernels (3 to 4 microseconds in published traces of an H100), and of the host for
# one launch (half of the 55 microseconds of a tile, on a machine where kernels were counted and not run).
GAP, HOST = 3e-6, 27e-6

LIBRARY = "library"  # the algorithm that is no tile of the fused kernel
FEW_ROWS = 256  # below which reading the head takes longer than multiplying by it (about 183 rows on an H200)
BUFFER_SHARE = 64  # a 64th of a GPU's memory may hold exponentials that are used at once: half of what may be kept


class Device(NamedTuple):
    """What a plan needs to know of a GPU."""

    processors: int  # streaming multiprocessors; AMD's compute units
    l2: int  # bytes of the L2 cache
    memory: int  # bytes
    bandwidth: float  # bytes a second of a copy, those read and those written
    rates: Mapping[int, float]  # FLOP a second of a large product, by the size of its operands' dtype in bytes
    capability: tuple[int, int] = (0, 0)
    maker: str = "NVIDIA"
    block: tuple[int, int] = (128, 256)  # of a product's result that a processor computes at a time: an assumption
    # Rows of a chunk, roughly. Above 733 on an H200, adding to the float32 dW (8 bytes an entry at 4.3 TB/s) takes less
    # time than its product (2 FLOP a row at 788 TFLOP/s).
    height: int = 4096
    tile: int = 2**27  # bytes of a tile of logits in the compute dtype: 2^25 in float32


# What a large product and a copy reach of the data sheet: 798 of 989 TFLOP/s and 3.0 of 3.35 TB/s measured on an H100.
REACHED_RATE, REACHED_BANDWIDTH = 0.80, 0.895


def _sheet(
    processors: int, l2: float, memory: float, bandwidth: float, rate16: float, rate32: float, rate64: float,
    capability: tuple[int, int], maker: str = "NVIDIA",
) -> Device:  # fmt: skip
    """Return a device by its data sheet: L2 in MB, memory in GB, bandwidth in TB/s, dense TFLOP/s by size of dtype."""
    rates = {size: rate * REACHED_RATE * 1e12 for size, rate in ((2, rate16), (4, rate32), (8, rate64))}
    bandwidth *= REACHED_BANDWIDTH * 1e12
    return Device(processors, int(l2 * 1e6), int(memory * 1e9), bandwidth, rates, capability, maker)


# Data sheets of NVIDIA (A100 80 GB SXM4, H100 SXM5, H200 SXM, HGX B200 a GPU) and of AMD (Instinct MI300X); float32
# without TF32. On the H100 and the H200 the 16-bit rate (8192 x 8192 x 8192) and the bandwidth were measured.
_H100 = _sheet(132, 50, 85.0, 3.35, 989, 67, 67, (9, 0))
DEVICES = {
    "A100": _sheet(108, 40, 85.0, 2.04, 312, 19.5, 19.5, (8, 0)),
    "H100": _H100._replace(bandwidth=3.0e12, rates={**_H100.rates, 2: 798e12}),
    "H200": _H100._replace(memory=int(150.7e9), bandwidth=4.3e12, rates={**_H100.rates, 2: 788e12}),
    "B200": _sheet(148, 126, 191.5, 8.0, 2250, 75, 37, (10, 0)),
    "MI300X": _sheet(304, 4, 206.1, 5.3, 1307, 163, 163, (9, 4), "AMD"),
}

# For Triton's interpreter: several chunks and tiles at the sizes of its tests.
TOY = Device(4, 1024, 2**36, 1e9, {2: 1e9, 4: 1e9, 8: 1e9}, block=(2, 32), height=8, tile=8 * 48 * 4)


def known_device(
    name: str, processors: int, l2: int, memory: int, capability: tuple[int, int], maker: str = "NVIDIA"
) -> Device:
    """Return a GPU by what it says of itself; rates of one that is not in `DEVICES` are guessed.

    They are those of the latest known GPU of its maker that is not newer (else of the oldest one), a processor.
    """
    for known, device in DEVICES.items():
        if known in name and device.processors == processors:
            return device._replace(memory=memory)
    family = sorted((d for d in DEVICES.values() if d.maker == maker), key=lambda d: d.capability)
    like = next((d for d in reversed(family) if d.capability <= capability), family[0])
    part = processors / like.processors
    rates = {size: rate * part for size, rate in like.rates.items()}
    return Device(processors, l2, memory, like.bandwidth * part, rates, capability, maker)


class Plan(NamedTuple):
    """How one call is cut."""

    algorithm: str  # `LIBRARY`, or the name of one of `mopl.kernels.fused_logprob.TILES`
    rows: int  # of a chunk whose logits are summed, or kept
    buffer_rows: int  # of a chunk whose exponentials over the whole vocabulary are used at once: at most `rows`
    area: int  # elements of a tile of logits
    block: tuple[int, int]
    processors: int

    def chunks(self, start: int, stop: int, buffered: bool = False) -> list[slice]:
        """Cut [start, stop) into chunks of `rows` or `buffer_rows`; the last one is what is left."""
        step = self.buffer_rows if buffered else self.rows
        return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]

    def columns(self, rows: int, vocabulary: int) -> int:
        """Return the columns of a tile for a chunk of some rows: as many whole waves as `area` has room for.

        All of the vocabulary, or a multiple of 16: kernels write that many of a tile, beyond a ragged end zeros.
        """
        high = -(-rows // self.block[0])
        room = max(1, self.area // (high * self.block[0] * self.block[1]))
        if room * self.block[1] >= vocabulary:
            return vocabulary
        waves = room * high // self.processors
        return (waves * self.processors // high or room) * self.block[1]


def make_plan(
    device: Device, dtype: torch.dtype, rows: int, size: int, vocabulary: int, wanted: Wanted,
    fits: tuple[str, ...] = (), buffers: int = 1,
) -> Plan:  # fmt: skip
    """Return the plan of a call: `rows` of `size` columns times a head of `vocabulary` rows.

    Args:
        device: the GPU.
        dtype: of the operands.
        rows: N.
        size: H.
        vocabulary: V.
        wanted: sums alone (scoring), the directions of a frozen head, or all that a trained one needs.
        fits: tiles of the fused kernel that the device has room for.
        buffers: how many matrices of exponentials are held at a time.
    """
    block = block_of(device, dtype)
    compute = max(4, dtype.itemsize)
    algorithm = LIBRARY
    if wanted == "scoring" and dtype.itemsize == 2 and rows <= FEW_ROWS:
        name = "few" if rows <= 16 else "short"
        algorithm = name if name in fits else LIBRARY
    most = device.height * 3 // 2 // block[0]
    room = device.memory // BUFFER_SHARE // (buffers * vocabulary * dtype.itemsize * block[0])
    high = fullest(device.processors, -(-size // block[1]), most)
    low = high if room >= high else fullest(device.processors, -(-size // block[1]), max(1, room))
    return Plan(algorithm, high * block[0], low * block[0], device.tile // compute, block, device.processors)


def block_of(device: Device, dtype: torch.dtype) -> tuple[int, int]:
    """Return the block of a product's result: half as wide for operands of more than 16 bit."""
    return (device.block[0], device.block[1] // (1 if dtype.itemsize == 2 else 2))


def fullest(processors: int, wide: int, most: int) -> int:
    """Return how many blocks of rows, from a third of `most` on, fill the waves of a product `wide` blocks wide best.

    Of equally good ones the one nearest to two thirds of `most`.
    """

    def filled(high: int) -> float:
        return high * wide / (-(-high * wide // processors) * processors)

    return max(range(max(1, most // 3), most + 1), key=lambda high: (filled(high), -abs(3 * high - 2 * most)))


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
    device: Device, dtype: torch.dtype, name: str, times: int, rows: int, columns: int, inner: int, added: bool = False
) -> Step:
    """Return a library's product (rows, inner) x (inner, columns) that writes the compute dtype.

    The rate of a large product is that of whole waves: the one it was measured with filled 97 % of its waves.
    """
    block, compute = block_of(device, dtype), max(4, dtype.itemsize)
    blocks = -(-rows // block[0]) * -(-columns // block[1])
    waves = -(-blocks // device.processors)
    moved = (rows + columns) * inner * dtype.itemsize + rows * columns * compute * (2 if added else 1)
    wave = 2 * block[0] * block[1] * inner * device.processors / (device.rates[dtype.itemsize] / 0.97)
    last = min(blocks, device.processors) * block[0] * block[1] * compute / device.bandwidth
    seconds = max(waves * wave + last, moved / device.bandwidth) + GAP
    return Step(name, times, rows, columns, inner, waves, moved, seconds)


def pass_step(device: Device, name: str, times: int, moved: int) -> Step:
    """Return a kernel whose time is that of moving `moved` bytes."""
    return Step(name, times, 0, 0, 0, 0, moved, moved / device.bandwidth + GAP)


def cost_of(
    plan: Plan, device: Device, dtype: torch.dtype, rows: int, size: int, vocabulary: int, wanted: Wanted, keep: int = 0
) -> Cost:
    """Return what a plan should cost, forward and backward: products, epilogues, and passes over matrices.

    What is proportional to N or to N H alone is left out.

    Args:
        plan: of `make_plan`, or an alternative to it.
        device: the GPU.
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
                steps.append(product_step(device, dtype, "logits", times, many, columns, size))
                steps.append(pass_step(device, "exp", times, moved))

    def exponentials(chunk: slice) -> None:
        if narrow:
            scan(chunk, False)
        scan(chunk, True)

    if plan.algorithm != LIBRARY:
        # One kernel: it reads the head once, or multiplies at nine tenths of the library's rate.
        moved = (rows + vocabulary) * size * dtype.itemsize
        flop = 2 * rows * vocabulary * size / (0.9 * device.rates[dtype.itemsize])
        steps.append(Step("fused", 1, rows, vocabulary, size, 0, moved, max(flop, moved / device.bandwidth) + GAP))
    elif wanted == "scoring":
        for chunk in plan.chunks(0, rows):
            scan(chunk, False)
    elif wanted == "frozen":
        for chunk in plan.chunks(0, rows, buffered=True):
            exponentials(chunk)
            many = chunk.stop - chunk.start
            steps.append(product_step(device, dtype, "direction", 1, many, size, vocabulary))
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
            steps.append(product_step(device, dtype, "dX", 1, many, size, vocabulary))
            steps.append(product_step(device, dtype, "dW", 1, vocabulary, size, many, added=chunk.start > 0))
        if dtype.itemsize == 2:
            steps.append(pass_step(device, "dW in 16 bit", 1, vocabulary * size * (compute + dtype.itemsize)))
    seconds = sum(step.times * step.seconds for step in steps)
    return Cost(tuple(steps), 1e3 * max(seconds, HOST * sum(step.times for step in steps)))
