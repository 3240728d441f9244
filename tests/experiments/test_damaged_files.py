"""A damaged file of a run is named in one line, with the key: no traceback, no other exception, no hang."""

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("moocore")

from damage import CONSTANTS, OTHERS, changed, complaint, fifo, paths, replaced, run, whole

from mopl import _records
from mopl._bounds import check_bounds
from mopl._records import DamagedFile
from mopl.cli import main
from mopl.experiments import run_fronts
from mopl.ranking.config import RankConfig

TINY = [
    "--data", "synthetic:queries=60,items=6,features=8,objectives=2", "--hidden", "8", "--base-hidden", "8", "--heads",
    "2", "--steps", "4", "--base-steps", "3", "--batch-size", "8", "--bootstrap", "10", "--points", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def ranking(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("damaged") / "run"
    assert main(["rank", "--run", str(path), *TINY]) == 0
    return path


def assert_none(found: dict[str, str | None]) -> None:
    wrong = {name: text for name, text in found.items() if text is not None}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in list(wrong.items())[:30]) + f"\n{len(wrong)} wrong"


def every_key(text: str, others: list[object]) -> dict[str, str]:
    """Return a JSON file with one value replaced or removed, for every value in it."""
    cases = {}
    for path in paths(json.loads(text)):
        if path:
            cases |= {f"{path} {new!r:.20}": changed(text, path, new) for new in others}
            cases[f"{path} removed"] = changed(text, path, remove=True)
    return cases


def test_the_front_of_another_method_is_no_second_seed_of_it(ranking):
    """Put in place of the run's own, it would be averaged with that method's front in a report of several runs."""
    file = ranking / "front.json"
    with replaced(file, changed(file.read_text(), ["method"], "dpo-ls")), pytest.raises(DamagedFile) as error:
        run_fronts(ranking)
    assert f"{file}: method is 'dpo-ls' but {ranking / 'config.json'} has 'weight-cos-dpo' there" in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "front.json", "base/front.json"])
def test_every_key_of_a_run_may_be_anything(ranking, name):
    file = ranking / name
    found = {}
    for what, content in every_key(file.read_text(), [None, [[1]], "x", 10**18, "NaN"]).items():
        with replaced(file, content):
            try:
                run_fronts(ranking)
                found[what] = None
            except ValueError as error:
                found[what] = None if str(file) in str(error) else str(error)
    assert_none(found)
    assert len(found) > 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "front.json", "base/front.json"])
def test_every_key_of_a_run_may_be_anything_for_the_command(ranking, name, tmp_path):
    file, command = ranking / name, ["report", str(ranking), "--table", str(tmp_path / "table.txt")]
    found = {}
    for what, content in every_key(file.read_text(), [*OTHERS[::3], *CONSTANTS[:2]]).items():
        with replaced(file, content):
            found[what] = complaint(command, file)
    assert_none(found)
    assert len(found) > 150


@pytest.mark.parametrize("name", ["config.json", "front.json"])
def test_a_file_that_is_something_else_is_named(ranking, name, tmp_path):
    file, command = ranking / name, ["report", str(ranking), "--table", str(tmp_path / "table.txt")]
    found = {}
    for what, content in whole(file.read_bytes()).items():
        with replaced(file, content):
            found[what] = complaint(command, file)
            assert found[what] is not None or run(command)[0] == 2, what
    with replaced(file, None):
        file.mkdir()
        found["folder"] = complaint(command, file)
    with replaced(file, b""):
        fifo(file)
        found["pipe"] = complaint(command, file)
    with replaced(file, b"\xef\xbb\xbf" + file.read_bytes()):
        assert run(command) == (0, "")  # an editor's byte order mark does no harm
    assert_none(found)


def test_what_is_wrong_is_said_with_key_value_type_and_remedy(ranking):
    file = ranking / "config.json"
    for path, new, said in (
        (("config", "points"), "x", 'config.points is "x" but must be int | null; the run is damaged'),
        (("config", "scales", 0), None, "config.scales[0] is null but must be float; the run is damaged"),
        (("config", "points"), 10**9, "points is 1000000000 but must be at most 10000; the run is damaged"),
        (("config", "unheard_of"), 1, "the run has unknown settings unheard_of; was it made by another version?"),
        (("data", "objectives", 1), [], "data.objectives[1] is a list of 0 but must be object; the run is damaged"),
        (("versions", "torch"), 3, "versions.* is something else but must be str"),
        (("kind",), ["align"], "kind is a list of 1 but must be str | null"),
    ):
        with replaced(file, changed(file.read_text(), path, new)), pytest.raises(DamagedFile) as raised:
            run_fronts(ranking)
        assert str(raised.value).startswith(f"{file}: {said}"), raised.value


@pytest.mark.parametrize("value", ["x", [0.0]])
def test_what_is_wrong_in_an_older_run_has_the_name_that_the_file_has_for_it(ranking, value):
    file = ranking / "config.json"
    record = json.loads(file.read_text())
    record["config"]["temperature"] = value
    del record["config"]["beta"]
    said = r"beta is .* \(beta is called temperature there\)"
    with replaced(file, json.dumps(record)), pytest.raises(DamagedFile, match=said):
        run_fronts(ranking)


def test_a_run_of_an_older_version_opens_with_the_defaults_of_newer_settings(ranking):
    file = ranking / "config.json"
    for name in json.loads(file.read_text())["config"]:
        with replaced(file, changed(file.read_text(), ("config", name), remove=True)):
            assert len(run_fronts(ranking)) == 2, name


@pytest.mark.parametrize("name", ["points", "layers", "hidden", "steps", "bootstrap", "batch_size", "seed"])
def test_a_number_that_would_hang_is_refused_on_the_command_line(name, tmp_path):
    status, said = run(["rank", f"--{name.replace('_', '-')}", str(10**20), "--run", str(tmp_path / "run")], 10)
    assert status == 2 and f"{name} " in said.replace("-", "_") and "must be at most" in said
    assert not (tmp_path / "run").exists()


def test_generated_data_that_would_fill_the_memory_is_refused(tmp_path):
    status, said = run(["rank", "--data", "synthetic:queries=1000000000", "--run", str(tmp_path / "run")], 10)
    assert status == 2 and "but must be at most" in said


def test_bounds_leave_alone_what_means_no_limit():
    check_bounds({"log_every": 10**15, "gradient_clip": float("inf"), "kl_limit": float("inf"), "steps": None})
    with pytest.raises(ValueError, match="weight_decay is nan but must be a finite number"):
        RankConfig(weight_decay=float("nan"))


def test_a_file_is_measured_before_it_is_read(tmp_path, monkeypatch):
    file = tmp_path / "large.json"
    with file.open("wb") as stream:
        stream.truncate(_records.MOST_BYTES + 1)  # sparse: nothing is on the disk
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    with pytest.raises(DamagedFile, match=r"large.json: it has 256 MB but must have at most 256"):
        _records.read_json(file)
