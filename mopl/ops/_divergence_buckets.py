"""The passes of `linear_topk_jsd`: k entries of the vocabulary, each by itself, and all others as one bucket.

Of a row with ids i_1 .. i_k and logits u, `rest` = log Σ_{v no id} e^{u_v} is a sum over the others alone, never
1 - Σ p, so the others' mass keeps its digits however small it is. The k + 1 numbers (u_{i_1}, .., u_{i_k}, rest) are
then the logits of a small vocabulary, and the divergence from the teacher's on it is what `_divergence_blocks.settle`
computes, in float64. With G its derivative in these logits:

    d/du_v = G_j where v = i_j,      G_rest e^{u_v - rest} elsewhere

One pass over the vocabulary gives both, in blocks of rows whose logits are held; a trained head takes a second one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mopl._arguments import wide_dtype
from mopl.ops._divergence_blocks import (
    Head,
    Need,
    add_product,
    lift,
    logit_gradient,
    operand_of,
    pull_back,
    row_blocks,
    settle,
)
from mopl.ops.linear_logprob.shard import VocabularyShard


class Found(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    top: Tensor  # (M,), the largest logit outside of the ids, in the compute dtype
    total: Tensor  # (M,), Σ e^(u - top) over the others, wide
    gradient: Tensor  # (M, k or k + 1), G of the ids and of the rest, wide


def teacher_buckets(logprob: Tensor, counts: Tensor, tail: bool) -> tuple[Tensor, Tensor]:
    """Return the teacher's log-probabilities (M, k or k + 1), wide, and the log of their sum over the ids (M,)."""
    logprob = logprob.to(wide_dtype(logprob.device)).masked_fill(~counts, -torch.inf)
    known = logprob.logsumexp(-1)
    if not tail:
        return logprob, known
    below = known.clamp(max=0)  # rounding of what was cached can make a sum of 1 larger
    rest = torch.where(below > -0.6931, (-torch.expm1(below)).log(), torch.log1p(-below.exp()))
    return torch.cat([logprob, rest[:, None]], -1), known


def _place(column: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return which ids lie in a tile, and where in it; those that do not are at 0."""
    own = (column >= columns.start) & (column < columns.stop)
    return own, torch.where(own, column - columns.start, 0)


def _set(u: Tensor, own: Tensor, at: Tensor, value: Tensor | float, lower: bool) -> None:
    """Write `value`, which lies below (or above) what is there, into a tile where ids are; in place, without a wait."""
    nothing = torch.inf if lower else -torch.inf
    source = torch.where(own, value, nothing).to(u.dtype)
    u.scatter_reduce_(1, at, source, "amin" if lower else "amax")


def _logit_gradient(u: Tensor, columns: slice, column: Tensor, found: Found, factor: Tensor, tail: bool) -> Tensor:
    """Return factor * dL/du of a tile of logits, which it may destroy."""
    own, at = _place(column, columns)
    k, dtype = column.shape[1], u.dtype
    if tail:
        total = found.total
        of_rest = torch.where(total == 0, 0, factor * found.gradient[:, k] / torch.where(total == 0, 1, total))
        _set(u, own, at, -torch.inf, lower=True)
        g = u.sub_(lift(found.top)[:, None]).exp_().mul_(of_rest.to(dtype)[:, None])
    else:
        g = torch.zeros_like(u)
    return g.scatter_add_(1, at, torch.where(own, found.gradient[:, :k] * factor[:, None], 0).to(dtype))


def forward(
    policy: Head,
    column: Tensor,  # (M, k) int64, ids; negative: none
    teacher: Tensor,  # (M, k or k + 1), log-probabilities of the buckets, wide
    beta: float,
    tail: bool,
    direction: bool,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Found, Tensor]:
    """Return the divergence (M,) in the compute dtype, `Found`, and d divergence / d hidden (M, H) or empty."""
    like, dtype = policy.temperature, policy.temperature.dtype
    wide, device = wide_dtype(like.device), like.device
    value = torch.zeros(like.shape, dtype=dtype, device=device)
    kept = Found(
        torch.zeros(like.shape, dtype=dtype, device=device),
        torch.zeros(like.shape, dtype=wide, device=device),
        torch.zeros(teacher.shape, dtype=wide, device=device),
    )
    directions = torch.zeros(policy.rows.shape if direction else (0,), dtype=dtype, device=device)
    local = column if shard is None else torch.where(column < 0, -1, shard.local(column))
    for rows, cuts in row_blocks(policy, 1, shard):
        ids, chosen = local[rows], torch.zeros(column[rows].shape, dtype=dtype, device=device)
        tiles = [policy.logits(rows, columns, policy.weight[columns]) for columns in cuts]
        for columns, u in zip(cuts, tiles, strict=True):
            own, at = _place(ids, columns)
            chosen = torch.where(own, u.gather(1, at), chosen)
            _set(u, own, at, -torch.inf, lower=True)
        top = torch.stack([u.amax(-1) for u in tiles]).amax(0)
        if shard is not None:
            shard.sum(chosen)
            top = shard.max(top)
        total = torch.zeros(top.shape, dtype=wide, device=device)
        for u in tiles:
            total += (u - lift(top)[:, None]).exp_().sum(-1, dtype=wide)
        if shard is not None:
            shard.sum(total)
        chosen = chosen.to(wide).masked_fill(column[rows] < 0, -torch.inf)
        rest = lift(top).to(wide) + total.log()
        buckets = torch.cat([chosen, rest[:, None]], -1) if tail else chosen
        pair = [buckets.clone(), teacher[rows].clone()]
        own_value, sums = settle([pair], beta, keep=True)
        gradient = logit_gradient(*pair, sums, beta, torch.ones_like(total))  # type: ignore[arg-type]
        value[rows] = own_value.to(dtype)
        found = Found(top, total, gradient)
        for part, values in zip(kept, found, strict=True):
            part[rows] = values
        if not direction:
            continue
        for columns, u in zip(cuts, tiles, strict=True):
            own, at = _place(ids, columns)
            _set(u, own, at, buckets[:, : ids.shape[1]], lower=False)
            bent = policy.bent(u, rows)
            g = _logit_gradient(u, columns, ids, found, policy.slope(rows).to(wide), tail)
            g = g if bent is None else g.mul_(bent)
            add_product(g, operand_of(policy.weight[columns], dtype), directions[rows])
    if direction and shard is not None:
        shard.sum(directions)
    return value, kept, directions


def backward(
    grad: Tensor,  # (M,)
    policy: Head,
    column: Tensor,
    found: Found,
    tail: bool,
    need: Need,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the policy's hidden states, weight and bias; one that is not needed is empty (0,)."""
    factor = grad.to(found.total.dtype) * policy.slope()
    local = column if shard is None else torch.where(column < 0, -1, shard.local(column))

    def of_logits(u: Tensor, rows: slice, columns: slice) -> Tensor:
        own = Found(*(part[rows] for part in found))
        return _logit_gradient(u, columns, local[rows], own, factor[rows], tail)

    return pull_back(policy, of_logits, need, shard)
