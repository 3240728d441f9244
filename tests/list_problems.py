"""Random problems for the kernels of the list losses, and their comparison with the float64 reference.

Shared by the tests in Triton's interpreter and those on a GPU. Whatever must not be looked at holds NaN or inf: masked
slots, and the gaps between rows, which also make the strides unusual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

F64 = torch.float64


@dataclass
class Problem:
    """The arguments of a list op, and the upstream gradient (B, m) of its result."""

    scores: Tensor
    labels: Tensor
    beta: Tensor
    mask: Tensor | None
    upstream: Tensor
    options: dict = field(default_factory=dict)

    def to(self, device: str) -> Problem:
        def move(value):
            return value.to(device) if isinstance(value, Tensor) else value

        moved = {name: move(getattr(self, name)) for name in ("scores", "labels", "beta", "mask", "upstream")}
        return Problem(**moved, options={name: move(value) for name, value in self.options.items()})


def padded(values: Tensor, gap: int = 16, ahead: int = 16) -> Tensor:
    """Return the same values as a view into a larger tensor: poison before, after and between rows.

    By default it begins at 16 items, and rows are as well aligned as contiguous ones: what is not, ops may copy.
    """
    poison = math.nan if values.is_floating_point() else True if values.dtype == torch.bool else 99
    rows = values.reshape(-1, values.shape[-1])
    stride = rows.shape[1] + gap
    store = torch.full((ahead + (rows.shape[0] + 1) * stride,), poison, dtype=values.dtype, device=values.device)
    store.as_strided(rows.shape, (stride, 1), ahead).copy_(rows)
    strides = [math.prod(values.shape[d + 1 : -1]) * stride for d in range(values.ndim - 1)]
    return store.as_strided(values.shape, (*strides, 1), ahead)


def random_mask(batch: int, items: int) -> Tensor:
    """Return lists of every length from none to all, at random places; the first is full, the next have 0 and 1."""
    count = torch.randint(0, items + 1, (batch,))
    count[: min(3, batch)] = torch.tensor([items, 0, min(1, items)])[: min(3, batch)]
    return torch.rand(batch, items).argsort(-1) < count[:, None]


def make(
    batch: int,
    objectives: int,
    items: int,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    levels: int | None = None,  # so many different integer labels; None: continuous labels, some of them 0
    label_dtype: torch.dtype = torch.float32,
    common: bool = False,
    masked: bool = True,
    **options,
) -> Problem:
    """Return a random problem; the options are passed on to the op and to the reference."""
    scores = (torch.randn(batch, items, dtype=F64) * scale).to(dtype)
    if levels is None:
        labels = torch.rand(batch, objectives, items, dtype=F64) * (torch.rand(batch, objectives, items) < 0.7)
    else:
        labels = torch.randint(0, levels, (batch, objectives, items))
    beta = torch.rand(batch, 1 if common else objectives, dtype=F64) + 0.2
    return Problem(
        scores=scores,
        labels=labels.to(label_dtype),
        beta=beta.to(torch.float64 if dtype == torch.float64 else torch.float32),
        mask=random_mask(batch, items) if masked else None,
        upstream=torch.randn(batch, objectives, dtype=F64),
        options=options,
    )


def infinite_scores() -> tuple[Problem, Tensor]:
    """Return lists with infinite scores whose softmax is defined, and the gradients in beta (6, 1) of their losses."""
    inf = math.inf
    scores = torch.tensor([[1.2, inf, 0], [inf, inf, 0], [-inf, 1, 0], [1.2, inf, 0], [inf, inf, 0], [-inf, 1, 0]])
    labels = torch.tensor([0.0, 0.3, 0.7]).expand(6, 1, 3).clone()
    labels[1, 0] = torch.tensor([0.2, 0.8, 0.0])
    labels[4:, 0, :2] = 0
    beta = torch.tensor([0.5, 0.5, 0.5, -0.5, -0.5, -0.5])[:, None]
    # One item alone is likeliest; two equal ones; a finite list of 1 and 0; the same with the signs turned around.
    share = 1 / (1 + math.exp(-0.5))
    expected = torch.tensor([inf, 0, share - 0.3, -inf, 0, -inf])[:, None]
    return Problem(scores, labels, beta, None, torch.ones(6, 1)), expected


def best_first(problem: Problem) -> Tensor:
    """Return the order (B, m, K) of falling labels, masked items last."""
    labels = problem.labels.double()
    if problem.mask is not None:
        labels = labels.masked_fill(~problem.mask[:, None], -torch.inf)
    return labels.argsort(dim=-1, descending=True, stable=True)


def results(op: Callable[..., Tensor], problem: Problem, with_labels: bool = False) -> dict[str, Tensor]:
    """Return the loss (B, m) and the gradients of (upstream * loss).sum()."""
    leaves = {"scores": problem.scores, "beta": problem.beta}
    if with_labels:
        leaves["labels"] = problem.labels
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    labels = leaves.get("labels", problem.labels)
    loss = op(leaves["scores"], labels, leaves["beta"], problem.mask, **problem.options)
    found = {"loss": loss.detach()}
    if loss.requires_grad:
        gradients = torch.autograd.grad((loss * problem.upstream.to(loss.dtype)).sum(), list(leaves.values()))
        found |= dict(zip(leaves, gradients, strict=True))
    else:  # the reference found no list that costs anything
        found |= {name: torch.zeros_like(value) for name, value in leaves.items()}
    return found


def curvature(op: Callable[..., Tensor], problem: Problem) -> dict[str, Tensor]:
    """Return the gradients of <d, gradient of (upstream * loss).sum()> for a fixed direction d: second derivatives."""
    leaves = [t.detach().requires_grad_() for t in (problem.scores, problem.beta)]
    loss = op(leaves[0], problem.labels, leaves[1], problem.mask, **problem.options)
    gradients = torch.autograd.grad(loss, leaves, problem.upstream.to(loss.dtype), create_graph=True)
    directions = [torch.linspace(-1, 2, g.numel(), dtype=F64).view_as(g).to(g.dtype) for g in gradients]
    total = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    return dict(zip(("scores", "beta"), torch.autograd.grad(total, leaves), strict=True))


def in_float64(problem: Problem) -> Problem:
    """Return what the reference is given: the rounded inputs, in float64."""
    options = {k: v.double() if k == "position_weights" and v is not None else v for k, v in problem.options.items()}
    labels = problem.labels.double() if problem.labels.is_floating_point() else problem.labels
    return replace(
        problem,
        scores=problem.scores.double(),
        labels=labels,
        beta=problem.beta.double(),
        options=options,
    )


def poisoned(problem: Problem) -> Problem:
    """Return the problem with NaN or inf in masked slots, and with gaps of NaN around every row."""
    scores, labels, mask = problem.scores.clone(), problem.labels.clone(), problem.mask
    if mask is not None:
        scores[~mask] = math.nan
        scores[:, ::2][~mask[:, ::2]] = math.inf
        if labels.is_floating_point():
            labels.masked_fill_(~mask[:, None], math.nan)
        elif labels.dtype != torch.bool:
            labels.masked_fill_(~mask[:, None], 77)
        mask = padded(mask)
    options = {k: padded(v) if isinstance(v, Tensor) else v for k, v in problem.options.items()}
    return replace(
        problem,
        scores=padded(scores),
        labels=padded(labels),
        beta=padded(problem.beta, gap=2),
        mask=mask,
        options=options,
    )


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Assert that every list's results agree relative to the largest entry of that list."""
    for name, value in expected.items():
        actual = found[name].detach().cpu().double()
        value = value.cpu()
        assert actual.shape == value.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(value.shape)}"
        if not value.numel():
            continue
        assert torch.equal(actual.isnan(), value.isnan()), f"{name} has NaN in other places"
        infinite = value.isinf()
        assert torch.equal(actual[infinite], value[infinite]), f"{name} has inf in other places"
        error = (actual - value).masked_fill(infinite | value.isnan(), 0).abs().flatten(1).amax(-1)
        size = value.masked_fill(infinite | value.isnan(), 0).abs().flatten(1).amax(-1)
        # Objectives of one list may cancel in the gradient of its scores: a list next to zero is judged by the others.
        # The gradient of a beta is a sum over items of both signs, so it is smaller than its terms.
        limit = (4 if name == "beta" else 1) * tolerance * (size + 5e-2 * size.max())
        worst = int((error - limit).argmax())
        assert bool((error <= limit).all()), (
            f"{name} of list {worst} is off by {float(error[worst]):.2e} where its largest entry is "
            f"{float(size[worst]):.2e}, relative {float(error[worst] / size[worst]):.1e} > {tolerance:.1e}"
        )


def check(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    problem: Problem,
    tolerance: float | None = None,
    with_labels: bool = False,
    device: str = "cpu",
) -> None:
    """Assert that the op on the poisoned problem gives the reference's results on the clean one."""
    if tolerance is None:
        tolerance = 1e-12 if problem.scores.dtype == torch.float64 else 2e-6
        if problem.scores.dtype in (torch.bfloat16, torch.float16):
            # The loss is exact for the rounded scores, but the gradient is rounded to their dtype; the interpreter
            # truncates there instead, a whole unit in the last place.
            tolerance = 2**-7 if problem.scores.dtype == torch.bfloat16 else 2**-10
    expected = results(reference, in_float64(problem), with_labels)
    hidden = poisoned(problem).to(device)
    before = [t.clone() for t in (hidden.scores, hidden.labels, hidden.beta)]
    found = results(op, hidden, with_labels)
    for kept, now in zip(before, (hidden.scores, hidden.labels, hidden.beta), strict=True):
        assert torch.equal(kept.nan_to_num(7), now.nan_to_num(7)), "an input was changed"
    compare(found, expected, tolerance)
    if problem.scores.dtype in (torch.bfloat16, torch.float16):
        compare({"loss": found["loss"]}, {"loss": expected["loss"]}, 2e-6)
    if problem.mask is not None:
        outside = found["scores"].cpu()[~problem.mask]
        assert torch.equal(outside, torch.zeros_like(outside)), "a masked item has a gradient"
