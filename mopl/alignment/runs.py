"""Finished alignment runs: their models for any trade-off.

>>> run = open_run("runs/align-helpful-1")                                            # doctest: +SKIP
>>> model = run.load(weights=[0.7, 0.3])                                              # doctest: +SKIP
>>> model.generate(**run.tokenizer("Hello", return_tensors="pt"), weights=[0.7, 0.3])  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from mopl._records import read_json
from mopl._renamed import renamed_attribute
from mopl.alignment import tuned
from mopl.alignment.config import PER_TOKEN, AlignConfig
from mopl.alignment.trained import load_trained, set_weights
from mopl.conditioning import TextPrompt, TextPromptModel, WeightedModel
from mopl.experiments.methods import TABLE
from mopl.experiments.run import EVALUATION, LanguageModelRun
from mopl.experiments.run_directory import DAMAGED_RUN
from mopl.pareto import Front
from mopl.report import Metric


class DataRecord(msgspec.Struct):
    """What is read from `data` in a run's `config.json`."""

    objectives: Annotated[list[str], msgspec.Meta(min_length=1)]
    fingerprint: str
    tokens: str


class Accuracies(msgspec.Struct):
    """What is read from `evaluation.json`."""

    accuracy: list[list[float | None]] = []


@dataclass
class AlignmentRun(LanguageModelRun):
    """A finished run of `mopl align`: what generation, export and reports need."""

    KIND = "align"
    CONFIG = AlignConfig
    DATA = DataRecord

    config: AlignConfig

    @property
    def beta(self) -> tuple[float, ...]:
        """β of the training, one for each objective; for temperature-cos-dpo the middle of its box."""
        return self.config.betas(len(self.objectives))

    def is_conditioned(self, method: str | None = None) -> bool:
        """Whether a method has one model for every trade-off, so that `load` needs no weights."""
        return TABLE[self.check_method(method)].conditioned

    def takes_beta(self, method: str | None = None) -> bool:
        """Whether a method's model is conditioned on β too."""
        return TABLE[self.check_method(method)].takes_beta

    takes_temperature = renamed_attribute("AlignmentRun.takes_temperature", "takes_beta")

    def text_prompt(self, method: str | None = None) -> TextPrompt | None:
        """Return how weights are written into prompts, or None where a method takes them otherwise, or none."""
        return tuned.prompt_of(self.config, TABLE[self.check_method(method)], self.objectives)

    def load(
        self,
        method: str | None = None,
        weights: Sequence[float] | Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> nn.Module:
        """Return a trained model of the run, in evaluation mode.

        Args:
            method: One of `methods`; by default the only one, or weight-cos-dpo.
            weights: (m,) on the simplex: for `dpo-soup` those of the mixture, for `dpo-ls` and `mo-dpo` a vector of
                `grid`. A conditioned model answers for all and ignores them here.
            device: Where the model goes.

        Returns:
            A `HyperPromptModel` or `LoraMixture`, whose `forward` and `generate` take `weights` (a baseline's change
            nothing there); or the PEFT model that `text_prompt` conditions. Each call loads a model of its own.

        Raises:
            FileNotFoundError: If the method has no front yet.
            ValueError: If the run has no such method, or a baseline got no weights, or none for these weights.
        """
        method = self.check_method(method)
        if weights is None and not self.is_conditioned(method):
            raise ValueError(
                f"{method} has a model of its own for each trade-off; pass weights, one for each of "
                f"{', '.join(self.objectives)}"
            )
        model = load_trained(self.path, self.folder(method), method, self.grid, self.base_model())
        if weights is not None and not self.is_conditioned(method):
            set_weights(model, self.path, method, self.grid, weights)
        return model.to(device).eval()

    def load_weighted(
        self, method: str | None = None, device: torch.device | str = "cpu"
    ) -> tuple[WeightedModel, float | None]:
        """Return the one model that a method has for every trade-off, and None, the KL weight of runs on rewards.

        Args:
            method: As in `load`.
            device: Where the model goes.

        Raises:
            FileNotFoundError: If the method has no front yet.
            ValueError: If the run has no such method, or it has a model for each trade-off, or it reads words.
        """
        method = self.check_method(method)
        if not self.is_conditioned(method):
            raise ValueError(
                f"{method} has a model of its own for each trade-off, so there is none for all; choose one with weights"
            )
        model: Any = self.load(method, device=device)
        if (words := self.text_prompt(method)) is not None:
            model = TextPromptModel(model, words, self.tokenizer)
        return model, None

    def training_settings(self, method: str) -> dict[str, str]:
        """Return the settings of a card: conditioning, loss, β, batches."""
        config, own = self.config, TABLE[method]
        found = {"weights enter by": config.conditioning} if own.conditioned else {}
        if own.distils:
            found |= {
                "teachers": "one for each objective" if config.teachers else "an expert for each objective (dpo-soup)",
                "divergence": f"generalised JSD, teacher's share {config.distill_beta:g}, temperature "
                f"{config.distill_temperature:g}",
            }
        if not config.teachers:
            found |= {"loss": config.loss, "β": ", ".join(f"{b:g}" for b in self.beta)}
        if own.takes_beta:
            found["β"] += " times {:g} to {:g}".format(*config.beta_range)
        if own.conditioned:
            found["weights drawn from"] = f"Dirichlet({config.concentration:g})"
        return {**found, "lists per step": str(config.lists_per_batch)}

    @property
    def metric(self) -> Metric:
        """What the figures of the fronts are."""
        loss = self.config.loss
        scored = "averaged over tokens" if loss in PER_TOKEN else "summed over tokens"
        return Metric(
            "held-out loss",
            f"{loss} of log-probabilities {scored}, in nats; deviation: mean |log p - log p0| of a response, in nats",
            higher_is_better=False,
            main_name="from the reference (nats)",
        )

    def accuracies(self, fronts: Sequence[Front]) -> dict[str, list[list[float | None]]]:
        """Return by method, for each point of its front at scale 1, the accuracy of each objective on held-out pairs.

        Args:
            fronts: The run's fronts.
        """
        found = {}
        for front in fronts:
            if (file := self.folder(front.method) / EVALUATION).exists():
                found[front.method] = read_json(file, Accuracies, remedy=DAMAGED_RUN).get("accuracy")
        return {method: rows for method, rows in found.items() if rows}

    @property
    def measured(self) -> Mapping[str, Any]:
        """The settings that say what a figure is: the loss."""
        return {"loss": self.config.loss}

    @property
    def noted(self) -> Mapping[str, Any]:
        """What else the figures depend on."""
        config = self.config
        ranks = config.loss == "plackett-luce"
        return {
            "beta": self.beta,
            "how labels become targets": config.labels,
            "label smoothing": config.label_smoothing,
            "partly labelled lists": config.partial,
            "ties, last group and top k of Plackett-Luce": (
                (config.ties, config.last_group, config.top_k) if ranks else "none"
            ),
            "the model before training": config.model,
        }


def open_run(path: str | Path) -> AlignmentRun:
    """Open a finished run of `mopl align`.

    Args:
        path: The run directory.

    Returns:
        An `AlignmentRun`: its `objectives`, `config`, `tokenizer` and `fronts()`, and its models by `load`.

    Raises:
        FileNotFoundError: If there is no run, or it has no front yet.
        ValueError: If it is a run of another command, or it is damaged.
    """
    return AlignmentRun.open(path)
