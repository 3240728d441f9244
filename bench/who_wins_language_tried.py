"""What else was tried for a mixture of adapters with few steps, on data that is not in the map of who wins.

    python -m bench.who_wins_language_tried --rows bench/results/cpu/who-wins-language-tried.jsonl
    python -m bench.who_wins_language_tried --rows FILE --report      # only the table

Each trial is trained in the six cells of `bench.who_wins_language` at budget 0.25, at the rates and seeds of `TRIALS`.
Rows are kept as there: what was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.who_wins_cells import Cell
from bench.who_wins_language_cells import Problem, Sizes, Trial, run
from mopl import _terminal

CELLS = tuple(product((1.0, 3.0), (0.2, 0.6, 1.0)))  # spread and conflict
RATES = (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
MIXTURE, SOUP, BUDGET, RATE = "lora-mixture", "dpo-soup", 0.25, 1.6e-2
SIX = tuple(range(1000, 1006))
PLAIN = "`lora-mixture` as in the map"
# name: method, how it is trained, budget, rates, seeds
TRIALS: dict[str, tuple[str, Trial, float, tuple[float, ...], tuple[int, ...]]] = {
    PLAIN: (MIXTURE, Trial(), BUDGET, RATES, SIX),
    "`dpo-soup` as in the map": (SOUP, Trial(), BUDGET, RATES, SIX),
    "concentration 0.2": (MIXTURE, Trial(concentration=0.2), BUDGET, RATES, SIX),
    "concentration 0.05": (MIXTURE, Trial(concentration=0.05), BUDGET, RATES, SIX),
    "balanced draws": (MIXTURE, Trial(balanced=True), BUDGET, RATES, SIX),
    "each objective alone, too: three passes a step": (MIXTURE, Trial(alone=True), BUDGET, (RATE,), SIX[:3]),
    "three times the steps": (MIXTURE, Trial(), 0.75, (8e-3,), SIX[:2]),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], prog="python -m bench.who_wins_language_tried"
    )  # fmt: skip
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="where rows are kept")
    parser.add_argument("--report", action="store_true", help="only write the table of what is there")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    if not given.report:
        work(rows, given.rows)
    print(f"{table(rows)}\n\n{by_conflict(rows)}")
    return 0


def work(rows: list[dict[str, Any]], file: Path, sizes: Sizes | None = None) -> None:
    """Train what the rows lack, a line of the file for each; `rows` grow with it."""
    done = {_key(row) for row in rows}
    for name, (method, trial, budget, rates, seeds) in TRIALS.items():
        for seed, (spread, conflict) in product(seeds, CELLS):
            problem = None
            for rate in rates:
                if (name, spread, conflict, seed, rate) in done:
                    continue
                problem = problem or Problem(spread, conflict, seed, sizes or Sizes())
                problem.trial = trial
                with _terminal.quietly():
                    row = {"trial": name, **run(problem, Cell(budget, spread, conflict, seed), method, rate)}
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")
                rows.append(row)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["trial"], row["spread"], row["conflict"], row["seed"], row["rate"])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the mean hypervolume of each trial at each rate, and its difference from the map's on the same data."""
    lines = [
        f"| | {' | '.join(f'{rate:g}' for rate in RATES)} | its best rate against the map's {RATE:g}, points | "
        "trainings of each |",
        "|---" * (len(RATES) + 3) + "|",
    ]
    figures = {_key(row): row["hypervolume"] for row in rows}
    for name in TRIALS:
        of: dict[float, dict[tuple[Any, ...], float]] = {}
        for (trial, *where, rate), figure in figures.items():
            if trial == name:
                of.setdefault(rate, {})[tuple(where)] = figure
        if not of:
            continue
        means = {rate: statistics.fmean(each.values()) for rate, each in of.items()}
        best = max(means, key=lambda rate: means[rate])
        shown = [f"{means[rate]:.3f}" if rate in means else "" for rate in RATES]
        plain = [100 * (of[best][where] - figures[(PLAIN, *where, RATE)]) for where in of[best]]
        lines.append(f"| {name} | {' | '.join(shown)} | {_mean(plain)} | {len(plain)} |")
    return "\n".join(lines)


def by_conflict(rows: list[dict[str, Any]]) -> str:
    """Return in points by how much each trial at its best rate is above the map's, for each conflict, as a table."""
    conflicts = sorted({conflict for _, conflict in CELLS})
    lines = [f"| conflict | {' | '.join(f'{conflict:g}' for conflict in conflicts)} |", "|---" * 4 + "|"]
    plain = {_key(row)[1:4]: row["hypervolume"] for row in rows if (row["trial"], row["rate"]) == (PLAIN, RATE)}
    for name, (*_, seeds) in TRIALS.items():
        of: dict[float, dict[float, list[float]]] = {}
        for row in rows:
            if row["trial"] == name != PLAIN and seeds == SIX:
                lead = 100 * (row["hypervolume"] - plain[_key(row)[1:4]])
                of.setdefault(row["rate"], {}).setdefault(row["conflict"], []).append(lead)
        if of:
            best = max(of.values(), key=lambda each: sum(map(sum, each.values())))
            lines.append(f"| {name} | {' | '.join(_mean(best[conflict]) for conflict in conflicts)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    """Return a mean with its standard error."""
    if not any(values):
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):+.1f} ± {spread / math.sqrt(len(values)):.1f}"


if __name__ == "__main__":
    sys.exit(main())
