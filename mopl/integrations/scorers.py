"""`RewardListTrainer`: a `transformers.Trainer` of reward models and rerankers on lists, a head for each objective.

    trainer = RewardListTrainer(
        "FacebookAI/roberta-base",
        args=RewardListConfig("out", mini_batch_size=16),
        train_dataset=load_preferences("PKU-Alignment/PKU-SafeRLHF"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_reward_model("reward-model")      # rewards of `mopl clp --rewards classifier:directory=reward-model`

The model is one of transformers for sequence classification, encoder or decoder, whose m outputs are the scores of the
m objectives. The loss is a mean over the lists of the whole step, however it is split into processes and accumulated
parts (see `mopl.integrations.transformers`). `mini_batch_size` bounds the memory of long lists: see
`mopl.training.gradient_cache`.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mopl._arguments import shape_of
from mopl._counted import counted, there_are
from mopl._extras import require

require("transformers", "accelerate", what="mopl.integrations.scorers")
from transformers import EvalPrediction, TrainingArguments, set_seed

from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.sampling import check_weights
from mopl.conditioning.weighted import WeightedModel
from mopl.integrations._head_losses import NOT_DEFINED, HeadLoss, OneLoss, centring, gains_of, named, order_of
from mopl.integrations._scorer_data import (
    ScoredListCollator,
    ScoredLists,
    Texts,
    parts_of,
    read_texts,
    tokens_of,
)
from mopl.integrations._scorer_setup import (
    RewardListConfig,
    check_tokens,
    load_scorer,
    prepare_writer,
    warn_of_frozen_head,
)
from mopl.integrations._setup import check_labels, prepare_arguments, recomputes, warn_of_rounding
from mopl.integrations._sharding import SHARDED
from mopl.integrations._trainer import StepTrainer
from mopl.language_models.data import OnError
from mopl.language_models.models import disable_dropout
from mopl.training.gradient_cache import score_in_parts
from mopl.training.parallel import distribution_of

__all__ = ["RewardListConfig", "RewardListTrainer"]


class RewardListTrainer(StepTrainer):
    """Trains a sequence classifier on lists of responses, or documents, with labels for m objectives.

    Args:
        model: A model of `AutoModelForSequenceClassification` with m outputs, the same with adapters of PEFT, or the
            name of any model that has such a head, which is then made with m outputs.
        args: `RewardListConfig`.
        train_dataset: `PreferenceData`, or a `datasets.Dataset` or list of rows as `MultiObjectiveTrainer` takes them:
            `prompt`, `chosen`, `rejected` (the data of TRL's `RewardTrainer`, conversations without `prompt` included)
            with label columns that `objectives` names, or any format of `mopl.language_models.readers`. TRL's column
            `margin` is obeyed by the losses "bradley_terry" and "pairwise_logistic".
        eval_dataset: The same, or a dictionary of them.
        processing_class: The tokenizer.
        compute_metrics: Called with losses, accuracies and NDCG (L, m) of L lists as `predictions` and which objectives
            count (L, m) as `label_ids`, besides what is reported anyway.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.
        peft_config: Adapters to put on a model that has none, with `task_type="SEQ_CLS"`.
        loss: A loss in place of `list_loss`: called as `mopl.losses.listwise_dpo`, or m of them.
        model_init_kwargs: Keywords of `from_pretrained` for models that are given by name; they are float32 unless
            `dtype` says another.
        on_error: `"raise"` refuses data with rows that cannot be used, `"skip"` leaves them out with a warning.

    Raises:
        ValueError: If arguments do not fit one another or the data.
        NotImplementedError: If `mini_batch_size` is set under FSDP or DeepSpeed.
    """

    def __init__(
        self,
        model: Any,
        args: RewardListConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        peft_config: Any = None,
        loss: OneLoss | Sequence[OneLoss] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        on_error: OnError = "raise",
    ) -> None:
        args = RewardListConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, RewardListConfig):
            raise TypeError(f"args is a {type(args).__name__} but must be a RewardListConfig")
        prepare_arguments(args, TrainingArguments)
        if getattr(args, "train_sampling_strategy", "random") == "group_by_length":
            raise ValueError(
                "train_sampling_strategy is 'group_by_length', which has little to save here; leave it out and pass "
                "mini_batch_size: sequences of like length then share a forward pass"
            )
        if isinstance(model, WeightedModel):
            raise TypeError(
                f"model is a {type(model).__name__}, which takes weights; a reward model has a head for each"
            )
        set_seed(args.seed)  # heads and adapters are initialised at random

        # ---- data, whose objectives the model's outputs are
        self._on_error: OnError = on_error
        names = args.objectives
        train = None if train_dataset is None else read_texts(train_dataset, objectives=names, on_error=on_error)
        names = names if train is None else train.lists.objectives
        many = isinstance(eval_dataset, dict)
        others = eval_dataset if many else {"": eval_dataset} if eval_dataset is not None else {}
        held_out: dict[str, Texts] = {}
        for key, value in others.items():
            held_out[key] = read_texts(value, objectives=names, on_error=on_error)
            names = names or held_out[key].lists.objectives
        if names is None:
            raise ValueError("there is no data set to read the objectives from; pass train_dataset, or name objectives")
        self.objectives = tuple(names)
        m = len(self.objectives)
        by_number = [name for name in ("objective_weights", "objective_beta") if getattr(args, name) is not None]
        by_number += [] if isinstance(args.list_loss, str) else ["list_loss"]
        if m > 1 and args.objectives is None and by_number:
            raise ValueError(
                f"{by_number[0]} is in the order of the objectives, which the data alone would say "
                f"({', '.join(names)}, by first appearance); pass objectives=[...] with it"
            )

        # ---- objective
        self.loss = HeadLoss(args.list_loss if loss is None else loss, m)
        if args.objective_beta is not None and len(args.objective_beta) != m:
            given = counted(len(args.objective_beta), "number")
            raise ValueError(f"objective_beta has {given} but {there_are(m, 'objective')}")
        betas = [args.beta] if args.objective_beta is None else args.objective_beta
        if not all(math.isfinite(value) and value > 0 for value in betas):
            raise ValueError(f"beta is {betas} but must be positive")
        self._beta = torch.tensor([betas], dtype=torch.float32)
        self._weights = torch.full((1, m), 1.0 / m)
        if args.objective_weights is not None:
            given = check_weights(args.objective_weights, m, name="objective_weights")
            self._weights = given.float().reshape(1, m)

        # ---- model and tokens
        model = load_scorer(model, self.objectives, peft_config, model_init_kwargs)
        self.writer = prepare_writer(model, processing_class, args.inputs, args.max_length, args.mini_batch_size)
        if recomputes(args) and is_peft(model):
            # Reentrant checkpointing passes no gradient on if no input needs one, and frozen embeddings need none.
            model.enable_input_require_grads()
        warn_of_frozen_head(model)
        if args.disable_dropout:
            disable_dropout(model)
        written = {key: self._written(texts, model) for key, texts in held_out.items()}
        evaluated: Any = written if many else written.get("")
        self._user_metrics = compute_metrics
        self._sums: Tensor | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=ScoredListCollator(processing_class, args.pad_to_multiple_of),
            train_dataset=None if train is None else self._written(train, model),
            eval_dataset=evaluated,
            processing_class=processing_class,
            compute_metrics=self._metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs are visible to one process and nn.DataParallel would be used, whose gradients this "
                "trainer does not follow; launch with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES"
            )
        if args.mini_batch_size is not None and (kind := distribution_of(self.accelerator)) in SHARDED:
            raise NotImplementedError(
                f"mini_batch_size runs the model in the backward pass, which {kind} does not take; leave it out there "
                "and use gradient_checkpointing, or train on one device or under DDP"
            )
        warn_of_rounding(model, self.accelerator)

    # ---------------------------------------------------------------- data

    def _written(self, texts: Texts, model: Any = None) -> ScoredLists:
        """Return lists as tokens, checked against the loss and the model."""
        data = texts.write(self.writer, self._on_error)
        if data.objectives != self.objectives:
            raise ValueError(
                f"the data has the objectives {', '.join(data.objectives)} but the model is for "
                f"{', '.join(self.objectives)}; name the same, in the same order"
            )
        for column, function in enumerate(self.loss.functions):
            rows = ((each.index, each.labels[column : column + 1]) for each in data.lists)
            check_labels(function, self.objectives[column : column + 1], rows)
        longest = max(len(each.sequences) for each in data.lists)
        if self.loss.pairs_only and longest > 2:
            raise ValueError(
                f"list_loss is 'bradley_terry' but there is a list of {longest} responses; take 'pairwise_logistic', "
                "which is the same over all pairs of a list, or another list_loss"
            )
        margins = [each.margin is not None for each in data.lists]
        if any(margins) and not self.loss.takes_margin:
            raise ValueError(
                f"the data has the column margin, of which {', '.join(dict.fromkeys(map(named, self.loss.names)))} "
                "knows nothing; take list_loss='bradley_terry', or leave the column out"
            )
        for name in ("weights", "beta", "margin"):
            given = {getattr(each, name) is not None for each in data.lists}
            if len(given) > 1:
                raise ValueError(f"some rows have {name} of their own and others have none; give it to all or to none")
        check_tokens(model or self.model, max(max(row["input_ids"]) for e in data.lists for row in e.sequences))
        return data

    def _prepared(self, data: Any) -> Any:
        if data is None or isinstance(data, (str, ScoredLists)):
            return data
        if isinstance(data, dict):
            return {key: self._prepared(value) for key, value in data.items()}
        return self._written(read_texts(data, objectives=self.objectives, on_error=self._on_error))

    def get_train_dataloader(self) -> Any:
        """Return the batches of lists; `train_dataset` may have been replaced by data of any form."""
        self.train_dataset = self._prepared(self.train_dataset)
        return super().get_train_dataloader()

    # ---------------------------------------------------------------- loss

    def scores(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the scores (B, m, K) of a batch, float32, 0 where no response is.

        Args:
            model: The model, as it is wrapped.
            batch: What the collator made.
        """
        tokens = tokens_of(batch)
        size = self.args.mini_batch_size  # type: ignore[attr-defined]
        if size is None:
            found = self._run(model, tokens)
        else:
            parts, places = parts_of(tokens, size)
            found = score_in_parts(functools.partial(self._run, model), parts, model)[places]
        lists, width = batch["list_exists"].shape
        flat = batch["list_index"][:, 0] * width + batch["list_index"][:, 1]
        # Every place is written at most once, so this needs no atomics and its backward is a plain gather.
        placed = found.new_zeros(lists * width, found.shape[1]).index_copy(0, flat, found)
        return placed.view(lists, width, -1).transpose(1, 2)

    def _run(self, model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
        logits = model(**tokens).logits
        wanted = (len(tokens["input_ids"]), len(self.objectives))
        if logits.shape != wanted:
            raise ValueError(
                f"the model's logits have shape {shape_of(logits)} but must be {wanted}, a number for each sequence "
                "and objective; pass a model of AutoModelForSequenceClassification"
            )
        return logits.float()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch: in training scaled for the whole step, else the mean over its lists.

        Args:
            model: The model, as it is wrapped.
            inputs: What the collator made.
            return_outputs: Also return `{"scores": (B, m, K), "loss_vector": (B, m), "value": (B,)}`.
            num_items_in_batch: Not used; the step's batch is counted in lists.
        """
        _, factor = self._place(len(inputs["list_mask"]))
        scores = self.scores(model, inputs)
        labels, mask = inputs["list_labels"], inputs["list_mask"]
        device, counts = labels.device, mask.sum(-1) >= 2
        weights = inputs.get("list_weights", self._weights.to(device)) * counts
        with torch.autocast(device.type, enabled=False):
            beta = inputs.get("list_beta", self._beta.to(device))
            vector = self.loss(scores, labels, mask, beta, inputs.get("list_margin"))
            value = (weights * vector).sum(-1)
            coefficient = self.args.center_rewards_coefficient  # type: ignore[attr-defined]
            if coefficient:
                value = value + coefficient * (weights * centring(scores, inputs["list_exists"])).sum(-1)
        if self.model.training:
            self._note(scores.detach(), vector.detach(), inputs)
        loss = value.sum() * factor
        return (loss, {"scores": scores, "loss_vector": vector, "value": value}) if return_outputs else loss

    # ---------------------------------------------------------------- evaluation and logs

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure every objective.

        Args:
            eval_dataset: Data in any form that the trainer takes, or a dictionary of them; by default its own.
            ignore_keys: Not used.
            metric_key_prefix: Stands in front of the names of the figures.

        Returns:
            `eval_loss`, the mean weighted loss, and for each objective `eval_<name>_loss`, `eval_<name>_accuracy` (of
            pairs with different labels the part that scores order so) and `eval_<name>_ndcg@<cut>` (linear gains, mean
            over lists with a positive label; left out where a label is negative).
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
        """Measure a batch; the loss comes with the other figures, as `MultiObjectiveTrainer` has it."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, found = self.compute_loss(model, inputs, return_outputs=True)
        cut = self.args.ndcg_at  # type: ignore[attr-defined]
        lists = (found["scores"], inputs["list_labels"], inputs["list_mask"])
        table = torch.cat([found["loss_vector"], *order_of(*lists), gains_of(*lists, cut), found["value"][:, None]], 1)
        return None, table.float(), (inputs["list_mask"].sum(-1) >= 2).float()

    def _metrics(self, prediction: Any) -> dict[str, float]:
        table, counts = np.asarray(prediction.predictions, np.float64), np.asarray(prediction.label_ids)
        m = len(self.objectives)
        loss, right, pairs, gain = (table[:, n * m : (n + 1) * m] for n in range(4))
        found = {"loss": float(table[:, 4 * m].mean())}
        for j, name in enumerate(self.objectives):
            found[f"{name}_loss"] = float(loss[:, j].sum() / max(counts[:, j].sum(), 1))
            found[f"{name}_accuracy"] = float(right[:, j].sum() / max(pairs[:, j].sum(), 1))
            known = gain[:, j][~np.isnan(gain[:, j])]
            if len(known) and not (known == NOT_DEFINED).any():
                found[f"{name}_ndcg@{self.args.ndcg_at}"] = float(known.mean())  # type: ignore[attr-defined]
        if self._user_metrics is not None:
            each = np.divide(right, pairs, out=np.full_like(right, np.nan), where=pairs > 0)
            tables: Any = (loss, each, np.where(gain == NOT_DEFINED, np.nan, gain))
            found |= self._user_metrics(EvalPrediction(predictions=tables, label_ids=counts))
        return found

    def _note(self, scores: Tensor, vector: Tensor, batch: dict[str, Any]) -> None:
        """Add up what is logged; that does not wait for a GPU."""
        mask, exists = batch["list_mask"], batch["list_exists"][:, None]
        right, pairs = order_of(scores, batch["list_labels"], mask)
        columns = [vector, right, pairs, mask.sum(-1) >= 2, (scores * exists).sum(-1), exists.sum(-1).expand_as(vector)]
        row = torch.stack([column.sum(0).float() for column in columns])  # (6, m)
        self._sums = row if self._sums is None else self._sums + row

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with each objective's loss, accuracy and mean score since the last time."""
        if "loss" in logs and self._sums is not None:
            reduced: Any = self.accelerator.reduce(self._sums, reduction="sum")
            loss, right, pairs, lists, score, responses = reduced.tolist()
            self._sums = None
            for j, name in enumerate(self.objectives):
                logs = {
                    **logs,
                    f"loss/{name}": loss[j] / max(lists[j], 1),
                    f"accuracy/{name}": right[j] / max(pairs[j], 1),
                    f"reward/{name}": score[j] / max(responses[j], 1),
                }
        super().log(logs, *args, **kwargs)

    # ---------------------------------------------------------------- files

    def save_reward_model(self, directory: str | Path) -> None:
        """Save a plain model of transformers with its tokenizer, adapters merged: what `classifier_rewards` opens.

        Args:
            directory: Where; under several processes the first one writes.
        """
        if not self.is_world_process_zero():
            return
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if is_peft(model):
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(str(directory))
        self.writer.tokenizer.save_pretrained(str(directory))
