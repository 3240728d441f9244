"""What `bench.who_wins` trains: one cell of the map is data with a known optimum, a budget and a seed.

Every method of a cell has the same data, base model, network, batches and **total** number of optimizer steps: what a
method trains is cut from one budget, evenly. Steps are all of one size (as many lists, one pass of the network).

| method                       | models trained               | steps of each     |
|------------------------------|------------------------------|-------------------|
| `mixture`, `concat`          | one, conditioned on weights  | all               |
| `dpo-ls`, `mo-dpo`           | one for each of n trade-offs | a share of n      |
| `dpo-soup`                   | one for each of m objectives | a share of m      |

Each model may be the average of several trainings, as `mopl rank --average` makes it: these share its steps.

The experts that MO-DPO needs are its models at the ends of the grid, so it pays for n models and not for n + m.
Everything is the library's own: `mopl.ranking` and `mopl.training`, with the validation of `mopl rank`.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopl import steering
from mopl.conditioning.samplers import dirichlet_weights, fixed
from mopl.experiments.cos_dpo import modpo_loss, scalarized_loss, vertices, vertices_and_centre
from mopl.experiments.methods import TABLE
from mopl.pareto import hypervolume, weight_grid
from mopl.ranking.config import RankConfig
from mopl.ranking.evaluate import in_batches, reference_scores, score_items
from mopl.ranking.methods import Batches, ConditionedPolicy, FixedPolicy, ListSource, Policy, main_loss, score_batch
from mopl.ranking.metrics import ndcg
from mopl.ranking.model import RankingModel
from mopl.ranking.stages import order_of, shared_out, untrained
from mopl.ranking.synthetic import distance_to_optimum, expected_losses, synthetic, true_scores
from mopl.ranking.transformer import ListTransformer
from mopl.ranking.validation import Validation
from mopl.training import TrainingConfig, train

CONDITIONED = ("mixture", "concat")  # by name in the map, which is that of RankConfig.conditioning
RIVALS = ("dpo-ls", "dpo-soup", "mo-dpo")
METHODS = (*CONDITIONED, *RIVALS)


class Choice(NamedTuple):
    """How a method is trained, chosen for each budget."""

    rate: float
    average: int  # trainings that share the steps of each model and are averaged into it; see RankConfig.average


@dataclass(frozen=True)
class Sizes:
    """What all cells share."""

    objectives: int = 2
    points: int = 11
    train_lists: int = 1000
    valid_lists: int = 100
    test_lists: int = 300
    items: int = 12
    features: int = 12
    hidden: int = 32
    layers: int = 1
    batch: int = 32
    steps: int = 220  # the budget 1: of all models of a method together
    base_steps: int = 60
    warmup: float = 0.1  # of the steps of each model


@dataclass(frozen=True, order=True)
class Cell:
    """A place in the map, and a seed."""

    budget: float
    spread: float
    conflict: float
    seed: int


class Problem:
    """Data, base model and validation of one spread, conflict and seed; all budgets and methods share them."""

    def __init__(self, spread: float, conflict: float, seed: int, sizes: Sizes) -> None:
        self.sizes, self.seed = sizes, seed
        lists = (sizes.train_lists, sizes.valid_lists, sizes.test_lists)
        data = synthetic(
            sum(lists), items=sizes.items, features=sizes.features, objectives=sizes.objectives, spread=spread,
            conflict=conflict, seed=seed,
        )  # fmt: skip
        self.train, valid, self.test = data.split([count / sum(lists) for count in lists], seed=seed)
        self.names = tuple(objective.name for objective in data.objectives)
        self.config = RankConfig(
            "synthetic", hidden=sizes.hidden, layers=sizes.layers, base_hidden=sizes.hidden, base_layers=sizes.layers,
            batch_size=sizes.batch, seed=seed,
        )  # fmt: skip
        self.grid = weight_grid(sizes.objectives, sizes.points)
        self.beta = torch.ones(sizes.objectives)
        self.validation = Validation(valid, self.config)
        torch.manual_seed(seed)
        base = ListTransformer(sizes.features, sizes.hidden, sizes.layers, self.config.heads)
        settings = self._training(sizes.base_steps, self.config.learning_rate)
        train(
            base, Batches(self.train, sizes.batch, seed=seed), main_loss, settings,
            selection=self.validation.of_base(settings.steps),
        )  # fmt: skip
        self.base = base.eval()
        self.reference, valid_reference, self.test_reference = (
            reference_scores(base, split) for split in (self.train, valid, self.test)
        )
        self.validation.take_reference(valid_reference)
        self.truth = torch.stack([self.ndcg(true_scores(self.test, w, 1.0, self.test_reference)) for w in self.grid])

    def _training(self, steps: int, rate: float) -> TrainingConfig:
        return TrainingConfig(
            steps=steps, learning_rate=rate, warmup=max(1, round(self.sizes.warmup * steps)), schedule="cosine",
            seed=self.seed, log_every=steps, checkpoint_every=0,
        )  # fmt: skip

    def ndcg(self, scores: Tensor) -> Tensor:
        """Return NDCG@10 (m,) of scores (N,) of the test lists, with what is true in place of drawn labels."""
        gains, found = self.test.truth.log_probs.exp().float(), []  # type: ignore[union-attr]
        for lists in in_batches(self.test):
            padded = self.test.pad(scores.float(), lists.queries)
            labels = self.test.pad(gains, lists.queries).movedim(-1, 1)
            found.append(ndcg(padded, labels, mask=lists.mask, k=10).values)
        return torch.cat(found).double().mean(0)

    def fit(
        self,
        steps: int,
        choice: Choice,
        weights: Tensor | None = None,
        *,
        conditioning: str | None = None,
        experts: Tensor | None = None,
    ) -> RankingModel:
        """Train one model: for weights (m,), by MO-DPO if scores (N, m) of experts are given; or conditioned."""
        models = [
            self._fit(share, choice.rate, order_of(self.seed, place), weights, conditioning, experts)
            for place, share in enumerate(shared_out(steps, choice.average))
        ]
        states = [model.network.state_dict() for model in models]
        if len(states) > 1:
            models[0].network.load_state_dict(steering.soup(states, [1 / len(states)] * len(states)))
        return models[0]

    def _fit(
        self,
        steps: int,
        rate: float,
        order: int,
        weights: Tensor | None,
        conditioning: str | None,
        experts: Tensor | None,
    ) -> RankingModel:
        m, batch = self.sizes.objectives, self.sizes.batch
        config = dataclasses.replace(self.config, conditioning=conditioning or "concat")
        torch.manual_seed(self.seed)  # every model starts from the same parameters
        model = untrained(config, self.names, self.base, TABLE["dpo-ls" if weights is not None else "weight-cos-dpo"])
        if weights is None:
            asked = vertices_and_centre(m)
            sampler = dirichlet_weights(m, batch, concentration=config.concentration, per="list", seed=self.seed)
        else:
            asked, sampler = weights[None], fixed(weights, batch)
        if experts is None:
            loss = scalarized_loss(score_batch, config.list_loss, self.names, common_beta=1.0)
        else:
            assert weights is not None
            anchor = int(weights.argmax())
            loss = modpo_loss(score_batch, config.list_loss, anchor, self.names[anchor])
        source = ListSource(
            self.train, batch, seed=order, reference=self.reference, weights=sampler,
            beta=fixed(self.beta, batch), experts=experts,
        )  # fmt: skip
        selection = self.validation.of_tuned(asked, self.beta, steps)
        train(model, source, loss, self._training(steps, rate), selection=selection)
        return model.eval()

    def policy(self, method: str, steps: int, choice: Choice) -> tuple[Policy, list[int]]:
        """Train a method with `steps` in all; return it and the steps of each of its models."""
        if method in CONDITIONED:
            return ConditionedPolicy(self.fit(steps, choice, conditioning=method)), [steps]
        ends = vertices(self.sizes.objectives)
        asked = ends if method == "dpo-soup" else self.grid
        shares = shared_out(steps, len(asked))
        models: list[RankingModel | None] = [None] * len(asked)
        experts = None
        if method == "mo-dpo":
            places = [int((self.grid - end).abs().sum(1).argmin()) for end in ends]
            for place in places:
                models[place] = self.fit(shares[place], choice, self.grid[place])
            experts = torch.stack([self._scores(models[place]) for place in places], 1)
        for place, w in enumerate(asked):
            if models[place] is None:
                models[place] = self.fit(shares[place], choice, w, experts=experts)
        states = [{k: v.clone() for k, v in model.network.state_dict().items()} for model in models]  # type: ignore[union-attr]
        return FixedPolicy(models[0], states, None if method == "dpo-soup" else self.grid), shares  # type: ignore[arg-type]

    def _scores(self, model: Any) -> Tensor:
        """Return the scores (N,) of the training lists under a model of one trade-off."""

        def scorer(features: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
            return model.score(features, mask=mask, reference=reference)

        return score_items(scorer, self.train, self.reference)

    def measure(self, policy: Policy) -> dict[str, float]:
        """Return what a policy reaches on the test lists, against the truth."""
        test, reference = self.test, self.test_reference
        scores = [score_items(policy.at(w), test, reference) for w in self.grid]
        reached = torch.stack([self.ndcg(each) for each in scores])
        lost = [distance_to_optimum(test, each, w, 1.0, reference) for each, w in zip(scores, self.grid, strict=True)]
        losses = torch.stack([expected_losses(test, each, 1.0, reference) for each in scores])
        untouched = expected_losses(test, reference, 1.0, reference)  # of the base model
        zeros = [0.0] * self.sizes.objectives
        return {
            "hypervolume": hypervolume(reached, zeros, maximise=True),
            "of_the_optimum": hypervolume(reached, zeros, maximise=True)
            / hypervolume(self.truth, zeros, maximise=True),
            "regret": sum(lost) / len(lost),
            "loss_hypervolume": hypervolume(untouched - losses, zeros, maximise=True),
        }


def run(problem: Problem, cell: Cell, method: str, choice: Choice) -> dict[str, Any]:
    """Train and measure one method in one cell."""
    began = time.process_time()
    total = round(cell.budget * problem.sizes.steps)
    policy, steps = problem.policy(method, total, choice)
    seconds = time.process_time() - began
    return {
        "budget": cell.budget, "spread": cell.spread, "conflict": cell.conflict, "seed": cell.seed, "method": method,
        "rate": choice.rate, "average": choice.average, **problem.measure(policy), "steps": total, "models": len(steps),
        "cpu_seconds": round(seconds, 2),
    }  # fmt: skip
