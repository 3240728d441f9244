"""Reading one SVMlight/LETOR file: scikit-learn parses; here lines become queries and faults get a place.

A line is `label qid:ID column:value ... # comment`, columns counted from 1 and rising. Files without `qid:` need the
sizes of their groups, one a line, in a side file `<name>.query` (LightGBM's convention).

Query ids are whole numbers of 64 bits, with a sign or without: kept as int64 where all of a file fit it, and as uint64
where some are 2^63 or more. Leading zeros mean nothing; so an id that is written in two ways is a fault.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from mopl._counted import counted
from mopl._extras import require
from mopl._lines import TextError, open_bytes, read_lines
from mopl._terminal import progress
from mopl.ranking import storage
from mopl.ranking.array_cache import ArrayCache
from mopl.ranking.storage import Rows

_LINES_AT_ONCE = 20_000
_PROGRESS_FROM_BYTES = 20_000_000
_MOST_COLUMNS = 100_000  # read into a dense matrix; a larger column number is taken for a fault
_ID = re.compile(rb"qid:([+-]?)([0-9]+)")
_ARRAYS = ("features", "labels", "offsets", "query_ids")
_BEYOND = f"above {_MOST_COLUMNS}, the most that is read; renumber it"


LetorError = TextError  # a fault in a data file: the message begins with the file and, where there is one, the line


@dataclass(frozen=True)
class LetorFile:
    """One file as it stands."""

    path: Path
    features: np.ndarray  # (N, C) float32, all columns of the file
    labels: np.ndarray  # (N,) float64, the first number of each line
    offsets: np.ndarray  # (Q + 1,) int64, where the queries begin and end
    query_ids: np.ndarray  # (Q,) int64, or uint64 if one is 2^63 or more; 0, 1, ... where the file has none
    has_ids: bool = True

    def line_of(self, item: int) -> int:
        """Return the line, from 1, on which an item stands: for messages."""
        with open_bytes(self.path) as (_, stream):
            return next(islice((n for n, text in enumerate(stream, 1) if _content(text)), item, None))


def read_letor(
    path: str | os.PathLike[str],
    *,
    cache: bool | str | os.PathLike[str] = True,
    labels: Mapping[int, str] = MappingProxyType({}),
) -> LetorFile:
    """Read one file, from the cache if it is unchanged since it was read last.

    Args:
        path: the file; names in .gz or .bz2 are decompressed.
        cache: true keeps the cache beside the file, or in the user's cache folder if that cannot be written; a path is
            the folder to keep it in; false neither reads nor writes one. See `mopl.ranking.array_cache`.
        labels: columns that are labels, and the names of their objectives, for messages.

    Returns:
        The file's matrix, labels and queries.

    Raises:
        LetorError: if the file is malformed, with file and line.
        FileNotFoundError: if it does not exist.
        ImportError: if scikit-learn is not installed and the file must be parsed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give an SVMlight/LETOR file, or a folder of them")
    kept = ArrayCache(path, cache)
    arrays = kept.load(_ARRAYS)
    if arrays is None:
        arrays = _parse(path, labels)
        if kept.save(arrays) and arrays["features"].nbytes > storage.LIMIT:
            arrays = kept.load(_ARRAYS) or arrays  # mapped from there, so that the temporary file goes
    groups = _side_file(path)
    if arrays["query_ids"].size:
        offsets, query_ids = arrays["offsets"], arrays["query_ids"]
    elif groups is None:
        raise LetorError(
            f"{path}: no line has a query id and there is no file {path.name}.query beside it; write qid:ID after "
            "each label, or the sizes of the groups into that file, one a line"
        )
    else:
        offsets = read_groups(groups, len(arrays["labels"]), path)
        query_ids = np.arange(len(offsets) - 1)
    return LetorFile(path, arrays["features"], arrays["labels"], offsets, query_ids, arrays["query_ids"].size > 0)


def read_groups(path: Path, items: int, data: Path) -> np.ndarray:
    """Return offsets (Q + 1,) from a file of group sizes, one a line, which add up to the items of the file `data`."""
    sizes: list[int] = []
    for number, line in read_lines(path):
        if not (text := line.strip()):
            continue
        if not (text.isascii() and text.isdigit()):
            raise LetorError(f"{path}:{number}: {text!r} is not the size of a group; write one whole number")
        if len(text) > 18:
            raise LetorError(f"{path}:{number}: no group has {text} documents; correct the number")
        if int(text) == 0:
            raise LetorError(f"{path}:{number}: this query has no documents; remove the line")
        sizes.append(int(text))
    if sum(sizes) != items:
        raise LetorError(
            f"{path}: the sizes of {counted(len(sizes), 'group')} sum to {sum(sizes)} but {data} has "
            f"{counted(items, 'document')}; make them agree"
        )
    return np.cumsum([0, *sizes], dtype=np.int64)


def read_label_file(path: Path, items: int, data: Path) -> np.ndarray:
    """Return (N,) float64 labels, a finite number a line, for the items of the file `data` in its order."""
    values: list[float] = []
    lines = [(number, line.strip()) for number, line in read_lines(path)]
    if len(lines) != items:
        raise LetorError(
            f"{path}: it has {counted(len(lines), 'line')} but {data} has {counted(items, 'document')}; write one "
            "label a document, in the order of that file"
        )
    for number, text in lines:
        try:
            values.append(_number(text))
        except ValueError:
            raise LetorError(f"{path}:{number}: {text!r} is not a number") from None
        if not math.isfinite(values[-1]):
            raise LetorError(f"{path}:{number}: the label is {text}; replace it by a finite number")
    return np.array(values)


def _number(text: str) -> float:
    """Return a number as everybody writes it: Python's own also takes `1_000`, a `ValueError` here."""
    if "_" in text:
        raise ValueError(f"{text!r} has a line below")
    return float(text)


def _side_file(path: Path) -> Path | None:
    """Return the file of group sizes beside `path`, if there is one."""
    names = (path.name, path.stem) if path.suffix in (".gz", ".bz2") else (path.name,)
    return next((side for name in names if (side := path.with_name(f"{name}.query")).is_file()), None)


# --- parsing --------------------------------------------------------------------------------------------------------


def _content(line: bytes) -> bytes:
    """Return a line without its comment and outer blanks; empty if it holds no item."""
    return line.partition(b"#")[0].strip()


class _Lines:
    """A file as scikit-learn reads it, some lines at a time, while line numbers and query ids are noted.

    The ids are not left to scikit-learn: it appends them one by one to an array, which takes a time quadratic in the
    number of lines, and it does not notice lines without one.
    """

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.line = 0  # the number of the line given out last
        self.text = b""
        self.rows: list[int] = []  # line numbers of the items of this chunk
        self.ids: list[int] = []  # query ids, where the file has them
        self.starts: list[int] = []  # the item with which each query begins
        self.first_line: dict[int, int] = {}  # of each query
        self.token = b""  # the query id of the line before, as it is written
        self.least = self.most = 0  # of the query ids
        self.items = 0
        self.has_ids: bool | None = None
        self.ended = False

    def read(self, size: int = -1) -> bytes:  # scikit-learn takes an object for a file if it has this
        return self.stream.read(size)

    def chunk(self) -> _Lines:
        self.rows = []
        return self

    def __iter__(self) -> Iterator[bytes]:
        for text in self.stream:
            self.line += 1
            content = _content(text)
            if not content:
                continue
            self.text = content
            if b"_" in content:  # scikit-learn reads 1_0 as 10, as Python does
                raise self.error(explain_line(content) or "an underscore is no part of a line's numbers")
            yield self._without_id(content)
            self.rows.append(self.line)
            self.items += 1
            if len(self.rows) == _LINES_AT_ONCE:
                return
        self.ended = True

    def _without_id(self, content: bytes) -> bytes:
        """Note the query id of a line and take it out."""
        label, token, *features = [*content.split(None, 2), b""]
        has_id = token.startswith(b"qid:")
        if self.has_ids is None:
            self.has_ids = has_id
        if has_id != self.has_ids:
            missing, other = ("a", "no") if has_id else ("no", "a")
            raise self.error(f"the line has {missing} query id but earlier lines have {other} one; write qid:ID on all")
        if not has_id:
            return content
        if token != self.token:
            self._begin_query(token)
            self.token = token
        return b" ".join([label, *features])

    def _begin_query(self, token: bytes) -> None:
        """Note the first line of a query."""
        shown = repr(token[:60].decode(errors="replace"))
        match = _ID.fullmatch(token)
        if match is None:
            raise self.error(f"{shown} is no query id; write qid: and a whole number")
        sign, digits = match[1], match[2].lstrip(b"0") or b"0"
        query = int(digits[:21]) * (-1 if sign == b"-" else 1)  # of 21 digits no number is in range
        if not -(2**63) <= query < 2**64:
            raise self.error(f"{shown} is beyond 64 bits, -2^63 to 2^64 - 1; renumber the queries")
        self.least, self.most = min(self.least, query), max(self.most, query)
        if self.least < 0 and self.most >= 2**63:
            raise self.error(
                f"{shown} does not go with the id {self.most if query < 0 else self.least} of an earlier line: ids are "
                "from -2^63 to 2^63 - 1, or from 0 to 2^64 - 1; renumber the queries"
            )
        if self.ids and query == self.ids[-1]:
            raise self.error(
                f"{shown} is query {query}, which the line before writes as {self.token.decode()!r}; write each id in "
                "one way"
            )
        if query in self.first_line:
            raise self.error(
                f"query {query} comes back after other queries (it began on line {self.first_line[query]}); "
                "put all documents of a query on consecutive lines"
            )
        self.first_line[query] = self.line
        self.ids.append(query)
        self.starts.append(self.items)

    def error(self, message: str) -> LetorError:
        return LetorError(f"{self.path}:{self.line}: {message}")


def _parse(path: Path, names: Mapping[int, str]) -> dict[str, np.ndarray]:
    """Parse a file into features, labels, offsets and query_ids (the last two empty if it has no ids)."""
    require("sklearn", what="reading SVMlight files")
    from sklearn.datasets import load_svmlight_file

    load: Any = load_svmlight_file  # its annotations are those of the defaults

    rows = Rows()
    labels: list[np.ndarray] = []
    size = path.stat().st_size
    shown = progress(f"reading {path.name}", size, "B", show=size >= _PROGRESS_FROM_BYTES)
    with open_bytes(path) as (raw, stream), shown as bar:
        lines = _Lines(path, stream)
        while not lines.ended:
            try:
                matrix, label = load(lines.chunk(), dtype=np.float32, zero_based=False)[:2]
            except LetorError:
                raise
            except (ValueError, OverflowError) as error:
                raise lines.error(explain_line(lines.text) or str(error)) from error
            if not lines.rows:
                continue
            _check_chunk(lines, matrix, label, names)
            rows.append(matrix.toarray())
            labels.append(label)
            bar.update(raw.tell() - bar.done)
    if not labels:
        raise LetorError(f"{path}: the file has no documents")
    return {
        "features": rows.matrix(),
        "labels": np.concatenate(labels),
        "offsets": np.array([*lines.starts, lines.items] if lines.has_ids else [], dtype=np.int64),
        "query_ids": np.array(lines.ids, dtype=np.int64 if lines.most < 2**63 else np.uint64),
    }


def _check_chunk(lines: _Lines, matrix: Any, labels: np.ndarray, names: Mapping[int, str]) -> None:
    """Raise if a number of the chunk is not finite or a column number is out of range; `names`: of label columns."""

    def at(row: int, message: str) -> LetorError:
        return LetorError(f"{lines.path}:{lines.rows[row]}: {message}")

    def row_of(place: int) -> int:
        return int(np.searchsorted(matrix.indptr, place, side="right")) - 1

    bad = ~np.isfinite(labels)
    if bad.any():
        raise at(int(bad.argmax()), f"the label is {labels[bad.argmax()]}; replace it by a finite number")
    bad = ~np.isfinite(matrix.data)
    if bad.any():
        place = int(bad.argmax())
        column, what = int(matrix.indices[place]) + 1, "feature"
        remedy = "or leave it out, which means 0"
        if column in names:
            what, remedy = f"the label of objective {names[column]!r}, column", "(a column left out is the label 0)"
        message = f"{what} {column} is {matrix.data[place]}; replace it by a number of float32's range {remedy}"
        raise at(row_of(place), message)
    if matrix.shape[1] > _MOST_COLUMNS:
        place = int(matrix.indices.argmax())
        raise at(row_of(place), f"column {matrix.indices[place] + 1} is {_BEYOND}")


def explain_line(line: bytes) -> str | None:
    """Say what is wrong with a line, without its comment; None if nothing is found."""
    text = line.decode(errors="replace")
    label, *features = re.split(r"[ \t\n\r\x0b\x0c]+", text.strip(" \t\n\r\x0b\x0c"))  # as bytes are split
    try:
        _number(label)
    except ValueError:
        return f"the label {label!r} is not a number; a line is LABEL qid:ID 1:VALUE 2:VALUE ..."
    last = 0
    for feature in features:
        if feature.startswith("qid:") and feature is features[0]:
            continue
        column, colon, value = feature.partition(":")
        if not colon:
            return f"{feature!r} has no colon; write COLUMN:VALUE"
        if not (column.isascii() and column.isdigit()):
            return f"{feature!r} has no column number before the colon"
        number = int(column.lstrip("0")[:11] or 0)  # of 11 digits no number is in range
        if number == 0:
            return "column 0 is used but columns are counted from 1; add 1 to all"
        if number <= last:
            return f"column {column} comes after column {last}; columns must rise along the line"
        if number > _MOST_COLUMNS:
            return f"column {column[:60]} is {_BEYOND}"
        try:
            _number(value)
        except ValueError:
            return f"{feature!r} has no number after the colon"
        last = number
    return None
