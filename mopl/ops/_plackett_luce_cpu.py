"""The CPU path of Plackett-Luce, part 1: the likelihood of presorted rankings and its gradient.

Rankings lie as rows (R, K), best first; formulas and names are those of `mopl/ops/plackett_luce.py`. Two forms of the
same sums: `_linear` adds exp(u) themselves, which is right where the scores of a list span less than a factor that the
dtype can hold; `_scaled` keeps every suffix sum relative to its own largest term, and so serves any scores, at three
to five times the cost. `likelihood` sends each list where it belongs.

Both write a single item's part as log1p(x) with x = R / exp(u), and its gradient as -w x / (1 + x), where R is a sum
and never a difference, so that small losses keep their digits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mopl.ops._rows import row_sum
from mopl.ops._tied_groups import Groups, charge_groups, find_groups


class Rankings(NamedTuple):
    """A block of presorted rankings and how they are charged."""

    u: Tensor  # (R, K) scores times temperature, best ranked first; 0 where masked
    tied: Tensor | None  # (R, K) true where an item has the label of the one before it; None: no ties
    valid: Tensor | None  # (R, K) true where an item exists
    weight: Tensor | None  # (K,) or (R, K) position weights
    top_k: int | None
    ties: str
    bottom_free: bool

    def take(self, rows: Tensor) -> Rankings:
        """Return some of the rankings."""

        def some(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.ndim == 1 else x[rows]

        return self._replace(u=self.u[rows], tied=some(self.tied), valid=some(self.valid), weight=some(self.weight))

    def charge(self) -> Tensor | None:
        """Return the weight of every position, (K,) or (R, K), for items that are not tied; None means 1."""
        if self.top_k is None or self.top_k >= self.u.shape[1]:
            return self.weight
        charged = torch.arange(self.u.shape[1], device=self.u.device) < self.top_k
        return charged.to(self.u.dtype) if self.weight is None else self.weight * charged

    def groups(self) -> Groups | None:
        """Return the tied groups."""
        if self.tied is None:
            return None
        # In any order, the lowest group is certain to come last, so it is free.
        free = self.bottom_free or self.ties == "exact"
        return find_groups(self.tied, self.valid, self.weight, self.top_k, free, self.u.dtype)


def likelihood(r: Rankings, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return the negative log-likelihood (R,) and its gradient with respect to u (R, K), in the order of the rows."""
    size = r.u.shape[1]
    # Sums of exp(u) over a list and of weight / exp(u) must both stay inside the dtype.
    limit = 0.9 * math.log(torch.finfo(r.u.dtype).max) - math.log(size)
    if r.weight is not None:
        limit -= math.log(max(float(r.weight.abs().max()), 1.0))
    groups = r.groups()
    far = None
    lowest, highest = r.u.aminmax()
    if -limit / 2 < float(lowest) and float(highest) < limit / 2:
        exponent = r.u
    else:
        missing = None if r.valid is None else ~r.valid
        top = (r.u if missing is None else r.u.masked_fill(missing, -torch.inf)).amax(-1, keepdim=True)
        exponent = r.u - top
        if missing is not None:
            exponent.masked_fill_(missing, 0)
        far = ~(exponent.amin(-1) > -limit)
    if r.ties == "exact" and groups is not None:
        hard = groups.first[groups.weight != 0] // size
        if len(hard):
            far = r.u.new_zeros(len(r.u), dtype=torch.bool) if far is None else far
            far[hard] = True
    rows = None if far is None else far.nonzero()[:, 0]
    if rows is None or not len(rows):
        return _linear(r, exponent, groups, need_grad)
    if len(rows) == len(r.u):
        return _scaled(r, groups, need_grad)
    # The far rows go through the linear form as rows of equal scores, so that they cannot overflow there.
    loss, gradient = _linear(r, exponent.masked_fill(far[:, None], 0), groups, need_grad)
    some = r.take(rows)
    loss[rows], far_gradient = _scaled(some, some.groups(), need_grad)
    if gradient is not None:
        gradient[rows] = far_gradient
    return loss, gradient


def _linear(r: Rankings, exponent: Tensor, groups: Groups | None, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return loss and gradient from sums of exp(exponent); exponent is u up to a constant a row."""
    missing = None if r.valid is None else ~r.valid
    e = exponent.exp()
    if missing is not None:
        e.masked_fill_(missing, 0)
    c = e.flip(-1).cumsum_(-1).flip(-1)  # exp(u) summed from an item to the end of its list
    # Neighbours along a row are neighbours in memory: a shift of the flattened rows is right but for one column.
    x = torch.empty_like(c)
    torch.div(c.view(-1)[1:], e.view(-1)[:-1], out=x.view(-1)[:-1])
    x[:, -1] = 0
    if missing is not None:
        x.masked_fill_(missing, 0)
    weight = r.charge()
    loss = x.log1p()
    if weight is not None:
        loss.mul_(weight)
    if groups is not None:
        rest = torch.where(groups.bottom, 0, c.view(-1)[(groups.last + 1).clamp(max=c.numel() - 1)])
        part, own, passed = charge_groups(
            groups, r.ties, exponent.reshape(-1)[groups.items], c.view(-1)[groups.first], rest, rest.log()
        )
        loss.view(-1)[groups.items] = part
    loss = row_sum(loss)
    if not need_grad:
        return loss, None

    gradient = x.div_(1 + x).neg_()
    b = c.reciprocal_()
    if missing is not None:
        b.masked_fill_(missing, 0)
    if weight is not None:
        gradient.mul_(weight)
        b.mul_(weight)
    if groups is not None:
        gradient.view(-1)[groups.items] = own
        b.view(-1)[groups.items] = 0
        b.view(-1)[groups.last] = torch.where(groups.bottom, 0, passed / rest)
    b.cumsum_(-1)
    b[:, -1] = 0
    gradient.view(-1)[1:].addcmul_(e.view(-1)[1:], b.view(-1)[:-1])
    return loss, gradient


def _scaled(r: Rankings, groups: Groups | None, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return loss and gradient for scores of any size, by scans over sums that are relative to their largest term.

    top_k = max of u from item k on, and s_k = sum of exp(u - top_k) from item k on, so that L_k = top_k + log s_k. Both
    that sum and the sum of w_i / exp(L_i) over the items above k obey recurrences whose factors exp(top_k - top_i) are
    at most 1; log2(K) doublings evaluate them for all lists and items at once.
    """
    u, size = r.u, r.u.shape[1]
    lowest = torch.finfo(u.dtype).min
    if r.valid is not None:
        u = u.masked_fill(~r.valid, -torch.inf)
    undefined = ~(u < torch.inf).all(-1)
    u = u.masked_fill(undefined[:, None], 0)
    top = u.flip(-1).cummax(-1).values.flip(-1).clamp_(min=lowest)
    s = (u - top).exp_()
    for step in _doublings(size):
        s[:, :-step] += s[:, step:] * (top[:, step:] - top[:, :-step]).exp_()

    next_top = torch.cat([top[:, 1:], torch.full_like(top[:, :1], lowest)], 1)
    next_s = torch.cat([s[:, 1:], torch.zeros_like(s[:, :1])], 1)
    last = next_s == 0  # nothing below, or nothing that could ever be chosen
    v = u - next_top
    leads = v >= 0
    x = torch.where(leads, next_s * v.clamp(min=0).neg_().exp_(), s - 1)
    loss = x.log1p() - v.clamp(max=0)
    weight = r.charge()
    loss = torch.where(last if weight is None else last | (weight == 0), 0, loss if weight is None else weight * loss)
    if groups is not None:
        after = (groups.last + 1).clamp(max=u.numel() - 1)
        first_top = top.view(-1)[groups.first]
        gap = top.view(-1)[after] - first_top
        rest = torch.where(groups.bottom, 0, s.view(-1)[after] * gap.exp())
        # Where everything below is -inf the group is certain, and its own order cannot be seen.
        empty = torch.where(groups.bottom, 0, s.view(-1)[after]) == 0
        hopeless = s.view(-1)[groups.first] == 0
        skip = hopeless | empty if r.ties == "exact" else hopeless
        groups = groups._replace(weight=groups.weight.masked_fill(skip, 0))
        part, own, passed = charge_groups(
            groups,
            r.ties,
            u.view(-1)[groups.items] - first_top[groups.group],
            s.view(-1)[groups.first],
            rest,
            gap + s.view(-1)[after].log(),
        )
        loss.view(-1)[groups.items] = part
    loss = loss.sum(-1).masked_fill_(undefined, torch.nan)
    if not need_grad:
        return loss, None

    miss = torch.where(leads, x / (1 + x), next_s / s)
    y = s.reciprocal().masked_fill_(s == 0, 0)
    gradient = miss.neg_().masked_fill_(last, 0)
    if weight is not None:
        gradient.mul_(weight)
        y.mul_(weight)
    if groups is not None:
        gradient.view(-1)[groups.items] = own
        y.view(-1)[groups.items] = 0
    # What the items above pass down to item k and all below it, as a multiple of 1 / exp(top_k).
    above = torch.zeros_like(y)
    torch.mul(y[:, :-1], (top[:, 1:] - top[:, :-1]).exp_(), out=above[:, 1:])
    if groups is not None:
        passes = ~(groups.bottom | empty)
        above.view(-1)[after[passes]] = (passed / s.view(-1)[after])[passes]
    for step in _doublings(size):
        above[:, step:] += above[:, :-step] * (top[:, step:] - top[:, :-step]).exp_()
    gradient.addcmul_((u - top).exp_(), above)
    if bool(undefined.any()):
        gradient[undefined] = torch.nan
        if r.valid is not None:
            gradient.masked_fill_(~r.valid, 0)
    return loss, gradient


def _doublings(size: int) -> list[int]:
    """Return 1, 2, 4, ... below `size`."""
    return [1 << i for i in range((size - 1).bit_length())]
