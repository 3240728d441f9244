"""The CPU path of the listwise cross-entropy; formulas and names are those of `function.py`.

The plain formula with torch's fused softmax serves all lists in few more passes than it has itself. Only lists that may
lose digits in it, those where an item is likely or an entry is not finite, are done again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from mopl._arguments import compute_dtype, refuse_negative
from mopl.ops._rows import (
    block_lists,
    existing,
    in_full_precision,
    is_number,
    log_softmax,
    log_softmax_backward,
    merge,
    row_dot,
    row_sum,
    times,
)

# A list is confident where its most likely item has at least this log probability. Below it the plain formula is off
# by a float32 rounding (6e-8) in a loss of at least 0.1, which is inside 1e-6 relative.
_CONFIDENT = -0.1
# From here on a maximum along rows is as cheap as a sum; for rows of 8 to 120 items it takes two to six times as long.
_LONG = 256


def new_saved(loss: Tensor, labels: Tensor, beta: Tensor) -> list[Tensor]:
    """Return peak, rest, mass, others and logp, not yet written; `mass` stays 0 without `normalize`."""
    peak, nothing = loss.new_full(beta.shape, -1, dtype=torch.int64), (loss.new_empty(0), loss.new_empty(0))
    return [peak, nothing[0], loss.new_zeros(loss.shape), nothing[1], loss.new_empty((*beta.shape, labels.shape[2]))]


@in_full_precision
def forward(
    scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None, normalize: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss, and what `new_saved` says."""
    batch, objectives, size = labels.shape
    shared, dtype = beta.shape[1], compute_dtype(scores)
    loss = scores.new_empty((batch, objectives), dtype=dtype)
    saved = peak, _, mass, _, logp = new_saved(loss, labels, beta)
    if size < 2 or labels.numel() == 0:
        logp.zero_()
        return loss.zero_(), saved
    valid, rate = existing(mask), _rate(beta, dtype)
    # What shows which rows may be confident; `log_softmax` of two finite items needs no help.
    exact = valid is not None or size >= _LONG
    hint = None if size == 2 else scores.new_empty((batch, shared), dtype=dtype)
    first, work = 0, _work(labels, objectives, shared, dtype)
    for z, s, t, some, rows, dot, total, likely in _blocks(labels, shared, scores, rate, valid, logp, loss, mass, hint):
        z = _labels(z, some, dtype)
        log_softmax(_logits(s, t, some, dtype), out=rows)
        row_dot(z, rows, out=dot, work=work)
        if normalize:
            refuse_negative(z, "normalize='l1'", first=first)
            row_sum(z, out=total)
        if hint is not None:
            torch.amax(rows, -1, out=likely) if exact else row_sum(rows, out=likely)
        first += len(rows)
    row = _doubtful(loss, logp, hint, exact)
    loss.neg_()
    if normalize:
        loss.div_(mass).masked_fill_(mass <= 0, 0)
    if row is not None and len(row):
        for some in row.split(_lists_at_once(size)):
            _do_again(some, scores, labels, rate, valid, normalize, loss, peak, mass, logp)
    return loss, saved


def _lists_at_once(items_per_list: int) -> int:
    """Return the number of lists in a block: twice the usual, which halves the calls and still stays in cache."""
    return 2 * block_lists(items_per_list)


def _step(labels: Tensor, shared: int) -> int:
    """Return the number of lists in a block by their softmaxes, or by a fourth of the labels that share one."""
    return _lists_at_once(max(shared, labels.shape[1] // 4) * labels.shape[2])


def _blocks(labels: Tensor, shared: int, *more: Tensor | None) -> Iterator[tuple]:
    """Cut tensors with one row a list into blocks that stay in cache; None stays None."""
    step = _step(labels, shared)
    if step >= len(labels):
        return iter([(labels, *more)])
    return zip(*(repeat(None) if t is None else t.split(step) for t in (labels, *more)), strict=False)


def _work(labels: Tensor, rows: int, shared: int, dtype: torch.dtype) -> Tensor:
    """Return room for products of a block (n, rows, K): fresh memory for each would cost as much as the products."""
    return labels.new_empty((min(len(labels), _step(labels, shared)), rows, labels.shape[2]), dtype=dtype)


def _doubtful(dot: Tensor, logp: Tensor, hint: Tensor | None, exact: bool) -> Tensor | None:
    """Return the rows that the plain formula does not serve: confident ones, and any that hold -inf, inf or NaN.

    `dot` (B, m) is the product of labels and rows, `hint` (B, m) or (B, 1) the largest log probability of each row, or
    unless `exact` the sum of them. None where there is no such row.
    """
    others = logp.shape[-1] - 1
    # If one probability is at least p, the others share 1 - p, so the sum of the logarithms is at most
    # log(p) + (K - 1) log((1 - p) / (K - 1)): few rows are below, and only these are searched.
    bound = _CONFIDENT + others * math.log(-math.expm1(_CONFIDENT) / others)
    if math.isfinite(float(dot.sum())) and (  # false for NaN, as both comparisons are
        hint is None or (float(hint.amax()) < _CONFIDENT if exact else float(hint.amin()) > bound)
    ):
        return None
    each = dot if dot.shape == logp.shape[:2] else row_sum(dot)
    trace = each.view(-1) * 0  # NaN where it is not finite
    if hint is None:
        return (trace != 0).nonzero()[:, 0]
    trace += hint.view(-1)
    if exact:
        return (~(trace < _CONFIDENT)).nonzero()[:, 0]
    row, rows = (~(trace > bound)).nonzero()[:, 0], logp.view(-1, others + 1)
    parts = row.split(_lists_at_once(others + 1))
    return torch.cat([part[~(rows[part].amax(-1) + trace[part] * 0 < _CONFIDENT)] for part in parts])


def _do_again(
    row: Tensor, scores: Tensor, labels: Tensor, rate: Tensor | None, valid: Tensor | None, normalize: bool,
    loss: Tensor, peak: Tensor, mass: Tensor, logp: Tensor,
) -> None:  # fmt: skip
    """Write the results of some rows again, without a difference of close numbers."""
    batch, shared, size = logp.shape
    # One row is one softmax: list `item` with all objectives, or with objective `which` where β differs between them.
    item, which = row // shared, slice(None) if shared == 1 else row % shared
    some = None if valid is None else valid[item]
    rate = None if rate is None else rate if _is_one(rate) else rate.reshape(-1, 1)[row]
    logits = _logits(scores[item], rate, some, logp.dtype, careful=True)
    first = logits.max(-1, keepdim=True).indices
    rest = row_sum(logits.exp().scatter_(-1, first, 0))[..., None]
    log_total = torch.log1p(rest)
    rows = (logits - log_total).scatter_(-1, first, -log_total)
    z = _labels(labels[item, which].view(len(row), -1, size), some, logp.dtype)
    if normalize:  # before the product, which may then be as large as a score
        whole = mass[item, which].view(len(row), -1, 1)
        z = torch.where(whole <= 0, 0, z / whole)
    dot = times(z, rows).sum(-1)
    loss[item, which] = -dot.view(loss[item, which].shape)
    logp.view(batch * shared, size)[row] = rows[:, 0]
    peak.view(-1)[row] = torch.where(rest < 1, first, -1)[:, 0, 0]


def _labels(labels: Tensor, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return labels (n, m, K) in the dtype of the arithmetic, 0 where masked."""
    labels = labels.to(dtype)
    return labels if valid is None else labels.masked_fill(~valid[:, None], 0)


def _rate(beta: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return β in the dtype of the arithmetic, None where it is 1 throughout."""
    return None if _is_one(beta) and float(beta[0, 0]) == 1 else beta.to(dtype)


def _is_one(beta: Tensor) -> bool:
    """Say whether one number is the β of all lists; (B, m) has a softmax an objective all the same."""
    return beta.shape[1] == 1 and is_number(beta)


def _logits(
    scores: Tensor, rate: Tensor | None, valid: Tensor | None, dtype: torch.dtype, careful: bool = False
) -> Tensor:
    """Return rate * scores (n, m, K) or (n, 1, K) up to a constant a row; `careful` makes the largest exactly 0.

    The largest score is subtracted before β multiplies: the difference of close floats is exact, so a
    common offset of all scores costs no digits. Masked slots hold a number that no sum can notice.
    """
    scores = scores.to(dtype)[:, None]
    lowest = torch.finfo(dtype).min / 2
    if rate is None and not careful:
        return scores if valid is None else scores.masked_fill(~valid[:, None], lowest)
    if rate is not None:
        rate = rate[0, 0] if _is_one(rate) else rate[:, :, None]
        if bool((rate < 0).any()):
            scores, rate = scores * rate.sign() + 0.0, rate.abs()
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    logits = scores - top
    if careful:
        logits.masked_fill_(scores == top, 0)  # where -inf is the largest
    if rate is not None:
        logits = logits.mul_(rate) if rate.numel() in (1, len(logits)) else logits * rate
    return logits if valid is None else logits.masked_fill_(~valid[:, None], lowest)


@in_full_precision
def backward(
    grad_loss: Tensor, scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None, loss: Tensor,
    saved: Sequence[Tensor], normalize: bool, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of scores, labels and beta; one that is not needed is empty."""
    (peak, _, mass, _, logp), (need_scores, need_labels, need_beta) = saved, need
    shared, size, dtype = beta.shape[1], labels.shape[2], loss.dtype
    new = torch.zeros if size < 2 or labels.numel() == 0 else torch.empty
    du = new((len(labels), shared, size), dtype=dtype)  # upstream gradient of u, summed where they share β
    dlabels = new(labels.shape if need_labels else (0,), dtype=labels.dtype)
    if size >= 2 and labels.numel():
        valid = existing(mask)
        share = -grad_loss.to(dtype)  # minus the upstream gradient of a label's share in the loss
        without = False  # whether there are lists without labels, which may hold NaN
        if normalize:
            empty = mass <= 0
            without = bool(empty.any())
            share.div_(mass)
            share = share.masked_fill_(empty, 0) if without else share
        need_du, work = need_scores or need_beta, _work(labels, shared, shared, dtype)
        own, written = (loss if normalize else None, dlabels) if need_labels else (None, None)
        for z, some, rows, part, d, own_part, dz in _blocks(labels, shared, valid, logp, share, du, own, written):
            if dz is not None:
                found = rows if own_part is None else rows + own_part[:, :, None]
                found = part[:, :, None] * found
                dz.copy_(found if some is None else found.masked_fill_(~some[:, None], 0))
            if need_du:
                z = _labels(z, some, dtype)
                g = work[: len(z)]
                merge(part, z, out=g[:, 0]) if shared == 1 else torch.mul(part[:, :, None], z, out=g)
                log_softmax_backward(g, rows, out=d)
        if need_du:
            _sharpen(du, peak)
            if without:
                du[empty.all(-1)] = 0
        if need_labels and without:
            dlabels.masked_fill_(empty[:, :, None], 0)
    dbeta = du.new_empty(0)
    if need_beta:
        side = torch.where(beta < 0, -1, 1) if bool((beta < 0).any()) else beta.new_ones(1, 1)
        key = side.to(dtype)[:, :, None] * scores.to(dtype)[:, None]
        key = key if mask is None else key.masked_fill(~mask[:, None], -torch.inf)
        top = key.amax(-1, keepdim=True) if size else key
        away = (key - top).masked_fill_(key == top, 0)  # du sums to 0, so the origin of the scores is free
        dbeta = side * times(du, away).sum(-1)
    dscores = _times_beta(du, beta) if need_scores else du.new_empty(0)
    return dscores.to(scores.dtype), dlabels, dbeta.to(beta.dtype)


def _times_beta(du: Tensor, beta: Tensor) -> Tensor:
    """Return sum_j beta_j du_j (B, K); `du` may be overwritten."""
    rate = _rate(beta, du.dtype)
    if rate is None:
        return du[:, 0]
    return merge(rate, du) if du.shape[1] > 1 else du[:, 0].mul_(rate)


def _sharpen(du: Tensor, peak: Tensor) -> None:
    """Set the gradient at the peak of confident lists to minus the sum of the others, which keeps every digit."""
    if not peak.numel() or int(peak.amax()) < 0:
        return
    peak = peak.view(-1)
    index = (peak >= 0).nonzero()[:, 0]
    du = du.view(-1, du.shape[-1])
    rows, at = du[index], peak[index][:, None]
    du[index] = rows.scatter_(-1, at, 0).scatter_(-1, at, -row_sum(rows)[:, None])
