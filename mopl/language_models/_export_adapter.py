"""Exports as adapters of PEFT: a mixture as one adapter, a prompt as prompt tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mopl._extras import require
from mopl.conditioning import HyperPromptModel, LoraMixture
from mopl.conditioning.causal_lm import is_peft


def save_mixed_adapter(model: LoraMixture, weights: Tensor, path: Path) -> None:
    """Write Σ w_i B_i A_i as one LoRA adapter, exactly: its factors are those of the m adapters side by side.

    The rank is the sum of theirs, so no factorisation is needed and nothing is lost.

    Raises:
        ValueError: If an adapter's scale is not what PEFT can carry over.
    """
    name, peft_model = "mopl_mixture", model.model
    coefficients = model.coefficients_of(weights).tolist()
    tuner = peft_model.base_model
    tuner.add_weighted_adapter(model.adapters, coefficients, adapter_name=name, combination_type="cat")
    try:
        if any(layer.scaling[name] != 1 for layer in model._layers):
            raise ValueError("the adapters use a scale of another kind than lora_alpha / r; pass kind='model'")
        peft_model.save_pretrained(str(path), selected_adapters=[name])
    finally:
        tuner.delete_adapter(name)
        tuner.set_adapter(model.adapters)
    # PEFT puts every adapter but the one called "default" into a folder of its name; loaders look for it above.
    for file in sorted((path / name).iterdir()):
        file.rename(path / file.name)
    (path / name).rmdir()


def save_prompt(model: HyperPromptModel, prefix: Tensor, path: Path) -> None:
    """Write a prompt as PEFT's prompt tuning."""
    require("peft", "safetensors")
    from peft import PromptTuningConfig, TaskType
    from safetensors.torch import save_file

    if is_peft(model.model):
        raise ValueError(
            "the model has a prompt and adapters, and a PEFT adapter is one or the other; pass kind='model', which "
            "merges the adapters and writes the prompt into the vocabulary"
        )
    config: Any = model.causal_lm.config.get_text_config()
    adapter = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=getattr(model.causal_lm, "name_or_path", "") or None,  # type: ignore[arg-type]
        num_virtual_tokens=prefix.shape[0],
        token_dim=prefix.shape[1],
        num_transformer_submodules=1,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        inference_mode=True,
    )
    adapter.save_pretrained(str(path))
    tensors: Mapping[str, Tensor] = {"prompt_embeddings": prefix.cpu().contiguous()}
    save_file(dict(tensors), str(path / "adapter_model.safetensors"), metadata={"format": "pt"})
