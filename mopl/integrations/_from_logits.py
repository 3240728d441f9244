"""From logits: entropies, and log-probabilities where the vocabulary is sharded over a process group.

`gathered_logprob` gives each rank log p and the logsumexp over its own shard. With L_r the logsumexp of rank r and L
that of all, the target's rank o has

    log p = log p_o + (L_o - L),        L_r - L = -log(1 + exp(log Σ_{s ≠ r} exp L_s - L_r))

which keeps every digit of a confident row. For an upstream gradient g, which is the same on every rank,

    ∂/∂ log p_o = g,     ∂/∂ L_r = g (1[r = o] - exp(L_r - L))

so that only vectors travel: the logsumexps are gathered and the results summed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mopl._arguments import shape_of
from mopl.ops import gathered_logprob

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def entropy_of(logits: Tensor) -> Tensor:  # (..., V) -> (...)
    """Return the entropy of softmax(logits) over the last dimension, in nats, in the compute dtype."""
    if not isinstance(logits, Tensor) or logits.ndim < 1 or logits.shape[-1] == 0:
        got = shape_of(logits) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits are {got} but must be (..., V) with at least one token")
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return gathered_logprob(logits, any_token, return_entropy=True)[1]


def sharded_logprob(
    logits: Tensor,  # (..., V / ranks)
    target: Tensor,  # (...)
    group: ProcessGroup | None,
    ignore_index: int = -100,
) -> Tensor:  # (...)
    """Return log p(target) over the whole vocabulary, of which every rank of `group` has an equal part.

    Args:
        logits: this rank's part, in the order of the ranks.
        target: token ids of the whole vocabulary, the same on every rank.
        group: the ranks, or None for a vocabulary that is whole.
        ignore_index: targets with this value count as 0, without gradient.

    Raises:
        ValueError: On a CPU, if a target is outside the vocabulary; on a GPU it gives NaN.
    """
    if group is None or dist.get_world_size(group) == 1:
        return gathered_logprob(logits, target, ignore_index=ignore_index)
    size, rank = logits.shape[-1], dist.get_rank(group)
    vocabulary = size * dist.get_world_size(group)
    counts = target != ignore_index
    outside = counts & ((target < 0) | (target >= vocabulary))
    if not logits.is_cuda and bool(outside.any()):
        raise ValueError(f"target holds an id outside the vocabulary of {vocabulary}; give what is no token -100")
    own = target - rank * size
    here = counts & (own >= 0) & (own < size)
    # Rows whose target is elsewhere count for their logsumexp: any column will do.
    logprob, logsumexp = gathered_logprob(logits, own.clamp(0, size - 1), mask=counts, return_logsumexp=True)
    found = torch.where(counts, _Combined.apply(logprob, logsumexp, here, group), 0)
    return found.masked_fill(outside, torch.nan)


class _Combined(torch.autograd.Function):
    """Log p over all shards from log p and logsumexp over each: see the top of the file."""

    @staticmethod
    def forward(ctx: Any, logprob: Tensor, logsumexp: Tensor, here: Tensor, group: ProcessGroup) -> Tensor:
        parts = [torch.empty_like(logsumexp) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, logsumexp.contiguous(), group=group)
        others = torch.stack([part for rank, part in enumerate(parts) if rank != dist.get_rank(group)]).logsumexp(0)
        log_share = -torch.logaddexp(others - logsumexp, torch.zeros_like(others))
        ctx.save_for_backward(here, log_share)
        total = torch.where(here, logprob + log_share, 0)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        here, log_share = ctx.saved_tensors
        upstream = gradients[0]
        by_logsumexp = torch.where(here, -torch.expm1(log_share), -log_share.exp())
        return torch.where(here, upstream, 0), upstream * by_logsumexp, None, None
