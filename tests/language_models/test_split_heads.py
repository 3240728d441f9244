"""Fused models whose output head tensor parallelism has split, on gloo processes."""

import pytest
from launching import DISTRIBUTED, launch

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_a_split_head_gives_the_scores_and_the_gradients_of_a_whole_one(tmp_path, processes):
    done = launch(processes, str(DISTRIBUTED / "split_heads.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "all split heads equal" in done.stdout
