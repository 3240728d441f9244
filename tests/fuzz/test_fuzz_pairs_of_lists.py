"""Pairwise logistic loss, LambdaLoss and ApproxNDCG on hostile lists, beside loops over pairs in fifty digits."""

from __future__ import annotations

from typing import Any

import torch
from hostile import broadcastable, budget
from hypothesis import given
from hypothesis import strategies as st
from list_losses import RANKED, Lists, check_losses, lists
from running import Real, absolute, exp, expm1, log, real, sigmoid, softplus, total

from mopl.losses import approx_ndcg, lambda_loss, pairwise_logistic


def _pairs(case: Lists, b: int, j: int, exists: list[int]) -> list[tuple[int, int]]:
    labels = case.labels_of(b, j)
    return [(i, k) for i in exists for k in exists if labels[i] > labels[k]]


def _scaled(exists: list[int], x: list[Real], rate: float) -> dict[int, Real]:
    """Return u = rate * x less an offset that all share, which rounds each score by its own last digit at most."""
    least = min(exists, key=lambda i: abs(x[i].value))
    return {i: rate * (x[i] - x[least]) for i in exists}


def _logistic(pairs: dict[tuple[int, int], Real], exists: list[int], x: list[Real], rate: float, margin: float) -> Any:
    """Return the weighted sum of softplus(-(u_i - u_k - margin)), its gradient by u, and by the margin."""
    u = _scaled(exists, x, rate)
    gap = {(i, k): u[i] - u[k] - margin for i, k in pairs}
    loss = total(w * softplus(-gap[pair]) for pair, w in pairs.items())
    push = {pair: w * sigmoid(-gap[pair]) for pair, w in pairs.items()}
    by_u = {
        i: total([-p for (a, _), p in push.items() if a == i] + [p for (_, c), p in push.items() if c == i])
        for i in exists
    }
    return loss, by_u, None, total(push.values())


def ranknet(case: Lists, b: int, j: int, exists: list[int], x: list[Real], rate: float) -> Any:
    """Burges et al. 2005: cross-entropy of every pair whose order is known."""
    margin = torch.as_tensor(case.margin, dtype=torch.float64).expand(case.shape[:2])[b, j]
    return _logistic({pair: real(1) for pair in _pairs(case, b, j, exists)}, exists, x, rate, float(margin))


@budget(60)
@given(lists(RANKED), st.data())
def test_pairwise_logistic_by_pairs(case: Lists, data: st.DataObject) -> None:
    case.margin = data.draw(broadcastable(*case.shape[:2], [0.0, 0.5, -1.0, 10.0, 300.0], case.dtype))
    check_losses(case, pairwise_logistic, ranknet)


def _gain(label: float, gain: str) -> Real:
    return real(label) if gain == "linear" else expm1(real(label) * log(real(2)))


def lambdarank(case: Lists, b: int, j: int, exists: list[int], x: list[Real], rate: float) -> Any:
    """Burges 2010, with LiPO's weights (2402.01878): |G_i - G_k| |1/log2(1 + rank_i) - 1/log2(1 + rank_k)|."""
    options, labels = case.options, case.labels_of(b, j)
    # Ranks are those of the difference as the dtype holds it.
    held = (case.scores.to(case.dtype) - (0 if case.reference is None else case.reference.to(case.dtype)))[b].tolist()
    order = sorted(exists, key=lambda i: -held[i])
    rank = {i: 1 + r for r, i in enumerate(order)}
    gains = {i: _gain(labels[i], options["gain"]) for i in exists}
    discount = {i: 1 / (log(real(1 + rank[i])) / log(real(2))) for i in exists}
    cut = options["top_k"] or len(exists)
    scale = real(1)
    if options["normalize"]:
        best = sorted(exists, key=lambda i: -labels[i])[:cut]
        scale = total(gains[i] / (log(real(2 + r)) / log(real(2))) for r, i in enumerate(best))
        if not scale.value > 0:
            return real(0), {i: real(0) for i in exists}, None, real(0)
    keep = any if options["top_k_rule"] == "either" else all
    pairs = {
        (i, k): absolute(gains[i] - gains[k]) / scale * absolute(discount[i] - discount[k])
        for i, k in _pairs(case, b, j, exists)
        if keep(rank[n] <= cut for n in (i, k))
    }
    return _logistic(pairs, exists, x, rate, 0.0)


GRADES = {"binary": [0.0, 1.0], "grades": [0.0, 1.0, 2.0, 3.0, 4.0], "shares": [0.0, 0.1, 0.25, 1 / 3, 0.9],
          "many": [0.0, 7.0, 20.0, 100.0]}  # fmt: skip


@budget(60)
@given(
    lists(GRADES),
    st.fixed_dictionaries(
        {
            "gain": st.sampled_from(["linear", "exponential"]),
            "normalize": st.booleans(),
            "top_k": st.none() | st.integers(1, 7),
            "top_k_rule": st.sampled_from(["either", "both"]),
        }
    ),
)
def test_lambda_loss_by_pairs(case: Lists, options: dict[str, Any]) -> None:
    case.options = options
    check_losses(case, lambda_loss, lambdarank)


def smooth_ndcg(case: Lists, b: int, j: int, exists: list[int], x: list[Real], rate: float) -> Any:
    """Qin, Liu, Li 2010: 1 - NDCG with rank_i = 1 + sum_k sigmoid(u_k - u_i)."""
    labels, gain = case.labels_of(b, j), case.options["gain"]
    # 2^-h G, for the largest label h: the ratio is the same, and labels of any size have a finite gain.
    high = real(max(0.0, *(float(labels[i]) for i in exists))) * log(real(2))
    gains = {i: real(labels[i]) if gain == "linear" else _scaled_gain(labels[i], high) for i in exists}
    slope = {
        i: real(1) if gain == "linear" else log(real(2)) * exp(real(labels[i]) * log(real(2)) - high) for i in exists
    }
    order = sorted(exists, key=lambda i: -labels[i])
    place = {i: real(2 + r) for r, i in enumerate(order)}
    ideal = total(gains[i] * log(real(2)) / log(place[i]) for i in exists)
    if len({labels[i] for i in exists}) < 2 or not ideal.value > 0:
        return real(0), {i: real(0) for i in exists}, {i: real(0) for i in exists}
    u = _scaled(exists, x, rate)
    gap = {(i, k): u[k] - u[i] for i in exists for k in exists if i != k}
    rank = {i: 1 + total(sigmoid(gap[i, k]) for k in exists if k != i) for i in exists}
    inverse = {i: log(real(2)) / log(1 + rank[i]) for i in exists}
    dcg = total(gains[i] * inverse[i] for i in exists)
    loss = 1 - dcg / ideal
    c = {i: gains[i] / ideal * inverse[i] / (log(1 + rank[i]) * (1 + rank[i])) for i in exists}
    by_u = {
        i: total((c[k] - c[i]) * sigmoid(gap[i, k]) * sigmoid(-gap[i, k]) for k in exists if k != i) for i in exists
    }
    by_label = {
        i: slope[i] * (dcg / ideal * log(real(2)) / log(place[i]) - inverse[i]) / ideal
        if [labels[k] for k in exists].count(labels[i]) == 1  # the order of equal labels, and so their place, is free
        else None
        for i in exists
    }
    return loss, by_u, by_label


def _scaled_gain(label: float, high: Real) -> Real:
    power = real(label) * log(real(2))
    return exp(power - high) - exp(-high) if label > 1 else exp(-high) * expm1(power)


@budget(60)
@given(lists(GRADES | {"huge": [0.0, 1.0, 500.0, 1000.0, 30000.0]}), st.sampled_from(["linear", "exponential"]))
def test_approx_ndcg_by_pairs(case: Lists, gain: str) -> None:
    case.options = {"gain": gain}
    check_losses(case, approx_ndcg, smooth_ndcg)
