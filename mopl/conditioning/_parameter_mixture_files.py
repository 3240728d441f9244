"""Files of parameter mixtures beside `mopl.json`: all sets, the shared part, the configuration of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mopl._extras import require
from mopl._hub import naming_own_code

WEIGHTS_FILE, MODEL_FOLDER = "parameter_mixture.safetensors", "architecture"


def write(folder: Path, model: Any, tensors: Mapping[str, Tensor], *, untied: bool) -> None:
    """Write tensors, and the configuration of the model that they are of, whose head the mixture may have untied."""
    require("safetensors")
    from safetensors.torch import save_file

    if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
        architecture = copy.deepcopy(model.config)
        if untied:
            # As the model came: its other ties, under the same switch, are there still, and the mixture that is made
            # from it unties the head again.
            for part in (architecture, architecture.get_text_config()):
                part.tie_word_embeddings = True
        architecture.save_pretrained(str(folder / MODEL_FOLDER))
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(str(folder / MODEL_FOLDER))
    state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(state, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})


def new_model(folder: Path, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Any:
    """Return a causal language model of the configuration in a folder, in the dtype of its tensors."""
    source = folder / MODEL_FOLDER
    if not source.is_dir():
        raise ValueError(f"{folder} holds no configuration of a model; pass the model")
    require("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    dtype = next((value.dtype for name, value in tensors.items() if name.startswith("model.")), None)
    options = {"dtype": dtype, "trust_remote_code": False, **options}
    with naming_own_code(str(source)):
        known = AutoConfig.from_pretrained(str(source), trust_remote_code=options["trust_remote_code"])
        model = AutoModelForCausalLM.from_config(known, **options)
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source))
    return model
