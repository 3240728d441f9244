"""A run directory: made whole by one rename, never overwritten by accident, described well enough to be repeated.

`config.json` holds the resolved settings, the command line, the versions and whatever describes the data. It is written
before the directory gets its name, so a directory without it was not made by `mopl` and is never touched. One process
at a time works in a run (`mopl.experiments.run_lock`).
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from mopl import __version__, _terminal
from mopl._disk import with_resume
from mopl._files import TEMPORARY, discard_folder, remove_leftovers, write_file, write_folder
from mopl._records import check, read_json
from mopl.experiments.applications import APPLICATIONS, Application
from mopl.experiments.run_lock import RunInUse, locked
from mopl.training.parallel import on_main

CONFIG_FILE = "config.json"
DONE = "training.json"  # written beside a model when its training has ended
DAMAGED_RUN = "the run is damaged: take the file from a backup, or start another run"
# Whose version may change what any run computes.
_PACKAGES = ("torch", "numpy", "triton", "accelerate", "safetensors", "moocore")
# What stands at the top of a run, of any command and version. Anything else is a person's, and is not deleted.
_OWN = frozenset(
    "config.json log.jsonl front.json evaluation.json table.txt front.png report.html comparison.png comparison.html "
    "samples.json samples.jsonl rewards.json training.json model.json model.safetensors normalizer.safetensors "
    "reference.safetensors base model models reference checkpoints rollouts tensorboard wandb trackers.json".split()
).union(*(each.methods for each in APPLICATIONS.values()))
_CLUTTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave


@contextmanager
def hold_run(
    run: str | os.PathLike[str] | None, stem: str, accelerator: Any, *, resume: bool, overwrite: bool
) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Give the directory of a run to begin or to resume, held against other processes until the block ends.

    It is not made yet; with it comes the record of the run that is resumed, or None. The default directory is
    `runs/<stem>-<n>` with the next free n. Under a launcher the main process holds it, and every process gets its path
    or its error.

    Raises:
        FileExistsError: As `check_new_run`.
        FileNotFoundError: If there is no run to resume.
        OSError: If it cannot be made, or another process works in it.
        ValueError: If the run to resume cannot be read.
    """
    if resume and run is None:
        raise ValueError("--resume needs the run to continue; name it with --run")
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it; pass one of them")
    if run is not None and not os.fspath(run):
        raise ValueError("--run is empty; name a directory, or leave it out")

    def look(path: Path) -> None:
        read_run(path) if resume else check_new_run(path, overwrite=overwrite)

    with ExitStack() as held:

        def take() -> str:
            path = next_run("runs", stem) if run is None else Path(run)
            look(path)  # before anything is made
            try:
                held.enter_context(locked(path))
            except RunInUse as error:
                raise RunInUse(f"{error}, or name another with --run") from None
            look(path)  # what another process has done until then
            _clean(Path(os.path.realpath(path)))
            return str(path)

        path = Path(on_main(accelerator, take))
        try:
            yield path, read_run(path) if resume else None
        except OSError as error:
            if not (path / CONFIG_FILE).is_file():  # no run yet
                raise
            raise with_resume(error, path) from error


def _clean(run: Path) -> None:
    """Delete what killed processes left half-written or half-deleted, and what they would have deleted next."""
    remove_leftovers(run)
    for folder, folders, files in os.walk(run):
        for name in folders:
            trained = name in ("checkpoints", "rollouts") and DONE in files
            if trained or (name.endswith(".parts") and f"{name.removesuffix('.parts')}.safetensors" in files):
                discard_folder(Path(folder) / name)
        folders[:] = [name for name in folders if (Path(folder) / name).is_dir()]


def refresh(
    path: str | os.PathLike[str], write: Callable[[Path], None], say: Callable[[str], None] = _terminal.say
) -> None:
    """Call `write(path)`, which writes a run's reports anew; say so where the run has to stay as it is."""
    try:
        with locked(path):
            write(Path(path))
    except OSError as error:
        if not isinstance(error, (RunInUse, PermissionError)) and error.errno != errno.EROFS:
            raise
        say(f"note: the table, picture and page in {path} stay as they are: {error}")


class RunRecord(msgspec.Struct):
    """What `config.json` holds, as far as every command reads it; "config" and "data" are checked by each command."""

    config: dict[str, Any]
    data: dict[str, Any]
    kind: str | None = None
    versions: dict[str, str] = {}
    command: list[str] = []
    platform: str = ""
    commit: str = ""


class Sample(msgspec.Struct):
    """An entry of `samples.json`: a prompt, and an answer for each trade-off."""

    prompt: str
    responses: list[str]


def check_new_run(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise unless a run may be made at `path`; nothing is changed.

    Raises:
        FileExistsError: If something is there and may not be replaced.
        OSError: If nothing can be written there.
    """
    path = Path(path)
    parent = next((folder for folder in path.absolute().parents if folder.exists()), path)
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file, so there can be no run at {path}; name another with --run")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"nothing may be written into {parent}, so {path} cannot be made; name another with --run"
        )
    if not path.exists() or _is_empty(path):
        return
    try:
        made = "mopl" in read_run(path).get("versions", {})
    except (FileNotFoundError, ValueError):
        made = False
    if not made:
        raise FileExistsError(f"{path} exists and is no run of mopl, so it is left alone; name another with --run")
    if not overwrite:
        raise FileExistsError(
            f"{path} holds a run already: continue it with --resume, replace it with --overwrite, or name another "
            "with --run"
        )
    if os.path.samefile(path, os.curdir):
        raise FileExistsError(f"{path} is the current folder, which --overwrite would delete; go to another one")
    names = sorted(entry.name for entry in path.iterdir())
    if strange := [n for n in names if n not in _OWN and n not in _CLUTTER and not n.startswith(TEMPORARY)]:
        raise FileExistsError(
            f"{path} holds what no run of mopl has ({', '.join(strange[:3])}{', ...' if strange[3:] else ''}), which "
            "--overwrite would delete; move it elsewhere, or name another with --run"
        )


def create_run(path: str | os.PathLike[str], record: dict[str, Any], *, overwrite: bool = False) -> Path:
    """Make a run directory that holds `record` as `config.json`; an old run in its place is deleted only now.

    Raises:
        FileExistsError: As `check_new_run`.
    """
    path = Path(path)
    check_new_run(path, overwrite=overwrite)
    text = json.dumps(record, indent=2) + "\n"
    if _is_empty(path):  # perhaps the current folder or the root of a disk, which must not be replaced
        write_file(path / CONFIG_FILE, text)
    else:
        write_folder(path, lambda folder: write_file(folder / CONFIG_FILE, text), replace=overwrite)
    return path


def _is_empty(path: Path) -> bool:
    """Return whether there is a folder with nothing in it but what a killed process left of its first file."""
    return path.is_dir() and all(entry.name.startswith(TEMPORARY) for entry in path.iterdir())


class RunInterrupted(RuntimeError):
    """A run was stopped by Ctrl-C or SIGTERM; everything finished so far is in its directory."""

    def __init__(self, path: Path, where: str, command: str, *options: str) -> None:
        again = _terminal.shell("mopl", command, "--run", path, "--resume", *options)
        super().__init__(f"stopped {where}; continue with: {again}")
        self.path = path


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the record of a run.

    Raises:
        FileNotFoundError: If there is no run at `path`.
        ValueError: If its record cannot be read, or is of another program.
    """
    file = Path(path) / CONFIG_FILE
    if not file.exists():
        raise FileNotFoundError(
            f"there is no run at {os.fspath(path) or repr('')}: it has no {CONFIG_FILE}; name the directory of a run"
        )
    record = read_json(file, dict[str, Any], remedy=DAMAGED_RUN)
    if not {"config", "data"} <= record.keys():
        raise ValueError(f"{path} is no run of mopl: {file} is something else; name the directory of a run")
    return check(record, RunRecord, file, remedy=DAMAGED_RUN)


def check_kind(record: dict[str, Any], path: str | os.PathLike[str], kind: str | None) -> None:
    """Raise a ValueError unless a run was made by the command of that kind; it says by which, and what it is for."""
    if record.get("kind") == kind:
        return
    found, wanted = application_of(record, path), APPLICATIONS[kind]
    remedy = f" or use this one with {found.used_with}" if found.used_with != wanted.used_with else ""
    raise ValueError(f"{path} is a run of {found.made_by}, not of {wanted.made_by}; name another run{remedy}")


def application_of(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Application:
    """Return the application that made a run, or raise a ValueError if there is none of its kind."""
    found = record.get("kind")
    if found not in APPLICATIONS:
        raise ValueError(f"{path} is a run of something else ({found}); was it made by another version of mopl?")
    return APPLICATIONS[found]


def check_fingerprints(
    record: dict[str, Any], found: Mapping[str, Any], fingerprints: Mapping[str, str], path: Path
) -> None:
    """Raise a ValueError unless the fingerprints of now are those in a run's record.

    `fingerprints` has by their keys in both of what they are.
    """
    for key, what in fingerprints.items():
        if record["data"][key] != found[key]:
            is_not = "are not what they were" if what.endswith("s") else "is not what it was"
            raise ValueError(
                f"the {what} of {path} {is_not} when the run began (another fingerprint); put the old files back, or "
                "start another run"
            )


def next_run(parent: str | os.PathLike[str], stem: str) -> Path:
    """Return `parent/stem-n` with the smallest n from 1 above that of every run that is there or beginning."""
    parent = Path(parent)
    taken = [0]
    if parent.is_dir():
        run = re.compile(rf"{re.escape(stem)}-([0-9]+)|\.{re.escape(stem)}-([0-9]+)\.lock")
        matches = (run.fullmatch(entry.name) for entry in parent.iterdir())
        taken += [int(match[1] or match[2]) for match in matches if match]
    return parent / f"{stem}-{max(taken) + 1}"


def environment(kind: str | None) -> dict[str, Any]:
    """Return the versions that a run of a kind depends on, and the commit of the checkout that this is, if any."""
    versions: dict[str, Any] = {"python": platform.python_version(), "mopl": __version__}
    for package in (*_PACKAGES, *APPLICATIONS[kind].packages):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = _commit()
    return {"versions": versions, "platform": platform.platform(), **({"commit": commit} if commit else {})}


def _commit() -> str | None:
    """Return the commit of the checkout that this file lies in, with "-dirty" if tracked files were changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str | None:
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
            return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return f"{commit}-dirty" if changed else commit


def version_changes(record: dict[str, Any]) -> list[str]:
    """Return, in words, how the versions now differ from those a run was made with."""
    then, now = record.get("versions", {}), environment(record.get("kind"))["versions"]
    return [f"{name} {then[name]} -> {now.get(name, 'none')}" for name in then if then[name] != now.get(name)]


def command_line() -> list[str]:
    """Return the command line as it can be repeated: the program's name and its arguments."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else []
