"""What the GPU benches share: who was measured on what, tables that survive being cut off, memory."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from bench.limits import ON_GPU
from mopl._files import write_file

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "triton", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels",
    "flash-attn",
)  # fmt: skip


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
    """Rows, written as they come, and a table of them.

    What an earlier run of the same commit on the same machine left in the file is kept, so that a bench that was cut
    off goes on where it was; a row of ours that failed is tried again.
    """

    def __init__(self, path: Path | None, columns: dict[str, str]) -> None:
        self.path, self.columns, self.rows = path, columns, []
        self.about: dict[str, object] = about()
        self.targets: list[dict] = []
        if path and path.exists():
            before = json.loads(path.read_text())
            if all(before.get(key) == self.about[key] for key in ("device", "versions", "commit")):
                self.rows = [row for row in before["results"] if not (ours(row["variant"]) and "failed" in row)]

    def find(self, size: str, name: str) -> dict | None:
        """Return the row of a variant at a size."""
        return next((row for row in self.rows if (row["size"], row["variant"]) == (size, name)), None)

    def add(self, size: str, name: str, **values: float | str | None) -> None:
        """Add a row; one that did not run has an entry `failed` or `absent` with the reason."""
        self.rows.append({"size": size, "variant": name, **values})
        measured = (f"{key} {values[key]:{form}}" for key, form in self.columns.items() if values.get(key) is not None)
        shown = next((f"{key}: {values[key]}" for key in ("failed", "absent") if key in values), ", ".join(measured))
        print(f"  {size:32s} {name:30s} {shown}", flush=True)
        self.write()

    def _cells(self, values: dict) -> list[str]:
        cells = []
        for column, form in self.columns.items():
            value = values.get(column)
            cells.append(f"{'-' if value is None else format(value, form):>10s}")
        return cells

    def table(self) -> None:
        """Print all rows, size by size."""
        for size in dict.fromkeys(row["size"] for row in self.rows):
            print(f"\n{size}, {self.about['device']}\n  {'':30s}" + " ".join(f"{name:>10s}" for name in self.columns))
            for row in self.rows:
                if row["size"] == size and not row.keys() & {"failed", "absent"}:
                    print(f"  {row['variant']:30s}" + " ".join(self._cells(row)))
        for kind in ("failed", "absent"):
            for reason in dict.fromkeys((row["variant"], row[kind]) for row in self.rows if kind in row):
                print(f"{kind}: {reason[0]} ({reason[1]})")

    def target(self, size: str, what: str, wanted: float, measured: float) -> None:
        """Print a target beside what was measured; larger is better."""
        met = bool(measured >= wanted)
        print(f"target: {size}, {what} at least {wanted:g}: {measured:.3g}, {'met' if met else 'missed'}", flush=True)
        self.targets.append({"size": size, "target": what, "at least": wanted, "measured": measured, "met": met})
        self.write()

    def failures(self) -> int:
        """Return how many rows of ours failed."""
        return sum(ours(row["variant"]) and "failed" in row for row in self.rows)

    def write(self) -> None:
        """Write everything so far, at once or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {**self.about, "targets": self.targets, "results": self.rows}
        write_file(self.path, json.dumps(whole, indent=1) + "\n")


def ours(variant: str) -> bool:
    """Say whether a failure of this variant is one of ours: mopl, or the bare products and bytes beside it."""
    return variant.startswith(("mopl", "its "))


ROW = "@row "  # before a row in what a bench's process prints


def give(size: str, **values: object) -> None:
    """Hand a row to the process that started this one."""
    print(ROW + json.dumps({"size": size, **values}), flush=True)


def each(sizes: Iterable[str], measure: Callable[[str], dict]) -> int:
    """Measure in this process, size after size, until one fails; return the exit status."""
    for size in sizes:
        try:
            give(size, **measure(size))
        except ImportError as error:
            give(size, absent=str(error))
        except Exception as error:  # other people's code, out of memory, not for this machine: reported, not hidden
            traceback.print_exc()
            give(size, failed=f"{type(error).__name__}: {error}".splitlines()[0][:110])
            return 1  # what is on the GPU may be broken: another process goes on
    return 0


def named(size: str, variant: str = "") -> tuple[str, str]:
    """Return a size and its variant, where it names one in front: `variant @ size`."""
    own, mark, rest = size.rpartition(" @ ")
    return (rest, own) if mark else (size, variant)


def apart(report: Report, name: str, sizes: list[str], command: list[str], limit: float) -> None:
    """Let processes of their own measure a variant: one that raises, hangs or poisons the GPU's context ends no other.

    Args:
        report: gets the rows.
        name: the variant.
        sizes: those that have a row already are left out; one with a variant of its own shares the process: `named`.
        command: arguments of Python; the sizes are added.
        limit: seconds for one size.
    """
    left = [size for size in sizes if report.find(*named(size, name)) is None]
    while left:
        before, line = len(left), ""
        process = subprocess.Popen([sys.executable, *command, *left], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        timer = threading.Timer(limit * len(left), process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(ROW):
                values = json.loads(line.removeprefix(ROW))
                left.remove(size := values.pop("size"))
                report.add(*named(size, name), **values)
            else:
                print(line, end="")
        status = process.wait()
        timer.cancel()
        if left and len(left) == before:
            how = f"ended with status {status}" if status >= 0 else f"killed by signal {-status}"
            report.add(*named(left.pop(0), name), failed=f"its process {how}, after {limit:.0f} s a size at the latest")


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


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
