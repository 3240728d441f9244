"""What models that take weights ask of a causal language model of transformers, and of PEFT's wrapper around one."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import shape_of
from mopl._extras import require
from mopl._modules import modules_of
from mopl._restoring import requires_grad_kept
from mopl._sharded import whole_shape
from mopl._threads import Turns
from mopl.conditioning.hyper_prompt import HyperPrompt

# What trainers and accelerate read from a model, taken from the causal language model. A closed list: with an open one
# `fuse` and `is_fused` would take this module for the model inside.
DELEGATED = frozenset(
    "config device dtype generation_config gradient_checkpointing_enable gradient_checkpointing_disable "
    "is_gradient_checkpointing activation_checkpointing_enable activation_checkpointing_disable "
    "is_activation_checkpointing supports_gradient_checkpointing enable_input_require_grads get_input_embeddings "
    "get_output_embeddings name_or_path hf_device_map is_quantized is_loaded_in_8bit is_loaded_in_4bit "
    "hf_quantizer quantization_method _no_split_modules main_input_name warnings_issued tie_weights".split()
)


def is_peft(model: nn.Module) -> bool:
    """Say whether a model is PEFT's wrapper around a causal language model."""
    # Not by `base_model`: every model of transformers has that, the one inside PEFT's wrapper too.
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


_switches: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()  # of PEFT's wrappers


def adapters_off(model: Any) -> contextlib.AbstractContextManager[None]:
    """Let PEFT's wrapper be the model that it is around inside a `with` block; blocks of several threads may overlap.

    What was off before stays so.
    """
    return _switches.setdefault(model, Turns()).switched("off", lambda: [_switched_off(model)])


@contextlib.contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    """Switch adapters off as PEFT's `disable_adapter` does.

    That looks up the state of every adapter for a warning and sets `requires_grad` of each of them twice, which keeps
    a host busy for as long as a forward pass of many small layers. All that the layers read is one flag, so where
    nothing else belongs to switching them off, the flag is all that is set.
    """
    layers = _switched_by_flag(model)
    if layers is None:
        with requires_grad_kept(model), model.disable_adapter():
            yield
        return
    on = [layer for layer in layers if not layer.disable_adapters]
    try:
        for layer in on:
            layer._disable_adapters = True
        yield
    finally:
        for layer in on:
            layer._disable_adapters = False


def _switched_by_flag(model: Any) -> list[Any] | None:
    """Return the layers of PEFT's wrapper that a flag in each switches off; None where something else is done, too."""
    require("peft")
    from peft.tuners.lora import LoraLayer, LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if type(model.base_model) is not LoraModel or any(config.bias != "none" for config in model.peft_config.values()):
        return None  # a bias that is trained stays as it is, and PEFT warns of it
    modules = modules_of(model.base_model)
    kinds = {kind for kind in set(map(type, modules)) if issubclass(kind, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    for kind in kinds - {ModulesToSaveWrapper}:
        switch: Any = getattr(kind, "enable_adapters", None)
        if not issubclass(kind, LoraLayer) or switch is not LoraLayer.enable_adapters:
            return None
    return [module for module in modules if type(module) in kinds]


def text_config(model: Any) -> Any:
    """Return the configuration of a model's text part: its own, but for models that see images too."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def check_no_prompt(model: Any) -> None:
    """Raise where PEFT puts virtual tokens of its own in front of a model's input."""
    if is_peft(model) and any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError("the PEFT model has a prompt of its own; pass a plain model, or one with LoRA or the like")


def check_wrapped(model: nn.Module) -> None:
    """Raise where layers have adapters that no wrapper of PEFT around the model knows: no files would have them."""
    known: Any = model.peft_config if is_peft(model) else {}
    for module in model.modules():
        for part in getattr(module, "adapter_layer_names", ()):
            if set(getattr(getattr(module, part, None), "keys", tuple)()) - set(known):
                raise ValueError(
                    f"{type(model).__name__} carries adapters without PEFT's wrapper; pass what peft.get_peft_model "
                    "returned, and wrap it so instead of calling add_adapter"
                )


def check_model(model: nn.Module, base: Any, prompt: HyperPrompt) -> None:
    """Raise where a prompt could not be put in front of the model's input."""
    name = type(base).__name__
    if not hasattr(base, "get_input_embeddings") or base.get_input_embeddings() is None:
        raise ValueError(f"{name} has no token embeddings; pass a causal language model of transformers")
    if "inputs_embeds" not in inspect.signature(type(base).forward).parameters:
        raise ValueError(f"{name}.forward takes no inputs_embeds, so virtual tokens cannot be put in front")
    if getattr(text_config(base), "hidden_size_per_layer_input", 0):
        raise ValueError(f"{name} embeds tokens again in every layer, which virtual tokens have no answer for")
    width = whole_shape(base.get_input_embeddings().weight)[1]
    if width != prompt.hidden:
        raise ValueError(f"hyper_prompt has hidden={prompt.hidden} but {name} embeds tokens in {width}; pass that")
    check_no_prompt(model)


def check_text(text: Tensor, mask: Tensor | None, position_ids: Tensor | None, past: int) -> None:
    """Raise unless a mask and positions fit a text (B, T, ...) behind `past` positions of a cache."""
    shape = tuple(text.shape[:2])
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]):
        raise ValueError(f"attention_mask has shape {shape_of(mask)} but the text is {shape}; pass (B, T)")
    if position_ids is not None:
        if tuple(position_ids.shape) not in (shape, (1, shape[1])):
            raise ValueError(f"position_ids has shape {shape_of(position_ids)} but the text is {shape}")
        if mask is None and (shape[0] != 1 or past):
            raise ValueError("position_ids without attention_mask say packed sequences, which need one row (1, N)")


def check_prompts(input_ids: Any, mask: Tensor | None, config: Any) -> Tensor:
    """Return the mask of prompts (B, T), all ones where there is none; raise where they may be padded on the right."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise ValueError("input_ids must be a tensor (B, T)")
    if mask is not None:
        if bool((mask[:, -1] == 0).any()):
            raise ValueError("rows are padded on the right; generation needs padding_side='left'")
        return mask
    return mask_of_prompts(input_ids, config.pad_token_id)


def mask_of_prompts(input_ids: Tensor, pad: int | None) -> Tensor:  # (B, T) -> (B, T)
    """Return the mask of prompts that come without one, all ones; raise where some seem to be padded."""
    if pad is not None and len(input_ids) > 1 and bool((input_ids[:, (0, -1)] == pad).any()):
        raise ValueError(f"input_ids have padding (token {pad}); pass the tokenizer's attention_mask too")
    return torch.ones_like(input_ids)


def generate_option(name: str, kwargs: dict[str, Any], own: Any) -> Any:
    """Return what `generate` of transformers takes for an option: what the call says, or else its configuration.

    The model's `own` generation_config fills in what that of the call leaves at None.
    """
    if name in kwargs:
        return kwargs[name]
    given = getattr(kwargs.get("generation_config"), name, None)
    return getattr(own, name, None) if given is None else given


def count_new_tokens(kwargs: dict[str, Any], config: Any, length: int) -> None:
    """Turn lengths of the whole text into numbers of new tokens: `generate` would count virtual tokens as text."""
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if kwargs.get(new, getattr(config, new, None)) is None:
            value = kwargs.pop(total, None) or getattr(config, total, None)
            if value:
                if total == "max_length" and value <= length:
                    raise ValueError(f"max_length is {value} but the prompts have {length} tokens already")
                kwargs[new] = max(value - length, 0)


def output_head(model: nn.Module) -> nn.Module:
    """Return the module that makes logits."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{type(model).__name__} names no output head (get_output_embeddings); pass a pattern of parameter names "
            "as scope"
        )
    return head


def untie_head(model: nn.Module) -> bool:
    """Give the output head a weight of its own where it shares the embedding's; say whether it did."""
    head: Any = output_head(model)
    others = (p for module in model.modules() if module is not head for p in module._parameters.values())
    if not any(p is head.weight for p in others):
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    config: Any = getattr(model, "config", None)
    for part in () if config is None else (config, config.get_text_config()):
        part.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None)
    if isinstance(tied, dict):  # what transformers leaves out of its files
        names = {name for name, p in model.named_parameters(remove_duplicate=False) if p is head.weight}
        model.all_tied_weights_keys = {a: b for a, b in tied.items() if a not in names and b not in names}  # type: ignore
    return True
