"""What is handed from room to room: the head, the rows of a call, what is wanted of them, and what was found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mopl.ops.linear_logprob.shard import VocabularyShard


class Head(NamedTuple):
    """A language-model head; with `shard` this rank's part of one."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float  # 0.0: none
    logit_scale: float
    shard: VocabularyShard | None = None

    @property
    def vocabulary(self) -> int | Tensor:
        """The size of the whole vocabulary."""
        return len(self.weight) if self.shard is None else self.shard.vocabulary

    def local(self, column: Tensor) -> Tensor:
        """Return indices into the rows of `weight`, -1 for what is not there: other ranks' tokens and mistakes."""
        if self.shard is not None:
            return self.shard.local(column)
        return torch.where(column < len(self.weight), column, -1)

    def slope(self, u: Tensor, temperature: Tensor) -> Tensor:
        """Return du/da at logits u: logit_scale / temperature, times 1 - tanh^2 under a softcap."""
        factor = self.logit_scale / temperature
        if not self.softcap:
            return factor.expand(u.shape)
        bent = u * (temperature / self.softcap)
        return factor * ((1 - bent) * (1 + bent))


class Inputs(NamedTuple):
    """The rows and targets of a call."""

    hidden: Tensor  # (N, H)
    temperature: Tensor  # (N,)
    target: Tensor  # (E,) int64, negative where it does not count
    row: Tensor | None  # (E,) int64: the row of each target; None: target i belongs to row i, and E = N


class Want(NamedTuple):
    """What is wanted of a call besides log-probabilities, what of it will need a gradient, and its bounds."""

    logsumexp: bool
    entropy: bool
    frozen: bool  # hidden states need a gradient, and the head does not: directions are kept in their place
    temperature: bool  # needs a gradient
    check_targets: bool
    keep_rows: int  # whose exponentials are kept, of a trainable head
    max_rows: int

    def numbers(self) -> list[int]:
        """Return the fields as an operator takes them: in one list, which may hold symbols but no bool beside them."""
        flags = (self.logsumexp, self.entropy, self.frozen, self.temperature, self.check_targets)
        return [*map(int, flags), self.keep_rows, self.max_rows]

    @property
    def moments(self) -> int:
        """The highest moment of u under p: none, the mean (for entropies), or the variance (for their gradients)."""
        return self.entropy + self.temperature

    @property
    def directions(self) -> int:
        """How many products with the weight directions are made of: none, e W, or e (u - shift) W as well."""
        return self.frozen * (1 + self.entropy)


class Need(NamedTuple):
    """Which gradients a backward pass has to find."""

    hidden: bool
    weight: bool
    bias: bool
    temperature: bool


class Batch(NamedTuple):
    """The rows in play."""

    hidden: Tensor  # (M, H)
    temperature: Tensor  # (M,)
    counts: Tensor | None  # (M,) bool: whether a row counts; the others may hold anything. None: all do


class Sums(NamedTuple):
    """Sums over the vocabulary, the pivots left out; see `accumulate`. Those not asked for are empty (0,)."""

    shift: Tensor  # (M,)
    others: Tensor  # (M,)
    moment1: Tensor  # (M,)
    moment2: Tensor  # (M,)
    weighted: Tensor  # (M, H)
    weighted_moment: Tensor  # (M, H)


class Forward(NamedTuple):
    """Results and saved tensors of the forward pass, rows and targets that do not count being 0 everywhere."""

    logprob: Tensor  # (E,)
    logsumexp: Tensor  # (N,)
    entropy: Tensor  # (N,) or empty
    variance: Tensor  # (N,) or empty: of u under p
    direction: Tensor  # (E, H) or empty: d logprob / d hidden
    direction_logsumexp: Tensor  # (N, H) or empty
    direction_entropy: Tensor  # (N, H) or empty
    shift: Tensor  # (N,)
    total: Tensor  # (N,); 0 for rows that took no part
    pivot: Tensor  # (N,) int64; empty without `row`: the target
    pivot_logprob: Tensor  # (N,); empty without `row`: logprob
    cache: Tensor  # (keep_rows * columns,), or empty: e_v as the backend lays it out, see `cache_layout`


class Coefficients(NamedTuple):
    """The factors of `combine` for one kind of direction; see there."""

    pivot: Tensor  # (F,), or (M,) without `position`
    weighted: Tensor  # (M,)
    moment: Tensor | None = None  # (M,)
    own: Tensor | None = None  # (F,)
    column: Tensor | None = None  # (F,) int64, or -1: that term is left out
    position: Tensor | None = None  # (F,) int64

    def without(self, blank: Tensor | None) -> Coefficients:
        """Return them with 0 for rows (M,) that do not count, which makes these rows of the result 0."""
        if blank is None:
            return self
        pivot = self.pivot if self.position is not None else self.pivot.masked_fill(blank, 0)
        moment = None if self.moment is None else self.moment.masked_fill(blank, 0)
        return self._replace(pivot=pivot, weighted=self.weighted.masked_fill(blank, 0), moment=moment)


class Entries(NamedTuple):
    """Single entries of the gradient of the logits (F,)."""

    column: Tensor  # int64; outside of the vocabulary: none
    position: Tensor  # int64, the row
    coefficient: Tensor


class LogitGradient(NamedTuple):
    """The gradient of the logits as `backward` of a backend takes it; see there."""

    alpha: Tensor  # (M,)
    gamma: Tensor | None  # (M,)
    entries: Entries  # F; with several targets a row M + F, first the pivots
