"""The GPUs that the performance model knows: what they compute and move a second, and where the figures are from."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One GPU."""

    name: str
    processors: int
    rate: float  # FLOP/s of a large bf16 product
    rate_float32: float  # FLOP/s of a large float32 product, IEEE
    bandwidth: float  # bytes/s read plus written by a large copy
    clock: float  # Hz under load
    l2: int  # bytes
    shared: int  # bytes of shared memory for one block
    memory: int  # bytes
    capability: tuple[int, int]
    hip: bool = False
    source: str = "predicted"


CARDS = {
    card.name: card
    for card in (
        Card("H200", 132, 788e12, 50e12, 4.3e12, 1.6e9, 50 * 2**20, 232448, 141 * 10**9, (9, 0)),
        Card("H100", 132, 728e12, 50e12, 3.0e12, 1.6e9, 50 * 2**20, 232448, 80 * 10**9, (9, 0)),
        Card("B200", 148, 1700e12, 60e12, 7.2e12, 1.7e9, 126 * 2**20, 232448, 180 * 10**9, (10, 0)),
        Card("A100", 108, 265e12, 16e12, 1.78e12, 1.3e9, 40 * 2**20, 166912, 80 * 10**9, (8, 0)),
        Card("MI300X", 304, 720e12, 100e12, 4.2e12, 1.9e9, 256 * 2**20, 65536, 192 * 10**9, (9, 4), hip=True),
    )
}
