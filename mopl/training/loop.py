"""One thin training loop on accelerate, for rankers and language models alike.

A step draws the batch of that step from the source, one part a process and accumulation step, adds up the gradient of
the mean loss over the whole batch, clips it and updates. Three properties hold and are tested:

* the update does not depend on how a batch is split into processes and accumulation steps (up to rounding);
* the step number is the whole random state: a resumed training continues bit for bit;
* what is on the disk is complete: a crash at any point leaves the last checkpoint intact.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mopl._arguments import check_choice
from mopl._bounds import check_bounds
from mopl._counted import counted
from mopl._restoring import generators_kept, modes_kept
from mopl._terminal import progress
from mopl.training.accumulation import LossFunction, accumulate, reduced
from mopl.training.batches import BatchSource
from mopl.training.checkpoint import Checkpoint, CheckpointFolder
from mopl.training.logs import RunLog
from mopl.training.optimizer import adamw
from mopl.training.parallel import make_accelerator, prepare
from mopl.training.selection import Selection, continue_selection

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")

# Settings that change what is written but not what is computed: a resumed training may have others.
_FREE_SETTINGS = ("log_every", "checkpoint_every", "keep_checkpoints")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training.

    Args:
        steps: Number of updates.
        learning_rate: Learning rate of AdamW after the warm-up.
        weight_decay: Decoupled weight decay.
        warmup: Steps in which the learning rate rises linearly from 0.
        schedule: Course of the learning rate after the warm-up: `"constant"`, `"linear"` or `"cosine"` down to 0.
        gradient_clip: Largest norm of the gradient, or None.
        accumulation: Parts of a batch that one process works through before it updates.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"` (autocast of the model's forward pass).
        seed: Seed of everything random.
        log_every: Steps from one line of the log to the next.
        checkpoint_every: Steps from one checkpoint to the next; 0 writes one at the end only.
        keep_checkpoints: How many of the newest checkpoints stay.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    gradient_clip: float | None = 1.0
    accumulation: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        check_bounds(self)
        check_choice(self.schedule, SCHEDULES, "schedule")
        check_choice(self.mixed_precision, PRECISIONS, "mixed_precision")
        for name, lowest in (("steps", 0), ("warmup", 0), ("accumulation", 1), ("log_every", 1),
                             ("checkpoint_every", 0), ("keep_checkpoints", 1), ("seed", 0)):  # fmt: skip
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least {lowest}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate} but must be a positive number")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip is {self.gradient_clip} but must be positive, or None for no clipping")

    def rate_factor(self, step: int) -> float:
        """Return what the learning rate is multiplied by at `step` (from 0)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        if self.schedule == "linear":
            return 1.0 - done
        return 0.5 * (1.0 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1.0


@dataclass
class TrainingResult:
    """What a training leaves behind besides the model.

    Attributes:
        steps: Steps done, those before a resumption included.
        seconds: Seconds over all parts of the training.
        last: The last log record: stage, step, loss, what the loss function logged, and more; empty where this call
            had no step to do.
        kept: The step whose model a `Selection` has left; None without one.
    """

    steps: int
    seconds: float
    last: dict[str, Any] = field(default_factory=dict)
    kept: int | None = None


class TrainingInterrupted(RuntimeError):
    """A signal stopped the training after a complete step; a checkpoint was written if there is a folder for it.

    Attributes:
        stage: Name of the training.
        step: Steps done.
        checkpoint: Folder of the checkpoint; None where the training has no folder.
    """

    def __init__(self, stage: str, step: int, checkpoint: Path | None) -> None:
        kept = f"; checkpoint {checkpoint}" if checkpoint else "; no checkpoint folder was given"
        super().__init__(f"training {stage!r} was stopped after step {step}{kept}")
        self.stage, self.step, self.checkpoint = stage, step, checkpoint


class TrainingDiverged(FloatingPointError):
    """The loss or its gradient is no longer a number."""


@generators_kept()
def train(
    model: nn.Module,
    source: BatchSource,
    loss: LossFunction,
    config: TrainingConfig,
    *,
    accelerator: Any = None,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
    log: RunLog | None = None,
    stage: str = "train",
    optimizer: torch.optim.Optimizer | None = None,
    save_frozen: bool = True,
    selection: Selection | None = None,
) -> TrainingResult:
    """Train `model` in place.

    Args:
        model: The model; it is left whole on the device of the training, in the mode (train or eval) it had. Under
            FSDP2 a sharded copy is trained, and an error that does not strike every process leaves the model as it was.
        source: Gives a step's batch in parts; see `BatchSource`.
        loss: `loss(model, batch, step) -> (scalar, logs)`: the mean over the lists of the batch it is given, and
            numbers or scalar tensors to log. It must call the `model` it is given (the wrapped or sharded one).
        config: Settings.
        accelerator: accelerate's `Accelerator`; one from `make_accelerator` by default.
        directory: Folder of the checkpoints, or None for none.
        resume: Continue from the newest checkpoint in `directory`, if there is one.
        log: Where log records go.
        stage: Name of this training in the log and in messages.
        optimizer: AdamW on the trainable parameters by default. The schedule multiplies its own learning rates.
        save_frozen: Whether checkpoints hold parameters that are not trained, too; False for a small adapter on a
            large model that the caller has anyway.
        selection: Chooses the best step by validation data and may end the training early; its model is left then.

    Returns:
        Steps, seconds and the last log record.

    Raises:
        FileExistsError: If there are checkpoints and `resume` is false.
        ValueError: If the checkpoint was made with other settings, or a batch has fewer lists than parts.
        TrainingInterrupted: After Ctrl-C or SIGTERM, once the step is complete and its checkpoint written.
        TrainingDiverged: If the loss or its gradient is NaN or infinite; nothing was updated with it.
    """
    accelerator = accelerator or make_accelerator(config.mixed_precision)
    if accelerator.mixed_precision != config.mixed_precision:
        raise ValueError(
            f"mixed_precision is {config.mixed_precision!r} but the accelerator was made with "
            f"{accelerator.mixed_precision!r}; pass make_accelerator({config.mixed_precision!r})"
        )
    parts = accelerator.num_processes * config.accumulation
    if parts > source.batch_size:
        raise ValueError(
            f"a batch of {counted(source.batch_size, 'list')} cannot be split into "
            f"{counted(accelerator.num_processes, 'process')} x {counted(config.accumulation, 'accumulation step')}; "
            "take a larger batch_size or a smaller accumulation"
        )
    folder = None
    if directory is not None:
        folder = CheckpointFolder(directory, config.keep_checkpoints, save_frozen=save_frozen)
    checkpoint = _checkpoint_to_resume(folder, resume, config, stage)
    updater = adamw(model, config, accelerator.device) if optimizer is None else optimizer
    rates = [group["lr"] for group in updater.param_groups]
    states: dict[str, Any] = {}
    if checkpoint is not None:
        checkpoint.load_model(model)
        states = checkpoint.load_optimizer()
        continue_selection(selection, states, checkpoint.path)
        checkpoint.check_optimizer(states, model, updater.param_groups, scaler=accelerator.scaler is not None)
    prepared = prepare(accelerator, model, updater)
    stepper = prepared.optimizer
    start, spent = 0, 0.0
    if checkpoint is not None:
        start, spent = checkpoint.step, checkpoint.state()["seconds"]
        try:
            prepared.load_optimizer(states["optimizer"])
        except BaseException:
            prepared.finish(gather=False)
            raise
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(states["scaler"])
    if accelerator.is_main_process and folder is not None:
        folder.remove_leftovers()
    if log is not None:
        log.rewind(stage, start)

    result = TrainingResult(start, spent)
    began = time.perf_counter()

    def save(step: int) -> Path | None:
        """Write the checkpoint after `step` steps, on the main process; every process waits until it is there."""
        if folder is None:
            return None
        plain, optimizer_state = prepared.whole()
        if accelerator.is_main_process:
            states = {"optimizer": optimizer_state}
            if selection is not None:
                states["selection"] = selection.state_dict()
            if accelerator.scaler is not None:
                states["scaler"] = accelerator.scaler.state_dict()
            seconds = spent + time.perf_counter() - began
            saved = {"stage": stage, "seconds": seconds, "config": asdict(config)}
            folder.save(step, plain, states, saved)
        accelerator.wait_for_everyone()
        return folder.path / f"step-{step:06d}"

    together = False  # whether every process comes to the end of the loop
    try:
        watched = progress(stage, config.steps, "steps", start=start, show=accelerator.is_main_process)
        with modes_kept(model), _StopSignals() as stop, watched as shown:
            prepared.model.train()
            for step in range(start, config.steps):
                if selection is not None and selection.stopped:
                    break  # the checkpoint was written after the last step
                for group, rate in zip(stepper.param_groups, rates, strict=True):
                    group["lr"] = rate * config.rate_factor(step)
                value, logs = accumulate(accelerator, prepared, source, loss, config, step)
                limit = math.inf if config.gradient_clip is None else config.gradient_clip
                norm = prepared.clip(limit)
                # One reduction and one read a step: every process learns the same loss and the same wish to stop.
                told = torch.stack([value, torch.as_tensor(float(stop.asked), device=value.device)])
                told = [*accelerator.reduce(told, "sum").tolist(), norm]
                together = True  # in what comes of these figures
                _check_finite(told[0], told[2], config, stage, step, folder)
                together = False
                stepper.step()
                stepper.zero_grad()
                result.steps = done = step + 1
                chosen = selection is not None and selection.consider(done, config.steps, prepared, accelerator)
                ended = done == config.steps or (selection is not None and selection.stopped)
                if done % config.log_every == 0 or ended or chosen:
                    record = {"stage": stage, "step": done, "loss": told[0]}
                    record |= {name: float(v) for name, v in zip(logs, reduced(accelerator, logs), strict=True)}
                    record |= {"learning_rate": stepper.param_groups[0]["lr"], "gradient_norm": told[2]}
                    record |= {"validation": selection.value} if selection is not None and chosen else {}
                    record["seconds"] = round(spent + time.perf_counter() - began, 3)
                    result.last = record
                    if log is not None:
                        log.write(record)
                shown.update(1, loss=told[0])
                due = config.checkpoint_every and done % config.checkpoint_every == 0
                path = save(done) if due or told[1] or ended else None
                if told[1] or (stop.asked and ended):
                    raise TrainingInterrupted(stage, done, path)
        together = True
    except TrainingInterrupted:
        together = True
        raise
    finally:
        prepared.finish(gather=together)
        # accelerate keeps whatever it prepared. Its own free_memory() would also run the garbage collector, which takes
        # longer than a small model's hundred steps.
        for kept in ("_models", "_optimizers"):
            getattr(accelerator, kept, []).clear()
    if selection is not None:
        result.kept = selection.restore(model)
    result.seconds = spent + time.perf_counter() - began
    return result


def _checkpoint_to_resume(
    folder: CheckpointFolder | None, resume: bool, config: TrainingConfig, stage: str
) -> Checkpoint | None:
    checkpoint = folder.latest() if folder is not None else None
    if checkpoint is None:
        return None
    if not resume:
        raise FileExistsError(
            f"{checkpoint.path.parent} holds checkpoints of another training (up to step {checkpoint.step}); "
            "pass resume=True to continue it, or another directory"
        )
    then, now = checkpoint.state()["config"], asdict(config)
    differ = [name for name in now if then.get(name) != now[name] and name not in _FREE_SETTINGS]
    changed = [f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in differ]
    if changed:
        raise ValueError(
            f"the checkpoint {checkpoint.path} of {stage!r} was made with other settings ({'; '.join(changed)}); "
            "resume with the settings it was made with, or start a new run"
        )
    return checkpoint


def _check_finite(
    value: float, norm: float, config: TrainingConfig, stage: str, step: int, folder: CheckpointFolder | None
) -> None:
    # With fp16 a gradient that overflows is ordinary: the gradient scaler skips the update and lowers its scale.
    if math.isfinite(value) and (math.isfinite(norm) or config.mixed_precision == "fp16"):
        return
    what = f"the loss is {value}" if not math.isfinite(value) else f"the gradient's norm is {norm}"
    kept = folder.latest() if folder is not None else None
    clip = (
        "set gradient_clip" if config.gradient_clip is None else f"lower gradient_clip (now {config.gradient_clip:g})"
    )
    raise TrainingDiverged(
        f"{what} at step {step + 1} of {stage!r}: lower learning_rate (now {config.learning_rate:g}), {clip}, lengthen "
        f"warmup (now {config.warmup}), or normalise the features; the model was not updated with it, and "
        + (f"the last checkpoint is intact: {kept.path}" if kept else "no checkpoint had been written yet")
    )


class _StopSignals:
    """Turns SIGINT and SIGTERM into a wish to stop after the step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, _frame: object) -> None:
        # accelerate's launcher answers Ctrl-C with a SIGTERM to each process: only Ctrl-C itself counts as the second.
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
