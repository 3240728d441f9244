"""From scores (B, K) to one loss, and what is logged about it: the one copy that both trainers use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl import losses
from mopl._extras import require
from mopl.experiments.cos_dpo import scalarized
from mopl.experiments.response_loss import LossFunction, PairLoss, ResponseLoss
from mopl.integrations._scores import Scored
from mopl.integrations._settings import ObjectiveArguments
from mopl.language_models.collate import ListBatch
from mopl.language_models.scoring import ordered_pairs, preferred


@dataclass(frozen=True)
class Measured:
    """What a batch gave. Its pairs are those of responses with different labels."""

    vector: Tensor  # (B, m), the loss of each list and objective, without weights
    value: Tensor  # (B,), the scalarised loss
    right: Tensor  # (B, m), how many pairs are ordered as their labels: see `ordered_pairs`
    pairs: Tensor  # (B, m), how many there are
    strict: Tensor  # (B, m), how many are in TRL's count, where a tie is wrong
    margin: Tensor  # (B, m), the sum over them of β times the difference of their log-ratios
    log_ratio: Tensor  # (B,), mean over responses of log(policy / reference), or of the scores without a reference
    rewards: tuple[Tensor, Tensor]  # (B, m), sums over pairs of β times the log-ratio: of the preferred, of the other
    logps: tuple[Tensor, Tensor]  # the same of log-probabilities
    router: Tensor | None = None  # the auxiliary loss of a mixture of experts, without its coefficient

    @property
    def of_objectives(self) -> list[Tensor]:
        """Eight of (B, m)."""
        return [self.vector, self.right, self.pairs, self.strict, *self.rewards, *self.logps]


class Objective:
    """The loss of lists under trade-offs; if `partial`, objectives may label some responses of a list only.

    A `loss` has the arguments of `mopl.losses.listwise_dpo` (a `functools.partial` of one, or one's own), or is a
    `PairLoss`; by default it is the settings' `list_loss`.
    """

    def __init__(
        self, settings: ObjectiveArguments, loss: LossFunction | PairLoss | None = None, partial: bool = False
    ) -> None:
        self.settings = settings
        if loss is not None and not callable(loss):
            raise TypeError(
                f"loss is {loss!r} but must be a function of mopl.losses or like one; list_loss takes names"
            )
        self.loss = ResponseLoss(getattr(losses, settings.list_loss) if loss is None else loss, by_objective=partial)

    def __call__(
        self,
        scored: Scored,
        batch: ListBatch,
        *,
        weights: Tensor,  # (B, m)
        beta: Tensor,  # broadcasts to (B, m)
        reference: Tensor | None,  # (B, K)
    ) -> Measured:
        """Return the losses of a batch; the arithmetic is in float32 at least, whatever the training's precision."""
        scores, lengths = scored.scores, scored.lengths
        if self.settings.length_normalized:
            scores = scores / lengths.clamp(min=1)
            reference = None if reference is None else reference / lengths.clamp(min=1)
        with torch.autocast(scores.device.type, enabled=False):
            of_pairs = {name: getattr(scored, name) for name in ("lengths", "tokens", "likelihood")}
            vector = self.loss(scores, batch, beta, reference, **of_pairs)
            if scored.confidence is not None:
                vector = vector * scored.confidence
            settings = self.settings
            value = scalarized(
                vector,
                weights,
                mask=batch.objective_mask,
                how=settings.scalarization,  # type: ignore[arg-type]
                penalty=settings.cosine_penalty,
                penalty_sign=settings.cosine_sign,  # type: ignore[arg-type]
            )
            if scored.router is not None:
                value = value + scored.router_coefficient * scored.router
            with torch.no_grad():
                ratio = scores if reference is None else scores - reference
                better = preferred(batch)
                difference = (ratio[:, :, None] - ratio[:, None, :])[:, None]
                count = batch.mask.sum(-1).clamp(min=1)
                chosen, rejected = by_side(ratio, better)
                return Measured(
                    vector,
                    value,
                    *ordered_pairs(ratio, batch),
                    strict=(better & (difference > 0)).sum((-1, -2)).float(),
                    margin=torch.where(better, difference, 0.0).sum((-1, -2)) * beta,
                    log_ratio=torch.where(batch.mask, ratio, 0.0).sum(-1) / count,
                    rewards=(chosen * beta, rejected * beta),
                    logps=by_side(scored.scores, better),
                    router=scored.router,
                )


def by_side(values: Tensor, better: Tensor) -> tuple[Tensor, Tensor]:  # (B, K), (B, m, K, K)
    """Return (B, m), the sums over pairs of the values of the response that is preferred, and of the other."""
    first, second = better.sum(-1), better.sum(-2)  # (B, m, K)
    return (first * values[:, None]).sum(-1), (second * values[:, None]).sum(-1)


class Totals:
    """Sums of what batches gave since they were last read; adding to them does not wait for a GPU."""

    def __init__(self, objectives: Sequence[str]) -> None:
        self.objectives = tuple(objectives)
        self._sums: Tensor | None = None
        self._has_router = False

    def add(self, measured: Measured, objective_mask: Tensor) -> None:
        """Add a batch."""
        with torch.no_grad():
            columns = [each.sum(0) for each in (*measured.of_objectives, measured.margin, objective_mask.float())]
            ratio = measured.log_ratio
            router = ratio.new_zeros(()) if measured.router is None else measured.router
            rest = torch.stack([ratio.sum(), torch.ones_like(ratio).sum(), router, torch.ones_like(router)])
            row = torch.cat([*columns, rest]).detach().float()
            self._has_router = measured.router is not None
            self._sums = row if self._sums is None else self._sums + row

    def read(self, reduce: Callable[[Tensor], Any]) -> dict[str, float]:
        """Return means by name and start again; `reduce` adds up the processes."""
        if self._sums is None:
            return {}
        values, m = reduce(self._sums).tolist(), len(self.objectives)
        self._sums = None
        loss, right, pairs, *of_trl, margin, count = (values[n * m : (n + 1) * m] for n in range(10))
        logs: dict[str, float] = {}
        for j, name in enumerate(self.objectives):
            logs[f"loss/{name}"] = loss[j] / max(count[j], 1)
            logs[f"accuracy/{name}"] = right[j] / max(pairs[j], 1)
            logs[f"margin/{name}"] = margin[j] / max(pairs[j], 1)
        log_ratio, lists, router, batches = values[10 * m :]
        logs["log_ratio"] = log_ratio / max(lists, 1)
        logs |= trl_metrics(sum(pairs), *map(sum, of_trl))
        if self._has_router:
            logs["aux_loss"] = router / max(batches, 1)
        return logs


def trl_metrics(
    pairs: float, correct: float, rewards_chosen: float, rewards_rejected: float, chosen: float, rejected: float
) -> dict[str, float]:
    """Return what TRL's trainer calls the means over pairs, from their number and sums over them; a tie is wrong."""
    pairs = max(pairs, 1)
    return {
        "rewards/chosen": rewards_chosen / pairs,
        "rewards/rejected": rewards_rejected / pairs,
        "rewards/accuracies": correct / pairs,
        "rewards/margins": (rewards_chosen - rewards_rejected) / pairs,
        "logps/chosen": chosen / pairs,
        "logps/rejected": rejected / pairs,
    }


def grid_table(points: Sequence[Measured]) -> Tensor:
    """Return what a batch gave at each of n points, in one tensor that processes can gather.

    It is (B, n, 8 m + 1), or one column more: a mixture of experts' auxiliary loss, the same for all lists of a batch.
    """
    rows = [[*point.of_objectives, point.value[:, None]] for point in points]
    for row, point in zip(rows, points, strict=True):
        if point.router is not None:
            row.append(point.router.expand(len(point.value), 1))
    return torch.stack([torch.cat([part.float() for part in row], 1) for row in rows], 1)


def grid_metrics(
    prediction: Any, grid: Tensor, objectives: Sequence[str], user_metrics: Any = None
) -> dict[str, float]:
    """Return means over lists by name, and what a user's `compute_metrics`, if there is one, gives.

    The prediction has tables of L lists, as `grid_table` gives them, and which objectives count (L, m).
    """
    table, mask = np.asarray(prediction.predictions, dtype=np.float64), np.asarray(prediction.label_ids)
    m = len(objectives)
    loss, right, pairs, *of_trl = (table[..., n * m : (n + 1) * m] for n in range(8))  # (L, n, m)
    count = np.maximum(mask.sum(0), 1)
    losses = loss.sum(0) / count  # (n, m)
    accuracies = right.sum(0) / np.maximum(pairs.sum(0), 1)
    value, *router = table[..., 8 * m :].transpose(2, 0, 1)  # (L, n) each
    found: dict[str, float] = {"loss": float(value.mean())}
    if router:
        found["aux_loss"] = float(router[0].mean())
    for j, name in enumerate(objectives):
        found[f"{name}_loss"] = float(losses[:, j].mean())
        found[f"{name}_accuracy"] = float(accuracies[:, j].mean())
    for n, at in enumerate(names_of(grid)):
        found[f"loss@{at}"] = float(value[:, n].mean())
        for j, name in enumerate(objectives):
            found[f"{name}_loss@{at}"] = float(losses[n, j])
            found[f"{name}_accuracy@{at}"] = float(accuracies[n, j])
    found |= trl_metrics(pairs.sum(), *(part.sum() for part in of_trl))
    if user_metrics is not None:
        require("transformers")
        from transformers import EvalPrediction

        each = np.divide(right, pairs, out=np.full_like(right, np.nan), where=pairs > 0)
        tables: Any = (loss, each)
        found |= user_metrics(EvalPrediction(predictions=tables, label_ids=mask))
    return found


def names_of(grid: Tensor) -> list[str]:
    """Return what the points of a grid (n, m) are called in logs: with two decimals, or as many as tell them apart."""
    different = len(set(map(tuple, grid.tolist())))
    for decimals in range(2, 10):
        names = [",".join(f"{x:.{decimals}f}" for x in point) for point in grid.tolist()]
        if len(set(names)) == different:
            break
    return names
