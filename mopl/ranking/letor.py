"""LETOR/SVMlight data sets: which files are which split, and which columns or label files are objectives.

MSLR-WEB10K and 30K are read fold by fold (`.../Fold1` with train.txt, vali.txt and test.txt). Their objectives by
name are those of COS-DPO, and then all five auxiliary columns, used or not, leave the 136 inputs, as in the paper.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mopl._counted import counted
from mopl.ranking.data import RankingData
from mopl.ranking.objectives import MSLR_COLUMNS, MSLR_OBJECTIVES, Objective, negative_label, parse_objectives
from mopl.ranking.svmlight import LetorError, LetorFile, read_label_file, read_letor

SPLITS = ("train", "valid", "test")
_SPLIT_WORDS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("vali", "valid", "validation", "val", "dev"), "valid"
)
_COMPRESSED = (".gz", ".bz2")
_ENDINGS = (".txt", ".svm", ".svmlight", ".libsvm", ".letor", ".dat")


def load_letor(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    objectives: str | Sequence[str | Objective] | None = None,
    main: Objective | None = None,
    exclude: Sequence[int] = (),
    cache: bool | str | os.PathLike[str] = True,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
) -> tuple[RankingData, RankingData, RankingData]:
    """Load a data set from SVMlight/LETOR files.

    Args:
        path: a folder with one file for each split (train.txt, vali.txt, test.txt; `rank.train`, `rank.test`; .gz and
            .bz2 too), or one file, which is split by query, or a sequence of two (train, test) or three (train, valid,
            test) files. Where there is no validation file, validation queries are drawn from the training file.
        objectives: the auxiliary objectives, as `mopl.ranking.objectives.parse_objective` reads them; default the five
            of MSLR if the files have its 136 columns. Their columns are taken out of the features.
        main: name and normalisation of the main objective, the first number of each line.
        exclude: more columns, counted from 1, to leave out of the features.
        cache: see `mopl.ranking.svmlight.read_letor`.
        fractions: of train, valid and test where a split is drawn; the first two where the test file is given.
        seed: of the drawn splits.

    Returns:
        Train, valid and test, without feature normalisation.

    Raises:
        LetorError: if a file is malformed; the message begins with the file and, where there is one, the line.
        ValueError: if an objective or column is unknown, or the files of a folder cannot be told apart.
        FileNotFoundError: if a file does not exist.
    """
    main = main or Objective("relevance")
    asked = _parsed(objectives, main)  # before files are read, which may take minutes
    files = find_files(path)
    labels = {o.column: o.name for o in asked or MSLR_OBJECTIVES.values() if o.column is not None}
    read = {split: read_letor(file, cache=cache, labels=labels) for split, file in files.items()}
    width = max(file.features.shape[1] for file in read.values())
    chosen = _choose_objectives(asked, width, next(iter(files.values())))
    used = {o.column for o in chosen if o.column} | set(exclude)
    if any(o in MSLR_OBJECTIVES.values() for o in chosen):
        used |= {o.column for o in MSLR_OBJECTIVES.values() if o.column}
    unknown = [c for c in used if not 1 <= c <= width]
    if unknown:
        names = [f" of objective {o.name!r}" for o in chosen if o.column == unknown[0]] or [" in exclude"]
        raise ValueError(
            f"column {unknown[0]}{names[0]} is unknown: {next(iter(files.values()))} has columns 1 to {width}"
        )
    inputs = [c for c in range(1, width + 1) if c not in used]
    if not inputs:
        raise ValueError(f"all {width} columns are objectives or excluded, so no input is left; keep at least one")
    in_folder = isinstance(path, (str, os.PathLike)) and Path(path).is_dir()
    parts = {
        split: _ranking_data(file, split, main, chosen, inputs, several=len(files) > 1, in_folder=in_folder)
        for split, file in read.items()
    }
    if len(parts) == 3:
        return parts["train"], parts["valid"], parts["test"]
    if len(parts) == 2:
        known = sum(fractions[:2])
        train, valid = parts["train"].split([f / known for f in fractions[:2]], seed=seed, names=SPLITS[:2])
        return train, valid, parts["test"]
    train, valid, test = parts["all"].split(fractions, seed=seed, names=SPLITS)
    return train, valid, test


def find_files(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """Return the data files by split: `all`, or `train` and `test`, or those and `valid`; errors as `load_letor`."""
    if not isinstance(path, (str, os.PathLike)):
        names = {1: ("all",), 2: ("train", "test"), 3: SPLITS}.get(len(path))
        if names is None:
            raise ValueError(f"there are {len(path)} files; give 1, 2 (train, test) or 3 (train, valid, test)")
        return dict(zip(names, map(Path, path), strict=True))
    root = Path(path)
    if root.is_file():
        return {"all": root}
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such file or folder; give an SVMlight/LETOR file or a folder")
    found: dict[str, Path] = {}
    for file in sorted(root.iterdir()):
        split = _SPLIT_WORDS.get(_split_word(file.name))
        if split is None or file.name.startswith(".") or not file.is_file():
            continue
        if split in found:
            raise ValueError(f"{root} has two files for {split}, {found[split].name} and {file.name}; give the files")
        found[split] = file
    if not {"train", "test"} <= found.keys():
        folds = sorted(f.name for f in root.iterdir() if f.is_dir() and f.name.lower().startswith("fold"))
        remedy = f"choose a fold, e.g. {root / folds[0]}" if folds else "name them so, or give the files"
        missing = " and ".join(s for s in ("train", "test") if s not in found)
        raise ValueError(f"{root} has no file for {missing} (train.txt, vali.txt and test.txt in MSLR); {remedy}")
    return {split: found[split] for split in SPLITS if split in found}


def _split_word(name: str) -> str:
    """Return the part of a file name that may name a split: `train` of train.txt.gz and of rank.train."""
    for endings in (_COMPRESSED, _ENDINGS):
        name = next((name.removesuffix(e) for e in endings if name.endswith(e)), name)
    return name.rpartition(".")[2].lower()


def _parsed(specs: str | Sequence[str | Objective] | None, main: Objective) -> tuple[Objective, ...] | None:
    """Return the auxiliary objectives asked for, each with a source and a name of its own."""
    if specs is None:
        return None
    chosen = parse_objectives(specs)
    for objective in chosen:
        if objective.column is None and objective.path is None:
            raise ValueError(f"objective {objective.name!r} has no source; give it a column or a label file")
        if objective.name == main.name:
            raise ValueError(f"the main objective and an auxiliary one are both named {main.name!r}; name them apart")
    return chosen


def _choose_objectives(chosen: tuple[Objective, ...] | None, width: int, file: Path) -> tuple[Objective, ...]:
    """Return the objectives asked for, or MSLR's if none are and the files are MSLR's."""
    if chosen is None:
        if width != MSLR_COLUMNS:
            raise ValueError(
                f"{file} has {counted(width, 'column')}, not the {MSLR_COLUMNS} of MSLR, so the objectives must be "
                "named: write objectives as NAME=COLUMN or NAME=@FILE, e.g. clicks={max(width - 1, 1)} "
                f"price={width}:min:softmax"
            )
        return tuple(MSLR_OBJECTIVES.values())
    for objective in chosen:
        if objective in MSLR_OBJECTIVES.values() and width != MSLR_COLUMNS:
            raise ValueError(
                f"objective {objective.name!r} is column {objective.column} of MSLR's {MSLR_COLUMNS}, but {file} has "
                f"{counted(width, 'column')}; write {objective.name}=COLUMN"
            )
    return chosen


def _ranking_data(
    file: LetorFile,
    split: str,
    main: Objective,
    objectives: tuple[Objective, ...],
    inputs: Sequence[int],
    *,
    several: bool,
    in_folder: bool,
) -> RankingData:
    """Make one split out of one file."""

    def labels_of(objective: Objective) -> np.ndarray:
        if objective.column is not None:
            return _checked(_columns(file.features, [objective.column])[:, 0], objective, file)
        source = _label_path(objective, split, file.path, several=several)
        return _checked(read_label_file(source, len(file.labels), file.path), objective, file, source)

    return RankingData(
        features=torch.from_numpy(_columns(file.features, inputs)),
        raw_main=torch.from_numpy(_checked(file.labels, main, file, main=True)),
        raw_auxiliary=torch.from_numpy(np.stack([labels_of(objective) for objective in objectives], axis=1)),
        offsets=torch.from_numpy(file.offsets),
        query_ids=torch.from_numpy(file.query_ids),
        main=main,
        objectives=objectives,
        name=f"{file.path.parent.name}/{file.path.name}" if in_folder else file.path.name,
        feature_names=tuple(map(str, inputs)),
    )


def _columns(features: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """Return columns, counted from 1, of features (N, C); those after the last of the file are 0."""
    out = np.zeros((features.shape[0], len(columns)), dtype=np.float32)
    present = [i for i, c in enumerate(columns) if c <= features.shape[1]]
    out[:, present] = features[:, [columns[i] - 1 for i in present]]
    return out


def _checked(
    values: np.ndarray, objective: Objective, file: LetorFile, source: Path | None = None, *, main: bool = False
) -> np.ndarray:
    """Return labels (N,) as float32; raise, with file and line, if one is negative and may not be, or too large."""
    with np.errstate(over="ignore"):
        labels = values.astype(np.float32)
    bad = beyond = ~np.isfinite(labels)
    if objective.maximise and objective.normalize == "l1" and not bad.any():
        bad = labels < 0
    if not bad.any():
        return labels
    item = int(bad.argmax())
    place = f"{source}:{item + 1}" if source else f"{file.path}:{file.line_of(item)}"
    if bad is not beyond:
        raise LetorError(f"{place}: {negative_label(values[item], objective, main=main)}")
    raise LetorError(
        f"{place}: label {values[item]:g} of objective {objective.name!r} is beyond float32's range; scale the labels "
        "down"
    )


def _label_path(objective: Objective, split: str, data: Path, *, several: bool) -> Path:
    """Return the label file of an objective for one split, as written or beside the data file."""
    assert objective.path is not None
    if several and "{split}" not in objective.path:
        raise ValueError(
            f"objective {objective.name!r} has the one label file {objective.path} but the data has several files; "
            "write {split} in its name and have one for each, e.g. dwell=@{split}.dwell.txt"
        )
    words = [split, *(word for word, meant in _SPLIT_WORDS.items() if meant == split and word != split)]
    names = dict.fromkeys(objective.path.replace("{split}", word) for word in words)
    candidates = [folder / name for name in names for folder in (Path(), data.parent)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"objective {objective.name!r} has no label file {' or '.join(names)}, neither here nor in {data.parent}"
    )
