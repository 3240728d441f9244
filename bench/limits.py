"""The two limits that every GPU figure is a ratio to: copy bandwidth and the rate of a large matrix product."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def milliseconds(step: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Return the median time of `step` on the GPU, by events, with a cold L2 cache before each run."""
    flush = torch.empty(128 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(bytes_: int = 4 * 2**30) -> float:
    """Return bytes read plus written per second by a device-to-device copy."""
    source = torch.empty(bytes_, dtype=torch.int8, device="cuda").random_(0, 100)
    target = torch.empty_like(source)
    return 2 * bytes_ / (milliseconds(lambda: target.copy_(source)) * 1e-3)


def product_rate(size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return FLOP per second of a square matrix product of random numbers (zeros would draw less power)."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: a @ b) * 1e-3)


def measure() -> dict[str, float | str]:
    """Return both limits with the names of what they were measured on."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bytes_per_second": copy_bandwidth(),
        "bf16_flop_per_second": product_rate(),
    }


if __name__ == "__main__":
    result = measure()
    print(json.dumps(result, indent=1))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
