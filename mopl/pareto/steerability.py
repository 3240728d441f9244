"""Does the model give what it is asked for? Figures of the map from weights to objective vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl.conditioning.sampling import check_weights
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
        raise ValueError(f"weights has {len(asked)} rows and objective_vectors {len(points)}; pass one vector a weight")
    w = check_weights(torch.from_numpy(asked))
    u = torch.from_numpy(points * directions(maximise, points.shape[1]))
    utility = w @ u.T  # row w, column v
    achieved, best = float(utility.diagonal().mean()), float(utility.max(1).values.mean())
    keep = non_dominated(points, maximise=maximise)
    front = points[keep.numpy()]
    figures: dict[str, Any] = {
        "achieved_utility": achieved,
        "front_utility": best,
        "steering_regret": float((utility.max(1).values - utility.diagonal()).mean()),
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


def kendall_tau(x: Tensor, y: Tensor) -> float:
    """Kendall's tau-b of two vectors (n,); 0 where one of them is constant."""
    a, b = (torch.sign(v.double()[:, None] - v.double()[None]) for v in (x, y))
    scale = torch.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two vectors (n,), ties at their mean rank; 0 where one of them is constant."""
    ranks = [(v[:, None] > v[None]).double().sum(1) + 0.5 * (v[:, None] == v[None]).double().sum(1) for v in (x, y)]
    a, b = (rank - rank.mean() for rank in ranks)
    scale = a.norm() * b.norm()
    return float((a @ b) / scale) if scale > 0 else 0.0
