"""Numbers that know how far off honest arithmetic would be: the fuzz tests' oracles are written in them.

A `Real` is a number in fifty digits and a bound on the error that the same formula would collect in floating point of
unit roundoff u, by running error analysis (Wilkinson 1963; Higham, Accuracy and Stability of Numerical Algorithms,
section 3.3): each operation adds u times its result, and passes on the errors of its operands by its largest
derivative on the way. An oracle that is the textbook's formula, in a form in which nothing large cancels, therefore
brings its own tolerance: it is small where the problem is well-conditioned, whatever the size of the numbers, and grows
only where the inputs do not say more. Differences that the dtype can hold are exact, and a number that is too large for
the dtype has an infinite error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import mpmath
import torch
from mpmath import mp, mpf

DIGITS = 50
_format: dict = {"unit": 2.0**-53, "largest": math.inf, "dtype": torch.float64}


@contextmanager
def arithmetic(dtype: torch.dtype) -> Iterator[None]:
    """Count errors as arithmetic in `dtype` makes them."""
    before = dict(_format)
    _format.update(unit=torch.finfo(dtype).eps / 2, largest=torch.finfo(dtype).max, dtype=dtype)
    try:
        with mp.workdps(DIGITS):
            yield
    finally:
        _format.update(before)


def unit() -> float:
    """Return the unit roundoff of the arithmetic."""
    return _format["unit"]


def size(value: mpf) -> float:
    """Return |value| as a float; inf where it is too large."""
    try:
        return abs(float(value))
    except OverflowError:
        return math.inf


def _is_held(value: mpf) -> bool:
    """Say whether the format holds the number exactly."""
    near = float(value)
    if near != value:
        return False
    return _format["dtype"] == torch.float64 or float(torch.tensor(near, dtype=_format["dtype"])) == near


class Real:
    """A number and a bound on the error of its evaluation."""

    __slots__ = ("error", "value")

    def __init__(self, value: mpf | float, error: float = 0.0) -> None:
        self.value = value if isinstance(value, mpf) else mpf(value)
        self.error = error if size(self.value) <= _format["largest"] else math.inf

    def __repr__(self) -> str:
        return f"{mpmath.nstr(self.value, 10)} ± {self.error:.1e}"

    def __add__(self, other: Real | float) -> Real:
        other = real(other)
        value = self.value + other.value
        error = self.error + other.error
        return Real(value, 0.0 if not error and _is_held(value) else error + _format["unit"] * size(value))

    def __neg__(self) -> Real:
        return Real(-self.value, self.error)

    def __sub__(self, other: Real | float) -> Real:
        return self + -real(other)

    def __mul__(self, other: Real | float) -> Real:
        other = real(other)
        value = self.value * other.value
        passed = size(self.value) * other.error + size(other.value) * self.error + self.error * other.error
        return Real(value, 0.0 if not passed and _is_held(value) else passed + _rounding(value))

    def __truediv__(self, other: Real | float) -> Real:
        other = real(other)
        value = self.value / other.value
        divisor = size(other.value) - other.error
        passed = (self.error + size(value) * other.error) / divisor if divisor > 0 else math.inf
        return Real(value, passed + _rounding(value))

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: float) -> Real:
        return real(other) - self

    def __rtruediv__(self, other: float) -> Real:
        return real(other) / self


def real(value: Real | mpf | float) -> Real:
    """Return a number as an exact `Real`."""
    return value if isinstance(value, Real) else Real(value)


def _rounding(value: mpf) -> float:
    """Return the error of rounding: relative, but absolute below the smallest normal number, which may be flushed."""
    tiny = torch.finfo(_format["dtype"]).tiny
    magnitude = size(value)
    return _format["unit"] * magnitude + (tiny if magnitude < 2 * tiny and value else 0.0)


def _nearest(x: Real) -> mpf:
    """Return how near to 0 the number may be."""
    return max(abs(x.value) - x.error, mpf(0))


def exp(x: Real) -> Real:
    value = mpmath.exp(x.value)
    return Real(value, size(mpmath.exp(x.value + x.error) * x.error) + 2 * _rounding(value))


def expm1(x: Real) -> Real:
    value = mpmath.expm1(x.value)
    return Real(value, size(mpmath.exp(x.value + x.error) * x.error) + 2 * _rounding(value))


def log(x: Real) -> Real:
    value = mpmath.log(x.value)
    room = size(x.value) - x.error
    return Real(value, (x.error / room if room > 0 else math.inf) + 2 * _rounding(value))


def log1p(x: Real) -> Real:
    value = mpmath.log1p(x.value)
    room = size(1 + x.value) - x.error
    return Real(value, (x.error / room if room > 0 else math.inf) + 2 * _rounding(value))


def sqrt(x: Real) -> Real:
    value = mpmath.sqrt(x.value)
    return Real(value, (x.error / (2 * size(value)) if value else math.sqrt(x.error)) + 2 * _rounding(value))


def tanh(x: Real) -> Real:
    value = mpmath.tanh(x.value)
    return Real(value, size(mpmath.sech(_nearest(x)) ** 2 * x.error) + 2 * _rounding(value))


def sigmoid(x: Real) -> Real:
    small = mpmath.exp(-abs(x.value))
    value = (1 if x.value >= 0 else small) / (1 + small)
    return Real(value, size(mpmath.sech(_nearest(x) / 2) ** 2 / 4 * x.error) + 2 * _rounding(value))


def softplus(x: Real) -> Real:
    """log(1 + e^x) = -log s(-x)."""
    value = max(x.value, mpf(0)) + mpmath.log1p(mpmath.exp(-abs(x.value)))
    slope = 1 / (1 + mpmath.exp(-x.value - x.error))
    return Real(value, size(slope * x.error) + 2 * _rounding(value))


def absolute(x: Real) -> Real:
    return Real(abs(x.value), x.error)


def total(terms: Iterable[Real]) -> Real:
    """Sum in any order."""
    terms = list(terms)
    rounds = min(len(terms) - 1, 4 + math.ceil(math.log2(len(terms) + 1)))
    value = mpmath.fsum(t.value for t in terms) if terms else mpf(0)
    if len(terms) < 2:
        return terms[0] if terms else Real(0)
    error = sum(t.error for t in terms) + rounds * _format["unit"] * sum(size(t.value) for t in terms)
    return Real(value, error)


class Dual:
    """A `Real` with its derivatives by named inputs: forward-mode differentiation of textbook formulas."""

    __slots__ = ("slopes", "value")

    def __init__(self, value: Real, slopes: dict[str, Real] | None = None) -> None:
        self.value, self.slopes = value, slopes or {}

    @staticmethod
    def leaf(name: str, value: Real | float) -> Dual:
        return Dual(real(value), {name: real(1)})

    def _chain(self, value: Real, own: Real | float, other: Dual | None = None, by_other: Real | float = 0) -> Dual:
        slopes = {name: slope * own for name, slope in self.slopes.items()}
        if other is not None:
            for name, slope in other.slopes.items():
                part = slope * by_other
                slopes[name] = slopes[name] + part if name in slopes else part
        return Dual(value, slopes)

    def __add__(self, other: Dual | float) -> Dual:
        other = dual(other)
        return self._chain(self.value + other.value, 1, other, 1)

    def __neg__(self) -> Dual:
        return self._chain(-self.value, -1)

    def __sub__(self, other: Dual | float) -> Dual:
        other = dual(other)
        return self._chain(self.value - other.value, 1, other, -1)

    def __mul__(self, other: Dual | float) -> Dual:
        other = dual(other)
        return self._chain(self.value * other.value, other.value, other, self.value)

    def __truediv__(self, other: Dual | float) -> Dual:
        other = dual(other)
        ratio = self.value / other.value
        return self._chain(ratio, 1 / other.value, other, -ratio / other.value)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: float) -> Dual:
        return dual(other) - self

    def __rtruediv__(self, other: float) -> Dual:
        return dual(other) / self

    def map(self, function: Callable[[Real], Real], derivative: Callable[[Real], Real]) -> Dual:
        return self._chain(function(self.value), derivative(self.value))

    def exp(self) -> Dual:
        return self.map(exp, exp)

    def expm1(self) -> Dual:
        return self.map(expm1, exp)

    def log(self) -> Dual:
        return self.map(log, lambda x: 1 / x)

    def softplus(self) -> Dual:
        return self.map(softplus, sigmoid)

    def sigmoid(self) -> Dual:
        return self.map(sigmoid, lambda x: sigmoid(x) * sigmoid(-x))

    def tanh(self) -> Dual:
        return self.map(tanh, lambda x: (1 - tanh(x)) * (1 + tanh(x)))

    def sqrt(self) -> Dual:
        return self.map(sqrt, lambda x: 1 / (2 * sqrt(x)))

    def square(self) -> Dual:
        return self.map(lambda x: x * x, lambda x: 2 * x)

    def relu(self) -> Dual:
        if abs(self.value.value) <= 8 * self.value.error or not self.value.value:  # either slope may be right
            return Dual(self.value, {name: Real(slope.value, math.inf) for name, slope in self.slopes.items()})
        return self if self.value.value > 0 else dual(0)


def dual(value: Dual | Real | float) -> Dual:
    return value if isinstance(value, Dual) else Dual(real(value))


def dual_total(terms: Iterable[Dual]) -> Dual:
    terms = list(terms)
    names = {name for term in terms for name in term.slopes}
    return Dual(
        total(t.value for t in terms),
        {name: total(t.slopes[name] for t in terms if name in t.slopes) for name in names},
    )
