"""The losses of pairs that TRL's `loss_type` names, for m objectives, and their options.

They are those of `mopl.losses.bradley_terry`. Three things are added, because TRL does them outside of the formulas:
types whose log-probabilities are averaged over tokens, types that sort what is in one forward pass, and `sft`, the mean
of the negative log-likelihood over the tokens of all preferred responses in one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mopl.losses import bradley_terry
from mopl.losses.pair_formulas import LOSSES, WHOLE_BATCH, regularised

AVERAGED = ("ipo", "sigmoid_norm")  # TRL divides what it has summed over a response by the number of tokens
LIKELIHOOD = "sft"
TYPES = (*LOSSES, LIKELIHOOD)
# Where TRL's label smoothing acts (and in the types that only mopl has); in others its option does nothing.
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired", "dpop")


@dataclass(frozen=True)
class PairLoss:
    """Losses of pairs by the names of TRL's `loss_type`, and their weights."""

    types: Sequence[str] = ("sigmoid",)  # names in `mopl.losses.bradley_terry`, or `sft`
    weights: Sequence[float] = (1.0,)  # a factor each
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # for the types that have them

    @property
    def sorts(self) -> bool:
        """Whether a type sorts what is in one forward pass, so that no value belongs to one pair."""
        return any(name in WHOLE_BATCH for name in self.types)

    def __call__(
        self,
        scores: Tensor,  # (B, 2) log-probabilities of the responses in nats, summed over tokens
        labels: Tensor,  # (B, m, 2)
        *,
        lengths: Tensor,  # (B, 2) tokens that are scored
        reference: Tensor | None,  # (B, 2)
        beta: Tensor,  # broadcasts to (B, m)
        tokens: Tensor | None = None,  # (B, 2) all tokens; TRL's averages count one that nothing stands before
        likelihood: Tensor | None = None,  # (B, 2) the scores for `sft`, where they are others (see `ld_alpha`)
    ) -> Tensor:  # (B, m)
        """Return the loss of each pair and objective; 0 where an objective does not prefer either response."""
        first = labels[..., 0] > labels[..., 1]
        tied = labels[..., 0] == labels[..., 1]

        def sides(values: Tensor) -> tuple[Tensor, Tensor]:  # chosen, rejected, each (B, m)
            left, right = values[:, :1], values[:, 1:]
            return torch.where(first, left, right), torch.where(first, right, left)

        total = scores.new_zeros(first.shape)
        for name, factor in zip(self.types, self.weights, strict=True):
            if name == LIKELIHOOD:
                chosen, _ = sides(scores if likelihood is None else likelihood)
                scored, pairs = (~tied * sides(lengths)[0]).sum(0), (~tied).sum(0)
                value = -chosen * pairs / scored.clamp(min=1)
            else:
                divisors = lengths if tokens is None else tokens
                value = self._value(name, sides, scores, divisors, reference, beta, tied)
            total = total + factor * value
        return torch.where(tied, 0.0, total)

    def _value(
        self, name: str, sides: Any, scores: Tensor, lengths: Tensor, reference: Any, beta: Tensor, tied: Tensor
    ) -> Tensor:
        options = {"beta": beta, "loss_type": name, **self.options.get(name, {})}
        if name in AVERAGED:
            divergence = options.pop("f_divergence", "reverse_kl")
            if divergence != "reverse_kl":
                # f' of the sum is averaged, not f' of the average: its own constant no longer cancels.
                ratio = scores if reference is None else scores - reference
                value, divisor, constant = regularised(ratio, divergence, options.pop("f_alpha", 0.5))
                scores, reference = value / divisor + constant, None
            scores = scores / lengths.clamp(min=1)
            reference = None if reference is None else reference / lengths.clamp(min=1)
        chosen, rejected = sides(scores)
        base = (None, None) if reference is None else sides(reference)
        if name not in WHOLE_BATCH:
            return bradley_terry(
                chosen, rejected, reference_chosen=base[0], reference_rejected=base[1], reduction="none", **options
            )
        if beta.ndim == 2 and beta.shape[0] > 1:
            raise ValueError(
                f"loss_type {name!r} sorts the pairs, after which none has a β of its own; leave out "
                "beta_low, beta_high and the column objective_beta"
            )
        total = torch.zeros_like(chosen)
        for objective in range(chosen.shape[1]):
            rows = (~tied[:, objective]).nonzero()[:, 0]
            known = [None if part is None else part[rows, objective] for part in base]
            options["beta"] = beta.expand(1, tied.shape[1])[0, objective : objective + 1]
            value = bradley_terry(
                chosen[rows, objective],
                rejected[rows, objective],
                reference_chosen=known[0],
                reference_rejected=known[1],
                reduction="none",
                **options,
            )
            total = total.index_put((rows, torch.full_like(rows, objective)), value[:, 0])
        return total


def pair_loss_of(args: Any) -> PairLoss | None:
    """Return the loss of pairs that `loss_type` and its options ask for; None where a list loss is the same.

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
    if types == ["sigmoid"] and weights == [1.0] and not given:
        return None
    options = {name: {o: v for o, v in given.items() if name in users[o]} for name in types}
    return PairLoss(types, weights, options)


def _has(name: str, option: str) -> bool:
    return option in LOSSES[name].options and (option != "label_smoothing" or name in _SMOOTHED)
