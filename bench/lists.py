"""ListNet and Plackett–Luce on a GPU, forward + backward, beside the peers and beside the bytes.

    python -m bench.lists [--json FILE] [--objectives 1 3 5] [--sizes 2 4 8 ...] [--variants NAME ...]

For a CPU there is bench_listwise.py. Each variant runs in a process of its own, mopl once more at the end. A batch has
2^27 items (1.3e8), drawn on the GPU, and times are those between events there: a million items would be 10 us of work
behind 600 us of host. `ns` are nanoseconds an item; `of bytes` is the time of a copy that moves as many bytes as
reading scores and labels and writing one gradient, over the variant's; `x mopl`, its time over mopl's. mopl gets
Plackett–Luce's order as the peers do; "mopl, sorting" makes it. The exit status says whether a row of mopl failed.
"""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.limits import ON_GPU, times_of
from bench.listwise_variants import Problem, listnet_variants, plackett_luce_variants
from bench.measuring import DEVICE, Report, apart, each, extra_memory

ITEMS = 2**27 if ON_GPU else 64
SIZES = [2**k for k in range(1, 13)] if ON_GPU else [4]
LOSSES = {"plackett-luce": plackett_luce_variants, "listnet": listnet_variants}
BYTES, AGAIN = "its bytes alone", "mopl, again"
PLAIN = {"plackett-luce": "logcumsumexp", "listnet": "log_softmax"}
COMPILED = {loss: f"torch.compile of {name}" for loss, name in PLAIN.items()}
REPEATS, WARMUP, LIMIT_S = (10, 2, 60.0) if ON_GPU else (1, 0, 600.0)
COLUMNS = {
    "ns": ".4f",
    "ms": ".3f",
    "spread": ".1%",
    "host ms": ".3f",
    "of bytes": ".1%",
    "x mopl": ".2f",
    "extra GB": ".2f",
}


def parse(case: str) -> tuple[str, int, int]:
    """Return loss, objectives and items of a list."""
    loss, objectives, items = case.split(" ")
    return loss, int(objectives.removeprefix("m=")), int(items.removeprefix("K="))


def bytes_alone(problem: Problem) -> Callable[[], object]:
    """Return a step that moves as many bytes as reading scores and labels and writing one gradient."""
    moved = 4 * (2 * problem.scores.numel() + problem.labels.numel())
    source = torch.empty(moved // 2, dtype=torch.int8, device=DEVICE)
    copy = torch.empty_like(source)
    return lambda: copy.copy_(source)


def measure(variant: str, case: str) -> dict:
    """Measure one variant in this process."""
    loss, objectives, items = parse(case)
    problem = Problem.make(max(1, ITEMS // items // objectives), objectives, items, DEVICE.type)
    if compiled := variant in COMPILED.values():  # whose import takes seconds
        torch._dynamo.reset()  # it compiles a function eight times, then no more
    steps = {BYTES: bytes_alone(problem)} if variant == BYTES else LOSSES[loss](problem, compiled)
    step = steps[variant.removesuffix(", again")]
    step()
    memory = extra_memory(step)
    times = times_of(step, REPEATS, WARMUP)
    return {**times, "ns": times["ms"] * 1e6 / problem.items / objectives, "extra GB": memory}


def variants(loss: str, objectives: int) -> list[str]:
    """Return the names of what is measured, torch.compile last: it compiles for seconds at every size."""
    every = list(LOSSES[loss](Problem.make(2, 1, 2), compiled=False))
    if objectives > 1:  # peers have one objective: m calls are what their users would write
        every = [name for name in every if name.startswith(("mopl", PLAIN[loss]))]
    return [BYTES, *every, AGAIN, COMPILED[loss]]


def complete(report: Report) -> None:
    """Add to every row what needs another one, and what has to hold: mopl ahead of plain and of compiled torch."""
    report.targets.clear()
    for row in report.rows:
        mopl, limit = report.find(row["size"], "mopl"), report.find(row["size"], BYTES)
        if "ms" in row and mopl and "ms" in mopl:
            row["x mopl"] = row["ms"] / mopl["ms"]
            loss, objectives, _ = parse(row["size"])
            if ON_GPU and objectives == 1 and row["variant"] in (PLAIN[loss], COMPILED[loss]):
                report.target(row["size"], f"time of {row['variant']} over mopl's", 1.0, row["x mopl"])
        if "ms" in row and limit and "ms" in limit:
            row["of bytes"] = limit["ms"] / row["ms"]
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
    arguments = parser.parse_args()
    if arguments.alone:
        return each(arguments.cases, lambda case: measure(arguments.alone, case))
    report = Report(arguments.json, COLUMNS)
    shapes = [(loss, m) for loss in LOSSES for m in arguments.objectives]
    every = dict.fromkeys(name for shape in shapes for name in variants(*shape))
    every = sorted(every, key=lambda name: (name in COMPILED.values(), name == AGAIN))
    if arguments.no_compile:
        every = [name for name in every if name not in COMPILED.values()]
    for name in arguments.variants or every:
        cases = [f"{l} m={m} K={k}" for l, m in shapes if name in variants(l, m) for k in arguments.sizes]
        apart(report, name, cases, ["-m", "bench.lists", "--alone", name], LIMIT_S)
        complete(report)
    report.table()
    report.write()
    return 1 if report.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
