"""Draws docs/pictures/readme.png and readme-dark.png from a finished demo: its front, and its answers at three weights.

mopl align --demo
python docs/make_readme_picture.py runs/align-demo
"""

import argparse
import json
import subprocess
import sys
import textwrap
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

PICTURES = Path(__file__).resolve().parent / "pictures"
PROMPT = "What makes a good friend?"
SHARES = (0.0, 0.5, 1.0)  # weights of sentiment whose answers are shown
TOKENS = 40  # of an answer: as many as the demo's own samples have
WIDTH, HEIGHT = 6.4, 7.0  # inches: on a phone of 390 pixels, a text of 12 points is 9 pixels high
COLOURS = {
    "readme.png": {"paper": "#ffffff", "ink": "#1a1d21", "soft": "#5a626c", "line": "#d9dde3", "front": "#2f6fb3",
                   "mark": "#c2410c", "base": "#9b2393"},
    "readme-dark.png": {"paper": "none", "ink": "#e6e9ee", "soft": "#a3acb8", "line": "#343b45", "front": "#6ea8e0",
                        "mark": "#fb923c", "base": "#e07bd8"},
}  # fmt: skip


def answers_of(run: Path, prompt: str = PROMPT) -> list[str]:
    """Return what `mopl generate` answers at each of the weights; dots end an answer that the limit cuts off."""
    found = []
    for share in SHARES:
        words = ["generate", str(run), "--weights", f"{share:g}", f"{1 - share:g}", "--max-new-tokens", f"{TOKENS}"]
        done = subprocess.run(
            [sys.executable, "-m", "mopl.cli", *words, "--json", prompt], check=True, stdout=subprocess.PIPE, text=True
        )
        answer = json.loads(done.stdout)
        text = " ".join(answer["text"].split())
        found.append(text if answer["finished"] else f"{text} …")
    return found


def draw(run: Path, answers: list[str], colours: dict[str, str], prompt: str = PROMPT) -> Figure:
    """Return the picture of a run: its accuracies, shares of held-out pairs of answers in the order of each reward."""
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert found["objectives"] == ["sentiment", "brevity"], "the words of the axes are those of the demo's objectives"
    shares = [row[0] for row in found["weights"]]
    across, up = ([100 * row[j] for row in found["accuracy"]] for j in (0, 1))
    ink, soft, line, mark = (colours[name] for name in ("ink", "soft", "line", "mark"))
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor=colours["paper"])

    def place(left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
        return left / WIDTH, bottom / HEIGHT, width / WIDTH, height / HEIGHT

    axes = figure.add_axes(place(0.85, 4.5, 5.35, 2.1), facecolor=colours["paper"])
    axes.grid(color=line, linewidth=0.8)
    axes.plot(across, up, "-o", color=colours["front"], linewidth=2, markersize=7, zorder=2)
    axes.plot([50], [50], "*", color=colours["base"], markersize=17, zorder=3)
    axes.annotate("before training", (50, 50), (-11, -5), textcoords="offset points", ha="right", color=colours["base"])
    for share in SHARES:
        at = across[shares.index(share)], up[shares.index(share)]
        axes.plot(*at, "o", color=mark, markersize=11, zorder=4)
        text = f"weight of sentiment {share:g}" if share == 0 else f"{share:g}"
        axes.annotate(text, at, (11, 3), textcoords="offset points", color=mark, weight="bold")
    axes.margins(0.09, 0.14)
    axes.set_xlabel("favours the more positive answer, % of pairs  →", color=ink)
    axes.set_ylabel("favours the shorter, %  →", color=ink)
    axes.set_title("One training, every trade-off", loc="left", x=-0.13, color=ink, weight="bold", fontsize=14)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    page.axis("off")
    page.patch.set_alpha(0)
    page.text(0.17, 3.72, f"“{prompt}”", color=ink, fontsize=14, weight="bold", va="center")
    page.text(
        WIDTH - 0.2, 3.71, "the rest of the weight is brevity's", color=soft, fontsize=9.5, va="center", ha="right"
    )
    start, end = 2.85, 6.1  # of a slider
    for number, (share, answer) in enumerate(zip(SHARES, answers, strict=True)):
        top = 3.37 - 1.06 * number
        knob = start + share * (end - start)
        page.text(0.17, top, f"weight of sentiment {share:g}", color=mark, weight="bold", va="center")
        page.plot([start, end], [top, top], color=line, linewidth=6, solid_capstyle="round", zorder=1)
        page.plot([start, knob], [top, top], color=colours["front"], linewidth=6, solid_capstyle="round", zorder=2)
        page.plot([knob], [top], "o", color=mark, markersize=13, zorder=3)
        lines = "\n".join(textwrap.wrap(answer, 66))
        page.text(0.17, top - 0.17, lines, color=ink, va="top", linespacing=1.25)
    note = f"A model of 135 million parameters after mopl align --demo; answers end at {TOKENS} tokens."
    page.text(0.17, 0.14, note, color=soft, fontsize=9.5, va="center")
    return figure


def main() -> None:
    """Draw the pictures of the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the finished demo")
    run = parser.parse_args().run
    answers = answers_of(run)
    for name, colours in COLOURS.items():
        soft = colours["soft"]
        style = {"axes.edgecolor": soft, "xtick.color": soft, "ytick.color": soft}
        with rc_context({"font.family": "DejaVu Sans", "font.size": 12, **style}):
            draw(run, answers, colours).savefig(PICTURES / name, dpi=180)


if __name__ == "__main__":
    main()
