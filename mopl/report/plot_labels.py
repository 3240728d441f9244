"""Labels of a picture that cover neither a point nor one another.

A label is tried beside its point first, then further away with a line to it, and is left out where all places are
taken: a picture with one label less is better than one with a hidden point.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from mopl._extras import require
from mopl.pareto import Point

DISTANCES = (6, 12, 20, 32, 44)  # from the point's edge, in typographic points
DIRECTIONS = 16
LEADER = 12  # from this distance a line joins label and point


@dataclasses.dataclass(frozen=True)
class Label:
    """Text that belongs to a point, in the coordinates of the axes' data."""

    text: str
    at: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Box:
    left: float
    low: float
    right: float
    high: float

    def near(self, x: float, y: float, radius: float) -> bool:
        """Return whether a disc touches the box."""
        dx = max(self.left - x, 0.0, x - self.right)
        dy = max(self.low - y, 0.0, y - self.high)
        return math.hypot(dx, dy) < radius

    def meets(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.low < other.high and other.low < self.high

    def inside(self, other: _Box) -> bool:
        return (
            self.left >= other.left and self.right <= other.right and self.low >= other.low and self.high <= other.high
        )


def _name(weights: Sequence[float]) -> str:
    """Return weights as a label: shorter where there are many objectives, and so many small panels."""
    if len(weights) > 3 and max(weights) - min(weights) < 0.01:
        return "equal weights"
    return ("" if len(weights) > 3 else "w = ") + f"({', '.join(f'{w:.2g}' for w in weights)})"


def chosen(points: Sequence[Point], x: int, y: int) -> dict[tuple[float, float], Label]:
    """Return the labels of a panel of objectives `x` and `y` by their places, the most important ones first.

    They name the points with the most weight on either of the two, then the middle: of two objectives the middle of
    the grid, of more the point of equal weights, where there is one.
    """
    line = sorted(points, key=lambda p: p.weights)
    if not line:
        return {}
    named = [max(line, key=lambda p: p.weights[j]) for j in (x, y)]
    if len(line[0].weights) < 3:
        named.append(line[len(line) // 2])
    else:
        named += [p for p in line if max(p.weights) - min(p.weights) < 0.01][:1]
    labels: dict[tuple[float, float], Label] = {}
    for point in named:
        at = point.auxiliary[x], point.auxiliary[y]
        labels.setdefault(at, Label(_name(point.weights), at))
    return labels


def place(
    axes: Any,
    labels: Sequence[Label],
    points: Sequence[tuple[float, float, float]],
    lines: Sequence[Sequence[tuple[float, float]]] = (),
    *,
    fontsize: float = 8,
) -> list[Any]:
    """Print labels where nothing lies below them; the layout of the figure must be final.

    Args:
        axes: Axes whose figure has been laid out at the resolution at which it will be saved.
        labels: What to print, the most important one first.
        points: All marks: x, y in data coordinates and the radius in typographic points.
        lines: Corners of lines, which labels cross only where they must.
        fontsize: Of the labels.

    Returns:
        The annotations.
    """
    require("matplotlib", what="the picture")
    from matplotlib.patheffects import withStroke

    figure = axes.figure
    renderer, unit = figure.canvas.get_renderer(), figure.dpi / 72
    to_pixels = axes.transData.transform
    marks = [(*to_pixels((x, y)), radius * unit) for x, y, radius in points if math.isfinite(x) and math.isfinite(y)]
    along = [dot for line in lines for dot in _dots([to_pixels(corner) for corner in line], 4 * unit)]
    area = axes.get_window_extent(renderer)
    area = _Box(area.x0, area.y0, area.x1, area.y1)
    taken: list[_Box] = []
    printed = []
    for label in labels:
        note = axes.annotate(
            label.text,
            label.at,
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=fontsize,
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=2, foreground="white")],
            zorder=6,
        )
        note.set_in_layout(False)
        size = note.get_window_extent(renderer)
        half = size.width / 2 + 1.5 * unit, size.height / 2 + 1.0 * unit
        found = _best_place(to_pixels(label.at), half, unit, area, taken, marks, along)
        note.remove()
        if found is None:
            continue
        x, y, distance = found
        own = to_pixels(label.at)
        style: dict[str, Any] = {}
        if distance >= LEADER:
            style = {"arrowprops": {"arrowstyle": "-", "color": "#666666", "lw": 0.6, "shrinkA": 0, "shrinkB": 3}}
        note = axes.annotate(
            label.text,
            label.at,
            xytext=((x - own[0]) / unit, (y - own[1]) / unit),
            textcoords="offset points",
            fontsize=fontsize,
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=2, foreground="white")],
            zorder=2.5,  # its line passes below the points
            **style,
        )
        note.set_in_layout(False)
        taken.append(_Box(x - half[0], y - half[1], x + half[0], y + half[1]))
        printed.append(note)
    return printed


def _best_place(
    own: Sequence[float],
    half: tuple[float, float],
    unit: float,
    area: _Box,
    taken: Sequence[_Box],
    marks: Sequence[tuple[float, float, float]],
    along: Sequence[tuple[float, float]],
) -> tuple[float, float, float] | None:
    """Return the centre of a label and its distance: near, and off the lines where that is possible."""
    best, cheapest = None, math.inf
    for distance in DISTANCES:
        for step in range(DIRECTIONS):
            angle = math.pi / 4 + 2 * math.pi * step / DIRECTIONS
            dx, dy = math.cos(angle), math.sin(angle)
            # From the point to the nearest side of the box it is `distance`, whatever the direction.
            reach = min(
                half[0] / abs(dx) if abs(dx) > 1e-9 else math.inf, half[1] / abs(dy) if abs(dy) > 1e-9 else math.inf
            )
            x, y = own[0] + dx * (distance * unit + reach), own[1] + dy * (distance * unit + reach)
            box = _Box(x - half[0], y - half[1], x + half[0], y + half[1])
            if not box.inside(area) or any(box.meets(other) for other in taken):
                continue
            if any(box.near(*mark) for mark in marks):
                continue
            cost = distance + 3 * sum(box.near(*dot, 0.5) for dot in along)
            if cost < cheapest:
                best, cheapest = (x, y, float(distance)), cost
    return best


def _dots(corners: Sequence[Sequence[float]], every: float) -> list[tuple[float, float]]:
    """Return positions along a line, in pixels."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        if not all(map(math.isfinite, (x0, y0, x1, y1))):
            continue
        count = max(1, min(500, math.ceil(math.hypot(x1 - x0, y1 - y0) / every)))
        found += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1)]
    return found
