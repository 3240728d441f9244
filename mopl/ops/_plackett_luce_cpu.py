"""The CPU path of Plackett-Luce: the likelihood of presorted rankings and its gradient.

Formulas and names are those of `mopl/ops/plackett_luce.py`. Sums of exp(u) themselves are right where the scores of a
list span less than a factor that the dtype can hold; other lists, and ties in any order, go to `scaled`, which serves
any scores at about five times the cost.

A single item's part is log1p(x) with x = R / exp(u), and its gradient -w x / (1 + x), where R is a sum and never a
difference, so that small losses keep their digits. With ties, x_i = (R + mass of the group but item i) / exp(u_i).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mopl.ops._plackett_luce_scaled import scaled
from mopl.ops._rankings import Rankings
from mopl.ops._rows import row_sum


def likelihood(r: Rankings, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return the negative log-likelihood (R,) and its gradient with respect to u (R, K), in the order of the rows."""
    size = r.u.shape[1]
    # Sums of exp(u) over a list and of weight / exp(u) must both stay inside the dtype.
    limit = 0.9 * math.log(torch.finfo(r.u.dtype).max) - math.log(size)
    if r.weight is not None:
        limit -= math.log(max(float(r.weight.abs().max()), 1.0))
    runs = None if r.leads is None else _find_runs(r, r.leads.reshape(-1))
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
    if runs is not None and len(runs.hard):
        far = torch.zeros(len(r.u), dtype=torch.bool, device=r.u.device) if far is None else far
        far[runs.hard] = True
    if far is None or not bool(far.any()):
        return _linear(r, exponent, runs, need_grad)
    rows = far.nonzero()[:, 0]
    if len(rows) == len(r.u):
        return scaled(r, need_grad)
    # The far rows go through the linear form as rows of equal scores, so that they cannot overflow there.
    loss, gradient = _linear(r, exponent.masked_fill(far[:, None], 0), runs, need_grad)
    loss[rows], far_gradient = scaled(r.take(rows), need_grad)
    if gradient is not None:
        gradient[rows] = far_gradient
    return loss, gradient


class _Runs(NamedTuple):
    """Runs of equal labels in the flattened rows, single items included: J runs over R * K places."""

    run: Tensor  # (R K,) the run of each place
    first: Tensor  # (J,) place of a run's first item
    last: Tensor  # (J,) and of its last
    size: Tensor  # (J,) items in the run, in the dtype of u
    weight: Tensor | None  # (J,) what it is charged; None: 1 each
    hard: Tensor  # rows that only `scaled` can do: with a charged tie, in any order


def _find_runs(r: Rankings, leads: Tensor) -> _Runs:
    places, items = r.u.numel(), r.u.shape[1]
    run = leads.cumsum(0, dtype=torch.int64).sub_(1)
    first = leads.nonzero()[:, 0]
    count = torch.diff(first, append=first.new_full((1,), places))
    last = first + count - 1
    size = count.to(r.u.dtype)
    weight = None
    if r.weight is not None:
        each = r.weight.expand_as(r.u).reshape(-1)
        weight = torch.zeros_like(size).index_add_(0, run, each) / size
    if r.top_k is not None and r.top_k < items:
        charged = (first % items < r.top_k).to(size.dtype)
        weight = charged if weight is None else weight * charged
    if r.bottom_free or r.ties == "exact":
        charged = (~r.bottom(last)).to(size.dtype)
        weight = charged if weight is None else weight * charged
    hard = first[:0]
    if r.ties == "exact":
        assert weight is not None
        tied = size > 1
        hard = first[tied & (weight != 0)] // items
        weight = weight * ~tied
    return _Runs(run, first, last, size, weight, hard)


def _linear(r: Rankings, exponent: Tensor, runs: _Runs | None, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return loss and gradient from sums of exp(exponent); exponent is u up to a constant a row."""
    e = exponent.exp()
    # Masked items get mass 0 in sums and 1 in divisors; selecting them instead would cost more than all the rest.
    present = None if r.valid is None else r.valid.to(e.dtype)
    missing = None if present is None else 1 - present
    if present is not None:
        e.mul_(present)
    c = e.flip(-1).cumsum_(-1).flip(-1)  # exp(u) summed from an item to the end of its list
    # Neighbours along a row are neighbours in memory: a shift of the flattened rows is right but for one column.
    others = torch.empty_like(c)
    others.view(-1)[:-1] = c.view(-1)[1:]
    others[:, -1] = 0
    weight = r.charge()
    if runs is not None:
        total = c.view(-1)[runs.first]
        rest = others.view(-1)[runs.last]
        others.add_(total.index_select(0, runs.run).view_as(c).sub_(c))  # the group's items before this one
        chosen = c
        if r.ties == "efron":
            place = torch.arange(c.numel(), device=c.device) - runs.first.index_select(0, runs.run)
            chosen = place.to(c.dtype) / runs.size.index_select(0, runs.run)
            others.view(-1).addcmul_(chosen, (total - rest).index_select(0, runs.run), value=-1)
        weight = None if runs.weight is None else runs.weight.index_select(0, runs.run).view_as(c)
    if present is not None:
        weight = present if weight is None else weight * present
    x = others / (e if missing is None else e + missing)
    loss = x.log1p()
    if weight is not None:
        loss.mul_(weight)
    loss = row_sum(loss)
    if not need_grad:
        return loss, None

    # y_i = w_i / D_i is what item i takes from every item below, per exp(u); shifted prefix sums collect it.
    y = c if runs is None else others + e
    if missing is not None:
        y.add_(missing)
    y.reciprocal_()
    if weight is not None:
        y.mul_(weight)
    gradient = x.div_(1 + x).neg_()
    if runs is not None:
        single = (runs.size == 1).to(e.dtype)
        if r.ties == "efron":
            inside = torch.zeros_like(single).index_add_(0, runs.run, (1 - chosen).mul_(y.view(-1)))
        else:
            inside = runs.size * y.view(-1)[runs.first]
        inside.mul_(1 - single)
        y.cumsum_(-1)
        y[:, -1] = 0
        above = y.view(-1)[runs.first - 1].add_(inside)
        single = single.index_select(0, runs.run).view_as(c)
        gradient.mul_(single).sub_(1 - single)
        if weight is not None:
            gradient.mul_(weight)
        return loss, gradient.addcmul_(e, above.index_select(0, runs.run).view_as(c))
    if weight is not None:
        gradient.mul_(weight)
    y.cumsum_(-1)
    y[:, -1] = 0
    gradient.view(-1)[1:].addcmul_(e.view(-1)[1:], y.view(-1)[:-1])
    return loss, gradient
