"""Finished runs of `mopl clp`: their models for any trade-off.

>>> run = open_run("runs/clp-prompts-1")                                             # doctest: +SKIP
>>> model = run.load(weights=[0.7, 0.3])                                             # doctest: +SKIP
>>> model.generate(**run.tokenizer("Hello", return_tensors="pt"))                    # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from mopl._renamed import renamed_attribute
from mopl.clp.config import ClpConfig
from mopl.clp.policies import Policy, load_policy, release, text_prompt
from mopl.conditioning import TextPrompt, WeightedModel, check_weights
from mopl.experiments.run import LanguageModelRun
from mopl.report import Metric


class DataRecord(msgspec.Struct):
    """What is read from `data` in a run's `config.json`."""

    objectives: Annotated[list[str], msgspec.Meta(min_length=1)]
    fingerprint: str


@dataclass
class ClpRun(LanguageModelRun):
    """A finished run of `mopl clp`: what generation and reports need."""

    KIND = "clp"
    CONFIG = ClpConfig
    DATA = DataRecord
    MAIN_METHOD = "clp"

    config: ClpConfig

    def is_conditioned(self, method: str | None = None) -> bool:
        """Whether the model of `load` takes weights: of scope hyper-prompt, and words of the prompting baseline."""
        method = self.check_method(method)
        return method == "prompting" or (method == "clp" and self.config.scope == "hyper-prompt")

    def takes_beta(self, method: str | None = None) -> bool:
        """Whether a model takes β: none here does."""
        return False

    takes_temperature = renamed_attribute("ClpRun.takes_temperature", "takes_beta")

    def text_prompt(self, method: str | None = None, kl_weight: float | None = None) -> TextPrompt | None:
        """Return how weights are written into prompts, or None where a method takes them otherwise.

        Raises:
            ValueError: If the run has no such method, or it was not trained for this KL weight.
        """
        method = self.check_method(method)
        kl_weight = self._kl_weight(method, kl_weight)
        if method != "prompting":
            return None
        return text_prompt(self.objectives, kl_weight if self.config.conditions_on_kl else None)

    def load(
        self,
        method: str | None = None,
        weights: Sequence[float] | Tensor | None = None,
        device: torch.device | str = "cpu",
        *,
        kl_weight: float | None = None,
        merge: bool = True,
    ) -> nn.Module:
        """Return the model of a trade-off, in evaluation mode.

        Args:
            method: One of `methods` with a model of its own: clp, rewarded-soups or prompting; by default the only
                one, or clp.
            weights: (m,) on the simplex. Not needed where `is_conditioned`.
            device: Where the model goes.
            kl_weight: α, for a policy conditioned on it, from the smallest to the largest of the training; None: the
                run's first.
            merge: False returns a mixture as it is, which takes weights (and the KL weight) at each call; weights are
                not needed then.

        Returns:
            A plain causal language model, merged, that decodes at the cost of one; or for scope hyper-prompt a
            `HyperPromptModel`, and for prompting the one model that `text_prompt` asks. Each call loads a model of its
            own.

        Raises:
            FileNotFoundError: If the method has no front yet.
            ValueError: If the run has no such method, weights are missing or off the simplex, or the KL weight is
                none that the method was trained for.
        """
        method, kl_weight = self._asked(method, kl_weight)
        conditioned = self.is_conditioned(method)
        if weights is None and merge and not conditioned:
            raise ValueError(f"weights are missing; pass one for each of {', '.join(self.objectives)}")
        policy = self._policy(method)
        model: Any = policy.model
        if not model.virtual_tokens and (merge or policy.single):  # virtual tokens cannot be merged
            w = None if policy.single else check_weights(weights, len(self.objectives))  # type: ignore[arg-type]
            model = policy.merge(w, kl_weight)
            release(policy)
        return model.to(device).eval()

    def load_weighted(
        self, method: str | None = None, device: torch.device | str = "cpu", *, kl_weight: float | None = None
    ) -> tuple[WeightedModel, float | None]:
        """Return the one model that a method has for every trade-off, and the KL weight to ask it for, if it takes one.

        Args:
            method: clp or rewarded-soups; by default the only one, or clp.
            device: Where the model goes.
            kl_weight: α, as for `load`.

        Raises:
            FileNotFoundError: If the method has no front yet.
            ValueError: As of `load`; and of the prompting baseline, which reads its trade-off in words.
        """
        method, kl_weight = self._asked(method, kl_weight)
        if method == "prompting":
            raise ValueError(
                f"{method} reads its trade-off in words, and its model takes no weights; choose one with weights"
            )
        policy = self._policy(method)
        return policy.model.to(device).eval(), kl_weight if policy.takes_kl_weight else None

    def _asked(self, method: str | None, kl_weight: float | None) -> tuple[str, float]:
        """Return a method that has a model, and the KL weight that it is asked for."""
        method = self.check_method(method)
        if method in ("logit-mixing", "dera"):
            raise ValueError(f"{method} mixes models while it decodes and has none of its own; see mopl.decoding")
        return method, self._kl_weight(method, kl_weight)

    def _policy(self, method: str) -> Policy:
        return load_policy(self.folder(method) / "model", self.base_model(), self.config, self.objectives, method)

    def _kl_weight(self, method: str, kl_weight: float | None) -> float:
        """Return the KL weight that a method is asked for, the run's first by default; raise if it has no answer."""
        if kl_weight is None:
            return self.config.kl_weight[0]
        trained = self.config.kl_weights(method)
        if len(trained) == 1:
            raise ValueError(
                f"{method} of {self.path} was trained at the KL weight {trained[0]:g} alone, so no other one can be "
                "asked for; leave out kl_weight, or train with several"
            )
        if not min(trained) <= kl_weight <= max(trained):
            raise ValueError(
                f"kl_weight is {kl_weight:g} but {method} of {self.path} was trained for those from {min(trained):g} "
                f"to {max(trained):g}; pass one of them, or one in between"
            )
        return kl_weight

    @property
    def conditions_on_kl(self) -> bool:
        """Whether the KL weight is an input of the policy, too."""
        return self.config.conditions_on_kl

    def training_settings(self, method: str) -> dict[str, str]:
        """Return the settings of a card: scope, KL weights, rollouts."""
        config = self.config
        return {
            "scope": config.scope,
            "KL weight α": ", ".join(f"{a:g}" for a in config.kl_weights(method)),
            "weights drawn from": f"Dirichlet({config.concentration:g})",
            "prompts and answers per step": f"{config.prompts_per_step}, {config.samples_per_prompt} each",
            "longest answer": f"{config.max_new_tokens} tokens",
        }

    @property
    def metric(self) -> Metric:
        """What the figures of the fronts are."""
        config = self.config
        return Metric(
            "mean reward",
            f"over sampled answers of at most {config.max_new_tokens} tokens at temperature {config.temperature:g}, in "
            "the reward's own unit; KL to the reference: mean log-ratio of an answer, in nats",
            higher_is_better=False,
            main_name="(nats)",
        )

    @property
    def measured(self) -> Mapping[str, Any]:
        """The settings that say what a figure is: the rewards, and how answers are sampled."""
        config = self.config
        return {
            "rewards": config.rewards,
            "the longest answer": config.max_new_tokens,
            "temperature": config.temperature,
        }

    @property
    def noted(self) -> Mapping[str, Any]:
        """What else the figures depend on."""
        config = self.config
        return {
            "the model before training": config.model,
            "answers to a prompt": config.eval_samples,
            "most prompts": config.eval_prompts,
        }


def open_run(path: str | Path) -> ClpRun:
    """Open a finished run of `mopl clp` or `train_policies`.

    Args:
        path: The run directory.

    Returns:
        The run. `load(weights=[0.7, 0.3])` gives the model of a trade-off, `load_weighted()` the one that takes weights
        at each call, and `fronts()` what was measured.

    Raises:
        FileNotFoundError: If there is no run, or it has no front yet (the message says how to continue it).
        ValueError: If it is a run of another command, or it is damaged.
    """
    return ClpRun.open(path)
