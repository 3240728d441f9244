"""From scores (B, K) to one loss, and what is logged about it: the one copy that both trainers use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mopl import losses
from mopl.alignment.collate import ListBatch, by_objective
from mopl.integrations._settings import ObjectiveArguments
from mopl.losses import bradley_terry, scalarize

ListLoss = Callable[..., Tensor]

AVERAGED = ("ipo", "sigmoid_norm")  # TRL divides the summed log-probabilities of these by the number of tokens
WHOLE_BATCH = ("aot", "aot_unpaired")


@dataclass(frozen=True)
class PairLoss:
    """Losses of pairs by the names of TRL's `loss_type`, and their weights.

    Attributes:
        types: Names in `mopl.losses.bradley_terry`.
        weights: One factor each.
        options: Options for the types that have them.
    """

    types: Sequence[str] = ("sigmoid",)
    weights: Sequence[float] = (1.0,)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.types:
            if name in WHOLE_BATCH:
                raise ValueError(
                    f"loss_type {name!r} sorts the batch, so its update would depend on how a batch is split and rows "
                    "could have no weights of their own; use TRL's own DPOTrainer for it"
                )

    def __call__(
        self,
        scores: Tensor,  # (B, 2)
        labels: Tensor,  # (B, m, 2)
        *,
        lengths: Tensor,  # (B, 2)
        reference: Tensor | None,  # (B, 2)
        temperature: Tensor,
    ) -> Tensor:  # (B, m)
        """Return the loss of each pair and objective; 0 where an objective does not prefer either response."""
        first = labels[..., 0] > labels[..., 1]

        def sides(values: Tensor | None, average: bool) -> tuple[Tensor | None, Tensor | None]:
            if values is None:
                return None, None
            if average:
                values = values / lengths.clamp(min=1)
            left, right = values[:, :1], values[:, 1:]
            return torch.where(first, left, right), torch.where(first, right, left)

        total = scores.new_zeros(first.shape)
        for name, factor in zip(self.types, self.weights, strict=True):
            chosen, rejected = sides(scores, name in AVERAGED)
            reference_chosen, reference_rejected = sides(reference, name in AVERAGED)
            assert chosen is not None and rejected is not None
            value = bradley_terry(
                chosen,
                rejected,
                reference_chosen=reference_chosen,
                reference_rejected=reference_rejected,
                temperature=temperature,
                loss_type=name,
                reduction="none",
                **self.options.get(name, {}),
            )
            total = total + factor * value
        return torch.where(labels[..., 0] == labels[..., 1], 0.0, total)


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
    """

    vector: Tensor
    value: Tensor
    correct: Tensor
    pairs: Tensor
    margin: Tensor
    log_ratio: Tensor


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
        self.loss: ListLoss | PairLoss = getattr(losses, settings.list_loss) if loss is None else loss

    def __call__(
        self,
        scores: Tensor,  # (B, K) sums of log-probabilities
        lengths: Tensor,  # (B, K)
        batch: ListBatch,
        *,
        weights: Tensor,  # (B, m)
        temperature: Tensor,  # broadcasts to (B, m)
        reference: Tensor | None,  # (B, K)
    ) -> Measured:
        """Return the losses of a batch; the arithmetic is in float32 at least, whatever the training's precision."""
        if self.settings.length_normalized:
            scores = scores / lengths.clamp(min=1)
            reference = None if reference is None else reference / lengths.clamp(min=1)
        with torch.autocast(scores.device.type, enabled=False):
            vector = self._vector(scores, lengths, batch, temperature, reference)
            vector = torch.where(batch.objective_mask, vector, 0.0)
            value = self.scalarized(vector, weights * batch.objective_mask)
            with torch.no_grad():
                ratio = scores if reference is None else scores - reference
                correct, pairs, margin = agreement(ratio, batch)
                count = batch.mask.sum(-1).clamp(min=1)
                log_ratio = torch.where(batch.mask, ratio, 0.0).sum(-1) / count
        return Measured(vector, value, correct, pairs, margin * temperature, log_ratio)

    def scalarized(self, vector: Tensor, weights: Tensor) -> Tensor:  # (B, m), (B, m) -> (B,)
        """Return one number a list."""
        settings = self.settings
        combine = {
            "linear": scalarize.linear,
            "chebyshev": scalarize.chebyshev,
            "smooth_chebyshev": scalarize.smooth_chebyshev,
        }[settings.scalarization]
        value = combine(vector, weights)
        if settings.cosine_penalty:
            sign: Any = settings.cosine_sign
            value = value + settings.cosine_penalty * scalarize.cosine_penalty(vector, weights, sign)
        return value

    def _vector(
        self, scores: Tensor, lengths: Tensor, batch: ListBatch, temperature: Tensor, reference: Tensor | None
    ) -> Tensor:
        if isinstance(self.loss, PairLoss):
            if batch.mask.shape[1] != 2:
                raise ValueError(
                    f"loss_type {', '.join(self.loss.types)} is for pairs but a list has {batch.mask.shape[1]} "
                    f"responses; leave loss_type at 'sigmoid' and choose a list_loss"
                )
            return self.loss(scores, batch.labels, lengths=lengths, reference=reference, temperature=temperature)
        options: dict[str, Any] = {"reduction": "none"}
        if not self.partial:
            vector = self.loss(
                scores, batch.labels, reference=reference, temperature=temperature, mask=batch.mask, **options
            )
            return _checked(vector, (batch.labels.shape[0], batch.labels.shape[1]))
        alone, labels, mask = by_objective(scores, batch)
        shape = (batch.labels.shape[0], batch.labels.shape[1])
        base = None if reference is None else by_objective(reference, batch)[0]
        beta = temperature.expand(shape).reshape(-1, 1)
        vector = self.loss(alone, labels, reference=base, temperature=beta, mask=mask, **options)
        return _checked(vector, (shape[0] * shape[1], 1)).reshape(shape)


def _checked(vector: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(vector.shape) != shape:
        raise ValueError(
            f"loss gave a tensor of shape {tuple(vector.shape)} but must give {shape}, one value for each list and "
            "objective, when it is called with reduction='none'"
        )
    return vector


def agreement(scores: Tensor, batch: ListBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, m) pairs that scores order as labels, pairs of different labels, and the sum of their differences."""
    both = batch.label_mask[..., :, None] & batch.label_mask[..., None, :]
    better = both & (batch.labels[..., :, None] > batch.labels[..., None, :])  # (B, m, K, K)
    difference = (scores[:, :, None] - scores[:, None, :])[:, None]
    correct = (better & (difference > 0)).sum((-1, -2)).float()
    margin = torch.where(better, difference, 0.0).sum((-1, -2))
    return correct, better.sum((-1, -2)).float(), margin


class Totals:
    """Sums of what batches gave since they were last read; adding to them does not wait for a GPU.

    Args:
        objectives: Names.
    """

    def __init__(self, objectives: Sequence[str]) -> None:
        self.objectives = tuple(objectives)
        self._sums: Tensor | None = None

    def add(self, measured: Measured, objective_mask: Tensor) -> None:
        """Add a batch."""
        with torch.no_grad():
            count = objective_mask.float().sum(0)
            columns = [measured.vector.sum(0), count, measured.correct.sum(0), measured.pairs.sum(0)]
            lists = torch.ones_like(measured.log_ratio).sum()
            rest = torch.stack([measured.log_ratio.sum(), lists])
            row = torch.cat([*columns, measured.margin.sum(0), rest]).detach().float()
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
        logs["log_ratio"] = values[5 * m] / max(values[5 * m + 1], 1)
        return logs
