"""LETOR/SVMlight data sets: which files are which split, and which columns or label files are objectives.

MSLR-WEB10K and 30K are read fold by fold (`.../Fold1` with train.txt, vali.txt and test.txt). Their objectives by
name are those of COS-DPO, and then all five auxiliary columns, used or not, leave the 136 inputs, as in the paper.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopl._counted import counted
from mopl.ranking import storage
from mopl.ranking.data import RankingData
from mopl.ranking.objectives import MSLR_COLUMNS, MSLR_OBJECTIVES, Objective, negative_label, parse_objectives
from mopl.ranking.svmlight import LetorError, LetorFile, read_label_file, read_letor

SPLITS = ("train", "valid", "test")
_SPLIT_WORDS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("vali", "valid", "validation", "val", "dev"), "valid"
)
_COMPRESSED = (".gz", ".bz2")
_NUMBER = re.compile(r"[-_.](?:part[-_.]?)?([0-9]+)(?:-of-([0-9]+))?$", re.ASCII)  # of one of several files
_LEAST_DATE = 10**5  # numbers from here on may be dates, between which days are missing
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
        path: a folder with a file for each split (train.txt, vali.txt, test.txt; `rank.train`, `rank.test`; .gz and
            .bz2 too), with several, which are numbered (train-00000.txt, train-00001.txt, ...), or with a folder of
            files for each; or one file, which is split by query, or a sequence of two (train, test) or three (train,
            valid, test) files. Where there is no validation file, validation queries are drawn from the training files.
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
    read = {split: [read_letor(file, cache=cache, labels=labels) for file in each] for split, each in files.items()}
    width = max(file.features.shape[1] for each in read.values() for file in each)
    first = next(iter(files.values()))[0]
    chosen = _choose_objectives(asked, width, first)
    used = {o.column for o in chosen if o.column} | set(exclude)
    if any(o in MSLR_OBJECTIVES.values() for o in chosen):
        used |= {o.column for o in MSLR_OBJECTIVES.values() if o.column}
    unknown = [c for c in used if not 1 <= c <= width]
    if unknown:
        names = [f" of objective {o.name!r}" for o in chosen if o.column == unknown[0]] or [" in exclude"]
        raise ValueError(f"column {unknown[0]}{names[0]} is unknown: {first} has columns 1 to {width}")
    inputs = [c for c in range(1, width + 1) if c not in used]
    if not inputs:
        raise ValueError(f"all {width} columns are objectives or excluded, so no input is left; keep at least one")
    in_folder = isinstance(path, (str, os.PathLike)) and Path(path).is_dir()
    parts = {
        split: _ranking_data(each, split, main, chosen, inputs, several=len(files) > 1, in_folder=in_folder)
        for split, each in read.items()
    }
    if len(parts) == 3:
        return parts["train"], parts["valid"], parts["test"]
    if len(parts) == 2:
        known = sum(fractions[:2])
        train, valid = parts["train"].split([f / known for f in fractions[:2]], seed=seed, names=SPLITS[:2])
        return train, valid, parts["test"]
    train, valid, test = parts["all"].split(fractions, seed=seed, names=SPLITS)
    return train, valid, test


def find_files(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> dict[str, list[Path]]:
    """Return the data files by split: `all`, or `train` and `test`, or those and `valid`; errors as `load_letor`."""
    if not isinstance(path, (str, os.PathLike)):
        names = {1: ("all",), 2: ("train", "test"), 3: SPLITS}.get(len(path))
        if names is None:
            raise ValueError(f"there are {len(path)} files; give 1, 2 (train, test) or 3 (train, valid, test)")
        return dict(zip(names, ([Path(file)] for file in path), strict=True))
    root = Path(path)
    if root.is_file():
        return {"all": [root]}
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such file or folder; give an SVMlight/LETOR file or a folder")
    found: dict[str, list[Path]] = {}
    for entry in sorted(root.iterdir(), key=_in_order):
        split = _SPLIT_WORDS.get(_split_word(entry.name))
        if split is None or entry.name.startswith("."):
            continue
        each = [entry] if entry.is_file() else _files_in(entry)
        if each and split in found and not all(_NUMBER.search(_stem(file.name)) for file in (*found[split], *each)):
            raise ValueError(
                f"{root} has two files for {split}, {found[split][0].name} and {entry.name}; give the files, or number "
                f"those of a split: {split}-00000.txt, {split}-00001.txt, ..."
            )
        if each:
            found.setdefault(split, []).extend(each)
    for split, each in found.items():
        _check_numbers(root, split, each)
    if not {"train", "test"} <= found.keys():
        folds = sorted(f.name for f in root.iterdir() if f.is_dir() and f.name.lower().startswith("fold"))
        remedy = f"choose a fold, e.g. {root / folds[0]}" if folds else "name them so, or give the files"
        missing = " and ".join(s for s in ("train", "test") if s not in found)
        raise ValueError(
            f"{root} has no file for {missing} (train.txt, vali.txt and test.txt in MSLR, or train-00000.txt, ...); "
            f"{remedy}"
        )
    return {split: found[split] for split in SPLITS if split in found}


def _stem(name: str) -> str:
    """Return a file name without its endings."""
    for endings in (_COMPRESSED, _ENDINGS):
        name = next((name.removesuffix(e) for e in endings if name.endswith(e)), name)
    return name


def _split_word(name: str) -> str:
    """Return the part of a name that may name a split: `train` of train.txt.gz, rank.train and train-00001-of-00032."""
    return _NUMBER.sub("", _stem(name)).rpartition(".")[2].lower()


def _in_order(path: Path) -> list[Any]:
    """Return what sorts names with numbers by the numbers: 2 before 10."""
    return [
        (int(part), "") if number % 2 else (-1, part) for number, part in enumerate(re.split(r"([0-9]+)", path.name))
    ]


def _check_numbers(root: Path, split: str, files: Sequence[Path]) -> None:
    """Raise unless numbered files are those of one set, each once, and none is missing as far as names tell."""
    sets: dict[tuple[str, ...], str] = {}  # folder, what stands before the number, how many there are
    numbers: dict[int, str] = {}
    for file in files:
        match = _NUMBER.search(stem := _stem(file.name))
        if match is None:
            return  # one file that is all of it
        sets.setdefault((str(file.parent), stem[: match.start()], match[2] or ""), str(file.relative_to(root)))
        name = numbers.setdefault(int(match[1]), file.name)
        if len(sets) == 1 and name != file.name:
            raise ValueError(f"{root} has one part of {split} twice, {name} and {file.name}; remove one of them")
    if len(sets) > 1:
        raise ValueError(f"{root} has files of several sets for {split}, {' and '.join(sets.values())}; keep one set")
    (_, _, total), first = next(iter(sets.items()))
    if total and len(files) != int(total):
        raise ValueError(
            f"{root} has {counted(len(files), 'file')} for {split}, but the name of {first} says that there "
            f"are {int(total)}; add the missing ones"
        )
    known = sorted(numbers)
    gap = next((a for a, b in itertools.pairwise(known) if b != a + 1), None)
    if gap is not None and known[-1] < _LEAST_DATE:
        raise ValueError(
            f"{root} has {counted(len(files), 'file')} for {split}, numbered from {known[0]} to {known[-1]}, but no "
            f"number {gap + 1}; add it, or number them without a gap"
        )


def _files_in(folder: Path) -> list[Path]:
    """Return the data files of a folder that is a split."""
    if not folder.is_dir():
        return []
    files = [file for file in sorted(folder.iterdir(), key=_in_order) if file.is_file() and file.name[0] != "."]
    data = [file for file in files if _NUMBER.search(_stem(file.name)) and file.suffix != ".query"]
    strange = [file for file in files if file not in data and _stem(file.name) != file.name]
    if data and strange:
        raise ValueError(
            f"{folder} has {strange[0].name} among the numbered files of a split; remove it, or number it: "
            "part-00000.txt, part-00001.txt, ..."
        )
    return data


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
                f"named: write objectives as NAME=COLUMN or NAME=@FILE, e.g. clicks={max(width - 1, 1)} "
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
    files: Sequence[LetorFile],
    split: str,
    main: Objective,
    objectives: tuple[Objective, ...],
    inputs: Sequence[int],
    *,
    several: bool,
    in_folder: bool,
) -> RankingData:
    """Make one split out of its files."""

    def labels_of(objective: Objective, file: LetorFile) -> np.ndarray:
        if objective.column is not None:
            column = _columns([file.features], [objective.column])[:, 0]
            return _checked(column.numpy(), objective, file)
        if len(files) > 1:
            raise ValueError(
                f"objective {objective.name!r} has a label file, {objective.path}, but {split} has "
                f"{counted(len(files), 'file')}, {files[0].path} and so on; write the labels as a column of these"
            )
        source = _label_path(objective, split, file.path, several=several)
        return _checked(read_label_file(source, len(file.labels), file.path), objective, file, source)

    first = files[0].path
    name = f"{first.parent.name}/{first.name}" if in_folder else first.name
    auxiliary = [np.stack([labels_of(objective, file) for objective in objectives], axis=1) for file in files]
    starts = np.cumsum([0, *(len(file.labels) for file in files)])
    offsets = [file.offsets[1:] + start for file, start in zip(files, starts, strict=False)]
    return RankingData(
        features=_columns([file.features for file in files], inputs),
        raw_main=torch.from_numpy(np.concatenate([_checked(file.labels, main, file, main=True) for file in files])),
        raw_auxiliary=torch.from_numpy(np.concatenate(auxiliary)),
        offsets=torch.from_numpy(np.concatenate([np.zeros(1, dtype=np.int64), *offsets])),
        query_ids=torch.from_numpy(_query_ids(files)),
        main=main,
        objectives=objectives,
        name=name if len(files) == 1 else f"{name} to {files[-1].path.name}",
        feature_names=tuple(map(str, inputs)),
    )


def _query_ids(files: Sequence[LetorFile]) -> np.ndarray:
    """Return the ids of the queries of a split; those of files without ids are numbered on.

    Raises:
        LetorError: If a query is in two files, or ids of all files do not fit into one type.
    """
    if len(files) == 1:
        return files[0].query_ids
    if not any(file.has_ids for file in files):
        return np.arange(sum(len(file.query_ids) for file in files))
    where: dict[int, Path] = {}
    for file in files:
        if not file.has_ids:
            other = next(each for each in files if each.has_ids)
            raise LetorError(
                f"{file.path}: it has no query ids, but {other.path} has; write qid:ID on all lines of both"
            )
        for query in file.query_ids.tolist():
            if (other := where.setdefault(query, file.path)) is not file.path:
                raise LetorError(
                    f"{file.path}: query {query} is in {other} as well; put all documents of a query into one file, on "
                    "consecutive lines"
                )
    if min(where) < 0 and max(where) >= 2**63:
        raise LetorError(
            f"{where[min(where)]}: query {min(where)} does not go with {max(where)} of {where[max(where)]}: ids are "
            "from -2^63 to 2^63 - 1, or from 0 to 2^64 - 1; renumber the queries"
        )
    return np.fromiter(where, dtype=np.int64 if max(where) < 2**63 else np.uint64, count=len(where))


def _columns(matrices: Sequence[np.ndarray], columns: Sequence[int]) -> torch.Tensor:
    """Return columns, counted from 1, of matrices (N, C), one below the other; those that one does not have are 0."""
    whole = matrices[0]
    if len(matrices) == 1 and list(columns) == list(range(1, whole.shape[1] + 1)):
        return torch.from_numpy(whole)
    out = storage.empty((sum(map(len, matrices)), len(columns)))
    start = 0
    for matrix in matrices:
        present = [i for i, c in enumerate(columns) if c <= matrix.shape[1]]
        taken = [columns[i] - 1 for i in present]
        for part in storage.blocks(*matrix.shape):
            rows = np.zeros((part.stop - part.start, len(columns)), dtype=np.float32)
            rows[:, present] = matrix[part][:, taken]
            out[start + part.start : start + part.stop] = torch.from_numpy(rows)
        start += len(matrix)
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
