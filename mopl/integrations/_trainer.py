"""What `transformers.Trainer` does beside the loss, for lists and for a `HyperPromptModel`: samplers, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from mopl._files import write_file
from mopl.conditioning.hyper_prompt_model import HyperPromptModel
from mopl.integrations import _models as models
from mopl.integrations._data import Examples


class ListTrainer(Trainer):
    """A `Trainer` whose data sets are `Examples` and whose model may be a `HyperPromptModel`."""

    model: Any
    row_lengths: Sequence[int] | None = None  # a data set's own column of lengths

    # ---------------------------------------------------------------- samplers

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(data, Examples):
            return super()._get_train_sampler(train_dataset)
        lengths = _tokens(data) if self.row_lengths is None else list(self.row_lengths)
        if self.row_lengths is not None and len(lengths) == data.rows:
            lengths = [lengths[example.tokens.index] for example in data.lists]  # some rows may be left out
        if len(lengths) != len(data):
            raise ValueError(
                f"the column {self.args.length_column_name} has {len(lengths)} rows, {len(data)} of which are lists, "
                "and it is unknown which; leave the column out and tokens are counted"
            )
        return LengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps, dataset=data, lengths=lengths
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(eval_dataset, Examples):
            return super()._get_eval_sampler(eval_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler(
            self.args.eval_batch_size,
            dataset=eval_dataset,
            lengths=_tokens(eval_dataset),
            generator=torch.Generator().manual_seed(seed),
        )

    # ---------------------------------------------------------------- checkpoints of a HyperPromptModel

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not isinstance(self.model, HyperPromptModel):
            return super()._save(output_dir, state_dict)
        folder = output_dir if output_dir is not None else self.args.output_dir
        assert folder is not None
        if not self.args.should_save:
            return
        self.model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        write_file(Path(folder) / "training_args.bin", lambda path: torch.save(self.args, path))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not isinstance(self.model, HyperPromptModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        models.load_hyper_prompt(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not isinstance(self.model, HyperPromptModel):
            return super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        models.load_hyper_prompt(self.model, self.state.best_model_checkpoint)


def lengths_of(data: Any, args: Any) -> Sequence[int] | None:
    """Return the column of lengths that a data set of rows has for sampling, if it is asked for."""
    if getattr(args, "train_sampling_strategy", "random") != "group_by_length":
        return None
    return (
        data[args.length_column_name]
        if args.length_column_name in (getattr(data, "column_names", None) or ())
        else None
    )


def _tokens(data: Examples) -> list[int]:
    return [int(example.tokens.lengths.max()) for example in data.lists]
