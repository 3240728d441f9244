"""The table of methods, in the shape of Table 1 of the COS-DPO paper: one row a method, the best of each column marked.

`summarise` makes the cells once; the terminal, `table.txt` and the HTML page only lay them out.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mopl._extras import require
from mopl._terminal import Stream, is_terminal, spelled
from mopl.pareto import Front
from mopl.report.layout import Cell, Summary, aligned, as_text, columns_of
from mopl.report.records import Metric, by_method, clean, is_base, mean_and_std, number, read_all

if TYPE_CHECKING:
    from rich.console import Console

MISSING = "n/a"
COSTS = ("deviation", "KL to the reference")  # main figures that say how far a model went from the one before training


@dataclasses.dataclass(frozen=True)
class _Column:
    header: str
    anchor: str  # of its definition in the documentation
    sign: int  # +1: more is better, -1: less is better, 0: nothing is best
    figure: Callable[[list[Front]], tuple[float, float]]  # seeds of a method -> value, spread (NaN: none)
    digits: Callable[[float], str]
    main_sign: int = 0  # as `sign`, of the main figure without which this one is never the best; 0: it stands alone
    base: Callable[[list[Front]], float] | None = None  # the base model's figure, which stands beside


def _hypervolume_digits(records: Sequence[Front]) -> Callable[[float], str]:
    """Return one format for the column: four decimals, or one common power of ten where those would say nothing."""
    compared = [r for r in records if not is_base(r)] or records
    largest = max((abs(r.hypervolume) for r in compared if not math.isnan(r.hypervolume)), default=0.0)
    if largest == 0 or 1e-2 <= largest < 1e4:
        return lambda x: f"{x:.4f}"
    exponent = math.floor(math.log10(largest))
    return lambda x: f"{x / 10.0**exponent:.3f}e{exponent}"


def _over_seeds(attribute: str) -> Callable[[list[Front]], tuple[float, float]]:
    def figure(seeds: list[Front]) -> tuple[float, float]:
        mean, std = mean_and_std(number(getattr(r, attribute)) for r in seeds)
        return mean, std if std > 0 else math.nan

    return figure


def _measured(name: str) -> _Column:
    """Return the column of one of `Front.measures`."""

    def over_seeds(part: str) -> Callable[[list[Front]], tuple[float, float]]:
        def figure(seeds: list[Front]) -> tuple[float, float]:
            mean, std = mean_and_std(r.measures[name][part] if name in r.measures else math.nan for r in seeds)
            return mean, std if std > 0 else math.nan

        return figure

    base = over_seeds("base")
    return _Column(
        clean(name), "divergence", -1, over_seeds("value"), lambda x: f"{x:.4f}", base=lambda seeds: base(seeds)[0]
    )


def _main(seeds: list[Front]) -> tuple[float, float]:
    grids = [mean_and_std(p.main for p in r.trained_points) for r in seeds]
    spread = mean_and_std(std for _, std in grids)[0] if len(seeds[0].trained_points) > 1 else math.nan
    return mean_and_std(mean for mean, _ in grids)[0], spread


def _worst_main(seeds: list[Front], sign: int) -> float:
    """Return the worse end of the interval of a method's main figure, or the figure itself where there is none.

    It is the mean over the grid of the worse ends of its points, whose errors go together, since all are measured on
    the same lists; or, where that is worse, one standard deviation over seeds from the mean.
    """
    means = [mean_and_std(p.main for p in front.trained_points)[0] for front in seeds]
    mean, deviation = mean_and_std(means)
    ends = [p.intervals[0] or (p.main, p.main) for front in seeds for p in front.trained_points]
    measured = mean_and_std(low if sign > 0 else high for low, high in ends)[0]
    return sign * min(sign * measured, sign * mean - deviation)


def _cell(column: _Column, seeds: list[Front], best: bool) -> Cell:
    value, spread = column.figure(seeds)
    if math.isnan(value):
        return Cell(MISSING)
    text, detail = column.digits(value), ""
    if not math.isnan(spread):
        detail = f"± {column.digits(spread)}"
    elif column.main_sign and len(seeds) == 1 and (ends := seeds[0].interval.get("hypervolume")):
        detail = f"[{column.digits(ends[0])}, {column.digits(ends[1])}]"
    if column.base is not None:
        detail = f"{detail} (base {column.digits(column.base(seeds))})".strip()
    return Cell(text, detail, best)


def _best(column: _Column, groups: dict[str, list[Front]]) -> set[str]:
    """Return the methods that a column marks; figures that are printed alike are equal."""
    compared = {method: seeds for method, seeds in groups.items() if not is_base(seeds[0])}
    values = {method: column.figure(seeds)[0] for method, seeds in compared.items()}
    known = {method: column.sign * value for method, value in values.items() if not math.isnan(value)}
    needed = 1 if column.base is None else 2  # methods that were not trained for a measure do not lose in it
    if len(values) < 2 or len(known) < needed or column.sign == 0:
        return set()
    sign = column.main_sign
    if not sign:
        best = column.digits(column.sign * max(known.values()))
        return {method for method in known if column.digits(values[method]) == best}
    mains = {method: sign * _main(compared[method])[0] for method in known}
    floors = {method: sign * _worst_main(compared[method], sign) for method in known}

    def beaten(method: str) -> bool:
        return any(
            value > known[method] and column.digits(values[other]) != column.digits(values[method])
            and mains[other] >= floors[method]
            for other, value in known.items()
        )  # fmt: skip

    return {method for method in known if not math.isnan(mains[method]) and not beaten(method)}


def summarise(fronts: object, metric: Metric | None = None, notes: Sequence[str] = ()) -> Summary:
    """Return the cells of the table of methods.

    Several fronts of one method are its seeds: their hypervolume, regret and seconds become mean ± standard
    deviation over seeds. The main figure is the mean ± standard deviation over the grid of weights, as in the paper,
    averaged over seeds. Points at a `scale` other than 1 (moved towards the base after training) are left out of it.
    A row "base" is shown but never marked best: it has no trade-off to offer.

    A hypervolume is marked where no other method has both a larger one and a main figure at least within the interval
    of this one's main figure. So it stands for nothing that was bought with the main objective: of two methods, one
    with the larger hypervolume and one that keeps the main objective clearly better, both are marked. The interval is
    that of the bootstrap, or one standard deviation over seeds where this is wider; without either it is the figure
    itself. A method whose main figure is not known is not marked.

    What methods were trained for besides the objectives (`Front.measures`) stands first, with the base model's figure.
    Parameters are `Front.inference_parameters`; where not every front says these, all are `Front.parameters`. The
    arguments are those of `print_table`.
    """
    metric = metric or Metric()
    records = read_all(fronts)
    groups = by_method(records)
    references = {tuple(r.reference_point) for r in records if not math.isnan(r.hypervolume)}
    kept, long = all(r.inference_parameters is not None for r in records), any(r.seconds >= 100 for r in records)
    better, counted = 1 if metric.higher_is_better else -1, "inference_parameters" if kept else "parameters"
    main = "drift" if better < 0 and records[0].main in COSTS else "main-objective"
    measured = [_measured(name) for name in dict.fromkeys(name for record in records for name in record.measures)]
    columns = [
        *measured,
        _Column(
            "Aux. hypervolume",
            "hypervolume",
            int(len(references) < 2),
            _over_seeds("hypervolume"),
            _hypervolume_digits(records),
            main_sign=better,
        ),
        _Column(clean(f"{records[0].main} {metric.of_main}"), main, better, _main, lambda x: f"{x:.3f}"),
        _Column("Steering regret", "steering-regret", -1, _over_seeds("regret"), lambda x: f"{x:.4f}"),
        _Column("Seconds", "seconds", -1, _over_seeds("seconds"), lambda x: f"{x:,.0f}" if long else f"{x:.1f}"),
        _Column("Parameters", "parameters", -1, _over_seeds(counted), lambda x: f"{x:,.0f}"),
    ]
    arrows = {1: " ↑", 0: "", -1: " ↓"}
    best = [_best(column, groups) for column in columns]
    rows = tuple(
        (
            clean(method) + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""),
            tuple(_cell(column, seeds, method in marked) for column, marked in zip(columns, best, strict=True)),
        )
        for method, seeds in groups.items()
    )
    headers = ("Method", *(column.header + arrows[column.sign] for column in columns))
    own = [f"{record.method}: {note}" for record in records for note in record.notes]
    notes = [*notes, *dict.fromkeys(own), *(_behind_base(groups) if len(references) < 2 else ())]
    note = _note(records, groups, references, metric, best[len(measured) :], kept, notes)
    return Summary(headers, rows, note, tuple(column.anchor for column in columns))


def _note(
    records: Sequence[Front],
    groups: dict[str, list[Front]],
    references: set[tuple[float, ...]],
    metric: Metric,
    best: Sequence[set[str]],
    kept: bool,
    notes: Sequence[str],
) -> str:
    """Return what stands below the table; `best` holds the marked methods of each column from the hypervolume on."""
    parts = ["* best in its column"] if any(best) else []
    if best[0]:
        main = clean(f"{records[0].main} {metric.of_main}")
        parts = [
            f"* best in its column; for hypervolume: no other method has both a larger one and a {main} as good as "
            "this method's, to within its interval"
        ]
    if any(not math.isnan(_main(seeds)[1]) for seeds in groups.values()):
        grids = {len(r.trained_points) for r in records if not is_base(r)}
        over = f"the {grids.pop()} weights of the grid" if len(grids) == 1 else "the weights of the grid"
        parts.append(f"± of {clean(records[0].main)}: standard deviation over {over}")
    if any(len(seeds) > 1 for seeds in groups.values()):
        parts.append("other ±: standard deviation over seeds")
    elif any("hypervolume" in r.interval for r in records):
        parts.append("[low, high]: bootstrap interval over lists")
    if steps := [text for method, seeds in groups.items() if (text := _steps_kept(method, seeds))]:
        parts.append(f"steps kept, of those done: {', '.join(steps)}")
    named = ", ".join(clean(name) for name in records[0].objectives)
    if len(references) > 1:
        parts.append("reference points differ, so hypervolumes cannot be compared")
    elif references:
        reference = next(iter(references))
        parts.append(f"hypervolume of ({named}) from reference point ({', '.join(f'{x:g}' for x in reference)})")
    else:
        parts.append(f"hypervolume of ({named})")
    if any(not math.isnan(number(r.regret)) for r in records):
        parts.append(
            "steering regret: how far asking for weights falls short of the method's best point for them, on average"
        )
    counted = "all that must be kept for every trade-off, base included" if kept else "those that were trained"
    parts.append(f"parameters: {counted}")
    return clean("; ".join([*parts, metric.describe()]) + ".") + "".join(f"\nNote: {clean(note)}." for note in notes)


def _behind_base(groups: dict[str, list[Front]]) -> list[str]:
    """Return a note that names the methods whose hypervolume is below that of the only base model."""
    volumes = {method: mean_and_std(number(r.hypervolume) for r in seeds)[0] for method, seeds in groups.items()}
    base = [volumes[method] for method, seeds in groups.items() if is_base(seeds[0])]
    behind = [method for method, volume in volumes.items() if len(base) == 1 and volume < base[0]]
    if not behind:
        return []
    return [
        f"{', '.join(behind)}: hypervolume below that of the model before training (base), so the training spoiled "
        "more of an objective than it gained; a lower learning rate, other steps or more data may help"
    ]


def _steps_kept(method: str, seeds: list[Front]) -> str:
    """Return which steps of a method's models validation kept, in words; "" where it always was the last one."""
    steps = [r.steps for r in seeds if r.steps]
    if not steps or all(s["kept"] == [s["limit"]] * len(s["kept"]) for s in steps):
        return ""
    kept, done = (sorted(x for s in steps for x in s[name]) for name in ("kept", "done"))
    spans = [f"{each[0]}" if each[0] == each[-1] else f"{each[0]} to {each[-1]}" for each in (kept, done)]
    return f"{clean(method)} {spans[0]} of {spans[1]}"


def as_rich(summary: Summary, columns: int) -> Any:
    """Return the table as a rich renderable that fits `columns`: details move below their values, then rows stack."""
    require("rich", what="the table on a terminal")
    from rich import box
    from rich.console import Console, Group
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    def figure(value: str, detail: str, best: bool) -> Text:
        return Text(value, style="bold green" if best else "").append(detail, style="not bold dim")

    def table(narrow: bool) -> Table:
        lines = narrow and len(summary.rows) > 1
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_lines=lines)
        grid.add_column(summary.headers[0], style="bold")
        figures = []
        for header, cells in zip(summary.headers[1:], columns_of(summary), strict=True):
            if narrow:
                title = header.replace(" ", "\n", 1)
                pairs = [(cell.value + "*" * cell.best, f"\n{cell.detail}" if cell.detail else "") for cell in cells]
            else:
                title, pairs = aligned(header, cells)
            grid.add_column(Text(title), justify="right" if narrow else "left")
            figures.append([figure(*pair, cell.best) for pair, cell in zip(pairs, cells, strict=True)])
        for (name, _), row in zip(summary.rows, zip(*figures, strict=True), strict=True):
            grid.add_row(Text(name.replace(" (", "\n(") if narrow else name), *row)
        return grid

    def stacked() -> Group:
        parts: list[Any] = []
        for name, cells in summary.rows:
            parts.append(Text(name, style="bold"))
            for header, cell in zip(summary.headers[1:], cells, strict=True):
                value = figure(cell.value + "*" * cell.best, f" {cell.detail}".rstrip(), cell.best)
                parts.append(Text(f"  {header}: ").append_text(value))
        return Group(*parts, "")

    # Without a height rich takes a dumb terminal for 80 columns wide, and every table would seem to fit.
    probe = Console(width=10_000, height=100)
    for grid in (table(narrow=False), table(narrow=True)):
        if Measurement.get(probe, probe.options, grid).maximum <= columns:
            return Group(grid, Text(summary.note, style="dim"))
    return Group(stacked(), Text(summary.note, style="dim"))


def print_table(
    fronts: object, console: Console | None = None, *, metric: Metric | None = None, notes: Sequence[str] = ()
) -> str:
    """Print the table of methods and return it as plain text.

    On a terminal it is drawn by rich, fitted to its width; piped, or on a console that is no terminal, it is the
    plain text that is returned, which is also what belongs into `table.txt`.

    Args:
        fronts: One `mopl.pareto.Front` (or mapping like front.json), or a sequence of them; several of one method
            are its seeds. See `summarise`.
        console: A `rich.console.Console` to print to; None prints to standard output.
        metric: What the figures are; default NDCG@10 with the paper's conventions.
        notes: What else a reader must know, added to the note below the table.

    Returns:
        The plain text, aligned, without ANSI codes, ending in a newline.

    Raises:
        ImportError: If standard output is a terminal and rich is not installed.
        ValueError: If the fronts are not fronts of one task.
    """
    summary = summarise(fronts, metric, notes)
    text = as_text(summary)
    stream: Any = sys.stdout if console is None else console.file
    if stream is None:  # closed before Python started
        return text
    shown = _spelled(summary, getattr(stream, "encoding", None))
    if console is None and is_terminal(stream):
        require("rich", what="the table on a terminal")
        from rich.console import Console

        drawn: Any = stream.in_colour() if isinstance(stream, Stream) else stream
        console = Console(file=drawn)
    if console is not None and console.is_terminal:
        console.print(as_rich(shown, console.width))
    else:
        stream.write(as_text(shown))
    return text


def _spelled(summary: Summary, encoding: str | None) -> Summary:
    """Return the table in characters that an encoding can hold; before it is laid out, so that columns stay aligned."""

    def cell(one: Cell) -> Cell:
        return Cell(spelled(one.value, encoding), spelled(one.detail, encoding), one.best)

    rows = tuple((spelled(name, encoding), tuple(map(cell, cells))) for name, cells in summary.rows)
    headers = tuple(spelled(header, encoding) for header in summary.headers)
    return Summary(headers, rows, spelled(summary.note, encoding), summary.anchors)
