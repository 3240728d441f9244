"""Time, memory and error of log-probabilities from hidden states on a CPU, beside full logits, torch and TRL.

    python -m bench.bench_logprob_cpu --json FILE                      # N 2048, H 1024, V 32,000 and 128,256, float32
    python -m bench.bench_logprob_cpu --heads trained --rounds 9 --variants "F.cross_entropy, full logits" mopl
    python -m bench.bench_logprob_cpu --rows 512 --vocabulary 8192 --dtype bfloat16 --rounds 2

Every measurement is a process of its own, and the variants of one round follow one another, so that a slow minute of
the machine hits all of them. The file is written anew after each measurement; those that are in it when the command
starts are kept and not made again, so that a run that was cut off goes on. Columns:

* `wall`, `cpu`: seconds of forward and backward, best of the rounds;
* `bound`: processor time over that of the bare products (two with a frozen head, three with a trained one) in the same
  dtype, median of the rounds; `CE`: the same over F.cross_entropy on full logits. Processor time, because others on
  the machine do not count in it; take one thread (OMP_NUM_THREADS=1) where there are any, for waiting threads do;
* `MB`: the peak of resident memory (VmHWM, reset before the run) beyond inputs and gradients, largest of the rounds;
  `/CE`: that over the same of F.cross_entropy;
* `error`: of the log-probabilities of 64 rows against float64; `grad`: the same for the gradient of the hidden states,
  relative to its norm, with random upstream gradients. Both on the inputs as rounded to the dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX

import torch
import torch.nn.functional as F
from torch import Tensor

import mopl.ops
from mopl._files import write_file

CHECKED = 64  # rows whose error is measured
Variant = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | None]  # (hidden, weight, target, upstream) -> log p


def full_logits(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> Tensor:
    """F.cross_entropy on logits that are held whole."""
    logprob = -F.cross_entropy(hidden @ weight.T, target, reduction="none")
    logprob.backward(upstream.to(logprob.dtype))
    return logprob


def upcast_logits(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> Tensor:
    """The same with operands brought to float32 first: for 16-bit ones, where their own products are slow."""
    logprob = -F.cross_entropy(hidden.float() @ weight.float().T, target, reduction="none")
    logprob.backward(upstream)
    return logprob


def products(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> None:
    """The matrix products alone."""
    with torch.no_grad():
        logits = hidden @ weight.T
        hidden.grad = logits @ weight
        if weight.requires_grad:
            weight.grad = logits.T @ hidden


def torch_linear(**options: object) -> Variant:
    """torch.nn.functional.linear_cross_entropy, one loss a token."""

    def run(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> Tensor:
        chosen = torch.nn.LinearCrossEntropyOptions(**options)  # type: ignore[arg-type]
        logprob = -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=chosen)
        logprob.backward(upstream.to(logprob.dtype))
        return logprob

    return run


def torch_linear_sum(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> None:
    """The same for a plain sum, whose gradient it can take in the forward pass: no other upstream, so no errors."""
    chosen = torch.nn.LinearCrossEntropyOptions()
    F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=chosen).backward()


def trl_chunked(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> Tensor:
    """TRL's chunked log-probability, with its default vocabulary chunk of 8192."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logprob = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 8192, None, 1.0, ())[0]
    logprob.backward(upstream.to(logprob.dtype))
    return logprob


def ours(**options: int) -> Variant:
    """mopl.ops.linear_logprob."""

    def run(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> Tensor:
        logprob = mopl.ops.linear_logprob(hidden, weight, target, **options)
        logprob.backward(upstream)
        return logprob

    return run


VARIANTS: dict[str, Variant] = {
    "products alone": products,
    "F.cross_entropy, full logits": full_logits,
    "F.cross_entropy, float32 operands": upcast_logits,
    "mopl": ours(),
    "mopl, workspace=0": ours(workspace=0),
    "TRL chunked": trl_chunked,
    "torch linear_cross_entropy": torch_linear(),
    "the same, sum of the losses": torch_linear_sum,
    "the same, batch_chunk_size=256": torch_linear(batch_chunk_size=256),
}
PRODUCTS, NAIVE = "products alone", "F.cross_entropy, full logits"


def problem(rows: int, width: int, vocabulary: int, dtype: torch.dtype, frozen: bool) -> tuple[Tensor, ...]:
    """Draw hidden states, a weight whose logits have a standard deviation of 3, targets and upstream gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul_(3 / width**0.5).to(dtype)
    target = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight.requires_grad_(not frozen), target, torch.randn(rows, generator=generator)


def status(field: str) -> float:
    """Return a field of this process's memory status in MB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(name: str, arguments: argparse.Namespace, frozen: bool) -> dict[str, float]:
    """Run one variant in this process: once for its memory, then for its time."""
    run, dtype = VARIANTS[name], getattr(torch, arguments.dtype)
    run(*problem(8, 16, 64, dtype, frozen))  # libraries and their buffers are loaded
    hidden, weight, target, upstream = problem(arguments.rows, arguments.width, arguments.vocabulary, dtype, frozen)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = status("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    logprob = run(hidden, weight, target, upstream)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gradients = sum(t.grad.nbytes for t in (hidden, weight) if t.grad is not None) / 2**20
    result = {"wall": wall, "cpu": cpu, "MB": status("VmHWM") - before - gradients}
    if logprob is not None and hidden.grad is not None:
        result |= errors(logprob.detach(), hidden, weight.detach(), target, upstream)
    return result


def errors(logprob: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> dict[str, float]:
    """Compare the first rows with float64."""
    exact = hidden[:CHECKED].detach().double().requires_grad_()
    expected = torch.cat([(part @ weight.double().T).log_softmax(-1) for part in exact.split(8)])
    expected = expected.gather(1, target[:CHECKED, None]).squeeze(1)
    expected.backward(upstream[:CHECKED].double())
    assert exact.grad is not None and hidden.grad is not None
    difference = hidden.grad[:CHECKED].double() - exact.grad
    return {
        "error": (logprob[:CHECKED].double() - expected.detach()).abs().max().item(),
        "grad": (difference.norm() / exact.grad.norm()).item(),
    }


Results = dict[str, dict[int, dict[str, float]]]  # figures by variant and round


def ratio(results: Results, name: str, other: str) -> float | None:
    """Return the median of processor time over another variant's in the same round."""
    theirs = results.get(other, {})
    found = [mine["cpu"] / theirs[turn]["cpu"] for turn, mine in results[name].items() if turn in theirs]
    return statistics.median(found) if found else None


def table(results: Results) -> str:
    """Return the lines of one size."""
    lines = [f"{'':34}{'wall':>8}{'cpu':>8}{'bound':>7}{'CE':>7}{'MB':>7}{'/CE':>6}{'error':>9}{'grad':>9}"]
    memory = {name: max(r["MB"] for r in rounds.values()) for name, rounds in results.items() if rounds}
    for name, rounds in results.items():
        if not rounds:
            continue
        runs = list(rounds.values())
        ratios = (ratio(results, name, other) for other in (PRODUCTS, NAIVE))
        shown = "".join(" " * 7 if value is None else f"{value:7.2f}" for value in ratios)
        accuracy = "".join(f"{runs[0][key]:9.0e}" if key in runs[0] else " " * 9 for key in ("error", "grad"))
        wall, cpu = (min(r[key] for r in runs) for key in ("wall", "cpu"))
        less = f"{memory[name] / memory[NAIVE]:6.2f}" if NAIVE in memory else " " * 6
        lines.append(f"{name:34}{wall:8.2f}{cpu:8.2f}{shown}{memory[name]:7.0f}{less}{accuracy}")
    return "\n".join(lines)


def print_bounds(results: Results, head: str) -> None:
    """Print what is wanted of a trained head's processor time, and whether it is so in the median of the rounds."""
    found = ratio(results, "mopl", NAIVE) if head == "trained" and "mopl" in results else None
    if found is not None:
        rounds = len(results["mopl"])
        verdict = "met" if found <= 1.05 else "missed"
        print(f"mopl over F.cross_entropy, median of {rounds} rounds: {found:.3f}, at most 1.05: {verdict}")


def run_one(command: list[str]) -> dict[str, float] | str:
    """Measure in a process of its own; return the figures, or why there are none."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def write(path: Path | None, log: list[dict]) -> None:
    """Write all figures, at once or not at all."""
    if path is None:
        return
    about = {
        "command": " ".join(["python", "-m", "bench.bench_logprob_cpu", *sys.argv[1:]]),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps({**about, "runs": log}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--heads", nargs="+", default=["frozen", "trained"], choices=["frozen", "trained"])
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # name of the variant that this process measures
    arguments = parser.parse_args()
    if arguments.one:
        arguments.vocabulary = arguments.vocabulary[0]
        print(json.dumps(measure(arguments.one, arguments, arguments.heads == ["frozen"])))
        return
    log: list[dict] = []
    if arguments.json and arguments.json.exists():
        log = json.loads(arguments.json.read_text())["runs"]
    for vocabulary in arguments.vocabulary:
        for head in arguments.heads:
            size = {"dtype": arguments.dtype, "rows": arguments.rows, "width": arguments.width}
            size |= {"vocabulary": vocabulary, "head": head}
            results: Results = {name: {} for name in arguments.variants}
            for entry in log:
                if entry["variant"] in results and size.items() <= entry.items() and "failed" not in entry:
                    results[entry["variant"]][entry["round"]] = entry
            options = ["--heads", head, "--dtype", arguments.dtype, "--rows", arguments.rows]
            options += ["--width", arguments.width, "--vocabulary", vocabulary]
            for turn in range(arguments.rounds):
                for name in arguments.variants:
                    if turn in results[name]:
                        continue
                    found = run_one(
                        [sys.executable, "-m", "bench.bench_logprob_cpu", "--one", name, *map(str, options)]
                    )
                    if isinstance(found, str):
                        print(f"{name}: {found}", file=sys.stderr)
                        log.append({"variant": name, **size, "round": turn, "failed": found})
                    else:
                        results[name][turn] = found
                        log.append({"variant": name, **size, "round": turn, **found})
                    write(arguments.json, log)
            print(f"\nN {arguments.rows}, H {arguments.width}, V {vocabulary}, {arguments.dtype}, {head} head")
            print(table(results), flush=True)
            print_bounds(results, head)


if __name__ == "__main__":
    main()
