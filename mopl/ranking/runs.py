"""Finished runs: their data, models and fronts, the reports of one and the comparison of several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from mopl._extras import require
from mopl._files import write_file
from mopl._records import Finite, damaged, read_json
from mopl._tensor_files import opened, read_tensors
from mopl._terminal import shell
from mopl.experiments.run_directory import CONFIG_FILE, read_run, refresh, settings_of
from mopl.pareto import weight_grid
from mopl.pareto.front import Front, load_fronts
from mopl.ranking.config import ALL, RankConfig
from mopl.ranking.data import RankingData
from mopl.ranking.loading import load
from mopl.ranking.methods import Policy
from mopl.ranking.normalization import FeatureNormalizer
from mopl.ranking.stages import REFERENCE, load_policy, read_references

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
FRONT, EVALUATION, NORMALIZER = "front.json", "evaluation.json", "normalizer.safetensors"


class _Named(msgspec.Struct):
    name: str


class DataRecord(msgspec.Struct):
    """What is read from `data` in a run's `config.json`."""

    fingerprint: str
    empty_share: dict[str, Share]
    objectives: Annotated[list[_Named], msgspec.Meta(min_length=2)]  # the main objective is the first


@dataclass
class OpenRun:
    """A run that exists, with its data: what reports and steering need.

    Attributes:
        path: The run directory.
        config: Its settings.
        splits: Its data by split.
        reference: The base model's scores (N,) by split.
    """

    path: Path
    config: RankConfig
    splits: dict[str, RankingData]
    reference: dict[str, Tensor]

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the auxiliary objectives."""
        return tuple(objective.name for objective in self.splits["train"].objectives)

    @property
    def grid(self) -> Tensor:
        """(n, m) the weights of the run's fronts."""
        return weight_grid(len(self.objectives), self.config.points, density="medium")

    @property
    def method_name(self) -> str:
        """The run's only method, or weight-cos-dpo where it has all."""
        return "weight-cos-dpo" if self.config.method == ALL else self.config.method

    def policy(self, method: str | None = None, device: torch.device | str = "cpu") -> Policy:
        """Return a trained method of the run, by default its only one or weight-cos-dpo.

        Raises:
            ValueError: If the run has no such method.
        """
        method = method or self.method_name
        if method not in self.config.methods:
            raise ValueError(f"{self.path} has no {method}; it has {', '.join(self.config.methods)}")
        folder = method_folder(self.path, self.config, method)
        return load_policy(self.path, folder, method, self.config, self.objectives, self.grid, device)


def load_splits(config: RankConfig) -> dict[str, RankingData]:
    """Return the data of a run by split."""
    parts = load(
        config.data, objectives=",".join(config.objectives) or None, normalization=config.normalize_features,
        seed=config.data_seed,
    )  # fmt: skip
    return dict(zip(("train", "valid", "test"), parts, strict=True))


def save_normalizer(path: Path, train: RankingData) -> None:
    """Keep what the normalisation of the features measured, so that the model can be used on other data."""
    require("safetensors", extra="demo")
    from safetensors.torch import save_file

    normalizer = train.normalizer
    if normalizer is not None and not (path / NORMALIZER).exists():
        write_file(
            path / NORMALIZER,
            lambda file: save_file(normalizer.tensors(), str(file), metadata={"name": normalizer.name}),
        )


def load_normalizer(path: str | Path) -> FeatureNormalizer:
    """Return the normalisation of features that the models of a run expect: apply it to raw features (N, F).

    Raises:
        FileNotFoundError: If there is none.
    """
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


def method_folder(path: Path, config: RankConfig, method: str) -> Path:
    """Return where a method's front and model are: the run itself, or a folder each under `--method all`."""
    return path / method if config.method == ALL else path


def run_fronts(path: str | Path) -> list[Front]:
    """Return the fronts of a run, the base model's first.

    Raises:
        FileNotFoundError: If there is no run, or it has no front yet.
    """
    path = Path(path)
    record = read_run(path)
    config = config_of(record, path)
    folders = {"base": path / "base", **{method: method_folder(path, config, method) for method in config.methods}}
    files = {method: folder / FRONT for method, folder in folders.items() if (folder / FRONT).exists()}
    if len(files) < 2:
        command = shell("mopl", "rank", "--run", path, "--resume")
        raise FileNotFoundError(f"the run {path} is not finished; continue it with: {command}")
    objectives = [objective["name"] for objective in record["data"]["objectives"][1:]]
    return load_fronts(files, objectives, path / CONFIG_FILE)


def config_of(record: dict[str, Any], path: str | Path) -> RankConfig:
    """Return the settings of a run.

    Raises:
        ValueError: If it is a run of another command.
    """
    return settings_of(record, path, None, RankConfig, DataRecord)


def write_reports(path: Path) -> None:
    """Write table.txt, front.png and report.html of a run from its fronts."""
    from mopl.report import plot_front, write_page
    from mopl.report.table import as_text, summarise

    record = read_run(path)
    config = config_of(record, path)
    fronts = run_fronts(path)
    metric = config.measure.metric(record["data"]["empty_share"])
    folder = method_folder(path, config, config.methods[0])
    m = len(fronts[0].objectives)
    row = Annotated[list[Finite], msgspec.Meta(min_length=m, max_length=m)]
    schema = msgspec.defstruct("Evaluation", [("true_auxiliary", list[row] | None, None)])
    rows = read_json(folder / EVALUATION, schema).get("true_auxiliary")
    write_file(path / "table.txt", as_text(summarise(fronts, metric)))
    plot_front(fronts, path / "front.png", metric=metric, truth=rows)
    write_page(fronts, path / "report.html", metric=metric, truth=rows, configuration=record)


def open_run(path: str | Path) -> OpenRun:
    """Open a finished run: settings, data and the base model's scores.

    Raises:
        FileNotFoundError: If there is no run, it is not finished, or its data is gone.
        ValueError: If the data changed since.
    """
    path = Path(path)
    record = read_run(path)
    config = config_of(record, path)
    run_fronts(path)
    splits = load_splits(config)
    check_data(record, splits, path)
    return OpenRun(path, config, splits, read_references(path / REFERENCE, splits))


def check_data(record: dict[str, Any], splits: dict[str, RankingData], path: Path) -> None:
    """Raise unless the data is what it was when the run began."""
    if record["data"]["fingerprint"] != fingerprint(splits):
        raise ValueError(
            f"the data of {path} is not what it was when the run began (its fingerprint differs); put the old files "
            "back, or start another run"
        )


def fingerprint(splits: dict[str, RankingData]) -> str:
    """Return one fingerprint of all splits."""
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        digest.update(f"{name}:{split.fingerprint}".encode())
    return digest.hexdigest()


def compare(
    runs: Sequence[str | Path],
    *,
    html: str | Path | None = None,
    png: str | Path | None = None,
    table: str | Path | None = None,
) -> str:
    """Print one table of several runs and write what is asked for; a single run gets its own files anew.

    See `mopl.report.compare`.

    Returns:
        The table as text.

    Raises:
        FileNotFoundError: If a run is missing or not finished.
        ValueError: If the runs have other objectives or are measured otherwise, or are of different commands.
    """
    from mopl.report.compare import Run, compare_runs

    found = []
    for path in runs:
        record = read_run(path)
        config = config_of(record, path)
        measure, objectives = config.measure, record["data"]["objectives"]
        measured = {"the cut k of NDCG": measure.k, "gain": measure.gain, "empty": measure.empty, "ties": measure.ties}
        sources = {each["name"]: (each.get("column") or each.get("path"), each.get("maximise")) for each in objectives}
        noted = {f"where objective {name} is from, and which way is better": source for name, source in sources.items()}
        found.append(
            Run(Path(path), record, run_fronts(path), measure.metric(record["data"]["empty_share"]), config.to_dict(),
                measured, noted)
        )  # fmt: skip
    if len(runs) == 1 and not (html or png or table):
        refresh(runs[0], write_reports)
    return compare_runs(found, html=html, png=png, table=table)
