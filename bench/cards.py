"""The GPUs that the performance model knows: those of the head's plan, and what a plan does not need."""

from __future__ import annotations

from dataclasses import dataclass

from mopl.ops._head_plan import DEVICES, Device


@dataclass(frozen=True)
class Card:
    """One GPU.

    Args:
        name: as `--card` takes it.
        plan: processors, caches, memory, bandwidth and rates, with their sources.
        shared: bytes of shared memory that one block may have (CUDA's table of compute capabilities; AMD's LDS).
        clock: Hz of kernels without products, predicted: nine tenths of the data sheet's boost clock.
        cached: bytes that stay near the processors; on an MI300X its Infinity Cache.
    """

    name: str
    plan: Device
    shared: int
    clock: float
    cached: int

    @property
    def hip(self) -> bool:
        return self.plan.maker == "AMD"

    def rate(self, itemsize: int) -> float:
        """Return FLOP a second of a large product of operands of so many bytes."""
        return self.plan.rates[itemsize]


def _card(name: str, shared_kib: int, boost_ghz: float, cached: int | None = None) -> Card:
    plan = DEVICES[name]
    return Card(name, plan, shared_kib * 1024, 0.9e9 * boost_ghz, cached or plan.l2)


CARDS = {
    card.name: card
    for card in (
        _card("H200", 227, 1.98), _card("H100", 227, 1.98), _card("B200", 227, 1.97), _card("A100", 163, 1.41),
        _card("MI300X", 64, 2.1, 256 * 10**6),
    )
}  # fmt: skip
