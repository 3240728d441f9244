"""Which step of a training is kept: the best one on validation data, and when to stop waiting for a better one.

The model is validated after every `every` steps and after the last one. The state of the best step lies in memory and
in every checkpoint, so a resumed training keeps and stops at what an uninterrupted one does, bit for bit. Nothing that
the training draws is touched: its seeds come from the step (see `mopl.training.loop`), and what validation draws comes
from a seed of its own, the same at each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._restoring import evaluating, seeded
from mopl.training.checkpoint import trained_state
from mopl.training.parallel import Prepared


class Selection:
    """Keeps the best step of one training.

    Args:
        validate: Gives the figure of a model, in evaluation mode, on validation data. It is called on the main process
            alone, with the plain model on the device that its parameters are on (the CPU under FSDP2 and DeepSpeed).
        every: Steps from one validation to the next.
        patience: Validations without a better figure after which the training ends; None trains all steps.
        maximise: Whether larger figures are better. A figure that is no number is worse than any; while there is none,
            the latest step is kept.

    Attributes:
        step: The best step so far; None before the first validation.
        value: The latest figure.
        best: The best figure so far.
        waited: Validations since the best one.
    """

    def __init__(
        self, validate: Callable[[nn.Module], float], *, every: int, patience: int | None = None, maximise: bool = False
    ) -> None:
        if every < 1 or (patience is not None and patience < 1):
            raise ValueError(
                f"every is {every} and patience is {patience} but both must be at least 1 (patience or None)"
            )
        self.validate, self.every, self.patience, self.maximise = validate, every, patience, maximise
        self.step: int | None = None
        self.value = self.best = float("nan")
        self.waited = 0
        self._kept: dict[str, Tensor] = {}

    @property
    def stopped(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def consider(self, step: int, steps: int, prepared: Prepared, accelerator: Any) -> bool:
        """Validate after `step` of at most `steps` if it is time; every process must call it, and learns the same.

        Returns:
            Whether it was time.
        """
        if step % self.every and step != steps:
            return False
        model = prepared.plain()
        figure = torch.zeros((), device=accelerator.device)
        if accelerator.is_main_process:
            figure += self._figure(model)
        self.value = float(accelerator.reduce(figure, "sum"))
        better = self.value > self.best if self.maximise else self.value < self.best
        if better or math.isnan(self.best):
            self.step, self.best, self.waited = step, self.value, 0
            self._kept = {name: tensor.to("cpu", copy=True) for name, tensor in trained_state(model).items()}
        else:
            self.waited += 1
        return True

    @torch.no_grad()
    def _figure(self, model: nn.Module) -> float:
        with evaluating(model), seeded(0):
            return float(self.validate(model))

    def restore(self, model: nn.Module) -> int | None:
        """Give a model the parameters of the best step, and return that step; None where nothing was validated."""
        if self.step is not None:
            model.load_state_dict(self._kept, strict=False)
        return self.step

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, settings included."""
        return {
            **self._settings(), "step": self.step, "value": self.value, "best": self.best, "waited": self.waited,
            "kept": self._kept,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: If it was made with other settings.
        """
        differ = [f"{name} was {state[name]}, is {v}" for name, v in self._settings().items() if state[name] != v]
        if differ:
            raise ValueError(f"the selection of the best step had other settings ({'; '.join(differ)}); use the same")
        self.step, self.value, self.best, self.waited = (state[key] for key in ("step", "value", "best", "waited"))
        self._kept = state["kept"]

    def _settings(self) -> dict[str, Any]:
        return {"every": self.every, "patience": self.patience, "maximise": self.maximise}


def continue_selection(selection: Selection | None, states: dict[str, Any], checkpoint: Path) -> None:
    """Bring a selection to where a checkpoint's was.

    Raises:
        ValueError: If the checkpoint was written with one and there is none now, or the other way round, or its
            settings differ.
    """
    if (selection is None) != ("selection" not in states):
        raise ValueError(
            f"the checkpoint {checkpoint} was written {'with' if selection is None else 'without'} a selection of the "
            "best step by validation data; resume as it was begun, or start a new run"
        )
    if selection is not None:
        selection.load_state_dict(states["selection"])
