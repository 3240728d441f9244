"""Run by tests/training/test_deepspeed_training.py on several processes, as `accelerate launch --use_deepspeed` would.

deepspeed_training.py PLACE [STAGE ...]; the settings of DeepSpeed are in PLACE/zero2.json and PLACE/zero3.json.
"""

import contextlib
import os
import shutil
import sys
import types
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / room) for room in ("alignment", "")]

import torch
from accelerate.state import AcceleratorState
from deepspeed_site import without_compiled_ops
from ending import leave
from sharded_training import fit
from small_training import Source, config, network, parameters, squared_error

from mopl.language_models import models
from mopl.training import RunLog, TrainingDiverged, TrainingInterrupted, make_accelerator, train
from mopl.training import loop as training_loop
from mopl.training.parallel import whole_model
from mopl.training.selection import Selection

ASKED = "ACCELERATE_USE_DEEPSPEED"
KINDS = ("zero2", "zero3", "fsdp2", "ddp")
HELD: list[torch.UntypedStorage] = []  # by shares of the last training with `is_cut`

# Other numbers of processes divide the same batch by another accumulation.
training_loop._FREE_SETTINGS = (*training_loop._FREE_SETTINGS, "accumulation")


@contextlib.contextmanager
def launched(place: Path, kind: str):
    """Do as if the launcher had been told other things."""
    os.environ[ASKED] = str(kind.startswith("zero")).lower()
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(place / f"{kind}.json")
    os.environ["ACCELERATE_USE_FSDP"] = str(kind == "fsdp2").lower()
    os.environ["FSDP_VERSION"] = "2"
    yield
    os.environ["ACCELERATE_USE_FSDP"] = "false"


def full(
    accelerator, *, sgd=True, steps=6, poison=None, stop=None, check=None, selection=None, **options
) -> torch.Tensor:
    """Train all of a small network: what its parameters are after some steps of three parts, clipped, a schedule."""
    model = network()
    optimizer = None
    if sgd:
        groups = [{"params": [p for n, p in model.named_parameters() if n.startswith(name)], "lr": rate}
                  for name, rate in (("0", 0.1), ("3", 0.05))]  # fmt: skip
        optimizer = torch.optim.SGD(groups, momentum=0.9)
    settings = config(
        steps=steps, accumulation=8 // accelerator.num_processes // 2, gradient_clip=0.3, schedule="cosine", warmup=2,
        checkpoint_every=3, log_every=1, mixed_precision=accelerator.mixed_precision,
    )  # fmt: skip

    def loss(module, batch, step):
        if check is not None:
            check(module)
        if step == stop and accelerator.is_main_process:
            os.kill(os.getpid(), 15)
        return squared_error(module, batch, step)

    before = [p.detach().clone() for p in model.parameters()]
    try:
        train(model, Source(poison_at=poison), loss, settings, accelerator=accelerator, optimizer=optimizer,
              selection=selection, **options)  # fmt: skip
    except TrainingInterrupted as stopped:
        assert stopped.step == stop + 1
        return parameters(model)
    except TrainingDiverged as error:
        assert "nan" in str(error)
        return parameters(model)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(type(p) is torch.nn.Parameter and p.numel() for p in model.parameters())
    found = parameters(model)
    if optimizer is not None:  # which the caller may go on with
        model(torch.ones(1, 5)).sum().backward()
        optimizer.step()
        assert not torch.equal(parameters(model), found)
    return found


class Branches(torch.nn.Module):
    """Two layers, one of which may be left out, behind what keeps a running mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.norm = torch.nn.BatchNorm1d(5, affine=False)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 1) for _ in range(2))

    def forward(self, x, used):
        return sum(self.layers[number](self.norm(x)) for number in used)


def branches(accelerator, used, model=None) -> torch.Tensor:
    """Train what may leave out a layer in a part of a batch: `used(step, part)` are those that are not."""
    model, count = model or Branches(), 0
    settings = config(
        steps=3, accumulation=4 // accelerator.num_processes, gradient_clip=0.3,
        mixed_precision=accelerator.mixed_precision,
    )  # fmt: skip

    def loss(module, batch, step):
        nonlocal count
        part = accelerator.process_index * settings.accumulation + count % settings.accumulation
        count += 1
        return (module(batch["x"], used(step, part)) - batch["y"]).square().mean(), {}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    try:
        train(model, Source(), loss, settings, accelerator=accelerator, optimizer=optimizer)
    finally:
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == before
        assert not isinstance(torch.nn.functional.linear, types.FunctionType), "DeepSpeed's is gone"
    return torch.cat([parameters(model), model.norm.running_mean])


def some_parts(step, part):
    """Leave out a layer in the first part of each process."""
    return (0, 1) if part % 2 else (0,)


def refused(accelerator) -> None:
    """Leave out a layer in a step, then in a process; have a scalar among the parameters."""
    model = Branches()
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    cases = (
        (lambda step, part: (0, 1) if step == 0 else (0,), None, "does not depend on 2 trained parameters, layers.1.w"),
        (lambda step, part: (part // 2,), None, r"layers.0.weight has a gradient in 1 of 2 processes"),
        (some_parts, model, r"scale has the shape ()"),
    )
    for used, given, message in cases:
        fails(accelerator, message, used, given)


def without_an_engine(accelerator) -> None:
    """Where DeepSpeed cannot make its engine, model and optimizer are the caller's again, and can be trained."""
    import deepspeed  # which the test that imports this module may lack

    model, made = Branches(), deepspeed.initialize
    before = parameters(model)

    def initialize(**given):
        raise RuntimeError(f"no engine for {type(given['model']).__name__}")

    deepspeed.initialize = initialize
    try:
        fails(accelerator, "no engine for Branches", some_parts, model)
    finally:
        deepspeed.initialize = made
    assert torch.equal(parameters(model), before) and all(p.numel() for p in model.parameters())
    assert torch.equal(branches(accelerator, some_parts, model), branches(accelerator, some_parts))


def fails(accelerator, message, *arguments) -> None:
    try:
        branches(accelerator, *arguments)
    except (RuntimeError, ValueError) as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"it was trained, but: {message}")


def is_cut(model) -> None:
    """Check what a loss is given under stage 3, and that the whole model is there to generate with."""
    assert type(model).__name__ == "DeepSpeedEngine"
    assert all(p.numel() == 0 for p in model.parameters()), "frozen parameters too"
    parts = (*model.optimizer.fp32_partitioned_groups_flat, *(p.ds_tensor for p in model.parameters()))
    HELD[:] = [part.untyped_storage() for part in parts]
    with whole_model(model) as whole:
        assert all(p.numel() for p in whole.parameters())


def same(accelerator, value: torch.Tensor) -> torch.Tensor:
    everywhere = accelerator.gather(value[None])
    assert all(torch.equal(everywhere[0], other) for other in everywhere), "every process gets the whole model"
    return value


def validated(model) -> float:
    return float(model(Source().x).square().mean())


def cross(accelerator, place: Path) -> dict[str, torch.Tensor]:
    """Stop a training of a kind, in shares or not, and go on with it in itself and in other kinds."""
    found, count = {}, accelerator.num_processes
    for kind in KINDS if count == 2 else KINDS[:2]:
        with launched(place, kind):
            full(accelerator, sgd=False, stop=2, directory=place / "stopped" / f"{kind}-{count}")
    for before in sorted((place / "stopped").iterdir()):
        was = before.name.partition("-")[0]
        kinds = {"zero2": ("zero2",), "zero3": KINDS if count == 2 else ("zero3",), "fsdp2": ("zero3",)}
        for kind in kinds.get(was, ("zero2", "zero3")):
            copy = place / "continued" / f"{before.name}-by-{kind}-{count}"
            if accelerator.is_main_process:
                shutil.copytree(before, copy)
            accelerator.wait_for_everyone()
            with launched(place, kind):
                found[copy.name] = full(accelerator, sgd=False, directory=copy, resume=True)
    return found


def half(place: Path) -> dict[str, torch.Tensor]:
    """Train with bf16 autocast."""
    AcceleratorState._reset_state()
    with launched(place, "zero3"):
        accelerator, found = make_accelerator("bf16", cpu=True), {}
    for kind in KINDS:
        with launched(place, kind):
            found[kind] = full(accelerator)
    return found


def main(place: Path, stages: list[str]) -> None:
    without_compiled_ops()
    accelerator = make_accelerator(cpu=True)
    count = accelerator.num_processes
    base = models.load_causal_lm(str(place / "model")) if count == 2 else None
    for stage in stages:
        with launched(place, stage):
            here = place / f"{stage}-{count}"
            here.mkdir(exist_ok=True)
            log = RunLog(here, enabled=accelerator.is_main_process)
            found = {"sgd": same(accelerator, full(accelerator, log=log, check=is_cut if stage == "zero3" else None))}
            assert bool(HELD) == (stage == "zero3")
            assert not any(part.nbytes() for part in HELD), "shares are freed"
            found["adamw"] = same(accelerator, full(accelerator, sgd=False, directory=here / "whole"))
            if base is not None:
                full(accelerator, sgd=False, poison=2, directory=here / "diverged")
                found["branches"] = same(accelerator, branches(accelerator, some_parts))[:-5]
                refused(accelerator)
                without_an_engine(accelerator)
                found["selected"] = full(accelerator, sgd=False, selection=Selection(validated, every=2, patience=1))
            if base is not None and stage == "zero3":
                before = {name: value.clone() for name, value in base.state_dict().items()}
                found["adapters"] = fit(base, accelerator, sgd=True)
                found["recompute"] = fit(base, accelerator, sgd=True, recompute=True)
                after = base.state_dict()
                assert before.keys() == after.keys()
                assert all(torch.equal(before[name], after[name]) for name in before)
                found["stopped"] = fit(base, accelerator)
                try:
                    fit(base, accelerator, directory=here / "parts", stop=1)
                    raise AssertionError("the training was not stopped")
                except TrainingInterrupted as stopped:
                    assert stopped.step == 2
                if accelerator.is_main_process:
                    shutil.copytree(here / "parts", here / "stopped")
                resumed = fit(base, accelerator, directory=here / "parts", resume=True)
                assert torch.equal(resumed, found["stopped"]), "bits of one that was never stopped"
            if accelerator.is_main_process:
                torch.save(found, here / "found.pt")
    crossed, rounded = cross(accelerator, place), half(place) if count == 2 else {}
    if accelerator.is_main_process:
        torch.save(crossed, place / f"crossed-{count}.pt")
        torch.save(rounded, place / f"half-{count}.pt")
        print("trainings under DeepSpeed are done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["zero2", "zero3"])
    leave()
