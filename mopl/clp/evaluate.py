"""What a policy earns on held-out prompts at each trade-off: rewards, KL to the reference, value, cost of decoding.

Shapes: `Q` prompts, `n` trade-offs, `m` rewards. Every trade-off is sampled with the same seed.

* *Reward*: mean of R_j over the answers, in its own unit. Higher is better.
* *KL*: mean of log π(y|x) - log π_ref(y|x) over the sampled answers, in nats: an unbiased estimate of KL(π ‖ π_ref) of
  whole responses, which may come out below 0 near 0. The main figure of a front, lower is better.
* *Value*: c(α) w·R - α KL of the objective, with R in the scale of the training (where that follows the rewards, in the
  one that it begins with, which all methods share); and the front of the values of single
  rewards, c(α) R_j - α KL, whose weighted sum it is.
* *Cost*: seconds of generation for a token, relative to the untrained model; and how many models run for a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._restoring import seeded
from mopl.clp.config import ClpConfig
from mopl.clp.policies import new_policy, release
from mopl.clp.prompts import Prompts
from mopl.clp.rollout import Answers
from mopl.clp.stages import Stages
from mopl.losses.policy_gradient import reward_coefficient
from mopl.pareto import hypervolume, spearman
from mopl.rewards.scale import RewardScale

MAIN = "KL to the reference"


@dataclass(frozen=True)
class Evaluation:
    """Figures at each trade-off."""

    weights: Tensor | None  # (n, m), or None for the untrained model
    kl_weight: float  # the KL weight that was asked for
    rewards: Tensor  # (Q, n, m) mean over a prompt's answers, NaN where a reward failed on all
    kl: Tensor  # (Q, n), nats
    texts: list[list[str]]  # n x Q first answers
    seconds: float  # of generation, of all of it
    tokens: int  # generated
    model_runs: int = 1  # models that run for a token

    @property
    def mean_rewards(self) -> Tensor:
        """(n, m)."""
        return self.rewards.nanmean(0)

    def summary(
        self,
        scale: RewardScale,
        config: ClpConfig,
        objectives: Sequence[str],
        reference_point: Sequence[float],
        base: Evaluation,
    ) -> dict[str, Any]:
        """Return what `evaluation.json` holds.

        Args:
            scale: Scale of the rewards in the objective.
            config: Settings.
            objectives: Names of the rewards.
            reference_point: Of the hypervolume of mean rewards; that of values is its own value at KL 0.
            base: The untrained model's figures, for the cost of decoding.
        """
        factor = reward_coefficient(self.kl_weight, config.kl_form)
        values = factor * scale(self.mean_rewards) - self.kl_weight * self.kl.mean(0)[:, None]  # (n, m)
        value_reference = factor * scale(torch.tensor([list(reference_point)]))[0]
        figures: dict[str, Any] = {
            "objectives": list(objectives), "kl_weight": self.kl_weight,
            "weights": None if self.weights is None else self.weights.tolist(),
            "rewards": self.mean_rewards.tolist(), "kl": self.kl.mean(0).tolist(),
            "value": None if self.weights is None else (self.weights * values).sum(-1).tolist(),
            "objective_values": values.tolist(),
            "value_hypervolume": hypervolume(values, value_reference, maximise=True),
            "value_reference_point": value_reference.tolist(),
            "missing": float(self.rewards.isnan().double().mean()),
            "model_runs_per_token": self.model_runs,
            "seconds_per_token": self.seconds / max(self.tokens, 1),
        }  # fmt: skip
        own = base.seconds / max(base.tokens, 1)
        figures["seconds_relative_to_base"] = figures["seconds_per_token"] / own if own else None
        if self.weights is not None and len(self.weights) > 1:
            rewards = self.mean_rewards
            # 1: the more a reward is asked for, the more of it there is. Its spread: from least to most asked for.
            figures["spearman"] = [spearman(w, r) for w, r in zip(self.weights.T, rewards.T, strict=True)]
            figures["spread"] = [
                float(r[int(w.argmax())] - r[int(w.argmin())]) for w, r in zip(self.weights.T, rewards.T, strict=True)
            ]
        return figures


class Evaluator:
    """Answers the held-out prompts of a run.

    Args:
        stages: The run's policies, sampler and rewards.
        prompts: The held-out prompts.
    """

    def __init__(self, stages: Stages, prompts: Prompts) -> None:
        self.stages, self.config, self.sampler = stages, stages.config, stages.sampler
        asked = prompts.repeated(self.config.eval_samples)
        self.texts, self.tokens = asked.texts, asked.tokens

    def base(self) -> Evaluation:
        """Return the figures of the untrained model."""
        base = self.stages.base
        return self._evaluation(None, self.config.kl_weight[0], [self._plain(base, self.tokens)], 1)

    def method(self, method: str, folder: Path, grid: Tensor) -> list[Evaluation]:
        """Return the figures of a method on a grid of weights (n, m), one evaluation for each of its KL weights."""
        if method == "logit-mixing":
            experts = self.stages.experts()
            asked = [self._mixed(experts, w) for w in grid]
            return [self._evaluation(grid, self.config.kl_weight[0], asked, len(experts))]
        if method == "dera":
            return self._dera(grid)
        rounds: dict[float, list[Any]] = {kl_weight: [] for kl_weight in self.config.kl_weights(method)}
        with self.stages.policy(method, folder / "model") as policy:
            for kl_weight, asked in rounds.items():
                for w in grid:
                    own = [policy.tokens(tokens, w, kl_weight, self.sampler.tokenizer) for tokens in self.tokens]
                    with policy.at(w, kl_weight) as model:
                        asked.append(self._plain(model, own))
        # Adapters are out of the language model now, which is the reference again.
        return [self._evaluation(grid, kl_weight, asked, 1) for kl_weight, asked in rounds.items()]

    def _dera(self, grid: Tensor) -> list[Evaluation]:
        """Move the policy of the smallest α to the other ones by mixing it with the reference at every token."""
        config, strongest = self.config, min(self.config.kl_weight)
        rounds: dict[float, list[Any]] = {kl_weight: [] for kl_weight in config.kl_weight}
        for w in grid:
            with self.stages.policy("clp", self.stages.clp_folder / "model") as policy:
                merged = policy.merge(w, strongest)
            for kl_weight in config.kl_weight:
                share = kappa(kl_weight, config) / kappa(strongest, config)
                rounds[kl_weight].append(self._mixed([merged, self.stages.base], [share, 1 - share]))
        return [self._evaluation(grid, kl_weight, asked, 2) for kl_weight, asked in rounds.items()]

    @torch.no_grad()
    def _plain(self, model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Answers, Tensor]:
        """Return how one model answers the prompts as it reads them, and log π of each answer (R,)."""
        with seeded(self.config.seed):
            answers = self.sampler.sample(model, prompts)
            return answers, self.sampler.score(model, prompts, answers.tokens)[0].double().sum(1).cpu()

    @torch.no_grad()
    def _mixed(self, several: Sequence[Any], coefficients: Any) -> tuple[Answers, Tensor]:
        """Return the same of a mixture of models at every token."""
        from mopl.decoding import MixedLogits

        shares = torch.as_tensor(coefficients, dtype=torch.float64)
        with seeded(self.config.seed):
            answers = self.sampler.sample(
                several[0], self.tokens,
                processor=lambda mask: MixedLogits(several[1:], shares.to(mask.device), mask),
            )  # fmt: skip
        assert answers.log_prob is not None
        return answers, answers.log_prob

    def _evaluation(
        self, weights: Tensor | None, kl_weight: float, asked: Sequence[tuple[Answers, Tensor]], runs: int
    ) -> Evaluation:
        """Score the answers of several trade-offs and compare them with the reference."""
        count, base = self.config.eval_samples, self.stages.base
        rewards, kl = [], []
        for answers, log_prob in asked:
            log_p0 = self.sampler.score(base, self.tokens, answers.tokens)[0].double().sum(1).cpu()
            kl.append((log_prob - log_p0).view(-1, count).mean(1))
            values = self.stages.rewards(answers.texts, self.texts).double()
            rewards.append(values.view(-1, count, values.shape[1]).nanmean(1))
        return Evaluation(
            weights, kl_weight, torch.stack(rewards, 1), torch.stack(kl, 1), [a.texts[::count] for a, _ in asked],
            sum(a.seconds for a, _ in asked), sum(len(t) for a, _ in asked for t in a.tokens), runs,
        )  # fmt: skip


def kept_parameters(base: nn.Module, config: ClpConfig, objectives: Sequence[str], method: str) -> int:
    """Return `Front.inference_parameters` of a method, or of "base"; soups and mixtures of logits need every expert."""
    if method == "base":
        return _count(base.parameters())
    kind = {"clp": "clp", "dera": "clp", "prompting": "prompting"}.get(method, "expert")
    policy = new_policy(base, config, objectives, kind, objectives[0])
    try:
        total = _count(policy.model.parameters())
        if kind == "expert":  # what experts do not train, they share
            total += (len(objectives) - 1) * _count(p for p in policy.model.parameters() if p.requires_grad)
        if method == "dera" and not policy.model.has_reference:  # what the mixture replaces, too
            names = set(policy.model.names)
            total += _count(p for name, p in base.named_parameters() if name in names)
    finally:
        release(policy)
    return total


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def kappa(kl_weight: float, config: ClpConfig) -> float:
    """Return κ(α) = c(α)/α, what multiplies the rewards in the exponent of the optimal policy."""
    return float(reward_coefficient(kl_weight, config.kl_form)) / kl_weight
