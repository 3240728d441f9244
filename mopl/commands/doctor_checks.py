"""The checks of `mopl doctor`: each op on a small problem, value and gradients, beside the plain formula in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopl import losses, ops, reference, reference_logprob, reference_policy

# Float32 sums of a few dozen terms; a wrong formula is off by far more.
TOLERANCE = 1e-4
DRIVER = Path("/proc/driver/nvidia/version")
Problem = Callable[[torch.device], tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]


def describe_gpu() -> str:
    """Return the GPUs that torch can use, or why there are none."""
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{each.name}, {each.total_memory / 2**30:.0f} GiB" for each in devices]
        return f"{'; '.join(names)} (torch {torch.__version__}{_driver()})"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"none: torch {torch.__version__} is a build for CPUs"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return f"none found: torch {torch.__version__}, built for {built}, sees no device{_driver() or ' or no driver'}"


def _driver() -> str:
    """Return the version of NVIDIA's driver as ", driver X"; "" where there is none."""
    try:
        text = DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^NVRM version:.*?(\d+\.[\d.]+)", text, re.MULTILINE)
    return f", driver {found[1]}" if found else ""


def run_checks() -> list[dict[str, Any]]:
    """Run every check on the CPU and on each kind of GPU there is; return name, whether it works, and a detail."""
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    return [
        {"name": f"{name}, {'CPU' if device.type == 'cpu' else 'GPU'}", **_checked(problem, device)}
        for device in devices
        for name, problem in PROBLEMS.items()
    ]


def _checked(problem: Problem, device: torch.device) -> dict[str, Any]:
    try:
        worst = _error(*problem(device))
    except Exception as error:  # whatever it is: that is what the check is for
        text = " ".join(str(error).split())
        return {"works": False, "detail": f"{type(error).__name__}: {text}"}
    return {"works": worst < TOLERANCE, "detail": f"largest error {worst:.1e}"}


def _error(op: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Return the largest error of values and gradients, relative to the largest entry of each."""
    found = _results(op, inputs)
    wanted = _results(formula, [x.detach().cpu().double() for x in inputs])
    errors = [float((a.cpu().double() - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in
              zip(found, wanted, strict=True)]  # fmt: skip
    return max(error if error == error else float("inf") for error in errors)


def _results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = function(*inputs)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
    return [value.detach(), *torch.autograd.grad((value * upstream).sum(), inputs)]


def _random(device: torch.device, *shape: int) -> Tensor:
    """Return the same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])).to(device)


def _lists(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    scores, beta = _random(device, 3, 5), torch.tensor([[0.5, 1.0]] * 3, device=device)
    labels = torch.tensor([[[3.0, 2, 1, 0, 0], [0, 1, 0, 2, 4]]] * 3, device=device)
    return scores, labels, beta


def _list_loss(name: str) -> Problem:
    def problem(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
        scores, labels, beta = _lists(device)
        op, formula = getattr(ops, name), getattr(reference, name)
        return (
            lambda s: op(s, labels, beta),
            lambda s: formula(s, labels.cpu().double(), beta.cpu().double()),
            [scores],
        )

    return problem


def _own_loss(name: str) -> Problem:
    """Return the problem of a list loss that `mopl.losses` computes itself."""

    def problem(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
        scores, labels, beta = _lists(device)
        loss, formula = getattr(losses, name), getattr(reference, name)
        return (
            lambda s: loss(s, labels, beta=beta, reduction="none"),
            lambda s: formula(s, labels.cpu().double(), beta.cpu().double()),
            [scores],
        )

    return problem


def _of_sequences(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    segment = torch.tensor([0, 0, 1, -1, 2, 2, 2], device=device)
    return (
        lambda logprob: ops.sequence_logprob(logprob, segment, sequences=3),
        lambda logprob: reference_logprob.sequence_logprob(logprob, segment.cpu(), 3),
        [_random(device, 7)],
    )


def _divergence(kind: str) -> Problem:
    """Return the problem of a divergence from a teacher's hidden states, or from its two likeliest tokens."""

    def problem(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
        teacher, head = _random(device, 6, 12), _random(device, 40, 12)
        logits = teacher.cpu().double() @ head.cpu().double().T
        known, ids = (x.to(device) for x in logits.log_softmax(-1).float().topk(2))
        op: Callable[..., Tensor] = {
            "jsd": lambda h, w: ops.linear_jsd(h, w, teacher, head, beta=0.3),
            "kl": lambda h, w: ops.linear_kl(h, w, teacher, head),
            "top-k": lambda h, w: ops.linear_topk_jsd(h, w, ids, known, beta=0.3),
        }[kind]
        formula: Callable[[Tensor], Tensor] = {
            "jsd": lambda own: reference_logprob.jsd(own, logits, 0.3),
            "kl": lambda own: reference_logprob.jsd(own, logits, 1.0),  # KL(student ‖ teacher)
            "top-k": lambda own: reference_logprob.topk_jsd(own, ids.cpu(), known.cpu().double(), 0.3, True),
        }[kind]
        return op, lambda h, w: formula(h @ w.T), [_random(device, 6, 16), _random(device, 40, 16)]

    return problem


def _policy(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """Return the policy gradient in expectation over all responses, and the value's gradient; both values are 0."""
    rewards, w, alpha = _random(device, 7, 2), torch.tensor([0.7, 0.3], device=device), 0.2
    other = _random(device, 1, 7)[0].log_softmax(0)

    def expected(logits: Tensor) -> Tensor:
        log_policy = logits.log_softmax(0)
        found = losses.policy_gradient(
            log_policy[:, None], rewards, w, kl_weight=alpha, reference=other[:, None],
            token_weights=log_policy.detach().exp()[:, None], reduction="sum",
        )  # fmt: skip
        return (found.loss - found.loss.detach())[None]

    def formula(logits: Tensor) -> Tensor:
        reference, gains, kept = (x.cpu().double() for x in (other, rewards.T, w))
        value = -reference_policy.value(logits.log_softmax(0), reference, gains, kept, alpha)
        return (value - value.detach())[None]

    return expected, formula, [_random(device, 7)]


def _from_logits(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    target = torch.arange(6, device=device) * 5
    return (
        lambda logits: ops.gathered_logprob(logits, target),
        lambda logits: reference_logprob.gathered_logprob(logits, target.cpu())[0],
        [_random(device, 6, 40)],
    )


def _from_hidden(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    target = torch.arange(6, device=device) * 5
    return (
        lambda hidden, weight: ops.linear_logprob(hidden, weight, target),
        lambda hidden, weight: reference_logprob.linear_logprob(hidden, weight, target.cpu())[0],
        [_random(device, 6, 16), _random(device, 40, 16)],
    )


PROBLEMS: dict[str, Problem] = {
    "ListNet": _list_loss("listwise_cross_entropy"),
    "Plackett-Luce": _list_loss("plackett_luce_nll"),
    "Bradley-Terry": _own_loss("pairwise_logistic"),
    "LambdaLoss": _own_loss("lambda_loss"),
    "approximate NDCG": _own_loss("approx_ndcg"),
    "log-probabilities from logits": _from_logits,
    "log-probabilities from hidden states": _from_hidden,
    "log-probabilities of sequences": _of_sequences,
    "JSD from hidden states": _divergence("jsd"),
    "KL from hidden states": _divergence("kl"),
    "JSD from a teacher's top k": _divergence("top-k"),
    "policy gradient": _policy,
}
