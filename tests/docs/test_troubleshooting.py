"""The messages that docs/troubleshooting.md and "What goes wrong" of other pages quote are in the source."""

import re

from doc_messages import is_message, templates
from doc_pages import PAGES, ROOT, blocks_of, prose_of


def texts() -> str:
    """Return every text of the source, each part of an f-string by itself."""
    return "\n".join(part for parts in templates() for part in parts if part)


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
    source = texts()
    missing = [message for message in quoted if message not in source]
    assert len(quoted) >= 30 and not missing, missing


def test_every_message_has_a_cause_or_a_remedy() -> None:
    assert len(sections()) >= 40
    assert not [heading for heading, said in sections() if len(said.split()) < 3]


def test_every_message_under_what_goes_wrong_is_one_of_mopl() -> None:
    """Those are the blocks of text below that heading; values in them are free."""
    quoted = []
    for page in PAGES:
        prose = prose_of(page)
        if "## What goes wrong" in prose:
            start = prose.index("## What goes wrong")
            end = next((n for n, line in enumerate(prose) if n > start and line.startswith("## ")), len(prose))
            blocks = [block for block in blocks_of(page) if start < block.line < end and block.language == "text"]
            quoted += [(block.where, line) for block in blocks for line in block.text.splitlines()]
    missing = [f"{where}: {message}" for where, message in quoted if not is_message(message)]
    assert len(quoted) >= 25 and not missing, "\n".join(missing)
