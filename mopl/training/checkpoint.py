"""Checkpoints that are complete or absent: written under a temporary name, flushed to disk, then renamed.

A checkpoint is a folder `step-000120` with

* `model.safetensors`: every parameter and buffer of the model,
* `optimizer.pt`: the state of the optimizer and of the gradient scaler (`torch.save`),
* `state.json`: the step, the seconds spent so far and the configuration.

There is no state of a random generator: whatever is random in a step is drawn from (seed, step, part of the batch),
so the step number is the whole state, for any number of processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

_NAME = re.compile(r"step-(\d+)$")
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """Return what `state.json` holds."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))

    def load_model(self, model: nn.Module) -> None:
        """Load the parameters and buffers into `model`, which must have the same names and shapes."""
        from safetensors.torch import load_model

        load_model(model, self.path / "model.safetensors", strict=True)

    def load_optimizer(self) -> dict[str, Any]:
        """Return what was given as `optimizer_state` when the checkpoint was written."""
        return torch.load(self.path / "optimizer.pt", map_location="cpu", weights_only=True)


class CheckpointFolder:
    """The checkpoints of one training in one folder.

    Args:
        path: The folder; it is made when the first checkpoint is written.
        keep: How many of the newest checkpoints stay.
    """

    def __init__(self, path: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep} but at least one checkpoint must stay")
        self.path = Path(path)
        self.keep = keep

    def all(self) -> list[Checkpoint]:
        """Return the complete checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        found = ((_NAME.match(entry.name), entry) for entry in self.path.iterdir() if entry.is_dir())
        return sorted((Checkpoint(entry, int(m.group(1))) for m, entry in found if m), key=lambda c: c.step)

    def latest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None."""
        found = self.all()
        return found[-1] if found else None

    def save(self, step: int, model: nn.Module, optimizer_state: dict[str, Any], state: dict[str, Any]) -> Checkpoint:
        """Write the checkpoint of `step` and drop the oldest ones; a crash at any point leaves the others intact."""
        from safetensors.torch import save_model

        final = self.path / f"step-{step:06d}"

        def fill(folder: Path) -> None:
            save_model(model, str(folder / "model.safetensors"))
            torch.save(optimizer_state, folder / "optimizer.pt")
            (folder / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")

        write_folder(final, fill)
        for old in self.all()[: -self.keep]:
            discard_folder(old.path)
        return Checkpoint(final, step)

    def remove_leftovers(self) -> None:
        """Delete what a killed process left half-written or half-deleted."""
        if self.path.is_dir():
            for entry in self.path.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `final` with what `fill` writes, all of it or nothing; an existing `final` is replaced."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f"{_TEMPORARY}{final.name}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        _flush(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        discard_folder(final)
    os.replace(temporary, final)
    _flush(final.parent)


def discard_folder(path: Path) -> None:
    """Delete a folder so that no reader ever sees a part of it under its own name."""
    doomed = path.parent / f"{_TEMPORARY}deleted-{path.name}"
    if doomed.exists():
        shutil.rmtree(doomed)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def write_file(path: str | os.PathLike[str], content: str | bytes | Callable[[Path], None]) -> None:
    """Write a file all at once: into a temporary name in the same folder, flushed, then renamed.

    Args:
        path: The file; an existing one is replaced.
        content: Text, bytes, or a function that writes the file at the path that it is given.
    """
    path = Path(path)
    # The suffix stays last: writers such as matplotlib's choose the format by it.
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        if callable(content):
            content(temporary)
        elif isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            temporary.write_text(content, encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Ask the operating system to put a file or a folder entry on the disk."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
