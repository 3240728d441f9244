"""What the rows of `bench.who_wins` say: differences with intervals over seeds, a table and a picture.

The rival of a cell is the one with the largest mean hypervolume there, so it is chosen with hindsight, in its favour.
Differences are paired: both methods of a seed have the same data, base model and batches. Intervals are Student's, of
95 %, over seeds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.who_wins_cells import CONDITIONED, RIVALS
from mopl._files import write_file

# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 beyond.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
AXES = ("budget", "spread", "conflict")
SPAN = 20.0  # percent at which a colour is full
GOAL = -2.0  # percent: how far the conditioned model may be behind


class Difference(NamedTuple):
    """By how many percent of the rival's hypervolume a method is ahead of it."""

    rival: str
    values: tuple[float, ...]  # of each seed
    mean: float
    low: float  # -inf where one seed says nothing of others
    high: float

    @property
    def seeds_ahead(self) -> str:
        """In how many seeds the method is ahead."""
        return f"{sum(value > 0 for value in self.values)}/{len(self.values)}"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and ends of Student's interval of 95 %."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return mean, -math.inf, math.inf
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (count - 1))
    quantile = STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96
    half = quantile * deviation / math.sqrt(count)
    return mean, mean - half, mean + half


Cells = dict[tuple[float, ...], dict[str, dict[int, dict[str, Any]]]]


def by_cell(rows: list[dict[str, Any]]) -> Cells:
    """Return rows by (budget, spread, conflict), method and seed; only seeds that every method of the cell has."""
    found: Cells = {}
    for row in rows:
        cell = tuple(row[axis] for axis in AXES)
        found.setdefault(cell, {}).setdefault(row["method"], {})[row["seed"]] = row
    whole = {}
    for cell, methods in sorted(found.items()):
        seeds = set.intersection(*(set(each) for each in methods.values()))
        if seeds and set(methods) >= {*CONDITIONED, *RIVALS}:
            whole[cell] = {name: {s: each[s] for s in sorted(seeds)} for name, each in methods.items()}
    if not whole:
        raise ValueError("no cell has all methods yet; run without --report until one has")
    return whole


def mean_of(seeds: dict[int, dict[str, Any]], figure: str) -> float:
    """Return the mean of a figure over seeds."""
    return sum(row[figure] for row in seeds.values()) / len(seeds)


def difference(methods: dict[str, dict[int, dict[str, Any]]], method: str) -> Difference:
    """Return how far a method is ahead of the best rival of its cell."""
    rival = max(RIVALS, key=lambda name: mean_of(methods[name], "hypervolume"))
    ours, theirs = methods[method], methods[rival]
    values = [100 * (ours[s]["hypervolume"] / theirs[s]["hypervolume"] - 1) for s in ours]
    return Difference(rival, tuple(values), *interval(values))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the map as a Markdown table, and what it comes to."""
    cells = by_cell(rows)
    lines = [
        f"| {' | '.join((*AXES, *CONDITIONED, *RIVALS))} | heads ahead of the best rival, % | seeds ahead |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, methods in cells.items():
        figures = {name: mean_of(methods[name], "of_the_optimum") for name in (*CONDITIONED, *RIVALS)}
        best = max(figures.values())
        shown = (f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in figures.values())
        lead = difference(methods, "heads")
        said = f"{lead.mean:+.1f} [{lead.low:+.1f}, {lead.high:+.1f}] ({lead.rival})"
        lines.append(f"| {' | '.join(f'{x:g}' for x in cell)} | {' | '.join(shown)} | {said} | {lead.seeds_ahead} |")
    return "\n".join([*lines, "", summary(cells), ""])


def summary(cells: Cells) -> str:
    """Return how often each conditioned model is ahead and behind."""
    parts = []
    for name in CONDITIONED:
        leads = [difference(methods, name) for methods in cells.values()]
        worst = min(leads, key=lambda lead: lead.mean)
        parts.append(
            f"{name}: ahead of the best rival in {sum(lead.mean > 0 for lead in leads)} of {len(leads)} cells "
            f"({sum(lead.low > 0 for lead in leads)} beyond doubt), behind in {sum(lead.mean < 0 for lead in leads)} "
            f"({sum(lead.high < 0 for lead in leads)} beyond doubt), by more than {-GOAL:g} % in "
            f"{sum(lead.mean < GOAL for lead in leads)}; at worst {worst.mean:+.1f} %"
        )
    for budget in sorted({cell[0] for cell in cells}):
        here = {cell: methods for cell, methods in cells.items() if cell[0] == budget}
        said = (f"{name} {over(here, name)}" for name in CONDITIONED)
        parts.append(
            f"budget {budget:g}, mean over its cells of the lead over the best rival of each: {', '.join(said)}"
        )
    names = (*CONDITIONED, *RIVALS)
    least = [min(names, key=lambda name: mean_of(methods[name], "regret")) for methods in cells.values()]
    parts.append("least regret: " + ", ".join(f"{name} in {least.count(name)} cells" for name in names))
    seeds = sorted({len(each) for methods in cells.values() for each in methods.values()})
    parts.append(f"seeds of a cell: {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}")
    return "\n".join(f"* {part}" for part in parts)


def over(cells: Cells, method: str) -> str:
    """Return the mean lead over cells, with its interval over the seeds that all of these have."""
    leads = [difference(methods, method) for methods in cells.values()]
    count = min(len(lead.values) for lead in leads)
    mean, low, high = interval([sum(lead.values[s] for lead in leads) / len(leads) for s in range(count)])
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the map: a square for each cell, its colour and its text how far each conditioned model is ahead."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = by_cell(rows)
    budgets, spreads, conflicts = (sorted({cell[axis] for cell in cells}) for axis in range(3))
    titles = {"heads": "conditioned, --conditioning heads", "concat": "conditioned, --conditioning concat"}
    size = (0.9 + 3.0 * len(budgets), 1.0 + 2 * (0.5 + 0.8 * len(spreads)))
    with plt.rc_context({"font.size": 8.5, "font.family": "DejaVu Sans"}):
        figure, panels = plt.subplots(len(titles), len(budgets), figsize=size, squeeze=False, layout="constrained")
        image: Any = None
        for row, name in enumerate(titles):
            for column, budget in enumerate(budgets):
                axes = panels[row][column]
                grid = [[math.nan] * len(conflicts) for _ in spreads]
                for y, spread in enumerate(spreads):
                    for x, conflict in enumerate(conflicts):
                        methods = cells.get((budget, spread, conflict))
                        if methods is None:
                            continue
                        lead = difference(methods, name)
                        grid[y][x] = lead.mean
                        said = f"{lead.mean:+.1f} %\n{lead.seeds_ahead} seeds\n{lead.rival}"
                        axes.text(
                            x, y, said, ha="center", va="center", fontsize=7.5,
                            weight="bold" if len({value > 0 for value in lead.values}) == 1 else "normal",
                            color="white" if abs(lead.mean) > 0.7 * SPAN else "#222222",
                        )  # fmt: skip
                image = axes.imshow(grid, cmap="RdBu", vmin=-SPAN, vmax=SPAN, origin="lower", aspect="auto")
                axes.set_xticks(range(len(conflicts)), [f"{x:g}" for x in conflicts])
                axes.set_yticks(range(len(spreads)), [f"{y:g}" for y in spreads])
                axes.tick_params(length=0)
                axes.set_title(f"{titles[name]}\nbudget {budget:g}" if column == 0 else f"budget {budget:g}", size=8.5,
                               loc="left")  # fmt: skip
                if column == 0:
                    axes.set_ylabel("spread: sharpness of the truth")
                if row == len(titles) - 1:
                    axes.set_xlabel("conflict of the objectives")
        bar = figure.colorbar(image, ax=panels, shrink=0.7, pad=0.01)
        bar.set_label("hypervolume beyond the best rival's, %")
        written = io.BytesIO()
        figure.savefig(written, format="png", dpi=130, metadata={"Software": None})
        plt.close(figure)
    write_file(file, written.getvalue())
