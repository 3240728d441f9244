"""The command for GPUs, `python -m bench.device`, tried without one: a mistake in it would cost time on a machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.device import STAGES, Stage

FILES = ("tests/test_gpu_list_kernels.py", "tests/test_gpu_logprob.py")


def command(*arguments: str, limit: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.device", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    done = command("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no GPU here" in done.stderr and "--toy" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_stage_that_does_not_exist_is_named() -> None:
    done = command("limits", "logprob-sideways")
    assert done.returncode == 2 and "no stage logprob-sideways" in done.stderr


def selects(stage: Stage, file: str, test: str) -> bool:
    """Say whether pytest would choose a test, as -k does with "and" and "or" alone."""
    if file not in stage.command:
        return False
    ways = stage.command[-1].split(" or ") if "-k" in stage.command else [""]
    return any(all(part in test for part in way.split(" and ")) for way in ways)


@pytest.mark.parametrize("file", FILES)
def test_every_gpu_test_is_in_exactly_one_stage(file: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", "--collect-only", "-q", file],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    tests = re.findall(r"::(test_.*)", found.stdout)
    assert len(tests) > 20, found.stdout + found.stderr
    for test in tests:
        stages = [stage.name for stage in STAGES if selects(stage, file, test)]
        assert len(stages) == 1, f"{test} is in stages {stages}"


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """All measuring stages but those that run the same code as another, and one of tests, at toy sizes."""
    out = tmp_path_factory.mktemp("toy")
    twins = ("lists-long", "lists-short", "logprob-forward")
    stages = [s.name for s in STAGES if not s.name.startswith("tests") and s.name not in twins]
    return command("--toy", "--out", str(out), "tests-fused-float16", *stages), out / "toy"


@pytest.mark.slow
def test_every_measuring_stage_runs_at_toy_sizes_and_is_not_run_again(
    dry_run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    """One test, because workers of pytest share no fixture and the dry run takes a minute."""
    every_stage_ran(*dry_run)
    for mode in ("gathered", "frozen", "trained", "error"):
        holds_who_was_measured_how_and_on_what(mode, dry_run[1])
    finished_stages_are_skipped_and_cut_off_ones_are_not(dry_run[1])


def every_stage_ran(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    states = json.loads((folder / "stages.json").read_text())
    assert {state["verdict"] for state in states.values()} == {"done"}
    assert not list(folder.glob("*.part"))
    for name in states:
        assert str(ROOT) not in (folder / f"{name}.json").read_text().replace(str(folder), "")


def holds_who_was_measured_how_and_on_what(mode: str, folder: Path) -> None:
    found = json.loads((folder / f"logprob-{mode}.json").read_text())
    assert found["command"].startswith(f"python -m bench.logprob {mode} ")
    assert found["device"] and found["date"] and found["versions"]["torch"] == torch.__version__
    assert isinstance(found["absent"], dict)
    rows = {row["variant"]: row for row in found["results"] if "failed" not in row}
    assert "mopl" in rows and len(rows) > 2, found["results"]
    if mode == "error":
        assert all(rows["mopl"][key] >= 0 for key in ("log p max", "dh frozen", "dh trained", "dW"))
    else:
        assert rows["mopl"]["ms"] > 0 and rows["mopl"]["share"] > 0 and rows["mopl"]["log p"] < 1e-4


def finished_stages_are_skipped_and_cut_off_ones_are_not(folder: Path) -> None:
    before = (folder / "limits.json").read_text()
    assert "done before" in command("--toy", "--out", str(folder.parent), "limits").stdout
    assert (folder / "limits.json").read_text() == before
    cut = command("--toy", "--out", str(folder.parent), "limits", "--again", "--limit", "0.2")
    assert cut.returncode == 1 and "cut off" in cut.stdout and "not done: limits" in cut.stdout
    assert "done before" not in command("--toy", "--out", str(folder.parent), "limits", "--minutes", "0.001").stdout
