"""A front as a table of Markdown, for model cards."""

from __future__ import annotations

from mopl._markdown import escaped, table
from mopl.pareto import Front
from mopl.report.page import format_number
from mopl.report.records import Metric, base_points, read_all
from mopl.report.table import MISSING


def front_as_markdown(front: object, metric: Metric | None = None, base: object = None) -> str:
    """Return a row for each trade-off of a front: its weights, the main figure and those of the objectives.

    Args:
        front: A `mopl.pareto.Front`, or a mapping like front.json.
        metric: What the figures are; default as of `summarise`.
        base: The front of the model before training, or its only point; its row comes first.

    Returns:
        The table, without its caption. Points moved towards the base after training (of another scale than 1) are left
        out: they are no trade-off of the model alone.

    Raises:
        ValueError: If a front is damaged, or its points do not fit.
    """
    (record,), metric = read_all(front), metric or Metric()
    arrows = [" ↑" if up else " ↓" for up in (metric.higher_is_better, *record.rising)]
    names = [f"{record.main} {metric.of_main}".strip(), *record.objectives]
    headers = [
        escaped(f"weights ({', '.join(record.objectives)})"),
        *(escaped(f"{name}{arrow}") for name, arrow in zip(names, arrows, strict=True)),
    ]
    rows = [
        [", ".join(f"{w:.3g}" for w in point.weights) or MISSING, *(format_number(x) for x in point.figures)]
        for point in record.trained_points
    ]
    if isinstance(base, Front):
        base = base.points[0]
    if (first := base_points([record], base)[0]) is not None:
        rows.insert(0, ["before training", *(format_number(x) for x in first.figures)])
    return table(headers, rows, numbers=True)
