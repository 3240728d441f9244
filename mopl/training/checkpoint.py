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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopl._files import discard_folder, remove_leftovers, write_folder

_NAME = re.compile(r"step-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """Return what `state.json` holds."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))

    def load_model(self, model: nn.Module) -> None:
        """Load the parameters and buffers into `model`, which must have the same names and shapes.

        Where frozen parameters were left out, `model` keeps its own.
        """
        from safetensors.torch import load_file, load_model

        if self.state().get("save_frozen", True):
            load_model(model, self.path / "model.safetensors", strict=True)
            return
        saved, wanted = load_file(self.path / "model.safetensors"), set(trained_state(model))
        if saved.keys() != wanted:
            names = ", ".join(sorted(saved.keys() ^ wanted)[:3])
            raise ValueError(f"{self.path} and the model do not both train {names}; the models must be alike")
        model.load_state_dict(saved, strict=False)

    def load_optimizer(self) -> dict[str, Any]:
        """Return what was given as `optimizer_state` when the checkpoint was written."""
        return torch.load(self.path / "optimizer.pt", map_location="cpu", weights_only=True)


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
        """Write the checkpoint of `step` and drop the oldest ones; a crash at any point leaves the others intact."""
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
