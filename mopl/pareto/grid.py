"""The weights at which a front is evaluated."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from mopl._arguments import check_choice
from mopl._counted import counted

# A lattice with fewer steps than objectives has no interior point, and 126 points give 4 steps at m = 5.
LATTICE_OBJECTIVES = 4
Density = Literal["fine", "dense", "medium", "coarse"]
# Points of the default grids for 1, 2, 3, 4 and more objectives. All but the fine ones hold equal weights, which people
# ask for first. Coarse and medium: the smallest lattices with a point inside the simplex for 2 and 3; for 4 the middle
# of every edge, and of the simplex.
DEFAULT_POINTS: dict[Density, tuple[int, ...]] = {
    "fine": (1, 11, 66, 84, 126),
    "dense": (1, 11, 28, 35, 32),
    "medium": (1, 11, 10, 11, 12),
    "coarse": (1, 5, 10, 11, 16),
}


def weight_grid(objectives: int, points: int | None = None, *, density: Density = "fine") -> Tensor:
    """Grid of weight vectors on the simplex, vertices included; the same at every call.

    Up to 4 objectives it is the simplex lattice of Das and Dennis (1998): all vectors of multiples of 1/p, and equal
    weights where a size asks for one vector more than a lattice has. Above, it is the vertices, equal weights, and the
    spacings of a scrambled Sobol sequence: sorted Sobol points of the unit cube cut [0, 1] into m parts, which are
    uniform on the simplex. Hypervolume grows with the number of points, so compare methods on equal grids only.

    Args:
        objectives: m.
        points: Number of vectors; None: as `density` says. For m = 3 and 4 only sizes of lattices exist:
            C(p + m - 1, m - 1), and one more if the lattice lacks equal weights.
        density: The default number of vectors for m = 2, 3, 4 and above. "fine": 11 (0, 0.1, ..., 1), 66, 84, 126, for
            a model that is asked. "dense": 11, 28, 35, 32, the grid of a run whose models are small and take the
            weights as an input. "medium": 11, 10, 11, 12, the grid of a run that trains a model for each vector, or
            evaluates a language model. "coarse": 5, 10, 11, 16, for an evaluation that is repeated while a model
            trains. Above 4 objectives at least m + 2. All but "fine" hold equal weights.

    Returns:
        (points, m) float64. A lattice is in lexicographic order, so for m = 2 the first weight rises from 0 to 1;
        equal weights that are added to it come last. A Sobol grid begins with the vertices and equal weights.

    Raises:
        ValueError: If there is no grid of that size; the message names the nearest sizes.
    """
    if objectives < 1:
        raise ValueError(f"objectives is {objectives} but must be at least 1")
    check_choice(density, tuple(DEFAULT_POINTS), "density")
    if points is None:
        defaults = DEFAULT_POINTS[density]
        lattice = objectives <= LATTICE_OBJECTIVES
        points = defaults[objectives - 1] if lattice else max(defaults[-1], objectives + 2)
    return (_lattice if objectives <= LATTICE_OBJECTIVES else _sobol_spacings)(objectives, points)


def _lattice(objectives: int, points: int) -> Tensor:
    """Return the lattice that has `points` points, or one less and lacks equal weights, which are added then."""
    sizes = [1] if objectives == 1 else []
    steps = 1
    while objectives > 1 and (not sizes or sizes[-1] < points):
        size = _lattice_size(objectives, steps)
        sizes += [size, size + 1] if steps % objectives else [size]
        steps += 1
    if points not in sizes:
        below, above = [size for size in sizes if size < points], [size for size in sizes if size > points]
        least = "at least " if not below else f"{below[-1]} or " if above else ""
        near = least + counted((above or below)[0], "point")
        raise ValueError(f"points is {points} but a lattice of {counted(objectives, 'objective')} has {near}")
    steps = 1
    while objectives > 1 and _lattice_size(objectives, steps + 1) <= points:
        steps += 1
    size = _lattice_size(objectives, steps)
    if size < points:
        return torch.cat([_lattice(objectives, size), _equal(objectives)])
    # Stars and bars: m - 1 bars among p + m - 1 places; the weights are the runs of stars between them.
    places = steps + objectives - 1
    bars = torch.tensor(list(combinations(range(places), objectives - 1)), dtype=torch.float64)
    bars = bars.reshape(size, objectives - 1)
    edges = torch.cat([bars.new_full((size, 1), -1.0), bars, bars.new_full((size, 1), float(places))], 1)
    return (edges.diff(dim=1) - 1.0) / steps


def _equal(objectives: int) -> Tensor:
    return torch.full((1, objectives), 1 / objectives, dtype=torch.float64)


def _lattice_size(objectives: int, steps: int) -> int:
    return math.comb(steps + objectives - 1, objectives - 1)


def _sobol_spacings(objectives: int, points: int) -> Tensor:
    """Return the vertices, equal weights and points - m - 1 scrambled Sobol spacings."""
    if points < objectives:
        raise ValueError(f"points is {points} but the grid holds the {objectives} vertices; pass at least {objectives}")
    vertices = torch.eye(objectives, dtype=torch.float64)
    if points == objectives:
        return vertices
    first = torch.cat([vertices, _equal(objectives)])
    if points == objectives + 1:
        return first
    engine = torch.quasirandom.SobolEngine(objectives - 1, scramble=True, seed=0)
    cuts = engine.draw(points - len(first), dtype=torch.float64).sort(-1).values
    edges = torch.cat([cuts.new_zeros(len(cuts), 1), cuts, cuts.new_ones(len(cuts), 1)], 1)
    return torch.cat([first, edges.diff(dim=1)])
