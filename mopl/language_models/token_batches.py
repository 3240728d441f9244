"""Which lists make up a batch: whole lists up to a budget of tokens.

The step number is the whole state of the order: any step can be asked for at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mopl._arguments import check_choice
from mopl.language_models.tokenization import TokenizedList
from mopl.training.batches import part_of_batch, shuffled_indices

BATCH_ORDER_STREAM = 1_000_000_021  # a stream of its own, far from the epochs, which take small integers


class TokenBatches:
    """Batches of whole lists whose tokens fit a budget.

    Each epoch is a permutation of the lists drawn from (seed, epoch), cut greedily: a batch takes lists in that order
    as long as they fit. Every list is used once an epoch, and none is ever split. Epochs differ in their number of
    batches; the step that an epoch begins with is found by cutting the epochs before it (a few milliseconds each for
    10,000 lists, once).

    Args:
        lists: the tokenised lists; only their lengths are read.
        budget: most tokens of a batch, padding included if `padded`.
        seed: of the permutations.
        shuffle: false keeps the order of the data in every epoch.
        padded: count what padding adds: number of sequences times the longest one.
        window: sort by length within windows of this many lists, which saves padding; the batches of an epoch then come
            in random order. It costs a batch its being a uniform sample. 0, the default, does nothing.
        oversized: a list longer than the budget is an error, or with "own" a batch of its own.

    Raises:
        ValueError: if a list exceeds the budget and `oversized` is "error", or there is no list.
    """

    def __init__(
        self,
        lists: Sequence[TokenizedList],
        budget: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        padded: bool = True,
        window: int = 0,
        oversized: Literal["error", "own"] = "error",
    ) -> None:
        check_choice(oversized, ("error", "own"), "oversized")
        if len(lists) == 0:
            raise ValueError("there is no list to make batches of")
        if budget < 1 or window < 0:
            raise ValueError(f"budget is {budget} and window is {window}; they must be at least 1 and 0")
        lengths = [item.lengths for item in lists]
        self.counts = np.array([len(of_list) for of_list in lengths])  # (Q,) sequences
        self.longest = np.array([of_list.max() for of_list in lengths])  # (Q,) tokens of the longest sequence
        self.tokens = self.counts * self.longest if padded else np.array([of_list.sum() for of_list in lengths])
        self.budget, self.seed, self.shuffle, self.padded, self.window = budget, seed, shuffle, padded, window
        over = np.flatnonzero(self.tokens > budget)
        if len(over) and oversized == "error":
            raise ValueError(
                f"{len(over)} of {len(lists)} lists have more tokens than the budget of {budget}: list {over[0]} has "
                f"{self.tokens[over[0]]} ({self.counts[over[0]]} sequences, the longest of {self.longest[over[0]]}). "
                "Raise the budget, lower max_length, or pass oversized='own'"
            )
        self._starts = [0]  # the first step of each epoch that is known
        self._epochs: dict[int, list[np.ndarray]] = {}

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the batches of an epoch, each an int64 array of places in the data."""
        if epoch not in self._epochs:
            # The epoch before may be asked for again at a boundary; more would only cost memory.
            self._epochs = {kept: cut for kept, cut in self._epochs.items() if kept == epoch - 1}
            self._epochs[epoch] = self._cut(epoch)
        return self._epochs[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, place in the epoch) of a step."""
        if step < 0:
            raise IndexError(f"step is {step} but steps count from 0")
        while step >= self._starts[-1]:
            self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        return epoch, step - self._starts[epoch]

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return part `rank` of `world_size` of the lists of `step`; a part may be empty if there are few lists."""
        epoch, place = self.locate(step)
        batch = self.epoch(epoch)[place]
        return batch[part_of_batch(len(batch), rank, world_size)]

    def _cut(self, epoch: int) -> list[np.ndarray]:
        count = len(self.counts)
        order = np.arange(count)
        if self.shuffle:
            order = shuffled_indices(count, count, seed=self.seed, step=epoch)
        if self.window > 1:
            windows = [order[start : start + self.window] for start in range(0, count, self.window)]
            order = np.concatenate([part[np.argsort(self.longest[part], kind="stable")] for part in windows])
        batches, start, sequences, longest, tokens = [], 0, 0, 0, 0
        for place, item in enumerate(order):
            sequences, longest = sequences + int(self.counts[item]), max(longest, int(self.longest[item]))
            tokens = sequences * longest if self.padded else tokens + int(self.tokens[item])
            if tokens > self.budget and place > start:
                batches.append(order[start:place])
                start, sequences, longest = place, int(self.counts[item]), int(self.longest[item])
                tokens = int(self.tokens[item])
        batches.append(order[start:])
        if self.window > 1 and self.shuffle:
            bits = np.random.Philox(np.random.SeedSequence([self.seed, BATCH_ORDER_STREAM, epoch]))
            batches = [batches[number] for number in np.random.Generator(bits).permutation(len(batches))]
        return batches
