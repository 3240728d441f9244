"""What every view of fronts shares: reading them, naming the metric, grouping and summarising seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mopl._counted import counted, there_are
from mopl._files import make_parents, write_file
from mopl._terminal import json_escaped, printable
from mopl.pareto import Front, Point
from mopl.pareto import write_csv as write_points

BASE_METHOD = "base"


@dataclasses.dataclass(frozen=True)
class Metric:
    """What the figures of a report are, in the words that the table, the plot and the page print.

    Attributes:
        name: Name of the figure of one objective.
        convention: How it is computed, in a phrase: gain, discount, ties, empty lists.
        higher_is_better: False where the main figure is a loss; for auxiliary objectives the front says it.
        empty_share: Share of lists, in [0, 1], that an objective leaves out because they have no label: one number,
            or a mapping from the objective's name; None where unknown.
        main_name: Name of the figure of the main objective; None: the same.
    """

    name: str = "NDCG@10"
    convention: str = "linear gain, ties averaged, empty queries skipped"
    higher_is_better: bool = True
    empty_share: float | Mapping[str, float] | None = None
    main_name: str | None = None

    @property
    def of_main(self) -> str:
        """Name of the figure of the main objective."""
        return self.name if self.main_name is None else self.main_name

    def describe(self) -> str:
        """Return the convention and the share of empty lists as one line."""
        line = f"{self.name}: {self.convention}" if self.convention else self.name
        if self.empty_share is None:
            return line
        shares = self.empty_share if isinstance(self.empty_share, Mapping) else {"": self.empty_share}
        if not any(shares.values()):
            return f"{line}; no list is empty"
        each = ", ".join(f"{clean(str(name))} {share:.1%}".strip() for name, share in shares.items())
        return f"{line}; empty lists: {each}"


def clean(text: str) -> str:
    """Return text with control characters, which could steer a terminal or break a row, made visible."""
    return printable(text, keep="")


def number(value: object) -> float:
    """Return a number as a float, and NaN for None: JSON has no NaN."""
    return math.nan if value is None else float(value)  # type: ignore[arg-type]


def jsonable(value: Any) -> Any:
    """Return a copy of plain Python, NumPy or torch values that `json.dumps(..., allow_nan=False)` accepts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if callable(to_list := getattr(value, "tolist", None)):
        return jsonable(to_list())
    if isinstance(value, Iterable):
        return [jsonable(item) for item in value]
    return str(value)


def read(front: object) -> Front:
    """Return a front, or a mapping with the fields of `front.json`, as a checked `Front`.

    Figures may be NaN, or None in a mapping: such as do not exist.

    Raises:
        TypeError: If `front` is neither.
        ValueError: If a field is missing, unknown or wrong.
    """
    if isinstance(front, Front):
        front.check(missing=True)
        return front
    content = jsonable(front)
    if not isinstance(content, dict):
        raise TypeError(f"a front must be a mopl.pareto.Front or a mapping like front.json, got {type(front).__name__}")
    try:
        return Front.from_dict(content, missing=True)
    except ValueError as error:
        raise ValueError(f"front {content.get('method')!r} cannot be reported: {error}") from error


def read_all(fronts: object) -> list[Front]:
    """Return one front or a sequence of fronts, checked, which share their objectives.

    Raises:
        ValueError: If there is no front, or two fronts name other objectives.
    """
    if isinstance(fronts, Mapping) or not isinstance(fronts, Iterable):
        fronts = [fronts]
    records = [read(front) for front in fronts]
    if not records:
        raise ValueError("fronts is empty; pass at least one front")
    for record in records[1:]:
        if (record.objectives, record.main) != (records[0].objectives, records[0].main):
            raise ValueError(
                f"front {record.method!r} has objectives {record.objectives} and main {record.main!r} but front "
                f"{records[0].method!r} has {records[0].objectives} and {records[0].main!r}; report them separately"
            )
        if record.rising != records[0].rising:
            raise ValueError(
                f"front {record.method!r} has maximise {record.rising} but front {records[0].method!r} has "
                f"{records[0].rising}, so one counts as better what the other counts as worse; report them separately"
            )
    return records


def write_csv(fronts: object, path: str | os.PathLike[str]) -> Path:
    """Write the points of fronts as CSV, a row each, with the columns of `mopl.pareto.Front.to_frame`.

    Args:
        fronts: One `mopl.pareto.Front` (or mapping like front.json), or a sequence of them.
        path: The file; it appears whole or not at all. Missing folders are made.

    Returns:
        The path.

    Raises:
        ValueError: If the fronts do not belong together.
    """
    write_points(read_all(fronts), path)
    return Path(path)


def data_name(record: Front) -> str:
    """Return what the front was measured on: a name, the "name" of a description, or "Front" where nothing says."""
    data = record.data.get("name") if isinstance(record.data, dict) else record.data
    return str(data) if data else "Front"


def data_names(records: Sequence[Front]) -> str:
    """Return what fronts were measured on, each name once; a path in full would show where its file lies."""
    names = (data_name(record) for record in records)
    return ", ".join(dict.fromkeys("/".join(n.rsplit("/", 2)[-2:]) if n.startswith("/") else n for n in names))


def is_base(record: Front) -> bool:
    """Say whether a front is that of a base model: "base", or "base (RUN)" where several runs have other ones."""
    return record.method == BASE_METHOD or record.method.startswith(f"{BASE_METHOD} (")


def base_points(records: Sequence[Front], base: object) -> list[Point | None]:
    """Return for each front its base model as a point, or None where it is not known.

    `base` is a point for all, or a sequence with a point or None for each. None takes the only points of the fronts
    whose method is "base": the one that there is, or that of the same seed.

    Raises:
        ValueError: If a sequence has not one entry for each front.
    """
    like = records[0].to_dict()
    if isinstance(base, Sequence) and not isinstance(base, str):
        if len(base) != len(records):
            many = f"{counted(len(base), 'entry')} but {there_are(len(records), 'front')}"
            raise ValueError(f"base has {many}; pass one for each")
        return [None if each is None else _point(each, like) for each in base]
    if base is not None:
        return [_point(base, like)] * len(records)
    own = [r for r in records if is_base(r) and len(r.points) == 1]
    found: list[Point | None] = []
    for record in records:
        fitting = {r.points[0].figures: r.points[0] for r in own if r.seed == record.seed or len(own) == 1}
        found.append(next(iter(fitting.values())) if len(fitting) == 1 else None)
    return found


def _point(given: Any, like: dict[str, Any]) -> Point:
    """Return a point, given as one or as a mapping, that fits the objectives of a front."""
    try:
        return Front.from_dict({**like, "points": [{"weights": [], **jsonable(given)}]}, missing=True).points[0]
    except ValueError as error:
        raise ValueError(str(error).replace("points[0]", "base")) from error


def by_method(records: Sequence[Front]) -> dict[str, list[Front]]:
    """Return the fronts of each method, its seeds, in order of first appearance."""
    groups: dict[str, list[Front]] = {}
    for record in records:
        groups.setdefault(record.method, []).append(record)
    return groups


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Return mean and population standard deviation of the values that exist; (NaN, NaN) if none does."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    mean = math.fsum(known) / len(known)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))


def write(path: str | os.PathLike[str], content: bytes | Callable[[Path], None]) -> Path:
    """Write a file whole or not at all, make missing folders, return the path."""
    target = Path(path)
    make_parents(target)
    write_file(target, content)
    return target


def to_json(value: object) -> str:
    """Return compact JSON that may stand inside an HTML script element: no end tag, comment or entity can start."""
    text = json_escaped(json.dumps(jsonable(value), allow_nan=False, ensure_ascii=False, separators=(",", ":")))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
