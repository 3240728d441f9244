"""Training with FSDP2 under accelerate's launcher: sharded over two processes, equal to one."""

import copy
import sys
import types
from pathlib import Path

import pytest
import torch
from launching import launch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("moocore")

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from sharded_training import fit

from mopl.alignment import open_run
from mopl.cli import main
from mopl.conditioning import LoraMixture
from mopl.language_models import models
from mopl.pareto import Front
from mopl.training import RunLog, make_accelerator, read_log
from mopl.training.parallel import fsdp_plugin
from tests.alignment.test_command import arguments, write_data
from tests.alignment.test_training import write_model


def align(place: Path, run: str) -> list[str]:
    return arguments(place, place / run, "--conditioning", "text", "--learning-rate", "0.01", "--samples", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("sharded")
    write_model(folder)
    write_data(folder / "data.jsonl")
    script = Path(__file__).parents[1] / "distributed" / "sharded_training.py"
    done = launch(2, str(script), str(folder), *align(folder, "two"), ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "sharded trainings are done" in done.stdout
    return folder


@pytest.fixture
def base(place):
    return models.load_causal_lm(str(place / "model"))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_shards_train_what_one_process_trains_are_resumed_by_it_and_make_the_same_run(place, base, tmp_path):
    """One test, because workers of pytest share no fixture and what two processes do takes half a minute."""
    trains_what_one_process_trains(place, base, tmp_path)
    is_resumed_by_one_process(place, models.load_causal_lm(str(place / "model")))
    makes_the_same_run(place)


def trains_what_one_process_trains(place, base, tmp_path):
    accelerator, found = make_accelerator(cpu=True), torch.load(place / "sharded.pt")
    one = fit(base, accelerator, sgd=True)
    torch.testing.assert_close(found["sgd"], one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["recompute"], one, rtol=1e-5, atol=1e-5)
    one = fit(base, accelerator, log=RunLog(tmp_path))
    torch.testing.assert_close(found["adamw"], one, rtol=2e-4, atol=1e-4)
    ours, theirs = read_log(tmp_path / "log.jsonl"), read_log(place / "log.jsonl")
    assert len(ours) == len(theirs) == 3
    for alone, sharded in zip(ours, theirs, strict=True):
        for name in ("loss", "loss/low", "loss/middle", "gradient_norm"):
            assert sharded[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-4)
    assert ours[0]["gradient_norm"] > 0.2  # so clipping had something to do


def is_resumed_by_one_process(place, base):
    resumed = fit(base, make_accelerator(cpu=True), directory=place / "stopped", resume=True)
    torch.testing.assert_close(resumed, torch.load(place / "sharded.pt")["adamw"], rtol=2e-4, atol=1e-4)


def makes_the_same_run(place):
    assert main(align(place, "one")) == 0
    one, two = (Front.load(place / name / "front.json").tensors() for name in ("one", "two"))
    torch.testing.assert_close(two[2], one[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two[1], one[1], rtol=1e-2, atol=1e-3)
    assert float(one[1].max()) > 0.01  # something was learned
    ids = torch.tensor([[1, 5, 9, 20]])
    with torch.no_grad():
        one, two = (open_run(place / name).load()(ids).logits for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings", "precision", "message"),
    [
        ("FSDP", {"fsdp_version": 1}, "no", "pass `--fsdp_version 2`"),
        ("FSDP", {"cpu_offload": True}, "bf16", "fsdp_offload_params does not work with FSDP2"),
        ("FSDP", {"activation_checkpointing": True}, "no", "use gradient_checkpointing of the model"),
        ("FSDP", {"cpu_ram_efficient_loading": True}, "no", "before the model is loaded"),
        ("FSDP", {"auto_wrap_policy": "size_based_wrap"}, "no", "pass TRANSFORMER_BASED_WRAP"),
        ("FSDP", {}, "fp16", "pass bf16, or train with DDP"),
        ("DEEPSPEED", {}, "no", "set up for DEEPSPEED"),
    ],
)  # fmt: skip
def test_what_does_not_work_is_refused_before_anything_is_sharded(monkeypatch, kind, settings, precision, message):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    plugin = accelerate.FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **settings})
    monkeypatch.undo()
    asked = types.SimpleNamespace(
        distributed_type=kind, state=types.SimpleNamespace(fsdp_plugin=plugin), num_processes=2,
        mixed_precision=precision,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match=message):
        fsdp_plugin(asked)


def test_ddp_and_one_process_are_not_sharded(monkeypatch):
    assert fsdp_plugin(make_accelerator(cpu=True)) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert fsdp_plugin(types.SimpleNamespace(distributed_type="NO", num_processes=1)) is None


@pytest.mark.parametrize(("device", "told"), [(None, True), ("mps", True), ("cuda", False), ("xpu", False)])
def test_processes_of_a_launcher_know_of_one_another_where_there_is_no_gpu(monkeypatch, device, told):
    """accelerate itself takes each for the only one there, or beside Apple's GPU, unless it is told to use CPUs."""
    made = []

    def accelerator(**given):
        made.append(given["cpu"])
        return types.SimpleNamespace(distributed_type="MULTI_CPU", num_processes=2)

    monkeypatch.setattr(accelerate, "Accelerator", accelerator)
    there = None if device is None else torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: there)
    for name in ("WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    make_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    make_accelerator()
    monkeypatch.setenv("LOCAL_RANK", "0")
    make_accelerator()
    assert made == [False, False, told]


def test_a_copy_of_a_mixture_of_adapters_is_conditioned_by_itself(tmp_path):
    """What is sharded is a copy of the model."""
    torch.manual_seed(0)
    mixture = LoraMixture(
        models.load_causal_lm(str(write_model(tmp_path))), 2,
        config=peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    ).eval()  # fmt: skip
    ids, weights = torch.tensor([[1, 5, 9], [1, 7, 4]]), torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    made = copy.deepcopy(mixture)
    torch.testing.assert_close(made(ids, weights=weights).logits, mixture(ids, weights=weights).logits)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.zero_()
    assert float(made(ids, weights=weights).logits.abs().max()) > 0
