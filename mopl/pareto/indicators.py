"""How good a set of points is: hypervolume, dominance, distances to a reference front, evenness, attainment.

Everywhere `points` are (n, m), one row a point (a tensor, an array or nested lists), and `maximise` is a bool or one
for each objective. It has no default: the library that computes most of this minimises unless told, and a wrong
direction gives a plausible number. A NaN or infinite point is an error that names it; that library ignores NaN.
The exact indicators come from moocore (the extra `eval`), which is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mopl._extras import require
from mopl.pareto._exact import exponent, homogeneous, lengths, row_blocks, scaled_back
from mopl.pareto.volumes import BOOTSTRAP, DIRECTIONS, patiently, seconds

Points: TypeAlias = Tensor | np.ndarray | Sequence[Sequence[float]]
Maximise: TypeAlias = bool | Sequence[bool]


def as_points(points: Points, name: str = "points", objectives: int | None = None) -> np.ndarray:
    """Return points as a checked (n, m) float64 array.

    Raises:
        ValueError: If the shape is not (n, m), or a point is NaN or infinite.
    """
    try:
        array = _float64(points)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be (n, m) numbers, one row a point, all of one length") from None
    if array.ndim != 2 or (objectives is not None and array.shape[1] != objectives) or array.shape[1] == 0:
        wanted = "(n, m)" if objectives is None else f"(n, {objectives})"
        raise ValueError(f"{name} has shape {array.shape} but must be {wanted}, one row a point")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise ValueError(f"point {row} of {name} is {array[row].tolist()} but every point must be finite; leave it out")
    return array


def directions(maximise: Maximise, objectives: int) -> np.ndarray:
    """Return (m,) signs: +1 where an objective is maximised, -1 where it is minimised.

    Raises:
        ValueError: If `maximise` is neither a bool nor one for each objective.
    """
    flags = np.asarray(maximise)
    if flags.dtype != np.bool_ or flags.shape not in ((), (objectives,)):
        raise ValueError(f"maximise is {maximise!r} but must be a bool, or {objectives} of them, one an objective")
    return np.where(np.broadcast_to(flags, (objectives,)), 1.0, -1.0)


def _moocore() -> Any:
    """Import moocore on use."""
    require("moocore", what="this indicator")
    import moocore

    return moocore


def hypervolume(points: Points, reference: Sequence[float] | Tensor | np.ndarray, *, maximise: Maximise) -> float:
    """Volume that the points dominate, bounded by a reference point (Zitzler and Thiele 1998), exact.

    It depends on the number of points and on the reference point: compare equal grids, and fix the reference point
    before looking at results (COS-DPO: the origin for NDCG, (1.1, 1.1) for losses). A point that is not better than
    the reference point in every objective adds nothing; no point at all has volume 0.

    Args:
        points: (n, m).
        reference: (m,), worse than the points.
        maximise: Whether larger is better, a bool or one for each objective.

    Returns:
        The volume. One that takes more than ten seconds is announced by a RuntimeWarning and can be stopped.

    Raises:
        ImportError: If moocore is not installed.
        ValueError: If a shape is wrong, a point or the reference is NaN or infinite, the message says which; or the
            volume is beyond float64; or it would take more than an hour.
    """
    array = as_points(points)
    m = array.shape[1]
    reference_point = _vector(reference, m, "reference")
    signs = directions(maximise, m)
    ahead = array[(array * signs > reference_point * signs).all(axis=1)]
    if not len(ahead):
        return 0.0
    # All points are passed on, as ever; what counts for the time are those that add something.
    n = int(non_dominated(ahead, maximise=maximise).sum()) if m > 4 else len(ahead)

    def exact(points: np.ndarray, reference: np.ndarray) -> float:
        return patiently(lambda: float(_moocore().hypervolume(points, reference, maximise=maximise)), n, m)

    value = exact(array, reference_point)
    if 0.0 < value < np.inf:
        return value
    # A product on the way left the range of float64: once more with every objective between -1 and 1.
    by = [exponent(array[:, j], reference_point[j]) for j in range(m)]
    value = exact(np.ldexp(array, np.negative(by)), np.ldexp(reference_point, np.negative(by)))
    value = scaled_back(value, sum(by), "hypervolume")
    if not value > 0.0:
        raise ValueError("the hypervolume of these points is below the smallest float64; multiply them by a constant")
    return value


def hypervolume_of_resamples(
    estimate: Points, reference: Sequence[float] | Tensor | np.ndarray, *, maximise: Maximise, samples: int
) -> tuple[Callable[[Points], float], str | None]:
    """Return what a bootstrap of the hypervolume calls for each resample, and in words what is not exact in it.

    Exact volumes where `samples` of them take seconds; else approximations from 10,000 directions (moocore's
    `hv_approx`), times the factor by which that of the estimate is off, so that only the change is approximate.

    Args:
        estimate: (n, m), the points of which resamples are drawn.
        reference: (m,), as in `hypervolume`.
        maximise: As in `hypervolume`.
        samples: How many volumes are needed.

    Returns:
        A function from points (n, m) to a volume, and None or a note.

    Raises:
        ImportError: If moocore is not installed, or is too old to approximate.
        ValueError: As `hypervolume`.
    """

    def exact(points: Points) -> float:
        return hypervolume(points, reference, maximise=maximise)

    array = as_points(estimate)
    n, m = array.shape
    if samples * seconds(n, m) <= BOOTSTRAP:
        return exact, None
    approximate = getattr(_moocore(), "hv_approx", None)
    if approximate is None:
        raise ImportError("a bootstrap of this hypervolume needs moocore 0.3 or later; run: pip install -U moocore")
    reference_point = _vector(reference, m, "reference")

    def directions_of(points: Points) -> float:
        options: dict[str, Any] = {"maximise": maximise, "nsamples": DIRECTIONS, "method": "Rphi-FWE+"}
        return float(approximate(as_points(points, objectives=m), reference_point, **options))

    known, rough = exact(array), directions_of(array)
    if known == 0.0:
        return directions_of, None
    note = f"the interval of its hypervolume is from volumes along {DIRECTIONS:,} directions, scaled to the exact one"
    return lambda points: known / rough * directions_of(points), note


def non_dominated(points: Points, *, maximise: Maximise) -> Tensor:
    """Say which points no other point dominates: better in one objective and nowhere worse.

    Equal points do not dominate each other, so duplicates share their fate. Compares all pairs, block by block.

    Args:
        points: (n, m).
        maximise: Whether larger is better, a bool or one for each objective.

    Returns:
        (n,) bool on the CPU.

    Raises:
        ValueError: If the shape is wrong, or a point is NaN or infinite.
    """
    array = as_points(points)
    better = torch.from_numpy(array * directions(maximise, array.shape[1]))
    dominated = torch.zeros(len(better), dtype=torch.bool)
    for rows in row_blocks(better.numel()):
        at_least, above = better[rows, None] >= better[None], better[rows, None] > better[None]
        dominated |= (at_least.all(-1) & above.any(-1)).any(0)
    return ~dominated


def epsilon_additive(points: Points, front: Points, *, maximise: Maximise) -> float:
    """Smallest shift of every objective that makes the points weakly dominate a reference front.

    Args:
        points: (n, m).
        front: (r, m), the reference front.
        maximise: Whether larger is better, a bool or one for each objective.

    Returns:
        The shift, in the unit of the objectives; 0 or less if the front is reached everywhere.

    Raises:
        ImportError: If moocore is not installed.
        ValueError: If a set is empty, a shape is wrong, a point is NaN or infinite, or the distance is beyond float64.
    """
    return _distance(
        "shift", lambda a, f: _moocore().epsilon_additive(a, f, maximise=maximise), points, front, maximise
    )


def igd_plus(points: Points, front: Points, *, maximise: Maximise) -> float:
    """IGD+ (Ishibuchi et al. 2015): mean over a reference front of how far the points fall short of it, at least 0.

    It is small only if the points are near the whole front.

    Args:
        points: (n, m).
        front: (r, m), the reference front.
        maximise: Whether larger is better, a bool or one for each objective.

    Returns:
        The mean distance, Euclidean over the objectives in which a point falls short, in their unit; 0 if every point
        of the front is reached.

    Raises:
        ImportError: If moocore is not installed.
        ValueError: If a set is empty, a shape is wrong, a point is NaN or infinite, or the distance is beyond float64.
    """
    return _distance("IGD+", lambda a, f: _moocore().igd_plus(a, f, maximise=maximise), points, front, maximise)


def gd_plus(points: Points, front: Points, *, maximise: Maximise) -> float:
    """GD+: mean over the points of how far they fall short of a reference front, at least 0.

    It is small if every point is near the front, even if they are all in one place.

    Args:
        points: (n, m).
        front: (r, m), the reference front.
        maximise: Whether larger is better, a bool or one for each objective.

    Returns:
        The mean distance, Euclidean over the objectives in which a point falls short, in their unit; 0 if every point
        reaches the front.

    Raises:
        ImportError: If moocore is not installed.
        ValueError: If a set is empty, a shape is wrong, a point is NaN or infinite, or the distance is beyond float64.
    """

    # With the roles and the direction exchanged IGD+ measures, from each point, how far the front is ahead of it.
    def exchanged(a: np.ndarray, f: np.ndarray) -> float:
        return _moocore().igd_plus(f, a, maximise=(directions(maximise, a.shape[1]) < 0).tolist())

    return _distance("GD+", exchanged, points, front, maximise)


def _distance(what: str, measure: Callable[..., float], points: Points, front: Points, maximise: Maximise) -> float:
    """Return what `measure` gives for two checked sets of points of one width, neither of them empty."""
    array = as_points(points)
    reference = as_points(front, "front", array.shape[1])
    directions(maximise, array.shape[1])
    for name, value in (("points", array), ("front", reference)):
        if len(value) == 0:
            raise ValueError(f"{name} is empty; a distance needs at least one point")
    return homogeneous(lambda a, f: float(measure(a, f)), what, array, reference)


def front_distance(points: Points, front: Points, *, maximise: Maximise) -> dict[str, float]:
    """Distances of points to a known front: `epsilon_additive`, `igd_plus` and `gd_plus` under their names.

    Args:
        points: (n, m).
        front: (r, m), the known front, densely sampled.
        maximise: Whether larger is better, a bool or one for each objective.

    Returns:
        The three distances, each in the unit of the objectives.

    Raises:
        ImportError: If moocore is not installed.
        ValueError: If a set is empty, a shape is wrong, a point is NaN or infinite, or a distance is beyond float64.
    """
    measures = {"epsilon_additive": epsilon_additive, "igd_plus": igd_plus, "gd_plus": gd_plus}
    return {name: measure(points, front, maximise=maximise) for name, measure in measures.items()}


def spacing(points: Points) -> float:
    """Unevenness (Schott 1995): the sample deviation of the distances to the nearest neighbour, in the L1 norm.

    Args:
        points: (n, m), as a rule the non-dominated ones.

    Returns:
        The deviation, 0 for equally spaced points and for fewer than 3.

    Raises:
        ValueError: If the shape is wrong, a point is NaN or infinite, or the deviation is beyond float64.
    """
    array = as_points(points)
    return homogeneous(_spacing, "spacing", array) if len(array) > 2 else 0.0


def _spacing(points: np.ndarray) -> float:
    array = torch.from_numpy(points)
    nearest = torch.empty(len(array), dtype=torch.float64)
    for rows in row_blocks(len(array)):
        distance = torch.cdist(array[rows], array, p=1)
        distance[torch.arange(len(distance)), torch.arange(rows.start, rows.stop)] = torch.inf
        nearest[rows] = distance.min(1).values
    return homogeneous(lambda x: float(torch.from_numpy(x).std()), "spacing", nearest.numpy())


def max_gap(points: Points) -> float:
    """Widest gap: the longest edge of the minimum spanning tree of the points, Euclidean.

    For two objectives and non-dominated points that is the widest gap between neighbours on the front.

    Args:
        points: (n, m), as a rule the non-dominated ones.

    Returns:
        The length, 0 for fewer than 2 points.

    Raises:
        ValueError: If the shape is wrong, a point is NaN or infinite, or the length is beyond float64.
    """
    array = as_points(points)
    return homogeneous(_max_gap, "widest gap", array) if len(array) > 1 else 0.0


def _max_gap(array: np.ndarray) -> float:
    # Prim's algorithm: the tree grows by the point that is nearest to it.
    nearest = lengths(array - array[0])
    outside = np.ones(len(array), dtype=bool)
    outside[0] = False
    longest = 0.0
    while outside.any():
        new = int(np.where(outside, nearest, np.inf).argmin())
        longest = max(longest, float(nearest[new]))
        outside[new] = False
        nearest = np.minimum(nearest, lengths(array - array[new]))
    return longest


def attainment(
    fronts: Sequence[Points], *, maximise: Maximise, percentiles: Sequence[float] = (50,)
) -> dict[float, Tensor]:
    """Empirical attainment surfaces of several runs, such as seeds (Grunert da Fonseca et al. 2001).

    Args:
        fronts: One set of points (n_s, m) a run; m is 2 or 3.
        maximise: Whether larger is better, a bool or one for each objective.
        percentiles: Shares of the runs in percent: 50 is the median front, 100 what every run attains.

    Returns:
        For each percentile the points (r, m), float64, that at least this share of the runs weakly dominates.

    Raises:
        ImportError: If moocore is not installed.
        ValueError: If there is no run, a run is empty, m is not 2 or 3, or a point is NaN or infinite.
    """
    if len(fronts) == 0:
        raise ValueError("fronts is empty; pass one set of points a run")
    objectives = as_points(fronts[0], "fronts[0]").shape[1]
    arrays = [as_points(front, f"fronts[{i}]", objectives) for i, front in enumerate(fronts)]
    if objectives not in (2, 3) or any(len(array) == 0 for array in arrays):
        raise ValueError(f"attainment is for 2 or 3 objectives and runs with points, got m = {objectives}")
    minimised = -directions(maximise, objectives)
    run = np.repeat(np.arange(1.0, len(arrays) + 1.0), [len(array) for array in arrays])
    surfaces = {}
    for percentile in percentiles:
        rows = _moocore().eaf(np.concatenate(arrays) * minimised, run, percentiles=[percentile])
        surfaces[percentile] = torch.from_numpy(rows[:, :-1] * minimised)
    return surfaces


def _vector(value: Sequence[float] | Tensor | np.ndarray, objectives: int, name: str) -> np.ndarray:
    """Return a finite (m,) float64 array."""
    array = _float64(value)
    if array.shape != (objectives,) or not np.isfinite(array).all():
        raise ValueError(f"{name} is {array.tolist()} but must be {objectives} finite numbers, one an objective")
    return array


def _float64(values: Any) -> np.ndarray:
    # NumPy has no bfloat16, so torch widens.
    return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)
