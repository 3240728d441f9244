"""Who wins at an equal total budget: one conditioned model, or experts, soups and MO-DPO?

    python -m bench.who_wins --plan                    # what would be trained, and how long it takes
    python -m bench.who_wins --out who-wins            # trains what is missing, then writes the map
    python -m bench.who_wins --out who-wins --cells budget=0.25,conflict=1    # a part of it
    python -m bench.who_wins --out who-wins --report --keep bench/results/cpu/who-wins.jsonl    # the rows of the docs
    python -m bench.who_wins --out who-wins --report   # only the table and the picture, of what is there

The map has three axes: the budget of optimizer steps (of all models of a method together), the sharpness of the true
preferences (`spread`) and the conflict of the objectives, on data of `mopl.ranking.synthetic`, whose optimum is known.
`bench.who_wins_cells` says what each method trains. Each method has the learning rate of `RATES` and the number of
`AVERAGES` that are best for it at each budget, on data of a sharpness and a seed that are not in the map.

DIR/rows.jsonl has a line for each cell, seed and method, written when it is done: a run that was stopped goes on where
it was. Seeds are the outermost loop, so that a run that is stopped leaves a whole map of fewer seeds. DIR/map.md and
DIR/map.png are written at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench import who_wins_map
from bench.who_wins_cells import METHODS, Cell, Choice, Problem, Sizes, run
from mopl import _terminal

BUDGETS = (0.25, 1.0, 4.0)
SPREADS = (1.0, 3.0)
CONFLICTS = (0.2, 0.6, 1.0)
SEEDS = 5
RATES = (3e-3, 1e-2, 3e-2)
# By budget: trainings that are averaged into each model. With few steps a second one takes more than it gives.
AVERAGES = {0.25: (1,), 1.0: (1,), 4.0: (1, 2)}
CHOICE_SEED, CHOICE_CELL = 1000, (1.7, 0.6)  # where these are chosen: spread and conflict
SECONDS_A_STEP = 0.006  # until there are rows that say
AXES = ("budget", "spread", "conflict")
KEPT = (
    "role",
    *AXES,
    "seed",
    "method",
    "rate",
    "average",
    "models",
    "steps",
    "hypervolume",
    "of_the_optimum",
    "regret",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="python -m bench.who_wins")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("who-wins"),
        metavar="DIR",
        help="where rows and map lie (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="seeds 0 to N - 1 (default: %(default)s)")
    parser.add_argument("--cells", default="", metavar="AXIS=VALUE,...", help="only these, such as budget=1,spread=3")
    parser.add_argument(
        "--methods", default=",".join(METHODS), metavar="NAME,...", help="only these (default: %(default)s)"
    )
    parser.add_argument("--sizes", default="", metavar="NAME=NUMBER,...", help="sizes of all cells, for a quick look")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FILE",
        help="take up what is here, and write the figures here, a line for each row",
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
        print(f"stopped; the same command goes on with what {given.out / 'rows.jsonl'} lacks", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # the models are too small for more
    if given.seeds < 1:
        raise ValueError(f"--seeds is {given.seeds} but must be at least 1")
    if given.keep is not None and not given.keep.parent.is_dir():
        raise ValueError(
            f"--keep needs the folder {given.keep.parent}, which is not there; make it, or name another file"
        )
    sizes = sizes_of(given.sizes)
    cells, methods = chosen(given.cells), given.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"--methods has {min(unknown)!r} but must be some of {', '.join(METHODS)}")
    rows = read_rows(given.out / "rows.jsonl", sizes)
    if given.keep is not None and given.keep.exists() and sizes == Sizes():
        there = {key_of(row) for row in rows}
        kept = (json.loads(line) for line in given.keep.read_text(encoding="utf-8").splitlines())
        rows += [row for row in kept if key_of(row) not in there]
    if given.report:
        return report(given.out, rows, given.keep)
    budgets = sorted({cell[0] for cell in cells})
    choice_jobs = [
        (Cell(budget, *CHOICE_CELL, CHOICE_SEED), method, Choice(rate, average))
        for budget in budgets
        for method, rate, average in product(methods, RATES, AVERAGES[budget])
    ]
    for budget in budgets:
        least, fewest = round(budget * sizes.steps), max(AVERAGES[budget]) * max(sizes.points, sizes.objectives)
        if least < fewest:
            raise ValueError(
                f"--sizes has steps={sizes.steps}, which is {least} at budget {budget:g}, but dpo-ls does {fewest} "
                f"trainings there; raise steps to {math.ceil(fewest / budget)} or more"
            )
    jobs = [(Cell(*cell, seed), method, None) for seed in range(given.seeds) for cell in cells for method in methods]
    done = {key_of(row) for row in rows}
    missing = [job for job in [*choice_jobs, *jobs] if key(*job) not in done]
    print(plan(missing, len(choice_jobs) + len(jobs), rows, sizes))
    if given.plan:
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    work(missing, rows, given.out / "rows.jsonl", sizes)
    return report(given.out, rows, given.keep)


def work(missing: list, rows: list[dict[str, Any]], file: Path, sizes: Sizes) -> None:
    """Do what is missing, a line of the file for each; `rows` grow with it."""
    problem, of = None, None
    for number, (cell, method, choice) in enumerate(missing):
        if of != (cell.spread, cell.conflict, cell.seed):
            of = (cell.spread, cell.conflict, cell.seed)
            problem = Problem(*of, sizes)
        began = time.perf_counter()
        with _terminal.quietly():
            row = run(problem, cell, method, best_choice(rows, cell.budget, method) if choice is None else choice)
        row = {"role": "map" if choice is None else "choice", **row, "sizes": dataclasses.asdict(sizes)}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        rows.append(row)
        left = remaining(missing[number + 1 :], rows, sizes)
        print(
            f"[{number + 1}/{len(missing)}] budget {cell.budget:g}, spread {cell.spread:g}, conflict "
            f"{cell.conflict:g}, seed {cell.seed}, {method} at {row['rate']:g}"
            f"{' x 2' if row['average'] == 2 else ''}: {row['of_the_optimum']:.3f} of the "
            f"optimum, {time.perf_counter() - began:.1f} s; about {left / 60:.0f} CPU minutes left",
            flush=True,
        )


def best_choice(rows: list[dict[str, Any]], budget: float, method: str) -> Choice:
    """Return the choice with the largest hypervolume where choices are made."""
    tried = [row for row in rows if row["role"] == "choice" and (row["budget"], row["method"]) == (budget, method)]
    best = max(tried, key=lambda row: row["hypervolume"])
    return Choice(best["rate"], best["average"])


def key(cell: Cell, method: str, choice: Choice | None) -> tuple:
    """Return what identifies a row."""
    return ("map" if choice is None else "choice", *dataclasses.astuple(cell), method, choice)


def key_of(row: dict[str, Any]) -> tuple:
    """Return the same of a row that is there."""
    choice = Choice(row["rate"], row["average"]) if row["role"] == "choice" else None
    return (row["role"], *(row[axis] for axis in AXES), row["seed"], row["method"], choice)


def remaining(missing: list, rows: list[dict[str, Any]], sizes: Sizes) -> float:
    """Return how many seconds of CPU time the rest takes, by what a step of the rows that are there took."""
    timed = [row for row in rows if "cpu_seconds" in row]
    steps = sum(row["steps"] for row in timed)
    each = sum(row["cpu_seconds"] for row in timed) / steps if steps else SECONDS_A_STEP
    return each * sum(round(cell.budget * sizes.steps) for cell, _, _ in missing)


def plan(missing: list, whole: int, rows: list[dict[str, Any]], sizes: Sizes) -> str:
    """Return what will be done, in words."""
    steps = sum(round(cell.budget * sizes.steps) for cell, _, _ in missing)
    return (
        f"{whole} trainings of a method, of which {whole - len(missing)} are there; {len(missing)} to do, {steps} "
        f"steps, about {remaining(missing, rows, sizes) / 60:.0f} minutes of one core"
    )


def chosen(text: str) -> list[tuple[float, float, float]]:
    """Return the cells (budget, spread, conflict) that `--cells` leaves, those of one problem side by side."""
    wanted = _pairs(text, "--cells", AXES)
    values = dict(zip(AXES, (BUDGETS, SPREADS, CONFLICTS), strict=True))
    for axis, value in wanted.items():
        if value not in values[axis]:
            raise ValueError(
                f"--cells has {axis}={value:g} but the map has {', '.join(f'{v:g}' for v in values[axis])}"
            )
        values[axis] = (value,)
    return [
        (budget, spread, conflict)
        for spread, conflict, budget in product(*(values[a] for a in ("spread", "conflict", "budget")))
    ]


def sizes_of(text: str) -> Sizes:
    """Return the sizes with what `--sizes` changes."""
    names = [field.name for field in dataclasses.fields(Sizes)]
    changes = _pairs(text, "--sizes", names)
    values: dict[str, Any] = {name: value if name == "warmup" else int(value) for name, value in changes.items()}
    return Sizes(**values)


def _pairs(text: str, option: str, names: Any) -> dict[str, float]:
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"{option} has {part!r}; write NAME=NUMBER, several with commas between") from None
        if name not in names:
            raise ValueError(f"{option} has {name!r} but it must be one of {', '.join(names)}")
    return found


def read_rows(file: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """Return the rows that are there; a last line that was cut off is left out, and cut from the file."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    rows = [json.loads(line) for line in whole.splitlines()]
    if any(row["sizes"] != dataclasses.asdict(sizes) for row in rows):
        raise ValueError(f"{file} has rows of other sizes; pass the --sizes that it was made with, or another --out")
    return rows


def report(out: Path, rows: list[dict[str, Any]], keep: Path | None = None) -> int:
    """Write the map of the rows, and the rows themselves into a file to keep."""
    every, rows = rows, [row for row in rows if row["role"] == "map"]
    if not rows:
        raise ValueError(f"{out / 'rows.jsonl'} has no row of the map yet; run without --report first")
    text = who_wins_map.table(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "map.md").write_text(text, encoding="utf-8")
    who_wins_map.picture(rows, out / "map.png")
    if keep is not None:
        kept = sorted(every, key=lambda row: [row[name] for name in KEPT[:8]])
        lines = (json.dumps({name: rounded(row[name]) for name in KEPT}) for row in kept)
        keep.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(text)
    print(f"written: {out / 'map.md'}, {out / 'map.png'}")
    return 0


def rounded(value: Any) -> Any:
    """Return a number with six digits, which are more than the figures mean; anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
