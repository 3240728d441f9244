"""`MultiObjectiveTrainer`: a `transformers.Trainer` for preference lists, several objectives and models that take w.

    trainer = MultiObjectiveTrainer(
        HyperPromptModel(model, HyperPrompt(objectives=2, hidden=model.config.hidden_size)),
        args=MultiObjectiveConfig("out", beta=0.1),
        train_dataset=load_preferences("PKU-Alignment/PKU-SafeRLHF"),
        processing_class=tokenizer,
    )
    trainer.train()

What is not as in any other subclass of `Trainer`, and why:

* The loss is a mean over the *lists of the whole step*. `Trainer` averages over accumulation steps and DDP over
  processes, whatever their sizes; each part is scaled so that these two averages come out right.
* Weights and temperatures are drawn from (seed, step, place of the list in the step's batch): no update depends on how
  the batch is split, and a resumed training repeats them. (Where the processes do not divide a pass, accelerate repeats
  rows at its end, which are then part of the last step.)
* Log-probabilities are computed inside the forward of the wrapped model (see `mopl.alignment.fuse`), which is what
  makes DDP and FSDP reduce gradients. `compute_loss_func` is not used: `Trainer` takes what it returns for already
  divided by the number of accumulation steps.
* Data sets are read before `Trainer` sees them, so `remove_unused_columns` has nothing to remove, and batches have no
  entry `labels`, so `label_names` means nothing.
* Evaluation measures every point of a grid of w.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl.language_models.scoring import Conditions

require("transformers", "accelerate", what="mopl.integrations.transformers")
from transformers import TrainingArguments, set_seed

from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.weighted import WeightedModel, causal_lm_of
from mopl.experiments.response_loss import LossFunction, PairLoss
from mopl.integrations._data import ExampleCollator, Examples, Extras, batch_of, examples_of, without_format
from mopl.integrations._objective import Measured, Objective, Totals, grid_metrics, grid_table
from mopl.integrations._scores import Scoring
from mopl.integrations._settings import ObjectiveArguments, TradeOffs, settings_of, with_help
from mopl.integrations._setup import (
    check_columns,
    check_fit,
    check_labelled_whole,
    check_model_rows,
    check_objectives_labelled,
    default_collator,
    prepare_arguments,
    prepare_model,
    prepare_stream,
    recomputes,
    reference_name,
    warn_of_rounding,
    write_record,
)
from mopl.integrations._sharding import prepare_reference
from mopl.integrations._streams import ExampleStream, is_stream
from mopl.integrations._trainer import ListTrainer, lengths_of
from mopl.language_models.collate import ListBatch, ListCollator
from mopl.language_models.data import OnError
from mopl.language_models.formats import is_table
from mopl.language_models.models import disable_dropout

__all__ = ["MultiObjectiveConfig", "MultiObjectiveTrainer", "ObjectiveArguments"]


@with_help
@dataclass
class MultiObjectiveConfig(ObjectiveArguments, TrainingArguments):
    """Arguments of `MultiObjectiveTrainer`: those of `transformers.TrainingArguments`, of `ObjectiveArguments`, and

    Args:
        beta: β, the temperature, where objectives have none of their own.
        max_length: Most tokens of prompt and response; longer lists are truncated as `ListTokenizer` does it.
        disable_dropout: Set every dropout to 0, in the model and in its configuration.
        precompute_ref_log_probs: Compute the reference's log-probabilities once, before training.
        precompute_ref_batch_size: Lists of a batch of that; by default as in training and evaluation.
        padding_free: Pack sequences into one row without padding.
        pad_to_multiple_of: Pad rows to a multiple of this many tokens.
    """

    beta: float = 0.1
    max_length: int | None = 1024
    disable_dropout: bool = True
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    padding_free: bool = False
    pad_to_multiple_of: int | None = None


class MultiObjectiveTrainer(ListTrainer):
    """Trains a causal language model on lists of responses with labels for m objectives.

    Args:
        model: A `WeightedModel` (takes w), a PEFT model, a causal language model, or the name of one. Its head is
            fused in place (`mopl.alignment.fuse`).
        args: `MultiObjectiveConfig`, or any `TrainingArguments`, whose missing settings have their defaults.
        data_collator: A `ListCollator`; by default one that pads with the tokenizer's padding token.
        train_dataset: `PreferenceData`, `TokenizedData`, or a `datasets.Dataset` or list of rows: `prompt`, `chosen`,
            `rejected` and the labels of each objective that `objectives` names (by default chosen is preferred), or any
            format of `mopl.language_models.readers`. Labels are two numbers in columns `<objective>_chosen` and
            `<objective>_rejected`, or in one column `<objective>` two numbers, or one whose sign says which response is
            better (positive: chosen) and whose size by how much; None and NaN are missing. Columns `objective_weights`,
            `objective_beta` (m numbers a row) and `ref_chosen_logps`, `ref_rejected_logps` replace what would be drawn
            or computed. A stream, such as a `datasets.IterableDataset`, is read as the training goes on, in its own
            order; see docs/trl.md.
        eval_dataset: The same, or a dictionary of them; a stream is read to its end.
        processing_class: The tokenizer.
        compute_metrics: Called with the losses (L, n, m) and accuracies (L, n, m) of L lists at n points of the grid as
            `predictions` and which objectives count (L, m) as `label_ids`, besides what is reported anyway. An
            accuracy is NaN where an objective prefers no response of a list.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.
        ref_model: The reference; by default the model as it is passed, without prompt: see
            `mopl.language_models.adapter_reference`, and a frozen copy of a plain model.
        reference_adapter: Name of another adapter of a PEFT model that is the reference; it is never trained or saved.
        peft_config: Adapters to put on a model that has none.
        loss: A loss in place of `list_loss`: called as `mopl.losses.listwise_dpo`, it gives (B, m).
        eval_weights: (n, m) points of the grid of w for evaluation. A model without weights is measured at one point,
            by default that which it trains for.
        model_init_kwargs: Keywords of `from_pretrained` for models that are given by name; they are float32 unless
            `dtype` says another.
        template: How lists are written as text, see `mopl.language_models.tokenization.ListTokenizer`.
        on_error: `"raise"` refuses data with rows that cannot be used, `"skip"` leaves them out with a warning.

    Raises:
        ValueError: If arguments do not fit one another or the data.
        NotImplementedError: Under FSDP or DeepSpeed, for a model or a reference that needs another way.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: ListCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        ref_model: Any = None,
        reference_adapter: str | None = None,
        peft_config: Any = None,
        loss: LossFunction | PairLoss | None = None,
        eval_weights: Tensor | Sequence[Sequence[float]] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        template: str = "auto",
        on_error: OnError = "raise",
    ) -> None:
        args = MultiObjectiveConfig(output_dir="tmp_trainer") if args is None else args
        prepare_arguments(args, self._kind)
        settings = settings_of(args)
        self.settings = settings
        set_seed(args.seed)  # adapters are initialised at random
        if ref_model is model and isinstance(model, nn.Module):
            raise ValueError("model and ref_model are one object; leave ref_model out to get a frozen copy")
        model = prepare_model(model, peft_config, model_init_kwargs)
        if ref_model is not None:
            ref_model = prepare_model(ref_model, None, model_init_kwargs if isinstance(ref_model, str) else None)
        if recomputes(args) and is_peft(getattr(model, "model", model) if isinstance(model, WeightedModel) else model):
            # Reentrant checkpointing passes no gradient on if no input needs one, and frozen embeddings need none.
            causal_lm_of(model).enable_input_require_grads()

        # ---- data
        self._tokenizer = processing_class
        length = getattr(args, "max_length", 1024)
        self._reading: dict[str, Any] = {"max_length": length, "template": template, "on_error": on_error}
        train_dataset = without_format(train_dataset)
        self.row_lengths = lengths_of(train_dataset, args)
        sets: list[Examples] = []
        self._precompute = getattr(args, "precompute_ref_log_probs", False) and not settings.reference_free
        if is_stream(train_dataset):
            prepare_stream(args, self._precompute)

        def read(data: Any) -> Examples:
            sets.append(self._examples(data, sets[0].objectives if sets else settings.objectives))
            return sets[-1]

        if is_stream(train_dataset):
            train_dataset = ExampleStream(train_dataset, self._reader(train_dataset), settings.objectives)
            sets.append(train_dataset.head)
        elif train_dataset is not None:
            train_dataset = read(train_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {key: read(value) for key, value in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = read(eval_dataset)
        names = sets[0].objectives if sets else settings.objectives
        if names is None:
            raise ValueError("there is no data set to read the objectives from; pass train_dataset, or name objectives")
        self.objectives = tuple(names)
        if data_collator is not None and not isinstance(data_collator, ListCollator):
            raise TypeError(f"data_collator is a {type(data_collator).__name__} but must be a mopl ListCollator")
        collator = data_collator or default_collator(args, processing_class, sets)

        # ---- objective and model
        self.objective = Objective(settings, loss, collator.partial == "keep")
        self.scoring = Scoring.of(args, model)
        beta = getattr(args, "beta", 0.1)
        self.conditions = Conditions.of(model)
        self.trade_offs = TradeOffs(settings, len(names), self.conditions, beta=beta, seed=args.seed)
        checks = check_fit(args, settings, self.objective.loss.loss, self.scoring, self.conditions, model)
        for number, examples in enumerate(sets):
            checks(examples)
            check_columns(args, examples, number == 0 and train_dataset is not None, self._precompute)
        if isinstance(train_dataset, Examples):
            check_objectives_labelled(train_dataset)
        elif isinstance(train_dataset, ExampleStream):
            train_dataset.checks = (*train_dataset.checks, checks, functools.partial(check_labelled_whole, collator))
        self.eval_weights = self.trade_offs.grid(settings.eval_points, eval_weights)
        self._user_metrics = compute_metrics
        if getattr(args, "disable_dropout", True):
            disable_dropout(model)
        given = all(value.has_reference for value in sets)
        passed = ref_model
        ref_model = self.choose_reference(model, passed, reference_adapter, peft_config is not None, given)
        if isinstance(model, WeightedModel):
            reference = reference_name(model, self.own, passed, settings.reference_free)
            write_record(model, self.objectives, settings, beta, reference)

        super().__init__(
            model=model,
            args=args,
            data_collator=ExampleCollator(collator),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=self._grid_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs are visible to one process and nn.DataParallel would be used, which cannot run a fused "
                "head; launch with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES"
            )
        self.check_reference_placement(ref_model)
        check_model_rows(model, collator, self.accelerator)
        if passed is not None:
            check_model_rows(passed, collator, self.accelerator)
        warn_of_rounding(model, self.accelerator)
        self.ref_model: Any = None
        if ref_model is not None:
            ref_model.requires_grad_(False).eval()
            self.ref_model = prepare_reference(self.accelerator, ref_model)
        self._totals = Totals(self.objectives)
        if self._precompute:
            if self.train_dataset is not None:
                self.train_dataset = self._with_reference(self.train_dataset, args.per_device_train_batch_size)
            self.eval_dataset = self._prepared(self.eval_dataset)

    # ---------------------------------------------------------------- data

    def _reader(self, data: Any) -> Callable[..., Examples]:
        """Return what turns data like these into lists of tokens, given them and `objectives`."""
        how = {"processing_class": self._tokenizer, "table": is_table(data)}
        return functools.partial(examples_of, **how, **self._reading)

    def _examples(self, data: Any, objectives: Sequence[str] | None) -> Examples:
        data = without_format(data)
        read = self._reader(data)
        return ExampleStream(data, read, objectives).whole() if is_stream(data) else read(data, objectives=objectives)

    def _prepared(self, data: Any) -> Any:
        """Return data for evaluation as lists of tokens, with the reference if it is precomputed."""
        if data is None or isinstance(data, str):
            return data
        if isinstance(data, dict):
            return {key: self._prepared(value) for key, value in data.items()}
        return self._with_reference(self._examples(data, self.objectives), self.args.per_device_eval_batch_size)

    # ---------------------------------------------------------------- loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch: in training scaled for the whole step, else the mean over its lists.

        Args:
            model: The model, as it is wrapped.
            inputs: What the collator made.
            return_outputs: Also return `{"scores": (B, K), "reference": (B, K), "loss_vector": (B, m), "weights"}`.
            num_items_in_batch: Not used; the step's batch is counted in lists.
        """
        batch, extras = batch_of(inputs)
        offset, factor = self._place(len(batch))
        weights, beta, seen = self._trade_offs(batch, extras, offset)
        reference = self._reference(model, batch, extras, weights, seen)
        scored = self.scoring(model, batch, self.conditions, weights, seen)
        measured = self.objective(scored, batch, weights=weights, beta=beta, reference=reference)
        if self.model.training:
            self._totals.add(measured, batch.objective_mask)
        loss = measured.value.sum() * factor
        if not return_outputs:
            return loss
        outputs = {"scores": scored.scores, "reference": reference, "loss_vector": measured.vector, "weights": weights}
        return loss, outputs

    def _trade_offs(self, batch: ListBatch, extras: Extras, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return w (B, m), the β of the loss and the β that the model sees, on the batch's device."""
        drawn = self.trade_offs.draw(self.state.global_step, offset, len(batch))
        weights, beta, seen = (value.to(batch.labels.device, non_blocking=True) for value in drawn)
        if extras.weights is not None:
            weights = extras.weights
        if extras.beta is not None:
            seen = extras.beta
            beta = seen / seen.sum(-1, keepdim=True) if self.conditions.beta else seen
        return weights, beta, seen

    # ---------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure every objective at every point of the grid of w.

        Args:
            eval_dataset: Data in any form that the trainer takes, or a dictionary of them; by default its own.
            ignore_keys: Not used.
            metric_key_prefix: Stands in front of the names of the figures.

        Returns:
            `eval_loss`, the mean scalarised loss; for each objective `eval_<name>_loss` and `eval_<name>_accuracy`,
            means over the grid, and the same with `@<w>` at each point.
        """
        return super().evaluate(self._prepared(eval_dataset), ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Measure a data set, as `evaluate` does.

        Args:
            test_dataset: Data in any form that the trainer takes.
            *args: As in `Trainer.predict`.
            **kwargs: As in `Trainer.predict`.
        """
        return super().predict(self._prepared(test_dataset), *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Measure a batch at every point of the grid.

        The loss comes with the other measures: `Trainer` would weigh a last batch of fewer lists as a full one. There
        are no logits that `prediction_loss_only` could leave out.
        """
        batch, extras = batch_of(self._prepare_inputs(inputs))
        points: list[Measured] = []
        scored, device = None, batch.labels.device
        with torch.no_grad(), self.compute_loss_context_manager():
            reference = None
            for point in self.eval_weights:
                parts = self.trade_offs.at(point, len(batch))
                weights, beta, seen = (value.to(device, non_blocking=True) for value in parts)
                if reference is None or self.reference_conditions is not None:
                    reference = self._reference(model, batch, extras, weights, seen)
                if scored is None or self.conditions.weights:
                    scored = self.scoring(model, batch, self.conditions, weights, seen)
                points.append(self.objective(scored, batch, weights=weights, beta=beta, reference=reference))
        return None, grid_table(points), batch.objective_mask.float()

    def _grid_metrics(self, prediction: Any) -> dict[str, float]:
        return grid_metrics(prediction, self.eval_weights, self.objectives, self._user_metrics)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with each objective's loss, accuracy and margin since the last time."""
        if "loss" in logs:
            logs = {**logs, **self._totals.read(functools.partial(self.accelerator.reduce, reduction="sum"))}
        super().log(logs, *args, **kwargs)
