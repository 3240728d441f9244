"""What rankers bring to COS-DPO: the loss of a list, the batch of a step, and policies that score lists.

See `mopl.experiments.methods` for the methods and `mopl.experiments.cos_dpo` for what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mopl import steering
from mopl._arguments import check_positive
from mopl._renamed import renamed_in_methods
from mopl.conditioning import check_weights
from mopl.conditioning.samplers import Sampler
from mopl.experiments.cos_dpo import Scored, StepBatch, StepSource, place_in_grid
from mopl.losses import listwise_dpo
from mopl.ranking.batch import Batch
from mopl.ranking.data import RankingData
from mopl.ranking.model import RankingModel
from mopl.training.batches import part_of_batch, shuffled_indices
from mopl.training.parallel import unwrapped


class Batches:
    """The batches of the base model's training: a `mopl.training` batch source of `lists_per_batch` lists at most."""

    def __init__(self, data: RankingData, lists_per_batch: int, *, seed: int) -> None:
        self.data, self.seed, self.batch_size = data, seed, min(lists_per_batch, len(data))

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return part `rank` of `world_size` of the batch of `step`."""
        chosen = shuffled_indices(len(self.data), self.batch_size, seed=self.seed, step=step)
        return self.data.batch(torch.from_numpy(chosen[part_of_batch(self.batch_size, rank, world_size)]))


class ListSource(StepSource):
    """The batches of a training, with the base model's scores (N,) and, for `mo-dpo`, those of the experts (N, m)."""

    def __init__(
        self,
        data: RankingData,
        batch_size: int,
        *,
        seed: int,
        reference: Tensor,
        weights: Sampler,
        beta: Sampler,
        experts: Tensor | None = None,
        order: bool = False,
    ) -> None:
        super().__init__(len(data), batch_size, seed=seed, weights=weights, beta=beta)
        self.data, self.reference, self.experts, self.order = data, reference, experts, order

    def batch(self, chosen: np.ndarray, weights: Tensor, beta: Tensor) -> StepBatch:
        """Return the batch of these lists."""
        queries = torch.from_numpy(chosen)
        experts = None if self.experts is None else self.data.pad(self.experts, queries).movedim(-1, 1)
        lists, reference = self.data.batch(queries, order=self.order), self.data.pad(self.reference, queries)
        return StepBatch(lists, weights, beta, reference, experts)


def score_batch(model: nn.Module, batch: StepBatch) -> Scored:
    """Return the scores of a batch, and those of the base model and of the experts, which are known.

    A model that mixes its outputs is seen at each objective alone, too: its network does not see the weights, so that
    costs no pass, and every output learns from every list.
    """
    plain, lists = unwrapped(model), batch.lists
    config, mixes = plain.config, plain.mixes
    assert batch.reference is not None
    scores = model(
        lists.features,
        batch.weights if config.conditioned else None,
        beta=batch.beta if config.takes_beta else None,
        mask=lists.mask,
        reference=batch.reference,
        **({"alone": True} if mixes else {}),
    )
    if mixes:
        return Scored(scores[:, 0], batch.reference, batch.experts, alone=scores[:, 1:])
    return Scored(scores, batch.reference, batch.experts)


def main_loss(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the base model's training loss: ListNet on the main objective."""
    targets = batch.main_targets[:, None]
    return listwise_dpo(model(batch.features, batch.mask), targets, mask=batch.mask, normalize=None), {}


Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]  # features (B, K, F), mask (B, K), reference (B, K) -> (B, K)


class Policy(Protocol):
    """A trained method: gives, for a trade-off, a function that scores lists."""

    def at(self, weights: Sequence[float] | Tensor, beta: Sequence[float] | Tensor | None = None) -> Scorer:
        """Return the scorer for weights (m,) and, where the method is conditioned on it, β (m,)."""
        ...


@renamed_in_methods("at", temperature="beta")
class BasePolicy:
    """The base model: the same scores for every trade-off."""

    def at(self, weights: Any = None, beta: Any = None) -> Scorer:
        """Return a scorer that gives the reference scores."""
        return lambda features, mask, reference: reference


@renamed_in_methods("at", temperature="beta")
@dataclass
class ConditionedPolicy:
    """One model that takes the trade-off as an input."""

    model: RankingModel

    def at(self, weights: Sequence[float] | Tensor, beta: Sequence[float] | Tensor | None = None) -> Scorer:
        """Return the scorer for any weights, and for any β if the model takes it."""
        config, device = self.model.config, next(self.model.parameters()).device
        w = check_weights(weights, len(config.objectives)).float().to(device)
        if config.takes_beta and beta is None:
            raise ValueError("this model is conditioned on β; pass beta, one for each objective")
        if beta is not None and not config.takes_beta:
            raise ValueError(
                "this model was trained at one β; pass scale (c of equation 14) instead, or train temperature-cos-dpo"
            )
        betas = None if beta is None else check_positive(beta, "beta").float().to(device)

        def score(features: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
            return self.model.score(features, w, beta=betas, mask=mask, reference=reference)

        return score


@renamed_in_methods("at", temperature="beta")
@dataclass
class FixedPolicy:
    """Networks that were trained for fixed weights, and answer for these alone.

    Without a grid they are m experts, one an objective, whose parameters are averaged with any weights.
    """

    template: RankingModel  # whose network takes their parameters
    states: Sequence[Mapping[str, Tensor]]  # of the n networks
    grid: Tensor | None = None  # (n, m)

    def at(self, weights: Sequence[float] | Tensor, beta: Any = None) -> Scorer:
        """Return the scorer for weights (m,)."""
        if beta is not None:
            raise ValueError("this method was trained at one β; pass scale (c of equation 14) instead")
        w = check_weights(weights, len(self.template.config.objectives))
        if self.grid is None:
            state = steering.soup(self.states, w)
        else:
            state = self.states[place_in_grid(self.grid, w.double())]

        def score(features: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
            # Loaded at each call: two scorers of one policy share the network.
            self.template.network.load_state_dict(state)
            return self.template.score(features, mask=mask, reference=reference)

        return score
