"""Ranking stops in time: what a run is validated by, which step it keeps, and what an old run goes on to do."""

import dataclasses
import json
import os
import signal

import pytest
import torch

pytest.importorskip("moocore")  # every run measures its front

from mopl.experiments import run_fronts
from mopl.experiments.cos_dpo import ListLoss, vertices_and_centre
from mopl.experiments.stages import Trained
from mopl.ranking import ListTransformer, RankingModel, RankingModelConfig
from mopl.ranking.config import RankConfig
from mopl.ranking.evaluate import Measure, evaluate, reference_scores
from mopl.ranking.loading import load
from mopl.ranking.methods import ConditionedPolicy, FixedPolicy
from mopl.ranking.recipe import RunInterrupted, rank
from mopl.ranking.runs import open_run
from mopl.ranking.validation import FEWEST_LISTS, MOST_LISTS, Validation
from mopl.training import read_log
from tests.ranking.test_recipe import TINY, bytes_of, interrupt_at, quiet

DATA = "synthetic:queries=120,items=6,features=8,objectives=3"
PATIENT = {"validate_every": 1, "patience": 2, "steps": 16, "base_steps": 12, "learning_rate": 0.02, "warmup": 2}
WEIGHTS = ("model.safetensors", "base/model.safetensors")


def config(**changes):
    return RankConfig(**{**TINY, "data": DATA, **changes})


@pytest.fixture(scope="module")
def data():
    return load(DATA)


def ranker(data, conditioned):
    torch.manual_seed(3)
    settings = RankingModelConfig(
        data[0].num_features, ("aux1", "aux2", "aux3"), hidden=8, heads=2, conditioned=conditioned
    )
    model = RankingModel(settings, ListTransformer(data[0].num_features, hidden=8, heads=2))
    torch.nn.init.normal_(model.network.output.weight)
    return model.eval()


def mean_figures(policy, valid, reference, weights):
    """Return sum_j w_j NDCG_j as the front would have it, for each trade-off."""
    options = {"measure": Measure(), "list_loss": ListLoss(), "beta": (1.0,) * 3}
    (found,) = evaluate(policy, valid, reference, weights, **options)
    return (weights * found.auxiliary.nanmean(0)).sum(1)


# What is measured


def test_the_base_model_is_judged_by_the_figure_that_the_report_shows(data):
    valid = data[1]
    model = ListTransformer(valid.num_features, hidden=8, heads=2).eval()
    figure = Validation(valid, config(k=3, gain="exponential")).of_base(100).validate(model)
    scores = valid.pad(reference_scores(model, valid), torch.arange(len(valid)))
    lists = valid.batch(range(len(valid)))
    wanted = Measure(k=3, gain="exponential").ndcg(scores, lists.main, lists.mask).nanmean()
    assert figure == pytest.approx(float(wanted))


def test_tuned_models_are_judged_by_the_weighted_ndcg_of_the_front_at_their_weights(data):
    valid, reference = data[1], torch.randn(data[1].num_items)
    validation = Validation(valid, config())
    validation.take_reference(reference)
    fixed, w = ranker(data, conditioned=False), torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64)
    policy = FixedPolicy(fixed, [fixed.network.state_dict()], w)
    assert validation.of_tuned(w, torch.ones(3), 100).validate(fixed) == pytest.approx(
        float(mean_figures(policy, valid, reference, w)[0]), abs=1e-6
    )
    conditioned, asked = ranker(data, conditioned=True), vertices_and_centre(3)
    figures = mean_figures(ConditionedPolicy(conditioned), valid, reference, asked)
    assert figures.std() > 0.01
    assert validation.of_tuned(asked, torch.ones(3), 100).validate(conditioned) == pytest.approx(
        float(figures.mean()), abs=1e-6
    )


def test_many_lists_are_sampled_evenly_and_each_at_some_of_the_trade_offs(monkeypatch):
    parts = load("synthetic:queries=1600,items=4,features=8,objectives=3", fractions=(0.1, 0.8, 0.1))
    valid, seen = parts[1], []
    validation = Validation(valid, config())
    assert len(validation.data) == MOST_LISTS < len(valid)
    validation.take_reference(torch.arange(valid.num_items).float())
    first, last = validation.data.query_ids[[0, -1]].tolist()
    assert first == int(valid.query_ids[0]) and last >= int(valid.query_ids[-3])
    rows = torch.isin(valid.query_ids[valid.owner], validation.data.query_ids)
    assert torch.equal(validation._reference, torch.arange(valid.num_items)[rows].float())
    model = ranker(parts, conditioned=True)
    score = model.score
    monkeypatch.setattr(model, "score", lambda f, w, **k: (seen.append(w), score(f, w, **k))[1])
    validation.of_tuned(vertices_and_centre(3), torch.ones(3), 100).validate(model)
    asked = torch.cat(seen)
    assert len(asked) == MOST_LISTS  # not four times as many
    assert sorted(asked.unique(dim=0, return_counts=True)[1].tolist()) == [MOST_LISTS // 4] * 4


def test_validation_is_taken_twenty_times_a_training_but_not_more_often_than_every_fifth_step(data):
    validation = Validation(data[1], config())
    assert [validation.of_base(steps).every for steps in (20, 100, 200, 2000)] == [5, 5, 10, 100]
    assert Validation(data[1], config(validate_every=7)).of_base(2000).every == 7
    for settings, message in (({"patience": -1}, "patience is -1"), ({"validate_every": 0}, "validate_every is 0")):
        with pytest.raises(ValueError, match=message):
            config(**settings)


def test_few_lists_choose_nothing_and_the_run_says_so(tmp_path):
    said = []
    small = "synthetic:queries=45,items=6,features=8,objectives=3"
    few = rank(config(data=small), tmp_path / "few", say=said.append)
    assert any(f"base model does all steps: synthetic:valid has 9 lists with a label of relevance above 0, and "
               f"choosing a step needs at least {FEWEST_LISTS}" in line for line in said)  # fmt: skip
    assert any("tuned models do all steps" in line for line in said)
    assert Trained.read(few).validation is None and Trained.read(few).kept == 6
    assert not Validation(load(small)[1], config(patience=0)).notes
    same = rank(config(data=small, patience=0), tmp_path / "same", say=quiet)
    assert bytes_of(few, *WEIGHTS) == bytes_of(same, *WEIGHTS)


def test_a_damaged_record_of_a_training_is_named_with_its_key(tmp_path):
    file = tmp_path / "training.json"
    for text, key in (
        ('{"steps": 3}', "seconds is missing"), ('{"steps": "3", "seconds": 1.0}', 'steps is "3"'),
        ('{"steps": 3, "seconds": 1.0, "kept": -1}', "kept is -1"), ("[]", "must be"), ("{", "not JSON"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=f"training.json: .*{key}"):
            Trained.read(tmp_path)
    file.write_text('{"steps": 3, "seconds": 1.0}')
    assert Trained.read(tmp_path) == Trained(3, 1.0, 3, 3)


# What is kept


def test_without_patience_all_steps_are_trained_and_validation_changes_no_bit_of_them(tmp_path):
    runs = [
        rank(config(method="all", dropout=0.2, loss="plackett-luce", ties="random", **changes), tmp_path / str(i),
             say=quiet)
        for i, changes in enumerate(({"patience": 0}, {"validate_every": 99}))
    ]  # fmt: skip
    names = sorted(str(p.relative_to(runs[0])) for p in runs[0].rglob("*.safetensors"))
    assert len(names) > 10 and bytes_of(runs[0], *names) == bytes_of(runs[1], *names)
    assert "steps kept" not in " ".join((runs[0] / "table.txt").read_text().split())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """One run of every method whose trainings end early, and what it said."""
    said = []
    run = rank(config(method="all", **PATIENT), tmp_path_factory.mktemp("runs") / "all", say=said.append)
    return run, said


def test_every_method_keeps_its_best_step_by_one_rule_and_says_which(stopped):
    run, said = stopped
    log = read_log(run / "log.jsonl")
    done = {path.parent: Trained.read(path.parent) for path in run.rglob("training.json")}
    assert len(done) == 1 + 2 + 3 + 3
    names = {r["stage"] for r in log}
    for name in names:
        figures = {r["step"]: r["validation"] for r in log if r["stage"] == name}
        best = max(figures, key=lambda step: (figures[step], -step))
        limit = 12 if name == "base" else 16
        found = [d for d in done.values() if (d.kept, d.steps, d.limit) == (best, len(figures), limit)]
        assert found and any(d.validation == pytest.approx(figures[best]) for d in found), name
        assert len(figures) in (best + 2, limit)  # the patience of two
        line = next(line for line in said if line.startswith(f"{name}: "))
        of = "main" if name == "base" else "auxiliary"
        assert f"; kept step {best} ({of} NDCG on validation {figures[best]:.4f})" in line
        assert (f"stopped at {best + 2} of {limit}: no better for 2 steps" in line) == (len(figures) < limit)
    assert any(d.steps < d.limit for d in done.values()) and any(d.kept < d.steps for d in done.values())


def test_files_and_table_of_a_run_say_which_steps_were_kept(stopped):
    run, _ = stopped
    for front in run_fronts(run):
        trainings = json.loads((run / front.method / "evaluation.json").read_text())["trainings"]
        models = {"base": 1, "dpo-ls": 3, "dpo-soup": 3, "mo-dpo": 6}.get(front.method, 1)
        assert len(trainings) == models and front.steps["limit"] == (12 if front.method == "base" else 16)
        assert front.steps["kept"] == [t["kept"] for t in trainings.values()]
        assert front.steps["done"] == [t["steps"] for t in trainings.values()]
        for wrong in ({"kept": [9]}, {**front.steps, "kept": [99] * models}, {**front.steps, "limit": "x"}, []):
            with pytest.raises(ValueError, match="steps"):
                dataclasses.replace(front, steps=wrong).check()
        assert front.seconds == pytest.approx(sum(t["seconds"] for t in trainings.values()))
    base, ours = (Trained.read(run / name) for name in ("base", "weight-cos-dpo"))
    note = f"steps kept, of those done: base {base.kept} of {base.steps}, weight-cos-dpo {ours.kept} of {ours.steps}, "
    assert note in " ".join((run / "table.txt").read_text().split()) + " " and note in (run / "report.html").read_text()


def test_the_model_of_a_run_has_the_figure_that_was_best(stopped):
    run, _ = stopped
    opened = open_run(run)
    validation = Validation(opened.splits["valid"], opened.config)
    validation.take_reference(opened.reference["valid"])
    base = ListTransformer.from_pretrained(run / "base")
    assert validation.of_base(12).validate(base) == pytest.approx(Trained.read(run / "base").validation, abs=1e-6)
    model = RankingModel.from_pretrained(run / "weight-cos-dpo")
    figure = validation.of_tuned(vertices_and_centre(3), torch.ones(3), 16).validate(model)
    assert figure == pytest.approx(Trained.read(run / "weight-cos-dpo").validation, abs=1e-6)


@pytest.mark.parametrize("at", [1, 5])
def test_an_interrupted_run_keeps_what_an_uninterrupted_one_keeps(tmp_path, stopped, monkeypatch, at):
    straight, _ = stopped
    settings = config(**PATIENT, checkpoint_every=at)
    with monkeypatch.context() as patch:
        interrupt_at(patch, at, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(RunInterrupted):
            rank(settings, tmp_path / "run", say=quiet)
    resumed = rank(settings, tmp_path / "run", resume=True, say=quiet)
    assert bytes_of(resumed, "model.safetensors") == bytes_of(straight, "weight-cos-dpo/model.safetensors")
    ours, theirs = Trained.read(resumed), Trained.read(straight / "weight-cos-dpo")
    assert (ours.kept, ours.steps, ours.validation) == (theirs.kept, theirs.steps, theirs.validation)


def test_a_run_of_a_version_without_patience_goes_on_as_it_began(tmp_path, monkeypatch):
    straight = rank(config(patience=0), tmp_path / "straight", say=quiet)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(RunInterrupted):
            rank(config(patience=0), tmp_path / "old", say=quiet)
    file = tmp_path / "old" / "config.json"
    record = json.loads(file.read_text())
    del record["config"]["patience"], record["config"]["validate_every"]
    file.write_text(json.dumps(record))
    old = json.loads((tmp_path / "old" / "base" / "training.json").read_text())
    (tmp_path / "old" / "base" / "training.json").write_text(json.dumps({k: old[k] for k in ("steps", "seconds")}))
    assert RankConfig.from_dict(record["config"]).patience == 0
    assert RankConfig.from_dict(RankConfig().to_dict()).patience == RankConfig().patience > 0
    with pytest.raises(ValueError, match="patience was 0, is 3"):
        rank(config(patience=3), tmp_path / "old", resume=True, say=quiet)
    resumed = rank(config(), tmp_path / "old", resume=True, say=quiet)
    assert bytes_of(resumed, *WEIGHTS) == bytes_of(straight, *WEIGHTS)
    assert open_run(resumed).config.patience == 0


def test_small_noisy_data_no_longer_cost_the_base_model_its_rankings(tmp_path):
    """120 lists, on which a hundred steps overfit."""
    data = "synthetic:queries=200,items=10,features=16,objectives=3"
    settings = {"data": data, "hidden": 32, "base_hidden": 64, "heads": 4, "steps": 1, "base_steps": 100,
                "batch_size": 64, "checkpoint_every": 0, "learning_rate": 3e-3, "warmup": 20}  # fmt: skip
    kept, last = (
        rank(config(**settings, **c), tmp_path / str(i), say=quiet) for i, c in enumerate(({}, {"patience": 0}))
    )
    done = Trained.read(kept / "base")
    assert done.kept < 60 and done.steps < 100
    ours, theirs = (run_fronts(run)[0].points[0].main for run in (kept, last))
    assert ours > theirs + 0.005
