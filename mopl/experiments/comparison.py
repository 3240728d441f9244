"""Several runs in one table, picture and page: what may stand side by side, under which names, beside which base."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mopl._files import write_file
from mopl.experiments.run import BASE, FinishedRun, run_class
from mopl.experiments.run_directory import read_run, refresh
from mopl.experiments.settings import settings_of
from mopl.pareto import Front, Point
from mopl.report.page import write_page
from mopl.report.plot import plot_front
from mopl.report.records import data_name, write_csv
from mopl.report.table import print_table

# Runs that agree in all settings but these, and have different seeds, are seeds of one method.
SEED_ALONE = ("seed", "method", "log_every", "checkpoint_every", "log_samples", "log_with", "device")


class _Compared(NamedTuple):
    """A run, its fronts (the base's first) and the name that tells it from the others."""

    run: FinishedRun
    fronts: list[Front]
    name: str


def compare(
    runs: Sequence[str | Path],
    *,
    html: str | Path | None = None,
    png: str | Path | None = None,
    table: str | Path | None = None,
    csv: str | Path | None = None,
) -> str:
    """Print one table of several runs and write what is asked for; a single run gets its own files anew.

    Every front keeps the base of its own run. Runs that differ in nothing but the seed are seeds; other fronts of one
    method, and bases that differ, are told apart by the names of their runs.

    Args:
        runs: The runs; one that is there twice counts once.
        html: Where the page goes, if anywhere.
        png: Where the picture goes.
        table: Where the table goes.
        csv: Where the points of all fronts go, as CSV.

    Returns:
        The table as text.

    Raises:
        FileNotFoundError: If a run is missing or has no front yet.
        ValueError: If the runs have other objectives or are measured otherwise, or are of different commands.
    """
    kind = run_class(read_run(runs[0]), runs[0])
    opened = [kind.read(path) for path in runs]
    found = {run.path.resolve(): (run, run.fronts()) for run in opened}
    compared = [_Compared(*each, name) for each, name in zip(found.values(), run_names(list(found)), strict=True)]
    samples = truth = None
    first, fronts, _ = compared[0]
    if len(runs) == 1:
        if not (html or png or table or csv):
            refresh(first.path, lambda path: first.write_reports())
        samples, truth = first.samples(fronts), first.true_front()
    _check_comparable(compared)
    notes = (*(note for each in compared for note in each.run.notes), *_differences(compared))
    named, bases = _named_fronts(compared)
    metric = first.metric
    if any(each.run.metric.empty_share != metric.empty_share for each in compared):
        metric = dataclasses.replace(metric, empty_share=None)
    text = print_table(named, metric=metric, notes=notes)
    if table is not None:
        write_file(table, text)
    if csv is not None:
        write_csv(named, csv)
    if png is not None:
        plot_front(named, png, metric=metric, base=bases, truth=truth, notes=notes)
    if html is not None:
        records = [each.run.record for each in compared]
        write_page(
            named, html, metric=metric, base=bases, truth=truth, notes=notes, samples=samples, picture=png,
            continuous=[
                front.method for front in named
                if any(front.method.split(" (")[0] in each.run.continuous for each in compared)
            ],
            configuration=records[0] if len(records) == 1 else records,
        )  # fmt: skip
    return text


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart: the folder's name, or more where names are equal."""
    parts = [path.resolve().parts for path in paths]
    found = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        found.append(str(Path(*own[-length:])))
    return found


def _check_comparable(compared: Sequence[_Compared]) -> None:
    """Raise a ValueError, with the runs and what differs, unless their figures mean the same."""

    def meant(each: _Compared) -> dict[str, Any]:
        front = each.fronts[0]
        said = {"objectives": front.objectives, "main objective": front.main, "direction": front.maximise}
        return {**said, **each.run.measured}

    first, *others = compared
    for other in others:
        theirs = meant(other)
        for what, value in meant(first).items():
            if theirs[what] != value:
                raise ValueError(
                    f"the runs are measured differently: {what} {_said(value)} in {first.name}, "
                    f"{_said(theirs[what])} in {other.name}; report them separately"
                )


def _differences(compared: Sequence[_Compared]) -> list[str]:
    """Return in words what the figures of runs depend on and is not the same in all."""
    notes = []
    if len({each.run.record["data"]["fingerprint"] for each in compared}) > 1:
        notes.append(_other_data(compared))
    for what in compared[0].run.noted:
        values = {each.name: _said(each.run.noted[what]) for each in compared}
        if len(set(values.values())) > 1:
            said = "; ".join(f"{name}: {value}" for name, value in values.items())
            notes.append(f"these runs differ in {what} ({said})")
    grids = {sum(point.scale == 1 for point in front.points) for each in compared for front in each.fronts[1:]}
    if len(grids) > 1:
        sizes = ", ".join(map(str, sorted(grids)))
        notes.append(f"grids of {sizes} weights: hypervolume grows with their number")
    return notes


def _other_data(compared: Sequence[_Compared]) -> str:
    """Return what differs in the data of runs: their names, else how they were read, else what is in them."""
    names = {each.name: data_name(each.fronts[0]) for each in compared}
    if len(set(names.values())) == len(names):
        return f"these runs were measured on different data ({'; '.join(f'{n}: {data}' for n, data in names.items())})"
    found = []
    for known in settings_of(type(compared[0].run.config)).values():
        values = {each.name: getattr(each.run.config, known.name) for each in compared}
        if known.group == "data" and len(set(values.values())) > 1:
            said = (f"{_said(value) or known.unset or 'none'} in {name}" for name, value in values.items())
            found.append(f"{known.name} {', '.join(said)}")
    if found:
        return f"these runs took their data differently ({'; '.join(found)})"
    return f"these runs were measured on different data: {', '.join(set(names.values()))} changed between them"


def _named_fronts(compared: Sequence[_Compared]) -> tuple[list[Front], list[Point]]:
    """Return the fronts of runs under names that tell them apart, and for each the base of its run."""
    entries: list[tuple[Front, _Compared]] = []
    for each in compared:
        for front in each.fronts:
            same = (other for other, _ in entries if other.method == BASE == front.method)
            if not any(_same_base(front, other) for other in same):
                entries.append((front, each))
    groups: dict[str, list[list[_Compared]]] = {}  # by method the runs of one setting, each of another seed
    for front, each in entries:
        own = _but_seed(each)
        known = groups.setdefault(front.method, [])
        alike = [group for group in known if _but_seed(group[0]) == own]
        seeds = [member.run.config.seed for group in alike for member in group]
        if not alike or each.run.config.seed in seeds:
            known.append([each])
        else:
            alike[0].append(each)
    fronts, bases = [], []
    for front, each in entries:
        known = groups[front.method]
        group = next(members for members in known if each in members)
        # One group of seeds may keep the method's own name; two of one name would be averaged.
        alone = len(known) == 1 or (len(group) > 1 and sum(len(members) > 1 for members in known) == 1)
        name = front.method if alone else f"{front.method} ({', '.join(member.name for member in group)})"
        fronts.append(dataclasses.replace(front, method=name))
        bases.append(each.fronts[0].points[0])
    return fronts, bases


def _but_seed(each: _Compared) -> dict[str, Any]:
    """Return the settings of a run, without those in which seeds of one method differ."""
    return {name: value for name, value in each.run.config.to_dict().items() if name not in SEED_ALONE}


def _same_base(one: Front, other: Front) -> bool:
    """Say whether two bases are one: the same figures on the same data from the same reference point."""

    def figures(front: Front) -> Any:
        data = front.data.get("fingerprint") if isinstance(front.data, dict) else front.data
        return [point.figures for point in front.points], front.reference_point, data

    return figures(one) == figures(other)


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
