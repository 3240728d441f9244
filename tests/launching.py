"""Several processes on the CPU, as a person would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DISTRIBUTED = Path(__file__).parent / "distributed"


def launch(processes, *script, **environment):
    """Run a script with its arguments under accelerate's launcher on the CPU, with the tests' own interpreter."""
    # `--multi_gpu` is how the launcher is told to start processes by torchrun; `--cpu` would start a single one.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    command = [*launcher, str(DISTRIBUTED / "ending.py"), *script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # and not kill: the launcher then ends the processes that hang
        process.communicate(timeout=60)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def launch_mopl(*command, **environment):
    """Run a command of mopl on two processes, one of which comes late to every question about a file."""
    return launch(2, str(DISTRIBUTED / "late_process.py"), "1", *command, **environment)
