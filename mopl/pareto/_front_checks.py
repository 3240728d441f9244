"""What `front.json` may hold: the types, lengths and ranges of the fields of a `Front`."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from mopl.conditioning.sampling import check_weights

if TYPE_CHECKING:
    from mopl.pareto.front import Front, Point

_LARGEST = sys.float_info.max


def fields_of(content: Any, front: type[Front], point: type[Point], missing: bool) -> dict[str, Any]:
    """Return what `Front.from_dict` makes a front of; see there."""
    values = _known_keys(content, front, "", missing)
    if not isinstance(values["points"], list):
        raise ValueError("points must be a list of objects")
    points = enumerate(values["points"])
    values["points"] = [point(**_known_keys(each, point, f"points[{i}].", missing)) for i, each in points]
    return values


def _known_keys(content: Any, cls: type[Front] | type[Point], where: str, missing: bool) -> dict[str, Any]:
    """Return a JSON object whose keys are the fields of a dataclass, the required ones all there."""
    if not isinstance(content, dict):
        raise ValueError(f"{where.rstrip('.') or 'front.json'} must be an object, got {type(content).__name__}")
    names = [f.name for f in fields(cls)]
    for f in fields(cls):
        if f.name not in content and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}{f.name} is missing")
    for name in content:
        if name not in names:
            raise ValueError(f"{where}{name} is not a key of front.json; known are {', '.join(names)}")
    return {name: _or_missing(name, value) for name, value in content.items()} if missing else dict(content)


def _or_missing(name: str, value: Any) -> Any:
    """Return a field with NaN for figures that are None, and without intervals that lack an end."""

    def whole(ends: Any) -> bool:
        return not isinstance(ends, list) or None not in ends

    if name in ("hypervolume", "seconds", "main") and value is None:
        return math.nan
    if name == "auxiliary" and isinstance(value, list):
        return [math.nan if figure is None else figure for figure in value]
    if name != "interval" or not isinstance(value, dict):
        return value
    several = value.get("auxiliary")
    kept = {key: ends for key, ends in value.items() if whole(ends)}
    if isinstance(several, list):
        kept["auxiliary"] = [ends if whole(ends) else None for ends in several]
    return kept


def check_front(front: Front, missing: bool) -> None:
    """See `Front.check`."""
    for name in ("method", "main"):
        _require(isinstance(getattr(front, name), str), name, getattr(front, name), "a string")
    names = front.objectives
    texts = isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names)
    _require(texts, "objectives", names, "a list of at least one string")
    m = len(names)
    _require(isinstance(front.points, list) and len(front.points) > 0, "points", front.points, "at least one point")
    for i, point in enumerate(front.points):
        _check_point(point, m, f"points[{i}].", missing)
    for name in ("hypervolume", "seconds"):
        value = getattr(front, name)
        _require(_is_number(value, missing) and not value < 0, name, value, "a number >= 0")
    _check_vector(front.reference_point, m, "reference_point")
    for name in ("parameters", "seed", "inference_parameters"):
        value = getattr(front, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        good = (whole and 0 <= value < 2**64) or (value is None and name == "inference_parameters")
        _require(good, name, value, "an integer >= 0 and below 2^64")
    _require(isinstance(front.data, (str, dict)), "data", front.data, "a string or an object")
    flags = front.maximise if isinstance(front.maximise, list) else [front.maximise]
    good = all(isinstance(flag, bool) for flag in flags) and len(flags) in ((m,) if flags is front.maximise else (1,))
    _require(good, "maximise", front.maximise, f"true, false or a list of {m} of them")
    _require(isinstance(front.interval, dict), "interval", front.interval, "an object")
    for name, bounds in front.interval.items():
        _check_interval(bounds, f"interval.{name}")
    _require(front.regret is None or _is_number(front.regret), "regret", front.regret, "a number")
    _require(isinstance(front.steerability, dict), "steerability", front.steerability, "an object")
    _require(
        front.steps == {} or _are_steps(front.steps), "steps", front.steps, "limit, and done and kept of each model"
    )
    texts = isinstance(front.notes, list) and all(isinstance(note, str) for note in front.notes)
    _require(texts, "notes", front.notes, "a list of strings")
    _require(isinstance(front.measures, dict), "measures", front.measures, "an object")
    for name, each in front.measures.items():
        good = isinstance(each, dict) and each.keys() == {"value", "base"} and all(map(_is_number, each.values()))
        _require(good, f"measures[{name!r}]", each, "value and base, two finite numbers")
    for name in ("data", "steerability", "steps"):
        try:
            json.dumps(getattr(front, name), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} cannot be written as JSON: {error}") from error


def _are_steps(steps: Any) -> bool:
    """Return whether this is `Front.steps`: a limit, and as many steps done as kept, none of them beyond it."""
    if not isinstance(steps, dict) or steps.keys() != {"limit", "done", "kept"}:
        return False
    limit, done, kept = steps["limit"], steps["done"], steps["kept"]
    numbers = isinstance(done, list) and isinstance(kept, list) and len(done) == len(kept) > 0
    if not numbers or not all(type(x) is int for x in (limit, *done, *kept)):
        return False
    return all(0 <= k <= d <= limit for k, d in zip(kept, done, strict=True))


def _check_point(point: Point, m: int, where: str, missing: bool) -> None:
    """Raise unless a point has m weights (or none) on the simplex, its figures and ordered intervals."""
    if not (isinstance(point.weights, (list, tuple)) and len(point.weights) == 0):
        _check_vector(point.weights, m, f"{where}weights")
        check_weights(point.weights, m, name=f"{where}weights")
    _require(_is_number(point.main, missing), f"{where}main", point.main, "a finite number")
    _check_vector(point.auxiliary, m, f"{where}auxiliary", missing)
    _require(_is_number(point.scale) and point.scale > 0, f"{where}scale", point.scale, "a number > 0")
    _require(isinstance(point.interval, dict), f"{where}interval", point.interval, "an object")
    for name, bounds in point.interval.items():
        if name == "main":
            _check_interval(bounds, f"{where}interval.main")
        elif name == "auxiliary":
            several = isinstance(bounds, (list, tuple)) and len(bounds) == m
            _require(several, f"{where}interval.auxiliary", bounds, f"a list of {m} intervals")
            for j, each in enumerate(bounds):
                if each is not None:
                    _check_interval(each, f"{where}interval.auxiliary[{j}]")
        else:
            raise ValueError(f"{where}interval.{name} is not a key of front.json; known are main, auxiliary")


def _check_vector(value: Any, length: int, where: str, missing: bool = False) -> None:
    """Raise unless `value` is a list of `length` numbers."""
    good = isinstance(value, (list, tuple)) and len(value) == length
    _require(good, where, value, f"a list of {length} numbers, one an objective")
    for j, entry in enumerate(value):
        _require(_is_number(entry, missing), f"{where}[{j}]", entry, "a finite number")


def _check_interval(value: Any, where: str) -> None:
    """Raise unless `value` is [low, high] with low <= high."""
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))
    _require(good and value[0] <= value[1], where, value, "[low, high] with low <= high")


def _is_number(value: Any, missing: bool = False) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    # A whole number may be larger than any float.
    return -_LARGEST <= value <= _LARGEST or (missing and value != value)


def _require(good: bool, where: str, value: Any, wanted: str) -> None:
    if not good:
        raise ValueError(f"{where} is {value!r} but must be {wanted}")
