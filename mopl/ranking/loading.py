"""The front door to ranking data: one function for embedded data sets and files."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopl.ranking.data import RankingData, Truth
from mopl.ranking.normalization import FeatureNormalizer, check_normalization
from mopl.ranking.objectives import Objective

# The normalisation of each kind of data unless another is asked for. Features of synthetic data are normal already;
# LETOR's are counts and lengths with heavy tails.
DEFAULT_NORMALIZATION = {"travel": "global", "synthetic": "none", "letor": "log1p+global"}
_DECIMAL = re.compile(r"\d*\.\d+|\d+\.", re.ASCII)


def load(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = "travel",
    *,
    objectives: str | Sequence[str | Objective] | None = None,
    normalization: str | None = None,
    seed: int = 0,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    cache: bool | str | os.PathLike[str] = True,
) -> tuple[RankingData, RankingData, RankingData]:
    """Load a ranking data set, split by query and with normalised features.

    Args:
        data: `"travel"`, `"synthetic"`, either with options after a colon (`"synthetic:queries=300,objectives=3"`,
            `"travel:features=conditional_logit"`; the options are the arguments of `mopl.ranking.synthetic.synthetic`
            and `mopl.ranking.travel.travel`), or files, as `mopl.ranking.letor.load_letor` takes them. A file that is
            called travel is `./travel`.
        objectives: of a file, the sources of the auxiliary labels (`"clicks=134,price=7:min:softmax"`); of an embedded
            data set, the names of those to keep. Default: all of an embedded data set, MSLR's five for its files.
        normalization: see `mopl.ranking.normalization.FeatureNormalizer`; measured on the training split. Default:
            `"global"` for travel, `"none"` for synthetic, `"log1p+global"` for files.
        seed: of drawn splits, and of synthetic data unless its options name another.
        fractions: of train, valid and test, where the split is drawn.
        cache: where parsed files are kept; see `mopl.ranking.svmlight.read_letor`.

    Returns:
        Train, valid and test. Their `normalizer` belongs into the checkpoint of a model that is trained on them.

    Raises:
        ValueError: if an option, objective or normalisation is unknown, or a file is malformed.
        FileNotFoundError: if a file does not exist.
        ImportError: if a package that the data needs is not installed; the message names the extra.
    """
    if normalization is not None:
        check_normalization(normalization)
    kind, _, options = data.partition(":") if isinstance(data, str) else ("", "", "")
    if kind in ("travel", "synthetic"):
        whole = _embedded(kind, _options(options, str(data)), seed)
        if objectives is not None:
            whole = _select(whole, objectives)
        train, valid, test = whole.split(fractions, seed=seed)
    else:
        from mopl.ranking.letor import load_letor

        if isinstance(data, str) and not Path(data).exists():
            raise FileNotFoundError(
                f"{data}: there is no such file or folder, nor an embedded data set of that name (travel, synthetic)"
            )
        kind = "letor"
        train, valid, test = load_letor(data, objectives=objectives, cache=cache, fractions=fractions, seed=seed)
    name = DEFAULT_NORMALIZATION[kind] if normalization is None else normalization
    normalizer = FeatureNormalizer.fit(name, train.features)
    train, valid, test = (part.resolve_scales(train).normalized(normalizer) for part in (train, valid, test))
    return train, valid, test


def _options(text: str, spec: str) -> dict[str, Any]:
    """Read `key=value,key=value`; whole numbers become ints, decimal ones floats."""
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.strip().partition("=")
        if not equals or not key or not value:
            raise ValueError(f"data {spec!r} has the option {part!r}; write KEY=VALUE, several with commas between")
        options[key] = _number(value)
    return options


def _number(text: str) -> int | float | str:
    """Return a text as the number that it is, or as it is."""
    if text.isascii() and text.isdigit():
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) else text


def _embedded(kind: str, options: dict[str, Any], seed: int) -> RankingData:
    """Make an embedded data set."""
    import inspect

    if kind == "travel":
        from mopl.ranking.travel import travel as make
    else:
        from mopl.ranking.synthetic import synthetic as make

        options = {"seed": seed} | options
    known = inspect.signature(make).parameters
    if unknown := options.keys() - known.keys():
        raise ValueError(
            f"data {kind!r} has no option {', '.join(sorted(unknown))}; its options are {', '.join(known)}"
        )
    for key, value in options.items():
        wanted = type(known[key].default)
        if wanted is float and isinstance(value, int):
            value = options[key] = float(value)
        if not isinstance(value, wanted):
            raise ValueError(f"option {key} of data {kind!r} is {value!r} but must be of type {wanted.__name__}")
    return make(**options)


def _select(data: RankingData, objectives: str | Sequence[str | Objective]) -> RankingData:
    """Keep the named auxiliary objectives, in the order asked for."""
    parts = objectives.split(",") if isinstance(objectives, str) else objectives
    names = [part if isinstance(part, str) else part.name for part in parts]
    have = [objective.name for objective in data.objectives]
    if unknown := [name for name in names if name not in have]:
        raise ValueError(f"objective {unknown[0]!r} is unknown; {data.name} has {', '.join(have)}")
    kept = [have.index(name) for name in names]
    truth = data.truth and Truth(data.truth.log_probs[:, kept], data.truth.rates[kept])
    return dataclasses.replace(
        data,
        raw_auxiliary=data.raw_auxiliary[:, kept],
        objectives=tuple(data.objectives[j] for j in kept),
        truth=truth,
    )
