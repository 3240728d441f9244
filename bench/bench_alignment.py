"""One training step of a language model on preferences beside TRL's DPOTrainer on a CPU: time and memory.

    pytest bench/bench_alignment.py                                   # the pytest-benchmark suite, tiny model
    python bench/bench_alignment.py --json FILE                       # one interleaved run and a table, tiny model
    python bench/bench_alignment.py --model smollm2-135m --threads 2  # the shape of SmolLM2-135M, random weights

What a step is, and what each variant does, bench/training_step.py says; `bench.step` is for a GPU. `reference` says
where reference log-probabilities come from: a second model in every step, or computed before.

Variants take turns, round by round; figures are medians, and ratios of one run are what may be quoted. `extra` is the
peak of memory during loss and backward beyond what was there before, from the allocator. The losses of equal problems
must agree, and the run stops if they do not.
"""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory announces each start and stop

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import training_step
from bench.measuring import ON_GPU, synchronize
from bench.training_step import LIGER, MODELS, TRL, Problem, Variant, disagreeing, peak_memory
from mopl._files import write_file

VARIANTS = {name: build for name, build in training_step.VARIANTS.items() if name != LIGER}


def interleaved(variants: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each variant, measured in turn after one round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


# ---------------------------------------------------------------- pytest-benchmark


@pytest.fixture(scope="module")
def built() -> dict:
    return {}


@pytest.mark.parametrize("items", [2, 8])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_step(benchmark, built: dict, name: str, items: int) -> None:
    """Time one step of the tiny model."""
    problem = Problem("tiny", lists=4, items=items, prompt=32, response=32)
    variant = built.setdefault((name, items), VARIANTS[name](problem))
    benchmark.group = f"tiny model, {problem.lists} lists of {items}"
    benchmark.extra_info["sequences"] = variant.sequences

    def run() -> None:
        variant()
        synchronize()

    benchmark(run)


# ---------------------------------------------------------------- table


def main() -> None:
    """Measure and print a table for pairs and for lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--lists", type=int, default=4, help="prompts in a batch (default 4)")
    parser.add_argument("--items", type=int, nargs="+", default=[2, 8], help="responses of a list (default 2 8)")
    parser.add_argument("--prompt", type=int, default=64, help="most tokens of a prompt")
    parser.add_argument("--response", type=int, default=64, help="most tokens of a response")
    parser.add_argument("--reference", choices=["precomputed", "model"], nargs="+", default=["precomputed", "model"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1: figures repeat best)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    results = []
    for reference in arguments.reference:
        for items in arguments.items:
            problem = Problem(
                arguments.model, arguments.lists, items, arguments.prompt, arguments.response, reference,
                getattr(torch, arguments.dtype),
            )  # fmt: skip
            variants = {name: build(problem) for name, build in VARIANTS.items()}
            _check_losses(problem, variants)
            memory = {name: peak_memory(variant) for name, variant in variants.items()}
            times = interleaved(variants, arguments.rounds)
            print(
                f"\n{problem.model} model, {problem.lists} lists of {items}, up to {problem.prompt} + "
                f"{problem.response} tokens, reference {reference}, {arguments.dtype}, {'cuda' if ON_GPU else 'cpu'}"
            )
            for name, variant in variants.items():
                milliseconds = statistics.median(times[name]) * 1e3
                # A ratio a round, then their median: what slows the machine down for a moment slows both.
                ratio = statistics.median(a / b for a, b in zip(times[name], times[TRL], strict=True))
                print(
                    f"  {name:32s} {variant.sequences:5d} sequences {milliseconds:10.1f} ms   {ratio:5.2f} x TRL   "
                    f"{memory[name]:9.1f} MiB extra  {memory[name] / memory[TRL]:5.2f} x TRL",
                    flush=True,
                )
                results.append(
                    {"K": items, "reference": reference, "variant": name, "sequences": variant.sequences,
                     "ms": milliseconds, "time_over_trl": ratio, "extra_mib": memory[name],
                     "memory_over_trl": memory[name] / memory[TRL]}
                )  # fmt: skip
            del variants
            gc.collect()
    if arguments.json:
        about = {
            "device": torch.cuda.get_device_name() if ON_GPU else platform.processor() or platform.machine(),
            "threads": arguments.threads,
            "date": time.strftime("%Y-%m-%d"),
            **{module.__name__: module.__version__ for module in (torch, transformers, trl)},
            "command": " ".join(["python", "bench/bench_alignment.py", *sys.argv[1:]]),
            "problem": {
                name: str(getattr(arguments, name)) for name in ("model", "lists", "prompt", "response", "dtype")
            },
        }
        write_file(arguments.json, json.dumps({"about": about, "results": results}, indent=1) + "\n")


def _check_losses(problem: Problem, variants: dict[str, Variant]) -> None:
    """Stop if two trainers do not compute the same on pairs, where they should."""
    losses = {name: variants[name].loss() for name in (TRL, "mopl")}
    if disagreeing(problem, losses):
        raise SystemExit(f"the trainers do not solve the same problem: {losses}")


if __name__ == "__main__":
    main()
