"""What rows of a batch can mix of PEFT's adapters, and what to do about what they cannot."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl.conditioning.adapted import Part, adapter_state, copied_modules, lora_layers, parts_of

# Initialisations that move a part of the base model's weights into the adapter.
_TAKING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_initialisation(name: str, config: Any, model: nn.Module | None = None) -> None:
    """Raise where an adapter changes the base model, which then is no reference and no base of other adapters.

    Its biases it can change only where it has any, if that `model` is passed.
    """
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_TAKING):
        raise ValueError(
            f"adapter {name!r} has init_lora_weights={start!r}, which moves a part of the base weights into the "
            "adapter, so the model without it is not the base model; pass True, 'gaussian', 'orthogonal' or 'eva', or "
            "convert a trained adapter by PEFT's path_initial_model_for_weight_conversion"
        )
    if getattr(config, "layer_replication", None):
        raise ValueError(
            f"adapter {name!r} uses layer_replication, which repeats layers of the base model, so the model without it "
            "is not the base model; repeat the layers first, and leave layer_replication out"
        )
    names = ["bias"] if model is None else [part for part, _ in model.named_parameters() if "lora_" not in part]
    if (bias := getattr(config, "bias", "none")) != "none" and any(part.endswith("bias") for part in names):
        raise ValueError(
            f"adapter {name!r} has bias={bias!r}, which trains the base model's own biases, the same ones for all "
            "adapters and the model without them; pass lora_bias=True, a bias of each adapter, where layers have one"
        )


def check_config(name: str, config: Any) -> None:
    """Raise where an adapter's configuration asks for what rows cannot mix."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ValueError(f"adapter {name!r} is of kind {kind}, which cannot be mixed; use LoRA")
    check_initialisation(name, config)
    if getattr(config, "ensure_weight_tying", False):
        raise ValueError(
            f"adapter {name!r} uses ensure_weight_tying, which PEFT does not load for several adapters; leave it out, "
            "and what is trained of tied weights is untied"
        )
    if getattr(config, "trainable_token_indices", None):
        raise ValueError(
            f"adapter {name!r} uses trainable_token_indices, which cannot be mixed; name the embeddings in "
            "modules_to_save"
        )
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    if extra := [field for field in variants if field != "use_dora" and getattr(config, field)]:
        raise ValueError(f"adapter {name!r} uses {', '.join(extra)}, which cannot be mixed; use LoRA or DoRA")


def with_adapters(model: Any, config: Any, adapters: Sequence[str] = ("default",)) -> Any:
    """Return PEFT's wrapper around a model with new adapters of one configuration.

    Raises:
        ValueError: If PEFT puts none on the targets, or an option names modules that are not there, which PEFT ignores.
    """
    require("peft")
    from peft import get_peft_model

    if bad := [name for name in adapters if not name or hasattr(nn.ModuleDict, name)]:
        raise ValueError(f"an adapter cannot be called {bad[0]!r}; give the objective another name")
    check_no_adapters(model)
    options = ("rank_pattern", "alpha_pattern", "modules_to_save")
    # PEFT may change it.
    given: dict[str, list[str]] = {option: list(getattr(config, option, None) or ()) for option in options}
    with _naming_targets(model):
        wrapped: Any = get_peft_model(model, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        wrapped.add_adapter(name, copy.deepcopy(config))
    _check_names(wrapped, given)
    return wrapped


def check_no_adapters(model: nn.Module) -> None:
    """Raise where a base model has layers of adapters inside, which a second wrapper would share and change."""
    require("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"the {type(model).__name__} has adapters inside already; pass the base model without them (unload() takes "
            "them out, copy.deepcopy makes a second one before), or load into the model around it by load_weights"
        )


def _check_names(model: Any, given: dict[str, list[str]]) -> None:
    """Raise where an option names what is no module of the PEFT model that was made by it."""
    layers, copies = lora_layers(model), copied_modules(model)
    experts = [f"{name}.{layer.parameter_name}" for name, layer in layers.items() if hasattr(layer, "parameter_name")]
    adapted = [*layers, *experts]
    for option, keys in given.items():
        for key in keys:
            if option == "modules_to_save":
                if not any(name.endswith(key) for name in copies):
                    raise ValueError(f"modules_to_save names {key!r}, but no module of the model is called so")
            elif not any(re.match(rf"(.*\.)?({key})$", name) for name in adapted):
                on = ", ".join(sorted(set(map(short_name, adapted))))
                raise ValueError(f"{option} names {key!r}, but no module with adapters is called so; these are {on}")


def adapted_parts(model: Any, adapters: Sequence[str]) -> dict[str, Part]:
    """Return what adapters of a PEFT model change, by name; raise where rows cannot mix one of them."""
    require("peft")
    from peft.tuners.lora import ParamWrapper

    layers = lora_layers(model)
    experts = [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]
    bad = _not_linear({name: layer for name, layer in layers.items() if name not in experts})
    for name in adapters:
        config = model.peft_config[name]
        if experts:
            # PEFT puts adapters there by itself where experts are fused into one parameter.
            raise ValueError(
                f"adapter {name!r} is on parameters of experts ({', '.join(sorted(config.target_parameters))}), which "
                f"rows cannot mix; {other_targets(layers, [*experts, *bad], 'the experts')}"
            )
        check_config(name, config)
    for place, layer in layers.items():
        base = layer.get_base_layer()
        for name in adapters:
            variant = layer.lora_variant.get(name)
            if name in layer.lora_embedding_A:
                raise ValueError(
                    f"an adapter on a {type(base).__name__} is no LoRA on a linear layer; leave it out of the targets, "
                    "or name it in modules_to_save"
                )
            if variant is not None and not layer.use_dora[name]:
                raise ValueError(
                    f"adapter {name!r} is of PEFT's {type(variant).__name__}, which cannot be mixed; use LoRA or DoRA"
                )
            if layer.lora_bias.get(name) and getattr(base, "bias", None) is None:
                raise ValueError(
                    f"adapter {name!r} has lora_bias=True but {place} has no bias that its own could be added to; pass "
                    "lora_bias=False, or targets with biases"
                )
    if bad:
        kinds = sorted({type(layers[name].get_base_layer()).__name__ for name in bad})
        raise ValueError(
            f"an adapter on a {', '.join(kinds)} ({bad[0]}) is none on a linear layer, which that is not; "
            f"{other_targets(layers, bad)}"
        )
    if not layers:
        raise ValueError("the model has no LoRA layers; check target_modules of the config")
    copies = copied_modules(model)
    for name, wrapper in copies.items():
        if inside := [each for each, _ in wrapper.original_module.named_children()]:
            raise ValueError(
                f"modules_to_save has {short_name(name)}, a {type(wrapper.original_module).__name__} of several "
                f"modules, whose copies cannot be mixed; name those that are linear in their parameters, of {inside}"
            )
    return parts_of(model)


def check_saved_whole(model: Any, adapters: Sequence[str]) -> None:
    """Raise where PEFT, which looks for an adapter's name anywhere in a tensor's, would not save all of an adapter."""
    for adapter in adapters:
        own = [value for each in lora_layers(model).values() for value in _tensors_of(each, adapter)]
        copies = [each.modules_to_save for each in copied_modules(model).values() if adapter in each.modules_to_save]
        wanted = len(own) + sum(len(each[adapter].state_dict()) for each in copies)
        if (found := len(adapter_state(model, adapter))) != wanted:
            raise ValueError(
                f"an adapter called {adapter!r} has {wanted} tensors and PEFT would save {found}, since a name of an "
                "adapter is a part of other names in the model; give the objective, or the adapter, another name"
            )


def _tensors_of(layer: Any, adapter: str) -> list[Tensor]:
    """Return what an adapter has in a LoRA layer: of lora_A.NAME.weight and the like."""
    names = ((name.split("."), value) for name, value in layer.named_parameters())
    return [value for name, value in names if name[0].startswith("lora_") and name[1:2] == [adapter]]


def _not_linear(layers: dict[str, Any]) -> list[str]:
    """Return the names of layers whose base does something else to its input than to multiply it with its weight.

    Subclasses of a linear layer are asked with one input; those of a quantised weight are PEFT's business.
    """
    require("transformers")
    from transformers.pytorch_utils import Conv1D

    found = []
    for name, layer in layers.items():
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if weight is None:
            found.append(name)
            continue
        quantised = weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if type(base).forward in (nn.Linear.forward, Conv1D.forward) or weight.is_meta or quantised:
            continue
        try:
            with torch.no_grad():
                given = base(weight.new_zeros(1, layer.in_features))
        except Exception:
            given = None
        if not isinstance(given, Tensor) or given.shape != (1, layer.out_features):
            found.append(name)
    return found


def short_name(name: str) -> str:
    """Return the last part of a module's name that is no number: what `target_modules` takes."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def other_targets(layers: Iterable[str], bad: Iterable[str], what: str | None = None) -> str:
    """Return what to pass as the adapters' targets in the place of some that cannot be."""
    without = {short_name(name) for name in bad}
    rest = sorted({short_name(name) for name in layers} - without)
    said = what or ", ".join(sorted(without))
    return f"leave out {said}: target_modules={rest} (lora_targets of a run)"


@contextlib.contextmanager
def _naming_targets(model: Any) -> Iterator[None]:
    """Say of modules that PEFT refuses inside the `with` block which linear layers, but the output head, are left."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # Asked before: PEFT may stop halfway.
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    try:
        yield
    except ValueError as error:
        bad = re.findall(r"'([\w.]+)'", str(error).partition("Incompatible modules:")[2])
        said = f"PEFT puts no such adapters on {type(model).__name__}: {error}"
        raise ValueError(f"{said} {other_targets(linear, bad)}" if bad else said) from error
