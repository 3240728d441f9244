"""The table of the README: times as multiples of mopl's, memory and errors, at a few sizes alone."""

from __future__ import annotations

from pathlib import Path

from bench.goals import HEAD, LIST_PEERS, LOGITS, parse_list
from bench.measured import (
    HEAD_MODES,
    LIST_WORDS,
    WORDS,
    Rows,
    figure,
    heading,
    listed,
    read,
    rows_of,
    table,
    variants_of,
)

GOAL_STAGES = ("logprob-head", "logprob-gathered")
SHORT = {
    "full logits": "full logits", "TRL chunked": "TRL", "CCE exact": "CCE exact", "Liger scaled CE": "Liger, scaled",
    "Liger fused linear CE, sum": "Liger, the sum alone", "QuACK chunked, sum": "QuACK, the sum alone",
}  # fmt: skip


def in_short(folder: Path) -> str:
    """Return one table for the README: times as multiples of mopl's, memory and errors at a few sizes."""
    found = read(folder)
    rows, (title, _) = rows_of(found, "logprob-"), heading(found, folder.name)
    sizes = {mode: f"{mode} {HEAD}" for mode in HEAD_MODES}
    peers = [name for name in SHORT if any("ms" in rows.get((size, name), {}) for size in sizes.values())]
    columns = [
        *((f"{WORDS[mode]}, time", sizes[mode], "x mopl", lambda x: f"× {x:.2f}") for mode in HEAD_MODES),
        ("trained head, extra memory", sizes["trained"], "extra GB", lambda x: f"{x:.1f} GiB"),
        ("largest error of log p, nats", sizes["forward"], "log p", lambda x: f"{x:.1e}"),
    ]
    cells = [
        [SHORT[name], *(figure(rows.get((size, name)), key, form) for _, size, key, form in columns)] for name in peers
    ]
    own = []
    for _, size, key, form in columns:
        if key == "x mopl":
            key, form = "ms", lambda x: f"{x:.1f} ms"
        own.append(figure(rows.get((size, "mopl")), key, form))
    cells.insert(0, ["**mopl**", *own])
    commands = [  # each with its own commit: the stages of a card are measured as the code changes
        f"`{stage['command'].split(' --json')[0]}` ({stage['date']}, commit {stage['commit']})"
        for stage in map(found.get, GOAL_STAGES)
        if stage
    ]
    tokens, width, vocabulary = (f"{int(size):,}" for size in HEAD.split("x"))
    shape = f"{tokens} tokens, width {width}, vocabulary {vocabulary}, bfloat16"
    lines = [f"{title.partition(', ')[0]}: {shape}. Times of the others are multiples of mopl's.", ""]
    lines += table(["", *(head for head, *_ in columns)], cells)
    size = f"gathered {LOGITS}"
    every = [(name, rows[size, name]) for name in variants_of(rows, (size,)) if "ms" in rows[size, name]]
    if mopl := dict(every).get("mopl"):
        others = "; ".join(
            f"{name} × {row['x mopl']:.2f}" for name, row in every if not name.startswith(("mopl", "its "))
        )
        tokens, vocabulary = (f"{int(size):,}" for size in LOGITS.split("x0x"))
        what = f"From logits that are there already ({tokens} × {vocabulary}, both passes)"
        lines += [f"{what}: {mopl['ms']:.2f} ms; {others}.", ""]
    lines += [f"Measured by {listed(commands)}.", ""]
    return "\n".join(lines + list_sentences(rows_of(found, "lists")))


def list_sentences(rows: Rows) -> list[str]:
    """Return a sentence for each list loss: its share of the bytes, and how many times as long each peer takes."""
    lines: list[str] = []
    for loss, name in LIST_WORDS.items():
        own = {parse_list(size)[2]: row for (size, variant), row in rows.items() if size.startswith(f"{loss} m=1 ")
               and variant == "mopl" and "of bytes" in row}  # fmt: skip
        times = []
        for variant in LIST_PEERS[loss]:
            found = [rows.get((f"{loss} m=1 K={k}", variant), {}).get("x mopl") for k in own]
            if found := [x for x in found if x]:
                times.append(f"{min(found):.2f} to {max(found):.2f} {variant}")
        if own:
            shares = [row["of bytes"] for row in own.values()]
            what = f"{name}, forward + backward, lists of {min(own)} to {max(own)} items"
            others = f" Times of the others, as multiples: {'; '.join(times)}." if times else ""
            lines += [f"{what}: {min(shares):.2f} to {max(shares):.2f} of the bytes.{others}", ""]
    return lines
