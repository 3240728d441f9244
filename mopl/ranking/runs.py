"""Finished runs of rankers: their data, models and figures."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from mopl._records import Finite, damaged, read_json
from mopl._tensor_files import opened, read_tensors, write_tensors
from mopl.experiments.run import EVALUATION, FinishedRun
from mopl.experiments.run_directory import check_fingerprints
from mopl.ranking.config import RankConfig
from mopl.ranking.data import RankingData
from mopl.ranking.loading import load
from mopl.ranking.methods import Policy
from mopl.ranking.normalization import FeatureNormalizer
from mopl.ranking.objectives import parse_objectives
from mopl.ranking.stages import REFERENCE, load_policy, read_references
from mopl.report import Metric

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
NORMALIZER = "normalizer.safetensors"


class _Named(msgspec.Struct):
    name: str


class DataRecord(msgspec.Struct):
    """What is read from `data` in a run's `config.json`."""

    fingerprint: str
    empty_share: dict[str, Share]
    objectives: Annotated[list[_Named], msgspec.Meta(min_length=2)]  # the main objective is the first


@dataclass
class RankingRun(FinishedRun):
    """A finished run of `mopl rank`."""

    KIND = None
    CONFIG = RankConfig
    DATA = DataRecord

    config: RankConfig

    @classmethod
    def open(cls, path: str | Path) -> RankingRun:
        """Open a finished run with its data, which must be there, unchanged; other errors as `FinishedRun.open`."""
        run = super().open(path)
        _ = run.reference
        return run

    @functools.cached_property
    def splits(self) -> dict[str, RankingData]:
        """The data by split: train, valid, test; a `ValueError` if it changed since the run began."""
        splits = load_splits(self.config)
        check_fingerprints(self.record, {"fingerprint": fingerprint(splits)}, {"fingerprint": "data"}, self.path)
        return splits

    @functools.cached_property
    def reference(self) -> dict[str, Tensor]:
        """The base model's scores (N,) by split."""
        return read_references(self.path / REFERENCE, self.splits)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the m auxiliary objectives."""
        return tuple(objective["name"] for objective in self.record["data"]["objectives"][1:])

    def policy(self, method: str | None = None, device: torch.device | str = "cpu") -> Policy:
        """Return a trained method of the run, by default its only one or weight-cos-dpo; errors as `check_method`."""
        return load_policy(self, self.check_method(method), device)

    @property
    def metric(self) -> Metric:
        """What the figures of the fronts are."""
        return self.config.measure.metric(self.record["data"]["empty_share"])

    @property
    def measured(self) -> Mapping[str, Any]:
        """The settings that say what a figure is: cut, gain and empty lists of NDCG."""
        return {"the cut k of NDCG": self.config.k, "gain": self.config.gain, "empty": self.config.empty}

    @property
    def noted(self) -> Mapping[str, Any]:
        """What else the figures depend on: where the labels are from."""
        return {
            f"where objective {each['name']} is from, and which way is better": (
                each.get("column") or each.get("path"), each.get("maximise"),
            )
            for each in self.record["data"]["objectives"]
        }  # fmt: skip

    def true_front(self) -> list[list[float]] | None:
        """Return the figures (n, m) of the optimum on the run's grid, which generated data has."""
        m, done = len(self.objectives), [method for method in self.methods if method not in self.missing]
        row = Annotated[list[Finite], msgspec.Meta(min_length=m, max_length=m)]
        schema = msgspec.defstruct("Evaluation", [("true_auxiliary", list[row] | None, None)])
        return read_json(self.folder(done[0]) / EVALUATION, schema).get("true_auxiliary")


def open_run(path: str | Path) -> RankingRun:
    """Open a finished run of `mopl rank` or `rank`, with its data.

    Args:
        path: The run directory.

    Returns:
        The run. `splits` has the data, `reference` the base model's scores (N,) of each split, `policy()` the trained
        ranker, and `fronts()` what was measured.

    Raises:
        FileNotFoundError: If there is no run, it has no front yet, or its data is gone.
        ValueError: If it is a run of another command, it is damaged, or its data changed since it began.
    """
    return RankingRun.open(path)


def load_splits(config: RankConfig, *, recorded: bool = True) -> dict[str, RankingData]:
    """Return the data of a run by split; `recorded` says that it has begun, maybe with an earlier version."""
    objectives: Any = ",".join(config.objectives) or None
    if recorded and "=" in (objectives or ""):  # columns of files; those of embedded data are names
        objectives = parse_objectives(objectives, recorded=True)
    parts = load(
        config.data, objectives=objectives,
        normalization=config.normalize_features, seed=config.data_seed,
    )  # fmt: skip
    return dict(zip(("train", "valid", "test"), parts, strict=True))


def fingerprint(splits: dict[str, RankingData]) -> str:
    """Return one fingerprint of all splits."""
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        digest.update(f"{name}:{split.fingerprint}".encode())
    return digest.hexdigest()


def save_normalizer(path: Path, train: RankingData) -> None:
    """Keep what the normalisation of the features measured, so that the model can be used on other data."""
    normalizer = train.normalizer
    if normalizer is not None and not (path / NORMALIZER).exists():
        write_tensors(path / NORMALIZER, normalizer.tensors(), {"name": normalizer.name})


def load_normalizer(path: str | Path) -> FeatureNormalizer:
    """Return the normalisation of features that the models of a run expect: apply it to raw features (N, F)."""
    file = Path(path) / NORMALIZER
    if not file.exists():
        raise FileNotFoundError(f"there is no {NORMALIZER} in {path}; name the directory of a finished run")
    with opened(file) as handle:
        name = (handle.metadata() or {}).get("name", "")
        features = handle.get_slice("shift").get_shape() if "shift" in handle.keys() else None
    wanted = {} if features is None or len(features) != 1 else {"shift": features, "scale": features}
    tensors = read_tensors(file, wanted)
    try:
        return FeatureNormalizer(name, **tensors)
    except ValueError as error:
        raise damaged(file, str(error)) from None
