"""ListNet and Plackett–Luce on a GPU, forward + backward, beside the peers and beside the bytes.

    python -m bench.lists [--json FILE] [--objectives 1 3 5] [--sizes 2 4 8 ...] [--variants NAME ...]

For a CPU there is bench_listwise.py. Each variant runs in a process of its own, mopl once more at the end; while plain
torch is measured, other processes compile mopl's kernels into Triton's cache. A batch has 2^27 items (1.3e8), drawn on
the GPU, and times are those between events there: a million items would be 10 us of work behind 600 us of host. `ns`
are nanoseconds an item and objective. `of bytes` is the time of a copy of the bytes that both passes have to move (see
`bytes_moved`) over the variant's; who finds the order by itself has no order to read. `x mopl` is its time over mopl's,
which gets Plackett–Luce's order as the peers do; for peers that sort, over that of "mopl, sorting". The exit status
says whether a row of mopl failed.
"""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.goals import SORTING, judge_lists, parse_list
from bench.limits import ON_GPU, times_of
from bench.listwise_variants import Problem, listnet_variants, plackett_luce_variants
from bench.measuring import DEVICE, ROOT, Report, apart, each, extra_memory

ITEMS = 2**27 if ON_GPU else 64
SIZES = [2**k for k in range(1, 13)] if ON_GPU else [4]
LOSSES = {"plackett-luce": plackett_luce_variants, "listnet": listnet_variants}
BYTES, AGAIN = "its bytes alone", "mopl, again"
SORTS = "mopl, sorting"
PLAIN = {"plackett-luce": "logcumsumexp", "listnet": "log_softmax"}
COMPILED = {loss: f"torch.compile of {name}" for loss, name in PLAIN.items()}
REPEATS, WARMUP, LIMIT_S = (5, 1, 60.0) if ON_GPU else (1, 0, 600.0)
SECONDS = 1.0  # no run begins after them but for the first three: some peers take two seconds for short lists
COMPILING_S = 90.0  # at the longest
COLUMNS = {
    "ns": ".4f",
    "ms": ".3f",
    "spread": ".1%",
    "host ms": ".3f",
    "of bytes": ".1%",
    "x mopl": ".2f",
    "extra GB": ".2f",
}


def bytes_moved(loss: str, objectives: int, items: int, sorting: bool = False) -> int:
    """Return the bytes of a list that forward and backward have to move, numbers of 4 bytes and an order of 8.

    Both write the losses and read their gradients, 8m a list, m the number of objectives. By item, ListNet reads scores
    and labels in both passes and writes the scores' gradient: 2 (4 + 4m) + 4. Plackett–Luce reads scores, labels and
    the order, and leaves a gradient by objective that backward reads and sums up: 4 + 4m + 8m + 4m, then 4m + 4.
    """
    if loss == "listnet":
        item = 12 + 8 * objectives
    else:
        item = 8 + (12 if sorting else 20) * objectives
    return items * item + 8 * objectives


def lists_of(objectives: int, items: int) -> int:
    """Return how many lists a batch has."""
    return max(1, ITEMS // items // objectives)


def bytes_alone(moved: int) -> Callable[[], object]:
    """Return a step that moves so many bytes, half of them read and half of them written."""
    source = torch.empty(moved // 2, dtype=torch.int8, device=DEVICE)
    copy = torch.empty_like(source)
    return lambda: copy.copy_(source)


def measure(variant: str, case: str) -> dict:
    """Measure one variant in this process."""
    loss, objectives, items = parse_list(case)
    lists = lists_of(objectives, items)
    if variant == BYTES:
        step = bytes_alone(lists * bytes_moved(loss, objectives, items))
    else:
        if compiled := variant in COMPILED.values():  # whose import takes seconds
            torch._dynamo.reset()  # it compiles a function eight times, then no more
        problem = Problem.make(lists, objectives, items, DEVICE.type)
        step = LOSSES[loss](problem, compiled)[variant.removesuffix(", again")]
    step()
    memory = extra_memory(step)
    times = times_of(step, REPEATS, WARMUP, SECONDS)
    return {**times, "ns": times["ms"] * 1e6 / (lists * items * objectives), "extra GB": memory}


def compile_kernels(cases: list[str], names: list[str]) -> None:
    """Run mopl's variants on few lists, as many more than a multiple of 16 as the measured ones: the same kernels."""
    for case in cases:
        loss, objectives, items = parse_list(case)
        problem = Problem.make(1024 + lists_of(objectives, items) % 16, objectives, items, DEVICE.type)
        for name, step in LOSSES[loss](problem, False).items():
            if name in names:
                step()


@contextlib.contextmanager
def compiling(cases: list[str], names: list[str]) -> Iterator[Callable[[], None]]:
    """Compile for each case in a process of its own; give a function that waits until all have ended."""
    ours = [name for name in names if name.startswith("mopl")]
    started = []
    if ON_GPU and ours:
        line = [sys.executable, "-m", "bench.lists", "--compile", *ours, "--"]
        started = [subprocess.Popen([*line, case], cwd=ROOT) for case in cases]

    deadline = time.monotonic() + COMPILING_S

    def wait() -> None:
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):  # what it lacks is compiled when it is measured
                process.wait(max(0.0, deadline - time.monotonic()))

    try:
        yield wait
    finally:
        for process in started:
            process.kill()
            process.wait()


def variants(loss: str, objectives: int) -> list[str]:
    """Return the names of what is measured, torch.compile last: it compiles for seconds at every size."""
    every = list(LOSSES[loss](Problem.make(2, 1, 2), compiled=False))
    if objectives > 1:  # peers have one objective: m calls are what their users would write
        every = [name for name in every if name.startswith(("mopl", PLAIN[loss]))]
    return [BYTES, *every, AGAIN, COMPILED[loss]]


def turn(name: str) -> int:
    """Return when a variant is measured: plain torch while mopl's kernels are compiled, mopl, then the slow peers."""
    if name in PLAIN.values():
        return 0
    if name in COMPILED.values():
        return 4
    return 3 if name == AGAIN else 1 if name.startswith(("mopl", "its ")) else 2


def complete(report: Report) -> None:
    """Add to every row what needs another one, and judge the goals."""
    report.targets.clear()
    for row in report.rows:
        if "ms" not in row:
            continue
        size, name = row["size"], row["variant"]
        loss, objectives, items = parse_list(size)
        mopl, sorts, limit = (report.find(size, other) for other in ("mopl", SORTS, BYTES))
        beside = sorts if name in SORTING and name != SORTS else mopl
        if beside and "ms" in beside:
            row["x mopl"] = row["ms"] / beside["ms"]
        if limit and "ms" in limit:
            # A copy of fewer bytes, no order among them, takes as much less time.
            moved = [bytes_moved(loss, objectives, items, sorting) for sorting in (name in SORTING, False)]
            row["of bytes"] = limit["ms"] / row["ms"] * moved[0] / moved[1]
    for goal in judge_lists(report.rows) if ON_GPU else ():
        report.target(*goal)
    report.write()


def main() -> int:
    """Measure each variant in a process of its own, or be such a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--objectives", type=int, nargs="+", default=[1], metavar="M")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="K", help="lengths of the lists")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--alone", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="only these")
    parser.add_argument("--compile", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_kernels(arguments.cases, arguments.compile)
        return 0
    if arguments.alone:
        return each(arguments.cases, lambda case: measure(arguments.alone, case))
    report = Report(arguments.json, COLUMNS)
    shapes = [(loss, m) for loss in arguments.losses for m in arguments.objectives]
    cases = {(loss, m): [f"{loss} m={m} K={k}" for k in arguments.sizes] for loss, m in shapes}
    own = {shape: variants(*shape) for shape in shapes}
    every = arguments.variants or dict.fromkeys(name for names in own.values() for name in names)
    every = sorted(every, key=turn)
    if arguments.no_compile:
        every = [name for name in every if name not in COMPILED.values()]
    with compiling([case for part in cases.values() for case in part], every) as wait:
        for name in every:
            if name.startswith(("mopl", "its ")):
                wait()
            chosen = [case for shape in shapes if name in own[shape] for case in cases[shape]]
            apart(report, name, chosen, ["-m", "bench.lists", "--alone", name], LIMIT_S)
            complete(report)
    report.table()
    report.write()
    return 1 if report.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
