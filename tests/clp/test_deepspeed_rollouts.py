"""Models that answer in their training under DeepSpeed: two processes train, save and resume what one process does."""

import sys

import pytest
import torch
from deepspeed_site import launch_environment, settings_of
from launching import DISTRIBUTED

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("moocore")

sys.path.append(str(DISTRIBUTED))

from mopl.training.zero import ZeroModel
from tests.clp.test_sharded_rollouts import train_what_one_process_trains

ASKED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.distributed
@pytest.mark.slow
def test_cut_policies_and_a_student_train_what_one_process_trains_and_each_resumes_the_other(tmp_path):
    environment = {**launch_environment(), **ASKED}  # first, where it skips
    from sharded_rollouts import STAGES

    for stage in STAGES.values():
        settings_of(tmp_path, stage)
    train_what_one_process_trains(
        tmp_path, STAGES, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(settings_of(tmp_path, 3)), **environment
    )


def test_a_mixture_of_whole_parameters_is_refused_under_zero_3(monkeypatch):
    from clp_problems import language_model, settings

    from mopl.clp.policies import new_policy
    from mopl.training import zero

    policy = new_policy(language_model(), settings(scope="full"), ("first", "second"), "clp")
    monkeypatch.setattr(zero, "check_device", lambda _: None)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(NotImplementedError, match=r"ParameterMixture reads .*`--zero_stage 2`.* or take a LoraMixture"):
        ZeroModel(None, policy, optimizer, {"zero_optimization": {"stage": 3}})
