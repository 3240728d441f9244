"""A head whose vocabulary is sharded over two processes."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.distributed
def test_sharded_vocabulary_equals_the_whole_in_every_output_and_gradient() -> None:
    script = Path(__file__).parents[1] / "distributed" / "vocab_parallel.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all cases equal" in done.stdout
