"""How long a training step keeps the host busy, mopl's beside TRL's: a step of `bench.step` with next to no arithmetic.

    python -m bench.host_time [--steps 15] [--json FILE] [--cases NAME ...]

Steps of small models on a fast GPU wait for Python. So the model has SmolLM2-135M's 30 layers, each 16 wide, and the
batch a few tokens: what is left is what the host does for any width, but for the launches of kernels. In one process on
one thread, by turns; processor time, which other processes disturb less than the clock. `ms` is the median and `least`
the smallest of all steps; `x TRL` compares the smallest.
"""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch

from bench.measuring import Report
from bench.training_step import MODELS, TRL, VARIANTS, Problem

MODELS["narrow"] = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=30, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=256,
)  # fmt: skip
CASES = {
    f"{how} {items}{own}": Problem("narrow", lists, count, 4, 4, reference, torch.bfloat16, how == "LoRA")
    for how in ("full", "LoRA")
    for items, lists, count in (("pairs", 2, 2), ("lists of 8", 1, 8))
    for own, reference in (("", "precomputed"), (", own reference", "model"))
    if reference == "precomputed" or (how, items) == ("LoRA", "pairs")
}
COLUMNS = {"ms": ".1f", "least": ".1f", "x TRL": ".2f"}


def measure(report: Report, case: str, steps: int) -> None:
    """Add the rows of a case."""
    variants = {name: VARIANTS[name](CASES[case]) for name in (TRL, "mopl")}
    times: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    for turn in range(steps + 2):  # two make the optimizer's states and warm up
        for name, step in variants.items():
            begin = time.process_time()
            step()
            if turn > 1:
                times[name].append(1e3 * (time.process_time() - begin))
    for name, own in times.items():
        ratio = min(own) / min(times[TRL])
        report.add(case, name, **{"ms": statistics.median(own), "least": min(own), "x TRL": ratio})


def main() -> None:
    """Measure every case that was asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="of each variant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(arguments.json, COLUMNS)
    for case in arguments.cases:
        if report.find(case, "mopl") is None:
            measure(report, case, arguments.steps)
    report.table()


if __name__ == "__main__":
    main()
