"""Models that take weights, references and checkpoints in the trainers under accelerate's FSDP2, on gloo processes."""

import sys
import types
from pathlib import Path

import pytest
import torch
from launching import DISTRIBUTED, launch

pytest.importorskip("transformers")
pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

sys.path.insert(0, str(DISTRIBUTED))

import sharded_trainers

from mopl.conditioning import ParameterMixture, WeightedModel
from mopl.integrations._rollout_checks import refuse_sharded_rollouts
from mopl.integrations._sharding import check_sharding, refuse_sharded_moving

ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FOUR = ("lora mixture", "words")


def start(processes: int, folder: Path, *kinds: str, **environment: str) -> None:
    script = str(DISTRIBUTED / "sharded_trainers.py")
    done = launch(processes, script, str(folder), *kinds, **ASKED, **environment)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "sharded trainers are done" in done.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_two_and_four_shards_train_what_one_process_trains_and_their_checkpoints_are_whole(tmp_path):
    """One test, because workers of pytest share no fixture."""
    start(2, tmp_path, *sharded_trainers.KINDS)
    start(4, tmp_path, *FOUR, FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    for kind in sharded_trainers.KINDS:
        trainer = sharded_trainers.make(kind, tmp_path / "one", 1, sharded_trainers.build(kind))
        one = sharded_trainers.small.measured(trainer, kind)
        for name in (f"{kind}-{processes}" for processes in (2, 4) if processes == 2 or kind in FOUR):
            sharded_trainers.is_one_process(torch.load(tmp_path / f"{name}.pt"), one, name)
    for kind in sharded_trainers.SAVED:  # resumed bit for bit by the two processes; here a single one opens them
        trained = torch.load(tmp_path / f"{kind}, saved.pt")
        for folder in (tmp_path / f"{kind}, saved", tmp_path / kind / "checkpoint-2"):
            base = None if kind == "words" else sharded_trainers.small.build("plain")
            own = dict(WeightedModel.from_pretrained(folder, base).named_parameters())
            assert all(torch.equal(own[name], value) for name, value in trained.items()), (kind, folder)
            assert not list(folder.glob("pytorch_model_fsdp*"))  # nothing is written twice


def accelerator_of(kind, **options):
    """What the checks read of accelerate's `Accelerator`."""
    plugin = types.SimpleNamespace(
        **{"fsdp_version": 2, "activation_checkpointing": False, "mixed_precision_policy": None, **options}
    )
    state = types.SimpleNamespace(fsdp_plugin=plugin)
    return types.SimpleNamespace(distributed_type=kind, state=state, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("FSDP", {"fsdp_version": 1}, "training under version 1 of FSDP works for .* this is a LoraMixture; train it"),
        ("MEGATRON_LM", {}, "training under MEGATRON_LM works for a plain model"),
        ("FSDP", {"activation_checkpointing": True}, "pass gradient_checkpointing=True to the trainer"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_the_reason(kind, options, message):
    with pytest.raises(NotImplementedError, match=message):
        check_sharding(accelerator_of(kind, **options), sharded_trainers.build("lora mixture")[0])


def test_mixtures_of_parameters_and_rollouts_are_refused_under_sharding():
    mixture = sharded_trainers.build("parameter mixture")[0]
    assert isinstance(mixture, ParameterMixture)
    with pytest.raises(NotImplementedError, match="ParameterMixture mixes its parameters before its layers run"):
        check_sharding(accelerator_of("FSDP"), mixture)
    with pytest.raises(NotImplementedError, match="one whose completions end early would leave the others waiting"):
        refuse_sharded_rollouts(accelerator_of("FSDP"), mixture)
    with pytest.raises(NotImplementedError, match="sync_ref_model is True, and under DEEPSPEED"):
        refuse_sharded_moving(accelerator_of("DEEPSPEED"))
    check_sharding(accelerator_of("MULTI_GPU"), mixture)
    refuse_sharded_moving(accelerator_of("MULTI_GPU"))
    refuse_sharded_rollouts(accelerator_of("MULTI_GPU"), mixture)
