"""Models that answer in their training under FSDP2: two processes train, save and resume what one process does."""

import copy
import json
import os
import sys

import pytest
import torch
from launching import DISTRIBUTED, launch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("moocore")

from mopl.alignment import align, open_run
from mopl.cli import main
from mopl.clp.policies import new_policy
from mopl.pareto import Front
from mopl.training import make_accelerator, read_log
from tests.alignment.test_command import write_data
from tests.alignment.test_training import write_model

sys.path.append(str(DISTRIBUTED))

SCRIPT = str(DISTRIBUTED / "sharded_rollouts.py")
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
REWARDS = """
def first(texts, prompts):
    return [sum(word < "w2" for word in text.split()) / 4 for text in texts]

def second(texts, prompts):
    return [sum("w2" <= word < "w4" for word in text.split()) / 4 for text in texts]
"""
BUDGET = (
    "align --model model --data prompts.jsonl --rewards two_rewards:first two_rewards:second --device cpu --steps 3 "
    "--prompts-per-step 2 --samples-per-prompt 2 --max-new-tokens 4 --points 3 --normalize-prompts 4 --bootstrap 0 "
    "--held-out 0.2 --eval-prompts 3 --kl-weight 0.05 --learning-rate 0.01 --samples 2 --log-every 1 --scope full "
    "--method rewarded-soups"
).split()


def train_what_one_process_trains(place, scopes, **environment):
    """Compare what one process trains with what two do in one launch, and let one go on with what they left."""
    from sharded_rollouts import fit, quiet, student

    accelerator, one = make_accelerator(cpu=True), {}
    for scope in scopes:
        one[scope] = fit(scope, accelerator, place / "alone" / scope)
        fit(scope, accelerator, place / scope / "of-one", stop=1)
    for seed, name in enumerate(("model", "one", "other")):
        write_model(place, seed=seed, name=name)
    write_data(place / "data.jsonl", count=12)
    done = launch(2, SCRIPT, str(place), **environment)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "one process was stopped by its guard" in done.stdout
    for scope in scopes:
        torch.testing.assert_close(torch.load(place / f"{scope}-2.pt"), one[scope], rtol=0, atol=1e-6)
        resumed = fit(scope, accelerator, place / scope / "stopped", resume=True)
        torch.testing.assert_close(resumed, one[scope], rtol=0, atol=1e-6)
    align(student(place), place / "whole", say=quiet)
    align(student(place), place / "stopped", resume=True, say=quiet)
    ids, w = torch.tensor([[1, 5, 9, 20]]), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        start = open_run(place / "whole").base_model()(ids).logits
        whole, *others = (open_run(place / run).load()(ids, weights=w).logits for run in ("whole", "two", "stopped"))
    assert float((whole - start).abs().max()) > 1e-3  # something was learned
    for found in others:
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.slow
def test_sharded_policies_and_a_student_train_what_one_process_trains_and_each_resumes_the_other(tmp_path):
    from sharded_rollouts import COMPARED

    train_what_one_process_trains(tmp_path, COMPARED, **SHARDED)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_command_makes_the_run_of_one_process(tmp_path, monkeypatch):
    """Experts of whole models, and a soup of them."""
    write_model(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(20)))
    (tmp_path / "two_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = launch(2, SCRIPT, ".", "clp", *BUDGET, "--run", "two", PYTHONPATH=path, **SHARDED)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert main([*BUDGET, "--accumulation", "2", "--run", "one"]) == 0
    for name in ("rewards.json", "samples.jsonl"):
        found, wanted = ((tmp_path / run / name).read_text() for run in ("two", "one"))
        assert found == wanted, name
    one, two = (read_log(tmp_path / run / "log.jsonl") for run in ("one", "two"))
    assert len(one) == len(two) == 6
    for alone, sharded in zip(one, two, strict=True):
        for name in ("loss", "kl", "entropy", "reward/first", "gradient_norm"):
            assert sharded[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5)
    for of_one, of_two in zip(
        *(Front.load(tmp_path / run / "front.json").tensors() for run in ("one", "two")), strict=True
    ):
        torch.testing.assert_close(of_two, of_one, rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_policy_has_the_same_reference():
    """What is sharded is a copy of the policy; another copy of the language model would fill each GPU for nothing."""
    from clp_problems import language_model, settings

    base = language_model()
    policy = new_policy(base, settings(scope="full"), ("first", "second"), "clp")
    with copy.deepcopy(policy).reference() as reference:
        assert reference is base
