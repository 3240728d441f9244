"""Time, memory and error of log-probabilities from hidden states on a CPU, beside full logits, torch and TRL.

    python -m bench.bench_logprob_cpu                                  # N 2048, H 1024, V 32,000 and 128,256, float32
    python -m bench.bench_logprob_cpu --rows 512 --vocabulary 8192 --dtype bfloat16 --rounds 2

Every measurement is a process of its own, and the variants of one round follow one another, so that a slow minute of
the machine hits all of them. Run it alone on the machine. Columns:

* `wall`, `cpu`: seconds of forward and backward, best of the rounds; `bound`: wall over that of the bare products
  (two with a frozen head, three with a trained one) in the same dtype; `CE`: wall over F.cross_entropy on full logits;
* `MB`: the peak of resident memory (VmHWM, reset before the run) beyond inputs and gradients, largest of the rounds;
* `error`: of the log-probabilities of 64 rows against float64; `grad`: the same for the gradient of the hidden states,
  relative to its norm, with random upstream gradients. Both on the inputs as rounded to the dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX

import torch
import torch.nn.functional as F
from torch import Tensor

import mopl.ops

CHECKED = 64  # rows whose error is measured
Variant = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | None]  # (hidden, weight, target, upstream) -> log p


def full_logits(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> Tensor:
    """F.cross_entropy on logits that are held whole."""
    logprob = -F.cross_entropy(hidden @ weight.T, target, reduction="none")
    logprob.backward(upstream.to(logprob.dtype))
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
    "mopl": ours(),
    "mopl, workspace=0": ours(workspace=0),
    "TRL chunked": trl_chunked,
    "torch linear_cross_entropy": torch_linear(),
    "the same, batch_chunk_size=256": torch_linear(batch_chunk_size=256),
}


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


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return the lines of one size."""
    best = {name: min(r["wall"] for r in runs) for name, runs in results.items() if runs}
    bound, naive = best.get("products alone"), best.get("F.cross_entropy, full logits")
    lines = [f"{'':34}{'wall':>8}{'cpu':>8}{'bound':>7}{'CE':>7}{'MB':>7}{'error':>9}{'grad':>9}"]
    for name, runs in results.items():
        if not runs:
            continue
        ratios = "".join(f"{best[name] / other:7.2f}" if other else " " * 7 for other in (bound, naive))
        accuracy = "".join(f"{runs[0][key]:9.0e}" if key in runs[0] else " " * 9 for key in ("error", "grad"))
        cpu, memory = min(r["cpu"] for r in runs), max(r["MB"] for r in runs)
        lines.append(f"{name:34}{best[name]:8.2f}{cpu:8.2f}{ratios}{memory:7.0f}{accuracy}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--json", help="also write every measurement to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # name of the variant that this process measures
    parser.add_argument("--frozen", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        arguments.vocabulary = arguments.vocabulary[0]
        print(json.dumps(measure(arguments.one, arguments, arguments.frozen)))
        return
    log = []
    for vocabulary in arguments.vocabulary:
        for frozen in (True, False):
            size = ["--rows", arguments.rows, "--width", arguments.width, "--vocabulary", vocabulary]
            size += ["--dtype", arguments.dtype, *(["--frozen"] if frozen else [])]
            results: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.variants}
            for _ in range(arguments.rounds):
                for name in arguments.variants:
                    command = [sys.executable, "-m", "bench.bench_logprob_cpu", "--one", name, *map(str, size)]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                        continue
                    results[name].append(json.loads(done.stdout.splitlines()[-1]))
                    log.append({"variant": name, "vocabulary": vocabulary, "frozen": frozen, **results[name][-1]})
            head = "frozen head" if frozen else "trained head"
            print(f"\nN {arguments.rows}, H {arguments.width}, V {vocabulary}, {arguments.dtype}, {head}")
            print(table(results), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"command": sys.argv, "threads": torch.get_num_threads(), "runs": log}, file, indent=1)


if __name__ == "__main__":
    main()
