"""Losses of a pair: Bradley–Terry, DPO, and every loss of four log-probabilities that TRL's `DPOTrainer` has.

`l_w`, `l_l` are the log-probabilities (or scores) of the chosen and the rejected response, `l0_w`, `l0_l` those of the
reference (0 without one). With β, margin γ, label smoothing ε and s the logistic function:

    delta_w = l_w - l0_w,   delta_l = l_l - l0_l,   d = delta_w - delta_l
    x = β d - γ,   r_w = β delta_w,   r_l = β delta_l

| `loss_type`    | loss                                                 | options | source                           |
|----------------|------------------------------------------------------|---------|----------------------------------|
| `sigmoid`      | -(1-ε) log s(x) - ε log s(-x)                        | ε, γ, f | DPO 2305.18290                   |
| `sigmoid_norm` | the same of log-probabilities averaged over tokens   | ε, γ, f | TRL                              |
| `hinge`        | max(0, 1 - x)                                        | γ, f    | SLiC 2305.10425                  |
| `ipo`          | (d - 1/(2β))², of averaged log-probabilities         | f       | IPO 2310.12036, equation 17      |
| `exo_pair`     | KL((s(x), s(-x)) from (1-ε, ε)), ε > 0               | ε, γ, f | EXO 2402.00856, equation 16      |
| `robust`       | [-(1-ε) log s(x) + ε log s(-x)] / (1-2ε), ε < 1/2    | ε, γ, f | rDPO 2403.00409                  |
| `discopop`     | -(1-g) log s(x) + g exp(-x), g = s(x/τ)              | γ, f, τ | DiscoPOP 2406.08414, equation 5  |
| `dpop`         | `sigmoid` of β(d - λ max(0, -delta_w)) - γ           | ε, γ, λ | DPO-Positive 2402.13228          |
| `nca_pair`     | -log s(r_w) - ½ log s(-r_w) - ½ log s(-r_l)          |         | NCA 2402.05369                   |
| `bco_pair`     | -log s(r_w - γ) - log s(-(r_l - γ))                  | γ       | BCO 2404.04656                   |
| `sppo_hard`    | (delta_w - 1/(2β))² + (delta_l + 1/(2β))²            |         | SPPO 2405.00675, equation 4.7    |
| `apo_zero`     | s(-r_w) + s(r_l)                                     |         | APO 2408.06266, equation 7       |
| `apo_down`     | s(r_w) + s(r_l - r_w)                                |         | APO 2408.06266, equation 8       |
| `aot`          | `sigmoid` of sort(l_w - l_l) - sort(l0_w - l0_l)     | ε       | AOT 2406.05882; whole batch      |
| `aot_unpaired` | `sigmoid` of sort(delta_w) - sort(delta_l)           | ε       | AOT 2406.05882; whole batch      |

ε, γ, τ, λ are `label_smoothing`, `margin`, `discopop_tau` and `dpop_lambda`; f means that `f_divergence` may replace
reverse KL. Losses that are settings of these:

* cDPO: `sigmoid` with `label_smoothing`, the listwise loss of two items with labels (1-ε, ε).
* SimPO (2405.14734): `sigmoid` without a reference, log-probabilities averaged over tokens, `margin` γ.
* ODPO (2402.10571): `sigmoid` with a `margin` tensor, the offset of each pair.
* MODPO (2310.03708): `beta=β / w_k` and `margin` = the other objectives' weighted reward difference / w_k.
* AlphaPO (2501.03884): SimPO with `f_divergence="alpha_divergence"`, `f_alpha=1 - α`.
* WPO (2406.11827), β-DPO (2407.08639): `weights` or `beta` of shape (B, 1).
* BCO's shift δ, the running mean of the rewards, is the caller's to keep and to pass as `margin`. TRL's `DPOTrainer`
  has no shift in `bco_pair`.

Not here: TRL's `sft` needs the number of tokens, not only the four log-probabilities.

All but `aot` with a reference, which sorts policy and reference apart, and the f-divergences are functions of
β (s - s0), up to a factor 1/β² for `ipo` and `sppo_hard`. A model trained at β therefore answers for cβ by
(1 - 1/c) s0 + s/c (COS-DPO, proposition 3.1). An added likelihood term, as in CPO or ORPO, destroys that too.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from mopl._arguments import (
    FINITE,
    KNOWN,
    NOT_NEGATIVE,
    POSITIVE,
    Domain,
    Reduction,
    as_value,
    check_choice,
    check_device,
    check_floating,
    compute_dtype,
    per_objective,
    shape_of,
    weigh_and_reduce,
)
from mopl._counted import counted, there_are
from mopl._renamed import renamed_keywords
from mopl.losses.pair_formulas import LOSSES, Pair

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LOSS_TYPES = tuple(LOSSES)

_INSTEAD = {  # names that other trainers accept
    "dpo": "pass 'sigmoid'",
    "cdpo": "pass 'sigmoid' with label_smoothing",
    "simpo": "pass 'sigmoid' with averaged log-probabilities, no reference and margin=gamma",
    "odpo": "pass 'sigmoid' with margin",
    "aot_pair": "pass 'aot', or 'aot_unpaired' for unpaired data",
    "sft": "it needs the number of tokens, not only log-probabilities; add -chosen.sum() / tokens to the loss yourself",
    "orpo": "pass 'sigmoid' with the log-odds of averaged log-probabilities as chosen and rejected, and add the "
    "negative log-likelihood of chosen",
    "kto": "its responses are not paired; it is a different function",
}


@renamed_keywords(temperature="beta")
def bradley_terry(
    chosen: Tensor,  # (B,) or (B, m)
    rejected: Tensor,  # (B,) or (B, m)
    *,
    reference_chosen: Tensor | None = None,  # (B,) or (B, m)
    reference_rejected: Tensor | None = None,  # (B,) or (B, m)
    beta: float | Tensor = 1.0,  # broadcasts to (B, m)
    weights: float | Tensor | None = None,  # broadcasts to (B, m)
    loss_type: str = "sigmoid",
    label_smoothing: float | Tensor = 0.0,  # broadcasts to (B, m)
    margin: float | Tensor = 0.0,  # broadcasts to (B, m)
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    dpop_lambda: float = 50.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return a loss of pairs, one for each pair and objective; the module's table has the formula of each type.

    The Bradley–Terry model (1952) says P(chosen beats rejected) = s(β(chosen - rejected)); its negative
    log-likelihood, with a reference, is DPO.

    `sigmoid_norm` and `ipo` expect log-probabilities averaged over tokens, where TRL divides the summed ones itself.
    With an f-divergence these two differ from TRL's, which divides by the length after f' and not before.
    `aot` and `aot_unpaired` sort over the whole batch: row i of the result belongs to the i-th smallest difference and
    not to pair i, so weights, β and label smoothing must not vary over the batch, and the result depends on
    which pairs share it.

    Args:
        chosen: log-probabilities in nats, or scores, of the preferred responses; (B,) is one objective. Differentiable.
        rejected: those of the other responses.
        reference_chosen: those of the reference for the preferred responses; None (for both) means 0.
        reference_rejected: those of the reference for the other responses.
        beta: β > 0. Like all tensor options: a number, (m,), (B, 1) or (B, m), and differentiable. A tensor of
            two dimensions may bring in the m objectives of a pair given as (B,).
        weights: what each loss is multiplied by.
        loss_type: one of `LOSS_TYPES`.
        label_smoothing: ε, the rate of flipped labels, for the types that have it.
        margin: γ in nats, for the types that have it.
        f_divergence: the divergence that replaces reverse KL, one of `F_DIVERGENCES` (Wang et al. 2023, 2309.16240).
        f_alpha: the order of "alpha_divergence"; 1 is reverse KL.
        discopop_tau: τ of `discopop`, positive.
        dpop_lambda: λ of `dpop`, not negative.
        reduction: "none" for (B, m), "sum", or "mean" over pairs of the sum over objectives.

    Returns:
        (B, m), or a scalar; float32, or float64 where an input is float64.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes do not fit, a name is unknown, an option is out of range or is not one of the loss type.
    """
    if loss_type in _INSTEAD:
        raise ValueError(f"loss_type {loss_type!r} is not here: {_INSTEAD[loss_type]}")
    check_choice(loss_type, LOSS_TYPES, "loss_type")
    check_choice(f_divergence, F_DIVERGENCES, "f_divergence")
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError("one of reference_chosen and reference_rejected is None; pass both or neither")
    given = {
        "label_smoothing": _nonzero(label_smoothing),
        "margin": _nonzero(margin),
        "f_divergence": f_divergence != "reverse_kl",
        "f_alpha": f_alpha != 0.5,
        "discopop_tau": discopop_tau != 0.05,
        "dpop_lambda": dpop_lambda != 50.0,
    }
    kind = LOSSES[loss_type]
    for option, is_given in given.items():
        if is_given and option not in kind.options:
            users = ", ".join(name for name, other in LOSSES.items() if option in other.options)
            raise ValueError(
                f"{option} has no part in loss_type {loss_type!r}, only in {users}; leave it at its default"
            )
    if given["f_alpha"] and f_divergence != "alpha_divergence":
        raise ValueError(f"f_alpha is the order of 'alpha_divergence' but f_divergence is {f_divergence!r}")
    rates = _SMOOTHING.get(loss_type, _RATE)
    _check_smoothing(label_smoothing, rates)
    if kind.whole_batch:
        for name, value in (("weights", weights), ("beta", beta), ("label_smoothing", label_smoothing)):
            if _is_matrix(value) and value.shape[0] > 1:
                raise ValueError(
                    f"{name} has shape {shape_of(value)} but loss_type {loss_type!r} sorts the batch, after which a "
                    f"row is no longer a pair; pass a number or (m,)"
                )

    objectives = [t.shape[1] for t in (beta, weights, label_smoothing, margin) if _is_matrix(t)]
    named = {"chosen": chosen, "rejected": rejected}
    if reference_chosen is not None and reference_rejected is not None:
        named |= {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
    pairs = _as_pairs(named, max([1, *objectives]))
    like, shape = pairs[0], pairs[0].shape
    for option, value, domain in (
        ("f_alpha", f_alpha, FINITE),
        ("discopop_tau", discopop_tau, POSITIVE),
        ("dpop_lambda", dpop_lambda, NOT_NEGATIVE),
    ):
        if given[option]:
            as_value(value, option, like, domain)
    pair = Pair(
        policy=(pairs[0], pairs[1]),
        reference=(pairs[2], pairs[3]) if len(pairs) == 4 else None,
        beta=per_objective(beta, "beta", shape, like, POSITIVE),
        smoothing=per_objective(label_smoothing, "label_smoothing", shape, like, rates)
        if given["label_smoothing"]
        else None,
        margin=per_objective(margin, "margin", shape, like, KNOWN) if given["margin"] else None,
        divergence=f_divergence,
        alpha=f_alpha,
        tau=discopop_tau,
        penalty=dpop_lambda,
    )
    return weigh_and_reduce(kind.of(pair), weights, reduction)


class DPOLoss(torch.nn.Module):
    """DPO, and cDPO with label smoothing, in the shape that torchtune and LLaMA-Factory call.

    OpenRLHF calls the same four tensors but expects a scalar in the first place, the mean of the losses: there, wrap
    this in a function that returns `losses.mean(), chosen_rewards, rejected_rewards`.

    Args:
        beta: β, the factor of the log-ratios.
        label_smoothing: the rate of flipped labels, in [0, 1]; cDPO.
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0) -> None:
        super().__init__()
        as_value(beta, "beta", torch.empty(()), POSITIVE)
        _check_smoothing(label_smoothing, _RATE)
        self.beta, self.label_smoothing = beta, label_smoothing

    def forward(
        self,
        policy_chosen: Tensor,  # (B,)
        policy_rejected: Tensor,  # (B,)
        reference_chosen: Tensor,  # (B,)
        reference_rejected: Tensor,  # (B,)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses and the rewards of chosen and rejected, β log(policy/reference), without gradient.

        Args:
            policy_chosen: log-probabilities in nats, summed over tokens, of the preferred responses, (B,).
            policy_rejected: those of the other responses.
            reference_chosen: those of the reference for the preferred responses.
            reference_rejected: those of the reference for the other responses.

        Returns:
            Three tensors (B,): losses, chosen rewards, rejected rewards; float32, or float64 for float64.

        Raises:
            ValueError: the tensors are not (B,) of one length.
        """
        if policy_chosen.ndim != 1:
            raise ValueError(
                f"policy_chosen has shape {shape_of(policy_chosen)} but must be (B,); for several objectives take "
                "mopl.losses.bradley_terry"
            )
        losses = bradley_terry(
            policy_chosen,
            policy_rejected,
            reference_chosen=reference_chosen,
            reference_rejected=reference_rejected,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )[:, 0]
        with torch.no_grad():
            chosen_rewards = self.beta * (policy_chosen.to(losses.dtype) - reference_chosen.to(losses.dtype))
            rejected_rewards = self.beta * (policy_rejected.to(losses.dtype) - reference_rejected.to(losses.dtype))
        return losses, chosen_rewards, rejected_rewards

    def extra_repr(self) -> str:
        """Show the two settings where the module is printed."""
        return f"beta={self.beta}, label_smoothing={self.label_smoothing}"


def _is_matrix(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 2


def _nonzero(value: float | Tensor) -> bool:
    """Say whether an option is given: a tensor always is, its values are never read."""
    # While tracing, a number is a symbol, which cannot be asked for attributes.
    array = not torch.compiler.is_compiling() and getattr(value, "ndim", 0) > 0
    return isinstance(value, Tensor) or array or value != 0


_SMOOTHING = {
    "robust": Domain(lambda x: (x >= 0) & (x < 0.5), "must lie in [0, 0.5) for 'robust', which divides by 1 - 2ε"),
    "exo_pair": Domain(lambda x: (x > 0) & (x < 1), "must lie in (0, 1) for 'exo_pair'; its paper takes 1e-3"),
}
_RATE = Domain(lambda x: (x >= 0) & (x <= 1), "must lie in [0, 1]: it is the rate of flipped labels")


def _check_smoothing(value: float | Tensor, allowed: Domain) -> None:
    """Raise where the number 0, which is not taken for an option that is given, is out of range."""
    as_value(value, "label_smoothing", torch.empty(()), None if isinstance(value, Tensor) else allowed)


def _as_pairs(named: dict[str, Tensor], objectives: int) -> list[Tensor]:
    """Return tensors as (B, m) in the dtype of the arithmetic."""
    for name, value in named.items():
        check_floating(value, name, "(B,) or (B, m)")
        if value.ndim not in (1, 2):
            raise ValueError(
                f"{name} has shape {shape_of(value)} but must be (B,) or (B, m): one log-probability a response, "
                "summed or averaged over tokens"
            )
    tensors = [value if value.ndim == 2 else value[:, None] for value in named.values()]
    # Its length is a number, which non-strict torch.export would make a constant of; its shape may be a symbol.
    batch, objectives = tensors[0].shape[0], max(objectives, *(tensor.shape[1] for tensor in tensors))
    for name, tensor in zip(named, tensors, strict=True):
        if tensor.shape[0] != batch or tensor.shape[1] not in (1, objectives):
            raise ValueError(
                f"{name} has shape {shape_of(named[name])} but {there_are(batch, 'pair')} and "
                f"{counted(objectives, 'objective')}; pass ({batch},) or ({batch}, {objectives})"
            )
        check_device(tensor, name, tensors[0], "chosen")
    dtype = compute_dtype(*tensors)
    return [tensor.to(dtype).expand(batch, objectives) for tensor in tensors]
