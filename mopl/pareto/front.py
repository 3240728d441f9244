"""`front.json`: one method's front as a file that a report, a comparison or another program can read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl._files import write_file
from mopl._records import damaged, parse_json, read_text
from mopl.conditioning.sampling import check_weights
from mopl.pareto.indicators import Maximise, Points, as_points, hypervolume
from mopl.pareto.steerability import steerability

_LARGEST = sys.float_info.max


@dataclass
class Point:
    """One evaluated trade-off.

    Attributes:
        weights: w, (m,) on the simplex; empty for a model that is not asked for a trade-off, such as the base model.
        main: The figure of the main objective.
        auxiliary: The figures of the m auxiliary objectives.
        interval: `{"main": [low, high], "auxiliary": [[low, high], ...]}`, either part or none; an auxiliary entry
            may be None.
        scale: c of `mopl.steering.rescale` at which the point was evaluated; 1 is the model as trained.
    """

    weights: list[float]
    main: float
    auxiliary: list[float]
    interval: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0


@dataclass
class Front:
    """The front of one method and one seed.

    Attributes:
        method: Name of the method.
        objectives: Names of the m auxiliary objectives.
        main: Name of the main objective.
        points: The evaluated trade-offs.
        hypervolume: Hypervolume of the auxiliary figures of the points of scale 1.
        reference_point: (m,), the reference point of that hypervolume.
        seconds: Wall-clock seconds of training, validation included.
        parameters: Number of parameters, of all models that the front needs.
        seed: Seed of the run.
        data: What it was trained on: a name or a description.
        maximise: Whether larger figures are better, a bool or one for each auxiliary objective.
        interval: `{"hypervolume": [low, high]}` and the like.
        regret: Steering regret, None if the points carry no weights.
        steerability: The other figures of `mopl.pareto.steerability`.
        steps: Of each of its models the steps that were `done`, of at most `limit`, and the one that was `kept`.
        notes: What a reader of the figures must know, in words.
    """

    method: str
    objectives: list[str]
    main: str
    points: list[Point]
    hypervolume: float
    reference_point: list[float]
    seconds: float
    parameters: int
    seed: int
    data: str | dict[str, Any]
    maximise: bool | list[bool] = True
    interval: dict[str, list[float]] = field(default_factory=dict)
    regret: float | None = None
    steerability: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def measure(
        cls,
        method: str,
        *,
        objectives: Sequence[str],
        main: str,
        weights: Points | None,  # (n, m)
        main_values: Sequence[float] | Tensor,  # (n,)
        auxiliary_values: Points,  # (n, m)
        reference_point: Sequence[float] | Tensor,  # (m,)
        seconds: float,
        parameters: int,
        seed: int,
        data: str | dict[str, Any],
        maximise: Maximise = True,
        intervals: Sequence[Mapping[str, Any]] | None = None,
        interval: Mapping[str, Sequence[float]] | None = None,
        reference_front: Points | None = None,
        steps: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> Front:
        """Make a front from evaluated points; hypervolume and steerability are computed here.

        Args:
            method: Name of the method.
            objectives: Names of the m auxiliary objectives.
            main: Name of the main objective.
            weights: (n, m), each on the simplex; None for a model that is not asked for a trade-off.
            main_values: (n,), figures of the main objective.
            auxiliary_values: (n, m), figures of the auxiliary objectives.
            reference_point: (m,), fixed before the methods are compared.
            seconds: Wall-clock seconds of training, validation included.
            parameters: Number of parameters, of all models that the front needs.
            seed: Seed of the run.
            data: What it was trained on.
            maximise: Whether larger figures are better, a bool or one for each auxiliary objective.
            intervals: For each point what `Point.interval` holds.
            interval: What `Front.interval` holds.
            reference_front: (r, m), the true front, for its distance in `steerability`.
            steps: What `Front.steps` holds.
            notes: What `Front.notes` holds.

        Returns:
            The checked front.

        Raises:
            ImportError: If moocore is not installed.
            ValueError: If shapes disagree or a figure is NaN or infinite.
        """
        auxiliary = as_points(auxiliary_values, "auxiliary_values").tolist()
        figures: dict[str, Any] = {}
        if weights is None:
            volume = hypervolume(auxiliary, reference_point, maximise=maximise)
        else:
            figures = steerability(
                weights,
                auxiliary,
                maximise=maximise,
                reference_point=reference_point,
                reference_front=reference_front,
            )
            volume = figures.pop("hypervolume")
        asked = [[] for _ in auxiliary] if weights is None else as_points(weights, "weights").tolist()
        mains = _numbers(main_values)
        bounds = [{} for _ in auxiliary] if intervals is None else [dict(each) for each in intervals]
        if not len(mains) == len(bounds) == len(auxiliary):
            raise ValueError(
                f"there are {len(auxiliary)} auxiliary_values, {len(mains)} main_values and {len(bounds)} intervals; "
                "pass one of each a point"
            )
        front = cls(
            method=method,
            objectives=list(objectives),
            main=main,
            points=[Point(*row) for row in zip(asked, mains, auxiliary, bounds, strict=True)],
            hypervolume=volume,
            reference_point=_numbers(reference_point),
            seconds=float(seconds),
            parameters=int(parameters),
            seed=int(seed),
            data=data,
            maximise=maximise if isinstance(maximise, bool) else [bool(flag) for flag in maximise],
            interval={name: _numbers(ends) for name, ends in (interval or {}).items()},
            regret=figures.pop("steering_regret", None),
            steerability=figures,
            steps=dict(steps or {}),
            notes=list(notes),
        )
        front.check()
        return front

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights (n, m), main (n,) and auxiliary (n, m) of the points, float64."""
        columns = ([p.weights for p in self.points], [p.main for p in self.points], [p.auxiliary for p in self.points])
        weights, main, auxiliary = (torch.tensor(column, dtype=torch.float64) for column in columns)
        return weights, main, auxiliary

    def check(self) -> None:
        """Raise unless every field has its type and length and every number is finite.

        Raises:
            ValueError: With the key that is wrong, such as `points[3].auxiliary[1]`.
        """
        _check_front(self)

    def to_json(self) -> str:
        """Return the front as JSON: the keys of `front.json`, and the optional ones where they are set.

        Raises:
            ValueError: As `check`.
        """
        self.check()
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content["points"] = [{f.name: getattr(p, f.name) for f in fields(p)} for p in self.points]
        for point in content["points"]:
            if point["scale"] == 1.0:
                del point["scale"]
        optional = {"maximise": True, "interval": {}, "regret": None, "steerability": {}, "steps": {}, "notes": []}
        for name, default in optional.items():
            if content[name] == default:
                del content[name]
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Front:
        """Read a front from JSON.

        Raises:
            ValueError: If it is not JSON, or a key is missing, unknown or wrong; the message names it.
        """
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ValueError(f"front.json cannot be read: {error}") from error
        values = _known_keys(content, cls, "")
        if not isinstance(values["points"], list):
            raise ValueError("points must be a list of objects")
        values["points"] = [Point(**_known_keys(p, Point, f"points[{i}].")) for i, p in enumerate(values["points"])]
        front = cls(**values)
        front.check()
        return front

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the front to a file, whole or not at all: a reader never sees half of it.

        Raises:
            ValueError: As `check`; the file that was there is kept.
        """
        write_file(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Front:
        """Read a front from a file.

        Raises:
            OSError: If the file cannot be read.
            ValueError: As `from_json`; the message begins with the path.
        """
        text = read_text(path)
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise damaged(path, str(error)) from error


def load_fronts(files: Mapping[str, Path], objectives: Sequence[str], record: Path) -> list[Front]:
    """Read the fronts of one run.

    Args:
        files: Where they are, by method.
        objectives: Names of the run's m auxiliary objectives.
        record: The file that has them.

    Raises:
        OSError: If a file cannot be read.
        DamagedFile: As `Front.load`, or if the method or the objectives are others; the message names the files.
    """
    fronts = [Front.load(file) for file in files.values()]
    for (method, file), front in zip(files.items(), fronts, strict=True):
        if front.method != method:
            raise damaged(file, f"method is {front.method!r} but {record} has {method!r} there")
        if front.objectives != list(objectives):
            raise damaged(file, f"objectives is {front.objectives} but {record} has {list(objectives)}")
        if front.main != fronts[0].main:
            raise damaged(file, f"main is {front.main!r} but {next(iter(files.values()))} has {fronts[0].main!r}")
    return fronts


def _numbers(values: Sequence[float] | Tensor | np.ndarray) -> list[float]:
    """Return numbers or a tensor as a list of floats."""
    return [float(x) for x in values]


def _known_keys(content: Any, cls: type[Front] | type[Point], where: str) -> dict[str, Any]:
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
    return dict(content)


def _check_front(front: Front) -> None:
    """See `Front.check`."""
    for name in ("method", "main"):
        _require(isinstance(getattr(front, name), str), name, getattr(front, name), "a string")
    names = front.objectives
    texts = isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names)
    _require(texts, "objectives", names, "a list of at least one string")
    m = len(names)
    _require(isinstance(front.points, list) and len(front.points) > 0, "points", front.points, "at least one point")
    for i, point in enumerate(front.points):
        _check_point(point, m, f"points[{i}].")
    for name in ("hypervolume", "seconds"):
        _require(
            _is_number(getattr(front, name)) and getattr(front, name) >= 0, name, getattr(front, name), "a number >= 0"
        )
    _check_vector(front.reference_point, m, "reference_point")
    for name in ("parameters", "seed"):
        value = getattr(front, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(whole and 0 <= value < 2**64, name, value, "an integer >= 0 and below 2^64")
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


def _check_point(point: Point, m: int, where: str) -> None:
    """Raise unless a point has m weights (or none) on the simplex, finite figures and ordered intervals."""
    if not (isinstance(point.weights, (list, tuple)) and len(point.weights) == 0):
        _check_vector(point.weights, m, f"{where}weights")
        check_weights(point.weights, m, name=f"{where}weights")
    _require(_is_number(point.main), f"{where}main", point.main, "a finite number")
    _check_vector(point.auxiliary, m, f"{where}auxiliary")
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


def _check_vector(value: Any, length: int, where: str) -> None:
    """Raise unless `value` is a list of `length` finite numbers."""
    good = isinstance(value, (list, tuple)) and len(value) == length
    _require(good, where, value, f"a list of {length} numbers, one an objective")
    for j, entry in enumerate(value):
        _require(_is_number(entry), f"{where}[{j}]", entry, "a finite number")


def _check_interval(value: Any, where: str) -> None:
    """Raise unless `value` is [low, high] with low <= high."""
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))
    _require(good and value[0] <= value[1], where, value, "[low, high] with low <= high")


def _is_number(value: Any) -> bool:
    # A whole number may be larger than any float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def _require(good: bool, where: str, value: Any, wanted: str) -> None:
    if not good:
        raise ValueError(f"{where} is {value!r} but must be {wanted}")
