"""What a trained method reaches on held-out lists at each trade-off: losses, accuracy, distance from the reference.

Shapes: `Q` lists, `S` responses, `n` trade-offs, `m` objectives.

* *Loss*: the training loss of each objective, mean over the lists in which it counts, in nats. Lower is better.
* *Accuracy*: share of the pairs of responses with different labels whose implicit rewards β (log p - log p0) are
  ordered as the labels are; ties count half. The untrained model has 0.5.
* *Divergence*, of `distill`: what its training loss adds up, between each teacher and the student at each trade-off.
* *Deviation*: log p - log p0 of a response, in nats. Its mean and quartiles tell how far a model went, and the mean of
  its absolute value over responses is the main figure of a front: fidelity to the reference, lower is better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopl import steering
from mopl.experiments.response_loss import ResponseLoss
from mopl.language_models.collate import ListBatch, ListCollator
from mopl.language_models.scoring import ListScores, ordered_pairs, response_lengths
from mopl.language_models.tokenization import TokenizedList
from mopl.pareto import spearman

MAIN = "deviation"
LISTS_PER_BATCH = 256
# The paper's reference point is 1.1 for losses on pairs, where the untrained model's loss is ln 2.
REFERENCE_FACTOR = 1.1 / 0.6931471805599453


@dataclass(frozen=True)
class Evaluation:
    """Figures at each trade-off; NaN where an objective does not count in a list."""

    weights: Tensor | None  # (n, m), or None for a model without a trade-off
    losses: Tensor  # (Q, n, m) loss of each list, in nats
    deviation: Tensor  # (Q, n) mean of |log p - log p0| over the responses of a list, in nats
    right: Tensor  # (Q, n, m) pairs with different labels that are ordered as the labels are
    pairs: Tensor  # (Q, m) pairs with different labels
    log_ratio: Tensor  # (n, S) log p - log p0 of each response
    # (n, m) divergence to each teacher, in nats, mean over the tokens of a response and over responses; of distill
    divergence: Tensor | None = None
    base_divergence: Tensor | None = None  # (m,) the same of the model before training

    @property
    def mean_losses(self) -> Tensor:
        """(n, m) mean over the lists in which an objective counts."""
        return self.losses.nanmean(0)

    @property
    def accuracy(self) -> Tensor:
        """(n, m) share of pairs that are ordered rightly; NaN for an objective without such pairs."""
        return self.right.sum(0) / self.pairs.sum(0)

    def summary(self, objectives: Sequence[str]) -> dict[str, Any]:
        """Return what `evaluation.json` holds: the figures of each trade-off."""
        quartiles = torch.quantile(self.log_ratio, torch.tensor([0.25, 0.5, 0.75], dtype=self.log_ratio.dtype), dim=1)
        figures: dict[str, Any] = {
            "objectives": list(objectives),
            "weights": None if self.weights is None else self.weights.tolist(),
            "losses": self.mean_losses.tolist(),
            "accuracy": _without_nan(self.accuracy),
            "pairs": self.pairs.sum(0).tolist(),
            "log_ratio": {
                "mean": self.log_ratio.mean(1).tolist(),
                "quartiles": quartiles.T.tolist(),
                "mean_absolute": self.deviation.mean(0).tolist(),
            },
        }
        if self.weights is not None and len(self.weights) > 1:
            figures["spearman"] = {
                # How surely more weight gives more of an objective; losses are negated, so 1 is perfect in both.
                "loss": [spearman(w, -loss) for w, loss in zip(self.weights.T, self.mean_losses.T, strict=True)],
                "accuracy": [
                    None if bool(found.isnan().any()) else spearman(w, found)
                    for w, found in zip(self.weights.T, self.accuracy.T, strict=True)
                ],
            }
        return figures

    def measures(self) -> dict[str, dict[str, float]]:
        """Return `Front.measures`: of `distill` the divergence to the teachers, weighted by w, mean over the grid."""
        if self.weights is None or self.divergence is None or self.base_divergence is None:
            return {}
        student, base = (
            (self.weights * d.to(self.weights)).sum(1).mean() for d in (self.divergence, self.base_divergence)
        )
        return {"Divergence to teachers (nats)": {"value": float(student), "base": float(base)}}

    def notes(self, objectives: Sequence[str]) -> list[str]:
        """Return what stands below the table of a trained method, what it was trained for first.

        Of `distill` that is the divergence to the teachers. The accuracy of an objective is that of the trade-off with
        the most weight on it.
        """
        if self.weights is None:
            return []
        found, best = [], self.weights.argmax(0).tolist()
        if self.divergence is not None and self.base_divergence is not None:
            each = ", ".join(
                f"{name} {float(self.divergence[at, j]):.4f} (base {float(self.base_divergence[j]):.4f})"
                for j, (name, at) in enumerate(zip(objectives, best, strict=True))
            )
            found.append(
                "divergence to the teachers on held-out responses, a mean over tokens, weighted by w in the table; "
                f"where an objective has the most weight, to its teacher: {each}"
            )
        share = [float(self.accuracy[at, j]) for j, at in enumerate(best)]
        each = ", ".join(
            f"{name} {100 * value:.1f} %" if value == value else f"{name} n/a"
            for name, value in zip(objectives, share, strict=True)
        )
        if not all(value != value for value in share):
            found.append(
                "accuracy on held-out pairs of responses (50 % before training), where the objective has the most "
                f"weight: {each}"
            )
        return found


def _without_nan(values: Tensor) -> list[list[float | None]]:
    return [[None if x != x else x for x in row] for row in values.tolist()]


class HeldOut:
    """Held-out lists without their tokens: what figures are computed from once scores are known.

    Args:
        lists: The tokenised lists.
        collator: Makes the batches.
        loss: The loss of each objective.
        beta: β (m,) of the loss.
        reference: Log-probabilities of the reference.

    Raises:
        ValueError: If an objective counts in none of the lists.
    """

    def __init__(
        self,
        lists: Sequence[TokenizedList],
        collator: ListCollator,
        loss: ResponseLoss,
        beta: Tensor,
        reference: ListScores,
        objectives: Sequence[str],
    ) -> None:
        self.loss, self.beta, self.reference, self.lists = loss, beta, reference, lists
        self.batches: list[tuple[ListBatch, Tensor]] = []
        for first in range(0, len(lists), LISTS_PER_BATCH):
            batch = collator(lists[first : first + LISTS_PER_BATCH])
            self.batches.append((dataclasses.replace(batch, inputs={}), response_lengths(batch).clamp(min=1)))
        counts = torch.cat([batch.objective_mask for batch, _ in self.batches]).sum(0)
        for name, count in zip(objectives, counts.tolist(), strict=True):
            if count == 0:
                raise ValueError(
                    f"objective {name!r} has no labels in any held-out list, so there is nothing to measure; raise "
                    "held_out, take another data_seed, or leave the objective out"
                )

    def figures(self, flat: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
        """Return losses (Q, m), deviation (Q,), right (Q, m), pairs (Q, m) and log-ratios (S,) of scores (S,).

        Args:
            flat: Summed log-probabilities in the order of the lists.
            scale: c of equation (14).
        """
        scores, found = ListScores(self.lists, flat), []
        for batch, lengths in self.batches:
            base = self.reference.pad(batch)
            s = steering.rescale(scores.pad(batch), base, scale)
            difference = (s - base).masked_fill(~batch.mask, 0.0)
            own, s0 = (s / lengths, base / lengths) if self.loss.per_token else (s, base)
            loss = self.loss(own, batch, self.beta, s0).masked_fill(~batch.objective_mask, torch.nan)
            found.append((
                loss, difference.abs().sum(1) / batch.mask.sum(1), *ordered_pairs(difference, batch),
                difference[batch.mask],
            ))  # fmt: skip
        return tuple(torch.cat(each).double() for each in zip(*found, strict=True))


def evaluation_of(weights: Tensor | None, columns: Sequence[tuple[Tensor, ...]]) -> Evaluation:
    """Return the figures of several trade-offs as one evaluation.

    Args:
        weights: (n, m), or None.
        columns: What `HeldOut.figures` gave for each.
    """
    losses, deviation, right, pairs, ratios = (list(each) for each in zip(*columns, strict=True))
    return Evaluation(
        weights, torch.stack(losses, 1), torch.stack(deviation, 1), torch.stack(right, 1), pairs[0], torch.stack(ratios)
    )


def reference_point(base: Evaluation) -> list[float]:
    """Return the reference point of the hypervolume that the losses of the untrained model ask for."""
    return (REFERENCE_FACTOR * base.mean_losses[0]).tolist()
