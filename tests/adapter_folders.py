"""Folders as `mopl export --adapters` writes them, made by PEFT and by hand from adapters on a tiny model."""

import json

import peft
import torch
from tiny_language_models import build

NAMES = ("helpful", "harmless", "brief")
BASE = "some-one/tiny-llama"


def with_adapters(
    ranks=(2, 3), targets=(("q_proj", "v_proj"), ("v_proj", "down_proj")), dtype=torch.float32, **options
):
    """Return a PEFT model with plain adapters of scale 1, away from their start."""
    model, wrapped = build("llama").to(dtype), None
    for name, rank, target in zip(NAMES, ranks, targets):  # noqa: B905
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(target), task_type="CAUSAL_LM", **options)
        config.base_model_name_or_path = BASE
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, name, autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
    torch.manual_seed(5)
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            with torch.no_grad():
                parameter.copy_(0.5 * torch.randn_like(parameter))
    for config in wrapped.peft_config.values():
        config.base_model_name_or_path = BASE
    return wrapped.eval()


def write(folder, model, base=BASE):
    """Write the folder of a PEFT model's adapters; return the folder."""
    names = list(model.peft_config)
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(str(folder), selected_adapters=names, save_embedding_layers=False)
    record = {
        "kind": "adapters", "mopl": "0.1.0", "objectives": names, "adapters": names, "base_model": base,
        "reference": "self", "beta": 0.1, "alpha": 1.0, "kl_weight": None,
    }  # fmt: skip
    (folder / "mopl.json").write_text(json.dumps(record))
    return folder
