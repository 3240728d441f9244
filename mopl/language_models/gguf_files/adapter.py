"""`write_gguf_adapter`: a LoRA adapter of PEFT as a GGUF file.

llama.cpp adds (scale · alpha / rank) B A to a weight, with one alpha in a file, the rank of each pair and the scale of
a request. PEFT adds s B A, with an s of each pair: alpha / rank, alpha / √rank, or by patterns. Where all pairs have
one s · rank, that is the file's alpha and the factors are those of PEFT, bit by bit; else alpha is the largest rank R,
and B is multiplied by s · rank / R. Either way scale 1 is the adapter as PEFT has it.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopl._extras import require
from mopl._records import read_json
from mopl.conditioning.saved_models import ADAPTER_CONFIG, ADAPTER_FILE
from mopl.language_models.gguf_files.families import REMEDY, family_of
from mopl.language_models.gguf_files.files import Entry, Planned, write_gguf
from mopl.language_models.gguf_files.tensors import Layout, plan

# Options of PEFT's LoraConfig that are obeyed below, or have done what they do before an adapter is saved.
_OBEYED = frozenset((
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights", "megatron_core", "qalora_group_size",
))  # fmt: skip
_FACTOR = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")


def write_gguf_adapter(
    folder: str | os.PathLike[str],
    config: Any,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    show_progress: bool = False,
) -> Path:
    """Write a LoRA adapter, a folder of PEFT, as a GGUF file in float32, whole or not at all.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.
        config: Configuration of the base model, of transformers.
        path: The file; one that is there is replaced.
        name: What the file says the adapter is called.
        show_progress: Show on standard error how far it is.

    Returns:
        The file.

    Raises:
        ImportError: If gguf or peft is not installed.
        OSError: If files cannot be read or written.
        ValueError: If the base model is none that llama.cpp is known to compute, or the adapter is more than a LoRA.
    """
    require("gguf", "peft", "safetensors", "transformers", what="GGUF", extra="demo-lm")
    from gguf import Keys
    from peft import PeftConfig
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    settings: Any = PeftConfig.from_pretrained(str(folder))
    _check_settings(settings, folder)
    with torch.device("meta"):  # shapes alone
        base = AutoModelForCausalLM.from_config(config)
    family = family_of(base)
    shapes = {name: tuple(p.shape) for name, p in base.state_dict().items()}
    pairs = _pairs(load_file(str(folder / ADAPTER_FILE)), folder)
    totals = {module: _scale(settings, module, a.shape[0]) * a.shape[0] for module, (a, _) in pairs.items()}
    alike = len(set(totals.values())) == 1
    alpha = next(iter(totals.values())) if alike else float(max(a.shape[0] for a, _ in pairs.values()))
    layout = Layout(config, family)
    tensors: list[Planned] = []
    for module, (a, b) in pairs.items():
        weight = f"{module}.weight"
        embedding = module == "model.embed_tokens"
        wanted = shapes.get(weight)
        if wanted is None or (wanted if not embedding else wanted[::-1]) != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"{folder.name} adapts {module} of shape {(b.shape[0], a.shape[1])} but the base model has "
                f"{wanted or 'none'} there; is it the adapter's base?"
            )
        if module in ("model.embed_tokens", "lm_head") and config.tie_word_embeddings:
            raise ValueError(
                f"{folder.name} adapts {module}, which is tied to another matrix here; llama.cpp has one tensor of the "
                "two. Merge it (`mopl export RUN --weights W.. DIR`), or train without it"
            )
        factor = 1.0 if alike else totals[module] / alpha
        a = a.float().T if embedding else a.float()  # llama.cpp looks rows of it up
        b = layout.rows(weight, b.float()) * factor if factor != 1 else layout.rows(weight, b.float())
        tensors += [plan(f"{layout.name(weight)}.lora_a", a), plan(f"{layout.name(weight)}.lora_b", b)]
    entries = [
        Entry(Keys.General.TYPE, "adapter", "STRING"),
        Entry(Keys.General.NAME, name or folder.name, "STRING"),
        Entry(Keys.Adapter.TYPE, "lora", "STRING"),
        Entry(Keys.Adapter.LORA_ALPHA, alpha, "FLOAT32"),
    ]
    return write_gguf(path, family.architecture, entries, tensors, show_progress=show_progress)


def _check_settings(settings: Any, folder: Path) -> None:
    """Raise for what makes an adapter more than the LoRA that llama.cpp computes."""
    from peft import LoraConfig

    kind = getattr(settings.peft_type, "value", settings.peft_type)
    if kind != "LORA":
        raise ValueError(f"{folder.name} is an adapter of the kind {kind} but llama.cpp has LoRA alone; merge it")
    known = LoraConfig().to_dict()
    for name, value in read_json(folder / ADAPTER_CONFIG).items():
        if name not in known and value:  # PEFT reads on without it
            raise ValueError(
                f"{name} of {folder.name} is {value!r}, an option that the installed PEFT does not know; install a "
                "newer one"
            )
    for name, plain in known.items():
        if name not in _OBEYED and (getattr(settings, name, None) or None) != (plain or None):
            raise ValueError(
                f"{name} of {folder.name} is {getattr(settings, name)!r} but llama.cpp has plain LoRA alone "
                f"({plain!r}): merge the adapter into the model (`mopl export RUN --weights W.. DIR`)"
            )
    # Other ways to begin change the base model, too.
    if settings.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights of {folder.name} is {settings.init_lora_weights!r}, with which the base model is not "
            "as its files have it: save the adapter with PEFT's path_initial_model_for_weight_conversion, or merge it"
        )


def _pairs(tensors: dict[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (r, in) and B (out, r) of each module that is adapted."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise ValueError(
                f"{folder.name} holds {name}, which is no factor of a LoRA of a matrix; merge the adapter into the "
                f"model (`mopl export RUN --weights W.. DIR`). {REMEDY[0].upper()}{REMEDY[1:]}"
            )
        parts[match[1]]["A" if match[2].endswith(("_A", "_A.weight")) else "B"] = tensor
    for module, pair in parts.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = {name: tuple(tensor.shape) for name, tensor in pair.items()}
            raise ValueError(f"{folder.name} has {shapes} for {module} but must have A (r, in) and B (out, r)")
    if not parts:
        raise ValueError(f"{folder.name} holds no factors")
    return {module: (pair["A"], pair["B"]) for module, pair in parts.items()}


def _scale(settings: Any, module: str, rank: int) -> float:
    """Return what PEFT multiplies B A by."""
    wanted = _by_pattern(settings.rank_pattern, module, settings.r)
    if wanted != rank:
        raise ValueError(f"the adapter's settings have rank {wanted} for {module} but its file has {rank}")
    alpha = _by_pattern(settings.alpha_pattern, module, settings.lora_alpha)
    return alpha / (math.sqrt(rank) if settings.use_rslora else rank)


def _by_pattern(patterns: dict[str, Any], module: str, otherwise: Any) -> Any:
    """Return the first pattern's value that a module's name ends with, as PEFT chooses."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), module), otherwise)
