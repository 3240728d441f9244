"""The runs of an experiment, each made by the library, and the folder in which the same command finds them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from mopl._files import TEMPORARY, discard_folder, write_file
from mopl._records import read_json
from mopl._terminal import shell
from mopl.experiments.driver import FREE_ON_RESUME
from mopl.experiments.run import FinishedRun, read_any
from mopl.experiments.run_directory import CONFIG_FILE, read_run

BEGUN, ESTIMATE = "experiment.json", "estimate.json"
END = 1 << 20  # bytes at either end of a file that tell it from another of its size


class Door(NamedTuple):
    """One application of the library."""

    settings: tuple[str, str]  # module and class
    recipe: str  # the module of `check_resume` and of the function that trains
    train: str  # that function
    managed: tuple[str, ...]  # settings that the experiment itself sets

    @property
    def free(self) -> tuple[str, ...]:
        """The settings that a run which goes on may have otherwise."""
        return getattr(import_module(self.recipe), "FREE_ON_RESUME", FREE_ON_RESUME)

    @property
    def config(self) -> Any:
        """The class of its settings."""
        return getattr(import_module(self.settings[0]), self.settings[1])


RANK = Door(("mopl.ranking.config", "RankConfig"), "mopl.ranking.recipe", "rank", ("data", "objectives", "base"))
ALIGN = Door(
    ("mopl.alignment.config", "AlignConfig"), "mopl.alignment.recipe", "align", ("data", "objectives", "format")
)
CLP = Door(
    ("mopl.clp.config", "ClpConfig"), "mopl.clp.recipe", "train_policies",
    ("data", "rewards", "method", "scope", "kl_weight"),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run of the library."""

    name: str  # its folder in that of the experiment
    group: str  # the table to which it belongs
    door: Door
    settings: Mapping[str, Any]
    rows: Mapping[str, str] = field(default_factory=dict)  # by method the row of its figures; none: named as it is
    rewards: Callable[[], Any] | None = None  # of CLP
    lists: int = 1  # rows of the whole data, where the probe of `bench.paper.estimate` reads a few alone

    def config(self, **changes: Any) -> Any:
        """Return the settings as the library checks them."""
        return self.door.config(**{**self.settings, **changes})

    def train(self, folder: Path, config: Any, say: Callable[[str], None], **how: Any) -> None:
        """Do the run, or go on with it."""
        more = {} if self.rewards is None else {"rewards": self.rewards()}
        getattr(import_module(self.door.recipe), self.door.train)(config, folder, say=say, **more, **how)

    def rows_of(self, run: FinishedRun) -> dict[str, Any]:
        """Return the fronts of a finished run by the row in which they stand, that of the base as "base"."""
        fronts = {front.method: front for front in run.fronts()}
        names = {"base": "base", **(self.rows or {method: method for method in run.methods})}
        return {row: fronts[method] for method, row in names.items() if method in fronts}


@dataclass
class Plan:
    """An experiment that can begin: its data is there and has the form that it must have."""

    name: str
    out: Path
    jobs: list[Job]
    files: list[Path]  # the data
    options: dict[str, Any]  # what was asked for, beside the data
    counts: dict[str, Any]  # what is known of the size of the data

    def folder(self, job: Job) -> Path:
        """Return where a run lies."""
        return self.out / "runs" / job.name

    def finished(self, job: Job) -> FinishedRun | None:
        """Return a run that is finished with these settings, or None.

        Raises:
            ValueError: If it was begun with other settings.
        """
        folder = self.folder(job)
        if not (folder / CONFIG_FILE).is_file():
            return None
        self._settings_to_resume(job)
        run = read_any(folder)
        return None if run.missing or not (folder / "report.html").is_file() else run

    def finish(self, job: Job, say: Callable[[str], None]) -> None:
        """Do a run, or what is missing of it."""
        folder = self.folder(job)
        if not (folder / CONFIG_FILE).is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            job.train(folder, job.config(), say)
        elif self.finished(job) is None:
            job.train(folder, self._settings_to_resume(job), say, resume=True)

    def _settings_to_resume(self, job: Job) -> Any:
        folder = self.folder(job)
        return import_module(job.door.recipe).check_resume(read_run(folder), dict(job.settings), folder)

    def begin(self) -> None:
        """Write what is begun here; or check that it is what was begun.

        Raises:
            ValueError: If the folder holds an experiment of other data or options.
        """
        data = dict(zip(_names(self.files), map(mark, self.files), strict=True))
        now = {"experiment": self.name, "options": self.options, "data": data}
        now = json.loads(json.dumps(now))
        file = self.out / BEGUN
        for entry in self.out.iterdir() if self.out.is_dir() else ():
            if entry.is_file() and entry.name.startswith(TEMPORARY):  # of a process that was killed while it wrote
                entry.unlink()
        if not file.is_file():
            if self.out.is_dir() and any(self.out.iterdir()):
                raise ValueError(
                    f"--out {self.out} holds files of something else ({BEGUN} is not there); name a new folder"
                )
            self.out.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(now, indent=2) + "\n")
            return
        then = read_json(file, dict[str, Any], remedy="take it from a backup, or name a new folder")
        if then != now and not (self.out / "runs").exists():  # nothing is trained yet, after --plan or a mistake
            for name in ("data", "probe"):
                if (self.out / name).exists():
                    discard_folder(self.out / name)
            (self.out / ESTIMATE).unlink(missing_ok=True)
            write_file(file, json.dumps(now, indent=2) + "\n")
            return
        if then["experiment"] != now["experiment"]:
            raise ValueError(f"--out {self.out} was begun by {then['experiment']}, not {self.name}; name a new folder")
        old, new = ({**each["options"], **each["options"].get("settings", {})} for each in (then, now))
        changed = [
            f"{name} was {_word(old.get(name))}, is {_word(new.get(name))}"
            for name in sorted({*old, *new} - {"settings", *self.jobs[0].door.free})
            if old.get(name) != new.get(name)
        ]
        files = sorted(name for name, value in now["data"].items() if then["data"].get(name) != value)
        files += sorted(then["data"].keys() - now["data"].keys())
        if changed or files:
            what = "; ".join(changed + [f"{name} is another file" for name in files])
            raise ValueError(
                f"--out {self.out} was begun otherwise ({what}); pass what it was begun with to go on, or name a new "
                "folder"
            )


def _names(files: Sequence[Path]) -> list[str]:
    """Return the names of files below the folder that holds all of them: parts of two folds may have one name."""
    top = Path(os.path.commonpath([file.parent for file in files]))
    return [file.relative_to(top).as_posix() for file in files]


def _word(value: Any) -> str:
    return "not given" if value is None else shell(*value) if isinstance(value, list) else str(value)


def mark(file: Path) -> list[Any]:
    """Return the size of a file and a digest of its ends: the library compares all of it when a run goes on."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        first = handle.read(END)
        handle.seek(max(0, size - END))
        return [size, hashlib.sha256(first + handle.read(END)).hexdigest()[:16]]


def by_group(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Return the jobs of each table, in their order."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    return groups
