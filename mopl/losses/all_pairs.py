"""Losses over all pairs of a list: pairwise logistic (RankNet), LambdaLoss (LiPO-λ), and ApproxNDCG.

Scores are (B, K), labels (B, K) or (B, m, K) with higher better, and u = beta * (scores - reference). Time is
O(K²) a list and objective, memory O(K): see `mopl.ops.pairs`. A pair counts where the labels differ; lists with fewer
than two items, or with equal labels only, have loss 0 and gradient 0. Masked items are never read into arithmetic.
A score of NaN at an existing item makes the losses of its list NaN and of no other. On a CPU an error is raised by a β
that is not positive, a weight that is not finite, a label of NaN, and, where NDCG is computed, one that is negative or
infinite; on a GPU, where reading would wait, and under `torch.compile` each makes its losses NaN (an infinite weight:
infinite).

    >>> scores, labels = torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> pairwise_logistic(scores, labels)     # log(1 + e^-1) + log(1 + e^2) + log(1 + e^-2) + log(1 + e^1)
    tensor(3.8804)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mopl._arguments import (
    KNOWN,
    NOT_INFINITE,
    Domain,
    Reduction,
    as_labels,
    check_choice,
    compute_dtype,
    or_nan,
    readable,
    weigh_and_reduce,
    wide_dtype,
)
from mopl._renamed import renamed_keywords
from mopl.losses._scores import prepare, shared_by_objectives
from mopl.losses.labels import integer_differences, large_integers, not_negative
from mopl.ops import pairs

Gain = Literal["exponential", "linear"]
GAINS = ("exponential", "linear")
SHIFT = (
    "shift each list's labels so that the lowest is 0, or pass them to pairwise_logistic, plackett_luce or "
    "listwise_dpo with normalize='softmax', which take any real numbers"
)


@renamed_keywords(temperature="beta")
def pairwise_logistic(
    scores: Tensor,  # (B, K)
    labels: Tensor,  # (B, K) or (B, m, K)
    *,
    reference: Tensor | None = None,  # (B, K)
    beta: float | Tensor = 1.0,  # broadcasts to (B, m)
    weights: float | Tensor | None = None,  # broadcasts to (B, m)
    mask: Tensor | None = None,  # (B, K) bool
    margin: float | Tensor = 0.0,  # broadcasts to (B, m)
    reduction: Reduction = "mean",
) -> Tensor:
    """Return the sum of -log sigmoid(u_i - u_j - margin) over all pairs with label_i > label_j.

    RankNet (Burges et al. 2005) without its scale; with two items, Bradley–Terry and DPO. It is a sum over pairs: a
    mean is this with `weights` of one over the number of pairs.

    Args:
        scores: (B, K), log-probabilities or a ranker's output. Differentiable.
        labels: (B, K) or (B, m, K), any real numbers, infinite ones included: only their order within a list counts.
        reference: (B, K), the scores of the base model; None means 0. Differentiable.
        beta: β > 0, a number, (m,), (B, 1) or (B, m). Differentiable.
        weights: what each loss is multiplied by, of any sign, shaped like `beta`. Differentiable.
        mask: (B, K), true where an item exists; None means everywhere.
        margin: γ in nats, shaped like `beta`. Differentiable.
        reduction: "none" for (B, m), "sum", or "mean" over lists of the sum over objectives.

    Returns:
        (B, m) in nats, or a scalar; float32, or float64 for float64 scores.

    Raises:
        TypeError: scores are not floating point or the mask is not bool.
        ValueError: shapes do not fit, or a β is not positive; the message says which and what to pass.
    """
    _, u, y, rate = _prepare(scores, labels, reference, beta, mask, KNOWN)
    loss = pairs.pairwise_logistic(u, _ranked(labels, y, mask), shared_by_objectives(margin, "margin", y, u, KNOWN))
    return weigh_and_reduce(or_nan(pairs.or_infinite(loss, rate), y, mask), weights, reduction)


@renamed_keywords(temperature="beta")
def lambda_loss(
    scores: Tensor,  # (B, K)
    labels: Tensor,  # (B, K) or (B, m, K)
    *,
    reference: Tensor | None = None,  # (B, K)
    beta: float | Tensor = 1.0,  # broadcasts to (B, m)
    weights: float | Tensor | None = None,  # broadcasts to (B, m)
    mask: Tensor | None = None,  # (B, K) bool
    gain: Gain = "exponential",
    normalize: bool = False,
    top_k: int | None = None,
    top_k_rule: Literal["either", "both"] = "either",
    reduction: Reduction = "mean",
) -> Tensor:
    """Return LiPO-λ: the pairwise logistic loss, each pair weighted by what swapping it would change in DCG.

        sum over label_i > label_j of  |G_i - G_j| |1/log2(1 + rank_i) - 1/log2(1 + rank_j)|  (-log sigmoid(u_i - u_j))

    Liu et al. 2024, LiPO (2402.01878); LambdaRank (Burges 2010) where `normalize` is true. Ranks are those of the
    present scores - reference, 1 the best, equal scores in order of position (as in LightGBM). The pair weights are
    constants, as in the papers, so that labels get no gradient. Another base of the logarithm only scales the loss.

    Args:
        scores: (B, K), log-probabilities or a ranker's output. Differentiable.
        labels: (B, K) or (B, m, K), any real numbers; not negative with `normalize`.
        reference: (B, K), the scores of the base model; None means 0. Differentiable.
        beta: β > 0, a number, (m,), (B, 1) or (B, m). Differentiable.
        weights: what each loss is multiplied by, of any sign, shaped like `beta`. Differentiable.
        mask: (B, K), true where an item exists; None means everywhere.
        gain: "exponential" for G = 2^label - 1, "linear" for G = label. Without `normalize`, exponential gains are
            beyond float32 from labels of 128 on: take linear ones for counts and times.
        normalize: divide by the ideal DCG (of the top k), so that the weights are changes of NDCG. A list whose labels
            are all 0 contributes 0.
        top_k: leave out pairs beyond the k best ranked items; None keeps all.
        top_k_rule: keep a pair if "either" of its items is in the top k (LightGBM, XGBoost), or only if "both" are
            (allRank).
        reduction: "none" for (B, m), "sum", or "mean" over lists of the sum over objectives.

    Returns:
        (B, m), or a scalar; float32, or float64 for float64 scores.

    Raises:
        TypeError: scores are not floating point or the mask is not bool.
        ValueError: shapes do not fit, an option is unknown, a β is not positive, a label that differs from another
            of its list has an infinite gain, or with `normalize` one is negative; the message says which and what to
            pass.
    """
    check_choice(gain, GAINS, "gain")
    check_choice(top_k_rule, ("either", "both"), "top_k_rule")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k} but must be at least 1, or None for all items")
    x, u, y, rate = _prepare(scores, labels, reference, beta, mask, NOT_INFINITE if normalize else KNOWN)
    if normalize:
        y = _for_gains(y, mask)
    order = _ranked(labels, y, mask)
    with torch.no_grad():
        source = y
        if gain == "linear" and not normalize and order is not y:
            # Only differences of these gains count, and those of large labels are lost where each is rounded alone.
            source = _above_lowest(as_labels(labels, scores).detach(), order, mask).to(y.dtype)
        gains = _gains(source, gain, mask, scaled=normalize)
        if readable(gains) and bool((large := gains.isinf()).any()):
            highest, lowest = _extremes(order, mask)
            for place in (large & (highest > lowest)).nonzero()[:1].tolist():  # equal labels form no pair
                label = float(as_labels(labels, scores)[tuple(place)])
                others = "" if gain == "linear" else "pass gain='linear' or normalize=True, or "
                remedy = f"{others}divide the labels"
                if math.isinf(label):
                    remedy = "leave the item out with mask, or give it a finite label"
                raise ValueError(
                    f"labels of list {place[0]} hold {label:g}, whose gain is beyond {gains.dtype}; {remedy}"
                )
        if normalize:
            ideal = _ideal_dcg(gains, mask, top_k)
            gains = torch.where(ideal > 0, gains / torch.where(ideal > 0, ideal, 1), 0)
        ranks = _ranks(x, mask)
    loss = pairs.pairwise_logistic(
        u,
        order,
        u.new_zeros((y.shape[0], 1)),
        gains,
        1 / torch.log2(1 + ranks.double()),
        None if top_k is None else ranks <= top_k,
        top_k_rule == "both",
    )
    return weigh_and_reduce(or_nan(pairs.or_infinite(loss, rate), y, mask), weights, reduction)


@renamed_keywords(temperature="beta")
def approx_ndcg(
    scores: Tensor,  # (B, K)
    labels: Tensor,  # (B, K) or (B, m, K)
    *,
    reference: Tensor | None = None,  # (B, K)
    beta: float | Tensor = 1.0,  # broadcasts to (B, m)
    weights: float | Tensor | None = None,  # broadcasts to (B, m)
    mask: Tensor | None = None,  # (B, K) bool
    gain: Gain = "exponential",
    reduction: Reduction = "mean",
) -> Tensor:
    """Return 1 - NDCG with smooth ranks, rank_i = 1 + sum_{j != i} sigmoid(u_j - u_i).

        1 - (sum_i G_i / log2(1 + rank_i)) / (sum_i G_(i) / log2(1 + i)),   G_(1) >= G_(2) >= ...

    Qin, Liu, Li 2010, A general approximation framework for direct optimization of information retrieval measures.
    `beta` multiplies the scores: a smoothing temperature of 0.1, TF-Ranking's default, is `beta=10`.
    A large β approaches the metric and makes most gradients vanish.

    Args:
        scores: (B, K), log-probabilities or a ranker's output. Differentiable.
        labels: (B, K) or (B, m, K), gains of NDCG and therefore not negative. Differentiable where floating point.
        reference: (B, K), the scores of the base model; None means 0. Differentiable.
        beta: β > 0, a number, (m,), (B, 1) or (B, m). Differentiable.
        weights: what each loss is multiplied by, of any sign, shaped like `beta`. Differentiable.
        mask: (B, K), true where an item exists; None means everywhere.
        gain: "exponential" for G = 2^label - 1, which never overflows here, "linear" for G = label.
        reduction: "none" for (B, m), "sum", or "mean" over lists of the sum over objectives.

    Returns:
        (B, m), or a scalar; float32, or float64 for float64 scores. 0 where all labels of a list are equal.

    Raises:
        TypeError: scores are not floating point or the mask is not bool.
        ValueError: shapes do not fit, the gain is unknown, a β is not positive or a label negative; the
            message says which and what to pass.
    """
    check_choice(gain, GAINS, "gain")
    _, u, y, _ = _prepare(scores, labels, reference, beta, mask, NOT_INFINITE)
    y = _for_gains(y, mask)
    gains = _gains(y, gain, mask, scaled=True)
    ideal = _ideal_dcg(gains, mask, None)  # (B, m, 1)
    dcg = (gains / torch.log2(1 + pairs.smooth_ranks(u, mask))).sum(-1)
    highest, lowest = _extremes(y.detach(), mask)
    counts = (highest > lowest) & (ideal > 0)
    # Where a list does not count, 0 is selected before the division, so that its gradient is 0 and not NaN.
    loss = torch.where(counts[..., 0], 1 - dcg / torch.where(counts, ideal, 1)[..., 0], 0)
    return weigh_and_reduce(or_nan(loss, y, mask), weights, reduction)


def _prepare(
    scores: Tensor,
    labels: Tensor,
    reference: Tensor | None,
    beta: float | Tensor,
    mask: Tensor | None,
    allowed: Domain,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scores - reference (B, K), u (B, m or 1, K), labels (B, m, K), NaN where no item exists, and β."""
    x, y, rate = prepare(scores, labels, reference, beta, mask, allowed)
    dtype = compute_dtype(x)
    x = x.to(dtype)
    if mask is not None:
        x = torch.where(mask, x, 0)
    # Only differences count. Without a common offset the product with β, and its gradient, are exact.
    # The offset is the score of the smallest size: to subtract it rounds no score by more than its own last digit, so
    # that one large score costs the differences of the others nothing.
    centred = x
    if x.shape[1]:
        size = x.detach().abs()
        size = torch.where(size.isfinite() if mask is None else size.isfinite() & mask, size, math.inf)
        offset = x.detach().gather(1, size.argmin(1, keepdim=True))
        # The ranks are those of x itself: rounding the offset away could make scores equal that are not.
        centred = x - torch.where(offset.isfinite(), offset, 0)
    return x, pairs.times_beta(centred[:, None], rate[..., None]), _filled(y.to(dtype), mask, math.nan), rate


def _filled(values: Tensor, mask: Tensor | None, nothing: float) -> Tensor:
    """Return values (B, m, K) with `nothing` where no item exists."""
    return values if mask is None else torch.where(mask[:, None, :], values, nothing)


def _ranked(labels: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """Return labels (B, m, K) in the order of those given: not y where its dtype would make two of them equal."""
    exact = as_labels(labels, y[:, 0]).detach()
    if large_integers(exact):  # int64 fits no floating-point number: its ranks do, equal ones where labels are
        best, places = exact.long().sort(-1)
        steps = torch.zeros_like(best)
        steps[..., 1:] = best[..., 1:] != best[..., :-1]
        exact = torch.zeros_like(best).scatter(-1, places, steps.cumsum(-1)).to(y.dtype)
    elif exact.dtype == torch.float64 != y.dtype and wide_dtype(y.device) == torch.float64:
        exact = exact.double()
    else:
        return y
    return _filled(exact, mask, math.nan)


def _above_lowest(labels: Tensor, order: Tensor, mask: Tensor | None) -> Tensor:
    """Return labels (B, m, K) minus the lowest of their list, exact where the numbers themselves would be rounded."""
    if not large_integers(labels):
        lowest = _extremes(order, mask)[1]
        return order - torch.where(lowest.isfinite(), lowest, 0)
    labels = labels.long()
    existing = labels if mask is None else labels.masked_fill(~mask[:, None, :], torch.iinfo(torch.int64).max)
    lowest = existing.amin(-1, keepdim=True) if labels.shape[-1] else labels
    return _filled(integer_differences(labels, lowest, wide_dtype(labels.device)), mask, math.nan)


def _ranks(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return ranks (B, K) from 1 among the existing items, the highest score first, ties by position."""
    keyed = scores if mask is None else torch.where(mask, scores, -math.inf)
    order = keyed.argsort(dim=1, descending=True, stable=True)
    exists = torch.ones_like(order) if mask is None else mask.gather(1, order).long()
    return torch.zeros_like(order).scatter(1, order, exists.cumsum(1))


def _extremes(labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the highest and the lowest label of the existing items, (B, m, 1); -inf and inf where there are none."""
    if labels.shape[-1] == 0:
        empty = labels.new_full((*labels.shape[:2], 1), math.inf)
        return -empty, empty
    highest = _filled(labels, mask, -math.inf).amax(-1, keepdim=True)
    return highest, _filled(labels, mask, math.inf).amin(-1, keepdim=True)


def _for_gains(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Return labels (B, m, K) that NDCG is defined for: none is negative."""
    return _filled(not_negative(_filled(labels, mask, 0), "NDCG, whose gains they are", SHIFT), mask, math.nan)


def _gains(labels: Tensor, gain: str, mask: Tensor | None, scaled: bool) -> Tensor:
    """Return the gains (B, m, K), 0 where no item exists; `scaled` divides exponential ones by 2^(highest label).

    Whoever divides by the ideal DCG may scale, and then labels of any size have finite gains.
    """
    y = _filled(labels, mask, 0)
    if gain == "linear":
        return y
    if not scaled:
        return torch.expm1(y * math.log(2))
    highest = _extremes(labels.detach(), mask)[0].clamp(min=0)
    # 2^y - 1 = -2^y (2^-y - 1): the left factor takes the scale, the right one is exact for small labels.
    return -torch.exp2(y - highest) * torch.expm1(-y.clamp(min=-100) * math.log(2))


def _ideal_dcg(gains: Tensor, mask: Tensor | None, top_k: int | None) -> Tensor:
    """Return the DCG of the best order of the existing items, of its first `top_k` of them, as (B, m, 1)."""
    # Behind all others a place without an item takes no position from an item whose gain is 0.
    keyed = _filled(gains.detach(), mask, -math.inf)
    best = gains.gather(-1, keyed.argsort(dim=-1, descending=True, stable=True))[..., :top_k]
    positions = torch.arange(2, best.shape[-1] + 2, device=best.device, dtype=best.dtype)
    return (best / torch.log2(positions)).sum(-1, keepdim=True)
