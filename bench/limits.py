"""The two limits that every GPU figure is a ratio to: copy bandwidth and the rate of a large matrix product.

python -m bench.limits [OUT.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

ON_GPU = torch.cuda.is_available()


LEAD_BYTES = 4 * 2**30  # written before every run: about 1.3 ms, in which the host launches what is timed


def times_of(step: Callable[[], object], repeats: int = 20, warmup: int = 3, seconds: float = 10) -> dict[str, float]:
    """Return the median milliseconds of `step`, their spread, and how long the host was busy with it.

    On a GPU the time is that between two events. Before the first one the GPU is kept busy by writes that also clear
    the L2 cache, so that the time in which the host prepares the first launches (0.2 to 0.6 ms) is not counted.

    Args:
        step: what is timed.
        repeats: runs that count.
        warmup: runs before them; the first one compiles.
        seconds: no run is begun after them, but for the first three.
    """
    flush = torch.empty(LEAD_BYTES // 8, dtype=torch.int8, device="cuda") if ON_GPU else None
    times, host, end = [], [], float("inf")
    for turn in range(warmup + repeats):
        if turn == warmup:
            end = time.monotonic() + seconds
        if turn >= warmup + 3 and time.monotonic() > end:
            break
        begin = time.perf_counter()
        if flush is None:
            step()
            taken = busy = (time.perf_counter() - begin) * 1e3
        else:
            for _ in range(8):
                flush.zero_()
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            begin = time.perf_counter()
            step()
            busy = (time.perf_counter() - begin) * 1e3
            last.record()
            torch.cuda.synchronize()
            taken = first.elapsed_time(last)
        if turn >= warmup:
            times.append(taken)
            host.append(busy)
    middle = statistics.median(times)
    return {"ms": middle, "spread": (max(times) - min(times)) / middle, "host ms": statistics.median(host)}


def milliseconds(step: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Return the median time of `step`; see `times_of`."""
    return times_of(step, repeats, warmup)["ms"]


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
    copy, product = (milliseconds(step, 5, 1) * 1e-3 for step in (source.clone, lambda: a @ a))
    return 2 * source.numel() / copy, 2 * 512**3 / product


def main() -> None:
    """Measure both and write them down."""
    from bench.measuring import about
    from mopl._files import write_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", metavar="OUT.json", help="file to write")
    out = parser.parse_args().out
    copy, product = rates()
    result = {**about(), "bytes_per_second": copy, "flop_per_second": product}
    print(json.dumps(result, indent=1))
    print(f"copy {copy / 1e12:.3f} TB/s, product {product / 1e12:.1f} TFLOP/s")
    if out:
        write_file(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
