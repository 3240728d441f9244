"""The plain formulas: slow, any dtype, differentiable by autograd. The specification, and the oracle of the tests.

Shapes as everywhere: scores (B, K), labels (B, m, K), beta (B, m) or (B, 1), mask (B, K), result (B, m).
Every function loops over lists and objectives and takes the existing items of a list before any arithmetic, so nothing
here depends on how padding, blocks or scans are done elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mopl._renamed import renamed_keywords


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)) with every digit on both sides (torch's own softplus is cut off at 20)."""
    return -logsigmoid(-x)


def _logsumexp(x: Tensor) -> Tensor:
    """Return log sum exp(x) of a vector; torch's own has the gradient exp(x - result), which rounds for large x."""
    top = x.detach().max()
    return top + (x - top).exp().sum().log() if top.isfinite() else torch.logsumexp(x, 0)


def _each_list(
    scores: Tensor,
    objectives: int,
    beta: Tensor,
    mask: Tensor | None,
    loss: Callable[[Tensor, int, int, Tensor], Tensor],
) -> Tensor:
    """Return loss(u, b, j, items) as (B, m), with 0 for lists of fewer than two items."""
    batch, size = scores.shape
    beta = beta.expand(batch, objectives)
    rows = []
    for b in range(batch):
        items = torch.arange(size) if mask is None else mask[b].nonzero()[:, 0]
        for j in range(objectives):
            u = beta[b, j] * scores[b, items]
            rows.append(loss(u, b, j, items) if len(items) > 1 else u.new_zeros(()))
    return torch.stack(rows).reshape(batch, objectives) if rows else scores.new_zeros(batch, objectives)


# ---------------------------------------------------------------------------------------------------------------------
# Listwise cross-entropy


@renamed_keywords(temperature="beta")
def listwise_cross_entropy(
    scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None = None, normalize: bool = True
) -> Tensor:
    """Return -sum_i z_i log softmax(beta scores)_i with z the labels, divided by their sum if `normalize`.

    Ren et al. 2025 (COS-DPO), equation 8; Cao et al. 2007 (ListNet). 0 where `normalize` finds no positive label sum.

    Args:
        scores: (B, K).
        labels: (B, m, K).
        beta: β, (B, m) or (B, 1).
        mask: (B, K) bool, true where an item exists; None for all.
        normalize: Divide labels by their sum over the list.

    Returns:
        (B, m), nats; 0 for lists of fewer than two items.
    """

    def one(u: Tensor, b: int, j: int, items: Tensor) -> Tensor:
        z = labels[b, j, items].to(u.dtype)
        if normalize:
            if z.sum() <= 0:
                return u.new_zeros(())
            z = z / z.sum()
        # -log softmax_i = log(1 + sum_{k != i} exp(u_k) / exp(u_i)): no digit is lost where softmax_i is nearly 1.
        terms = []
        for i in range(len(u)):
            others = torch.cat([u[:i], u[i + 1 :]])
            # Differences come before the sum: beside 1e30 a sum of three equal scores would lose its log(3).
            top = others.detach().max()
            top = top if bool(top.isfinite()) else torch.zeros_like(top)
            rest = _logsumexp(others - top) + (top - u[i])
            if z[i] != 0 or z.requires_grad:
                terms.append(z[i] * _softplus(rest))
        return torch.stack(terms).sum() if terms else u.new_zeros(())

    return _each_list(scores, labels.shape[1], beta, mask, one)


# ---------------------------------------------------------------------------------------------------------------------
# Plackett-Luce


@renamed_keywords(temperature="beta")
def plackett_luce_nll(
    scores: Tensor,
    labels: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    order: Tensor | None = None,
    position_weights: Tensor | None = None,
    top_k: int | None = None,
    ties: str = "breslow",
    last_group_free: bool = False,
) -> Tensor:
    """Return -log P(ranking by `labels`) under Plackett-Luce: the sum over groups of equal labels, best first.

    Plackett 1975, Luce 1959; Breslow 1974 and Efron 1977 for ties; "exact" sums the probability over all orders of a
    tied group by recursion over its subsets, so its cost is exponential in the size of the group.

    Args:
        scores: (B, K).
        labels: (B, m, K).
        beta: β, (B, m) or (B, 1).
        mask: (B, K) bool, true where an item exists; None for all.
        order: (B, m, K) items best first, instead of an order by label.
        position_weights: (K,) or (B, m, K), the weight of the choice at each position; tied items take their mean.
        top_k: Only the first k ranks count.
        ties: "breslow", "efron" or "exact".
        last_group_free: Whether the worst group of equal labels adds no term.

    Returns:
        (B, m), nats; 0 for lists of fewer than two items.
    """
    weights = position_weights if position_weights is not None else torch.ones(scores.shape[1], dtype=scores.dtype)
    weights = weights.expand(labels.shape)
    tied_loss = {"breslow": _breslow, "efron": _efron, "exact": _exact}[ties]

    def one(u: Tensor, b: int, j: int, items: Tensor) -> Tensor:
        place = torch.empty(scores.shape[1], dtype=torch.int64)
        place[labels[b, j].argsort(descending=True, stable=True) if order is None else order[b, j].long()] = (
            torch.arange(scores.shape[1])
        )
        best_first = place[items].argsort()
        u, z = u[best_first], labels[b, j, items][best_first]
        starts = [k for k in range(len(u)) if k == 0 or z[k] != z[k - 1]]
        ends = [*starts[1:], len(u)]
        total = u.new_zeros(())
        for start, end in zip(starts, ends, strict=True):
            free = last_group_free and end == len(u)
            if not free and (top_k is None or start < top_k):
                weight = weights[b, j, start:end].to(u.dtype).mean()
                group_loss = _choice if end - start == 1 else tied_loss
                total = total + weight * group_loss(u[start:end], u[end:])
        return total

    return _each_list(scores, labels.shape[1], beta, mask, one)


def _choice(u: Tensor, below: Tensor) -> Tensor:
    """Return -log P(an item with utility u (1,) is chosen before the items below)."""
    return _softplus(_logsumexp(below) - u[0]) if len(below) else u.new_zeros(())


def _breslow(group: Tensor, below: Tensor) -> Tensor:
    return len(group) * _logsumexp(torch.cat([group, below])) - group.sum()


def _efron(group: Tensor, below: Tensor) -> Tensor:
    shares = 1 - torch.arange(len(group), dtype=group.dtype) / len(group)
    denominators = [_logsumexp(torch.cat([group + share.log(), below])) for share in shares]
    return torch.stack(denominators).sum() - group.sum()


def _exact(group: Tensor, below: Tensor) -> Tensor:
    if not len(below):
        return group.new_zeros(())

    @cache
    def log_probability(subset: frozenset[int]) -> Tensor:
        """Return log P(the items of `subset` come, in any order, before all items below)."""
        if not subset:
            return group.new_zeros(())
        choices = []
        for i in sorted(subset):
            others = torch.cat([group[sorted(subset - {i})], below])
            choices.append(-_choice(group[i : i + 1], others) + log_probability(subset - {i}))
        return _logsumexp(torch.stack(choices))

    return -log_probability(frozenset(range(len(group))))


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of a list


@renamed_keywords(temperature="beta")
def pairwise_logistic(
    scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None = None, margin: Tensor | None = None
) -> Tensor:
    """Return the sum of -log sigmoid(u_i - u_j - margin) over label_i > label_j; Burges et al. 2005 (RankNet).

    Args:
        scores: (B, K).
        labels: (B, m, K).
        beta: β, (B, m) or (B, 1).
        mask: (B, K) bool, true where an item exists; None for all.
        margin: γ, (B, m) or (B, 1), in nats; None for 0.

    Returns:
        (B, m), nats; 0 for lists of fewer than two items.
    """

    def one(u: Tensor, b: int, j: int, items: Tensor) -> Tensor:
        gamma = 0 if margin is None else margin.expand(labels.shape[:2])[b, j]
        return _sum_over_pairs(u, labels[b, j, items], lambda high, low: _softplus(u[low] - u[high] + gamma))

    return _each_list(scores, labels.shape[1], beta, mask, one)


@renamed_keywords(temperature="beta")
def lambda_loss(
    scores: Tensor,
    labels: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    gain: str = "exponential",
    normalize: bool = False,
    top_k: int | None = None,
    top_k_rule: str = "either",
) -> Tensor:
    """Return the pairwise logistic loss weighted by |G_i - G_j| |1/log2(1 + rank_i) - 1/log2(1 + rank_j)|.

    Liu et al. 2024 (LiPO-lambda); with `normalize` Burges 2010 (LambdaRank). Ranks are by u, ties by position.

    Args:
        scores: (B, K).
        labels: (B, m, K).
        beta: β, (B, m) or (B, 1).
        mask: (B, K) bool, true where an item exists; None for all.
        gain: "exponential", 2^label - 1, or "linear".
        normalize: Divide by the DCG of the best order.
        top_k: Cut of the ranks.
        top_k_rule: Whether "either" item of a pair, or "both", must rank within `top_k`.

    Returns:
        (B, m); 0 for lists of fewer than two items.
    """

    def one(u: Tensor, b: int, j: int, items: Tensor) -> Tensor:
        gains = _gain(labels[b, j, items].to(u.dtype), gain).tolist()
        place = u.argsort(descending=True, stable=True).tolist()
        rank = [place.index(i) + 1 for i in range(len(place))]
        cut = len(rank) if top_k is None else top_k
        ideal = sum(g / math.log2(i + 2) for i, g in enumerate(sorted(gains, reverse=True)[:cut])) if normalize else 1
        if ideal <= 0:
            return u.new_zeros(())

        def pair(high: int, low: int) -> Tensor:
            if (max if top_k_rule == "both" else min)(rank[high], rank[low]) > cut:
                return u.new_zeros(())
            swap = abs(1 / math.log2(1 + rank[high]) - 1 / math.log2(1 + rank[low]))
            return abs(gains[high] - gains[low]) * swap / ideal * _softplus(u[low] - u[high])

        return _sum_over_pairs(u, labels[b, j, items], pair)

    return _each_list(scores, labels.shape[1], beta, mask, one)


@renamed_keywords(temperature="beta")
def approx_ndcg(
    scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None = None, gain: str = "exponential"
) -> Tensor:
    """Return 1 - NDCG with rank_i = 1 + sum_{j != i} sigmoid(u_j - u_i), 0 for equal labels; Qin, Liu, Li 2010.

    Args:
        scores: (B, K).
        labels: (B, m, K).
        beta: β, (B, m) or (B, 1).
        mask: (B, K) bool, true where an item exists; None for all.
        gain: "exponential", 2^label - 1, or "linear".

    Returns:
        (B, m), from 0 to 1; 0 for lists of fewer than two items.
    """

    def one(u: Tensor, b: int, j: int, items: Tensor) -> Tensor:
        z = labels[b, j, items].to(u.dtype)
        gains = _gain(z, gain)
        ideal = float(sum(g / math.log2(i + 2) for i, g in enumerate(gains.sort(descending=True).values)))
        if z.max() == z.min() or ideal <= 0:
            return u.new_zeros(())
        ranks = [0.5 + torch.sigmoid(u - u[i]).sum() for i in range(len(u))]
        dcg = torch.stack([g / torch.log2(1 + rank) for g, rank in zip(gains, ranks, strict=True)]).sum()
        return 1 - dcg / ideal

    return _each_list(scores, labels.shape[1], beta, mask, one)


def _gain(labels: Tensor, gain: str) -> Tensor:
    return labels if gain == "linear" else 2**labels - 1


def _sum_over_pairs(u: Tensor, labels: Tensor, loss: Callable[[int, int], Tensor]) -> Tensor:
    n = range(len(u))
    return sum((loss(i, j) for i in n for j in n if labels[i] > labels[j]), u.new_zeros(()))


# ---------------------------------------------------------------------------------------------------------------------
# Trade-offs


def mixture_of_objectives(
    scores: Tensor,  # (B, K, m)
    weights: Tensor,  # (B, m)
    beta: Tensor,  # (B, m)
    mask: Tensor | None = None,
) -> Tensor:  # (B, K)
    """Return (1/b) log sum_j v_j softmax(b h_j) over the items of each list, 0 in masked places.

    v_j is w_j beta_j² / sum_k w_k beta_k², and b is sum_j v_j beta_j. With one beta, v is w, b is beta, and scores h_j
    that minimise the listwise cross-entropy of their own labels give those that minimise the weighted sum.
    """
    batch, size, objectives = scores.shape
    rows = scores.new_zeros(batch, size)
    for i in range(batch):
        items = torch.arange(size) if mask is None else mask[i].nonzero()[:, 0]
        shares = weights[i] * beta[i] ** 2
        shares = shares / shares.sum()
        b = (shares * beta[i]).sum()
        terms = []
        for j in range(objectives):
            if len(items) and shares[j] > 0:
                h = b * scores[i, items, j]
                terms.append(shares[j].log() + h - _logsumexp(h))
        if terms:
            each = torch.stack([_logsumexp(of_item) for of_item in torch.stack(terms, 1)])
            rows = rows.index_put((torch.tensor(i), items), each / b)
    return rows
