"""Which lists make up a training batch, for data whose lists differ in length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mopl.ranking.batch import Batch
from mopl.ranking.data import RankingData
from mopl.training.batches import part_of_batch, shuffled_indices

WINDOW_STREAM = 1_000_000_009  # see SPLIT_STREAM


class Batches:
    """Training batches as a function of the step: a `mopl.training` batch source.

    The epochs, each a permutation drawn from (seed, epoch), are laid end to end and cut into batches, so every batch
    is full, every list is used equally often and the step number is the whole state.

    Args:
        data: the lists.
        lists_per_batch: B. More than the data has gives all of them in each step.
        seed: of the permutations.
        shuffle: false keeps the order of the data in every epoch.
        bucket: sort by length within windows of this many batches, so that a batch holds lists of similar length and
            little padding; the order of the batches within a window is random. It costs the batch its being a uniform
            sample. 1, the default, does nothing.
        order: give the presorted order of each objective with every batch.
        width: pad every batch to this many items; default the longest list of the batch.

    Raises:
        ValueError: if a number is below 1.
    """

    def __init__(
        self,
        data: RankingData,
        lists_per_batch: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        bucket: int = 1,
        order: bool = False,
        width: int | None = None,
    ) -> None:
        if lists_per_batch < 1 or bucket < 1:
            raise ValueError(f"lists_per_batch is {lists_per_batch} and bucket is {bucket}; both must be at least 1")
        self.batch_size = min(lists_per_batch, len(data))
        self.data, self.seed, self.shuffle, self.bucket = data, seed, shuffle, bucket
        self.order, self.width = order, width

    def queries(self, step: int) -> Tensor:
        """Return (B,) int64, which lists of the data make up the batch of `step`, counted from 0 without end."""
        if step < 0:
            raise IndexError(f"step is {step} but steps count from 0")
        if self.bucket == 1:
            return torch.from_numpy(self._stream(step, self.batch_size))
        window, place = divmod(step, self.bucket)
        lists = self._stream(window, self.bucket * self.batch_size)
        lists = lists[np.argsort(self.data.lengths.numpy()[lists], kind="stable")]
        if self.shuffle:
            bits = np.random.Philox(np.random.SeedSequence([self.seed, WINDOW_STREAM, window]))
            place = np.random.Generator(bits).permutation(self.bucket)[place]
        return torch.from_numpy(lists[place * self.batch_size : (place + 1) * self.batch_size])

    def _stream(self, cut: int, size: int) -> np.ndarray:
        """Return the given cut, of `size` lists, of the epochs laid end to end."""
        if self.shuffle:
            return shuffled_indices(len(self.data), size, seed=self.seed, step=cut)
        return np.arange(cut * size, (cut + 1) * size) % len(self.data)

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return part `rank` of `world_size` of the batch of `step`."""
        part = self.queries(step)[part_of_batch(self.batch_size, rank, world_size)]
        return self.data.batch(part, order=self.order, width=self.width)


def batches(
    data: RankingData,
    lists_per_batch: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    bucket: int = 1,
    order: bool = False,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Batch]:
    """Yield the training batches of steps `start` to `stop - 1`, by default without end; see `Batches`."""
    source = Batches(data, lists_per_batch, seed=seed, shuffle=shuffle, bucket=bucket, order=order)
    step = start
    while stop is None or step < stop:
        yield source(step)
        step += 1
