"""What the GPU benches share: tables that survive being cut off, medians of interleaved rounds, memory, the limits."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.limits import ON_GPU
from mopl._files import write_file

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn")


def about(command: str | None = None) -> dict[str, object]:
    """Return what a figure must name: the command, the machine's processor or GPU, versions, the day and the commit."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if torch.version.cuda or torch.version.hip:
        versions["cuda or hip"] = str(torch.version.cuda or torch.version.hip)
    spec = sys.modules["__main__"].__spec__
    name = ["-m", spec.name] if spec else [os.path.relpath(sys.argv[0])]
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
        commit = git.stdout.strip() or None
    except OSError:  # no git here
        commit = None
    return {
        "command": command or " ".join(["python", *name, *sys.argv[1:]]).replace(f"{ROOT}/", ""),
        "device": torch.cuda.get_device_name() if ON_GPU else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
    }


class Report:
    """Rows of a table, printed and written as they come."""

    def __init__(self, path: Path | None, columns: dict[str, str]) -> None:
        self.path, self.columns, self.rows = path, columns, []
        self.about: dict[str, object] = about()
        self.more: dict[str, object] = {"absent": {}}
        self.targets: list[dict] = []

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
        self.write()

    def fail(self, size: str, name: str, error: Exception, **values: object) -> None:
        """Add a row for what does not run here, with the reason."""
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:110]
        print(f"  {name:30s} failed: {reason}", flush=True)
        self.rows.append({"size": size, "variant": name, **values, "failed": reason})
        self.write()

    def note(self, **more: object) -> None:
        """Add entries to the head of the file."""
        self.more |= more
        self.write()

    def target(self, size: str, what: str, wanted: float, measured: float) -> None:
        """Print a target beside what was measured; larger is better."""
        met = bool(measured >= wanted)
        print(f"  target: {what} at least {wanted:g}: {measured:.3g}, {'met' if met else 'missed'}", flush=True)
        self.targets.append({"size": size, "target": what, "at least": wanted, "measured": measured, "met": met})
        self.write()

    def write(self) -> None:
        """Write everything so far, at once or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {**self.about, **self.more, "targets": self.targets, "results": self.rows}
        write_file(self.path, json.dumps(whole, indent=1) + "\n")


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def interleaved(steps: dict[str, Callable[[], object]], deadline: float, rounds: int) -> dict[str, float]:
    """Return the median seconds of each step, all of them in turn, after a round that warms up.

    After the deadline no round is begun, but for the first three.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
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


def resident(field: str) -> float:
    """Return a field of this process's memory status in gigabytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(field))


def extra_memory(step: Callable[[], object]) -> float | None:
    """Return gigabytes of peak memory beyond what is held now.

    On a GPU that is the allocator's count. On a CPU it is resident memory (VmHWM), which misses what the process had
    freed but not given back, and says nothing below some megabytes; None where the system cannot tell.
    """
    gc.collect()
    if not ON_GPU:
        try:
            with open("/proc/self/clear_refs", "w") as reset:
                reset.write("5")
            before = resident("VmRSS")
            step()
            return max(0.0, resident("VmHWM") - before)
        except OSError:
            step()
            return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
