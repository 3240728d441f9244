"""The modules of a language model that PEFT's adapters change: what several of them compute, and as which weights.

| an adapter has     | a module computes at coefficients c    | so its parameters are                                |
|--------------------|----------------------------------------|------------------------------------------------------|
| LoRA, rsLoRA       | W x + b + Σ c_i s_i (B_i A_i x + b_i)  | W + Σ c_i s_i B_i A_i and b + Σ c_i s_i b_i          |
| DoRA               | W x + b + Σ c_i (W_i - W) x            | W + Σ c_i (W_i - W), W_i = m_i V_i / ‖V_i‖ by rows   |
| `modules_to_save`  | (1 - Σ c_i) f(x; θ) + Σ c_i f(x; θ_i)  | θ + Σ c_i (θ_i - θ)                                  |

V_i = W + s_i B_i A_i. The scale s is alpha / r, or alpha / √r for rsLoRA, with the r and alpha that `rank_pattern` and
`alpha_pattern` give the module in that adapter; b_i are there with `lora_bias`. So what an adapter does to a module is
always added with its coefficient, and a vertex of the simplex is the model with that adapter alone. A module that an
adapter leaves alone is that of the base model for it. Copies are right for modules that are linear in their parameters
(linear layers, embeddings, norms); a probe (`mopl.conditioning.merging`) finds others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import compute_dtype
from mopl._extras import require
from mopl._modules import modules_of
from mopl._threads import CallOfThread

Place = tuple[nn.Module, str, Tensor]  # a parameter of a module, by name, and a value for it


def parts_of(model: Any) -> dict[str, Part]:
    """Return all that adapters of a PEFT model change, by name, whatever it is."""
    found: dict[str, Part] = {name: LoraPart(layer) for name, layer in lora_layers(model).items()}
    return found | {name: CopiedPart(wrapper) for name, wrapper in copied_modules(model).items()}


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that carry LoRA adapters, by name."""
    require("peft")
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def copied_modules(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's wrappers around what `modules_to_save` names, by name."""
    require("peft")
    from peft.utils import ModulesToSaveWrapper

    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def adapter_state(model: Any, name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter of a PEFT model, by the names that PEFT's files have."""
    require("peft")
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


# ---------------------------------------------------------------- coefficients of a call


def _scaled(adapter: int, call: CallOfThread, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Multiply what an adapter adds, or what all of that follows from, with its coefficient; a forward hook."""
    share = call.once(adapter, output, lambda: _share(output, adapter, call).to(compute_dtype(output)))
    return (output * share).to(output.dtype)


def _share(output: Tensor, adapter: int, call: CallOfThread) -> Tensor:
    """Return what multiplies the rows of an adapter's output, (1,) or (rows, 1, ...)."""
    given = call.for_rows(output)
    return output.new_ones(()) if given is None else given["coefficients"][..., adapter, None]


# ---------------------------------------------------------------- one module


def _without_others(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Let DoRA start from the layer itself: PEFT gives it the output with the adapters before it; a forward hook."""
    return args, {**kwargs, "base_result": None}


class LoraPart:
    """A linear layer with factors of LoRA or DoRA; `base` has the parameters that they are added to."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def base(self) -> Any:
        """The module that adapters are on."""
        return self.layer.get_base_layer()

    def mix(self, adapters: Sequence[str], call: CallOfThread, whole: bool) -> None:
        """Let all adapters be active, and what each adds be multiplied with its coefficient in each row."""
        self.layer.set_adapter(list(adapters))
        first = next(name for name in adapters if name in self.layer.lora_B)
        for i, name in enumerate(adapters):
            if name not in self.layer.lora_B:
                continue
            # B of c times what A gives is c times what B gives, and A gives the few numbers of the rank.
            scaled = self.layer.lora_B[name] if self.layer.lora_bias[name] else self.layer.lora_A[name]
            if self.layer.use_dora[name]:
                scaled = self.layer.lora_magnitude_vector[name]  # it calls the factors with other things than rows
                if name != first:
                    scaled.register_forward_pre_hook(_without_others, with_kwargs=True)
            # No closure: a deep copy of the mixture must read its own coefficients.
            scaled.register_forward_hook(functools.partial(_scaled, i, call))

    def values(self, adapters: Sequence[str], shares: Sequence[float]) -> list[Place]:
        """Return the parameters at coefficients, summed in float32 and rounded once."""
        layer, base = self.layer, self.base
        weight, bias = base.weight, getattr(base, "bias", None)
        if not weight.is_floating_point():
            raise ValueError(f"a weight is {weight.dtype}, quantised, and takes no adapter in; use generate(weights=)")
        wide = compute_dtype(weight)
        total, moved = weight.to(wide), None if bias is None else bias.to(wide)
        for share, name in zip(shares, adapters, strict=True):
            if name not in layer.lora_B:
                continue
            delta = layer.get_delta_weight(name).to(weight.device, wide)
            if layer.use_dora[name]:
                whole = weight.to(wide) + delta
                along = 0 if layer.fan_in_fan_out else 1
                magnitude = layer.lora_magnitude_vector[name].weight.to(weight.device, wide).unsqueeze(along)
                delta = magnitude / whole.norm(dim=along, keepdim=True) * whole - weight.to(wide)
            total = total + share * delta
            if layer.lora_bias[name]:
                moved = moved + share * layer.scaling[name] * layer.lora_B[name].bias.to(weight.device, wide)
        found: list[Place] = [(base, "weight", total.to(weight.dtype))]
        if any(layer.lora_bias[name] for name in adapters if name in layer.lora_B):
            assert moved is not None
            found.append((base, "bias", moved.to(weight.dtype)))
        return found

    def probe(self, adapters: Sequence[str], generator: torch.Generator | None) -> list[Place]:
        """Return factors B: random, so that ‖scale B A‖ is about ‖W‖; without a generator so that nothing changes."""
        layer, found = self.layer, []
        for name in adapters:
            if name not in layer.lora_B:
                continue
            for key, own in layer.lora_B[name].named_parameters():
                value = torch.zeros_like(own)
                if generator is not None:
                    spread = abs(layer.scaling[name]) * len(own) ** 0.5 * float(layer.lora_A[name].weight.norm())
                    size = float(self.base.weight.norm()) / max(spread, 1e-12)
                    value = torch.randn(own.shape, generator=generator) * size
                found.append((layer.lora_B[name], key, value.to(own)))
            if layer.use_dora[name] and generator is None:
                own = layer.lora_magnitude_vector[name].weight
                norm = self.base.weight.to(compute_dtype(own)).norm(dim=0 if layer.fan_in_fan_out else 1)
                found.append((layer.lora_magnitude_vector[name], "weight", norm.to(own)))
        return found

    def has(self, adapters: Sequence[str]) -> bool:
        """Whether some of these adapters change the module."""
        return any(name in self.layer.lora_B for name in adapters)

    def one(
        self, adapters: Sequence[str], shares: Sequence[float], rank: int, with_bias: bool, wide: bool
    ) -> dict[str, Tensor]:
        """Return the factors of a mixture, side by side, as those of one adapter of some rank and scale 1."""
        layer, start = self.layer, 0
        own = next(layer.lora_A[name].weight for name in adapters if name in layer.lora_A)
        own = own.new_empty(0, dtype=compute_dtype(own) if wide else own.dtype)
        a, b = own.new_zeros(rank, layer.in_features), own.new_zeros(layer.out_features, rank)
        bias = own.new_zeros(layer.out_features)
        for share, name in zip(shares, adapters, strict=True):
            if name in layer.lora_B:
                end, scale = start + layer.r[name], share * layer.scaling[name]
                a[start:end] = scale * layer.lora_A[name].weight.to(own.dtype)
                b[:, start:end] = layer.lora_B[name].weight
                if layer.lora_bias[name]:
                    bias += scale * layer.lora_B[name].bias.to(own.dtype)
                start = end
        found = {"lora_A.weight": a, "lora_B.weight": b}
        return {**found, "lora_B.bias": bias} if with_bias else found


class CopiedPart:
    """A module that `modules_to_save` names: every adapter has a copy, θ_i; `base` has the original's parameters."""

    def __init__(self, wrapper: Any) -> None:
        self.layer = wrapper

    @property
    def base(self) -> Any:
        """The module of the base model."""
        return self.layer.original_module

    def mix(self, adapters: Sequence[str], call: CallOfThread, whole: bool) -> None:
        """Let the module be mixed from the original and the copies."""
        self.layer.set_adapter([])  # PEFT knows one at a time
        for name in adapters:
            if name in self.layer.modules_to_save:
                self.layer.modules_to_save[name].requires_grad_(True)
        self.layer.forward = self.layer._mopl_copies = MixedCopies(self.layer, adapters, call, whole)

    def values(self, adapters: Sequence[str], shares: Sequence[float]) -> list[Place]:
        """Return the parameters at coefficients, summed in float32 and rounded once."""
        found: list[Place] = []
        copies = self.layer.modules_to_save
        own_shares = {name: c for c, name in zip(shares, adapters, strict=True) if name in copies}
        for key, (module, last, own) in self._parameters(self.base).items():
            wide = compute_dtype(own)
            total = (1 - sum(own_shares.values())) * own.to(wide)
            for name, share in own_shares.items():
                total = total + share * copies[name].get_parameter(key).to(own.device, wide)
            found.append((module, last, total.to(own.dtype)))
        return found

    def _parameters(self, module: nn.Module) -> dict[str, Place]:
        """Return the parameters of the module, or of a copy, by name."""
        split = {key: (key.rpartition("."), own) for key, own in module.named_parameters()}
        return {key: (module.get_submodule(path), last, own) for key, ((path, _, last), own) in split.items()}

    def probe(self, adapters: Sequence[str], generator: torch.Generator | None) -> list[Place]:
        """Return copies: the original moved by about its own size; without a generator the original."""
        found: list[Place] = []
        for name in adapters:
            if name in self.layer.modules_to_save:
                copy = self._parameters(self.layer.modules_to_save[name])
                for key, own in self.base.named_parameters():
                    value = own.detach()
                    if generator is not None:
                        size = float(own.norm()) / own.numel() ** 0.5
                        value = value + (torch.randn(own.shape, generator=generator) * size).to(own)
                    found.append((*copy[key][:2], value))
        return found

    def has(self, adapters: Sequence[str]) -> bool:
        """Whether some of these adapters change the module."""
        return any(name in self.layer.modules_to_save for name in adapters)

    def one(
        self, adapters: Sequence[str], shares: Sequence[float], rank: int, with_bias: bool, wide: bool
    ) -> dict[str, Tensor]:
        """Return the copy of one adapter that the mixture is."""
        return {name: value for _, name, value in self.values(adapters, shares)}


Part = LoraPart | CopiedPart


class MixedCopies:
    """The forward of a module that adapters have copies of; copied and pickled with the model.

    Args:
        wrapper: PEFT's around the module.
        adapters: All that are mixed.
        call: Who knows the coefficients.
        whole: The coefficients sum to 1, so that the original has no share where all adapters have copies.
    """

    def __init__(self, wrapper: Any, adapters: Sequence[str], call: CallOfThread, whole: bool) -> None:
        self.wrapper, self.call = wrapper, call
        self.copied = [(i, name) for i, name in enumerate(adapters) if name in wrapper.modules_to_save]
        self.alone = whole and len(self.copied) == len(adapters)

    @property
    def modules(self) -> list[nn.Module]:
        """What is mixed: the copies, behind the original where that has a share."""
        copies = [self.wrapper.modules_to_save[name] for _, name in self.copied]
        return copies if self.alone else [self.wrapper.original_module, *copies]

    def shares(self, output: Tensor) -> list[Tensor]:
        """Return what multiplies the rows of an output of each of `modules`, () or (rows, 1, ...)."""
        found = [_share(output, i, self.call) for i, _ in self.copied]
        return found if self.alone else [1 - torch.stack(found).sum(0), *found]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the mixture of each row; where adapters are off, what the original module gives."""
        if self.wrapper.disable_adapters:
            return self.wrapper.original_module(*args, **kwargs)
        outputs = [module(*args, **kwargs) for module in self.modules]
        if not all(isinstance(output, Tensor) for output in outputs):
            kind = type(self.wrapper.original_module).__name__
            raise ValueError(
                f"a {kind} gives a {type(outputs[0]).__name__}, of which no mixture can be made; leave it out of "
                "modules_to_save"
            )
        wide, shares = compute_dtype(outputs[0]), self.shares(outputs[0])
        total = shares[0].to(wide) * outputs[0]
        for share, output in zip(shares[1:], outputs[1:], strict=True):  # one after another: logits are large
            total = total + share.to(wide) * output
        return total.to(outputs[0].dtype)

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, H) -> (B, T, H'), (V, H')
        """Return a linear layer's product at the mixture of each row as one of wider operands, without a bias."""
        modules: Any = self.modules
        shares, wide = self.shares(hidden), compute_dtype(hidden)
        left = [(hidden * share.to(wide)).to(hidden.dtype) for share in shares]
        right = [module.weight for module in modules]
        if getattr(modules[0], "bias", None) is not None:
            left += [share.to(hidden.dtype).expand(*hidden.shape[:-1], 1) for share in shares]
            right += [module.bias[:, None] for module in modules]
        return torch.cat(left, -1), torch.cat(right, -1)


def mixed_copies(module: Any) -> MixedCopies | None:
    """Return what mixes a module of which each adapter has a copy; None for others, and where adapters are off."""
    copies = vars(module).get("_mopl_copies")
    return None if copies is None or module.disable_adapters else copies


# ---------------------------------------------------------------- all of them


def shared_places(model: nn.Module, values: Mapping[int, Tensor]) -> list[Place]:
    """Return where a model has parameters, told by their ids, that there are values for: all places of a tied one."""
    own = ((module, name, id(p)) for module in modules_of(model) for name, p in module._parameters.items())
    return [(module, name, values[key]) for module, name, key in own if key in values]


def places_of(parts: Iterable[Part], adapters: Sequence[str], shares: Sequence[float]) -> list[Place]:
    """Return the parameters of the base model at coefficients."""
    with torch.no_grad():
        return [place for part in parts for place in part.values(adapters, shares)]


@contextlib.contextmanager
def held(places: Sequence[Place]) -> Iterator[None]:
    """Put values in the place of parameters inside a `with` block; places of one value share one parameter."""
    before = [module._parameters[name] for module, name, _ in places]
    values = {id(value): nn.Parameter(value, requires_grad=False) for _, _, value in places}
    try:
        for module, name, value in places:
            module._parameters[name] = values[id(value)]
        yield
    finally:
        for (module, name, _), parameter in zip(places, before, strict=True):
            module._parameters[name] = parameter


def rank_of(parts: Iterable[Part], adapters: Sequence[str]) -> int:
    """Return the rank that one adapter needs for the factors of several, side by side."""
    layers = [part.layer for part in parts if isinstance(part, LoraPart)]
    return max(sum(layer.r[name] for name in adapters if name in layer.lora_B) for layer in layers)


def one_adapter(
    model: Any, parts: Mapping[str, Part], adapters: Sequence[str], shares: Sequence[float], rank: int | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """Return the configuration and the tensors of one LoRA adapter that is a mixture of several, exactly.

    Its factors are theirs side by side, zeros up to a rank, the largest sum of ranks by default, and the scales are in
    A: so one rank and the scale 1 for all layers, which servers read that know no patterns. In 16 bits A would be
    rounded by a scale that is no power of two: factors are then in float32. Which layers it is on is left as the first
    adapter's configuration says it: see `LoraMixture.adapter_at`.
    """
    parts = {name: part for name, part in parts.items() if part.has(adapters)}
    configs = [model.peft_config[name] for name in adapters]
    if any(config.use_dora for config in configs):
        raise ValueError(
            "the adapters are of DoRA, whose mixture has the rank of the weights, so it is no adapter; write "
            "it whole: merge(weights).save_pretrained(directory), or kind='model' of an export"
        )
    linear = {name: part for name, part in parts.items() if isinstance(part, LoraPart)}
    rank = rank or rank_of(linear.values(), adapters)
    scales = [
        share * part.layer.scaling[name]
        for part in linear.values()
        for share, name in zip(shares, adapters, strict=True)
        if name in part.layer.lora_B
    ]
    wide = any(abs(math.frexp(scale)[0]) not in (0, 0.5) for scale in scales)
    saved = sorted({name for config in configs for name in config.modules_to_save or ()})
    with_bias = any(config.lora_bias for config in configs)
    changes: dict[str, Any] = dict(
        r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={}, init_lora_weights=True,
        lora_bias=with_bias, modules_to_save=saved or None, inference_mode=True,
    )  # fmt: skip
    with torch.no_grad():
        tensors = {
            f"{name}.{key}": value.detach().contiguous()
            for name, part in parts.items()
            for key, value in part.one(adapters, shares, rank, with_bias, wide).items()
        }
    return dataclasses.replace(configs[0], **changes), tensors
