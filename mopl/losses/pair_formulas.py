"""The formulas behind `mopl.losses.bradley_terry`: one small function for each loss type, and which options it has.

The table in `mopl.losses.pairwise` states them; here is how they are evaluated without losing digits or overflowing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mopl.ops import pairs

_LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}  # exp stays finite, with room for a sum and a factor


@dataclass(frozen=True)
class Pair:
    """What a formula sees; every tensor is (B, m)."""

    policy: tuple[Tensor, Tensor]  # log-probabilities of chosen and rejected
    reference: tuple[Tensor, Tensor] | None
    beta: Tensor
    smoothing: Tensor | None  # None means 0
    margin: Tensor | None  # None means 0
    divergence: str
    alpha: float
    tau: float
    penalty: float

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of policy to reference, chosen and rejected."""
        if self.reference is None:
            return self.policy
        return self.policy[0] - self.reference[0], self.policy[1] - self.reference[1]

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """The implicit rewards, β times log-ratio."""
        chosen, rejected = self.ratios
        return self.times_beta(chosen), self.times_beta(rejected)

    @property
    def difference(self) -> Tensor:
        """Chosen minus rejected, each log-ratio passed through f' of the f-divergence (2309.16240).

        A term common to both cancels and is left out.
        """
        chosen, rejected = self.ratios
        value, divisor, _ = regularised(chosen, self.divergence, self.alpha)
        difference = value - regularised(rejected, self.divergence, self.alpha)[0]
        return difference if divisor == 1 else difference / divisor

    @property
    def logit(self) -> Tensor:
        """The log-odds that chosen beats rejected."""
        return self.less_margin(self.times_beta(self.difference))

    def times_beta(self, value: Tensor) -> Tensor:
        """Return β times a difference of log-probabilities, which may be infinite."""
        return pairs.times_beta(value, self.beta) if self.beta.requires_grad else self.beta * value

    def less_margin(self, value: Tensor) -> Tensor:
        """Return `value` less the margin, if there is one."""
        return value if self.margin is None else value - self.margin


def regularised(ratio: Tensor, divergence: str, alpha: float) -> tuple[Tensor, float, float]:
    """Return f'(exp(ratio)) of an f-divergence as `value, divisor, constant`: it is value / divisor + constant.

    Exponents are cut where exp would overflow, as TRL does for the alpha divergence: beyond, a response has practically
    left the policy and the gradient is 0.
    """
    largest = _LARGEST_EXPONENT[ratio.dtype]
    if divergence == "forward_kl":
        return -(-ratio).clamp(max=largest).exp(), 1.0, 1.0
    if divergence == "js_divergence":
        return logsigmoid(ratio), 1.0, math.log(2)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:  # the limit is reverse KL
        power = alpha - 1
        return _expm1((power * ratio).clamp(max=largest)), power, 0.0
    return ratio, 1.0, 0.0


def _logistic(logit: Tensor, smoothing: Tensor | None) -> Tensor:
    """Return -(1 - smoothing) log s(logit) - smoothing log s(-logit): two terms of one sign, nothing cancels."""
    loss = -logsigmoid(logit)
    return loss if smoothing is None else (1 - smoothing) * loss - smoothing * logsigmoid(-logit)


def _probability(logit: Tensor) -> Tensor:
    """Return s(logit), whose derivative s (1 - s) keeps its digits where s rounds to 1."""
    return torch.where(logit > 0, 1 - torch.sigmoid(-logit), torch.sigmoid(logit))


def _expm1(x: Tensor) -> Tensor:
    """Return exp(x) - 1, whose derivative, of autograd result + 1, keeps its digits where the result rounds to -1."""
    return torch.where(x > -1, torch.expm1(x), x.exp() - 1)


def _sigmoid(pair: Pair) -> Tensor:
    return _logistic(pair.logit, pair.smoothing)


def _hinge(pair: Pair) -> Tensor:
    return torch.relu(1 - pair.logit)


def _ipo(pair: Pair) -> Tensor:
    return (pair.difference - 0.5 / pair.beta).square()


def _exo_pair(pair: Pair) -> Tensor:
    logit, smoothing = pair.logit, pair.smoothing
    assert smoothing is not None  # a number 0 was refused
    wins = _probability(logit) * (logsigmoid(logit) - torch.log1p(-smoothing))
    return wins + _probability(-logit) * (logsigmoid(-logit) - smoothing.log())


def _robust(pair: Pair) -> Tensor:
    # (1-ε) softplus(-x) - ε softplus(x) = (1-2ε) softplus(-x) - ε x, which does not subtract two large terms.
    logit, smoothing = pair.logit, pair.smoothing
    loss = -logsigmoid(logit)
    return loss if smoothing is None else loss - smoothing / (1 - 2 * smoothing) * logit


def _discopop(pair: Pair) -> Tensor:
    # g exp(-x) as one exponential: apart they are 0 times infinity for very negative x, of which log g is a multiple.
    logit, steep = pair.logit, pair.logit / pair.tau
    # log s(-x / tau), or the 0 that it rounds to: its slope of 0 would be NaN beside an exponential that is infinite.
    nearly = torch.where(steep < -80, 0, logsigmoid(-steep))
    excess = 1 / pair.tau - 1  # where it is 0, its product with an infinite x would be NaN
    low, high = excess * logit + nearly if excess else nearly, logsigmoid(steep) - logit
    share = torch.where(logit == -torch.inf, 1, _probability(-steep))  # whose slope of 0 times infinity would be NaN
    return -logsigmoid(logit) * share + torch.where(logit < 0, low, high).exp()


def _dpop(pair: Pair) -> Tensor:
    chosen, rejected = pair.ratios
    penalised = chosen - rejected - pair.penalty * torch.relu(-chosen)
    return _logistic(pair.less_margin(pair.times_beta(penalised)), pair.smoothing)


def _nca_pair(pair: Pair) -> Tensor:
    chosen, rejected = pair.rewards
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco_pair(pair: Pair) -> Tensor:
    chosen, rejected = pair.rewards
    return -logsigmoid(pair.less_margin(chosen)) - logsigmoid(-pair.less_margin(rejected))


def _sppo_hard(pair: Pair) -> Tensor:
    (chosen, rejected), half = pair.ratios, 0.5 / pair.beta
    return (chosen - half).square() + (rejected + half).square()


def _apo_zero(pair: Pair) -> Tensor:
    chosen, rejected = pair.rewards
    return _probability(-chosen) + _probability(rejected)


def _apo_down(pair: Pair) -> Tensor:
    # Ratios are subtracted before β multiplies: the difference of close numbers is exact.
    chosen, rejected = pair.ratios
    return _probability(pair.times_beta(chosen)) + _probability(pair.times_beta(rejected - chosen))


def _aot(pair: Pair) -> Tensor:
    difference = (pair.policy[0] - pair.policy[1]).sort(0).values
    if pair.reference is not None:
        difference = difference - (pair.reference[0] - pair.reference[1]).sort(0).values
    return _logistic(pair.times_beta(difference), pair.smoothing)


def _aot_unpaired(pair: Pair) -> Tensor:
    chosen, rejected = (ratio.sort(0).values for ratio in pair.ratios)
    return _logistic(pair.times_beta(chosen - rejected), pair.smoothing)


class LossType(NamedTuple):
    """One type of pair loss."""

    formula: Callable[[Pair], Tensor]
    options: frozenset[str]  # of bradley_terry's; any other one must stay at its default
    whole_batch: bool = False
    multiplies: bool = True  # differences by β; False: compares them with a target that β divides

    def of(self, pair: Pair) -> Tensor:
        """Return the losses (B, m)."""
        loss = self.formula(pair)
        return pairs.or_infinite(loss, pair.beta) if self.multiplies and pair.beta.requires_grad else loss


def _type(formula: Callable[[Pair], Tensor], *options: str, **others: bool) -> LossType:
    if "f_divergence" in options:
        options = (*options, "f_alpha")
    return LossType(formula, frozenset(options), **others)


LOSSES = {
    "sigmoid": _type(_sigmoid, "label_smoothing", "margin", "f_divergence"),
    "sigmoid_norm": _type(_sigmoid, "label_smoothing", "margin", "f_divergence"),
    "hinge": _type(_hinge, "margin", "f_divergence"),
    "ipo": _type(_ipo, "f_divergence", multiplies=False),
    "exo_pair": _type(_exo_pair, "label_smoothing", "margin", "f_divergence"),
    "robust": _type(_robust, "label_smoothing", "margin", "f_divergence"),
    "discopop": _type(_discopop, "margin", "f_divergence", "discopop_tau"),
    "dpop": _type(_dpop, "label_smoothing", "margin", "dpop_lambda"),
    "nca_pair": _type(_nca_pair),
    "bco_pair": _type(_bco_pair, "margin"),
    "sppo_hard": _type(_sppo_hard, multiplies=False),
    "apo_zero": _type(_apo_zero),
    "apo_down": _type(_apo_down),
    "aot": _type(_aot, "label_smoothing", whole_batch=True),
    "aot_unpaired": _type(_aot_unpaired, "label_smoothing", whole_batch=True),
}

WHOLE_BATCH = tuple(name for name, kind in LOSSES.items() if kind.whole_batch)
