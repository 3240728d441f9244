"""Parts of the policy gradient: estimators of a KL divergence from samples, baselines, the regression of a baseline."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mopl._arguments import (
    NOT_NEGATIVE,
    REDUCTIONS,
    Reduction,
    as_value,
    check_choice,
    check_floating,
    check_mask,
    compute_dtype,
    reduced,
    shape_of,
    wide_dtype,
)
from mopl.ops.sequence_logprob import segment_sum

Estimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]
ESTIMATORS = ("k1", "k2", "k3")
LEVELS = ("token", "sequence")


def check_tokens(value: Tensor | None, like: Tensor, name: str) -> None:
    """Raise unless `value` is None or a floating-point (B, T) like `logprob`."""
    if value is None:
        return
    check_floating(value, name, "(B, T)")
    if value.shape != like.shape:
        raise ValueError(f"{name} has shape {shape_of(value)} but logprob has {shape_of(like)}; pass one value a token")


def check_logprob(logprob: Tensor, mask: Tensor | None) -> Tensor:
    """Raise unless `logprob` is a floating-point (B, T) and `mask` None or boolean like it; return the mask."""
    check_floating(logprob, "logprob", "(B, T)")
    if logprob.ndim != 2:
        raise ValueError(
            f"logprob has shape {shape_of(logprob)} but must be (B, T), one row a sampled response; "
            "for log-probabilities of whole responses pass logprob[:, None]"
        )
    check_mask(mask, logprob, "logprob", "token")
    return torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask


def log_ratio_to(reference: Tensor, policy: Tensor, mask: Tensor, level: str) -> Tensor:
    """Return log(π/π_ref) of each token (B, T) or at level "sequence" of each response (B, 1), without gradient."""
    log_ratio = policy.detach() - torch.where(mask, reference.detach().to(policy.dtype), 0)
    return log_ratio if level == "token" else log_ratio.sum(-1, keepdim=True)


def with_gradient_of_kl(value: Tensor, log_ratio: Tensor, policy: Tensor) -> Tensor:
    """Return `value` with the gradient x ∇log π; both are of tokens (B, T) or of responses (B, 1), as x is."""
    if log_ratio.shape != policy.shape:
        policy = policy.sum(-1, keepdim=True)
    return value + log_ratio * (policy - policy.detach())


def weights_of(importance: Tensor | None, mask: Tensor, policy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the weights of responses (B,), or those of tokens (B, T), 0 where masked; None for what there is not."""
    if importance is None:
        return None, None
    if importance.shape not in (policy.shape, policy.shape[:1]):
        raise ValueError(
            f"importance has shape {shape_of(importance)} but logprob has {shape_of(policy)}; pass one weight a "
            f"response, ({policy.shape[0]},), or one a token"
        )
    kept = torch.where(mask if importance.ndim == 2 else mask.any(-1), importance.detach().to(policy.device), 0)
    kept = as_value(kept, "importance", policy, NOT_NEGATIVE)
    return (kept, None) if kept.ndim == 1 else (None, kept)


def estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """Return k1, k2 or k3 of log(π/π_ref) at samples of π, elementwise."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio


def kl_term(policy: Tensor, log_ratio: Tensor, kl: Tensor, importance: Tensor) -> Tensor:
    """Return the KL of each response (B,) with its value from the estimator and the gradient x ∇log π, times ρ."""
    term = with_gradient_of_kl(kl, log_ratio, policy)
    if importance.ndim == 1:
        return term.sum(-1) * importance
    if term.shape != importance.shape:  # a response's estimate with ratios of tokens: the ratio of the response
        return term.sum(-1) * importance.prod(-1)
    return (term * importance).sum(-1)


def kl_estimate(
    logprob: Tensor,  # (B, T)
    reference: Tensor,  # (B, T)
    *,
    mask: Tensor | None = None,  # (B, T) bool
    estimator: Estimator = "k1",
    level: Level = "token",
) -> Tensor:  # (B,)
    """Estimate KL(π ‖ π_ref) of each sampled response, in nats, with the gradient of that KL.

    With x = log π/π_ref at what was sampled from π (Schulman 2020, "Approximating KL divergence"):

        k1 = x             unbiased, may be negative
        k2 = x² / 2        biased, small for close policies
        k3 = e^(-x) - 1 + x   unbiased, never negative, less variance for close policies

    **The gradient** is x ∇log π for all three. Differentiated as they stand, only k2 would give that: ∇k1 = ∇log π has
    mean 0, and ∇k3 = (1 - e^(-x)) ∇log π has the mean ∇KL(π_ref ‖ π), another divergence (Tang and Munos 2025,
    "On a few pitfalls in KL divergence gradient estimation for RL"). Here the value is that of the estimator and the
    gradient that of KL(π ‖ π_ref): ∇E[k1] = E[k1 ∇log π + ∇k1] = E[x ∇log π], and the same for k3. The x
    in the gradient is a constant: second derivatives are x ∇²log π, not those of the KL, so take no Fisher matrix from
    here.

    **The level.** At "sequence", x is the log-ratio of the whole response and the gradient is unbiased for the KL of
    whole responses. At "token", the estimates of the tokens are summed: k1's value is the same, k3's has less variance
    and is still unbiased (chain rule), but the gradient takes the prefixes as given: it leaves out what a token does to
    the KL of the tokens after it. For that, have the KL in the reward (see `policy_gradient`).

    Args:
        logprob: log π of the sampled tokens, (B, T).
        reference: log π_ref of the same tokens, (B, T); a constant.
        mask: True on sampled tokens; what it leaves out is not read.
        estimator: "k1", "k2" or "k3".
        level: "token" or "sequence".

    Returns:
        (B,), float32, or float64 where an input is. Rows without tokens are 0.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, an unknown estimator or level.
    """
    check_choice(estimator, ESTIMATORS, "estimator")
    check_choice(level, LEVELS, "level")
    mask = check_logprob(logprob, mask)
    check_tokens(reference, logprob, "reference")
    dtype = compute_dtype(logprob, reference)
    policy = torch.where(mask, logprob.to(dtype), 0)
    log_ratio = log_ratio_to(reference, policy, mask, level)
    return with_gradient_of_kl(estimate(log_ratio, estimator), log_ratio, policy).sum(-1)


def group_ids(group: int | Tensor | None, rows: int, device: torch.device) -> Tensor:
    """Return the group number of each row (B,) from a size of consecutive groups or from numbers."""
    if isinstance(group, Tensor):
        if group.shape != (rows,) or group.is_floating_point():
            raise ValueError(
                f"group is {group.dtype} of shape {shape_of(group)}; pass one integer a response, ({rows},)"
            )
        return group.to(device)
    if isinstance(group, bool) or not isinstance(group, int) or group < 1 or rows % group:
        raise ValueError(
            f"group is {group!r} but must say which responses belong together: the number of consecutive responses of "
            f"one prompt, which divides B = {rows}, or an integer tensor ({rows},)"
        )
    return torch.arange(rows, device=device) // group


def group_mean(
    values: Tensor,  # (B,)
    group: int | Tensor,
    *,
    leave_one_out: bool,
    valid: Tensor | None = None,  # (B,) bool
    counts: Tensor | None = None,  # (B,)
) -> Tensor:  # (B,)
    """Return for each response the mean of its group, with or without itself.

    Without itself (leave-one-out; Kool et al. 2019, Ahmadian et al. 2024) the mean does not depend on the response, so
    a policy gradient stays unbiased. With itself, as in GRPO, the gradient is (K - 1)/K of it for groups of K.

    Args:
        values: (B,), returns of the responses.
        group: size of groups of consecutive responses, or one integer a response (B,).
        leave_one_out: whether a response is left out of its own mean.
        valid: which responses count; the values of others are not read.
        counts: how much each counts in the means of others, positive; default 1.

    Returns:
        (B,), float32, or float64 for float64; 0 where no response is left to average. Memory is O(B), however the
        groups lie.

    Raises:
        ValueError: a group that does not fit.
    """
    if values.ndim != 1:
        raise ValueError(f"values has shape {shape_of(values)} but must be (B,), one value a response")
    rows, dtype, wide = len(values), compute_dtype(values), wide_dtype(values.device)
    number = group_ids(group, rows, values.device)
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    # Groups by sorting, in numbers below B: nothing here depends on how many there are, so nothing waits for a GPU.
    order = number.argsort(stable=True)
    ranked = number[order]
    starts = torch.cat([ranked[:1] < ranked[:1], ranked[1:] != ranked[:-1]])
    place = torch.empty_like(number).scatter_(0, order, starts.cumsum(0))
    row = torch.arange(rows, device=values.device)
    first = torch.full_like(row, rows).scatter_reduce(0, place, torch.where(valid, row, rows), "amin")
    first = first.clamp(max=max(rows - 1, 0))[place]
    # Sums of values minus one of them: a group of equal returns has exactly that mean. In float64, so that taking a
    # large value out of its group's sum leaves the digits of the small ones.
    values = torch.where(valid, values, 0).to(wide)
    origin = values[first]
    away = torch.where(valid, values - origin, 0)
    number_of = segment_sum(valid.long(), place, rows)[place] - (valid.long() if leave_one_out else 0)
    if counts is None:
        total = segment_sum(away, place, rows)[place] - (away if leave_one_out else 0)
        mean = total / number_of.clamp(min=1)
    else:
        share = torch.where(valid, counts, 0).to(wide)
        total, count = (segment_sum(t, place, rows)[place] - (t if leave_one_out else 0) for t in (share * away, share))
        mean = total / torch.where(number_of > 0, count, 1)
    return torch.where(number_of > 0, origin + mean, 0).to(dtype)


def group_deviation(values: Tensor, group: int | Tensor, valid: Tensor) -> Tensor:
    """Return for each response the standard deviation (over K, not K - 1) of its group, (B,)."""
    wide = values.to(wide_dtype(values.device))  # squares of what float32 holds
    square = (wide - group_mean(wide, group, leave_one_out=False, valid=valid)).square()
    deviation = group_mean(square, group, leave_one_out=False, valid=valid).sqrt()
    return deviation.to(compute_dtype(values))


def baseline_of(
    baseline: Tensor | str | None,
    group: int | Tensor | None,
    returns: Tensor,
    policy: Tensor,
    valid: Tensor,
    importance: Tensor | None,
) -> Tensor:
    """Return the baseline as something that broadcasts to (B, T)."""
    if baseline is None:
        return torch.zeros_like(returns)[:, None]
    if isinstance(baseline, str):
        check_choice(baseline, ("leave_one_out", "group"), "baseline")
        if group is None:
            raise ValueError(f"baseline={baseline!r} needs group: the number of responses of one prompt")
        alone = baseline == "leave_one_out"
        # A little more for each, so that there is a mean where all others count 0; it is still of the others alone.
        counts = importance + 1e-3 if alone and importance is not None else None
        return group_mean(returns, group, leave_one_out=alone, valid=valid, counts=counts)[:, None]
    if baseline.shape not in (policy.shape, policy.shape[:1]):
        raise ValueError(
            f"baseline has shape {shape_of(baseline)} but logprob has {shape_of(policy)}; pass one value a response, "
            f"({policy.shape[0]},), or one a token"
        )
    value = baseline.detach().to(policy.dtype)
    return value if value.ndim == 2 else value[:, None]


def value_loss(
    values: Tensor,  # (B,) or (B, T)
    returns: Tensor,  # values' shape
    *,
    mask: Tensor | None = None,  # values' shape, bool
    reduction: Reduction = "mean",
) -> Tensor:
    """Return ½ (V - G)², the regression of a learned value baseline on the returns.

    Args:
        values: V(x, w, α) of each response (B,), or of each token's prefix (B, T).
        returns: G, of the same shape: `sequence_returns` or `returns` of `policy_gradient`. A constant.
        mask: true where a value counts; what it leaves out is not read.
        reduction: "none" gives (B,), the mean over a row's tokens; "sum" its sum, "mean" its mean over the B rows.

    Returns:
        (B,) or a scalar, float32, or float64 where an input is.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit.
    """
    check_choice(reduction, REDUCTIONS, "reduction")
    check_floating(values, "values", "(B,) or (B, T)")
    if values.ndim not in (1, 2):
        raise TypeError(
            f"values has shape {shape_of(values)} but must be (B,) or (B, T); pass one value a response or a token"
        )
    if values.ndim == 1:
        values, returns, mask = values[:, None], returns[..., None], None if mask is None else mask[..., None]
    mask = check_logprob(values, mask)
    check_tokens(returns, values, "returns")
    dtype = compute_dtype(values, returns)
    error = torch.where(mask, values.to(dtype), 0) - torch.where(mask, returns.detach().to(dtype), 0)
    return reduced(0.5 * error.square().sum(-1) / mask.sum(-1).clamp(min=1), reduction)
