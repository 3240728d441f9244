"""Reading preference data: from a file, a directory, the Hugging Face hub, or rows in memory, in any public format."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mopl._extras import require
from mopl._hub import find
from mopl._lines import TextError, byte_lines, decode, json_array, parse_json, read_lines, read_text
from mopl.language_models import _pairs, formats
from mopl.language_models.data import DataError, OnError, PreferenceData, PreferenceList, ReadReport, RowError, collect
from mopl.language_models.formats import Format, Row

Placed = tuple[str, Any]

# From the most to the least telling columns: the first format whose columns are all there is taken.
FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("lists", ("prompt", "responses", "labels"), formats.parse_lists, about="mopl's own"),
        Format(
            "pku-safe-rlhf",
            ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"),
            formats.parse_safe_rlhf,
            about="PKU-Alignment/PKU-SafeRLHF",
        ),
        Format(
            "ultrafeedback", ("instruction", "completions"), formats.parse_ultrafeedback, about="openbmb/UltraFeedback"
        ),
        Format(
            "distilabel", ("instruction", "generations", "ratings"), formats.parse_generations, about="argilla's lists"
        ),
        Format("nectar", ("prompt", "answers"), formats.parse_ranked_answers, about="berkeley-nest/Nectar"),
        Format(
            "helpsteer3-preference",
            ("context", "response1", "response2", "overall_preference"),
            formats.parse_helpsteer_preference,
            about="nvidia/HelpSteer3",
        ),
        Format(
            "helpsteer2-preference",
            ("prompt", "response_1", "response_2", "preference_strength"),
            formats.parse_helpsteer_preference,
            about="nvidia/HelpSteer2, preference",
        ),
        Format(
            "helpsteer2",
            ("prompt", "response", *formats.HELPSTEER),
            functools.partial(
                formats.parse_attributes, prompt="prompt", response="response", attributes=formats.HELPSTEER
            ),
            group=lambda row: row["prompt"],
            about="nvidia/HelpSteer2",
        ),
        Format(
            "unieval",
            ("source", "system_output", "scores"),
            functools.partial(
                formats.parse_attributes, prompt="source", response="system_output", attributes=None, scores="scores"
            ),
            group=lambda row: (row["source"], row.get("context")),
            about="UniEval's dialogues",
        ),
        Format("oasst-trees", ("message_tree_id", "prompt"), formats.parse_oasst_tree, about="Open Assistant exports"),
        Format(
            "oasst-messages",
            ("message_tree_id", "message_id", "parent_id", "text", "role", "rank"),
            formats.parse_oasst_messages,
            group=lambda row: row["message_tree_id"],
            about="OpenAssistant/oasst1, oasst2",
        ),
        Format(
            "llamafactory",
            ("conversations", "chosen", "rejected"),
            formats.parse_sharegpt_pair,
            about="LLaMA-Factory, ShareGPT style",
        ),
        Format(
            "llamafactory-alpaca",
            ("instruction", "chosen", "rejected"),
            formats.parse_alpaca_pair,
            about="LLaMA-Factory, Alpaca style",
        ),
        Format("pairs", ("chosen", "rejected"), _pairs.parse_pair, about="Anthropic/hh-rlhf, TRL preference"),
    )
}


def format_of(columns: Iterable[str]) -> Format | None:
    """Return the format that has these columns, or None."""
    have = set(columns)
    return next((entry for entry in FORMATS.values() if have.issuperset(entry.columns)), None)


def detect_format(columns: Iterable[str]) -> str:
    """Return the name of the format that has these columns.

    Raises:
        DataError: if none has; the message lists what each needs.
    """
    have = set(columns)
    if (entry := format_of(have)) is not None:
        return entry.name
    raise DataError(
        f"no known format has the columns {', '.join(sorted(have))}{_nearest_format(have)}. Rename columns, write "
        "mopl's own JSON lines, or pass format=...; the formats and the columns they need:\n" + _known_formats()
    )


def _nearest_format(have: set[str]) -> str:
    """Say which format lacks one column only, often a word that is misspelt; a prompt alone is in too many formats."""
    for entry in FORMATS.values():
        lacks = [column for column in entry.columns if column not in have]
        if len(lacks) == 1 and have.intersection(entry.columns) - {"prompt"}:
            return f"; nearest is {entry.name}, which needs {lacks[0]} too"
    return ""


def _known_formats() -> str:
    return ";\n".join(f"  {entry.name} ({entry.about}): {', '.join(entry.columns)}" for entry in FORMATS.values())


def load_preferences(
    source: str | Path | Sequence[str | Path] | Iterable[Row],
    *,
    format: str = "auto",
    objectives: Sequence[str] | None = None,
    on_error: OnError = "raise",
    split: str = "train",
    config: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    limit: int | None = None,
    **options: Any,
) -> PreferenceData:
    """Read preference data in any of `FORMATS`.

    Args:
        source: a file (.json, .jsonl, .parquet, .csv; JSON also with .gz), several files, a directory in the layout of
            the hub, the name of a data set on the hub, or rows (dictionaries, a `datasets.Dataset`). Files and
            directories are looked for first. JSON is read line by line with its line numbers and needs no library;
            everything else goes through `datasets`.
        format: the name of a format; "auto" tells it from the columns of the first row.
        objectives: which labels to take, and their order; default all, in the order of their first appearance.
        on_error: "raise" refuses data with rows that cannot be used, after all of them are counted; "skip" leaves them
            out, logs the counts as a warning and keeps them in `data.report`.
        split: split of a directory or of the hub.
        config: configuration of a directory or of the hub.
        data_dir: a folder of the directory or of the hub's data set (`"harmless-base"` of Anthropic/hh-rlhf).
        revision: of the hub's data set.
        cache_dir: where `datasets` keeps what it made.
        limit: read no more than this many rows.
        **options: of the format, for example `objective="helpful"` for pairs, `aspects=(...)` for UltraFeedback.

    Returns:
        The data, with `report`.

    Raises:
        DataError: if rows cannot be used (see `on_error`), no list is left, or the format cannot be told.
        FileNotFoundError: if a path does not exist.
        ValueError: if the format or an option is unknown.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format is {format!r} but must be 'auto' or one of\n{_known_formats()}")
    name, rows = _open(source, cache_dir, name=config, split=split, data_dir=data_dir, revision=revision)
    if limit is not None:
        rows = itertools.islice(rows, limit)
    report = ReadReport(name)
    drafts = _parse(rows, format, report, options)
    return collect(drafts, report, objectives=objectives, on_error=on_error)


# ---------------------------------------------------------------- rows


def _open(source: Any, cache_dir: Any, **hub: Any) -> tuple[str, Iterator[Placed]]:
    """Return a name for messages and (place, row or RowError) pairs."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_file():
            return path.name, _rows_of_file(path, cache_dir)
        if path.is_dir():
            hub.pop("revision")
            return path.name, _numbered(_load_dataset(str(path), cache_dir=cache_dir, **hub))
        # A hub name is "name" or "owner/name", without a file's ending.
        file = path.is_absolute() or path.suffix in (*_ENDINGS, ".txt")
        if isinstance(source, Path) or file or source.count("/") > 1:
            raise FileNotFoundError(f"there is no file or directory {source}")
        return source, _numbered(_from_hub(source, cache_dir=cache_dir, **hub))
    if isinstance(source, Sequence) and source and all(isinstance(entry, (str, Path)) for entry in source):
        paths = [Path(entry) for entry in source]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path}; several sources must all be files")
        placed = ((f"{path.name} {place}", row) for path in paths for place, row in _rows_of_file(path, cache_dir))
        return f"{len(paths)} files", placed
    if isinstance(source, Mapping):
        raise TypeError(f"source is a mapping with {', '.join(map(str, source))}; pass one of its values, or a list")
    return "rows", _numbered(source)


def _from_hub(source: str, *, cache_dir: Any, **options: Any) -> Any:
    library = _library()  # before the hub is asked

    def cached() -> bool:
        folder = cache_dir or library.config.HF_DATASETS_CACHE
        return (Path(folder) / source.replace("/", "___")).is_dir()

    find(source, "dataset", cached=cached)
    try:
        return _load_dataset(source, cache_dir=cache_dir, **options)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"there is no file or directory {source}, and no data set of that name could be loaded from the hub "
            f"({reason}); correct the name, or name a file"
        ) from error


_ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".gz")


def _numbered(rows: Iterable[Row]) -> Iterator[Placed]:
    if formats.is_table(rows):
        rows = map(formats.without_gaps, rows)
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _rows_of_file(path: Path, cache_dir: Any) -> Iterator[Placed]:
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind in (".json", ".jsonl", ".ndjson"):
        return rows_of_json(path)
    if kind in (".parquet", ".csv") and path.suffix == kind:
        if kind == ".csv":
            _check_text(path)
        rows = _load_dataset(kind[1:], data_files=[str(path)], split="train", cache_dir=cache_dir)
        return _numbered(rows)
    raise ValueError(f"{path.name} ends in {path.suffix!r} but must be {', '.join(_ENDINGS)}; prompts alone: mopl clp")


def _check_text(path: Path) -> None:
    """Raise if a table is no text, naming the line, which the library that reads it does not."""
    try:
        for _ in read_lines(path):
            pass
    except TextError as error:
        raise DataError(str(error)) from None


def rows_of_json(path: Path) -> Iterator[Placed]:
    """Yield the rows of a JSON file: of an array of records, or one record a line.

    Not through `datasets`: Arrow wants one schema for all rows, which trees and labels of different objectives do not
    have, and it forgets line numbers.

    Raises:
        DataError: if the file as a whole cannot be read.
    """
    try:
        first = True
        for number, line in byte_lines(path):
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"[") and not _is_of_lines(path):
                yield from _rows_of_array(path)
                return
            first = False
            yield f"line {number}", _row_of_line(line)
    except TextError as error:
        raise DataError(str(error)) from None


def _is_of_lines(path: Path) -> bool:
    """Return whether the first line of a file is a whole array by itself and others follow: then it is a bad row."""
    lines = (line for _, line in byte_lines(path) if line.strip())
    first, more = next(lines), next(lines, None)
    return more is not None and not isinstance(_row_of_line(first), RowError)


def _row_of_line(line: bytes) -> Any:
    try:
        text = decode(line)
    except TextError as error:
        return RowError("no UTF-8 text", str(error))
    try:
        return parse_json(text)
    except TextError as error:
        return RowError("not JSON", str(error))


def _rows_of_array(path: Path) -> Iterator[Placed]:
    text = read_text(path)
    try:
        for number, row in enumerate(json_array(text), 1):
            yield f"row {number}", RowError("not JSON", str(row)) if isinstance(row, TextError) else row
    except TextError as error:
        raise DataError(f"{path.name} is no JSON: {error}") from None


def _library() -> Any:
    require("datasets", what="data that is not a JSON file")
    import datasets

    return datasets


def _load_dataset(path: str, **options: Any) -> Any:
    options = {key: value for key, value in options.items() if value is not None}
    if "cache_dir" in options:
        options["cache_dir"] = str(options["cache_dir"])
    return _library().load_dataset(path, **options)


# ---------------------------------------------------------------- lists


def _parse(
    rows: Iterable[Placed], name: str, report: ReadReport, options: Mapping[str, Any]
) -> Iterator[tuple[str, PreferenceList | RowError]]:
    entry = None if name == "auto" else FORMATS[name]
    waiting: list[Row] = []
    strange: DataError | None = None
    place, key = "", None

    def flush() -> Iterator[tuple[str, PreferenceList | RowError]]:
        if waiting and entry is not None:
            yield from ((place, draft) for draft in _drafts(entry, waiting, options))
            waiting.clear()

    for where, row in rows:
        report.rows += 1
        if not isinstance(row, (Mapping, RowError)):
            row = RowError("wrong type", f"it is a {type(row).__name__} but must be a record")
        if entry is None and isinstance(row, Mapping):
            try:
                entry = FORMATS[detect_format(row)]
            except DataError as error:
                strange = strange or error
                row = RowError("unknown columns", f"no known format has {', '.join(map(str, row)) or 'none'}")
        if isinstance(row, Mapping) and entry is not None:
            absent = [column for column in entry.columns if column not in row]
            if absent:
                row = RowError(
                    "missing column", f"{entry.name} needs {', '.join(absent)}; it has {', '.join(map(str, row))}"
                )
        if isinstance(row, Mapping):
            row = formats.unread_column(row) or row
        if isinstance(row, RowError):
            yield from flush()
            yield where, row
            continue
        assert entry is not None
        try:
            new_key = entry.group(row) if entry.group is not None else None
            begins = entry.group is None or not waiting or new_key != key
        except _OTHER_SHAPE as error:
            yield from flush()
            yield where, _other_shape(entry, error)
            continue
        if begins:
            yield from flush()
            place, key = where, new_key
        waiting.append(row)
    yield from flush()
    if entry is None and strange is not None:
        raise strange


@functools.cache
def _options_of(entry: Format) -> tuple[str, ...]:
    return tuple(inspect.signature(entry.parse).parameters)[1:]


def _drafts(entry: Format, rows: Sequence[Row], options: Mapping[str, Any]) -> Iterator[PreferenceList | RowError]:
    known = _options_of(entry)
    if unknown := sorted(set(options) - set(known)):
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"format {entry.name} has no option {', '.join(unknown)}; {has}")
    try:
        yield from entry.parse(rows[0] if entry.group is None else rows, **options)
    except RowError as error:
        yield error
    except _OTHER_SHAPE as error:
        yield _other_shape(entry, error)


# What a record of another shape, or one that is nested without end, makes a format's reader do.
_OTHER_SHAPE = (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError)


def _other_shape(entry: Format, error: Exception) -> RowError:
    """Return the error of a row inside which something has another shape: what matters is which row it is."""
    return RowError("wrong structure", f"not a row of {entry.name} ({type(error).__name__}: {error})")
