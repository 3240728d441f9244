"""Draws docs/pictures/readme.png from a finished run of `mopl align --demo`: its front, a slider, and two answers.

mopl align --demo
python docs/make_readme_picture.py runs/align-demo
"""

import argparse
import json
import textwrap
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PICTURE = Path(__file__).resolve().parent / "pictures" / "readme.png"
PROMPT = "Should I buy an umbrella or a raincoat?"
INK, SOFT, LINE, BLUE, RED, PURPLE = "#1a1d21", "#5a626c", "#d9dde3", "#2f6fb3", "#c2410c", "#9b2393"


def draw(run: Path, prompt: str = PROMPT) -> Figure:
    """Return the picture of a run: its accuracies, shares of held-out pairs of answers in the order of each reward."""
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    answers = {entry["prompt"]: entry["responses"] for entry in json.loads((run / "samples.json").read_text("utf-8"))}
    names, weights = found["objectives"], found["weights"]
    across, up = ([100 * row[j] for row in found["accuracy"]] for j in (0, 1))
    figure = Figure(figsize=(12, 5.4), facecolor="white")
    axes = figure.add_axes((0.065, 0.14, 0.42, 0.74))
    axes.grid(color=LINE, linewidth=0.8)
    axes.plot(across, up, "-", color=BLUE, linewidth=2, zorder=2)
    axes.plot(across, up, "o", color="white", markeredgecolor=BLUE, markeredgewidth=2, markersize=10, zorder=3)
    axes.plot([50], [50], "*", color=PURPLE, markersize=17, zorder=3)
    axes.annotate("before training", (50, 50), (-10, -20), textcoords="offset points", ha="right", color=PURPLE)
    for place in (0, len(weights) // 2, len(weights) - 1):
        axes.plot(across[place], up[place], "o", color=RED, markersize=11, zorder=4)
        text, at = f"w = ({weights[place][0]:g}, {weights[place][1]:g})", (across[place], up[place])
        axes.annotate(text, at, (10, 9), textcoords="offset points", color=RED, weight="bold")
    axes.margins(0.2, 0.12)
    axes.set_xlabel(f"pairs in the order of {names[0]}, %  →", color=INK)
    axes.set_ylabel(f"pairs in the order of {names[1]}, %  →", color=INK)
    axes.set_title("One training, every trade-off", loc="left", color=INK, weight="bold", fontsize=14)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

    page = figure.add_axes((0.53, 0.03, 0.46, 0.94))
    page.set(xlim=(0, 100), ylim=(0, 100))
    page.axis("off")
    page.text(0, 94, f"“{prompt}”", color=INK, fontsize=14, weight="bold", va="center")
    for place, height in ((0, 68), (len(weights) - 1, 24)):
        share = weights[place][0]
        knob = 3 + 31 * share
        page.plot([3, 34], [height, height], color=LINE, linewidth=7, solid_capstyle="round", zorder=1)
        page.plot([3, knob], [height, height], color=BLUE, linewidth=7, solid_capstyle="round", zorder=2)
        page.plot([knob], [height], "o", color=RED, markersize=15, zorder=3)
        page.text(1, height + 9, f"w = ({share:g}, {weights[place][1]:g})", color=RED, weight="bold", va="center")
        page.text(1, height - 8, names[1], color=SOFT, fontsize=10, va="center")
        page.text(36, height - 8, names[0], color=SOFT, fontsize=10, va="center", ha="right")
        text = " ".join(answers[prompt][place].split())
        lines = textwrap.wrap(text if text[-1] in ".!?" else f"{text} …", 33)  # cut off after a number of tokens
        box = FancyBboxPatch((42, height - 20), 57, 40, boxstyle="round,pad=0,rounding_size=2", fc="#f6f7f9", ec=LINE)
        page.add_patch(box)
        page.text(45, height, "\n".join(lines), color=INK, fontsize=11.5, va="center", linespacing=1.35)
    return figure


def main() -> None:
    """Draw the picture of the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the finished demo")
    style = {"font.family": "DejaVu Sans", "font.size": 12, "axes.edgecolor": SOFT, "xtick.color": SOFT}
    with rc_context({**style, "ytick.color": SOFT}):
        draw(parser.parse_args().run).savefig(PICTURE, dpi=125)


if __name__ == "__main__":
    main()
