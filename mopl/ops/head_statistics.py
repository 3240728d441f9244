"""Figures of the rows of a head that are logged and pass no gradient, from hidden states, without the logits [N, V].

With the logits u of a row, after logit scale, softcap and temperature, and p = softmax(u):

    log_sum_sq_probs   log Σ_v p_v²
    mean_logits        Σ_v u_v / V
    is_top1            1 if the target is the likeliest token, and the first of those that are equally likely; else 0

Each is had as cheaply as it can be. A mean without a softcap needs no product with the head: it is the product with the
mean of the head's rows. A target with p > 1/2 is the likeliest; only for the other rows is the product formed. What
needs it is computed for the rows that count in one pass over the vocabulary, tile by tile. That Σ p² is at least 1/V
keeps it far from underflow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mopl._arguments import compute_dtype, wide_dtype
from mopl.ops._divergence_blocks import COLUMNS, ROWS, Head
from mopl.ops._logprob import check_operands, check_scalar, merge_targets, per_row
from mopl.ops._rows import slices
from mopl.ops.linear_logprob.shard import VocabularyShard, shard_or_whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NAMES = ("log_sum_sq_probs", "mean_logits", "is_top1")

# Above log(1/2) by more than the rounding of a log-probability: such a token is likelier than all others together.
CERTAIN = math.log(0.5) + 1e-3


@torch.no_grad()
def head_statistics(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (...)
    log_probs: Tensor,  # (...)
    logsumexp: Tensor,  # (...)
    *,
    names: tuple[str, ...],
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # broadcastable to (...)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Return figures of each row, without a gradient.

    Args:
        hidden: (..., H), hidden states, any floating dtype.
        weight: (V, H), the head's weight.
        target: (...), integer token ids.
        log_probs: (...), what `linear_logprob` gives for these arguments.
        logsumexp: (...), the same.
        names: which of `NAMES` are wanted.
        bias: (V,) or None.
        temperature: divides the logits; a number or a tensor that broadcasts to the rows.
        softcap: logits become softcap * tanh(logits / softcap), after `logit_scale` and before `temperature`.
        logit_scale: multiplies the logits, the bias included.
        ignore_index: rows with this target do not count and are 0.
        group: process group over which the vocabulary is sharded, as `linear_logprob` takes it.

    Returns:
        The names with tensors (...), float32, float64 if an operand is.

    Raises:
        TypeError: wrong dtypes, or a sharded (DTensor) head without `group`.
        ValueError: an unknown name, or shapes or devices that do not fit.
    """
    if unknown := sorted(set(names) - set(NAMES)):
        raise ValueError(f"names has {', '.join(map(repr, unknown))} but only {', '.join(NAMES)} are known")
    check_operands(hidden, weight, bias)
    shard, weight, bias = shard_or_whole(hidden, weight, bias, group)
    vocabulary = len(weight) if shard is None else shard.vocabulary
    lead = hidden.shape[:-1]
    for value, name in ((target, "target"), (log_probs, "log_probs"), (logsumexp, "logsumexp")):
        if value.shape != lead:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} but hidden has rows {tuple(lead)}; they must agree"
            )
    dtype = compute_dtype(hidden, weight)
    flat = merge_targets(target, None, ignore_index, vocabulary).reshape(-1)
    like = torch.empty((), dtype=dtype, device=hidden.device)
    divisor = per_row(temperature, "temperature", lead, like, lambda: flat >= 0)
    cap, scale = check_scalar(softcap, "softcap"), check_scalar(logit_scale, "logit_scale")
    wide = logsumexp.reshape(-1)

    def head(rows: Tensor) -> Head:
        return Head(hidden.reshape(-1, hidden.shape[-1])[rows], weight, bias, divisor[rows], cap, scale)

    found = {name: torch.zeros(len(flat), dtype=dtype, device=hidden.device) for name in names}
    counted = (flat >= 0).nonzero()[:, 0]
    in_pass = [name for name in names if name != "mean_logits" or cap]
    if "mean_logits" in names and not cap:
        found["mean_logits"][counted] = _mean_without_product(head(counted), shard)
    if in_pass == ["is_top1"]:
        likeliest = (log_probs.reshape(-1) > CERTAIN)[counted]
        found["is_top1"][counted] = likeliest.to(dtype)
        counted = counted[~likeliest]
    if in_pass and len(counted):
        for name, value in _one_pass(head(counted), flat[counted], wide[counted], in_pass, shard).items():
            found[name][counted] = value
    return {name: value.view(lead) for name, value in found.items()}


def _mean_without_product(head: Head, shard: VocabularyShard | None) -> Tensor:
    """Return the mean logit of each row (M,) of a head without a softcap: logits are linear in the head's rows."""
    dtype = head.temperature.dtype

    def mean_of(values: Tensor) -> Tensor:
        if shard is None:
            return values.mean(0, dtype=dtype)
        return shard.sum(values.sum(0, dtype=dtype)) / shard.vocabulary

    mean = head.rows.to(dtype) @ mean_of(head.weight)
    if head.bias is not None:
        mean = mean + mean_of(head.bias)
    return mean * head.logit_scale / head.temperature


def _one_pass(
    head: Head, target: Tensor, logsumexp: Tensor, names: list[str], shard: VocabularyShard | None
) -> dict[str, Tensor]:
    """Return what needs the logits of all rows (M,), forming each tile of them once."""
    dtype, device, vocabulary = head.temperature.dtype, target.device, head.weight.shape[0]
    if shard is not None:
        target = target - shard.start  # outside of what is here, on either side, for targets of other ranks
    before, behind, own = (torch.full(target.shape, -torch.inf, dtype=dtype, device=device) for _ in range(3))
    total, squares = (torch.zeros(target.shape, dtype=wide_dtype(device), device=device) for _ in range(2))
    kind = device.type if device.type in COLUMNS else "else"
    for columns in slices(0, vocabulary, COLUMNS[kind]):
        tile = head.weight[columns]
        for rows in slices(0, len(target), ROWS[kind]):
            u = head.logits(rows, columns, tile)
            if "is_top1" in names:
                column = target[rows, None] - columns.start
                place = torch.arange(u.shape[1], device=device)
                before[rows] = before[rows].maximum(u.masked_fill(place >= column, -torch.inf).amax(-1))
                behind[rows] = behind[rows].maximum(u.masked_fill(place <= column, -torch.inf).amax(-1))
                own[rows] = own[rows].maximum(u.masked_fill(place != column, -torch.inf).amax(-1))
            if "mean_logits" in names:
                total[rows] += u.sum(-1)
            if "log_sum_sq_probs" in names:
                squares[rows] += u.sub_(logsumexp[rows, None]).mul_(2).exp_().sum(-1)
    everything: int | Tensor = vocabulary
    if shard is not None:
        everything, total, squares = shard.vocabulary, shard.sum(total), shard.sum(squares)
        before, behind, own = shard.max(before), shard.max(behind), shard.max(own)
    values = {
        "log_sum_sq_probs": lambda: squares.log(),
        "mean_logits": lambda: total / everything,
        "is_top1": lambda: (own > before) & (own >= behind),
    }
    return {name: values[name]().to(dtype) for name in names}
