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
from mopl.clp.policies import load_policy, release, text_prompt
from mopl.conditioning import TextPrompt, check_weights
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
        method = self.check_method(method)
        if method in ("logit-mixing", "dera"):
            raise ValueError(f"{method} mixes models while it decodes and has none of its own; see mopl.decoding")
        kl_weight = self._kl_weight(method, kl_weight)
        conditioned = self.is_conditioned(method)
        if weights is None and merge and not conditioned:
            raise ValueError(f"weights are missing; pass one for each of {', '.join(self.objectives)}")
        folder = self.folder(method) / "model"
        policy = load_policy(folder, self.base_model(), self.config, self.objectives, method)
        model: Any = policy.model
        if not model.virtual_tokens and (merge or policy.single):  # virtual tokens cannot be merged
            w = None if policy.single else check_weights(weights, len(self.objectives))  # type: ignore[arg-type]
            model = policy.merge(w, kl_weight)
            release(policy)
        return model.to(device).eval()

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
    def metric(self) -> Metric:
        """What the figures of the fronts are."""
        config = self.config
        return Metric(
            "mean reward",
            f"over sampled answers of at most {config.max_new_tokens} tokens at temperature {config.temperature:g}, in "
            "the reward's own unit; main: mean log-ratio of an answer to the reference, in nats",
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
    """Open a finished run of a method on rewards; see `ClpRun.open`."""
    return ClpRun.open(path)
