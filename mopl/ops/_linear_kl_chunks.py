"""The two passes of `linear_kl`, tile by tile, in plain PyTorch on any device.

M rows, H and H' wide hidden states, V vocabulary entries. A tile is (rows, columns) of the logits u of the policy and
r of the reference, after logit scale, softcap and temperature. Rows are (M,) vectors; `wide` is float64.

**Forward**, one pass. With the largest logits so far t_p, t_q, and a = u - t_p, b = r - t_q:

    S_p = Σ e^a,   S_q = Σ e^b,   D = Σ e^a (a - b)  (reverse)  or  Σ e^b (b - a)  (forward)
    reverse KL = D/S_p - log S_p + log S_q,          forward KL = D/S_q - log S_q + log S_p

Neither t_p nor t_q stands in the result, so nothing large cancels: a and b are small where the probability is not, and
equal policies have a KL of exactly 0. When a larger logit comes, the sums are rescaled and a - b moves by a constant.

The exponentials are rounded in float32, so a KL is right to 1e-7 nats or to its own seven digits.

**Backward**, one pass, from the row vectors of the first: p_v (log p_v/q_v - KL) = e^a/S_p (a - b - D/S_p), or
p_v - q_v for the forward direction. Neither pass holds more than a tile.

On a GPU operands of 16 bit are multiplied as they are, with float32 sums. The gradient of the logits, which is float32,
is then the sum of two bf16 numbers: with one, rows of bf16 gradients would have up to 2.7 times the error that 32-bit
products leave them, with two they have the same (computed, tests/ops/test_linear_kl.py). For float16 it stays float32,
and the products with it as well: its entries would flush to 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mopl._arguments import wide_dtype
from mopl.ops._products import product
from mopl.ops._rows import slices, times

# Tiles: on a CPU they stay near the caches. On a GPU they take 256 MiB in float32: one that its L2 cache holds, of 32,
# would be multiplied in 90 µs with H = 4096, while the host needs 200 µs for its 40 launches (computed for an H200).
COLUMNS = {"cpu": 2048, "else": 8192}
ROWS = {"cpu": 512, "else": 8192}


class Head(NamedTuple):
    """Rows and a head that make logits: of the policy, or of the reference."""

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

    def bent(self, u: Tensor, rows: slice) -> Tensor:
        """Return 1 - tanh² of a softcap at logits u."""
        tanh = u * (self.temperature[rows, None] / self.softcap)
        return (1 - tanh) * (1 + tanh)


class Sums(NamedTuple):
    """Row vectors (M,) that the forward pass leaves for the backward pass."""

    top: Tensor  # t_p
    total: Tensor  # S_p
    reference_top: Tensor  # t_q
    reference_total: Tensor  # S_q
    mean: Tensor  # D/S_p, or D/S_q


def _slices(size: int, steps: dict[str, int], device: torch.device) -> list[slice]:
    return slices(0, size, steps.get(device.type, steps["else"]))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in the compute dtype, which float64 elsewhere may have raised."""
    return product(a.to(dtype), b.to(dtype)) if dtype == torch.float64 else product(a, b)


def _narrow(operand: Tensor, dtype: torch.dtype) -> bool:
    """Say whether an operand stays bf16 when it is multiplied by the gradient of the logits."""
    return operand.is_cuda and operand.dtype == torch.bfloat16 and dtype == torch.float32


def _parts(value: Tensor, operand: Tensor) -> tuple[Tensor, ...]:
    """Return `value` as what `operand` is multiplied by: itself, or two bf16 tensors that it is the sum of."""
    if operand.dtype == value.dtype:
        return (value,)
    high = value.to(operand.dtype)
    return high, (value - high).to(operand.dtype)


def _rescale(old: Tensor, new: Tensor) -> Tensor:
    """Return e^(old - new), 0 where there was nothing yet."""
    return torch.where(old == -torch.inf, 0, (old - torch.where(new == -torch.inf, 0, new)).exp())


def _lift(top: Tensor) -> Tensor:
    """Return what to subtract from logits: their maximum, or 0 where all are -inf."""
    return torch.where(top == -torch.inf, 0, top)


def forward(policy: Head, reference: Head, reverse: bool) -> tuple[Tensor, Sums]:
    """Return the KL of each row (M,) in the compute dtype, and `Sums` in the wide dtype (tops in the compute dtype)."""
    like = policy.temperature
    wide = wide_dtype(like.device)
    tops = [torch.full_like(like, -torch.inf, memory_format=torch.contiguous_format) for _ in range(2)]
    total, reference_total, moment = (torch.zeros(like.shape, dtype=wide, device=like.device) for _ in range(3))
    for columns in _slices(len(policy.weight), COLUMNS, like.device):
        tiles = policy.weight[columns], reference.weight[columns]
        for rows in _slices(len(like), ROWS, like.device):
            logits = [head.logits(rows, columns, tile) for head, tile in zip((policy, reference), tiles, strict=True)]
            new = [torch.maximum(top[rows], u.amax(-1)) for top, u in zip(tops, logits, strict=True)]
            old = [top[rows].clone() for top in tops]
            factors = [_rescale(o, n).to(wide) for o, n in zip(old, new, strict=True)]
            # What a - b has moved by; without mass so far there is nothing to move.
            steps = [torch.where(o == -torch.inf, 0, o - n).to(wide) for o, n in zip(old, new, strict=True)]
            leading, factor = (total, factors[0]) if reverse else (reference_total, factors[1])
            step = steps[0] - steps[1] if reverse else steps[1] - steps[0]
            moved = moment[rows] + times(leading[rows], step)
            a, b = (u.sub_(_lift(n)[:, None]) for u, n in zip(logits, new, strict=True))
            p, q = a.exp(), b.exp()
            difference = a.sub_(b) if reverse else b.sub_(a)
            moment[rows] = times(factor, moved) + times(p if reverse else q, difference).sum(-1, dtype=wide)
            for sums, part, scale in ((total, p, factors[0]), (reference_total, q, factors[1])):
                sums[rows] = sums[rows] * scale + part.sum(-1, dtype=wide)
            for top, value in zip(tops, new, strict=True):
                top[rows] = value
    mean = moment / (total if reverse else reference_total)
    gap = reference_total.log() - total.log()
    kl = (mean + gap if reverse else mean - gap).clamp(min=0)
    return kl.to(like.dtype), Sums(tops[0], total, tops[1], reference_total, mean)


def backward(
    grad: Tensor,  # (M,)
    policy: Head,
    reference: Head,
    sums: Sums,
    reverse: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the policy's hidden states, weight and bias; one that is not needed is empty (0,).

    Sums are made in the compute dtype and rounded once to the dtype of what they belong to.
    """
    dtype, weight, bias = policy.temperature.dtype, policy.weight, policy.bias
    shape = policy.rows.shape if need_hidden else (0,)
    grad_hidden = torch.zeros(shape, dtype=dtype, device=grad.device)
    grad_weight = weight.new_empty(weight.shape) if need_weight else grad.new_empty(0)
    grad_bias = bias.new_empty(bias.shape) if need_bias and bias is not None else grad.new_empty(0)
    slope = grad.to(dtype) * policy.logit_scale / policy.temperature
    scale, reference_scale = (slope / total.to(dtype) for total in (sums.total, sums.reference_total))
    mean = sums.mean.to(dtype)
    for columns in _slices(len(weight), COLUMNS, grad.device):
        tile, reference_tile = weight[columns], reference.weight[columns]
        operand = tile if _narrow(tile, dtype) else tile.to(dtype)
        of_tile = torch.zeros(tile.shape if need_weight else 0, dtype=dtype, device=grad.device)
        of_bias = torch.zeros(len(tile), dtype=dtype, device=grad.device)
        for rows in _slices(len(grad), ROWS, grad.device):
            u = policy.logits(rows, columns, tile)
            bent = policy.bent(u, rows) if policy.softcap else None
            a = u.sub_(_lift(sums.top[rows])[:, None])
            r = reference.logits(rows, columns, reference_tile)
            b = r.sub_(_lift(sums.reference_top[rows])[:, None])
            p = a.exp()
            if reverse:
                g = times(p, a.sub_(b).sub_(mean[rows, None])).mul_(scale[rows, None])
            else:
                g = p.mul_(scale[rows, None]).sub_(b.exp_().mul_(reference_scale[rows, None]))
            g = g if bent is None else g.mul_(bent)
            if need_hidden:
                for part in _parts(g, operand):
                    product(part, operand, grad_hidden[rows], add=True)
            if need_weight:
                inner = policy.rows[rows]
                inner = inner if _narrow(inner, dtype) else inner.to(dtype)
                for part in _parts(g, inner):
                    product(part.t(), inner, of_tile, add=True)
            if need_bias:
                of_bias += g.sum(0)
        if need_weight:
            grad_weight[columns] = of_tile.to(weight.dtype)
        if need_bias and bias is not None:
            grad_bias[columns] = of_bias.to(bias.dtype)
    return grad_hidden, grad_weight, grad_bias
