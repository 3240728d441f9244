"""What a trainer checks and chooses before it begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mopl.alignment.collate import ListCollator
from mopl.conditioning.hyper_prompt_model import HyperPromptModel
from mopl.integrations._data import Example, Examples
from mopl.integrations._settings import ObjectiveArguments


def write_record(
    model: HyperPromptModel, objectives: tuple[str, ...], settings: ObjectiveArguments, beta: float
) -> None:
    """Note in a model what its weights mean, for `save_pretrained`.

    Raises:
        ValueError: If it is for other objectives.
    """
    record = model.record
    unnamed = tuple(f"objective_{j + 1}" for j in range(len(record.objectives)))
    if len(record.objectives) != len(objectives) or record.objectives not in (unnamed, objectives):
        raise ValueError(
            f"the model is for {', '.join(record.objectives)} but the data has {', '.join(objectives)}; "
            "name the same objectives, in the same order"
        )
    box = None if settings.beta_low is None else (settings.beta_low, settings.beta_high)
    model.record = dataclasses.replace(
        record,
        objectives=objectives,
        beta=box or settings.objective_beta or beta,
        alpha=settings.weights_alpha if settings.objective_weights is None else None,
    )


def check_arguments(args: Any) -> None:
    """Raise where an argument of `Trainer` would be dropped without a word."""
    remedies = {
        "label_smoothing_factor": (
            0.0,
            "pass loss=functools.partial(...) with label smoothing, or TRL's label_smoothing",
        ),
        "batch_eval_metrics": (False, "leave it at False"),
        "eval_do_concat_batches": (True, "leave it at True"),
        "include_for_metrics": ([], "leave it empty; compute_metrics gets losses and accuracies"),
    }
    for name, (wanted, remedy) in remedies.items():
        if getattr(args, name, wanted) != wanted:
            raise ValueError(f"{name} is {getattr(args, name)!r} but has no meaning here; {remedy}")
    fused = (getattr(args, "liger_kernel_config", None) or {}).get("fused_linear_cross_entropy", True)
    if getattr(args, "use_liger_kernel", False) and fused:
        raise ValueError(
            "use_liger_kernel replaces the model's forward, which is fused here; "
            "pass liger_kernel_config={'fused_linear_cross_entropy': False} with it"
        )


def default_collator(args: Any, processing_class: Any, sets: Sequence[Examples]) -> ListCollator:
    multiple = getattr(args, "pad_to_multiple_of", None)
    packed = getattr(args, "padding_free", False)
    token = next(
        (
            getattr(processing_class, name)
            for name in ("pad_token_id", "eos_token_id")
            if getattr(processing_class, name, None) is not None
        ),
        0,
    )
    some = any(_partly_labelled(example) for value in sets for example in value.lists)
    return ListCollator(packed=packed, pad_id=token, pad_to_multiple_of=multiple, partial="keep" if some else "drop")


def _partly_labelled(example: Example) -> bool:
    missing = example.tokens.labels != example.tokens.labels  # NaN
    return bool((missing.any(-1) & ~missing.all(-1)).any())


def with_width(collator: ListCollator, width: int) -> ListCollator:
    return ListCollator(
        packed=collator.packed,
        padding_side=collator.padding_side,  # type: ignore[arg-type]
        pad_id=collator.pad_id,
        pad_to_multiple_of=collator.pad_to_multiple_of,
        width=width,
    )
