"""One step of CLP: a rollout at each prompt's trade-off, the policy gradient of V_{α,w}, and guards against collapse.

A training is a sequence of rollouts, each used for `epochs` steps. Rollouts are drawn from (seed, step, part), so a
training that is resumed samples what it would have sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl.clp.config import ClpConfig
from mopl.clp.policies import Policy
from mopl.clp.prompts import PromptBatch
from mopl.clp.rollout import AnswerSource, Rollout, RolloutStore, Sampler, roll
from mopl.language_models.head import IGNORE_INDEX
from mopl.losses.importance import ImportanceWeights, balance_weights, importance_weights
from mopl.losses.policy_gradient import policy_gradient, value_loss
from mopl.rewards import Rewards, prompt_key
from mopl.rewards.scale import RewardScale
from mopl.training import RunLog, TrainingDiverged
from mopl.training.checkpoint import CheckpointFolder
from mopl.training.parallel import unwrapped, whole_model


class PolicyCollapsed(TrainingDiverged):
    """A guard stopped the training: the policy ran away, became deterministic, or earns the same whatever it says."""


# Trained parameters that are this many times as large as at the start are no policy any more. AdamW moves a parameter
# by about the learning rate in a step at most, so it takes a rate that is out of all proportion.
GROWTH = 100.0


def size_of(model: nn.Module) -> float:
    """Return the norm of all trained parameters."""
    norms = [p.detach().norm().double() for p in model.parameters() if p.requires_grad]
    return float(torch.stack(norms).norm())


@dataclass
class Guard:
    """Stops a training that has gone wrong, before the update. Each part of a step is looked at by itself.

    Args:
        config: Settings.
        stage: Name of the training.
        checkpoints: Folder of its checkpoints.
        start: `size_of` the model before the first step; None to leave it out.
    """

    config: ClpConfig
    stage: str
    checkpoints: Path
    start: float | None = None
    _counts: dict[str, int] = field(default_factory=dict)

    def __call__(self, step: int, rewards: Tensor, kl: Tensor, entropy: Tensor, names: tuple[str, ...]) -> None:
        """Look at a rollout.

        Args:
            step: Step, from 0.
            rewards: (R, m), NaN where missing.
            kl: Scalar, mean KL of a response to the reference.
            entropy: Scalar, mean entropy of a token.
            names: Of the rewards.

        Raises:
            PolicyCollapsed: With what happened, and what to change.
        """
        config = self.config
        missing = rewards.isnan().float().mean(0)
        for name, share in zip(names, missing.tolist(), strict=True):
            if share > 0.5:
                self._stop(step, f"the reward {name} is missing (NaN, or an error) on {share:.0%} of the responses",
                           "see the warnings above, or take another reward")  # fmt: skip
        found_kl, found_entropy = float(kl), float(entropy)
        if config.kl_limit and not found_kl <= config.kl_limit:
            self._stop(step, f"the KL of a response to the reference is {found_kl:.4g} nats, above kl_limit = "
                       f"{config.kl_limit:g}", "lower learning_rate or raise kl_weight")  # fmt: skip
        if self._lasts("entropy", bool(config.entropy_floor) and found_entropy < config.entropy_floor):
            self._stop(step, f"the entropy of a token has been below entropy_floor = {config.entropy_floor:g} nats for "
                       f"{config.patience} rollouts (now {found_entropy:.3g}): the policy says one thing",
                       "lower learning_rate or raise kl_weight")  # fmt: skip
        if len(rewards) > 1:
            known = rewards.nan_to_num(torch.inf).amin(0), rewards.nan_to_num(-torch.inf).amax(0)
            if self._lasts("reward", bool((known[0] >= known[1]).all())):
                self._stop(step, f"all responses have had the same rewards for {config.patience} rollouts, which "
                           "teaches nothing", "take other rewards, more samples or a higher temperature")  # fmt: skip

    def check_engine(self, step: int, found: ImportanceWeights) -> None:
        """Look at how far what sampled is from the policy.

        Raises:
            PolicyCollapsed: If it is plainly another model.
        """
        limit = self.config.engine_kl_limit
        if limit and not float(found.kl) <= limit:
            self._stop(step, f"the KL of a token from the rollout server {self.config.rollout_server} to the policy is "
                       f"{float(found.kl):.4g} nats, above engine_kl_limit = {limit:g}: the server has another model",
                       "let it serve the model and the data type of the run, or raise the limit")  # fmt: skip

    def check_size(self, model: nn.Module, steps: int) -> None:
        """Look at the parameters after a number of steps: what has run away may show in no rollout.

        Behind activations that overflow, a normalisation gives 0 for anything: the policy is then uniform, or one for
        all prompts, its KL that of such a policy (which is small where responses are short), its gradient 0.

        Raises:
            PolicyCollapsed: If they are not finite or have grown beyond all measure.
        """
        size = 0.0 if self.start is None else size_of(model)
        if self.start is not None and not size <= GROWTH * self.start:
            raise PolicyCollapsed(
                f"the trained parameters of {self.stage!r} are {size / self.start:.3g} times as large as at the start "
                f"(their norm), after step {steps}: the training has diverged; lower learning_rate (now "
                f"{self.config.learning_rate:g})"
            )

    def _lasts(self, what: str, now: bool) -> bool:
        self._counts[what] = self._counts.get(what, 0) + 1 if now else 0
        return self._counts[what] >= self.config.patience

    def _stop(self, step: int, what: str, remedy: str) -> None:
        kept = CheckpointFolder(self.checkpoints).latest()
        raise PolicyCollapsed(
            f"{what}, at step {step + 1} of {self.stage!r}: {remedy}; the model was not updated with it, and "
            + (f"the last checkpoint is intact: {kept.path}" if kept else "no checkpoint had been written yet")
        )


@dataclass(eq=False)
class ClpLoss:
    """The loss function of a training: `loss(model, batch, step)`.

    Args:
        config: Settings.
        sampler: Samples and scores.
        rewards: The m rewards.
        scale: Their scale in the objective, unless the policy has one of its own, which follows them.
        store: Keeps rollouts for their steps.
        guard: Looks at each rollout.
        log: Where responses are logged, or None.
        stage: Name of the training.
        source: Where answers come from; None: from the policy, by `sampler`.
    """

    config: ClpConfig
    sampler: Sampler
    rewards: Rewards
    scale: RewardScale
    store: RolloutStore
    guard: Guard
    log: RunLog | None
    stage: str
    source: AnswerSource | None = None

    def __call__(self, model: nn.Module, batch: PromptBatch, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of a step and its figures."""
        config, policy = self.config, unwrapped(model)
        rollout = self.store.find(batch, step)
        fresh = rollout is None
        if rollout is None:
            with whole_model(model) as whole:
                self.guard.check_size(whole.model, step)  # first: sampling may not survive what has overflowed
                rollout = roll(whole, batch, self.sampler, self.rewards, config, self.source)
            rollout.scaled = self._scaled(policy, rollout.rewards, rollout.trade_offs)
        device = policy.device
        inputs, place, mask = self.sampler.inputs(rollout.prompts, rollout.responses, device)
        here = rollout.to(device)
        w, kl_weight = here.weights, here.kl_weight
        hidden = None if here.hidden is None else _in_place(here.hidden, inputs["targets"], mask)
        every, values, every_kl = model(inputs, w, kl_weight, config.temperature, here.features, hidden)
        logprob = every.gather(1, place)
        raw = rollout.rewards
        # A response without one of its rewards counts for nothing, and not in another's baseline either.
        usable = ~(raw.isnan() & (rollout.weights > 0)).any(1).to(device)
        counted = mask & usable[:, None]
        by_policy = logprob.detach() if here.behaviour is None else here.behaviour
        importance = engine = shared = None
        if here.sampled is not None:
            own = rollout.own.to(device)
            engine = importance_weights(
                by_policy[own], here.sampled[own], mask=mask[own], level=config.importance_level,
                cap=config.importance_cap,
            )  # fmt: skip
            if fresh:
                self.guard.check_engine(step, engine)
            importance = engine.weights
        if rollout.source is not None:
            of_responses = by_policy.masked_fill(~mask, 0.0).sum(1).view(rollout.trade_offs, -1)
            shared = balance_weights(of_responses)
            importance = (shared if importance is None else shared * importance).flatten()
        baseline: Any = {"value": values, "none": None}.get(config.baseline, config.baseline)
        assert here.scaled is not None
        found = policy_gradient(
            logprob, here.scaled, w, kl_weight=kl_weight, reference=here.reference,
            behaviour=None if fresh else here.behaviour, mask=counted,
            importance=importance,
            baseline=baseline.detach() if isinstance(baseline, Tensor) else baseline,
            group=self._groups(here) if isinstance(baseline, str) else None, standardize=config.standardize,
            kl_form=config.kl_form, kl_in=config.kl_in, kl_estimator=config.kl_estimator, kl_level=config.kl_level,
            exact_kl=None if every_kl is None else every_kl.gather(1, place), to_go=config.to_go,
            clip=None if fresh else config.clip, ratio_level="token" if fresh else config.ratio_level,
        )  # fmt: skip
        loss = found.loss
        # Figures of a policy are means over its own responses: those of others count as in the loss.
        each = torch.ones_like(found.kl) if shared is None else shared.flatten()
        # Minus the mean log-probability of what was sampled estimates the entropy of a token.
        lengths = mask.sum(1) * each
        entropy = -(logprob.detach().masked_fill(~mask, 0.0).sum(1) * each).sum() / lengths.sum()
        responses = (usable * each).sum().clamp(min=1)
        kl = (found.kl * each).sum() / responses
        logs: dict[str, Any] = {f"reward/{name}": raw[:, j].nanmean() for j, name in enumerate(self.rewards.names)}
        logs |= {
            "return": (found.sequence_returns * each).sum() / responses, "kl": kl, "entropy": entropy,
            "tokens": lengths.float().mean(), "missing": 1 - usable.float().mean(), "clip_share": found.clip_share,
        }  # fmt: skip
        if engine is not None:
            logs |= {"importance": engine.ratio, "truncated": engine.truncated, "engine_kl": engine.kl}
        if shared is not None:
            logs["overlap"] = overlap_of(shared)
        if policy.running is not None:
            for name, mean, deviation in zip(
                self.rewards.names, policy.running.mean, policy.running.deviation, strict=True
            ):  # fmt: skip
                logs |= {f"mean/{name}": mean, f"deviation/{name}": deviation}
        if fresh:
            estimate = ((logprob.detach() - here.reference).masked_fill(~mask, 0.0).sum(1) * each).mean()
            self.guard(step, raw, estimate, entropy, self.rewards.names)
            rollout.behaviour = logprob.detach()
            self.store.keep(batch, rollout)
            last = step + config.epochs  # of the steps that this rollout serves
            due = last // config.log_every > step // config.log_every or last >= config.steps
            if self.log is not None and batch.part == 0 and due:
                self._write(rollout, step + 1)
        if values is not None:
            regression = value_loss(values, found.sequence_returns, reduction="none")
            if importance is not None and importance.ndim == 1:  # it regresses what the policy's own answers are worth
                regression = importance * regression
            regression = regression.masked_fill(~usable, 0.0).sum() / responses
            logs["value_loss"] = regression.detach()
            loss = loss + regression
        return loss, logs

    def _scaled(self, policy: Policy, rewards: Tensor, trade_offs: int) -> Tensor:
        """Return the rewards of a new rollout in the scale of the objective, which may then follow them."""
        if policy.running is None:
            return self.scale(rewards)
        scaled = policy.running(rewards)
        policy.running.update(rewards[: len(rewards) // trade_offs])  # each response once
        return scaled

    def _groups(self, rollout: Rollout) -> int | Tensor:
        """Return which rows answer one prompt at one trade-off."""
        if rollout.prompt is None:
            return self.config.samples_per_prompt
        block = torch.arange(len(rollout.prompt), device=rollout.prompt.device) * rollout.trade_offs
        return rollout.prompt * rollout.trade_offs + block // len(rollout.prompt)

    def _write(self, rollout: Rollout, step: int) -> None:
        """Log responses to different prompts, as many as asked for."""
        assert self.log is not None and rollout.behaviour is not None
        groups = self._groups(rollout)
        first = rollout.own[::groups] if isinstance(groups, int) else _first_of_each(rollout.own, groups)
        chosen = first[: self.config.log_samples].tolist()
        names = self.rewards.names
        log_ratio = rollout.behaviour.cpu() - rollout.reference.cpu()
        for r in chosen:
            values = [None if x != x else x for x in rollout.rewards[r].tolist()]
            self.log.write({
                "stage": self.stage, "step": step, "weights": [round(x, 4) for x in rollout.weights[r].tolist()],
                "kl_weight": round(float(rollout.kl_weight[r]), 6), "prompt": prompt_key(rollout.asked[r]),
                "text": rollout.texts[r], "rewards": dict(zip(names, values, strict=True)),
                "log_ratio": round(float(log_ratio[r, : len(rollout.responses[r])].sum()), 4),
            })  # fmt: skip


def overlap_of(shared: Tensor) -> Tensor:  # (K, B) balance weights, whose sum is K for each response
    """Return how far the policies of K trade-offs still share responses: 0 where each has its own alone, 1 if all."""
    alone = (shared / len(shared)).square().sum(0)  # of a response: 1 if it counts at one alone, 1/K if at all evenly
    return (1 - alone).mean() / (1 - 1 / len(shared))


def _first_of_each(rows: Tensor, groups: Tensor) -> Tensor:
    """Return the first of these rows of each group."""
    seen: dict[int, int] = {}
    for row in rows.tolist():
        seen.setdefault(int(groups[row]), row)
    return torch.tensor(list(seen.values()))


def _in_place(hidden: Tensor, targets: Tensor, exists: Tensor) -> Tensor:  # (R, n, H), (R, T), (R, n) -> (R, T, H)
    """Return the reference's hidden states at the positions of the policy's inputs, 0 where nothing is predicted."""
    found = hidden.new_zeros((*targets.shape, hidden.shape[-1]))
    # Both name the tokens of all responses in the same order.
    found[targets != IGNORE_INDEX] = hidden[exists]
    return found
