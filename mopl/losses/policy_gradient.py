"""KL-regularised policy gradient for rewards R_1..R_m, weights w and KL weight α: what CLP trains with.

    V_{α,w}(π) = E_x [ c(α) E_{y~π} w·R(x, y) - α KL( π(.|x) ‖ π_ref(.|x) ) ]

with c(α) = 1 - α ("complement") or 1 ("penalty"). We recall the factor 1 - α from CLP (Wang et al., EMNLP Findings
2024) with medium confidence only, hence the option; the optimum is π* ∝ π_ref exp((c(α)/α) w·R).

For a response y sampled from π, G = c(α) w·R - α log(π/π_ref) and any baseline b that does not depend on y,

    ∇V = E[ (G - b) ∇log π(y) ],         G taken as a constant

(the derivative of G itself is -α ∇log π, whose mean is 0). `policy_gradient` returns the loss whose gradient is minus
this, and what a log wants to know.

**Where the KL enters** (`kl_in`):

* "reward": G above. With "k1" the gradient is that of V. k2 and k3 in the reward are constants there, too, so their own
  derivative is missing: k3's mean gradient is ∇KL(π ‖ π_ref) - ∇KL(π_ref ‖ π). They are offered because others do so.
* "loss": G = c(α) w·R, and α times `kl_estimate` is added to the loss. Its gradient is unbiased for V at
  `kl_level="sequence"`; at "token" it leaves out what a token does to the KL of later ones, as GRPO's does.
* `kl_estimator="exact"` takes each position's KL over the whole vocabulary (`mopl.ops.linear_kl`). In the "loss" it is
  the local term alone; in the "reward" the local term is in the loss *and* the KL of the positions is in the returns,
  which together are the gradient of the sequence's KL, with less variance than any estimator from samples
  (Amini et al. 2025, "Better estimation of the KL divergence between language models").

**Several epochs on one batch**: pass `behaviour`, the log-probabilities under the policy that sampled. The loss is
-ρ A with ρ = π/π_behaviour of a token, of a sequence, or the geometric mean over a sequence's tokens (GSPO, Zheng et
al. 2025); with `clip` it is PPO's -min(ρ A, clip(ρ, 1 - ε, 1 + ε) A). G uses the present π, and KL terms in the loss
are weighted with ρ. Unclipped, "sequence" ratios give an unbiased gradient of V from old samples; "token" ratios take
the prefixes as if sampled from π.

**Credit of single tokens.** Rewards of tokens R_t, (B, m, T), are summed over a response, and with `to_go` a token is
credited with those from it on: the gradient of E[Σ_t w·R_t], with less variance, as long as R_t depends on nothing
after token t. `token_weights` c_t multiply the advantage of each token, after baseline and standardisation:

    gradient of the loss = -Σ_t ρ_t c_t A_t ∇log π_t

and nothing else: not the KL in the loss, nor ρ, nor what the clip compares. With ratios of responses this is
-ρ A Σ_t c_t ∇log π_t ("sequence"), or that over the number of tokens ("sequence_mean": GSPO-token, section 4.3 of Zheng
et al. 2025). Weights that depend on the prefix alone stretch the gradient of V at each prefix: a policy that is free
at every prefix is stationary where it was. Those that depend on the token itself change what is optimised.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mopl._arguments import (
    NOT_NEGATIVE,
    REDUCTIONS,
    Domain,
    Reduction,
    as_value,
    check_choice,
    compute_dtype,
    per_objective,
    reduced,
    shape_of,
)
from mopl._renamed import renamed_keywords
from mopl.losses._policy_gradient_parts import (
    ESTIMATORS,
    LEVELS,
    Estimator,
    Level,
    baseline_of,
    check_logprob,
    check_tokens,
    estimate,
    group_deviation,
    group_mean,
    kl_estimate,
    kl_term,
    log_ratio_to,
    value_loss,
    weights_of,
)

__all__ = ["PolicyGradient", "group_mean", "kl_estimate", "policy_gradient", "reward_coefficient", "value_loss"]

KLForm = Literal["complement", "penalty"]
KL_FORMS = ("complement", "penalty")
RatioLevel = Literal["token", "sequence", "sequence_mean"]
RATIO_LEVELS = ("token", "sequence", "sequence_mean")


_SHARE = Domain(lambda x: (x >= 0) & (x <= 1), 'must not be negative, and at most 1 where kl_form is "complement"')


class PolicyGradient(NamedTuple):
    """What `policy_gradient` returns; all but `loss` are without gradient.

    Attributes:
        loss: a scalar, or (B,) with reduction="none".
        advantages: A, (B, T), or c A with `token_weights`: what multiplies each token's ∇log π; 0 where masked.
        returns: (B, T), G, from each token on with `to_go`; 0 where masked. Before the baseline.
        sequence_returns: G, (B,): c(α) w·R - α KL of each response (without the KL, if that is in the loss).
        reward: w·R, (B,), without the factor c(α).
        kl: estimate of KL(π ‖ π_ref) of each response, (B,), nats; 0 without a reference.
        ratio: ρ, (B, T), or (B,) for ratios of sequences; 1 without `behaviour`, and where masked.
        clip_share: scalar, share of the tokens (or sequences) whose gradient the clip has cut.
    """

    loss: Tensor
    advantages: Tensor
    returns: Tensor
    sequence_returns: Tensor
    reward: Tensor
    kl: Tensor
    ratio: Tensor
    clip_share: Tensor


@renamed_keywords(alpha="kl_weight")
def reward_coefficient(kl_weight: float | Tensor, kl_form: KLForm = "complement") -> float | Tensor:
    """Return c(α), what multiplies the reward: 1 - α for "complement", 1 for "penalty"."""
    check_choice(kl_form, KL_FORMS, "kl_form")
    if kl_form == "complement":
        return 1 - kl_weight
    return torch.ones_like(kl_weight) if isinstance(kl_weight, Tensor) else 1.0


@renamed_keywords(alpha="kl_weight")
def policy_gradient(
    logprob: Tensor,  # (B, T)
    rewards: Tensor,  # (B, m), or (B, m, T)
    weights: Tensor,  # (m,) or (B, m)
    *,
    kl_weight: float | Tensor,  # number or (B,)
    reference: Tensor | None = None,  # (B, T)
    behaviour: Tensor | None = None,  # (B, T)
    mask: Tensor | None = None,  # (B, T) bool
    token_weights: Tensor | None = None,  # (B, T)
    importance: Tensor | None = None,  # (B,) or (B, T)
    baseline: Tensor | Literal["leave_one_out", "group"] | None = None,  # (B,), (B, T)
    group: int | Tensor | None = None,
    standardize: bool = False,
    kl_form: KLForm = "complement",
    kl_in: Literal["reward", "loss"] = "reward",
    kl_estimator: Estimator | Literal["exact"] = "k1",
    kl_level: Level = "token",
    exact_kl: Tensor | None = None,  # (B, T)
    to_go: bool = False,
    clip: float | tuple[float, float] | None = None,
    ratio_level: RatioLevel = "token",
    reduction: Reduction = "mean",
) -> PolicyGradient:
    """Return the loss whose gradient is minus the policy gradient of V_{α,w}, and figures about it.

    Args:
        logprob: log π of the sampled tokens, (B, T), as `mopl.ops.linear_logprob` gives it; the only argument besides
            `exact_kl` that gets a gradient.
        rewards: R, (B, m), one value a response and objective; or (B, m, T), one a token, as process rewards are: what
            the mask leaves out is not read.
        weights: w, (m,) or (B, m), not negative.
        kl_weight: α, a number or one a response (B,): not negative, in [0, 1] for the complement form.
        reference: log π_ref of the same tokens, (B, T). Needed unless α is the number 0 or the KL is exact.
        behaviour: log-probabilities of the same tokens under the policy that sampled them, (B, T). None: π did.
        mask: True on sampled tokens. What it leaves out is not read; a response without tokens counts for nothing but
            stays in B, so mask a response whose reward could not be computed.
        token_weights: c, (B, T), not negative: multiply the advantage of each token, see the top of the file. For
            credit of either sign pass rewards of tokens.
        importance: constants that weigh each response (B,), or each of its tokens (B, T), with all that the loss has of
            it, where another policy sampled it: those of `mopl.losses.importance_weights` or `balance_weights`. Weights
            of responses also count in the averages of "leave_one_out".
        baseline: a constant for the gradient: values (B,) or (B, T), "leave_one_out", "group" or None. The last two
            average G over responses of one prompt that were sampled alike: with the same w and α. A response that is
            alone in its group has baseline 0.
        group: which responses belong together, for such a baseline: the size of groups of consecutive responses, or
            one integer a response (B,).
        standardize: with the baseline "group", divide by the group's standard deviation, as GRPO does. Biased: prompts
            whose responses differ little count more.
        kl_form: "complement" for (1 - α) w·R - α KL, "penalty" for w·R - α KL.
        kl_in: "reward" or "loss", see the top of the file.
        kl_estimator: "k1", "k2", "k3", or "exact" with `exact_kl`.
        kl_level: whether the estimator sees log-ratios of tokens or of whole responses.
        exact_kl: KL of each position over the vocabulary, (B, T), differentiable.
        to_go: count for each token the KL, and rewards of tokens, from it on only: same mean, less variance. A reward
            of a response, which comes at the end, counts for every token.
        clip: ε, or (ε_low, ε_high), of PPO's clipped ratio; needs `behaviour`.
        ratio_level: "token", "sequence" or "sequence_mean" (GSPO).
        reduction: "mean" over the B responses of the sum over tokens, "sum", or "none" for (B,).

    Returns:
        `PolicyGradient`. float32, or float64 where an input is. With no baseline and no `behaviour` the loss is
        -Σ_t A_t log π_t; its value means little, its gradient is what it is for. Second derivatives are those of this
        loss, with A held constant, and not those of V.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, unknown options, or options that exclude each other.
    """
    for value, choices, name in (
        (kl_form, KL_FORMS, "kl_form"),
        (kl_in, ("reward", "loss"), "kl_in"),
        (kl_estimator, (*ESTIMATORS, "exact"), "kl_estimator"),
        (kl_level, LEVELS, "kl_level"),
        (ratio_level, RATIO_LEVELS, "ratio_level"),
        (reduction, REDUCTIONS, "reduction"),
    ):
        check_choice(value, choices, name)
    mask = check_logprob(logprob, mask)
    tokens = {"reference": reference, "behaviour": behaviour, "exact_kl": exact_kl, "token_weights": token_weights}
    for name, value in tokens.items():
        check_tokens(value, logprob, name)
    exact = kl_estimator == "exact"
    _check_options(kl_weight, reference, behaviour, exact_kl, exact, baseline, standardize, to_go, clip, ratio_level)

    dtype = compute_dtype(logprob, reference, behaviour, exact_kl)
    policy = torch.where(mask, logprob.to(dtype), 0)
    valid = mask.any(-1)
    reward = _weighted_reward(rewards, weights, policy)  # one a token (B, T), or one a response (B, 1)
    reward = torch.where(mask if rewards.ndim == 3 else valid[:, None], reward, 0)
    credit = _credit(token_weights, mask, policy)
    strength = _per_response(kl_weight, policy, _SHARE if kl_form == "complement" else NOT_NEGATIVE)

    # The KL of each position (B, T), or of each response (B, 1), without gradient; `local` has one.
    local, log_ratio = None, torch.zeros_like(policy)
    if exact:
        local = torch.where(mask, exact_kl.to(dtype), 0)  # type: ignore[union-attr]
        kl = local.detach()
    elif reference is None:
        kl = torch.zeros_like(policy)
    else:
        log_ratio = log_ratio_to(reference, policy, mask, kl_level)
        kl = estimate(log_ratio, kl_estimator)

    share = torch.where(valid, reward_coefficient(strength, kl_form), 0)
    penalty = kl if kl_in == "reward" else torch.zeros_like(kl)
    sequence_returns = share * reward.sum(-1) - strength * penalty.sum(-1)
    returns = sequence_returns[:, None].expand_as(policy)
    if to_go:
        returns = share[:, None] * _to_go(reward, policy) - strength[:, None] * _to_go(penalty, policy)
    by_row, by_token = weights_of(importance, mask, policy)
    advantages = returns - baseline_of(baseline, group, sequence_returns, policy, valid, by_row)
    if standardize:
        # GRPO's constant: groups of equal returns have advantage 0, whatever it is.
        advantages = advantages / (group_deviation(sequence_returns, group, valid)[:, None] + 1e-6)  # type: ignore[arg-type]
    advantages = torch.where(mask, advantages, 0)

    counts = credit if by_token is None else by_token if credit is None else credit * by_token
    loss, ratio, clipped = _surrogate(policy, behaviour, advantages, counts, mask, clip, ratio_level)
    weight = ratio.detach()
    if local is not None:
        # A sequence's ratio reweighs its prefixes; a token's ratio has no part in the KL of the position itself.
        term = local.sum(-1)
        loss = loss + strength * (term * weight if weight.ndim == 1 else term)
    elif kl_in == "loss" and reference is not None:
        if by_token is not None:
            weight = weight * (by_token if weight.ndim == 2 else torch.where(mask, by_token, 1).prod(-1))
        loss = loss + strength * kl_term(policy, log_ratio, kl, weight)
    if by_row is not None:
        loss = by_row * loss
    counted = valid.sum() if ratio.ndim == 1 else mask.sum()
    return PolicyGradient(
        reduced(loss, reduction),
        advantages if credit is None else credit * advantages,
        torch.where(mask, returns, 0),
        sequence_returns,
        reward.sum(-1),
        kl.sum(-1),
        ratio.detach(),
        clipped.sum().to(dtype) / counted.clamp(min=1),
    )


def _surrogate(
    policy: Tensor,
    behaviour: Tensor | None,
    advantages: Tensor,
    credit: Tensor | None,
    mask: Tensor,
    clip: float | tuple[float, float] | None,
    level: RatioLevel,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (B,), the ratios (B, T) or (B,), and which of them the clip has cut."""
    if credit is not None and level == "token":
        advantages = credit * advantages
    if behaviour is None:
        ratio = torch.ones_like(policy)
        return -(advantages * policy).sum(-1), ratio, torch.zeros_like(mask)
    log_ratio = policy - torch.where(mask, behaviour.detach().to(policy.dtype), 0)
    if level != "token":
        if credit is not None:  # the ratio's value is as ever, its gradient c_t ∇log π_t at each token
            log_ratio = log_ratio.detach() + credit * (policy - policy.detach())
        log_ratio = log_ratio.sum(-1)
        if level == "sequence_mean":
            log_ratio = log_ratio / mask.sum(-1).clamp(min=1)
        # Without `to_go` every token of a response has the same advantage; the first one is a masked 0 at times.
        advantages = torch.nn.functional.pad(advantages, (0, 1))  # a response may have no token at all
        advantages = advantages.gather(-1, advantages.abs().argmax(-1, keepdim=True))[:, 0]
    ratio = log_ratio.exp()
    if clip is None:
        loss, clipped = -ratio * advantages, torch.zeros_like(ratio, dtype=torch.bool)
    else:
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        clipped = torch.where(advantages > 0, ratio > 1 + high, (ratio < 1 - low) & (advantages < 0)).detach()
        # Where the clip cuts, the exponential is not differentiated at all: it may have overflowed.
        kept = log_ratio.masked_fill(clipped, 0).exp()
        loss = -torch.where(clipped, ratio.detach().clamp(1 - low, 1 + high), kept) * advantages
    return (loss.sum(-1) if level == "token" else loss), ratio, clipped


def _weighted_reward(rewards: Tensor, weights: Tensor, policy: Tensor) -> Tensor:
    """Return w·R of tokens (B, T), or of responses (B, 1)."""
    given: tuple[int, ...] = tuple(rewards.shape) if isinstance(rewards, Tensor) else ()
    if (
        len(given) not in (2, 3)
        or given[:1] != tuple(policy.shape[:1])
        or given[2:] not in ((), tuple(policy.shape[1:]))
    ):
        got = shape_of(rewards) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(
            f"rewards is {got} but logprob has {shape_of(policy)}; pass one value a response and objective, (B, m), or "
            "one a token, (B, m, T)"
        )
    values = rewards.detach().to(policy.device, policy.dtype)
    w = per_objective(weights, "weights", values.shape[:2], policy, NOT_NEGATIVE).detach()[..., None]
    # A reward that is not asked for may be NaN or infinite.
    return torch.where(w == 0, 0, w * (values if values.ndim == 3 else values[..., None])).sum(1)


def _credit(token_weights: Tensor | None, mask: Tensor, policy: Tensor) -> Tensor | None:
    """Return the tokens' weights as constants (B, T), 0 where masked."""
    if token_weights is None:
        return None
    kept = torch.where(mask, token_weights.detach().to(policy.device), 0)
    return as_value(kept, "token_weights", policy, NOT_NEGATIVE)


def _to_go(values: Tensor, policy: Tensor) -> Tensor:
    """Return the sums from each token on, (B, T), of values of tokens; those of responses (B, 1) count for all."""
    return values.flip(-1).cumsum(-1).flip(-1) if values.shape == policy.shape else values


def _per_response(value: float | Tensor, policy: Tensor, domain: Domain) -> Tensor:
    """Return a number or (B,) as a constant (B,)."""
    rows = policy.shape[0]
    tensor = as_value(value, "kl_weight", policy, domain).detach()
    if tensor.ndim > 1 or tensor.shape not in ((), (1,), (rows,)):
        raise ValueError(f"kl_weight has shape {shape_of(tensor)}; pass a number or one value a response, ({rows},)")
    return tensor.expand(rows)


def _check_options(
    kl_weight: float | Tensor,
    reference: Tensor | None,
    behaviour: Tensor | None,
    exact_kl: Tensor | None,
    exact: bool,
    baseline: Tensor | str | None,
    standardize: bool,
    to_go: bool,
    clip: float | tuple[float, float] | None,
    ratio_level: RatioLevel,
) -> None:
    """Raise where options are missing or exclude each other."""
    if exact != (exact_kl is not None):
        raise ValueError("kl_estimator='exact' and exact_kl (B, T) belong together; pass both or neither")
    if reference is None and not exact and (isinstance(kl_weight, Tensor) or kl_weight != 0):
        raise ValueError("reference is missing; without its log-probabilities kl_weight must be the number 0")
    if standardize and not (isinstance(baseline, str) and baseline == "group"):
        raise ValueError("standardize divides by a group's standard deviation; it needs baseline='group'")
    if behaviour is None and (clip is not None or ratio_level != "token"):
        raise ValueError("clip and ratio_level are about the ratio to the policy that sampled; pass behaviour (B, T)")
    if ratio_level != "token" and (to_go or (isinstance(baseline, Tensor) and baseline.ndim == 2)):
        raise ValueError(
            f"ratio_level={ratio_level!r} weighs whole responses, which have one advantage each; leave out to_go and "
            "pass a baseline of shape (B,)"
        )
    ends = () if clip is None else clip if isinstance(clip, tuple) else (clip, clip)
    if any(not end > 0 for end in ends) or len(ends) not in (0, 2):
        raise ValueError(f"clip is {clip} but must be a positive number, or (low, high) of two such")
