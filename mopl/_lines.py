r"""Text from files, for every reader: prompts, preference data, LETOR files, labels, sizes of groups.

* Text is UTF-8. A byte order mark at the start of a file belongs to no line. UTF-16 and binary files are refused.
* A line ends at `\n` or `\r\n`, and nowhere else. U+2028, U+2029, U+0085, form feeds, vertical tabs and a lone `\r` are
  characters of the line, as in JSON and in SVMlight files: `str.splitlines` would cut texts in two there. What ends a
  file is a line too, without a `\r` before the end.
* Names in .gz and .bz2 are decompressed.
* JSON is read strictly where a lenient reader would guess: a key that stands twice in an object is a fault.

Imports nothing but the standard library.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_WHITESPACE = re.compile(r"[ \t\n\r]*")  # of JSON
# Far beyond chat messages with tool calls, and far below where Python's own recursion ends.
DEEPEST = 100


class TextError(ValueError):
    """What was read is no text, or no JSON; the message says why and what to do."""


@contextlib.contextmanager
def open_bytes(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a text file behind its byte order mark, decompressing by its name; it must be one that can be read again.

    Yields:
        The file as it lies on the disk, whose position tells the progress, and the stream of its text.

    Raises:
        TextError: If it is UTF-16, or compressed data ends early or is damaged, here or in the `with` block.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        raw: Any = stack.enter_context(path.open("rb"))
        stream: Any = raw
        if path.suffix == ".gz":
            stream = stack.enter_context(gzip.GzipFile(fileobj=raw))
        elif path.suffix == ".bz2":
            stream = stack.enter_context(bz2.BZ2File(raw))
        try:
            start = stream.read(len(BOM))
            if start[:2] in _UTF16:
                raise TextError(f"{path} is no UTF-8 text but begins like UTF-16; save it as UTF-8")
            if start != BOM:
                stream.seek(0)
            yield raw, stream
        except (EOFError, zlib.error, OSError) as error:
            # A file that is damaged inside has no number of the system; one that cannot be read has.
            if stream is raw or (isinstance(error, OSError) and error.errno is not None):
                raise
            kind = "gzip" if path.suffix == ".gz" else "bzip2"
            raise TextError(
                f"{path}: the compressed file ends early or is damaged, or is no {kind} ({error}); fetch it again"
            ) from error


def byte_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers from 1, without their ends, before they are decoded."""
    with open_bytes(path) as (_, stream):
        for number, line in enumerate(stream, 1):
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yield what `byte_lines` does as text, or raise a `TextError` that names file and line."""
    for number, line in byte_lines(path):
        try:
            yield number, decode(line)
        except TextError as error:
            raise TextError(f"{path}:{number}: {error}") from None


def read_text(path: str | os.PathLike[str]) -> str:
    r"""Return the whole text of a file, its lines ended by `\n`; errors as `read_lines`."""
    return "\n".join(line for _, line in read_lines(path))


def decode(line: bytes) -> str:
    """Return a line, or any bytes, as text; a `TextError` if they are no UTF-8, or have NUL bytes, as no text has."""
    if b"\0" in line:
        raise TextError("it holds a NUL byte, as UTF-16 and binary files do; save the file as UTF-8")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"its byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; save the file as UTF-8 "
            "(iconv -f LATIN1 -t UTF-8 if it is Latin-1)"
        ) from None


def lone_surrogate(text: str) -> str | None:
    r"""Say where a text has half of a surrogate pair, which no UTF-8 text has; None if it has none.

    JSON's escapes allow it (`"\ud83d"`), and arguments of a command have it in place of bytes that are not UTF-8.
    """
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        was = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half a character"
        return f"holds U+{code:04X} at character {error.start + 1}: {was}"
    return None


def text_fault(value: Any) -> str | None:
    """Say what keeps a value, a text or records of texts, from being written as UTF-8 JSON; None if nothing does."""
    try:
        return next(filter(None, map(lone_surrogate, texts_inside(value))), None)
    except TextError as error:
        return str(error)


def texts_inside(value: Any) -> Iterator[str]:
    """Yield every text in a value, names of keys among them; a `TextError` where it is nested more than 100 deep."""
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, str):
            yield part
        elif depth > DEEPEST:
            raise TextError(f"is nested more than {DEEPEST} deep")
        elif isinstance(part, Mapping):
            waiting += ((inner, depth + 1) for item in part.items() for inner in item)
        elif isinstance(part, (list, tuple)):
            waiting += ((inner, depth + 1) for inner in part)


def texts_of_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the texts that a command was given, where `-` stands for the standard input; each must be UTF-8."""
    texts = []
    for number, text in enumerate(arguments):
        text = _standard_input() if text == "-" else text
        if fault := lone_surrogate(text):
            raise TextError(f"prompt {number} {fault}; write it in UTF-8")
        texts.append(text)
    return texts


def _standard_input() -> str:
    """Return the text of the standard input, in UTF-8 whatever the terminal's encoding is."""
    nothing = "a prompt is to be read from the standard input, which is closed or empty; write it as an argument"
    if sys.stdin is None:
        raise TextError(nothing)
    stream = getattr(sys.stdin, "buffer", None)
    try:
        text = sys.stdin.read() if stream is None else decode(stream.read().removeprefix(BOM))
    except TextError as error:
        raise TextError(f"the standard input is no UTF-8 text: {error}") from None
    if not text.strip():
        raise TextError(nothing)
    return text.replace("\r\n", "\n").strip()


# ---------------------------------------------------------------- JSON


class _Decoder(json.JSONDecoder):
    """Python's decoder, which also notes a key that stands twice in an object: nobody knows which value was meant."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.twice: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            keys = [key for key, _ in pairs]
            self.twice = next(key for key in keys if keys.count(key) > 1)
        return record

    def value(self, text: str, start: int = 0) -> tuple[Any, int]:
        """Return the value that begins at `start`, or a `TextError` where a key stands twice; and where it ends."""
        self.twice = None
        try:
            found, end = self.raw_decode(text, _skip(text, start))
        except RecursionError:
            raise TextError("it is nested too deeply") from None
        except ValueError as error:  # no JSON, or a whole number of thousands of digits
            raise TextError(str(error)) from None
        if self.twice is not None:
            found = TextError(f"the key {self.twice!r} stands twice in one object; leave one of them")
        return found, _skip(text, end)


def _skip(text: str, place: int) -> int:
    return _WHITESPACE.match(text, place).end()  # type: ignore[union-attr]  # of no characters, perhaps


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; a `TextError` if it is none, or cannot be read without a guess."""
    found, end = _Decoder().value(text)
    if end < len(text):
        raise TextError(f"there is more after its end, at character {end + 1}")
    if isinstance(found, TextError):
        raise found
    return found


def json_array(text: str) -> Iterator[Any]:
    """Yield the elements of a JSON text that is an array; a `TextError` for one in which a key stands twice.

    Raises:
        TextError: If it is no array, once the elements before the fault are given out.
    """
    decoder = _Decoder()
    place = _skip(text, 0)
    first = _skip(text, place + 1)
    more = text.startswith("[", place) and not text.startswith("]", first)
    place = place if more or not text.startswith("[", place) else first
    while more:
        element, place = decoder.value(text, place + 1)
        yield element
        more = text.startswith(",", place)
    if not text.startswith("]", place) or _skip(text, place + 1) < len(text):
        raise TextError(f"the array does not end as one, at line {text.count(chr(10), 0, place) + 1}")
