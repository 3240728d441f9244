"""What stands between `linear_logprob` and its backends: records, which rows are in play, and the formulas on vectors.

Plain PyTorch on vectors of length N (rows), M (rows in play), E (targets) or F (targets in play). The formulas are
derived in `linear_logprob`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mopl.ops._logprob import SKIP, Upstream, weighted_by_probability
from mopl.ops.segments import segment_sum

if TYPE_CHECKING:
    from mopl.ops.linear_logprob.shard import VocabularyShard


class Head(NamedTuple):
    """A language-model head; with `shard` this rank's part of one."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float  # 0.0: none
    logit_scale: float
    shard: VocabularyShard | None = None

    @property
    def vocabulary(self) -> int | Tensor:
        """The size of the whole vocabulary."""
        return len(self.weight) if self.shard is None else self.shard.vocabulary

    def local(self, column: Tensor) -> Tensor:
        """Return indices into the rows of `weight`, -1 for what is not there: other ranks' tokens and mistakes."""
        if self.shard is not None:
            return self.shard.local(column)
        return torch.where(column < len(self.weight), column, -1)

    def slope(self, u: Tensor, temperature: Tensor) -> Tensor:
        """Return du/da at logits u: logit_scale / temperature, times 1 - tanh^2 under a softcap."""
        factor = self.logit_scale / temperature
        if not self.softcap:
            return factor.expand(u.shape)
        bent = u * (temperature / self.softcap)
        return factor * ((1 - bent) * (1 + bent))


class Batch(NamedTuple):
    """The rows in play."""

    hidden: Tensor  # (M, H)
    temperature: Tensor  # (M,)
    count: Tensor | None  # () int64: only the first `count` rows hold data; None means all


class Want(NamedTuple):
    """What a forward pass finds besides log-probabilities and logsumexps, and what it keeps for the backward pass."""

    entropy: bool
    variance: bool
    direction: bool  # of the log-probabilities; with a frozen head alone, and the hidden states are not kept then
    direction_logsumexp: bool
    direction_entropy: bool
    keep_rows: int  # whose exponentials are kept, of a trainable head
    max_rows: int


class Forward(NamedTuple):
    """Results and saved tensors of the forward pass, rows and targets that do not count being 0 everywhere."""

    logprob: Tensor  # (E,)
    logsumexp: Tensor  # (N,)
    entropy: Tensor  # (N,) or empty
    variance: Tensor  # (N,) or empty: of u under p
    direction: Tensor  # (E, H) or empty: d logprob / d hidden
    direction_logsumexp: Tensor  # (N, H) or empty
    direction_entropy: Tensor  # (N, H) or empty
    shift: Tensor  # (N,)
    total: Tensor  # (N,); 0 for rows that took no part
    pivot: Tensor  # (N,) int64; empty without `row`: the target
    pivot_logprob: Tensor  # (N,); empty without `row`: logprob
    cache: Tensor  # (keep_rows * cache_columns,) in `cache_dtype`, or empty


def padded_columns(columns: int, itemsize: int) -> int:
    """Return how many entries a row of the kernels takes: it begins at a multiple of 128 bytes, a line of the cache."""
    step = 128 // itemsize
    return -(-columns // step) * step


class Selection(NamedTuple):
    """Rows and targets that count, in the order in which a backend sees them."""

    index: Tensor | None  # (M,) rows of hidden; None: all N, as they are
    entry: Tensor | None  # (F,) indices into the E targets; None: all E, as they are
    column: Tensor  # (F,) int64 vocabulary index, -1 for a target that does not count
    position: Tensor | None  # (F,) place of each target's row among the M; None: target i belongs to row i
    # Compaction without a synchronisation only, else None:
    valid: Tensor | None = None  # (M,) bool: the row holds data; false only at the end
    count: Tensor | None = None  # () int64 = valid.sum()
    lost_rows: Tensor | None = None  # (N,) bool: the row counts but lies beyond the bound
    lost_entries: Tensor | None = None  # (E,) bool: the target's row does


def select(target: Tensor, row: Tensor | None, rows: int, bound: int, on_host: bool) -> Selection:
    """Compact rows and targets: exactly, by index, on the host; without a synchronisation on a GPU.

    On a GPU M = bound, or fewer where there are fewer rows or targets: first the rows that count, in their order, then
    rows that do not. How many count is known there only (`count`). Rows that count but lie beyond the bound are left
    out, and their results become NaN.
    """
    counts = target >= 0
    if on_host:
        if row is None and bool(counts.all()):
            selection = Selection(None, None, target, None)
        elif row is None:
            index = counts.nonzero()[:, 0]
            selection = Selection(index, index, target[index], None)
        else:
            entry = counts.nonzero()[:, 0]
            index, position = row[entry].unique(return_inverse=True)
            selection = Selection(index, entry, target[entry], position)
        found = rows if selection.index is None else len(selection.index)
        if found > bound:
            raise ValueError(f"max_rows is {bound} but {found} rows count; pass at least {found}, or None")
        return selection
    used = counts
    if row is not None:
        used = torch.zeros(rows, dtype=torch.int64, device=target.device)
        used = used.scatter_reduce_(0, row, counts.long(), "amax") > 0
    possible = min(rows, len(target))  # more rows cannot count
    bound = min(bound, possible)
    order = torch.argsort(~used, stable=True)
    count = used.sum().clamp(max=bound)
    valid = torch.arange(bound, device=target.device) < count
    place = torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device))
    lost = used & (place >= bound) if bound < possible else None
    if row is None:
        index = order[:bound]
        return Selection(index, index, torch.where(valid, target[index], SKIP), None, valid, count, lost, lost)
    lost_entries = None if lost is None else counts & lost[row]
    if not bound:  # no row is in play, so that no target has a place
        nothing = row.new_empty(0)
        return Selection(nothing, nothing, nothing, nothing, valid, count, lost, lost_entries)
    place = place[row]
    column = torch.where(place < bound, target, SKIP)
    return Selection(order[:bound], None, column, place.clamp(max=bound - 1), valid, count, lost, lost_entries)


def gather(values: Tensor, selection: Selection, fill: float = 0) -> Tensor:
    """Return the rows in play (M, ...) of values (N, ...); rows that hold no data are `fill`, whatever stood there."""
    if selection.index is None:
        return values
    picked = values.index_select(0, selection.index)
    if selection.valid is None:
        return picked
    return picked.masked_fill(~selection.valid.view(-1, *[1] * (values.ndim - 1)), fill)


def gather_entries(values: Tensor, selection: Selection) -> Tensor:
    """Return the entries in play (F,) of values (E,); entries that do not count are 0."""
    if selection.entry is not None:
        values = values.index_select(0, selection.entry)
    return values if selection.valid is None else values.masked_fill(selection.column < 0, 0)


def scatter_rows(values: Tensor, selection: Selection, size: int) -> Tensor:
    """Return (N, ...) from values (M, ...) of the rows in play; rows that do not count are 0."""
    tail = [1] * (values.ndim - 1)
    if selection.index is None:
        return values
    if selection.valid is not None:
        values = values.masked_fill(~selection.valid.view(-1, *tail), 0)
    result = values.new_zeros((size, *values.shape[1:])).index_copy_(0, selection.index, values)
    if selection.lost_rows is not None and values.is_floating_point():
        result.masked_fill_(selection.lost_rows.view(-1, *tail), torch.nan)
    return result


def scatter_entries(values: Tensor, selection: Selection, size: int) -> Tensor:
    """Return (E, ...) from values (F, ...) of the targets in play; targets that do not count are 0."""
    tail = [1] * (values.ndim - 1)
    if selection.valid is not None:
        values = values.masked_fill((selection.column < 0).view(-1, *tail), 0)
    if selection.entry is not None:
        values = values.new_zeros((size, *values.shape[1:])).index_copy_(0, selection.entry, values)
    if selection.lost_entries is not None:
        values = values.masked_fill(selection.lost_entries.view(-1, *tail), torch.nan)
    return values


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


def statistics(shift: Tensor, others: Tensor, moment1: Tensor, pivot_logit: Tensor) -> Statistics:
    """Complete the sums of `accumulate` with the pivot's own term."""
    others, moment1 = others.to(shift.dtype), moment1.to(shift.dtype)
    shifted = pivot_logit - shift
    total = others + shifted.exp()
    odds = others * (-shifted).exp()  # (1 - p_q) / p_q: log1p of it keeps the digits of a confident row
    safe = odds.isfinite()
    log_total = torch.where(safe, shifted + odds.log1p(), total.log())
    pivot_logprob = torch.where(safe, -odds.log1p(), shifted - total.log())
    return Statistics(shift, others, moment1, pivot_logit, total, log_total, pivot_logprob)


def variance(shift: Tensor, others: Tensor, moment1: Tensor, moment2: Tensor, pivot_logit: Tensor) -> Tensor:
    """Return the variance of u under p, in the dtype of `shift`: that of the others, and of the pivot against them."""
    shifted = (pivot_logit - shift).to(others.dtype)
    peak = shifted.exp()
    total = others + peak
    mean = moment1 / others
    within = (moment2 - mean * moment1) / total
    between = torch.where(peak == 0, 0, others * peak / total.square() * (shifted - mean).square())
    return torch.where(others == 0, 0, within + between).to(shift.dtype)


def scaled_by(shift: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(shift - common) and shift - common for common >= shift; (0, 0) where nothing is left of a sum."""
    step = torch.where(shift == common, 0, shift - common)
    factor = step.exp()
    return factor, torch.where(factor == 0, 0, step)


def target_logprob(stats: Statistics, logits: Tensor, selection: Selection) -> Tensor:
    """Return log p (F,) of every target in play."""
    if selection.position is None:
        return stats.pivot_logprob
    pivot_logit = stats.pivot_logit[selection.position]
    logprob = (logits - pivot_logit) + stats.pivot_logprob[selection.position]
    return logprob.masked_fill(pivot_logit == -torch.inf, -torch.inf)


class Coefficients(NamedTuple):
    """The factors of `combine` for one kind of direction; see there."""

    pivot: Tensor
    weighted: Tensor
    moment: Tensor | None
    own: Tensor | None


def logprob_direction(
    stats: Statistics, logits: Tensor, pivot: Tensor, selection: Selection, temperature: Tensor, head: Head
) -> Coefficients:
    """Factors of d logprob / d hidden, one row a target."""
    pivot_slope = head.slope(stats.pivot_logit, temperature)
    weighted = -head.logit_scale / temperature / stats.total
    sure = pivot_slope * (stats.others / stats.total)
    if selection.position is None:
        return Coefficients(sure, weighted, None, None)
    position = selection.position
    unsure = -pivot_slope * stats.pivot_logprob.exp()
    is_pivot = selection.column == pivot[position]
    own = head.slope(logits, temperature[position]).masked_fill(is_pivot, 0)
    return Coefficients(torch.where(is_pivot, sure[position], unsure[position]), weighted, None, own)


def logsumexp_direction(stats: Statistics, temperature: Tensor, head: Head) -> Coefficients:
    """Factors of d logsumexp / d hidden = sum_v p_v f_v W_v, one row a row."""
    pivot_slope = head.slope(stats.pivot_logit, temperature)
    share = head.logit_scale / temperature / stats.total
    return Coefficients(pivot_slope * stats.pivot_logprob.exp(), share, None, None)


def entropy_direction(stats: Statistics, entropy: Tensor, temperature: Tensor, head: Head) -> Coefficients:
    """Factors of d entropy / d hidden = -sum_v p_v (log p_v + H) f_v W_v, one row a row."""
    pivot_slope = head.slope(stats.pivot_logit, temperature)
    own = weighted_by_probability(stats.pivot_logprob + entropy, stats.pivot_logprob)
    share = head.logit_scale / temperature / stats.total
    return Coefficients(-pivot_slope * own, share * (stats.log_total - entropy), -share, None)


class LogitGradient(NamedTuple):
    """The gradient of the logits as `backward` of a backend takes it; see there."""

    alpha: Tensor  # (M,)
    gamma: Tensor | None  # (M,)
    column: Tensor  # (F,) int64, or -1; with several targets a row (M + F,), first the pivots
    position: Tensor  # int64
    coefficient: Tensor


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
    if selection.valid is not None:
        alpha, coefficient = (t.masked_fill(~selection.valid, 0) for t in (alpha, coefficient))
        gamma = None if gamma is None else gamma.masked_fill(~selection.valid, 0)
    rows = torch.arange(len(pivot), device=pivot.device)
    if position is None:
        return LogitGradient(alpha, gamma, pivot, rows, coefficient)
    # At targets that are pivots the row's own entry holds everything: theirs is 0.
    apart = elsewhere * head.slope(logprob + logsumexp[position], temperature[position])
    columns, rows = torch.cat([pivot, selection.column]), torch.cat([rows, position])
    return LogitGradient(alpha, gamma, columns, rows, torch.cat([coefficient, apart]))
