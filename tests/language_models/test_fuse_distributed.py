"""Fused scores inside DDP and FSDP2, on two processes."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")


@pytest.mark.distributed
@pytest.mark.slow
def test_gradients_under_ddp_and_fsdp2_equal_those_of_one_process() -> None:
    script = Path(__file__).parents[1] / "distributed" / "fuse_gradients.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all gradients equal" in done.stdout


@pytest.mark.distributed
@pytest.mark.slow
def test_gradients_under_zero3_equal_those_of_one_process() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    script = Path(__file__).parents[1] / "distributed" / "zero3_gradients.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all gradients equal" in done.stdout
