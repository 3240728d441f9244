"""A training step of a language model on a GPU beside TRL's and Liger's DPO: time, memory, tokens per second.

    python -m bench.step [--json FILE] [--models 1b 135m] [--variants NAME ...]

Models of random weights in the shapes of Llama-3.2-1B and of SmolLM2-135M, bf16, trained whole (`full`) and by LoRA
(rank 16, all linear layers, head frozen), on pairs and on lists of 8, of up to 256 tokens in the prompt and in each
response; what a step is, and what each variant does, bench/training_step.py says. For a CPU there is
bench_alignment.py. For each model TRL has a process of its own and mopl one, in which the first case is measured once
more at the end, and Liger, which compiles for many seconds, the last. Batches are so large that an H200 should be
busier than its host; TRL's largest takes 70 GB beside the model.

`ms` is the median of up to 6 steps, as many as begin within 0.7 s, at least 3, after 4 that warm up; `host ms`, for how
long the host was busy with it. Where that is nearly all of it, `bound` says host: then the step says nothing of the GPU
and of what runs on it. `tokens/s` counts the tokens of the lists, each response behind its prompt: no padding, and not
the prompts and responses that pairs repeat. `lists/s` compares lists of 8. `extra GB` is the allocator's peak in loss
and backward beyond what was there before; with `full` mopl's holds the head's exponentials, up to a 32nd of the GPU's
memory. `x TRL` and `memory x TRL` are multiples of what TRL took in this run. `loss` is that of the model as it was at
first: where the problems are one the losses must agree, or the exit status is 1, as it is if a row of mopl failed.

Wanted of mopl: not slower than TRL on pairs, twice as fast on lists of 8. For a list of 8, pairs read 14 sequences and
mopl 8, so by the sequences alone it is 1.75 times as fast; the rest has to come from the head, the loss and the host.
"""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory announces each start and stop

import argparse
import gc
import sys
from pathlib import Path

import torch

from bench.limits import ON_GPU, times_of
from bench.measuring import Report, apart, each, named
from bench.training_step import LIGER, TRL, VARIANTS, Problem, disagreeing, peak_memory

REPEATS, WARMUP, SECONDS, LIMIT_S = (6, 1, 0.7, 60.0) if ON_GPU else (1, 0, 1.0, 600.0)
SHAPES = {"1b": ("llama-3.2-1b", 16, 4), "135m": ("smollm2-135m", 48, 12)}  # pairs and lists of 8 in a batch
LORA_STEP = "135m LoRA pairs, own reference"
AGAIN = "mopl, again"
PROCESSES = ([TRL], [*(name for name in VARIANTS if name.startswith("mopl")), AGAIN], [LIGER])
ORDER = [name for process in PROCESSES for name in process]
HOST_SHARE = 0.9  # of a step's time; from there on the host is what it waits for
COLUMNS = {
    "ms": ".1f",
    "spread": ".1%",
    "host ms": ".1f",
    "bound": "s",
    "tokens/s": ",.0f",
    "lists/s": ".1f",
    "x TRL": ".2f",
    "extra GB": ".2f",
    "memory x TRL": ".2f",
    "loss": ".4f",
}
LEAST = {2: 1.0, 8: 2.0}  # TRL's time over mopl's that is wanted on pairs, and on lists of 8


def cases(model: str, variant: str) -> list[str]:
    """Return the names of what a variant measures with a model: of the others than TRL and mopl a part."""
    pairs, lists, lora_pairs, lora_lists = (
        f"{model} {how} {items}" for how in ("full", "LoRA") for items in ("pairs", "lists of 8")
    )
    small = model == "135m"
    if variant in (TRL, "mopl"):
        return [pairs, lists, lora_pairs, lora_lists, *([LORA_STEP] if small else [])]
    if variant in (LIGER, AGAIN):
        return [] if small else [pairs]
    return [lora_lists if "HyperPrompt" in variant else lists] if small else []


def problem_of(case: str) -> Problem:
    """Return what a name stands for; a tiny one without a GPU."""
    shape, pairs, lists = SHAPES[case.split(" ")[0]]
    longest = 256
    if not ON_GPU:
        shape, pairs, lists, longest = "tiny", 2, 1, 8
    count, items = (lists, 8) if "lists of 8" in case else (pairs, 2)
    reference = "model" if case == LORA_STEP else "precomputed"
    return Problem(shape, count, items, longest, longest, reference, torch.bfloat16, " LoRA " in case)


def measure(variant: str, case: str) -> dict:
    """Measure one variant in this process."""
    problem = problem_of(case)
    gc.collect()  # trainers are in circles of references, which would keep the last model
    step = VARIANTS["mopl" if variant == AGAIN else variant](problem)
    loss = step.loss()
    step()  # which makes the optimizer's states
    memory = peak_memory(step)
    times = times_of(step, REPEATS, WARMUP, SECONDS)
    a_second = 1e3 / times["ms"]
    return {
        **times,
        "bound": ("host" if times["host ms"] > HOST_SHARE * times["ms"] else "GPU") if ON_GPU else None,
        "tokens/s": problem.token_count() * a_second,
        "lists/s": problem.lists * a_second,
        "extra GB": memory / 2**10,
        "loss": loss,
        "sequences": step.sequences,
    }


def complete(report: Report) -> None:
    """Add to every row what needs TRL's, say which losses differ, and what has to hold: mopl ahead of TRL."""
    report.targets.clear()
    for case in dict.fromkeys(row["size"] for row in report.rows):
        rows = [row for row in report.rows if row["size"] == case and "ms" in row]
        base = report.find(case, TRL)
        for row in rows:
            row.pop("differs from", None)
            if base and "ms" in base:
                row["x TRL"] = row["ms"] / base["ms"]
                row["memory x TRL"] = row["extra GB"] / base["extra GB"]
                if ON_GPU and row["variant"] == "mopl":
                    report.target(case, "time of TRL DPOTrainer over mopl's", LEAST[items_of(case)], 1 / row["x TRL"])
        for first, second in disagreeing(problem_of(case), {row["variant"]: row["loss"] for row in rows}):
            report.find(case, second)["differs from"] = first  # type: ignore[index]
    report.write()


def items_of(case: str) -> int:
    """Return the responses of a list."""
    return problem_of(case).items


def differences(report: Report) -> int:
    """Print which losses differ, and return how many."""
    rows = [row for row in report.rows if "differs from" in row]
    for row in rows:
        other = report.find(row["size"], row["differs from"])
        values = f"{row['loss']:.5g}, {other['loss']:.5g}" if other else f"{row['loss']:.5g}"
        print(f"not the same problem: {row['size']}, {row['variant']} and {row['differs from']}: losses {values}")
    return len(rows)


def main() -> int:
    """Measure variants in processes of their own, or be such a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"only these of {', '.join(ORDER)}")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        return each(arguments.cases, lambda size: measure(*reversed(named(size))))
    if unknown := set(arguments.variants or ()) - set(ORDER):
        parser.error(f"no variant {', '.join(sorted(unknown))}")
    report = Report(arguments.json, COLUMNS)
    wanted = arguments.variants or ORDER
    models = [model for model in SHAPES if model in arguments.models]
    # Model by model, so that what a run that is cut off has left can be compared; Liger, which compiles, at the end.
    turns = [(model, process) for model in models for process in PROCESSES[:-1]]
    for model, process in [*turns, *((model, PROCESSES[-1]) for model in models)]:
        names = [name for name in process if name in wanted]
        if chosen := [f"{name} @ {case}" for name in names for case in cases(model, name)]:
            apart(report, names[0], chosen, ["-m", "bench.step", "--alone"], LIMIT_S)
            complete(report)
    report.table()
    report.write()
    return 1 if differences(report) + report.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
