"""What the rows of `bench.who_wins_language` say: a table, sentences and a picture.

Differences, intervals and the choice of the rival are those of `bench.who_wins_map`: paired over seeds, in percent of
the rival's hypervolume, Student's intervals of 95 %, the rival with the largest mean.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.pictures import fingerprint
from bench.who_wins_language_cells import CONDITIONED, INFLUENCE, METHODS, RIVALS
from bench.who_wins_map import AXES, Difference, interval, mean_of
from mopl._files import write_file

OURS, PRESENT = CONDITIONED
PANELS = {"rivals": f"{OURS} against its best rival", PRESENT: f"{OURS} against {PRESENT}"}
SPAN = 60.0  # percent at which a colour is full

Methods = dict[str, dict[int, dict[str, Any]]]  # rows by method and seed
Cells = dict[tuple[float, ...], Methods]


def by_cell(rows: list[dict[str, Any]]) -> Cells:
    """Return rows of the map by (budget, spread, conflict), method and seed; only seeds that all methods have."""
    found: Cells = {}
    for row in rows:
        if row["role"] == "map":
            cell = found.setdefault(tuple(row[axis] for axis in AXES), {})
            cell.setdefault(row["method"], {})[row["seed"]] = row
    whole: Cells = {}
    for cell, methods in sorted(found.items()):
        seeds = set.intersection(*(set(methods.get(name, ())) for name in METHODS))
        if seeds:
            whole[cell] = {name: {s: each[s] for s in sorted(seeds) if s in each} for name, each in methods.items()}
    if not whole:
        raise ValueError("no cell has all methods yet; run without --report until one has")
    return whole


def difference(
    methods: Methods, method: str, rivals: Sequence[str] = RIVALS, figure: str = "hypervolume"
) -> Difference:
    """Return by how many percent a method is ahead of the best of some others."""
    rival = max(rivals, key=lambda name: mean_of(methods[name], figure))
    ours, theirs = methods[method], methods[rival]
    values = [100 * (ours[s][figure] / theirs[s][figure] - 1) for s in ours]
    return Difference(rival, tuple(values), *interval(values))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the map as a Markdown table."""
    lines = [
        f"| {' | '.join((*AXES, *METHODS))} | {OURS} ahead of the best rival, % | seeds | "
        f"ahead of {PRESENT}, % | seeds |",
        "|---" * (len(AXES) + len(METHODS) + 4) + "|",
    ]
    for cell, methods in by_cell(rows).items():
        figures = [mean_of(methods[name], "of_the_optimum") for name in METHODS]
        shown = [f"**{x:.3f}**" if x == max(figures) else f"{x:.3f}" for x in figures]
        lead, over = difference(methods, OURS), difference(methods, OURS, (PRESENT,))
        said = [f"{_interval(lead)} ({lead.rival})", lead.seeds_ahead, _interval(over), over.seeds_ahead]
        lines.append(f"| {' | '.join([*(f'{x:g}' for x in cell), *shown, *said])} |")
    return "\n".join(lines)


def _interval(lead: Difference) -> str:
    return f"{lead.mean:+.1f}" + (f" [{lead.low:+.1f}, {lead.high:+.1f}]" if math.isfinite(lead.low) else "")


def summary(rows: list[dict[str, Any]]) -> str:
    """Return in sentences how often each conditioned model is ahead, by four figures, and what the variant does."""
    cells = by_cell(rows)
    parts = []
    for name, rivals in ((OURS, RIVALS), (OURS, (PRESENT,)), (PRESENT, RIVALS)):
        leads = [difference(methods, name, rivals) for methods in cells.values()]
        worst = min(leads, key=lambda lead: lead.mean)
        against = "the best rival" if rivals == RIVALS else f"`{rivals[0]}`"
        parts.append(
            f"`{name}` is ahead of {against} in {sum(x.mean > 0 for x in leads)} of {len(leads)} cells, in "
            f"{sum(len(x.values) > 1 and all(v > 0 for v in x.values) for x in leads)} of them in all of "
            "several seeds, "
            f"in {sum(x.low > 0 for x in leads)} with an interval above 0; behind in "
            f"{sum(x.mean < 0 for x in leads)}, in {sum(x.high < 0 for x in leads)} with an interval below 0; "
            f"more than 2 % behind in {sum(x.mean < -2 for x in leads)}, at worst {worst.mean:+.1f} %"
        )
    for budget in sorted({cell[0] for cell in cells}):
        here = [methods for cell, methods in cells.items() if cell[0] == budget]
        said = [
            f"{over(here, OURS, rivals)} over {what}"
            for rivals, what in ((RIVALS, "the best rival of each"), ((PRESENT,), f"`{PRESENT}`"))
        ]
        parts.append(f"budget {budget:g}, mean lead of `{OURS}` over its cells: {' and '.join(said)}")
    for figure, what in (
        ("hypervolume", "hypervolume of KL-regularised rewards"), ("rewards", "hypervolume of rewards"),
        ("losses", "hypervolume of expected losses"), ("regret", "regret of the expected loss"),
        ("value_regret", "regret of the KL-regularised reward"),
    ):  # fmt: skip
        choose = min if "regret" in figure else max
        best = [choose(METHODS, key=lambda n, m=methods: mean_of(m[n], figure)) for methods in cells.values()]
        counted = ", ".join(f"`{name}` {best.count(name)}" for name in METHODS if name in best)
        parts.append(f"{'least' if 'regret' in figure else 'largest'} {what}, in how many cells: {counted}")
    for cell, methods in cells.items():
        if INFLUENCE in methods:
            lead = difference({**methods}, INFLUENCE, (PRESENT,))
            figure = mean_of(methods[INFLUENCE], "of_the_optimum")
            parts.append(
                f"a hyper prompt that starts with an influence of w, at budget {cell[0]:g}, spread {cell[1]:g}, "
                f"conflict {cell[2]:g}: {figure:.3f}"
                f", ahead of `{PRESENT}` by {_interval(lead)} %, in {lead.seeds_ahead} seeds"
            )
    parts += _checks(rows, cells)
    rates = {(row["method"], row["budget"]): row["rate"] for row in rows if row["role"] == "map"}
    for name in METHODS:
        each = ", ".join(f"{rate:g} at {budget:g}" for (of, budget), rate in sorted(rates.items()) if of == name)
        parts.append(f"learning rates of `{name}` by budget: {each}")
    seeds = sorted({len(methods[OURS]) for methods in cells.values()})
    parts.append(f"seeds of a cell: {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}")
    return "\n".join(f"* {part}" for part in parts)


def _checks(rows: list[dict[str, Any]], cells: Cells) -> list[str]:
    """Return what another learning rate than the chosen one comes to, where `--check` has trained with one."""
    found: dict[tuple[str, float, float], Cells] = {}
    for row in rows:
        cell = tuple(row[axis] for axis in AXES)
        if row["role"] == "check" and row["seed"] in cells.get(cell, {}).get(row["method"], {}):
            of = found.setdefault((row["method"], row["rate"], row["budget"]), {})
            of.setdefault(cell, {name: each for name, each in cells[cell].items() if name != row["method"]})
            of[cell].setdefault(row["method"], {})[row["seed"]] = row
    return [
        f"with a learning rate of {rate:g} `{method}` is ahead of the best rival in "
        f"{sum(difference(each, method).mean > 0 for each in of.values())} of {len(of)} cells of budget {budget:g}, by "
        f"{over(list(of.values()), method, RIVALS)}, and of `{PRESENT}` in "
        f"{sum(difference(each, method, (PRESENT,)).mean > 0 for each in of.values())}, by "
        f"{over(list(of.values()), method, (PRESENT,))}"
        for (method, rate, budget), of in sorted(found.items())
    ]


def over(cells: list[Methods], method: str, rivals: Sequence[str]) -> str:
    """Return the mean lead over cells, with its interval over the seeds that all of these have."""
    leads = [difference(methods, method, rivals) for methods in cells]
    count = min(len(lead.values) for lead in leads)
    mean, low, high = interval([sum(lead.values[s] for lead in leads) / len(leads) for s in range(count)])
    return f"{mean:+.1f} %" + (f" [{low:+.1f}, {high:+.1f}]" if math.isfinite(low) else "")


def leads_of(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what the picture shows: panel, cell, rival, mean and seeds ahead."""
    found = []
    for panel in PANELS:
        for cell, methods in by_cell(rows).items():
            lead = difference(methods, OURS, RIVALS if panel == "rivals" else (panel,))
            found.append((panel, *cell, lead.rival, round(lead.mean, 1), lead.seeds_ahead))
    return found


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the map: a square for each cell, its colour and its text how far the mixture of adapters is ahead."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    leads = leads_of(rows)
    budgets, spreads, conflicts = (sorted({lead[1 + axis] for lead in leads}) for axis in range(3))
    size = (0.9 + 3.0 * len(budgets), 1.0 + 2 * (0.5 + 0.8 * len(spreads)))
    with plt.rc_context({"font.size": 8.5, "font.family": "DejaVu Sans"}):
        figure, panels = plt.subplots(2, len(budgets), figsize=size, squeeze=False, layout="constrained")
        image: Any = None
        for row, (panel, title) in enumerate(PANELS.items()):
            for column, budget in enumerate(budgets):
                axes, grid = panels[row][column], [[math.nan] * len(conflicts) for _ in spreads]
                for of, at, spread, conflict, rival, mean, ahead in leads:
                    if (of, at) != (panel, budget):
                        continue
                    y, x = spreads.index(spread), conflicts.index(conflict)
                    grid[y][x] = mean
                    some, whole = ahead.split("/")
                    axes.text(
                        x, y, f"{mean:+.1f} %\n{ahead} seeds\n{rival}", ha="center", va="center", fontsize=7.5,
                        weight="bold" if whole > "1" and some in ("0", whole) else "normal",
                        color="white" if abs(mean) > 0.7 * SPAN else "#222222",
                    )  # fmt: skip
                image = axes.imshow(grid, cmap="RdBu", vmin=-SPAN, vmax=SPAN, origin="lower", aspect="auto")
                axes.set_xticks(range(len(conflicts)), [f"{x:g}" for x in conflicts])
                axes.set_yticks(range(len(spreads)), [f"{y:g}" for y in spreads])
                axes.tick_params(length=0)
                axes.set_title(f"{title}\nbudget {budget:g}" if column == 0 else f"budget {budget:g}", size=8.5,
                               loc="left")  # fmt: skip
                if column == 0:
                    axes.set_ylabel("spread: sharpness of the truth")
                if row == 1:
                    axes.set_xlabel("conflict of the objectives")
        figure.colorbar(image, ax=panels, shrink=0.7, pad=0.01).set_label("hypervolume beyond the other's, %")
        written = io.BytesIO()
        described = {"Software": None, "Description": fingerprint(leads)}
        figure.savefig(written, format="png", dpi=130, metadata=described)
        plt.close(figure)
    write_file(file, written.getvalue())


def report(out: Path, rows: list[dict[str, Any]]) -> int:
    """Write the map of the rows into a folder."""
    text = f"{table(rows)}\n\n{summary(rows)}\n"
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "map.md", text)
    picture(rows, out / "map.png")
    print(f"{text}\nwritten: {out / 'map.md'}, {out / 'map.png'}")
    return 0
