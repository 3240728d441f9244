"""Finished alignment runs: their models for any trade-off, their fronts, the reports of one and of several.

>>> run = open_run("runs/align-helpful-1")                                            # doctest: +SKIP
>>> model = run.load(weights=[0.7, 0.3])                                              # doctest: +SKIP
>>> model.generate(**run.tokenizer("Hello", return_tensors="pt"), weights=[0.7, 0.3])  # doctest: +SKIP
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
from mopl.alignment import tuned
from mopl.alignment.config import ALL, CONDITIONED, AlignConfig
from mopl.alignment.trained import load_trained
from mopl.conditioning import TextPrompt
from mopl.experiments.run_directory import CONFIG_FILE, DAMAGED_RUN, Sample, read_run, refresh, settings_of
from mopl.language_models import models
from mopl.language_models.tokenization import ListTokenizer
from mopl.pareto import weight_grid
from mopl.pareto.front import Front, load_fronts
from mopl.report import Metric

FRONT, EVALUATION, SAMPLES = "front.json", "evaluation.json", "samples.json"
KIND = "align"


class DataRecord(msgspec.Struct):
    """What is read from `data` in a run's `config.json`."""

    objectives: Annotated[list[str], msgspec.Meta(min_length=1)]
    fingerprint: str
    tokens: str


@dataclass
class OpenRun:
    """A finished run: what generation, export and reports need.

    Attributes:
        path: The run directory.
        config: Its settings, resolved.
        objectives: Names of the m objectives, in the order of the weights.
    """

    path: Path
    config: AlignConfig
    objectives: tuple[str, ...]

    @property
    def grid(self) -> Tensor:
        """(n, m) float64, the weights of the run's fronts."""
        return weight_grid(len(self.objectives), self.config.points, density="medium")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the run trained."""
        return self.config.methods

    @property
    def method_name(self) -> str:
        """The run's only method, or weight-cos-dpo where it has all."""
        return "weight-cos-dpo" if self.config.method == ALL else self.config.method

    @property
    def beta(self) -> tuple[float, ...]:
        """β of the training, one for each objective; for temperature-cos-dpo the middle of its box."""
        return self.config.betas(len(self.objectives))

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the language model."""
        return models.load_tokenizer(self.config.model)

    @property
    def list_tokenizer(self) -> ListTokenizer:
        """How the run turned texts into tokens: template and lengths."""
        return list_tokenizer(self.config, self.tokenizer)

    def is_conditioned(self, method: str | None = None) -> bool:
        """Whether a method has one model for every trade-off, so that `load` needs no weights."""
        return self._method(method) in CONDITIONED

    def takes_temperature(self, method: str | None = None) -> bool:
        """Whether a method's model is conditioned on temperatures too."""
        return self._method(method) == "temperature-cos-dpo"

    def text_prompt(self, method: str | None = None) -> TextPrompt | None:
        """Return how weights are written into prompts, or None where a method takes them otherwise, or none."""
        if not self.is_conditioned(method) or self.config.conditioning != "text":
            return None
        return tuned.text_prompt(self.objectives, temperature=self.takes_temperature(method))

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
            ValueError: If the run has no such method, or a baseline got no weights, or none for these weights.
        """
        method = self._method(method)
        if method not in CONDITIONED and weights is None:
            raise ValueError(
                f"{method} has a model of its own for each trade-off; pass weights, one for each of "
                f"{', '.join(self.objectives)}"
            )
        folder = method_folder(self.path, self.config, method)
        model = load_trained(self.path, folder, method, self.objectives, self.grid, self.base_model(), weights)
        return model.to(device).eval()

    def _method(self, method: str | None) -> str:
        method = method or self.method_name
        if method not in self.methods:
            raise ValueError(f"{self.path} has no {method}; it has {', '.join(self.methods)}")
        return method


def is_align_run(record: dict[str, Any]) -> bool:
    """Say whether the `config.json` of a run is one of `mopl align`."""
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


def config_of(record: dict[str, Any], path: str | Path) -> AlignConfig:
    """Return the settings of a run.

    Raises:
        ValueError: If it is a run of another command.
    """
    return settings_of(record, path, KIND, AlignConfig, DataRecord)


def list_tokenizer(config: AlignConfig, tokenizer: Any) -> ListTokenizer:
    """Return how a run turns texts into tokens."""
    return ListTokenizer(
        tokenizer, max_length=config.max_length, min_prompt=config.min_prompt, template=config.template
    )  # fmt: skip


def method_folder(path: Path, config: AlignConfig, method: str) -> Path:
    """Return where a method's front is: the run itself, or a folder each under `--method all`."""
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


def metric_of(config: AlignConfig) -> Metric:
    """Return what the figures of a run's fronts are."""
    scored = "averaged over tokens" if config.loss in ("ipo", "sigmoid_norm") else "summed over tokens"
    return Metric(
        "held-out loss",
        f"{config.loss} of log-probabilities {scored}, in nats; main: mean |log p - log p0| of a response, in nats",
        higher_is_better=False,
        main_name="from the reference (nats)",
    )


def load_samples(path: Path, config: AlignConfig, fronts: Sequence[Front]) -> dict[str, list[Any]] | None:
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
            # Points at other distances from the reference come after the grid and have no answers of their own.
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
        ValueError: If the runs have other objectives or losses, or are of different commands.
    """
    from mopl.report.compare import Run, compare_runs

    found = []
    for path in runs:
        record = read_run(path)
        config = config_of(record, path)
        measured: dict[str, Any] = {"loss": config.loss}
        noted: dict[str, Any] = {
            "beta": config.betas(len(record["data"]["objectives"])),
            "how labels become targets": config.labels,
            "label smoothing": config.label_smoothing,
            "partly labelled lists": config.partial,
            "ties, last group and top k of Plackett-Luce": (config.ties, config.last_group, config.top_k)
            if config.loss == "plackett-luce"
            else "none",
            "the model before training": config.model,
        }
        found.append(
            Run(Path(path), record, run_fronts(path), metric_of(config), config.to_dict(), measured, noted)
        )  # fmt: skip
    if len(runs) == 1 and not (html or png or table):
        refresh(runs[0], write_reports)
    samples = load_samples(Path(runs[0]), config, found[0].fronts) if len(runs) == 1 else None
    return compare_runs(found, html=html, png=png, table=table, samples=samples)
