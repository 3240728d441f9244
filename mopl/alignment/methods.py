"""What language models bring to COS-DPO: the loss of each objective, the batch of a step, and scores of responses.

See `mopl.experiments.methods` for the methods and `mopl.experiments.cos_dpo` for what they compute. Scores are
log-probabilities of whole responses, summed over their tokens; all m objectives of a step share one forward and one
backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mopl._arguments import check_choice
from mopl.alignment.config import LIST_LOSSES, LOSSES, PAIR_LOSSES, PER_TOKEN
from mopl.conditioning import WeightedModel
from mopl.conditioning.samplers import Sampler
from mopl.experiments.cos_dpo import ListLoss, Score, Scored, StepBatch, StepSource
from mopl.language_models.collate import ListBatch, ListCollator, by_objective
from mopl.language_models.scoring import Conditioner, ListScores, response_lengths, score_batch
from mopl.language_models.tokenization import TokenizedList
from mopl.losses import bradley_terry, normalize_labels
from mopl.training.parallel import unwrapped


@dataclass(frozen=True)
class ResponseLoss(ListLoss):
    """The loss of each objective of each list of responses, on scores `(B, K)`.

    Args:
        loss: As in `ListLoss`, or a type of `mopl.losses.bradley_terry` for lists of two.
        ties: As in `ListLoss`; so are the next two.
        last_group: Whether Plackett-Luce charges the responses of the lowest label.
        top_k: How many ranks Plackett-Luce sees; None for all.
        labels: How ListNet turns the labels of each objective into targets: `"l1"` or `"softmax"`, one or m times.
        label_temperature: What labels are divided by before their softmax, one or m times.
        label_smoothing: Rate of flipped labels, for the pair losses that have it.
        by_objective: Some lists have labels of an objective for a part of their responses only.
    """

    CHOICES: ClassVar[tuple[str, ...]] = LOSSES

    labels: tuple[str, ...] = ("l1",)
    label_temperature: tuple[float, ...] = (1.0,)
    label_smoothing: float = 0.0
    by_objective: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in self.labels:
            check_choice(entry, ("l1", "softmax"), "labels")

    @property
    def per_token(self) -> bool:
        """Whether scores are log-probabilities averaged over tokens."""
        return self.loss in PER_TOKEN

    def __call__(
        self,
        scores: Tensor,  # (B, K)
        lists: ListBatch,
        beta: float | Tensor,  # number, (m,) or (B, m)
        reference: Tensor | None = None,  # (B, K)
        objective: int | None = None,
    ) -> Tensor:  # (B, m), or (B, 1) for one objective
        """Return the loss vector of a batch, or that of one `objective`; exactly 0 where an objective has no labels."""
        chosen = slice(None) if objective is None else slice(objective, objective + 1)
        counts = lists.objective_mask[:, chosen]
        if isinstance(beta, Tensor) and beta.ndim > 0 and beta.shape[-1] > 1:
            beta = beta[..., chosen]
        if self.loss in PAIR_LOSSES:
            vector, preferred = self._pairs(scores, lists, beta, reference, chosen)
            counts = counts & preferred
        elif self.by_objective:
            vector = self._apart(scores, lists, beta, reference, chosen)
        else:
            vector = super().__call__(scores, lists, beta, reference, objective)
        return torch.where(counts, vector, 0.0)

    def _apart(self, scores: Tensor, lists: ListBatch, beta: Any, reference: Tensor | None, chosen: slice) -> Tensor:
        """Every objective of every list is a list of its own."""
        every, shape = lists.labels.shape[:2], lists.labels[:, chosen].shape  # (B, m), (B, c, K)

        def of_chosen(flat: Tensor) -> Tensor:
            return flat.unflatten(0, every)[:, chosen].flatten(0, 1)

        own, labels, mask = map(of_chosen, by_objective(scores, lists))
        s0 = None if reference is None else of_chosen(by_objective(reference, lists)[0])
        if isinstance(beta, Tensor):
            beta = beta.expand(shape[:2]).reshape(-1, 1)
        targets = self.targets(lists)[:, chosen].reshape(-1, 1, shape[2]) if self.loss == "listnet" else None
        return self.vector(own, labels, targets, reference=s0, beta=beta, mask=mask).view(shape[:2])

    def targets(self, lists: ListBatch) -> Tensor:
        """Return the target distributions (B, m, K) of ListNet; 0 throughout where an objective has no labels."""
        batch, objectives, width = lists.labels.shape
        modes = self.labels * objectives if len(self.labels) == 1 else self.labels
        rates = self.label_temperature * objectives if len(self.label_temperature) == 1 else self.label_temperature
        targets = torch.zeros_like(lists.labels)
        for mode, rate in set(zip(modes, rates, strict=True)):
            same = [j for j in range(objectives) if (modes[j], rates[j]) == (mode, rate)]
            flat, mask = (each[:, same].reshape(-1, width) for each in (lists.labels, lists.label_mask))
            part = normalize_labels(flat, mode, mask, label_temperature=rate)  # type: ignore[arg-type]
            targets[:, same] = part.view(batch, len(same), width)
        return targets

    def _pairs(
        self, scores: Tensor, lists: ListBatch, beta: Any, reference: Tensor | None, chosen: slice
    ) -> tuple[Tensor, Tensor]:
        """Each objective prefers one of the two responses, or none of them if it gives both the same label."""
        if scores.shape[1] != 2:
            raise ValueError(
                f"loss {self.loss!r} compares two responses but a list has {scores.shape[1]}; "
                f"take {' or '.join(map(repr, LIST_LOSSES))}"
            )
        labels = lists.labels[:, chosen]
        first, preferred = labels[..., 0] >= labels[..., 1], labels[..., 0] != labels[..., 1]

        def sides(values: Tensor) -> tuple[Tensor, Tensor]:
            a, b = values[:, :1], values[:, 1:]
            return torch.where(first, a, b), torch.where(first, b, a)

        winner, loser = sides(scores)
        s0: tuple[Any, Any] = (None, None) if reference is None else sides(reference)
        vector = bradley_terry(
            winner, loser, reference_chosen=s0[0], reference_rejected=s0[1], beta=beta, loss_type=self.loss,
            label_smoothing=self.label_smoothing, reduction="none",
        )  # fmt: skip
        return vector, preferred


class AlignSource(StepSource):
    """The batches of a training.

    Args, besides those of `StepSource`:
        lists: The tokenised lists.
        collator: Makes the batches.
        reference: Log-probabilities of the reference; None if they are computed in the step.
        experts: Those of the m experts, for `mo-dpo`.
        conditioner: Writes weights into a list's prompt.
    """

    def __init__(
        self,
        lists: Sequence[TokenizedList],
        lists_per_batch: int,
        collator: ListCollator,
        *,
        seed: int,
        weights: Sampler,
        beta: Sampler,
        reference: ListScores | None = None,
        experts: Sequence[ListScores] | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        super().__init__(len(lists), lists_per_batch, seed=seed, weights=weights, beta=beta)
        self.lists, self.collator = lists, collator
        self.reference, self.experts, self.conditioner = reference, experts, conditioner

    def batch(self, chosen: np.ndarray, weights: Tensor, beta: Tensor) -> StepBatch:
        """Return the batch of these lists."""
        items = [self.lists[int(number)] for number in chosen]
        if self.conditioner is not None:
            items = [self.conditioner(*each) for each in zip(items, weights, beta, strict=True)]
        batch = self.collator(items)
        return StepBatch(
            lists=batch,
            weights=weights,
            beta=beta,
            reference=None if self.reference is None else self.reference.pad(batch),
            experts=None if self.experts is None else torch.stack([each.pad(batch) for each in self.experts], 1),
        )


def scored_for(loss: ResponseLoss) -> Score:
    """Return what gives `loss` the scores of a batch: one forward pass of the model, and one of the reference if its
    log-probabilities are not known.
    """

    def score(model: nn.Module, batch: StepBatch) -> Scored:
        scores = score_batch(model, batch.lists, batch.weights, batch.beta)
        reference, experts = batch.reference, batch.experts
        if reference is None:
            inner = unwrapped(model)
            if not isinstance(inner, WeightedModel):
                raise ValueError("without a HyperPromptModel or LoraMixture the reference must be computed beforehand")
            with torch.no_grad(), inner.reference():
                reference = score_batch(model, batch.lists, batch.weights, batch.beta)
        if loss.per_token:
            lengths = response_lengths(batch.lists).clamp(min=1)
            scores, reference = scores / lengths, reference / lengths
            experts = None if experts is None else experts / lengths[:, None]
        # The mean of log p - log p0 over responses tells at once when a model drifts away.
        mask = batch.lists.mask
        difference = (scores - reference).detach().masked_fill(~mask, 0.0)
        return Scored(scores, reference, experts, {"log_ratio": difference.sum() / mask.sum()})

    return score
