"""Bootstrap intervals over what was measured: lists of documents, lists of responses, or prompts.

Called queries here, as in retrieval: the rows that are drawn with replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mopl._arguments import shape_of
from mopl.pareto.indicators import Maximise, hypervolume_of_resamples


class Interval(NamedTuple):
    """A figure with its bootstrap interval; float64 tensors of one shape, in the unit of the figure.

    Attributes:
        estimate: The figure on all queries.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    estimate: Tensor
    low: Tensor
    high: Tensor


def bootstrap_means(values: Tensor, samples: int = 1000, seed: int = 0) -> Tensor:
    """Means over queries drawn with replacement.

    Every column sees the same draws, so that differences and functions of several points keep their pairing.

    Args:
        values: (Q, ...), one row a query; NaN where a query does not count for a column, as in
            `mopl.ranking.metrics.NDCG.values`.
        samples: Number of resamples.
        seed: The draws depend on it, on Q and on `samples` only.

    Returns:
        (samples, ...) float64 on the CPU; NaN where a resample has no query that counts.

    Raises:
        ValueError: If there is no query, a column has none that counts, or a value is infinite.
    """
    flat = _columns(values)
    queries = flat.shape[0]
    if samples < 1:
        raise ValueError(f"samples is {samples} but must be at least 1")
    counts_for = ~flat.isnan()
    stacked = torch.cat([flat.nan_to_num(nan=0.0), counts_for.double()], 1)
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    chunk = max(1, 4_000_000 // queries)  # 32 MB of counts at a time; the draws do not depend on it
    means = []
    for first in range(0, samples, chunk):
        rows = min(chunk, samples - first)
        drawn = generator.integers(0, queries, size=(rows, queries)) + queries * np.arange(rows)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=rows * queries).reshape(rows, queries)
        total, size = (torch.from_numpy(counts).double() @ stacked).chunk(2, 1)
        means.append(total / size)  # 0 / 0 is the NaN of a resample without a query that counts
    return torch.cat(means).reshape(samples, *values.shape[1:])


def bootstrap_interval(
    values: Tensor,  # (Q, ...)
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    statistic: Callable[[Tensor], Tensor | float] | None = None,
) -> Interval:
    """Percentile bootstrap over queries for means, or for any function of means (Efron 1979).

    For the hypervolume of a front pass the per-query values of all its points, (Q, n, m), and
    `statistic=lambda means: hypervolume(means, reference, maximise=True)`.

    Args:
        values: (Q, ...), one row a query; NaN where a query does not count for a column, as in
            `mopl.ranking.metrics.NDCG.values`.
        level: Probability of the interval, between 0 and 1.
        samples: Number of resamples.
        seed: Equal seeds give equal intervals.
        statistic: A function of the means (...) that returns a number or a tensor; None for the means themselves.

    Returns:
        The figure on all queries and its interval, each of shape (...) or of the statistic's shape. Resamples in which
        a column has no query that counts are left out.

    Raises:
        ValueError: If `level` is not between 0 and 1, or as `bootstrap_means`.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level} but must lie between 0 and 1, such as 0.95")
    draws = bootstrap_means(values, samples, seed)
    usable = draws[draws.reshape(samples, -1).isfinite().all(1)]
    if len(usable) == 0:
        raise ValueError("no resample has a query that counts in every column; the data are too few for a bootstrap")
    estimate = _columns(values).nanmean(0).reshape(values.shape[1:])
    if statistic is not None:
        estimate = torch.as_tensor(statistic(estimate), dtype=torch.float64)
        usable = torch.stack([torch.as_tensor(statistic(means), dtype=torch.float64) for means in usable])
    tail = (1.0 - level) / 2.0
    low, high = torch.quantile(usable, torch.tensor([tail, 1.0 - tail], dtype=torch.float64), dim=0)
    return Interval(estimate, low, high)


def hypervolume_interval(
    values: Tensor,  # (Q, n, m)
    reference: Sequence[float] | Tensor,
    *,
    maximise: Maximise,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, list[float]], list[str]]:
    """Bootstrap interval over queries of a front's hypervolume, as `Front.interval` and `Front.notes` hold it.

    Args:
        values: (Q, n, m) figures of each query at each of n points, as in `bootstrap_interval`.
        reference: (m,), the reference point.
        maximise: Whether larger is better, a bool or one for each objective.
        level: As in `bootstrap_interval`; so are the next two.
        samples: Number of resamples; 0 for no interval.
        seed: Equal seeds give equal intervals.

    Returns:
        `{"hypervolume": [low, high]}`, and a note where resamples were not measured exactly; both empty without any.
    """
    if not samples:
        return {}, []
    means = _columns(values).nanmean(0).reshape(values.shape[1:])
    volume, note = hypervolume_of_resamples(means, reference, maximise=maximise, samples=samples)
    bounds = bootstrap_interval(values, level, samples, seed, statistic=volume)
    return {"hypervolume": [float(bounds.low), float(bounds.high)]}, [] if note is None else [note]


def point_intervals(
    main: Tensor,  # (Q, n)
    auxiliary: Tensor,  # (Q, n, m)
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Bootstrap intervals over queries of the figures of n points, as `Point.interval` holds them; see above."""
    if not samples:
        return [{} for _ in range(main.shape[1])]
    found = bootstrap_interval(torch.cat([main[..., None], auxiliary], -1), level, samples, seed)
    ends = torch.stack([found.low, found.high], -1).tolist()  # n x (1 + m) x 2
    return [{"main": point[0], "auxiliary": point[1:]} for point in ends]


def _columns(values: Tensor) -> Tensor:
    """Return per-query values as a checked (Q, columns) float64 tensor on the CPU."""
    if values.ndim == 0 or values.shape[0] == 0:
        raise ValueError(f"values has shape {shape_of(values)} but must be (Q, ...) with at least one query")
    flat = values.detach().double().cpu().reshape(values.shape[0], -1)
    if bool(flat.isinf().any()):
        raise ValueError(f"values hold an infinite entry in row {int(flat.isinf().any(1).nonzero()[0, 0])}")
    largest = flat.abs().nan_to_num(nan=0.0).max() if flat.numel() else 0.0
    if largest > torch.finfo(torch.float64).max / len(flat):
        raise ValueError(
            f"values go up to {float(largest):.3g}, whose sum float64 cannot hold; divide them by a constant"
        )
    if bool(flat.isnan().all(0).any()):
        column = int(flat.isnan().all(0).nonzero()[0, 0])
        raise ValueError(f"column {column} of values has no query that counts: all {len(flat)} are NaN; leave it out")
    return flat
