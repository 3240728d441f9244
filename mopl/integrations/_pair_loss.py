"""The losses of pairs that TRL's `loss_type` names, and which of its options belong to which of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from mopl.experiments.response_loss import LIKELIHOOD, LossFunction, PairLoss
from mopl.losses import listwise_dpo
from mopl.losses.pair_formulas import LOSSES

TYPES = (*LOSSES, LIKELIHOOD)
# Where TRL's label smoothing acts (and in the types that only mopl has); in others its option does nothing.
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired", "dpop")


def pair_loss_of(args: Any) -> PairLoss | LossFunction | None:
    """Return the loss that `loss_type` and its options ask for; None where the default `list_loss` is the same.

    Raises for a type that is unknown, and for an option that TRL refuses or has no use for.
    """
    types = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    weights = [1.0] * len(types) if args.loss_weights is None else list(args.loss_weights)
    unknown = [name for name in types if name not in TYPES]
    if unknown:
        raise ValueError(f"loss_type {unknown} is unknown here; there are {', '.join(TYPES)}")
    named = {
        "label_smoothing": ("label_smoothing", args.label_smoothing, 0.0),
        "f_divergence": ("f_divergence_type", args.f_divergence_type, "reverse_kl"),
        "f_alpha": ("f_alpha_divergence_coef", args.f_alpha_divergence_coef, 0.5),
        "discopop_tau": ("discopop_tau", args.discopop_tau, 0.05),
    }
    given = {option: value for option, (_, value, default) in named.items() if value != default}
    if "f_alpha" in given and args.f_divergence_type != "alpha_divergence":
        raise ValueError(
            f"f_alpha_divergence_coef is {args.f_alpha_divergence_coef} but f_divergence_type is "
            f"{args.f_divergence_type!r}; leave it out, or pass f_divergence_type='alpha_divergence'"
        )
    users = {option: [name for name in LOSSES if _has(name, option)] for option in named}
    if "f_divergence" in given:
        without = [name for name in types if name not in (*users["f_divergence"], LIKELIHOOD)]
        if without:
            raise ValueError(
                f"f_divergence_type is {args.f_divergence_type!r} but loss_type {', '.join(without)} has only "
                f"'reverse_kl'; those that have others are {', '.join(users['f_divergence'])}"
            )
    for option, value in given.items():
        if not any(name in users[option] for name in types):
            more = "; labels 1 - ε and ε in place of 1 and 0 smooth 'sigmoid'" if option == "label_smoothing" else ""
            raise ValueError(
                f"{named[option][0]} is {value!r} but loss_type {', '.join(types)} has no use for it; it belongs to "
                f"{', '.join(users[option])}{more}"
            )
    if types == ["sigmoid"] and len(weights) == 1 and not given:  # a factor does not change what is read of labels
        return None if weights == [1.0] else partial(listwise_dpo, weights=weights[0])
    options = {name: {o: v for o, v in given.items() if name in users[o]} for name in types}
    return PairLoss(types, weights, options)


def _has(name: str, option: str) -> bool:
    return option in LOSSES[name].options and (option != "label_smoothing" or name in _SMOOTHED)
