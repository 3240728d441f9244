"""Indicators of fronts beside exact arithmetic: rational numbers where the definition is made of sums and products."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hostile import budget
from hypothesis import given
from hypothesis import strategies as st

from mopl.pareto import (
    epsilon_additive,
    gd_plus,
    hypervolume,
    igd_plus,
    kendall_tau,
    max_gap,
    non_dominated,
    spacing,
    spearman,
    steerability,
)

SIZES = {"grid": 1.0, "unit": 1.0, "offset": 1.0, "huge": 1e200, "tiny": 1e-200, "wide": 1.0}


@st.composite
def fronts(draw: st.DrawFn, objectives: int, least: int = 0, most: int = 6) -> np.ndarray:
    n = draw(st.integers(least, most))
    kind = draw(st.sampled_from(list(SIZES)))
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    points = g.integers(-2, 3, (n, objectives)).astype(float) if kind == "grid" else g.normal(size=(n, objectives))
    if kind == "offset":
        points = 1e6 + np.round(points, 2)
    if kind == "wide":
        points = np.sign(points) * 10.0 ** g.uniform(-40, 40, points.shape)
    return points * SIZES[kind]


def fractions(points: np.ndarray) -> list[list[Fraction]]:
    return [[Fraction(x) for x in row] for row in np.asarray(points).tolist()]


def near(found: float, expected: Fraction, size: Fraction | float, unit: float = 1e-12) -> None:
    """Assert equality to `unit` of `size`, what the terms of the figure are large as."""
    limit = unit * float(size)
    assert abs(Fraction(found) - expected) <= Fraction(limit) + Fraction(1, 10**320), (found, float(expected))


@budget(80)
@given(st.data(), st.integers(1, 4))
def test_hypervolume_by_inclusion_and_exclusion(data: st.DataObject, m: int) -> None:
    points = data.draw(fronts(m))
    maximise = data.draw(st.lists(st.booleans(), min_size=m, max_size=m))
    reference = data.draw(fronts(m, 1, 1))[0]
    if len(points) and data.draw(st.booleans()):
        reference = np.where(maximise, points.min(0), points.max(0)) - np.where(maximise, 1, -1) * abs(points).max(0)
    signs = [1 if up else -1 for up in maximise]
    boxes = [
        [s * (p - Fraction(c)) for s, p, c in zip(signs, row, reference.tolist(), strict=True)]
        for row in fractions(points)
    ]
    boxes = [box for box in boxes if min(box) > 0]
    volume = sum(
        (-1) ** (size + 1) * math.prod(min(side) for side in zip(*some, strict=True))
        for size in range(1, len(boxes) + 1)
        for some in itertools.combinations(boxes, size)
    )
    if volume and not Fraction(1, 10**305) < volume < Fraction(10**308):
        try:
            found = hypervolume(points, reference.tolist(), maximise=maximise)
        except ValueError as error:
            assert "float64" in str(error)
            return
    else:
        found = hypervolume(points, reference.tolist(), maximise=maximise)
    near(found, Fraction(volume), volume, 1e-9)


@budget(80)
@given(st.data(), st.integers(1, 3))
def test_dominance_and_distances_by_definition(data: st.DataObject, m: int) -> None:
    points, front = data.draw(fronts(m, 1)), data.draw(fronts(m, 1))
    maximise = data.draw(st.lists(st.booleans(), min_size=m, max_size=m))
    signs = [1 if up else -1 for up in maximise]
    a, f = ([[s * x for s, x in zip(signs, row, strict=True)] for row in fractions(p)] for p in (points, front))
    kept = [not any(q != p and all(x >= y for x, y in zip(q, p, strict=True)) for q in a) for p in a]
    assert non_dominated(points, maximise=maximise).tolist() == kept
    size = max(abs(x) for row in [*a, *f] for x in row)
    shift = max(min(max(y - x for x, y in zip(p, q, strict=True)) for p in a) for q in f)
    near(epsilon_additive(points, front, maximise=maximise), shift, size)

    def short(p: list[Fraction], q: list[Fraction]) -> Fraction:
        """How far p falls short of q: the length of what q has more."""
        square = sum(max(y - x, Fraction(0)) ** 2 for x, y in zip(p, q, strict=True))
        scale = Fraction(2) ** 2400
        return Fraction(math.isqrt(int(square * scale)), 2**1200)

    near(igd_plus(points, front, maximise=maximise), sum(min(short(p, q) for p in a) for q in f) / len(f), size)
    near(gd_plus(points, front, maximise=maximise), sum(min(short(p, q) for q in f) for p in a) / len(a), size)


@budget(80)
@given(st.data(), st.integers(1, 3))
def test_evenness_by_definition(data: st.DataObject, m: int) -> None:
    points = data.draw(fronts(m))
    p = fractions(points)
    n = len(p)
    size = max((abs(x) for row in p for x in row), default=Fraction(0))
    scale = 2**1200

    def root(square: Fraction) -> Fraction:
        return Fraction(math.isqrt(int(square * scale**2)), scale)

    squares = {(i, k): sum((x - y) ** 2 for x, y in zip(p[i], p[k], strict=True)) for i in range(n) for k in range(n)}
    edges, together = [], {i: {i} for i in range(n)}
    for (i, k), square in sorted(squares.items(), key=lambda item: item[1]):  # Kruskal's algorithm
        if k not in together[i]:
            edges.append(square)
            whole = together[i] | together[k]
            for member in whole:
                together[member] = whole
    gap = root(max(edges, default=Fraction(0)))
    near(max_gap(points), gap, max(gap, size * Fraction(1, 10**6)))
    if n < 3:
        assert spacing(points) == 0
        return
    nearest = [
        min(sum(abs(x - y) for x, y in zip(p[i], p[k], strict=True)) for k in range(n) if k != i) for i in range(n)
    ]
    mean = sum(nearest) / n
    near(spacing(points), root(sum((d - mean) ** 2 for d in nearest) / (n - 1)), max(size, max(nearest)))


@budget(60)
@given(st.data(), st.integers(1, 3))
def test_steerability_by_definition(data: st.DataObject, m: int) -> None:
    points = data.draw(fronts(m, 1))
    n = len(points)
    g = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    weights = g.dirichlet([0.7] * m, n)
    maximise = data.draw(st.lists(st.booleans(), min_size=m, max_size=m))
    figures = steerability(weights, points, maximise=maximise)
    signs = [1 if up else -1 for up in maximise]
    u = [[s * x for s, x in zip(signs, row, strict=True)] for row in fractions(points)]
    w = fractions(weights)
    own = [sum(a * b for a, b in zip(w[i], u[i], strict=True)) for i in range(n)]
    best = [max(sum(a * b for a, b in zip(w[i], v, strict=True)) for v in u) for i in range(n)]
    size = max(abs(x) for row in u for x in row)
    near(figures["achieved_utility"], sum(own) / n, size)
    near(figures["front_utility"], sum(best) / n, size)
    near(figures["steering_regret"], (sum(best) - sum(own)) / n, size)
    assert figures["steering_regret"] >= 0
    for j in range(m):
        x, y = [row[j] for row in w], [row[j] for row in u]
        assert figures["kendall_tau"][j] == pytest.approx(tau(x, y), abs=1e-12)
        assert figures["spearman"][j] == pytest.approx(rho(x, y), abs=1e-12)


def tau(x: list[Fraction], y: list[Fraction]) -> float:
    """Kendall's tau-b: concordant minus discordant pairs, over the pairs untied in either."""

    def sign(a: Fraction, b: Fraction) -> int:
        return (a > b) - (a < b)

    pairs = list(itertools.combinations(range(len(x)), 2))
    score = sum(sign(x[i], x[k]) * sign(y[i], y[k]) for i, k in pairs)
    untied = [sum(v[i] != v[k] for i, k in pairs) for v in (x, y)]
    return score / math.sqrt(untied[0] * untied[1]) if all(untied) else 0.0


def rho(x: list[Fraction], y: list[Fraction]) -> float:
    """Pearson's correlation of mean ranks."""
    ranks = [[Fraction(sum(b < a for b in v)) + Fraction(sum(b == a for b in v) - 1, 2) for a in v] for v in (x, y)]
    centred = [[r - sum(rank) / len(rank) for r in rank] for rank in ranks]
    norms = [sum(r * r for r in rank) for rank in centred]
    return (
        float(sum(a * b for a, b in zip(*centred, strict=True))) / math.sqrt(norms[0] * norms[1]) if all(norms) else 0.0
    )


@budget(60)
@given(st.data(), st.integers(0, 12))
def test_rank_correlations_of_any_vectors(data: st.DataObject, n: int) -> None:
    x, y = (
        data.draw(st.lists(st.sampled_from([0.0, 1.0, -1.0, 1e300, -1e300, 5e-324, 0.5]), min_size=n, max_size=n))
        for _ in "xy"
    )
    pair = [Fraction(v) for v in x], [Fraction(v) for v in y]
    tensors = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    assert kendall_tau(*tensors) == pytest.approx(tau(*pair), abs=1e-12)
    assert spearman(*tensors) == pytest.approx(rho(*pair), abs=1e-12)
