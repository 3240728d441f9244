"""ListNet and Plackett–Luce on a CPU, forward + backward, beside the peers and the bytes; `bench.lists` is for a GPU.

    pytest bench/bench_listwise.py                          # the pytest-benchmark suite
    python bench/bench_listwise.py --json FILE              # one interleaved run and a table of ratios
    python bench/bench_listwise.py --items 1000000 --sizes 2 8 32 120 1000 --objectives 1 3 5
    python bench/bench_listwise.py --bounds                 # the bounds of a CPU, met or missed, by processor time

Time on a shared machine drifts, so the second form takes all variants of a size in turn, round by round, and reports
medians and their ratios. A figure to quote is a ratio of one run, never a bare time.
"""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from listwise_variants import Problem, copy_limit, listnet_passes, listnet_variants, plackett_luce_variants

from mopl._files import write_file

SIZES = (2, 8, 32, 120, 1000)
LOSSES = {"Plackett–Luce": plackett_luce_variants, "ListNet": listnet_variants}


def _parameters() -> list:
    small = Problem.make(2, 1, 2)
    return [
        pytest.param(loss, name, items, objectives, id=f"{loss}-K{items}-m{objectives}-{name}")
        for loss, variants in LOSSES.items()
        for items in SIZES
        for objectives in (1, 3, 5)
        for name in variants(small, compiled=False)
        if objectives == 1 or name.startswith("mopl")
    ]


@pytest.mark.parametrize(("loss", "name", "items", "objectives"), _parameters())
def test_listwise(benchmark, loss: str, name: str, items: int, objectives: int) -> None:
    """Time one variant; 1e5 items keep the whole suite short."""
    problem = Problem.make(100_000 // items, objectives, items)
    step = LOSSES[loss](problem, compiled=False)[name]
    benchmark.group = f"{loss} K={items} m={objectives}"
    benchmark.extra_info["items"] = problem.items
    benchmark(step)


def interleaved(steps: dict, rounds: int) -> dict[str, float]:
    """Return the median seconds of each step, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first round warms up, and compiles
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


# What is wanted of a CPU: (what, the figure's numerator, its denominator, at most or at least, the bound).
BOUNDS = (
    ("ListNet over a bare log_softmax", ("ListNet", 1, "mopl"), ("ListNet", 1, "log_softmax"), "at most", 1.2),
    ("ListNet, five objectives over one", ("ListNet", 5, "mopl"), ("ListNet", 1, "mopl"), "at most", 2.5),
    (
        "logcumsumexp over Plackett–Luce",
        ("Plackett–Luce", 1, "logcumsumexp"),
        ("Plackett–Luce", 1, "mopl"),
        "at least",
        5.0,
    ),
)


def print_bounds(items: int, sizes: list[int], rounds: int) -> None:
    """Print every bound of a CPU beside its figure: the median over rounds of ratios of processor time."""
    print(f"threads {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    for size in sizes:
        steps: dict = {
            (loss, objectives, name): variants(Problem.make(items // size, objectives, size), compiled=False)[name]
            for _, above, below, _, _ in BOUNDS
            for loss, objectives, name in (above, below)
            for variants in (LOSSES[loss],)
        }
        alone, bare = "its passes alone", ("ListNet", 1, "log_softmax")
        if size >= 16:  # shorter rows have no fused softmax
            steps[alone] = listnet_passes(Problem.make(items // size, 1, size))
        times: dict[object, list[float]] = {key: [] for key in steps}
        for turn in range(rounds + 1):
            for key, step in steps.items():
                start = time.process_time()
                step()
                if turn:
                    times[key].append(time.process_time() - start)
        if alone in steps:
            ratio = statistics.median(a / b for a, b in zip(times[alone], times[bare], strict=True))
            print(f"  K = {size:4d}  {'passes of ListNet alone over it':36s} {ratio:6.2f}")
        for what, above, below, kind, bound in BOUNDS:
            ratio = statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))
            least = min(times[above]) / min(times[below])
            met = ratio <= bound if kind == "at most" else ratio >= bound
            verdict = "no bound here" if size < 8 and kind == "at most" else "met" if met else "missed"
            print(f"  K = {size:4d}  {what:36s} {ratio:6.2f} (of minima {least:.2f}), {kind} {bound:g}: {verdict}")


def main() -> None:
    """Measure and print a table for each loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000, help="scores in a batch (default 1e6)")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="list lengths K")
    parser.add_argument("--objectives", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--rounds", type=int, default=5, help="default 5; at least 21 are taken for --bounds")
    parser.add_argument("--bounds", action="store_true", help="print the bounds of a CPU, met or missed, and stop")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1: figures repeat best)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.bounds:
        return print_bounds(arguments.items, arguments.sizes, max(21, arguments.rounds))

    results: list[dict] = []
    machine = {
        "device": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "command": " ".join(["python", "bench/bench_listwise.py", *sys.argv[1:]]),
    }

    def write() -> None:
        """Write all figures so far, at once or not at all."""
        if arguments.json:
            write_file(arguments.json, json.dumps({"machine": machine, "results": results}, indent=1) + "\n")

    for loss, variants in LOSSES.items():
        for objectives in arguments.objectives:
            for size in arguments.sizes:
                problem = Problem.make(arguments.items // size, objectives, size)
                steps = variants(problem, compiled=not arguments.no_compile)
                if objectives > 1:  # peers have one objective: m calls are what their users would write
                    keep = ("mopl", "logcumsumexp", "log_softmax")
                    steps = {name: step for name, step in steps.items() if name.startswith(keep)}
                steps["limit: the bytes"] = copy_limit(problem)
                seconds = interleaved(steps, arguments.rounds)
                print(f"\n{loss}, K = {size}, m = {objectives}, {problem.items} items")
                for name, value in seconds.items():
                    nanoseconds = value / problem.items * 1e9
                    ratio, limit = value / seconds["mopl"], value / seconds["limit: the bytes"]
                    print(f"  {name:32s} {nanoseconds:8.2f} ns/item   {ratio:6.2f} x mopl   {limit:7.1f} x limit")
                    results.append(
                        {"loss": loss, "K": size, "m": objectives, "variant": name, "ns_per_item": nanoseconds}
                    )
                write()
                torch._dynamo.reset()


if __name__ == "__main__":
    main()
