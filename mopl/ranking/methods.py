"""COS-DPO and its baselines: what a training step of each sees, and how each answers for a trade-off afterwards.

| method                | models trained              | loss of a list                        | answers for       |
|-----------------------|-----------------------------|---------------------------------------|-------------------|
| `weight-cos-dpo`      | one, conditioned on w       | sum_j w_j L_j, w ~ Dirichlet(alpha)   | every w           |
| `temperature-cos-dpo` | one, conditioned on w and β | the same at β / ‖β‖₁, β from a box    | every w and β     |
| `dpo-ls`              | one for each w of the grid  | sum_j w_j L_j                         | the grid          |
| `dpo-soup`            | m experts                   | L_j                                   | every w, averaged |
| `mo-dpo`              | m experts, one for each w   | L_i of equation (17), w_i the largest | the grid          |

Source: Ren et al., COS-DPO, UAI 2025: sections 3.1 and 3.3, appendices A.1 and A.2. Every model is trained for the
same number of steps, from the same initialisation, on the same batches. The first three weight losses (an arithmetic
mixture of the label distributions), `mo-dpo` and a soup weight scores (a geometric one): see `mopl.losses.scalarize`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mopl import steering
from mopl._arguments import check_choice, check_positive
from mopl.conditioning import check_weights
from mopl.conditioning.samplers import Sampler
from mopl.losses import listwise_dpo, plackett_luce, scalarize
from mopl.ranking.batch import Batch
from mopl.ranking.batches import Batches
from mopl.ranking.data import RankingData
from mopl.ranking.model import RankingModel
from mopl.training import part_of_batch

METHODS = ("weight-cos-dpo", "temperature-cos-dpo", "dpo-ls", "dpo-soup", "mo-dpo")
LOSSES = ("listnet", "plackett-luce")


@dataclass(frozen=True)
class ListLoss:
    """The list loss of every objective.

    Args:
        loss: `"listnet"`: `mopl.losses.listwise_dpo`, the loss of the paper; `"plackett-luce"`: the likelihood of the
            whole ranking by labels.
        ties: How Plackett-Luce treats equal labels.
        last_group: Whether Plackett-Luce charges the items of the lowest label; `"free"` takes them as unranked,
            which is what zeros of a sparse label mean.
        top_k: How many ranks Plackett-Luce sees; None for all.
    """

    loss: Literal["listnet", "plackett-luce"] = "listnet"
    ties: Literal["breslow", "efron", "exact", "random"] = "breslow"
    last_group: Literal["charged", "free"] = "charged"
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.loss, LOSSES, "loss")

    @property
    def needs_order(self) -> bool:
        """Whether batches should bring the items sorted by label."""
        return self.loss == "plackett-luce" and self.ties != "random"

    def __call__(
        self,
        scores: Tensor,  # (B, K)
        lists: Batch,
        temperature: float | Tensor,  # number or (B, m)
        reference: Tensor | None = None,  # (B, K)
        objective: int | None = None,
    ) -> Tensor:  # (B, m), or (B, 1) for one objective
        """Return the loss vector of a batch; only that of `objective` where one is given."""
        chosen = slice(None) if objective is None else slice(objective, objective + 1)
        options: dict[str, Any] = {"reference": reference, "beta": temperature, "mask": lists.mask}
        if self.loss == "listnet":
            # The targets are normalised by each objective's own rule already.
            return listwise_dpo(scores, lists.targets[:, chosen], normalize=None, reduction="none", **options)
        order = None if lists.order is None or not self.needs_order else lists.order[:, chosen]
        options |= {"top_k": self.top_k, "ties": self.ties, "last_group": self.last_group, "order": order}
        return plackett_luce(scores, lists.labels[:, chosen], reduction="none", **options)


@dataclass(frozen=True)
class TrainingBatch:
    """One part of a step's batch with everything a loss needs.

    Attributes:
        lists: The lists.
        reference: (B, K) the base model's scores.
        weights: (B, m) the trade-off of each list.
        temperature: (B, m) β, or β / ‖β‖₁ for `temperature-cos-dpo`.
        experts: (B, m, K) scores of the experts, for `mo-dpo`.
    """

    lists: Batch
    reference: Tensor
    weights: Tensor
    temperature: Tensor
    experts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lists)

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Return the batch on `device`."""
        return TrainingBatch(**{f.name: _moved(getattr(self, f.name), device) for f in dataclasses.fields(self)})


def _moved(value: Any, device: torch.device | str) -> Any:
    return None if value is None else value.to(device)


class ListSource:
    """The batches of a training: a function of the step, cut into parts in which nothing depends on the cut.

    Args:
        data: The lists.
        batch_size: Lists in a step's batch; at most all of them.
        seed: Seed of the order of the lists.
        reference: (N,) the base model's scores.
        weights: step -> (B, m), drawn for the whole batch.
        temperature: step -> (B, m), drawn for the whole batch.
        experts: (N, m) the experts' scores, for `mo-dpo`.
        order: Bring the items sorted by label.
    """

    def __init__(
        self,
        data: RankingData,
        batch_size: int,
        *,
        seed: int,
        reference: Tensor,
        weights: Sampler,
        temperature: Sampler,
        experts: Tensor | None = None,
        order: bool = False,
    ) -> None:
        self._batches = Batches(data, batch_size, seed=seed)
        self.batch_size = self._batches.batch_size
        self.data, self.reference, self.experts, self.order = data, reference, experts, order
        self.weights, self.temperature = weights, temperature

    def __call__(self, step: int, rank: int, world_size: int) -> TrainingBatch:
        """Return part `rank` of `world_size` of the batch of `step`."""
        rows = part_of_batch(self.batch_size, rank, world_size)
        queries = self._batches.queries(step)[rows]
        experts = None if self.experts is None else self.data.pad(self.experts, queries).movedim(-1, 1)
        return TrainingBatch(
            lists=self.data.batch(queries, order=self.order),
            reference=self.data.pad(self.reference, queries),
            weights=self.weights(step)[rows],
            temperature=self.temperature(step)[rows],
            experts=experts,
        )


def scalarized_loss(
    list_loss: ListLoss,
    names: Sequence[str],
    *,
    penalty: float = 0.0,
    penalty_sign: Literal["as_printed", "cosmos"] = "as_printed",
    common_temperature: float | None = None,
) -> Callable[[nn.Module, TrainingBatch, int], tuple[Tensor, dict[str, Tensor]]]:
    """Return the training loss sum_j w_j L_j + penalty * G, a mean over lists, of a model (equations 12, 16 and 18).

    The penalty is that of each list's own loss vector, so that it does not depend on how a batch is split.

    Args:
        list_loss: The loss of each objective.
        names: Names of the objectives, for the log.
        penalty: λ, the factor of the cosine penalty.
        penalty_sign: See `mopl.losses.scalarize.cosine_penalty`.
        common_temperature: β where it is one number: then one softmax serves all objectives.
    """

    def loss(model: nn.Module, batch: TrainingBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        lists = batch.lists
        config = _config_of(model)
        scores = model(
            lists.features,
            batch.weights if config.conditioned else None,
            temperature=batch.temperature if config.temperature else None,
            mask=lists.mask,
            reference=batch.reference,
        )
        beta = batch.temperature if common_temperature is None else common_temperature
        vector = list_loss(scores, lists, beta, batch.reference)
        value = scalarize.linear(vector, batch.weights)
        if penalty:
            value = value + penalty * scalarize.cosine_penalty(vector, batch.weights, penalty_sign)
        means = vector.detach().mean(0)
        return value.mean(), {f"loss/{name}": mean for name, mean in zip(names, means, strict=True)}

    return loss


def modpo_loss(
    list_loss: ListLoss, anchor: int, name: str
) -> Callable[[nn.Module, TrainingBatch, int], tuple[Tensor, dict[str, Tensor]]]:
    """Return the training loss of MO-DPO: the anchor objective's, of the reward of equation (17)."""

    def loss(model: nn.Module, batch: TrainingBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.experts is not None
        scores = model(batch.lists.features, mask=batch.lists.mask, reference=batch.reference)
        reward = steering.modpo_reward(scores, batch.reference, batch.experts.unbind(1), batch.weights, anchor)
        temperature = batch.temperature[:, anchor : anchor + 1]
        value = list_loss(reward, batch.lists, temperature, objective=anchor).mean()
        return value, {f"loss/{name}": value.detach()}

    return loss


def main_loss(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the base model's training loss: ListNet on the main objective."""
    targets = batch.main_targets[:, None]
    return listwise_dpo(model(batch.features, batch.mask), targets, mask=batch.mask, normalize=None), {}


def _config_of(model: nn.Module) -> Any:
    """Return the config of a ranking model behind whatever DDP wraps around it."""
    return getattr(model, "module", model).config


class Policy(Protocol):
    """A trained method: gives, for a trade-off, a function that scores lists."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives."""
        ...

    def at(self, weights: Sequence[float] | Tensor, temperature: Sequence[float] | Tensor | None = None) -> Scorer:
        """Return the scorer for weights (m,) and, where the method is conditioned on it, temperatures (m,)."""
        ...


Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]  # features (B, K, F), mask (B, K), reference (B, K) -> (B, K)


@dataclass
class BasePolicy:
    """The base model: the same scores for every trade-off."""

    objectives: tuple[str, ...]

    def at(self, weights: Any = None, temperature: Any = None) -> Scorer:
        """Return a scorer that gives the reference scores."""
        return lambda features, mask, reference: reference


@dataclass
class ConditionedPolicy:
    """One model that takes the trade-off as an input."""

    model: RankingModel

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives."""
        return self.model.config.objectives

    def at(self, weights: Sequence[float] | Tensor, temperature: Sequence[float] | Tensor | None = None) -> Scorer:
        """Return the scorer for any weights, and for any temperatures if the model takes them."""
        device = next(self.model.parameters()).device
        w = check_weights(weights, len(self.objectives)).float().to(device)
        if self.model.config.temperature and temperature is None:
            raise ValueError("this model is conditioned on temperatures; pass one for each objective")
        if temperature is not None and not self.model.config.temperature:
            raise ValueError(
                "this model was trained at one temperature; pass scale (c of equation 14) instead, or train "
                "temperature-cos-dpo"
            )
        beta = None if temperature is None else check_positive(temperature, "temperature").float().to(device)

        def score(features: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
            return self.model.score(features, w, temperature=beta, mask=mask, reference=reference)

        return score


@dataclass
class SoupPolicy:
    """Experts whose parameters are averaged with the weights."""

    template: RankingModel
    experts: Sequence[Mapping[str, Tensor]]  # state dicts of the networks, one an objective

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives."""
        return self.template.config.objectives

    def at(self, weights: Sequence[float] | Tensor, temperature: Any = None) -> Scorer:
        """Return the scorer of the average for any weights."""
        _refuse_temperature(temperature)
        mixed = steering.soup(self.experts, check_weights(weights, len(self.experts)))

        def score(features: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
            # Loaded at each call: two scorers of one policy share the network.
            self.template.network.load_state_dict(mixed)
            return self.template.score(features, mask=mask, reference=reference)

        return score


@dataclass
class GridPolicy:
    """One model for each trade-off of a grid, and none between them."""

    template: RankingModel
    grid: Tensor  # (n, m)
    states: Sequence[Mapping[str, Tensor]]

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives."""
        return self.template.config.objectives

    def at(self, weights: Sequence[float] | Tensor, temperature: Any = None) -> Scorer:
        """Return the scorer of the model that was trained for exactly these weights."""
        _refuse_temperature(temperature)
        w = check_weights(weights, self.grid.shape[1]).double()
        distance = (self.grid - w).abs().sum(1)
        nearest = int(distance.argmin())
        if distance[nearest] > 1e-4:
            known = " ".join(f"{x:.4g}" for x in self.grid[nearest].tolist())
            raise ValueError(
                f"this method trained a model for each of {len(self.grid)} weight vectors, none for "
                f"{' '.join(f'{x:.4g}' for x in w.tolist())}; the nearest is {known}. Only weight-cos-dpo takes any"
            )

        def score(features: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
            self.template.network.load_state_dict(self.states[nearest])
            return self.template.score(features, mask=mask, reference=reference)

        return score


def _refuse_temperature(temperature: Any) -> None:
    if temperature is not None:
        raise ValueError("this method was trained at one temperature; pass scale (c of equation 14) instead")
