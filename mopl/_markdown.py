"""Text of others as Markdown that shows it as it is, and tables of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mopl._terminal import printable

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$&!])")


def escaped(text: object) -> str:
    """Return text in one line, in which nothing is markup, HTML or a part of a table."""
    return _SPECIAL.sub(r"\\\1", " ".join(printable(text, keep="\n\t").split()))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Return a table of GitHub's Markdown; cells are markup already.

    Args:
        headers: Of the columns.
        rows: A cell for each column.
        numbers: Whether all columns but the first are set to the right.
    """
    line = ["---", *(["---:" if numbers else "---"] * (len(headers) - 1))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, line, *rows))
