"""The gradient of one step: the mean over a whole batch, added up over its parts, and the seeds of what it draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mopl.training.batches import BatchSource, part_of_batch, to_device
from mopl.training.parallel import Prepared

if TYPE_CHECKING:
    from mopl.training.loop import TrainingConfig

LossFunction = Callable[[nn.Module, Any, int], tuple[Tensor, dict[str, Any]]]


def accumulate(
    accelerator: Any,
    prepared: Prepared,
    source: BatchSource,
    loss: LossFunction,
    config: TrainingConfig,
    step: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up the gradient of the mean over the whole batch; return this process's share of the loss and the logs."""
    parts = accelerator.num_processes * config.accumulation
    total: Tensor | None = None
    logs: dict[str, Tensor] = {}
    for turn in range(config.accumulation):
        part = accelerator.process_index * config.accumulation + turn
        rows = part_of_batch(source.batch_size, part, parts)
        share = (rows.stop - rows.start) / source.batch_size
        batch = to_device(source(step, part, parts), accelerator.device)
        _seed_generators((config.seed, step, part), accelerator.device)
        last = turn == config.accumulation - 1
        with contextlib.nullcontext() if last else prepared.no_sync():
            value, extra = loss(prepared.model, batch, step)
            # Gradients are averaged over the processes; the mean over all lists needs the sum of shares.
            prepared.backward(value * (share * accelerator.num_processes))
        total = share * value.detach() if total is None else total + share * value.detach()
        for name, item in extra.items():
            item = share * torch.as_tensor(item, dtype=torch.float32, device=accelerator.device).detach()
            logs[name] = logs[name] + item if name in logs else item
    assert total is not None
    return total.float(), logs


def reduced(accelerator: Any, logs: dict[str, Tensor]) -> list[float]:
    """Return the logs of all processes together, in order; every process must call it."""
    return accelerator.reduce(torch.stack(list(logs.values())), "sum").tolist() if logs else []


def _seed_generators(entropy: tuple[int, int, int], device: torch.device) -> None:
    """Seed what a model on `device` draws (dropout) for one part of one step's batch: by the run's seed, step and part.

    `torch.manual_seed` would do, but where there is no accelerator it keeps a stack trace of every call for later.
    """
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)
