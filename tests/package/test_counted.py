"""Messages count in English: "1 entry", "2 entries", and never "1 entries" or "entry(s)"."""

import ast
import re

import pytest
from doc_pages import ROOT

from mopl._counted import counted, there_are


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (1, "entry", "1 entry"),
        (0, "entry", "0 entries"),
        (2, "query", "2 queries"),
        (3, "day", "3 days"),
        (2, "process", "2 processes"),
        (2, "loss", "2 losses"),
        (1, "held-out prompt", "1 held-out prompt"),
        (5, "held-out prompt", "5 held-out prompts"),
        (2, "batch", "2 batches"),
    ],
)
def test_nouns_follow_their_number(number: int, noun: str, expected: str) -> None:
    assert counted(number, noun) == expected


def test_the_verb_follows_the_number() -> None:
    assert [there_are(number, "list") for number in (0, 1, 2)] == [
        "there are 0 lists",
        "there is 1 list",
        "there are 2 lists",
    ]


def test_no_message_leaves_the_plural_to_its_reader() -> None:
    """No text says "process(es)"; in docstrings s( ) is a function of s."""
    found = []
    for file in sorted((ROOT / "mopl").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts = "".join(part.value for part in node.values if isinstance(part, ast.Constant))
                if re.search(r"[a-z]\((?:s|es)\)", texts):
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not found, f"use mopl._counted.counted: {', '.join(found)}"
