"""Which lists make up a step's batch, by index arithmetic: the step number is the whole state of the data order."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class BatchSource(Protocol):
    """Gives the batches of a training.

    A step's batch has `batch_size` lists, the same ones however it is split. The source is asked for one part of it at
    a time: part `rank` of `world_size`, which must hold exactly the lists `part_of_batch(batch_size, rank,
    world_size)` of the batch. Whatever is drawn at random for a batch (weights, β) is drawn for the whole
    batch from (seed, step) and cut in the same way, so that no update depends on how a batch is split.

    Attributes:
        batch_size: Lists of a step's batch, over all processes and parts.
    """

    batch_size: int

    def __call__(self, step: int, rank: int, world_size: int) -> Any:
        """Return part `rank` of `world_size` of the batch of `step`, on the CPU or on the training device.

        Args:
            step: Step, from 0.
            rank: Which part, from 0.
            world_size: How many parts there are: processes times parts that each works through.

        Returns:
            What the loss function takes as its batch: a tensor, or anything else with `.to(device)`, or a dict or list
            of these.
        """
        ...


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return a tensor, anything else with `.to`, or a dict or list of them on a device; what has none as it is."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(to_device(value, device) for value in batch)
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    move = getattr(batch, "to", None)
    return batch if move is None else move(device)


def part_of_batch(batch_size: int, rank: int, world_size: int) -> slice:
    """Return which rows of a batch of `batch_size` lists are part `rank` of `world_size`; sizes differ by at most 1.

    Args:
        batch_size: Lists of the whole batch.
        rank: Which part, from 0.
        world_size: How many parts there are.

    Returns:
        The rows of the part, consecutive; empty where there are more parts than lists.

    Raises:
        ValueError: If `rank` is negative or not below `world_size`.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} but must be at least 0 and below world_size = {world_size}")
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def shuffled_indices(count: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Return the indices of the lists in the batch of `step`: consecutive cuts of an endless run of permutations.

    Each epoch is a permutation of all `count` lists drawn from (seed, epoch); batches run across the ends of epochs,
    so every list is used equally often and every batch is full.

    Args:
        count: Number of lists in the data.
        batch_size: Number of lists in a batch; it may exceed `count`.
        seed: Seed of the run.
        step: Step, from 0.

    Returns:
        int64 array (batch_size,).

    Raises:
        ValueError: If there is no list, or the batch is empty.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"there are {count} lists and batch_size is {batch_size}; both must be at least 1")
    first = step * batch_size
    epochs = range(first // count, (first + batch_size - 1) // count + 1)
    stream = np.concatenate([_permutation(count, seed, epoch) for epoch in epochs])
    offset = first - epochs[0] * count
    return stream[offset : offset + batch_size]


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(count)
