"""One of several processes dies in the middle of a step: the job ends, and its run goes on as if nothing had been."""

import os
import subprocess
import sys

import pytest
from launching import DISTRIBUTED, launch

pytest.importorskip("accelerate")
pytest.importorskip("moocore")

from kill_runs import RANK, differences

SCRIPT = str(DISTRIBUTED / "killed_worker.py")


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_ends_a_job_whose_worker_was_killed_and_resume_makes_the_run_of_an_undisturbed_one(
    tmp_path, monkeypatch
):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    done = launch(2, SCRIPT, *RANK.split())
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]

    monkeypatch.chdir(tmp_path / "killed")
    # The main process dies, which holds the run's lock. `--` keeps torchrun from reading `--run` as its own.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "KILLED": "0"}
    job = subprocess.Popen([*launcher, SCRIPT, *RANK.split()], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _, said = job.communicate(timeout=60)
    finally:
        job.terminate()  # and not kill: the launcher then ends its workers
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in said.partition("Root Cause")[2]
    assert [path.name for path in (tmp_path / "killed" / "run").rglob("step-*")] == ["step-000001", "step-000002"]

    done = launch(2, SCRIPT, "rank", "--resume", "--run", "run")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
