"""Plain formulas of the KL-regularised policy objective on a finite set of Y responses: the oracle of the tests.

Everything is in the dtype of the arguments; pass float64. `log_policy` and `log_reference` are log-probabilities (Y,),
`rewards` (m, Y), `weights` (m,), and c(α) = 1 - α ("complement") or 1 ("penalty"):

    V(π)  = c(α) E_π[w·R] - α KL(π ‖ π_ref)
    π*    ∝ π_ref exp((c(α)/α) w·R)
    V*    = V(π*) = α log Σ_y π_ref exp((c(α)/α) w·R),        V* - V(π) = α KL(π ‖ π*)
    ∂V/∂logits = π ⊙ (G - E_π[G]),   G = c(α) w·R - α log(π/π_ref)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopl._renamed import renamed_keywords


def kl(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    """Return KL(π ‖ π_ref) over the last dimension, from log-probabilities.

    Args:
        log_policy: log π, (..., Y).
        log_reference: log π_ref, (..., Y).

    Returns:
        (...), nats.
    """
    term = log_policy.exp() * (log_policy - log_reference)
    return torch.where(log_policy == -torch.inf, 0, term).sum(-1)


def full_vocabulary_kl(
    logits: Tensor,
    reference_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    reference_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    direction: str = "reverse",
) -> Tensor:
    """Return KL(π ‖ π_ref) ("reverse") or KL(π_ref ‖ π) ("forward") of softmaxes of logits.

    Args:
        logits: (N, V) of π.
        reference_logits: (N, V) of π_ref.
        temperature: Divides the logits; a number or (N,).
        reference_temperature: That of π_ref; default `temperature`.
        softcap: Both logits become softcap tanh(logits / softcap); None for none.
        direction: "reverse" or "forward".

    Returns:
        (N,), nats.
    """
    second = temperature if reference_temperature is None else reference_temperature
    logs = []
    for values, divisor in ((logits, temperature), (reference_logits, second)):
        u = values if softcap is None else softcap * torch.tanh(values / softcap)
        logs.append((u / torch.as_tensor(divisor, dtype=u.dtype).expand(u.shape[:-1])[..., None]).log_softmax(-1))
    return kl(*logs) if direction == "reverse" else kl(logs[1], logs[0])


@renamed_keywords(alpha="kl_weight")
def reward_strength(kl_weight: float, kl_form: str = "complement") -> float:
    """Return κ = c(α)/α, what multiplies the reward in the optimum's exponent.

    Args:
        kl_weight: α, above 0.
        kl_form: "complement" or "penalty".

    Returns:
        κ.
    """
    return ((1 - kl_weight) if kl_form == "complement" else 1.0) / kl_weight


@renamed_keywords(alpha="kl_weight")
def value(
    log_policy: Tensor,
    log_reference: Tensor,
    rewards: Tensor,
    weights: Tensor,
    kl_weight: float,
    kl_form: str = "complement",
) -> Tensor:
    """Return V(π).

    Args:
        log_policy: log π, (Y,).
        log_reference: log π_ref, (Y,).
        rewards: (m, Y).
        weights: w, (m,).
        kl_weight: α, above 0.
        kl_form: "complement" or "penalty".

    Returns:
        A scalar.
    """
    coefficient = kl_weight * reward_strength(kl_weight, kl_form)
    return coefficient * (log_policy.exp() * (weights @ rewards)).sum(-1) - kl_weight * kl(log_policy, log_reference)


@renamed_keywords(alpha="kl_weight")
def optimal_log_policy(
    log_reference: Tensor, rewards: Tensor, weights: Tensor, kl_weight: float, kl_form: str = "complement"
) -> Tensor:
    """Return log π*, of the policy with the largest V.

    Args:
        log_reference: log π_ref, (Y,).
        rewards: (m, Y).
        weights: w, (m,).
        kl_weight: α, above 0.
        kl_form: "complement" or "penalty".

    Returns:
        (Y,), log-probabilities.
    """
    return (log_reference + reward_strength(kl_weight, kl_form) * (weights @ rewards)).log_softmax(-1)


@renamed_keywords(alpha="kl_weight")
def optimal_value(
    log_reference: Tensor, rewards: Tensor, weights: Tensor, kl_weight: float, kl_form: str = "complement"
) -> Tensor:
    """Return V*, the value of the best policy.

    Args:
        log_reference: log π_ref, (Y,).
        rewards: (m, Y).
        weights: w, (m,).
        kl_weight: α, above 0.
        kl_form: "complement" or "penalty".

    Returns:
        A scalar.
    """
    return kl_weight * (log_reference + reward_strength(kl_weight, kl_form) * (weights @ rewards)).logsumexp(-1)


@renamed_keywords(alpha="kl_weight")
def returns(
    log_policy: Tensor,
    log_reference: Tensor,
    rewards: Tensor,
    weights: Tensor,
    kl_weight: float,
    kl_form: str = "complement",
) -> Tensor:
    """Return G of every response.

    Args:
        log_policy: log π, (Y,).
        log_reference: log π_ref, (Y,).
        rewards: (m, Y).
        weights: w, (m,).
        kl_weight: α, above 0.
        kl_form: "complement" or "penalty".

    Returns:
        (Y,).
    """
    coefficient = kl_weight * reward_strength(kl_weight, kl_form)
    return coefficient * (weights @ rewards) - kl_weight * (log_policy - log_reference)


@renamed_keywords(alpha="kl_weight")
def value_gradient(
    log_policy: Tensor,
    log_reference: Tensor,
    rewards: Tensor,
    weights: Tensor,
    kl_weight: float,
    kl_form: str = "complement",
) -> Tensor:
    """Return ∂V/∂logits.

    Args:
        log_policy: log π, (Y,).
        log_reference: log π_ref, (Y,).
        rewards: (m, Y).
        weights: w, (m,).
        kl_weight: α, above 0.
        kl_form: "complement" or "penalty".

    Returns:
        (Y,).
    """
    g = returns(log_policy, log_reference, rewards, weights, kl_weight, kl_form)
    policy = log_policy.exp()
    return policy * (g - (policy * g).sum(-1, keepdim=True))


def token_credit_gradient(
    logprob: Tensor,  # (B, T)
    advantages: Tensor,  # (B, T)
    token_weights: Tensor,  # (B, T)
    behaviour: Tensor | None = None,  # (B, T)
    *,
    ratio_level: str = "token",
    clip: float | None = None,
) -> Tensor:
    """Return ∂loss/∂logprob (B, T) of the policy gradient with weighted tokens, token by token: -ρ_t c_t A_t.

    ρ is the ratio of the token, or of its response: then A is the response's, and "sequence_mean", whose ratio is the
    geometric mean, divides by the number of tokens (GSPO-token). 0 where PPO's minimum is the clipped term.

    Args:
        logprob: (B, T), log π of the tokens.
        advantages: A, (B, T).
        token_weights: c, (B, T).
        behaviour: (B, T), log-probabilities of the policy that has sampled; None for ratios of 1.
        ratio_level: "token", "sequence" or "sequence_mean".
        clip: ε of PPO; None for no clipping.

    Returns:
        (B, T).
    """
    result = torch.zeros_like(logprob)
    rows, size = logprob.shape
    for b in range(rows):
        gap = torch.zeros_like(logprob[b]) if behaviour is None else logprob[b] - behaviour[b]
        for t in range(size):
            power = {"token": gap[t], "sequence": gap.sum(), "sequence_mean": gap.sum() / size}[ratio_level]
            ratio, advantage = power.exp(), advantages[b, t]
            cut = clip is not None and bool(
                ratio * advantage > ratio.clamp(1 - clip, 1 + clip) * advantage  # the smaller one is constant
            )
            share = size if ratio_level == "sequence_mean" else 1
            result[b, t] = 0 if cut else -ratio * token_weights[b, t] * advantage / share
    return result


def returns_to_go(
    rewards: Tensor,  # (B, m, T)
    weights: Tensor,  # (m,)
    log_ratio: Tensor,  # (B, T)
    kl_weight: float,
    kl_form: str = "complement",
) -> Tensor:
    """Return G_t = Σ_{s >= t} c(α) w·R_s - α log(π/π_ref)_s, token by token.

    Args:
        rewards: R, (B, m, T).
        weights: w, (m,).
        log_ratio: log(π/π_ref), (B, T).
        kl_weight: α, above 0.
        kl_form: "complement" or "penalty".

    Returns:
        (B, T).
    """
    coefficient = kl_weight * reward_strength(kl_weight, kl_form)
    result = torch.zeros_like(log_ratio)
    for b in range(log_ratio.shape[0]):
        for t in range(log_ratio.shape[1]):
            for s in range(t, log_ratio.shape[1]):
                result[b, t] += coefficient * (weights @ rewards[b, :, s]) - kl_weight * log_ratio[b, s]
    return result
