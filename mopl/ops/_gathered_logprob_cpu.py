"""The CPU path of `gathered_logprob`: chunks of rows, in PyTorch. Formulas and names are those of that file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mopl.ops._logprob import weighted_by_probability
from mopl.ops._rows import slices

ELEMENTS = 2**20  # logits in one chunk of the CPU path: 4 MiB in float32
# Below this exp is 0 in either precision; a finite floor keeps 0 * log p from being NaN where a logit is -inf.
FLOOR = -1e4
LARGE = 64.0  # of a logsumexp: its rounding, a relative error of every probability, is 4e-6 in float32


def launch_forward(
    logits: Tensor, target: Tensor, temperature: Tensor, softcap: float, want_entropy: bool, want_variance: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, logsumexp, entropy and variance; the last two are empty if not wanted."""
    rows = len(logits)
    logprob = temperature.new_zeros(target.shape)
    logsumexp = temperature.new_zeros(rows)
    entropy = temperature.new_zeros(rows if want_entropy else 0)
    variance = temperature.new_zeros(rows if want_variance else 0)
    for part in _chunks((target >= 0).any(1), logits.shape[1]):
        u = _scaled(logits, part, temperature, softcap)
        own, keep, pivot, place = _targets(u, target[part])
        pivot_logit = own.gather(1, place)
        u.scatter_(1, pivot, -torch.inf)
        top = u.amax(1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0)  # the pivot is the only token with any probability
        u.sub_(top)
        shifted = u.clamp(min=FLOOR) if want_entropy else None
        e = u.exp_()
        others = e.sum(1, keepdim=True)
        # torch's softplus turns linear at a threshold; logaddexp does not, and underflows to exp at the other end
        odds = (top - pivot_logit) + others.log()
        pivot_logprob = -torch.logaddexp(odds, torch.zeros_like(odds))
        # From the larger of the two summands on.
        over_top = (others + (pivot_logit - top).exp()).log()
        total = torch.where(odds > 0, top + over_top, pivot_logit - pivot_logprob)
        nothing = (others == 0) & (pivot_logit == -torch.inf)  # every logit of the row is -inf
        logsumexp[part] = total.masked_fill(nothing, -torch.inf).squeeze(1)
        relative = torch.where(pivot_logit == -torch.inf, -torch.inf, (own - pivot_logit) + pivot_logprob)
        logprob[part] = relative.masked_fill(~keep, 0)
        if shifted is None:
            continue
        # Moments about the logsumexp: every term of the entropy then has one sign. The difference of top and logsumexp
        # is formed from small numbers: the two, and a pivot far below the others, are rounded to the size of the
        # logits. Without others exp(off) could overflow, times nothing.
        off = torch.where(odds > 16, -over_top, (top - pivot_logit) + pivot_logprob).masked_fill(others == 0, 0)
        off.clamp_(min=FLOOR)
        scale = off.exp()
        first = (shifted * e).sum(1, keepdim=True)
        mean = scale * (first + off * others) + weighted_by_probability(pivot_logprob, pivot_logprob)
        entropy[part] = -mean.masked_fill(pivot_logit == torch.inf, torch.nan).squeeze(1)
        if want_variance:
            square = scale * ((shifted.add_(off - mean)).square_() * e).sum(1, keepdim=True)
            square = square + weighted_by_probability((pivot_logprob - mean).square(), pivot_logprob)
            variance[part] = square.squeeze(1)
    return logprob, logsumexp, entropy, variance


def launch_backward(
    grad_logprob: Tensor | None, grad_logsumexp: Tensor | None, grad_entropy: Tensor | None,
    logits: Tensor, target: Tensor, temperature: Tensor, logprob: Tensor, logsumexp: Tensor, entropy: Tensor,
    softcap: float, grad: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of the logits into `grad` (N, V), which may be `logits` itself."""
    upstream = torch.zeros_like(logprob) if grad_logprob is None else grad_logprob.masked_fill(target < 0, 0)
    counts = (target >= 0).any(1)
    live = (upstream != 0).any(1)
    for more in (grad_logsumexp, grad_entropy):
        live = live if more is None else live | (more != 0)
    live = live & counts
    if not bool(live.all()):
        grad[~live] = 0
    for part in _chunks(live, logits.shape[1]):
        u = _scaled(logits, part, temperature, softcap)
        _, keep, pivot, place = _targets(u, target[part])
        bent = None if not softcap else u * (temperature[part, None] / softcap)
        pivot_logprob, total = logprob[part].gather(1, place), logsumexp[part, None]
        if bool((total.abs() > LARGE).any()):
            # Relative to the pivot: the logsumexp has lost digits to the size of the logits, and the log-probability
            # of an unlikely pivot may have lost more.
            near = pivot_logprob.abs() < total.abs()
            u.sub_(torch.where(near, u.gather(1, pivot), total)).add_(torch.where(near, pivot_logprob, 0))
        else:
            u.sub_(total)
        logp = u
        g = upstream[part]
        column = target[part].clamp(min=0, max=u.shape[1] - 1)
        is_pivot = (column == pivot) & keep
        # Float64, because many upstream gradients of one row may cancel.
        on_pivot = g.double().masked_fill(~is_pivot, 0).sum(1, keepdim=True).to(g.dtype)
        off_pivot = g.double().masked_fill(is_pivot, 0).sum(1, keepdim=True).to(g.dtype)
        if grad_logsumexp is not None:
            off_pivot = off_pivot - grad_logsumexp[part, None]
        at_pivot = -on_pivot * pivot_logprob.expm1() - weighted_by_probability(off_pivot, pivot_logprob)
        factor = -(on_pivot + off_pivot)
        if grad_entropy is None:
            du = logp.exp_().mul_(factor)
        else:
            h, surprise = grad_entropy[part, None], entropy[part, None]
            at_pivot = at_pivot - h * weighted_by_probability(pivot_logprob + surprise, pivot_logprob)
            weight = logp.clamp(min=FLOOR).add_(surprise).mul_(-h).add_(factor)
            du = logp.exp_().mul_(weight)
        # Without a finite logit there is no distribution.
        du.scatter_(1, pivot, at_pivot.masked_fill(total == -torch.inf, torch.nan))
        du.scatter_add_(1, column, g.masked_fill(is_pivot, 0))
        if bent is not None:
            du.mul_((1 - bent).mul_(1 + bent))
        grad[part] = du.div_(temperature[part, None]).to(grad.dtype)


def _chunks(counts: Tensor, vocabulary: int) -> Sequence[Tensor | slice]:
    """Return the rows that count in chunks: slices where all of them do, else indices."""
    size = max(1, ELEMENTS // vocabulary)
    if bool(counts.all()):
        return slices(0, len(counts), size)
    return [part for part in counts.nonzero()[:, 0].split(size) if len(part)]


def _scaled(logits: Tensor, part: Tensor | slice, temperature: Tensor, softcap: float) -> Tensor:
    """Return a fresh copy of u for some rows, in the compute dtype."""
    u = torch.empty(logits[part].shape, dtype=temperature.dtype).copy_(logits[part])
    if softcap:
        u.div_(softcap).tanh_().mul_(softcap)
    return u.div_(temperature[part, None])


def _targets(u: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return u at the targets, which of them count, and the pivot: its column and its place among the targets."""
    keep, vocabulary = target >= 0, u.shape[1]
    column = target.clamp(min=0, max=vocabulary - 1)
    own = u.gather(1, column).masked_fill(target >= vocabulary, torch.nan)
    place = own.masked_fill(~keep, -torch.inf).argmax(1, keepdim=True)
    # Where all logits of targets are -inf, argmax may fall on a target that does not count.
    place = torch.where(keep.gather(1, place), place, keep.long().argmax(1, keepdim=True))
    return own, keep, column.gather(1, place), place
