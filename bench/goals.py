"""The goals of the GPU benches, and what was measured beside them; modes are those of `bench.logprob`.

From hidden states a goal is a share of what the card needs for the same products with float32 results and nothing else,
measured beside it ("its products alone", `own`). `share` is taken from the rate of one product of 8192^3, 1.4 ms long,
which a card whose power is limited does not hold for the tens of milliseconds of these products: an H200's bare ones
reach .83 to .86 of it. From logits a goal is a share of the bytes. Milliseconds are those that the same shares of that
rate would be on an H200, as they were wanted before one was measured; they are shown beside the goals.

List losses with one objective have two: a share of the bytes that have to be moved, where lists are long enough that
the launch and the list's own numbers do not count, and not to be slower than any peer at any length.
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

LIST_SHARE, LIST_ITEMS = 0.8, 32  # of the bytes, from this many items on
LIST_PEERS = {
    "plackett-luce": (
        "logcumsumexp", "torch.compile of logcumsumexp", "allRank listMLE", "sentence-transformers ListMLE",
    ),
    "listnet": ("log_softmax", "torch.compile of log_softmax", "allRank listNet"),
}  # fmt: skip
SORTING = ("mopl, sorting", "allRank listMLE", "sentence-transformers ListMLE")  # find the order by themselves


class Goal(NamedTuple):
    """What was wanted of a row, and what was measured; larger is better."""

    size: str  # "MODE NxHxV" or "LOSS m=M K=K"
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


def parse_list(size: str) -> tuple[str, int, int]:
    """Return loss, objectives and items of the size of a list loss."""
    loss, objectives, items = size.split(" ")
    return loss, int(objectives.removeprefix("m=")), int(items.removeprefix("K="))


def judge_lists(rows: Iterable[dict]) -> Iterator[Goal]:
    """Compare rows of `bench.lists` with the goals of one objective; nothing where nothing was measured."""
    for row in rows:
        if "ms" not in row:
            continue
        loss, objectives, items = parse_list(row["size"])
        if objectives != 1:
            continue
        if row["variant"] == "mopl" and items >= LIST_ITEMS and "of bytes" in row:
            yield Goal(row["size"], "share of its bytes", LIST_SHARE, row["of bytes"])
        if row["variant"] in LIST_PEERS[loss] and "x mopl" in row:
            yield Goal(row["size"], f"time of {row['variant']} over mopl's", 1.0, row["x mopl"])
