"""Run directories: one process at a time, only runs of mopl are replaced, and nothing is left lying about."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import launch

from mopl import __version__
from mopl.alignment import config as alignment
from mopl.clp import config as clp
from mopl.experiments import run_directory
from mopl.experiments.methods import METHODS
from mopl.experiments.run_directory import check_new_run, create_run, hold_run, next_run, refresh
from mopl.experiments.run_lock import RunInUse, lock_file, locked

RECORD = {"config": {}, "data": {}, "versions": {"mopl": __version__}}
ALONE = SimpleNamespace(is_main_process=True, num_processes=1)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def holder(path):
    """Start a process that holds a run until it is killed."""
    script = "import sys, time\nfrom mopl.experiments.run_lock import locked\nwith locked(sys.argv[1]):\n"
    script += "    print('held', flush=True)\n    time.sleep(1000)\n"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_at_once_and_a_dead_one_is_in_nobodys_way(tmp_path):
    process = holder(tmp_path / "run")
    refused = rf"run is in use by process {process.pid}, .*wait until that has ended or stop it, or name another"
    create_run(tmp_path / "run", RECORD)
    (tmp_path / "link").symlink_to("run")
    try:
        for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            with pytest.raises(RunInUse, match=refused), hold_run(tmp_path / "run", "", ALONE, **options):
                raise AssertionError
        with pytest.raises(RunInUse, match=r"link is in use by .* or stop it$"), locked(tmp_path / "link"):
            raise AssertionError
        with locked(tmp_path / "other"):
            pass
        said = []
        refresh(tmp_path / "run", lambda path: said.append("written"), said.append)
        assert len(said) == 1 and said[0].startswith("note: the table, picture and page in ") and "in use" in said[0]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert lock_file(tmp_path / "run").exists()
    with hold_run(tmp_path / "link", "", ALONE, resume=True, overwrite=False) as (path, record):
        assert path == tmp_path / "link" and record == RECORD
        with pytest.raises(RunInUse, match=f"process {os.getpid()}"), locked(tmp_path / "run"):
            raise AssertionError
    assert names(tmp_path) == ["link", "run"]


def test_many_at_once_hold_a_run_one_after_another(tmp_path):
    """The lock's file goes away with each of them, and a lock on a file that is gone would not count."""
    errors, done = [], []

    def work():
        try:
            while len(done) < 100:
                with suppress(RunInUse), locked(tmp_path / "run"):
                    (tmp_path / "inside").touch(exist_ok=False)
                    (tmp_path / "inside").unlink()
                    done.append(1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and names(tmp_path) == []


def test_a_run_that_never_began_leaves_no_folder(tmp_path):
    with (
        pytest.raises(ValueError, match="unsound"),
        hold_run(tmp_path / "a" / "b" / "run", "", ALONE, resume=False, overwrite=False),
    ):
        raise ValueError("unsound")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_hold_a_lock_is_named():
    with pytest.raises(OSError, match=r"^/proc/self/run cannot be locked against other processes: /proc/\S+ cannot be"):
        with locked("/proc/self/run"):
            raise AssertionError


def test_a_number_that_another_process_is_about_to_use_is_not_taken(tmp_path):
    (tmp_path / "rank-1").mkdir()
    (tmp_path / "rank-x").mkdir()
    with locked(tmp_path / "rank-2"):
        assert next_run(tmp_path, "rank") == tmp_path / "rank-3"
    assert next_run(tmp_path, "rank") == tmp_path / "rank-2"


def test_names_that_are_no_directories_are_refused(tmp_path):
    for resume in (False, True):
        with pytest.raises(ValueError, match="--run is empty; name a directory"):
            with hold_run("", "", ALONE, resume=resume, overwrite=False):
                raise AssertionError
    with pytest.raises(FileExistsError, match="/ exists and is no run of mopl, so it is left alone"):
        check_new_run("/", overwrite=True)
    with pytest.raises(FileNotFoundError, match="there is no run at /"):
        with hold_run("/", "", ALONE, resume=True, overwrite=False):
            raise AssertionError


@pytest.mark.parametrize(
    "content",
    [
        '{"model_type": "llama"}',
        '{"config": {}, "data": {}}',
        '{"config": {}, "data": {}, "versions": {"transformers": "5.0"}}',
        "{",
        "[]",
    ],
)
def test_only_a_run_that_mopl_made_is_replaced(tmp_path, content):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    (tmp_path / "model" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="model exists and is no run of mopl, so it is left alone"):
            create_run(tmp_path / "model", RECORD, overwrite=overwrite)
    assert names(tmp_path / "model") == ["config.json", "notes.txt"]


def test_what_a_person_put_into_a_run_is_not_deleted(tmp_path):
    run = create_run(tmp_path / "run", RECORD)
    for own in ("front.json", ".writing-0123456789abcdef-x", ".DS_Store"):
        (run / own).touch()
    with pytest.raises(FileExistsError, match="holds a run already: continue it with --resume, replace it with --over"):
        check_new_run(run)
    check_new_run(run, overwrite=True)
    for strange in ("a.txt", "b", "c", "d"):
        (run / strange).touch()
    with pytest.raises(FileExistsError, match=r"no run of mopl has \(a.txt, b, c, \.\.\.\), which --overwrite would"):
        create_run(run, RECORD, overwrite=True)
    assert (run / "front.json").exists()


def test_the_names_in_a_run_include_every_method():
    for method in (*METHODS, *alignment.METHODS, *clp.METHODS):
        assert method in run_directory._OWN


def test_the_run_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    run = create_run(tmp_path / "real", RECORD)
    (run / "front.json").touch()
    (tmp_path / "link").symlink_to("real")
    create_run(tmp_path / "link", RECORD, overwrite=True)
    assert (tmp_path / "link").is_symlink() and names(run) == ["config.json"] and names(tmp_path) == ["link", "real"]


def test_an_old_run_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    run = create_run(tmp_path / "run", RECORD)
    (run / "front.json").touch()

    def fail(path, content):
        raise OSError("disk full")

    monkeypatch.setattr(run_directory, "write_file", fail)
    with pytest.raises(OSError, match="disk full"):
        create_run(run, RECORD, overwrite=True)
    assert names(run) == ["config.json", "front.json"] and names(tmp_path) == ["run"]


def test_opening_a_run_takes_away_what_kills_have_left(tmp_path):
    token = "0123456789abcdef"
    run = create_run(tmp_path / "run", RECORD)
    for left in (f"base/.writing-deleted-{token}-checkpoints", "base/checkpoints/step-000001", "base/rollouts",
                 "models/w-1-0/checkpoints/step-000001", "reference/train.parts", "reference/test.parts",
                 f"../.writing-{token}-run", f"../.writing-{token}-other"):  # fmt: skip
        (run / left).mkdir(parents=True)
    (run / "base" / "training.json").touch()
    (run / "reference" / "train.safetensors").touch()
    with hold_run(run, "", ALONE, resume=True, overwrite=False):
        assert names(run / "base") == ["training.json"] and names(run / "models" / "w-1-0") == ["checkpoints"]
        assert names(run / "reference") == ["test.parts", "train.safetensors"]
    assert names(tmp_path) == [f".writing-{token}-other", "run"]


@pytest.mark.parametrize("error", [PermissionError("it is read-only"), OSError(30, "Read-only file system")])
def test_the_reports_of_a_run_that_cannot_be_written_stay_and_are_printed(tmp_path, error):
    def write(path):
        raise error

    said = []
    refresh(create_run(tmp_path / "run", RECORD), write, said.append)
    assert len(said) == 1 and "stay as they are" in said[0] and str(error) in said[0]
    with pytest.raises(FileNotFoundError):
        refresh(tmp_path / "run", lambda path: (path / "nothing").read_text(), said.append)


PROCESSES = """
    import sys
    from pathlib import Path
    from mopl.training import make_accelerator
    from mopl.experiments.run_directory import create_run, hold_run
    from mopl.training.parallel import on_main

    accelerator = make_accelerator(cpu=True)
    assert accelerator.num_processes == 2
    place, me = Path(sys.argv[1]), accelerator.process_index

    def attempt(name, body=lambda path: None, resume=False):
        try:
            with hold_run(place / name, "", accelerator, resume=resume, overwrite=False) as (path, _):
                body(path)
                text = "held"
        except (OSError, ValueError) as error:
            text = str(error)
        (place / f"{name}-{me}.txt").write_text(text)

    attempt("new", lambda path: on_main(accelerator, lambda: create_run(path, {"config": {}, "data": {}})))
    attempt("living", resume=True)
    attempt("nowhere", resume=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
"""


@pytest.mark.distributed
def test_every_process_of_a_launcher_learns_of_a_refusal(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(PROCESSES))
    create_run(tmp_path / "living", RECORD)
    process = holder(tmp_path / "living")
    try:
        done = launch(2, str(tmp_path / "script.py"), str(tmp_path))
    finally:
        process.kill()
        process.wait()
    assert done.returncode == 0, done.stderr[-3000:]
    for me in "01":
        assert (tmp_path / f"new-{me}.txt").read_text() == "held"
        assert f"living is in use by process {process.pid}," in (tmp_path / f"living-{me}.txt").read_text()
        assert "there is no run at" in (tmp_path / f"nowhere-{me}.txt").read_text()
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"config": {}, "data": {}}
    assert not Path(lock_file(tmp_path / "new")).exists()


def test_a_run_may_begin_in_the_current_folder_but_not_delete_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".writing-0123456789abcdef-config.json").mkdir()  # of a process that was killed here
    create_run(".", {"config": {}, "data": {}, "versions": {"mopl": "0"}})
    assert Path("config.json").is_file()  # found from here: it is the same folder
    with pytest.raises(FileExistsError, match="is the current folder"):
        check_new_run(".", overwrite=True)
    assert Path("config.json").is_file()
