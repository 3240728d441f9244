"""The map of who wins: equal totals, a run that goes on where it was, and what its rows come to."""

import json
from pathlib import Path

import pytest

from bench import who_wins, who_wins_map
from bench.who_wins_cells import METHODS, Sizes
from mopl.ranking.stages import shared_out

ROOT = Path(__file__).resolve().parents[2]
SMALL = "steps=12,train_lists=24,valid_lists=12,test_lists=12,items=5,hidden=4,base_steps=2,batch=8,points=3"


def test_a_budget_is_cut_evenly_and_wholly():
    assert shared_out(11, 3) == [4, 4, 3] and shared_out(220, 11) == [20] * 11
    with pytest.raises(ValueError, match="a budget of 2 steps does not reach for 3 models"):
        shared_out(2, 3)


def row(method, seed, value, budget=1.0):
    return {
        "role": "map", "budget": budget, "spread": 3.0, "conflict": 1.0, "seed": seed, "method": method, "rate": 0.01,
        "hypervolume": value, "of_the_optimum": value, "regret": 1 - value, "steps": 10, "cpu_seconds": 1.0,
    }  # fmt: skip


def test_leads_are_paired_differences_from_the_rival_that_is_best_on_average():
    values = {
        "mixture": (0.55, 0.66, 0.9), "concat": (0.4, 0.5, 0.6), "dpo-ls": (0.1, 0.9, 0.2), "dpo-soup": (0.5, 0.6, 0.9),
        "mo-dpo": (0.1, 0.1, 0.1),
    }  # fmt: skip
    rows = [row(name, seed, value) for name, each in values.items() for seed, value in enumerate(each)]
    rows.append(row("mixture", 3, 0.1))  # a seed that the others lack is left out
    lead = who_wins_map.difference(who_wins_map.by_cell(rows)[1.0, 3.0, 1.0], "mixture")
    assert lead.rival == "dpo-soup" and lead.values == pytest.approx((10, 10, 0)) and lead.seeds_ahead == "2/3"
    # 20/3 -+ t(0.975, 2) x s / sqrt(3), with s = 10 / sqrt(3)
    assert lead[2:] == pytest.approx((20 / 3, 20 / 3 - 4.303 * 10 / 3, 20 / 3 + 4.303 * 10 / 3))
    text = who_wins_map.table(rows)
    assert "| 1 | 3 | 1 | **0.703** | 0.500 | 0.400 | 0.667 | 0.100 | +6.7 [-7.7, +21.0] (dpo-soup) | 2/3 |" in text
    assert "| 1 | 3 | 1 | **0.297** | 0.500 | 0.600 | 0.333 | 0.900 |" in text  # regrets
    assert "`mixture` is ahead of the best rival in 1 of 1 squares, with an interval above 0 in 0" in text
    assert "It is more than 2 % behind in 1; the worst is -23.3 %." in text
    assert "the mean lead over the best rival of each square is +6.7 % [-7.7, +21.0] for `mixture`" in text
    assert "The least regret belongs, in squares: 1 to `mixture`." in text
    # Squares of other seeds count with their own mean, and seeds are paired by their numbers.
    more = [row(name, seed, value) | {"spread": 1.0} for seed in (1, 2, 3) for name, value in
            {"mixture": 0.5 + seed / 10, "dpo-ls": 0.5, "dpo-soup": 0.4}.items()]  # fmt: skip
    assert "of each square is +23.3 % (over the 2 seeds that all of these have +17.5 % " in who_wins_map.table(
        rows + more
    )
    assert "of each square is +33.3 % for `mixture`" in who_wins_map.table(rows + more[-3:])  # of 20/3 and 60
    with pytest.raises(ValueError, match="no cell has mixture, dpo-ls, dpo-soup yet"):
        who_wins_map.table(rows[:3])


def test_a_run_goes_on_where_it_was_stopped_and_every_method_has_the_same_total(tmp_path, monkeypatch, capsys):
    small = {"BUDGETS": (1.0,), "SPREADS": (3.0,), "CONFLICTS": (1.0,), "RATES": (0.01,), "AVERAGES": {1.0: (1, 2)}}
    for name, values in small.items():
        monkeypatch.setattr(who_wins, name, values)
    out, kept = tmp_path / "out", tmp_path / "kept.jsonl"
    command = ["--out", str(out), "--seeds", "1", "--sizes", SMALL, "--keep", str(kept)]
    assert who_wins.main([*command, "--plan"]) == 0
    assert "15 trainings of a method, of which 0 are there; 15 to do, 180 steps" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
    assert who_wins.main(command) == 0
    file = out / "rows.jsonl"
    whole = file.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    doubled = [name for name in METHODS for _ in range(2)]
    assert [r["method"] for r in rows] == [*doubled, *METHODS] and {r["steps"] for r in rows} == {12}
    assert {r["method"]: r["models"] for r in rows} == dict(zip(METHODS, (1, 1, 3, 2, 3), strict=True))
    for name in METHODS:  # what is chosen is the best of what was tried
        tried = {r["average"]: r["hypervolume"] for r in rows if (r["role"], r["method"]) == ("choice", name)}
        (mapped,) = (r for r in rows if (r["role"], r["method"]) == ("map", name))
        assert set(tried) == {1, 2} and tried[mapped["average"]] == max(tried.values())
    assert (out / "map.png").read_bytes()[:4] == b"\x89PNG" and "| 1 | 3 | 1 |" in (out / "map.md").read_text()
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert sorted(line["method"] for line in lines if line["role"] == "map") == sorted(METHODS) and all(
        set(line) == set(who_wins.KEPT) for line in lines
    )
    mapped = [line for line in lines if line["role"] == "map"]
    assert who_wins_map.table(mapped).splitlines()[2] == (out / "map.md").read_text().splitlines()[2]
    file.write_text(whole[: whole.rindex("\n", 0, -1) + 20])  # killed while it wrote the last line
    capsys.readouterr()
    assert who_wins.main(command) == 0
    assert "of which 14 are there; 1 to do" in capsys.readouterr().out
    timeless = [{k: v for k, v in json.loads(line).items() if k != "cpu_seconds"} for line in file.open()]
    assert timeless == [{k: v for k, v in r.items() if k != "cpu_seconds"} for r in rows]
    assert who_wins.main(["--out", str(out)]) == 2
    assert "rows.jsonl has rows of other sizes; pass the --sizes" in capsys.readouterr().err


def test_the_map_of_kept_rows_is_written_into_a_new_folder(tmp_path, capsys):
    kept = tmp_path / "rows.jsonl"
    lines = (ROOT / "bench/results/cpu/who-wins.jsonl").read_text()
    kept.write_text(lines)
    assert who_wins.main(["--out", str(tmp_path / "new"), "--report", "--keep", str(kept)]) == 0
    assert (tmp_path / "new" / "map.md").read_text() in capsys.readouterr().out and kept.read_text() == lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cells", "budget=3"], "--cells has budget=3 but the map has 0.25, 1, 4"),
        (["--cells", "width=3"], "--cells has 'width' but it must be one of budget, spread, conflict"),
        (["--sizes", "steps=many"], "--sizes has 'steps=many'; write NAME=NUMBER"),
        (["--methods", "dpo-soup,ppo"], "--methods has 'ppo' but must be some of mixture, concat, dpo-ls"),
        (["--report"], "has no row of the map yet"),
        (
            ["--keep", "gone/rows.jsonl"],
            "--keep needs the folder gone, which is not there; make it, or name another file",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(tmp_path, capsys, arguments, said):
    assert who_wins.main(["--out", str(tmp_path / "new"), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_sizes_are_those_of_the_docs_unless_they_are_given():
    assert who_wins.sizes_of("") == Sizes() and who_wins.sizes_of("steps=44,warmup=0.2").steps == 44


@pytest.mark.parametrize(
    "options, error",
    [
        (["--seeds", "0"], "--seeds is 0 but must be at least 1"),
        (["--sizes", "steps=20"], "5 at budget 0.25, but dpo-ls does 11 trainings there; raise steps to 44 or more"),
    ],
)
def test_what_would_train_nothing_is_refused_before_training(options, error, tmp_path, capsys):
    assert who_wins.main(["--out", str(tmp_path / "map"), *options]) == 2
    assert error in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_the_page_says_what_the_kept_rows_say():
    rows = [json.loads(line) for line in (ROOT / "bench/results/cpu/who-wins.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["role"] == "map"]
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    page = (ROOT / "docs/explanation/who_wins.md").read_text()
    for block in who_wins_map.table(rows).strip().split("\n\n"):  # the map, the regrets, what they come to
        assert block in page
    assert {row["steps"] for row in rows} == {55, 220, 880}
    chosen = {(row["budget"], row["method"]): (row["rate"], row["average"]) for row in rows}
    assert len({(row["budget"], row["method"], row["rate"], row["average"]) for row in rows}) == len(chosen)
    for budget in who_wins.BUDGETS:
        cells = " | ".join(
            f"{rate:g}{' × 2' if average == 2 else ''}" for rate, average in (chosen[budget, m] for m in methods)
        )
        assert f"| {budget:g} | {cells} |" in page
