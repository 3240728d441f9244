"""CLP under FSDP2: two processes with a sharded policy train what one process trains."""

import sys

import pytest
import torch
from launching import DISTRIBUTED, launch

from mopl.training import make_accelerator

sys.path.append(str(DISTRIBUTED))


@pytest.mark.distributed
@pytest.mark.slow
def test_sharded_policies_train_what_one_process_trains_and_are_resumed_by_it(tmp_path):
    from sharded_rollouts import SCOPES, fit

    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    done = launch(2, str(DISTRIBUTED / "sharded_rollouts.py"), str(tmp_path), **sharded)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    for scope in SCOPES:
        found = torch.load(tmp_path / f"{scope}-2.pt")
        one = fit(scope, make_accelerator(cpu=True), tmp_path / "one" / scope)
        torch.testing.assert_close(found, one, rtol=0, atol=1e-6)
