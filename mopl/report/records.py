"""What every view of a front shares: reading a front, naming the metric, summarising seeds.

A front arrives as a `mopl.pareto.Front` or as the mapping that `front.json` holds; views see only `Record`s, in
which every optional part is either there or None.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mopl._files import make_parents, write_file
from mopl._terminal import json_escaped, printable
from mopl.pareto import Front

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


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluated trade-off of one method; NaN is a figure that does not exist."""

    weights: tuple[float, ...]
    main: float
    auxiliary: tuple[float, ...]
    main_interval: tuple[float, float] | None = None
    auxiliary_intervals: tuple[tuple[float, float] | None, ...] = ()
    scale: float = 1.0

    @property
    def figures(self) -> tuple[float, ...]:
        """The main figure and the auxiliary ones."""
        return (self.main, *self.auxiliary)


@dataclasses.dataclass(frozen=True)
class Record:
    """One front, checked: the points of one method and one seed."""

    method: str
    objectives: tuple[str, ...]
    main: str
    points: tuple[Point, ...]
    hypervolume: float
    hypervolume_interval: tuple[float, float] | None
    reference_point: tuple[float, ...] | None
    seconds: float
    parameters: float
    seed: object
    data: object
    regret: float
    maximise: tuple[bool, ...]
    raw: dict[str, Any]

    def at_training_scale(self) -> tuple[Point, ...]:
        """Return the points of the model as trained; all of them where none has scale 1."""
        return tuple(p for p in self.points if p.scale == 1.0) or self.points


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


def interval(value: object, where: str) -> tuple[float, float] | None:
    """Return (low, high), or None where either end is missing."""
    if value is None:
        return None
    try:
        low, high = (number(end) for end in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {value!r} but must be two numbers, low and high, or None") from None
    return None if math.isnan(low) or math.isnan(high) else (low, high)


def read_point(point: Mapping[str, Any], objectives: Sequence[str], where: str) -> Point:
    """Return a point of `front.json` as a `Point`.

    Raises:
        ValueError: If the weights or the auxiliary figures are not one for each objective.
    """
    m = len(objectives)
    auxiliary = tuple(number(x) for x in point["auxiliary"])
    weights = tuple(number(x) for x in point.get("weights") or ())
    for name, values in (("auxiliary", auxiliary), ("weights", weights or auxiliary)):
        if len(values) != m:
            raise ValueError(f"{name} of {where} has {len(values)} entries but there are {m} objectives; pass {m}")
    given = point.get("interval") or {}
    ends = given.get("auxiliary") or [None] * m
    if len(ends) != m:
        raise ValueError(f"interval['auxiliary'] of {where} has {len(ends)} entries but there are {m} objectives")
    scale = point.get("scale")
    return Point(
        weights=weights,
        main=number(point.get("main")),
        auxiliary=auxiliary,
        main_interval=interval(given.get("main"), f"interval['main'] of {where}"),
        auxiliary_intervals=tuple(interval(end, f"interval['auxiliary'] of {where}") for end in ends),
        scale=1.0 if scale is None else float(scale),
    )


def read(front: object) -> Record:
    """Return a `Front` or a mapping with the fields of `front.json` as a checked `Record`.

    Raises:
        TypeError: If `front` is neither.
        ValueError: If a field is missing, there is no point, or a point has another number of objectives.
    """
    raw = json.loads(front.to_json()) if isinstance(front, Front) else jsonable(front)
    if not isinstance(raw, dict):
        raise TypeError(f"a front must be a mopl.pareto.Front or a mapping like front.json, got {type(front).__name__}")
    missing = [name for name in ("method", "objectives", "main", "points") if name not in raw]
    if missing:
        raise ValueError(f"a front lacks {', '.join(missing)}; pass a mopl.pareto.Front or the whole of front.json")
    objectives = tuple(str(name) for name in raw["objectives"])
    if not objectives or not raw["points"]:
        raise ValueError(f"front {raw['method']!r} needs at least one objective and one point")
    points = tuple(
        read_point(point, objectives, f"point {i} of front {raw['method']!r}") for i, point in enumerate(raw["points"])
    )
    m = len(objectives)
    maximise = raw.get("maximise", True)
    flags = tuple(bool(flag) for flag in maximise) if isinstance(maximise, list) else (bool(maximise),) * m
    if len(flags) != m:
        raise ValueError(f"maximise of front {raw['method']!r} has {len(flags)} entries; pass a bool or {m} of them")
    given = raw.get("interval") or {}
    reference = raw.get("reference_point")
    return Record(
        method=str(raw["method"]),
        objectives=objectives,
        main=str(raw["main"]),
        points=points,
        hypervolume=number(raw.get("hypervolume")),
        hypervolume_interval=interval(given.get("hypervolume"), f"interval['hypervolume'] of {raw['method']!r}"),
        reference_point=None if reference is None else tuple(number(x) for x in reference),
        seconds=number(raw.get("seconds")),
        parameters=number(raw.get("parameters")),
        seed=raw.get("seed"),
        data=raw.get("data"),
        regret=number(raw.get("regret")),
        maximise=flags,
        raw=raw,
    )


def read_all(fronts: object) -> list[Record]:
    """Return one front or a sequence of fronts as records that share their objectives.

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
    return records


def data_name(record: Record) -> str:
    """Return what the front was measured on: a name, the "name" of a description, or "Front" where nothing says."""
    data = record.data.get("name") if isinstance(record.data, dict) else record.data
    return str(data) if data else "Front"


def data_names(records: Sequence[Record]) -> str:
    """Return what fronts were measured on, each name once."""
    return ", ".join(dict.fromkeys(data_name(record) for record in records))


def is_base(record: Record) -> bool:
    """Say whether a front is that of a base model: "base", or "base (RUN)" where several runs have other ones."""
    return record.method == BASE_METHOD or record.method.startswith(f"{BASE_METHOD} (")


def base_points(records: Sequence[Record], base: object) -> list[Point | None]:
    """Return for each front its base model as a point, or None where it is not known.

    Args:
        records: The fronts.
        base: A point for all, or a sequence with a point or None for each. None takes the only points of the fronts
            whose method is "base": the one that there is, or that of the same seed.

    Raises:
        ValueError: If a sequence has not one entry for each front.
    """
    names = records[0].objectives
    if isinstance(base, Sequence) and not isinstance(base, str):
        if len(base) != len(records):
            raise ValueError(f"base has {len(base)} entries but there are {len(records)} fronts; pass one for each")
        return [None if each is None else read_point(jsonable(each), names, "base") for each in base]
    if base is not None:
        return [read_point(jsonable(base), names, "base")] * len(records)
    own = [r for r in records if is_base(r) and len(r.points) == 1]
    found: list[Point | None] = []
    for record in records:
        fitting = {r.points[0].figures: r.points[0] for r in own if r.seed == record.seed or len(own) == 1}
        found.append(next(iter(fitting.values())) if len(fitting) == 1 else None)
    return found


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each method, its seeds, in order of first appearance."""
    groups: dict[str, list[Record]] = {}
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
