"""Time, memory and error of the JSD to a teacher from hidden states, beside TRL's, Liger's and full logits.

    python -m bench.bench_divergence --json FILE           # N 512, H 576, V 49,152 (SmolLM2 135M), float32 and bfloat16
    python -m bench.bench_divergence --rows 64 --vocabulary 4096 --rounds 1 --variants mopl "full logits"

The teacher is as wide as the student and has a head of its own; the loss is the mean over the rows, since Liger's gives
nothing else. Every measurement is a process of its own, and the variants of one round follow one another, so that a
slow minute of the machine hits all of them. Columns:

* `seconds`: of forward and backward, best of the rounds; `bound`: processor time over that of the bare products of a
  step that holds both models' logits (three with a frozen head, four with a trained one), best over best;
* `MB`: the peak of resident memory (VmHWM, reset before the run) beyond inputs and gradients, largest of the rounds;
* `value`: the relative error of the loss against float64 on the inputs as rounded, `grad`: that of the gradient of the
  hidden states in 32 rows, relative to its norm. None for top k, which is another function, a lower bound.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX

import torch
from torch import Tensor

from bench.measuring import Report, apart, each, extra_memory
from mopl import reference_logprob
from mopl.ops import linear_jsd, linear_topk_jsd

CHECKED = 32  # rows whose gradient is compared
Problem = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden states and head of the student, then of the teacher
Variant = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # -> the loss
BETA = 0.5


def full_logits(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """The formula of TRL's GKDTrainer on logits that are held whole, in float32."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    log_q = (teacher @ head.T).float().log_softmax(-1)
    half = torch.tensor(BETA).log()
    log_m = torch.logaddexp(log_p + half, log_q + half)
    to_student = torch.nn.functional.kl_div(log_m, log_p, reduction="none", log_target=True)
    to_teacher = torch.nn.functional.kl_div(log_m, log_q, reduction="none", log_target=True)
    return (BETA * to_teacher + (1 - BETA) * to_student).sum(-1).mean()


def products(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """The matrix products alone."""
    with torch.no_grad():
        logits = hidden @ weight.T
        torch.mm(teacher, head.T)
        hidden.grad = logits @ weight
        if weight.requires_grad:
            weight.grad = logits.T @ hidden
    return torch.zeros((), requires_grad=True) * 1.0


def trl(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """The chunked divergence of TRL's DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    everything = torch.ones(1, len(hidden), dtype=torch.bool)
    return _chunked_divergence_loss(hidden[None], teacher[None], weight, head, everything, BETA)[0]


def liger(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """Liger's fused loss, not compiled: on a CPU a compilation costs more than it saves here."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=False)
    return loss(hidden, weight, teacher, head, torch.zeros(len(hidden), dtype=torch.long))


def topk(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """Of 64 log-probabilities of the teacher, whose cost is none here: they are cached."""
    known = torch.full((len(hidden), 64), -6.0)
    ids = torch.arange(64).expand(len(hidden), 64)
    return linear_topk_jsd(hidden, weight, ids, known, beta=BETA).mean()


VARIANTS: dict[str, Variant] = {
    "its products alone": products,
    "mopl": lambda *problem: linear_jsd(*problem, beta=BETA).mean(),
    "TRL chunked": trl,
    "Liger fused": liger,
    "full logits": full_logits,
    "mopl, top 64": topk,
}


def problem(rows: int, width: int, vocabulary: int, dtype: torch.dtype, frozen: bool) -> Problem:
    """Draw a student and a teacher whose logits have a standard deviation of 3 and correlate by a half."""
    generator = torch.Generator().manual_seed(0)

    def draw(size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, width, generator=generator).mul_(scale)

    hidden, weight = draw(rows), draw(vocabulary, 3 / width**0.5)
    teacher, head = (hidden + draw(rows)).mul_(0.5**0.5), weight + draw(vocabulary, 1 / width**0.5)
    student = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen)
    return *student, teacher.to(dtype), head.to(dtype)


def exact(hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> tuple[float, Tensor]:
    """Return the loss and the gradient of the first rows in float64."""
    total, gradients = 0.0, []
    for h, t in zip(hidden.detach().split(16), teacher.split(16), strict=True):
        leaf = h.double().requires_grad_(len(gradients) * 16 < CHECKED)
        value = reference_logprob.jsd(leaf @ weight.detach().double().T, t.double() @ head.double().T, BETA).sum()
        if leaf.requires_grad:
            gradients += torch.autograd.grad(value / len(hidden), leaf)
        total += float(value.detach())
    return total / len(hidden), torch.cat(gradients)


def measure(name: str, size: str) -> dict:
    """Run one variant in this process: once for its memory, its time, and its error."""
    rows, width, vocabulary, dtype, head, turn = parse(size)
    run, frozen = VARIANTS[name], head == "frozen"
    loss = run(*problem(64, 16, 512, dtype, frozen))  # libraries and their buffers are loaded
    loss.backward()
    given = problem(rows, width, vocabulary, dtype, frozen)
    spent: dict = {}

    def step() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        spent["loss"] = run(*given)
        spent["loss"].backward()
        spent.update(seconds=time.perf_counter() - wall, cpu=time.process_time() - cpu)

    peak = extra_memory(step)
    gradients = sum(t.grad.nbytes for t in given if t.grad is not None) / 2**20
    result = {"seconds": spent["seconds"], "cpu": spent["cpu"], "round": turn}
    if peak is not None:
        result["MB"] = max(peak * 1024 - gradients, 0.0)
    if turn == 0 and name not in ("its products alone", "mopl, top 64"):
        value, gradient = exact(*given)
        assert given[0].grad is not None
        result["value"] = abs(float(spent["loss"].detach()) - value) / value
        result["grad"] = float((given[0].grad[:CHECKED].double() - gradient).norm() / gradient.norm())
    return result


def named(rows: int, width: int, vocabulary: int, dtype: str, head: str, turn: int) -> str:
    return f"N {rows}, H {width}, V {vocabulary}, {dtype}, {head} head, round {turn}"


def parse(size: str) -> tuple[int, int, int, torch.dtype, str, int]:
    words = size.replace(",", "").split()
    return int(words[1]), int(words[3]), int(words[5]), getattr(torch, words[6]), words[7], int(words[10])


def summary(report: Report) -> str:
    """Return a table of each size: best times, largest memory."""
    lines = []
    for size in dict.fromkeys(row["size"].rpartition(", round")[0] for row in report.rows):
        lines.append(f"\n{size}, {report.about['device']}, threads {report.about['threads']}")
        lines.append(f"  {'':22}{'seconds':>9}{'bound':>8}{'MB':>8}{'value':>9}{'grad':>9}")
        every = [row for row in report.rows if row["size"].startswith(size + ",")]
        found = {name: [row for row in every if row["variant"] == name and "cpu" in row] for name in VARIANTS}
        floor = min((row["cpu"] for row in found["its products alone"]), default=None)
        for name, rows in found.items():
            if not rows:
                reasons = [row.get("absent", row.get("failed")) for row in every if row["variant"] == name]
                lines += [f"  {name:22}{reasons[0]}"] if reasons else []
                continue
            bound = f"{min(row['cpu'] for row in rows) / floor:8.2f}" if floor else f"{'-':>8}"
            memory = max((row["MB"] for row in rows if "MB" in row), default=float("nan"))
            errors = (next((f"{row[key]:9.0e}" for row in rows if key in row), f"{'':9}") for key in ("value", "grad"))
            best = min(row["seconds"] for row in rows)
            lines.append(f"  {name:22}{best:9.2f}{bound}{memory:8.0f}{''.join(errors)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--heads", nargs="+", default=["frozen", "trained"], choices=["frozen", "trained"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)  # a variant and sizes, in this process
    arguments = parser.parse_args()
    if arguments.measure:
        name, *sizes = arguments.measure
        sys.exit(each(sizes, lambda size: measure(name, size)))
    report = Report(arguments.json, {"seconds": ".2f", "MB": ".0f", "value": ".0e", "grad": ".0e"})
    for dtype in arguments.dtypes:
        for head in arguments.heads:
            for turn in range(arguments.rounds):
                size = named(arguments.rows, arguments.width, arguments.vocabulary, dtype, head, turn)
                for name in arguments.variants:
                    apart(report, name, [size], ["-m", "bench.bench_divergence", "--measure", name], 300)
    print(summary(report))


if __name__ == "__main__":
    main()
