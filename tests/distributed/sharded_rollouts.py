"""Run by tests/clp/test_sharded_rollouts.py on gloo processes, whole or sharded: CLP with SGD, stopped and resumed."""

import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / room) for room in ("clp", "")]

import shutil

import torch
from ending import leave
from test_training import language_model, make_loss, parts, settings

from mopl.clp.policies import new_policy, release
from mopl.clp.prompts import PromptSource
from mopl.training import TrainingInterrupted, make_accelerator, train

SCOPES = ("attention", "lora-mixture", "hyper-prompt")


def fit(scope, accelerator, place: Path, *, stop=None, resume=False):
    """Return trained parameters after two rollouts of two steps each, all answers drawn by (seed, step, part)."""
    base = language_model()
    config = settings(
        scope=scope,
        epochs=2,
        baseline="value",
        kl_estimator="exact",
        clip=0.2,
        steps=4,
        accumulation=4 // accelerator.num_processes,
    )
    policy = new_policy(base, config, ("first", "second"), "clp")
    loss = make_loss(base, config, place)
    source = PromptSource(parts(config)["train"], config, 2, trade_offs=2)
    sgd = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    if stop is not None:
        inner = loss

        def loss(model, batch, step):
            if step == stop and accelerator.is_main_process:
                os.kill(os.getpid(), 15)
            return inner(model, batch, step)

    before = torch.cat([p.detach().flatten().clone() for p in policy.parameters() if p.requires_grad])
    options = {"accelerator": accelerator, "optimizer": sgd, "directory": place / "checkpoints", "resume": resume}
    try:
        train(policy, source, loss, config.training(), **options)
    except TrainingInterrupted as stopped:
        assert stopped.step == stop + 1
    found = torch.cat([p.detach().flatten() for p in policy.parameters() if p.requires_grad])
    assert float((found - before).abs().max()) > 1e-4  # something was learned
    release(policy)
    return found


if __name__ == "__main__":
    accelerator = make_accelerator(cpu=True)
    for scope in SCOPES:
        place = Path(sys.argv[1]) / scope
        found = fit(scope, accelerator, place / "whole")
        fit(scope, accelerator, place / "parts", stop=0)  # in the middle of a rollout
        if accelerator.is_main_process:
            shutil.copytree(place / "parts", place / "stopped")
        resumed = fit(scope, accelerator, place / "parts", resume=True)
        assert torch.equal(resumed, found), "a resumed training has the bits of one that was never stopped"
        if accelerator.is_main_process:
            torch.save(found, Path(sys.argv[1]) / f"{scope}-{accelerator.num_processes}.pt")
    leave()
