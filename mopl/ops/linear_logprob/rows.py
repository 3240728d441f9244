"""Which rows and targets are in play: on a CPU those that count, on a GPU all, or those that count first.

N rows, M in play; E targets, F in play.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mopl.ops._logprob import SKIP


class Places(NamedTuple):
    """Which of `size` rows, or targets, are in play, and the way there and back."""

    size: int  # N, or E
    index: Tensor | None = None  # (M,), or (F,); None: all, as they are
    # Without a synchronisation only, else None:
    blank: Tensor | None = None  # (M,), or (F,), bool: does not count
    lost: Tensor | None = None  # (N,), or (E,), bool: counts, but its row lies beyond the bound

    def pick(self, values: Tensor) -> Tensor:
        """Return what is in play (M, ...) of values (N, ...); what does not count may hold anything."""
        return values if self.index is None else values.index_select(0, self.index)

    def take(self, values: Tensor, fill: float = 0) -> Tensor:
        """Return what is in play (M, ...) of values (N, ...); what does not count is `fill`, whatever stood there."""
        values = self.pick(values)
        return values if self.blank is None else values.masked_fill(_beside(self.blank, values), fill)

    def put(self, values: Tensor, blank: bool = True) -> Tensor:
        """Return (N, ...) from values (M, ...) of what is in play: 0 where it does not count, NaN where it is lost.

        Without `blank` what does not count is 0 already: a pass over large values is spared.
        """
        if blank and self.blank is not None:
            values = values.masked_fill(_beside(self.blank, values), 0)
        if self.index is not None:
            values = values.new_zeros((self.size, *values.shape[1:])).index_copy_(0, self.index, values)
        if self.lost is not None and values.is_floating_point():
            values.masked_fill_(_beside(self.lost, values), torch.nan)
        return values


def _beside(mask: Tensor, values: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (values.ndim - 1))


class Selection(NamedTuple):
    """Rows and targets that count, in the order in which a backend sees them."""

    rows: Places
    entries: Places
    column: Tensor  # (F,) int64 vocabulary index, -1 for a target that does not count
    position: Tensor | None  # (F,) place of each target's row among the M; None: target i belongs to row i


def select(target: Tensor, row: Tensor | None, rows: int, bound: int, on_host: bool) -> Selection:
    """Compact rows and targets: exactly, by index, on the host; without a synchronisation on a GPU.

    On a GPU M = bound, or fewer where there are fewer rows or targets: first the rows that count, in their order, then
    rows that do not. How many count is known there only. Rows that count but lie beyond the bound are left out, and
    their results become NaN. Where the bound spares no row all stay where they are: to move them would cost more than
    the few passes that skip those that do not count.
    """
    counts, entries = target >= 0, len(target)
    if on_host:
        entry = None if row is None and bool(counts.all()) else counts.nonzero()[:, 0]
        column = target if entry is None else target[entry]
        index, position = (entry, None) if row is None else row[entry].unique(return_inverse=True)
        found = rows if index is None else len(index)
        if found > bound:
            raise ValueError(f"max_rows is {bound} but {found} rows count; pass at least {found}, or None")
        return Selection(Places(rows, index), Places(entries, entry), column, position)
    used = counts
    if row is not None:
        used = torch.zeros(rows, dtype=torch.int64, device=target.device)
        used = used.scatter_reduce_(0, row, counts.long(), "amax") > 0
    possible = min(rows, entries)  # more rows cannot count
    bound = min(bound, possible)
    if row is None and bound == rows:
        places = Places(rows, None, ~counts)
        return Selection(places, places, torch.where(counts, target, SKIP), None)
    order = torch.argsort(~used, stable=True)
    count = used.sum().clamp(max=bound)
    blank = torch.arange(bound, device=target.device) >= count
    place = torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device))
    lost = used & (place >= bound) if bound < possible else None
    places = Places(rows, order[:bound], blank, lost)
    if row is None:
        return Selection(places, places, torch.where(blank, SKIP, target[order[:bound]]), None)
    lost = None if lost is None else counts & lost[row]
    if not bound:  # no row is in play, so that no target has a place
        nothing = row.new_empty(0)
        return Selection(places, Places(entries, nothing, blank, lost), nothing, nothing)
    place = place[row]
    column = torch.where(place < bound, target, SKIP)
    place = place.clamp(max=bound - 1)
    return Selection(places, Places(entries, None, column < 0, lost), column, place)
