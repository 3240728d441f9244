"""Run by tests/integrations/test_deepspeed_trainers.py on gloo processes: the trainers' models under ZeRO-2 and -3."""

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

if __name__ == "__main__":  # the server of these forks may have imported packages where DeepSpeed was not to be found
    for name in ("accelerate.utils", "accelerate.accelerator", "accelerate", "transformers.integrations.deepspeed"):
        importlib.reload(importlib.import_module(name))

import multi_objective_trainer as small
import sharded_trainers
import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from ending import leave
from sharded_trainers import trained

from mopl._sharded import is_sharded
from mopl.conditioning import LoraMixture, ParameterMixture
from mopl.integrations.transformers import MultiObjectiveConfig

IN_SHARDS = ", loaded in shards"  # by transformers, where the config is there before the model
KINDS = {
    2: ("conditioned", "plain", "parameter mixture"),
    3: ("conditioned", "lora mixture", "words", "weighted reference", "copied head", f"reference adapter{IN_SHARDS}"),
}
FOUR = {2: ("words",), 3: ("lora mixture",)}
SAVED = {2: ("conditioned",), 3: ("lora mixture", "words")}


def config(stage: int, **more) -> dict:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # 0: cut even small ones
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**dict.fromkeys(automatic, "auto"), "bf16": {"enabled": "auto"}, "zero_optimization": zero, **more}


def options(stage: int, **more) -> dict:
    return {"deepspeed": config(stage), "use_cpu": False, **more}


def build(kind: str):
    """Return a model, and further arguments of its trainer."""
    kind = kind.removesuffix(IN_SHARDS)
    if kind == "weighted reference":
        return small.build("conditioned"), {"ref_model": small.build("lora mixture")}
    if kind == "copied head":  # of which each adapter has one, beside what it adds by DoRA
        import peft

        settings = {"modules_to_save": ["lm_head"], "use_dora": True, "init_lora_weights": False}
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
        return LoraMixture(small.build("plain"), 2, config=lora), {}
    return sharded_trainers.build(kind)


def loaded_in_shards(kind: str, place: Path):
    """Build a model around one that transformers loads in shards."""
    folder, made = place / "tiny", transformers.LlamaForCausalLM
    arguments = MultiObjectiveConfig(str(place / "arguments"), report_to="none", **options(3))

    def load(_):
        made(_)  # draws as many numbers as elsewhere
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    transformers.LlamaForCausalLM = load
    try:
        model, more = build(kind)
    finally:
        transformers.LlamaForCausalLM = made
    assert is_sharded(model) and arguments.deepspeed
    return model, more


def run(kind: str, place: Path, processes: int, stage: int) -> dict:
    built = model, _ = loaded_in_shards(kind, place) if kind.endswith(IN_SHARDS) else build(kind)
    if kind == "conditioned":
        sharded_trainers.differ(model)
    trainer = sharded_trainers.make(kind, place / "runs" / f"{kind}-{stage}", processes, built, **options(stage))
    found = small.measured(trainer, kind)
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine", f"{kind} was not trained by DeepSpeed"
    assert is_sharded(model) == (stage == 3)
    other = kind in ("plain", "words", "weighted reference", "parameter mixture")
    assert (found["reference"] == "DeepSpeedEngine") == other, f"{kind}: {found['reference']}"
    return {**found, "parameters": trained(trainer)}


def loading(trainer, first: Path, last: Path, expected: dict) -> None:
    """What is loaded into a model that is trained, the optimizer's own copies have, too."""
    from deepspeed.utils import safe_get_full_fp32_param

    trainer.model.load_weights(first)
    assert not all(torch.equal(value, expected[name]) for name, value in trained(trainer).items())
    trainer.model.load_weights(last)
    assert all(torch.equal(value, expected[name]) for name, value in trained(trainer).items())
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            copy = safe_get_full_fp32_param(parameter)
            assert torch.equal(copy.view_as(expected[name]), expected[name]), name


def evaluated_first(place: Path) -> None:
    """An engine that was made for an evaluation cannot train."""
    trainer = sharded_trainers.make("conditioned", place / "first", 2, build("conditioned"), **options(3))
    assert trainer.evaluate()["eval_loss"] > 0
    try:
        trainer.train()
    except ValueError as error:
        assert "pass eval_on_start=True" in str(error)
    else:
        raise AssertionError("a training without an optimizer")


def rollouts(place: Path) -> None:
    """GRPO under ZeRO-2 samples and trains what it does under DDP."""
    import grpo_cases

    kinds = {
        "lora mixture": (grpo_cases.mixture, {"beta": 0.1}),
        "parameter mixture": (lambda: ParameterMixture(grpo_cases.build(), 2), {"weights_per": "step", "beta": 0.0}),
    }
    sizes = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 0.5}
    for kind, (make, more) in kinds.items():
        found = []
        for asked in ("false", "true"):
            os.environ["ACCELERATE_USE_DEEPSPEED"] = asked
            own = options(2) if asked == "true" else {}
            model = make()
            start = {name: p.detach().clone() for name, p in model.named_parameters()}
            one = grpo_cases.trainer(
                place / "grpo", model, optim="sgd", eval_dataset=grpo_cases.DATA, eval_weights=[[0.2, 0.8]], **sizes,
                **more, **own,
            )  # fmt: skip
            one.train()
            assert type(one.model_wrapped).__name__ == ("DeepSpeedEngine" if own else "DistributedDataParallel")
            found.append((grpo_cases.trained(one), {n: v for n, v in one.evaluate().items() if "@" in n}))
        (ours, rewards), (zero, rewards_zero) = found
        assert all((value - ours[name]).abs().max() <= 1e-6 * ours[name].abs().max() for name, value in zero.items())
        assert any((value - start[name]).abs().max() > 1e-3 for name, value in zero.items()), f"{kind} was not trained"
        assert rewards and rewards == rewards_zero


def main(place: Path, processes: int, stage: int) -> None:
    # accelerate knows no group of CPUs under DeepSpeed; all that is missing is its backend.
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    torch.set_num_threads(1)
    first = os.environ["RANK"] == "0"
    for kind in (KINDS if processes == 2 else FOUR)[stage]:
        found = run(kind, place, processes, stage)
        if first:
            torch.save(found, place / f"{kind}-{stage}-{processes}.pt")
    if processes == 2:
        if stage == 3:
            evaluated_first(place)
        for kind in SAVED[stage]:
            here = place / f"zero-{stage}"
            one, two, expected = sharded_trainers.checkpoints(here, kind, build, first, **options(stage))
            one.model.save_pretrained(str(here / f"{kind}, by itself"), is_main_process=first)
            loading(two, here / kind / "checkpoint-1", here / f"{kind}, saved", expected)
        model = sharded_trainers.precision(place, "conditioned" if stage == 3 else "plain", build, **options(stage))
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        if stage == 2:
            rollouts(place)
    if first:
        print(f"ZeRO-{stage} is done")


if __name__ == "__main__":
    from deepspeed_site import without_compiled_ops

    without_compiled_ops()
    for number in map(int, sys.argv[2:]):
        main(Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]), number)
    leave()
