"""What a trainer checks and chooses before it begins: models, arguments, data."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mopl._counted import counted
from mopl._extras import require
from mopl._hub import naming_own_code
from mopl._rows import check_rows
from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.saved_models import base_of_adapter
from mopl.conditioning.weighted import WeightedModel, causal_lm_of, check_packed
from mopl.experiments.methods import PER_TOKEN
from mopl.experiments.response_loss import LIKELIHOOD, PairLoss
from mopl.integrations._data import BETA, REFERENCE_COLUMNS, WEIGHTS, Example, Examples
from mopl.integrations._options import check_options
from mopl.integrations._scores import Scoring
from mopl.integrations._settings import ObjectiveArguments
from mopl.integrations._sharding import cuts_parameters
from mopl.language_models.adapter_reference import OwnReference
from mopl.language_models.collate import ListCollator
from mopl.language_models.head import fuse
from mopl.language_models.scoring import Conditions
from mopl.language_models.tokenization import pad_token
from mopl.losses import approx_ndcg, lambda_loss, listwise_dpo
from mopl.training.optimizer import rounding_of
from mopl.training.parallel import distribution_of

# ---------------------------------------------------------------- models


def prepare_model(model: Any, peft_config: Any = None, model_init_kwargs: dict[str, Any] | None = None) -> Any:
    """Load a model that is given by name, wrap it with adapters if asked for, and fuse its head."""
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, (str, nn.Module)):
        raise TypeError(f"model is a {type(model).__name__} but must be a causal language model, or the name of one")
    if isinstance(model, str):
        require("transformers")
        from transformers import AutoModelForCausalLM

        options = dict(model_init_kwargs or {})
        if "torch_dtype" not in options:  # an older name
            # Not the dtype of the file: what is trained in 16 bit loses every update below 1/256 of a value.
            options.setdefault("dtype", torch.float32)
        options.setdefault("trust_remote_code", False)
        if (base := base_of_adapter(model)) is not None:
            raise ValueError(
                f"model is {model!r}, which holds a PEFT adapter of {base}; load it with "
                "peft.AutoPeftModelForCausalLM.from_pretrained(model, is_trainable=True) and pass the result: its "
                "reference is then the adapter as it is"
            )
        with naming_own_code(model):
            model = AutoModelForCausalLM.from_pretrained(model, **options)
    elif model_init_kwargs:
        raise ValueError("model_init_kwargs are for a model that is loaded here by name, but model is loaded already")
    if peft_config is not None:
        if isinstance(model, WeightedModel) or is_peft(model):
            raise ValueError(
                f"peft_config was passed with a {type(model).__name__}; wrap the causal language model with "
                "peft.get_peft_model first and pass the result, or a model that takes weights around it"
            )
        require("peft")
        from peft import PeftConfig, get_peft_model

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"peft_config is a {type(peft_config).__name__} but must be a peft.PeftConfig, such as peft.LoraConfig"
            )
        model = get_peft_model(model, peft_config)
    if isinstance(model, WeightedModel) and model.takes_kl_weight:
        raise ValueError(
            f"model is a {type(model).__name__} that is conditioned on the KL weight, which the trainers do not draw; "
            "leave its coefficients out, or train it on rewards with `mopl clp`"
        )
    fuse(causal_lm_of(model))
    return model


def check_objectives(model: WeightedModel, objectives: tuple[str, ...], name: str = "model") -> None:
    """Raise where the weights of a model are for other objectives than the data has."""
    own = model.record.objectives
    unnamed = tuple(f"objective_{j + 1}" for j in range(len(own)))
    allowed = (objectives,) if model.text_prompt is not None else (unnamed, objectives)  # words have the names in them
    if len(own) != len(objectives) or own not in allowed:
        raise ValueError(
            f"the {name} is for {', '.join(own)} but the data has {', '.join(objectives)}; "
            "name the same objectives, in the same order"
        )


def write_record(
    model: WeightedModel, objectives: tuple[str, ...], settings: ObjectiveArguments, beta: float, reference: str
) -> None:
    """Note in a model what its weights mean, for `save_pretrained`; raise if it is for other objectives."""
    check_objectives(model, objectives)
    box = None if settings.beta_low is None else (settings.beta_low, settings.beta_high)
    model.record = dataclasses.replace(
        model.record,
        objectives=objectives,
        reference=reference,
        beta=box or settings.objective_beta or beta,
        concentration=settings.concentration if settings.objective_weights is None else None,
    )


# ---------------------------------------------------------------- arguments and data


def prepare_arguments(args: Any, kind: type) -> None:
    """Raise where an option of `kind`, `TrainingArguments` or `DPOConfig`, would be dropped without a word."""
    if hasattr(args, "loss_type") and "loss_type" not in {entry.name for entry in dataclasses.fields(kind)}:
        raise TypeError(
            f"args is a {type(args).__name__}, whose loss_type and other options of TRL MultiObjectiveTrainer does not "
            "have; pass a MultiObjectiveConfig, or take mopl.integrations.trl.MultiObjectiveDPOTrainer"
        )
    check_options(args, kind)
    if getattr(args, "use_liger_kernel", False):
        # By default it would replace the model's forward, whose head is fused here.
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}


def recomputes(args: Any) -> bool:
    """Say whether activations are computed again in the backward pass, by either name of that option."""
    return any(getattr(args, f"{name}_checkpointing", False) for name in ("activation", "gradient"))


def check_fit(
    args: Any,
    settings: ObjectiveArguments,
    loss: Any,
    scoring: Scoring,
    conditions: Conditions,
    model: Any,
) -> ListChecks:
    """Raise where options do not fit the model or one another; return what they ask of lists."""
    pairs_only, sorts = scoring.pairs_only, False
    if isinstance(loss, PairLoss):
        pairs_only = f"loss_type {', '.join(loss.types)}"
        if settings.length_normalized and any(name in PER_TOKEN for name in loss.types):
            raise ValueError(
                f"{pairs_only} averages over tokens by itself and length_normalized is True; leave that out"
            )
        if scoring.weighting and (loss.sorts or LIKELIHOOD in loss.types):
            raise ValueError(
                f"use_weighting is True but {pairs_only} has no value for each pair that it could weigh, and TRL "
                "raises there too; leave one of them out"
            )
        sorts = loss.sorts
        if sorts and conditions.weights and settings.weights_per == "list":
            raise ValueError(_SORTED.format(pairs_only))
    if isinstance(model, WeightedModel) and not model.takes_gradient_checkpointing and recomputes(args):
        raise ValueError(
            f"gradient_checkpointing is True, by which layers of a {type(model).__name__} would be computed again "
            "without its mixture; pass gradient_checkpointing=False, or take a LoraMixture"
        )
    pushes = getattr(args, "push_to_hub", False) and str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if pushes and pushes != "end" and isinstance(model, WeightedModel):
        raise ValueError(
            f"hub_strategy is {pushes!r}, by which transformers pushes files of plain models and adapters only, and "
            f"this is a {type(model).__name__}; pass hub_strategy='end'"
        )
    size = getattr(causal_lm_of(model).get_input_embeddings(), "num_embeddings", None)
    return ListChecks(loss, pairs_only, sorts, size, scoring.ld_alpha)


_SORTED = (
    "{} sorts the pairs, after which none has weights of its own; pass weights_per='step' and leave out the columns "
    f"{WEIGHTS} and {BETA}"
)


@dataclass(frozen=True)
class ListChecks:
    """Raises for lists that a training cannot use. It holds no model, so a process that reads a stream can have it."""

    loss: Any
    pairs_only: str | None  # the name of an option that is for pairs
    sorts: bool  # whether the loss sorts pairs, which then share their weights
    vocabulary: int | None  # tokens that the model has embeddings for, if that is known
    ld_alpha: float | None = None

    def __call__(self, examples: Examples) -> None:
        """Check all lists of a data set, or of a part of one."""
        if self.sorts and any(e.weights is not None or e.beta is not None for e in examples.lists):
            raise ValueError(_SORTED.format(self.pairs_only))
        if self.ld_alpha is not None and any(example.reference is not None for example in examples.lists):
            raise ValueError(
                f"ld_alpha is {self.ld_alpha}, which weighs the tokens of a response by the length of the other one, "
                f"and the columns {', '.join(REFERENCE_COLUMNS)} are plain sums; leave one of them out"
            )
        if self.pairs_only is not None and examples.width > 2:
            raise ValueError(
                f"{self.pairs_only} is for pairs but there are lists with more than two responses; leave loss_type at "
                "'sigmoid' without options for pairs and choose a list_loss"
            )
        check_labels(self.loss, examples.objectives, ((e.tokens.index, e.tokens.labels) for e in examples.lists))
        for item in (example.tokens for example in examples.lists):
            largest = max(int(part.max(initial=0)) for part in (item.prompt, *item.responses))
            # A GPU reports that in no readable way.
            if self.vocabulary is not None and largest >= self.vocabulary:
                raise ValueError(
                    f"row {item.index + 1} has the token {largest} but the model has embeddings of {self.vocabulary} "
                    "tokens; pass the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))"
                )


OF_TRAINERS = (
    "pass loss=functools.partial(mopl.losses.listwise_dpo, normalize='softmax', label_temperature=...) to the trainer, "
    "or list_loss='plackett_luce', which takes their ranks, to its config"
)


def check_labels(
    loss: Any, objectives: Sequence[str], lists: Iterable[tuple[int, np.ndarray]], remedy: str = OF_TRAINERS
) -> None:
    """Raise if a loss of shares or gains is given negative labels; the caller's own losses judge for themselves.

    `lists` has the place of each list in the data and its labels (m, K), NaN where one is missing.
    """
    function, options = (loss.func, loss.keywords) if isinstance(loss, functools.partial) else (loss, {})
    shares = function is listwise_dpo and options.get("normalize", "l1") == "l1"
    gains = function is approx_ndcg or (function is lambda_loss and options.get("normalize", False))
    for index, labels in lists if shares or gains else ():
        negative = labels < 0  # false where a label is missing
        if negative.any():
            j = int(negative.any(1).argmax())
            raise ValueError(
                f"labels of {objectives[j]} hold {labels[negative][0]:g} (row {index + 1}), but {function.__name__} "
                f"takes none that are negative; for rewards and the like {remedy}"
            )


def check_objectives_labelled(examples: Examples) -> None:
    """Raise where training data has no label at all for an objective: nothing would be learnt of it."""
    labelled = np.zeros(len(examples.objectives), dtype=bool)
    for example in examples.lists:
        labelled |= ~np.isnan(example.tokens.labels).all(1)
    for name in np.array(examples.objectives)[~labelled]:
        raise ValueError(
            f"objective {str(name)!r} has no label in any of the {counted(len(examples), 'training list')}, so nothing "
            "would be learnt of it; give some lists labels, or leave it out of objectives"
        )


def warn_of_rounding(model: torch.nn.Module, accelerator: Any) -> None:
    """Warn where 16-bit parameters are trained that no sharding keeps a float32 copy of."""
    if distribution_of(accelerator) not in ("FSDP", "DEEPSPEED") and (note := rounding_of(model)) is not None:
        warnings.warn(f"{note} (dtype=torch.float32; bf16=True keeps the arithmetic in 16 bit)", stacklevel=3)


def check_reference(model: Any, ref_model: Any, adapter: str | None, reference_free: bool) -> None:
    """Raise where two references are asked for, or `ref_model` would change as the model is trained."""
    if adapter is not None and (ref_model is not None or reference_free):
        other = "reference_free is set" if reference_free else "ref_model was passed"
        raise ValueError(f"reference_adapter is {adapter!r} but {other}, so there is another reference; leave one out")
    if ref_model is not None:
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        if any(id(p) in trained for p in ref_model.parameters()):
            raise ValueError(
                "ref_model holds parameters of the model that are trained (PEFT puts adapters into the very model that "
                "it wraps); leave ref_model out, or load it a second time"
            )


def check_store(settings: ObjectiveArguments, precompute: bool, scoring: Scoring, in_data: bool) -> None:
    """Raise where there is nothing that a store of references could keep."""
    if settings.reference_store is None:
        return
    given = f"reference_store is {settings.reference_store!r}"
    if settings.reference_free:
        raise ValueError(f"{given} but reference_free is True, so there is no reference; leave one of them out")
    if not precompute:
        raise ValueError(f"{given} but the reference is computed in each step; pass precompute_ref_log_probs=True")
    if in_data:
        raise ValueError(
            f"{given} but all data has the columns {', '.join(REFERENCE_COLUMNS)}, so nothing would be read or kept; "
            "leave one of them out"
        )
    if scoring.ld_alpha is not None:
        raise ValueError(
            f"{given} but ld_alpha is {scoring.ld_alpha}, which weighs the tokens of a response by the length of the "
            "other one, and a store has plain sums; leave one of them out"
        )


def reference_name(model: WeightedModel, own: OwnReference | None, ref_model: Any, reference_free: bool) -> str:
    """Return what a `TuningRecord` says of the reference: what a training has in `own`, or the one that was passed."""
    if ref_model is not None:
        return getattr(ref_model, "name_or_path", "") or f"the {type(ref_model).__name__} that was passed as ref_model"
    if own is None and not reference_free:  # all of the model is trained
        return getattr(model, "name_or_path", "") or "the model as training began"
    if own is None or own.kind == "base":
        return "self"
    return f"the adapter {own.adapter}" if own.adapter else "the adapters as training began"


def default_collator(args: Any, processing_class: Any, sets: Sequence[Examples]) -> ListCollator:
    multiple = getattr(args, "pad_to_multiple_of", None)
    packed = getattr(args, "padding_free", False)
    pad = pad_token(getattr(processing_class, "tokenizer", processing_class))
    some = any(_partly_labelled(example) for value in sets for example in value.lists)
    return ListCollator(packed=packed, pad_id=pad, pad_to_multiple_of=multiple, partial="keep" if some else "drop")


def check_model_rows(model: Any, collator: ListCollator, accelerator: Any) -> None:
    """Raise where a model cannot take the rows of a training. A sharded model says so in its first step."""
    weighted = model if isinstance(model, WeightedModel) else None
    if weighted is not None and collator.packed and not weighted.takes_packed_rows:
        raise ValueError(
            f"a {type(model).__name__} has one trade-off for each row, and a packed row holds many lists; pass "
            "padding_free=False"
        )
    if collator.packed:
        check_packed(model)
    if not cuts_parameters(accelerator):
        virtual = weighted is not None and weighted.takes_embeddings
        check_rows(causal_lm_of(model), packed=collator.packed, virtual=virtual)


def prepare_stream(args: Any, precompute: bool) -> None:
    """Raise where an option needs all rows of the training data at once; let every process read the stream."""
    for given, name, remedy in (
        (precompute, "precompute_ref_log_probs", "leave it out: the reference is then computed in each step; or let "
         "the rows have the columns ref_chosen_logps and ref_rejected_logps"),
        (args.train_sampling_strategy == "group_by_length", "train_sampling_strategy='group_by_length'", "leave it "
         "out; rows come in the order of the stream"),
        (args.dataloader_num_workers > 1, f"dataloader_num_workers={args.dataloader_num_workers}", "pass 1, which "
         "reads ahead of the training, or 0"),
        (args.accelerator_config.dispatch_batches, "dispatch_batches=True", "leave it out: every process reads the "
         "stream and takes its part, since lists of other lengths cannot be put together"),
    ):  # fmt: skip
        if given:
            raise ValueError(f"train_dataset is a stream, which {name} cannot go with; {remedy}")
    args.accelerator_config.dispatch_batches = False


def check_columns(args: Any, examples: Examples, train: bool, filled: bool) -> None:
    """Raise where batches would mix lists with weights, β or a reference of their own and lists without.

    Args:
        args: The trainer's.
        examples: Lists of training data (`train`), or of data for evaluation.
        train: Which of the two.
        filled: Whether a reference that is missing will be computed beforehand.
    """
    strategy = getattr(args, "train_sampling_strategy", "random")
    size = args.per_device_train_batch_size if train else args.per_device_eval_batch_size
    lists = examples.lists
    if size > 1 and (strategy == "group_by_length" or (train and strategy != "sequential")):
        size = len(lists)  # any may meet
    columns = {"weights": WEIGHTS, "beta": BETA, "reference": " and ".join(REFERENCE_COLUMNS)}
    for name, column in columns.items():
        if name == "reference" and filled:
            continue
        for first in range(0, len(lists), size):
            without = [each.tokens.index + 1 for each in lists[first : first + size] if getattr(each, name) is None]
            if 0 < len(without) < len(lists[first : first + size]):
                raise ValueError(
                    f"row {without[0]} has no {column} and others of its batch have; give them to all rows or to none"
                )


def check_labelled_whole(collator: ListCollator, examples: Examples) -> None:
    """Raise where labels of a stream would be dropped, because its first rows had labels for all responses."""
    partly = None if collator.partial == "keep" else next(filter(_partly_labelled, examples.lists), None)
    if partly is not None:
        raise ValueError(
            f"row {partly.tokens.index + 1} of the stream has labels for a part of its responses only, which none of "
            "its first rows had; pass data_collator=ListCollator(partial='keep', pad_id=tokenizer.pad_token_id)"
        )


def _partly_labelled(example: Example) -> bool:
    missing = example.tokens.labels != example.tokens.labels  # NaN
    return bool((missing.any(-1) & ~missing.all(-1)).any())
