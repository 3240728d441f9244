"""The picture of the fronts: pairs of auxiliary objectives, with the main objective as colour.

Two objectives make one panel; more make the lower triangle of all pairs, with the legend in the free corner. There the
points that are best in a pair are joined and the others are small: projected grids of weights would hide each other.
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

from mopl._extras import require
from mopl.pareto import Front, Point, non_dominated
from mopl.report.plot_labels import chosen, place
from mopl.report.records import (
    Metric,
    base_points,
    by_method,
    clean,
    data_names,
    is_base,
    mean_and_std,
    read_all,
    write,
)

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
OUTLINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PIXELS_PER_INCH = 150
NOT_KNOWN = "#ffffff"
_TRUE_FRONT: dict[bool, dict[str, Any]] = {
    False: {"color": "#666666", "linestyle": "--", "linewidth": 1.2, "zorder": 1},
    True: {"color": "#666666", "linestyle": "", "marker": ".", "markersize": 2, "zorder": 1},
}
MAIN = -1  # the main objective, where auxiliary ones are counted from 0


@dataclasses.dataclass(frozen=True)
class _Series:
    """What is drawn of one method: a point for each weight, the mean over seeds where there are several."""

    label: str
    marker: str
    outline: str
    points: tuple[Point, ...]
    moved: tuple[Point, ...]  # other scales, drawn faintly
    hypervolume: float
    base: Point | None


@dataclasses.dataclass(frozen=True)
class _Scene:
    """Everything that a panel needs to know."""

    front: Front  # for the names
    series: Sequence[_Series]
    truth: Sequence[Sequence[float]]
    metric: Metric
    colours: Any  # matplotlib's map from the main figure to a colour

    @property
    def pairs(self) -> bool:
        """Whether there are several panels."""
        return len(self.front.objectives) > 2

    @property
    def size(self) -> float:
        """The diameter of a mark, in typographic points."""
        return 4.5 if self.pairs else 8

    @property
    def bases(self) -> dict[tuple[float, ...], tuple[Point, _Series]]:
        """The different bases, each with the first method that started from it."""
        found: dict[tuple[float, ...], tuple[Point, _Series]] = {}
        for one in self.series:
            if one.base is not None:
                found.setdefault(one.base.figures, (one.base, one))
        return found

    def rising(self, index: int) -> bool:
        """Return whether more is better."""
        return self.metric.higher_is_better if index == MAIN else self.front.rising[index]


def plot_front(
    fronts: object,
    path: str | os.PathLike[str],
    *,
    metric: Metric | None = None,
    base: object = None,
    truth: Sequence[Sequence[float]] | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write a PNG of the fronts, 1200 pixels wide.

    Args:
        fronts: One `mopl.pareto.Front` (or mapping like front.json), or a sequence of them; several of one method
            are its seeds and are drawn as means with bars of one standard deviation.
        path: The file; it appears whole or not at all. Missing folders are made.
        metric: What the figures are; default NDCG@10 with the paper's conventions.
        base: The base model as a point, `{"main": x, "auxiliary": [...]}`, or a sequence with one (or None) for each
            front; default the only point of the front whose method is "base", of the same seed where there are several.
            Methods with bases of their own have stars in their colours.
        truth: The true front, `(n, m)` auxiliary figures, where it is known.
        title: Heading; default names the data.
        notes: What else a reader must know, below the heading.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the path has another ending than .png, the fronts do not belong together or a point has another
            number of objectives.
    """
    check_picture(path)
    require("matplotlib", what="the picture")
    from matplotlib import rc_context

    records = read_all(fronts)
    m = len(records[0].objectives)
    true_points = [tuple(float(x) for x in row) for row in truth] if truth is not None else []
    if any(len(row) != m for row in true_points):
        raise ValueError(f"truth must have one column for each of the {m} objectives: shape (n, {m})")
    metric = metric or Metric()
    series = _series(records, base_points(records, base))
    scene = _Scene(records[0], series, true_points, metric, _colours(series))
    if title is None:
        title = f"{data_names(records)}: every trade-off ({metric.name})"
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}):
        figure = _draw(scene, plain(title), [_wrapped(note, 110) for note in notes])
        return write(path, figure.canvas.print_png)


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise unless a picture can be written under this name.

    Raises:
        ValueError: If its ending is not that of the one format that there is.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path} cannot be the picture: .png is the only known ending; name {Path(path).stem}.png")


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


def _series(records: Sequence[Front], bases: Sequence[Point | None]) -> list[_Series]:
    groups = {method: seeds for method, seeds in by_method(records).items() if not is_base(seeds[0])}
    if not groups:
        groups = by_method(records)
    base_of = {id(record): base for record, base in zip(records, bases, strict=True)}
    result = []
    for index, (method, seeds) in enumerate(groups.items()):
        points = [front.trained_points for front in seeds]
        moved = [p for front in seeds for p in front.points if p not in front.trained_points]
        weights = {tuple(tuple(p.weights) for p in front) for front in points}
        label = plain(method) + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else "")
        if len(seeds) > 1 and len(weights) == 1:
            drawn = tuple(_mean_point(same) for same in zip(*points, strict=True))
        else:
            drawn = tuple(itertools.chain.from_iterable(points))
        marker, outline = MARKERS[index % len(MARKERS)], OUTLINES[index % len(OUTLINES)]
        volume = mean_and_std(record.hypervolume for record in seeds)[0]
        own = {base.figures: base for record in seeds if (base := base_of[id(record)]) is not None}
        base = _mean_point(list(own.values())) if own else None
        result.append(_Series(label, marker, outline, drawn, tuple(moved), volume, base))
    return result


def _mean_point(points: Sequence[Point]) -> Point:
    figures = [mean_and_std(column) for column in zip(*(p.auxiliary for p in points), strict=True)]
    return Point(
        weights=points[0].weights,
        main=mean_and_std(p.main for p in points)[0],
        auxiliary=[mean for mean, _ in figures],
        interval={"auxiliary": [[mean - std, mean + std] for mean, std in figures]},
    )


def _colours(series: Sequence[_Series]) -> Any:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    mains = [p.main for s in series for p in (*s.points, *s.moved) if not math.isnan(p.main)]
    low, high = (min(mains), max(mains)) if mains else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.005, high + 0.005
    # The palest end of viridis is cut off: it would vanish on white.
    ramp = LinearSegmentedColormap.from_list("main", [colormaps["viridis"](x / 20 * 0.96) for x in range(21)])
    return ScalarMappable(Normalize(low, high), ramp)


def _draw(scene: _Scene, title: str, notes: Sequence[str]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    m, pairs = len(scene.front.objectives), scene.pairs
    side = max(m - 1, 1)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(8, 7.6 if pairs else 5.2), dpi=PIXELS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    panels = []
    grid = figure.subplots(
        side, side, squeeze=False, sharex="col" if pairs else False, sharey="row" if pairs else False
    )
    for row, column in itertools.product(range(side), range(side)):
        axes = grid[row, column]
        if column > row:
            axes.set_visible(False)
            continue
        panel = _Panel(axes, scene, column, row + 1 if m > 1 else MAIN)
        panel.draw()
        panels.append(panel)
        axes.label_outer()
        if row == side - 1:
            axes.set_xlabel(panel.name(panel.x))
        if column == 0:
            axes.set_ylabel(panel.name(panel.y))
    _legend(figure, grid, scene)
    figure.suptitle(title)
    if notes:
        grid[0, 0].set_title("\n".join(notes), fontsize=7, loc="left", color="#555555")
    layout.execute(figure)  # where the axes end up decides where labels fit
    figure.set_layout_engine("none")
    for panel in panels:
        panel.annotate()
    return figure


@dataclasses.dataclass(frozen=True)
class _Panel:
    """One pair of objectives, the one across and the one upwards."""

    axes: Any
    scene: _Scene
    x: int
    y: int

    def name(self, index: int) -> str:
        """Return what an axis is called."""
        front = self.scene.front
        name = front.main if index == MAIN else front.objectives[index]
        arrow = "↑" if self.scene.rising(index) else "↓"
        name = _wrapped(f"{name} {arrow}", max(12, 72 // max(len(front.objectives) - 1, 1)))
        return name if self.scene.pairs else f"{name}  ({plain(self.scene.metric.name)})"

    def at(self, point: Point) -> tuple[float, float]:
        """Return where a point is."""
        return point.figures[self.x + 1], point.figures[self.y + 1]  # MAIN is -1

    def draw(self) -> None:
        """Draw the true front, every method and every base."""
        from matplotlib.ticker import MaxNLocator

        axes, scene, pairs, size = self.axes, self.scene, self.scene.pairs, self.scene.size
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.margins(0.08)
        most, least = (7, 4) if not pairs else (5, 4) if len(scene.front.objectives) == 3 else (4, 3)
        axes.tick_params(labelsize=9 if most > 4 else 7)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(most, min_n_ticks=least, steps=[1, 2, 2.5, 5, 10]))
        if scene.truth and self.y != MAIN:
            line = zip(*sorted((row[self.x], row[self.y]) for row in scene.truth), strict=True)
            axes.plot(*line, **_TRUE_FRONT[pairs])
        for one in scene.series:
            line = self.edge(one.points) if pairs else sorted(one.points, key=lambda p: p.weights)
            rest = [point for point in one.points if point not in line]
            self.whiskers(one, line, alpha=0.18 if pairs else 0.35)
            axes.plot([self.at(p)[0] for p in line], [self.at(p)[1] for p in line], color=one.outline, lw=1, alpha=0.6)
            self.markers(one, one.moved, 0.6 * size, alpha=0.35)
            self.markers(one, rest, 0.45 * size, outlined=False, alpha=0.7)
            self.markers(one, line, size)
        for base, one in scene.bases.values():
            colour = "black" if len(scene.bases) == 1 else one.outline
            axes.plot(*self.at(base), "*", color=colour, markersize=size * 2, mec="white", mew=0.6, zorder=5)

    def edge(self, points: Sequence[Point]) -> list[Point]:
        """Return the points that are best in this pair of objectives, along the first: what the pair allows."""
        known = [point for point in points if not any(map(math.isnan, self.at(point)))]
        if not known:
            return []
        rising = [self.scene.rising(self.x), self.scene.rising(self.y)]
        flags = non_dominated([self.at(p) for p in known], maximise=rising)
        return sorted((p for p, best in zip(known, flags.tolist(), strict=True) if best), key=lambda p: self.at(p)[0])

    def markers(
        self, one: _Series, points: Sequence[Point], size: float, *, outlined: bool = True, alpha: float = 1.0
    ) -> None:
        """Draw points of a method, filled with the colour of their main figure."""
        self.axes.scatter(
            [self.at(p)[0] for p in points],
            [self.at(p)[1] for p in points],
            s=size**2,
            marker=one.marker,
            facecolors=[NOT_KNOWN if math.isnan(p.main) else self.scene.colours.to_rgba(p.main) for p in points],
            edgecolors=one.outline if outlined else "none",
            linewidths=0.7 if self.scene.pairs else 1.2,
            alpha=alpha,
            zorder=3 if outlined else 1.5,
        )

    def whiskers(self, one: _Series, points: Sequence[Point], alpha: float) -> None:
        """Draw the intervals of points."""
        style = {"color": one.outline, "linewidth": 0.8, "alpha": alpha, "zorder": 2}
        for lines, along, across in ((self.axes.hlines, self.x, 1), (self.axes.vlines, self.y, 0)):
            bars = [(self.at(p)[across], *ends) for p in points if (ends := p.intervals[along + 1]) is not None]
            if bars:
                lines(*zip(*bars, strict=True), **style)

    def annotate(self) -> None:
        """Print weights of the method with the largest hypervolume: the ends and the middle, or each corner."""
        scene = self.scene
        if self.y == MAIN or not scene.series:
            return
        one = max(scene.series, key=lambda s: -math.inf if math.isnan(s.hypervolume) else s.hypervolume)
        known = [p for p in one.points if p.weights and not any(map(math.isnan, self.at(p)))]
        marks, lines = [], []
        for each in scene.series:
            marks += [(*self.at(p), scene.size / 2 + 1) for p in (*each.points, *each.moved)]
            along = self.edge(each.points) if scene.pairs else sorted(each.points, key=lambda p: p.weights)
            lines.append([self.at(p) for p in along])
        marks += [(*self.at(base), scene.size) for base, _ in scene.bases.values()]
        truth = sorted((row[self.x], row[self.y]) for row in scene.truth)
        if scene.pairs:
            marks += [(*row, 1.0) for row in truth]
        else:
            lines.append(truth)
        font = {2: 8.0, 3: 6.5}.get(len(scene.front.objectives), 5.5)
        place(self.axes, list(chosen(known, self.x, self.y).values()), marks, lines, fontsize=font)


def _legend(figure: Any, grid: Any, scene: _Scene) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D

    def entry(label: str, marker: str = "", colour: Any = "#999999", line: Any = "", **style: Any) -> None:
        handles.append(Line2D([], [], **{"marker": marker, "color": colour, "linestyle": line, **style}, label=label))

    handles: list[Any] = []
    size, edge = scene.size, 0.7 if scene.pairs else 1.2
    for one in scene.series:
        mains = sorted(point.main for point in one.points if not math.isnan(point.main))
        fill = scene.colours.to_rgba(mains[len(mains) // 2]) if mains else NOT_KNOWN
        entry(
            one.label, one.marker, to_rgba(one.outline, 0.6), "-", linewidth=1, markersize=size,
            markerfacecolor=fill, markeredgecolor=one.outline, markeredgewidth=edge,
        )  # fmt: skip
    if scene.pairs:
        entry("small: not best in this pair", "o", markersize=0.45 * size, alpha=0.7)
    main = plain(scene.front.main)
    star = {"markersize": 2 * size, "markeredgecolor": "white", "markeredgewidth": 0.6}
    for base, one in scene.bases.values():
        known = "" if math.isnan(base.main) else f" ({main} {base.main:.3f})"
        if len(scene.bases) == 1:
            entry(f"base model{known}", "*", "black", **star)
        else:
            entry(f"base of {one.label}{known}", "*", one.outline, **star)
    if scene.truth:
        handles.append(Line2D([], [], **_TRUE_FRONT[scene.pairs], label="true front"))
    if any(one.moved for one in scene.series):
        marker = next(one.marker for one in scene.series if one.moved)
        entry("other scales", marker, markersize=0.6 * size, alpha=0.35)
    mains = [point.main for one in scene.series for point in one.points]
    if any(math.isnan(x) for x in mains):
        entry(f"{main} n/a", "o", "#555555", markersize=size, markerfacecolor=NOT_KNOWN)
    if not all(math.isnan(x) for x in mains):
        role = "main objective" if scene.metric.higher_is_better else "cost"
        label = f"{_wrapped(scene.front.main, 60)} {plain(scene.metric.of_main)} ({role})"
        label += " ↑" if scene.rising(MAIN) else " ↓"
        where = {"ax": grid, "shrink": 0.7} if scene.pairs else {"ax": grid[0, 0]}
        figure.colorbar(scene.colours, label=label, pad=0.02, **where)
    if scene.pairs:
        figure.legend(handles=handles, loc="upper right", bbox_to_anchor=(0.86, 0.93), frameon=False)
    else:
        widest = max(len(handle.get_label()) for handle in handles) + 8  # marker and gap
        columns = max(1, min(len(handles), 4, 130 // widest))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
