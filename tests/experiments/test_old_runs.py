"""Runs of an earlier version open, report, compare and go on; see old_runs/README.md."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("moocore")

from mopl.alignment import open_run as open_alignment
from mopl.cli import main
from mopl.clp import open_run as open_clp
from mopl.experiments import compare, open_run, run_fronts
from mopl.ranking import open_run as open_ranking
from mopl.training import read_log

OLD = Path(__file__).parent / "old_runs"
EXPECTED = json.loads((OLD / "expected.json").read_text())
METHODS = list(EXPECTED["fronts"])
WORDS = ["w1 w2", "w5 w9 w3"]
LANGUAGE = {"align": ["align"], "clp": ["clp", "--kl-weight", "0.05"]}


def copy(place: Path) -> Path:
    """Put the old runs where they can be changed, with the paths that they hold."""
    for file in OLD.rglob("*"):
        if file.is_file():
            target = place / file.relative_to(OLD)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".json":
                target.write_text(file.read_text().replace("{place}", str(place)))
            else:
                shutil.copy(file, target)
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return copy(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """The run that was killed in its second method, resumed."""
    run = copy(tmp_path_factory.mktemp("resumed")) / "rank"
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # nobody can change the names in a record
        assert main(["rank", "--run", str(run), "--resume"]) == 0
    return run


def same_arithmetic() -> bool:
    """Say whether this machine computes as that which made the runs did, so that bits can be compared."""
    x = torch.linspace(-2, 2, 64 * 64).reshape(64, 64)
    found = hashlib.sha256((x @ x.sin().T).exp().numpy().tobytes()).hexdigest()
    return torch.__version__ == EXPECTED["torch"] and found == EXPECTED["arithmetic"]


def assert_same(found, expected, where=""):
    """Compare figures to the bit where the arithmetic is the same, closely elsewhere; new keys are let through."""
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    elif isinstance(expected, float) and not same_arithmetic():
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_resumes_to_the_figures_of_one_that_nobody_stopped(resumed, method):
    assert_same(json.loads((resumed / method / "front.json").read_text()), EXPECTED["fronts"][method])


def test_what_was_finished_is_kept_and_what_had_begun_goes_on(resumed):
    for name in ("weight-cos-dpo/front.json", "weight-cos-dpo/model.safetensors", "base/training.json"):
        assert (resumed / name).read_bytes() == (OLD / "rank" / name).read_bytes()
    # The line of step 4, where the checkpoint is, has the seconds that it had; all later ones are new.
    ours, theirs = (
        {line["step"]: line for line in read_log(run / "log.jsonl") if line["stage"] == "temperature-cos-dpo"}
        for run in (resumed, OLD / "rank")
    )
    assert ours[4] == theirs[4] and list(ours) == [4, 5, 8, 10, 12, 15, 16, 20]
    assert not (resumed / "temperature-cos-dpo" / "checkpoints").exists()


def test_a_resumed_run_opens_and_steers_as_it_did(resumed, capsys):
    run = open_ranking(resumed)
    assert type(open_run(resumed)) is type(run) and run.objectives == ("aux1", "aux2") and run.missing == ()
    assert [front.method for front in run.fronts()] == METHODS
    for method, options in (("weight-cos-dpo", ["0.3", "0.7", "--scale", "2"]), ("mo-dpo", ["0.5", "0.5"])):
        capsys.readouterr()
        assert main(["steer", str(resumed), "--method", method, "--json", "--weights", *options]) == 0
        assert_same(json.loads(capsys.readouterr().out)["rows"], EXPECTED["steer"][method])


def test_a_run_that_was_never_finished_shows_what_it_has_and_says_what_it_lacks(place, capsys):
    run = place / "rank"
    assert main(["report", str(run)]) == 0
    lacks = "is not finished: temperature-cos-dpo, dpo-ls, dpo-soup, mo-dpo have no front"
    printed = capsys.readouterr().out
    for text in (printed, (run / "table.txt").read_text(), (run / "report.html").read_text()):
        assert lacks in " ".join(text.split()) and "weight-cos-dpo" in text
    assert [front.method for front in run_fronts(run)] == ["base", "weight-cos-dpo"]
    opened = open_ranking(run)
    assert opened.policy() is not None
    with pytest.raises(FileNotFoundError, match=r"not finished: mo-dpo has no front; continue it with: mopl rank"):
        opened.policy("mo-dpo")


@pytest.mark.parametrize("kind", LANGUAGE)
def test_a_run_of_a_language_model_reports_and_answers_as_it_did(place, kind, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    run = place / kind
    fronts = run_fronts(run)
    opened = {"align": open_alignment, "clp": open_clp}[kind](run)
    assert type(open_run(run)) is type(opened) and opened.method_name == fronts[1].method
    samples = opened.samples(fronts)
    assert set(samples) == {"base", opened.method_name}
    answered = {"align": 2, "clp": 1}[kind]  # prompts, at each of the three trade-offs
    assert [len(texts) for texts in samples[opened.method_name][:3]] == [answered] * 3
    assert main(["report", str(run)]) == 0
    for name in ("table.txt", "front.png", "report.html"):
        assert (run / name).stat().st_size > 300
    name, *options = LANGUAGE[kind]
    capsys.readouterr()
    given = ["--weights", "0.3", "0.7", "--max-new-tokens", "6", "--json", *options, *WORDS]
    assert main(["generate", str(place / name), *given]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert_same(answers, EXPECTED["generate"][kind])


@pytest.mark.parametrize("kind", ["rank", *LANGUAGE])
def test_an_old_run_stands_beside_a_copy_of_another_seed(place, tmp_path, kind):
    if kind != "rank":
        pytest.importorskip("transformers")
    other = shutil.copytree(place / kind, tmp_path / "other")
    record = json.loads((other / "config.json").read_text())
    record["config"]["seed"] = 4
    (other / "config.json").write_text(json.dumps(record))
    text = compare([place / kind, other], table=tmp_path / "table.txt", html=tmp_path / "page.html")
    assert "(2 seeds)" in text and (tmp_path / "table.txt").read_text() == text


def test_a_run_of_another_default_grid_is_asked_at_the_weights_that_it_has(tmp_path, capsys):
    """Version 0.1 had other default numbers of points; a method with a model for each point has no others."""
    run = tmp_path / "run"
    data = "synthetic:queries=12,items=4,features=6,objectives=3"
    few = ["--steps", "2", "--hidden", "8", "--heads", "1", "--points", "3", "--bootstrap", "0"]
    assert main(["rank", "--data", data, "--method", "dpo-ls", "--run", str(run), *few]) == 0
    record = json.loads((run / "config.json").read_text())
    record["config"]["points"] = None
    (run / "config.json").write_text(json.dumps(record))
    assert open_run(run).grid.tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    capsys.readouterr()
    assert main(["steer", str(run), "--weights", "0", "1", "0"]) == 0
    assert main(["steer", str(run), "--weights", "0.5", "0.25", "0.25"]) == 2
    assert "0.5" in (said := capsys.readouterr().err) and "model.safetensors" not in said


def test_a_run_with_settings_that_were_allowed_once_opens_and_goes_on(tmp_path, capsys):
    run = tmp_path / "run"
    text = "".join(f"{i % 2} qid:{i // 4} 1:{i % 3} 2:{i % 5} 3:0.{i}\n" for i in range(60))
    (tmp_path / "my.txt").write_text(text)
    given = ["--data", str(tmp_path / "my.txt"), "--objectives", "a=1", "b=2", "--base-steps", "1", "--steps", "1"]
    few = ["--hidden", "8", "--heads", "1", "--points", "2", "--bootstrap", "0"]
    assert main(["rank", *given, *few, "--run", str(run)]) == 0
    record = json.loads((run / "config.json").read_text())
    record["config"] |= {"base_steps": 0, "objectives": ["a=1:scale=1", "b=2"]}  # neither did anything
    (run / "config.json").write_text(json.dumps(record))
    assert main(["rank", "--run", str(run), "--resume"]) == 0
    assert main(["steer", str(run), "--weights", "0.5", "0.5"]) == 0
    for option in (["--base-steps", "0"], ["--objectives", "a=1:scale=2"]):
        assert main(["rank", *given, *few, *option, "--run", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
