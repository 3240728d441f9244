"""Trackers: each training is a run of theirs, with the settings; one that is resumed goes on and logs no step twice."""

import json
import sys

import pytest
from accelerate import tracking
from small_training import Source, config, network, squared_error
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mopl._records import DamagedFile
from mopl.training import RunLog, read_log, train

SETTINGS = {"method": "all", "scales": (0.5, 2.0), "points": None, "steps": 3}


class Fake(tracking.GeneralTracker):
    """Notes what it is asked to do; accelerate's own trackers of these names have packages that tests go without."""

    requires_logging_directory = False
    told: list

    def __init__(self, project, **options):
        super().__init__()
        self.told.append(("new", project, options))

    @property
    def tracker(self):
        return self

    id, step = "an-id", 0
    info = property(lambda self: type("Info", (), {"run_id": "a-run-id"}))

    def store_init_configuration(self, values):
        self.told.append(("settings", values))

    def log(self, values, step=None, **kwargs):
        self.told.append((step, values))

    def finish(self):
        self.told.append("end")


@pytest.fixture
def fake(monkeypatch):
    def make(name):
        kind = type("Kind", (Fake,), {"name": name, "told": []})
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
        monkeypatch.setattr("mopl.training.trackers.require", lambda *modules, **options: None)
        return kind

    return make


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_tensorboard_gets_the_numbers_and_the_settings(tmp_path):
    log = RunLog(tmp_path, log_with=("tensorboard",), settings=SETTINGS)
    train(network(), Source(), squared_error, config(), log=log, stage="base")
    log.close()
    seen = events(tmp_path / "tensorboard" / "base")
    written = [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in read_log(tmp_path / "log.jsonl")]
    assert [(e.step, e.value) for e in seen.Scalars("loss")] == written and len(written) == 4
    (text,) = seen.Tensors("settings/text_summary")
    assert text.tensor_proto.string_val == [b"    method: all\n    scales: 0.5 2.0\n    steps: 3"]
    assert {path.name for path in (tmp_path / "tensorboard").rglob("*") if path.is_dir()} == {"base"}


def test_tensorboard_takes_back_what_came_after_the_checkpoint(tmp_path):
    for done, loss in ((0, 1.0), (2, 5.0)):
        log = RunLog(tmp_path, log_with=("tensorboard",), settings=SETTINGS)
        log.rewind("base", done)
        for step in range(done + 1, 5):
            log.write({"stage": "base", "step": step, "loss": loss})
        log.close()
    seen = events(tmp_path / "tensorboard" / "base")
    assert [(e.step, e.value) for e in seen.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0)]
    assert seen.Tensors("settings/text_summary")


def test_a_tracker_has_a_run_for_each_training(fake, tmp_path):
    kind = fake("other")
    log = RunLog(tmp_path, log_with=("other", "other"), settings=SETTINGS)
    for stage in ("base", "tuned"):
        log.rewind(stage, 0)
        log.write({"stage": stage, "step": 2, "loss": 0.5, "learning_rate": 0.1, "note": "text"})
    log.close()
    begun = [("new", "mopl", {}), ("settings", {"method": "all", "scales": "0.5 2.0", "steps": 3})]
    assert kind.told == [*begun, (2, {"loss": 0.5, "learning_rate": 0.1}), "end"] * 2


@pytest.mark.parametrize(("name", "identity"), [("wandb", "an-id"), ("mlflow", "a-run-id"), ("trackio", "")])
def test_a_resumed_stage_continues_the_same_run_and_logs_no_step_twice(fake, tmp_path, name, identity):
    kind = fake(name)
    for done in (0, 2):
        log = RunLog(tmp_path, log_with=(name,), settings=SETTINGS)
        kind.step = 2 * done  # what W&B has by its own account
        log.rewind("base", done)
        for step in range(done + 1, 4 + done):
            log.write({"stage": "base", "step": step, "loss": 1.0})
        if done:
            log.close()  # the first was killed
    assert [each[0] for each in kind.told if isinstance(each[0], int)] == [1, 2, 3, 4, 5]
    first, second = (each[2] for each in kind.told if each[0] == "new")
    title = f"{tmp_path.name}/base"
    if name == "wandb":
        same = {"name": title, "group": tmp_path.name, "dir": str(tmp_path), "resume": "allow"}
        assert first == {**same, "id": None} and second == {**same, "id": identity}
    elif name == "mlflow":
        assert first == {"run_name": title, "tags": {"group": tmp_path.name}} and second == {"run_id": identity}
    else:
        assert first["name"] == second["name"] == title and [first["resume"], second["resume"]] == ["never", "allow"]
    # MLflow takes no other value of a setting; the others get what a resumed run has now.
    assert sum(each[0] == "settings" for each in kind.told) == (1 if name == "mlflow" else 2)
    assert json.loads((tmp_path / "trackers.json").read_text())["base"][name] == {"id": identity, "step": 5}


def test_offline_wandb_is_sent_again_what_came_after_the_checkpoint(fake, tmp_path):
    kind = fake("wandb")
    for done in (0, 1):
        log = RunLog(tmp_path, log_with=("wandb",))
        log.rewind("base", done)
        for step in range(done + 1, 4):
            log.write({"stage": "base", "step": step, "loss": 1.0})
    assert [each[0] for each in kind.told if isinstance(each[0], int)] == [1, 2, 3, 2, 3]


def test_projects_and_places_of_wandb_are_those_of_its_users(fake, tmp_path, monkeypatch):
    kind = fake("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    RunLog(tmp_path, log_with=("wandb",)).rewind("base", 0)
    (_, project, options), *_ = kind.told
    assert project == "ours" and "dir" not in options


def test_other_processes_than_the_main_one_open_no_tracker(fake, tmp_path):
    kind = fake("other")
    log = RunLog(tmp_path, enabled=False, log_with=("other",))
    log.rewind("base", 0)
    log.write({"stage": "base", "step": 1, "loss": 1.0})
    assert not kind.told and not list(tmp_path.iterdir())


def test_what_cannot_be_a_tracker_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="log_with has 'tensorbord'; choose from tensorboard, wandb, mlflow, trackio"):
        RunLog(tmp_path, log_with=("tensorbord",))
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(
        ImportError, match=r"log_with='trackio' needs trackio, which is not installed; run: pip install"
    ):
        RunLog(tmp_path, log_with=("trackio",))
    with pytest.warns(FutureWarning, match=r'tensorboard=True is called log_with=\("tensorboard",\) now'):
        RunLog(tmp_path, tensorboard=True)
    (tmp_path / "trackers.json").write_text('{"base": {"wandb": {"id": 3, "step": 1}}}')
    with pytest.raises(DamagedFile, match=r"trackers.json.*delete the file: the trackers begin new runs then"):
        RunLog(tmp_path, log_with=("tensorboard",)).rewind("base", 0)
