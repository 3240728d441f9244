"""How `linear_logprob` cuts its work on a GPU: rows of a chunk, columns of a tile.

Numbers only: nothing here asks a device, so a plan for any GPU can be made, and tested, on any machine; what it should
cost is predicted in `bench/head_costs.py`.

**Waves.** A library's product computes its result in blocks, of 128 x 256 for 16-bit operands, as many at a time as
the GPU has processors. A product whose blocks do not fill its last wave wastes the rest of it, so chunks of rows are
multiples of 128 whose products fill whole waves: 4224 = 33 * 128 rows of 4096 columns are 33 * 16 blocks, four waves
of 132 processors. Rows are therefore not cut evenly: only the last chunk has what is left.

**Tiles of constant area.** Logits are made tile by tile. Between two kernels a GPU runs dry for some microseconds, and
at the end of a product the last wave's results are still to be written, so a tile should be large; its memory is
bounded by `Device.tile`. Few rows get wide tiles, and many rows narrow ones.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from mopl.ops._rows import slices

Wanted = Literal["scoring", "frozen", "trained"]

LIBRARY = "library"  # the algorithm whose products are the vendor's
# The one whose products are `own_products`; all others are tiles of the fused kernel, for scoring alone.
DESCRIPTORS = "descriptors"
FEW_ROWS = 256  # below which reading the head takes longer than multiplying by it (about 183 rows on an H200)
# Where the rest goes to `DESCRIPTORS`: 64 rows take .44 ms against .56 there, 128 rows .54 against .51 (H200).
FEWER_ROWS = 64
BUFFER_SHARE = 64  # a 64th of a GPU's memory may hold exponentials that are used at once: half of what may be kept


class Device(NamedTuple):
    """What a plan needs to know of a GPU."""

    processors: int  # streaming multiprocessors; AMD's compute units
    memory: int  # bytes
    capability: tuple[int, int] = (0, 0)
    maker: str = "NVIDIA"
    block: tuple[int, int] = (128, 256)  # of a product's result that a processor computes at a time: an assumption
    # Rows of a chunk, roughly. Above 733 on an H200, adding to the float32 dW (8 bytes an entry at 4.3 TB/s) takes less
    # time than its product (2 FLOP a row at 788 TFLOP/s).
    height: int = 4096
    tile: int = 2**27  # bytes of a tile of logits in the compute dtype: 2^25 in float32


H100 = Device(132, int(85.0e9), (9, 0))
# For Triton's interpreter: several chunks and tiles at the sizes of its tests.
TOY = Device(4, 2**36, block=(2, 32), height=8, tile=8 * 48 * 4)


class Plan(NamedTuple):
    """How one call is cut."""

    algorithm: str  # `LIBRARY`, `DESCRIPTORS`, or the name of one of `mopl.kernels.fused_logprob.TILES`
    rows: int  # of a chunk whose logits are summed, or kept
    buffer_rows: int  # of a chunk whose exponentials over the whole vocabulary are used at once: at most `rows`
    area: int  # elements of a tile of logits
    block: tuple[int, int]
    processors: int

    def chunks(self, start: int, stop: int, buffered: bool = False) -> list[slice]:
        """Cut [start, stop) into chunks of `rows` or `buffer_rows`."""
        return slices(start, stop, self.buffer_rows if buffered else self.rows)

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
    """Return the plan of a call: `rows` of `size` columns times a head of `vocabulary` rows, operands of one `dtype`.

    `wanted` are sums alone (scoring), the directions of a frozen head, or all that a trained one needs; `fits` which
    algorithms beside the library the device has room for; `buffers` matrices of exponentials are held at a time.
    """
    block = block_of(device, dtype)
    compute = max(4, dtype.itemsize)
    algorithm = DESCRIPTORS if DESCRIPTORS in fits else LIBRARY
    few = FEWER_ROWS if algorithm == DESCRIPTORS else FEW_ROWS
    if wanted == "scoring" and dtype.itemsize == 2 and rows <= few:
        name = "few" if rows <= 16 else "short"
        algorithm = name if name in fits else algorithm
    most = device.height * 3 // 2 // block[0]
    room = device.memory // BUFFER_SHARE // (buffers * vocabulary * dtype.itemsize * block[0])
    high = fullest(device.processors, -(-size // block[1]), most)
    low = high if room >= high else fullest(device.processors, -(-size // block[1]), max(1, room))
    if algorithm == DESCRIPTORS:
        # Tiles go on through all of the vocabulary, so that no wave is cut short. The library's product of exponentials
        # and head, N = 16384, took 24.6 ms by 4096 rows and 25.3 by 4224, which fill its waves (H200, 2026-11-27).
        high = device.height // block[0]
        low = min(high, max(1, room))
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
