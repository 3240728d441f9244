"""Run by tests/training/test_sharded_training.py on two processes, `accelerate launch --use_fsdp --fsdp_version 2`."""

import dataclasses
import gc
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / room) for room in ("alignment", "")]

import torch
from ending import leave
from test_training import DENSE, NAMES, conditioned, scalarized_loss, settings, source, trained
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mopl.language_models import models
from mopl.training import RunLog, TrainingInterrupted, make_accelerator, train
from mopl.training.optimizer import adamw


def fit(base: nn.Module, accelerator, *, sgd=False, recompute=False, stop=None, check=None, **options) -> Tensor:
    """Train adapters and prompt for three steps, the reference in the step, two parts a process, gradients clipped."""
    config = settings(accumulation=2, learning_rate=1e-2)
    model = conditioned(base, config)
    inner = scalarized_loss(DENSE, NAMES)

    def loss(module, batch, step):
        if step == stop and accelerator.is_main_process:
            os.kill(os.getpid(), 15)
        if check is not None:
            check(module)
        return inner(module, batch, step)

    optimizer = adamw(model, config.training(3), torch.device("cpu"), {"hyper_prompt.": config.prompt_learning_rate})
    if sgd:  # Adam hides a gradient of the wrong size
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9)
    training = dataclasses.replace(config.training(3), schedule="constant", warmup=0, gradient_clip=0.2, log_every=1)
    if recompute:
        models.recompute_activations(base, True)
    try:
        train(
            model, source(), loss, training, accelerator=accelerator, optimizer=optimizer, save_frozen=False, **options
        )
        return trained(model)
    finally:
        models.recompute_activations(base, False)
        models.release(model)


def is_sharded(model: nn.Module) -> None:
    """Check what a loss is given: each process holds half of every parameter, of the frozen ones too."""
    assert all(isinstance(p, DTensor) for p in model.model.base_model.model.model.layers.parameters())
    assert all(2 * p.to_local().numel() == p.numel() for p in model.causal_lm.model.layers.parameters())


def main(place: Path, arguments: list[str]) -> None:
    gc.freeze()  # what was imported is no garbage, which is collected at the end of every training
    accelerator = make_accelerator(cpu=True)
    assert accelerator.num_processes == 2
    base = models.load_causal_lm(str(place / "model"))
    before = {name: value.clone() for name, value in base.state_dict().items()}

    log = RunLog(place, enabled=accelerator.is_main_process)
    whole = fit(base, accelerator, check=is_sharded, log=log)
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    both = accelerator.gather(whole[None])
    assert torch.equal(both[0], both[1]), "every process gets the whole model"

    folder = place / "checkpoints"
    try:
        fit(base, accelerator, directory=folder, stop=1)
        raise AssertionError("the training was not stopped")
    except TrainingInterrupted as stopped:
        assert stopped.step == 2
    if accelerator.is_main_process:
        shutil.copytree(folder, place / "stopped")
    resumed = fit(base, accelerator, directory=folder, resume=True)
    assert torch.equal(resumed, whole), "a resumed training has the bits of one that was never stopped"

    found = {
        "adamw": whole,
        "sgd": fit(base, accelerator, sgd=True),
        "recompute": fit(base, accelerator, sgd=True, recompute=True),
    }
    if accelerator.is_main_process:
        torch.save(found, place / "sharded.pt")
    try:
        make_accelerator(cpu=True, sharding=False)
        raise AssertionError("sharding was not refused")
    except NotImplementedError as error:
        assert "launch it with DDP" in str(error)

    from mopl.cli import main as mopl

    assert mopl(arguments) == 0
    if accelerator.is_main_process:
        print("sharded trainings are done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
