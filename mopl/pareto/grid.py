"""The weights at which a front is evaluated."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from mopl._arguments import check_choice

# A lattice with fewer steps than objectives has no interior point, and 126 points give 4 steps at m = 5.
LATTICE_OBJECTIVES = 4
Density = Literal["fine", "medium", "coarse"]
# Points of the default grids for 1, 2, 3, 4 and more objectives. Coarse: the smallest lattices with a point inside the
# simplex for 2 and 3, with the middle of every edge for 4. Medium: 11 points for 5 objectives are those of COS-DPO.
DEFAULT_POINTS: dict[Density, tuple[int, ...]] = {
    "fine": (1, 11, 66, 84, 126),
    "medium": (1, 11, 15, 20, 11),
    "coarse": (1, 5, 10, 10, 16),
}


def weight_grid(objectives: int, points: int | None = None, *, density: Density = "fine") -> Tensor:
    """Grid of weight vectors on the simplex, vertices included; the same at every call.

    Up to 4 objectives it is the simplex lattice of Das and Dennis (1998): all vectors of multiples of 1/p. Above, it
    is the vertices and the spacings of a scrambled Sobol sequence: sorted Sobol points of the unit cube cut [0, 1]
    into m parts, which are uniform on the simplex. Hypervolume grows with the number of points, so compare methods on
    equal grids only.

    Args:
        objectives: m.
        points: Number of vectors; None: as `density` says. For m = 3 and 4 only sizes of lattices exist:
            C(p + m - 1, m - 1).
        density: The default number of vectors for m = 2, 3, 4 and above. "fine": 11 (0, 0.1, ..., 1), 66, 84, 126, for
            a model that is asked. "medium": 11, 15, 20, 11, which a method that trains a model for each can afford:
            the grid of a run. "coarse": 5, 10, 10, 16, for an evaluation that is repeated while a model trains. Above
            4 objectives at least m + 1.

    Returns:
        (points, m) float64. A lattice is in lexicographic order, so for m = 2 the first weight rises from 0 to 1; a
        Sobol grid begins with the vertices.

    Raises:
        ValueError: If there is no grid of that size; the message names the nearest sizes.
    """
    if objectives < 1:
        raise ValueError(f"objectives is {objectives} but must be at least 1")
    check_choice(density, tuple(DEFAULT_POINTS), "density")
    if points is None:
        defaults = DEFAULT_POINTS[density]
        lattice = objectives <= LATTICE_OBJECTIVES
        points = defaults[objectives - 1] if lattice else max(defaults[-1], objectives + 1)
    return (_lattice if objectives <= LATTICE_OBJECTIVES else _sobol_spacings)(objectives, points)


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
