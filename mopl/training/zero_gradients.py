"""Which parameters the loss of a step depends on: under DeepSpeed all of them, in every process, as under DDP."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mopl._counted import counted


class UsedParameters:
    """Which trained parameters have had a gradient since the last update.

    ZeRO sums up what has one, in that order: where processes differ it would add the gradients of one parameter to
    those of another, or wait without end. It would update what has none with 0: by weight decay and old momentum.

    Args:
        model: What the engine trains.
        zero: The engine's optimizer.
        accelerator: accelerate's.
    """

    def __init__(self, model: nn.Module, zero: Any, accelerator: Any) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names, self._processes = [name for name, _ in trained], accelerator.num_processes
        self._device = accelerator.device
        self._now: set[int] = set()
        self._all: set[int] = set()
        self._hooks = [p.register_hook(functools.partial(self._note, number)) for number, (_, p) in enumerate(trained)]
        self._sum = zero.independent_gradient_partition_epilogue
        zero.independent_gradient_partition_epilogue = self._compare

    def _note(self, number: int, _: Tensor) -> None:
        self._now.add(number)

    def begin(self) -> None:
        """Begin a backward pass."""
        self._now.clear()

    def _compare(self) -> None:
        """Check that all processes have gradients of the same parameters, then sum them up."""
        counts = torch.zeros(len(self._names), dtype=torch.int32)
        counts[list(self._now)] = 1
        counts = counts.to(self._device)
        torch.distributed.all_reduce(counts)
        for name, count in zip(self._names, counts.tolist(), strict=True):
            if 0 < count < self._processes:
                raise RuntimeError(
                    f"{name} has a gradient in {count} of {self._processes} processes, and DeepSpeed adds up those of "
                    "all; let the loss use the same parameters for every part of a batch (a term of 0 * x does), or "
                    "freeze it"
                )
        self._all |= self._now
        self._sum()

    def check(self) -> None:
        """Check that nothing is without a gradient, then begin anew."""
        left_out = [name for number, name in enumerate(self._names) if number not in self._all]
        self._all.clear()
        if left_out:
            raise RuntimeError(
                f"the loss of this step does not depend on {counted(len(left_out), 'trained parameter')}, "
                f"{', '.join(left_out[:3])}{', ...' * (len(left_out) > 3)}, which DeepSpeed would decay all the same; "
                "freeze what is not trained, let the loss use the same parameters in each step (a term of 0 * x does), "
                "or train in one process"
            )

    def clear(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
