"""Every way to compute ListNet and Plackett–Luce that `bench_listwise.py` measures, ours and the peers', as callables.

A variant gets the same float32 scores `(B, K)` and labels `(B, m, K)` without ties and runs forward and backward for
the sum over lists and objectives. The peers' formulas are written from their papers and documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mopl.losses
import mopl.ops

Step = Callable[[], Tensor]


@dataclass
class Problem:
    """One size of the benchmark."""

    scores: Tensor  # (B, K), requires grad
    labels: Tensor  # (B, m, K), all different within a list
    order: Tensor  # (B, m, K), best first
    position: Tensor  # (B, m, K), every label's share of its list, for ListNet
    betas: Tensor  # (m,), unequal

    @classmethod
    def make(cls, lists: int, objectives: int, items: int, device: str = "cpu", seed: int = 0) -> Problem:
        """Draw scores from N(0, 1) and random permutations as labels.

        The labels of the first million items stand for those of all others too, which are copies in memory of their
        own: to sort a hundred million would take longer than to measure on them.
        """
        draw: dict = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
        scores = torch.randn(lists, items, **draw)
        drawn = min(lists, max(1, 2**20 // max(1, objectives * items)))
        labels = torch.rand(drawn, objectives, items, **draw)
        order = labels.argsort(-1, descending=True)
        ranks = torch.arange(items, 0, -1.0, device=device).expand(drawn, objectives, items)
        labels.scatter_(-1, order, ranks)

        def every(rows: Tensor) -> Tensor:
            return rows if drawn == lists else rows.repeat(-(-lists // drawn), 1, 1)[:lists]

        return cls(
            scores=scores.requires_grad_(),
            labels=every(labels),
            order=every(order),
            position=every(labels / labels.sum(-1, keepdim=True)),
            betas=torch.linspace(0.5, 1.5, objectives).to(device) if objectives > 1 else torch.ones(1, device=device),
        )

    @property
    def items(self) -> int:
        """Number of scores."""
        return self.scores.numel()


def _backward(scores: Tensor, loss: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, scores)
    return gradient


# ---------------------------------------------------------------- formulas of the peers


def logcumsumexp_nll(scores: Tensor, order: Tensor) -> Tensor:
    """Plackett–Luce in plain PyTorch for presorted lists: the usual one-liner."""
    ranked = scores[:, None].expand(order.shape).gather(-1, order)
    return (ranked.flip(-1).logcumsumexp(-1).flip(-1) - ranked).sum()


def cumsum_nll(scores: Tensor, order: Tensor) -> Tensor:
    """The same by `cumsum(exp(s - max))`: fast, and inf or NaN past a range of 87."""
    ranked = scores[:, None].expand(order.shape).gather(-1, order)
    top = ranked.amax(-1, keepdim=True).detach()
    return ((ranked - top).exp().flip(-1).cumsum(-1).flip(-1).log() - (ranked - top)).sum()


def allrank_list_mle(scores: Tensor, labels: Tensor, eps: float = 1e-10) -> Tensor:
    """Follow allRank's listMLE: shuffle to break ties, sort, cumsum of exp, eps inside the log."""
    total = scores.new_zeros(())
    for j in range(labels.shape[1]):
        shuffle = torch.randperm(scores.shape[-1], device=scores.device)
        shuffled, truth = scores[:, shuffle], labels[:, j, shuffle]
        ranked_truth, indices = truth.sort(descending=True, dim=-1)
        pad = ranked_truth == -1
        ranked = shuffled.gather(1, indices).masked_fill(pad, float("-inf"))
        shifted = ranked - ranked.max(dim=1, keepdim=True).values
        sums = shifted.exp().flip(1).cumsum(1).flip(1)
        total = total + ((sums + eps).log() - shifted).masked_fill(pad, 0.0).sum()
    return total


def sentence_transformers_list_mle(scores: Tensor, labels: Tensor) -> Tensor:
    """Follow sentence-transformers' ListMLE (6.2) after the model: pad, sort, mask, logcumsumexp."""
    total = scores.new_zeros(())
    for j in range(labels.shape[1]):
        mask = torch.ones_like(scores, dtype=torch.bool)
        _, indices = labels[:, j].sort(descending=True, dim=1)
        ranked, valid = scores.gather(1, indices), mask.gather(1, indices)
        filled = ranked.masked_fill(~valid, torch.finfo(ranked.dtype).min)
        log_probs = ranked - filled.flip(1).logcumsumexp(1).flip(1)
        total = total - log_probs.masked_fill(~valid, 0.0).sum(1).sum()
    return total


def log_softmax_cross_entropy(scores: Tensor, position: Tensor) -> Tensor:
    """ListNet in plain PyTorch, one softmax for all objectives."""
    return -(position * scores.log_softmax(-1)[:, None]).sum()


def allrank_list_net(scores: Tensor, labels: Tensor, eps: float = 1e-10) -> Tensor:
    """Follow allRank's listNet: softmax of scores and of labels, eps inside the log."""
    total = scores.new_zeros(())
    for j in range(labels.shape[1]):
        pad = labels[:, j] == -1
        predicted = scores.masked_fill(pad, float("-inf")).softmax(1)
        truth = labels[:, j].masked_fill(pad, float("-inf")).softmax(1)
        total = total - (truth * (predicted + eps).log()).sum()
    return total


# ---------------------------------------------------------------- variants


def plackett_luce_variants(problem: Problem, compiled: bool = True) -> dict[str, Step]:
    """Return name -> forward + backward of Plackett–Luce."""
    p = problem
    presorted = p.order.contiguous()
    variants: dict[str, Step] = {
        "mopl": lambda: _backward(
            p.scores, mopl.losses.plackett_luce(p.scores, p.labels, order=presorted, reduction="sum")
        ),
        "mopl, sorting": lambda: _backward(p.scores, mopl.losses.plackett_luce(p.scores, p.labels, reduction="sum")),
        "logcumsumexp": lambda: _backward(p.scores, logcumsumexp_nll(p.scores, p.order)),
        "cumsum (unsafe)": lambda: _backward(p.scores, cumsum_nll(p.scores, p.order)),
        "allRank listMLE": lambda: _backward(p.scores, allrank_list_mle(p.scores, p.labels)),
        "sentence-transformers ListMLE": lambda: _backward(
            p.scores, sentence_transformers_list_mle(p.scores, p.labels)
        ),
    }
    if compiled:
        jitted = torch.compile(logcumsumexp_nll, dynamic=False)
        variants["torch.compile of logcumsumexp"] = lambda: _backward(p.scores, jitted(p.scores, p.order))
    return variants


def listnet_variants(problem: Problem, compiled: bool = True) -> dict[str, Step]:
    """Return name -> forward + backward of ListNet."""
    p = problem
    variants: dict[str, Step] = {
        "mopl": lambda: _backward(p.scores, mopl.losses.listwise_dpo(p.scores, p.position, reduction="sum")),
        "mopl, no normalisation": lambda: _backward(
            p.scores, mopl.losses.listwise_dpo(p.scores, p.position, normalize=None, reduction="sum")
        ),
        "mopl, a beta each": lambda: _backward(
            p.scores, mopl.losses.listwise_dpo(p.scores, p.position, beta=p.betas, reduction="sum")
        ),
        "log_softmax": lambda: _backward(p.scores, log_softmax_cross_entropy(p.scores, p.position)),
        "allRank listNet": lambda: _backward(p.scores, allrank_list_net(p.scores, p.labels)),
    }
    if compiled:
        jitted = torch.compile(log_softmax_cross_entropy, dynamic=False)
        variants["torch.compile of log_softmax"] = lambda: _backward(p.scores, jitted(p.scores, p.position))
    return variants


def listnet_passes(problem: Problem) -> Step:
    """Do the passes of `mopl` over one objective and nothing else: no checks, no autograd, no row done again."""
    scores, labels = problem.scores.detach(), problem.position[:, 0].contiguous()
    lists, items = scores.shape
    step = max(1, min(lists, 262144 // items))
    work, ones = torch.empty(step, items), torch.ones(items)

    def row_sum(x: Tensor, out: Tensor) -> None:
        torch.mv(x, ones, out=out) if items <= 64 else torch.sum(x, -1, out=out)

    def run() -> Tensor:
        logp, gradient = torch.empty_like(scores), torch.empty_like(scores)
        loss, mass, hint = torch.empty(3, lists)
        for s, z, rows, a, b, c in zip(*(t.split(step) for t in (scores, labels, logp, loss, mass, hint)), strict=True):
            torch.log_softmax(s, -1, out=rows)
            row_sum(torch.mul(z, rows, out=work[: len(z)]), a)
            float(z.amin())
            row_sum(z, b)
            row_sum(rows, c)
        share = mass.reciprocal().neg_()[:, None]
        for z, rows, d, part in zip(*(t.split(step) for t in (labels, logp, gradient, share)), strict=True):
            product = torch.mul(z, part, out=work[: len(z)])
            torch.ops.aten._log_softmax_backward_data(product, rows, -1, rows.dtype, out=d)
        return gradient

    return run


def copy_limit(problem: Problem) -> Step:
    """Move the bytes that cannot be avoided: read scores and labels, write one gradient."""
    p = problem
    source = torch.cat([p.scores.detach()[:, None], p.labels], 1)
    target = torch.empty_like(p.scores)

    def step() -> Tensor:
        # A read of every label without a write: the sum of a row is the cheapest pass that torch has.
        source.sum(dim=(1, 2))
        return target.copy_(p.scores.detach())

    return step
