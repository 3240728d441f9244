"""Scalarisers: one number a list from its loss vector and the weights of its objectives.

`loss_vector` is (B, m), as every loss gives it with `reduction="none"`, or (m,); `weights` is a number or anything that
broadcasts to it. The result is (B,), or a scalar for (m,). Everything is differentiable in the loss vector, the weights
and the ideal point.

Two mixtures go by the name of weighting, and they have different optima. Weighting the *losses*, as here, is
ARITHMETIC: with label distributions z_j and a common β the optimal policy is
`reference * (sum_j w_j z_j)^(1/β)`. Weighting the *rewards* or the scores (MODPO, soups of scores, logit mixing, CLP)
is GEOMETRIC: `reference * prod_j z_j^(w_j/β)`. Measured in losses the arithmetic front dominates, measured in rewards
the geometric one does: say which of the two a comparison measures.

Weighted sums reach every point of a convex front. The Tchebycheff scalarisers also reach the rest.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mopl._arguments import KNOWN, NOT_NEGATIVE, check_choice, check_floating, compute_dtype, per_objective, shape_of

CosineSign = Literal["as_printed", "cosmos"]


def linear(loss_vector: Tensor, weights: float | Tensor) -> Tensor:  # (B, m) or (m,) -> (B,) or ()
    """Return the weighted sum, sum_j w_j L_j.

    Args:
        loss_vector: (B, m) or (m,).
        weights: w, broadcasts to the loss vector.

    Returns:
        (B,), or a scalar for (m,).

    Raises:
        TypeError: the loss vector is not a floating-point tensor.
        ValueError: shapes do not fit.
    """
    losses, w = _lift(loss_vector, weights)
    return _lower((w * losses).sum(1), loss_vector)


def chebyshev(
    loss_vector: Tensor,  # (B, m) or (m,)
    weights: float | Tensor,  # broadcasts to the loss vector
    ideal: float | Tensor = 0.0,  # broadcasts to the loss vector
    rho: float = 0.0,
) -> Tensor:
    """Return the (augmented) Tchebycheff scalarisation, max_j w_j (L_j - ideal_j) + rho sum_j w_j L_j.

    Objectives that share the maximum share its gradient equally. With `rho` 0 weakly Pareto-optimal points are optima
    too; a small positive one, as in Knowles 2006 (ParEGO, 0.05), excludes them.

    Args:
        loss_vector: (B, m) or (m,).
        weights: w, broadcasts to the loss vector.
        ideal: the ideal point, below every loss that can be reached; infinity leaves an objective out.
        rho: the share of the weighted sum, not negative.

    Returns:
        (B,), or a scalar for (m,).

    Raises:
        TypeError: the loss vector is not a floating-point tensor.
        ValueError: shapes do not fit, or rho is negative.
    """
    if not rho >= 0:
        raise ValueError(f"rho is {rho} but must not be negative")
    losses, w = _lift(loss_vector, weights)
    value = (w * (losses - per_objective(ideal, "ideal", losses.shape, losses, KNOWN))).amax(1)
    if rho:
        value = value + rho * (w * losses).sum(1)
    return _lower(value, loss_vector)


def smooth_chebyshev(
    loss_vector: Tensor,  # (B, m) or (m,)
    weights: float | Tensor,  # broadcasts to the loss vector
    ideal: float | Tensor = 0.0,  # broadcasts to the loss vector
    mu: float = 0.01,
) -> Tensor:
    """Return mu log sum_j exp(w_j (L_j - ideal_j) / mu), which lies within mu log m above the Tchebycheff value.

    Lin et al. 2024, Smooth Tchebycheff Scalarization (2402.19078), whose experiments take mu = 0.01. The gradient is
    w_j softmax_j(w (L - ideal) / mu).

    Args:
        loss_vector: (B, m) or (m,).
        weights: w, broadcasts to the loss vector.
        ideal: the ideal point, below every loss that can be reached; infinity leaves an objective out.
        mu: the smoothing, > 0, in the unit of the losses.

    Returns:
        (B,), or a scalar for (m,).

    Raises:
        TypeError: the loss vector is not a floating-point tensor.
        ValueError: shapes do not fit, or mu is not positive.
    """
    if not mu > 0:
        raise ValueError(f"mu is {mu} but must be positive; for mu = 0 take chebyshev")
    losses, w = _lift(loss_vector, weights)
    terms = w * (losses - per_objective(ideal, "ideal", losses.shape, losses, KNOWN))
    # The largest is taken out before the division by mu, which would round its digits away from the differences.
    top = terms.detach().amax(1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    return _lower(top[:, 0] + mu * torch.logsumexp((terms - top) / mu, 1), loss_vector)


def cosine_penalty(
    loss_vector: Tensor,  # (B, m) or (m,)
    weights: float | Tensor,  # broadcasts to the loss vector
    sign: CosineSign = "as_printed",
) -> Tensor:
    """Return the penalty G of COS-DPO that is added to the scalarised loss, `linear(L, w) + lambda * G`.

    The sign is a trap. Ren et al. 2025 print, in equations 18 and 19, -G = cos(w, -L) and a total of L_w + lambda G:
    that *adds* lambda cos(w, L), which pushes the optima of neighbouring weights apart, slightly beyond the front at
    its ends. The code of COSMOS (Ruchte and Grabocka 2021), which the paper cites and whose effect it describes,
    *subtracts* lambda cos(w, L), which aligns the loss vector with the weights and pulls the optima inwards.

    Args:
        loss_vector: (B, m) or (m,).
        weights: w, broadcasts to the loss vector.
        sign: "as_printed" for G = +cos(w, L) (the paper), "cosmos" for G = -cos(w, L) (the code that it cites).

    Returns:
        (B,), or a scalar for (m,): within [-1, 1], and 0 with gradient 0 where the losses or the weights are all 0.

    Raises:
        TypeError: the loss vector is not a floating-point tensor.
        ValueError: shapes do not fit, or the sign is unknown.
    """
    check_choice(sign, ("as_printed", "cosmos"), "sign")
    losses, w = _lift(loss_vector, weights)
    cosine = (_direction(losses) * _direction(w)).sum(1)
    return _lower(cosine if sign == "as_printed" else -cosine, loss_vector)


def _direction(vector: Tensor) -> Tensor:
    """Return (B, m) vectors scaled to length 1; a zero vector stays zero and passes no gradient on."""
    # The direction does not depend on this factor, so it needs no gradient; without it squares over- or underflow.
    largest = vector.detach().abs().amax(1, keepdim=True)
    exists = largest != 0  # true for NaN, which must not be hidden
    scaled = torch.where(exists, vector / torch.where(exists, largest, 1), 0)
    return scaled / torch.where(exists, scaled, 1).square().sum(1, keepdim=True).sqrt()


def _lift(loss_vector: Tensor, weights: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss vector and the weights as (B, m)."""
    check_floating(loss_vector, "loss_vector", "(B, m) or (m,)")
    if loss_vector.ndim not in (1, 2) or loss_vector.shape[-1] == 0:
        raise ValueError(
            f"loss_vector has shape {shape_of(loss_vector)} but must be (B, m) or (m,) with m >= 1; "
            'losses give it with reduction="none"'
        )
    losses = (loss_vector if loss_vector.ndim == 2 else loss_vector[None]).to(compute_dtype(loss_vector))
    return losses, per_objective(weights, "weights", losses.shape, losses, NOT_NEGATIVE)


def _lower(value: Tensor, loss_vector: Tensor) -> Tensor:
    return value if loss_vector.ndim == 2 else value[0]
