"""The picture of the fronts: pairs of auxiliary objectives, with the main objective as colour.

Two objectives make one panel; more make the lower triangle of all pairs, with the legend in the free corner.
Colours are viridis for the main objective and Okabe and Ito's for methods, which also differ by marker, so that
the picture reads without colour vision and in grey.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopl.report.records import (
    BASE_METHOD,
    Metric,
    Point,
    Record,
    base_point,
    by_method,
    clean,
    data_name,
    mean_and_std,
    read_all,
    require,
    write,
)

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
OUTLINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PIXELS_PER_INCH = 150
NOT_KNOWN = "#ffffff"


@dataclasses.dataclass(frozen=True)
class _Series:
    """What is drawn of one method: a point for each weight, the mean over seeds where there are several."""

    label: str
    marker: str
    outline: str
    points: tuple[Point, ...]
    moved: tuple[Point, ...]  # other distances from the base, drawn faintly
    hypervolume: float


def plot_front(
    fronts: object,
    path: str | os.PathLike[str],
    *,
    metric: Metric | None = None,
    base: object = None,
    truth: Sequence[Sequence[float]] | None = None,
    title: str | None = None,
) -> Path:
    """Write a PNG of the fronts, 1200 pixels wide.

    Args:
        fronts: One `mopl.pareto.Front` (or mapping like front.json), or a sequence of them; several of one method
            are its seeds and are drawn as means with bars of one standard deviation.
        path: The file; it appears whole or not at all. Missing folders are made.
        metric: What the figures are; default NDCG@10 with the paper's conventions.
        base: The base model as a point, `{"main": x, "auxiliary": [...]}`; default the only point of a front whose
            method is "base", if there is one.
        truth: The true front, `(n, m)` auxiliary figures, where it is known.
        title: Heading; default names the data.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the fronts do not belong together or a point has another number of objectives.
    """
    require("matplotlib")
    from matplotlib import rc_context

    metric = metric or Metric()
    records = read_all(fronts)
    origin = base_point(records, base)
    m = len(records[0].objectives)
    true_points = [tuple(float(x) for x in row) for row in truth] if truth is not None else []
    if any(len(row) != m for row in true_points):
        raise ValueError(f"truth must have one column for each of the {m} objectives: shape (n, {m})")
    series = _series(records)
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}):
        figure = _draw(records[0], series, origin, true_points, metric, title)
        return write(path, lambda file: figure.savefig(file, format="png", dpi=PIXELS_PER_INCH))


def plain(text: str) -> str:
    """Return text that matplotlib prints as it is: no mathematics, no control characters."""
    text = clean(text).replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text


def _wrapped(text: str, columns: int) -> str:
    """Return a name on at most three lines."""
    lines = textwrap.wrap(clean(text), columns) or [""]
    if len(lines) > 3:
        lines = [*lines[:2], lines[2][: columns - 1] + "…"]
    return "\n".join(plain(line) for line in lines)


def _series(records: Sequence[Record]) -> list[_Series]:
    groups = {method: seeds for method, seeds in by_method(records).items() if method != BASE_METHOD}
    if not groups:
        groups = by_method(records)
    result = []
    for index, (method, seeds) in enumerate(groups.items()):
        points = [record.at_training_scale() for record in seeds]
        moved = [p for record in seeds for p in record.points if p not in record.at_training_scale()]
        weights = {tuple(p.weights for p in front) for front in points}
        label = plain(method) + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else "")
        if len(seeds) > 1 and len(weights) == 1:
            drawn = tuple(_mean_point(same) for same in zip(*points, strict=True))
        else:
            drawn = tuple(itertools.chain.from_iterable(points))
        marker, outline = MARKERS[index % len(MARKERS)], OUTLINES[index % len(OUTLINES)]
        volume = mean_and_std(record.hypervolume for record in seeds)[0]
        result.append(_Series(label, marker, outline, drawn, tuple(moved), volume))
    return result


def _mean_point(points: Sequence[Point]) -> Point:
    figures = [mean_and_std(column) for column in zip(*(p.auxiliary for p in points), strict=True)]
    return Point(
        weights=points[0].weights,
        main=mean_and_std(p.main for p in points)[0],
        auxiliary=tuple(mean for mean, _ in figures),
        auxiliary_intervals=tuple((mean - std, mean + std) for mean, std in figures),
    )


def _draw(
    record: Record,
    series: Sequence[_Series],
    base: Point | None,
    truth: Sequence[Sequence[float]],
    metric: Metric,
    title: str | None,
) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    m = len(record.objectives)
    names = [
        _wrapped(f"{name} {'↑' if more else '↓'}", max(12, 72 // max(m - 1, 1)))
        for name, more in zip(record.objectives, record.maximise, strict=True)
    ]
    main = _wrapped(f"{record.main} {'↑' if metric.higher_is_better else '↓'}", 60)
    mains = [p.main for s in series for p in (*s.points, *s.moved) if not math.isnan(p.main)]
    low, high = (min(mains), max(mains)) if mains else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.005, high + 0.005
    viridis = require("matplotlib").colormaps["viridis"]
    colours = LinearSegmentedColormap.from_list("main", [viridis(x / 20 * 0.96) for x in range(21)])
    scale = ScalarMappable(Normalize(low, high), colours)
    side = max(m - 1, 1)
    figure = Figure(figsize=(8, 5.2 if m <= 2 else 7.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        side, side, squeeze=False, sharex="col" if m > 2 else False, sharey="row" if m > 2 else False
    )
    for row, column in itertools.product(range(side), range(side)):
        axes = grid[row, column]
        if column > row:
            axes.set_visible(False)
            continue
        x, y = column, (row + 1 if m > 1 else -1)  # -1 is the main objective
        _panel(axes, series, base, truth, x, y, scale, small=m > 2, annotate=m == 2)
        axes.label_outer()
        if row == side - 1:
            axes.set_xlabel(names[x] if m > 2 else f"{names[x]}  ({plain(metric.name)})")
        if column == 0:
            name = names[y] if y >= 0 else main
            axes.set_ylabel(name if m > 2 else f"{name}  ({plain(metric.name)})")
    _legend(figure, grid, series, base, truth, scale, record, metric, m)
    figure.suptitle(
        plain(title) if title is not None else f"{plain(data_name(record))}: every trade-off ({plain(metric.name)})"
    )
    return figure


def _figure(point: Point, index: int) -> float:
    return point.main if index < 0 else point.auxiliary[index]


def _bar(point: Point, index: int) -> tuple[float, float] | None:
    if index < 0:
        return point.main_interval
    return point.auxiliary_intervals[index] if point.auxiliary_intervals else None


def _panel(
    axes: Any,
    series: Sequence[_Series],
    base: Point | None,
    truth: Sequence[Sequence[float]],
    x: int,
    y: int,
    scale: Any,
    small: bool,
    annotate: bool,
) -> None:
    size = 4.5 if small else 8
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.margins(0.08)
    axes.locator_params(nbins=4 if small else 6)
    if truth and y >= 0:
        pairs = sorted((row[x], row[y]) for row in truth)
        style = {"color": "#888888", "zorder": 1}
        if small:
            axes.plot(*zip(*pairs, strict=True), ".", markersize=1.5, **style)
        else:
            axes.plot(*zip(*pairs, strict=True), "--", linewidth=1.2, **style)
    for one in series:
        for point in one.points:
            _whiskers(axes, point, x, y, one.outline)
        if not small and len(one.points) > 1:
            line = sorted(one.points, key=lambda p: p.weights)
            axes.plot([_figure(p, x) for p in line], [_figure(p, y) for p in line], color=one.outline, lw=1, alpha=0.6)
        for points, alpha, factor in ((one.moved, 0.35, 0.6), (one.points, 1.0, 1.0)):
            for point in points:
                known = not math.isnan(point.main)
                axes.plot(
                    _figure(point, x),
                    _figure(point, y),
                    one.marker,
                    markersize=size * factor,
                    markerfacecolor=scale.to_rgba(point.main) if known else NOT_KNOWN,
                    markeredgecolor=one.outline,
                    markeredgewidth=0.7 if small else 1.2,
                    alpha=alpha,
                    zorder=3,
                )
    if base is not None:
        axes.plot(
            _figure(base, x), _figure(base, y), "*", color="black", markersize=size * 2, mec="white", mew=0.6, zorder=5
        )
    if annotate:
        outermost = max(series, key=lambda s: -math.inf if math.isnan(s.hypervolume) else s.hypervolume)
        _annotate(axes, outermost, x, y)


def _whiskers(axes: Any, point: Point, x: int, y: int, colour: str) -> None:
    style = {"color": colour, "linewidth": 0.8, "alpha": 0.35, "zorder": 2}
    if (ends := _bar(point, x)) is not None:
        axes.plot(ends, [_figure(point, y)] * 2, **style)
    if (ends := _bar(point, y)) is not None:
        axes.plot([_figure(point, x)] * 2, ends, **style)


def _annotate(axes: Any, one: _Series, x: int, y: int) -> None:
    """Print the weights of both ends and of the middle of one method."""
    from matplotlib.patheffects import withStroke

    line = sorted((p for p in one.points if p.weights), key=lambda p: p.weights)
    done = set()
    for index in sorted({0, len(line) // 2, len(line) - 1}) if line else ():
        point = line[index]
        if point.auxiliary in done:
            continue
        done.add(point.auxiliary)
        axes.annotate(
            "w = (" + ", ".join(f"{w:.2g}" for w in point.weights) + ")",
            (_figure(point, x), _figure(point, y)),
            xytext=(8, 8),
            textcoords="offset points",
            fontsize=8,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=2.5,  # a label must not hide another method's point
        )


def _legend(
    figure: Any,
    grid: Any,
    series: Sequence[_Series],
    base: Point | None,
    truth: Sequence[Sequence[float]],
    scale: Any,
    record: Record,
    metric: Metric,
    m: int,
) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            marker=s.marker,
            color=s.outline,
            markerfacecolor="#bbbbbb",
            linewidth=1 if m <= 2 else 0,
            label=s.label,
        )
        for s in series
    ]
    if base is not None:
        known = "" if math.isnan(base.main) else f" ({plain(record.main)} {base.main:.3f})"
        handles.append(
            Line2D([], [], marker="*", color="black", linewidth=0, markersize=10, label=f"base model{known}")
        )
    if truth:
        handles.append(Line2D([], [], color="#888888", linestyle="--" if m <= 2 else ":", label="true front"))
    if any(s.moved for s in series):
        handles.append(
            Line2D(
                [], [], marker="o", color="#999999", markersize=4, linewidth=0, label="other distances from the base"
            )
        )
    if any(math.isnan(p.main) for s in series for p in s.points):
        handles.append(
            Line2D([], [], marker="o", color="#555555", markerfacecolor=NOT_KNOWN, linewidth=0, label="main n/a")
        )
    arrow = "↑" if metric.higher_is_better else "↓"
    label = f"{_wrapped(record.main, 60)} {plain(metric.name)} (main objective) {arrow}"
    if any(not math.isnan(p.main) for s in series for p in s.points):
        figure.colorbar(scale, ax=grid[0, 0] if m <= 2 else grid, label=label, pad=0.02, shrink=1 if m <= 2 else 0.7)
    if m <= 2:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
        return
    corner = grid[0, -1]
    corner.set_visible(True)
    corner.axis("off")
    figure.legend(handles=handles, loc="upper right", bbox_to_anchor=(0.86, 0.93), frameon=False)
