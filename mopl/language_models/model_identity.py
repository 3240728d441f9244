"""What tells a model from others whose log-probabilities differ: parameters, configuration, adapters, attention.

A model with adapters has the `"model"` of its base model without them, so that one whose adapters are off, or one that
never had any, is the same reference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mopl.conditioning.adapted import adapter_state
from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.weighted import WeightedModel, causal_lm_of

# Of configurations of models and adapters: names, versions, and what only a training or a generation reads.
_WITHOUT_EFFECT = (
    "_name_or_path", "architectures", "auto_map", "auto_mapping", "base_model_name_or_path", "dtype", "id2label",
    "inference_mode", "init_lora_weights", "initializer_range", "label2id", "peft_version", "revision",
    "runtime_config", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip

# Where PEFT's wrappers have what they are around: a layer, the tokens of an embedding, a module that is trained whole.
_WRAPPED = ("base_layer", "token_adapter", "original_module")


def identity_of(model: Any) -> dict[str, str]:
    """Return what the log-probabilities of a model depend on besides the tokens, as it stands now.

    Batches, packing and the machine are no part of it: they change rounding alone.

    Args:
        model: A causal language model, plain or with adapters, PEFT's or those that transformers loads, which count if
            they are on; or a `WeightedModel` inside of `with model.reference():`.

    Returns:
        Fingerprints by name: `"model"`, of the parameters and buffers that a checkpoint has, without adapters;
        `"config"`; `"constants"`, of the buffers that a checkpoint has not and the numbers that parts of the model
        keep; `"adapter"`, of the active ones with their settings, or `"none"`; and `"attention"`, the name of its
        implementation.

    Raises:
        ValueError: If the log-probabilities depend on weights of objectives.
        NotImplementedError: If the parameters are not here whole: sharded, on no device, or packed into no tensors.
    """
    if isinstance(model, WeightedModel):
        if not model.is_reference:
            raise ValueError(
                f"the log-probabilities of a {type(model).__name__} depend on the weights w, so they cannot be stored "
                "for all of them; ask inside of `with model.reference():` for those of the model that it was tuned "
                "from, pass model.merge(w) for those at one w, or compute the reference in each step"
            )
        model = model.model
    inner = causal_lm_of(model)
    settings = inner.config.to_diff_dict() if hasattr(inner, "config") else {}
    adapters = _adapters(model, inner)
    return {
        "model": fingerprint(inner),
        "config": _digest(settings),
        "constants": _constants(inner),
        "adapter": _digest(adapters) if adapters else "none",
        "attention": str(getattr(getattr(inner, "config", None), "_attn_implementation", None)),
    }


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 of the names, types and values of what a checkpoint has: all but what belongs to adapters."""
    digest = hashlib.sha256(type(model).__name__.encode())
    _update(digest, _without_adapters(model, model.state_dict(keep_vars=True)).items())
    return digest.hexdigest()


def _constants(model: nn.Module) -> str:
    """Return a SHA-256 of what a forward pass reads besides parameters and configuration, without that of adapters.

    Frequencies of positions are such buffers: a checkpoint that is loaded in bfloat16 has them in float32, a model that
    is cast has them rounded. Scales of logits and of attention are often numbers that a part of the model keeps.
    """
    saved = model.state_dict(keep_vars=True)
    buffers = {name: value for name, value in model.named_buffers(remove_duplicate=False) if name not in saved}
    numbers: dict[str, float] = {}
    module: Any
    for path, module in model.named_modules():
        own = f"{path}." if path else ""
        for name, value in vars(module).items():
            if type(value) in (int, float) and not _is_passing(module, name):
                numbers[own + name] = value
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {"": kinds}).items():
            name = f"{layer}_inv_freq" if layer else "inv_freq"
            original = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
            if kind in ("dynamic", "longrope") and original is not None:  # they change with the length of a text
                buffers[own + name] = original
    digest = hashlib.sha256(_digest(_without_adapters(model, numbers)).encode())
    _update(digest, _without_adapters(model, buffers).items())
    return digest.hexdigest()


def _is_passing(module: nn.Module, name: str) -> bool:
    """Say whether a number of a module is noise of a training or a count, and no part of what the model computes."""
    if name == "p" and "drop" in type(module).__name__.lower():
        return True
    return name.startswith(("_", "ds_", "applied_", "neftune")) or "drop" in name or "cache" in name


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a short fingerprint of tensors by name: exact sums of their bits, taken where they are.

    It costs no copy from a GPU, and does not see values that change places. Checkpoints of trainings hold it.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda entry: entry[0]):
        bits = tensor.detach().contiguous()
        bits = bits.to(torch.uint8) if bits.dtype == torch.bool else bits.view(kinds[bits.element_size()])
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()[:32]


def _update(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in sorted(tensors, key=lambda entry: entry[0]):
        if not isinstance(tensor, Tensor):
            raise NotImplementedError(
                f"{name} is a {type(tensor).__name__} and no tensor, so the model cannot be told from others; load it "
                "without this quantisation, or compute its log-probabilities by score_lists, without a store"
            )
        if tensor.is_meta or hasattr(tensor, "ds_shape") or hasattr(tensor, "full_tensor"):
            raise NotImplementedError(
                f"{name} is sharded or on no device, so the model cannot be told from others; compute its "
                "log-probabilities before it is sharded, in a process that has it whole"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _without_adapters(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return what belongs to parts of a model by the names that it has before PEFT wraps some of them."""
    for path, module in reversed(list(model.named_modules())):
        kept = _wrapped_in(module)
        if kept is None:
            continue
        own, inside = f"{path}.", f"{path}.{kept}."
        state = {
            own + name[len(inside) :] if name.startswith(inside) else name: value
            for name, value in state.items()
            if name.startswith(inside) or not name.startswith(own)
        }
    return state


def _wrapped_in(module: Any) -> str | None:
    """Return the name of what one of PEFT's wrappers is around; None for other modules."""
    if not hasattr(module, "active_adapters"):
        return None
    return next((name for name in _WRAPPED if name in module._modules), None)


def _adapters(model: Any, inner: nn.Module) -> list[Any]:
    """Return what tells the adapters by which a model computes now from others, whatever their names are.

    That is asked of the layers, which know more than PEFT's wrapper: transformers puts adapters into a model without
    one, and each layer can be switched, scaled and merged by itself.
    """
    layers: list[Any] = []
    layer: Any
    for path, layer in inner.named_modules():
        if _wrapped_in(layer) is not None:
            active = [] if layer.disable_adapters else list(layer.active_adapters)
            if active or getattr(layer, "merged", False):  # merged ones are taken out where they are off
                layers.append((path, active, getattr(layer, "merged", False), getattr(layer, "scaling", {})))
    names = list(dict.fromkeys(name for _, active, _, _ in layers for name in active))
    found = [_adapter(model, inner, name) for name in names]
    if is_peft(model) and model.active_peft_config.is_prompt_learning and not model._adapters_disabled:
        found += [_prompt(model, name) for name in model.active_adapters]
    places = [
        [path, merged, [[names.index(name), scaling.get(name)] for name in active]]
        for path, active, merged, scaling in layers
    ]
    return [*found, places] if found or places else []


def _adapter(model: Any, inner: nn.Module, name: str) -> list[Any]:
    """Return the settings of an adapter and a SHA-256 of all tensors by which it computes.

    PEFT's own state of an adapter lacks those that it draws again by their seed, and is asked of the wrapper alone.
    """
    configs: Any = inner.peft_config
    found: dict[str, Tensor] = {}
    for path, layer in inner.named_modules():
        if (kept := _wrapped_in(layer)) is not None:
            inside = ((part, tensor) for part, tensor in _tensors(layer) if not part.startswith(f"{kept}."))
            found |= {f"{path}.{part}": tensor for part, tensor in _of_adapter(inside, name, configs)}
    base = {id(tensor) for _, tensor in _tensors(inner)}
    beside = ((part, tensor) for part, tensor in _tensors(model) if id(tensor) not in base)  # that layers share
    found |= dict(_of_adapter(beside, name, configs))
    digest = hashlib.sha256()
    _update(digest, found.items())
    return [configs[name].to_dict(), digest.hexdigest()]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _of_adapter(
    tensors: Iterable[tuple[str, Tensor]], name: str, adapters: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors but those of other adapters, by names that do not hold the adapter's own."""
    for path, tensor in tensors:
        parts = path.split(".")
        if (name in parts or not set(adapters) & set(parts)) and "cache" not in path:
            yield ".".join("" if part == name else part for part in parts), tensor


def _prompt(model: Any, name: str) -> list[Any]:
    """Return the settings of an adapter of prompt learning and a SHA-256 of what it puts in front."""
    digest = hashlib.sha256()
    _update(digest, adapter_state(model, name).items())
    return [model.peft_config[name].to_dict(), digest.hexdigest()]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(_plain(content), sort_keys=True).encode()).hexdigest()


def _plain(content: Any) -> Any:
    """Return settings as JSON has them, without those that have no part in a forward pass without dropout."""
    if isinstance(content, Mapping):
        names = (name for name in content if name not in _WITHOUT_EFFECT)
        return {
            str(name): _plain(content[name])
            for name in names
            if "drop" not in str(name) and not str(name).endswith("_token_id")
        }
    if isinstance(content, (set, frozenset)):
        return sorted(map(_plain, content), key=str)
    if isinstance(content, (list, tuple)):
        return [_plain(each) for each in content]
    return content if isinstance(content, (str, int, float, bool)) or content is None else str(content)
