"""Models as the trainers need them: fused, with or without conditions, and their reference."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._hub import naming_own_code
from mopl._renamed import renamed_parameter
from mopl._tensor_files import load_state
from mopl.conditioning.adapter_base import base_of_adapter
from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.hyper_prompt_model import WEIGHTS_FILE, HyperPromptModel
from mopl.conditioning.saved_models import ADAPTER_FILE, adapter_folder, check_adapter, check_adapter_state, read_record
from mopl.conditioning.weighted import Conditioned, causal_lm_of
from mopl.language_models.collate import ListBatch
from mopl.language_models.head import fuse
from mopl.training.parallel import distribution_of

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # no process has the whole model


@dataclass(frozen=True)
class Conditions:
    """What a model's forward takes beside text: weights of objectives, and β under a name of its own."""

    weights: bool
    beta: str | None

    @classmethod
    def of(cls, model: nn.Module) -> Conditions:
        """Read them off a model: `HyperPromptModel`, or any whose forward has an argument `weights`."""
        if isinstance(model, HyperPromptModel):
            return cls(True, "beta" if model.hyper_prompt.takes_beta else None)
        forward = type(model).forward
        names, beta = inspect.signature(forward).parameters, renamed_parameter(forward, "objective_temperature", "beta")
        return cls("weights" in names, beta if beta in names else None)

    def keywords(self, batch: ListBatch, weights: Any, beta: Any) -> dict[str, Tensor]:
        """Return that of a batch, one row a sequence, from w and β of its lists, (B, m) each."""
        of_lists = ({"weights": weights} if self.weights else {}) | ({self.beta: beta} if self.beta else {})
        return {name: value[batch.index[:, 0]] for name, value in of_lists.items()}


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
        if isinstance(model, HyperPromptModel) or is_peft(model):
            raise ValueError(
                f"peft_config was passed with a {type(model).__name__}; wrap the causal language model with "
                "peft.get_peft_model first and pass the result (or a HyperPromptModel around it)"
            )
        require("peft")
        from peft import PeftConfig, get_peft_model

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"peft_config is a {type(peft_config).__name__} but must be a peft.PeftConfig, such as peft.LoraConfig"
            )
        model = get_peft_model(model, peft_config)
    if isinstance(model, Conditioned) and not isinstance(model, HyperPromptModel):
        raise ValueError(
            f"model is a {type(model).__name__}, whose reference at each w the trainers do not know; use "
            "`mopl align --conditioning lora-mixture` (on rewards: --method clp), or a HyperPromptModel"
        )
    fuse(causal_lm_of(model))
    return model


def load_hyper_prompt(model: HyperPromptModel, folder: str | Path) -> None:
    """Load what `save_pretrained` wrote into a model that is there already, so that its optimizer stays valid."""
    folder = Path(folder)
    if not (folder / WEIGHTS_FILE).exists():
        raise ValueError(f"{folder} is no checkpoint of a HyperPromptModel: it has no {WEIGHTS_FILE}")
    config = read_record(folder, "HyperPromptModel")
    objectives = tuple(config["objectives"])
    if objectives != model.record.objectives:
        raise ValueError(f"{folder} was trained on {objectives} but the model is for {model.record.objectives}")
    load_state(model.hyper_prompt, folder / WEIGHTS_FILE)
    adapter = config["adapter"]
    if (adapter is not None) != is_peft(model.model):
        raise ValueError(f"{folder} has {'an' if adapter else 'no'} adapter but the model differs in that")
    if adapter is not None:
        require("peft")
        from peft import load_peft_weights, set_peft_model_state_dict

        path = adapter_folder(folder, adapter)
        device = str(next(model.parameters()).device)
        peft_model: Any = model.model
        check_adapter(path)
        check_adapter_state(peft_model, adapter, path / ADAPTER_FILE)
        set_peft_model_state_dict(peft_model, load_peft_weights(str(path), device=device), adapter_name=adapter)


def check_sharding(accelerator: Any) -> None:
    """Raise where a `HyperPromptModel`, or a reference that is more than adapters off, would have to be sharded."""
    if (kind := distribution_of(accelerator)) in SHARDED:
        raise NotImplementedError(
            f"training under {kind} works for a plain model, or one with PEFT adapters, that is its own reference with "
            "adapters off or has precompute_ref_log_probs; a HyperPromptModel, a separate ref_model, and adapters that "
            "were trained before or have a reference_adapter train on one device or under DDP"
        )
