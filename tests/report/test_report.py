"""The table, the picture and the page of a front: the numbers shown are those of front.json."""

import copy
import csv
import html
import io
import json
import math
import random
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser

import pytest
from browsing import CHROMIUM, needs_browser

from mopl.pareto import Front, Point
from mopl.report import Metric, plot_front, print_table, write_csv, write_page
from mopl.report.layout import as_text, width
from mopl.report.page import format_number
from mopl.report.records import jsonable, read, to_json
from mopl.report.table import summarise

NAMES = ["click count", "url clicks", "dwell time", "quality", "quality 2", "freshness"]
NASTY = ['<b>"price" & value</b>', "_under $x^2$", "</script><script>alert(1)</script>", "{{data}} ’naïve’", "[red]e"]


def front(method="weight-cos-dpo", m=2, seed=0, *, shift=0.0, names=None, scales=(1.0,), **fields):
    """A mapping like front.json with 11 weights for m = 2, the vertices and the centre above."""
    random_state = random.Random(f"{method} {m} {seed}")
    if m == 2:
        grid = [[round(0.1 * i, 1), round(1 - 0.1 * i, 1)] for i in range(11)]
    else:
        grid = [[float(i == j) for i in range(m)] for j in range(m)] + [[1 / m] * m]
    points = []
    for scale in scales:
        for weights in grid:
            auxiliary = [0.3 + shift + 0.2 * w / scale + random_state.gauss(0, 0.004) for w in weights]
            main = 0.45 + shift + random_state.gauss(0, 0.01)
            ends = {"main": [main - 0.01, main + 0.012], "auxiliary": [[x - 0.01, x + 0.013] for x in auxiliary]}
            point = {"weights": weights, "main": main, "auxiliary": auxiliary, "interval": ends}
            points.append(point if scale == 1.0 else point | {"scale": scale})
    return {
        "method": method,
        "objectives": names or NAMES[:m],
        "main": "relevance",
        "points": points,
        "hypervolume": 0.2 + shift,
        "reference_point": [0.0] * m,
        "seconds": 38.2,
        "parameters": 50432,
        "seed": seed,
        "data": "travel",
        "interval": {"hypervolume": [0.19 + shift, 0.21 + shift]},
        "regret": 0.003 - shift / 100,
        **fields,
    }


def base(m=2):
    point = {"weights": [], "main": 0.4901, "auxiliary": [0.3002] * m}
    return front("base", m, points=[point], hypervolume=0.09, seconds=12.0, parameters=180000, regret=None, interval={})


def several(m=2, **fields):
    shifts = {"weight-cos-dpo": 0.0, "dpo-ls": -0.015, "dpo-soup": -0.03}
    return [front(name, m, shift=shift, **fields) for name, shift in shifts.items()]


# --- the table


def test_table_has_the_columns_of_the_papers_table_and_one_row_a_method(capsys):
    fronts = [base(), *several()]
    fronts[2]["seconds"], fronts[2]["parameters"] = 412.0, 551232
    assert capsys.readouterr().out == "" and print_table(fronts) == capsys.readouterr().out  # piped: the text itself
    lines = as_text(summarise(fronts), 200).splitlines()
    assert re.split(r"  +", lines[0]) == [
        "Method",
        "Aux. hypervolume ↑",
        "relevance NDCG@10 ↑",
        "Steering regret ↓",
        "Seconds ↓",
        "Parameters ↓",
    ]
    mains = [p["main"] for p in fronts[2]["points"]]
    mean = sum(mains) / 11
    std = math.sqrt(sum((x - mean) ** 2 for x in mains) / 11)
    assert lines[4].split() == f"dpo-ls 0.1850 [0.1750, 0.1950] {mean:.3f} ± {std:.3f} 0.0032 412 551,232".split()
    assert [line.split()[0] for line in lines[2:6]] == ["base", "weight-cos-dpo", "dpo-ls", "dpo-soup"]


def test_best_value_of_each_column_is_marked_and_the_base_model_never_is():
    fronts = [base(), *several()]
    fronts[2]["seconds"] = 20.0
    best = {name: [cell.best for cell in cells] for name, cells in summarise(fronts).rows}
    assert best["base"] == [False] * 5
    assert best["weight-cos-dpo"] == [True, True, True, False, True]
    assert best["dpo-ls"] == [False, False, False, True, True]  # equal numbers of parameters are both the best
    assert not any(cell.best for _, cells in summarise([base(), front()]).rows for cell in cells)  # nothing to compare


def test_a_method_behind_the_model_before_training_is_named():
    note = "hypervolume below that of the model before training (base)"
    assert note not in summarise([base(), *several()]).note
    found = summarise([{**base(), "hypervolume": 0.18}, *several()]).note  # 0.2, 0.185, 0.17
    assert f"Note: dpo-soup: {note}" in found
    assert note not in summarise([{**base(), "hypervolume": 0.18}, *several(reference_point=[-1.0, 0.0])]).note


def test_what_a_method_was_trained_for_stands_first_and_only_measured_methods_compete():
    name = "Divergence to teachers (nats)"
    student = front("distill", measures={name: {"value": 0.125, "base": 0.5}})
    summary = summarise([base(), student, front("dpo-soup", hypervolume=0.3)])
    assert summary.headers[:3] == ("Method", name + " ↓", "Aux. hypervolume ↑")
    first = {method: cells[0] for method, cells in summary.rows}
    assert (first["distill"].value, first["distill"].detail) == ("0.1250", "(base 0.5000)")
    assert first["dpo-soup"].value == first["base"].value == "n/a"
    assert not any(cell.best for cell in first.values())  # nothing to compare
    assert [cells[1].best for _, cells in summary.rows] == [False, False, True]  # marks stay with their columns
    assert "no other method has both" in summary.note
    other = front("distill (other run)", measures={name: {"value": 0.0625, "base": 0.5}})
    assert [cells[0].best for _, cells in summarise([student, other]).rows] == [False, True]
    seeds = [front("distill", seed=s, measures={name: {"value": v, "base": 0.5}}) for s, v in enumerate((0.1, 0.2))]
    assert summarise(seeds).rows[0][1][0].detail == "± 0.0500 (base 0.5000)"
    with pytest.raises(ValueError, match=r"measures.*value and base"):
        print_table(front(measures={name: {"value": 0.1}}))


def test_a_base_model_with_the_figure_of_the_best_is_not_marked_either():
    fronts = [{**base(), "method": name, "seconds": 38.2} for name in ("base", "base (other run)")]
    text = print_table([*fronts, front(seconds=38.2), front("dpo-ls", seconds=50.0)])
    assert [line.split()[0] for line in text.split("\n\n")[0].splitlines() if "38.2*" in line] == ["weight-cos-dpo"]


def test_a_main_loss_is_best_where_it_is_lowest():
    summary = summarise(several(), Metric("loss", "", higher_is_better=False))
    assert summary.headers[2] == "relevance loss ↓"
    assert [name for name, cells in summary.rows if cells[1].best] == ["dpo-soup"]


def test_seeds_of_a_method_become_mean_and_standard_deviation():
    fronts = [front(seed=seed, hypervolume=0.2 + 0.02 * seed, seconds=30.0 + seed) for seed in range(3)]
    ((name, cells),) = summarise(fronts).rows
    assert name == "weight-cos-dpo (3 seeds)"
    assert (cells[0].value, cells[0].detail) == ("0.2200", f"± {0.02 * math.sqrt(2 / 3):.4f}")
    assert (cells[3].value, cells[3].detail) == ("31.0", "± 0.8")
    assert (cells[4].value, cells[4].detail) == ("50,432", "")
    assert (
        "other ±: standard deviation over seeds" in summarise(fronts).note and "bootstrap" not in summarise(fronts).note
    )


def marked(*fronts, metric=None):
    """The methods whose hypervolume is marked."""
    return [name.split(" (")[0] for name, cells in summarise(fronts, metric).rows if cells[0].best]


def flat(method, hypervolume, main, width=0.02, seed=0):
    """A front with one main figure, and an interval of that half width, at every point."""
    made = front(method, seed=seed, hypervolume=hypervolume)
    for point in made["points"]:
        point.update(main=main, interval={"main": [main - width, main + width]} if width else {})
    return made


def test_a_hypervolume_is_best_unless_a_larger_one_keeps_the_main_objective_as_well():
    ours = flat("ours", 0.20, 0.50)
    assert marked(ours, flat("larger, main within", 0.21, 0.49)) == ["larger, main within"]
    assert marked(ours, flat("larger, main better", 0.21, 0.60)) == ["larger, main better"]
    assert marked(ours, flat("smaller, main better", 0.19, 0.60)) == ["ours", "smaller, main better"]
    # What is bought with the main objective is not put above what keeps it.
    collapsed = flat("collapsed", 0.30, 0.10)
    assert marked(ours, collapsed) == ["ours", "collapsed"]
    assert marked(ours, collapsed, flat("as ours, smaller", 0.18, 0.51)) == ["ours", "collapsed"]
    assert marked(ours, collapsed, flat("between", 0.25, 0.49)) == ["collapsed", "between"]
    assert marked(ours, flat("printed alike", 0.20004, 0.50)) == ["ours", "printed alike"]
    assert marked(ours, flat("smaller", 0.19, 0.50), {**base(), "hypervolume": 0.9}) == ["ours"]
    note = summarise([ours, collapsed]).note
    assert "no other method has both a larger one and a relevance NDCG@10 as good" in note


def test_a_main_loss_keeps_within_its_interval_from_above():
    loss = Metric("loss", "", higher_is_better=False)
    ours = flat("ours", 0.20, 0.50)
    assert marked(ours, flat("larger, main within", 0.21, 0.51), metric=loss) == ["larger, main within"]
    assert marked(ours, flat("larger, main better", 0.21, 0.40), metric=loss) == ["larger, main better"]
    assert marked(ours, flat("collapsed", 0.21, 0.60), metric=loss) == ["ours", "collapsed"]


def test_the_interval_of_several_seeds_is_the_wider_of_bootstrap_and_seeds():
    def seeds(method, hypervolume, mains, width):
        return [flat(method, hypervolume, main, width, seed) for seed, main in enumerate(mains)]

    ours = seeds("ours", 0.20, [0.45, 0.50, 0.55], 0.001)  # ± 0.041
    assert marked(*ours, *seeds("larger", 0.21, [0.47, 0.47], 0.001)) == ["larger"]
    assert marked(*ours, *seeds("larger", 0.21, [0.45, 0.45], 0.001)) == ["ours", "larger"]
    assert marked(*seeds("ours", 0.20, [0.5, 0.5], 0.1), *seeds("larger", 0.21, [0.42, 0.42], 0.0)) == ["larger"]


def test_a_main_figure_without_an_interval_is_its_own_and_one_that_is_not_known_is_never_best():
    ours = flat("ours", 0.20, 0.50, width=0)
    assert marked(ours, flat("larger", 0.21, 0.4999)) == ["ours", "larger"]
    assert marked(ours, flat("larger", 0.21, 0.5)) == ["larger"]
    unknown = flat("unknown", 0.30, math.nan, width=0)
    assert marked(ours, unknown) == ["ours"]


def test_parameters_are_those_that_inference_keeps_where_every_front_says_them():
    said = [{**f, "inference_parameters": 1000 * (1 + i)} for i, f in enumerate([base(), *several()])]
    summary = summarise(said)
    assert [cells[4].value for _, cells in summary.rows] == ["1,000", "2,000", "3,000", "4,000"]
    assert [cells[4].best for _, cells in summary.rows] == [False, True, False, False]
    assert "parameters: all that must be kept for every trade-off, base included" in summary.note
    mixed = summarise([*said[:3], several()[2]])
    assert [cells[4].value for _, cells in mixed.rows] == ["180,000", "50,432", "50,432", "50,432"]
    assert "parameters: those that were trained" in mixed.note


def test_small_hypervolumes_share_one_power_of_ten_as_in_the_paper():
    volumes = {"dpo-ls": 1.648e-3, "dpo-soup": 1.468e-3, "mo-dpo": 1.263e-3, "weight-cos-dpo": 2.039e-3}
    rows = summarise([front(name, 5, hypervolume=v, interval={}) for name, v in volumes.items()]).rows
    assert [cells[0].value for _, cells in rows] == ["1.648e-3", "1.468e-3", "1.263e-3", "2.039e-3"]
    assert [cells[0].best for _, cells in rows] == [False, False, False, True]


def test_points_moved_towards_the_base_do_not_enter_the_mean_of_the_main_figure():
    moved = front(scales=(1.0, 2.0))
    trained = [p["main"] for p in moved["points"] if "scale" not in p]
    ((_, cells),) = summarise(moved).rows
    assert cells[1].value == f"{sum(trained) / 11:.3f}"


def test_the_line_below_says_metric_reference_point_and_share_of_empty_queries():
    metric = Metric(empty_share={"click count": 0.125, "url clicks": 0.5})
    note = summarise(several(), metric).note
    assert "from reference point (0, 0)" in note
    assert "linear gain, ties averaged, empty queries skipped" in note
    assert "click count 12.5%, url clicks 50.0%" in note
    assert "empty lists: 7.0%" in summarise(front(), Metric(empty_share=0.07)).note
    assert "no list is empty" in summarise(front(), Metric(empty_share={"click count": 0.0, "url clicks": 0.0})).note


def test_hypervolumes_of_other_reference_points_are_not_compared():
    summary = summarise([front(), front("dpo-ls", reference_point=[0.1, 0.0])])
    assert "cannot be compared" in summary.note
    assert not any(cells[0].best for _, cells in summary.rows)


def test_columns_align_whatever_the_names_hold_and_nothing_steers_the_terminal():
    fronts = several()
    fronts[0]["method"], fronts[1]["method"], fronts[2]["method"] = "漢字の方法", "red\x1b[31m\nline", "e\u0301te\u0301"
    text = as_text(summarise(fronts), 200)
    assert "\x1b" not in text + print_table(fronts)
    table = text.split("\n\n")[0].splitlines()
    assert len(table) == 5
    ends = [len(line[: line.rindex(" ")]) for line in table[2:]]
    wide = [width(line[:end]) for line, end in zip(table[2:], ends, strict=True)]
    assert len(set(wide)) == 1
    assert width("e\u0301") == 1 and width("漢") == 2 and not any(unicodedata.category(c) == "Cc" for c in table[3])


@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("columns", [40, 80, 100, 140])
def test_table_on_a_terminal_fits_its_width_and_loses_no_figure(columns, term, monkeypatch):
    monkeypatch.setenv("TERM", term)
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", screen)
    console = pytest.importorskip("rich.console").Console(
        file=io.StringIO(), width=columns, height=25, force_terminal=True, color_system="standard"
    )
    fronts = [base(), *several(), front("temperature-cos-dpo", shift=0.01)]
    fronts[1]["method"] = "[bold]weight"  # not markup
    text = print_table(fronts, console)
    drawn = console.file.getvalue()
    assert "\x1b[" in drawn and "\x1b" not in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn)
    assert all(width(line.rstrip()) <= columns for line in plain.splitlines())
    unwrapped = " ".join(plain.split())
    for _, cells in summarise(fronts).rows:
        for cell in cells:
            assert cell.value in unwrapped and cell.detail in unwrapped
    assert "[bold]weight" in plain


def test_a_console_that_is_no_terminal_gets_the_plain_text():
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=40)
    assert print_table(several(), console) == console.file.getvalue()


@pytest.mark.parametrize(("encoding", "sign"), [("latin-1", "±"), ("ascii", "+/-")])
def test_output_that_cannot_hold_an_arrow_gets_one_in_ascii_and_columns_stay_aligned(monkeypatch, encoding, sign):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", narrow)
    text = print_table(several())
    narrow.flush()
    shown = narrow.buffer.getvalue().decode(encoding)
    assert "↑" in text and "hypervolume ^" in shown and "regret v" in shown
    rows = [row for row in shown.split("\n\n")[0].splitlines() if sign in row]
    assert len(rows) == 3 and {row.rindex(sign) for row in rows} == {rows[0].index(sign)}


@pytest.mark.parametrize("columns", [40, 60, 80, 100])
@pytest.mark.parametrize("m", [2, 5])
def test_the_plain_text_fits_its_width_and_loses_no_figure(columns, m):
    fronts = [base(m), *several(m), front("temperature-cos-dpo", m)]
    for named in (fronts, several(m, names=NAMES[:m], main="the relevance of a result to the query of a person")):
        text = as_text(summarise(named), columns)
        assert max(width(line) for line in text.splitlines()) <= columns
        figures = [x for _, cells in summarise(named).rows for cell in cells for x in (cell.value, cell.detail) if x]
        assert all(text.count(x) >= figures.count(x) for x in figures)
        assert not [line for line in text.splitlines() if line.strip() in "↑↓" and line.strip()]
    assert len(as_text(summarise(fronts)).split("\n\n")[0].splitlines()) > len(fronts) + 2


# --- what every view shares


def test_a_front_and_its_json_give_the_same_report(tmp_path):
    mapping = front()
    made = Front(**{**mapping, "points": [Point(**p) for p in mapping["points"]]})
    assert print_table(made) == print_table(mapping) == print_table([json.loads(made.to_json())])
    one, two = write_page(made, tmp_path / "a.html"), write_page(json.loads(made.to_json()), tmp_path / "b.html")
    assert one.read_bytes() == two.read_bytes()


def test_missing_figures_are_shown_as_missing(tmp_path):
    holes = front(hypervolume=math.nan, seconds=None, regret=None, interval={})
    for point in holes["points"]:
        point["main"] = math.nan
        point["interval"] = {"auxiliary": [None, [0.1, None]]}
    ((_, cells),) = summarise(holes).rows
    assert [cell.value for cell in cells] == ["n/a", "n/a", "n/a", "n/a", "50,432"]
    assert "nan" not in print_table(holes)
    page = write_page(holes, tmp_path / "page.html").read_text("utf-8")
    assert "NaN" not in embedded(page)[1] and "<td>n/a</td>" in page
    assert plot_front(holes, tmp_path / "front.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.pop("points"), "front 'weight-cos-dpo' .*points is missing"),
        (lambda f: f.update(points=[]), r"points is \[\] but must be at least one point"),
        (lambda f: f["points"][3].update(auxiliary=[0.1]), r"points\[3\].auxiliary is \[0.1\] .* list of 2 numbers"),
        (lambda f: f["points"][2].update(weights=[0.1, 0.2, 0.7]), r"points\[2\].weights is .* list of 2 numbers"),
        (lambda f: f["points"][1]["interval"].update(main=[1.0]), r"points\[1\].interval.main is \[1.0\]"),
        (lambda f: f.update(maximise=[True]), r"maximise is \[True\] but must be true, false or a list of 2"),
        (lambda f: f.update(volume=1), "volume is not a key of front.json"),
    ],
)
def test_a_front_that_does_not_fit_its_objectives_is_refused(change, words):
    bad = front()
    change(bad)
    with pytest.raises(ValueError, match=words):
        read(bad)


def test_fronts_of_different_tasks_are_refused():
    with pytest.raises(ValueError, match="report them separately"):
        print_table([front(), front(names=["other", "names"])])
    with pytest.raises(ValueError, match="at least one front"):
        print_table([])
    with pytest.raises(TypeError, match="a mapping like"):
        print_table([3])


@pytest.mark.parametrize(("module", "extra"), [("matplotlib", "eval"), ("rich", "demo")])
def test_a_missing_library_is_an_error_that_names_the_extra(monkeypatch, tmp_path, module, extra):
    monkeypatch.setattr("sys.stdout", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}, .* run: pip install .*\[{extra}\]'"):
        plot_front(front(), tmp_path / "front.png") if module == "matplotlib" else print_table(front())
    assert list(tmp_path.iterdir()) == []


def test_the_points_of_all_fronts_are_one_table_of_numbers(tmp_path):
    fronts = [base(), *several(scales=(1.0, 1.5))]
    fronts[1]["points"][2]["main"] = None
    with write_csv(fronts, tmp_path / "new" / "fronts.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    points = [(f["method"], point) for f in fronts for point in f["points"]]
    assert [row["method"] for row in rows] == [method for method, _ in points]
    for row, (_, point) in zip(rows, points, strict=True):
        assert row["main"] == ("" if point["main"] is None else repr(point["main"]))
        assert [float(row[name]) for name in NAMES[:2]] == point["auxiliary"]
        assert [row[f"w_{name}"] for name in NAMES[:2]] == [str(w) for w in point["weights"] or ("", "")]
    with pytest.raises(ValueError, match="report them separately"):
        write_csv([front(), front(names=["other", "names"])], tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


# --- the picture


def pixels(path):
    return pytest.importorskip("matplotlib.image").imread(path)


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_picture_is_1200_pixels_wide_and_shows_more_than_axes(tmp_path, m):
    if m == 1:
        fronts = [front(m=2, objectives=["only"], reference_point=[0.0])]
        for point in fronts[0]["points"]:
            point["auxiliary"], point["weights"], point["interval"] = point["auxiliary"][:1], [1.0], {}
    else:
        fronts = [base(m), *several(m)]
    image = pixels(plot_front(fronts, tmp_path / "new folder" / "front.png"))
    assert image.shape[1] == 1200
    colours = (image[..., :3] * 255).round().astype(int) @ (1, 256, 256**2)
    assert len(set(colours.flat)) > 300  # viridis, outlines, anti-aliasing


def test_picture_depends_on_base_model_truth_seeds_and_scale(tmp_path):
    truth = [[0.3, 0.5], [0.45, 0.45], [0.5, 0.3]]
    drawn = {
        "plain": plot_front(front(), tmp_path / "1.png"),
        "base": plot_front(front(), tmp_path / "2.png", base=base()["points"][0]),
        "truth": plot_front(front(), tmp_path / "3.png", truth=truth),
        "seeds": plot_front([front(seed=s) for s in range(3)], tmp_path / "4.png"),
        "scale": plot_front(front(scales=(0.8, 1.0, 1.5)), tmp_path / "5.png"),
    }
    assert len({path.read_bytes() for path in drawn.values()}) == len(drawn)
    pairs = plot_front(front(m=3), tmp_path / "7.png"), plot_front(front(m=3, maximise=False), tmp_path / "8.png")
    assert (pixels(pairs[0]) != pixels(pairs[1])).mean() > 1e-3  # other arrows, and other points are best
    again = plot_front(front(), tmp_path / "6.png")
    assert (pixels(again) == pixels(drawn["plain"])).all()


@pytest.mark.parametrize("m", [2, 3])
def test_picture_survives_identical_points_one_point_and_names_that_look_like_mathematics(tmp_path, m):
    same = front(m=m, names=NASTY[:m], main="$main_")
    for point in same["points"]:
        point.update(main=0.4, auxiliary=[0.3] * m, interval={})
    plot_front(same, tmp_path / "same.png", title="100 $ & _x")
    single = front(m=m)
    single["points"] = [single["points"][0] | {"auxiliary": [1e6, -3e-9, 0.0][:m], "interval": {}}]
    plot_front(single, tmp_path / "one.png")
    plot_front(base(m), tmp_path / "base.png")


@pytest.mark.parametrize("m", [2, 3, 5])
def test_weights_are_named_and_no_label_covers_a_point_or_another_label(tmp_path, monkeypatch, m):
    canvas = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg
    seen, save = [], canvas.print_png
    monkeypatch.setattr(canvas, "print_png", lambda self, file: (seen.append(self.figure), save(self, file))[1])
    crowd = [front(f"method {i}", m, shift=0.02 * i - 0.06, hypervolume=4.0 - abs(i - 3)) for i in range(7)]
    plot_front([base(m), *crowd], tmp_path / "front.png")
    (figure,) = seen
    panels = [axes for axes in figure.axes if axes.texts]
    assert len(panels) == m * (m - 1) // 2
    first = "(" * (m > 3) + "w = (" * (m <= 3) + ", ".join(["1"] + ["0"] * (m - 1)) + ")"
    assert first in [text.get_text() for text in panels[0].texts]
    for axes in panels:
        assert all(len([t for t in axis.get_ticklocs() if low <= t <= high]) >= 3
                   for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())))  # fmt: skip
        boxes = [super(type(text), text).get_window_extent() for text in axes.texts]  # without the leader line
        points = [axes.transData.transform(xy) for each in axes.collections for xy in each.get_offsets()]
        assert len(points) > 2 * m
        assert not [1 for box in boxes for point in points if box.contains(*point)]
        assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]


def test_marks_of_the_legend_are_those_of_the_picture(tmp_path, monkeypatch):
    canvas = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg
    seen, save = [], canvas.print_png
    monkeypatch.setattr(canvas, "print_png", lambda self, file: (seen.append(self.figure), save(self, file))[1])
    plot_front([base(), *several()], tmp_path / "front.png", truth=[[0.3, 0.5], [0.5, 0.3]])
    (figure,) = seen
    marks = {handle.get_label(): handle for handle in figure.legends[0].legend_handles}
    drawn = next(each for each in figure.axes[0].collections if len(each.get_offsets()) == 11)
    assert marks["weight-cos-dpo"].get_markersize() ** 2 == drawn.get_sizes()[0]
    fill = tuple(marks["weight-cos-dpo"].get_markerfacecolor())
    assert fill in [tuple(colour) for colour in drawn.get_facecolors()]
    truth = next(line for line in figure.axes[0].lines if line.get_zorder() == 1)
    assert marks["true front"].get_linestyle() == truth.get_linestyle() == "--"


@pytest.mark.parametrize("name", ["front.foo", "front", "front.svg"])
def test_a_picture_of_another_ending_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.png is the only known ending; name front\.png"):
        plot_front(front(), tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert plot_front(front(), tmp_path / "FRONT.PNG").is_file()


def test_a_true_front_of_another_number_of_objectives_is_refused(tmp_path):
    for view in (plot_front, write_page):
        with pytest.raises(ValueError, match=r"shape \(n, 2\)"):
            view(front(), tmp_path / "file.png", truth=[[1.0, 2.0, 3.0]])


# --- the page


class Page(HTMLParser):
    """Start tags with their attributes, and the rows of every table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self.cell is not None:
            self.tables[-1][-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def embedded(page):
    text = re.search(r'<script type="application/json" id="mopl-data">(.*?)</script>', page, re.DOTALL)[1]
    return json.loads(text), text


def test_the_embedded_json_is_the_input(tmp_path):
    fronts = [base(), *several(scales=(0.8, 1.0))]
    fronts[1]["regret"] = 1 / 3
    before = copy.deepcopy(fronts)
    data, _ = embedded(write_page(fronts, tmp_path / "page.html").read_text("utf-8"))
    assert [Front.from_dict(f) for f in data["fronts"]] == [Front.from_dict(f) for f in fronts]
    assert fronts == before
    assert data["bases"] == [{"main": 0.4901, "auxiliary": [0.3002, 0.3002]}] * len(fronts)
    assert data["is_base"] == [True, *[False] * (len(fronts) - 1)]


def test_the_page_holds_everything_and_fetches_nothing(tmp_path):
    path = write_page([base(), *several()], tmp_path / "page.html", configuration={"steps": 100})
    text = path.read_text("utf-8")
    assert path.stat().st_size < 80_000
    linked = re.sub(r'href="https://mopl-project\.github\.io/[^"]*"', "", text)  # to the documentation, if asked
    assert "://" not in linked and "@import" not in text and "url(" not in text
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        addresses = {"src", "href", "srcset", "action"} & set(attributes)
        assert not addresses or (tag == "a" and attributes["class"] == "about")  # followed if asked alone
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    assert ("html", {"lang": "en"}) in page.tags


def test_the_page_has_room_for_the_grid_of_five_objectives(tmp_path):
    big = front(m=5)
    big["points"] = [big["points"][i % 6] for i in range(126)]
    assert write_page(big, tmp_path / "page.html").stat().st_size < 190_000


def test_every_name_is_escaped(tmp_path):
    nasty = front('<img src=x onerror="alert(1)">', 5, names=NASTY, main="<i>main</i>", data="<u>data")
    samples = [["</script><b>sample"]] * 6
    path = write_page(nasty, tmp_path / "page.html", configuration={"<k>": "</pre><b>"}, samples=samples)
    text = path.read_text("utf-8")
    page = Page(text)
    assert {t for t, _ in page.tags} & {"img", "b", "i", "u"} == set()
    assert sum(t == "script" for t, _ in page.tags) == 2
    data, raw = embedded(text)
    assert "<" not in raw and ">" not in raw and "&" not in raw
    assert data["fronts"][0]["objectives"] == NASTY
    headers = page.tables[1][0]
    assert headers[1:6] == [f"w {name}" for name in NASTY] and headers[7:] == NASTY


def test_json_for_a_page_keeps_every_text_and_number():
    odd = {"text": "</script>&\u2028\ud800 \"'", "none": math.nan, "inf": [math.inf], "number": 1e-300, "big": 2**70}
    text = to_json(odd)
    assert json.loads(text) == odd | {"none": None, "inf": [None]}
    assert jsonable((1, {2: {3}})) == [1, {"2": [3]}]


def test_fronts_that_count_opposite_directions_as_better_are_refused():
    with pytest.raises(ValueError, match=r"counts as better .* report them separately"):
        print_table([front(maximise=True), front("dpo-ls", maximise=[True, False])])
    assert print_table([front(maximise=True), front("dpo-ls", maximise=[True, True])])


@pytest.mark.parametrize(("main", "higher", "anchor"), [
    ("Seconds late", True, "main-objective"), ("deviation", True, "main-objective"), ("deviation", False, "drift"),
])  # fmt: skip
def test_headings_lead_to_the_definition_of_their_column_whatever_the_objectives_are_called(main, higher, anchor):
    metric = Metric("loss", higher_is_better=higher)
    summary = summarise([front(main=main), front("dpo-ls", main=main)], metric)
    assert summary.anchors == ("hypervolume", anchor, "steering-regret", "seconds", "parameters")


def test_numbers_are_rounded_as_the_script_rounds_them():
    found = [format_number(x) for x in (112500.0, -112500.0, 0.000112500001, 999500.0, 1e-300, 0.00005)]
    assert found == ["1.13e5", "-1.13e5", "1.13e-4", "1.00e6", "1.00e-300", "5.00e-5"]


def test_the_tables_of_the_page_show_the_numbers_of_the_front(tmp_path):
    fronts = [base(), *several(scales=(1.0, 1.5))]
    page = Page(write_page(fronts, tmp_path / "page.html").read_text("utf-8"))
    methods, *points = page.tables
    assert [row[0] for row in methods[1:]] == [f["method"] for f in fronts]
    assert methods[2][1].startswith("0.2000* best") and methods[2][5] == "50,432* best"
    for one, table in zip(fronts, points, strict=True):
        assert len(table) == 1 + len(one["points"])
        for index, (point, row) in enumerate(zip(one["points"], table[1:], strict=True)):
            assert row[0] == str(index)
            assert row[-3:] == [f"{x:.4f}" for x in (point["main"], *point["auxiliary"])]
            if point["weights"]:
                assert [float(w) for w in row[-5:-3]] == pytest.approx(point["weights"])
                assert float(row[1]) == point.get("scale", 1.0)


@pytest.mark.parametrize(
    ("figure", "shown"),
    [
        (0.03125, "0.0313"),
        (-0.03125, "-0.0313"),
        (0.0, "0.0000"),
        (-0.0, "0.0000"),
        (math.nan, "n/a"),
        (1e6, "1.00e6"),
        (-3e-9, "-3.00e-9"),
        (12345.678, "12345.6780"),
        (0.001, "0.0010"),
    ],
)
def test_figures_are_written_as_the_script_of_the_page_writes_them(figure, shown):
    assert format_number(figure) == shown


def test_samples_belong_to_points_and_methods(tmp_path):
    samples = [[f"text {i}", {"prompt": "why?", "text": "because"}] for i in range(11)]
    fronts = [base(), *several()]
    data, _ = embedded(write_page(fronts, tmp_path / "a.html", samples=samples).read_text("utf-8"))
    assert data["samples"][0] is None and data["samples"][2:] == [None, None]
    assert data["samples"][1][3] == [{"text": "text 3"}, {"prompt": "why?", "text": "because"}]
    data, _ = embedded(write_page(fronts, tmp_path / "a.html", samples={"dpo-ls": samples}).read_text("utf-8"))
    assert [bool(entry) for entry in data["samples"]] == [False, False, True, False]
    for bad, words in (
        (samples[:3], "3 entries but front 'weight-cos-dpo' has 11 points"),
        ({"nobody": samples}, "no such fronts"),
        ([[3]] * 11, "a sample must be"),
        ([{"prompt": "why?", "responses": []}], "a sample must have prompt, method, responses"),
        ([{"prompt": "why?", "method": "nobody", "responses": ["a"] * 11}], "no such fronts"),
        ([{"prompt": "why?", "method": "dpo-ls", "responses": ["a"] * 9}], "9 responses but the front has 11 points"),
        ([{"prompt": "why?", "method": "dpo-ls", "responses": [7] * 11}], "a sample must be"),
    ):
        with pytest.raises(ValueError, match=words):
            write_page(fronts, tmp_path / "b.html", samples=bad)
    assert not (tmp_path / "b.html").exists()


def answers(prompts, method="weight-cos-dpo", count=11):
    return [
        {"prompt": prompt, "method": method, "responses": [f"{prompt} at {i} <i>&" for i in range(count)]}
        for prompt in prompts
    ]


def test_answers_to_prompts_go_to_the_points_of_their_method(tmp_path):
    fronts = [base(), *several(scales=(1.5, 1.0))]
    given = [*answers(["why?", "how?"]), *answers(["why?"], "dpo-soup", 22), *answers(["why?"], "base", 1)]
    given[0]["responses"][4] = None
    path = write_page(fronts, tmp_path / "a.html", samples=given)
    data, _ = embedded(path.read_text("utf-8"))
    of_base, conditioned, none, soup = data["samples"]
    assert of_base == [[{"prompt": "why?", "text": "why? at 0 <i>&"}]] and none is None
    # Eleven answers for twenty-two points are those at scale 1, which here come second.
    assert conditioned[:11] == [[]] * 11 and len(soup) == 22 and soup[3][0]["text"] == "why? at 3 <i>&"
    assert conditioned[11 + 3] == [{"prompt": p, "text": f"{p} at 3 <i>&"} for p in ("why?", "how?")]
    assert conditioned[11 + 4] == [{"prompt": "how?", "text": "how? at 4 <i>&"}]
    page = Page(path.read_text("utf-8"))
    assert [tag for tag, _ in page.tags].count("dd") == 1 + 21 + 22 and "i" not in {tag for tag, _ in page.tags}


@pytest.mark.parametrize("view", [plot_front, write_page])
def test_a_failure_while_writing_keeps_the_old_file_and_leaves_no_half(tmp_path, monkeypatch, view):
    path = tmp_path / "file.png"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("mopl.training.checkpoint.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        view(front(), path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.png"]
    monkeypatch.undo()
    view(front(), path)
    assert path.stat().st_size > 10_000


# --- the page in a browser


def rendered(path, fragment, profile):
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=2000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", f"{path.as_uri()}#{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout


def shown(dom):
    """The figures beside the bars, and the number of the point in the line above them."""
    figures = re.findall(r'data-axis="(\d+)"><b>(.*?)</b><small>(.*?)</small>', dom)
    status = html.unescape(re.search(r'<p id="status".*?</p>', dom, re.DOTALL)[0])
    return {int(k): (value, detail) for k, value, detail in figures}, int(re.search(r"#(\d+) of", status)[1]), status


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(
    ("m", "fragment", "method", "index"),
    [
        (2, "w=3", 1, 3),
        (2, "w=0.72,0.28&method=dpo-soup", 3, 7),
        (2, "w=0.3,0.7&scale=1.6&method=dpo-ls", 2, 14),
        (2, "w=99", 1, 5),
        (5, "w=0,0,1,0,0&method=dpo-ls&x=2&y=5", 2, 2),
        (5, "w=0.3,0.2,0.2,0.2,0.1", 1, 5),
        (5, "w=4", 1, 4),
    ],
)
def test_the_slider_shows_the_numbers_of_the_chosen_point(tmp_path, m, fragment, method, index):
    fronts = [base(m), *several(m, scales=(1.0, 1.5) if m == 2 else (1.0,))]
    dom = rendered(write_page(fronts, tmp_path / "page.html"), fragment, tmp_path / "profile")
    figures, point_shown, status = shown(dom)
    assert point_shown == index
    point = fronts[method]["points"][index]
    expected = {m: point["main"], **dict(enumerate(point["auxiliary"]))}
    assert {k: value for k, (value, _) in figures.items()} == {k: format_number(x) for k, x in expected.items()}
    low, high = (format_number(x) for x in point["interval"]["main"])
    change = point["main"] - 0.4901
    assert figures[m][1] == f" [{low}, {high}], base 0.4901 ({'+' if change > 0 else '−'}{abs(change):.4f})"
    assert ("names no point" in status) == (fragment == "w=99")
    assert len(re.findall('data-chosen=""', dom)) == 1
    assert len(re.findall(r'data-point="\d+"', dom)) == len(fronts[method]["points"])


def after(path, *steps):
    """Make the page act: each step is a control's id and the value that it is given, as a person's hand would."""
    acts = "".join(
        f"e = document.getElementById({name!r}); e.value = {value!r}; e.dispatchEvent(new Event({event!r}));"
        for name, value, event in steps
    )
    tell = "document.body.dataset.sliders = [...document.querySelectorAll('[type=range]')].map((e) => e.value).join();"
    tell += "document.body.dataset.hash = location.hash;"
    acted = path.with_name("acted.html")
    acted.write_text(
        path.read_text("utf-8").replace("</body>", f"<script>let e; {acts}{tell}</script></body>"), "utf-8"
    )
    return acted


@needs_browser
@pytest.mark.slow
def test_linked_sliders_stay_on_the_simplex_and_show_the_nearest_point(tmp_path):
    fronts = [base(3), *several(3)]
    page = after(
        write_page(fronts, tmp_path / "page.html"),
        ("weight-0", "0.6", "input"),  # from the centre: the other two share what is left
        ("weight-1", "0", "input"),
        ("method", "1", "change"),
    )
    dom = rendered(page, "", tmp_path / "profile")
    sliders = [float(x) for x in re.search(r'data-sliders="(.*?)"', dom)[1].split(",")]
    assert sliders == pytest.approx([0.75, 0.0, 0.25], abs=0.006)
    figures, index, _ = shown(dom)
    assert index == 0
    assert [figures[k][0] for k in range(3)] == [format_number(x) for x in fronts[2]["points"][0]["auxiliary"]]
    assert re.search(r'data-hash="(.*?)"', dom)[1] == "#w=1,0,0&amp;method=dpo-ls"


@needs_browser
@pytest.mark.slow
def test_one_slider_for_two_objectives_and_one_for_the_distance_from_the_base(tmp_path):
    one = front(scales=(0.8, 1.0, 1.5))
    page = after(write_page(one, tmp_path / "page.html"), ("weight", "9", "input"), ("scale", "0", "input"))
    dom = rendered(page, "", tmp_path / "profile")
    figures, index, _ = shown(dom)
    assert index == 2 * 11 + 9  # w = (0.9, 0.1) at the largest scale, which is closest to the base
    assert [figures[k][0] for k in range(2)] == [format_number(x) for x in one["points"][index]["auxiliary"]]
    assert 'aria-valuetext="scale 1.5, closer to the base"' in dom
    assert re.search(r'data-hash="(.*?)"', dom)[1] == "#w=0.9,0.1&amp;scale=1.5"


@needs_browser
@pytest.mark.slow
def test_the_page_runs_with_nasty_names_missing_figures_and_one_point(tmp_path):
    nasty = front("<b>m", 5, names=NASTY, main="<i>main</i>")
    nasty["points"] = nasty["points"][:1]
    nasty["points"][0].update(main=None, auxiliary=[1e6, -3e-9, 0.0, 0.5, None], interval={})
    page = write_page(nasty, tmp_path / "page.html", samples=[["<b>sample</b>"]])
    dom = rendered(page, "method=nobody", tmp_path / "profile")
    figures, index, status = shown(dom)
    values = [figures[k][0] for k in range(6)]
    assert index == 0 and values == ["1.00e6", "-3.00e-9", "0.0000", "0.5000", "n/a", "n/a"]
    assert 'no method "nobody"' in status
    visible = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    assert "&lt;b&gt;sample&lt;/b&gt;" in visible and "<i>" not in visible and "<b>m" not in visible


@needs_browser
@pytest.mark.slow
def test_answers_follow_the_slider_and_other_scales_show_the_nearest(tmp_path):
    fronts = [base(), front(scales=(1.0, 1.5))]
    given = [*answers(["why?", "how?"]), *answers(["why?"], "base", 1)]
    page = write_page(fronts, tmp_path / "page.html", samples=given)

    def visible(fragment, *steps):
        dom = rendered(after(page, *steps), fragment, tmp_path / "profile")
        part = re.search(r'<section[^>]*id="samples".*?</section>', dom, re.DOTALL)[0]
        return html.unescape(re.sub("<.*?>", " ", part)), part

    text, part = visible("w=3")
    assert "why? at 3 <i>&" in text and "how? at 3 <i>&" in text and "at 4" not in text
    assert 'id="samples-note" hidden' in part and "before training why? at 0" in " ".join(text.split())
    text, _ = visible("", ("weight", "9", "input"))
    assert "how? at 9 <i>&" in text
    text, part = visible("w=0.3,0.7&scale=1.5")
    assert "Point #14 has no samples of its own; these are of point #3" in text and "how? at 3 <i>&" in text
    assert 'id="samples-note" hidden' not in part
