"""The base models of what was trained: by name, by a record, or a PEFT adapter merged into its own base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mopl._extras import require
from mopl._hub import naming_own_code
from mopl._records import read_json
from mopl.conditioning.merging import merged, settle_merged
from mopl.conditioning.saved_models import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    REMEDY,
    AdapterRecord,
    adapter_folder,
    adapters_of,
    check_options,
    fitting,
    load_adapters,
    read_kind,
)


def base_of_adapter(name: str) -> str | None:
    """Return the base model that the PEFT adapter in a folder names; None for anything else than such a folder."""
    folder = Path(name)
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    if (folder / CONFIG_FILE).is_file() and (kind := read_kind(folder)) not in (None, "export"):
        raise ValueError(
            f"{name} holds a {kind}, whose adapter is a part of what it does; write its model of one trade-off with "
            "mopl export and name that"
        )
    base = read_json(folder / ADAPTER_CONFIG, AdapterRecord, remedy=REMEDY).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{name} holds a PEFT adapter, but its {ADAPTER_CONFIG} names no base model; write its directory or name "
            "on the hub there, as base_model_name_or_path"
        )
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{name} holds a PEFT adapter whose base model {base} is a PEFT adapter too; merge that one first, and "
            "write the merged model's directory as base_model_name_or_path"
        )
    return base


@contextlib.contextmanager
def naming_base(name: str, base: str) -> Iterator[None]:
    """Say of a base model that cannot be loaded inside the `with` block whose base it is."""
    try:
        yield
    except PermissionError:
        raise
    except OSError as error:
        raise OSError(
            f"{name} holds a PEFT adapter of the base model {base}, which cannot be loaded ({error}); put it there, or "
            f"write its place into {Path(name) / ADAPTER_CONFIG}, as base_model_name_or_path"
        ) from error


@torch.no_grad()
def merge_adapter(name: str, model: Any) -> Any:
    """Return a base model, not fused, with the adapter of a folder merged in; it is changed.

    In its own dtype: summed in float32, rounded once. What is quantised, or a kind that cannot be merged, is an error.
    """
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"the adapter of {name} cannot be merged into quantised parameters; write another base model")
    dtype, wrapped = model.dtype, load_adapters(model, {"default": Path(name)})
    kind = type(wrapped.peft_config["default"]).__name__.removesuffix("Config")
    remedy = "start from its base model, or in Python pass the PEFT model to a trainer of mopl.integrations"
    if wrapped.peft_config["default"].is_prompt_learning or not hasattr(wrapped, "merge_and_unload"):
        raise ValueError(f"{name} holds a PEFT adapter of kind {kind}, which cannot be merged; {remedy}")
    try:
        plain = merged(wrapped, dtype)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the adapter of {name} ({kind}) cannot be merged: {error}; {remedy}") from error
    settle_merged(plain)
    plain.name_or_path = plain.config._name_or_path = name
    return plain.eval()


def base_with_adapters(
    record: Mapping[str, Any], folder: Path, model: Any, options: Mapping[str, Any], *, trainable: bool
) -> Any:
    """Return the base model that was passed, or the one that a record names, with the adapters that it speaks of.

    Raises:
        ValueError: If there is neither, or an adapter does not fit it.
    """
    model = _base_model(record, folder, model, options)
    if not (adapters := adapters_of(record)):
        return model
    with fitting(folder / CONFIG_FILE):
        return load_adapters(model, {name: adapter_folder(folder, name) for name in adapters}, trainable=trainable)


def _base_model(record: Mapping[str, Any], folder: Path, model: Any, options: Mapping[str, Any]) -> Any:
    check_options(model, options)
    if model is not None:
        return model
    if record["base_model"] is None:
        raise ValueError(f"{folder / CONFIG_FILE} names no base model; pass it as model")
    require("transformers")
    from transformers import AutoModelForCausalLM

    name, options = record["base_model"], {"trust_remote_code": False, **options}
    if (base := base_of_adapter(name)) is not None:
        with naming_base(name, base), naming_own_code(base):
            return merge_adapter(name, AutoModelForCausalLM.from_pretrained(base, **options))
    with naming_own_code(name):
        return AutoModelForCausalLM.from_pretrained(name, **options)
