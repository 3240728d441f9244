"""The points of fronts as the columns of one table, for pandas and CSV."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mopl._files import make_parents, write_file
from mopl._terminal import printable

if TYPE_CHECKING:
    from mopl.pareto.front import Front


def columns_of(fronts: Sequence[Front]) -> dict[str, list[Any]]:
    """Return the columns of `Front.to_frame` of fronts that share their objectives, a row for each point.

    Raises:
        ValueError: If there is no front, or two have other objectives or another order of them.
    """
    if not fronts:
        raise ValueError("fronts is empty; pass at least one front")
    names = fronts[0].objectives
    for front in fronts:
        if front.objectives != names:
            raise ValueError(
                f"front {front.method!r} has objectives {front.objectives} but front {fronts[0].method!r} has {names}, "
                "and a column can hold one objective alone; write them into files of their own"
            )
    rows = []
    for front in fronts:
        for point in front.points:
            row: list[Any] = [front.method, front.seed, point.scale, *(point.weights or [math.nan] * len(names))]
            for figure, ends in zip(point.figures, point.intervals, strict=True):
                row += [figure, *(ends or (math.nan, math.nan))]
            rows.append(row)
    headers: list[str] = []
    figures = [f"{name}{end}" for name in ("main", *names) for end in ("", "_low", "_high")]
    for name in ["method", "seed", "scale", *(f"w_{name}" for name in names), *figures]:
        while name in headers:
            name += "_"
        headers.append(name)
    return dict(zip(headers, map(list, zip(*rows, strict=True)), strict=True))


def csv_text(fronts: Sequence[Front]) -> str:
    """Return the points of fronts that share their objectives as CSV; control characters in names are escaped.

    Args:
        fronts: At least one front; all have the objectives of the first, in its order.

    Returns:
        A line of headers and a line for each point, with the columns of `Front.to_frame`. An empty field is what a
        point lacks.

    Raises:
        ValueError: If there is no front, or two have other objectives or another order of them.
    """
    columns = columns_of(fronts)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(printable(name, keep="") for name in columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(
            printable(cell, keep="") if isinstance(cell, str) else "" if cell != cell else cell for cell in row
        )
    return text.getvalue()


def write_csv(fronts: Sequence[Front], path: str | os.PathLike[str]) -> None:
    """Write the points of fronts that share their objectives as CSV, whole or not at all; see `csv_text`.

    Args:
        fronts: At least one front; all have the objectives of the first, in its order.
        path: The file; an existing one is replaced, and folders that are missing are made.

    Raises:
        OSError: If the file cannot be written.
        ValueError: As `csv_text`.
    """
    make_parents(path)
    write_file(path, csv_text(fronts))
