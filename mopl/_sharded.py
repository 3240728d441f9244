"""Models that FSDP2 or ZeRO-3 has cut into shards: their parameters whole, or others in their place, for a moment.

Every process must call these functions, with the same arguments, since they talk to one another. On a model that is not
sharded they change nothing. Where a group of layers stays whole behind its forward pass, as the last one does under
FSDP2 and small parameters do under ZeRO-3, it stands in the way of both: nobody would see that what it was gathered
from is another value now, or what of it is trained. `resharded` therefore surrounds them.

| sharded by | a parameter is                     | the share of a process       | the optimizer updates           |
|------------|------------------------------------|------------------------------|---------------------------------|
| FSDP2      | a DTensor                          | its local tensor             | the parameter                   |
| ZeRO-3     | empty while nobody has gathered it | `ds_tensor`, flat and padded | a copy in float32, cut likewise |
| ZeRO-1, -2 | whole                              |                              | a part of a copy in float32     |
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mopl._modules import modules_of, parameters_in


def _shards(modules: list[nn.Module]) -> list[Any]:
    """Return those of a model's modules that `fully_shard` was applied to."""
    package: Any = sys.modules.get("torch.distributed.fsdp")  # without which nothing can be sharded
    if package is None or not hasattr(package, "FSDPModule"):
        return []
    return [module for module in modules if isinstance(module, package.FSDPModule)]


def is_dtensor(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, without importing the distributed package for those that are not."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_partitioned(tensor: Tensor) -> bool:
    """Say whether a parameter is one that ZeRO-3 has cut."""
    return getattr(tensor, "ds_tensor", None) is not None


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a parameter, also where ZeRO-3 leaves an empty tensor in its place between uses."""
    return getattr(tensor, "ds_shape", tensor.shape)


def is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 or ZeRO-3 has cut a model, or a part of it, into shards."""
    modules = modules_of(model)
    return bool(_shards(modules)) or any(map(is_partitioned, parameters_in(modules)))


def _reshard(model: nn.Module) -> None:
    modules = modules_of(model)
    for module in _shards(modules):
        module.reshard()
    cut: list[Any] = [parameter for parameter in parameters_in(modules) if is_partitioned(parameter)]
    # The optimizer, or what stands in its place, keeps count of what is whole.
    for engine in {id(p._z3_optimizer): p._z3_optimizer for p in cut if hasattr(p, "_z3_optimizer")}.values():
        engine.parameter_offload.partition_all_parameters()


@contextlib.contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Let no group of layers be whole when the `with` block begins, nor when what follows it begins."""
    _reshard(model)
    try:
        yield
    finally:
        _reshard(model)


@torch.no_grad()
def gathered(parameters: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return sharded tensors whole, on the CPU, one after another; others as they are.

    Args:
        parameters: Tensors by name, in one order on all processes.
        keep: Whether this process wants them; else it gets none, but does its part.
    """
    found = {}
    for name, value in parameters.items():
        whole = _whole(value)
        if keep:
            found[name] = whole
    return found


def _whole(value: Any) -> Tensor:
    if is_dtensor(value):
        return value.full_tensor().cpu()
    if not is_partitioned(value):
        return value
    package: Any = sys.modules["deepspeed"]
    with package.zero.GatheredParameters([value]):
        return value.detach().to("cpu", copy=True)


@dataclasses.dataclass(frozen=True)
class Share:
    """What a process has of a tensor that is cut as ZeRO-3 cuts it."""

    part: Tensor  # (n,), flat, with zeros at the end of the last one


@torch.no_grad()
def set_shards(parameters: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Give sharded parameters other values, each whole or as shards of the same kind; nothing is sent."""
    for name, value in values.items():
        own = parameters[name]
        if is_dtensor(own):
            own.to_local().copy_(shard_of(value, own).to_local())
        elif is_partitioned(own):
            own.ds_tensor.copy_(shard_of(value, own).part)
        elif own is not value:
            own.copy_(value)


@torch.no_grad()
def set_copies(parameters: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Let the copies that an optimizer of DeepSpeed trains follow parameters that have other values now, each whole."""
    for name, value in values.items():
        own = parameters[name]
        if is_partitioned(own) and hasattr(own, "_z3_optimizer"):
            own._z3_optimizer.set_local_hp_param(shard_of(value, own).part, own)
        elif hasattr(own, "_hp_mapping"):
            own.set_full_hp_param(value.to(own.device))


def shard_of(value: Any, like: Any) -> Any:
    """Return this process's share of a whole tensor that all processes have, cut as `like` is, a copy of its own."""
    if is_dtensor(value) or isinstance(value, Share):
        return value
    if is_partitioned(like):
        part = torch.zeros_like(like.ds_tensor)
        first = len(part) * torch.distributed.get_rank(like.ds_process_group)
        own = value.detach().reshape(-1)[first : first + len(part)]
        part[: len(own)] = own
        return Share(part)
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def shards_replaced(model: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Let parameters of a sharded model have other values inside a `with` block, for passes without gradient.

    Args:
        model: The model, or a part of it, by whose names of parameters there are
        values: Values, whole or as shards.
    """
    with resharded(model):
        own: dict[str, Any] = {name: p for name, p in model.named_parameters() if name in values}
        before = {n: Share(p.ds_tensor.clone()) if is_partitioned(p) else p.detach().clone() for n, p in own.items()}
        set_shards(own, values)
        try:
            yield
        finally:
            _reshard(model)
            set_shards(own, before)
