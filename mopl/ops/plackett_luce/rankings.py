"""Lists and how they are ranked, the order of their items, and a block of rankings as the CPU forms take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mopl._arguments import compute_dtype


def sort_items(labels: Tensor, order: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return labels (n, m, K) best first, the order (n, m, K) that makes them so, and where a rank exists.

    The last is None without `valid` (n, K); masked items come last.
    """
    # Sorting keeps the order of the memory, and callers want neighbours of a row to be neighbours there.
    labels = (labels if labels.is_floating_point() else labels.long()).contiguous()
    if order is None:
        labels, place = (labels if valid is None else masked_lowest(labels, valid)).sort(-1, descending=True)
    else:
        place = order.long()
        labels = labels.gather(-1, place)
    return labels, place, None if valid is None else valid[:, None].expand(place.shape).gather(-1, place)


def masked_lowest(labels: Tensor, valid: Tensor) -> Tensor:
    """Return labels (n, m, K) with masked items below all others: real ones of the lowest value move up by one."""
    if labels.is_floating_point():
        lowest, below = torch.finfo(labels.dtype).min, -torch.inf
    else:
        labels, below = labels.long(), torch.iinfo(torch.int64).min
        lowest = below + 1
    return labels.clamp(min=lowest).masked_fill(~valid[:, None], below)


class Rule(NamedTuple):
    """How rankings are charged."""

    top_k: int | None  # groups that start before this position alone; None: all
    ties: str
    last_group_free: bool  # the lowest group is not charged


class Lists(NamedTuple):
    """The arguments of `plackett_luce_nll`, checked."""

    scores: Tensor  # (B, K)
    labels: Tensor  # (B, m, K)
    beta: Tensor  # (B, m) or (B, 1)
    mask: Tensor | None  # (B, K) bool
    order: Tensor | None  # (B, m, K) integer
    position_weights: Tensor | None  # (K,) or (B, m, K)
    rule: Rule


def new_results(scores: Tensor, labels: Tensor, need_grad: bool, need_beta: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss (B, m), gradient (B, m, K) and beta_gradient (B, m), not yet written; empty if not needed."""
    loss = scores.new_empty(labels.shape[:2], dtype=compute_dtype(scores))
    return loss, loss.new_empty(labels.shape if need_grad else (0,)), loss.new_empty(loss.shape if need_beta else (0,))


class Rankings(NamedTuple):
    """Presorted rankings as rows (R, K), best first, and how they are charged."""

    u: Tensor  # (R, K) scores times β; 0 where masked
    leads: Tensor | None  # (R, K) 0.0 where an item has the label of the one before it, else 1.0; None: no ties
    valid: Tensor | None  # (R, K) true where an item exists
    weight: Tensor | None  # (K,) or (R, K) position weights
    rule: Rule

    def take(self, rows: Tensor) -> Rankings:
        """Return some of the rankings."""

        def some(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.ndim == 1 else x[rows]

        return self._replace(u=self.u[rows], leads=some(self.leads), valid=some(self.valid), weight=some(self.weight))

    def to(self, dtype: torch.dtype) -> Rankings:
        """Return the rankings for arithmetic in `dtype`."""
        weight = None if self.weight is None else self.weight.to(dtype)
        return self._replace(u=self.u.to(dtype), weight=weight)

    def charge(self) -> Tensor | None:
        """Return the weight of every position, (K,) or (R, K), for items that are not tied; None means 1."""
        if self.rule.top_k is None or self.rule.top_k >= self.u.shape[1]:
            return self.weight
        charged = torch.arange(self.u.shape[1], device=self.u.device) < self.rule.top_k
        return charged.to(self.u.dtype) if self.weight is None else self.weight * charged

    def charge_of_groups(self, mean: Tensor | None, first: Tensor, last: Tensor) -> Tensor | None:
        """Return what groups are charged, None for 1 each, given the mean weight of the positions that each occupies.

        `first` and `last` are their ends, places of the flattened rows.
        """
        size, counts = self.u.shape[1], []
        if self.rule.top_k is not None and self.rule.top_k < size:
            counts.append(first % size < self.rule.top_k)
        if self.rule.last_group_free or self.rule.ties == "exact":  # in any order, the lowest is certain to come last
            counts.append(~self.bottom(last))
        for charged in counts:
            mean = charged.to(self.u.dtype) if mean is None else mean * charged
        return mean

    def bottom(self, last: Tensor) -> Tensor:
        """Say of groups that end at the places `last` of the flattened rows whether nothing stands below."""
        size = self.u.shape[1]
        bottom = last % size == size - 1
        if self.valid is not None:
            bottom |= ~self.valid.reshape(-1)[(last + 1).clamp(max=self.u.numel() - 1)]
        return bottom
