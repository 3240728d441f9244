"""Finished runs of every application: their settings, fronts, answers and reports.

`open_run` and `run_fronts` find out from a run's record which application made it; see `mopl.experiments.applications`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mopl._files import write_file
from mopl._records import check, damaged, read_json, settings_from
from mopl._terminal import shell
from mopl.experiments.applications import APPLICATIONS
from mopl.experiments.common_settings import LanguageModelSettings
from mopl.experiments.methods import TABLE
from mopl.experiments.run_directory import (
    CONFIG_FILE,
    DAMAGED_RUN,
    Sample,
    application_of,
    check_kind,
    read_run,
)
from mopl.experiments.settings import Settings
from mopl.pareto import Front, weight_grid
from mopl.pareto.front import load_fronts

if TYPE_CHECKING:
    from mopl.language_models.tokenization import ListTokenizer
    from mopl.report import Metric

FRONT, EVALUATION, SAMPLES = "front.json", "evaluation.json", "samples.json"
BASE = "base"  # the model before training: its folder, and the method of its front
Self = TypeVar("Self", bound="FinishedRun")


def method_folder(path: Path, config: Any, method: str) -> Path:
    """Return where a method, or "base", has its front and its model: a folder of its own unless there is one method."""
    return path if method == config.method else path / method


def run_grid(config: Any, objectives: int) -> Tensor:
    """Return the weights (n, m) float64 at which the fronts of a run are evaluated; one objective has one point."""
    return weight_grid(objectives, config.points if objectives > 1 else None, density=config.grid_density)


@dataclass
class FinishedRun:
    """A run that has fronts; the base class of each application's own.

    Attributes:
        path: The run directory.
        record: What its `config.json` holds.
        config: Its settings, the application's dataclass.
    """

    KIND: ClassVar[str | None]  # the "kind" of its record
    CONFIG: ClassVar[type[Settings]]  # of its settings
    DATA: ClassVar[type]  # the `msgspec.Struct` of what is read from "data" in its record
    MAIN_METHOD: ClassVar[str] = "weight-cos-dpo"  # what a run of all methods answers with unless another is named

    path: Path
    record: dict[str, Any]
    config: Any

    @classmethod
    def read(cls: type[Self], path: str | Path) -> Self:
        """Read the settings of a run, finished or not; data and models are left alone.

        Raises:
            FileNotFoundError: If there is no run.
            ValueError: If it is a run of another command, or its record is damaged.
        """
        record = read_run(path)
        return cls(Path(path), record, cls.config_of(record, path))

    @classmethod
    def open(cls: type[Self], path: str | Path) -> Self:
        """Open a finished run.

        Raises:
            FileNotFoundError: If there is no run, or it has no front yet.
            ValueError: If it is a run of another command, or it is damaged.
        """
        run = cls.read(path)
        run.fronts()
        return run

    @classmethod
    def config_of(cls, record: dict[str, Any], path: str | Path) -> Any:
        """Return the settings in the record of a run; errors as `read`."""
        check_kind(record, path, cls.KIND)
        file = Path(path) / CONFIG_FILE
        check(record["data"], cls.DATA, file, "data", remedy=DAMAGED_RUN)
        return settings_from(cls.CONFIG, record["config"], file, "config", remedy=DAMAGED_RUN)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the m objectives that weights are for, in their order."""
        return tuple(self.record["data"]["objectives"])

    @property
    def grid(self) -> Tensor:
        """(n, m) float64, the weights of the run's fronts, which are those of its models where each has its own.

        They are read from a front: the default grids of other versions are others.

        Raises:
            FileNotFoundError: If no method has a front yet.
        """
        front = Front.load(self.folder(self.check_method()) / FRONT)
        return torch.tensor([point.weights for point in front.trained_points], dtype=torch.float64)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the run trains."""
        return self.config.methods

    @property
    def method_name(self) -> str:
        """The run's only method, or the main one where it has all."""
        return self.config.method if self.config.method in self.methods else self.MAIN_METHOD

    @property
    def missing(self) -> tuple[str, ...]:
        """The methods that have no front yet: none in a finished run."""
        return tuple(method for method in self.methods if not (self.folder(method) / FRONT).exists())

    def folder(self, method: str) -> Path:
        """Return where the front and the model of a method are, or of "base"."""
        return method_folder(self.path, self.config, method)

    def check_method(self, method: str | None = None) -> str:
        """Return the name of a method that has been trained, by default `method_name`.

        Raises:
            FileNotFoundError: If it has no front yet.
            ValueError: If the run has no such method.
        """
        method = method or self.method_name
        if method not in self.methods:
            raise ValueError(f"{self.path} has no {method}; it has {', '.join(self.methods)}")
        if method in self.missing:
            raise FileNotFoundError(f"{self._unfinished(method)}; continue it with: {self._resume}")
        return method

    def fronts(self) -> list[Front]:
        """Return the fronts of a run, that of the untrained model first; what `missing` names is not there.

        Raises:
            FileNotFoundError: If there is none of a trained model yet.
        """
        files = {method: self.folder(method) / FRONT for method in (BASE, *self.methods)}
        there = {method: file for method, file in files.items() if file.exists()}
        if BASE not in there or len(there) < 2:
            raise FileNotFoundError(f"the run {self.path} is not finished; continue it with: {self._resume}")
        return load_fronts(there, self.objectives, self.path / CONFIG_FILE)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the fronts must know."""
        return (self._unfinished(*self.missing),) if self.missing else ()

    def _unfinished(self, *methods: str) -> str:
        return f"the run {self.path} is not finished: {', '.join(methods)} {'have' if methods[1:] else 'has'} no front"

    @property
    def _resume(self) -> str:
        return shell("mopl", APPLICATIONS[self.KIND].command, "--run", self.path, "--resume")

    # ------------------------------------------------------------ what an application has of its own

    @property
    def metric(self) -> Metric:
        """What the figures of the fronts are."""
        raise NotImplementedError

    @property
    def measured(self) -> Mapping[str, Any]:
        """The settings that say what a figure is, by name: runs that differ in one cannot be compared."""
        return {}

    @property
    def noted(self) -> Mapping[str, Any]:
        """What else the figures depend on, by name: runs that differ in it are compared with a note."""
        return {}

    @property
    def continuous(self) -> tuple[str, ...]:
        """The methods that answer at any weights, so that figures between evaluated ones may be interpolated."""
        return tuple(method for method in self.methods if method not in TABLE or not TABLE[method].grid)

    def accuracies(self, fronts: Sequence[Front]) -> dict[str, list[list[float | None]]]:
        """Return by method, for each point of its front, the accuracy of each objective; empty without any.

        Args:
            fronts: The run's fronts.
        """
        return {}

    def true_front(self) -> list[list[float]] | None:
        """Return the figures (n, m) of the best possible model, or None where they are not known."""
        return None

    # ------------------------------------------------------------ what a person looks at

    def samples(self, fronts: Sequence[Front]) -> dict[str, list[Any]] | None:
        """Return the answers of a run as `mopl.report.write_page` takes them.

        Args:
            fronts: The run's fronts.

        Returns:
            By method, for each point of its front a list of `{"prompt", "text"}`; None without any.
        """
        found: dict[str, list[Any]] = {}
        for front in fronts:
            file, points = self.folder(front.method) / SAMPLES, len(front.points)
            entries = read_json(file, list[Sample], remedy=DAMAGED_RUN) if file.exists() else []
            if not entries:
                continue
            if max(len(entry["responses"]) for entry in entries) > points:
                raise damaged(file, f"it has answers at more trade-offs than {FRONT}, {points}", DAMAGED_RUN)
            # Points at other distances from the reference come after the grid and have no answers of their own.
            found[front.method] = [
                [{"prompt": e["prompt"], "text": e["responses"][place]} for e in entries if place < len(e["responses"])]
                for place in range(points)
            ]
        return found or None

    def write_reports(self) -> None:
        """Write table.txt, front.png and report.html of a run from its fronts and answers."""
        from mopl.report import plot_front, write_page
        from mopl.report.table import as_text, summarise

        fronts, metric, truth, notes = self.fronts(), self.metric, self.true_front(), self.notes
        samples = self.samples(fronts)
        write_file(self.path / "table.txt", as_text(summarise(fronts, metric, notes)))
        plot_front(fronts, self.path / "front.png", metric=metric, truth=truth, notes=notes)
        write_page(
            fronts, self.path / "report.html", metric=metric, truth=truth, notes=notes, configuration=self.record,
            samples=samples, picture=self.path / "front.png", continuous=self.continuous,
            accuracy=self.accuracies(fronts),
        )  # fmt: skip


@dataclass
class LanguageModelRun(FinishedRun):
    """A finished run on a language model; the base class of those applications' own."""

    config: LanguageModelSettings

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the language model."""
        return self.config.load_tokenizer()

    @property
    def list_tokenizer(self) -> ListTokenizer:
        """How the run turned texts into tokens: template and lengths."""
        return self.config.list_tokenizer(self.tokenizer)

    @property
    def conditions_on_kl(self) -> bool:
        """Whether a KL weight is an input of its model, too: so it may be in runs on rewards alone."""
        return False

    def training_settings(self, method: str) -> dict[str, str]:
        """Return what an application has set for a method and a reader of a model card wants to know; no paths."""
        return {}

    def base_model(self, device: torch.device | str = "cpu") -> Any:
        """Return the language model that the run started from, fused, without dropout."""
        return self.config.load_model().to(device)


def run_class(record: Mapping[str, Any], path: str | Path) -> type[FinishedRun]:
    """Return the class of a run, which imports the application that made it; errors as `application_of`."""
    module, name = application_of(record, path).run
    return getattr(importlib.import_module(module), name)


def read_any(path: str | Path) -> FinishedRun:
    """Read the settings of a run of any application, finished or not; see `FinishedRun.read`."""
    return run_class(read_run(path), path).read(path)


def open_run(path: str | Path) -> FinishedRun:
    """Open a finished run of any application.

    Args:
        path: The run directory.

    Returns:
        The run, of the class of its application: what `mopl.ranking.open_run`, `mopl.alignment.open_run` and
        `mopl.clp.open_run` return.

    Raises:
        FileNotFoundError: If there is no run, it has no front yet, or its data is gone.
        ValueError: If it is damaged, or its data changed since.
    """
    return run_class(read_run(path), path).open(path)


def run_fronts(path: str | Path) -> list[Front]:
    """Return the fronts of a run of any application, that of the untrained model first; see `FinishedRun.fronts`.

    Only the records are read: neither the data nor a model need be there.

    Args:
        path: The run directory.

    Returns:
        A front for each method that has one; the first is that of the model before training.

    Raises:
        FileNotFoundError: If there is no run, or it has no front yet.
        ValueError: If it is damaged.
    """
    return read_any(path).fronts()


def write_reports(path: str | Path) -> None:
    """Write table.txt, front.png and report.html of a run of any application; see `FinishedRun.write_reports`."""
    read_any(path).write_reports()
