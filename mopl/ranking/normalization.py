"""Normalisation of input features: what is measured on the training split, and how every split is transformed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mopl._counted import counted
from mopl.ranking.objectives import of_its_list
from mopl.ranking.storage import blocks, empty

METHODS = ("none", "global", "query", "query-minmax")
# float64 copies of this many columns at a time, not of the whole matrix, and of fewer where rows are many.
_COLUMNS_AT_ONCE = 16
_NUMBERS_AT_ONCE = 1 << 26  # 512 MiB
# Below this share of its largest value, the spread of a column is the rounding of its mean: the column is constant.
_CONSTANT = 1e-7


@dataclass(frozen=True)
class FeatureNormalizer:
    """A transformation of features (N, F); made by `fit`, kept in the checkpoint, applied to every split.

    Attributes:
        name: one of `"none"`, `"global"`, `"query"`, `"query-minmax"`, alone or after `"log1p+"`.
            `log1p` is `sign(x) log(1 + |x|)` of every feature, for counts and other heavy tails; values well inside
            (-1, 1) hardly change. `global` gives each feature mean 0 and standard deviation 1 over the training split.
            `query` does so within each list, and `query-minmax` maps each list onto [0, 1]; both erase features that
            are the same for all items of a list. A constant feature becomes 0 everywhere.
        shift: (F,) float64, under `global` the means of the training split.
        scale: (F,) float64, under `global` its standard deviations (1 for constant features).
    """

    name: str
    shift: Tensor | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        check_normalization(self.name)
        if self.method == "global" and (self.shift is None or self.scale is None):
            raise ValueError(f"normalization {self.name!r} needs shift and scale; make it by FeatureNormalizer.fit")

    @property
    def method(self) -> str:
        """The name without `log1p+`."""
        return self.name.removeprefix("log1p+")

    @classmethod
    def fit(cls, name: str, features: Tensor) -> FeatureNormalizer:
        """Measure what `name` needs on the features (N, F) of the training split, and of that alone."""
        check_normalization(name)
        if name.removeprefix("log1p+") != "global":
            return cls(name)
        shift = torch.zeros(features.shape[1], dtype=torch.float64)
        scale = torch.zeros_like(shift)
        for which, columns in _columns(features, name):
            shift[which] = columns.mean(0)
            spread = (columns - shift[which]).square_().mean(0).sqrt()
            scale[which] = torch.where(spread > _CONSTANT * columns.abs().amax(0), spread, 1.0)
        return cls(name, shift, scale)

    def __call__(self, features: Tensor, offsets: Tensor) -> Tensor:
        """Return the features (N, F) of lists `offsets` (Q + 1,) transformed, in their dtype; F is that of `fit`."""
        if self.name == "none":
            return features
        if self.shift is not None and features.shape[1] != self.shift.shape[0]:
            raise ValueError(
                f"features has {counted(features.shape[1], 'column')} but normalization {self.name!r} was measured on "
                f"{self.shift.shape[0]}; give the same columns"
            )
        out = empty(tuple(features.shape), features.dtype)
        if self.method in ("none", "log1p", "global"):  # of each item by itself: a block of rows at a time
            for part in blocks(*features.shape):
                rows = _in_float64(features[part], self.name)
                out[part] = self._transform(rows, slice(None), offsets)
            return out
        for which, columns in _columns(features, self.name):
            out[:, which] = self._transform(columns, which, offsets)
        return out

    def _transform(self, columns: Tensor, which: slice, offsets: Tensor) -> Tensor:
        """Transform some of the columns, (N, f) float64."""
        if self.method == "global":
            assert self.shift is not None and self.scale is not None
            return (columns - self.shift[which]) / self.scale[which]
        if self.method in ("none", "log1p"):
            return columns
        if self.method == "query":
            centred = columns - of_its_list(columns, offsets, "mean")
            spread = of_its_list(centred.square(), offsets, "mean").sqrt()
            largest = of_its_list(columns.abs(), offsets, "amax")
            return torch.where(spread > _CONSTANT * largest, centred / spread, 0.0)
        least = of_its_list(columns, offsets, "amin")
        spread = of_its_list(columns, offsets, "amax") - least
        return torch.where(spread > 0, (columns - least) / spread, 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """Return what `fit` measured, for a checkpoint; `FeatureNormalizer(name, **tensors)` reads it back."""
        return {} if self.shift is None or self.scale is None else {"shift": self.shift, "scale": self.scale}


def check_normalization(name: str) -> None:
    """Raise unless `name` is a known normalisation."""
    known = [*METHODS, "log1p", *(f"log1p+{m}" for m in METHODS[1:])]
    if name not in known:
        raise ValueError(f"normalization is {name!r} but must be one of {', '.join(known)}")


def _columns(features: Tensor, name: str) -> Iterator[tuple[slice, Tensor]]:
    """Yield some columns at a time: which, and they in float64, after log1p if `name` asks for it."""
    width = max(1, min(_COLUMNS_AT_ONCE, _NUMBERS_AT_ONCE // max(len(features), 1)))
    for start in range(0, features.shape[1], width):
        which = slice(start, start + width)
        yield which, _in_float64(features[:, which], name)


def _in_float64(features: Tensor, name: str) -> Tensor:
    """Return a copy of features in float64, after log1p if `name` asks for it."""
    values = features.to(torch.float64, copy=True)
    if name.startswith("log1p"):
        sign = values.sign()
        values = values.abs_().log1p_().mul_(sign)
    return values
