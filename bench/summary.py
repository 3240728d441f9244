"""What the stages of `bench.device` measured, on one page: the goals, the tests, and a table for each bench.

    python -m bench.summary bench/results/nvidia-h200           # prints the whole page, FOLDER/summary.md
    python -m bench.summary bench/results/nvidia-h200 --write README.md docs/performance.md

--write puts the figures into pages, in place of what stands there between `<!-- bench.summary CARD -->` (in short:
`<!-- bench.summary CARD, in short -->`) and `<!-- end -->`, where CARD is the folder's name, and writes
FOLDER/summary.md anew. A folder holds the figures of one card; two are an error.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from bench.device_stages import STAGES
from bench.goals import H200_MS, HEAD, LIST_ITEMS, LOGITS, Goal, judge, judge_lists, key_of, parse_list
from bench.measured import HEAD_MODES, LIST_WORDS, WORDS, Rows, figure, heading, read, rows_of, table, variants_of
from bench.short_table import in_short
from mopl._files import write_file

ORDER = [stage.name for stage in STAGES]
OWN, SHARE, SORTS = key_of("forward")[1], "share of its bytes", "mopl, sorting"


def goals(found: dict[str, dict]) -> list[str]:
    """Return the goals beside what was measured."""
    lines = []
    for stage, content in sorted(found.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else 99):
        for goal in judge(content.get("results", [])) if stage.startswith("logprob-") else ():
            mode, size = goal.size.split(" ")
            met = "met" if goal.measured >= goal.wanted else "**missed**"
            if not goal.what.startswith("of "):
                wanted, measured = f"≥ {goal.wanted:.2f}", f"{goal.measured:.2f}"
                lines.append([f"{WORDS[mode]}: {goal.what}", wanted, measured, met])
                continue
            rows = rows_of({stage: content}, "")
            row, again = rows[goal.size, "mopl"], rows.get((goal.size, "mopl, again"), {})
            drift = f", again {again['ms']:.2f}" if "ms" in again else ""
            wanted = f"≥ {goal.wanted:.2f} {goal.what}; {H200_MS[mode]} ms on an H200"
            limit = f" ({row['share']:.3f} of the limit)" if goal.what == OWN and "share" in row else ""
            measured = f"{goal.measured:.3f}{limit}; {row['ms']:.2f} ms{drift}"
            lines.append([f"{WORDS[mode]}, {size} ({stage})", wanted, measured, met])
    lines += list_goals(rows_of(found, "lists"))
    for target in found.get("step", {}).get("targets", []):
        met = "met" if target["met"] else "**missed**"
        what = f"step, {target['size']}: {target['target']}"
        lines.append([what, f"≥ {target['at least']:.2f}", f"{target['measured']:.2f}", met])
    return table(["goal", "wanted", "measured", ""], lines) if lines else ["Nothing measured yet.", ""]


def list_goals(rows: Rows) -> list[list[str]]:
    """Return a line for each goal of each list loss: what was measured where it was worst, and where best."""
    every: dict[tuple[str, str], list[Goal]] = {}
    for goal in judge_lists(rows.values()):
        every.setdefault((parse_list(goal.size)[0], goal.what), []).append(goal)
    lines = []
    for loss, what in sorted(every, key=lambda key: (list(LIST_WORDS).index(key[0]), key[1] != SHARE)):
        found = every[loss, what]
        worst, best = (choose(found, key=lambda goal: goal.measured) for choose in (min, max))
        wanted = f"≥ {worst.wanted:.2f} for K ≥ {LIST_ITEMS}" if what == SHARE else f"≥ {worst.wanted:.2f} at every K"
        measured = f"{worst.measured:.2f} at {worst.size.split(' ')[-1]}, {best.measured:.2f} at best"
        met = "met" if worst.measured >= worst.wanted else "**missed**"
        lines.append([f"{LIST_WORDS[loss]}: {what}", wanted, measured, met])
    return lines


COLUMNS = {
    "ms": ("ms", lambda x: f"{x:#.3g}" if x < 100 else f"{x:.0f}"), "share": ("of the limit", lambda x: f"{x:.2f}"),
    "own": ("of its products alone", lambda x: f"{x:.2f}"), "x mopl": ("× mopl", lambda x: f"{x:.2f}"),
    "extra GB": ("extra GiB", lambda x: f"{x:.1f}"), "log p": ("log p, nats", lambda x: f"{x:.1e}"),
    "grad": ("gradient", lambda x: f"{x:.1e}"),
}  # fmt: skip


def goal_tables(rows: Rows) -> list[str]:
    """Return a table for each mode at the size of its goal: variants, and everything that was measured of them."""
    lines: list[str] = []
    for mode, words in WORDS.items():
        size = f"{mode} {HEAD if mode in HEAD_MODES else LOGITS}"
        columns = dict(COLUMNS)
        columns["own"] = (f"of its {'products' if mode in HEAD_MODES else 'bytes'} alone", COLUMNS["own"][1])
        cells = []
        for variant in variants_of(rows, (size,)):
            row = rows[size, variant]
            name = f"**{variant}**" if variant == "mopl" else variant
            cells.append([name, *(figure(row, key, form) for key, (_, form) in columns.items())])
        if cells:
            title = f"{words[0].upper()}{words[1:]}, {size.split(' ')[1]}:"
            lines += [title, "", *table(["", *(head for head, _ in columns.values())], cells)]
    return lines


def size_tables(rows: Rows) -> list[str]:
    """Return a table for each mode: variants by size, milliseconds, share of the limit, extra memory."""
    goals_ = {f"{mode} {size}" for mode in WORDS for size in (HEAD, LOGITS)}
    sizes = [size for size, _ in rows if not size.startswith(("error", "tune")) and size not in goals_]
    lines: list[str] = []
    for mode, words in WORDS.items():
        own = [size for size in dict.fromkeys(sizes) if size.split(" ")[0] == mode]
        own.sort(key=lambda size: [int(n) for n in size.split(" ")[1].split("x")], reverse=True)
        cells = []
        for variant in variants_of(rows, own):
            cells.append([variant])
            for size in own:
                row = rows.get((size, variant))
                share = figure(row, "share", lambda x: f" ({x:.2f}") or ""
                memory = figure(row, "extra GB", lambda x: f", {x:.1f} GiB)")
                time = figure(row, "ms", lambda x: f"{x:.3g}")
                cells[-1].append(time + share + memory if row and row.get("share") else time)
        if cells:
            title = f"{words[0].upper()}{words[1:]}: ms (share of the limit, extra memory), rows x width x vocabulary:"
            lines += [title, "", *table(["", *(size.split(" ")[1] for size in own)], cells)]
    return lines


def list_table(rows: Rows) -> list[str]:
    """Return by the length of a list mopl's time, shares of the bytes, and multiples of mopl's time."""
    lines: list[str] = []
    shapes = dict.fromkeys(" ".join(size.split(" ")[:2]) for size, _ in rows)
    for shape in shapes:
        sizes = sorted({s for s, _ in rows if s.startswith(f"{shape} ")}, key=lambda s: int(s.split("K=")[1]))
        names = [v for v in variants_of(rows, sizes) if not v.startswith("its ") and v != "mopl"]

        def line(title: str, variant: str, key: str, digits: int = 2, sizes: list[str] = sizes) -> list[str]:
            return [title, *(figure(rows.get((s, variant)), key, lambda x: f"{x:.{digits}f}") for s in sizes)]

        cells = [line("mopl, ns an item and objective", "mopl", "ns", 4)]
        cells += [line(f"{v}, share of its bytes", v, "of bytes") for v in ("mopl", *names) if v in ("mopl", SORTS)]
        cells += [line(f"{variant}, × mopl", variant, "x mopl") for variant in names]
        loss, objectives = shape.split(" ")
        lines += [f"{LIST_WORDS[loss]}, {objectives}:", "", *table(["", *(s.split(" ")[-1] for s in sizes)], cells)]
    if lines:
        lines += [
            "A peer that sorts is beside mopl where it sorts too, all others beside mopl with the order given.",
            "",
        ]
    return lines


def step_table(rows: Rows) -> list[str]:
    """Return a training step's time, memory and tokens a second, case by case, and where the host set the time."""
    forms: dict[str, Callable[[float], str]] = {
        "ms": lambda x: f"{x:.0f}", "x TRL": lambda x: f"{x:.2f}", "extra GB": lambda x: f"{x:.1f}",
        "memory x TRL": lambda x: f"{x:.2f}", "tokens/s": lambda x: f"{x:,.0f}", "lists/s": lambda x: f"{x:.1f}",
    }  # fmt: skip
    cells = [
        [
            case if row.get("bound") != "host" else f"{case} (host-bound)",
            variant,
            *(figure(row, key, form) for key, form in forms.items()),
            row.get("differs from", ""),
        ]
        for case in dict.fromkeys(size for size, _ in rows)
        for (size, variant), row in rows.items()
        if size == case and "absent" not in row
    ]
    return table(["", "", *forms, "another loss than"], cells) if cells else []


def error_table(rows: Rows) -> list[str]:
    """Return errors by case and variant."""
    keys = ("log p max", "dh frozen", "worst row", "dh trained", "dW")
    cells = [
        [size.removeprefix("error "), variant, *(figure(row, key, lambda x: f"{x:.1e}") for key in keys)]
        for (size, variant), row in rows.items()
        if "absent" not in row
    ]
    return table(["rows x width x vocabulary", "", *keys], sorted(cells, key=lambda c: c[0])) if cells else []


def model_table(results: list[dict], judged: bool) -> list[str]:
    """Return what the performance model predicted beside what was measured."""
    verdict = {None: "", True: "met", False: "**missed**"}
    cells = []
    for row in results:
        times = (f"{row[key]:.3f}" if row[key] else "–" for key in ("limit_ms", "ms", "measured_ms"))
        cells.append([row["op"], row["name"], *times, *([row["goal"], verdict[row["met"]]] if judged else [])])
    return table(["", "", "limit, ms", "predicted", "measured", *(["goal", ""] if judged else [])], cells)


def source(found: dict[str, dict], prefix: str) -> list[str]:
    """Return the commands of these stages, with the day and the commit of each."""
    shown = [c for name, c in found.items() if name.startswith(prefix) and "command" in c]
    return [f"`{c['command']}`, {c['date']}, commit {c['commit']}" + (":" if c is shown[-1] else ";") for c in shown]


def figures(found: dict[str, dict], judged: bool = True) -> list[str]:
    """Return every table but that of the stages, each below a heading and the commands that measured it.

    `judged` adds what was wanted: goals are for those who develop, and a page for readers has what was measured.
    """
    lines: list[str] = []
    if limits := found.get("limits"):
        copy, product_ = limits["bytes_per_second"] / 1e12, limits["flop_per_second"] / 1e12
        lines += [f"Copy {copy:.2f} TB/s, bf16 product {product_:.0f} TFLOP/s (`{limits['command']}`).", ""]
    if judged:
        lines += ["### Goals", "", *goals(found)]
    first = {name: content for name, content in found.items() if name != "logprob-tuned"}
    errors = rows_of(found, "logprob-error")
    logprob = {key: row for key, row in rows_of(first, "logprob-").items() if key not in errors}
    parts = {
        "Log-probabilities": ("logprob-", goal_tables(logprob) + size_tables(logprob)),
        "Training steps": ("step", step_table(rows_of(found, "step"))),
        "List losses": ("lists", list_table(rows_of(found, "lists"))),
        "Errors": ("logprob-error", error_table(errors)),
    }
    for title, (prefix, tables) in parts.items():
        if tables:
            lines += [f"### {title}", "", *source(found, prefix), "", *tables]
    if "model" in found:
        card = found["model"]["card"]["name"]
        lines += [f"### The performance model ({card})", "", *model_table(found["model"]["results"], judged)]
    if "logprob-tune" in found:
        chosen = [[row["size"], row.get("fastest", "failed")] for row in found["logprob-tune"]["results"]]
        lines += ["### Chosen by `tune`", "", *table(["", "fastest"], chosen)]
    for kind, begin, prefixes in (
        ("absent", "Not measured", ("logprob-", "sanitizer", "step")),
        ("failed", "Failed", ("",)),
    ):
        rows = {(v, r[kind]) for p in prefixes for (_, v), r in rows_of(found, p).items() if kind in r}
        if rows:
            lines += [f"{begin}: " + "; ".join(f"{name} ({reason})" for name, reason in sorted(rows)) + ".", ""]
    return lines


def outcomes(folder: Path, only: str = "") -> list[str]:
    """Return what became of the stages whose names begin so, and the tests that failed."""
    path = folder / "stages.json"
    stages = json.loads(path.read_text()) if path.exists() else {}
    stages = {name: state for name, state in stages.items() if name.startswith(only)}
    rows = [
        [name, state["verdict"], f"{state['seconds']:.0f}", state.get("outcome") or "", f"`{state['command']}`"]
        for name, state in stages.items()
    ]
    failed = [f"* {name}: {line}" for name, state in stages.items() for line in state.get("failed", [])]
    return [*table(["", "", "seconds", "", "command"], rows), *failed, ""] if rows else []


def summary(folder: Path) -> str:
    """Return the page."""
    found = read(folder)
    title, versions = heading(found, folder.name)
    return "\n".join([f"# {title}", "", versions, "", *figures(found), "### Stages", "", *outcomes(folder)])


def section(folder: Path) -> str:
    """Return the figures for docs/performance.md."""
    found = read(folder)
    title, versions = heading(found, folder.name)
    tests = outcomes(folder, "tests")
    tests = ["### Tests on this card", "", *tests] if tests else []
    lines = figures(found, judged=False)
    if (lists := "### List losses") in lines:
        place, card = lines.index(lists) + 1, folder.name.removeprefix("nvidia-")
        lines[place:place] = ["", f"![Share of the bytes by the length of a list](pictures/lists-{card}.png)"]
    return "\n".join([f"{title}; {versions}.", "", *lines, *tests])


def written(page: str, folder: Path) -> str:
    """Return a page with the figures of a folder between its marks.

    Raises:
        ValueError: if the page has no marks for this folder.
    """
    found = 0
    for mark, make in {folder.name: section, f"{folder.name}, in short": in_short}.items():
        begin, end = f"<!-- bench.summary {mark} -->\n", "<!-- end -->"
        page, many = re.subn(
            f"{re.escape(begin)}.*?{end}",
            lambda _, begin=begin, make=make, end=end: f"{begin}\n{make(folder).strip()}\n\n{end}",
            page,
            flags=re.DOTALL,
        )
        found += many
    if not found:
        raise ValueError(f"the page has no <!-- bench.summary {folder.name} -->")
    return page


def main() -> None:
    """Print the page, or write the figures into others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="results of one card")
    parser.add_argument("--write", type=Path, nargs="+", metavar="PAGE.md", help="pages with marks for this folder")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if not arguments.write:
        print(summary(folder))
        return
    write_file(folder / "summary.md", summary(folder))
    for page in arguments.write:
        write_file(page, written(page.read_text(encoding="utf-8"), folder))


if __name__ == "__main__":
    main()
