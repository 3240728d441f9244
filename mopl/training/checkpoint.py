"""Checkpoints that are complete or absent: written under a temporary name, flushed to disk, then renamed.

A checkpoint is a folder `step-000120` with

* `model.safetensors`: every parameter and buffer of the model, or, where a large model is frozen and comes from
  elsewhere anyway, what is trained and the buffers,
* `optimizer.pt`: the state of the optimizer and of the gradient scaler (`torch.save`),
* `state.json`: the step, the seconds spent so far and the configuration.

There is no state of a random generator: whatever is random in a step is drawn from (seed, step, part of the batch),
so the step number is the whole state, for any number of processes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from mopl._extras import require
from mopl._files import discard_folder, remove_leftovers, write_folder
from mopl._records import Count, Seconds, check, damaged, read_json
from mopl._tensor_files import check_numbers, check_shapes, load_pickled, load_state, read_tensors

_NAME = re.compile(r"step-(\d+)$")

_REMEDY = "delete this checkpoint's folder: --resume then goes on from the one before, or from the start"


class _State(msgspec.Struct):
    """What is read of `state.json`."""

    step: Count
    seconds: Seconds
    config: dict[str, Any]
    save_frozen: bool = True


class _Group(msgspec.Struct):
    params: list[int]


class _Optimizer(msgspec.Struct):
    state: dict[Count, dict[str, Any]]
    param_groups: list[_Group]


class _Selected(msgspec.Struct):
    """See `mopl.training.selection`."""

    every: int
    maximise: bool
    waited: Count
    value: float
    best: float
    kept: dict[str, Any]
    step: Count | None
    patience: int | None


class _States(msgspec.Struct):
    optimizer: _Optimizer
    selection: _Selected | None = None
    scaler: dict[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: Its folder.
        step: How many steps were done when it was written.
    """

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """Return what `state.json` holds.

        Raises:
            DamagedFile: If it is damaged; the message names the key.
        """
        file = self.path / "state.json"
        state = read_json(file, _State, remedy=_REMEDY)
        if state["step"] != self.step:
            raise damaged(file, f"step is {state['step']} but the folder is that of step {self.step}", _REMEDY)
        return state

    def load_model(self, model: nn.Module) -> None:
        """Load the parameters and buffers into `model`, which must have the same names and shapes.

        Where frozen parameters were left out, `model` keeps its own.

        Raises:
            DamagedFile: If a file is damaged, or that of another model.
        """
        file = self.path / "model.safetensors"
        if self.state().get("save_frozen", True):
            load_state(model, file, remedy=_REMEDY)
            return
        wanted = {name: tensor.shape for name, tensor in trained_state(model).items()}
        buffers = [name for name, _ in model.named_buffers()]
        model.load_state_dict(read_tensors(file, wanted, buffers=buffers, remedy=_REMEDY), strict=False)

    def load_optimizer(self) -> dict[str, Any]:
        """Return what was given as `optimizer_state` when the checkpoint was written.

        Raises:
            DamagedFile: If the file is damaged.
        """
        return check(load_pickled(self._optimizer, remedy=_REMEDY), _States, self._optimizer, remedy=_REMEDY)

    def check_optimizer(
        self, states: dict[str, Any], model: nn.Module, groups: Sequence[Mapping[str, Any]], *, scaler: bool = False
    ) -> None:
        """Raise unless what `load_optimizer` gave is of this model.

        Args:
            states: What it gave.
            model: The model.
            groups: The parameter groups of its optimizer.
            scaler: Whether gradients are scaled, so that the state of that must be there.

        Raises:
            DamagedFile: With what does not fit.
        """
        file, found = self._optimizer, states["optimizer"]
        if scaler and states.get("scaler") is None:
            raise damaged(file, "scaler is missing: the state of the gradient scaler of fp16", _REMEDY)
        if [len(group["params"]) for group in found["param_groups"]] != [len(group["params"]) for group in groups]:
            raise damaged(file, "it is about other parameters than the model has", _REMEDY)
        parameters = [parameter for group in groups for parameter in group["params"]]
        for number, values in found["state"].items():
            for name, value in values.items():
                # Of other optimizers than Adam we do not know what belongs there.
                if name not in ("exp_avg", "exp_avg_sq"):
                    continue
                if number >= len(parameters) or getattr(value, "shape", None) != parameters[number].shape:
                    raise damaged(file, f"{name} of parameter {number} has not the parameter's shape", _REMEDY)
                check_numbers(file, {f"{name} of parameter {number}": value}, remedy=_REMEDY)
        best = states.get("selection")
        if best is not None and best["step"] is not None:
            kept = {name: getattr(tensor, "shape", ()) for name, tensor in best["kept"].items()}
            check_shapes(file, kept, {name: t.shape for name, t in trained_state(model).items()}, remedy=_REMEDY)

    @property
    def _optimizer(self) -> Path:
        return self.path / "optimizer.pt"


class CheckpointFolder:
    """The checkpoints of one training in one folder.

    Args:
        path: The folder; it is made when the first checkpoint is written.
        keep: How many of the newest checkpoints stay.
        save_frozen: Also save parameters that are not trained.
    """

    def __init__(self, path: str | os.PathLike[str], keep: int = 2, *, save_frozen: bool = True) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep} but at least one checkpoint must stay")
        self.path = Path(path)
        self.keep, self.save_frozen = keep, save_frozen

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
        """Write the checkpoint of `step` and drop the oldest ones; a crash at any point leaves the others intact.

        Args:
            step: Steps done; one checkpoint of the same step is replaced.
            model: The model.
            optimizer_state: `{"optimizer": optimizer.state_dict()}`, and what else `load_optimizer` is to return.
            state: Plain values for `state.json`: `seconds` and `config`, which must be there, and others.

        Returns:
            The checkpoint.

        Raises:
            ImportError: If safetensors is not installed.
            OSError: If it cannot be written.
        """
        require("safetensors")
        from safetensors.torch import save_file, save_model

        state = {"step": step, "save_frozen": self.save_frozen, **state}
        final = self.path / f"step-{step:06d}"

        def fill(folder: Path) -> None:
            file = str(folder / "model.safetensors")
            save_model(model, file) if self.save_frozen else save_file(trained_state(model), file)
            torch.save(optimizer_state, folder / "optimizer.pt")
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

        write_folder(final, fill)
        for old in self.all()[: -self.keep]:
            discard_folder(old.path)
        return Checkpoint(final, step)

    def remove_leftovers(self) -> None:
        """Delete what a killed process left half-written or half-deleted."""
        remove_leftovers(self.path)


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters, each once, and the buffers that a state dict holds."""
    state = model.state_dict(keep_vars=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: state[name] for name, _ in model.named_buffers() if name in state}
    return {name: tensor.detach().contiguous() for name, tensor in {**trained, **buffers}.items()}
