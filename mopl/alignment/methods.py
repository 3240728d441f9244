"""What language models bring to COS-DPO: the batch of a step, and scores of responses.

See `mopl.experiments.methods` for the methods, `mopl.experiments.cos_dpo` for what they compute and
`mopl.experiments.response_loss` for the loss of each objective. Scores are
log-probabilities of whole responses, summed over their tokens; all m objectives of a step share one forward and one
backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mopl.conditioning import WeightedModel
from mopl.conditioning.samplers import Sampler
from mopl.experiments.cos_dpo import Score, Scored, StepBatch, StepSource
from mopl.experiments.response_loss import ResponseLoss
from mopl.language_models.collate import ListBatch, ListCollator
from mopl.language_models.scoring import Conditioner, ListScores, response_lengths, score_batch
from mopl.language_models.tokenization import TokenizedList
from mopl.training.parallel import unwrapped


@dataclass(frozen=True, eq=False)
class AlignBatch(StepBatch):
    """One part of a step's batch, with what teachers read."""

    plain: ListBatch | None = None  # the lists without weights in their prompts; None where `lists` have none

    @property
    def read_by_teachers(self) -> ListBatch:
        """The lists as a model reads them that takes no weights in words."""
        return self.lists if self.plain is None else self.plain


class AlignSource(StepSource):
    """The batches of a training.

    Args, besides those of `StepSource`:
        lists: The tokenised lists.
        collator: Makes the batches.
        reference: Log-probabilities of the reference; None if they are computed in the step.
        experts: Those of the m experts, for `mo-dpo`.
        conditioner: Writes weights into a list's prompt.
        taught: Whether teachers read the lists, too, without these weights.
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
        taught: bool = False,
    ) -> None:
        super().__init__(len(lists), lists_per_batch, seed=seed, weights=weights, beta=beta)
        self.lists, self.collator = lists, collator
        self.reference, self.experts, self.conditioner = reference, experts, conditioner
        self.taught = taught and conditioner is not None

    def batch(self, chosen: np.ndarray, weights: Tensor, beta: Tensor) -> AlignBatch:
        """Return the batch of these lists."""
        items = [self.lists[int(number)] for number in chosen]
        plain = self.collator(items) if self.taught else None
        if self.conditioner is not None:
            items = [self.conditioner(*each) for each in zip(items, weights, beta, strict=True)]
        batch = self.collator(items)
        return AlignBatch(
            lists=batch,
            weights=weights,
            beta=beta,
            reference=None if self.reference is None else self.reference.pad(batch),
            experts=None if self.experts is None else torch.stack([each.pad(batch) for each in self.experts], 1),
            plain=plain,
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
