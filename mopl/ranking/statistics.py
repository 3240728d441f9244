"""Figures about ranking data for reports, and the lines with which a run begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from mopl._counted import counted
from mopl._terminal import printable
from mopl.ranking.objectives import of_its_list

if TYPE_CHECKING:
    from mopl.ranking.data import RankingData


def statistics(data: RankingData) -> dict[str, Any]:
    """Return plain figures about data: sizes, the raw labels, and how sparse each objective is."""
    objectives = zip((data.main, *data.objectives), (data.raw_main, *data.raw_auxiliary.unbind(1)), strict=True)
    columns = zip(objectives, (data.main_labels, *data.labels.unbind(1)), data.labelled.unbind(1), strict=True)
    return {
        "name": data.name,
        "queries": len(data),
        "items": data.num_items,
        "features": data.num_features,
        "items_per_query": [int(data.lengths.min()), data.num_items / len(data), int(data.lengths.max())],
        "single_item_queries": int((data.lengths < 2).sum()),
        "objectives": {
            o.name: {
                "role": "main" if o is data.main else "auxiliary",
                "direction": o.direction,
                "normalize": o.normalize,
                "range": [raw.min().item(), raw.max().item()],
                "values": raw.unique().numel(),
                "equal_queries": _equal(raw, data.offsets).double().mean().item(),
                "positive_items": (labels > 0).double().mean().item(),
                "empty_queries": (~labelled).double().mean().item(),
                "largest": labels.max().item(),
            }
            for (o, raw), labels, labelled in columns
        },
    }


def _equal(raw: Tensor, offsets: Tensor) -> Tensor:
    """Return which lists (Q,) have one raw label (N,) for all items."""
    spread = of_its_list(raw, offsets, "amax") - of_its_list(raw, offsets, "amin")
    return spread[offsets[:-1]] == 0


def in_lines(figures: dict[str, Any]) -> str:
    """Return the figures of `statistics` as a few lines of text: of the labels as they stand in the data."""
    least, mean, most = figures["items_per_query"]
    size = f"{least} to {most}" if least < most else least
    lines = [
        f"{figures['name']}: {counted(figures['queries'], 'query')}, {counted(figures['items'], 'item')} "
        f"({size} a query, mean {mean:.1f}), {counted(figures['features'], 'feature')}"
    ]
    for name, o in figures["objectives"].items():
        (low, high), found = o["range"], f"{o['equal_queries']:.1%} of the queries with equal labels only"
        if o["direction"] == "max" and low >= 0:
            empty = f"{o['empty_queries']:.1%} of the queries without labels"
            found = f"{o['positive_items']:.1%} of the items above 0, {empty}"
        raw = f"{low:g} to {high:g}, {counted(o['values'], 'value')}"
        lines.append(f"  {o['role']:9} {name} ({o['direction']}, {o['normalize']}): {raw}; {found}")
    return "\n".join(printable(line, keep="") for line in lines)
