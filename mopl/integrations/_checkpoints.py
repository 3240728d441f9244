"""Checkpoints of a `transformers.Trainer` whose model may be a `WeightedModel`, and the reference that they name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mopl._extras import require

require("transformers", "accelerate", what="mopl.integrations.transformers")
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from mopl._files import write_file
from mopl._sharded import is_sharded
from mopl.conditioning.saved_models import CONFIG_FILE
from mopl.conditioning.weighted import WeightedModel
from mopl.integrations._sharding import complete_zero_settings
from mopl.language_models.adapter_reference import OwnReference, check_same_reference, write_reference
from mopl.training.zero_gradients import CheckedSteps


class CheckedTrainer(Trainer):
    """A `Trainer` that does not run a training of nothing, and checks what DeepSpeed is told and what it updates."""

    model: Any
    deepspeed: Any  # the engine
    _steps: CheckedSteps | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, as `Trainer` does it.

        Raises:
            ValueError: If a setting of DeepSpeed's is not what it can be, or the processes of a launcher would not
                know of one another.
            NotImplementedError: If one does not work here.
        """
        started = int(os.environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in os.environ else 1
        if started > 1 and self.args.world_size == 1:
            raise ValueError(
                f"this is one of {started} processes, but transformers takes each of them for the only one, because "
                "there is no GPU (or Apple's alone) and use_cpu is False; pass use_cpu=True"
            )
        super().create_accelerator_and_postprocess()
        complete_zero_settings(self.accelerator, self.args)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `Trainer` does it.

        Raises:
            ValueError: If no parameter of the model is trained, or DeepSpeed has prepared it for evaluation alone or
                another training.
            RuntimeError: If DeepSpeed would update what the loss of a step, or of a process, does not depend on.
        """
        engine = getattr(self, "deepspeed", None)
        if engine is not None and not hasattr(engine.optimizer, "step"):
            raise ValueError(
                "evaluate() or predict() came before train(), for which DeepSpeed made an engine without an optimizer; "
                "pass eval_on_start=True in its place, or make another trainer for the training"
            )
        if engine is not None and self.model_wrapped is engine and self.model_init is None:
            raise ValueError(
                "this trainer has trained before, and under DeepSpeed transformers trains once with each; make another "
                "trainer, of another model or of what save_model() has written"
            )
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "no parameter of the model requires a gradient, so nothing would be trained; load adapters with "
                "is_trainable=True (PEFT freezes them otherwise), or call model.requires_grad_(True)"
            )
        try:
            return super().train(*args, **kwargs)
        finally:
            self._check_steps_of(None)

    def _check_steps_of(self, engine: Any) -> None:
        if self._steps is not None and self._steps.engine is not engine:
            self._steps.clear()
            self._steps = None
        if engine is not None and self._steps is None:
            self._steps = CheckedSteps(engine, self.accelerator)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Add to the gradients, as `Trainer` does it; under DeepSpeed the last part of a step updates with them."""
        self._check_steps_of(getattr(self, "deepspeed", None))
        return super().training_step(*args, **kwargs)


class WeightedCheckpoints(CheckedTrainer):
    """A `Trainer` that writes and reads a `WeightedModel` by its own files; stands in front of any other trainer.

    An engine of DeepSpeed writes and reads its own beside them: what is trained, in float32, and the optimizer's state.
    """

    model_wrapped: Any
    own: OwnReference | None = None  # the reference that the policy carries in itself, if no other model is it
    reference_is: str | None = None  # what tells it from others; None where it is a model that the user passed

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `Trainer` does it.

        Raises:
            ValueError: As `CheckedTrainer.train`, and if a checkpoint is of another reference.
        """
        with self._without_frozen():
            return super().train(*args, **kwargs)

    @contextlib.contextmanager
    def _without_frozen(self) -> Iterator[None]:
        """Let files of DeepSpeed lack what is not trained, inside a `with` block."""
        model = self.model
        if not self.is_deepspeed_enabled or not isinstance(model, WeightedModel):
            yield
            return

        def leave_out(_: Any, keys: Any) -> None:
            frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
            keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]

        handle = model.register_load_state_dict_post_hook(leave_out)
        try:
            yield
        finally:
            handle.remove()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            write_reference(self._checkpoint_folder(trial), self.reference_is)

    def _checkpoint_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, as `Trainer` does it; a `WeightedModel` whole, in its own files, also if it is sharded.

        Args:
            output_dir: The folder; by default that of the arguments.
            _internal_call: As in `Trainer`.
        """
        if not isinstance(self.model, WeightedModel) or not (self.is_deepspeed_enabled or is_sharded(self.model)):
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir)  # in every process, whatever kind of state accelerate was asked for
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        adapter = None if self.own is None else self.own.adapter
        if not isinstance(self.model, WeightedModel) and adapter is None:
            return super()._save(output_dir, state_dict)
        folder = output_dir if output_dir is not None else self.args.output_dir
        assert folder is not None
        writes = self.args.should_save
        if isinstance(self.model, WeightedModel):
            if writes or is_sharded(self.model):
                self.model.save_pretrained(folder, is_main_process=writes)
        elif writes:  # the reference is no policy, and no part of what was trained
            trained = [name for name in self.model.peft_config if name != adapter]
            self.model.save_pretrained(folder, state_dict=state_dict, selected_adapters=trained)
        if writes and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if writes:
            write_file(Path(folder) / "training_args.bin", lambda path: torch.save(self.args, path))

    def _save_optimizer_and_scheduler(self, output_dir: Any) -> None:
        """Write the state of optimizer and schedule; of a sharded `WeightedModel` without what its own files have."""
        if not isinstance(self.model, WeightedModel) or not (self.is_deepspeed_enabled or is_sharded(self.model)):
            return super()._save_optimizer_and_scheduler(output_dir)
        # Trainer would write all parameters once more, those of the frozen model inside included.
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            from accelerate.utils import save_fsdp_optimizer

            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        schedule: Any = self.lr_scheduler
        if self.args.should_save and type(schedule).__name__ != "DeepSpeedSchedulerWrapper":  # the engine's own
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_deepspeed_enabled:  # whose engine has read the model
            check_same_reference(Path(checkpoint), self.reference_is)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_same_reference(Path(resume_from_checkpoint), self.reference_is)
        if not isinstance(self.model, WeightedModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not isinstance(self.model, WeightedModel):
            return super()._load_best_model()
        folder = self.state.best_model_checkpoint
        assert folder is not None
        if not self.is_deepspeed_enabled:
            return self._load_weights(folder)
        from transformers.integrations.deepspeed import deepspeed_load_checkpoint

        with self._without_frozen():
            deepspeed_load_checkpoint(self.model_wrapped, folder)

    def _load_weights(self, folder: str) -> None:
        file = self.model.WEIGHTS_FILE or CONFIG_FILE
        if not (Path(folder) / file).exists():
            raise ValueError(f"{folder} is no checkpoint of a {type(self.model).__name__}: it has no {file}")
        self.model.load_weights(folder)
