"""Several runs in one table, picture and page: what may stand side by side, under which names, beside which base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mopl._files import write_file
from mopl.pareto import Front
from mopl.report.page import write_page
from mopl.report.plot import plot_front
from mopl.report.records import BASE_METHOD, Metric, write_csv
from mopl.report.table import print_table

SEED_ALONE = ("seed", "method", "log_every", "checkpoint_every", "log_samples", "log_with", "device")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run as a comparison sees it.

    Attributes:
        path: Its directory.
        record: Its `config.json`.
        fronts: Its fronts, the base's first.
        metric: What their figures are.
        settings: All settings; runs that agree in all but the seed are seeds of one method.
        measured: The settings that say what a figure is, by name: runs that differ in one are refused.
        noted: What else the figures depend on, by name: runs that differ in it are shown with a note.
        notes: What a reader of its figures must know.
    """

    path: Path
    record: dict[str, Any]
    fronts: Sequence[Front]
    metric: Metric
    settings: Mapping[str, Any]
    measured: Mapping[str, Any]
    noted: Mapping[str, Any]
    notes: Sequence[str] = ()


def compare_runs(
    runs: Sequence[Run],
    *,
    html: str | Path | None = None,
    png: str | Path | None = None,
    table: str | Path | None = None,
    csv: str | Path | None = None,
    samples: Any = None,
    truth: Any = None,
) -> str:
    """Print one table of runs of one kind and write what is asked for.

    Every front keeps the base of its own run. Runs that differ in nothing but the seed are seeds; other fronts of one
    method, and bases that differ, are told apart by the names of their runs.

    Args:
        runs: The runs; one that is there twice counts once.
        html: Where the page goes, if anywhere.
        png: Where the picture goes.
        table: Where the table goes.
        csv: Where the points of all fronts go, as CSV.
        samples: What `write_page` takes.
        truth: What `write_page` and `plot_front` take.

    Returns:
        The table as text.

    Raises:
        ValueError: If the figures of the runs mean different things.
    """
    places: dict[Path, Run] = {}
    for run in runs:
        places.setdefault(run.path.resolve(), run)
    runs = list(places.values())
    names = run_names([run.path for run in runs])
    check_comparable(runs, names)
    notes = (*(note for run in runs for note in run.notes), *differences(runs, names))
    fronts, bases = named_fronts(runs, names)
    metric = runs[0].metric
    if any(run.metric.empty_share != metric.empty_share for run in runs):
        metric = dataclasses.replace(metric, empty_share=None)
    text = print_table(fronts, metric=metric, notes=notes)
    if table is not None:
        write_file(table, text)
    if csv is not None:
        write_csv(fronts, csv)
    if png is not None:
        plot_front(fronts, png, metric=metric, base=bases, truth=truth, notes=notes)
    if html is not None:
        configuration = runs[0].record if len(runs) == 1 else [run.record for run in runs]
        write_page(
            fronts, html, metric=metric, base=bases, truth=truth, notes=notes, configuration=configuration,
            samples=samples,
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


def check_comparable(runs: Sequence[Run], names: Sequence[str]) -> None:
    """Raise unless the figures of runs mean the same.

    Raises:
        ValueError: With the runs and what differs.
    """
    first = runs[0]
    for run, name in zip(runs[1:], names[1:], strict=True):
        theirs, ours = ({"objectives": list(r.fronts[0].objectives), "main objective": r.fronts[0].main,
                         "direction": r.fronts[0].maximise} for r in (run, first))  # fmt: skip
        for what, value in {**ours, **first.measured}.items():
            other = {**theirs, **run.measured}[what]
            if other != value:
                raise ValueError(
                    f"the runs are measured differently: {what} {_said(value)} in {names[0]}, {_said(other)} in {name};"
                    " report them separately"
                )


def differences(runs: Sequence[Run], names: Sequence[str]) -> tuple[str, ...]:
    """Return in words what the figures of runs depend on and is not the same in all."""
    notes = []
    if len({run.record["data"]["fingerprint"] for run in runs}) > 1:
        what = "; ".join(f"{name}: {_data(run)}" for run, name in zip(runs, names, strict=True))
        notes.append(f"these runs were measured on different data ({what})")
    for what in runs[0].noted:
        values = [_said(run.noted[what]) for run in runs]
        if len(set(values)) > 1:
            each = "; ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
            notes.append(f"these runs differ in {what} ({each})")
    grids = {sum(point.scale == 1 for point in front.points) for run in runs for front in run.fronts[1:]}
    if len(grids) > 1:
        sizes = ", ".join(map(str, sorted(grids)))
        notes.append(f"grids of {sizes} weights: hypervolume grows with their number")
    return tuple(notes)


def named_fronts(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[Front], list[dict[str, Any] | None]]:
    """Return the fronts of runs under names that tell them apart, and for each the base of its run as a point."""
    entries: list[tuple[Front, int]] = []
    for place, run in enumerate(runs):
        for front in run.fronts:
            same = (other for other, _ in entries if other.method == BASE_METHOD == front.method)
            if not any(_same_base(front, other) for other in same):
                entries.append((front, place))
    groups: dict[str, list[tuple[dict[str, Any], list[int]]]] = {}  # by method: settings, runs
    for front, place in entries:
        settings = {name: value for name, value in runs[place].settings.items() if name not in SEED_ALONE}
        known = groups.setdefault(front.method, [])
        seeds = [runs[p].settings.get("seed") for found, members in known for p in members if found == settings]
        group = next((members for found, members in known if found == settings), None)
        if group is None or runs[place].settings.get("seed") in seeds:
            known.append((settings, [place]))
        else:
            group.append(place)
    fronts, bases = [], []
    for front, place in entries:
        groups_of_method = [members for _, members in groups[front.method]]
        group = next(members for members in groups_of_method if place in members)
        # One group of seeds may keep the method's own name; two of one name would be averaged.
        own = len(groups_of_method) == 1 or (len(group) > 1 and sum(len(each) > 1 for each in groups_of_method) == 1)
        name = front.method if own else f"{front.method} ({', '.join(names[each] for each in group)})"
        fronts.append(dataclasses.replace(front, method=name))
        base = next((f for f in runs[place].fronts if f.method == BASE_METHOD), None)
        bases.append(None if base is None else dataclasses.asdict(base.points[0]))
    return fronts, bases


def _same_base(one: Front, other: Front) -> bool:
    """Say whether two bases are one: the same figures on the same data from the same reference point."""

    def figures(front: Front) -> Any:
        data = front.data.get("fingerprint") if isinstance(front.data, dict) else front.data
        return [(point.main, point.auxiliary) for point in front.points], front.reference_point, data

    return figures(one) == figures(other)


def _data(run: Run) -> str:
    data = run.fronts[0].data
    return str(data.get("name") if isinstance(data, dict) else data)


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
