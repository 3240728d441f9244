"""The messages that docs/troubleshooting.md quotes are in the source, word for word."""

import ast
import re
from functools import cache

from doc_pages import ROOT


@cache
def texts() -> str:
    """Return every text of the source, each part of an f-string by itself."""
    found = []
    for file in (ROOT / "mopl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def sections() -> list[tuple[str, str]]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### (.+)\n\n((?:(?!#).*\n?)+)", page, re.MULTILINE)


def test_every_quoted_message_is_one_of_mopl() -> None:
    quoted = [
        message
        for heading, said in sections()
        if not said.startswith("From ")
        for message in re.findall(r"`([^`]+)`", heading)
        if not message.startswith("mopl doctor")
    ]
    missing = [message for message in quoted if message not in texts()]
    assert len(quoted) >= 30 and not missing, missing


def test_every_message_has_a_cause_or_a_remedy() -> None:
    assert len(sections()) >= 40
    assert not [heading for heading, said in sections() if len(said.split()) < 3]
