"""Hidden states, heads and targets for the benches of log-probabilities, and what is true of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.measuring import DEVICE
from mopl.ops._products import product


def problem(
    kind: str, rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, head, targets and upstream gradients.

    "flat" logits have a deviation of 1. "peaked" ones like those of a trained model: most rows are sure of their target
    or of another token, by up to 20 nats. Random flat logits would flatter who drops small gradients.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    weight = (normal(vocabulary, width) * width**-0.5).to(dtype)
    target = torch.randint(vocabulary, (rows,), generator=generator, device=DEVICE)
    hidden = normal(rows, width)
    if kind == "peaked":
        sure = torch.rand(rows, generator=generator, device=DEVICE) < 0.8
        own = weight[torch.where(sure, target, target.flip(0))].float()
        strength = torch.rand(rows, 1, generator=generator, device=DEVICE) * 20
        hidden += strength * own / own.square().sum(1, keepdim=True)
    return hidden.to(dtype), weight, target, normal(rows)


def exactly(
    hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log p, the gradient of the hidden states and, if `whole`, that of the head, in float64."""
    wide, values, gradients = weight.double(), [], []
    grad_weight = torch.zeros_like(wide) if whole else None
    for begin in range(0, len(hidden), 128):
        part = slice(begin, begin + 128)
        h, index = hidden[part].double(), target[part, None]
        u = h @ wide.T
        e = (u - u.gather(1, index)).exp_().scatter_(1, index, 0)
        others = e.sum(1, keepdim=True)
        values.append(-others.log1p()[:, 0])
        share = upstream[part, None].double() / (1 + others)
        grad = e.mul_(-share).scatter_(1, index, share * others)
        gradients.append(grad @ wide)
        if grad_weight is not None:
            grad_weight += grad.T @ h
    return torch.cat(values), torch.cat(gradients), grad_weight


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def logits_problem(rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return bf16 logits whose targets stand out by up to 20 nats, targets and upstream gradients."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.empty(rows, vocabulary, device=DEVICE, dtype=torch.bfloat16).normal_(generator=generator)
    target = torch.randint(vocabulary, (rows,), generator=generator, device=DEVICE)
    strength = torch.rand(rows, 1, generator=generator, device=DEVICE) * 20
    logits.scatter_add_(1, target[:, None], strength.bfloat16())
    return logits, target, torch.randn(rows, generator=generator, device=DEVICE)


PART = 4096  # rows of logits at a time, which bounds the memory of the bare products


def products(mode: str, rows: int, width: int, vocabulary: int) -> Callable[[], object]:
    """Return a step of the matrix products of a mode alone: bf16 operands, float32 results, nothing in between."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # on a CPU operands would be upcast every time

    def normal(*shape: int) -> Tensor:
        return torch.empty(*shape, device=DEVICE, dtype=dtype).normal_()

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device=DEVICE)

    hidden, weight = normal(rows, width), normal(vocabulary, width)
    logits, grad_hidden = empty(min(PART, rows), vocabulary), empty(rows, width)
    # Such as the exponentials that take the logits' place: random numbers, because zeros would draw less power.
    inner = normal(rows if mode == "trained" else min(PART, rows), vocabulary) if mode != "forward" else None
    grad_weight = empty(vocabulary, width) if mode == "trained" else None

    def step() -> None:
        for begin in range(0, rows, PART):
            part = slice(begin, min(begin + PART, rows))
            many = part.stop - part.start
            product(hidden[part], weight.T, logits[:many])
            if inner is not None:
                stored = inner[part] if mode == "trained" else inner[:many]
                product(stored, weight, grad_hidden[part])
        if grad_weight is not None and inner is not None:
            product(inner.T, hidden, grad_weight)

    return step
