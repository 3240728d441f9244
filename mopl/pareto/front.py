"""`front.json`: one method's front as a file that a report, a comparison or another program can read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mopl._counted import counted
from mopl._extras import require
from mopl._files import write_file
from mopl._records import damaged, parse_json, read_text
from mopl.pareto._front_checks import check_front, fields_of
from mopl.pareto._front_table import columns_of, write_csv
from mopl.pareto.bootstrap import hypervolume_interval, point_intervals
from mopl.pareto.indicators import Maximise, Points, as_points, hypervolume
from mopl.pareto.steerability import steerability

if TYPE_CHECKING:
    import pandas


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

    @property
    def figures(self) -> tuple[float, ...]:
        """The main figure and the auxiliary ones, (1 + m,)."""
        return (self.main, *self.auxiliary)

    @property
    def intervals(self) -> list[Sequence[float] | None]:
        """The interval [low, high] of each of `figures`, None where there is none."""
        return [self.interval.get("main"), *(self.interval.get("auxiliary") or [None] * len(self.auxiliary))]


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
        parameters: Number of parameters that were trained, of all models.
        seed: Seed of the run.
        data: What it was trained on: a name or a description.
        maximise: Whether larger figures are better, a bool or one for each auxiliary objective.
        interval: `{"hypervolume": [low, high]}` and the like.
        regret: Steering regret, None if the points carry no weights.
        steerability: The other figures of `mopl.pareto.steerability`.
        steps: Of each of its models the steps that were `done`, of at most `limit`, and the one that was `kept`.
        notes: What a reader of the figures must know, in words.
        inference_parameters: Number of parameters that must be kept to answer every trade-off of the front, those of
            the base model included. What several models share, such as a frozen base, counts once; a method with a
            model for each point of a grid needs all of these, a soup its experts, a mixture of logits the models that
            it mixes. None in files that do not say.
        measures: What the method was trained for, where that is none of the objectives, such as the divergence of a
            student to its teachers: by name its mean over the points (`value`) and the `base` model's. Lower is better.
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
    inference_parameters: int | None = None
    measures: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        main_values: Tensor,  # (L, n)
        auxiliary_values: Tensor,  # (L, n, m)
        /,
        method: str,
        *,
        weights: Points | None,  # (n, m)
        reference_point: Sequence[float] | Tensor,  # (m,)
        seed: int,
        maximise: Maximise = True,
        rescaled: Sequence[tuple[float, Tensor, Tensor]] = (),
        samples: int = 1000,
        level: float = 0.95,
        **said: Any,
    ) -> Front:
        """Make the front of a method from the figures of each list: means, bootstrap intervals, hypervolume.

        Args:
            main_values: (L, n), the main objective's figure of each list (or query, or prompt) at each trade-off; NaN
                where a list does not count.
            auxiliary_values: (L, n, m), those of the auxiliary objectives, NaN likewise.
            method: Name of the method.
            weights: (n, m), each on the simplex; None for a model that is not asked for a trade-off.
            reference_point: (m,), fixed before the methods are compared.
            seed: Seed of the run, and of the bootstrap.
            maximise: Whether larger figures are better, a bool or one for each auxiliary objective.
            rescaled: (c, main, auxiliary) with figures as above at other distances from the base model, see
                `Point.scale`; the hypervolume is without them.
            samples: Bootstrap resamples of the lists; 0 for no intervals. A single list has none.
            level: Probability of the intervals.
            said: What `measure` takes besides: objectives, main, seconds, parameters, data and the optional ones.

        Returns:
            The checked front.

        Raises:
            ImportError: If moocore is not installed.
            ValueError: If shapes disagree, or an objective counts in no list.
        """
        draws: dict[str, Any] = {"level": level, "samples": samples if len(main_values) > 1 else 0, "seed": seed}
        volume, notes = hypervolume_interval(auxiliary_values, reference_point, maximise=maximise, **draws)
        front = cls.measure(
            method, weights=weights, main_values=main_values.nanmean(0), auxiliary_values=auxiliary_values.nanmean(0),
            reference_point=reference_point, maximise=maximise, seed=seed, interval=volume,
            intervals=point_intervals(main_values, auxiliary_values, **draws),
            **{**said, "notes": [*said.get("notes", ()), *notes]},
        )  # fmt: skip
        asked = [list(point.weights) for point in front.points]
        for scale, main, auxiliary in rescaled:
            figures = main.nanmean(0).tolist(), auxiliary.nanmean(0).tolist()
            rows = zip(asked, *figures, point_intervals(main, auxiliary, **draws), strict=True)
            front.points += [Point(*row, scale) for row in rows]
        front.check()
        return front

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
        inference_parameters: int | None = None,
        measures: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Front:
        """Make a front from evaluated points; hypervolume and steerability are computed here.

        Args:
            method: Name of the method.
            objectives: As in `Front`.
            main: As in `Front`.
            weights: (n, m), each on the simplex; None for a model that is not asked for a trade-off.
            main_values: (n,), figures of the main objective.
            auxiliary_values: (n, m), figures of the auxiliary objectives.
            reference_point: (m,), fixed before the methods are compared.
            seconds: As in `Front`.
            parameters: As in `Front`.
            seed: As in `Front`.
            data: As in `Front`.
            maximise: As in `Front`.
            intervals: For each point what `Point.interval` holds.
            interval: As in `Front`.
            reference_front: (r, m), the true front, for its distance in `steerability`.
            steps: As in `Front`.
            notes: As in `Front`.
            inference_parameters: As in `Front`.
            measures: As in `Front`.

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
                weights, auxiliary, maximise=maximise, reference_point=reference_point, reference_front=reference_front
            )
            volume = figures.pop("hypervolume")
        asked = [[] for _ in auxiliary] if weights is None else as_points(weights, "weights").tolist()
        mains = _numbers(main_values)
        bounds = [{} for _ in auxiliary] if intervals is None else [dict(each) for each in intervals]
        if not len(mains) == len(bounds) == len(auxiliary):
            raise ValueError(
                f"there are {len(auxiliary)} auxiliary_values, {len(mains)} main_values and "
                f"{counted(len(bounds), 'interval')}; pass one of each a point"
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
            inference_parameters=inference_parameters,
            measures={name: dict(each) for name, each in (measures or {}).items()},
        )
        front.check()
        return front

    @property
    def rising(self) -> list[bool]:
        """(m,), whether larger figures of each auxiliary objective are better."""
        return self.maximise if isinstance(self.maximise, list) else [self.maximise] * len(self.objectives)

    @property
    def trained_points(self) -> list[Point]:
        """The points of the model as trained, at scale 1; all of them where none is."""
        return [point for point in self.points if point.scale == 1.0] or self.points

    def to_frame(self) -> pandas.DataFrame:
        """Return the points as a table of pandas, a row each.

        Columns: method, seed, scale; `w_NAME`, the weight of each auxiliary objective; main, main_low, main_high;
        `NAME`, `NAME_low`, `NAME_high` of each auxiliary objective. NaN is what a point lacks, and a name that is taken
        already gets an underscore at its end.

        Raises:
            ImportError: If pandas is not installed.
        """
        require("pandas", what="a table of a front")
        import pandas

        return pandas.DataFrame(columns_of([self]))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the columns of `to_frame` as CSV, with every digit; folders that are missing are made."""
        write_csv([self], path)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights (n, m), main (n,) and auxiliary (n, m) of the points, float64."""
        columns = ([p.weights for p in self.points], [p.main for p in self.points], [p.auxiliary for p in self.points])
        weights, main, auxiliary = (torch.tensor(column, dtype=torch.float64) for column in columns)
        return weights, main, auxiliary

    def check(self, *, missing: bool = False) -> None:
        """Raise unless every field has its type and length and every number is finite.

        Args:
            missing: Whether figures (hypervolume, seconds, those of points) may be NaN, for what does not exist.

        Raises:
            ValueError: With the key that is wrong, such as `points[3].auxiliary[1]`.
        """
        check_front(self, missing)

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of `front.json`, and the optional ones where they are set."""
        # `asdict` would copy what the caller gave as data, and fails on a `Counter` or a `defaultdict`.
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content["points"] = [{f.name: getattr(p, f.name) for f in fields(p)} for p in self.points]
        for point in content["points"]:
            if point["scale"] == 1.0:
                del point["scale"]
        for f in fields(self):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if content[f.name] == default:
                del content[f.name]
        return content

    def to_json(self) -> str:
        """Return the front as JSON.

        Raises:
            ValueError: As `check`.
        """
        self.check()
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, content: Any, *, missing: bool = False) -> Front:
        """Read a front from what `to_dict` returns.

        Args:
            content: Plain Python, as JSON has it.
            missing: As in `check`; None is NaN then, and an interval with such an end is none.

        Raises:
            ValueError: If a key is missing, unknown or wrong; the message names it.
        """
        front = cls(**fields_of(content, cls, Point, missing))
        front.check(missing=missing)
        return front

    @classmethod
    def from_json(cls, text: str) -> Front:
        """Read a front from JSON.

        Raises:
            ValueError: If it is not JSON, or as `from_dict`.
        """
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ValueError(f"front.json cannot be read: {error}") from error
        return cls.from_dict(content)

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
    """Read the fronts of one run, by method, once they are about its objectives, which the file `record` has.

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
