"""Run by tests/integrations/test_deepspeed_trainers.py on gloo processes: the trainers' models under ZeRO."""

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

from mopl._sharded import gathered, is_sharded
from mopl.conditioning import LoraMixture, ParameterMixture
from mopl.integrations.transformers import MultiObjectiveConfig
from mopl.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer

IN_SHARDS = ", loaded in shards"  # by transformers, where the config is there before the model
CLIPPED, DPO, BEST = ", clipped", ", in the trainer for pairs", ", the best of two"
KINDS = {
    1: (f"conditioned{CLIPPED}",),
    2: ("conditioned", f"plain{DPO}", "parameter mixture"),
    3: ("conditioned", "lora mixture", "words", "weighted reference", "copied head", f"reference adapter{IN_SHARDS}",
        f"conditioned{BEST}"),
}  # fmt: skip
FOUR = {1: (), 2: ("words",), 3: ("lora mixture",)}
SAVED = {2: ("conditioned",), 3: ("lora mixture", "words")}


def config(stage: int, **more) -> dict:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # 0: cut even small ones
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**dict.fromkeys(automatic, "auto"), "bf16": {"enabled": "auto"}, "zero_optimization": zero, **more}


def options(stage: int, **more) -> dict:
    if stage == 1:  # nothing is told that can be left out
        return {"deepspeed": {"zero_optimization": {"stage": 1}}, "use_cpu": False, **more}
    return {"deepspeed": config(stage), "use_cpu": False, **more}


def build(kind: str):
    """Return a model, and further arguments of its trainer."""
    kind = kind.partition(", ")[0]
    if kind == "weighted reference":
        return small.build("conditioned"), {"ref_model": small.build("lora mixture")}
    if kind == "copied head":  # of which each adapter has one, beside what it adds by DoRA
        import peft

        settings = {"modules_to_save": ["lm_head"], "use_dora": True, "init_lora_weights": False}
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
        return LoraMixture(small.build("plain"), 2, config=lora), {}
    return sharded_trainers.build(kind)


def make(kind: str, folder: Path, processes: int, built, **options):
    """Return a trainer of a kind."""
    if kind.endswith(CLIPPED):
        options["max_grad_norm"] = 0.05
    if kind.endswith(DPO):
        options |= {"classes": (MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer), "bf16": False}
    if not kind.endswith(BEST):
        return sharded_trainers.make(kind, folder, processes, built, **options)
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    more = {**built[1], "callbacks": [Answers()]}
    return sharded_trainers.make(kind, folder, processes, (built[0], more), **every, **best, **options)


class Answers(transformers.TrainerCallback):
    """Generates after each step, as every process must under ZeRO-3."""

    def __init__(self) -> None:
        self.found: list[list[list[int]]] = []

    def on_step_end(self, args, state, control, model=None, **_):
        tokens = torch.tensor([[5, 6, 7]])
        model.eval()
        given = {"attention_mask": torch.ones_like(tokens), "weights": torch.tensor([[0.3, 0.7]])}
        self.found.append(model.generate(input_ids=tokens, max_new_tokens=2, do_sample=False, **given).tolist())
        model.train()


def measured(trainer, kind: str) -> dict:
    """Train; return what `multi_objective_trainer` measures, and what was evaluated and answered on the way."""
    found = small.measured(trainer, kind.partition(", ")[0])
    for step, entry in enumerate(e for e in trainer.state.log_history[:-1] if "eval_loss" in e):
        found["metrics"][f"eval_loss in step {step}"] = entry["eval_loss"]
    if kind.endswith(BEST):
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-1"), "the one that is not the last"
        (answers,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, Answers))
        found["metrics"] |= {f"token {n}": t for n, t in enumerate(torch.tensor(answers.found).flatten().tolist())}
    return found


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
    trainer = make(kind, place / "runs" / f"{kind}-{stage}", processes, built, **options(stage))
    found = measured(trainer, kind)
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine", f"{kind} was not trained by DeepSpeed"
    assert is_sharded(model) == (stage == 3)
    other = kind.partition(", ")[0] in ("plain", "words", "weighted reference", "parameter mixture")
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


def left_out(place: Path, stage: int) -> None:
    """A layer without a gradient is neither updated with an old one, nor with that of another layer."""
    first = os.environ["RANK"] == "0"
    cases = [  # in which steps the loss depends on it, and what is said of that
        (
            lambda step: step == 0,
            "does not depend on 1 trained parameter, model.extra.weight, which DeepSpeed would up",
        ),
        (lambda step: False, None),
    ]
    if stage < 3:  # which gathers it in the forward pass, where the other process would not come
        cases.append((lambda step: first, "model.extra.weight has a gradient in 1 of 2 processes"))
    for used, message in cases:
        trainer = with_another_layer(used, place / "left out", stage)
        layer = {"weight": trainer.model.model.extra.weight}
        before = gathered(layer, keep=True)["weight"].clone()
        try:
            trainer.train()
            found = None
        except RuntimeError as error:
            found = str(error)
        assert (message in found) if message else found is None, found
        after = gathered(layer, keep=True)["weight"]  # of which the error may have left a part on its way
        assert message or torch.equal(after, before)
        assert "step" not in trainer.deepspeed.__dict__, "the engine is as it was"
    again(trainer, "this trainer has trained before")


def again(trainer, message: str, **more) -> None:
    try:
        trainer.train(**more)
    except (RuntimeError, ValueError) as error:
        assert message in str(error)
    else:
        raise AssertionError(message)


def left_out_after_resume(place: Path, stage: int) -> None:
    """Momentum that a checkpoint has counts; a layer that never had a gradient may stay without one."""
    more = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}
    for ever in (True, False):
        folder = place / f"left out, {ever}"
        one = with_another_layer(lambda step, ever=ever: ever and step == 0, folder, stage, **more, max_steps=1)
        one.train()
        two = with_another_layer(lambda step: False, folder, stage, **more)
        resumed = {"resume_from_checkpoint": str(folder / "checkpoint-1")}
        if ever:
            again(two, "does not depend on 1 trained parameter, model.extra.weight", **resumed)
        else:
            two.train(**resumed)


def gradients_in_float32(place: Path) -> None:
    """With stage 1 and bf16 DeepSpeed then has another optimizer, for which the same holds."""
    own = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    first = os.environ["RANK"] == "0"
    for used, message in (
        (lambda step: step == 0, "does not depend on 1 trained parameter, model.extra.weight"),
        (lambda step: first, "model.extra.weight has a gradient in 1 of 2 processes"),
    ):
        trainer = with_another_layer(used, place / "float32", 1, deepspeed=config(1, **own), bf16=True)
        again(trainer, message)
        assert type(trainer.deepspeed.optimizer).__name__ == "BF16_Optimizer"


def with_another_layer(used, folder: Path, stage: int, **more):
    """Return a trainer of a model with a layer that is `used(step)`."""
    model = small.build("plain")
    extra = model.model.extra = torch.nn.Linear(32, 32, bias=False)
    trainer = sharded_trainers.make("plain", folder, 2, (model, {}), **{**options(stage), **more})

    def add(_, __, output):
        return output + extra(output) if used(trainer.state.global_step) else output

    model.model.embed_tokens.register_forward_hook(add)
    return trainer


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
            left_out(place, stage)
            left_out_after_resume(place, stage)
        if stage == 1:
            left_out(place, stage)
            left_out_after_resume(place, stage)
            gradients_in_float32(place)
            return
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
