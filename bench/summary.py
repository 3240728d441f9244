"""What the stages of `bench.device` measured, on one page: the goals, the tests, and a table for each bench.

python -m bench.summary FOLDER        # prints it again, for docs/performance.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.device_stages import STAGES
from bench.goals import H200_MS

WORDS = {
    "forward": "scoring", "frozen": "frozen head", "trained": "trained head", "gathered": "from logits, both passes",
    "gathered-forward": "from logits, forward",
}  # fmt: skip
ORDER = [stage.name for stage in STAGES]
Rows = dict[tuple[str, str], dict]  # by size and variant


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def read(folder: Path) -> dict[str, dict]:
    """Return what each stage wrote, by its name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.stem != "stages":
            found[path.stem] = json.loads(path.read_text())
    return found


def rows_of(found: dict[str, dict], prefix: str) -> Rows:
    """Return the rows of all stages whose names begin so."""
    stages = [content for name, content in found.items() if name.startswith(prefix)]
    rows = (row for content in stages for row in content.get("results", []))
    return {(row["size"], row["variant"]): row for row in rows if "size" in row}


def figure(row: dict | None, key: str, form: Callable[[float], str]) -> str:
    """Return an entry of a row; why there is none, in a word."""
    if row is None:
        return ""
    if "failed" in row:
        return "failed"
    value = row.get(key)
    return "–" if value is None else form(value)


def goals(found: dict[str, dict]) -> list[str]:
    """Return the goals beside what was measured."""
    lines = []
    for stage, content in sorted(found.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else 99):
        for target in content.get("targets", []) if stage.startswith("logprob-") else ():
            mode, size = target["size"].split(" ")
            met = "met" if target["met"] else "**missed**"
            if target["target"] != "share of the limit":
                measured = f"{target['measured']:.2f}"
                lines.append([f"{WORDS[mode]}: {target['target']}", f"≥ {target['at least']:.2f}", measured, met])
                continue
            rows = rows_of({stage: content}, "")
            row, again = rows[target["size"], "mopl"], rows.get((target["size"], "mopl, again"), {})
            drift = f", again {again['ms']:.2f}" if "ms" in again else ""
            wanted = f"≥ {target['at least']:.2f} of the limit"
            wanted += f"; {H200_MS[mode]} ms on an H200" if mode in H200_MS else ""
            measured = f"{target['measured']:.3f}; {row['ms']:.2f} ms{drift}"
            lines.append([f"{WORDS[mode]}, {size} ({stage})", wanted, measured, met])
    for loss, peers in {"plackett-luce": "logcumsumexp", "listnet": "log_softmax"}.items():
        for peer in (peers, f"torch.compile of {peers}"):
            ratios = {
                row["size"]: row["x mopl"]
                for row in rows_of(found, "lists").values()
                if row["variant"] == peer and row["size"].startswith(f"{loss} m=1 ") and "x mopl" in row
            }
            if ratios:
                worst = min(ratios, key=lambda size: ratios[size])
                met = "met" if ratios[worst] >= 1 else "**missed**"
                measured = f"{ratios[worst]:.2f} at {worst.split(' ')[-1]}, {max(ratios.values()):.2f} at best"
                lines.append([f"{loss} beside {peer}", "ahead at every K", measured, met])
    return table(["goal", "wanted", "measured", ""], lines) if lines else ["Nothing measured yet.", ""]


def logprob_table(rows: Rows) -> list[str]:
    """Return variants by size: milliseconds, share of the limit, extra memory."""
    sizes = [size for size, _ in rows if not size.startswith(("error", "tune"))]
    lines: list[str] = []
    for mode, words in WORDS.items():
        own = [size for size in dict.fromkeys(sizes) if size.split(" ")[0] == mode]
        own.sort(key=lambda size: [int(n) for n in size.split(" ")[1].split("x")], reverse=True)
        variants = [v for v in dict.fromkeys(v for s, v in rows if s in own)]
        variants = [
            v for v in variants if any("ms" in rows.get((s, v), {}) or "failed" in rows.get((s, v), {}) for s in own)
        ]
        cells = []
        for variant in variants:
            cells.append([variant])
            for size in own:
                row = rows.get((size, variant))
                share = figure(row, "share", lambda x: f" ({x:.2f}") or ""
                memory = figure(row, "extra GB", lambda x: f", {x:.1f} GB)")
                time = figure(row, "ms", lambda x: f"{x:.3g}")
                cells[-1].append(time + share + memory if row and row.get("share") else time)
        if cells:
            title = f"{words[0].upper()}{words[1:]}: ms (share of the limit, extra memory), rows x width x vocabulary:"
            lines += [title, "", *table(["", *(size.split(" ")[1] for size in own)], cells)]
    return lines


def list_table(rows: Rows) -> list[str]:
    """Return multiples of mopl's time by the length of a list."""
    lines: list[str] = []
    shapes = dict.fromkeys(" ".join(size.split(" ")[:2]) for size, _ in rows)
    for shape in shapes:
        sizes = sorted({s for s, _ in rows if s.startswith(f"{shape} ")}, key=lambda s: int(s.split("K=")[1]))
        cells = [
            ["mopl, ns an item", *(figure(rows.get((s, "mopl")), "ns", lambda x: f"{x:.4f}") for s in sizes)],
            ["the bytes", *(figure(rows.get((s, "mopl")), "of bytes", lambda x: f"{x:.2f}") for s in sizes)],
        ]
        for variant in dict.fromkeys(v for s, v in rows if s in sizes and v not in ("mopl", "its bytes alone")):
            cells.append([variant, *(figure(rows.get((s, variant)), "x mopl", lambda x: f"{x:.2f}") for s in sizes)])
        lines += [f"{shape}, multiples of mopl's time:", "", *table(["", *(s.split(" ")[-1] for s in sizes)], cells)]
    return lines


def error_table(rows: Rows) -> list[str]:
    """Return errors by case and variant."""
    keys = ("log p max", "dh frozen", "worst row", "dh trained", "dW")
    cells = [
        [size.removeprefix("error "), variant, *(figure(row, key, lambda x: f"{x:.1e}") for key in keys)]
        for (size, variant), row in rows.items()
        if "absent" not in row
    ]
    return table(["rows x width x vocabulary", "", *keys], sorted(cells, key=lambda c: c[0])) if cells else []


def model_table(results: list[dict]) -> list[str]:
    """Return what the performance model predicted beside what was measured."""
    verdict = {None: "", True: "met", False: "**missed**"}
    cells = []
    for row in results:
        times = (f"{row[key]:.3f}" if row[key] else "–" for key in ("limit_ms", "ms", "measured_ms"))
        cells.append([row["op"], row["name"], *times, row["goal"], verdict[row["met"]]])
    return table(["", "", "limit, ms", "predicted", "measured", "goal", ""], cells)


def summary(folder: Path) -> str:
    """Return the page."""
    found = read(folder)
    stages = json.loads((folder / "stages.json").read_text()) if (folder / "stages.json").exists() else {}
    about = next((content for content in found.values() if "device" in content), {})
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    lines = [
        f"# {about.get('device', folder.name)}, {about.get('date')}, commit {about.get('commit')}",
        "",
        versions,
        "",
    ]
    if limits := found.get("limits"):
        copy, product = limits["bytes_per_second"] / 1e12, limits["flop_per_second"] / 1e12
        lines += [f"Copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s (`{limits['command']}`).", ""]
    lines += ["## Goals", "", *goals(found), "## Stages", ""]
    outcome = [
        [name, state["verdict"], f"{state['seconds']:.0f}", state.get("outcome") or "", f"`{state['command']}`"]
        for name, state in stages.items()
    ]
    lines += table(["", "", "seconds", "", "command"], outcome)
    for name, state in stages.items():
        lines += [f"* {name}: {line}" for line in state.get("failed", [])]
    first = {name: content for name, content in found.items() if name != "logprob-tuned"}
    logprob, errors = rows_of(first, "logprob-"), rows_of(found, "logprob-error")
    lines += ["", "## Log-probabilities", "", *logprob_table({k: v for k, v in logprob.items() if k not in errors})]
    lines += ["## List losses", "", *list_table(rows_of(found, "lists")), "## Errors", "", *error_table(errors)]
    if "model" in found:
        card = found["model"]["card"]["name"]
        lines += [f"## The performance model ({card})", "", *model_table(found["model"]["results"])]
    if "logprob-tune" in found:
        chosen = [[row["size"], row.get("fastest", "failed")] for row in found["logprob-tune"]["results"]]
        lines += ["## Chosen by `tune`", "", *table(["", "fastest"], chosen)]
    if absent := {(v, r["absent"]) for (_, v), r in (logprob | rows_of(found, "sanitizer")).items() if "absent" in r}:
        lines += ["Not measured: " + "; ".join(f"{name} ({reason})" for name, reason in sorted(absent)) + ".", ""]
    if bad := {(v, r["failed"]) for (_, v), r in rows_of(found, "").items() if "failed" in r}:
        lines += ["Failed: " + "; ".join(f"{name} ({reason})" for name, reason in sorted(bad)) + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
