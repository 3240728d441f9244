"""The CPU path of Plackett-Luce for scores of any size: sums kept relative to their largest term.

Rankings lie as rows (R, K), best first; formulas and names are those of `function.py`. Items of tied
groups are addressed by their place in the flattened rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mopl.ops.plackett_luce.exact_ties import any_order
from mopl.ops.plackett_luce.rankings import Rankings


def scaled(r: Rankings, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return loss and gradient for scores of any size, by scans over sums that are relative to their largest term.

    top_k = max of u from item k on, and s_k = sum of exp(u - top_k) from item k on, so that L_k = top_k + log s_k. Both
    that sum and the sum of w_i / exp(L_i) over the items above k obey recurrences whose factors exp(top_k - top_i) are
    at most 1; log2(K) doublings evaluate them for all lists and items at once.

    Scores of -inf are equal and below all others: the lowest number stands for them, and what is infinite is put in.
    """
    u, size = r.u, r.u.shape[1]
    groups = None if r.leads is None else _tied_groups(r, r.leads.reshape(-1) == 0)
    lowest = torch.finfo(u.dtype).min
    if r.valid is not None:
        u = u.masked_fill(~r.valid, -torch.inf)
    undefined = ~(u < torch.inf).all(-1)
    u = u.masked_fill(undefined[:, None], 0)
    hopeless = u == -torch.inf
    rivals = None
    if r.valid is not None:
        hopeless &= r.valid
    if bool(hopeless.any()):
        # Whether an item that can be chosen stands at a place or below it.
        rivals = (u > -torch.inf).flip(-1).cumsum(-1).flip(-1) > 0
        rivals = torch.cat([rivals, torch.zeros_like(rivals[:, :1])], 1)
        u = u.masked_fill(hopeless, lowest)
    top = u.flip(-1).cummax(-1).values.flip(-1).clamp_(min=lowest)
    s = (u - top).exp_()
    for step in _doublings(size):
        s[:, :-step] += s[:, step:] * (top[:, step:] - top[:, :-step]).exp_()

    next_top = torch.cat([top[:, 1:], torch.full_like(top[:, :1], lowest)], 1)
    next_s = torch.cat([s[:, 1:], torch.zeros_like(s[:, :1])], 1)
    last = next_s == 0  # nothing below
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
        part, own, passed = _charge(
            groups,
            r.rule.ties,
            u.view(-1)[groups.items] - first_top[groups.group],
            s.view(-1)[groups.first],
            rest,
            u.view(-1)[groups.items] - top.view(-1)[after][groups.group] - s.view(-1)[after].log()[groups.group],
        )
        loss.view(-1)[groups.items] = part
    if rivals is not None:
        loss = _with_lost(loss, hopeless, rivals, weight, groups, in_any_order=r.rule.ties == "exact")
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
        passes = ~groups.bottom
        above.view(-1)[after[passes]] = (passed / s.view(-1)[after])[passes]
    for step in _doublings(size):
        above[:, step:] += above[:, :-step] * (top[:, step:] - top[:, :-step]).exp_()
    gradient.addcmul_((u - top).exp_(), above)
    if bool(undefined.any()):
        gradient[undefined] = torch.nan
        if r.valid is not None:
            gradient.masked_fill_(~r.valid, 0)
    return loss, gradient


def _with_lost(
    loss: Tensor,  # (R, K)
    hopeless: Tensor,  # (R, K) true where the score is -inf
    rivals: Tensor,  # (R, K + 1)
    weight: Tensor | None,
    groups: Groups | None,
    in_any_order: bool,
) -> Tensor:
    """Return the items' parts of the loss, infinite where one of -inf is charged against one that can be chosen."""
    size, seen = loss.shape[1], rivals[:, 1:].clone()
    charge = loss.new_ones(loss.shape) if weight is None else weight.expand_as(loss).clone()
    if groups is not None:  # whose items compete with each other too, but not over their order under "exact"
        place = groups.first + groups.first // size  # in rows of K + 1
        place = place + groups.size if in_any_order else place
        seen.view(-1)[groups.items] = rivals.reshape(-1)[place][groups.group]
        charge.view(-1)[groups.items] = groups.weight[groups.group].to(loss.dtype)
    return torch.where(hopeless & seen & (charge != 0), charge * torch.inf, loss)


def _doublings(size: int) -> list[int]:
    """Return 1, 2, 4, ... below `size`."""
    return [1 << i for i in range((size - 1).bit_length())]


class Groups(NamedTuple):
    """The groups of two or more tied items in a block of rankings: J groups with P items in all."""

    items: Tensor  # (P,) places of the items, group after group
    group: Tensor  # (P,) group of each of them
    first: Tensor  # (J,) place of a group's first item
    last: Tensor  # (J,) and of its last
    size: Tensor  # (J,)
    bottom: Tensor  # (J,) true where no item stands below the group
    weight: Tensor  # (J,) mean position weight; 0 where the group is not charged

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` (P,) over each group."""
        return values.new_zeros(len(self.size)).index_add_(0, self.group, values)


def _tied_groups(r: Rankings, follows: Tensor) -> Groups:
    """Collect the groups of two or more items and what each is charged; `follows` marks items tied with the last."""
    member = follows.clone()
    member[:-1] |= follows[1:]
    items = member.nonzero()[:, 0]
    starts = ~follows[items]
    group = starts.cumsum(0) - 1
    first = items[starts]
    count = torch.bincount(group, minlength=len(first))
    last = first + count - 1
    groups = Groups(items, group, first, last, count, r.bottom(last), torch.ones_like(first, dtype=r.u.dtype))
    mean = groups.weight
    if r.weight is not None:
        mean = groups.total(r.weight.expand_as(r.u).reshape(-1)[items]) / count
    return groups._replace(weight=r.charge_of_groups(mean, first, last))


def _charge(
    groups: Groups,
    ties: str,
    depth: Tensor,  # (P,) u_i - a, with a number a for each group
    total: Tensor,  # (J,) sum of exp(u - a) over the group and all below
    rest: Tensor,  # (J,) sum of exp(u - a) over all below
    log_odds: Tensor,  # (P,) u_i minus the logarithm of the sum of exp(u) over all below the group
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the items' parts of the loss (P,), their gradients from their own group (P,), and W b R (J,).

    The last is what the items below share: each gets exp(u_i) / R of it.
    """
    dtype, g, weight = depth.dtype, groups.group, groups.weight
    charged = weight != 0
    if ties == "exact":
        kept = charged[g]
        number = charged.cumsum(0) - 1
        group_loss, phi_kept = any_order(log_odds[kept], number[g[kept]], groups.size[charged], dtype)
        phi = torch.zeros_like(depth)
        phi[kept] = phi_kept.to(dtype)
        loss, own, passed = torch.zeros_like(depth), -phi, groups.total(phi)
        loss[(groups.size.cumsum(0) - groups.size)[charged]] = group_loss.to(dtype)
    else:
        e = depth.exp()
        if ties == "efron":
            share = 1 - (groups.items - groups.first[g]).to(dtype) / groups.size[g]
            denominator = rest[g] + share * groups.total(e)[g]
            inside, b = groups.total(share / denominator), groups.total(1 / denominator)
            loss = denominator.log() - depth
        else:
            inside = b = groups.size.to(dtype) / total
            loss = total.log()[g] - depth
        own, passed = e * inside[g] - 1, b * rest
    # Selected, not multiplied: what is not charged may be infinite.
    passed = torch.where(charged, weight * passed, 0)
    charged, weight = charged[g], weight[g]
    return torch.where(charged, weight * loss, 0), torch.where(charged, weight * own, 0), passed
