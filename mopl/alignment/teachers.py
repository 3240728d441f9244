"""The teachers of distillation: other models, one for each objective, or the experts that a run has trained.

What shares the base model of a run (its experts, LoRA adapters, what another run trained on the same model) is held as
adapters on modules of its own whose parameters are the base's memory: m such teachers cost m adapters, and nothing is
switched. Any other teacher is a whole model more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._records import read_json
from mopl.conditioning import HyperPromptModel, LoraMixture, WeightedModel
from mopl.conditioning.saved_models import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    AdapterRecord,
    Record,
    base_of_adapter,
    load_adapters,
    read_kind,
)
from mopl.conditioning.weighted import causal_lm_of
from mopl.language_models import models
from mopl.language_models.collate import ListBatch
from mopl.language_models.divergences import HeadStates, states_of
from mopl.language_models.model_identity import checksum, identity_of


@dataclass(frozen=True, eq=False)
class Teacher:
    """The teacher of one objective.

    Attributes:
        name: What it is called in messages.
        model: The model, frozen, in evaluation mode.
        weights: (m,) it is asked at, if it takes weights.
    """

    name: str
    model: nn.Module
    weights: Tensor | None = None

    def states(self, batch: ListBatch) -> HeadStates:
        """Return what its head gets at the responses of a batch, without a gradient."""
        given = {} if self.weights is None else {"weights": self.weights.to(batch.mask.device)}
        return states_of(self.model, batch.inputs, **given)

    def identity(self) -> dict[str, str]:
        """Return what its answers depend on; see `mopl.language_models.identity_of`."""
        if not isinstance(self.model, WeightedModel):
            return identity_of(self.model)
        inside: Any = self.model.model
        return {**identity_of(inside), "conditioning": checksum(self.model.trained_state().items())}


def of_folder(folder: Path, base: nn.Module, weights: Tensor, name: str | None = None) -> Teacher:
    """Return what a run trained around its base model, asked at weights (m,)."""
    return Teacher(name or str(folder), models.load_model(folder, models.sharing(base)).eval(), weights.float())


def load_teacher(
    name: str,
    base: nn.Module,
    base_name: str,
    tokenizer: Any,
    objectives: Sequence[str],
    objective: int,
    **options: Any,
) -> Teacher:
    """Return a teacher by its directory or hub name.

    Args:
        name: A causal language model, a PEFT adapter, or what `mopl align` trained.
        base: The base model of the run, fused, on its device.
        base_name: Its name.
        tokenizer: Its tokenizer.
        objectives: Names of the m objectives of the run.
        objective: The number of the one that it teaches: what takes weights is asked where that one has all.
        **options: `dtype` and `attention` of `load_causal_lm`.

    Raises:
        OSError: If there is no such model.
        ValueError: If it cannot be a teacher here; the message says why.
    """
    folder = Path(name)
    inside = [*sorted(folder.glob("models/*")), *folder.glob("model"), *sorted(folder.glob("*/model"))]
    if inside := [str(each) for each in inside if (each / CONFIG_FILE).is_file()]:
        raise ValueError(f"the teacher {name} is a run; name one of its models: {', '.join(inside)}")
    if (folder / CONFIG_FILE).is_file() and (kind := read_kind(folder)) not in (None, "export"):
        record = read_json(folder / CONFIG_FILE, Record)
        if kind not in (HyperPromptModel.KIND, LoraMixture.KIND):  # others read words, or change the base model itself
            raise ValueError(
                f"the teacher {name} is a {kind}, but what takes weights teaches as a {HyperPromptModel.KIND} or a "
                f"{LoraMixture.KIND} alone; write its model of one trade-off with mopl export and name that"
            )
        if tuple(record["objectives"]) != tuple(objectives):
            raise ValueError(
                f"the teacher {name} is for the objectives {', '.join(record['objectives'])}, this run for "
                f"{', '.join(objectives)}; take one of a run on the same objectives in the same order"
            )
        if not _same_place(record["base_model"], base_name):
            raise ValueError(
                f"the teacher {name} was trained around {record['base_model']}, this run starts from {base_name}; "
                "start from the same model, or write the teacher as a model of its own with mopl export"
            )
        teacher = of_folder(folder, base, torch.eye(len(objectives))[objective])
        if teacher.model.takes_beta or teacher.model.takes_kl_weight:
            what = "β" if teacher.model.takes_beta else "a KL weight"
            raise ValueError(
                f"the teacher {name} is conditioned on {what} besides the weights, and nothing says at which it would "
                "teach; write its model of one trade-off with mopl export and name that"
            )
        return teacher
    models.check_same_tokens(name, base_name, tokenizer, "teacher")
    if _is_lora_on(name, base_name):
        model = load_adapters(models.sharing(base), {"default": folder}).eval()
        if not hasattr(
            causal_lm_of(model).get_output_embeddings(), "base_layer"
        ):  # a head with an adapter is no matrix
            return Teacher(name, model)
    return Teacher(name, models.load_causal_lm(name, **options))


def _is_lora_on(name: str, base_name: str) -> bool:
    """Say whether a folder holds a LoRA adapter of the base model of the run, which is none itself."""
    base = base_of_adapter(name)
    if base is None or base_of_adapter(base_name) is not None or not _same_place(base, base_name):
        return False
    return read_json(Path(name) / ADAPTER_CONFIG, AdapterRecord)["peft_type"] == "LORA"


def _same_place(one: str | None, other: str) -> bool:
    """Say whether two names are of one model: equal, or paths that lead to the same directory."""
    return one == other or (one is not None and Path(one).is_dir() and os.path.realpath(one) == os.path.realpath(other))
