"""Checkpoints of a `transformers.Trainer` whose model may be a `WeightedModel`, and the reference that they name."""

from __future__ import annotations

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
from mopl.language_models.adapter_reference import OwnReference, check_same_reference, write_reference


class CheckedTrainer(Trainer):
    """A `Trainer` that does not run a training of nothing."""

    model: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `Trainer` does it.

        Raises:
            ValueError: If no parameter of the model is trained.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "no parameter of the model requires a gradient, so nothing would be trained; load adapters with "
                "is_trainable=True (PEFT freezes them otherwise), or call model.requires_grad_(True)"
            )
        return super().train(*args, **kwargs)


class WeightedCheckpoints(CheckedTrainer):
    """A `Trainer` that writes and reads a `WeightedModel` by its own files; stands in front of any other trainer."""

    own: OwnReference | None = None  # the reference that the policy carries in itself, if no other model is it
    reference_is: str | None = None  # what tells it from others; None where it is a model that the user passed

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            write_reference(self._checkpoint_folder(trial), self.reference_is)

    def _checkpoint_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, as `Trainer` does it; a `WeightedModel` that FSDP2 has sharded whole, in its own files.

        Args:
            output_dir: The folder; by default that of the arguments.
            _internal_call: As in `Trainer`.
        """
        if not isinstance(self.model, WeightedModel) or not is_sharded(self.model):
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
        if not isinstance(self.model, WeightedModel) or not is_sharded(self.model):
            return super()._save_optimizer_and_scheduler(output_dir)
        from accelerate.utils import save_fsdp_optimizer

        # Trainer would write all parameters once more, those of the frozen model inside included.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_same_reference(Path(resume_from_checkpoint), self.reference_is)
        if not isinstance(self.model, WeightedModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not isinstance(self.model, WeightedModel):
            return super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, folder: str) -> None:
        file = self.model.WEIGHTS_FILE or CONFIG_FILE
        if not (Path(folder) / file).exists():
            raise ValueError(f"{folder} is no checkpoint of a {type(self.model).__name__}: it has no {file}")
        self.model.load_weights(folder)
