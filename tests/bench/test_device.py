"""The command for GPUs, `python -m bench.device`, tried without one: a mistake in it would cost time on a machine."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import python

ROOT = Path(__file__).resolve().parents[2]

from bench import device, lists, logprob, measuring
from bench.device_stages import COMMAND_MINUTES, MUST, PEERS, STAGES, Stage, commands, plan
from bench.goals import LIST_PEERS
from bench.summary import summary

GPU_TESTS = ("compiled", "gathered", "graphs", "linear_kl", "list_kernels", "logprob", "repeats", "wrapped")
FILES = tuple(f"tests/gpu/test_{name}.py" for name in GPU_TESTS)


def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = python("-m", "bench.device", "--out", str(tmp_path), CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no GPU here" in done.stderr and "--toy" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_stage_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = python("-m", "bench.device", "limits", "logprob-sideways")
    assert done.returncode == 2 and "no stage logprob-sideways" in done.stderr


# ---------------------------------------------------------------- the stages and the plan

COLLECT = """
import pytest, sys
class Names:
    def pytest_collection_modifyitems(self, items):
        for item in items:
            print("TEST", item.nodeid, item.get_closest_marker("huge") is not None)
pytest.main(["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-m", "gpu", "--collect-only", "-qqq",
             *sys.argv[1:]], plugins=[Names()])
"""


def test_every_gpu_test_is_in_exactly_one_stage() -> None:
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests/gpu").glob("test_*.py")} == set(FILES)
    found = subprocess.run(
        [sys.executable, "-c", COLLECT, *FILES], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    tests = re.findall(r"^TEST (\S+?)::.* (True|False)$", found.stdout, re.MULTILINE)
    assert len(tests) > 150, found.stdout + found.stderr
    kinds = {"gpu and huge": "True", "gpu and not huge": "False"}
    stages = [stage.command for stage in STAGES if stage.name.startswith("tests")]
    for file, huge in set(tests):
        chosen = [c for c in stages if file in c and kinds[c[len(c) - 1 - c[::-1].index("-m") + 1]] == huge]
        assert len(chosen) == 1, (file, huge)
        assert ("-n" in chosen[0]) == (huge == "False"), "huge tests run alone"


def test_goals_come_first_and_every_stage_can_be_started() -> None:
    names = [stage.name for stage in STAGES]
    assert names[:3] == ["limits", "logprob-head", "logprob-gathered"]
    assert [name.partition("-")[0] for name in names[3:6]] == ["tests", "tests", "lists"]
    assert names[-1] == "logprob-heavy"
    for stage in STAGES:
        module = stage.command[1]
        assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_plan_fits_a_lease_and_its_commands_can_be_pasted() -> None:
    text = plan(STAGES, None, " --out results")
    lines = re.findall(r"python3 -m bench\.device --out results --minutes ([\d.]+) (.*)", text)
    assert {float(minutes) for minutes, _ in lines} == {COMMAND_MINUTES} and COMMAND_MINUTES < 10
    assert sorted(" ".join(names for _, names in lines).split()) == sorted(stage.name for stage in STAGES)
    assert all(sum(stage.seconds for stage in part) <= 60 * COMMAND_MINUTES for part in commands(STAGES, None))
    assert sum(stage.seconds for stage in STAGES if stage.name != "logprob-heavy") <= 28 * 60
    assert sum(stage.seconds for stage in STAGES if stage.name.startswith("tests")) <= 360
    assert all(f"{name}=={version}" in text for name, version in (MUST | PEERS).items())


def test_the_plan_takes_measured_times_where_there_are_some(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(json.dumps({"limits": {"verdict": "done", "seconds": 7.4}}))
    text = plan(STAGES, tmp_path, "")
    assert re.search(r"limits +7 s measured", text) and re.search(r"logprob-head +\d+ s predicted", text)


# ---------------------------------------------------------------- running them


def arguments(**others: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"toy": False, "again": False, "minutes": None, "limit": None, "archive": None} | others
    )


def test_a_stage_that_fails_is_not_done_and_does_not_stop_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [Stage("bad", "", 1, ("-c", "raise SystemExit(3)")), Stage("good", "", 1, ("-c", "print('fine')"))]
    assert device.run_all(stages, tmp_path, arguments(archive=tmp_path.parent / "all.zip")) == 1
    verdicts = {name: state["verdict"] for name, state in device.states(tmp_path).items()}
    assert verdicts == {"bad": "failed with exit status 3", "good": "done"}
    assert "failed with exit status 3" in (tmp_path / "summary.md").read_text()
    assert (tmp_path.parent / "all.zip").exists()
    assert device.run_all(stages[1:], tmp_path, arguments()) == 0 and "good: done before" in capsys.readouterr().out
    cut = [Stage("good", "", 1, ("-c", "import time; time.sleep(30)"))]
    assert device.run_all(cut, tmp_path, arguments(again=True, limit=0.5)) == 1
    assert device.states(tmp_path)["good"]["verdict"].startswith("cut off")
    assert device.run_all([Stage("long", "", 70, ("-c", ""))], tmp_path, arguments(minutes=1)) == 1
    assert "long" not in device.states(tmp_path), "it would have passed the time"


def test_what_a_stage_started_ends_with_it(tmp_path: Path) -> None:
    child = "import time, pathlib; time.sleep(2); pathlib.Path('mark').write_text('still here')"
    script = f"import os, subprocess, sys, time; os.chdir({str(tmp_path)!r})\n"
    script += f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert device.start(["-c", script], dict(os.environ), tmp_path / "log", 1.0) == "cut off after 1 s"
    time.sleep(2.5)
    assert not (tmp_path / "mark").exists()


PEER = """
import json, os, sys, time
for size in sys.argv[1:]:
    if size == "raises":
        print("@row " + json.dumps({"size": size, "failed": "boo"}), flush=True)
        raise SystemExit(1)
    if size == "dies":
        os.kill(os.getpid(), 11)
    if size == "hangs":
        time.sleep(60)
    print("@row " + json.dumps({"size": size, "ms": 1.5}), flush=True)
"""


def test_a_peer_that_raises_dies_or_hangs_ends_no_other_row(tmp_path: Path) -> None:
    sizes = ["raises", "a", "dies", "b", "hangs", "c"]
    report = measuring.Report(tmp_path / "out.json", {"ms": ".1f"})
    measuring.apart(report, "peer", sizes, ["-c", PEER], 1.0)
    assert {size for size in sizes if "ms" in (report.find(size, "peer") or {})} == {"a", "b", "c"}
    reasons = [row["failed"] for row in report.rows if "failed" in row]
    assert reasons[0] == "boo" and "signal 11" in reasons[1] and "signal 9" in reasons[2]
    assert report.failures() == 0
    measuring.apart(report, "mopl", ["raises", "a"], ["-c", PEER], 1.0)
    assert report.failures() == 1


def test_a_bench_goes_on_where_it_was_but_tries_our_failures_again(tmp_path: Path) -> None:
    report = measuring.Report(tmp_path / "out.json", {"ms": ".1f"})
    report.add("a", "mopl", ms=1.0)
    report.add("b", "mopl", failed="boo")
    report.add("b", "peer", failed="boo")
    again = measuring.Report(tmp_path / "out.json", {"ms": ".1f"})
    assert [(row["size"], row["variant"]) for row in again.rows] == [("a", "mopl"), ("b", "peer")]
    other = json.loads((tmp_path / "out.json").read_text()) | {"device": "another"}
    (tmp_path / "out.json").write_text(json.dumps(other))
    assert measuring.Report(tmp_path / "out.json", {}).rows == []


def test_rows_are_compared_with_the_limit_and_with_mopl() -> None:
    report, size = measuring.Report(None, {}), "trained 1000x1000x1000"
    rates = {"bytes per second": 1e12, "FLOP per second": 1e12}
    report.rows = [
        {"size": size, "variant": "its products alone", "ms": 6.0, **rates},
        {"size": size, "variant": "mopl", "ms": 8.0},
        {"size": size, "variant": "full logits", "ms": 12.0},
        {"size": size, "variant": "CCE exact", "failed": "boo"},
    ]
    logprob.complete(report)
    assert report.rows[1]["share"] == pytest.approx(0.75) and report.rows[2]["x mopl"] == pytest.approx(1.5)
    assert [row.get("own") for row in report.rows] == [1, 0.75, 0.5, None]
    assert logprob.variants("frozen", False)[:2] == ["its products alone", "mopl"]
    assert logprob.variants("gathered-forward", False)[-1] == "mopl, again"
    assert lists.variants("listnet", 3)[-1] == "torch.compile of log_softmax"


def test_rows_of_lists_get_their_bytes_and_goals(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that sorts is beside mopl where it sorts, with fewer bytes to move: no order is read."""
    monkeypatch.setattr(lists, "ON_GPU", True)
    report = measuring.Report(None, lists.COLUMNS)
    times = {
        "cumsum (unsafe)": 2.0, "logcumsumexp": 9.0, "allRank listMLE": 6.0, "its bytes alone": 2.8, "mopl": 4.0,
        "mopl, sorting": 8.0, "mopl, again": 4.0,
    }  # fmt: skip
    for size in ("plackett-luce m=1 K=32", "plackett-luce m=3 K=32", "plackett-luce m=1 K=2"):
        report.rows += [{"size": size, "variant": name, "ms": ms} for name, ms in times.items()]
    lists.complete(report)
    for row in report.rows[:7]:
        sorts = row["variant"] in ("mopl, sorting", "allRank listMLE")
        beside = 8.0 if row["variant"] == "allRank listMLE" else 4.0
        assert row["x mopl"] == pytest.approx(row["ms"] / beside)
        moved = (20 * 32 + 8) / (28 * 32 + 8) if sorts else 1
        assert row["of bytes"] == pytest.approx(2.8 / row["ms"] * moved)
    found = [(target["size"], target["target"], target["measured"], target["met"]) for target in report.targets]
    peers = [("time of logcumsumexp over mopl's", 2.25, True), ("time of allRank listMLE over mopl's", 0.75, False)]
    share = ("plackett-luce m=1 K=32", "share of its bytes", pytest.approx(0.7), False)
    assert found[:3] == [("plackett-luce m=1 K=32", *peer) for peer in peers] + [share]
    assert found[3:] == [("plackett-luce m=1 K=2", *peer) for peer in peers], "short lists have no goal of bytes"


def test_the_bytes_that_list_losses_move() -> None:
    assert [lists.bytes_moved("listnet", m, 1) - 8 * m for m in (1, 3)] == [20, 36]
    assert [lists.bytes_moved("plackett-luce", m, 1) - 8 * m for m in (1, 3)] == [28, 68]
    assert [lists.bytes_moved("plackett-luce", m, 10, sorting=True) for m in (1, 3)] == [208, 464]


def test_what_the_stages_of_lists_measure_exists_and_is_compiled_before() -> None:
    for stage in (stage for stage in STAGES if stage.name.startswith("lists")):
        names = stage.command[stage.command.index("--variants") + 1 : stage.command.index("--json")]
        assert {"mopl"} < set(names) <= {name for loss in lists.LOSSES for name in lists.variants(loss, 1)}
    for loss, peers in LIST_PEERS.items():
        assert set(peers) <= set(lists.variants(loss, 1))
    lists.compile_kernels(["listnet m=3 K=4", "plackett-luce m=1 K=4"], ["mopl", "mopl, sorting"])


def test_the_summary_holds_goals_tests_and_what_was_not_measured(tmp_path: Path) -> None:
    size = "frozen 16384x4096x128256"
    rows = [
        {"size": size, "variant": "its products alone", "ms": 43.7, "share": 0.99},
        {"size": size, "variant": "mopl", "ms": 46.0, "share": 0.94, "extra GB": 1.0},
        {"size": size, "variant": "TRL chunked", "absent": "No module named 'trl'"},
        {"size": size, "variant": "CCE exact", "failed": "RuntimeError: boo"},
        {"size": size, "variant": "mopl, again", "ms": 47.0, "share": 0.93, "extra GB": 1.0},
    ]
    whole = {"device": "NVIDIA H200", "date": "2026-11-27", "commit": "abc", "versions": {"torch": "2.11.0"}}
    whole |= {"command": "python -m bench", "targets": []}
    (tmp_path / "logprob-frozen.json").write_text(json.dumps(whole | {"results": rows}))
    ratio = [{"size": "listnet m=1 K=8", "variant": "log_softmax", "ms": 1.0, "x mopl": 0.5}]
    (tmp_path / "lists.json").write_text(json.dumps(whole | {"results": ratio}))
    failed = ["FAILED tests/gpu/test_logprob.py::test_linear_errors"]
    state = {"verdict": "failed with exit status 1", "seconds": 90.0, "command": "python -m pytest"}
    stages = {"tests-logprob": state | {"outcome": "1 failed, 99 passed in 80 s", "failed": failed}}
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    text = summary(tmp_path)
    assert "(logprob-frozen) | ≥ 0.92 of its products alone; 47.5 ms on an H200 | 0.950 (0.940 of the limit); " in text
    assert "46.00 ms, again 47.00 | met |" in text
    assert (
        "| ListNet: time of log_softmax over mopl's | ≥ 1.00 at every K | 0.50 at K=8, 0.50 at best | **missed** |"
        in text
    )
    assert "1 failed, 99 passed" in text and failed[0] in text
    assert "No module named 'trl'" in text and "RuntimeError: boo" in text


@pytest.mark.slow
def test_every_kind_of_stage_runs_at_toy_sizes(tmp_path: Path) -> None:
    """One of the stages that run the same code, because each process takes seconds to start."""
    stages = ("limits", "logprob-head", "logprob-tune", "lists")
    line = [sys.executable, "-m", "bench.device", "--toy", "--out", str(tmp_path), "tests-huge", *stages]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    folder = tmp_path / "toy"
    assert done.returncode == 0, done.stdout + done.stderr
    states = json.loads((folder / "stages.json").read_text())
    assert set(states) == {"tests-huge", *stages} and {state["verdict"] for state in states.values()} == {"done"}
    assert not list(folder.glob("*.part")) and "not measured" not in (folder / "summary.md").read_text()
    found = json.loads((folder / "logprob-head.json").read_text())
    assert found["command"].startswith("python -m bench.logprob forward ") and str(ROOT) not in found["command"]
    assert found["device"] and found["date"] and found["versions"]["torch"] == torch.__version__
    rows = {row["variant"]: row for row in found["results"] if "failed" not in row}
    assert set(rows) == {"mopl", "full logits"} and rows["mopl"]["ms"] > 0 and rows["mopl"]["log p"] < 1e-4
    tuned = json.loads((folder / "logprob-tune.json").read_text())["results"]
    assert {row["size"].split(" ")[-1] for row in tuned if row["fastest"]} == {"forward", "frozen", "trained"}
