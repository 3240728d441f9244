"""One run of any application, from its settings to its report.

    read      data, settings and whatever could stop the run later: nothing is written yet
    begin     the run directory; or, of a run that goes on, the check that it is the same run
    prepare   what all methods share: a base model, the scores of the reference
    work      the untrained model and each method: trained, evaluated, recorded; `front.json` is the last of its files,
              so that where it lies, the method is finished and is left alone when the run goes on
    report    table, picture and page

What is particular to an application is a class of `Recipe`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mopl import _terminal
from mopl._extras import require_for
from mopl._files import write_file
from mopl._terminal import duration
from mopl.experiments.applications import APPLICATIONS
from mopl.experiments.methods import TABLE
from mopl.experiments.resume_settings import same
from mopl.experiments.run import BASE, EVALUATION, FRONT, SAMPLES, FinishedRun, method_folder, run_grid, write_reports
from mopl.experiments.run_directory import (
    CONFIG_FILE,
    RunInterrupted,
    check_fingerprints,
    command_line,
    create_run,
    environment,
    hold_run,
    version_changes,
)
from mopl.experiments.stages import Trained
from mopl.pareto import Front
from mopl.pareto.volumes import check_affordable
from mopl.training import RunLog, TrainingDiverged, TrainingInterrupted, make_accelerator
from mopl.training.parallel import exists_on_main, on_main

# Settings that a resumed run may have otherwise: they change what is written or where, not what is computed.
FREE_ON_RESUME = ("log_every", "checkpoint_every", "log_with", "device")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of a method, or of the untrained model, once it is evaluated."""

    front: Front
    figures: Any  # for `evaluation.json`: what the front has no place for
    samples: list[dict[str, Any]] | None = None  # for `samples.json`: answers to held-out prompts, if there are any

    def save(self, folder: Path) -> None:
        """Write it into the folder of the method, the front last."""
        write_file(folder / EVALUATION, json.dumps(self.figures, indent=2) + "\n")
        if self.samples is not None:
            write_file(folder / SAMPLES, json.dumps(self.samples, indent=2, ensure_ascii=False) + "\n")
        self.front.save(folder / FRONT)


class Recipe(ABC):
    """What an application does in a run; the driver calls the methods in the order in which they stand here."""

    kind: ClassVar[str | None]  # what `config.json` says made the run; None for ranking
    finished: ClassVar[type[FinishedRun]]
    free: ClassVar[tuple[str, ...]] = FREE_ON_RESUME  # settings that a resumed run may have otherwise
    chosen: ClassVar[Mapping[str, Any]] = {}  # by name the value that leaves a setting to the run
    # By their keys in `data` those that a resumed run must find again, and of what they are.
    fingerprints: ClassVar[Mapping[str, str]] = {"fingerprint": "data"}
    path: Path  # the run directory
    record: dict[str, Any] | None  # `config.json` of the run that goes on; None of a new one
    accelerator: Any
    log: RunLog
    say: Callable[[str], None]  # told, in a line, about each stage; silent on all processes but the main one
    data: dict[str, Any]  # what `config.json` remembers of it
    grid: Tensor  # (n, m) float64, the weights at which methods are evaluated; `plan` makes it
    stages: Any  # the trainings of the run, a `RunStages`, from `load` or `prepare` on

    def __init__(self, config: Any) -> None:
        self.config = config  # once `read` has returned with nothing left open

    @property
    def packages(self) -> tuple[str, ...]:
        """Modules that the settings need beside those of the command."""
        return ()

    @property
    @abstractmethod
    def stem(self) -> str:
        """What the default name of the run begins with."""

    def make_accelerator(self) -> Any:
        """Return the `Accelerator` of the run; nothing is loaded before."""
        return make_accelerator(self.config.mixed_precision, cpu=self.config.device == "cpu")

    @abstractmethod
    def read(self) -> dict[str, Any]:
        """Read the data, say what it is, complete the settings and check all that does not need the model.

        What is returned `config.json` will remember of the data.
        """

    def plan(self, objectives: int) -> None:
        """Set the grid for m objectives.

        Raises:
            ValueError: If the hypervolume of so many points takes too long.
        """
        self.grid = run_grid(self.config, objectives)
        check_affordable(*self.grid.shape)

    @classmethod
    def settings_to_resume(cls, record: dict[str, Any], changes: Mapping[str, Any], path: Path) -> Any:
        """Return the settings of the run that `record` is of, with the free ones among `changes` applied.

        These are settings as a user gives them again: what the run was begun with is no change.

        Raises:
            ValueError: If a setting that matters differs, or it is a run of another command.
        """
        config, kind = cls.finished.config_of(record, path), cls.finished.CONFIG
        again = {name: value for name, value in changes.items() if name not in cls.chosen or value != cls.chosen[name]}
        given = kind.from_dict({**record["config"], **again})
        differ = [
            f"{name} was {getattr(config, name)!r}, is {getattr(given, name)!r}"
            for name in again
            if name not in cls.free and not same(getattr(config, name), getattr(given, name))
        ]
        if differ:
            raise ValueError(
                f"{path} was started with other settings ({'; '.join(differ)}); leave them out to resume it, or start "
                "another run"
            )
        return kind.from_dict({**record["config"], **{name: again[name] for name in again if name in cls.free}})

    def load(self) -> None:  # noqa: B027
        """Load the model, where that shows what would stop the run later; nothing is written yet."""

    @abstractmethod
    def prepare(self) -> None:
        """Compute what all methods share, or read what the run has of it."""

    @abstractmethod
    def base(self) -> Measured:
        """Evaluate the untrained model."""

    def train(self, method: str, folder: Path) -> dict[str, Trained]:
        """Train what a method needs, in its folder and beside it; return its trainings by name."""
        return self.stages.train(method, folder)

    @abstractmethod
    def evaluate(self, method: str, folder: Path, trained: dict[str, Trained]) -> Measured:
        """Evaluate a trained method on the grid."""

    def front(
        self,
        method: str,
        figures: Sequence[tuple[float, Tensor, Tensor]],
        trained: Mapping[str, Trained],
        **said: Any,
    ) -> Front:
        """Return the front of a method or "base": `Front.of` with seed, resamples, seconds and parameters of the run.

        `figures` are scale c, main (L, n) and auxiliary (L, n, m) of each evaluation, c = 1 first.
        """
        (_, main, auxiliary), *rescaled = figures
        seconds = sum(each.seconds for each in trained.values())
        said = {"parameters": sum(each.parameters for each in trained.values()), **said}
        return Front.of(
            main, auxiliary, method, rescaled=rescaled, seconds=seconds, seed=self.config.seed,
            samples=self.config.bootstrap, **said,
        )  # fmt: skip

    def remarks(self) -> Iterable[str]:
        """Return what is to be said once all methods are there."""
        return ()

    def options_to_resume(self) -> tuple[str, ...]:
        """Return the options that continue the run, beside `--run` and `--resume`."""
        return ()


def execute(
    recipe: Recipe,
    run: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = _terminal.say,
) -> Path:
    """Train, evaluate and report; everything lands in one run directory, which is returned.

    `recipe` is the application with its settings; the other arguments and the errors are as in `mopl.ranking.rank`.
    """
    command = APPLICATIONS[recipe.kind].command
    require_for(command, *recipe.packages, *recipe.config.log_with)
    accelerator = recipe.accelerator = recipe.make_accelerator()
    main = accelerator.is_main_process
    recipe.say = say if main else (lambda text: None)
    with hold_run(run, recipe.stem, accelerator, resume=resume, overwrite=overwrite) as (path, record):
        recipe.path, recipe.record = path, record
        if record is not None:
            recipe.config = _as_begun(recipe.config, record)
        recipe.data = recipe.read()
        if record is not None:
            _check_same_run(recipe, record)
        config = recipe.config
        with closing(RunLog(path, enabled=main, log_with=config.log_with, settings=config.to_dict())) as recipe.log:
            recipe.load()
            accelerator.wait_for_everyone()
            with _begun(recipe, overwrite=overwrite):
                recipe.say(f"run {path}")
                _work(recipe)
    return path


@contextmanager
def _begun(recipe: Recipe, *, overwrite: bool) -> Iterator[None]:
    """Make the directory of a new run, and say of a run that stops inside the block what to do about what it leaves.

    A new run that fails before it has computed anything is taken back: it would only be in the way of the next try.

    Raises:
        RunInterrupted: After Ctrl-C or SIGTERM; it says how to go on.
        TrainingDiverged: If a loss is no longer a number.
    """
    path, accelerator = recipe.path, recipe.accelerator
    begins, keep_folder = recipe.record is None, path.is_dir() and not any(path.iterdir())
    if begins:
        on_main(accelerator, lambda: create_run(path, _record(recipe), overwrite=overwrite))
    command, options = APPLICATIONS[recipe.kind].command, recipe.options_to_resume()
    try:
        yield
    except TrainingInterrupted as stop:
        raise RunInterrupted(path, f"in {stop.stage!r} after step {stop.step}", command, *options) from None
    except KeyboardInterrupt:
        raise RunInterrupted(path, "between two steps", command, *options) from None
    except TrainingDiverged as error:
        raise type(error)(
            f"{error}; the run {path} stays as it is: pass other settings with --overwrite to replace it, or with "
            "another --run (--resume takes no other settings, so it would end here again)"
        ) from error
    except Exception:
        with suppress(OSError):  # what is said is the failure, not that its traces stay
            if begins and accelerator.is_main_process and [entry.name for entry in path.iterdir()] == [CONFIG_FILE]:
                (path / CONFIG_FILE).unlink()
                if not keep_folder:
                    path.resolve().rmdir()  # of a link, what it points to
        raise


def _work(recipe: Recipe) -> None:
    """Train, evaluate and report what is missing in the run directory."""
    path, accelerator = recipe.path, recipe.accelerator
    recipe.prepare()
    methods, began = (BASE, *recipe.config.methods), time.monotonic()

    for place, method in enumerate(methods):
        started = time.monotonic()
        folder = method_folder(path, recipe.config, method)
        if exists_on_main(accelerator, folder / FRONT):
            if method != BASE:
                _check_grid(recipe, folder / FRONT)
            continue
        on_main(accelerator, functools.partial(folder.mkdir, parents=True, exist_ok=True))
        if method == BASE:
            found = recipe.base()
        else:
            found = recipe.evaluate(method, folder, recipe.train(method, folder))
        on_main(accelerator, functools.partial(found.save, folder))
        if place:
            _estimate(recipe, method, methods[place + 1 :], found.front.seconds, time.monotonic() - started)
    if len(methods) > 2 and (spent := time.monotonic() - began) > 60:
        recipe.say(f"all methods took {duration(spent)}")
    for line in recipe.remarks():
        recipe.say(line)
    on_main(accelerator, lambda: write_reports(path))


def _estimate(recipe: Recipe, done: str, left: Sequence[str], training: float, whole: float) -> None:
    """Say how long the methods that are left will take, by the seconds of the one that is done.

    Each takes its own number of trainings, and one evaluation.
    """
    if not left or any(method not in TABLE for method in (done, *left)):
        return
    points, objectives = recipe.grid.shape
    trainings = sum(TABLE[method].trainings(objectives, points) for method in left)
    spent = training * trainings / TABLE[done].trainings(objectives, points) + max(0.0, whole - training) * len(left)
    if spent > 20:
        recipe.say(f"about {duration(spent)} for {', '.join(left)} (at most {trainings} trainings)")


def _check_grid(recipe: Recipe, file: Path) -> None:
    """Raise if a method that is finished was evaluated on another grid, which default ones of other versions are.

    Raises:
        ValueError: With what to do.
    """
    weights = [point.weights for point in Front.load(file).trained_points]
    grid = recipe.grid.tolist()
    if len(weights) != len(grid) or any(
        w is None or max(abs(a - b) for a, b in zip(w, own, strict=True)) > 1e-9
        for w, own in zip(weights, grid, strict=True)
    ):
        same = len(weights) == len(grid)
        held = "other trade-offs than" if same else f"{len(weights)} trade-offs but"
        raise ValueError(
            f"{file} holds {held} this version evaluates{'' if same else f' {len(grid)}'}, so that methods could not "
            "be compared; finish the run with the version of mopl that began it (config.json names it), or start "
            "another run"
        )


def plain_word(text: str) -> str:
    """Return a name of data as a part of a folder's name."""
    return "".join(c if c.isalnum() or c in "._" else "-" for c in text).strip("-") or "data"


# ---------------------------------------------------------------- what a run remembers


def _record(recipe: Recipe) -> dict[str, Any]:
    """Return what `config.json` holds."""
    kind = recipe.kind
    return {
        "command": command_line(),
        **({} if kind is None else {"kind": kind}),
        "config": recipe.config.to_dict(),
        **environment(kind),
        "data": recipe.data,
    }


def _as_begun(config: Any, record: dict[str, Any]) -> Any:
    """Return settings in which one that the run's version did not have means what that version did, unless it is given.

    That is known of a setting that differs from its default only.
    """
    before = getattr(config, "WHERE_MISSING", {})
    default = {name for name in before if getattr(config, name) == getattr(type(config), name)}
    changes = {name: before[name] for name in default - record["config"].keys()}
    return dataclasses.replace(config, **changes)


def _check_same_run(recipe: Recipe, record: dict[str, Any]) -> None:
    """Raise unless settings and data are those of the run that goes on; say if versions are not.

    Raises:
        ValueError: With what differs and what to do.
    """
    recipe.settings_to_resume(record, recipe.config.to_dict(), recipe.path)
    check_fingerprints(record, recipe.data, recipe.fingerprints, recipe.path)
    if changes := version_changes(record):
        recipe.say(f"note: versions changed since the run began ({'; '.join(changes)}); bits may differ")
