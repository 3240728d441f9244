"""What the rows of `bench.who_wins` say: differences with intervals over seeds, a table and a picture.

The rival of a cell is the one with the largest mean hypervolume there, so it is chosen with hindsight, in its favour.
Differences are paired: both methods of a seed have the same data, base model and batches. Intervals are Student's, of
95 %, over seeds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bench.who_wins_cells import CONDITIONED, METHODS, RIVALS
from mopl._files import write_file

# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 beyond.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
AXES = ("budget", "spread", "conflict")
LINEAR = 5.0  # percent up to which the colours of the picture are even; beyond, by the logarithm
SHOWN = {"mixture": "--conditioning mixture", "concat": "--conditioning concat, the paper's"}  # in the picture
NEEDED = ("mixture", "dpo-ls", "dpo-soup")  # without which a cell says nothing
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
    """Return rows by (budget, spread, conflict), method and seed.

    Only seeds that all of `NEEDED` have in a cell count there, and only methods that have them in every cell.
    """
    found: Cells = {}
    for row in rows:
        cell = tuple(row[axis] for axis in AXES)
        found.setdefault(cell, {}).setdefault(row["method"], {})[row["seed"]] = row
    whole = {}
    for cell, methods in sorted(found.items()):
        seeds = set.intersection(*(set(methods.get(name, ())) for name in NEEDED))
        if seeds:
            there = [name for name in METHODS if seeds <= set(methods.get(name, ()))]
            whole[cell] = {name: {s: methods[name][s] for s in sorted(seeds)} for name in there}
    if not whole:
        raise ValueError(f"no cell has {', '.join(NEEDED)} yet; run without --report until one has")
    shared = set.intersection(*(set(methods) for methods in whole.values()))
    return {cell: {name: methods[name] for name in methods if name in shared} for cell, methods in whole.items()}


def names_of(cells: Cells) -> tuple[list[str], list[str]]:
    """Return the conditioned methods and the rivals that the cells have."""
    there = next(iter(cells.values()))
    return [name for name in CONDITIONED if name in there], [name for name in RIVALS if name in there]


def mean_of(seeds: dict[int, dict[str, Any]], figure: str) -> float:
    """Return the mean of a figure over seeds."""
    return sum(row[figure] for row in seeds.values()) / len(seeds)


def difference(methods: dict[str, dict[int, dict[str, Any]]], method: str) -> Difference:
    """Return how far a method is ahead of the best rival of its cell."""
    rivals = [name for name in RIVALS if name in methods]
    rival = max(rivals, key=lambda name: mean_of(methods[name], "hypervolume"))
    ours, theirs = methods[method], methods[rival]
    values = [100 * (ours[s]["hypervolume"] / theirs[s]["hypervolume"] - 1) for s in ours]
    return Difference(rival, tuple(values), *interval(values))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the map as a Markdown table, the regrets as another, and what they come to."""
    cells = by_cell(rows)
    methods_there = [name for names in names_of(cells) for name in names]
    names = (*AXES, *methods_there)
    ours = CONDITIONED[0]
    lines = [
        f"| {' | '.join(names)} | {ours} ahead of the best rival, % | seeds ahead |", "|" + "---|" * (len(names) + 2),
    ]  # fmt: skip
    for cell, methods in cells.items():
        figures = {name: mean_of(methods[name], "of_the_optimum") for name in methods_there}
        best = max(figures.values())
        shown = (f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in figures.values())
        lead = difference(methods, ours)
        said = f"{lead.mean:+.1f}{ends_of(lead.low, lead.high)} ({lead.rival})"
        lines.append(f"| {' | '.join(f'{x:g}' for x in cell)} | {' | '.join(shown)} | {said} | {lead.seeds_ahead} |")
    return "\n".join([*lines, "", regrets(cells), "", summary(cells), ""])


def regrets(cells: Cells) -> str:
    """Return the mean regrets over seeds, in nats, as a Markdown table."""
    names = [name for names in names_of(cells) for name in names]
    lines = [f"| {' | '.join((*AXES, *names))} |", "|" + "---|" * (len(AXES) + len(names))]
    for cell, methods in cells.items():
        figures = [mean_of(methods[name], "regret") for name in names]
        shown = (f"**{x:.3f}**" if x == min(figures) else f"{x:.3f}" for x in figures)
        lines.append(f"| {' | '.join(f'{x:g}' for x in cell)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def summary(cells: Cells) -> str:
    """Return how often each conditioned model is ahead and behind, as a list of sentences."""
    parts, (conditioned, rivals) = [], names_of(cells)
    for name in conditioned:
        leads = [difference(methods, name) for methods in cells.values()]
        worst = min(leads, key=lambda lead: lead.mean)
        parts.append(
            f"`{name}` is ahead of the best rival in {sum(lead.mean > 0 for lead in leads)} of {len(leads)} squares, "
            f"with an interval above 0 in {sum(lead.low > 0 for lead in leads)}, and behind in "
            f"{sum(lead.mean < 0 for lead in leads)}, with an interval below 0 in "
            f"{sum(lead.high < 0 for lead in leads)}. It is more than {-GOAL:g} % behind in "
            f"{sum(lead.mean < GOAL for lead in leads)}; the worst is {worst.mean:+.1f} %."
        )
    for budget in sorted({cell[0] for cell in cells}):
        here = {cell: methods for cell, methods in cells.items() if cell[0] == budget}
        said = ", ".join(f"{over(here, name)} for `{name}`" for name in conditioned)
        parts.append(f"At budget {budget:g} the mean lead over the best rival of each square is {said}.")
    names = (*conditioned, *rivals)
    least = [min(names, key=lambda name: mean_of(methods[name], "regret")) for methods in cells.values()]
    counts = ", ".join(f"{least.count(name)} to `{name}`" for name in names if name in least)
    parts.append(f"The least regret belongs, in squares: {counts}.")
    seeds = sorted({len(each) for methods in cells.values() for each in methods.values()})
    parts.append(f"Seeds of a square: {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}.")
    return "\n".join(f"* {part}" for part in parts)


def over(cells: Cells, method: str) -> str:
    """Return the mean lead over cells, and that with its interval over the seeds that all of these have."""
    leads = {cell: difference(methods, method) for cell, methods in cells.items()}
    shared = sorted(set.intersection(*(set(methods[method]) for methods in cells.values())))
    of_seed = [dict(zip(cells[cell][method], lead.values, strict=True)) for cell, lead in leads.items()]
    whole = f"{sum(lead.mean for lead in leads.values()) / len(leads):+.1f} %"
    if len(shared) < 2:
        return whole
    mean, low, high = interval([sum(each[seed] for each in of_seed) / len(of_seed) for seed in shared])
    if all(len(each) == len(shared) for each in of_seed):
        return f"{whole}{ends_of(low, high)}"
    return f"{whole} (over the {len(shared)} seeds that all of these have {mean:+.1f} %{ends_of(low, high)})"


def ends_of(low: float, high: float) -> str:
    """Return an interval in brackets, or nothing where one seed gives none."""
    return f" [{low:+.1f}, {high:+.1f}]" if math.isfinite(low) else ""


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the map: a square for each cell, its colour and its text how far each conditioned model is ahead."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import SymLogNorm

    cells = by_cell(rows)
    budgets, spreads, conflicts = (sorted({cell[axis] for cell in cells}) for axis in range(3))
    shown = {name: title for name, title in SHOWN.items() if name in next(iter(cells.values()))}
    leads = {(cell, name): difference(methods, name) for cell, methods in cells.items() for name in shown}
    widest = 10 * math.ceil(max(10.0, *(abs(lead.mean) for lead in leads.values())) / 10)
    colours = SymLogNorm(LINEAR, vmin=-widest, vmax=widest, base=10)
    size = (1.2 + 4.0 * len(budgets), 1.2 + len(shown) * (0.8 + 1.35 * len(spreads)))
    with plt.rc_context({"font.size": 13, "font.family": "DejaVu Sans"}):
        figure, panels = plt.subplots(len(shown), len(budgets), figsize=size, squeeze=False, layout="constrained")
        image: Any = None
        for row, (name, title) in enumerate(shown.items()):
            for column, budget in enumerate(budgets):
                axes = panels[row][column]
                grid = [[math.nan] * len(conflicts) for _ in spreads]
                for y, x in product(range(len(spreads)), range(len(conflicts))):
                    lead = leads.get(((budget, spreads[y], conflicts[x]), name))
                    if lead is None:
                        continue
                    grid[y][x] = lead.mean
                    axes.text(
                        x, y, f"{lead.mean:+.1f} %\n{lead.seeds_ahead} seeds\n{lead.rival}", ha="center", va="center",
                        weight="bold" if len({value > 0 for value in lead.values}) == 1 else "normal",
                        color="white" if abs(float(colours(lead.mean)) - 0.5) > 0.28 else "#222222",
                    )  # fmt: skip
                image = axes.imshow(grid, cmap="RdBu", norm=colours, origin="lower", aspect="auto")
                axes.set_xticks(range(len(conflicts)), [f"{x:g}" for x in conflicts])
                axes.set_yticks(range(len(spreads)), [f"{y:g}" for y in spreads])
                axes.tick_params(length=0)
                axes.set_title(
                    f"{title}\nbudget {budget:g}" if column == 0 else f"budget {budget:g}", size=13, loc="left"
                )
                if column == 0:
                    axes.set_ylabel("spread (sharpness)")
                if row == len(shown) - 1:
                    axes.set_xlabel("conflict of the objectives")
        ticks = [x for x in (2, 5, 10, 20, 50, 100) if x < widest] + [widest]
        marks = [*(-x for x in reversed(ticks)), 0, *ticks]
        bar = figure.colorbar(image, ax=panels, shrink=0.85, pad=0.01, ticks=marks, format="%+g")
        bar.ax.minorticks_off()
        bar.set_label("hypervolume beyond the best rival's, %")
        written = io.BytesIO()
        figure.savefig(written, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)
    write_file(file, written.getvalue())
