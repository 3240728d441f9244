"""Hostile inputs for the fuzz tests, and the comparison of what came out with an oracle's `Real`s.

Hypothesis draws shapes, options and the *kind* of the numbers; the numbers themselves come from a generator with a
drawn seed. Kinds are listed from tame to hostile, so a failure shrinks to the tamest kind and the smallest shape.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from running import size
from torch import Tensor

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# An error may be this many times what a first-order bound of the textbook's formula allows: other orders of the
# operations, and functions of the machine that are right to two units in the last place and not to half of one.
SLACK = 8.0
NIGHT = int(os.environ.get("MOPL_FUZZ_TIMES", 100)) if os.environ.get("HYPOTHESIS_PROFILE") == "night" else 1


def budget(examples: int) -> settings:
    """Return so many examples for the suite, the same in every run; at night a hundred times as many, random ones."""
    return settings(max_examples=NIGHT * examples, deadline=None)


def _small_integers(g: np.random.Generator, n: int, dtype: torch.dtype) -> np.ndarray:
    return g.integers(-2, 3, n).astype(float)


def _normal(g: np.random.Generator, n: int, dtype: torch.dtype) -> np.ndarray:
    return g.normal(size=n) * g.choice([0.1, 1.0, 10.0])


def _confident(g: np.random.Generator, n: int, dtype: torch.dtype) -> np.ndarray:
    return g.normal(size=n) * g.choice([30.0, 100.0, 1000.0])


def _offset(g: np.random.Generator, n: int, dtype: torch.dtype) -> np.ndarray:
    return g.choice([-1e4, 300.0, 3e4]) + g.normal(size=n) * g.choice([0.5, 50.0])


def _one_huge(g: np.random.Generator, n: int, dtype: torch.dtype) -> np.ndarray:
    values = g.normal(size=n)
    if n:
        values[g.integers(n)] = g.choice([-1.0, 1.0]) * g.choice([50.0, 1e3, 1e4, 1e7, 1e30, 1e300])
    return values


def _any_size(g: np.random.Generator, n: int, dtype: torch.dtype) -> np.ndarray:
    high = math.log10(torch.finfo(dtype).max)
    return g.choice([-1.0, 1.0], n) * 10.0 ** g.uniform(-high, high - 1, n)


def _tiny(g: np.random.Generator, n: int, dtype: torch.dtype) -> np.ndarray:
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return g.choice([0.0, -0.0, least, -least, 1e3 * least, torch.finfo(dtype).tiny, 1.0], n)


def _largest(g: np.random.Generator, n: int, dtype: torch.dtype) -> np.ndarray:
    top = torch.finfo(dtype).max
    return g.choice([0.0, 1.0, top, -top, top / 4, -top / 4, top / 64], n)


KINDS: dict[str, Callable[[np.random.Generator, int, torch.dtype], np.ndarray]] = {
    "integers": _small_integers,
    "normal": _normal,
    "confident": _confident,
    "offset": _offset,
    "one huge": _one_huge,
    "any size": _any_size,
    "tiny": _tiny,
    "largest": _largest,
}
TAME = ("integers", "normal", "confident", "offset", "one huge")


def make(shape: Sequence[int], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """Return a tensor of a kind; every value is finite in its dtype."""
    values = KINDS[kind](np.random.default_rng([seed, list(KINDS).index(kind)]), math.prod(shape), dtype)
    top = torch.finfo(dtype).max
    return torch.from_numpy(np.clip(values, -top, top)).to(dtype).clamp(-top, top).reshape(tuple(shape))


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, kinds: Sequence[str] = tuple(KINDS)) -> Tensor:
    """Draw a tensor of finite numbers."""
    return make(shape, dtype, draw(st.sampled_from(list(kinds))), draw(st.integers(0, 2**20)))


LAYOUTS = ("contiguous", "transposed", "gaps", "every second", "offset")


@st.composite
def laid_out(draw: st.DrawFn, values: Tensor) -> Tensor:
    """Draw another order of the same values in memory; what lies between them is poison."""
    layout = draw(st.sampled_from(LAYOUTS))
    if layout == "contiguous" or values.ndim == 0 or not values.numel():
        return values
    if layout == "transposed":
        return values.permute(*reversed(range(values.ndim))).contiguous().permute(*reversed(range(values.ndim)))
    poison = math.nan if values.is_floating_point() else 1
    wide = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 3), poison).to(values.dtype)
    step = {"gaps": slice(0, values.shape[-1]), "offset": slice(3, 3 + values.shape[-1])}.get(
        layout, slice(1, 1 + 2 * values.shape[-1], 2)
    )
    view = wide[..., step]
    view.copy_(values)
    return view


@st.composite
def masks(draw: st.DrawFn, batch: int, items: int) -> Tensor | None:
    """Draw None, or lists of any length from none to all at any places."""
    kind = draw(st.sampled_from(["none", "all", "ragged", "prefix", "one item", "nothing"]))
    if kind == "none":
        return None
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    if kind == "prefix":
        return torch.from_numpy(np.arange(items)[None] < g.integers(0, items + 1, batch)[:, None])
    count = {"all": np.full(batch, items), "one item": np.ones(batch), "nothing": np.zeros(batch)}.get(
        kind, g.integers(0, items + 1, batch)
    )
    places = np.argsort(g.random((batch, items)), axis=1) if items else np.zeros((batch, 0))
    return torch.from_numpy(places < count[:, None])


def poison(values: Tensor, mask: Tensor | None, seed: int = 0) -> Tensor:
    """Return the tensor with NaN, infinities and the like where the mask (B, K) is false."""
    if mask is None:
        return values
    values = values.clone()
    gone = (~mask).reshape(mask.shape[0], *[1] * (values.ndim - 2), mask.shape[1]).expand(values.shape)
    g = np.random.default_rng(seed)
    junk = [math.nan, math.inf, -math.inf, 7.0] if values.is_floating_point() else [1, 0]
    values[gone] = torch.from_numpy(g.choice(junk, int(gone.sum()))).to(values.dtype)
    return values


@st.composite
def broadcastable(
    draw: st.DrawFn, batch: int, objectives: int, values: Sequence[float], dtype: torch.dtype, numbers: bool = True
) -> float | Tensor:
    """Draw a number, or a tensor (), (m,), (B, 1) or (B, m) of some of the values."""
    shapes: list[tuple[int, ...] | None] = [(), (objectives,), (batch, 1), (batch, objectives)]
    shape = draw(st.sampled_from([None, *shapes] if numbers else shapes))
    if shape is None:
        return draw(st.sampled_from(list(values)))
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    return torch.from_numpy(np.asarray(g.choice(list(values), shape))).to(dtype)


def spread(value: float | Tensor | None, batch: int, objectives: int, default: float = 1.0) -> list[list[float]]:
    """Return an option as B lists of m numbers."""
    if value is None:
        value = default
    tensor = torch.as_tensor(value, dtype=torch.float64)
    return tensor.expand(batch, objectives).tolist()


def upstream(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    """Return an upstream gradient."""
    return torch.from_numpy(np.random.default_rng([seed, 99]).normal(size=tuple(shape))).to(dtype)


def gradients(
    function: Callable[..., Tensor], leaves: Mapping[str, Tensor | None], weight: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """Return the value and the gradients of (weight * value).sum() by the leaves that are floating-point tensors."""
    given = {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in leaves.items()
    }
    value = function(**given, **options)
    found = {"value": value.detach()}
    wanted = {name: leaf for name, leaf in given.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    if value.requires_grad:
        goal = value if weight is None else (value * weight.to(value.dtype)).sum()
        by = torch.autograd.grad(goal, list(wanted.values()), allow_unused=True)
        found |= {name: g for name, g in zip(wanted, by, strict=True) if g is not None}
    return found


def agree(found: Tensor, expected: Any, name: str, may_be_nan: bool | Sequence[bool] = False) -> None:
    """Assert that every entry of a tensor is the oracle's number, as exactly as its dtype and the problem allow.

    `expected` holds a `Real`, a float (inf, or exactly this) or None (not judged) in nested lists of the same shape.
    Where `may_be_nan`, for the whole tensor or for each of its first entries, NaN is right as well.
    """
    info = torch.finfo(found.dtype)
    if found.ndim:
        assert len(found) == len(expected), f"{name} has {len(found)} rows, not {len(expected)}"
        for i, (part, target) in enumerate(zip(found, expected, strict=True)):
            agree(part, target, f"{name}[{i}]", may_be_nan if isinstance(may_be_nan, bool) else may_be_nan[i])
        return
    actual = float(found)
    if expected is None or may_be_nan:
        return
    if isinstance(expected, float):
        assert actual == expected, f"{name} is {actual} but should be {expected}"
        return
    exact = float(expected.value) if size(expected.value) < math.inf else math.copysign(math.inf, expected.value)
    limit = SLACK * expected.error + info.eps / 2 * 1.01 * abs(exact) + (info.tiny if exact else 0)
    if not limit < info.max:  # an intermediate result is beyond the dtype
        return
    if abs(exact) + limit >= info.max and math.isinf(actual):
        assert actual * exact > 0, f"{name} is {actual} but should be {exact}"
        return
    assert abs(actual - exact) <= limit, (
        f"{name} is {actual!r} but should be {exact!r}: off by {abs(actual - exact):.2e}, allowed {limit:.2e}"
    )
