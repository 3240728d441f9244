"""Models that take weights, references and checkpoints in the trainers under DeepSpeed's ZeRO, over gloo."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from deepspeed_site import launch_environment
from launching import DISTRIBUTED, launch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("trl", minversion="1.15")

sys.path.insert(0, str(DISTRIBUTED))

import deepspeed_trainers
import sharded_trainers

from mopl.conditioning import WeightedModel
from mopl.integrations._rollout_checks import refuse_sharded_rollouts
from mopl.integrations._sharding import check_sharding, complete_zero_settings, refuse_loaded_in_shards
from mopl.integrations.grpo import MultiObjectiveGRPOConfig
from mopl.integrations.scorers import RewardListConfig
from mopl.integrations.transformers import MultiObjectiveConfig
from mopl.integrations.trl import MultiObjectiveDPOConfig
from mopl.training.zero_settings import check_config

ASKED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"}


def start(processes: int, folder: Path) -> None:
    script = str(DISTRIBUTED / "deepspeed_trainers.py")
    done = launch(processes, script, str(folder), "1", "2", "3", **ASKED, **launch_environment())
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "ZeRO-2 is done" in done.stdout and "ZeRO-3 is done" in done.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_2_and_3_train_what_one_process_trains_and_their_checkpoints_are_whole(tmp_path):
    """One test, because workers of pytest share no fixture."""
    launch_environment()  # first, where it skips
    sharded_trainers.small.build("plain").save_pretrained(tmp_path / "tiny")
    start(2, tmp_path)
    start(4, tmp_path)
    for kind in dict.fromkeys(kind for kinds in deepspeed_trainers.KINDS.values() for kind in kinds):
        trainer = deepspeed_trainers.make(kind, tmp_path / "one", 1, deepspeed_trainers.build(kind))
        one = deepspeed_trainers.measured(trainer, kind)
        for processes, kinds in ((2, deepspeed_trainers.KINDS), (4, deepspeed_trainers.FOUR)):
            for name in (f"{kind}-{stage}-{processes}" for stage in (1, 2, 3) if kind in kinds[stage]):
                sharded_trainers.is_one_process(torch.load(tmp_path / f"{name}.pt"), one, name)
    for stage, kinds in deepspeed_trainers.SAVED.items():  # resumed bit for bit there; here one process opens them
        place = tmp_path / f"zero-{stage}"
        for kind in kinds:
            trained = torch.load(place / f"{kind}, saved.pt")
            for folder in (place / f"{kind}, saved", place / f"{kind}, by itself", place / kind / "checkpoint-2"):
                if stage == 2 and folder.name.endswith("by itself"):
                    assert folder.exists()
                base = None if kind == "words" else sharded_trainers.small.build("plain")
                own = dict(WeightedModel.from_pretrained(folder, base).named_parameters())
                assert all(torch.equal(own[name], value) for name, value in trained.items()), (kind, folder)
            # What is not trained is written by nobody, but where it is a part of the files above.
            for file in (place / kind / "checkpoint-2").rglob("*model_states.pt"):
                names = torch.load(file, weights_only=False)["module"].keys()
                assert kind == "words" or not [name for name in names if "embed_tokens" in name], file


def test_what_deepspeed_is_not_told_comes_from_the_arguments():
    accelerator = accelerator_of(1)
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    arguments = types.SimpleNamespace(max_grad_norm=0.7, per_device_train_batch_size=5)
    complete_zero_settings(accelerator, arguments)
    assert settings["gradient_clipping"] == 0.7 and settings["train_micro_batch_size_per_gpu"] == 5
    told = {"gradient_clipping": 0.3, "train_batch_size": 40}
    settings |= told
    del settings["train_micro_batch_size_per_gpu"]
    complete_zero_settings(accelerator, arguments)
    assert settings == {"zero_optimization": {"stage": 1}, **told}
    for stage in (0, 4, "3", 3.0, True, None):
        with pytest.raises(ValueError, match=r"zero_optimization.stage in .* is .* but must be 1, 2 or 3; leave Deep"):
            complete_zero_settings(accelerator_of(stage), arguments)


@pytest.mark.parametrize(
    "arguments", [MultiObjectiveConfig, MultiObjectiveDPOConfig, MultiObjectiveGRPOConfig, RewardListConfig]
)
def test_settings_of_another_form_are_named_where_transformers_would_end_in_an_attribute_error(tmp_path, arguments):
    with pytest.raises(ValueError, match="offload_optimizer in DeepSpeed's settings is 'cpu' but must be an object"):
        arguments(str(tmp_path), deepspeed={"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}})


def test_settings_as_a_text_are_read_too_whatever_their_length():
    settings = {"zero_optimization": {"stage": 2}, "steps_per_print": "x" * 5000}
    check_config(json.dumps(settings))
    check_config("eyJ6ZXJvX29wdGltaXphdGlvbiI6IHt9fQ==")  # accelerate reads base64, too
    settings["zero_optimization"]["offload_optimizer"] = "cpu"
    with pytest.raises(ValueError, match="offload_optimizer in DeepSpeed's settings is 'cpu' but must be an object"):
        check_config(json.dumps(settings))


@pytest.mark.parametrize("device", [None, "mps"])
def test_processes_that_would_each_train_alone_are_told_so(tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device is not None)
    trainer = sharded_trainers.make("plain", tmp_path, 1, sharded_trainers.build("plain"))
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"one of 2 processes, but .* there is no GPU .*; pass use_cpu=True"):
        trainer.create_accelerator_and_postprocess()


def accelerator_of(stage: int, **zero):
    """What the checks read of accelerate's `Accelerator`."""
    plugin = types.SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": {"stage": stage, **zero}})
    state = types.SimpleNamespace(deepspeed_plugin=plugin)
    return types.SimpleNamespace(distributed_type="DEEPSPEED", state=state, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"offload_param": {"device": "nvme"}}, "offload_param to nvme is set in the configuration of DeepSpeed"),
        ({"zero_hpz_partition_size": 4}, "zero_hpz_partition_size is set"),
        ({"mics_shard_size": 2}, "mics_shard_size is set"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights is set .* of a LoraMixture"),
    ],
)
def test_settings_by_which_shares_stand_elsewhere_are_refused(zero, message):
    model = sharded_trainers.build("lora mixture")[0]
    check_sharding(accelerator_of(3, offload_param={"device": "cpu"}), model)
    with pytest.raises(NotImplementedError, match=message):
        check_sharding(accelerator_of(3, **zero), model)


def test_mixtures_of_parameters_and_rollouts_are_refused_under_zero_3_alone():
    mixture = sharded_trainers.build("parameter mixture")[0]
    with pytest.raises(NotImplementedError, match=r"under DEEPSPEED no process has .* on one device, under ZeRO-2 or"):
        check_sharding(accelerator_of(3), mixture)
    with pytest.raises(NotImplementedError, match="the others waiting; train on one device, under ZeRO-2 or under DDP"):
        refuse_sharded_rollouts(accelerator_of(3), mixture)
    check_sharding(accelerator_of(2), mixture)
    refuse_sharded_rollouts(accelerator_of(2), mixture)


def test_a_model_that_was_loaded_in_shards_is_not_copied_as_its_reference():
    model = torch.nn.Linear(2, 2)
    refuse_loaded_in_shards(model)
    model.weight.ds_tensor = torch.zeros(2)
    with pytest.raises(NotImplementedError, match=r"the Linear was loaded in shards.* load the model before"):
        refuse_loaded_in_shards(model)
