"""Losses of models that give an item one score for each objective, (B, m, K): reward models and cross-encoders.

Every objective of every list is a list of its own, over the items that it labels, so missing labels cost nothing and
each objective may have a loss of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mopl import losses
from mopl._arguments import check_choice
from mopl._counted import counted, there_are
from mopl.integrations._settings import LIST_LOSSES
from mopl.language_models.collate import ListBatch
from mopl.language_models.scoring import ordered_pairs
from mopl.ranking.metrics import ndcg

PAIRS = "bradley_terry"
HEAD_LOSSES = (*LIST_LOSSES, PAIRS)
OneLoss = str | Callable[..., Tensor]
NOT_DEFINED = -1.0  # NDCG of a list with negative labels


class HeadLoss:
    """The losses of m objectives, each on a score of its own.

    Args:
        loss: A name of `HEAD_LOSSES`, or a function with the arguments of `mopl.losses.listwise_dpo`; one, or m of
            them. `"bradley_terry"` is for lists of two.
        objectives: m.

    Raises:
        ValueError: If a name is unknown, or there are neither one nor m losses.
        TypeError: If a loss is neither a name nor a function.
    """

    def __init__(self, loss: OneLoss | Sequence[OneLoss], objectives: int) -> None:
        given: list[OneLoss] = [loss] if isinstance(loss, str) or callable(loss) else list(loss)
        if len(given) not in (1, objectives):
            many = f"{there_are(len(given), 'loss')} but {counted(objectives, 'objective')}"
            raise ValueError(f"{many}; give one, or one for each")
        self.names = given * objectives if len(given) == 1 else given
        self._columns: dict[Callable[..., Tensor], list[int]] = {}
        self.functions = [_function(name) for name in self.names]
        for column, function in enumerate(self.functions):
            self._columns.setdefault(function, []).append(column)

    @property
    def pairs_only(self) -> bool:
        """Whether a loss is for lists of two."""
        return PAIRS in self.names

    @property
    def takes_margin(self) -> bool:
        """Whether all losses have a margin."""
        return all(function is losses.pairwise_logistic for function in self.functions)

    def __call__(
        self,
        scores: Tensor,  # (B, m, K)
        labels: Tensor,  # (B, m, K)
        mask: Tensor,  # (B, m, K) bool
        beta: Tensor,  # broadcasts to (B, m)
        margin: Tensor | None = None,  # (B,)
    ) -> Tensor:  # (B, m)
        """Return the loss of each list and objective; exactly 0 where it labels fewer than two items.

        Args:
            scores: In float32 or float64.
            labels: Higher is better; anything where `mask` is false.
            mask: Where a label counts.
            beta: Factor on the scores.
            margin: In nats, for `pairwise_logistic` and `bradley_terry`.
        """
        lists, objectives, width = scores.shape
        counts = mask.sum(-1) >= 2
        labels = torch.where(mask, labels, 0.0)
        if self.pairs_only and width > 2:
            raise ValueError(
                f"bradley_terry compares two responses but there is a list of {width}; take pairwise_logistic, which "
                "is the same over all pairs of a list, or another loss of lists"
            )
        beta = beta.expand(lists, objectives)
        found = scores.new_zeros(lists, objectives)
        for function, columns in self._columns.items():
            parts = [value[:, columns].reshape(-1, width) for value in (scores, labels, mask)]
            extra = {} if margin is None else {"margin": margin[:, None].expand(lists, len(columns)).reshape(-1, 1)}
            value = function(
                parts[0], parts[1][:, None], mask=parts[2], beta=beta[:, columns].reshape(-1, 1), reduction="none",
                **extra,
            ).view(lists, len(columns))  # fmt: skip
            where = (slice(None), torch.tensor(columns, device=scores.device))
            found = found.index_put((torch.arange(lists, device=scores.device)[:, None], where[1]), value.to(found))
        return torch.where(counts, found, 0.0)


def centring(scores: Tensor, exists: Tensor) -> Tensor:  # (B, m, K), (B, K) -> (B, m)
    """Return (2 / K Σ_k s_k)², which of pairs is the square of the sum that TRL's `center_rewards_coefficient` weighs.

    Of Eisenstein et al. 2023 (2312.09244), for lists of any length.
    """
    exists = exists[:, None]
    mean = torch.where(exists, scores, 0.0).sum(-1) / exists.sum(-1).clamp(min=1)
    return (2 * mean).square()


def order_of(scores: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many pairs of labelled items scores (B, m, K) put in order, and how many there are, each (B, m)."""
    shape, width = scores.shape[:2], scores.shape[2]
    flat, labels, mask = (value.reshape(-1, width) for value in (scores, labels, mask))
    nothing = torch.empty(0, dtype=torch.long)
    each = ListBatch({}, labels[:, None], mask, mask[:, None], mask.any(-1, keepdim=True), nothing, nothing)
    right, pairs = ordered_pairs(flat, each)
    return right.view(shape), pairs.view(shape)


def gains_of(scores: Tensor, labels: Tensor, mask: Tensor, cut: int) -> Tensor:
    """Return NDCG (B, m) of the labelled items at a cut, with linear gains.

    It is NaN where no label is positive, and `NOT_DEFINED` where one is negative.
    """
    width = scores.shape[2]
    flat, labels, mask = (value.reshape(-1, width) for value in (scores, torch.where(mask, labels, 0.0), mask))
    negative = (labels < 0).any(-1)
    found = ndcg(flat, torch.where(negative[:, None], 0.0, labels), k=cut, mask=mask)
    value = torch.where(found.valid.reshape(-1), found.values.reshape(-1).to(flat), torch.nan)
    return torch.where(negative, NOT_DEFINED, value).view(scores.shape[:2])


def _function(loss: OneLoss) -> Callable[..., Tensor]:
    if callable(loss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"loss is {loss!r} but must be one of {', '.join(HEAD_LOSSES)}, or a function like them")
    check_choice(loss, HEAD_LOSSES, "loss")
    # With two items it is Bradley-Terry, ties and margins included.
    return losses.pairwise_logistic if loss == PAIRS else getattr(losses, loss)


def named(loss: OneLoss) -> str:
    """Return what a loss is called."""
    inner = loss.func if isinstance(loss, functools.partial) else loss
    return inner if isinstance(inner, str) else getattr(inner, "__name__", type(inner).__name__)
