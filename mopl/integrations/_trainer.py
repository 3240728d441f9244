"""What `transformers.Trainer` does beside the loss, for lists: the reference of a training, samplers."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mopl._extras import require

require("transformers", "accelerate", what="mopl.integrations.transformers")
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from mopl._restoring import evaluating
from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.weighted import WeightedModel
from mopl.integrations._checkpoints import CheckedTrainer, WeightedCheckpoints
from mopl.integrations._data import REFERENCE_COLUMNS, Examples, Extras
from mopl.integrations._scores import Scoring
from mopl.integrations._settings import ObjectiveArguments
from mopl.integrations._setup import check_objectives, check_reference, check_store
from mopl.integrations._sharding import check_sharding, prepare_sharding, refuse_loaded_in_shards
from mopl.language_models.adapter_reference import OwnReference
from mopl.language_models.collate import ListBatch
from mopl.language_models.model_identity import checksum, identity_of
from mopl.language_models.reference_store import ReferenceStore
from mopl.language_models.scoring import Conditions, score_lists


class StepTrainer(CheckedTrainer):
    """A `Trainer` whose loss is a mean over the lists of a whole step, of all processes and accumulated parts."""

    data_collator: Any
    loss_is_scaled_for_ga = False
    _kind: type = TrainingArguments  # whose options are obeyed or refused
    # Where the next parts of this process stand in the step's batch, and the factors on the sums of their losses.
    _places: Iterator[tuple[int, float]] = iter(())

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Fetch the parts of a step, and note where in the step's batch each stands."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        counts = [len(sample["list_mask"]) for sample in samples]
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        table = [counts]
        if processes > 1 and counts:
            mine = torch.tensor(counts, device=self.accelerator.device)
            gathered: Any = self.accelerator.gather(mine)
            table = gathered.view(processes, len(counts)).tolist()
        total = sum(map(sum, table))
        places = []
        for turn in range(len(counts)):
            before = sum(sum(row[:turn]) for row in table) + sum(row[turn] for row in table[:rank])
            # Trainer divides by the number of parts, DDP by the number of processes.
            places.append((before, processes * len(counts) / total))
        self._places = iter(places)
        return samples, items

    def _prepare_input(self, data: Any) -> Any:
        """Put a batch on the device; under DeepSpeed `Trainer` would round labels, weights and references to 16 bit."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _place(self, lists: int) -> tuple[int, float]:
        """Return where these lists stand in the step's batch, and the factor on the sum of their losses."""
        alone = (0, 1.0 / lists)  # of a batch that no step fetched
        return next(self._places, alone) if self.model.training else alone


class ListTrainer(WeightedCheckpoints, StepTrainer):
    """A `StepTrainer` that has a reference, and knows the checkpoints of a `WeightedModel`."""

    ref_model: Any
    settings: ObjectiveArguments
    scoring: Scoring
    objectives: tuple[str, ...]
    reference_conditions: Conditions | None = None  # what the reference takes, where it is another one for each w
    reference_given = False  # whether all data has its log-probabilities
    row_lengths: Sequence[int] | None = None  # a data set's own column of lengths
    _precompute: bool

    # ---------------------------------------------------------------- reference

    def choose_reference(self, model: Any, ref_model: Any, adapter: str | None, added: bool, given: bool) -> Any:
        """Choose the reference of a training; return it where it is a model of its own, else None.

        The policy's adapters were `added` by the trainer; the data have (`given`) the reference's log-probabilities.
        """
        check_reference(model, ref_model, adapter, self.settings.reference_free)
        check_store(self.settings, self._precompute, self.scoring, given)
        self.reference_given = given
        if given and (ref_model is not None or adapter is not None) and not self.settings.reference_free:
            warnings.warn(
                f"{'ref_model' if adapter is None else 'reference_adapter'} was passed but all data has the columns "
                f"{', '.join(REFERENCE_COLUMNS)}, which are taken; it is asked for no other data than what evaluate() "
                "or predict() may be given later",
                stacklevel=3,
            )
        if isinstance(ref_model, WeightedModel):
            check_objectives(ref_model, self.objectives, "ref_model")
            self.reference_conditions = Conditions.of(ref_model)
        if ref_model is not None or self.settings.reference_free:
            return ref_model
        inner = model.model if isinstance(model, WeightedModel) else model
        frozen = inner is not model and not any(parameter.requires_grad for parameter in inner.parameters())
        varies = inner is not model and model.varies_with_weights
        if adapter is not None or is_peft(inner) or frozen:
            self.own = OwnReference(model, adapter=adapter, added=added)
            varies = self.own.varies_with_weights
        if varies:
            self.reference_conditions = Conditions.of(model)
        if given:
            return None
        if self._precompute:
            refuse_loaded_in_shards(model)
        if self.own is not None:
            self.reference_is = self.own.fingerprint(model)
            return None
        # All of the model is trained. Where its start does not depend on w it is that of the model inside.
        start = model if varies else inner
        refuse_loaded_in_shards(start)
        self.reference_is = f"model {checksum(start.named_parameters())}"
        return None if self._precompute else copy.deepcopy(start)

    def check_reference_placement(self, ref_model: Any) -> None:
        """Raise where the reference would have to be sharded; give all processes the same one."""
        within = self.own is not None and self.own.kind != "base" and not self._precompute
        weighted = isinstance(self.model, WeightedModel)
        if weighted or within:
            check_sharding(self.accelerator, self.model)
        prepare_sharding(self.accelerator, model=self.model if weighted or within else None)
        if ref_model is not None:
            check_sharding(self.accelerator, ref_model)
        if self.own is not None:
            self.own.spread(self.accelerator)

    @torch.no_grad()
    def _reference(self, model: nn.Module, batch: ListBatch, extras: Extras, weights: Tensor, beta: Tensor) -> Any:
        """Return the reference's scores (B, K), or None where the loss has no reference.

        Args:
            model: The policy, as it is wrapped.
            batch: The lists.
            extras: What stands beside them.
            weights: w (B, m), for a reference that depends on it.
            beta: β (B, m), likewise.
        """
        if self.settings.reference_free:
            return None
        if extras.reference is not None:
            return extras.reference
        conditions = self.reference_conditions
        keywords = {} if conditions is None else conditions.keywords(batch, weights, beta)
        with self._as_reference(model) as reference:
            return self.scoring.reference(reference, batch, **keywords)

    def _plain(self, model: nn.Module) -> Any:
        """Return the model that was passed behind what is around it, a compiled module included."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    @contextlib.contextmanager
    def _as_reference(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the reference: a model of its own, or the policy as it was when its training began."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        if self.own is None and self.state.global_step > 0:
            raise ValueError(
                "the data has no reference log-probabilities, and they cannot be computed after training has begun, "
                "because the model was its own reference; pass the data as eval_dataset, or pass ref_model"
            )
        inner = self._plain(model)
        with evaluating(inner) if self.own is None else self.own.active(inner):
            # Where all of a model that takes weights is trained, its start is the model inside, or depends on them.
            inside = self.own is None and isinstance(inner, WeightedModel) and self.reference_conditions is None
            yield inner.model if inside else model

    def _with_reference(self, data: Examples, batch_size: int) -> Examples:
        """Return data with the reference's log-probabilities beside each list, where they are to be computed once."""
        if not self._precompute or data.has_reference:
            return data
        if self.reference_conditions is not None:
            kind = self.model if self.ref_model is None else self._plain(self.ref_model)
            raise ValueError(
                f"precompute_ref_log_probs is True but the reference is a {type(kind).__name__}, whose "
                "log-probabilities depend on the weights w; leave precompute_ref_log_probs out"
            )
        lists = [example.tokens for example in data.lists]
        options: dict[str, Any] = {
            "collator": self.data_collator.collator,
            "lists_per_batch": getattr(self.args, "precompute_ref_batch_size", None) or batch_size,
            "accelerator": self.accelerator,
        }
        folder = self.settings.reference_store
        with self._as_reference(self.model) as model:
            if folder is None:
                flat = score_lists(model, lists, score=self.scoring.reference, **options)
            else:
                identity = identity_of(self._plain(model))
                flat = ReferenceStore(folder).load_or_compute(lists, model, identity=identity, **options)
        rows = list(flat.split([len(item.responses) for item in lists]))
        return data.with_reference(pad_sequence(rows, batch_first=True))

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
    if getattr(args, "train_sampling_strategy", "random") != "group_by_length" or not hasattr(data, "__len__"):
        return None
    there = args.length_column_name in (getattr(data, "column_names", None) or ())
    return data[args.length_column_name] if there else None


def _tokens(data: Examples) -> list[int]:
    return [int(example.tokens.lengths.max()) for example in data.lists]
