"""Draw the pictures of docs/explanation/ into docs/pictures/.

Run: python docs/make_figures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from mopl.steering import rescale

PICTURES = Path(__file__).resolve().parent / "pictures"
BLUE, ORANGE, GREY = "#2563a8", "#c2410c", "#6b7280"


def hypervolume() -> Figure:
    """Three points of a front and the area that they dominate."""
    points = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
    figure, axes = plt.subplots(figsize=(4.2, 3.4), layout="constrained")
    for x, y in points:
        axes.fill_between([0, x], 0, y, color="#cfe0f3", linewidth=0)
    axes.plot(*zip(*points, strict=True), "o", color=BLUE, markersize=7)
    axes.plot(0, 0, "s", color=GREY, markersize=7, clip_on=False)
    axes.annotate("reference point (0, 0)", (0, 0), xytext=(8, 8), textcoords="offset points", color="#374151")
    for x, y in points:
        axes.annotate(f"({x:g}, {y:g})", (x, y), xytext=(7, 5), textcoords="offset points")
    axes.text(0.95, 1.05, "area 6", color=BLUE, ha="center", fontsize=12)
    axes.set(xlim=(0, 4), ylim=(0, 4), xlabel="objective 1 (more is better)", ylabel="objective 2 (more is better)")
    return figure


def front() -> Figure:
    """Losses of the best policy for each weight, and the same policy at other scales."""
    first, second = torch.tensor([2.0, 1.0, 0.0]).softmax(0), torch.tensor([0.0, 1.0, 2.5]).softmax(0)
    base = torch.tensor([0.2, 0.1, 0.0])
    figure, axes = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    for scale, colour in ((1.0, BLUE), (2.0, ORANGE)):
        losses = []
        for w in torch.linspace(0, 1, 11):
            scores = base + (w * first + (1 - w) * second).log()
            policy = rescale(scores, base, scale)
            change = (policy - base).log_softmax(0)
            losses.append((-(first * change).sum().item(), -(second * change).sum().item()))
        axes.plot(*zip(*losses, strict=True), "o-", color=colour, markersize=4, label=f"scale {scale:g}")
        if scale == 1.0:
            for index, words, side in (
                (0, "w = (0, 1)", "right"),
                (5, "w = (0.5, 0.5)", "right"),
                (10, "w = (1, 0)", "left"),
            ):
                axes.annotate(
                    words,
                    losses[index],
                    xytext=(-4 if side == "right" else 7, -12 if side == "right" else 4),
                    textcoords="offset points",
                    ha=side,
                )
    start = torch.log(torch.tensor(3.0)).item()
    axes.plot(start, start, "*", color=GREY, markersize=12, label="before training")
    axes.set(xlabel="loss of objective 1 (less is better)", ylabel="loss of objective 2 (less is better)")
    axes.margins(0.14)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Write the pictures."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    for name, draw in {"hypervolume": hypervolume, "trade-offs": front}.items():
        figure = draw()
        figure.savefig(PICTURES / f"{name}.png", dpi=130, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
