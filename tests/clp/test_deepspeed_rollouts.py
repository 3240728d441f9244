"""Models that answer in their training under DeepSpeed: two processes train, save and resume what one process does."""

import json
import sys

import pytest
import torch
from deepspeed_site import launch_environment
from launching import DISTRIBUTED, launch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("moocore")

from mopl.alignment import align, open_run
from mopl.training import make_accelerator
from mopl.training.zero import ZeroModel
from tests.alignment.test_command import write_data
from tests.alignment.test_training import write_model

sys.path.append(str(DISTRIBUTED))

SCRIPT = str(DISTRIBUTED / "sharded_rollouts.py")


def on_two(place, stage, *arguments):
    file = place / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    done = launch(2, SCRIPT, str(place), *arguments, **launch_environment(), **asked)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return done.stdout


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "scope"), [(2, "attention"), (3, "lora-mixture, fixed scale")])
def test_cut_policies_train_what_one_process_trains_and_each_resumes_the_other(tmp_path, stage, scope):
    from sharded_rollouts import fit

    accelerator = make_accelerator(cpu=True)
    one = fit(scope, accelerator, tmp_path / "one")
    fit(scope, accelerator, tmp_path / scope / "of-one", stop=1)
    assert "one process was stopped by its guard" in on_two(tmp_path, stage, "rollouts", scope)
    torch.testing.assert_close(torch.load(tmp_path / f"{scope}-2.pt"), one, rtol=0, atol=1e-6)
    resumed = fit(scope, accelerator, tmp_path / scope / "stopped", resume=True)
    torch.testing.assert_close(resumed, one, rtol=0, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_student_learns_from_its_own_answers_and_one_process_resumes_it(tmp_path):
    from sharded_rollouts import quiet, student

    for seed, name in enumerate(("model", "one", "other")):
        write_model(tmp_path, seed=seed, name=name)
    write_data(tmp_path / "data.jsonl", count=12)
    on_two(tmp_path, 3, "distill")
    align(student(tmp_path), tmp_path / "whole", say=quiet)
    align(student(tmp_path), tmp_path / "stopped", resume=True, say=quiet)
    ids, w = torch.tensor([[1, 5, 9, 20]]), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        start = open_run(tmp_path / "whole").base_model()(ids).logits
        whole, *others = (open_run(tmp_path / run).load()(ids, weights=w).logits for run in ("whole", "two", "stopped"))
    assert float((whole - start).abs().max()) > 1e-3  # something was learned
    for found in others:
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


def test_a_mixture_of_whole_parameters_is_refused_under_zero_3(monkeypatch):
    from clp_problems import language_model, settings

    from mopl.clp.policies import new_policy
    from mopl.training import zero

    policy = new_policy(language_model(), settings(scope="full"), ("first", "second"), "clp")
    monkeypatch.setattr(zero, "check_device", lambda _: None)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(NotImplementedError, match=r"ParameterMixture reads .*`--zero_stage 2`.* or take a LoraMixture"):
        ZeroModel(None, policy, optimizer, {"zero_optimization": {"stage": 3}})
