"""Ranking data in memory: lists of unequal length without padding, and padded batches of them.

Shapes: `Q` queries (lists), `N` items of all lists together, `F` input features, `m` auxiliary objectives; in a batch
`B` lists of at most `K` items. What labels and targets are, and how directions are turned: `mopl.ranking.objectives`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl._arguments import shape_of
from mopl._counted import counted
from mopl.ranking.batch import Batch
from mopl.ranking.normalization import FeatureNormalizer
from mopl.ranking.objectives import (
    Objective,
    check_objectives,
    negative_label,
    normalized_targets,
    resolve_scale,
    turned_labels,
)
from mopl.ranking.statistics import in_lines, statistics
from mopl.ranking.storage import blocks, take

# Streams of random numbers are named, so that one seed never gives two of them the same numbers. The epochs of
# mopl.training take the stream numbers of small integers; these are far away.
SPLIT_STREAM = 1_000_000_007


@dataclasses.dataclass(frozen=True)
class Truth:
    """The distribution that generated labels were drawn from: it tells the optimum (`mopl.ranking.synthetic`)."""

    log_probs: Tensor  # (N, m) float64, log p_j(item | list): the expectation of the targets of a list that has labels
    rates: Tensor  # (m,) float64, the probability that a list has labels of objective j at all


@dataclasses.dataclass(frozen=True)
class RankingData:
    """One split of a data set; lists lie one after another, without padding. Never changed after it is made.

    Args:
        features: (N, F) float32.
        raw_main: (N,) raw labels of the main objective.
        raw_auxiliary: (N, m) raw labels of the auxiliary objectives, in their own direction.
        offsets: (Q + 1,) int64; list q is the items `offsets[q]` to `offsets[q + 1] - 1`.
        query_ids: (Q,) int64 or uint64, the ids of the file; any distinct numbers if it has none.
        main: the main objective.
        objectives: the m auxiliary objectives.
        name: of the data set and split, for messages.
        feature_names: F names; default the numbers from 1.
        truth: where the labels were generated, their distribution.
        normalizer: the transformation that the features have gone through, for the checkpoint.

    Raises:
        ValueError: if shapes do not agree, a list is empty, a value is NaN or infinite, or a label is negative under
            `"l1"`. The message names the query and the item.
    """

    features: Tensor  # (N, F)
    raw_main: Tensor  # (N,)
    raw_auxiliary: Tensor  # (N, m)
    offsets: Tensor  # (Q + 1,)
    query_ids: Tensor  # (Q,)
    main: Objective
    objectives: tuple[Objective, ...]
    name: str = "data"
    feature_names: tuple[str, ...] = ()
    truth: Truth | None = None
    normalizer: FeatureNormalizer | None = None

    def __post_init__(self) -> None:
        check_objectives(self.objectives)
        items, lists, m = self.features.shape[0], self.query_ids.shape[0], len(self.objectives)
        wanted = [
            ("raw_main", self.raw_main, (items,)),
            ("raw_auxiliary", self.raw_auxiliary, (items, m)),
            ("offsets", self.offsets, (lists + 1,)),
            ("query_ids", self.query_ids, (lists,)),
        ]
        if self.truth is not None:
            wanted.append(("truth.log_probs", self.truth.log_probs, (items, m)))
        for name, tensor, shape in wanted:
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} has shape {shape_of(tensor)} but must be {shape}: "
                    f"{counted(items, 'item')}, {counted(lists, 'list')}, {counted(m, 'objective')}"
                )
        if lists == 0:
            raise ValueError(f"{self.name} has no query; give it at least one")
        lengths = self.offsets.diff()
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != items or bool((lengths < 0).any()):
            raise ValueError(f"offsets of {self.name} must rise from 0 to the number of items, {items}")
        if bool((lengths == 0).any()):
            query = self.query_ids[(lengths == 0).nonzero()[0, 0]].item()
            raise ValueError(f"query {query} of {self.name} has no documents; leave it out")
        if self.feature_names and len(self.feature_names) != self.features.shape[1]:
            raise ValueError(
                f"there are {len(self.feature_names)} feature_names for {counted(self.features.shape[1], 'feature')}; "
                "give one name a column"
            )
        self._check_values()

    def _check_values(self) -> None:
        for what, values in (
            ("feature", self.features),
            ("main label", self.raw_main[:, None]),
            ("label", self.raw_auxiliary),
        ):
            for part in blocks(*values.shape):
                bad = ~torch.isfinite(values[part])
                if not bool(bad.any()):
                    continue
                row, column = bad.nonzero()[0].tolist()
                row += part.start
                which = f"{what} {column + 1}" if what == "feature" else what
                raise ValueError(
                    f"{which} of {self._where(row)} is {values[row, column].item()}; replace it by a finite number"
                )
        for place, (values, objective) in enumerate(self._columns()):
            if objective.normalize == "l1" and objective.maximise and bool((values < 0).any()):
                row = int((values < 0).nonzero()[0, 0])
                where = f" ({self._where(row)})"
                raise ValueError(negative_label(values[row].item(), objective, main=place == 0, where=where))

    def _where(self, row: int) -> str:
        """Name the place of item `row` for a message."""
        query = int(torch.searchsorted(self.offsets, row, right=True)) - 1
        return f"{self.name}, query {self.query_ids[query].item()}, item {row - int(self.offsets[query]) + 1}"

    def __len__(self) -> int:
        """The number of queries."""
        return self.query_ids.shape[0]

    @property
    def num_items(self) -> int:
        """The number of items of all lists together."""
        return self.features.shape[0]

    @property
    def num_features(self) -> int:
        """The number of input features."""
        return self.features.shape[1]

    @cached_property
    def lengths(self) -> Tensor:
        """(Q,) int64, the number of items of each list."""
        return self.offsets.diff()

    @cached_property
    def owner(self) -> Tensor:
        """(N,) int64, the list of each item."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    @cached_property
    def labels(self) -> Tensor:
        """(N, m) float32, non-negative, higher is better."""
        _, *columns = self._columns()
        return torch.stack([turned_labels(z, o, self.offsets) for z, o in columns], dim=1).float()

    @cached_property
    def targets(self) -> Tensor:
        """(N, m) float32, labels normalised to a distribution over each list, each by its objective's rule."""
        _, *columns = self._columns()
        return torch.stack([self._targets(z, o) for z, o in columns], dim=1).float()

    @cached_property
    def main_labels(self) -> Tensor:
        """(N,) float32, non-negative, higher is better."""
        return turned_labels(self.raw_main, self.main, self.offsets).float()

    @cached_property
    def main_targets(self) -> Tensor:
        """(N,) float32, main labels normalised."""
        return self._targets(self.raw_main, self.main).float()

    def _targets(self, raw: Tensor, objective: Objective) -> Tensor:
        return normalized_targets(turned_labels(raw.double(), objective, self.offsets), objective, self.offsets)

    @cached_property
    def labelled(self) -> Tensor:
        """(Q, 1 + m) bool, whether a list has any label above 0: of the main objective, of each auxiliary one."""
        columns = torch.cat([self.main_labels[:, None], self.labels], 1)
        return torch.zeros(len(self), columns.shape[1]).index_add_(0, self.owner, (columns > 0).float()) > 0

    @cached_property
    def order(self) -> Tensor:
        """(N, m) int64, within each list the positions of its items by label, best first, ties in file order.

        Labels do not change between epochs, so they are sorted once for each split.
        """
        columns = [
            np.lexsort((-self.labels[:, j].numpy(), self.owner.numpy())) - self.offsets[:-1].numpy()[self.owner.numpy()]
            for j in range(len(self.objectives))
        ]
        return torch.from_numpy(np.stack(columns, axis=1))

    def _columns(self) -> Iterator[tuple[Tensor, Objective]]:
        """Give the raw labels (N,) of each objective, the main one first."""
        raw = (self.raw_main, *self.raw_auxiliary.unbind(1))
        yield from zip(raw, (self.main, *self.objectives), strict=True)

    def items_of(self, queries: Sequence[int] | Tensor) -> Tensor:
        """Return the items of the given lists, list after list, as int64 indices into `features`."""
        queries = torch.as_tensor(queries, dtype=torch.int64)
        lengths = self.lengths[queries]
        starts = self.offsets[queries] - (lengths.cumsum(0) - lengths)
        return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts, lengths)

    def subset(self, queries: Sequence[int] | Tensor, name: str | None = None) -> RankingData:
        """Return the given lists as data of their own.

        Args:
            queries: indices of lists, from 0; the result has them in this order.
            name: of the result; default the one it has.
        """
        queries = torch.as_tensor(queries, dtype=torch.int64)
        items = self.items_of(queries)
        truth = self.truth and Truth(self.truth.log_probs[items], self.truth.rates)
        return dataclasses.replace(
            self,
            features=take(self.features, items),
            raw_main=self.raw_main[items],
            raw_auxiliary=self.raw_auxiliary[items],
            offsets=torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths[queries].cumsum(0)]),
            query_ids=self.query_ids[queries],
            name=name or self.name,
            truth=truth,
        )

    def split(
        self, fractions: Sequence[float] = (0.6, 0.2, 0.2), *, seed: int = 0, names: Sequence[str] = ()
    ) -> tuple[RankingData, ...]:
        """Split by query at random; the same seed gives the same split.

        Args:
            fractions: one for each part; they must sum to 1.
            seed: of the permutation of the queries.
            names: of the parts; default train, valid, test for three.

        Returns:
            The parts, each with its lists in their old order.

        Raises:
            ValueError: if the fractions do not sum to 1 or a part would have no query.
        """
        if abs(sum(fractions) - 1) > 1e-6 or min(fractions) <= 0:
            raise ValueError(f"fractions are {tuple(fractions)} but must be above 0 and sum to 1")
        if np.diff(cuts := _cuts(fractions, len(self)), prepend=0).min() < 1:
            need = math.ceil(1.5 / min(fractions))  # enough for any rounding
            while np.diff(_cuts(fractions, need - 1), prepend=0).min() > 0:
                need -= 1
            shares = ", ".join(f"{x:g}" for x in fractions)
            raise ValueError(
                f"{self.name} has {counted(len(self), 'query')}, too few to be split into shares of {shares}; give at "
                f"least {need} queries, or a file for each of train, valid and test"
            )
        names = names or (("train", "valid", "test") if len(fractions) == 3 else [f"part{i}" for i in range(len(cuts))])
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, SPLIT_STREAM])))
        parts = np.split(generator.permutation(len(self)), cuts[:-1])
        return tuple(
            self.subset(torch.from_numpy(np.sort(p)), f"{self.name}:{n}") for p, n in zip(parts, names, strict=True)
        )

    def pad(self, values: Tensor, queries: Sequence[int] | Tensor, width: int | None = None) -> Tensor:
        """Return values of the given lists as a batch has them.

        Args:
            values: (N, ...), one of each item of all lists.
            queries: (B,) indices of lists, from 0.
            width: K; default the length of the longest of these lists.

        Returns:
            (B, K, ...), zero in masked places.
        """
        return self._gather(values, *self._places(torch.as_tensor(queries, dtype=torch.int64), width))

    @staticmethod
    def _gather(values: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        return values[index].masked_fill(~mask.view(*mask.shape, *[1] * (values.ndim - 1)), 0)

    def _places(self, queries: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
        """Return item indices (B, K), 0 in masked places, and the mask (B, K)."""
        lengths = self.lengths[queries]
        longest = int(lengths.max()) if len(queries) else 0
        if width is not None and width < longest:
            raise ValueError(f"width is {width} but a list of this batch has {longest} items; give at least that")
        position = torch.arange(longest if width is None else width)
        mask = position < lengths[:, None]
        return torch.where(mask, self.offsets[queries, None] + position, 0), mask

    def batch(self, queries: Sequence[int] | Tensor, *, width: int | None = None, order: bool = False) -> Batch:
        """Return the given lists as a padded batch.

        Args:
            queries: indices of lists, from 0.
            width: pad to this many items; default the longest list of the batch.
            order: also give the presorted order of each objective.

        Returns:
            The batch, on the CPU.
        """
        queries = torch.as_tensor(queries, dtype=torch.int64)
        index, mask = self._places(queries, width)

        sorted_items = None
        if order:
            position = torch.arange(mask.shape[1])[:, None]
            sorted_items = torch.where(mask[..., None], self.order[index], position).movedim(-1, 1).contiguous()
        return Batch(
            features=self._gather(self.features, index, mask),
            labels=self._gather(self.labels, index, mask).movedim(-1, 1).contiguous(),
            targets=self._gather(self.targets, index, mask).movedim(-1, 1).contiguous(),
            main=self._gather(self.main_labels, index, mask),
            main_targets=self._gather(self.main_targets, index, mask),
            mask=mask,
            queries=queries,
            order=sorted_items,
        )

    def sequential(self, lists_per_batch: int) -> Iterator[Batch]:
        """Yield every list once, in order: for evaluation. The last batch may be shorter."""
        for start in range(0, len(self), lists_per_batch):
            yield self.batch(torch.arange(start, min(start + lists_per_batch, len(self))))

    def resolve_scales(self, train: RankingData) -> RankingData:
        """Return this data with every `scale="std"` measured on `train`."""
        main, *objectives = (resolve_scale(o, z, train.offsets) for z, o in train._columns())
        return dataclasses.replace(self, main=main, objectives=tuple(objectives))

    def normalized(self, normalizer: FeatureNormalizer) -> RankingData:
        """Return this data with its features transformed.

        Raises:
            ValueError: if they are transformed already.
        """
        if self.normalizer is not None:
            raise ValueError(f"{self.name} has gone through normalization {self.normalizer.name!r} already")
        return dataclasses.replace(self, features=normalizer(self.features, self.offsets), normalizer=normalizer)

    def statistics(self) -> dict[str, Any]:
        """Return plain figures about the data for a report: sizes, the raw labels, and how sparse each objective is."""
        return statistics(self)

    def describe(self) -> str:
        """Return the figures of `statistics` as a few lines of text: of the labels as they stand in the data."""
        return in_lines(self.statistics())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that training sees: two runs with the same fingerprint had the same data."""
        digest = hashlib.sha256(
            json.dumps([o.to_dict() for o in (self.main, *self.objectives)], sort_keys=True).encode()
        )
        for tensor in (self.features, self.raw_main, self.raw_auxiliary, self.offsets, self.query_ids):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def _cuts(fractions: Sequence[float], queries: int) -> np.ndarray:
    """Return where the parts of so many queries end."""
    return np.rint(np.cumsum(fractions) * queries).astype(int)
