"""Finished runs of `mopl align --method clp`: their models for any trade-off, fronts and reports.

>>> run = open_run("runs/clp-prompts-1")                                             # doctest: +SKIP
>>> model = run.load(weights=[0.7, 0.3])                                             # doctest: +SKIP
>>> model.generate(**run.tokenizer("Hello", return_tensors="pt"))                    # doctest: +SKIP
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from mopl._files import write_file
from mopl._records import damaged, read_json
from mopl._terminal import shell
from mopl.clp.config import ALL, ClpConfig
from mopl.clp.policies import load_policy, release, text_prompt
from mopl.conditioning import HyperPromptModel, TextPrompt, check_weights
from mopl.experiments.run_directory import CONFIG_FILE, DAMAGED_RUN, Sample, read_run, refresh, settings_of
from mopl.language_models import models
from mopl.language_models.tokenization import ListTokenizer
from mopl.pareto import weight_grid
from mopl.pareto.front import Front, load_fronts
from mopl.report import Metric

FRONT, EVALUATION, SAMPLES = "front.json", "evaluation.json", "samples.json"
KIND = "clp"


class DataRecord(msgspec.Struct):
    """What is read from `data` in a run's `config.json`."""

    objectives: Annotated[list[str], msgspec.Meta(min_length=1)]
    fingerprint: str


@dataclass
class OpenRun:
    """A finished run: what generation and reports need.

    Attributes:
        path: The run directory.
        config: Its settings.
        objectives: Names of the m rewards, in the order of the weights.
    """

    path: Path
    config: ClpConfig
    objectives: tuple[str, ...]

    @property
    def grid(self) -> Tensor:
        """(n, m) float64, the weights of the run's fronts."""
        return run_grid(self.config, len(self.objectives))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that have a front."""
        return self.config.methods

    @property
    def method_name(self) -> str:
        """The run's only method, or clp where it has all."""
        return "clp" if self.config.method == ALL else self.config.method

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the language model."""
        return models.load_tokenizer(self.config.model)

    @property
    def list_tokenizer(self) -> ListTokenizer:
        """How the run turned prompts into tokens."""
        return list_tokenizer(self.config, self.tokenizer)

    def is_conditioned(self, method: str | None = None) -> bool:
        """Whether the model of `load` takes weights: of scope hyper-prompt, and words of the prompting baseline."""
        method = self._method(method)
        return method == "prompting" or (method == "clp" and self.config.scope == "hyper-prompt")

    def takes_temperature(self, method: str | None = None) -> bool:
        """Whether a model takes temperatures of objectives: none here does."""
        return False

    def text_prompt(self, method: str | None = None, kl_weight: float | None = None) -> TextPrompt | None:
        """Return how weights are written into prompts, or None where a method takes them otherwise.

        Raises:
            ValueError: If the run has no such method, or it was not trained for this KL weight.
        """
        self._check_kl_weight(self._method(method), kl_weight)
        if self._method(method) != "prompting":
            return None
        alpha = self.config.kl_weight[0] if kl_weight is None else kl_weight
        return text_prompt(self.objectives, alpha if self.config.conditions_on_kl else None)

    def base_model(self, device: torch.device | str = "cpu") -> Any:
        """Return the language model that the run started from, fused, without dropout."""
        return models.load_causal_lm(
            self.config.model, dtype=self.config.dtype, attention=self.config.attention
        ).to(device)  # fmt: skip

    def load(
        self,
        method: str | None = None,
        weights: Sequence[float] | Tensor | None = None,
        device: torch.device | str = "cpu",
        *,
        kl_weight: float | None = None,
    ) -> nn.Module:
        """Return the model of a trade-off, in evaluation mode.

        Args:
            method: One of `methods` with a model of its own: clp, rewarded-soups or prompting; by default the only
                one, or clp.
            weights: (m,) on the simplex. Not needed where `is_conditioned`.
            device: Where the model goes.
            kl_weight: α, for a policy conditioned on it, from the smallest to the largest of the training; None: the
                run's first.

        Returns:
            A plain causal language model, merged, that decodes at the cost of one; or for scope hyper-prompt a
            `HyperPromptModel`, and for prompting the one model that `text_prompt` asks. Each call loads a model of its
            own.

        Raises:
            ValueError: If the run has no such method, weights are missing or off the simplex, or the KL weight is
                none that the method was trained for.
        """
        method = self._method(method)
        if method in ("logit-mixing", "dera"):
            raise ValueError(f"{method} mixes models while it decodes and has none of its own; see mopl.decoding")
        self._check_kl_weight(method, kl_weight)
        conditioned = self.is_conditioned(method)
        if weights is None and not conditioned:
            raise ValueError(f"weights are missing; pass one for each of {', '.join(self.objectives)}")
        kind = "soup" if method == "rewarded-soups" else method
        folder = method_folder(self.path, self.config, method) / "model"
        policy = load_policy(folder, self.base_model(), self.config, self.objectives, kind)
        model: Any = policy.model
        if not isinstance(model, HyperPromptModel):
            w = torch.ones(1) if policy.single else check_weights(weights, len(self.objectives))  # type: ignore[arg-type]
            alpha = self.config.kl_weight[0] if kl_weight is None else kl_weight
            merged = model.merge(w, alpha if policy.takes_alpha and not policy.single else None)
            release(policy)
            model = merged
        return model.to(device).eval()

    def _check_kl_weight(self, method: str, kl_weight: float | None) -> None:
        """Raise unless a method answers for a KL weight, or none is asked for."""
        if kl_weight is None:
            return
        trained = self.config.kl_weight if method in ("clp", "prompting") else self.config.kl_weight[:1]
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

    def _method(self, method: str | None) -> str:
        method = method or self.method_name
        if method not in self.methods:
            raise ValueError(f"{self.path} has no {method}; it has {', '.join(self.methods)}")
        return method


def run_grid(config: ClpConfig, objectives: int) -> Tensor:
    """Return the grid of weights (n, m) of a run; one reward has one point, whatever is asked for."""
    return weight_grid(objectives, config.points if objectives > 1 else None, density="medium")


def is_clp_run(record: dict[str, Any]) -> bool:
    """Say whether the `config.json` of a run is one of `mopl align --method clp` and its baselines."""
    return record.get("kind") == KIND


def open_run(path: str | Path) -> OpenRun:
    """Open a finished run.

    Raises:
        FileNotFoundError: If there is no run, or it is not finished.
        ValueError: If it is a run of another command.
    """
    path = Path(path)
    record = read_run(path)
    config = config_of(record, path)
    run_fronts(path)
    return OpenRun(path, config, tuple(record["data"]["objectives"]))


def config_of(record: dict[str, Any], path: str | Path) -> ClpConfig:
    """Return the settings of a run.

    Raises:
        ValueError: If it is a run of another command.
    """
    return settings_of(record, path, KIND, ClpConfig, DataRecord)


def list_tokenizer(config: ClpConfig, tokenizer: Any) -> ListTokenizer:
    """Return how a run turns prompts into tokens."""
    return ListTokenizer(tokenizer, max_length=None, template=config.template, append_eos=False)


def method_folder(path: Path, config: ClpConfig, method: str) -> Path:
    """Return where a method's front is: the run itself, or a folder each under clp-all."""
    return path / method if config.method == ALL else path


def run_fronts(path: str | Path) -> list[Front]:
    """Return the fronts of a run, that of the untrained model first.

    Raises:
        FileNotFoundError: If there is no run, or it is not finished.
    """
    path = Path(path)
    record = read_run(path)
    config = config_of(record, path)
    folders = {"base": path / "base", **{method: method_folder(path, config, method) for method in config.methods}}
    files = {method: folder / FRONT for method, folder in folders.items()}
    if any(not file.exists() for file in files.values()):
        command = shell("mopl", "align", "--run", path, "--resume")
        raise FileNotFoundError(f"the run {path} is not finished; continue it with: {command}")
    return load_fronts(files, record["data"]["objectives"], path / CONFIG_FILE)


def metric_of(config: ClpConfig) -> Metric:
    """Return what the figures of a run's fronts are."""
    return Metric(
        "mean reward",
        f"over sampled answers of at most {config.max_new_tokens} tokens at temperature {config.temperature:g}, in the "
        "reward's own unit; main: mean log-ratio of an answer to the reference, in nats",
        higher_is_better=False,
        main_name="(nats)",
    )


def load_samples(path: Path, config: ClpConfig, fronts: Sequence[Front]) -> dict[str, list[Any]] | None:
    """Return the answers of a run as the page takes them: for each method a list of texts a point; None without any."""
    found: dict[str, list[Any]] = {}
    lengths = {front.method: len(front.points) for front in fronts}
    for method in ("base", *config.methods):
        file = (path / "base" if method == "base" else method_folder(path, config, method)) / SAMPLES
        entries = read_json(file, list[Sample], remedy=DAMAGED_RUN) if file.exists() else []
        if not entries or method not in lengths:
            continue
        if max(len(entry["responses"]) for entry in entries) > lengths[method]:
            raise damaged(file, f"it has answers at more trade-offs than front.json, {lengths[method]}", DAMAGED_RUN)
        points: list[Any] = [[] for _ in range(lengths[method])]
        for entry in entries:
            for place, text in enumerate(entry["responses"]):
                points[place].append({"prompt": entry["prompt"], "text": text})
        found[method] = points
    return found or None


def write_reports(path: Path) -> None:
    """Write table.txt, front.png and report.html of a run from its fronts and samples."""
    from mopl.report import plot_front, write_page
    from mopl.report.table import as_text, summarise

    record = read_run(path)
    config = config_of(record, path)
    fronts, metric = run_fronts(path), metric_of(config)
    write_file(path / "table.txt", as_text(summarise(fronts, metric)))
    plot_front(fronts, path / "front.png", metric=metric)
    samples = load_samples(path, config, fronts)
    write_page(fronts, path / "report.html", metric=metric, configuration=record, samples=samples)


def compare(
    runs: Sequence[str | Path],
    *,
    html: str | Path | None = None,
    png: str | Path | None = None,
    table: str | Path | None = None,
) -> str:
    """Print one table of several runs and write what is asked for; a single run gets its own files anew.

    See `mopl.report.compare`.

    Returns:
        The table as text.

    Raises:
        FileNotFoundError: If a run is missing or not finished.
        ValueError: If the runs have other rewards or answers, or are of different commands.
    """
    from mopl.report.compare import Run, compare_runs

    found = []
    for path in runs:
        record = read_run(path)
        config = config_of(record, path)
        measured: dict[str, Any] = {
            "rewards": config.rewards,
            "the longest answer": config.max_new_tokens,
            "temperature": config.temperature,
        }
        noted: dict[str, Any] = {
            "the model before training": config.model,
            "answers to a prompt": config.eval_samples,
            "most prompts": config.eval_prompts,
        }
        found.append(
            Run(Path(path), record, run_fronts(path), metric_of(config), config.to_dict(), measured, noted)
        )  # fmt: skip
    if len(runs) == 1 and not (html or png or table):
        refresh(runs[0], write_reports)
    samples = load_samples(Path(runs[0]), config, found[0].fronts) if len(runs) == 1 else None
    return compare_runs(found, html=html, png=png, table=table, samples=samples)
