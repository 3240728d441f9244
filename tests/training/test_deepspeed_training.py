"""Training with DeepSpeed's ZeRO under accelerate's launcher: shares of two and of four processes, equal to one."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from deepspeed_site import launch_environment, settings_of
from launching import DISTRIBUTED, launch

pytest.importorskip("transformers")
pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

sys.path.append(str(DISTRIBUTED))

from mopl.language_models import models
from mopl.training import RunLog, make_accelerator, read_log
from mopl.training.parallel import fsdp_plugin
from mopl.training.selection import Selection
from mopl.training.zero_settings import check_config, zero_settings
from tests.alignment.test_training import write_model

ASKED = {"ACCELERATE_USE_DEEPSPEED": "true"}


def train_on(processes: int, place: Path) -> None:
    environment = {**launch_environment(), **ASKED}
    done = launch(processes, str(DISTRIBUTED / "deepspeed_training.py"), str(place), **environment)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "trainings under DeepSpeed are done" in done.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_shares_train_what_one_process_trains_and_each_kind_resumes_the_others(tmp_path):
    """One test, because workers of pytest share no fixture, and each launch takes long."""
    write_model(tmp_path)
    for stage in (2, 3):
        settings_of(tmp_path, stage)
    train_on(2, tmp_path)
    import deepspeed_training as script

    accelerator = make_accelerator(cpu=True)
    one = {
        "sgd": script.full(accelerator, log=RunLog(tmp_path)),
        "adamw": script.full(accelerator, sgd=False),
        "branches": script.branches(accelerator, script.some_parts)[:-5],
        "selected": script.full(accelerator, sgd=False, selection=Selection(script.validated, every=2, patience=1)),
    }
    base = models.load_causal_lm(str(tmp_path / "model"))
    one["adapters"] = one["recompute"] = script.fit(base, accelerator, sgd=True)
    is_what_one_process_trains(tmp_path, 2, one)
    resumed = script.fit(base, accelerator, directory=tmp_path / "zero3-2" / "stopped", resume=True)
    found = torch.load(tmp_path / "zero3-2" / "found.pt")["stopped"]
    torch.testing.assert_close(resumed, found, rtol=2e-4, atol=1e-4)  # AdamW, as under FSDP2

    # Stopped in shares of two processes, and in one process, and continued in those of four.
    for stage in (2, 3):
        before = tmp_path / "stopped" / f"zero{stage}-2"
        resumed = script.full(accelerator, sgd=False, directory=before, resume=True)
        torch.testing.assert_close(resumed, one["adamw"], rtol=0, atol=1e-6)
    script.shutil.rmtree(tmp_path / "stopped")
    script.full(accelerator, sgd=False, stop=2, directory=tmp_path / "stopped" / "ddp-1")
    train_on(4, tmp_path)
    is_what_one_process_trains(tmp_path, 4, one)


def is_what_one_process_trains(place, count, one):
    for stage in (2, 3):
        found = torch.load(place / f"zero{stage}-{count}" / "found.pt")
        for name in one.keys() & found.keys():
            torch.testing.assert_close(found[name], one[name], rtol=0, atol=1e-6, msg=f"{name}, stage {stage}")
        ours, theirs = read_log(place / "log.jsonl"), read_log(place / f"zero{stage}-{count}" / "log.jsonl")
        assert len(ours) == len(theirs) == 6
        for alone, shared in zip(ours, theirs, strict=True):
            for name in ("loss", "error", "gradient_norm", "learning_rate"):
                assert shared[name] == pytest.approx(alone[name], rel=1e-5)
    assert max(record["gradient_norm"] for record in ours) > 0.3  # so clipping had something to do
    crossed = torch.load(place / f"crossed-{count}.pt")
    for kind in ("zero2", "zero3"):
        whole = torch.load(place / f"{kind}-{count}" / "found.pt")["adamw"]
        assert torch.equal(crossed[f"{kind}-{count}-by-{kind}-{count}"], whole), "resumed bit for bit"
    for name, found in crossed.items():
        torch.testing.assert_close(found, one["adamw"], rtol=0, atol=1e-6, msg=name)
    half = torch.load(place / f"half-{count}.pt")
    assert half or count == 4
    for kind in half.keys() & {"zero2", "zero3"}:
        torch.testing.assert_close(half[kind], half["ddp"], rtol=0, atol=1e-5)
        assert not torch.allclose(half[kind], one["sgd"], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- settings


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Return what gives DeepSpeed's settings of a file, for two processes."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("mopl.training.zero_settings.require", lambda *_, **__: None)

    def settings(precision="no", **given):
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 3}, **given}))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
        return zero_settings(types.SimpleNamespace(num_processes=2, mixed_precision=precision, state=None))

    return settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage = 1 .* set 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer = .*cpu"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param = .*nvme"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size = 2 .*hpZ"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "ZeRO\\+\\+ rounds what it sends"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "MiCS"),
        ({"zero_optimization": {"stage": 3, "something_new": 2}}, "something_new = 2 .*leave it out"),
        ({"optimizer": {"type": "Adam"}}, "optimizer = .* AdamW with mopl's --learning-rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler = .* follows the schedule of the training"),
        ({"fp16": {"enabled": True}}, "fp16 = .* --mixed-precision bf16"),
        ({"bf16": {"enabled": True}}, "bf16 = .* is autocast"),
        ({"bf16": True}, "bf16 = True .* is autocast"),
        ({"train_batch_size": 8}, "train_batch_size = 8 .*--lists-per-batch"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps = 4 .*--accumulation"),
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5 .*gradient_clip of the training"),
        ({"compression_training": {}}, "compression_training = .*leave it out"),
        ({"precision": "fp16"}, "mixed_precision does not work with DeepSpeed here; pass bf16"),
    ],
)  # fmt: skip
def test_what_does_not_work_is_refused(asked, given, message):
    with pytest.raises(NotImplementedError, match=message):
        asked(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": None}, 'zero_optimization in .* None but must be an object .* {"stage": 3}'),
        ({"zero_optimization": 3}, "zero_optimization in DeepSpeed's settings is 3 but must be an object"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}, "offload_optimizer in .* 'cpu' but must"),
        ({"zero_optimization": {"stage": 3, "offload_param": True}}, 'offload_param in .* True .* {"device": "none"}'),
    ],
)  # fmt: skip
def test_settings_of_another_form_are_named(asked, monkeypatch, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        asked(**given)
    for file in (given, tmp_path / "deepspeed.json", None):  # in the trainers, whose files transformers reads
        with pytest.raises(ValueError, match=message):
            check_config(file)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    check_config()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[2]", r"the whole of DeepSpeed's settings is \[2\] but must be an object of settings, such as {.zero_opt"),
        ("{stage: 2}", "DeepSpeed's settings in .*deepspeed.json are no JSON: Expecting property name"),
        ("{}", 'zero_optimization is missing in DeepSpeed\'s settings.* add "zero_optimization": {"stage": 3}'),
        ('{"zero_optimization": {"stage": 2}, "fp16": "auto"}', "fp16 in .* 'auto' .* such as {\"enabled\": false}"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {"params": 1}}', "optimizer.params in .* is 1 but must be"),
    ],
)
def test_files_of_another_form_are_named(tmp_path, written, message):
    file = tmp_path / "deepspeed.json"
    file.write_text(written)
    with pytest.raises(ValueError, match=message):
        check_config(str(file))


def test_what_the_training_decides_may_be_auto(asked):
    zero = {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False, "offload_optimizer": {"device": "none"}}
    found = asked(
        zero_optimization=zero, train_batch_size="auto", gradient_clipping="auto", bf16={"enabled": "auto"},
        gradient_accumulation_steps=1, fp16={"enabled": False}, precision="bf16",
    )  # fmt: skip
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": False}


@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_options_of_the_launcher_are_enough(monkeypatch, stage):
    told = {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": stage, "GRADIENT_ACCUMULATION_STEPS": "1"}
    for name, value in told.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setattr("mopl.training.zero_settings.require", lambda *_, **__: None)
    found = zero_settings(types.SimpleNamespace(num_processes=2, mixed_precision="no", state=None))
    assert found["zero_optimization"]["stage"] == int(stage)


def test_one_process_is_not_cut_and_an_accelerator_of_another_making_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert zero_settings(make_accelerator(cpu=True)) is None
    other = types.SimpleNamespace(distributed_type="DEEPSPEED", num_processes=2)
    with pytest.raises(NotImplementedError, match=r"make the accelerator with mopl\.training\.make_accelerator"):
        fsdp_plugin(other)
