"""Draws what the stages of `bench.device` measured on one card, for README and docs/performance.md.

    python -m bench.pictures bench/results/nvidia-h200 [--out docs/pictures]

writes `performance-CARD.png` (log-probabilities: shares of the limit and errors, mopl and its peers) and
`lists-CARD.png` (list losses: shares of the bytes by the length of a list), of which one that nothing was measured for
is left out. Needs matplotlib (`.[eval]`). The background is white, so that the pictures look alike on light and dark
pages; each holds a fingerprint of the figures that it shows, which a test compares with the JSON files.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from bench.goals import HEAD, LOGITS
from bench.measured import HEAD_MODES, heading, read, rows_of, variants_of
from mopl._files import write_file

MOPL, PEER, FASTER, LINE, TEXT = "#1f6f8b", "#b9bec5", "#d98032", "#222222", "#222222"
SHOWN = ("ms", "share", "log p", "grad")
SUM = "////"  # hatched: gives a sum and no log-probability per token
TITLES = {
    "forward": "scoring", "frozen": "frozen head,\nforward + backward", "trained": "trained head,\nforward + backward",
    "gathered": "from logits,\nforward + backward",
}  # fmt: skip
LISTS = {
    "plackett-luce": {
        "mopl": "mopl, order given", "mopl, sorting": "mopl, sorting itself", "logcumsumexp": "logcumsumexp, eager",
        "torch.compile of logcumsumexp": "logcumsumexp, torch.compile", "allRank listMLE": "allRank (sorts)",
        "sentence-transformers ListMLE": "sentence-transformers (sorts)",
    },
    "listnet": {
        "mopl": "mopl", "log_softmax": "log_softmax, eager", "allRank listNet": "allRank",
        "torch.compile of log_softmax": "log_softmax, torch.compile",
    },
}  # fmt: skip
STYLES = {"torch.compile": ("#222222", "s", "-"), "allRank": ("#8a6fb0", "^", ":"), "eager": ("#80868e", "o", "--"),
          "sentence-transformers": ("#c08a3e", "v", ":")}  # fmt: skip
FONT = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
}


def fingerprint(drawn: object) -> str:
    """Return a short digest of the figures of a picture."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:16]


def heads(folder: Path) -> dict[str, Any] | None:
    """Return what the picture of the log-probabilities shows: rows by mode, in the order of the tables."""
    found = {k: v for k, v in read(folder).items() if k.startswith("logprob-") and k != "logprob-tuned"}
    rows = rows_of(found, "")
    drawn: dict[str, Any] = {"about": heading(found, folder.name)}
    for mode in TITLES:
        size = f"{mode} {LOGITS if mode == 'gathered' else HEAD}"
        names = (name for name in variants_of(rows, (size,)) if "ms" in rows[size, name])
        drawn[mode] = {name: {key: rows[size, name].get(key) for key in SHOWN} for name in names}
    drawn = {name: content for name, content in drawn.items() if name == "about" or "mopl" in content}
    return drawn if drawn.keys() & set(HEAD_MODES) else None


def lists(folder: Path) -> dict[str, Any] | None:
    """Return what the picture of the list losses shows: shares of the bytes by loss, variant and length."""
    found = {k: v for k, v in read(folder).items() if k.startswith("lists")}
    drawn: dict[str, Any] = {"about": heading(found, folder.name)}
    for loss, names in LISTS.items():
        lines: dict[str, list] = {}
        for (size, name), row in rows_of(found, "").items():
            if name in names and size.startswith(f"{loss} m=1 ") and row.get("of bytes"):
                lines.setdefault(name, []).append((int(size.split("K=")[1]), row["of bytes"]))
        if "mopl" in lines:
            drawn[loss] = {name: sorted(lines[name]) for name in names if name in lines}
    return drawn if len(drawn) > 1 else None


def _bars(axes: Any, mode: str, rows: dict[str, dict], names: list[str]) -> None:
    """Draw the shares of a mode as bars, with milliseconds; what is faster than mopl has a colour of its own."""
    mopl = rows["mopl"]["ms"]
    for place, name in enumerate(names):
        if name not in rows:
            axes.text(0.02, place, "not here", va="center", color="#80868e", size=8)
            continue
        row, ours = rows[name], name.startswith("mopl")
        faster = not ours and row["ms"] < mopl
        axes.barh(place, row["share"], 0.72, color=MOPL if ours else FASTER if faster else PEER,
                  hatch=SUM if name.endswith("sum") else None, edgecolor="white", linewidth=0)  # fmt: skip
        shown = f"{row['ms']:#.3g}" if row["ms"] < 100 else f"{row['ms']:.0f}"
        inside = row["share"] > 0.3
        axes.text(0.02 if inside else row["share"] + 0.02, place, f"{shown} ms", va="center", size=8,
                  color="white" if ours else TEXT, weight="bold" if ours or faster else "normal",
                  bbox={"facecolor": FASTER if faster else PEER, "edgecolor": "none", "pad": 0.8}
                  if name.endswith("sum") and inside else None)  # fmt: skip
    alone = next((row["share"] for name, row in rows.items() if name.startswith("its ")), None)
    if alone:
        axes.axvline(min(alone, 1), color=LINE, linewidth=1.6)
    axes.set(title=TITLES[mode], xlim=(0, 1.02), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xticklabels(["0", "", ".5", "", "1"])


def _errors(axes: Any, rows: dict[str, dict], names: list[str], key: str, title: str) -> None:
    """Draw errors as dots on a logarithmic axis: further to the left is better."""
    values = {place: rows[name][key] for place, name in enumerate(names) if rows.get(name, {}).get(key)}
    for place, value in values.items():
        colour = MOPL if names[place].startswith("mopl") else "#80868e"
        axes.plot(value, place, "D" if colour == MOPL else "o", color=colour, markersize=6)
        axes.annotate(f"{value:.1e}".replace("e-0", "e-"), (value, place), (7, 0), textcoords="offset points",
                      va="center", size=8, color=TEXT, weight="bold" if colour == MOPL else "normal")  # fmt: skip
    for place, name in enumerate(names):
        if place not in values:
            axes.annotate("gives none" if name.endswith("sum") else "not here", (0.02, place),
                          xycoords=("axes fraction", "data"), va="center", size=8, color="#80868e")  # fmt: skip
    axes.set(xscale="log", title=title)
    if values:
        axes.set_xlim(min(values.values()) / 3, max(values.values()) * (12 if key == "log p" else 5))
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    axes.minorticks_off()


def _named(axes: Any, names: list[str], labels: bool) -> None:
    axes.set(ylim=(len(names) - 0.4, -0.6), yticks=range(len(names)))
    axes.set_yticklabels(names if labels else [])
    axes.tick_params(axis="y", length=0)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set(color=MOPL if name.startswith("mopl") else TEXT, weight="bold" if name == "mopl" else "normal")


def _order(*modes: dict[str, dict]) -> list[str]:
    """Return who is drawn, mopl first."""
    names = dict.fromkeys(name for rows in modes for name in rows)
    return [name for name in names if not name.startswith("its ") and name != "mopl, again"]


def draw_heads(drawn: dict[str, Any]) -> Any:
    """Return the figure of `heads`."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    modes = [mode for mode in HEAD_MODES if mode in drawn]
    names, logits = _order(*(drawn[mode] for mode in modes)), _order(drawn.get("gathered", {}))
    inches = [0.95 + 0.25 * many for many in (len(names), max(len(names), len(logits)))]
    figure = Figure(figsize=(9.6, sum(inches) + 1.15), layout="constrained", facecolor="white")
    top, above, below, foot = figure.subfigures(4, 1, height_ratios=[0.3, *inches, 0.85])
    for column, mode in enumerate(modes):
        axes = above.add_subplot(1, len(modes), column + 1)
        _bars(axes, mode, drawn[mode], names)
        _named(axes, names, column == 0)
    if "gathered" in drawn:
        left = below.add_subplot(1, 3, 1)
        _bars(left, "gathered", drawn["gathered"], logits)
        _named(left, logits, True)
    for column, mode, key, title in (
        (2, modes[0], "log p", "largest error of log p, nats"), (3, modes[-1], "grad", "error of the gradient"),
    ):  # fmt: skip
        axes = below.add_subplot(1, 3, column)
        _errors(axes, drawn[mode], names, key, f"{title}\n(from hidden states)")
        _named(axes, names, column == 2)
    handles = [
        Patch(color=MOPL, label="mopl"), Patch(color=PEER, label="peer, slower"),
        Patch(color=FASTER, label="peer, faster than mopl"),
        Patch(facecolor=PEER, edgecolor="white", hatch=SUM, linewidth=0, label="gives a sum, not each log p"),
        Line2D([], [], color=LINE, linewidth=1.6, label="its products (bytes) alone"),
    ]  # fmt: skip
    words = "Share of the limit (longer is better), and errors against float64 (left is better)"
    foot.legend(handles=handles, loc="upper left", ncols=6, frameon=False, fontsize=8.5, columnspacing=1.3)
    shapes = f"{HEAD.replace('x', ' × ')} (rows × width × vocabulary); from logits {LOGITS.replace('x0x', ' × ')}"
    _around(top, foot, words, drawn["about"], f"bfloat16, {shapes}")
    return figure


def draw_lists(drawn: dict[str, Any]) -> Any:
    """Return the figure of `lists`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(9.6, 4.4), layout="constrained", facecolor="white")
    top, middle, foot = figure.subfigures(3, 1, height_ratios=[0.3, 3.6, 0.5])
    losses = [loss for loss in LISTS if loss in drawn]
    for column, loss in enumerate(losses):
        axes = middle.add_subplot(1, len(losses), column + 1)
        for name, line in drawn[loss].items():
            label = LISTS[loss][name]
            kind = next((style for part, style in STYLES.items() if part in label), None)
            colour, marker, dashes = kind or (MOPL, "D", "-" if name == "mopl" else ":")
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, linestyle=dashes, label=label,
                      markersize=4.5, linewidth=2.2 if name == "mopl" else 1.3)  # fmt: skip
        lengths = sorted({k for line in drawn[loss].values() for k, _ in line})
        axes.set_xscale("log", base=2)
        shown = FixedLocator(lengths[:: 2 if len(lengths) > 8 else 1])
        axes.xaxis.set(major_locator=shown, minor_locator=NullLocator())
        axes.xaxis.set_major_formatter(lambda k, _: f"{k:.0f}")
        axes.set(title="ListNet" if loss == "listnet" else "Plackett–Luce", xlabel="items of a list", ylim=(0, 1.02))
        axes.grid(color="#e3e6ea", linewidth=0.8)
        axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(0, -0.17), ncols=2)
    words = "Share of the bytes that must be moved, forward + backward (higher is better)"
    _around(top, foot, words, drawn["about"], "float32, one objective")
    return figure


def _around(top: Any, foot: Any, title: str, about: tuple[str, str], sizes: str) -> None:
    """Put the title above; below, which card, which day and commit, which sizes and which versions."""
    top.text(0.01, 0.4, title, weight="bold", size=11, va="center")
    versions = ", ".join(part for part in about[1].split(", ") if not part.startswith("python"))
    foot.text(0.01, 0.05, f"{about[0]}; {sizes}\n{versions}", size=8, color="#555555", va="bottom")


def picture(figure: Any, mark: str) -> bytes:
    """Return a figure as PNG of few colours, which is small, with the fingerprint as its description."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    drawn, file, about = io.BytesIO(), io.BytesIO(), PngInfo()
    figure.savefig(drawn, format="png", dpi=150)
    about.add_text("Description", mark)
    Image.open(drawn).convert("RGB").quantize(64).save(file, format="PNG", optimize=True, pnginfo=about)
    return file.getvalue()


def main() -> None:
    """Write the pictures of a folder."""
    from matplotlib import rc_context

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="results of one card")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="where pictures go")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    for name, (choose, draw) in PICTURES.items():
        if drawn := choose(folder):
            path = arguments.out / f"{name}-{folder.name.removeprefix('nvidia-')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with rc_context(FONT):
                write_file(path, picture(draw(drawn), fingerprint(drawn)))
            print(path)


PICTURES = {"performance": (heads, draw_heads), "lists": (lists, draw_lists)}

if __name__ == "__main__":
    main()
