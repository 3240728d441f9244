"""The passes of `linear_kl`, `linear_jsd` and `linear_topk_jsd`, block by block, in plain PyTorch on any device.

M rows, H and H' wide hidden states, V vocabulary entries; logits u of the policy and r of the other model (a reference,
a teacher) after logit scale, softcap and temperature. Rows are (M,) vectors; `wide` is float64. With the largest
logits t_p and t_q of a row, a = u - t_p, b = r - t_q and `beta`, the other model's share of the mixture m:

    S_p = Σ e^a,   S_q = Σ e^b,   gap = log S_q - log S_p,   x = log(p/q) = a - b + gap,   m = beta q + (1 - beta) p

    beta = 1    KL(p ‖ q) = D/S_p + gap,   D = Σ e^a (a - b)     d/du_v = p_v (a - b - D/S_p)
    beta = 0    KL(q ‖ p) = D/S_q - gap,   D = Σ e^b (b - a)     d/du_v = p_v - q_v
    between     beta K_q + (1 - beta) K_p                        d/du_v = (1 - beta) p_v (log(p_v/m_v) - K_p)
                with K_p = Σ p log(p/m),   K_q = Σ q log(q/m)

**Digits.** Neither t_p nor t_q stands in a result, so nothing large cancels: a and b are small where the probability is
not, and equal policies have a divergence of exactly 0. The logarithms of the ratios to m come from x alone, by
log1p(share * expm1(-|x|)), see `log_ratios`: they are small where the policies agree, and their rounding with them. The
exponentials are rounded in float32, so a KL is right to 1e-7 nats or to its own seven digits, and what lies between to
1e-7 times the largest |log(p/m)| that matters, which between near policies is far below 1e-7 nats.

**Forward** (`forward`): the logits of a block of rows over the whole vocabulary are held, at most `HELD` bytes for both
models; that is what lets one product each serve the normalisers, the mixture that needs them, and the direction
d/d hidden, a third product, where that is all that will be asked for. **Backward** (`backward`), for a trained head:
tiles of rows and columns again, from the row vectors that the forward pass left.

On a GPU operands of 16 bit are multiplied as they are, with float32 sums. The gradient of the logits, which is float32,
is then the sum of two bf16 numbers: with one, rows of bf16 gradients would have up to 2.7 times the error that 32-bit
products leave them, with two they have the same (computed, tests/ops/test_linear_kl.py). For float16 it stays float32,
and the products with it as well: its entries would flush to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mopl._arguments import wide_dtype
from mopl.ops._products import product
from mopl.ops._rows import slices, times
from mopl.ops.linear_logprob.shard import VocabularyShard

# Tiles: on a CPU they stay near the caches. On a GPU they take 256 MiB in float32: one that its L2 cache holds, of 32,
# would be multiplied in 90 µs with H = 4096, while the host needs 200 µs for its 40 launches (computed for an H200).
COLUMNS = {"cpu": 2048, "else": 8192}
ROWS = {"cpu": 512, "else": 8192}
HELD = {"cpu": 2**27, "else": 2**30}


class Head(NamedTuple):
    """Rows and a head that make logits: of the policy, or of the other model."""

    rows: Tensor  # (M, H), in their own dtype
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    temperature: Tensor  # (M,), in the compute dtype
    softcap: float  # 0.0: none
    logit_scale: float

    def logits(self, rows: slice, columns: slice, tile: Tensor) -> Tensor:
        """Return u (rows, columns); `tile` are those rows of the weight."""
        dtype = self.temperature.dtype
        u = _product(self.rows[rows], tile.t(), dtype)
        if self.bias is not None:
            u += self.bias[columns].to(dtype)
        if self.softcap:
            u = torch.tanh(u.mul_(self.logit_scale / self.softcap)).mul_(self.softcap)
        elif self.logit_scale != 1.0:
            u *= self.logit_scale
        return u.div_(self.temperature[rows, None])

    def bent(self, u: Tensor, rows: slice) -> Tensor | None:
        """Return 1 - tanh² of a softcap at logits u, None without one."""
        if not self.softcap:
            return None
        tanh = u * (self.temperature[rows, None] / self.softcap)
        return (1 - tanh) * (1 + tanh)

    def slope(self, rows: slice = slice(None)) -> Tensor:
        """Return du/da (rows,) but for the softcap."""
        return self.logit_scale / self.temperature[rows]


class Sums(NamedTuple):
    """Row vectors (M,) that the forward pass leaves for the backward pass."""

    top: Tensor  # t_p
    total: Tensor  # S_p
    other_top: Tensor  # t_q
    other_total: Tensor  # S_q
    mean: Tensor  # D/S_p, D/S_q or K_p


class Need(NamedTuple):
    """Which gradients a backward pass has to find."""

    hidden: bool
    weight: bool
    bias: bool


def _slices(size: int, steps: dict[str, int], device: torch.device) -> list[slice]:
    return slices(0, size, steps.get(device.type, steps["else"]))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in the compute dtype, which float64 elsewhere may have raised."""
    return product(a.to(dtype), b.to(dtype)) if dtype == torch.float64 else product(a, b)


def _narrow(operand: Tensor, dtype: torch.dtype) -> bool:
    """Say whether an operand stays bf16 when it is multiplied by the gradient of the logits."""
    return operand.is_cuda and operand.dtype == torch.bfloat16 and dtype == torch.float32


def operand_of(operand: Tensor, dtype: torch.dtype) -> Tensor:
    return operand if _narrow(operand, dtype) else operand.to(dtype)


def _parts(value: Tensor, operand: Tensor) -> tuple[Tensor, ...]:
    """Return `value` as what `operand` is multiplied by: itself, or two bf16 tensors that it is the sum of."""
    if operand.dtype == value.dtype:
        return (value,)
    high = value.to(operand.dtype)
    return high, (value - high).to(operand.dtype)


def add_product(value: Tensor, operand: Tensor, out: Tensor) -> None:
    """Add value @ operand to `out`, the operand being what `operand_of` gives."""
    for part in _parts(value, operand):
        product(part, operand, out, add=True)


def lift(top: Tensor) -> Tensor:
    """Return what to subtract from logits: their maximum, or 0 where all are -inf."""
    return torch.where(top == -torch.inf, 0, top)


def log_ratios(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log(p/m) and log(q/m) at x = log(p/q), with m = beta q + (1 - beta) p and beta between 0 and 1.

    log(m / the larger of p and q) = log1p(share * (e^-|x| - 1)) with the share of the smaller one in m.
    """
    if beta < 0.25:  # then what is left of 1 may be small, and log(p/m) is of the size of beta: see below
        of_q, of_p = _uneven_log_ratios(-x, beta)
        return of_p, of_q
    if beta > 0.75:
        return _uneven_log_ratios(x, 1 - beta)
    drop = torch.expm1(-x.abs())
    below = torch.where(x >= 0, beta * drop, (1 - beta) * drop).log1p_()
    return x.clamp(max=0).sub_(below), x.clamp(min=0).neg_().sub_(below)


def _uneven_log_ratios(y: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return log(a/m) and log(b/m) at y = log(a/b), with m = share a + (1 - share) b and a share below a half.

    Each is right to its own digits, down to shares whose divergence, of the size of the share, is to be divided by it.
    """
    limit = 0.9 * math.log(torch.finfo(y.dtype).max)  # beyond, b is too small to matter
    of_b = torch.expm1(y.clamp(max=limit)).mul_(share).log1p_().neg_()
    drop = torch.expm1(-y).mul_(1 - share)
    whole = torch.exp(-y).mul_(1 - share).add_(share)  # 1 + drop, which would round where it is small
    of_a = torch.where(drop > -0.5, drop.log1p(), whole.log()).neg_()
    return torch.where(y > 0, of_a, y + of_b), of_b


def _normalised(a: Tensor, b: Tensor, sums: Sums, rows: slice = slice(None)) -> Tensor:
    gap = sums.other_total[rows].log() - sums.total[rows].log()
    return (a - b).add_(gap.to(a.dtype)[:, None])


def logit_gradient(a: Tensor, b: Tensor, sums: Sums, beta: float, factor: Tensor, rows: slice = slice(None)) -> Tensor:
    """Return factor * d/du (rows, columns) of the divergence, at a = u - t_p and b = r - t_q, which it may destroy."""
    dtype = a.dtype
    total, other_total, mean = (part[rows] for part in (sums.total, sums.other_total, sums.mean))
    scale = factor / total.to(dtype)
    if beta == 0.0:
        return a.exp_().mul_(scale[:, None]).sub_(b.exp_().mul_((factor / other_total.to(dtype))[:, None]))
    p = a.exp()
    if beta == 1.0:
        ratio = a.sub_(b)
    else:
        ratio, scale = log_ratios(_normalised(a, b, sums, rows), beta)[0], scale * (1 - beta)
    return times(p, ratio.sub_(mean.to(dtype)[:, None])).mul_(scale[:, None])


Reduce = Callable[[Tensor], Tensor]


def _same(values: Tensor) -> Tensor:
    return values


def settle(
    tiles: list[list[Tensor]], beta: float, keep: bool, shard: VocabularyShard | None = None
) -> tuple[Tensor, Sums]:
    """Return the divergence (R,), wide, and its `Sums`; the logits [u, r] of each tile become a and b if they are kept.

    The tiles are (R, columns) and make up the vocabulary, or this rank's shard of it.
    """
    like = tiles[0][0]
    wide = wide_dtype(like.device)
    largest: Reduce = _same if shard is None else shard.max
    summed: Reduce = _same if shard is None else shard.sum
    tops = largest(torch.stack([torch.stack([t[k].amax(-1) for t in tiles]).amax(0) for k in (0, 1)]))
    for tile in tiles:
        for logits, top in zip(tile, tops, strict=True):
            logits.sub_(lift(top)[:, None])
    found = like.new_zeros((3, len(like)), dtype=wide)
    ends = beta in (0.0, 1.0)
    for a, b in tiles:
        p, q = a.exp(), b.exp()
        found[0] += p.sum(-1, dtype=wide)
        found[1] += q.sum(-1, dtype=wide)
        if ends:
            first, second = (a, b) if beta else (b, a)
            difference = first - second if keep else first.sub_(second)
            found[2] += times(p if beta else q, difference).sum(-1, dtype=wide)
    total, other_total, moment = summed(found)
    sums = Sums(tops[0], total, tops[1], other_total, moment)
    if ends:
        gap = other_total.log() - total.log()
        mean = moment / (total if beta else other_total)
        return (mean + gap if beta else mean - gap).clamp(min=0), sums._replace(mean=mean)
    found = like.new_zeros((2, len(like)), dtype=wide)
    for a, b in tiles:
        ratios = log_ratios(_normalised(a, b, sums), beta)
        for k, (logits, ratio) in enumerate(zip((a, b), ratios, strict=True)):
            found[k] += times(logits.exp(), ratio).sum(-1, dtype=wide)
    of_policy, of_other = summed(found)
    mean = of_policy / total
    return (beta * (of_other / other_total) + (1 - beta) * mean).clamp(min=0), sums._replace(mean=mean)


def row_blocks(head: Head, models: int, shard: VocabularyShard | None) -> list[tuple[slice, list[slice]]]:
    """Return blocks of rows whose logits of so many models may be held, each with its tiles of columns.

    Ranks of a sharded vocabulary make the same blocks, since they meet after each.
    """
    device, vocabulary = head.rows.device, len(head.weight)
    most = vocabulary if shard is None else shard.largest()
    held = HELD.get(device.type, HELD["else"]) // (models * most * head.temperature.element_size())
    many = min(max(held, 1), ROWS.get(device.type, ROWS["else"]), max(len(head.rows), 1))
    widest = COLUMNS.get(device.type, COLUMNS["else"])
    area = widest * ROWS.get(device.type, ROWS["else"])
    columns = slices(0, vocabulary, max(widest, area // many))
    return [(rows, columns) for rows in slices(0, len(head.rows), many)]


def forward(
    policy: Head, other: Head, beta: float, direction: bool, shard: VocabularyShard | None = None
) -> tuple[Tensor, Sums, Tensor]:
    """Return the divergence of each row (M,) in the compute dtype, `Sums`, and d divergence / d hidden (M, H) or empty.

    Tops and the direction are in the compute dtype, the other sums in the wide one.
    """
    like, dtype = policy.temperature, policy.temperature.dtype
    wide = wide_dtype(like.device)
    value = torch.zeros_like(like, memory_format=torch.contiguous_format)
    dtypes = (dtype, wide, dtype, wide, wide)
    sums = Sums(*(torch.zeros(like.shape, dtype=each, device=like.device) for each in dtypes))
    directions = torch.zeros(policy.rows.shape if direction else (0,), dtype=dtype, device=like.device)
    for rows, cuts in row_blocks(policy, 2, shard):
        tiles = [[head.logits(rows, columns, head.weight[columns]) for head in (policy, other)] for columns in cuts]
        found, own = settle(tiles, beta, direction, shard)
        value[rows] = found.to(dtype)
        for part, values in zip(sums, own, strict=True):
            part[rows] = values
        if not direction:
            continue
        for columns, (a, b) in zip(cuts, tiles, strict=True):
            bent = policy.bent(a + lift(own.top)[:, None], rows) if policy.softcap else None
            g = logit_gradient(a, b, own, beta, policy.slope(rows))
            g = g if bent is None else g.mul_(bent)
            add_product(g, operand_of(policy.weight[columns], dtype), directions[rows])
    if direction and shard is not None:
        shard.sum(directions)
    return value, sums, directions


def backward(
    grad: Tensor,  # (M,)
    policy: Head,
    other: Head,
    sums: Sums,
    beta: float,
    need: Need,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the policy's hidden states, weight and bias; one that is not needed is empty (0,)."""
    factor = grad.to(policy.temperature.dtype) * policy.slope()

    def of_logits(u: Tensor, rows: slice, columns: slice) -> Tensor:
        a = u.sub_(lift(sums.top[rows])[:, None])
        r = other.logits(rows, columns, other.weight[columns])
        b = r.sub_(lift(sums.other_top[rows])[:, None])
        return logit_gradient(a, b, sums, beta, factor[rows], rows)

    return pull_back(policy, of_logits, need, shard)


def pull_back(
    policy: Head,
    of_logits: Callable[[Tensor, slice, slice], Tensor],
    need: Need,
    shard: VocabularyShard | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of hidden states, weight and bias; `of_logits` gives a tile's at u, but for the softcap's bend.

    Sums are made in the compute dtype and rounded once to the dtype of what they belong to. No tile of the weight's
    gradient is held in the compute dtype but the one that is being made.
    """
    like, weight, bias = policy.temperature, policy.weight, policy.bias
    dtype, device = like.dtype, like.device
    grad_hidden = torch.zeros(policy.rows.shape if need.hidden else (0,), dtype=dtype, device=device)
    grad_weight = weight.new_empty(weight.shape) if need.weight else like.new_empty(0)
    grad_bias = bias.new_empty(bias.shape) if need.bias and bias is not None else like.new_empty(0)
    for columns in _slices(len(weight), COLUMNS, device):
        tile = weight[columns]
        operand = operand_of(tile, dtype)
        of_tile = torch.zeros(tile.shape if need.weight else 0, dtype=dtype, device=device)
        of_bias = torch.zeros(len(tile), dtype=dtype, device=device)
        for rows in _slices(len(like), ROWS, device):
            u = policy.logits(rows, columns, tile)
            bent = policy.bent(u, rows)
            g = of_logits(u, rows, columns)
            g = g if bent is None else g.mul_(bent)
            if need.hidden:
                add_product(g, operand, grad_hidden[rows])
            if need.weight:
                add_product(g.t(), operand_of(policy.rows[rows], dtype), of_tile)
            if need.bias:
                of_bias += g.sum(0)
        if need.weight:
            grad_weight[columns] = of_tile.to(weight.dtype)
        if need.bias and bias is not None:
            grad_bias[columns] = of_bias.to(bias.dtype)
    if need.hidden and shard is not None:
        shard.sum(grad_hidden)
    return grad_hidden, grad_weight, grad_bias
