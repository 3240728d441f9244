"""The weights at which a front is evaluated."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

LATTICE_OBJECTIVES = (
    4  # a lattice with fewer steps than objectives has no interior point, and 126 points give 4 at m = 5
)
DEFAULT_POINTS = {1: 1, 2: 11, 3: 66, 4: 84}
DEFAULT_SOBOL_POINTS = 126


def weight_grid(objectives: int, points: int | None = None) -> Tensor:
    """Grid of weight vectors on the simplex, vertices included; the same at every call.

    Up to 4 objectives it is the simplex lattice of Das and Dennis (1998): all vectors of multiples of 1/p. Above, it
    is the vertices and the spacings of a scrambled Sobol sequence: sorted Sobol points of the unit cube cut [0, 1]
    into m parts, which are uniform on the simplex. Hypervolume grows with the number of points, so compare methods on
    equal grids only.

    Args:
        objectives: m.
        points: Number of vectors. Default 11 for m = 2 (0, 0.1, ..., 1), 66 for m = 3, 84 for m = 4, 126 above.
            For m = 3 and 4 only sizes of lattices exist: C(p + m - 1, m - 1).

    Returns:
        (points, m) float64. A lattice is in lexicographic order, so for m = 2 the first weight rises from 0 to 1; a
        Sobol grid begins with the vertices.

    Raises:
        ValueError: If there is no grid of that size; the message names the nearest sizes.
    """
    if objectives < 1:
        raise ValueError(f"objectives is {objectives} but must be at least 1")
    if objectives > LATTICE_OBJECTIVES:
        return _sobol_spacings(objectives, DEFAULT_SOBOL_POINTS if points is None else points)
    return _lattice(objectives, DEFAULT_POINTS[objectives] if points is None else points)


def _lattice(objectives: int, points: int) -> Tensor:
    """Return the lattice that has `points` points."""
    steps = 1
    while _lattice_size(objectives, steps) < points and objectives > 1:
        steps += 1
    size = _lattice_size(objectives, steps)
    if size != points:
        below = f"{_lattice_size(objectives, steps - 1)} or " if steps > 1 else "at least " if objectives > 1 else ""
        raise ValueError(f"points is {points} but a lattice of {objectives} objectives has {below}{size} points")
    # Stars and bars: m - 1 bars among p + m - 1 places; the weights are the runs of stars between them.
    places = steps + objectives - 1
    bars = torch.tensor(list(combinations(range(places), objectives - 1)), dtype=torch.float64)
    bars = bars.reshape(size, objectives - 1)
    edges = torch.cat([bars.new_full((size, 1), -1.0), bars, bars.new_full((size, 1), float(places))], 1)
    return (edges.diff(dim=1) - 1.0) / steps


def _lattice_size(objectives: int, steps: int) -> int:
    return math.comb(steps + objectives - 1, objectives - 1)


def _sobol_spacings(objectives: int, points: int) -> Tensor:
    """Return the vertices and points - m scrambled Sobol spacings."""
    if points < objectives:
        raise ValueError(f"points is {points} but the grid holds the {objectives} vertices; pass at least {objectives}")
    vertices = torch.eye(objectives, dtype=torch.float64)
    if points == objectives:
        return vertices
    engine = torch.quasirandom.SobolEngine(objectives - 1, scramble=True, seed=0)
    cuts = engine.draw(points - objectives, dtype=torch.float64).sort(-1).values
    edges = torch.cat([cuts.new_zeros(len(cuts), 1), cuts, cuts.new_ones(len(cuts), 1)], 1)
    return torch.cat([vertices, edges.diff(dim=1)])
