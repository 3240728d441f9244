"""Importance weights of responses that another engine sampled, such as a server in the place of the policy itself.

A server samples from μ: other kernels, 16-bit parameters, or a policy that is some steps old. What is wanted is the
mean over the policy π of the trainer. With the ratio of what was sampled,

    r = π(y|x) / μ(y|x) = exp(Σ_t log π_t - log μ_t),        E_μ[r f(y)] = E_π[f(y)]

for any f, as long as μ gives everything a chance that π does. So the gradient of a policy is exact in the mean if each
response counts r times. r has a large variance where the two differ much, hence

    weight = min(r, cap)

(truncated importance sampling, Ionides 2008, "Truncated importance sampling"), which trades a bias for a bounded
variance: without a cap there is no bias. At `level="token"` each token counts by its own ratio min(π_t/μ_t, cap), which
takes the prefixes as if sampled from π: less variance, and a bias even without a cap. Trainers that sample with vLLM
have both: verl's `rollout_is` ("token", "sequence"; threshold 2) and TRL's `vllm_importance_sampling_mode`
("token_truncate", "sequence_truncate").

Responses that a conditioned policy sampled at one trade-off may count at the others of the step as well. Where each
comes from one of K policies π_1, ..., π_K, drawn at random with equal chances, its density is the mean of all of them,
and the weight at trade-off k is that of the balance heuristic (Veach & Guibas 1995),

    r_k(y) = π_k(y) / (1/K Σ_j π_j(y)),

exact in the mean, and never above K: no cap is needed. Early in a training, where the policies are nearly one, all are
1, and each trade-off has the responses of all.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mopl._arguments import check_choice, check_floating, compute_dtype, shape_of
from mopl.losses._policy_gradient_parts import check_logprob, check_tokens, estimate

__all__ = ["ImportanceWeights", "balance_weights", "importance_weights"]


class ImportanceWeights(NamedTuple):
    """What `importance_weights` returns, all without gradient.

    Attributes:
        weights: min(r, cap) of each response (B,), or with level="token" of each token (B, T), 0 where masked.
        ratio: scalar, mean of r over responses (or tokens) before the cap: 1 up to noise where both are one policy.
        truncated: scalar, share of the responses (or tokens) whose ratio the cap has cut.
        kl: scalar, estimate of KL(μ ‖ π) for a token in nats, never negative: how far the engines are apart. Infinite
            where a token of the engine is all but impossible under the policy.
    """

    weights: Tensor
    ratio: Tensor
    truncated: Tensor
    kl: Tensor


@torch.no_grad()
def importance_weights(
    logprob: Tensor,  # (B, T)
    sampled: Tensor,  # (B, T)
    *,
    mask: Tensor | None = None,  # (B, T) bool
    level: Literal["sequence", "token"] = "sequence",
    cap: float | None = 2.0,
) -> ImportanceWeights:
    """Return what responses count that another engine sampled, for `policy_gradient(importance=...)`.

    Args:
        logprob: log π of the sampled tokens by the trainer, (B, T).
        sampled: log μ of the same tokens by the engine that sampled them, at the same temperature, (B, T).
        mask: True on sampled tokens; what it leaves out is not read.
        level: "sequence": one weight a response, exact in the mean without a cap; "token": one a token.
        cap: the largest weight; None for no cap.

    Returns:
        `ImportanceWeights`. float32, or float64 where an input is.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, an unknown level, a cap below 1.
    """
    check_choice(level, ("sequence", "token"), "level")
    if cap is not None and not cap >= 1:
        raise ValueError(f"cap is {cap} but must be at least 1, which equal engines have, or None")
    mask = check_logprob(logprob, mask)
    check_tokens(sampled, logprob, "sampled")
    dtype = compute_dtype(logprob, sampled)
    difference = torch.where(mask, logprob.to(dtype) - sampled.to(dtype), 0)
    tokens = mask.sum().clamp(min=1)
    # k3 of KL(μ ‖ π) at samples of μ (Schulman 2020): r - 1 - log r of each token.
    kl = torch.where(mask, estimate(-difference, "k3"), 0).sum() / tokens
    if level == "sequence":
        counted, log_ratio = mask.any(-1), difference.sum(-1)
    else:
        counted, log_ratio = mask, difference
    ratio = torch.where(counted, log_ratio.exp(), 0)
    count = counted.sum().clamp(min=1)
    weights = ratio.clamp(max=math.inf if cap is None else cap)
    return ImportanceWeights(weights, ratio.sum() / count, (weights < ratio).sum().to(dtype) / count, kl)


@torch.no_grad()
def balance_weights(
    log_probs: Tensor,  # (K, B)
) -> Tensor:  # (K, B)
    """Return what responses count at each of the K trade-offs that share them, for `policy_gradient(importance=...)`.

    Args:
        log_probs: log π_k of each of B whole responses, (K, B): row k under the policy of trade-off k. Each response
            was sampled at one of the K trade-offs, drawn with equal chances for each response by itself.

    Returns:
        (K, B) π_k / mean of π_j over j: from 0 to K, mean 1 over the trade-offs of a response. float32, or float64
        where the input is. Responses that are impossible at all of them count 1 each.

    Raises:
        TypeError: if it is not floating-point.
        ValueError: if it is not a matrix, or a value is NaN.
    """
    shape = "(K, B), a row for each trade-off"
    check_floating(log_probs, "log_probs", shape)
    if log_probs.ndim != 2:
        raise ValueError(f"log_probs has shape {shape_of(log_probs)} but must be {shape}")
    if bool(log_probs.isnan().any()):
        raise ValueError("log_probs has NaN; mask the responses whose log-probabilities could not be computed")
    # A softmax over trade-offs, K times: nothing overflows, however long the responses are.
    wide = log_probs.to(compute_dtype(log_probs))
    impossible = wide.isneginf().all(0)
    return len(wide) * torch.where(impossible, 0.0, wide).softmax(0)
