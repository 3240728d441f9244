"""Files of parameter mixtures: all sets and the shared part as tensors, the model's configuration, and `mopl.json`."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._files import write_files
from mopl._hub import naming_own_code
from mopl._records import damaged
from mopl._tensor_files import check_shapes, read_tensors
from mopl.conditioning._parameter_mixture_parts import CoefficientRule, rule_to_save, saved_rule
from mopl.conditioning.saved_models import CONFIG_FILE, REMEDY, read_record

WEIGHTS_FILE, MODEL_FOLDER = "parameter_mixture.safetensors", "architecture"


def named_tensors(mixture: Any) -> dict[str, Tensor]:
    """Return every parameter and buffer under the name that files have, tied ones once."""
    state, seen = {}, set()
    for name, value in mixture.model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            state[f"model.{name}"] = value
    for i, parameters in enumerate(mixture.others, start=2):
        state.update({f"set_{i}.{name}": p for name, p in zip(mixture.names, parameters, strict=True)})
    return state


def save(mixture: Any, directory: str | os.PathLike[str]) -> None:
    """Write what `ParameterMixture.save_pretrained` says."""
    require("safetensors")
    from safetensors.torch import save_file

    model = mixture.model
    config = {
        "kind": "ParameterMixture",
        **mixture.record.to_dict(),
        "scope": mixture.scope,
        "sets": len(mixture.others) + 1,
        "coefficients": rule_to_save(mixture.coefficients),
        "untied": mixture.untied,
        "base_model": getattr(model, "name_or_path", "") or None,
    }
    state = {name: value.detach().cpu().contiguous() for name, value in named_tensors(mixture).items()}

    def fill(folder: Path) -> None:
        if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
            architecture = copy.deepcopy(model.config)
            if mixture.untied:
                # As the model came: its other ties, under the same switch, are there still, and the mixture that is
                # made from it unties the head again.
                for part in {id(c): c for c in (architecture, architecture.get_text_config())}.values():
                    part.tie_word_embeddings = True
            architecture.save_pretrained(str(folder / MODEL_FOLDER))
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(str(folder / MODEL_FOLDER))
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(state, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})

    write_files(directory, fill, last=WEIGHTS_FILE)


def read(
    directory: str | os.PathLike[str],
    model: nn.Module | None,
    coefficients: CoefficientRule | None,
    model_kwargs: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor], nn.Module, CoefficientRule | None]:
    """Return what a folder says of a mixture, its tensors, the model to put them into, and the coefficients."""
    folder = Path(directory)
    config = read_record(folder, "ParameterMixture", WEIGHTS_FILE)
    coefficients = saved_rule(config["coefficients"], coefficients, folder)
    state = read_tensors(folder / WEIGHTS_FILE, remedy=REMEDY)
    sets = len({name.partition(".")[0] for name in state if name.startswith("set_")}) + 1
    if config["sets"] != sets:
        text = f"it has {sets} sets but {folder / CONFIG_FILE} says {config['sets']}"
        raise damaged(folder / WEIGHTS_FILE, f"{text}, so they do not fit", REMEDY)
    if model is None:
        if not (folder / MODEL_FOLDER).is_dir():
            raise ValueError(f"{folder} holds no configuration of a model; pass the model")
        require("transformers")
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        source = str(folder / MODEL_FOLDER)
        dtype = next((value.dtype for name, value in state.items() if name.startswith("model.")), None)
        options = {"dtype": dtype, "trust_remote_code": False, **model_kwargs}
        with naming_own_code(source):
            known = AutoConfig.from_pretrained(source, trust_remote_code=options["trust_remote_code"])
            model = AutoModelForCausalLM.from_config(known, **options)
        if (folder / MODEL_FOLDER / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source)  # type: ignore[union-attr]
    elif model_kwargs:
        raise ValueError(f"{sorted(model_kwargs)} are for a model that is made here, but model was passed")
    assert model is not None
    return config, state, model, coefficients


@torch.no_grad()
def fill(mixture: Any, state: dict[str, Tensor], directory: str | os.PathLike[str]) -> None:
    """Put the tensors of a folder into a mixture.

    Raises:
        DamagedFile: If they have other names or shapes than its own.
    """
    own = named_tensors(mixture)
    shapes, wanted = ({name: value.shape for name, value in each.items()} for each in (state, own))
    check_shapes(Path(directory) / WEIGHTS_FILE, shapes, wanted, remedy=REMEDY)
    for name, value in state.items():
        own[name].copy_(value)
