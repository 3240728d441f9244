"""What language models bring to COS-DPO: the loss of each objective, the batch of a step, and scores of responses.

See `mopl.experiments.methods` for the methods and `mopl.experiments.cos_dpo` for what they compute. Scores are
log-probabilities of whole responses, summed over their tokens; all m objectives of a step share one forward and one
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mopl._arguments import check_choice
from mopl._renamed import renamed_keywords
from mopl.alignment.config import LIST_LOSSES, LOSSES, PAIR_LOSSES, PER_TOKEN
from mopl.conditioning import WeightedModel
from mopl.conditioning.samplers import Sampler
from mopl.experiments.cos_dpo import ListLoss, Score, Scored, StepBatch, StepSource
from mopl.language_models.collate import ListBatch, ListCollator, by_objective, to_lists
from mopl.language_models.head import score_sequences
from mopl.language_models.tokenization import TokenizedList
from mopl.losses import bradley_terry, normalize_labels
from mopl.training.parallel import unwrapped

Conditioner = Callable[[TokenizedList, Tensor, Tensor], TokenizedList]  # list, w (m,), β (m,) -> list


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


@dataclass(frozen=True, eq=False)
class AlignBatch(StepBatch):
    """One part of a step's batch."""

    lengths: Tensor | None = None  # (B, K) tokens of each response, at least 1


class ListScores:
    """One number for each response of tokenised lists, found again by the places of the lists in the data.

    Args:
        lists: The lists, whose `index` is that place.
        values: (S,), in the order of the lists and of their responses.

    Raises:
        ValueError: If there is not one value a response.
    """

    def __init__(self, lists: Sequence[TokenizedList], values: Tensor) -> None:
        counts = torch.tensor([len(item.responses) for item in lists])
        if values.shape != (int(counts.sum()),):
            raise ValueError(f"there are {int(counts.sum())} responses but values are {tuple(values.shape)}")
        self.values = values
        self._start = torch.zeros(max(item.index for item in lists) + 1, dtype=torch.long)
        self._start[torch.tensor([item.index for item in lists])] = counts.cumsum(0) - counts

    def pad(self, batch: ListBatch, fill: float = 0.0) -> Tensor:
        """Return the values of a batch's lists as (B, K), `fill` in masked places."""
        place = self._start[batch.lists][:, None] + torch.arange(batch.mask.shape[1])
        return self.values[place.clamp(max=len(self.values) - 1)].masked_fill(~batch.mask, fill)


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

    def batch(self, chosen: np.ndarray, weights: Tensor, beta: Tensor) -> AlignBatch:
        """Return the batch of these lists."""
        items = [self.lists[int(number)] for number in chosen]
        if self.conditioner is not None:
            items = [self.conditioner(*each) for each in zip(items, weights, beta, strict=True)]
        batch = self.collator(items)
        return AlignBatch(
            lists=batch,
            weights=weights,
            beta=beta,
            reference=None if self.reference is None else self.reference.pad(batch),
            experts=None if self.experts is None else torch.stack([each.pad(batch) for each in self.experts], 1),
            lengths=response_lengths(items, batch),
        )


def response_lengths(items: Sequence[TokenizedList], batch: ListBatch) -> Tensor:
    """Return how many tokens each response has, (B, K) float32; 1 in masked places, so that it may be divided by."""
    lengths = torch.ones(batch.mask.shape)
    for row, item in enumerate(items):
        lengths[row, : len(item.responses)] = torch.tensor([float(len(response)) for response in item.responses])
    return lengths


@renamed_keywords(temperature="beta")
def score_batch(
    model: nn.Module,
    batch: ListBatch,
    weights: Tensor | None = None,  # (m,) or (B, m)
    beta: Tensor | None = None,  # (m,) or (B, m)
) -> Tensor:  # (B, K)
    """Return the summed log-probabilities of the responses of a batch, in nats, in one forward pass.

    Args:
        model: A fused model, or a `WeightedModel` around one, which takes the weights of each list.
        batch: The lists.
        weights: w, if the model takes it.
        beta: β, if the model takes it.
    """
    of_sequence = batch.index[:, 0]
    options: dict[str, Any] = {}
    inner = unwrapped(model)
    if isinstance(inner, WeightedModel):
        if weights is None:
            raise ValueError("this model takes weights; pass (m,) or one row a list, (B, m)")
        options["weights"] = weights[of_sequence] if weights.ndim == 2 else weights
        if inner.takes_beta:
            if beta is None:
                raise ValueError("this model takes β; pass (m,) or one row a list, (B, m)")
            options["beta"] = beta[of_sequence] if beta.ndim == 2 else beta
    return to_lists(score_sequences(model, batch.inputs, **options).scores, batch)


def scored_for(loss: ResponseLoss) -> Score:
    """Return what gives `loss` the scores of a batch: one forward pass of the model, and one of the reference if its
    log-probabilities are not known.
    """

    def score(model: nn.Module, batch: AlignBatch) -> Scored:
        scores = score_batch(model, batch.lists, batch.weights, batch.beta)
        reference, experts = batch.reference, batch.experts
        if reference is None:
            inner = unwrapped(model)
            if not isinstance(inner, WeightedModel):
                raise ValueError("without a HyperPromptModel or LoraMixture the reference must be computed beforehand")
            with torch.no_grad(), inner.reference():
                reference = score_batch(model, batch.lists, batch.weights, batch.beta)
        if loss.per_token:
            assert batch.lengths is not None
            scores, reference = scores / batch.lengths, reference / batch.lengths
            experts = None if experts is None else experts / batch.lengths[:, None]
        # The mean of log p - log p0 over responses tells at once when a model drifts away.
        mask = batch.lists.mask
        difference = (scores - reference).detach().masked_fill(~mask, 0.0)
        return Scored(scores, reference, experts, {"log_ratio": difference.sum() / mask.sum()})

    return score
