"""One HTML file with a slider over the trade-offs: no network, no library, readable without a script.

`page.html`, `page.css` and `page.js` beside this file are the page, behind what all pages share (`mopl/_page`); here
its tables are made, everything is escaped, and the fronts are embedded as JSON. The script shows only numbers of that
JSON.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from html import escape
from math import isnan
from pathlib import Path
from typing import Any

from mopl._counted import counted
from mopl._page import page_html, page_script, page_style
from mopl._terminal import printable
from mopl.pareto import Front, csv_text
from mopl.report.records import Metric, base_points, data_names, is_base, jsonable, read_all, to_json, write
from mopl.report.table import MISSING, Summary, summarise

DOCUMENTATION = "https://mopl-project.github.io/mopl/"  # as in pyproject.toml
# Short definitions, by their anchors on the page of the documentation about figures.
DEFINITIONS = {
    "weights": "How much each objective counts; weights are not negative and sum to 1.",
    "pareto-front": "The trade-offs that no other one beats in every objective.",
    "hypervolume": "Volume between the front and a reference point: larger is a better front.",
    "main-objective": "The figure that the trade-offs should not spoil.",
    "drift": "How far the model has moved from the model before training.",
    "steering-regret": "How far asking for weights falls short of the method's best point for them, on average.",
    "divergence": "How far the student is from its teachers, token by token.",
    "seconds": "Training time of the method.",
    "parameters": "Parameters that must be kept to answer every trade-off.",
}
Samples = Sequence[Sequence[str | Mapping[str, str]]]
Answers = Sequence[Mapping[str, Any]]


def write_page(
    fronts: object,
    path: str | os.PathLike[str],
    *,
    metric: Metric | None = None,
    base: object = None,
    truth: Sequence[Sequence[float]] | None = None,
    configuration: object = None,
    samples: Answers | Samples | Mapping[str, Samples] | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
    picture: str | os.PathLike[str] | None = None,
    continuous: Collection[str] = (),
    accuracy: Mapping[str, Sequence[Sequence[float | None]]] | None = None,
) -> Path:
    """Write the page: sliders over the weights, the metrics at the chosen ones, the front, the table of methods.

    A link to one trade-off is the page's address with `#w=3`, the point's place in front.json, or `#w=0.3,0.7`, the
    weights; `&method=`, `&seed=`, `&scale=` and the axes `&x=`, `&y=` (numbers of objectives, m for the main one)
    choose the rest. Where points carry other scales than 1, a second slider sets the distance from the base model.

    Args:
        fronts: One `mopl.pareto.Front` (or mapping like front.json), or a sequence of them.
        path: The file; it appears whole or not at all. Missing folders are made.
        metric: What the figures are; default NDCG@10 with the paper's conventions.
        base: The base model as a point, `{"main": x, "auxiliary": [...]}`, or a sequence with one (or None) for each
            front; default the only point of the front whose method is "base", of the same seed where there are several.
        truth: The true front, `(n, m)` auxiliary figures, where it is known.
        configuration: The run's configuration, anything that JSON can hold; folded away at the end of the page.
        samples: Texts shown beside the slider, in one of three forms. Answers to prompts,
            `[{"prompt": ..., "method": ..., "responses": [...]}, ...]`, one response for each point of that method's
            front, or for each at scale 1; None where there is none. For each point of a front a list of texts, or of
            `{"prompt": ..., "text": ...}`: a list of these lists belongs to the first front that is not the base
            model, a mapping holds one for each method. A point without texts shows those of the nearest weights that
            have some, and says so; texts of the method "base" stand beside the others as those before training.
        title: Heading; default names the data.
        notes: What else a reader must know, added to the note below the table.
        picture: A PNG of the fronts, shown where scripts are off.
        continuous: Methods that answer at any weights: figures between their evaluated points are interpolated.
        accuracy: By method, for each point of its front the accuracy of each objective, shares in [0, 1] or None.

    Returns:
        The path.

    Raises:
        ValueError: If the fronts do not belong together, or samples or accuracies do not fit the points.
    """
    metric = metric or Metric()
    records = read_all(fronts)
    origins = base_points(records, base)
    m = len(records[0].objectives)
    if truth is not None and any(len(row) != m for row in truth):
        raise ValueError(f"truth must have one column for each of the {m} objectives: shape (n, {m})")
    data = {
        "fronts": [record.to_dict() for record in records],
        "metric": {"name": metric.name, "main_name": metric.of_main, "higher_is_better": metric.higher_is_better},
        "bases": [None if o is None else {"main": o.main, "auxiliary": o.auxiliary} for o in origins],
        "is_base": [is_base(record) for record in records],
        "truth": truth,
        "samples": (texts := _samples(records, samples)),
        "continuous": sorted(continuous),
        "accuracy": (right := _accuracies(records, accuracy or {})),
        "csv": csv_text(records),
    }
    summary = summarise(fronts, metric, notes)
    first = records[0]
    parts = {
        "title": escape(title if title is not None else f"{data_names(records)}: choose the trade-off"),
        "subtitle": escape(_subtitle(first, metric)),
        "about_weights": _about("weights"),
        "about_front": _about("pareto-front"),
        "picture": _embedded(picture),
        "methods": _methods_table(summary),
        "note": escape(summary.note).replace("\n", "<br>"),
        "points": "\n".join(_points_table(record, metric, right.get(record.method)) for record in records),
        "every_sample": _every_sample(records, texts),
        "configuration": _configuration(configuration),
        "data": to_json(data),
        "style": page_style("mopl.report"),
        "script": page_script("mopl.report", "figures.js", "parts.js", "bars.js", "parallel.js", "downloads.js"),
    }
    # One pass, so that a name which looks like a placeholder is left alone.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page_html("mopl.report"))
    return write(path, printable(page).encode("utf-8"))


def format_number(x: float) -> str:
    """Return a figure as the page shows it: four decimals, or an exponent for very small and very large ones.

    Rounds half away from zero, as the script does, so that the tables and the bars never disagree in a digit.
    """
    if isnan(x):
        return MISSING
    if x != 0 and not 1e-3 <= abs(x) < 1e5:
        exponent = Decimal(x).adjusted()
        mantissa = Decimal(x).scaleb(-exponent).quantize(Decimal("0.01"), ROUND_HALF_UP)
        return f"{mantissa}e{exponent}" if abs(mantissa) < 10 else f"{mantissa / 10:.2f}e{exponent + 1}"
    return str(Decimal(x + 0.0).quantize(Decimal("0.0001"), ROUND_HALF_UP))


def _subtitle(front: Front, metric: Metric) -> str:
    """Return which objectives there are, and what the main figure is: an objective, or the cost of the others."""
    role, figure = ("main objective", f" ({metric.of_main})") if metric.higher_is_better else ("cost", "")
    return f"Objectives {', '.join(front.objectives)}; {role}: {front.main}{figure or f' {metric.of_main}'}."


def _about(anchor: str, text: str | None = None) -> str:
    """Return a link to the definition of a figure, with a short one that needs no network."""
    href, short = f"{DOCUMENTATION}explanation/metrics/#{anchor}", escape(DEFINITIONS[anchor])
    shown = escape("what is this?" if text is None else text)
    return f'<a class="about" href="{href}" title="{short}">{shown}</a>'


def _embedded(picture: str | os.PathLike[str] | None) -> str:
    if picture is None:
        return ""
    content = base64.b64encode(Path(picture).read_bytes()).decode("ascii")
    return f'<img src="data:image/png;base64,{content}" alt="The front of every method; its points are in the tables.">'


def _accuracies(
    records: Sequence[Front], accuracy: Mapping[str, Sequence[Sequence[float | None]]]
) -> dict[str, list[list[float | None]]]:
    for record in records:
        for rows, points in [(accuracy[record.method], record.points)] if record.method in accuracy else ():
            if len(rows) > len(points) or any(len(row) != len(record.objectives) for row in rows):
                raise ValueError(
                    f"accuracy of {record.method!r} must have a row for each of at most "
                    f"{counted(len(points), 'point')}, with {counted(len(record.objectives), 'entry')}"
                )
    return {method: [list(row) for row in rows] for method, rows in accuracy.items()}


def _methods_table(summary: Summary) -> str:
    rows = []
    for name, cells in summary.rows:
        figures = []
        for cell in cells:
            value = escape(cell.value)
            if cell.best:
                value = f'<span class="best">{value}*<span class="hidden"> best</span></span>'
            detail = f"<small>{escape(cell.detail)}</small>" if cell.detail else ""
            figures.append(f"<td>{value}{detail}</td>")
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(figures)}</tr>')
    headers = [
        header.replace(" ↑", "\N{NO-BREAK SPACE}↑").replace(" ↓", "\N{NO-BREAK SPACE}↓") for header in summary.headers
    ]
    links = dict(zip(headers, (None, *summary.anchors), strict=True))
    return _table(headers, rows, links=links)


def _points_table(record: Front, metric: Metric, right: Sequence[Sequence[float | None]] | None) -> str:
    scaled = any(point.scale != 1.0 for point in record.points)
    headers = ["#", *(["scale"] if scaled else []), *(f"w {name}" for name in record.objectives)]
    headers += [f"{record.main} ({'main' if metric.higher_is_better else 'cost'})", *record.objectives]
    headers += [f"accuracy {name}" for name in record.objectives] if right else []
    rows = []
    for index, point in enumerate(record.points):
        weights = [f"{w:.3g}" for w in point.weights] or [MISSING] * len(record.objectives)
        figures = [format_number(x) for x in point.figures]
        cells = [str(index), *([f"{point.scale:.3g}"] if scaled else []), *weights, *figures]
        if right:
            known = right[index] if index < len(right) else [None] * len(record.objectives)
            cells += [MISSING if x is None else f"{100 * x:.0f} %" for x in known]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    caption = f"<caption>{escape(record.method)}, seed {record.seed}: {escape(metric.name)}</caption>"
    where = escape(f"Points of {record.method}, seed {record.seed}")
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{where}">{_table(headers, rows, caption)}</div>'


def _table(
    headers: Sequence[str], rows: Sequence[str], caption: str = "", links: Mapping[str, str | None] | None = None
) -> str:
    def heading(header: str) -> str:
        anchor = (links or {}).get(header)
        return escape(header) if anchor is None else _about(anchor, header)

    head = "".join(f'<th scope="col">{heading(header)}</th>' for header in headers)
    body = "\n".join(rows)
    return f"<table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _configuration(configuration: object) -> str:
    if configuration is None:
        return ""
    text = json.dumps(jsonable(configuration), indent=2, ensure_ascii=False)
    return f'<details class="card"><summary>Configuration of the run</summary><pre>{escape(text)}</pre></details>'


def _samples(records: Sequence[Front], samples: Any) -> list[Any] | None:
    """Return the samples as one entry for each front: None, or for each point a list of {"prompt", "text"}."""
    if samples is None:
        return None
    own = [record for record in records if not is_base(record)] or list(records)
    given: dict[int, Any] = {}
    if not isinstance(samples, Mapping) and any(isinstance(one, Mapping) for one in samples):
        samples = _by_point(records, samples)
    if isinstance(samples, Mapping):
        unknown = set(samples) - {record.method for record in records}
        if unknown:
            raise ValueError(f"samples name the methods {sorted(unknown)} but there are no such fronts")
        for index, record in enumerate(records):
            if record.method in samples:
                given[index] = samples[record.method]
    else:
        given[records.index(own[0])] = samples
    for index, points in given.items():
        if isinstance(points, str) or len(points) != len(records[index].points):
            raise ValueError(
                f"samples hold {counted(len(points), 'entry')} but front {records[index].method!r} has "
                f"{counted(len(records[index].points), 'point')}; pass one list of texts for each point"
            )
        given[index] = [[_sample(one) for one in texts] for texts in points]
    return [given.get(index) for index in range(len(records))]


def _by_point(records: Sequence[Front], answers: Answers) -> dict[str, list[list[dict[str, str]]]]:
    """Return answers to prompts as a list of {"prompt", "text"} for each point of each method's front."""
    found: dict[str, list[list[dict[str, str]]]] = {}
    for answer in answers:
        fields = ("prompt", "method", "responses")
        if not isinstance(answer, Mapping) or not all(field in answer for field in fields):
            raise ValueError(f"a sample must have {', '.join(fields)}, got {answer!r}")
        front = next((record for record in records if record.method == answer["method"]), None)
        if front is None:
            raise ValueError(f"samples name the methods [{answer['method']!r}] but there are no such fronts")
        responses, places = answer["responses"], list(range(len(front.points)))
        trained = [place for place in places if front.points[place].scale == 1.0]
        if isinstance(responses, str) or len(responses) not in (len(places), len(trained)):
            raise ValueError(
                f"a sample of {front.method!r} has {counted(len(responses), 'response')} but the front has "
                f"{counted(len(places), 'point')}, {len(trained)} of them at scale 1; pass one response for each"
            )
        if len(responses) != len(places):
            places = trained
        points = found.setdefault(front.method, [[] for _ in front.points])
        for place, text in zip(places, responses, strict=True):
            if text is not None:
                points[place].append({"prompt": answer["prompt"], "text": text})
    return found


def _sample(sample: object) -> dict[str, str]:
    if isinstance(sample, str):
        return {"text": sample}
    if isinstance(sample, Mapping) and isinstance(sample.get("text"), str):
        return {key: str(sample[key]) for key in ("prompt", "text") if sample.get(key) is not None}
    raise ValueError(f'a sample must be a text or {{"prompt": ..., "text": ...}}, got {sample!r}')


def _every_sample(records: Sequence[Front], samples: Sequence[Any] | None) -> str:
    """Return all samples as text for readers without a script."""
    parts = []
    for record, points in zip(records, samples or [], strict=False):
        rows = []
        for point, texts in zip(record.points, points or [], strict=False):
            if not texts:
                continue
            names = [f"{name} {w:.3g}" for name, w in zip(record.objectives, point.weights, strict=False)]
            names += [f"scale {point.scale:.3g}"] if point.scale != 1.0 else []
            rows.append(f"<dt>{escape(', '.join(names) or record.method)}</dt>")
            for sample in texts:
                prompt = f'<span class="prompt">{escape(sample["prompt"])}</span>' if "prompt" in sample else ""
                rows.append(f'<dd class="sample">{prompt}{escape(sample["text"])}</dd>')
        if rows:
            parts.append(f"<h2>{escape(record.method)}, seed {record.seed}</h2>\n<dl>" + "\n".join(rows) + "</dl>")
    if not parts:
        return ""
    return '<details class="card"><summary>Every sample</summary>\n' + "\n".join(parts) + "\n</details>"
