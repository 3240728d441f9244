"""From scores (B, K) of lists of responses to the loss of each objective (B, m): for `mopl align` and the trainers.

A loss of lists is a function with the arguments of `mopl.losses.listwise_dpo`. A loss of pairs is a type of
`mopl.losses.bradley_terry`, or several with a factor each: a `PairLoss`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mopl._arguments import check_choice
from mopl._renamed import renamed_parameter
from mopl.experiments.cos_dpo import ListLoss
from mopl.experiments.methods import LIST_LOSSES, PAIR_LOSSES, PER_TOKEN
from mopl.language_models.collate import ListBatch, by_objective
from mopl.losses import bradley_terry, normalize_labels
from mopl.losses.pair_formulas import WHOLE_BATCH, regularised

LIKELIHOOD = "sft"
LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class PairLoss:
    """Losses of pairs by the names of TRL's `loss_type`, and their weights.

    They are those of `mopl.losses.bradley_terry`. Three things are added, because TRL does them outside of the
    formulas: types whose log-probabilities are averaged over tokens, types that sort what is in one forward pass, and
    `sft`, the mean of the negative log-likelihood over the tokens of all preferred responses in one forward pass.
    """

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
        reference: Tensor | None,  # (B, 2)
        beta: float | Tensor,  # broadcasts to (B, m)
        lengths: Tensor | None = None,  # (B, 2) tokens that are scored; None where scores are averages as types want
        tokens: Tensor | None = None,  # (B, 2) all tokens; TRL's averages count one that nothing stands before
        likelihood: Tensor | None = None,  # (B, 2) the scores for `sft`, where they are others (see `ld_alpha`)
    ) -> Tensor:  # (B, m)
        """Return the loss of each pair and objective; 0 where an objective does not prefer either response."""
        if scores.shape[1] != 2:
            raise ValueError(
                f"the loss of pairs {', '.join(self.types)} compares two responses but a list has {scores.shape[1]}; "
                "take a loss of lists: listnet or plackett-luce of `mopl align`, or a list_loss of the trainers"
            )
        first = labels[..., 0] > labels[..., 1]
        tied = labels[..., 0] == labels[..., 1]

        def sides(values: Tensor) -> tuple[Tensor, Tensor]:  # chosen, rejected, each (B, m)
            left, right = values[:, :1], values[:, 1:]
            return torch.where(first, left, right), torch.where(first, right, left)

        total = scores.new_zeros(first.shape)
        for name, factor in zip(self.types, self.weights, strict=True):
            if name == LIKELIHOOD:
                assert lengths is not None
                chosen, _ = sides(scores if likelihood is None else likelihood)
                scored, pairs = (~tied * sides(lengths)[0]).sum(0), (~tied).sum(0)
                value = -chosen * pairs / scored.clamp(min=1)
            else:
                divisors = lengths if tokens is None else tokens
                value = self._value(name, sides, scores, divisors, reference, beta, tied)
            total = total + factor * value
        return torch.where(tied, 0.0, total)

    def _value(
        self, name: str, sides: Any, scores: Tensor, lengths: Tensor | None, reference: Any, beta: Any, tied: Tensor
    ) -> Tensor:
        options = {"beta": beta, "loss_type": name, "reduction": "none", **self.options.get(name, {})}
        if name in PER_TOKEN and lengths is not None:
            divergence = options.pop("f_divergence", "reverse_kl")
            if divergence != "reverse_kl":
                # f' of the sum is averaged, not f' of the average: its own constant no longer cancels.
                ratio = scores if reference is None else scores - reference
                value, divisor, constant = regularised(ratio, divergence, options.pop("f_alpha", 0.5))
                scores, reference = value / divisor + constant, None
            scores = scores / lengths.clamp(min=1)
            reference = None if reference is None else reference / lengths.clamp(min=1)
        parts: dict[str, Tensor] = dict(zip(("chosen", "rejected"), sides(scores), strict=True))
        if reference is not None:
            parts |= zip(("reference_chosen", "reference_rejected"), sides(reference), strict=True)
        if name not in WHOLE_BATCH:
            return bradley_terry(**parts, **options)
        if isinstance(beta, Tensor) and beta.ndim == 2 and beta.shape[0] > 1:
            raise ValueError(
                f"loss_type {name!r} sorts the pairs, after which none has a β of its own; leave out "
                "beta_low, beta_high and the column objective_beta"
            )
        total = torch.zeros_like(parts["chosen"])
        betas = torch.as_tensor(beta).expand(1, tied.shape[1])[0]
        for objective in range(tied.shape[1]):
            rows = (~tied[:, objective]).nonzero()[:, 0]
            known = {side: part[rows, objective] for side, part in parts.items()}
            options["beta"] = betas[objective : objective + 1]
            value = bradley_terry(**known, **options)
            total = total.index_put((rows, torch.full_like(rows, objective)), value[:, 0])
        return total


@dataclass(frozen=True)
class ResponseLoss(ListLoss):
    """The loss of each objective of each list of responses, on scores `(B, K)`.

    Args:
        loss: As in `ListLoss`, or a type of `mopl.losses.bradley_terry` for lists of two; or a `PairLoss`, or a
            function with the arguments of `mopl.losses.listwise_dpo`, for which the options below have no meaning but
            the last one.
        ties: As in `ListLoss`; so are the next two.
        last_group: Whether Plackett-Luce charges the responses of the lowest label.
        top_k: How many ranks Plackett-Luce sees; None for all.
        labels: How ListNet turns the labels of each objective into targets: `"l1"` or `"softmax"`, one or m times.
        label_temperature: What labels are divided by before their softmax, one or m times.
        label_smoothing: Rate of flipped labels, for the pair losses that have it.
        by_objective: Some lists have labels of an objective for a part of their responses only.
    """

    CHOICES: ClassVar[tuple[str, ...]] = (*LIST_LOSSES, *PAIR_LOSSES)

    loss: str | PairLoss | LossFunction = "listnet"  # type: ignore[assignment]  # wider than that of `ListLoss`
    labels: tuple[str, ...] = ("l1",)
    label_temperature: tuple[float, ...] = (1.0,)
    label_smoothing: float = 0.0
    by_objective: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            super().__post_init__()
        for entry in self.labels:
            check_choice(entry, ("l1", "softmax"), "labels")

    @property
    def per_token(self) -> bool:
        """Whether scores are log-probabilities averaged over tokens."""
        return self.loss in PER_TOKEN

    @cached_property
    def function(self) -> PairLoss | LossFunction:
        """What computes it."""
        if not isinstance(self.loss, str):
            return self.loss
        if self.loss in LIST_LOSSES:
            return super().function
        options = {self.loss: {"label_smoothing": self.label_smoothing}} if self.label_smoothing else {}
        return PairLoss((self.loss,), options=options)

    @cached_property
    def _name_of_beta(self) -> str:
        return renamed_parameter(self.function, "temperature", "beta")

    def __call__(
        self,
        scores: Tensor,  # (B, K)
        lists: ListBatch,
        beta: float | Tensor,  # number, or broadcasts to (B, m)
        reference: Tensor | None = None,  # (B, K)
        objective: int | None = None,
        **of_pairs: Tensor | None,
    ) -> Tensor:  # (B, m), or (B, 1) for one objective
        """Return the loss vector of a batch, or that of one `objective`; exactly 0 where an objective has no labels.

        `of_pairs` are `lengths`, `tokens` and `likelihood` of `PairLoss`, which no other loss needs.
        """
        chosen = slice(None) if objective is None else slice(objective, objective + 1)
        if isinstance(beta, Tensor) and beta.ndim > 0 and beta.shape[-1] > 1:
            beta = beta[..., chosen]
        labels = (self.targets(lists) if self.loss == "listnet" else lists.labels)[:, chosen]
        if isinstance(self.function, PairLoss):
            vector = self.function(scores, labels, reference=reference, beta=beta, **of_pairs)
        else:
            vector = self._of_lists(self.function, scores, lists, labels, beta, reference, chosen)
        return torch.where(lists.objective_mask[:, chosen], vector, 0.0)

    def _of_lists(
        self, function: LossFunction, scores: Tensor, lists: ListBatch, labels: Tensor, beta: Any, reference: Any,
        chosen: slice,
    ) -> Tensor:  # fmt: skip
        shape = wanted = tuple(labels.shape[:2])
        mask, options = lists.mask, {}
        if self.by_objective:  # every objective of every list is a list of its own
            part = dataclasses.replace(lists, labels=labels, label_mask=lists.label_mask[:, chosen])
            wanted = (shape[0] * shape[1], 1)
            reference = None if reference is None else by_objective(reference, part)[0]
            scores, labels, mask = by_objective(scores, part)
            beta = beta.expand(shape).reshape(wanted) if isinstance(beta, Tensor) else beta
        elif self.needs_order and lists.order is not None:
            options["order"] = lists.order[:, chosen]
        options |= {self._name_of_beta: beta, "reduction": "none"}
        vector = function(scores, labels, reference=reference, mask=mask, **options)
        if tuple(vector.shape) != wanted:
            raise ValueError(
                f"loss gave a tensor of shape {tuple(vector.shape)} but must give {wanted}, one value for each list "
                "and objective, when it is called with reduction='none'"
            )
        return vector.reshape(shape)

    def targets(self, lists: ListBatch) -> Tensor:
        """Return the target distributions (B, m, K) of ListNet; 0 throughout where an objective has no labels."""
        objectives = range(lists.labels.shape[1])
        modes, rates = (
            each * len(objectives) if len(each) == 1 else each for each in (self.labels, self.label_temperature)
        )
        targets = [
            normalize_labels(lists.labels[:, j], mode, lists.label_mask[:, j], label_temperature=rate)  # type: ignore[arg-type]
            for j, mode, rate in zip(objectives, modes, rates, strict=True)
        ]
        return torch.stack(targets, 1)
