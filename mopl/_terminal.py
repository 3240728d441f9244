"""The one way out to a terminal: what is shown, in which characters, and what happens when nobody reads it.

Names, prompts, answers and texts in errors come from data, and data may hold escape sequences that rewrite a terminal.
`terminal()` puts the standard streams behind a stream that escapes control characters, so that a `print` anywhere in
a command, or in a library below it, cannot forget to; `say` also keeps a name from starting a line of its own.
A stream that is closed, full or read by nobody never ends the work: what it lost is known at the end.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import os
import re
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mopl._extras import require

# C0, DEL and C1 steer a terminal; overrides and isolates of direction reorder what is read; U+2028 and U+2029 break
# lines; surrogates cannot be written at all.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOUR = re.compile(r"(\x1b\[[\d;]*m)")
# What mopl itself prints, in ASCII; everything else that a stream cannot hold is shown by its number.
_SPELLING = {
    "α": "alpha", "β": "beta", "ε": "epsilon", "λ": "lambda", "π": "pi", "±": "+/-", "×": "x", "↑": "^", "↓": "v",
    "→": "->", "≤": "<=", "≥": ">=", "–": "-", "—": "-", "−": "-", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"',
    "·": "-", "\xa0": " ", "‖": "||", "∞": "inf",
}  # fmt: skip
_SECONDS_BETWEEN_LINES = 30.0


def printable(text: object, keep: str = "\n\t") -> str:
    r"""Return text with control characters escaped as in Python, `\x1b`, but for those of `keep`: "" for one line."""
    return _CONTROL.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), str(text))


def one_line(text: str) -> str:
    """Return a message of several lines as one."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return " ".join([*(line if line[-1] in ":;,.!?" else f"{line};" for line in lines[:-1]), *lines[-1:]])


def spelled(text: str, encoding: str | None) -> str:
    r"""Return text with what an encoding cannot hold spelled in ASCII: "beta" for β, `\u6771` for what has no name."""
    try:
        text.encode(encoding or "utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode(encoding or "utf-8", "mopl.spelled").decode(encoding or "utf-8")


def _spell(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    return "".join(_SPELLING.get(c) or c.encode("unicode_escape").decode() for c in found), error.end


codecs.register_error("mopl.spelled", _spell)


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print each argument on a line of its own, control characters and line ends escaped; none prints an empty line."""
    stream = sys.stdout if file is None else file
    if stream is None:  # closed before Python started
        return
    text = "".join(f"{printable(line, keep='')}\n" for line in lines or ("",))
    stream.write(spelled(text, getattr(stream, "encoding", None)))
    stream.flush()


def json_line(value: object) -> str:
    """Return JSON on one line that a program reads as it was, and that is safe and, where possible, readable here."""
    text = json_escaped(json.dumps(value, ensure_ascii=False))
    encoding = getattr(sys.stdout, "encoding", None)
    return text if spelled(text, encoding) == text else json.dumps(value)


def json_escaped(text: str) -> str:
    """Return JSON without indentation with control characters written as JSON escapes."""
    return _CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def shell(*words: object) -> str:
    """Return words as a command line that a POSIX shell reads as these words, control characters escaped.

    A `Path` that begins with a dash gets "./" before it, so that no command takes it for an option.
    """
    return " ".join(_quoted(f"./{w}" if isinstance(w, Path) and str(w).startswith("-") else str(w)) for w in words)


def _quoted(word: str) -> str:
    if not _CONTROL.search(word):
        return shlex.quote(word)

    def number(match: re.Match[str]) -> str:
        code = ord(match[0])
        # A byte of a file's name that is no text, as `os.fsdecode` gives it.
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"

    return "$'" + _CONTROL.sub(number, word.replace("\\", r"\\").replace("'", r"\'")) + "'"


# ---------------------------------------------------------------- the streams of a command


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal; what is closed, None, or a writer that knows no such question is none."""
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        return False


class Stream:
    """A text stream that escapes control characters, writes in what characters there are, and never raises.

    Args:
        stream: What is written to.
        colour: Keep colours: for a writer that escapes its texts itself.
        bars: Keep what progress bars need to redraw their line, on a terminal; drop the colours of other libraries.
    """

    def __init__(self, stream: Any, *, colour: bool = False, bars: bool = False) -> None:
        self._stream, self._colour, self._bars = stream, colour, bars
        self._losses: list[Exception] = []

    @property
    def lost(self) -> Exception | None:
        """Why something could first not be written; None where all was."""
        return self._losses[0] if self._losses else None

    def write(self, text: str) -> int:
        """Write text; what cannot be written is lost, and `lost` says why."""
        self._try(lambda: self._stream.write(spelled(self._escaped(text), self.encoding)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        """Return whether this is a terminal; a closed stream is none."""
        return is_terminal(self._stream)

    @property
    def encoding(self) -> str | None:
        """The characters that it can hold."""
        return getattr(self._stream, "encoding", None)

    def in_colour(self) -> Stream:
        """Return the same stream for a writer that escapes its texts itself and adds colours."""
        other = Stream(self._stream, colour=True)
        other._losses = self._losses
        return other

    def close_if_lost(self) -> None:
        """Flush; point a stream that lost something nowhere, or Python would complain again at its own end."""
        self.flush()
        if self.lost is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not getattr(self._stream, "closed", False):
                raise
            self._losses.append(error) if not self._losses else None

    def _escaped(self, text: str) -> str:
        if self._colour:
            return "".join(p if _COLOUR.fullmatch(p) else printable(p) for p in _COLOUR.split(text))
        if not self._bars:
            return printable(text)
        if self.isatty():
            if text == "\x1b[A":
                return text
            start, end = text.startswith("\r"), len(text) > 1 and text.endswith("\r")
            inner = text[start : len(text) - end]
            return "\r" * start + printable(_COLOUR.sub("", inner)) + "\r" * end
        return printable(_COLOUR.sub("", text))


@contextlib.contextmanager
def terminal() -> Iterator[Stream]:
    """Give a command safe standard streams, and its warnings and log one line each; yields standard output.

    Progress bars of other libraries, which fill a log, are only shown on a terminal that can redraw a line.
    """
    _open_closed_streams()
    before = sys.stdout, sys.stderr, warnings.formatwarning
    out, err = Stream(sys.stdout), Stream(sys.stderr, bars=True)
    log, handler = logging.getLogger("mopl"), _LogLine()
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    warnings.formatwarning = _warning
    log.addHandler(handler)
    try:
        with contextlib.nullcontext() if bars_wanted() else _no_bars():
            yield out
    finally:
        log.removeHandler(handler)
        out.close_if_lost()
        if out.lost is not None and not isinstance(out.lost, BrokenPipeError):
            say(f"mopl: not all of the output could be written: {out.lost}", file=err)  # type: ignore[arg-type]
        err.close_if_lost()
        sys.stdout, sys.stderr, warnings.formatwarning = before


def _open_closed_streams() -> None:
    """Point standard streams that are closed nowhere.

    Otherwise the next file that is opened gets their number, and a library that complains on "standard error" writes
    into a checkpoint.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _warning(message: Warning | str, category: type[Warning], *_: object) -> str:
    return f"mopl: {category.__name__}: {printable(one_line(str(message)), keep='')}\n"


class _LogLine(logging.Handler):
    """Writes what mopl logs as a line on standard error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        say(f"mopl: {one_line(record.getMessage())}", file=sys.stderr)


_BAR_SWITCHES = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    given = {name: os.environ.get(name) for name in _BAR_SWITCHES}
    os.environ.update(dict.fromkeys(_BAR_SWITCHES, "1"))
    try:
        yield
    finally:
        for name, value in given.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def exit_status(status: int, out: Stream, *, output_is_the_result: bool) -> int:
    """Return the exit status of a command whose output may have been lost.

    A command that trains has done its work though nobody reads about it. One that prints its result has not: 141 after
    a closed pipe, as of any tool that the shell ends there, and 2 otherwise.
    """
    if status or out.lost is None or not output_is_the_result:
        return status
    return 141 if isinstance(out.lost, BrokenPipeError) else 2


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error as Python does, with control characters escaped: a `sys.excepthook`."""
    if sys.stderr is not None:
        Stream(sys.stderr).write("".join(traceback.format_exception(kind, error, trace)))


# ---------------------------------------------------------------- long work


_QUIET = False  # whether progress is left out, see `quietly`


@contextlib.contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Show no progress inside the block, for `--quiet`; False changes nothing."""
    global _QUIET
    before, _QUIET = _QUIET, _QUIET or quiet
    try:
        with _no_bars() if quiet else contextlib.nullcontext():
            yield
    finally:
        _QUIET = before


def bars_wanted() -> bool:
    """Return whether standard error is a terminal that can redraw a line."""
    return is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """Return a time in words, as exact as an estimate is: "40 seconds", "3 minutes", "2.5 hours"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class Progress:
    """Told how far long work is: a bar on a terminal, else a line now and then; nothing where `show` is False."""

    def __init__(self, name: str, total: int, unit: str, *, start: int = 0, bar: Any = None, show: bool = True) -> None:
        self.name, self.total, self.unit, self._bar, self._show = name, total, unit, bar, show
        self.done = self._start = start
        self._began = self._told = time.monotonic()
        self._estimated = False  # whether a first line has said how long it will take

    def update(self, count: int, **figures: float) -> None:
        """Tell that `count` more are done, and figures to show."""
        self.done += count
        if not self._show:
            return
        if self._bar is not None:
            if figures:
                self._bar.set_postfix({name: f"{x:.4f}" for name, x in figures.items()}, refresh=False)
            self._bar.update(count)
        elif (now := time.monotonic()) - self._told >= _SECONDS_BETWEEN_LINES / (1 if self._estimated else 6):
            self._told, self._estimated = now, True  # a first estimate soon, then a line now and then
            spent = now - self._began
            left = spent / max(self.done - self._start, 1) * (self.total - self.done)
            shown = "".join(f", {name} {x:.4f}" for name, x in figures.items())
            how_far = f"{self.done:,} of {self.total:,} {self.unit}"
            rest = f", about {left:.0f} s left" if self.done < self.total else ""
            say(f"{self.name}: {how_far}{shown}, {spent:.0f} s{rest}", file=sys.stderr)


@contextlib.contextmanager
def progress(name: str, total: int, unit: str, *, start: int = 0, show: bool = True) -> Iterator[Progress]:
    """Show on standard error how far long work is: of `total` units, named in the plural or "B" for bytes.

    `start` of them were done before; `show=False` shows nothing, for all processes but one.
    """
    show = show and not _QUIET
    if not (show and bars_wanted()):
        yield Progress(name, total, unit, start=start, show=show and sys.stderr is not None)
        return
    require("tqdm")
    from tqdm import tqdm

    with tqdm(
        total=total, initial=start, desc=printable(name, keep=""), unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B", dynamic_ncols=True, leave=False,
    ) as bar:  # fmt: skip
        yield Progress(name, total, unit, start=start, bar=bar)
