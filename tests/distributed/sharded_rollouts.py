"""Run by tests/clp/test_sharded_rollouts.py on two gloo processes: sharded models that answer in their training.

They are sharded by FSDP2, or by DeepSpeed where ACCELERATE_USE_DEEPSPEED is set.

sharded_rollouts.py PLACE                 `distil` and what `fit` trains, stopped and resumed; a guard stops one process
sharded_rollouts.py PLACE clp ARGUMENTS   a command of mopl
"""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shutil

import torch
from clp_problems import language_model, make_loss, parts, settings
from deepspeed_site import without_compiled_ops
from ending import leave

from mopl.alignment import AlignConfig, align
from mopl.alignment.distill import Distilling
from mopl.clp import PolicyCollapsed
from mopl.clp.policies import new_policy, release
from mopl.clp.prompts import PromptSource
from mopl.experiments.run_directory import RunInterrupted
from mopl.rewards.scale import RewardScale, RunningScale
from mopl.training import TrainingInterrupted, make_accelerator, train
from mopl.training import loop as training_loop
from mopl.training.sharded import CopiedModel

COMPARED, RUNNING = ("attention",), "lora-mixture"  # a running scale depends on who rolls out with whom
STAGES = {"attention": 2, "lora-mixture, fixed scale": 3}  # of DeepSpeed, whose settings are files in PLACE


# What is sampled depends on the number of parts, so processes are compared at as many parts: four.
training_loop._FREE_SETTINGS = (*training_loop._FREE_SETTINGS, "accumulation")


def fit(scope, accelerator, place: Path, *, stop=None, resume=False, collapse=False):
    """Return what is trained after two rollouts of two steps each, all answers drawn by (seed, step, part)."""
    base = language_model()
    config = settings(
        scope=scope.partition(",")[0],
        epochs=2,
        baseline="value",
        kl_estimator="exact",
        clip=0.2,
        steps=4,
        accumulation=4 // accelerator.num_processes,
    )
    policy = new_policy(base, config, ("first", "second"), "clp")
    if scope == RUNNING:
        policy.running = RunningScale(RewardScale(torch.zeros(2), torch.ones(2), torch.full((2,), 4.0)))
    loss = make_loss(base, config, place)
    source = PromptSource(parts(config)["train"], config, 2, trade_offs=2)
    sgd = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    inner = loss

    def loss(model, batch, step):
        if step == stop and accelerator.is_main_process:
            os.kill(os.getpid(), 15)
        found = inner(model, batch, step)
        if collapse and step == 1 and not accelerator.is_main_process:
            raise PolicyCollapsed("seen by one process")
        return found

    before = torch.cat([p.detach().flatten().clone() for p in policy.parameters() if p.requires_grad])
    options = {"accelerator": accelerator, "optimizer": sgd, "directory": place / "checkpoints", "resume": resume}
    try:
        train(policy, source, loss, config.training(), **options)
    except TrainingInterrupted as stopped:
        assert stopped.step == stop + 1
    except PolicyCollapsed:  # a gathering would take what the other process sends for something else
        assert torch.equal(torch.cat([p.detach().flatten() for p in policy.parameters() if p.requires_grad]), before)
        raise
    found = torch.cat([p.detach().flatten() for p in policy.parameters() if p.requires_grad])
    assert float((found - before).abs().max()) > 1e-4  # something was learned
    release(policy)
    return found if policy.running is None else torch.cat([found, policy.running.mean, policy.running.deviation])


def rollouts(accelerator, place: Path, scope: str) -> None:
    here = place / scope
    found = fit(scope, accelerator, here / "whole")
    fit(scope, accelerator, here / "parts", stop=0 if scope == RUNNING else 1)  # in a rollout, or at its end
    if accelerator.is_main_process:
        shutil.copytree(here / "parts", here / "stopped")
    resumed = fit(scope, accelerator, here / "parts", resume=True)
    assert torch.equal(resumed, found), "a resumed training has the bits of one that was never stopped"
    if scope != RUNNING:
        taken = fit(scope, accelerator, here / "of-one", resume=True)
        torch.testing.assert_close(taken, found, rtol=0, atol=1e-6)
    if accelerator.is_main_process:
        torch.save(found, place / f"{scope}-2.pt")


def guarded(accelerator, place: Path, scope: str) -> None:
    try:
        fit(scope, accelerator, place / "collapsed", collapse=True)
    except PolicyCollapsed:
        print("one process was stopped by its guard", flush=True)  # its end is the end of the other's
    except RuntimeError as error:
        assert accelerator.is_main_process and "onnection" in str(error), error


def command(arguments: list[str]) -> None:
    from mopl.cli import main as mopl

    made = []
    before = CopiedModel.__init__

    def counted(self, *given):
        made.append(None)
        before(self, *given)

    CopiedModel.__init__ = counted
    assert mopl(arguments) == 0
    assert len(made) == 2, "one for each expert"


def student(place: Path) -> AlignConfig:
    """Settings of a student of two teachers that learns from its own answers in every second step or so."""
    return AlignConfig(
        model=str(place / "model"), data=str(place / "data.jsonl"), steps=4, lists_per_batch=4, points=2, bootstrap=0,
        samples=0, device="cpu", checkpoint_every=1, max_length=32, method="distill", conditioning="lora-mixture",
        teachers=(str(place / "one"), str(place / "other")), lora_rank=2, learning_rate=0.02, distill_on_policy=0.7,
        distill_tokens=5,
    )  # fmt: skip


def quiet(text: str) -> None:
    pass


def distil(accelerator, place: Path) -> None:
    config, divergence, seen = student(place), Distilling.divergence, []

    def stop_in_the_second_step(self, *args, **options):
        seen.append(None)
        if len(seen) == 2 and accelerator.is_main_process:
            os.kill(os.getpid(), 15)
        return divergence(self, *args, **options)

    Distilling.divergence = stop_in_the_second_step
    try:
        align(config, place / "two", say=quiet)
        raise AssertionError("the training was not stopped")
    except RunInterrupted:
        pass
    if accelerator.is_main_process:
        shutil.copytree(place / "two", place / "stopped")
    align(config, place / "two", resume=True, say=quiet)


def main(place: Path, arguments: list[str]) -> None:
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if zero:
        without_compiled_ops()
    gc.freeze()  # what was imported is no garbage, which is collected at the end of every training
    accelerator = make_accelerator(cpu=True)
    assert accelerator.num_processes == 2
    if arguments:
        return command(arguments[1:])
    distil(accelerator, place)
    for scope in STAGES if zero else (*COMPARED, RUNNING):
        if zero:
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(place / f"zero{STAGES[scope]}.json")
        rollouts(accelerator, place, scope)
    guarded(accelerator, place, scope if zero else COMPARED[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
