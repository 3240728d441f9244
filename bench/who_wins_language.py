"""Who wins at an equal total budget among language models: a conditioned one, or experts, soups and MO-DPO?

    python -m bench.who_wins_language --plan              # what would be trained, and how long it takes
    python -m bench.who_wins_language --out DIR           # trains what is missing, then writes the map
    python -m bench.who_wins_language --out DIR --cells budget=0.25,conflict=1      # a part of it
    python -m bench.who_wins_language --rows FILE --out DIR --report     # only the table and the picture

The axes are those of `bench.who_wins`: the budget of optimizer steps (of all models of a method together), the
sharpness of the true preferences (`spread`) and the conflict of the objectives. `bench.who_wins_language_cells` says
what the data are and what each method trains. Each method has the learning rate that is best for it at each budget, out
of `RATES`, on average over `RATE_SEEDS` seeds that are not in the map.

Rows (by default DIR/rows.jsonl) has a line for each cell, seed and method, written when it is done: a run that was
stopped goes on where it was. Rates come first; where another one turns out best, the map is trained again with it.
Seeds are the outermost loop. `VARIANT_CELLS` also have a variant of the hyper prompt. DIR/map.md and DIR/map.png are
written at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import who_wins, who_wins_language_map
from bench.who_wins_cells import Cell
from bench.who_wins_language_cells import INFLUENCE, METHODS, Problem, Sizes, run
from mopl import _terminal

SEEDS = 3
_FIVE = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
RATES = {0.25: _FIVE, 1.0: _FIVE, 4.0: (2e-3, *_FIVE)}  # by budget; none is best at an end
RATE_CELL = (1.7, 0.6)  # where learning rates are chosen: spread and conflict
FIRST_RATE_SEED = 1000  # and above; the map's are below
RATE_SEEDS = {0.25: 4, 1.0: 4, 4.0: 1}  # how many, by budget
VARIANT_CELLS = ((0.25, 3.0, 1.0), (1.0, 3.0, 1.0))
SECONDS_A_STEP = 0.02  # until there are rows that say

Job = tuple[Cell, str, "float | None"]  # the rate where it is given, None in the map


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], prog="python -m bench.who_wins_language"
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("who-wins-language"), metavar="DIR", help="where the map lies")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="where rows are kept (default: DIR/rows.jsonl)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="seeds 0 to N - 1 (default: %(default)s)")
    parser.add_argument("--cells", default="", metavar="AXIS=VALUE,...", help="only these, such as budget=1,spread=3")
    parser.add_argument("--sizes", default="", metavar="NAME=NUMBER,...", help="sizes of all cells, for a quick look")
    parser.add_argument(
        "--check", nargs=2, metavar=("METHOD", "RATE"), help="train a method in these cells at another learning rate"
    )
    parser.add_argument("--plan", action="store_true", help="say what would be done")
    parser.add_argument("--report", action="store_true", help="only write the map of what is there")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what the rows lack", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # the models are too small for more
    if given.seeds < 1:
        raise ValueError(f"--seeds is {given.seeds} but must be at least 1")
    sizes, cells = sizes_of(given.sizes), who_wins.chosen(given.cells)
    file = given.rows or given.out / "rows.jsonl"
    rows = who_wins.read_rows(file, sizes)  # type: ignore[arg-type]  # any dataclass of sizes does
    if given.report:
        return who_wins_language_map.report(given.out, of_best_rates(rows))
    todo = jobs(cells, given.seeds) if given.check is None else checks(cells, given.seeds, *given.check)
    least = round(min(cell[0] for cell in cells) * sizes.steps)
    if least < max(sizes.points, 2):
        raise ValueError(
            f"--sizes has steps={sizes.steps}, which is {least} at budget {min(cell[0] for cell in cells):g}, but "
            f"dpo-ls trains {sizes.points} models; raise steps"
        )
    missing = lacking(todo, rows)
    print(
        f"{len(todo)} trainings of a method, of which {len(todo) - len(missing)} are there; {len(missing)} to do, "
        f"about {remaining(missing, rows, sizes) / 60:.0f} minutes of one core"
    )
    if given.plan:
        return 0
    for folder in (given.out, file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    work(missing, rows, file, sizes)
    work(lacking(todo, rows), rows, file, sizes)  # the map where the rates that came first say another one
    return who_wins_language_map.report(given.out, of_best_rates(rows))


def jobs(cells: list[tuple[float, float, float]], seeds: int) -> list[Job]:
    """Return everything to train: rates first, then the map by seeds, in some cells with the variant."""
    budgets = sorted({cell[0] for cell in cells})
    variant = [cell for cell in VARIANT_CELLS if cell in cells]
    tried = [(b, name) for b in budgets for name in METHODS] + [(cell[0], INFLUENCE) for cell in variant]
    rates: list[Job] = [
        (Cell(budget, *RATE_CELL, FIRST_RATE_SEED + number), name, rate)
        for number in range(max(RATE_SEEDS.values()))
        for budget, name in tried
        for rate in RATES[budget]
        if number < RATE_SEEDS[budget]
    ]
    return [
        *rates,
        *(
            (Cell(*cell, seed), method, None)
            for seed in range(seeds)
            for cell in cells
            for method in (*METHODS, INFLUENCE)[: None if cell in variant else -1]
        ),
    ]


def checks(cells: list[tuple[float, float, float]], seeds: int, method: str, rate: str) -> list[Job]:
    """Return a method in the cells of the map at a learning rate that was not the best one where rates are chosen."""
    if method not in METHODS:
        raise ValueError(f"--check has {method!r} but it must be one of {', '.join(METHODS)}")
    try:
        value = float(rate)
    except ValueError:
        raise ValueError(f"--check has {rate!r} but a learning rate is a number") from None
    return [(Cell(*cell, seed), method, value) for seed in range(seeds) for cell in cells]


def _key(cell: Cell, method: str, rate: float | None) -> tuple[Any, ...]:
    """Return what identifies a row; a rate that is given at a seed of the map is a check."""
    role = "map" if rate is None else "rate" if cell.seed >= FIRST_RATE_SEED else "check"
    return (role, *dataclasses.astuple(cell), method, rate)


def _key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    rate = None if row["role"] == "map" else row["rate"]
    return (row["role"], *(row[axis] for axis in who_wins.AXES), row["seed"], row["method"], rate)


def lacking(todo: list[Job], rows: list[dict[str, Any]]) -> list[Job]:
    """Return what there are no rows of yet, or in the map only rows of a rate that is not the best one by now."""
    done = {_key_of(row) for row in of_best_rates(rows)}
    return [job for job in todo if _key(*job) not in done]


def of_best_rates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without those of the map whose learning rate is not the best one where rates are chosen."""
    chosen = {key: best_rate(rows, *key) for key in {(r["budget"], r["method"]) for r in rows if r["role"] == "rate"}}
    return [r for r in rows if r["role"] != "map" or r["rate"] == chosen.get((r["budget"], r["method"]), r["rate"])]


def work(missing: list[Job], rows: list[dict[str, Any]], file: Path, sizes: Sizes) -> None:
    """Do what is missing, a line of the file for each; `rows` grow with it."""
    problem, of = None, None
    for number, (cell, method, rate) in enumerate(missing):
        if problem is None or of != (cell.spread, cell.conflict, cell.seed):
            of = (cell.spread, cell.conflict, cell.seed)
            problem = Problem(*of, sizes)
        began = time.perf_counter()
        with _terminal.quietly():
            row = run(problem, cell, method, best_rate(rows, cell.budget, method) if rate is None else rate)
        row = {"role": _key(cell, method, rate)[0], **row, "sizes": dataclasses.asdict(sizes)}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        rows.append(row)
        left = remaining(missing[number + 1 :], rows, sizes)
        print(
            f"[{number + 1}/{len(missing)}] budget {cell.budget:g}, spread {cell.spread:g}, conflict "
            f"{cell.conflict:g}, seed {cell.seed}, {method} at {row['rate']:g}: {row['of_the_optimum']:.3f} of the "
            f"optimum, {time.perf_counter() - began:.1f} s; about {left / 60:.0f} CPU minutes left",
            flush=True,
        )


def best_rate(rows: list[dict[str, Any]], budget: float, method: str) -> float:
    """Return the learning rate with the largest mean hypervolume over the seeds where rates are chosen."""
    tried: dict[float, list[float]] = {}
    for row in rows:
        if row["role"] == "rate" and (row["budget"], row["method"]) == (budget, method):
            tried.setdefault(row["rate"], []).append(row["hypervolume"])
    return max(tried, key=lambda rate: sum(tried[rate]) / len(tried[rate]))


def remaining(missing: list[Job], rows: list[dict[str, Any]], sizes: Sizes) -> float:
    """Return how many seconds of CPU time the rest takes, by what a step of the rows that are there took."""
    steps = sum(row["steps"] for row in rows)
    each = sum(row["cpu_seconds"] for row in rows) / steps if steps else SECONDS_A_STEP
    return each * sum(round(cell.budget * sizes.steps) for cell, _, _ in missing)


def sizes_of(text: str) -> Sizes:
    """Return the sizes with what `--sizes` changes."""
    names, values = [field.name for field in dataclasses.fields(Sizes)], {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        try:
            values[name] = float(number) if name == "warmup" else int(number)
        except ValueError:
            raise ValueError(f"--sizes has {part!r}; write NAME=NUMBER, several with commas between") from None
        if name not in names:
            raise ValueError(f"--sizes has {name!r} but it must be one of {', '.join(names)}")
    return Sizes(**values)


if __name__ == "__main__":
    sys.exit(main())
