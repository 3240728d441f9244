"""The formulas of `linear_logprob` on vectors of the rows (M,) and targets (F,) in play; `function` derives them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mopl.ops._logprob import SKIP, Upstream, weighted_by_probability
from mopl.ops.linear_logprob.records import Coefficients, Entries, Forward, Head, LogitGradient, Sums
from mopl.ops.linear_logprob.rows import Selection
from mopl.ops.linear_logprob.shard import VocabularyShard
from mopl.ops.sequence_logprob import segment_sum


def choose_pivots(logits: Tensor, selection: Selection, rows: int) -> tuple[Tensor, Tensor]:
    """Return the pivot of each row in play, the likeliest of its targets: its column (M,) and its logit (M,).

    Only one token of a row can have p > 1/2. If that token is among the targets, then it is the pivot, and all
    quantities that would suffer from 1 - p are formed without that difference.
    """
    if selection.position is None:
        return selection.column, logits
    position = selection.position
    masked = logits.masked_fill(selection.column < 0, -torch.inf)
    largest = masked.new_full((rows,), -torch.inf).scatter_reduce_(0, position, masked, "amax")
    order = torch.arange(logits.numel(), device=logits.device)
    candidate = torch.where((masked == largest[position]) & (selection.column >= 0), order, logits.numel())
    first = torch.full((rows,), logits.numel(), device=logits.device)
    first = first.scatter_reduce_(0, position, candidate, "amin")
    # A NaN logit equals nothing: any target of the row will do, the row's results are NaN.
    found = first < logits.numel()
    first = first.clamp(max=logits.numel() - 1)
    return torch.where(found, selection.column[first], SKIP), torch.where(found, logits[first], largest)


def scaled_by(shift: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(shift - common) and shift - common for common >= shift; (0, 0) where nothing is left of a sum."""
    step = torch.where(shift == common, 0, shift - common)
    factor = step.exp()
    return factor, torch.where(factor == 0, 0, step)


def over_ranks(own: Sums, shard: VocabularyShard) -> Sums:
    """Return the sums over the whole vocabulary, relative to the shift that all ranks share."""
    common = shard.max(own.shift)
    factor, step = scaled_by(own.shift, common)
    parts = [own.others * factor]
    if len(own.moment1):
        parts.append((own.moment1 + step * own.others) * factor)
    if len(own.moment2):
        parts.append((own.moment2 + 2 * step * own.moment1 + step.square() * own.others) * factor)
    names = ("others", "moment1", "moment2")  # moments that were not asked for stay empty
    return own._replace(shift=common, **dict(zip(names, shard.sum(torch.stack(parts)), strict=False)))


class Statistics(NamedTuple):
    """Vectors (M,) of the rows in play, all in the compute dtype."""

    shift: Tensor
    others: Tensor  # sum of exp(u_v - shift), the pivot left out
    moment1: Tensor  # sum of exp(u_v - shift) (u_v - shift), the pivot left out; empty if not asked for
    pivot_logit: Tensor
    total: Tensor  # sum of exp(u_v - shift) over the whole vocabulary
    log_total: Tensor
    pivot_logprob: Tensor

    @property
    def logsumexp(self) -> Tensor:
        """The log of the normaliser of the logits."""
        return self.shift + self.log_total

    def entropy(self) -> Tensor:
        """H = -p_q log p_q + sum over the others of p_v (log total - (u_v - shift))."""
        own = weighted_by_probability(self.pivot_logprob, self.pivot_logprob)
        return (self.log_total * self.others - self.moment1) / self.total - own


def statistics(sums: Sums, pivot_logit: Tensor) -> Statistics:
    """Complete the sums over the vocabulary with the pivot's own term."""
    shift = sums.shift
    others, moment1 = sums.others.to(shift.dtype), sums.moment1.to(shift.dtype)
    shifted = pivot_logit - shift
    total = others + shifted.exp()
    odds = others * (-shifted).exp()  # (1 - p_q) / p_q: log1p of it keeps the digits of a confident row
    safe = odds.isfinite()
    log_total = torch.where(safe, shifted + odds.log1p(), total.log())
    pivot_logprob = torch.where(safe, -odds.log1p(), shifted - total.log())
    return Statistics(shift, others, moment1, pivot_logit, total, log_total, pivot_logprob)


def variance(sums: Sums, pivot_logit: Tensor) -> Tensor:
    """Return the variance of u under p, in the compute dtype: that of the others, and of the pivot against them."""
    others = sums.others
    shifted = (pivot_logit - sums.shift).to(others.dtype)
    peak = shifted.exp()
    total = others + peak
    mean = sums.moment1 / others
    within = (sums.moment2 - mean * sums.moment1) / total
    between = torch.where(peak == 0, 0, others * peak / total.square() * (shifted - mean).square())
    return torch.where(others == 0, 0, within + between).to(sums.shift.dtype)


def target_logprob(stats: Statistics, logits: Tensor, selection: Selection) -> Tensor:
    """Return log p (F,) of every target in play."""
    if selection.position is None:
        return stats.pivot_logprob
    pivot_logit = stats.pivot_logit[selection.position]
    logprob = (logits - pivot_logit) + stats.pivot_logprob[selection.position]
    return logprob.masked_fill(pivot_logit == -torch.inf, -torch.inf)


def logprob_direction(
    stats: Statistics, logits: Tensor, pivot: Tensor, selection: Selection, temperature: Tensor, head: Head
) -> Coefficients:
    """Factors of d logprob / d hidden, one row a target."""
    pivot_slope = head.slope(stats.pivot_logit, temperature)
    weighted = -head.logit_scale / temperature / stats.total
    sure = pivot_slope * (stats.others / stats.total)
    if selection.position is None:
        return Coefficients(sure, weighted)
    position = selection.position
    unsure = -pivot_slope * stats.pivot_logprob.exp()
    is_pivot = selection.column == pivot[position]
    own = head.slope(logits, temperature[position]).masked_fill(is_pivot, 0)
    return Coefficients(torch.where(is_pivot, sure[position], unsure[position]), weighted, own=own)


def logsumexp_direction(stats: Statistics, temperature: Tensor, head: Head) -> Coefficients:
    """Factors of d logsumexp / d hidden = sum_v p_v f_v W_v, one row a row."""
    pivot_slope = head.slope(stats.pivot_logit, temperature)
    share = head.logit_scale / temperature / stats.total
    return Coefficients(pivot_slope * stats.pivot_logprob.exp(), share)


def entropy_direction(stats: Statistics, entropy: Tensor, temperature: Tensor, head: Head) -> Coefficients:
    """Factors of d entropy / d hidden = -sum_v p_v (log p_v + H) f_v W_v, one row a row."""
    pivot_slope = head.slope(stats.pivot_logit, temperature)
    own = weighted_by_probability(stats.pivot_logprob + entropy, stats.pivot_logprob)
    share = head.logit_scale / temperature / stats.total
    return Coefficients(-pivot_slope * own, share * (stats.log_total - entropy), -share)


def logit_gradient(
    upstream: Upstream, selection: Selection, saved: Forward, temperature: Tensor, head: Head
) -> LogitGradient:
    """Turn upstream gradients into the few numbers a row that describe the gradient of its logits.

    All are of the rows and targets in play; of `saved`, pivots are there without `row`, too.
    """
    grad_logprob, grad_logsumexp, grad_entropy = upstream
    pivot, pivot_logprob, logprob, logsumexp = saved.pivot, saved.pivot_logprob, saved.logprob, saved.logsumexp
    zero = torch.zeros_like(saved.shift)
    on_target = torch.zeros_like(logprob) if grad_logprob is None else grad_logprob
    off_pivot = zero if grad_logsumexp is None else -grad_logsumexp  # what multiplies -p at the pivot beside 1 - p
    on_pivot, position, elsewhere = on_target, selection.position, on_target
    if position is not None:
        is_pivot = selection.column == pivot[position]
        elsewhere = torch.where(is_pivot, 0, on_target)
        # Float64, because many upstream gradients of one row may cancel.
        off_pivot = off_pivot + segment_sum(elsewhere.double(), position, len(pivot)).to(zero.dtype)
        on_pivot = segment_sum((on_target - elsewhere).double(), position, len(pivot)).to(zero.dtype)
    share = head.logit_scale / temperature / saved.total
    alpha = share * (on_pivot + off_pivot)
    coefficient = -on_pivot * pivot_logprob.expm1() - weighted_by_probability(off_pivot, pivot_logprob)
    gamma = None
    if grad_entropy is not None:
        gamma = share * grad_entropy
        # log(total) is logsumexp - shift, which has lost digits to the size of the logits. It is infinite on a rank
        # whose part of the vocabulary has no probability.
        alpha = alpha + torch.where(share == 0, 0, gamma * (saved.entropy - saved.total.log()))
        coefficient = coefficient - grad_entropy * weighted_by_probability(pivot_logprob + saved.entropy, pivot_logprob)
    coefficient = coefficient * head.slope(pivot_logprob + logsumexp, temperature)
    blank = selection.rows.blank
    if blank is not None:
        alpha, coefficient = (t.masked_fill(blank, 0) for t in (alpha, coefficient))
        gamma = None if gamma is None else gamma.masked_fill(blank, 0)
    rows = torch.arange(len(pivot), device=pivot.device)
    if position is None:
        return LogitGradient(alpha, gamma, Entries(pivot, rows, coefficient))
    # At targets that are pivots the row's own entry holds everything: theirs is 0.
    apart = elsewhere * head.slope(logprob + logsumexp[position], temperature[position])
    columns, rows = torch.cat([pivot, selection.column]), torch.cat([rows, position])
    return LogitGradient(alpha, gamma, Entries(columns, rows, torch.cat([coefficient, apart])))
