"""NDCG with its conventions as parameters; its intervals are those of `mopl.pareto.bootstrap_interval`.

Published NDCG values differ by convention more than by model: one ranking of 40 documents scores .911 with linear
gain, .813 with exponential gain and .778 by the script of MSLR. So every convention is an argument here, a result says
how many queries had no relevant document, and the defaults are those of COS-DPO's equation (22): linear gain, discount
1/log2(rank + 1), ties averaged, queries without any relevant document left out.

| who                          | gain        | discount | ties    | empty | short_lists |
|------------------------------|-------------|----------|---------|-------|-------------|
| COS-DPO, the default         | linear      | log2     | average | skip  | as_is       |
| scikit-learn, torchmetrics   | linear      | log2     | average | 0     | as_is       |
| trec_eval, ranx `ndcg`       | linear      | log2     | first   | 0     | as_is       |
| LightGBM, XGBoost, allRank   | exponential | log2     | first   | 1     | as_is       |
| Rax, ranx `ndcg_burges`      | exponential | log2     | first   | 0     | as_is       |
| CatBoost, type Exp           | exponential | log2     | worst   | 1     | as_is       |
| MSLR's eval-score-mslr.pl    | exponential | mslr     | first   | 0     | zero        |

Metrics are evaluation, not ops: they read values in order to check them, and compute in float64 whatever the input is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mopl._arguments import as_labels, check_choice, check_mask, check_scores, shape_of
from mopl._renamed import renamed

Gain = Literal["linear", "exponential"] | Callable[[Tensor], Tensor]
Discount = Literal["log2", "mslr"] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NDCG:
    """NDCG of each query, and which queries it stands for.

    Attributes:
        values: (B,) or (B, m) float64 in [0, 1]; NaN where the query is skipped, so that an average that forgets to
            leave it out shows.
        valid: bool like `values`; false where the query is skipped.
        empty: bool like `values`; true where no document of the query is relevant.
        k: The cut, None for the whole list.
    """

    values: Tensor
    valid: Tensor
    empty: Tensor
    k: int | None

    @property
    def empty_share(self) -> Tensor:
        """Share of queries without any relevant document: () or (m,), float64."""
        return self.empty.double().mean(0)

    def mean(self) -> Tensor:
        """Return the mean over the valid queries, () or (m,), float64; NaN where there is none."""
        return self.values.masked_fill(~self.valid, 0.0).sum(0) / self.valid.sum(0)

    def __str__(self) -> str:
        rows = zip(*(x.reshape(-1).tolist() for x in (self.mean(), self.valid.sum(0), self.empty_share)), strict=True)
        name = "NDCG" if self.k is None else f"NDCG@{self.k}"
        total = self.values.shape[0]
        return "\n".join(
            f"{name} {mean:.4f} over {count} of {total} queries ({share:.1%} without a relevant document)"
            for mean, count, share in rows
        )


def ndcg(
    scores: Tensor,  # (B, K)
    labels: Tensor,  # (B, K) or (B, m, K)
    *,
    k: int | None = 10,
    gain: Gain = "linear",
    discount: Discount = "log2",
    ties: Literal["average", "first", "worst"] = "average",
    empty: Literal["skip", 0, 1] = "skip",
    short_lists: Literal["as_is", "zero"] = "as_is",
    mask: Tensor | None = None,  # (B, K) bool
) -> NDCG:
    """Normalised discounted cumulative gain of each query (Järvelin and Kekäläinen 2002).

    NDCG@k = sum over ranks i <= k of gain(label at rank i) discount(i), divided by the same sum in the ideal order.

    Args:
        scores: (B, K) floating point; the ranking is by descending score.
        labels: (B, K), or (B, m, K) for m objectives; higher is better, gains must not be negative.
        k: The cut, or None for the whole list.
        gain: "linear" is the label itself, "exponential" is 2^label - 1, or a function of the labels (B, m, K).
        discount: "log2" is 1/log2(rank + 1); "mslr" leaves ranks 1 and 2 undiscounted and takes 1/log2(rank) from
            there on, like MSLR's script; or a function from ranks 1..K (a float64 vector) to factors.
        ties: What documents of equal score count: "average" is the mean over all their orders (as scikit-learn),
            "first" leaves them in the order of the input, "worst" puts the least relevant first (as CatBoost).
        empty: What a query counts whose ideal DCG is zero: "skip" leaves it out, or the value 0 or 1.
        short_lists: "as_is" computes a query with fewer than k documents like any other; "zero" counts it as 0 (as
            MSLR's script does).
        mask: (B, K), true where a document exists; what stands elsewhere is ignored, NaN included.

    Returns:
        An `NDCG`, whose `values` are (B,) for labels (B, K) and (B, m) for labels (B, m, K), float64.

    Raises:
        ValueError: If shapes disagree, a score or label is NaN, a gain is negative or overflows, or an option is
            unknown.
    """
    check_scores(scores)
    check_mask(mask, scores)
    gain = renamed("gain", gain)
    targets = as_labels(labels, scores).detach()
    check_choice(ties, ("average", "first", "worst"), "ties")
    check_choice(empty, ("skip", 0, 1), "empty")
    check_choice(short_lists, ("as_is", "zero"), "short_lists")
    if k is not None and k < 1:
        raise ValueError(f"k is {k} but must be at least 1; pass k=None for the whole list")

    exists = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    if scores.shape[1] == 0:  # one absent document instead of none, so that no reduction is over nothing
        exists = exists.new_zeros(len(scores), 1)
        scores, targets = scores.new_zeros(len(scores), 1), targets.new_zeros(*targets.shape[:2], 1)
    keys = scores.detach().double().masked_fill(~exists, -torch.inf)  # (B, K)
    _refuse(keys.isnan().any(-1), "scores hold NaN in list {}; did training diverge?")
    gains = _gains(targets.double().masked_fill(~exists[:, None], 0.0), gain).masked_fill(~exists[:, None], 0.0)

    factors = _discounts(scores.shape[1], k, discount).to(scores.device)  # (K,)
    order, factors_at_rank = _ranking(keys[:, None], gains, exists[:, None], factors, ties)
    dcg = (gains.take_along_dim(order, -1) * factors_at_rank).sum(-1)  # (B, m)
    ideal = (gains.sort(-1, descending=True).values * factors).sum(-1)

    is_empty = ideal <= 0
    values = dcg / ideal.masked_fill(is_empty, 1.0)
    if short_lists == "zero" and k is not None:
        values = values.masked_fill(exists.sum(-1, keepdim=True) < k, 0.0)
    values = values.masked_fill(is_empty, torch.nan if empty == "skip" else float(empty))
    valid = ~is_empty if empty == "skip" else torch.ones_like(is_empty)
    if labels.ndim == 2:
        values, valid, is_empty = values[:, 0], valid[:, 0], is_empty[:, 0]
    return NDCG(values, valid, is_empty, k)


def _refuse(bad: Tensor, message: str) -> None:
    """Raise with the first list for which `bad` is true, if there is one."""
    if bool(bad.any()):
        raise ValueError(message.format(int(bad.reshape(bad.shape[0], -1).any(-1).nonzero()[0, 0])))


def _gains(labels: Tensor, gain: Gain) -> Tensor:
    """Return the gains of labels (B, m, K), checked."""
    _refuse(labels.isnan().any(-1), "labels hold NaN in list {}; pass mask, or a number for a document without a label")
    if callable(gain):
        gains = gain(labels)
        if gains.shape != labels.shape:
            raise ValueError(f"gain returned shape {shape_of(gains)} for labels of shape {shape_of(labels)}")
        gains = gains.double()
    else:
        check_choice(gain, ("linear", "exponential"), "gain")
        gains = labels if gain == "linear" else torch.exp2(labels) - 1.0
    _refuse(
        ~gains.isfinite().all(-1),
        "gains of list {} are not finite: 2^label overflows for labels above 1023; pass gain='linear'",
    )
    _refuse((gains < 0).any(-1), "gains of list {} are negative; shift its labels so that the worst is 0")
    return gains


def _discounts(length: int, k: int | None, discount: Discount) -> Tensor:
    """Return the factor of each of `length` ranks as float64, zero beyond rank k."""
    ranks = torch.arange(1, length + 1, dtype=torch.float64)
    if callable(discount):
        factors = discount(ranks).double()
        if factors.shape != ranks.shape or not bool(factors.isfinite().all()):
            raise ValueError(f"discount must return {length} finite factors, one a rank, got {shape_of(factors)}")
    else:
        check_choice(discount, ("log2", "mslr"), "discount")
        factors = 1.0 / torch.log2(ranks + 1.0 if discount == "log2" else ranks.clamp_min(2.0))
    return factors if k is None else factors * (ranks <= k)


def _ranking(
    scores: Tensor,  # (B, 1, K), -inf where there is no document
    gains: Tensor,  # (B, m, K)
    exists: Tensor,  # (B, 1, K)
    factors: Tensor,  # (K,)
    ties: str,
) -> tuple[Tensor, Tensor]:
    """Return the order of the documents, (B, 1 or m, K), and the factor that each rank counts with, broadcastable."""
    # Stable sorts, the least significant key first. Absent documents go last even behind a score of -inf.
    sorts: list[tuple[Tensor, bool]] = [(scores, True), ((~exists).to(scores.dtype), False)]
    if ties == "worst":
        sorts.insert(0, (gains, False))
        scores, exists = scores.expand_as(gains), exists.expand_as(gains)
    order = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    for key, descending in sorts:
        by_key = torch.sort(key.take_along_dim(order, -1), dim=-1, descending=descending, stable=True).indices
        order = order.take_along_dim(by_key, -1)
    if ties != "average":
        return order, factors

    # The mean over all orders of a tied group equals giving each of its documents the mean factor of its ranks.
    ascending = -scores.take_along_dim(order, -1)
    start = torch.searchsorted(ascending, ascending)
    stop = torch.searchsorted(ascending, ascending, right=True)
    stop = stop.minimum(exists.sum(-1, keepdim=True))  # a score of -inf is not tied with an absent document
    count = (stop - start).clamp(min=1)
    total = torch.cat([factors.new_zeros(1), factors.cumsum(0)])
    mean = (total[stop] - total[start]) / count
    return order, torch.where(count == 1, factors, mean)  # an untied document keeps its factor exactly
