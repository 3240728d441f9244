"""What `transformers.Trainer` does beside the loss and checkpoints, for lists: samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mopl._extras import require

require("transformers", what="mopl.integrations.transformers")
from transformers.trainer_pt_utils import LengthGroupedSampler

from mopl.integrations._data import Examples
from mopl.integrations._references import ReferenceTrainer


class ListTrainer(ReferenceTrainer):
    """A `Trainer` whose data sets are `Examples`."""

    row_lengths: Sequence[int] | None = None  # a data set's own column of lengths

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
