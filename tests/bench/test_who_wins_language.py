"""The map of who wins among language models: its truth, a run at minuscule size, and a page that says what rows say."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from bench import who_wins_language, who_wins_language_costs, who_wins_language_tried
from bench.pictures import fingerprint
from bench.who_wins_cells import Cell
from bench.who_wins_language_cells import (
    CONDITIONED,
    INFLUENCE,
    METHODS,
    NAMES,
    Problem,
    Sizes,
    Trial,
    also_alone,
)
from bench.who_wins_language_map import by_cell, difference, leads_of, mean_of, summary, table
from mopl.alignment import tuned
from mopl.alignment.methods import AlignSource, scored_for
from mopl.conditioning.samplers import fixed
from mopl.experiments.cos_dpo import scalarized_loss
from mopl.experiments.methods import Method
from mopl.experiments.response_loss import ResponseLoss
from mopl.language_models import models
from mopl.language_models.collate import ListCollator

ROOT = Path(__file__).resolve().parents[2]
OURS = CONDITIONED[0]
ROWS = ROOT / "bench/results/cpu/who-wins-language.jsonl"
TRIED = ROWS.with_name("who-wins-language-tried.jsonl")
PAGE = ROOT / "docs/explanation/who_wins_language.md"
SMALL = "steps=16,train_lists=24,test_lists=12,base_steps=4,batch=4,points=3,hidden=8,prompts=2"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def test_the_optimum_is_reached_by_what_is_said_to_be_it():
    problem = Problem(2.0, 0.6, 0, Sizes(points=3, train_lists=8, test_lists=16, base_steps=2, hidden=8))
    best = [problem._best_policy(w) for w in problem.grid]
    found = problem.measure(best)
    assert found["hypervolume"] == pytest.approx(1) and found["rewards"] == pytest.approx(1)
    assert found["value_regret"] == pytest.approx(0, abs=1e-6)
    # at the ends of the simplex it has the least expected loss, too; no other policy has less at any weights
    losses = torch.stack([problem._losses(policy) for policy in best])
    torch.testing.assert_close(losses[0, 1], problem.best_losses[0, 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses[2, 0], problem.best_losses[2, 0], atol=1e-5, rtol=1e-5)
    assert found["regret"] > 0 and problem.measure([problem.reference] * 3)["regret"] > found["regret"]
    assert float((problem.rewards**2).mean()) == pytest.approx(4.0, rel=0.5)


def test_a_list_at_each_objective_alone_counts_as_much_as_at_its_weights():
    problem = Problem(1.0, 0.6, 1000, Sizes(points=3, train_lists=8, test_lists=4, base_steps=0, hidden=8))
    model = tuned.new_model(problem.base, problem.config(1e-3, "lora-mixture"), NAMES, Method(conditioned=True))
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.normal_(std=0.3)
    loss = ResponseLoss(labels=("l1", "l1"))
    source = AlignSource(
        problem.train, 3, ListCollator(), seed=0, weights=lambda step: torch.tensor([[0.3, 0.7]]).expand(3, 2),
        beta=fixed(problem.beta, 3), reference=problem.train_reference,
    )  # fmt: skip
    batch, score = source(0), scored_for(loss)
    trained = [value for value in model.parameters() if value.requires_grad]

    def of(score, batch):
        value, _ = scalarized_loss(score, loss, NAMES, common_beta=0.5)(model, batch, 0)
        return [value, *torch.autograd.grad(value, trained)]

    ends = [dataclasses.replace(batch, weights=row.expand(3, 2)) for row in torch.eye(2)]
    parts = [of(score, each) for each in (batch, *ends)]
    for found, *each in zip(of(also_alone(score), batch), *parts, strict=True):
        torch.testing.assert_close(found, sum(each) / 3)
    models.release(model)


@pytest.mark.parametrize(("base_steps", "least", "most"), [(0, 1.0, 3.0), (300, 0.0, 0.05)])
def test_virtual_tokens_begin_near_the_reference_of_a_model_that_overlooks_them(base_steps, least, most):
    problem = Problem(1.7, 0.6, 1000, Sizes(train_lists=8, test_lists=8, base_steps=base_steps))
    model = tuned.new_model(problem.base, problem.config(1e-3, "hyper-prompt"), NAMES, Method(conditioned=True))
    policy = problem.policy_of(model, problem.grid[1])
    models.release(model)
    assert least <= float((policy.exp() * (policy - problem.reference)).sum(1).mean()) < most


def test_a_run_goes_on_where_it_was_stopped_and_every_method_has_the_same_total(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(who_wins_language, "RATES", {1.0: (0.01,)})
    monkeypatch.setattr(who_wins_language, "RATE_SEEDS", {1.0: 1})
    command = ["--out", str(tmp_path), "--seeds", "1", "--sizes", SMALL, "--cells", "budget=1,spread=3,conflict=1"]
    assert who_wins_language.main([*command, "--plan"]) == 0
    assert "12 trainings of a method, of which 0 are there; 12 to do" in capsys.readouterr().out
    assert who_wins_language.main(command) == 0
    file = tmp_path / "rows.jsonl"
    whole = file.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [r["method"] for r in rows] == [*METHODS, INFLUENCE] * 2 and {r["steps"] for r in rows} == {16}
    assert {r["method"]: r["models"] for r in rows} == dict(zip((*METHODS, INFLUENCE), (1, 1, 3, 2, 3, 1), strict=True))
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert "| 1 | 3 | 1 |" in (tmp_path / "map.md").read_text()
    file.write_text(whole[: whole.rindex("\n", 0, -1) + 20])  # killed while it wrote the last line
    capsys.readouterr()
    assert who_wins_language.main(command) == 0
    assert "of which 11 are there; 1 to do" in capsys.readouterr().out
    timeless = [{k: v for k, v in json.loads(line).items() if k != "cpu_seconds"} for line in file.open()]
    assert timeless == [{k: v for k, v in r.items() if k != "cpu_seconds"} for r in rows]


def test_a_rate_is_the_best_on_average_and_the_map_is_trained_again_where_it_changes():
    row = {"budget": 1.0, "spread": 1.7, "conflict": 0.6, "method": "dpo-soup"}
    rates = [
        {**row, "role": "rate", "seed": 1000 + seed, "rate": rate, "hypervolume": figure}
        for rate, figures in ((0.008, (0.6, 0.5)), (0.016, (0.5, 0.7)), (0.032, (0.55, 0.55)))
        for seed, figure in enumerate(figures)
    ]
    assert who_wins_language.best_rate(rates[::2], 1.0, "dpo-soup") == 0.008  # by the first seed alone
    assert who_wins_language.best_rate(rates, 1.0, "dpo-soup") == 0.016
    cell = Cell(1.0, 3.0, 1.0, 0)
    there = [{**row, "role": "map", "spread": 3.0, "conflict": 1.0, "seed": 0, "rate": 0.008}]
    checked = [{**there[0], "role": "check", "rate": 0.032}]
    job = (cell, "dpo-soup", None)
    assert who_wins_language.lacking([job], rates[::2] + there) == []
    assert who_wins_language.lacking([job], rates + there) == [job]
    assert who_wins_language.of_best_rates(rates + there + checked) == rates + checked
    assert who_wins_language.lacking([job], [*rates, *there, {**there[0], "rate": 0.016}]) == []


def test_the_map_has_one_row_of_each_training_and_every_method_tried_the_same_rates(rows):
    assert who_wins_language.of_best_rates(rows) == rows
    assert len({who_wins_language._key_of(row) for row in rows}) == len(rows)
    for budget, seeds in who_wins_language.RATE_SEEDS.items():
        wanted = {(1000 + seed, rate) for seed in range(seeds) for rate in who_wins_language.RATES[budget]}
        for method in METHODS:
            of = [r for r in rows if (r["role"], r["budget"], r["method"]) == ("rate", budget, method)]
            assert {(r["seed"], r["rate"]) for r in of} == wanted, (budget, method)
            tried = who_wins_language.RATES[budget]
            assert tried[0] < who_wins_language.best_rate(rows, budget, method) < tried[-1]  # no end cuts it off


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cells", "budget=3"], "--cells has budget=3 but the map has 0.25, 1, 4"),
        (["--sizes", "steps=many"], "--sizes has 'steps=many'; write NAME=NUMBER"),
        (["--sizes", "width=3"], "--sizes has 'width' but it must be one of points, prompts"),
        (["--sizes", "steps=8"], "--sizes has steps=8, which is 2 at budget 0.25, but dpo-ls trains 5 models"),
        (["--seeds", "0"], "--seeds is 0 but must be at least 1"),
        (["--report"], "no cell has all methods yet"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(tmp_path, capsys, arguments, said):
    assert who_wins_language.main(["--out", str(tmp_path / "new"), *arguments]) == 2
    assert said in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_the_page_has_the_table_and_the_counts_of_the_rows(rows):
    page = PAGE.read_text(encoding="utf-8")
    anew = f"python -m bench.who_wins_language --rows {ROWS.relative_to(ROOT)} --out DIR --report"
    assert table(rows) in page, anew
    for line in summary(rows).splitlines():
        assert line in page, f"{anew}; {line}"


def test_the_picture_shows_what_the_rows_say(rows):
    image = pytest.importorskip("PIL.Image")
    shown = image.open(ROOT / "docs/pictures/who-wins-language.png").info["Description"]
    assert shown == fingerprint(leads_of(rows))


def test_the_page_has_the_table_of_what_else_was_tried():
    tried = [json.loads(line) for line in TRIED.read_text(encoding="utf-8").splitlines()]
    page = PAGE.read_text(encoding="utf-8")
    assert who_wins_language_tried.table(tried) in page and who_wins_language_tried.by_conflict(tried) in page
    for name, (method, _, budget, rates, seeds) in who_wins_language_tried.TRIALS.items():
        of = [(r["method"], r["budget"], r["rate"], r["seed"]) for r in tried if r["trial"] == name]
        assert sorted(of) == sorted((method, budget, rate, s) for rate in rates for s in seeds for _ in range(6)), name


def test_trials_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(who_wins_language_tried, "CELLS", ((1.0, 0.6),))
    plain, alone = who_wins_language_tried.PLAIN, "alone"
    trials = {plain: ("lora-mixture", Trial(), 0.25, (0.016,), (0,)),
              alone: ("lora-mixture", Trial(concentration=9.0, alone=True), 0.25, (0.016,), (0,))}  # fmt: skip
    monkeypatch.setattr(who_wins_language_tried, "TRIALS", trials)
    small, rows, file = who_wins_language.sizes_of(SMALL), [], tmp_path / "rows.jsonl"
    who_wins_language_tried.work(rows, file, small)
    first, second = rows
    assert (first["trial"], second["trial"]) == (plain, alone) and first["hypervolume"] != second["hypervolume"]
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    kept = rows[:1]
    who_wins_language_tried.work(kept, file, small)
    assert [{**row, "cpu_seconds": 0} for row in kept] == [{**row, "cpu_seconds": 0} for row in rows]
    assert who_wins_language_tried.main(["--rows", str(file), "--report"]) == 0
    assert f"| {plain} |  | {first['hypervolume']:.3f} |" in capsys.readouterr().out


def test_the_page_has_the_measured_costs():
    results = json.loads(ROWS.with_name("who-wins-language-costs.json").read_text())["results"]
    assert who_wins_language_costs.table(results) in PAGE.read_text(encoding="utf-8")


def test_what_the_page_says_in_words_is_what_the_rows_say(rows):
    cells, soup = by_cell(rows), "dpo-soup"
    seeds = {0.25: 10, 1.0: 5, 4.0: 1}
    assert len(cells) == 18 and all(len(m[OURS]) == seeds[cell[0]] for cell, m in cells.items())
    rivals = {cell: difference(m, OURS) for cell, m in cells.items()}
    assert sum(lead.mean > 0 for lead in rivals.values()) == 14
    (behind,) = (cell for cell, lead in rivals.items() if lead.mean < -2)
    worst = rivals[behind]
    assert behind == (1.0, 3.0, 0.2) and round(worst.mean, 1) == -4.1 and worst.low < 0 < worst.high
    prompts = {cell: difference(m, OURS, ("hyper-prompt",)).mean > 0 for cell, m in cells.items()}
    assert sum(prompts.values()) == 16 and all(prompts[cell] for cell in cells if cell[0] < 4)
    few = {cell[1:]: lead for cell, lead in rivals.items() if cell[0] == 0.25}
    assert {lead.rival for lead in few.values()} == {soup}
    assert all(few[spread, 0.2].mean > 10 and abs(few[spread, 1.0].mean) <= 1.05 for spread in (1.0, 3.0))
    odd = cells[0.25, 3.0, 0.6]
    assert mean_of(odd[soup], "hypervolume") > mean_of(odd[OURS], "hypervolume") and few[3.0, 0.6].mean > 0
    rate = {(row["budget"], row["method"]): row["rate"] for row in rows if row["role"] == "map"}
    assert all(rate[budget, OURS] == rate[budget, soup] / 2 for budget in seeds)
    slow: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        if row["role"] == "check" and row["rate"] == 0.008:
            slow.setdefault((0.25, row["spread"], row["conflict"]), {})[row["seed"]] = row
    assert len(slow) == 6
    assert all(difference({**cells[cell], OURS: each}, OURS).mean < 0 for cell, each in slow.items())
    variants = [difference(m, INFLUENCE, ("hyper-prompt",)) for m in cells.values() if INFLUENCE in m]
    assert len(variants) == 2 and all(lead.low < 0 < lead.high for lead in variants)
