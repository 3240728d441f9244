"""What an objective is: where its labels come from, which direction is better, and how they become a distribution.

Two tensors of every objective leave this file, both over the items of one list:

* *labels*: non-negative, higher is better; the gains of NDCG. A minimised objective is turned within its list:
  `labels = max(raw) - raw`, so the worst item of the list gets 0. A maximised objective keeps its raw labels; where
  some label of a list is negative (allowed under `"softmax"` only), the list is shifted up so that its least is 0.
* *targets*: the distribution that the listwise loss compares with (COS-DPO, section 2.2): `"l1"`, for sparse labels
  such as clicks, is `labels / sum(labels)`, and all zeros where the list has no mass; `"softmax"`, for dense labels
  such as quality, is `softmax(labels / scale)`. The softmax ignores shifts, so that a minimised objective has
  `softmax(-raw / scale)`, exactly as one expects.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mopl._arguments import check_choice
from mopl._lines import lone_surrogate
from mopl.experiments.settings import nearest

Normalize = Literal["l1", "softmax"]
NORMALIZE = ("l1", "softmax")


@dataclass(frozen=True)
class Objective:
    """One objective of a ranking data set.

    Args:
        name: the name in reports and in `front.json`.
        maximise: true if a higher raw label is better.
        normalize: `"l1"` (sparse, non-negative labels) or `"softmax"` (dense labels, strictly positive targets).
        column: the one-based column of the file that holds the labels, if it is one of the file's columns.
        path: the file with one label a line, if it is one; `{split}` in it stands for train, valid or test.
        scale: under `"softmax"`, what labels are divided by first; 1.0 is the paper's `softmax(z)`, `"std"` the
            standard deviation of the raw labels within lists of the training split (a number after loading). `"l1"`
            does not depend on it and takes no other than 1.0.
    """

    name: str
    maximise: bool = True
    normalize: Normalize = "l1"
    column: int | None = None
    path: str | None = None
    scale: float | Literal["std"] = 1.0

    def __post_init__(self) -> None:
        if not self.name or not self.name.strip() or any(c in self.name for c in "=:,@"):
            raise ValueError(f"objective name {self.name!r} is empty or contains one of '=:,@'; choose a plain word")
        if fault := lone_surrogate(self.name):
            raise ValueError(f"the name of an objective {fault}; write it in UTF-8")
        check_choice(self.normalize, NORMALIZE, f"normalize of objective {self.name!r}")
        if self.scale != "std" and not (isinstance(self.scale, (int, float)) and 0 < self.scale < float("inf")):
            raise ValueError(
                f"scale of objective {self.name!r} is {self.scale!r} but must be a number above 0 or 'std'"
            )
        if self.scale != 1.0 and self.normalize != "softmax":
            warnings.warn(self._idle_scale(), stacklevel=3)
        if self.column is not None and self.column < 1:
            raise ValueError(f"column of objective {self.name!r} is {self.column} but columns are counted from 1")
        if self.column is not None and self.path is not None:
            raise ValueError(f"objective {self.name!r} has both a column and a label file; give one of them")

    def _idle_scale(self) -> str:
        """Say that the normalisation leaves a scale that somebody gave without effect."""
        return (
            f"scale of objective {self.name!r} is {self.scale!r} but must be left out under {self.normalize}, "
            f"which does not depend on it; add softmax (:softmax:scale={self.scale}), or leave scale out"
        )

    @property
    def direction(self) -> str:
        """`"max"` or `"min"`, as the command line writes it."""
        return "max" if self.maximise else "min"

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain values for JSON; `Objective(**d)` reads them back."""
        return dataclasses.asdict(self)


# MSLR-WEB10K and 30K: the five columns that COS-DPO takes as auxiliary objectives (appendix A.4) out of the 136, so
# that 131 inputs remain. QualityScore2 "measures the badness of a web page" (the data set's own feature list), so less
# of it is better; the paper does not say that it turned it: `quality2=133:softmax:max` takes it as it stands. The
# paper does not say either how the scores 0..255 were scaled before the softmax; "std" is our choice.
MSLR_COLUMNS = 136
MSLR_OBJECTIVES: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective("query_url_clicks", column=134),
        Objective("url_clicks", column=135),
        Objective("url_dwell_time", column=136),
        Objective("quality", normalize="softmax", column=132, scale="std"),
        Objective("quality2", maximise=False, normalize="softmax", column=133, scale="std"),
    )
}


def parse_objective(spec: str, *, recorded: bool = False) -> Objective:
    """Read an objective from its text form, `name=source[:option]...`.

    The source is a one-based column (`clicks=134`) or `@` and a label file with one value a line (`dwell=@dwell.txt`;
    `{split}` in it stands for train, valid or test). Options: `min` or `max`, `l1` or `softmax`, `scale=NUMBER` or
    `scale=std`. A bare name is one of the MSLR objectives. Column labels default to `max` and `l1`. Examples are
    `"price=7:min"` and `"quality=132:softmax:scale=std"`; a text of another form is a `ValueError`, and so is a scale
    without softmax, unless a run of an earlier version has `recorded` it.
    """
    usage = "write NAME=COLUMN or NAME=@FILE, then any of :min :max :l1 :softmax :scale=X, e.g. price=7:min:softmax"
    text = spec.strip()
    if "=" not in text:
        if text in MSLR_OBJECTIVES:
            return MSLR_OBJECTIVES[text]
        near = nearest(text, MSLR_OBJECTIVES, 0.85)  # "clicks" of somebody's own file is no typing error
        raise ValueError(f"objective {spec!r} has no source{near}; {usage}")
    name, _, rest = text.partition("=")
    source, *options = rest.split(":")
    column, path = None, None
    if source.startswith("@") and len(source) > 1:
        path = source[1:]
    elif source.isascii() and source.isdigit() and len(source) < 10:
        column = int(source)
    else:
        raise ValueError(f"objective {spec!r} has the source {source!r}, not a column number or @FILE; {usage}")
    settings: dict[str, object] = {}
    for option in options:
        if option in ("min", "max"):
            key, value = "maximise", option == "max"
        elif option in NORMALIZE:
            key, value = "normalize", option
        elif option.startswith("scale="):
            text = option.removeprefix("scale=")
            try:
                key, value = "scale", "std" if text == "std" else float(text)
            except ValueError:
                raise ValueError(f"objective {spec!r} has the scale {text!r}, not a number or std; {usage}") from None
        else:
            raise ValueError(f"objective {spec!r} has the unknown option {option!r}; {usage}")
        if key in settings:
            raise ValueError(f"objective {spec!r} says {key} twice; {usage}")
        settings[key] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        objective = Objective(name.strip(), column=column, path=path, **settings)  # type: ignore[arg-type]
    if "scale" in settings and objective.normalize != "softmax" and not recorded:
        raise ValueError(objective._idle_scale())
    return objective


def parse_objectives(
    specs: str | Objective | Iterable[str | Objective], *, recorded: bool = False
) -> tuple[Objective, ...]:
    """Read several objectives of different names: a comma-separated text, or any mixture of texts and `Objective`s.

    `recorded` is that of `parse_objective`.
    """
    if isinstance(specs, (str, Objective)):
        specs = [specs]
    objectives: list[Objective] = []
    for spec in specs:
        parts = [p for p in spec.split(",") if p.strip()] if isinstance(spec, str) else [spec]
        objectives += [parse_objective(p, recorded=recorded) if isinstance(p, str) else p for p in parts]
    check_objectives(objectives)
    return tuple(objectives)


def check_objectives(objectives: Sequence[Objective]) -> None:
    """Raise unless there is at least one objective and all names differ."""
    names = [o.name for o in objectives]
    if not names:
        raise ValueError("there is no auxiliary objective; name at least one")
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"two objectives have the same name, {twice}, in {', '.join(names)}; rename one")


def negative_label(value: float, objective: Objective, *, main: bool, where: str = "") -> str:
    """Return what to say of a label below 0 that l1 cannot normalise."""
    remedy = (
        "it is of the main objective, the first number of each line: add one number to all of these, so that none is "
        "below 0"
        if main
        else "add :softmax to the objective, or :min if less is better"
    )
    return f"label {value:g} of objective {objective.name!r}{where} is negative, which l1 cannot normalise; {remedy}"


def of_its_list(values: Tensor, offsets: Tensor, how: Literal["sum", "mean", "amax", "amin"]) -> Tensor:
    """Give every item the reduction over its list of values (N, ...), in their dtype, on the CPU. No list is empty."""
    operation = {"sum": np.add, "mean": np.add, "amax": np.maximum, "amin": np.minimum}[how]
    reduced = torch.from_numpy(operation.reduceat(values.numpy(), offsets[:-1].numpy(), axis=0))
    lengths = offsets.diff()
    if how == "mean":
        reduced = reduced / lengths.view(-1, *[1] * (values.ndim - 1))
    return torch.repeat_interleave(reduced, lengths, dim=0)


def turned_labels(raw: Tensor, objective: Objective, offsets: Tensor) -> Tensor:
    """Return labels (N,), non-negative and higher better, of raw labels (N,); see the head of this file."""
    if not objective.maximise:
        return of_its_list(raw, offsets, "amax") - raw
    if bool((raw < 0).any()):
        return raw - of_its_list(raw, offsets, "amin").clamp(max=0)
    return raw


def normalized_targets(labels: Tensor, objective: Objective, offsets: Tensor) -> Tensor:
    """Return targets (N,), which sum to 1 over a list (to 0 where it has no mass), of labels (N,) from above."""
    wide = labels.double()
    if objective.normalize == "softmax":
        if objective.scale == "std":
            raise ValueError(
                f"objective {objective.name!r} has scale='std', which is measured on the training split; "
                "call resolve_scales(train) first, as mopl.ranking.load does"
            )
        wide = ((wide - of_its_list(wide, offsets, "amax")) / objective.scale).exp()
    mass = of_its_list(wide, offsets, "sum")
    return torch.where(mass > 0, wide / mass.clamp(min=torch.finfo(torch.float64).tiny), 0.0).to(labels.dtype)


def resolve_scale(objective: Objective, raw: Tensor, offsets: Tensor) -> Objective:
    """Return the objective with `scale="std"` replaced by the standard deviation of raw (N,) within its lists.

    A column that is constant within every list gets the scale 1; its targets are uniform under any.
    """
    if objective.scale != "std":
        return objective
    wide = raw.double()
    centred = wide - of_its_list(wide, offsets, "mean")
    deviation = centred.square().mean().sqrt().item()
    return dataclasses.replace(objective, scale=deviation if deviation > 0 else 1.0)
