"""What COS-DPO and its baselines compute, whether scores are those of a ranker or log-probabilities of responses.

`mopl.experiments.methods` has the table of the methods. An application brings what differs: the batch of a step
(`StepSource`), the scores that a model gives it (`Scored`), the loss of each objective, and how one model is built,
trained and saved (`CosDpoStages`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mopl import steering
from mopl._arguments import check_choice
from mopl.conditioning.samplers import Sampler, box_betas, dirichlet_weights, fixed
from mopl.experiments.methods import LIST_LOSSES, TABLE, Method
from mopl.experiments.stages import RunStages, Trained
from mopl.losses import listwise_dpo, plackett_luce, scalarize
from mopl.training import part_of_batch, shuffled_indices
from mopl.training.batches import to_device

if TYPE_CHECKING:
    from mopl.experiments.driver import Recipe

B = TypeVar("B", bound="StepBatch")
StepLoss = Callable[[nn.Module, Any, int], tuple[Tensor, dict[str, Tensor]]]  # model, batch, step -> mean, logs

# ---------------------------------------------------------------- what a step sees


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One part of a step's batch with everything a loss needs."""

    lists: Any  # the lists, a batch that has `to` and a length
    weights: Tensor  # (B, m) w of each list
    beta: Tensor  # (B, m) β, or β / ‖β‖₁ for `temperature-cos-dpo`
    reference: Tensor | None = None  # (B, K) scores of the reference; None if they are computed in the step
    experts: Tensor | None = None  # (B, m, K) scores of the experts, for `mo-dpo`

    def __len__(self) -> int:
        return len(self.lists)

    def to(self: B, device: torch.device | str) -> B:
        """Return the batch on `device`."""
        return type(self)(**to_device(vars(self), device))


class StepSource(ABC):
    """The batches of a training on `count` lists: a function of the step, cut into parts that the cut does not change.

    A step's batch has at most all lists, in an order drawn from `seed`; `weights` and `beta` of a step are (B, m),
    drawn for the whole batch.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, weights: Sampler, beta: Sampler) -> None:
        self.count, self.batch_size, self.seed = count, min(batch_size, count), seed
        self.weights, self.beta = weights, beta

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Any:
        """Return part `rank` of `world_size` of the batch of `step`."""
        rows = part_of_batch(self.batch_size, rank, world_size)
        chosen = shuffled_indices(self.count, self.batch_size, seed=self.seed, step=step)[rows]
        return self.batch(chosen, self.weights(step)[rows], self.beta(step)[rows])

    @abstractmethod
    def batch(self, chosen: np.ndarray, weights: Tensor, beta: Tensor) -> StepBatch:
        """Return the batch of these lists, each of which has a row of `weights` and of `beta`, (B, m)."""


# ---------------------------------------------------------------- losses


@dataclass(frozen=True)
class Scored:
    """What a loss compares."""

    scores: Tensor  # (B, K) of the model
    reference: Tensor  # (B, K)
    experts: Tensor | None = None  # (B, m, K), for `mo-dpo`
    logs: dict[str, Tensor] = field(default_factory=dict)  # what else is logged
    alone: Tensor | None = None  # (B, m, K) for each objective alone, where they come from the same pass


Score = Callable[[nn.Module, Any], Scored]
# scores (B, K), lists, β, reference (B, K) or None, objective=None -> (B, m), or (B, 1) of one objective
VectorLoss = Callable[..., Tensor]


@dataclass(frozen=True)
class ListLoss:
    """The loss of each objective of each list, on scores (B, K).

    Args:
        loss: `"listnet"`: `mopl.losses.listwise_dpo`, the loss of the paper; `"plackett-luce"`: the likelihood of the
            whole ranking by labels.
        ties: How Plackett-Luce treats equal labels.
        last_group: Whether Plackett-Luce charges the items of the lowest label; `"free"` takes them as unranked,
            which is what zeros of a sparse label mean.
        top_k: How many ranks Plackett-Luce sees; None for all.
    """

    CHOICES: ClassVar[tuple[str, ...]] = LIST_LOSSES

    loss: str = "listnet"
    ties: Literal["breslow", "efron", "exact", "random"] = "breslow"
    last_group: Literal["charged", "free"] = "charged"
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.loss, self.CHOICES, "loss")

    @property
    def needs_order(self) -> bool:
        """Whether batches should bring the items sorted by label."""
        return self.loss == "plackett-luce" and self.ties != "random"

    @property
    def function(self) -> Callable[..., Tensor]:
        """What computes it: from ListNet's targets, which are normalised already, or from labels."""
        if self.loss == "listnet":
            return partial(listwise_dpo, normalize=None)
        return partial(plackett_luce, top_k=self.top_k, ties=self.ties, last_group=self.last_group)

    def __call__(
        self,
        scores: Tensor,  # (B, K)
        lists: Any,
        beta: float | Tensor,  # number or (B, m)
        reference: Tensor | None = None,  # (B, K)
        objective: int | None = None,
    ) -> Tensor:  # (B, m), or (B, 1) for one objective
        """Return the loss vector of a batch; only that of `objective` where one is given."""
        chosen = slice(None) if objective is None else slice(objective, objective + 1)
        labels = lists.targets if self.loss == "listnet" else lists.labels
        options: dict[str, Any] = {"reference": reference, "beta": beta, "mask": lists.mask}
        if self.needs_order and lists.order is not None:
            options["order"] = lists.order[:, chosen]
        return self.function(scores, labels[:, chosen], reduction="none", **options)


def scalarized(
    vector: Tensor,  # (B, m)
    weights: Tensor,  # (B, m)
    *,
    mask: Tensor | None = None,  # (B, m) bool
    how: Literal["linear", "chebyshev", "smooth_chebyshev"] = "linear",
    penalty: float = 0.0,
    penalty_sign: Literal["as_printed", "cosmos"] = "as_printed",
) -> Tensor:  # (B,)
    """Return one number a list: its losses combined by its weights, with the cosine penalty (equations 12, 16, 18).

    Args:
        vector: The loss of each objective.
        weights: w.
        mask: Which objectives count in a list; all where it is None. A list in which none does gives 0.
        how: See `mopl.losses.scalarize`.
        penalty: λ, the factor of the penalty of each list's own loss vector, which so does not depend on how a batch
            is split.
        penalty_sign: See `mopl.losses.scalarize.cosine_penalty`.
    """
    if mask is not None:
        weights = weights * mask
    if how == "linear":
        value = scalarize.linear(vector, weights)
    else:
        combine = {"chebyshev": scalarize.chebyshev, "smooth_chebyshev": scalarize.smooth_chebyshev}[how]
        if mask is None:
            value = combine(vector, weights)
        else:  # what does not count is -infinity and so never the largest
            some = mask.any(1, keepdim=True)
            counts = mask | ~some
            value = combine(vector, torch.where(counts, weights, 1.0), torch.where(counts, 0.0, torch.inf))
            value = torch.where(some[:, 0], value, 0.0)
    return value + penalty * scalarize.cosine_penalty(vector, weights, penalty_sign) if penalty else value


def scalarized_loss(
    score: Score,
    loss: VectorLoss,
    names: Sequence[str],
    *,
    penalty: float = 0.0,
    penalty_sign: Literal["as_printed", "cosmos"] = "as_printed",
    common_beta: float | None = None,
) -> StepLoss:
    """Return the training loss of a model, the mean over lists of `scalarized`; `names` are those of the objectives.

    Where β is one number, `common_beta`, one softmax serves all objectives. Where the scores of each objective alone
    are known, a list counts as the mean over the drawn weights and the m ends, at which one weight is 1.
    """

    def step_loss(model: nn.Module, batch: StepBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        found = score(model, batch)
        vector = loss(found.scores, batch.lists, batch.beta if common_beta is None else common_beta, found.reference)
        value = scalarized(vector, batch.weights, penalty=penalty, penalty_sign=penalty_sign)
        if found.alone is not None:
            for j, scores in enumerate(found.alone.unbind(1)):
                beta = batch.beta[:, j : j + 1] if common_beta is None else common_beta
                value = value + loss(scores, batch.lists, beta, found.reference, objective=j)[:, 0]
            value = value / (1 + len(names))
        logs = {f"loss/{name}": mean for name, mean in zip(names, vector.detach().mean(0), strict=True)}
        return value.mean(), logs | found.logs

    return step_loss


def modpo_loss(score: Score, loss: VectorLoss, anchor: int, name: str) -> StepLoss:
    """Return the training loss of MO-DPO: that of objective `anchor`, called `name`, of the reward of equation (17)."""

    def step_loss(model: nn.Module, batch: StepBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        found = score(model, batch)
        assert found.experts is not None
        reward = steering.modpo_reward(found.scores, found.reference, found.experts.unbind(1), batch.weights, anchor)
        value = loss(reward, batch.lists, batch.beta[:, anchor : anchor + 1], objective=anchor).mean()
        return value, {f"loss/{name}": value.detach()} | found.logs

    return step_loss


# ---------------------------------------------------------------- models for fixed weights


def vertices(objectives: int) -> Tensor:
    """Return the weights of the experts, (m, m) float64."""
    return torch.eye(objectives, dtype=torch.float64)


def vertices_and_centre(objectives: int) -> Tensor:
    """Return the weights that a conditioned model is validated at, (m + 1, m); the one that there is for m = 1."""
    found = vertices(objectives)
    return found if objectives == 1 else torch.cat([found, found.mean(0, keepdim=True)])


def vector_name(weights: Sequence[float] | Tensor) -> str:
    """Return weights as a part of a folder's name: `0.25-0.75`."""
    return "-".join(f"{float(w):.4g}" for w in weights)


def model_folder(run: Path, method: str, weights: Sequence[float] | Tensor) -> Path:
    """Return where a run has the model that a baseline trained for these weights."""
    return run / "models" / f"{TABLE[method].kind}-{vector_name(weights)}"


def model_folders(run: Path, method: str, grid: Tensor) -> list[Path]:
    """Return where the models are that a baseline answers with: the experts to be averaged, or those of the grid."""
    trained = vertices(grid.shape[1]) if TABLE[method].averages else grid
    return [model_folder(run, method, w) for w in trained]


def place_in_grid(grid: Tensor, weights: Tensor, method: str = "this method") -> int:
    """Return which row of a grid (n, m) some weights (m,) are, up to 1e-4 in all.

    Raises:
        ValueError: If they are none; the message names the nearest.
    """
    distance = (grid - weights).abs().sum(1)
    nearest = int(distance.argmin())
    if distance[nearest] > 1e-4:
        known, asked = (" ".join(f"{x:.4g}" for x in w.tolist()) for w in (grid[nearest], weights))
        raise ValueError(
            f"{method} trained a model for each of {len(grid)} weight vectors, none for {asked}; the nearest is "
            f"{known}. Only weight-cos-dpo takes any"
        )
    return nearest


# ---------------------------------------------------------------- what a method trains


@dataclass(frozen=True, eq=False)
class Part:
    """One of the models that a method trains."""

    name: str  # of its training, in the log and in messages
    folder: Path  # the method's folder, where the model is conditioned; else the model's own
    method: Method
    weights: Tensor  # (n, m) it is trained for; of a conditioned model the vertices and the centre of the simplex
    sample_weights: Sampler  # of a step
    sample_beta: Sampler  # of a step
    loss: StepLoss
    experts: Any = None  # the experts' scores, for `mo-dpo`


class CosDpoStages(RunStages):
    """Trains the models of a run of COS-DPO or of a baseline; `beta` is (m,), `batch_size` that of a step."""

    def __init__(
        self,
        run: Recipe,
        objectives: Sequence[str],
        beta: Tensor,
        batch_size: int,
        score: Score,
        loss: VectorLoss,
    ) -> None:
        super().__init__(run)
        self.objectives, self.grid = tuple(objectives), run.grid
        self.beta, self.batch_size, self.score = beta, batch_size, score
        self.loss: Any = loss  # an application knows more of its own

    @abstractmethod
    def expert_scores(self) -> Any:
        """Return the scores of all training lists under the m experts, which are trained."""

    @abstractmethod
    def train_part(self, part: Part) -> Trained:
        """Train one model of a method unless it is there."""

    def train(self, method: str, folder: Path) -> dict[str, Trained]:
        """Train the model of a conditioned method, or those that a baseline answers with."""
        kind = TABLE[method]
        if kind.conditioned:
            return {method: self.train_part(self.conditioned_part(method, kind, folder))}
        done: dict[str, Trained] = {}
        if kind.experts:
            done |= self.train_fixed("dpo-soup", vertices(len(self.objectives)))
        if kind.grid:  # dpo-ls finds experts among these, if they are there already
            done |= self.train_fixed(method, self.grid, self.expert_scores() if kind.experts else None)
        return done

    def conditioned_part(self, method: str, kind: Method, folder: Path) -> Part:
        """Return the training of one model for every trade-off."""
        config, m = self.config, len(self.objectives)
        per: dict[str, Any] = {"per": config.weights_per, "seed": config.seed}
        beta = fixed(self.beta, self.batch_size)
        if kind.takes_beta:
            low, high = ((factor * self.beta).tolist() for factor in config.beta_range)
            beta = box_betas(m, self.batch_size, low=low, high=high, **per)
        loss = scalarized_loss(
            self.score, self.loss, self.objectives, penalty=config.penalty, penalty_sign=config.penalty_sign,
            common_beta=None if kind.takes_beta else self._common_beta(),
        )  # fmt: skip
        weights = dirichlet_weights(m, self.batch_size, concentration=config.concentration, **per)
        return Part(method, folder, kind, vertices_and_centre(m), weights, beta, loss)

    def train_fixed(self, method: str, grid: Tensor, experts: Any = None) -> dict[str, Trained]:
        """Train a model for each row of `grid`: DPO on the weighted sum, or MO-DPO where experts are given."""
        done: dict[str, Trained] = {}
        kind, count = TABLE[method], self.batch_size
        for w in grid:
            if experts is None:
                loss = scalarized_loss(self.score, self.loss, self.objectives, common_beta=self._common_beta())
            else:
                anchor = int(w.argmax())
                loss = modpo_loss(self.score, self.loss, anchor, self.objectives[anchor])
            name = f"{kind.kind} {vector_name(w)}"
            done[name] = self.train_part(
                Part(
                    name, model_folder(self.path, method, w), kind, w[None], fixed(w, count), fixed(self.beta, count),
                    loss, experts,
                )
            )  # fmt: skip
        return done

    def _common_beta(self) -> float | None:
        values = set(self.beta.tolist())
        return values.pop() if len(values) == 1 else None
