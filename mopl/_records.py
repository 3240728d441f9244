"""One validated reader for the files that a run, a saved model, a checkpoint or a cache consists of.

A file that was written by this package may come back as anything: cut off, swapped with another one, edited by hand,
received from somebody. So what is read is bounded first (a regular file of a size, JSON of a depth), then compared with
a schema, and whatever does not fit is one `DamagedFile` that names file and key. Schemas are dataclasses and structs,
checked by msgspec: it takes the dataclasses of settings as they are and has no dependencies, where pydantic would bring
a compiled core of its own and turn `"3"` into 3.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from mopl import _lines
from mopl._lines import TextError, texts_inside
from mopl._renamed import up_to_date

MOST_BYTES = 256 << 20  # of a JSON file: thousands of answers at thousands of trade-offs are less
REMEDY = "the file is damaged: take it from a backup, or make it again by starting another run"

T = TypeVar("T")
Finite = Annotated[float, msgspec.Meta(ge=-1.7976931348623157e308, le=1.7976931348623157e308)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Kind(msgspec.Struct):
    """What `model.json` and `mopl.json` say of every model."""

    kind: str | None = None


class DamagedFile(ValueError):
    """A file is not what this package writes; the message names file, key, what is there and what should be."""


def damaged(file: str | os.PathLike[str], what: str, remedy: str = REMEDY) -> DamagedFile:
    """Return the error that a file cannot be used."""
    return DamagedFile(f"{os.fspath(file)}: {what}; {remedy}")


def check_file(file: str | os.PathLike[str], *, most: int | None = None, remedy: str = REMEDY) -> Path:
    """Return the path of a file that can be read as a whole; nothing of it is read, so nothing can block.

    Raises:
        FileNotFoundError: If nothing is there.
        DamagedFile: If it is a folder, a pipe or a device, or has more than `most` bytes.
    """
    file = Path(file)
    try:
        status = file.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing; {remedy}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise damaged(file, f"it is {kind} but must be a file", remedy)
    if most is not None and status.st_size > most:
        raise damaged(file, f"it has {status.st_size >> 20:,} MB but must have at most {most >> 20:,}", remedy)
    return file


def read_text(file: str | os.PathLike[str], *, most: int = MOST_BYTES, remedy: str = REMEDY) -> str:
    """Return a file of UTF-8 text, with or without a byte order mark; errors as `check_file`."""
    file = check_file(file, most=most, remedy=remedy)
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise damaged(file, f"it is not UTF-8 text ({error.reason} at byte {error.start})", remedy) from None


def parse_json(text: str) -> Any:
    """Return what JSON text says. NaN and Infinity are read, as Python writes them; schemas say where they may be.

    Raises:
        ValueError: If it is not JSON, a key stands twice in an object, or it is nested more than 100 deep.
    """
    try:
        value = _lines.parse_json(text)
    except TextError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    try:
        deque(texts_inside(value), maxlen=0)
    except TextError as error:
        raise ValueError(f"it {error}") from None
    return value


def read_json(
    file: str | os.PathLike[str], schema: Any = dict[str, Any], *, most: int = MOST_BYTES, remedy: str = REMEDY
) -> Any:
    """Return what a JSON file holds, as plain values, once it fits a schema; errors as `check_file` and `check`."""
    text = read_text(file, most=most, remedy=remedy)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise damaged(file, str(error), remedy) from None
    return check(value, schema, file, remedy=remedy)


def check(value: Any, schema: Any, file: str | os.PathLike[str], key: str = "", *, remedy: str = REMEDY) -> Any:
    """Return plain values that were read from a file, at a key in it, as they are, once they fit a schema.

    That is a `msgspec.Struct`, or a dict or list of such; keys that it does not have are let through.
    """
    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise damaged(file, in_words(error, value, key), remedy) from None
    return value


def settings_from(
    schema: type[T], values: Any, file: str | os.PathLike[str] | None = None, key: str = "", *, remedy: str = REMEDY
) -> T:
    """Make a dataclass of settings from plain values by name.

    What is missing takes its default, or what the dataclass's `WHERE_MISSING` says that it meant when there was no such
    setting. Its annotations are the types, its `__post_init__` checks the rest.

    Raises:
        ValueError: If a setting is unknown, has another type or is refused; a `DamagedFile` where they are from a file.
    """
    recorded, old_names = values, getattr(schema, "old_names", dict)()
    values = up_to_date(recorded, old_names)
    known = {field.name for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    try:
        if isinstance(values, Mapping) and (unknown := sorted(set(values) - known)):
            names = ", ".join(map(str, unknown[:5]))
            raise ValueError(f"the run has unknown settings {names}; was it made by another version?")
        before = getattr(schema, "WHERE_MISSING", None)
        return msgspec.convert({**before, **values} if before and isinstance(values, Mapping) else values, schema)
    except msgspec.ValidationError as error:
        # What __post_init__ raised is said already as it should be.
        text = str(error.__cause__) if error.__cause__ is not None else in_words(error, values, key)
        if file is None:
            raise ValueError(text) from None
        there = recorded.keys() if isinstance(recorded, Mapping) else ()
        for old, name in old_names.items():  # who mends the file looks for the key that it has
            if old in there and name not in there and re.search(rf"\b{name}\b", text):
                text += f" ({name} is called {old} there)"
        raise damaged(file, text, remedy) from None
    except ValueError as error:
        raise error if file is None else damaged(file, str(error), remedy) from None


def in_words(error: msgspec.ValidationError, value: Any, key: str) -> str:
    """Return what msgspec found, with the key, what is there and what should be."""
    what, _, where = str(error).partition(" - at `$")
    steps = re.findall(r"\.([^.\[\]`]+)|\[(\d+|\.\.\.)\]", where)
    for name, place in steps:
        if place == "...":  # a key of a dictionary, which msgspec does not tell
            value = _MISSING
        elif value is not _MISSING:
            try:
                value = value[int(place)] if place else value[name]
            except (LookupError, TypeError):
                value = _MISSING
    path = key + where.rstrip("`") if key else where.rstrip("`").lstrip(".")
    path = path.replace("[...]", ".*") or "it"
    if found := re.fullmatch(r"Object missing required field `(.*)`", what):
        return f"{path + '.' if path != 'it' else ''}{found[1]} is missing"
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", what):
        return f"{path + '.' if path != 'it' else ''}{found[1]} is not known; leave it out"
    if what.startswith("Invalid enum value"):
        return f"{path} is {_short(value)}, which is none of its values"
    if what == "Number out of range":
        return f"{path} is {_short(value)} but must be a number that 64 bits hold"
    wanted = re.sub(r"^Expected |, got .*$|`", "", what)
    wanted = f"be {wanted}" if what.startswith("Expected ") else f"be right ({what})"
    return f"{path} is {_short(value)} but must {wanted}"


_MISSING = object()


def _short(value: Any) -> str:
    """Return a value in few characters."""
    if value is _MISSING:
        return "something else"
    if isinstance(value, (dict, list, tuple)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "null" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
