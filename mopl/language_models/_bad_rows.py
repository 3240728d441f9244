"""Rows of data that cannot be used: what one is called, how they are counted, and whether they end the reading."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mopl._arguments import check_choice
from mopl._counted import counted

logger = logging.getLogger("mopl.language_models.data")

OnError = Literal["raise", "skip"]
ON_ERROR = ("raise", "skip")
SHOWN = 3  # examples of each kind of error in a message: enough to find the cause, few enough to read


class DataError(ValueError):
    """Rows of a data set cannot be used; the message counts them by reason and names where they stand."""


class RowError(ValueError):
    """One row cannot be used.

    Args:
        reason: what errors of this kind are counted under; the same words for every row.
        detail: what exactly is wrong in this row.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@contextlib.contextmanager
def template_refusals(*texts: str | Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Turn what a chat template raises inside a `with` block for these texts or messages into a `RowError`.

    Templates refuse conversations that their model was not trained on, and stumble over fields that a message lacks. A
    template that is wrong by itself is no fault of a row.
    """
    try:
        yield
    except (ImportError, RowError):
        raise
    except Exception as error:
        from jinja2 import TemplateError, TemplateSyntaxError

        if isinstance(error, TemplateSyntaxError) or not isinstance(error, (TemplateError, TypeError, LookupError)):
            raise
        roles = [str(message.get("role")) for text in texts if not isinstance(text, str) for message in text]
        raise RowError(
            "refused by the chat template",
            (str(error) or type(error).__name__) + (f" (roles: {', '.join(roles)})" if roles else ""),
        ) from error


@dataclass
class ReadReport:
    """What reading a source gave.

    Attributes:
        source: the file, directory, hub name or format, for messages.
        rows: rows of the source that were read.
        lists: lists that were made of them.
        what: what is made of rows, for messages.
        errors: for each reason the places ("line 3", "row 7") and details of what could not be used.
    """

    source: str
    rows: int = 0
    lists: int = 0
    what: str = "lists"
    errors: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, place: str, error: RowError) -> None:
        """Count an error.

        Args:
            place: where the row stands, such as "line 3".
            error: why it cannot be used.
        """
        self.errors.setdefault(error.reason, []).append((place, error.detail))

    @property
    def counts(self) -> dict[str, int]:
        """How many lists could not be used, by reason."""
        return {reason: len(places) for reason, places in self.errors.items()}

    def __str__(self) -> str:
        bad = sum(self.counts.values())
        lines = [f"{self.source}: {self.lists} {self.what} from {counted(self.rows, 'row')}; {bad} could not be used"]
        for reason, places in sorted(self.errors.items(), key=lambda item: -len(item[1])):
            examples = "; ".join(f"{place}: {detail}" for place, detail in places[:SHOWN])
            lines.append(f"  {len(places)} x {reason} ({examples}{'; ...' if len(places) > SHOWN else ''})")
        return "\n".join(lines)

    def settle(self, on_error: OnError) -> None:
        """Raise, or log, what could not be used.

        Args:
            on_error: "raise" or "skip".

        Raises:
            DataError: if there were errors and `on_error` is "raise", or if no list is left.
        """
        check_choice(on_error, ON_ERROR, "on_error")
        if self.errors and self.lists == 0:
            raise DataError(f"{self}\nmend these rows: nothing is left to learn from")
        if self.errors and on_error == "raise":
            raise DataError(f"{self}\nmend these rows, or pass on_error='skip' to leave them out")
        if self.lists == 0:
            raise DataError(f"{self}\nnothing is left to learn from")
        if self.errors:
            logger.warning("%s", self)


def refuse_text(objectives: Sequence[str] | None) -> None:
    if isinstance(objectives, str):
        raise TypeError(f"objectives is {objectives!r} but must be a sequence of names; pass ({objectives!r},)")


def no_labels_for(unknown: Sequence[str], named: Iterable[str], source: str) -> str:
    """Say that objectives are none of those that have labels; names in one word are how others write several."""
    parts = [name for text in unknown for name in re.split(r"[,;\s]+", text.strip(",; "))]
    apart = parts != list(unknown) and set(parts) <= set(named)
    remedy = f"; give each name as a word of its own: {' '.join(parts)}" if apart else ""
    return f"no list of {source} has labels for {', '.join(unknown)}; it has {', '.join(named)}{remedy}"
