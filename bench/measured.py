"""What the stages of `bench.device` left in a folder, read, and the parts that every page of them is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.goals import add_own

WORDS = {
    "forward": "scoring", "frozen": "frozen head", "trained": "trained head", "gathered": "from logits, both passes",
    "gathered-forward": "from logits, forward",
}  # fmt: skip
LIST_WORDS = {"plackett-luce": "Plackett–Luce", "listnet": "ListNet"}
HEAD_MODES = ("forward", "frozen", "trained")
Rows = dict[tuple[str, str], dict]  # by size and variant


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def read(folder: Path) -> dict[str, dict]:
    """Return what each stage wrote, by its name.

    Raises:
        ValueError: if the figures are of several cards.
    """
    found = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem):  # "lists" before "lists-compiled"
        if path.stem != "stages":
            found[path.stem] = content = json.loads(path.read_text())
            if path.stem.startswith("logprob-"):
                add_own(row for row in content.get("results", []) if "variant" in row)
    if len(cards := {content["device"] for content in found.values() if "device" in content}) > 1:
        raise ValueError(f"{folder} holds figures of several cards, {' and '.join(sorted(cards))}: one folder each")
    return found


def rows_of(found: dict[str, dict], prefix: str) -> Rows:
    """Return the rows of all stages whose names begin so; of a row that several have, the first one's."""
    stages = [content for name, content in found.items() if name.startswith(prefix)]
    rows: Rows = {}
    for row in (row for content in stages for row in content.get("results", []) if "size" in row):
        rows.setdefault((row["size"], row["variant"]), row)
    return rows


def figure(row: dict | None, key: str, form: Callable[[float], str]) -> str:
    """Return an entry of a row; why there is none, in a word."""
    if row is None:
        return ""
    if "failed" in row:
        return "failed"
    value = row.get(key)
    return "–" if value is None else form(value)


def variants_of(rows: Rows, sizes: Iterable[str]) -> list[str]:
    """Return who was measured, or failed, at one of these sizes; mopl's repetition comes last."""
    names = dict.fromkeys(v for (s, v), row in rows.items() if s in sizes and row.keys() & {"ms", "failed"})
    return sorted(names, key=lambda name: name.endswith(", again"))


def listed(words: list[str]) -> str:
    """Return words as a sentence has them: a, b and c."""
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def heading(found: dict[str, dict], name: str) -> tuple[str, str]:
    """Return the card with days and commits, and the versions."""
    every = [content for content in found.values() if "device" in content]
    days, commits = (sorted({str(content[key]) for content in every}) for key in ("date", "commit"))
    versions: dict[str, dict[str, None]] = {}
    for content in every:
        for package, version in content.get("versions", {}).items():
            versions.setdefault(package, {})[version] = None
    card = every[0]["device"] if every else name
    measured = f"{listed(days)}, commit{'s' * (len(commits) > 1)} {listed(commits)}"
    return f"{card}, {measured}", ", ".join(f"{p} {' and '.join(v)}" for p, v in versions.items())
