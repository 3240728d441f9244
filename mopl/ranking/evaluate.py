"""What a trained method reaches: every figure of its front, with intervals over queries, on held-out lists.

Shapes: `Q` lists, `n` trade-offs, `m` objectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mopl import steering
from mopl._arguments import check_positive
from mopl._renamed import renamed, renamed_keywords
from mopl.experiments.cos_dpo import ListLoss
from mopl.ranking.batch import Batch
from mopl.ranking.data import RankingData
from mopl.ranking.methods import Policy, Scorer
from mopl.ranking.metrics import ndcg
from mopl.ranking.synthetic import distance_to_optimum, expected_losses, true_scores
from mopl.report import Metric

# Items of one forward pass, padding included: large enough to keep a processor busy, small enough for any memory.
ITEMS_PER_BATCH = 16_384


@dataclass(frozen=True)
class Measure:
    """How rankings are measured; the defaults are the paper's conventions, see `mopl.ranking.metrics`."""

    k: int = 10  # cut of NDCG
    gain: Literal["linear", "exponential"] = "linear"
    empty: Literal["skip", 0, 1] = "skip"  # what a list without any label counts

    def __post_init__(self) -> None:
        object.__setattr__(self, "gain", renamed("gain", self.gain, stacklevel=4))

    def ndcg(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Return NDCG per list: (B,) for labels (B, K), (B, m) for labels (B, m, K); NaN where a list is skipped."""
        return ndcg(scores, labels, mask=mask, k=self.k, gain=self.gain, empty=self.empty).values

    def metric(self, empty_share: dict[str, float] | None = None) -> Metric:
        """Return the name and the conventions for reports."""
        empty = "empty queries skipped" if self.empty == "skip" else f"empty queries count {self.empty}"
        return Metric(f"NDCG@{self.k}", f"{self.gain} gain, ties averaged, {empty}", empty_share=empty_share)


@dataclass(frozen=True)
class Evaluation:
    """Figures of each list at each trade-off."""

    weights: Tensor | None  # (n, m), or None for a policy without a trade-off
    main: Tensor  # (Q, n) NDCG of the main objective, NaN where a list is skipped
    auxiliary: Tensor  # (Q, n, m) NDCG of the auxiliary objectives, NaN likewise
    losses: Tensor  # (n, m) mean held-out loss of each objective
    scores: Tensor  # (n, N) the scores of all items


@torch.no_grad()
def reference_scores(scorer: Any, data: RankingData, device: torch.device | str = "cpu") -> Tensor:
    """Return the scores (N,) that a model `scorer(features, mask) -> (B, K)` gives all items of the data."""
    batches = (lists.to(device) for lists in in_batches(data))
    return torch.cat([scorer(lists.features, lists.mask)[lists.mask].float().cpu() for lists in batches])


def score_items(
    scorer: Scorer, data: RankingData, reference: Tensor, *, scale: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the scores (N,) of all items of the data for one trade-off, `scale` being c of equation (14)."""
    parts = (scored(scorer, lists, data, reference, device) for lists in in_batches(data))
    return torch.cat([steering.rescale(scores, base, scale)[mask].float() for scores, base, mask in parts])


def in_batches(data: RankingData) -> Iterator[Batch]:
    """Yield every list once, in order, in batches of about `ITEMS_PER_BATCH` places."""
    yield from data.sequential(max(1, ITEMS_PER_BATCH // int(data.lengths.max())))


def scored(
    scorer: Scorer, lists: Batch, data: RankingData, reference: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores (0 in masked places), reference and mask of a batch, on the CPU."""
    base = data.pad(reference, lists.queries)
    there = lists.to(device)
    scores = scorer(there.features, there.mask, base.to(device)).detach().float().cpu()
    return scores.masked_fill(~lists.mask, 0.0), base, lists.mask


@renamed_keywords(temperature="beta", conditioned_on_temperature="conditioned_on_beta")
@torch.no_grad()
def evaluate(
    policy: Policy,
    data: RankingData,
    reference: Tensor,  # (N,)
    weights: Tensor | None,  # (n, m)
    *,
    measure: Measure,
    list_loss: ListLoss,
    beta: Sequence[float],
    conditioned_on_beta: bool = False,
    scales: Sequence[float] = (1.0,),
    device: torch.device | str = "cpu",
) -> list[Evaluation]:
    """Evaluate a policy on lists at each trade-off, and at each distance c from the base model (equation 14).

    `reference` (N,) are the base model's scores of the data; `weights` are None for a policy that takes none. β (m,) is
    that of the held-out losses, and of the scores if the policy takes β. Other scales cost no further pass of the
    model; there is one evaluation for each.
    """
    asked: list[Tensor | None] = [None] if weights is None else list(weights)
    betas = check_positive(beta, "beta").float()
    columns: list[list[tuple[Tensor, ...]]] = [[] for _ in scales]
    for w in asked:
        scorer = policy.at(w, betas if conditioned_on_beta else None)  # type: ignore[arg-type]
        parts: list[list[tuple[Tensor, ...]]] = [[] for _ in scales]
        for lists in in_batches(data):
            if list_loss.needs_order:
                lists = data.batch(lists.queries, order=True)
            scores, base, mask = scored(scorer, lists, data, reference, device)
            for found, scale in zip(parts, scales, strict=True):
                at_scale = steering.rescale(scores, base, scale)
                loss = list_loss(at_scale, lists, betas, base)
                figures = (measure.ndcg(at_scale, labels, mask) for labels in (lists.main, lists.labels))
                found.append((*figures, loss, at_scale[mask]))
        for column, found in zip(columns, parts, strict=True):
            column.append(tuple(torch.cat(each) for each in zip(*found, strict=True)))
    results = []
    for column in columns:
        main, auxiliary, losses, scores = (list(each) for each in zip(*column, strict=True))
        means = torch.stack([loss.double().mean(0) for loss in losses])
        results.append(Evaluation(weights, torch.stack(main, 1), torch.stack(auxiliary, 1), means, torch.stack(scores)))
    return results


@dataclass(frozen=True)
class TrueFront:
    """What the best possible scores of generated data reach at each trade-off, on the same lists."""

    auxiliary: Tensor  # (n, m) NDCG of the auxiliary objectives
    losses: Tensor  # (n, m) expected losses, in nats


def true_front(
    data: RankingData, reference: Tensor, weights: Tensor, beta: Sequence[float], measure: Measure
) -> TrueFront | None:
    """Return the true front, or None where it is not known: real data, or entries of β that are not equal."""
    if data.truth is None or len(set(beta)) > 1:
        return None
    auxiliary, losses = [], []
    for w in weights:
        scores = true_scores(data, w, beta[0], reference)
        parts = [measure.ndcg(data.pad(scores, lists.queries), lists.labels, lists.mask) for lists in in_batches(data)]
        auxiliary.append(torch.cat(parts).nanmean(0))
        losses.append(expected_losses(data, scores, beta[0], reference))
    return TrueFront(torch.stack(auxiliary), torch.stack(losses))


def distances_to_truth(
    evaluation: Evaluation, data: RankingData, reference: Tensor, beta: Sequence[float]
) -> list[float]:
    """Return, for each trade-off, how many nats of expected weighted loss its scores lose against the optimum."""
    assert evaluation.weights is not None
    pairs = zip(evaluation.scores, evaluation.weights, strict=True)
    return [distance_to_optimum(data, scores, w, beta[0], reference) for scores, w in pairs]


def check_measurable(data: RankingData, measure: Measure) -> dict[str, float]:
    """Return the share of lists without any label of each objective; a `ValueError` if there is nothing to measure."""
    if int(data.lengths.max()) < 2:
        raise ValueError(
            f"{data.name} has one item in each of its {len(data)} queries, so there is nothing to order; give all "
            "items of one search the same qid"
        )
    names = (objective.name for objective in (data.main, *data.objectives))
    shares = dict(zip(names, (1.0 - data.labelled.double().mean(0)).tolist(), strict=True))
    for name, share in shares.items():
        if share == 1.0 and measure.empty == "skip":
            raise ValueError(
                f"objective {name!r} has no label above 0 in any list of {data.name}, so there is nothing to measure: "
                f"{_why_empty(data, name)}"
            )
    return shares


def _why_empty(data: RankingData, name: str) -> str:
    """Say why no list has a label of an objective, and what to do."""
    place, objective = next((j, o) for j, o in enumerate((data.main, *data.objectives)) if o.name == name)
    raw = data.raw_main if place == 0 else data.raw_auxiliary[:, place - 1]
    remedy = "give other labels" if place == 0 else "give it other labels, or leave the objective out"
    if bool((raw != 0).any()):
        return f"within each list all of its labels are equal; {remedy}"
    if objective.column is None:
        return f"all of its labels are 0; {remedy}"
    return f"column {objective.column} is 0 in every line, or left out, which means 0; {remedy}"
