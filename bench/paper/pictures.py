"""The pictures beside a table: fronts as the library draws them, or one reward over the KL."""

from __future__ import annotations

import math
from pathlib import Path

from bench.paper.tables import Table
from mopl._extras import require
from mopl.report.plot import MARKERS, OUTLINES, plain, plot_front
from mopl.report.records import write


def draw(table: Table, path: Path) -> None:
    """Write the picture of a table."""
    notes = ["figures of a sample, not of the paper's data"] if table.sample else []
    title = table.title
    if table.drift:
        _over_kl(table, path, notes)
        return
    repeated = max((entry["repetitions"] for entry in table.figures.values()), default=1)
    if repeated > 1:
        notes.append(f"means of {repeated} folds, bars: one standard deviation")
    if len(table.fronts[0].objectives) > 2:  # a note stands over the first of many columns and would widen it
        short = (["a sample"] if table.sample else []) + notes[int(table.sample) :]
        title, notes = f"{title} ({'; '.join(short)})" if short else title, []
    plot_front(table.fronts, path, metric=table.metric, title=title, notes=["; ".join(notes)] if notes else ())


def _over_kl(table: Table, path: Path, notes: list[str]) -> None:
    require("matplotlib", what="the picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    for place, (row, points) in enumerate(table.drift.items()):
        x, y = [p["kl"] for p in points], [p["reward"] for p in points]
        if row == "base":
            axes.plot(x, y, "*", color="black", markersize=14, label="model before training")
            continue
        colour = OUTLINES[place % len(OUTLINES)]
        axes.plot(x, y, "-", marker=MARKERS[place % len(MARKERS)], color=colour, markersize=6, label=plain(row))
        if place == 0:  # the others have the same weights in the same order; labels would cover one another
            for p in (points[0], points[-1]):
                if not math.isnan(p["kl_weight"]):
                    axes.annotate(
                        f"α = {p['kl_weight']:g}", (p["kl"], p["reward"]), xytext=(6, 6), textcoords="offset points",
                        fontsize=8, color=colour,
                    )  # fmt: skip
    axes.set_xlabel(plain(table.header[3].replace("↓", "").strip()))
    axes.set_ylabel(plain(table.header[2].replace("↑", "").strip()))
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(plain(table.title))
    if notes:
        axes.set_title("; ".join(notes), fontsize=7, loc="left", color="#555555")
    write(path, lambda file: figure.savefig(file, format="png", dpi=150))
