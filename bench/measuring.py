"""What the GPU benches share: tables that survive being cut off, medians of interleaved rounds, memory, the limits."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import limits

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Report:
    """Rows of a table, printed as they come and written whole after each size."""

    def __init__(self, path: Path | None, columns: dict[str, str]) -> None:
        self.path, self.columns, self.rows = path, columns, []
        self.about = {
            "command": " ".join(["python", "-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]),
            "device": torch.cuda.get_device_name() if ON_GPU else platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }

    def head(self, title: str) -> None:
        print(f"\n{title}")
        print(f"  {'':30s}" + "".join(f"{name:>11s}" for name in self.columns))

    def add(self, size: str, name: str, **values: float | str | None) -> None:
        cells = []
        for column, form in self.columns.items():
            value = values.get(column)
            cells.append("-" if value is None else value if isinstance(value, str) else format(value, form))
        print(f"  {name:30s}" + "".join(f"{cell:>11s}" for cell in cells), flush=True)
        self.rows.append({"size": size, "variant": name, **values})

    def write(self, absent: dict[str, str] | None = None, **more: object) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(self.path.suffix + ".part")
        part.write_text(
            json.dumps({**self.about, "absent": absent or {}, **more, "results": self.rows}, indent=1) + "\n"
        )
        os.replace(part, self.path)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def interleaved(steps: dict[str, Callable[[], object]], deadline: float) -> dict[str, float]:
    """Return the median seconds of each step, all of them in turn, at most twelve rounds after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(13):
        if turn > 3 and time.monotonic() > deadline:
            break
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def extra_memory(step: Callable[[], object]) -> float | None:
    """Return gigabytes of peak memory beyond what is allocated now; None where only a GPU could tell."""
    if not ON_GPU:
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def rates() -> tuple[float, float]:
    """Return bytes and FLOP (of bf16 products; float32 without a GPU) a second of this machine."""
    if ON_GPU:
        return limits.copy_bandwidth(), limits.product_rate()
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
