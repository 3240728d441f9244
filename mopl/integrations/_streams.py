"""Streams of rows as data to train on: read a block at a time, in their own order, never whole.

A training on a stream is the training on the same rows in a list with `train_sampling_strategy="sequential"`, to the
bit, while they last. At its end a stream begins again without a break: where it ends is not known beforehand, so the
last step of a pass could not be told to have fewer batches. Every process reads all rows and trains on its part of each
batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mopl.integrations._data import REFERENCE_COLUMNS, Example, Examples, is_pair
from mopl.language_models.data import DataError
from mopl.language_models.readers import FORMATS, detect_format

BLOCK = 128  # rows that are read at a time


def is_stream(data: Any) -> bool:
    """Say whether data are rows that can be iterated over but not counted, such as a `datasets.IterableDataset`."""
    return isinstance(data, Iterable) and not hasattr(data, "__len__")


class ExampleStream(torch.utils.data.IterableDataset):
    """Lists of tokens of a stream of rows, for trainers.

    Args:
        rows: Can be iterated over again and again, each time from the first row.
        read: Turns some rows into `Examples`: called with a list of rows and `objectives=`.
        objectives: Their names; by default what the first rows have.

    Attributes:
        head: Lists of the first rows, by which a trainer checks what it is given.
        checks: Called with the lists of each block of rows.

    Raises:
        TypeError: If the rows can be iterated over only once.
        ValueError: If there is no row, or the stream is split among processes already.
    """

    def __init__(self, rows: Any, read: Callable[..., Examples], objectives: Sequence[str] | None = None) -> None:
        if isinstance(rows, Iterator):
            raise TypeError(
                f"the data set is a {type(rows).__name__}, which can be read only once, and a training begins at its "
                "first row again (after an epoch, when it is resumed); pass "
                "datasets.IterableDataset.from_generator(function), or an object whose __iter__ begins anew"
            )
        if getattr(rows, "_distributed", None) is not None:
            raise ValueError(
                "the stream is split among processes already (split_dataset_by_node), and a trainer does so by itself; "
                "pass the whole stream"
            )
        self.rows, self.read, self.objectives = rows, read, objectives
        self.checks: Sequence[Callable[[Examples], None]] = (self._check_reference,)
        self.head: Examples | None = None
        head = next(self._blocks(), None)
        if head is None:
            raise ValueError("the data set has no rows; give it at least one")
        self.head, self.objectives = head, head.objectives

    def __iter__(self) -> Iterator[Example]:
        for epoch in itertools.count():
            if hasattr(self.rows, "set_epoch"):  # rows that are shuffled anew in each
                self.rows.set_epoch(epoch)
            found = False
            for block in self._blocks():
                found = True
                yield from block.lists
            if not found:
                raise ValueError(f"the stream had no rows when it was read again (epoch {epoch + 1})")

    def whole(self) -> Examples:
        """Return the lists of all rows; the stream must end."""
        blocks = list(self._blocks())
        lists = [example for block in blocks for example in block.lists]
        return Examples(lists, blocks[0].objectives, rows=sum(block.rows for block in blocks))

    def _check_reference(self, block: Examples) -> None:
        """Raise where the reference's log-probabilities end: what is not there from the start has no model for it."""
        if self.head is not None and self.head.has_reference and not block.has_reference:
            row = next(each.tokens.index for each in block.lists if each.reference is None) + 1
            raise ValueError(
                f"row {row} of the stream has no {' and no '.join(REFERENCE_COLUMNS)}, which its first rows have; give "
                "them to all rows or to none"
            )

    def _blocks(self) -> Iterator[Examples]:
        for first, rows in blocks_of(self.rows):
            try:
                found = self.read(rows, objectives=self.objectives)
            except DataError as error:
                raise DataError(f"rows from number {first + 1} of the stream on, counted from there: {error}") from None
            placed = (
                dataclasses.replace(each, tokens=dataclasses.replace(each.tokens, index=first + each.tokens.index))
                for each in found.lists
            )
            block = Examples(list(placed), found.objectives, rows=found.rows)
            for check in self.checks:
                check(block)
            yield block


def blocks_of(rows: Iterable[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Yield blocks of rows and the place of the first; rows that make one list stay together, as `readers` has it."""
    group: Callable[[Any], Any] | None = None
    first, block, key = 0, [], None
    for number, row in enumerate(rows):
        if number == 0 and isinstance(row, Mapping) and not is_pair(row):
            group = FORMATS[detect_format(row)].group
        found = None if group is None else _key(group, row)
        if len(block) >= BLOCK and (group is None or found != key):
            yield first, block
            first, block = number, []
        block.append(row)
        key = found
    if block:
        yield first, block


def _key(group: Callable[[Any], Any], row: Any) -> Any:
    try:
        return group(row)
    except (AttributeError, KeyError, TypeError):
        return None  # a row of another shape, which the reader names
