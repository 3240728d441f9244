"""Several runs side by side: each with its own base, under names that tell them apart, if they can be compared."""

import csv
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("moocore")
pytest.importorskip("accelerate")

from mopl import pareto
from mopl.alignment.config import AlignConfig
from mopl.cli import main
from mopl.clp.config import ClpConfig
from mopl.experiments import compare
from mopl.experiments.comparison import run_names
from mopl.ranking.config import RankConfig
from mopl.report.plot import plot_front

NAMES = ("clear", "short")
KINDS = ("rank", "align", "clp")
METHOD = {"rank": "weight-cos-dpo", "align": "weight-cos-dpo", "clp": "clp"}


def write_run(
    path: Path, kind: str, *, base=0.3, tuned=0.5, fingerprint="f", names=NAMES, points=3, called=None, **settings
) -> Path:
    """Make a finished run whose figures are known: the base has `base` everywhere, the front is around `tuned`."""
    needed = {"model": "m", "data": "d.jsonl"}
    if kind == "rank":
        config = RankConfig(**settings)
        objectives = [
            {"name": n, "maximise": True, "column": i + 1, "path": None} for i, n in enumerate(("main", *names))
        ]
        data = {
            "fingerprint": fingerprint,
            "empty_share": dict.fromkeys(("main", *names), 0.0),
            "objectives": objectives,
        }
    elif kind == "align":
        config = AlignConfig(**{**needed, "lora_rank": 0, **settings})
        data = {"fingerprint": fingerprint, "tokens": "t", "objectives": list(names)}
    else:
        config = ClpConfig(**{**needed, "rewards": ("brevity", "length"), **settings})
        data = {"fingerprint": fingerprint, "objectives": list(names)}
    record = {"config": config.to_dict(), "data": data, **({} if kind == "rank" else {"kind": kind})}
    common = {
        "objectives": list(names), "main": "main", "reference_point": [1.0, 1.0] if kind == "align" else [0.0, 0.0],
        "seconds": 1.0, "parameters": 5, "seed": config.seed,
        "data": {"name": called or path.name, "fingerprint": fingerprint},
        "maximise": kind != "align",
    }  # fmt: skip
    grid = [[i / (points - 1), 1 - i / (points - 1)] for i in range(points)]
    fronts = {
        "base": pareto.Front.measure(
            "base", weights=None, main_values=[base], auxiliary_values=[[base, base]], **common
        ),
        "": pareto.Front.measure(
            config.method, weights=grid, main_values=[tuned] * points,
            auxiliary_values=[[tuned + 0.1 * a, tuned + 0.1 * b] for a, b in grid], **common,
        ),
    }  # fmt: skip
    for folder, front in fronts.items():
        (path / folder).mkdir(parents=True, exist_ok=True)
        front.save(path / folder / "front.json")
    (path / "config.json").write_text(json.dumps(record))
    (path / "evaluation.json").write_text("{}")
    return path


def embedded(page: Path) -> dict:
    (content,) = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page.read_text("utf-8"), re.S)
    return json.loads(content)


def rows(text: str) -> list[str]:
    """The names in the first column of a table, whose other columns and lines of details are left out."""
    lines = text.split("\n\n")[0].splitlines()
    (rule,) = (place for place, line in enumerate(lines) if line.startswith("---"))
    room = lines[rule].index(" ")
    return [name for line in lines[rule + 1 :] if (name := line[:room].strip())]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_each_run_has_its_own_base(kind, tmp_path):
    one = write_run(tmp_path / "one", kind, base=0.2, tuned=0.4, learning_rate=1e-3)
    two = write_run(tmp_path / "two", kind, base=0.3, tuned=0.45, learning_rate=1e-2)
    page, method = tmp_path / "page.html", METHOD[kind]
    text = compare([one, two], html=page, png=tmp_path / "a.png", table=tmp_path / "table.txt")
    assert rows(text) == ["base (one)", f"{method} (one)", "base (two)", f"{method} (two)"]
    assert (tmp_path / "table.txt").read_text() == text
    data = embedded(page)
    assert [front["method"] for front in data["fronts"]] == rows(text)
    assert [base["main"] for base in data["bases"]] == [0.2, 0.2, 0.3, 0.3]
    assert data["is_base"] == [True, False, True, False]


def test_points_of_all_fronts_as_csv(kind, tmp_path):
    one = write_run(tmp_path / "one", kind, base=0.2, tuned=0.4, learning_rate=1e-3)
    two = write_run(tmp_path / "two", kind, base=0.2, tuned=0.45, learning_rate=1e-2)
    page, table = tmp_path / "page.html", tmp_path / "new" / "fronts.csv"
    assert main(["report", str(one), str(two), "--csv", str(table), "--html", str(page)]) == 0
    lines = list(csv.DictReader(table.open(encoding="utf-8")))
    method = METHOD[kind]
    assert [line["method"] for line in lines] == ["base", *[f"{method} (one)"] * 3, *[f"{method} (two)"] * 3]
    assert [(line["w_clear"], line["clear"]) for line in lines[1:4]] == [
        ("0.0", "0.4"),
        ("0.5", "0.45"),
        ("1.0", "0.5"),
    ]
    assert not (one / "report.html").exists()


def test_equal_bases_stand_there_once(kind, tmp_path):
    one = write_run(tmp_path / "one", kind, learning_rate=1e-3)
    two = write_run(tmp_path / "two", kind, tuned=0.4, learning_rate=1e-2)
    page, method = tmp_path / "page.html", METHOD[kind]
    assert rows(compare([one, two], html=page)) == ["base", f"{method} (one)", f"{method} (two)"]
    assert [base["main"] for base in embedded(page)["bases"]] == [0.3] * 3
    assert rows(compare([one, one])) == ["base", method]


def test_runs_that_differ_in_the_seed_alone_are_seeds(kind, tmp_path):
    runs = [write_run(tmp_path / f"run-{seed}", kind, base=0.2 + 0.1 * seed, seed=seed) for seed in (0, 1)]
    page, method = tmp_path / "page.html", METHOD[kind]
    assert rows(compare(runs, html=page)) == ["base (2 seeds)", f"{method} (2 seeds)"]
    assert [round(base["main"], 3) for base in embedded(page)["bases"]] == [0.2, 0.2, 0.3, 0.3]
    # Other settings are no other seed, even where the seeds differ.
    other = write_run(tmp_path / "other", kind, base=0.2, seed=7, learning_rate=0.5)
    text = compare([runs[0], other])
    assert rows(text) == ["base", f"{method} (run-0)", f"{method} (other)"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = [write_run(tmp_path / a / "run", "rank", base=b, learning_rate=c)
             for a, b, c in (("a", 0.1, 1e-3), ("b", 0.2, 1e-2))]  # fmt: skip
    assert rows(compare(paths)) == [
        "base (a/run)", "weight-cos-dpo (a/run)", "base (b/run)", "weight-cos-dpo (b/run)",
    ]  # fmt: skip
    assert run_names([Path("/x/a"), Path("/x/b"), Path("/y/b")]) == ["a", "x/b", "y/b"]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("rank", {"k": 5}, r"the cut k of NDCG 10 in one, 5 in two"),
        ("rank", {"empty": 0}, r"empty skip in one, 0 in two"),
        ("rank", {"names": ("clear", "long")}, r"objectives clear short in one, clear long in two"),
        ("align", {"loss": "plackett-luce"}, r"loss listnet in one, plackett-luce in two"),
        ("clp", {"rewards": ("brevity", "length:target=9")}, r"rewards brevity length in one, brevity length:target=9"),
        ("clp", {"max_new_tokens": 9}, r"the longest answer 64 in one, 9 in two"),
    ],
)
def test_figures_that_mean_something_else_are_refused(kind, changes, message, tmp_path, capsys):
    runs = [write_run(tmp_path / "one", kind), write_run(tmp_path / "two", kind, **changes)]
    with pytest.raises(ValueError, match=f"measured differently: {message}.*report them separately"):
        compare(runs, html=tmp_path / "page.html")
    assert main(["report", *map(str, runs), "--html", str(tmp_path / "page.html")]) == 2
    assert not (tmp_path / "page.html").exists() and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "changes", "note"),
    [
        ("rank", {"fingerprint": "g"}, "measured on different data (one: one; two: two)"),
        ("align", {"fingerprint": "g"}, "measured on different data (one: one; two: two)"),
        ("clp", {"fingerprint": "g"}, "measured on different data (one: one; two: two)"),
        ("align", {"beta": 0.3}, "differ in beta (one: 0.1 0.1; two: 0.3 0.3)"),
        ("clp", {"model": "n"}, "differ in the model before training (one: m; two: n)"),
        ("rank", {"points": 5}, "grids of 3, 5 weights"),
    ],
)
def test_what_else_differs_is_noted_in_table_and_page(kind, changes, note, tmp_path):
    runs = [write_run(tmp_path / "one", kind), write_run(tmp_path / "two", kind, **changes)]
    text = compare(runs, html=tmp_path / "page.html", png=tmp_path / "a.png")
    assert "Note: " in text and note in text and note in (tmp_path / "page.html").read_text()
    runs[1] = write_run(tmp_path / "three", kind)
    # Losses of tuned models are above the base's here, which is said too and is no matter of comparison.
    notes = compare(runs, png=tmp_path / "b.png").split("Note: ")[1:]
    assert all("before training" in " ".join(each.split()) for each in notes) and len(notes) == (kind == "align")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("kind", "changes", "note"),
    [
        (
            "rank",
            {"objectives": ("a=1:softmax",)},
            "differently (objectives those of the data in one, a=1:softmax in two)",
        ),
        ("align", {"held_out": 0.2}, "took their data differently (held_out 0.1 in one, 0.2 in two)"),
        ("clp", {}, "measured on different data: d.jsonl changed between them"),
    ],
)
def test_data_of_one_name_are_told_apart_by_how_they_were_read(kind, changes, note, tmp_path):
    one = write_run(tmp_path / "one", kind, called="d.jsonl")
    two = write_run(tmp_path / "two", kind, called="d.jsonl", fingerprint="g", **changes)
    assert note in compare([one, two]).replace("\n", " ")


@pytest.mark.parametrize(("one", "two"), [("rank", "align"), ("align", "clp"), ("clp", "rank")])
def test_runs_of_other_commands_are_refused(one, two, tmp_path, capsys):
    runs = [write_run(tmp_path / name, name) for name in (one, two)]
    assert main(["report", *map(str, runs)]) == 2
    assert "is a run of mopl" in capsys.readouterr().err


def test_the_picture_has_a_star_for_each_base(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("mopl.report.plot._legend", lambda figure, grid, scene: seen.append(scene.bases))
    for name, bases in (("same", (0.3, 0.3)), ("other", (0.2, 0.3))):
        runs = [write_run(tmp_path / f"{name}-{i}", "rank", base=b, concentration=0.1 + i) for i, b in enumerate(bases)]
        compare(runs, png=tmp_path / "a.png")
    assert [sorted(base.main for base, _ in found.values()) for found in seen] == [[0.3], [0.2, 0.3]]
    assert [one.label for _, one in seen[1].values()] == ["weight-cos-dpo (other-0)", "weight-cos-dpo (other-1)"]


def test_bases_of_seeds_belong_to_their_seeds(tmp_path):
    runs = [write_run(tmp_path / str(seed), "rank", base=0.1 + seed / 10, seed=seed) for seed in (0, 1)]
    fronts = [pareto.Front.load(run / part / "front.json") for run in runs for part in ("base", "")]
    from mopl.report.records import base_points, read_all

    assert [round(point.main, 3) for point in base_points(read_all(fronts), None)] == [0.1, 0.1, 0.2, 0.2]
    with pytest.raises(ValueError, match="base has 1 entry but there are 4 fronts"):
        plot_front(fronts, tmp_path / "a.png", base=[None])


def test_there_is_one_hypervolume(kind, tmp_path, capsys):
    run = write_run(tmp_path / "run", kind)
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    for name, folder in ((METHOD[kind], run), ("base", run / "base")):
        shown = f"{json.loads((folder / 'front.json').read_text())['hypervolume']:.4f}"
        for table in (printed, (run / "table.txt").read_text()):
            assert re.search(rf"^{name} +{shown} ", table, re.M)
        assert f'<th scope="row">{name}</th><td>{shown}<' in (run / "report.html").read_text()
    assert [front["hypervolume"] for front in embedded(run / "report.html")["fronts"]] == [
        json.loads((folder / "front.json").read_text())["hypervolume"] for folder in (run / "base", run)
    ]  # fmt: skip


def test_seeds_of_one_setting_are_never_averaged_with_those_of_another(kind, tmp_path):
    rates = {"slow": 1e-3, "fast": 1e-2}
    runs = [
        write_run(tmp_path / f"{name}-{seed}", kind, tuned=0.4 + rate, learning_rate=rate, seed=seed)
        for name, rate in rates.items()
        for seed in (0, 1)
    ]
    method = METHOD[kind]
    named = [f"{method} ({name}-0, {name}-1) (2 seeds)" for name in rates]
    assert rows(compare(runs)) == ["base", *named]
