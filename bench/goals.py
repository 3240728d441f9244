"""The goals of the log-probability ops on a GPU, and what was measured beside them; modes are those of `bench.logprob`.

From hidden states a goal is a share of what the card needs for the same products with float32 results and nothing else,
measured beside it ("its products alone", `own`). `share` is taken from the rate of one product of 8192^3, 1.4 ms long,
which a card whose power is limited does not hold for the tens of milliseconds of these products: an H200's bare ones
reach .83 to .86 of it. From logits a goal is a share of the bytes. Milliseconds are those that the same shares of that
rate would be on an H200, as they were wanted before one was measured; they are shown beside the goals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

HEAD, LOGITS = "16384x4096x128256", "16384x0x151936"  # the sizes that have goals
WIDE_HEAD = "8192x2048x151936"  # measured beside the first one
SIZE = {"forward": HEAD, "frozen": HEAD, "trained": HEAD, "gathered": LOGITS}
SHARE = {"forward": 0.88, "frozen": 0.92, "trained": 0.92, "gathered": 0.9}
H200_MS = {"forward": 24.8, "frozen": 47.5, "trained": 71.0, "gathered": 3.85}
PEERS = {"frozen": 1.8, "trained": 1.25}  # times of those who give a log-probability per token, over mopl's
RIVALS = ("TRL chunked", "Liger scaled CE")


class Goal(NamedTuple):
    """What was wanted of a row, and what was measured; larger is better."""

    size: str  # "MODE NxHxV"
    what: str
    wanted: float
    measured: float


def key_of(mode: str) -> tuple[str, str]:
    """Return the entry of a row that a mode's goal is about, and its name in words."""
    return ("share", "of the bytes") if mode == "gathered" else ("own", "of its products alone")


def add_own(rows: Iterable[dict]) -> None:
    """Add to rows `own`: the time of the bare products, or bytes, of the same size over theirs."""
    rows = [row for row in rows if "ms" in row]
    alone = {row["size"]: row["ms"] for row in rows if row["variant"].startswith("its ")}
    for row in rows:
        if row["size"] in alone:
            row["own"] = alone[row["size"]] / row["ms"]


def judge(rows: Iterable[dict]) -> Iterator[Goal]:
    """Compare rows, which have `own`, with the goals; of a goal that nothing was measured for there is nothing."""
    found = {(row["size"], row["variant"]): row for row in rows if "ms" in row}
    for mode, wanted in SHARE.items():
        key, words = key_of(mode)
        size = f"{mode} {SIZE[mode]}"
        if key in found.get((size, "mopl"), {}):
            yield Goal(size, words, wanted, found[size, "mopl"][key])
    for mode, wanted in PEERS.items():
        for name in RIVALS:
            size = f"{mode} {SIZE[mode]}"
            if "x mopl" in found.get((size, name), {}):
                yield Goal(size, f"time of {name} over mopl's", wanted, found[size, name]["x mopl"])
