"""One training of a run: done once, continued where it was interrupted, recorded last.

While a model is trained, its folder holds `checkpoints/` (and what else a training keeps to go on: `averaged/` has the
trainings whose parameters will be averaged). When it has ended,
the model is saved, then `training.json` is written, then the checkpoints are dropped: a folder with `training.json` is
finished and is only read from then on.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mopl._counted import counted
from mopl._files import discard_folder, write_file
from mopl._records import Count, Finite, Seconds, read_json
from mopl.experiments.run_directory import DONE
from mopl.training import BatchSource, Selection, TrainingConfig, TrainingResult, train
from mopl.training.optimizer import rounding_of
from mopl.training.parallel import exists_on_main, on_main

if TYPE_CHECKING:
    from mopl.experiments.driver import Recipe

CHECKPOINTS, ROLLOUTS, AVERAGED = "checkpoints", "rollouts", "averaged"


@dataclass(frozen=True)
class Trained:
    """What `training.json` says of a finished training."""

    steps: Count  # steps that were done, of at most `limit`
    seconds: Seconds  # seconds of all its parts, validation included
    kept: Count = 0  # the step whose model was kept
    limit: Count = 0  # steps that were asked for
    validation: float | None = None  # the best figure on validation data; None where none was taken
    parameters: Count = 0  # how many parameters were trained; 0 in records of ranking runs of earlier versions
    mean: tuple[Finite, ...] = ()  # (m,) of the rewards, where the scale of the rewards was followed; see `mopl.clp`
    deviation: tuple[Finite, ...] = ()  # (m,), likewise

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """Read the record in a model's folder; those of earlier versions do not say what was kept and asked for.

        Raises:
            DamagedFile: If something else is there; the message names the key.
        """
        remedy = "take it from a backup, or delete it: --resume then trains that model again"
        found = read_json(folder / DONE, cls, remedy=remedy)
        known = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        return cls(**{"kept": found["steps"], "limit": found["steps"], **known})

    def to_dict(self) -> dict[str, Any]:
        """Return what there is to say, as plain values for JSON."""
        optional = ("parameters", "mean", "deviation")
        return {name: value for name, value in dataclasses.asdict(self).items() if value or name not in optional}

    def describe(self, name: str, figure: str = "figure on validation") -> str:
        """Return it as a line; `figure` says what `validation` is."""
        line = f"{name}: {counted(self.steps, 'step')} in {self.seconds:.1f} s"
        if self.validation is None:
            return line
        kept = f"{line}; kept step {self.kept} ({figure} {self.validation:.4f})"
        if self.steps == self.limit:
            return kept
        waited = counted(self.steps - self.kept, "step")
        return f"{kept}, stopped at {self.steps} of {self.limit}: no better for {waited}"


@dataclass
class Training:
    """A model and how it is trained, for `RunStages.train_once`; see `mopl.training.train`."""

    model: nn.Module  # untrained
    source: BatchSource
    loss: Any
    settings: TrainingConfig
    save: Callable[[Path], None]  # writes the trained model into a folder; called on the main process
    optimizer: torch.optim.Optimizer | None = None  # AdamW on the trained parameters by default
    selection: Selection | None = None  # chooses the step that is kept
    figure: str = "figure on validation"  # what it is chosen by, in words
    save_frozen: bool = True  # whether checkpoints hold parameters that are not trained
    # Called with the result when the last step is done, on every process; returns what else `Trained` says.
    ended: Callable[[TrainingResult], dict[str, Any]] = lambda result: {}


class RunStages(ABC):
    """Does the trainings of a run; the base class of each application's own.

    Args:
        run: The run: its directory, settings, accelerator and log, and who is told what was done.
    """

    config: Any

    def __init__(self, run: Recipe) -> None:
        self.path, self.config, self.accelerator = run.path, run.config, run.accelerator
        self.log, self.say = run.log, run.say

    @abstractmethod
    def train(self, method: str, folder: Path) -> dict[str, Trained]:
        """Train what a method needs, in its folder and beside it; return its trainings by name."""

    def train_once(self, name: str, folder: Path, begin: Callable[[], AbstractContextManager[Training]]) -> Trained:
        """Train and save a model unless it is there; return how that went, interruptions left out.

        `begin` makes the model and gives up what it holds when its block ends; called only if there is something to do.
        """
        if exists_on_main(self.accelerator, folder / DONE):
            return Trained.read(folder)
        with begin() as training:
            if note := rounding_of(training.model):
                self.say(f"{name}: {note} (--dtype float32)")
            parameters = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
            result = train(
                training.model, training.source, training.loss, training.settings,
                accelerator=self.accelerator, directory=folder / CHECKPOINTS, resume=True, log=self.log, stage=name,
                optimizer=training.optimizer, save_frozen=training.save_frozen, selection=training.selection,
            )  # fmt: skip
            kept = {"kept": result.steps}
            if training.selection is not None and result.kept is not None:
                kept = {"kept": result.kept, "validation": training.selection.best}
            done = Trained(
                result.steps, result.seconds, limit=training.settings.steps, parameters=parameters, **kept,
                **training.ended(result),
            )  # fmt: skip
            self.record(folder, training.save, done)
        self.say(done.describe(name, training.figure))
        return done

    def record(self, folder: Path, save: Callable[[Path], None], done: Trained) -> None:
        """Save a model that is finished, and say so last; every process must call it."""

        def write() -> None:
            save(folder)
            write_file(folder / DONE, json.dumps(done.to_dict(), indent=2) + "\n")
            for name in (CHECKPOINTS, ROLLOUTS, AVERAGED):
                if (folder / name).exists():
                    discard_folder(folder / name)

        on_main(self.accelerator, write)
