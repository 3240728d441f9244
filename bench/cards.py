"""The GPUs that the performance model knows: what the head's plan asks of them, and what their data sheets say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mopl.ops.linear_logprob.plan import Device


@dataclass(frozen=True)
class Card:
    """One GPU.

    Args:
        name: as `--card` takes it.
        plan: processors and memory.
        l2: bytes of the L2 cache.
        bandwidth: bytes a second of a copy, those read and those written.
        rates: FLOP a second of a large product, by the size of its operands' dtype in bytes.
        shared: bytes of shared memory that one block may have (CUDA's table of compute capabilities; AMD's LDS).
        clock: Hz of kernels without products, predicted: nine tenths of the data sheet's boost clock.
        cached: bytes that stay near the processors; on an MI300X its Infinity Cache.
    """

    name: str
    plan: Device
    l2: int
    bandwidth: float
    rates: Mapping[int, float]
    shared: int
    clock: float
    cached: int

    @property
    def hip(self) -> bool:
        return self.plan.maker == "AMD"

    def rate(self, itemsize: int) -> float:
        """Return FLOP a second of a large product of operands of so many bytes."""
        return self.rates[itemsize]


# What a large product and a copy reach of the data sheet: 798 of 989 TFLOP/s and 3.0 of 3.35 TB/s measured on an H100.
REACHED_RATE, REACHED_BANDWIDTH = 0.80, 0.895


def _card(
    name: str, plan: Device, l2: float, bandwidth: float, rate16: float, rate32: float, rate64: float,
    shared_kib: int, boost_ghz: float, cached: float | None = None,
) -> Card:  # fmt: skip
    """Return a card by its data sheet: caches in MB, bandwidth in TB/s, dense TFLOP/s by size of dtype."""
    rates = {size: rate * REACHED_RATE * 1e12 for size, rate in ((2, rate16), (4, rate32), (8, rate64))}
    return Card(
        name, plan, int(l2 * 1e6), bandwidth * REACHED_BANDWIDTH * 1e12, rates, shared_kib * 1024, 0.9e9 * boost_ghz,
        int((cached or l2) * 1e6),
    )  # fmt: skip


# Data sheets of NVIDIA (A100 80 GB SXM4, H100 SXM5, H200 SXM, HGX B200 a GPU) and of AMD (Instinct MI300X); float32
# without TF32. On the H100 and the H200 the 16-bit rate (8192 x 8192 x 8192) and the bandwidth were measured.
_H100 = _card("H100", Device(132, int(85.0e9), (9, 0)), 50, 3.35, 989, 67, 67, 227, 1.98)
_H200 = replace(_H100, name="H200", plan=Device(132, int(150.7e9), (9, 0)))
CARDS = {
    card.name: card
    for card in (
        replace(_H200, bandwidth=4.3e12, rates={**_H200.rates, 2: 788e12}),
        replace(_H100, bandwidth=3.0e12, rates={**_H100.rates, 2: 798e12}),
        _card("B200", Device(148, int(191.5e9), (10, 0)), 126, 8.0, 2250, 75, 37, 227, 1.97),
        _card("A100", Device(108, int(85.0e9), (8, 0)), 40, 2.04, 312, 19.5, 19.5, 163, 1.41),
        _card("MI300X", Device(304, int(206.1e9), (9, 4), "AMD"), 4, 5.3, 1307, 163, 163, 64, 2.1, 256),
    )
}
