"""Parts of parameter mixtures: what a scope names, a new model for the sets of a folder, rows that share a mixture."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mopl._arguments import shape_of
from mopl._extras import require
from mopl._hub import naming_own_code
from mopl._restoring import freeze
from mopl._sharded import is_dtensor
from mopl.conditioning.causal_lm import output_head
from mopl.conditioning.merging import set_name

SCOPES = ("full", "attention", "logits")
MODEL_FOLDER = "architecture"
_steps = {"taken": 0}  # by all optimizers
# Keywords of transformers whose tensors hold positions or tokens, as many as there are rows by chance.
_NO_ROWS = re.compile("logits_to_keep$|cache_position$|token_ids?$|_tokens(_ids)?$")


def select_parameters(model: nn.Module, scope: str) -> list[str]:
    """Return the names of the parameters of a scope; a tied parameter once, under its first name.

    "full" are all, "attention" those inside modules whose class is an attention, "logits" those of the output head,
    and anything else is a regular expression that some of a parameter's names must match (`re.search`).
    """
    every = list(model.named_parameters(remove_duplicate=False))
    if scope == "attention":
        modules = (name for name, module in model.named_modules() if "attention" in type(module).__name__.lower())
        prefixes = tuple(f"{name}." if name else "" for name in modules)
        chosen = {id(parameter) for name, parameter in every if name.startswith(prefixes)}
    elif scope == "logits":
        chosen = {id(parameter) for parameter in output_head(model).parameters()}
    elif scope == "full":
        chosen = {id(parameter) for _, parameter in every}
    else:
        try:
            pattern = re.compile(scope)
        except re.error as error:
            raise ValueError(f"scope is {scope!r}, neither of {', '.join(SCOPES)} nor a pattern: {error}") from None
        chosen = {id(parameter) for name, parameter in every if pattern.search(name)}
    first = dict(model.named_parameters())
    names = [name for name, parameter in first.items() if id(parameter) in chosen and parameter.is_floating_point()]
    if not names:
        raise ValueError(
            f"scope={scope!r} names no parameter of {type(model).__name__}; its parameters are "
            f"{', '.join(list(first)[:8])}, ..."
        )
    return names


def new_model(
    folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> Any:
    """Return a causal language model of the configuration in a folder, in the dtype of its tensors.

    It has the name of the base model, not of that folder, and is frozen where the one was that was saved.
    """
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
    set_name(model, record["base_model"] or "")
    freeze(model, record.get("frozen") or ())
    return model


def _count_step(*_: Any) -> None:
    _steps["taken"] += 1


register_optimizer_step_post_hook(_count_step)  # fused ones leave the versions of parameters as they are


def state_of(sets: Sequence[Sequence[nn.Parameter]]) -> tuple[Any, ...]:
    """Return what changes where parameters do, and what kind of tensors are made of them."""
    own = [(p._version, p.data_ptr(), p.dtype, p.device) for each in sets for p in each]
    return (*own, _steps["taken"], torch.is_inference_mode_enabled())


def check_whole(sets: list[list[nn.Parameter]]) -> list[list[nn.Parameter]]:
    """Return sets of parameters; raise where FSDP2 or tensor parallelism has cut some of them into shards."""
    if any(is_dtensor(parameter) for each in sets for parameter in each):
        raise NotImplementedError(
            "parameters of the ParameterMixture are cut into shards, and it mixes them before its layers run, where "
            "none of them is gathered; train it with DDP, or take a LoraMixture"
        )
    return sets


# ---------------------------------------------------------------- rows that share a mixture


def group_rows(coefficients: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the distinct rows (G, sets) of coefficients (B, sets), and for each the indices of its rows."""
    distinct, inverse = torch.unique(coefficients, dim=0, return_inverse=True)
    return distinct, [(inverse == g).nonzero()[:, 0] for g in range(len(distinct))]


def rows_of(
    index: Tensor, rows: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return arguments with these rows alone of tensors whose first dimension is the batch; others as they are."""

    def cut(value: Any, name: str = "") -> Any:
        batched = isinstance(value, Tensor) and value.ndim and len(value) == rows and not _NO_ROWS.search(name)
        return value[index.to(value.device)] if batched else value

    return [cut(value) for value in args], {name: cut(value, name) for name, value in kwargs.items()}


def check_batch(values: Sequence[Any], rows: int) -> None:
    """Raise unless some tensor has a row for each row of the weights, and none another number of them."""
    shapes = [tuple(v.shape) for v in values if isinstance(v, Tensor) and v.ndim > 1]
    if not any(s[0] == rows for s in shapes) or any(s[0] not in (1, rows) for s in shapes):
        raise ValueError(
            f"weights has {rows} rows but the inputs have the shapes {shapes}; pass one weight vector a row, or (m,)"
        )


def no_cache(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword that keeps a causal language model from returning a cache, which cannot be put together."""
    if kwargs.get("past_key_values") is not None:
        raise ValueError("a cache belongs to one mixture; pass one weight vector (m,), or use generate()")
    inner = getattr(model, "get_base_model", lambda: model)()  # PEFT's wrapper hands on whatever it gets
    takes = "use_cache" in inspect.signature(type(inner).forward).parameters
    return {"use_cache": False} if takes and "use_cache" not in kwargs else {}


def join_rows(parts: Sequence[Any], groups: Sequence[Tensor]) -> Any:
    """Put outputs of groups of rows together in the rows' order: tensors, and tuples, mappings, dataclasses of them."""
    first = parts[0]
    if all(part is None for part in parts):
        return None
    if isinstance(first, Tensor):
        if any(p.ndim == 0 or len(p) != len(g) for p, g in zip(parts, groups, strict=True)):
            raise ValueError(
                f"an output of shape {shape_of(first)} has no row for each input, so outputs of rows with different "
                "weights cannot be put together; compute losses outside of the model (no labels), or pass (m,) weights"
            )
        order = torch.cat([g.to(first.device) for g in groups]).argsort()
        return torch.cat(list(parts))[order]
    if isinstance(first, Mapping):
        joined = {key: join_rows([part[key] for part in parts], groups) for key in first}
        return type(first)(**joined)
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return type(first)(**{n: join_rows([getattr(part, n) for part in parts], groups) for n in names})  # type: ignore
    if isinstance(first, (tuple, list)):
        values = [join_rows(list(each), groups) for each in zip(*parts, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    raise ValueError(
        f"an output is a {type(first).__name__}, which cannot be put together from rows with different weights; pass "
        "one weight vector (m,)"
    )


def join_generated(parts: Sequence[Any], groups: Sequence[Tensor], pad: int | None) -> Tensor:
    """Put generated sequences together, padded on the right to the longest."""
    if any(not isinstance(part, Tensor) for part in parts):
        raise ValueError("return_dict_in_generate works with one weight vector (m,) for all rows")
    length = max(part.shape[1] for part in parts)
    if pad is None and any(part.shape[1] != length for part in parts):
        raise ValueError("rows ended at different lengths and no pad_token_id says how to fill them; pass it")
    copies = len(parts[0]) // max(len(groups[0]), 1)  # num_return_sequences: the copies of a row follow one another
    filled = [nn.functional.pad(part, (0, length - part.shape[1]), value=pad or 0) for part in parts]
    rows = torch.cat([(g[:, None] * copies + torch.arange(copies, device=g.device)).reshape(-1) for g in groups])
    return torch.cat(filled)[rows.to(filled[0].device).argsort()]
