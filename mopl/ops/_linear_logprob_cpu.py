"""The four stages of `linear_logprob` in chunked PyTorch; `linear_logprob_triton` has the same four functions.

M rows in play (all of them count, but for a tail on a GPU, see `count`; the tail's rows of `hidden` are 0, its columns
-1, its results are ignored), F targets in play. All arithmetic and every (M,)-vector is in the compute dtype (float32, float64 for
float64), products too: operands of 16 bit enter a product exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor


def target_logits(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    column: Tensor,  # (F,) int64: vocabulary index, or -1
    position: Tensor | None,  # (F,) int64: row of each target; None means F = M, target i belongs to row i
    temperature: Tensor,  # (M,)
    softcap: float,  # 0.0: none
    logit_scale: float,
) -> Tensor:
    """Return u at the targets (F,), 0 where column is -1."""
    raise NotImplementedError


def accumulate(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    pivot: Tensor,  # (M,) int64: the column that every sum leaves out, or -1
    shift: Tensor,  # (M,): u at the pivot
    temperature: Tensor,  # (M,)
    softcap: float,
    logit_scale: float,
    count: Tensor | None,  # () int64: only the first `count` rows hold data; None means all
    moments: int,  # 0, 1 or 2
    directions: int,  # 0: no product with the weight; 1: weighted; 2: weighted and weighted_moment
    cache: Tensor,  # (keep_rows * V,), e_v of the first keep_rows rows is written here; the layout is the backend's
    keep_rows: int,  # may exceed M
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum over the vocabulary, the pivot left out, with e_v = exp(u_v - shift).

    Returns:
        shift (M,): the shift that was really used: the given one, or a larger one for rows where exp would overflow
            (some u_v far above the pivot's) or where the given one is not finite.
        others (M,) = sum e_v;  moment1 (M,) = sum e_v (u_v - shift);  moment2 (M,) = sum e_v (u_v - shift)^2
        weighted (M, H) = sum e_v f_v W_v;  weighted_moment (M, H) = sum e_v (u_v - shift) f_v W_v
            with f_v = 1 - tanh^2 under a softcap, else 1.
        Those not asked for are empty (0,).
    """
    raise NotImplementedError


def combine(
    weight: Tensor,  # (V, H)
    weighted: Tensor,  # (M, H)
    weighted_moment: Tensor | None,  # (M, H)
    pivot: Tensor,  # (M,) int64, or -1: that term is left out
    pivot_coefficient: Tensor,  # (M,); with `column` (F,)
    weighted_coefficient: Tensor,  # (M,)
    moment_coefficient: Tensor | None,  # (M,)
    column: Tensor | None,  # (F,) int64, or -1: that term is left out
    position: Tensor | None,  # (F,) int64
    own_coefficient: Tensor | None,  # (F,)
    dtype: torch.dtype,  # of the result
) -> Tensor:
    """Return directions (M, H), row i being

        pivot_coefficient_i W[pivot_i] + weighted_coefficient_i weighted_i + moment_coefficient_i weighted_moment_i

    With `column`, return (F, H), row k being, with i = position_k,

        own_coefficient_k W[column_k] + pivot_coefficient_k W[pivot_i] + weighted_coefficient_i weighted_i + ...
    """
    raise NotImplementedError


def backward(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    pivot: Tensor,  # (M,) int64, or -1
    shift: Tensor,  # (M,): as `accumulate` returned it
    temperature: Tensor,  # (M,)
    softcap: float,
    logit_scale: float,
    count: Tensor | None,  # () int64
    alpha: Tensor,  # (M,)
    gamma: Tensor | None,  # (M,)
    column: Tensor,  # (F,) int64, or -1
    position: Tensor,  # (F,) int64
    coefficient: Tensor,  # (F,)
    cache: Tensor,  # (keep_rows * V,), as `accumulate` left it; never changed here
    keep_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Products with the gradient of the logits a, which is never held whole:

        G_nv = -e_nv f_nv (alpha_n + gamma_n (u_nv - shift_n))   for v != pivot_n, 0 at the pivot
        G_{position_k, column_k} += coefficient_k                for every k with column_k >= 0

    Returns:
        G W (M, H) in the compute dtype, G^T hidden (V, H) in the weight's dtype (accumulated in the compute dtype and
        rounded once), column sums of G (V,) in the bias's dtype; empty (0,) where not needed.
    """
    raise NotImplementedError
