"""Fused scores inside DDP and FSDP2, on two processes."""

import pytest
from deepspeed_site import launch_environment
from launching import DISTRIBUTED, launch

pytest.importorskip("transformers")


@pytest.mark.distributed
@pytest.mark.slow
def test_gradients_under_ddp_and_fsdp2_equal_those_of_one_process() -> None:
    done = launch(2, str(DISTRIBUTED / "fuse_gradients.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all gradients equal" in done.stdout


@pytest.mark.distributed
@pytest.mark.slow
def test_gradients_under_zero3_equal_those_of_one_process() -> None:
    done = launch(2, str(DISTRIBUTED / "zero3_gradients.py"), **launch_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all gradients equal" in done.stdout
