"""The Plackett-Luce likelihood in differentiable functions of PyTorch, for the derivatives that the op does not give.

Formulas and names are those of `function.py`. Sums over the items below are logarithms of sums of
exponentials, found for all items at once by log2(K) doublings; sums over tied groups are scattered to the group. All in
float64: beside a score that is 1e4 higher, the differences of close ones would be rounded to 1e-3 in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from mopl._arguments import compute_dtype, unknown_labels
from mopl.ops import _derivatives as derivatives
from mopl.ops._rows import existing
from mopl.ops.plackett_luce.exact_ties import any_order_formula
from mopl.ops.plackett_luce.rankings import Lists, sort_items


def formula(given: Lists) -> Tensor:
    """Return the loss (B, m)."""
    scores, labels, beta, mask, order, position_weights, (top_k, ties, last_group_free) = given
    result_dtype, dtype, size = compute_dtype(scores), torch.float64, labels.shape[-1]
    if size < 2 or labels.numel() == 0:
        return scores.new_zeros(labels.shape[:2], dtype=result_dtype)
    valid, s = existing(mask), scores.to(dtype)
    if valid is not None:
        s = torch.where(valid, s, 0)
    rate = beta.to(dtype)[:, :, None]
    way = s.detach()[:, None] * rate.detach().sign()
    possible, undefined = way > -torch.inf, (~(way < torch.inf)).any(-1)
    if valid is not None:
        undefined = undefined & (valid.sum(-1, keepdim=True) > 1)
    origin, finite = torch.where(s.isinf(), -torch.inf, s.detach()).amax(-1, keepdim=True), s.isfinite()
    s, _ = derivatives.finite(s)
    away = torch.where(finite, s - torch.where(origin.isinf(), 0, origin), s)
    u, ahead = rate * away[:, None], possible
    # For -inf stands what is below all others and near enough to them to keep the digits of its own kind.
    lowest = torch.where(ahead, u.detach(), torch.inf).amin(-1, keepdim=True)
    lowest = torch.where(lowest.isinf(), 0, lowest)
    u = u + torch.where(ahead, 0, lowest - 1e3 - 1e-12 * lowest.abs())
    floor = torch.finfo(dtype).min / 2  # for what does not exist
    ranked_labels, place, ranked = sort_items(labels, order, valid)
    u = u.expand(place.shape).gather(-1, place)
    possible = possible.expand(place.shape).gather(-1, place)
    if ranked is None:
        ranked = torch.ones_like(possible)
    u, possible = torch.where(ranked, u, floor), possible & ranked

    # Groups: where each item's begins, which it is, and how many items it has.
    index = torch.arange(size, device=u.device).expand(place.shape)
    leads = pad(ranked_labels[..., 1:] != ranked_labels[..., :-1], (1, 0), value=True) | ~ranked
    group = leads.cumsum(-1) - 1
    first = torch.where(leads, index, 0).cummax(-1).values

    def total(values: Tensor) -> Tensor:
        """Return the sum of `values` over each item's group."""
        return torch.zeros_like(values).scatter_add(-1, group, values).gather(-1, group)

    count = total(torch.ones_like(u))
    after = first + count.long()  # the first item below the group

    def below(values: Tensor, nothing: float) -> Tensor:
        return pad(values, (0, 1), value=nothing).gather(-1, after)

    weight = torch.ones_like(u)
    if position_weights is not None:
        weight = torch.where(ranked, position_weights.detach().to(dtype), 0)
    weight = total(weight) / count
    charged = ranked & (weight != 0)
    if top_k is not None:
        charged = charged & (first < top_k)
    bottom = ~below(ranked.to(dtype), 0).bool()
    if last_group_free or ties == "exact":
        charged = charged & ~bottom
    # What stands at or below each item; one of -inf is lost where it competes with one that can be chosen.
    everything = _suffix_logsumexp(u, floor)
    rivals = pad(possible.long().flip(-1).cumsum(-1).flip(-1), (0, 1))
    tied = count > 1
    seen = torch.where(tied, first, index + 1)
    seen = after if ties == "exact" else seen

    rest = below(everything, floor)
    single = -logsigmoid(u - rest)
    if ties == "exact":
        own = any_order_formula(u - rest, group, result_dtype)
    elif ties == "breslow":
        own = everything.gather(-1, first) - u
    else:
        mass = _suffix_logsumexp(u, floor, group).gather(-1, first)
        left = (1 - (index - first) / count).log()
        own = torch.stack([left + mass, rest]).logsumexp(0) - u
    cost = torch.where(charged, weight * torch.where(tied, own, single), 0)
    lost = torch.where(charged & ~possible & (rivals.gather(-1, seen) > 0), weight * torch.inf, 0)
    # Neither is a constant: where a loss is infinite or NaN, so are derivatives.
    unknown = torch.where(undefined, torch.nan, 1)
    loss = (cost.sum(-1) * unknown + rate[..., 0].abs() * (lost.sum(-1) * unknown)).to(result_dtype)
    return torch.where(unknown_labels(labels, mask), torch.nan, loss) if labels.is_floating_point() else loss


def _suffix_logsumexp(u: Tensor, floor: float, group: Tensor | None = None) -> Tensor:
    """Return the logarithm of the sum of exp(u) from each item on, to the end of the list or of its group."""
    step, size = 1, u.shape[-1]
    while step < size:
        later = pad(u[..., step:], (0, step), value=floor)
        if group is not None:
            same = pad(group[..., step:], (0, step), value=-1) == group
            later = torch.where(same, later, floor)
        u = torch.stack([u, later]).logsumexp(0)
        step *= 2
    return u
