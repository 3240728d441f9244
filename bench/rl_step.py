"""Time and memory of one step of GRPO and of DPO at the shapes of SmolLM2-135M, beside TRL, Liger and full logits.

    python -m bench.rl_step --json bench/results/cpu/rl-step-float32.json                         # 15 rounds of seconds
    python -m bench.rl_step --dtype bfloat16 --rounds 3 --json bench/results/cpu/rl-step-bfloat16.json
    python -m bench.rl_step --model tiny --cases head --rounds 1                                  # a look

A step is loss, backward and a fused AdamW update of the same random model on the same tokens; what each variant does,
bench/rl_variants.py says. `head` is the head alone at these shapes, beside which one sees how much of a step it is.

Each variant has a process of its own, which builds it, and takes its turn in every round, so that a slow minute of the
machine hits all of them; one of them works at a time. `s` is the median of the rounds, `x TRL` the median of the
ratios of each round, `CPU x TRL` the same in processor time. `extra MB` is the allocator's peak during loss and
backward beyond what was there before: gradients, activations, logits. `peak GB` is the resident memory of the process
at its peak in a whole step, model and optimizer included. Losses of one problem must agree, or the exit status is 1.
"""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory announces each start and stop

import argparse
import json
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.measuring import about, resident
from bench.rl_variants import CASES, COMPARED, TRL, Size, tolerance
from bench.training_step import MODELS, peak_memory
from mopl._files import write_file

WARMUP = 1


def serve(pipe: Connection, case: str, variant: str, size: Size, threads: int) -> None:
    """Build a variant and do in this process what is asked of it, until `None` is."""
    torch.set_num_threads(threads)
    try:
        step = CASES[case][variant](size)
        found: dict[str, Any] = {"loss": step.loss()}
        for _ in range(WARMUP):
            step()
        found["extra MB"] = peak_memory(step)
        found["peak GB"] = _peak_of(step)
        pipe.send(found)
    except ImportError as error:
        pipe.send({"absent": str(error)})
        return
    except Exception as error:  # other people's code: reported, not hidden
        traceback.print_exc()
        pipe.send({"failed": f"{type(error).__name__}: {error}".splitlines()[0][:110]})
        return
    while pipe.recv() is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu))


def _peak_of(step: Any) -> float | None:
    """Return the peak of resident memory in a step, in gigabytes; None where the system cannot tell."""
    try:
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        step()
        return resident("VmHWM")
    except OSError:
        return None


def measure(
    case: str, size: Size, rounds: int, *, threads: int = 1, variants: Sequence[str] | None = None, context: Any = None
) -> list[dict[str, Any]]:
    """Return a row for each variant of a case; a variant that cannot be run says why."""
    context = context or multiprocessing.get_context("spawn")
    workers, rows = {}, {}
    try:
        for variant in variants or CASES[case]:
            pipe, other = context.Pipe()
            process = context.Process(target=serve, args=(other, case, variant, size, threads))
            process.start()
            other.close()
            try:
                rows[variant] = pipe.recv()  # one at a time: it measures its memory now
            except EOFError:
                process.join()
                rows[variant] = {"failed": f"its process ended with status {process.exitcode}"}
            workers[variant] = process, pipe
        times: dict[str, list[tuple[float, float]]] = {name: [] for name, row in rows.items() if "loss" in row}
        for _ in range(rounds):
            for variant, found in times.items():
                pipe = workers[variant][1]
                pipe.send("step")
                found.append(pipe.recv())
    finally:
        for process, pipe in workers.values():
            if process.is_alive():
                try:
                    pipe.send(None)
                except OSError:
                    process.terminate()
            process.join()
    for variant, found in times.items():
        row, first = rows[variant], times.get(TRL)
        row["s"], row["CPU s"] = (statistics.median(part) for part in zip(*found, strict=True))
        row["rounds"] = [round(wall, 4) for wall, _ in found]
        if first:
            for name, part in (("x TRL", 0), ("CPU x TRL", 1)):
                row[name] = statistics.median(own[part] / trl[part] for own, trl in zip(found, first, strict=True))
            row["memory x TRL"] = row["extra MB"] / max(rows[TRL]["extra MB"], 1e-9)
    return [{"case": case, "variant": variant, **row} for variant, row in rows.items()]


def disagreeing(rows: list[dict[str, Any]], size: Size) -> list[tuple[str, str, str]]:
    """Return case and names of variants whose losses differ though their problem is one."""
    found = []
    for case in {row["case"]: None for row in rows}:
        losses = {
            r["variant"]: r["loss"] for r in rows if r["case"] == case and r["variant"] in COMPARED and "loss" in r
        }
        first = next(iter(losses), None)
        for name, loss in losses.items():
            bound = tolerance(case, size) * max(1.0, abs(losses[first]))  # type: ignore[index]
            if not abs(loss - losses[first]) <= bound:  # type: ignore[index]  # NaN differs
                found.append((case, str(first), name))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table of Markdown."""
    columns = {
        "s": ".2f", "x TRL": ".2f", "CPU x TRL": ".2f", "extra MB": ",.0f", "memory x TRL": ".2f", "peak GB": ".2f",
        "loss": ".5f",
    }  # fmt: skip
    lines = ["| case | variant | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        if "loss" not in row:
            why = row.get("absent") or row.get("failed")
            lines.append(f"| {row['case']} | {row['variant']} | {why} |" + " |" * (len(columns) - 1))
            continue
        cells = [format(row[name], form) if row.get(name) is not None else "" for name, form in columns.items()]
        lines.append(f"| {row['case']} | {row['variant']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--model", choices=list(MODELS), default="smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=2, help="prompts of a step")
    parser.add_argument("--completions", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--prompt", type=int, default=32, help="most tokens of a prompt")
    parser.add_argument("--completion", type=int, default=48, help="most tokens of a completion")
    parser.add_argument("--tokens", type=int, default=512, help="rows of the head alone")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1: figures repeat best)")
    given = parser.parse_args(arguments)
    size = Size(
        given.model, getattr(torch, given.dtype), given.prompts, given.completions, given.prompt, given.completion,
        given.tokens,
    )  # fmt: skip
    start, rows = time.perf_counter(), []
    for case in given.cases:
        rows += measure(case, size, given.rounds, threads=given.threads)
    print(table(rows), flush=True)
    differing = disagreeing(rows, size)
    for case, one, other in differing:
        print(f"{case}: the losses of {one} and {other} are not those of the same problem")
    print(f"{time.perf_counter() - start:.0f} s")
    if given.json:
        whole = {
            **about(),
            "threads": given.threads,
            "problem": {name: str(value) for name, value in vars(size).items()},
            "results": rows,
        }
        write_file(given.json, json.dumps(whole, indent=1) + "\n")
    return int(bool(differing) or any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
