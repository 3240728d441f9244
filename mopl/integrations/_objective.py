"""From scores (B, K) to one loss, and what is logged about it: the one copy that both trainers use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopl import losses
from mopl._renamed import renamed_parameter
from mopl.experiments.cos_dpo import scalarized
from mopl.integrations._pair_loss import PairLoss
from mopl.integrations._scores import Scored
from mopl.integrations._settings import ObjectiveArguments
from mopl.language_models.collate import ListBatch, by_objective

ListLoss = Callable[..., Tensor]


@dataclass(frozen=True)
class Measured:
    """What a batch gave.

    Attributes:
        vector: (B, m), the loss of each list and objective, without weights.
        value: (B,), the scalarised loss.
        correct: (B, m), how many pairs of responses are ordered as their labels.
        pairs: (B, m), how many pairs have different labels.
        margin: (B, m), the sum over these pairs of β times the difference of their log-ratios.
        log_ratio: (B,), mean over responses of log(policy / reference), or of the scores without a reference.
        rewards: Two of (B, m), the sums over these pairs of β times the log-ratio of the preferred response, and of the
            other.
        logps: The same of their log-probabilities.
        router: The auxiliary loss of a mixture of experts, without its coefficient.
    """

    vector: Tensor
    value: Tensor
    correct: Tensor
    pairs: Tensor
    margin: Tensor
    log_ratio: Tensor
    rewards: tuple[Tensor, Tensor]
    logps: tuple[Tensor, Tensor]
    router: Tensor | None = None


class Objective:
    """The loss of lists under trade-offs.

    Args:
        settings: The settings.
        loss: A loss with the arguments of `mopl.losses.listwise_dpo` (a `functools.partial` of one, or one's own),
            or a `PairLoss`; the settings' `list_loss` by default.
        partial: Whether objectives may label a part of a list's responses.
    """

    def __init__(
        self, settings: ObjectiveArguments, loss: ListLoss | PairLoss | None = None, partial: bool = False
    ) -> None:
        self.settings, self.partial = settings, partial
        if loss is not None and not callable(loss):
            raise TypeError(
                f"loss is {loss!r} but must be a function of mopl.losses or like one; list_loss takes names"
            )
        self.loss: ListLoss | PairLoss = getattr(losses, settings.list_loss) if loss is None else loss
        self.name_of_beta = renamed_parameter(self.loss, "temperature", "beta")

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
            vector = self._vector(scores, scored, batch, beta, reference)
            if scored.confidence is not None:
                vector = vector * scored.confidence
            vector = torch.where(batch.objective_mask, vector, 0.0)
            value = self.scalarized(vector, weights * batch.objective_mask)
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
                    correct=(better & (difference > 0)).sum((-1, -2)).float(),
                    pairs=better.sum((-1, -2)).float(),
                    margin=torch.where(better, difference, 0.0).sum((-1, -2)) * beta,
                    log_ratio=torch.where(batch.mask, ratio, 0.0).sum(-1) / count,
                    rewards=(chosen * beta, rejected * beta),
                    logps=by_side(scored.scores, better),
                    router=scored.router,
                )

    def scalarized(self, vector: Tensor, weights: Tensor) -> Tensor:  # (B, m), (B, m) -> (B,)
        """Return one number a list."""
        settings = self.settings
        how: Any = settings.scalarization
        sign: Any = settings.cosine_sign
        return scalarized(vector, weights, how=how, penalty=settings.cosine_penalty, penalty_sign=sign)

    def _vector(
        self, scores: Tensor, scored: Scored, batch: ListBatch, beta: Tensor, reference: Tensor | None
    ) -> Tensor:
        if isinstance(self.loss, PairLoss):
            if batch.mask.shape[1] != 2:
                raise ValueError(
                    f"loss_type {', '.join(self.loss.types)} is for pairs but a list has {batch.mask.shape[1]} "
                    f"responses; leave loss_type at 'sigmoid' and choose a list_loss"
                )
            return self.loss(
                scores,
                batch.labels,
                lengths=scored.lengths,
                reference=reference,
                beta=beta,
                tokens=scored.tokens,
                likelihood=scored.likelihood,
            )
        options: dict[str, Any] = {"reduction": "none"}
        if not self.partial:
            options[self.name_of_beta] = beta
            vector = self.loss(scores, batch.labels, reference=reference, mask=batch.mask, **options)
            return _checked(vector, (batch.labels.shape[0], batch.labels.shape[1]))
        alone, labels, mask = by_objective(scores, batch)
        shape = (batch.labels.shape[0], batch.labels.shape[1])
        base = None if reference is None else by_objective(reference, batch)[0]
        options[self.name_of_beta] = beta.expand(shape).reshape(-1, 1)
        vector = self.loss(alone, labels, reference=base, mask=mask, **options)
        return _checked(vector, (shape[0] * shape[1], 1)).reshape(shape)


def _checked(vector: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(vector.shape) != shape:
        raise ValueError(
            f"loss gave a tensor of shape {tuple(vector.shape)} but must give {shape}, one value for each list and "
            "objective, when it is called with reduction='none'"
        )
    return vector


def preferred(batch: ListBatch) -> Tensor:
    """Return (B, m, K, K): whether an objective labels response i higher than response j."""
    both = batch.label_mask[..., :, None] & batch.label_mask[..., None, :]
    return both & (batch.labels[..., :, None] > batch.labels[..., None, :])


def by_side(values: Tensor, better: Tensor) -> tuple[Tensor, Tensor]:  # (B, K), (B, m, K, K)
    """Return (B, m), the sums over pairs of the values of the response that is preferred, and of the other."""
    first, second = better.sum(-1), better.sum(-2)  # (B, m, K)
    return (first * values[:, None]).sum(-1), (second * values[:, None]).sum(-1)


class Totals:
    """Sums of what batches gave since they were last read; adding to them does not wait for a GPU.

    Args:
        objectives: Names.
    """

    def __init__(self, objectives: Sequence[str]) -> None:
        self.objectives = tuple(objectives)
        self._sums: Tensor | None = None
        self._has_router = False

    def add(self, measured: Measured, objective_mask: Tensor) -> None:
        """Add a batch."""
        with torch.no_grad():
            count = objective_mask.float()
            by_objective = [measured.vector, count, measured.correct, measured.pairs, measured.margin]
            columns = [column.sum(0) for column in (*by_objective, *measured.rewards, *measured.logps)]
            router = measured.log_ratio.new_zeros(()) if measured.router is None else measured.router
            rest = [
                measured.log_ratio.sum(),
                torch.ones_like(measured.log_ratio).sum(),
                router,
                torch.ones_like(router),
            ]
            row = torch.cat([*columns, torch.stack(rest)]).detach().float()
            self._has_router = measured.router is not None
            self._sums = row if self._sums is None else self._sums + row

    def read(self, reduce: Callable[[Tensor], Any]) -> dict[str, float]:
        """Return means by name and start again; `reduce` adds up the processes."""
        if self._sums is None:
            return {}
        values, m = reduce(self._sums).tolist(), len(self.objectives)
        self._sums = None
        loss, count, correct, pairs, margin = (values[n * m : (n + 1) * m] for n in range(5))
        logs: dict[str, float] = {}
        for j, name in enumerate(self.objectives):
            logs[f"loss/{name}"] = loss[j] / max(count[j], 1)
            logs[f"accuracy/{name}"] = correct[j] / max(pairs[j], 1)
            logs[f"margin/{name}"] = margin[j] / max(pairs[j], 1)
        log_ratio, lists, router, batches = values[9 * m :]
        logs["log_ratio"] = log_ratio / max(lists, 1)
        logs |= trl_metrics(sum(pairs), sum(correct), *(sum(values[n * m : (n + 1) * m]) for n in range(5, 9)))
        if self._has_router:
            logs["aux_loss"] = router / max(batches, 1)
        return logs


def trl_metrics(
    pairs: float, correct: float, rewards_chosen: float, rewards_rejected: float, chosen: float, rejected: float
) -> dict[str, float]:
    """Return what TRL's trainer calls the means over pairs, from their number and sums over them."""
    pairs = max(pairs, 1)
    return {
        "rewards/chosen": rewards_chosen / pairs,
        "rewards/rejected": rewards_rejected / pairs,
        "rewards/accuracies": correct / pairs,
        "rewards/margins": (rewards_chosen - rewards_rejected) / pairs,
        "logps/chosen": chosen / pairs,
        "logps/rejected": rejected / pairs,
    }
