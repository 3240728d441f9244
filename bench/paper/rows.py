"""Records of JSON lines and of parquet, and whether they have the fields that an experiment reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mopl._extras import require
from mopl._lines import lone_surrogate
from mopl.language_models.data import RowError
from mopl.language_models.readers import rows_of_json

JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
ENDINGS = (*JSON, ".parquet")


def files_of(path: Path, what: str) -> list[Path]:
    """Return the files of the training split: the one that is named, or those of a folder whose names begin so.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the ending of the file is another, or files of a folder are in two formats.
    """
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise ValueError(f"{path} cannot be {what}: its ending must be one of {', '.join(ENDINGS)}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such file or folder; name {what}")
    for folder in (path, path / "data"):
        found = sorted(folder.glob("train*")) if folder.is_dir() else []
        if found := [file for file in found if file.is_file() and file.name.endswith(ENDINGS)]:
            tables = [file.name for file in found if file.name.endswith(".parquet")]
            if 0 < len(tables) < len(found):  # `datasets` reads a folder in one format and says nothing of the rest
                other = next(file.name for file in found if file.name not in tables)
                raise ValueError(
                    f"{folder} has {other} and {tables[0]}, files of two formats; keep those of one, or name a file"
                )
            return found
    raise FileNotFoundError(f"{path} has no train.jsonl, nor another file train* of {', '.join(ENDINGS)}; name a file")


def read(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """Yield the place and the record of each row; a `RowError` where a line holds none."""
    for file in files:
        if file.name.endswith(JSON):
            yield from ((f"{file.name} {place}", row) for place, row in rows_of_json(file))
            continue
        require("datasets", what="data that is not a JSON file")
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches():
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{file.name} row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} cannot be read as parquet behind row {number} ({error}); fetch it again, or name it by its "
                "format"
            ) from error


def checked(files: Sequence[Path], fields: dict[str, type | tuple[type, ...]], what: str) -> Iterator[dict[str, Any]]:
    """Yield the records.

    Raises:
        ValueError: If one lacks a field or has something else there, or text that no file can hold; the message names
            file, row and field.
    """
    for place, row in read(files):
        if isinstance(row, RowError):
            raise ValueError(f"{place}: {row.detail}; {what} has a record in each row")
        if not isinstance(row, dict):
            raise ValueError(f"{place} is a {type(row).__name__} and not a record with {', '.join(fields)}")
        if missing := [name for name in fields if name not in row]:
            raise ValueError(
                f"{place} has no {', '.join(missing)} (it has {', '.join(map(str, row)) or 'nothing'}); {what} has "
                f"{', '.join(fields)} in each row"
            )
        for name, kind in fields.items():
            if not isinstance(row[name], kind):
                raise ValueError(f"{place}: {name} is {str(row[name])[:40]!r}, which {what} cannot have there")
            if isinstance(row[name], str) and (half := lone_surrogate(row[name])):
                raise ValueError(f"{place}: {name} {half}; mend it, or leave the row out")
        yield row
