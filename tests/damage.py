"""Ways in which a file of a run can be damaged, and what a command may do about it."""

import contextlib
import functools
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mopl import cli

DEEP = "[" * 100_000
# What stands where something else belongs; the last ones are numbers that no setting may have.
OTHERS: list[Any] = [None, [], {}, "x", 1, -1, 0.5, True, [None], {"x": None}, [[1]], 10**9, 10**18, 10**400]
CONSTANTS = ["NaN", "Infinity", "-Infinity"]
# A command makes the parser of all commands, and another one to word its error, which takes most of the
# time in which it finds a damaged file. Here there is one.
parser_of_all = functools.cache(cli.build_parser)


def main(command: list[str]) -> int:
    with mock.patch.object(cli, "build_parser", parser_of_all):
        return cli.main(command)


def whole(text: bytes) -> dict[str, bytes]:
    """Return files that are something else from the first byte on, by what was done."""
    return {
        "empty": b"", "half": text[: len(text) // 2], "almost": text.rstrip()[:-1], "null": b"null", "list": b"[]",
        "object": b"{}", "string": b'"x"', "number": b"1", "huge": b"1" * 10_000, "deep": DEEP.encode(),
        "deep object": b'{"a":' * 100_000, "closed": b"[" * 500 + b"]" * 500, "random": bytes(range(256)) * 4,
        "utf-16": text.decode("utf-8", "replace").encode("utf-16"), "latin-1": b'{"\xe9": 1}', "nul": b"\0" * 100,
    }  # fmt: skip


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where every value of nested objects and lists is; of long lists the first two and the last."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*path, key))
    elif isinstance(value, list):
        for i in sorted({0, 1, len(value) - 1} & set(range(len(value)))):
            yield from paths(value[i], (*path, i))


def changed(text: str, path: tuple[Any, ...], new: Any = None, *, remove: bool = False) -> str:
    """Return JSON with one value replaced (by plain values, or the name of a constant) or removed."""
    content = json.loads(text)
    place = content
    for step in path[:-1]:
        place = place[step]
    if remove:
        del place[path[-1]]
    elif new in CONSTANTS:
        place[path[-1]] = float(new.lower().replace("infinity", "inf"))
    else:
        place[path[-1]] = new
    return json.dumps(content)


def run(command: list[str], seconds: int = 20) -> tuple[int, str]:
    """Run a command of mopl in this process; return its exit status and what it said on stderr.

    Raises:
        TimeoutError: If it takes too long.
    """
    said = io.StringIO()

    def late(*_: object) -> None:
        raise TimeoutError(f"mopl {' '.join(command)} hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = main(command)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return status, said.getvalue()


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on stderr of a command that fails with status 2."""
    try:
        status = main(command)
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def complaint(command: list[str], file: Path, *, named: bool = True) -> str | None:
    """Return what is wrong with how a command takes a damaged file: it must work, or name the file in one line.

    Args:
        command: The command.
        file: The damaged file.
        named: Whether the file is damaged for sure, so that an error has to name it.
    """
    status, said = run(command)
    if status == 0:
        return None
    lines = [line for line in said.splitlines() if line.startswith("mopl")]
    if status != 2 or len(lines) != 1 or not said.rstrip().endswith(lines[0]):
        return f"status {status}: {said[-300:]!r}"
    text = lines[0].split(": ", 1)[1]
    if text.split(":")[0].endswith(("Error", "Exception")) or "Traceback" in text:
        return text[:300]
    return f"does not name the file: {text[:300]}" if named and str(file) not in text else None


@contextlib.contextmanager
def replaced(file: Path, content: bytes | str | None) -> Iterator[None]:
    """Put something else into a file inside a `with` block; None takes it away."""
    before = file.read_bytes()
    try:
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        yield
    finally:
        if file.is_dir():
            file.rmdir()
        elif file.exists() or file.is_symlink():
            file.unlink()
        file.write_bytes(before)


def fifo(file: Path) -> None:
    """Make a pipe out of a file."""
    file.unlink()
    os.mkfifo(file)
