"""`MultiObjectiveDPOTrainer`: TRL's `DPOTrainer` for lists, several objectives and models that take w.

    trainer = MultiObjectiveDPOTrainer(
        model,
        args=MultiObjectiveDPOConfig("out", beta=0.1, objectives=["helpful", "harmless"]),
        train_dataset=dataset,  # prompt, chosen, rejected, helpful, harmless; or lists of any length
        processing_class=tokenizer,
        peft_config=LoraConfig(...),
    )

It takes the arguments of `trl.DPOTrainer` and a `trl.DPOConfig`, but it is a `transformers.Trainer` and not a subclass
of `DPOTrainer`, for four reasons. `DPOTrainer.__init__` accepts only data sets of pairs and tokenises them as pairs. It
patches the model's forward with its own head, so that there would be two. It takes any model that is no PEFT model to
need a second model as its reference, loaded by name, which neither a `WeightedModel` nor a model from memory can
give. And what a subclass would override (`_compute_loss`, `_metrics`, `_precompute_ref_logps`) is private and differs
from release to release. All that would be left to inherit is the wrapping of a model in adapters and the log.

Of TRL only `DPOConfig` and the preparation of rows of pairs are used, so one source serves TRL 1.10 to 1.16. Every
option is either obeyed or refused with an error that says what to do; none is dropped. With pairs, one objective that
prefers `chosen`, and the default settings, tokens, loss and gradients are those of the installed `DPOTrainer`.

Tokens are TRL's to the id where rows have its preference format (`chosen`, `rejected`, mostly `prompt`; texts or
messages; `tools` and `chat_template_kwargs`). `tokenization="mopl"` reads the same rows as
`mopl.language_models.tokenization` does all others, above all lists of more than two responses: texts go through the
chat template, a response ends at its end token, and all responses of a list keep the same prompt, cut at its left. A
model that was trained on texts as they are is asked with `template="plain"` (`mopl.language_models.generate`).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mopl._extras import require
from mopl._hub import naming_own_code

require("trl", "transformers", "accelerate", what="mopl.integrations.trl", extra="trl")
from trl import DPOConfig, SyncRefModelCallback  # type: ignore[attr-defined]

from mopl._arguments import check_choice
from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.weighted import WeightedModel, causal_lm_of
from mopl.experiments.response_loss import LossFunction, PairLoss
from mopl.integrations._data import REFERENCE_COLUMNS, Examples, is_pairs
from mopl.integrations._options import check_options
from mopl.integrations._pair_loss import pair_loss_of
from mopl.integrations._settings import ObjectiveArguments, with_help
from mopl.integrations._sharding import refuse_sharded_moving
from mopl.integrations._streams import is_stream
from mopl.integrations._trl_tokens import TOKENIZATIONS, examples_of_pairs, refuse_options, without_labels
from mopl.integrations.transformers import MultiObjectiveTrainer
from mopl.language_models.collate import ListCollator
from mopl.language_models.data import OnError
from mopl.language_models.reference_store import ReferenceStore
from mopl.language_models.tokenization import TokenizedData, pad_token

__all__ = ["MultiObjectiveDPOConfig", "MultiObjectiveDPOTrainer", "with_reference_logps"]


@with_help
@dataclass
class MultiObjectiveDPOConfig(ObjectiveArguments, DPOConfig):
    """Arguments of `MultiObjectiveDPOTrainer`: those of `trl.DPOConfig` and of `ObjectiveArguments`.

    `loss_type` names losses of pairs and takes part only where it is not `"sigmoid"` alone, or where an option that
    belongs to it (`label_smoothing`, `f_divergence_type`) is set; otherwise `list_loss` is the loss, and its default is
    the same on pairs with labels 1 and 0. Losses of pairs read only which label is larger, and give ties 0.

    Args:
        tokenization: Of rows in TRL's preference format: `"trl"`, as the installed `trl.DPOTrainer` does it, or
            `"mopl"`, as `mopl.language_models.tokenization` does it for all other data.
    """

    tokenization: str = "trl"

    def __post_init__(self) -> None:
        check_choice(self.tokenization, TOKENIZATIONS, "tokenization")
        super().__post_init__()


class MultiObjectiveDPOTrainer(MultiObjectiveTrainer):
    """Trains on pairs or lists with labels for m objectives, with the arguments of TRL's `DPOTrainer`.

    Args:
        model: A `WeightedModel` (takes w), a PEFT model, a causal language model, or the name of one.
        ref_model: The reference; by default the model as it is passed, without prompt: adapters that were trained
            before are in it as they were, as in TRL.
        args: `MultiObjectiveDPOConfig`, or a plain `DPOConfig`.
        data_collator: A mopl `ListCollator`.
        train_dataset: `PreferenceData`, `TokenizedData`, or a `datasets.Dataset` (or list of rows) in TRL's preference
            format with a label column for each objective, or in any format of `mopl.language_models.readers`.
            `max_length` cuts pairs as `truncation_mode` says and lists as `ListTokenizer` does.
        processing_class: The tokenizer; by default that of the model's name.
        quantization_config: For a model that is given by name.
        loss: A loss in place of `list_loss` and `loss_type`.
        template: Of data whose tokens are mopl's, see `mopl.language_models.tokenization.ListTokenizer`.

    The other arguments are those of `MultiObjectiveTrainer`.

    Raises:
        ValueError: If an option of `DPOConfig` cannot be obeyed, or arguments do not fit.
    """

    _kind = DPOConfig
    _chat: bool | None = None  # whether the first data set that was read is written by the chat template

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: ListCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        reference_adapter: str | None = None,
        loss: LossFunction | PairLoss | None = None,
        eval_weights: Tensor | Sequence[Sequence[float]] | None = None,
        template: str = "auto",
        on_error: OnError = "raise",
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else getattr(model, "name_or_path", "") or type(model).__name__
            args = MultiObjectiveDPOConfig(f"{name.split('/')[-1]}-DPO")
        check_options(args, DPOConfig)
        model, ref_model = (os.fspath(m) if isinstance(m, os.PathLike) else m for m in (model, ref_model))
        self._dpo_args = args
        pairs = pair_loss_of(args)
        if pairs is not None:
            if loss is not None or getattr(args, "list_loss", "listwise_dpo") != "listwise_dpo":
                raise ValueError(
                    f"loss_type is {args.loss_type} (with its options), and loss or list_loss names another; pass one"
                )
            loss = pairs
        if isinstance(args.model_init_kwargs, str):
            raise ValueError(f"model_init_kwargs is {args.model_init_kwargs!r} but must be a dictionary or its JSON")
        loading: dict[str, Any] = dict(args.model_init_kwargs or {})
        if isinstance(model, str):
            loading.setdefault("trust_remote_code", args.trust_remote_code)
            if quantization_config is not None:
                loading["quantization_config"] = quantization_config
        elif quantization_config is not None:
            raise ValueError("quantization_config is for a model that is loaded here by name; quantise it when loading")
        if processing_class is None and not isinstance(train_dataset, (TokenizedData, Examples)):
            from transformers import AutoTokenizer

            name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
            if not name:
                raise ValueError("processing_class is missing and the model has no name to load one by; pass it")
            with naming_own_code(name):
                processing_class = AutoTokenizer.from_pretrained(
                    name, revision=loading.get("revision"), trust_remote_code=args.trust_remote_code
                )
        # That of a processor, which has more for images.
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer is not None and not hasattr(tokenizer, "pad_token"):
            raise TypeError(
                f"processing_class is a {type(processing_class).__name__} but must be a tokenizer of transformers, "
                "such as AutoTokenizer.from_pretrained(...) gives"
            )
        if args.sync_ref_model:
            _check_moving_reference(model, args, peft_config)
        if tokenizer is not None:
            _set_padding(tokenizer, args.pad_token)
        elif args.pad_token is not None:
            raise ValueError(f"pad_token is {args.pad_token!r} but there is no tokenizer; pass processing_class")
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics,
            callbacks,
            optimizers,
            ref_model=ref_model,
            reference_adapter=reference_adapter,
            peft_config=peft_config,
            loss=loss,
            eval_weights=eval_weights,
            model_init_kwargs=loading,
            template=template,
            on_error=on_error,
        )
        if tokenizer is not None:
            inner = causal_lm_of(self.model)
            for settings in (inner.config.get_text_config(), getattr(inner, "generation_config", None)):
                if settings is not None:
                    settings.pad_token_id = tokenizer.pad_token_id
        if args.sync_ref_model:
            refuse_sharded_moving(self.accelerator)
            if self.ref_model is None or self.reference_given:
                raise ValueError(
                    "sync_ref_model is True but the data has the reference's log-probabilities, so there is no model "
                    "that could move; leave the columns ref_chosen_logps and ref_rejected_logps out"
                )
            self.add_callback(_MovingReference(ref_model=self.ref_model, accelerator=self.accelerator))

    def _reader(self, data: Any) -> Callable[..., Examples]:
        args = self._dpo_args
        by_trl = getattr(args, "tokenization", "trl") == "trl" and is_pairs(data)
        self._check_form(data, by_trl)
        if by_trl:
            template, on_error = self._reading["template"], self._reading["on_error"]
            if template != "auto":
                raise ValueError(
                    f"template is {template!r} but pairs are written as TRL does it; pass tokenization='mopl' with it"
                )
            if is_stream(data) and args.dataset_num_proc is not None:
                raise ValueError(
                    f"dataset_num_proc is {args.dataset_num_proc} but the rows are a stream, which one process reads; "
                    "leave it out"
                )
            tokenizer = self._tokenizer
            return functools.partial(examples_of_pairs, args=args, processing_class=tokenizer, on_error=on_error)
        if not isinstance(data, Examples):  # which were made here
            refuse_options(args)
        return super()._reader(data)

    def _check_form(self, data: Any, by_trl: bool) -> None:
        """Warn where texts go through the chat template in one data set of the trainer and not in another one."""
        if isinstance(data, (Examples, TokenizedData)):
            return
        if by_trl:
            chat = not isinstance(next(iter(data))["chosen"], str)
        else:
            template = self._reading["template"]
            chat = bool(getattr(self._tokenizer, "chat_template", None)) if template == "auto" else template == "chat"
        self._chat = first = chat if self._chat is None else self._chat
        if chat != first:
            forms = ("texts as they are", "texts written by the chat template")
            warnings.warn(
                f"the first data set of the trainer holds {forms[first]}, and another one {forms[chat]} (pairs of "
                "texts are written as TRL does it, all other data by the template), so that the model is measured on "
                "texts of another form; pass tokenization='mopl' for the template in both, or rows of one kind",
                stacklevel=2,
            )


def with_reference_logps(
    dataset: Any,
    model: Any,
    args: DPOConfig | None = None,
    *,
    processing_class: Any,
    reference_store: str | os.PathLike[str],
    **options: Any,
) -> Any:
    """Return rows of pairs with columns `ref_chosen_logps` and `ref_rejected_logps`, kept in a store of references.

    The trainers here, and `trl.DPOTrainer`, read these columns; see docs/reference_store.md.

    Args:
        dataset: A `datasets.Dataset` or a list of rows in TRL's preference format. Labels and other columns beside the
            texts are kept and not read.
        model: The reference: a causal language model, plain or with PEFT's adapters. Its head is fused in place.
        args: What `max_length`, `truncation_mode` and `dataset_num_proc` are read from; by default TRL's defaults.
        processing_class: The tokenizer.
        reference_store: Folder of a `mopl.language_models.ReferenceStore`.
        **options: Of `ReferenceStore.load_or_compute`, such as `tokens_per_batch` or `accelerator`.

    Returns:
        The same kind of rows; those that TRL would leave out, because their prompt alone fills `max_length`, are not
        among them.

    Raises:
        ValueError: If `ld_alpha` is set, whose weights of tokens a store does not have, or as `examples_of_pairs`.
    """
    args = DPOConfig("unused", use_cpu=True, bf16=False) if args is None else args
    if args.ld_alpha is not None:
        raise ValueError(
            f"ld_alpha is {args.ld_alpha}, which weighs tokens, and a store of references has plain sums; leave it out"
        )
    pairs = examples_of_pairs(without_labels(dataset), args, processing_class=processing_class)
    tokens = [item.tokens for item in pairs.lists]
    collator = ListCollator(pad_id=pad_token(processing_class))
    flat = ReferenceStore(os.fspath(reference_store)).load_or_compute(tokens, model, collator=collator, **options)
    columns = dict(zip(REFERENCE_COLUMNS, flat.view(-1, 2).T.tolist(), strict=True))
    places = [item.index for item in tokens]
    if not hasattr(dataset, "add_column"):
        beside = (dict(zip(columns, pair, strict=True)) for pair in zip(*columns.values(), strict=True))
        return [{**dataset[place], **pair} for place, pair in zip(places, beside, strict=True)]
    dataset = dataset.select(places).remove_columns([name for name in columns if name in dataset.column_names])
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


class _MovingReference(SyncRefModelCallback):
    """TRL's update of the reference, which no checkpoint holds."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= args.ref_model_sync_steps:
            raise ValueError(
                f"the training is resumed at step {state.global_step}, after the reference was moved "
                f"(ref_model_sync_steps is {args.ref_model_sync_steps}), and checkpoints do not hold it; train without "
                "an interruption, or leave sync_ref_model out"
            )


def _check_moving_reference(model: Any, args: DPOConfig, peft_config: Any) -> None:
    """Raise where there is no reference of its own that `sync_ref_model` could move."""
    if isinstance(model, WeightedModel) or is_peft(model) or peft_config is not None:
        raise ValueError(
            "sync_ref_model is True but a model with adapters or a prompt is its own reference without them, and TRL "
            "raises there too; leave it out, or train a whole model"
        )
    for name in ("precompute_ref_log_probs", "reference_free"):
        if getattr(args, name, False):
            raise ValueError(f"sync_ref_model and {name} are both True, and a reference that moves is needed; pass one")


def _set_padding(tokenizer: Any, token: str | None) -> None:
    """Give a tokenizer the padding token of the arguments, or its end-of-sequence token where it has none, as TRL."""
    if token is not None and token not in tokenizer.get_vocab():
        raise ValueError(f"pad_token is {token!r}, which is not in the tokenizer's vocabulary; name a token of it")
    if token is not None or tokenizer.pad_token is None:
        tokenizer.pad_token = token or tokenizer.eos_token
