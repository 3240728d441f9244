"""The two limits that every GPU figure is a ratio to: copy bandwidth and the rate of a large matrix product.

python -m bench.limits [OUT.json]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

ON_GPU = torch.cuda.is_available()


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


def rates() -> tuple[float, float]:
    """Return bytes and FLOP (of bf16 products; float32 without a GPU) a second of this machine."""
    if ON_GPU:
        return copy_bandwidth(), product_rate()
    a, source = torch.randn(512, 512), torch.empty(2**24, dtype=torch.int8)
    best = {}
    for name, step in {"copy": lambda: source.clone(), "product": lambda: a @ a}.items():
        times = []
        for _ in range(5):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        best[name] = min(times)
    return 2 * source.numel() / best["copy"], 2 * 512**3 / best["product"]


def main() -> None:
    """Measure both and write them down."""
    from bench.measuring import about
    from mopl._files import write_file

    copy, product = rates()
    result = {**about(), "bytes_per_second": copy, "flop_per_second": product}
    print(json.dumps(result, indent=1))
    print(f"copy {copy / 1e12:.3f} TB/s, product {product / 1e12:.1f} TFLOP/s")
    if len(sys.argv) > 1:
        write_file(sys.argv[1], json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
