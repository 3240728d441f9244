"""The CPU path of Plackett-Luce: blocks of lists, sorted, and the likelihood of the rankings with its gradient.

Formulas and names are those of `function.py`. Sums of exp(u) themselves are right where the scores of a
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

from mopl._arguments import compute_dtype
from mopl.ops._rows import blocks, existing, in_full_precision, is_number, merge, row_sum, times
from mopl.ops.plackett_luce.rankings import Lists, Rankings, new_results, sort_items
from mopl.ops.plackett_luce.scaled import scaled


@in_full_precision
def forward(given: Lists, need_grad: bool, need_beta: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, gradient, and 1 where the loss is infinite, for `beta_gradient`; the last two may be empty."""
    scores, labels, beta, mask, order, position_weights, rule = given
    batch, objectives, size = labels.shape
    loss, gradient, infinite = new_results(scores, labels, need_grad, need_beta)
    if size < 2 or labels.numel() == 0:
        return loss.zero_(), gradient.zero_(), infinite.zero_()
    if order is not None:  # which may name an item twice, and leave another one's gradient to chance
        gradient.zero_()
    valid, dtype = existing(mask), loss.dtype
    for lists in blocks(batch, objectives * size):
        some = None if valid is None else valid[lists]
        rate = beta[lists]
        plain = is_number(rate) and float(rate[0, 0]) == 1
        wide = dtype if plain else _dtype_of_product(scores[lists], some, rate)
        s = _load(scores[lists].to(wide), some, centre=not plain)
        place, leads, ranked = _rank(labels[lists], None if order is None else order[lists], some, dtype)
        u = s[:, None].expand(place.shape).gather(-1, place)
        if not plain:
            u.mul_(rate[0, 0] if is_number(rate) else rate[:, :, None])
        weight = position_weights
        if weight is not None:
            weight = weight.to(dtype) if weight.ndim == 1 else weight[lists].to(dtype)
            if weight.ndim == 3 and ranked is not None:
                weight = weight.masked_fill(~ranked, 0)
        flat = (x if x is None or x.ndim == 1 else x.reshape(-1, size) for x in (leads, ranked, weight))
        given_rows = Rankings(u.view(-1, size), *flat, rule=rule)
        some_loss, du = likelihood(given_rows if wide == dtype else given_rows.to(wide), need_grad)
        loss[lists] = some_loss.view(-1, objectives)
        if du is not None:
            gradient[lists].scatter_(-1, place, du.to(dtype).view(place.shape))
    if need_beta:
        infinite.copy_(loss.isinf())
    return loss, gradient, infinite


@in_full_precision
def backward(grad_loss: Tensor, beta: Tensor, gradient: Tensor) -> Tensor:
    """Return dscores (B, K)."""
    return merge((grad_loss * beta).to(gradient.dtype), gradient)


def beta_gradient(infinite: Tensor, gradient: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return sum_i gradient_bji scores_bi (B, m)."""
    centred = _load(scores.to(gradient.dtype), mask, centre=True)[:, None]
    # Scores without a chance, -inf or with a negative beta inf, differ by 0 from each other: only what their gradients
    # add up to is multiplied by infinity, where one of them stands above others. (The other infinity makes all NaN.)
    hopeless = centred.isinf()
    own = torch.where(hopeless, gradient, 0)
    together = own.sum(-1)
    lost = (infinite != 0) & (together.abs() > 1e-5 * own.abs().sum(-1))
    side = torch.where((hopeless & (centred > 0)).any(-1), torch.inf, -torch.inf)
    found = times(gradient, torch.where(hopeless, 0, centred)).sum(-1)
    return found + torch.where(lost | together.isnan(), together * side, 0)


def _dtype_of_product(scores: Tensor, valid: Tensor | None, rate: Tensor) -> torch.dtype:
    """Return the dtype of β times finite scores: float64 where float32 would make the largest infinite, so equal."""
    dtype = compute_dtype(scores)
    known = scores.abs() if valid is None else scores.abs().masked_fill_(~valid, 0)
    farthest = float(known.amax())
    if math.isinf(farthest):
        farthest = float(known.masked_fill_(known.isinf(), 0).amax())
    return torch.float64 if farthest * float(rate.abs().amax()) > torch.finfo(dtype).max else dtype


def _load(scores: Tensor, valid: Tensor | None, centre: bool) -> Tensor:
    """Return the scores (n, K), 0 where masked, without a common offset of all scores of a list if `centre`.

    An offset is subtracted where that is exact (Sterbenz: scores of one sign, within a factor of two of each other),
    so that it costs no digits when β multiplies and never costs any itself.
    """
    if valid is not None:
        scores = scores.masked_fill(~valid, 0)
    if not centre or not scores.shape[1]:
        return scores
    top = scores if valid is None else torch.where(valid, scores, -torch.inf)
    bottom = scores if valid is None else torch.where(valid, scores, torch.inf)
    top, bottom = top.amax(-1, keepdim=True), bottom.amin(-1, keepdim=True)
    offset = ((bottom > 0) & (bottom >= top / 2)) | ((top < 0) & (top <= bottom / 2))
    scores = scores - torch.where(offset & bottom.isfinite() & top.isfinite(), top, 0)
    return scores if valid is None else scores.masked_fill(~valid, 0)


def _rank(
    labels: Tensor, order: Tensor | None, valid: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the order (n, m, K), 0.0 where a rank is tied with the one before it, and where a rank exists.

    The second is 1.0 elsewhere, and None if nothing is tied; the third is None without a mask.
    """
    labels, place, ranked = sort_items(labels, order, valid)
    # Neighbours in memory, and a result in floating point: each is several times faster than its alternative.
    leads = torch.empty(labels.shape, dtype=dtype, device=labels.device)
    torch.ne(labels.view(-1)[1:], labels.view(-1)[:-1], out=leads.view(-1)[1:])
    leads[..., 0] = 1
    if ranked is not None:
        leads.masked_fill_(~ranked, 1)
    return place, leads if float(leads.amin()) == 0 else None, ranked


def likelihood(r: Rankings, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return the negative log-likelihood (R,) and its gradient with respect to u (R, K), in the order of the rows."""
    if r.u.shape[1] == 2 and r.leads is None and r.valid is None:
        pairs = _pairs(r, need_grad)
        if pairs is not None:
            return pairs
    rows = None if r.leads is None else (r.leads.amin(-1) == 0).nonzero()[:, 0]
    if rows is None or 2 * len(rows) > len(r.u):
        return _by_range(r, need_grad)
    # Few lists have ties: only those pay for them.
    loss, gradient = _by_range(r._replace(leads=None), need_grad)
    return _replace_rows(loss, gradient, rows, _by_range(r.take(rows), need_grad))


def _pairs(r: Rankings, need_grad: bool) -> tuple[Tensor, Tensor | None] | None:
    """Return loss and gradient of pairs, log(1 + exp(u_2 - u_1)), in a third of the passes; None for infinite gaps."""
    gap = r.u[:, 1] - r.u[:, 0]
    if gap.numel() and not bool(gap.abs().amax() < math.inf):
        return None
    # From here on exp(-gap) is less than half a unit in the last place of the loss.
    loss = torch.nn.functional.softplus(gap, threshold=20 if gap.dtype == torch.float32 else 40)
    weight = r.charge()
    if weight is not None:
        loss.mul_(weight[..., 0])
    if not need_grad:
        return loss, None
    share = gap.sigmoid_()
    if weight is not None:
        share.mul_(weight[..., 0])
    return loss, torch.stack([-share, share], -1)


def _replace_rows(
    loss: Tensor, gradient: Tensor | None, rows: Tensor, part: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    loss[rows] = part[0].to(loss.dtype)
    if gradient is not None and part[1] is not None:
        gradient[rows] = part[1].to(gradient.dtype)
    return loss, gradient


# A score minus the largest of its list is rounded, unless both have a common offset. Up to this range exp of it is off
# by half a unit in the last place of the range, 5e-7 in float32; a wider list takes float64.
_SHIFT_RANGE = 16.0


def _limit(r: Rankings, dtype: torch.dtype) -> float:
    """Return the range of scores for which sums of exp(u) and of weight / exp(u) both stay inside `dtype`."""
    limit = 0.9 * math.log(torch.finfo(dtype).max) - math.log(r.u.shape[1])
    return limit if r.weight is None else limit - math.log(max(float(r.weight.abs().max()), 1.0))


def _by_range(r: Rankings, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Send every ranking to the cheapest form that is right for it."""
    runs = None if r.leads is None else _find_runs(r, r.leads.reshape(-1))
    hard = runs.hard if runs is not None and len(runs.hard) else None
    limit = _limit(r, r.u.dtype)
    lowest, highest = r.u.aminmax()
    if hard is None and -limit / 2 < float(lowest) and float(highest) < limit / 2:
        return _linear(r, r.u, runs, need_grad)

    missing = None if r.valid is None else ~r.valid
    top = (r.u if missing is None else r.u.masked_fill(missing, -torch.inf)).amax(-1)
    bottom = (r.u if missing is None else r.u.masked_fill(missing, torch.inf)).amin(-1)
    fits = (-limit / 2 < bottom) & (top < limit / 2)
    span = top - bottom
    if r.u.dtype == torch.float64:
        near, wide = fits | (span < limit), torch.zeros_like(fits)
    else:
        near = fits | (span < min(limit, _SHIFT_RANGE))
        wide = ~near & (span < _limit(r, torch.float64))
    if hard is not None:
        near[hard] = wide[hard] = False
    # Whatever is left, NaN included, takes sums relative to their largest term.
    wide, widest = wide.nonzero()[:, 0], (~(near | wide)).nonzero()[:, 0]
    if len(wide) == len(r.u):
        loss, gradient = _by_range(r.to(torch.float64), need_grad)
        return loss.to(r.u.dtype), None if gradient is None else gradient.to(r.u.dtype)
    if len(widest) == len(r.u):
        return scaled(r, need_grad)
    # Rows of another form go along as rows of equal scores, which cannot overflow, and are replaced.
    shift = torch.where(near & ~fits, top, 0)[:, None]
    exponent = torch.where(near[:, None], r.u - shift, 0)
    if missing is not None:
        exponent.masked_fill_(missing, 0)
    loss, gradient = _linear(r, exponent, runs, need_grad)
    if len(wide):
        _replace_rows(loss, gradient, wide, _by_range(r.take(wide).to(torch.float64), need_grad))
    if len(widest):
        _replace_rows(loss, gradient, widest, scaled(r.take(widest), need_grad))
    return loss, gradient


class _Runs(NamedTuple):
    """Runs of equal labels in the flattened rows, single items included: J runs over R * K places."""

    shape: torch.Size  # (R, K)
    run: Tensor  # (R K,) the run of each place
    first: Tensor  # (J,) place of a run's first item
    last: Tensor  # (J,) and of its last
    size: Tensor  # (J,) items in the run, in the dtype of u
    weight: Tensor | None  # (J,) what it is charged; None: 1 each
    hard: Tensor  # rows that only `scaled` can do: with a charged tie, in any order

    def each(self, values: Tensor) -> Tensor:
        """Return the value (J,) of every item's run, as rows (R, K)."""
        return values.index_select(0, self.run).view(self.shape)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum (J,) of rows (R, K) over each run."""
        return values.new_zeros(len(self.first)).index_add_(0, self.run, values.view(-1))


def _find_runs(r: Rankings, leads: Tensor) -> _Runs:
    places, items = r.u.numel(), r.u.shape[1]
    run = leads.cumsum(0, dtype=torch.int64).sub_(1)
    first = leads.nonzero()[:, 0]
    count = torch.diff(first, append=first.new_full((1,), places))
    last = first + count - 1
    size = count.to(r.u.dtype)
    mean = None
    if r.weight is not None:
        mean = torch.zeros_like(size).index_add_(0, run, r.weight.expand_as(r.u).reshape(-1)) / size
    weight, hard = r.charge_of_groups(mean, first, last), first[:0]
    if r.rule.ties == "exact":
        assert weight is not None
        tied = size > 1
        hard = first[tied & (weight != 0)] // items
        weight = weight * ~tied
    return _Runs(r.u.shape, run, first, last, size, weight, hard)


def _linear(r: Rankings, exponent: Tensor, runs: _Runs | None, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return loss and gradient from sums of exp(exponent); exponent is u up to a constant a row."""
    e = exponent.exp()
    # Masked items get mass 0 in sums and 1 in divisors; selecting them instead would cost more than all the rest.
    present = None if r.valid is None else r.valid.to(e.dtype)
    missing = None if present is None else 1 - present
    if present is not None:
        e.mul_(present)
    below = e.flip(-1).cumsum_(-1).flip(-1)  # exp(u) summed from an item to the end of its list
    divisor = e if missing is None else e + missing
    share = None
    if runs is None:
        weight, denominator = r.charge(), below
        # Neighbours along a row are neighbours in memory: a shift of the flattened rows is right but for one column.
        x = torch.empty_like(e)
        torch.div(below.view(-1)[1:], divisor.view(-1)[:-1], out=x.view(-1)[:-1])
        x[:, -1] = 0
    else:
        weight = None if runs.weight is None else runs.each(runs.weight)
        others, share = _others(runs, below, efron=r.rule.ties == "efron")
        x = others / divisor
        denominator = others.add_(e)
    if present is not None:
        weight = present if weight is None else weight * present
    loss = x.log1p()
    if weight is not None:
        loss.mul_(weight)
    loss = row_sum(loss)
    if not need_grad:
        return loss, None

    # y_i is what item i takes from every item below, per exp(u); prefix sums that stop above an item collect it.
    y = (denominator if missing is None else denominator.add_(missing)).reciprocal_()
    if weight is not None:
        y.mul_(weight)
    gradient = x.div_(1 + x).neg_()
    if runs is None:
        y.cumsum_(-1)[:, -1] = 0
        if weight is not None:
            gradient.mul_(weight)
        gradient.view(-1)[1:].addcmul_(e.view(-1)[1:], y.view(-1)[:-1])
        return loss, gradient
    # A tied item also takes from itself and the others of its run: exp(u) inside - w instead of -w x / (1 + x).
    single = (runs.size == 1).to(e.dtype)
    inside = runs.size * y.view(-1)[runs.first] if share is None else runs.sum(share * y)
    inside.mul_(1 - single)
    y.cumsum_(-1)[:, -1] = 0
    above = y.view(-1)[runs.first - 1].add_(inside)
    single = runs.each(single)
    gradient.mul_(single).sub_(1 - single)
    if weight is not None:
        gradient.mul_(weight)
    return loss, gradient.addcmul_(e, runs.each(above))


def _others(runs: _Runs, below: Tensor, efron: bool) -> tuple[Tensor, Tensor | None]:
    """Return each item's denominator without the item, and the share of its run in it that Efron's rule leaves."""
    others = torch.empty_like(below)
    others.view(-1)[:-1] = below.view(-1)[1:]
    others[:, -1] = 0
    rest, total = others.view(-1)[runs.last], below.view(-1)[runs.first]
    others += runs.each(total).sub_(below)  # the items of the run before this one; exactly 0 for the first
    if not efron:
        return others, None
    place = torch.arange(below.numel(), device=below.device) - runs.first.index_select(0, runs.run)
    chosen = place.to(below.dtype).view_as(below) / runs.each(runs.size)
    return others.addcmul_(chosen, runs.each(total - rest), value=-1), 1 - chosen
