"""Our figures under those of the paper, with what differs, as Markdown and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.paper.plan import Plan
from mopl import _markdown
from mopl.experiments.run import FinishedRun
from mopl.pareto import Front, Point
from mopl.report import Metric
from mopl.report.records import mean_and_std

FIGURES = Path(__file__).with_name("figures.json")
NOT_KNOWN = "–"


@dataclasses.dataclass
class Table:
    """One table: rows of the paper, rows of ours, and what tells them apart."""

    title: str
    group: str
    header: tuple[str, ...]
    paper: list[tuple[str, ...]]
    ours: list[tuple[str, ...]]
    source: str  # of the paper's rows
    said: list[str]  # of the paper, in words
    differs: list[str]
    sample: bool  # whether the data is a part of the paper's
    figures: dict[str, Any]  # ours, for the JSON file
    metric: Metric
    fronts: list[Front] = dataclasses.field(default_factory=list)  # one for each row, for the picture
    drift: dict[str, list[dict[str, float]]] = dataclasses.field(default_factory=dict)  # by row: α, reward, KL

    def markdown(self) -> str:
        """Return the tables and what differs."""
        lines = [f"## {self.title}", ""]
        if self.paper:
            lines += [f"The paper's figures ({self.source}):", "", _markdown.table(self.header, self.paper), ""]
        else:
            lines += [f"The paper's figures: none is at hand ({self.source}), so no row of it stands here.", ""]
        lines += [*self.said, ""] if self.said else []
        word = "Figures of a sample, not of the paper's data" if self.sample else "This run"
        lines += [f"{word}:", "", _markdown.table(self.header, self.ours), "", "What differs from the paper:", ""]
        return "\n".join([*lines, *(f"* {line}" for line in self.differs), ""])


def paper_of(experiment: str, group: str) -> dict[str, Any]:
    """Return what `figures.json` has of an experiment: source, rows by method, and what else is said."""
    return json.loads(FIGURES.read_text(encoding="utf-8"))[experiment][group]


def collected(plan: Plan, group: str, runs: Mapping[str, FinishedRun]) -> dict[str, list[Front]]:
    """Return the fronts of a group by row; several of one row are its repetitions. That of the base comes last."""
    found: dict[str, list[Front]] = {}
    for job in plan.jobs:
        if job.group == group:
            for row, front in job.rows_of(runs[job.name]).items():
                found.setdefault(row, []).append(front)
    base = found.pop("base")
    same = {json.dumps([point.figures for point in front.points]) for front in base}
    if len(same) == 1:
        base = base[:1]
    return {**found, "base": base}


def averaged(row: str, fronts: Sequence[Front]) -> Front:
    """Return the mean of fronts on one grid; where there are several, with intervals of one standard deviation.

    Raises:
        ValueError: If they are not on one grid.
    """
    if len({json.dumps([point.weights for point in front.trained_points]) for front in fronts}) > 1:
        raise ValueError(f"the fronts of {row} are at different weights, so they have no mean")
    first = dataclasses.replace(fronts[0], method=row)
    if len(fronts) == 1:
        return first
    points = []
    for same in zip(*(front.trained_points for front in fronts), strict=True):
        figures = [mean_and_std(column) for column in zip(*(point.figures for point in same), strict=True)]
        ends = [[mean - spread, mean + spread] for mean, spread in figures]
        (main, *auxiliary) = (mean for mean, _ in figures)
        points.append(Point(same[0].weights, main, auxiliary, {"main": ends[0], "auxiliary": ends[1:]}))
    volume = mean_and_std(front.hypervolume for front in fronts)[0]
    return dataclasses.replace(first, points=points, hypervolume=volume, interval={})


def front_table(
    title: str,
    group: str,
    plan: Plan,
    runs: Mapping[str, FinishedRun],
    paper: Mapping[str, Any],
    differs: Sequence[str],
    sample: bool,
) -> Table:
    """Return the table of methods: hypervolume, main figure, seconds and parameters; the paper's methods first."""
    found = collected(plan, group, runs)
    run = next(runs[job.name] for job in plan.jobs if job.group == group)
    order = [row for row in paper["rows"] if row in found]
    order += [row for row in found if row not in order]
    header = (
        "Method", "Hypervolume ↑",
        f"{found['base'][0].main} {run.metric.of_main} {'↑' if run.metric.higher_is_better else '↓'}", "Seconds",
        "Parameters trained",
    )  # fmt: skip
    figures = {row: _figures(found[row]) for row in order}
    reference = ", ".join(f"{x:g}" for x in found["base"][0].reference_point)
    more = [
        f"hypervolume: from reference point ({reference}); ± of the main figure: standard deviation over the "
        f"trade-offs; seconds: of training, on this machine; {run.metric.describe()}"
    ]
    if len({json.dumps(front.reference_point) for fronts in found.values() for front in fronts}) > 1:
        more.append("reference points of the runs differ, so hypervolumes cannot be compared")
    return Table(
        title, group, header, [_row(row, entry) for row, entry in paper["rows"].items()],
        [_row(row, entry) for row, entry in figures.items()], paper["source"], list(paper["said"]),
        [*differs, *settings_given(plan), *more], sample, figures, run.metric,
        fronts=[averaged(row, fronts) for row, fronts in found.items()],
    )  # fmt: skip


def settings_given(plan: Plan) -> list[str]:
    """Return in a line which settings the command line has changed; those that a finished run need not have aside."""
    free = plan.jobs[0].door.free
    given = {name: value for name, value in plan.options.get("settings", {}).items() if name not in free}
    said = ", ".join(f"{name} {value}" for name, value in given.items())
    small = ["`--small`: few steps on few rows, to try the command; nothing here is a result"]
    return [*(small if plan.options.get("small") else ()), *([f"settings that were given: {said}"] if given else ())]


def _figures(fronts: Sequence[Front]) -> dict[str, Any]:
    volume, spread = mean_and_std(front.hypervolume for front in fronts)
    grids = [mean_and_std(point.main for point in front.trained_points) for front in fronts]
    found: dict[str, Any] = {
        "hypervolume": volume, "main": mean_and_std(mean for mean, _ in grids)[0],
        "seconds": mean_and_std(front.seconds for front in fronts)[0], "parameters": fronts[0].parameters,
        "repetitions": len(fronts),
        "points": [[dataclasses.asdict(point) for point in front.trained_points] for front in fronts],
    }  # fmt: skip
    if len(fronts) > 1:
        found["hypervolume_spread"] = spread
    if len(fronts[0].trained_points) > 1:
        found["main_spread"] = mean_and_std(deviation for _, deviation in grids)[0]
    return found


def _row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    def number(key: str, form: str) -> str:
        value = entry.get(key)
        if value is None or math.isnan(value):
            return NOT_KNOWN
        spread = entry.get(f"{key}_spread")
        return format(value, form) + ("" if spread is None else f" ± {format(spread, form)}")

    base = name == "base"  # nothing was trained
    return (
        name, number("hypervolume", ".4g"), number("main", ".3f"), NOT_KNOWN if base else number("seconds", ",.0f"),
        NOT_KNOWN if base else number("parameters", ",.0f"),
    )  # fmt: skip


def _or_dash(value: float) -> str:
    return NOT_KNOWN if math.isnan(value) else f"{value:g}"


def kl_table(
    title: str,
    group: str,
    plan: Plan,
    runs: Mapping[str, FinishedRun],
    paper: Mapping[str, Any],
    differs: Sequence[str],
    sample: bool,
) -> Table:
    """Return the table of one reward: its mean and the KL to the reference, for each method and KL weight."""
    drift: dict[str, list[dict[str, float]]] = {}
    metric, name = Metric(), ""
    for job in plan.jobs:
        if job.group != group:
            continue
        run = runs[job.name]
        metric, name = run.metric, run.objectives[0]
        for method, row in {**job.rows, "base": "base"}.items():
            front = next(front for front in run.fronts() if front.method == method)
            weights = [math.nan] if method == "base" else run.config.kl_weights(method)
            weights = run.config.kl_weight if method == "dera" else weights
            drift[row] = [
                {"kl_weight": weight, "reward": point.auxiliary[0], "kl": point.main}
                for weight, point in zip(weights, front.points, strict=True)
            ]
    drift["base"] = drift.pop("base")
    header = ("Method", "KL weight", f"{name}, mean ↑", f"{next(iter(runs.values())).fronts()[0].main} ↓")
    rows = [
        (row, _or_dash(p["kl_weight"]), f"{p['reward']:.4f}", f"{p['kl']:.3f}")
        for row, points in drift.items()
        for p in points
    ]
    figures = {
        row: [{key: None if math.isnan(value) else value for key, value in point.items()} for point in points]
        for row, points in drift.items()
    }
    return Table(
        title, group, header, [], rows, paper["source"], list(paper["said"]), [*differs, *settings_given(plan)],
        sample, figures, metric, drift=drift,
    )  # fmt: skip
