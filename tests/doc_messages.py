"""The messages of mopl as its source writes them, to compare those that pages quote."""

import ast
from collections.abc import Sequence
from functools import cache

from doc_pages import ROOT

LEAST = 0.4  # of a quoted message must be words of the source, not values


@cache
def templates() -> list[tuple[str | None, ...]]:
    """Return every text of the source: the parts of an f-string, with None in place of a value."""
    found: dict[tuple[str | None, ...], None] = {}
    for file in sorted([*(ROOT / "mopl").rglob("*.py"), *(ROOT / "bench/paper").glob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (each.value if isinstance(each, ast.Constant) else None for each in node.values)
                found[tuple(parts)] = None  # type: ignore[arg-type]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found[node.value,] = None
    return list(found)


def begins(parts: Sequence[str | None], message: str, wanted: float) -> bool:
    """Say whether a message is how the parts begin, with at least so many characters of theirs."""
    if not message:
        return wanted <= 0
    if not parts:
        return False
    first, rest = parts[0], parts[1:]
    if first is None:
        return any(begins(rest, message[end:], wanted) for end in range(1, len(message) + 1))
    if first.startswith(message):
        return wanted <= len(message)
    return message.startswith(first) and begins(rest, message[len(first) :], wanted - len(first))


def is_message(message: str) -> bool:
    """Say whether mopl can say this: a message, or a part of one from the beginning of a literal or a value on."""
    for parts in templates():
        known = [each for each in parts if each]
        if any(message in each for each in known):
            return True
        if any(len(each) > 5 and each in message for each in known) and any(
            begins(parts[start:], message, LEAST * len(message)) for start in range(len(parts))
        ):
            return True
    return False
