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
need a second model as its reference, loaded by name, which neither a `HyperPromptModel` nor a model from memory can
give. And what a subclass would override (`_compute_loss`, `_metrics`, `_precompute_ref_logps`) is private and differs
from release to release. All that would be left to inherit is the wrapping of a model in adapters and the log.

Of TRL only `DPOConfig` is used, so one source serves TRL 1.10 to 1.16. Every option of it is either obeyed or refused
with an error that says what to do; none is dropped. With pairs, one objective that prefers `chosen`, and the default
settings, loss and gradients are those of `DPOTrainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import Tensor

from mopl._extras import require

require("trl", "transformers", "accelerate", what="mopl.integrations.trl", extra="trl")
from trl import DPOConfig  # type: ignore[attr-defined]

from mopl.alignment.collate import ListCollator
from mopl.alignment.tokenization import TokenizedData
from mopl.integrations._data import Examples
from mopl.integrations._objective import ListLoss, PairLoss
from mopl.integrations._settings import ObjectiveArguments
from mopl.integrations.transformers import MultiObjectiveTrainer
from mopl.losses._pair_formulas import LOSSES

__all__ = ["MultiObjectiveDPOConfig", "MultiObjectiveDPOTrainer"]

# Options of DPOConfig that are refused, with the remedy.
_REFUSED = {
    "router_aux_loss_coef": "add the load-balancing loss of a mixture of experts in a subclass's compute_loss",
    "dataset_num_proc": "tokenise in processes of your own and pass mopl.alignment.tokenization.TokenizedData",
    "truncation_mode": "lists are cut as mopl.alignment.tokenization says: the prompt first, responses at their end",
    "ld_alpha": "pass length_normalized=True, or use TRL's own trainer",
    "use_weighting": "use TRL's own trainer for WPO",
    "activation_offloading": "use gradient_checkpointing",
    "sync_ref_model": "pass a ref_model that a callback of your own updates",
    "pad_token": "set tokenizer.pad_token",
}


@dataclass
class MultiObjectiveDPOConfig(ObjectiveArguments, DPOConfig):
    """Arguments of `MultiObjectiveDPOTrainer`: those of `trl.DPOConfig` and of `ObjectiveArguments`.

    `loss_type` names losses of pairs and takes part only where it is not `"sigmoid"` alone, or where an option that
    belongs to it (`label_smoothing`, `f_divergence_type`) is set; otherwise `list_loss` is the loss, and its default is
    the same on pairs.
    """


class MultiObjectiveDPOTrainer(MultiObjectiveTrainer):
    """Trains on pairs or lists with labels for m objectives, with the arguments of TRL's `DPOTrainer`.

    Args:
        model: A `HyperPromptModel` (takes w), a PEFT model, a causal language model, or the name of one.
        ref_model: The reference; by default the model without adapters and prompt, or a frozen copy of a plain model.
            (TRL takes the state in which a PEFT model was passed for its reference; here adapters are off in it.)
        args: `MultiObjectiveDPOConfig`, or a plain `DPOConfig`.
        data_collator: A mopl `ListCollator`.
        train_dataset: `PreferenceData`, `TokenizedData`, or a `datasets.Dataset` in TRL's preference format with a
            label column for each objective, or in any format of `mopl.alignment.readers`.
        eval_dataset: The same, or a dictionary of them.
        processing_class: The tokenizer; by default that of the model's name.
        compute_metrics: See `MultiObjectiveTrainer`.
        callbacks: As in TRL.
        optimizers: As in TRL.
        quantization_config: For a model that is given by name.
        peft_config: Adapters to put on a model that has none.
        loss: A loss in place of `list_loss` and `loss_type`.
        eval_weights: (n, m) points of the grid of w for evaluation.

    Raises:
        ValueError: If an option of `DPOConfig` cannot be obeyed, or arguments do not fit.
    """

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
        *,
        quantization_config: Any = None,
        peft_config: Any = None,
        loss: ListLoss | PairLoss | None = None,
        eval_weights: Tensor | Sequence[Sequence[float]] | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else getattr(model, "name_or_path", "") or type(model).__name__
            args = MultiObjectiveDPOConfig(f"{name.split('/')[-1]}-DPO")
        _refuse(args)
        pairs = pair_loss_of(args)
        if pairs is not None:
            if loss is not None or getattr(args, "list_loss", "listwise_dpo") != "listwise_dpo":
                raise ValueError(
                    f"loss_type is {args.loss_type} (with its options), and loss or list_loss names another; pass one"
                )
            loss = pairs
        loading = dict(args.model_init_kwargs or {}) if not isinstance(args.model_init_kwargs, str) else {}
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
            processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
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
            peft_config=peft_config,
            loss=loss,
            eval_weights=eval_weights,
            model_init_kwargs=loading,
        )


def _refuse(args: DPOConfig) -> None:
    """Raise for an option that is set and has no part in this trainer."""
    defaults = {entry.name: entry.default for entry in fields(DPOConfig)}
    for name, remedy in _REFUSED.items():
        default = defaults.get(name, MISSING)
        if default is not MISSING and getattr(args, name) != default:
            raise ValueError(f"{name} is {getattr(args, name)!r}, which this trainer does not have: {remedy}")


def pair_loss_of(args: DPOConfig) -> PairLoss | None:
    """Return the loss of pairs that `loss_type` and its options ask for; None where a list loss is the same.

    Raises:
        ValueError: If a type is unknown, or an option is set that no chosen type has.
    """
    types = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    weights = [1.0] * len(types) if args.loss_weights is None else list(args.loss_weights)
    unknown = [name for name in types if name not in LOSSES]
    if unknown:
        raise ValueError(f"loss_type {unknown} is unknown here; there are {', '.join(LOSSES)}")
    named = {
        "label_smoothing": (args.label_smoothing, 0.0),
        "f_divergence": (args.f_divergence_type, "reverse_kl"),
        "f_alpha": (args.f_alpha_divergence_coef, 0.5),
        "discopop_tau": (args.discopop_tau, 0.05),
    }
    chosen = {option: value for option, (value, default) in named.items() if value != default}
    if types == ["sigmoid"] and weights == [1.0] and not chosen:
        return None
    options = {name: {o: v for o, v in chosen.items() if o in LOSSES[name].options} for name in types}
    for option in chosen:
        if not any(option in options[name] for name in types):
            users = ", ".join(name for name, kind in LOSSES.items() if option in kind.options)
            raise ValueError(f"{option} is set but loss_type {types} has no use for it; it belongs to {users}")
    return PairLoss(types, weights, options)
