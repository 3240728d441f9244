"""The driver of every application: the order of its stages, what a failure leaves, what a resumed run must find."""

import dataclasses
import json
import types
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("moocore")

from mopl._files import write_file
from mopl.experiments import driver
from mopl.experiments.driver import Measured, Recipe, execute
from mopl.experiments.run_directory import RunInterrupted
from mopl.pareto import Front
from mopl.training import RunLog, TrainingDiverged, TrainingInterrupted
from mopl.training.parallel import on_main


@dataclasses.dataclass(frozen=True)
class Config:
    WHERE_MISSING: ClassVar[dict[str, Any]] = {"patience": 0}
    method: str = "all"
    patience: int = 6
    mixed_precision: str = "no"
    device: str = "cpu"
    log_with: tuple[str, ...] = ()

    @property
    def methods(self):
        return ("one", "two") if self.method == "all" else (self.method,)

    def to_dict(self):
        return dataclasses.asdict(self)


class Toy(Recipe):
    """Notes what it is asked for, and fails where it is told to."""

    kind = "align"
    fingerprints: ClassVar[dict[str, str]] = {"fingerprint": "data", "tokens": "tokenizer"}

    def __init__(self, config=None, *, fails=None, error=None, tokens="t"):
        super().__init__(config or Config())
        self.fails, self.error, self.tokens, self.done = fails, error or ValueError("a fault"), tokens, []

    def at(self, stage):
        self.done.append(stage)
        if stage == self.fails:
            raise self.error

    @property
    def stem(self):
        return "toy"

    def read(self):
        self.at("read")
        self.grid = torch.eye(2, dtype=torch.float64).flip(0)
        return {"fingerprint": "f", "tokens": self.tokens}

    def settings_to_resume(self, record, changes, path):
        self.at("settings_to_resume")

    def load(self):
        self.at("load")

    def prepare(self):
        self.at("prepare")
        (self.path / "reference").mkdir(exist_ok=True)

    def measured(self, method):
        weights = None if method == "base" else [[0.0, 1.0], [1.0, 0.0]]
        values = [[1.0, 2.0]] if method == "base" else [[1.0, 2.0], [2.0, 1.0]]
        front = Front.measure(
            method, objectives=["a", "b"], main="main", weights=weights, main_values=[0.0] * len(values),
            auxiliary_values=values, reference_point=[3.0, 3.0], seconds=0.0, parameters=0, seed=0, data={},
            maximise=False,
        )  # fmt: skip
        return Measured(front, {"of": method}, [{"prompt": "é", "responses": []}])

    def base(self):
        self.at("base")
        return self.measured("base")

    def train(self, method, folder):
        assert folder.is_dir() and not (folder / "front.json").exists()
        self.at(f"train {method}")
        return method

    def evaluate(self, method, folder, trained):
        assert trained == method
        self.at(f"evaluate {method}")
        return self.measured(method)

    def remarks(self):
        return ("at the end",)

    def options_to_resume(self):
        return ("--rewards", "mine:f")


ALL = ["read", "load", "prepare", "base", "train one", "evaluate one", "train two", "evaluate two"]


def quiet(text):
    pass


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    """What reports are written of; the toy has no figures to draw."""
    written = []
    monkeypatch.setattr("mopl.experiments.driver.write_reports", written.append)
    return written


def test_what_is_written_for_all_goes_through_the_door_that_passes_errors_on_to_every_process(tmp_path, monkeypatch):
    open_doors, written = [], []

    def door(accelerator, act):
        open_doors.append(act)
        try:
            return on_main(accelerator, act)
        finally:
            open_doors.pop()

    monkeypatch.setattr("mopl.experiments.driver.on_main", door)
    for place in ("mopl.experiments.driver.Measured.save", "mopl.experiments.driver.write_reports"):
        monkeypatch.setattr(place, lambda *_: written.append(len(open_doors)))
    execute(Toy(), tmp_path / "run", say=quiet)
    assert written == [1] * 4  # base, two methods, reports


def test_stages_follow_each_other_and_every_method_has_a_folder_with_its_files(tmp_path, reports):
    toy, said = Toy(), []
    assert execute(toy, tmp_path / "run", say=said.append) == tmp_path / "run"
    assert toy.done == ALL and reports == [tmp_path / "run"] and said == [f"run {tmp_path / 'run'}", "at the end"]
    for name in ("base", "one", "two"):
        folder = tmp_path / "run" / name
        assert Front.load(folder / "front.json").method == name
        assert json.loads((folder / "evaluation.json").read_text()) == {"of": name}
        assert "é" in (folder / "samples.json").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert list(record)[:3] == ["command", "kind", "config"] and record["data"] == {"fingerprint": "f", "tokens": "t"}
    assert execute(Toy(Config("one")), tmp_path / "alone", say=quiet) and (tmp_path / "alone/front.json").is_file()


def test_a_run_that_goes_on_does_what_is_missing(tmp_path):
    error = TrainingInterrupted("two", 3, None)
    with pytest.raises(RunInterrupted, match=r"stopped in 'two' after step 3; .* --resume --rewards mine:f"):
        execute(Toy(fails="train two", error=error), tmp_path / "run", say=quiet)
    toy = Toy()
    execute(toy, tmp_path / "run", resume=True, say=quiet)
    assert toy.done == ["read", "settings_to_resume", "load", "prepare", "train two", "evaluate two"]


def test_a_method_counts_as_finished_only_once_all_its_files_are_there(tmp_path, monkeypatch):
    def full(file, content):
        if file.name == "samples.json" and file.parent.name == "one":
            raise OSError("no space left on device")
        write_file(file, content)

    with monkeypatch.context() as patch:
        patch.setattr("mopl.experiments.driver.write_file", full)
        with pytest.raises(OSError, match="no space left"):
            execute(Toy(), tmp_path / "run", say=quiet)
    toy = Toy()
    execute(toy, tmp_path / "run", resume=True, say=quiet)
    assert [stage for stage in toy.done if stage.startswith("train")] == ["train one", "train two"]


@pytest.mark.parametrize("stage", ["read", "load"])
def test_nothing_is_written_before_all_is_found_sound(tmp_path, stage):
    with pytest.raises(ValueError, match="a fault"):
        execute(Toy(fails=stage), tmp_path / "runs" / "one", say=quiet)
    assert not list(tmp_path.iterdir())


def test_a_new_run_that_fails_before_it_has_computed_anything_is_taken_back(tmp_path):
    def failing(run, stage, **changes):
        with pytest.raises(type(changes.get("error", ValueError()))):
            execute(Toy(fails=stage, **changes), run, say=quiet)
        return run

    assert not failing(tmp_path / "new", "prepare").exists()
    (tmp_path / "empty").mkdir()
    assert not list(failing(tmp_path / "empty", "prepare").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert failing(tmp_path / "link", "prepare").is_symlink() and not (tmp_path / "elsewhere").exists()
    # What was computed stays, and so does what its error says stays.
    assert (failing(tmp_path / "begun", "base") / "config.json").is_file()
    assert (failing(tmp_path / "wild", "prepare", error=TrainingDiverged("no number")) / "config.json").is_file()
    # A run that goes on is never taken back.
    (tmp_path / "wild" / "reference").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="a fault"):
        execute(Toy(fails="prepare"), tmp_path / "wild", resume=True, say=quiet)
    assert (tmp_path / "wild" / "config.json").is_file()


@pytest.mark.parametrize("stage", [None, "load", "train two"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_the_log_is_closed_however_a_run_ends(tmp_path, monkeypatch, stage, error):
    closed = []
    monkeypatch.setattr(RunLog, "close", lambda self: closed.append(self.path))
    try:
        execute(Toy(fails=stage, error=error), tmp_path / "run", say=quiet)
    except (ValueError, RunInterrupted, KeyboardInterrupt):
        assert stage
    assert closed == [tmp_path / "run" / "log.jsonl"]


@pytest.mark.parametrize(("change", "what"), [({"fingerprint": "other"}, "data"), ({"tokens": "other"}, "tokenizer")])
def test_a_run_goes_on_with_the_data_it_began_with_before_any_model_is_loaded(tmp_path, change, what):
    run = execute(Toy(), tmp_path / "run", say=quiet)
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**record, "data": {**record["data"], **change}}))
    toy = Toy()
    with pytest.raises(ValueError, match=f"the {what} of .*run is not what it was when the run began"):
        execute(toy, run, resume=True, say=quiet)
    assert toy.done == ["read", "settings_to_resume"]


def test_other_versions_are_noted_and_a_setting_they_did_not_have_means_what_they_did(tmp_path):
    run, said = execute(Toy(), tmp_path / "run", say=quiet), []
    record = json.loads((run / "config.json").read_text())
    record["versions"]["torch"] = "1.0"
    del record["config"]["patience"]
    (run / "config.json").write_text(json.dumps(record))
    left, given = Toy(), Toy(Config(patience=3))
    for toy in (left, given):
        execute(toy, run, resume=True, say=said.append)
    assert any(line.startswith("note: versions changed since the run began (torch 1.0 -> ") for line in said)
    assert (left.config.patience, given.config.patience) == (0, 3)


def test_a_method_that_was_evaluated_on_another_grid_is_not_compared(tmp_path):
    execute(Toy(), tmp_path / "run", say=quiet)
    other = Toy()
    other.read = lambda: (Toy.read(other), setattr(other, "grid", torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])))[
        0
    ]
    with pytest.raises(ValueError, match="holds 2 trade-offs but this version evaluates 3"):
        execute(other, tmp_path / "run", resume=True, say=quiet)


def test_the_time_of_the_methods_that_are_left_is_estimated_by_their_trainings(monkeypatch):
    said = []
    recipe = types.SimpleNamespace(grid=torch.zeros(10, 3), say=said.append)
    driver._estimate(recipe, "weight-cos-dpo", ("dpo-ls", "dpo-soup"), 12.0, 12.0)
    assert said == ["about 3 minutes for dpo-ls, dpo-soup (at most 13 trainings)"]
    driver._estimate(recipe, "weight-cos-dpo", ("dpo-ls", "dpo-soup"), 2.0, 20.0)  # evaluation takes most of it
    assert said.pop() == "about 62 seconds for dpo-ls, dpo-soup (at most 13 trainings)"
    for done, left, seconds in (
        ("weight-cos-dpo", (), 99.0),
        ("weight-cos-dpo", ("dpo-soup",), 1.0),
        ("clp", ("dera",), 99.0),
    ):
        driver._estimate(recipe, done, left, seconds, seconds)
    assert len(said) == 1
