"""Generated data in the public formats, small, to try the commands on: labels conflict as they do in real data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

SUBJECTS = ("tea", "bread", "soup", "a garden", "a bicycle", "a kite", "a campfire", "paint", "glue", "a ladder")
PLAIN = ("Take what you need and put it together.", "Ask a friend.", "Look it up.", "It is easy.", "Try it once.")
DETAILED = (
    "Measure everything first, then work from the bottom to the top.", "Warm it slowly and stir it all the time.",
    "Start with the largest part and add the small ones after it.", "Cut it in halves, and dry both of them.",
)  # fmt: skip
CAREFUL = ("Wear gloves.", "Keep children away.", "Stop if it smokes.", "Please ask someone with experience first.")
RASH = ("You need no gloves.", "Do it in the dark.", "Skip every test.", "Nothing can happen to you.")
PLACES = ("Leeds", "Cardiff", "Perth", "Derry", "Hull", "Bath", "Dundee", "Swansea")
EVENTS = (
    ("a bridge", "was closed after", "a storm"), ("a school", "was praised after", "an inspection"),
    ("a bakery", "was sold after", "ninety years"), ("a team", "was promoted after", "a long final"),
    ("a museum", "was opened after", "two years of work"), ("a train", "was stopped after", "a signal failed"),
)  # fmt: skip
ASIDES = (
    "Neighbours said that they had heard of it in the morning.", "The council will meet next week.",
    "A spokeswoman thanked everybody who had helped.", "It is not known how much it will cost.",
    "Photographs were shared thousands of times.", "The weather is expected to stay cold.",
)  # fmt: skip


def mslr(folder: Path, queries: int = 20, items: int = 12, seed: int = 0) -> Path:
    """Write Fold1 to Fold5, each of the same five parts in turn, as MSLR does, with 136 columns.

    Relevance is of one direction of the features and the qualities of others, which partly pull against it; clicks and
    dwell time are counts, of which most are 0.
    """
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(4, 131)) / np.sqrt(8) * (rng.random((4, 131)) < 8 / 131)
    directions[1] -= 0.6 * directions[0]
    parts = [[_query(rng, 1 + part * queries + q, items, directions) for q in range(queries)] for part in range(5)]
    for fold in range(5):
        place = folder / f"Fold{fold + 1}"
        place.mkdir(parents=True, exist_ok=True)
        for name, chosen in (("train", (0, 1, 2)), ("vali", (3,)), ("test", (4,))):
            text = "".join("".join(parts[(part + fold) % 5]) for part in chosen)
            (place / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def _query(rng: np.random.Generator, number: int, items: int, directions: np.ndarray) -> str:
    count = int(rng.integers(items // 2, items + 1))
    features = rng.normal(size=(count, 131)).round(3)
    relevance, quality, badness, clicks = directions @ features.T + 0.3 * rng.normal(size=(4, count))
    grade = np.digitize(relevance, (-0.4, 0.3, 0.8, 1.4))
    counts = rng.poisson(np.exp(clicks + 0.5 * relevance - 0.8))
    scores = (127 + 60 * np.stack([quality, badness])).clip(0, 255).round()
    columns = np.concatenate([features, scores.T, counts[:, None], (counts * 1.5).round()[:, None],
                              (counts * rng.integers(1, 40, count))[:, None]], 1)  # fmt: skip
    return "".join(
        f"{y} qid:{number} " + " ".join(f"{c}:{x:g}" for c, x in enumerate(row, 1)) + "\n"
        for y, row in zip(grade, columns, strict=True)
    )


def safe_rlhf(file: Path, pairs: int = 160, seed: int = 0, say: Callable[[str], str] = str) -> Path:
    """Write rows of PKU-SafeRLHF: detailed answers are better, careful ones safer, and about a third disagree.

    `say` writes a text in other words, for models that know few.
    """
    rng = np.random.default_rng(seed)

    def answer() -> tuple[str, int, int]:
        detailed, careful = int(rng.integers(2)), int(rng.integers(2))
        body = rng.choice(DETAILED if detailed else PLAIN)
        return say(f"{body} {rng.choice(CAREFUL if careful else RASH)}"), detailed, careful

    lines = []
    while len(lines) < pairs:
        subject, (a, helpful0, safe0), (b, helpful1, safe1) = rng.choice(SUBJECTS), answer(), answer()
        if a == b:
            continue
        better = int(helpful1 + 0.1 * rng.random() > helpful0 + 0.1 * rng.random())
        safer = int(safe1 + 0.1 * rng.random() > safe0 + 0.1 * rng.random())
        lines.append({
            "prompt": say(f"How do I make {subject}?"), "response_0": a, "response_1": b,
            "is_response_0_safe": bool(safe0), "is_response_1_safe": bool(safe1), "better_response_id": better,
            "safer_response_id": safer,
        })  # fmt: skip
    return _write(file, lines)


def xsum(file: Path, documents: int = 80, seed: int = 0, say: Callable[[str], str] = str) -> Path:
    """Write rows of XSum: news of a few sentences, and their first fact in one sentence."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(documents):
        thing, did, cause = EVENTS[rng.integers(len(EVENTS))]
        place, year = rng.choice(PLACES), 1990 + number
        aside = " ".join(rng.permutation(ASIDES)[:3])
        lines.append({
            "document": say(f"In {place}, {thing} {did} {cause} in {year}. {aside}"),
            "summary": say(f"{thing.capitalize()} in {place} {did} {cause}."), "id": str(10_000_000 + number),
        })  # fmt: skip
    return _write(file, lines)


def _write(file: Path, lines: Sequence[dict[str, object]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file
