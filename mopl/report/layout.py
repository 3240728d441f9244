"""The table of methods as plain text: columns that line up whatever the names hold, in the width of a terminal."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import unicodedata
from collections.abc import Sequence

from mopl.report.records import clean


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure: the value as printed, what stands behind it (± or an interval), and whether it is the column's best."""

    value: str
    detail: str = ""
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Summary:
    """The table of methods before any layout."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    note: str
    anchors: tuple[str, ...] = ()  # of the definition of what each column but the first holds


def width(text: str) -> int:
    """Return the number of terminal columns that text takes: 2 for wide characters, 0 for combining ones."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in clean(text)
    )


def _pad(text: str, to: int, left: bool = False) -> str:
    space = " " * (to - width(text))
    return space + text if left else text + space


def aligned(header: str, cells: Sequence[Cell]) -> tuple[str, list[tuple[str, str]]]:
    """Return a column's header and (value, detail) pairs, padded: values and details stand below each other."""
    values = max(width(cell.value) for cell in cells)
    details = max(width(cell.detail) for cell in cells)
    marks = any(cell.best for cell in cells)
    total = max(width(header), values + marks + bool(details) + details)
    values = total - details - bool(details) - marks
    pairs = [
        (
            _pad(cell.value, values, left=True) + ("*" if cell.best else " " * marks),
            " " * bool(details) + _pad(cell.detail, details),
        )
        for cell in cells
    ]
    return _pad(header, total, left=True), pairs


def columns_of(summary: Summary) -> list[list[Cell]]:
    """Return the cells of each column but the first, which holds the names."""
    return [list(column) for column in zip(*(cells for _, cells in summary.rows), strict=True)]


def as_text(summary: Summary, columns: int = 80) -> str:
    """Return the table as aligned plain text without ANSI codes or trailing blanks, at most `columns` wide.

    Where it would be wider, details move below their values; where that is still too wide, the columns are parted into
    several tables. Only a single column with long names may exceed the width: nothing is cut.
    """
    names = [name for name, _ in summary.rows]
    wide = [_text_column([summary.headers[0]], [[name] for name in names], left=True)]
    for header, cells in zip(summary.headers[1:], columns_of(summary), strict=True):
        title, pairs = aligned(header, cells)
        wide.append(_text_column([title], [[value + detail] for value, detail in pairs], left=True))
    if _text_width(wide) <= columns:
        blocks, gap = [wide], 2
    else:
        narrow = []
        for header, cells in zip(summary.headers[1:], columns_of(summary), strict=True):
            marks = any(cell.best for cell in cells)
            rows = [[cell.value + ("*" if cell.best else " " * marks), cell.detail] for cell in cells]
            details = any(cell.detail for cell in cells)
            room = max(12, *(width(line) for row in rows for line in row))
            unbroken = re.sub(" ([↑↓^v])$", "\N{NO-BREAK SPACE}\\1", header)  # an arrow alone on a line says little
            title = _wrapped(unbroken, room)
            narrow.append(_text_column(title, [row[: 1 + details] for row in rows]))
        first = _text_column([summary.headers[0]], [[name] for name in names], left=True)
        gap = 2 if _text_width([first, *narrow]) <= columns else 1
        blocks = []
        for column in narrow:
            if blocks and _text_width([*blocks[-1], column], gap) <= columns:
                blocks[-1].append(column)
            else:
                blocks.append([first, column])
    notes = [line for paragraph in summary.note.split("\n") for line in _wrapped(paragraph, columns)]
    return "\n".join([*("\n".join([*_joined(block, gap), ""]) for block in blocks), *notes]) + "\n"


def _wrapped(text: str, room: int) -> list[str]:
    text = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _text_column(title: list[str], rows: list[list[str]], left: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return the lines of a column's title and rows, padded to one width."""
    widest = max(width(line) for lines in (title, *rows) for line in lines)
    return [_pad(line, widest, not left) for line in title], [
        [_pad(line, widest, not left) for line in lines] for lines in rows
    ]


def _text_width(block: Sequence[tuple[list[str], list[list[str]]]], gap: int = 2) -> int:
    return sum(width(title[0]) for title, _ in block) + gap * (len(block) - 1)


def _joined(block: Sequence[tuple[list[str], list[list[str]]]], gap: int) -> list[str]:
    """Return the lines of columns beside each other: titles end on one line, rows begin on one."""

    def beside(parts: Sequence[list[str]], height: int, bottom: bool = False) -> list[str]:
        filled = []
        for part in parts:
            blank = [" " * width(part[0])] * (height - len(part))
            filled.append([*blank, *part] if bottom else [*part, *blank])
        return [(" " * gap).join(line).rstrip() for line in zip(*filled, strict=True)]

    titles, columns = [title for title, _ in block], [rows for _, rows in block]
    lines = beside(titles, max(map(len, titles)), bottom=True)
    lines.append((" " * gap).join("-" * width(title[0]) for title in titles))
    for row in zip(*columns, strict=True):
        lines += [line for line in beside(row, max(map(len, row))) if line]  # details that no column has
    return lines
