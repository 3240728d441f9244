"""Does the model give what it is asked for? Figures of the map from weights to objective vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl._counted import counted
from mopl.conditioning.sampling import check_weights
from mopl.pareto._exact import exponent, row_blocks, scaled_back
from mopl.pareto.indicators import (
    Maximise,
    Points,
    as_points,
    directions,
    front_distance,
    hypervolume,
    max_gap,
    non_dominated,
    spacing,
)


def steerability(
    weights: Points,  # (n, m)
    objective_vectors: Points,  # (n, m)
    *,
    maximise: Maximise,
    reference_point: Sequence[float] | Tensor | np.ndarray | None = None,
    reference_front: Points | None = None,
) -> dict[str, Any]:
    """All figures of a conditioned model that gives the objective vector f(w) when it is asked for w.

    With u the objectives counted so that larger is better (negated where they are minimised):

    * `achieved_utility`: mean over w of w·u(w), and `front_utility`: mean over w of max over v of w·u(v).
    * `steering_regret`: their difference, at least 0; 0 if asking for w gives the best point for w.
    * `kendall_tau`, `spearman`: rank correlation of w_j and u_j for each objective; 1 if more weight always gives
      more, 0 where the objective never moves. With m > 2 even a perfect front stays below 1, since u_j depends on the
      other weights too.
    * `nondominated_fraction`: share of the points that no other dominates.
    * `spacing`, `max_gap`: evenness of the non-dominated points, in the units of the objectives.
    * `hypervolume`, if there is a reference point, and with a reference front `normalized_hypervolume`, its ratio to
      that front's. A front of one ideal point makes that the share of the box.
    * `epsilon_additive`, `igd_plus`, `gd_plus`, if there is a reference front.

    Args:
        weights: (n, m), each on the simplex.
        objective_vectors: (n, m), f(w) for each of them.
        maximise: Whether larger is better, a bool or one for each objective.
        reference_point: (m,), for the hypervolume.
        reference_front: (r, m), a front to compare with: the true one, or the single-objective fine-tunes.

    Returns:
        A dict of floats, and of lists of m floats for the correlations.

    Raises:
        ImportError: If moocore is needed and not installed.
        ValueError: If shapes disagree, weights are off the simplex, or a point is NaN or infinite.
    """
    points = as_points(objective_vectors, "objective_vectors")
    asked = as_points(weights, "weights", points.shape[1])
    if len(asked) != len(points) or len(points) == 0:
        raise ValueError(
            f"weights has {counted(len(asked), 'row')} and objective_vectors {len(points)}; pass one vector a weight"
        )
    w = check_weights(torch.from_numpy(asked))
    u = torch.from_numpy(points * directions(maximise, points.shape[1]))
    by = exponent(points)
    own, best = _utilities(w, torch.ldexp(u, torch.tensor(-by)))
    keep = non_dominated(points, maximise=maximise)
    front = points[keep.numpy()]
    figures: dict[str, Any] = {
        "achieved_utility": scaled_back(float(own.mean()), by, "achieved utility"),
        "front_utility": scaled_back(float(best.mean()), by, "utility"),
        "steering_regret": scaled_back(float((best - own).mean()), by, "steering regret"),
        "kendall_tau": [kendall_tau(w[:, j], u[:, j]) for j in range(u.shape[1])],
        "spearman": [spearman(w[:, j], u[:, j]) for j in range(u.shape[1])],
        "nondominated_fraction": float(keep.double().mean()),
        "spacing": spacing(front),
        "max_gap": max_gap(front),
    }
    if reference_point is not None:
        figures["hypervolume"] = hypervolume(points, reference_point, maximise=maximise)
        if reference_front is not None:
            whole = hypervolume(reference_front, reference_point, maximise=maximise)
            if whole <= 0.0:
                raise ValueError("no point of reference_front is better than reference_point; move reference_point")
            figures["normalized_hypervolume"] = figures["hypervolume"] / whole
    if reference_front is not None:
        figures.update(front_distance(points, reference_front, maximise=maximise))
    return figures


def _utilities(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each w (n, m) the utility of its own u (n, m), and that of the best one, each (n,)."""
    own, best = torch.empty(2, len(w), dtype=torch.float64)
    for rows in row_blocks(len(w)):
        utility = w[rows] @ u.T  # row w, column v
        own[rows], best[rows] = utility.diagonal(rows.start), utility.max(1).values
    return own, best


def kendall_tau(x: Tensor, y: Tensor) -> float:
    """Kendall's tau-b of two vectors (n,); 0 where one of them is constant.

    Args:
        x: (n,), of any dtype; computed in float64.
        y: (n,).

    Returns:
        The correlation, from -1 (opposite orders) to 1 (the same order).

    Raises:
        ValueError: If they are not vectors of one length, or hold NaN.
    """
    x, y = _vectors(x, y)
    agree = of_x = of_y = 0
    for rows in row_blocks(len(x)):
        # Compared, not subtracted: a difference of infinite figures is no number.
        a, b = ((v[rows, None] > v).to(torch.int8) - (v[rows, None] < v).to(torch.int8) for v in (x, y))
        agree, of_x, of_y = agree + int((a * b).sum()), of_x + int(a.abs().sum()), of_y + int(b.abs().sum())
    scale = math.sqrt(float(of_x) * float(of_y))
    return agree / scale if scale > 0 else 0.0


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two vectors (n,), ties at their mean rank; 0 where one of them is constant.

    Args:
        x: (n,), of any dtype; computed in float64.
        y: (n,).

    Returns:
        The correlation, from -1 (opposite orders) to 1 (the same order).

    Raises:
        ValueError: If they are not vectors of one length, or hold NaN.
    """
    ranks = []
    for v in _vectors(x, y):
        ordered = v.sort().values
        below, not_above = (torch.searchsorted(ordered, v, right=right).double() for right in (False, True))
        ranks.append(below + 0.5 * (not_above - below))
    a, b = (rank - rank.mean() for rank in ranks)
    scale = a.norm() * b.norm()
    return float((a @ b) / scale) if scale > 0 else 0.0


def _vectors(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return two vectors (n,) in float64 on the CPU, checked."""
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)} but must be vectors of one length")
    x, y = x.detach().cpu().double().contiguous(), y.detach().cpu().double().contiguous()
    for name, v in (("x", x), ("y", y)):
        if bool(v.isnan().any()):
            raise ValueError(f"{name} holds NaN at {int(v.isnan().nonzero()[0, 0])}, which has no rank; leave it out")
    return x, y
