"""A block of presorted rankings: what the CPU forms of the Plackett-Luce likelihood share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rankings(NamedTuple):
    """Presorted rankings as rows (R, K), best first, and how they are charged."""

    u: Tensor  # (R, K) scores times temperature; 0 where masked
    leads: Tensor | None  # (R, K) 0.0 where an item has the label of the one before it, else 1.0; None: no ties
    valid: Tensor | None  # (R, K) true where an item exists
    weight: Tensor | None  # (K,) or (R, K) position weights
    top_k: int | None
    ties: str
    bottom_free: bool

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
        if self.top_k is None or self.top_k >= self.u.shape[1]:
            return self.weight
        charged = torch.arange(self.u.shape[1], device=self.u.device) < self.top_k
        return charged.to(self.u.dtype) if self.weight is None else self.weight * charged

    def bottom(self, last: Tensor) -> Tensor:
        """Say of groups that end at the places `last` of the flattened rows whether nothing stands below."""
        size = self.u.shape[1]
        bottom = last % size == size - 1
        if self.valid is not None:
            bottom |= ~self.valid.reshape(-1)[(last + 1).clamp(max=self.u.numel() - 1)]
        return bottom
