"""Models that FSDP2 has cut into shards: their parameters whole, or others in their place, for a moment.

Every process must call these functions, with the same arguments, since they talk to one another. On a model that is not
sharded they change nothing. Where a group of layers stays whole behind its forward pass, as the last one does, it
stands in the way of both: nobody would see that what it was gathered from is another value now, or what of it is
trained. `resharded` therefore surrounds them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _shards(model: nn.Module) -> list[Any]:
    """Return the modules of a model that `fully_shard` was applied to."""
    package: Any = sys.modules.get("torch.distributed.fsdp")  # without which nothing can be sharded
    if package is None or not hasattr(package, "FSDPModule"):
        return []
    return [module for module in model.modules() if isinstance(module, package.FSDPModule)]


def is_dtensor(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, without importing the distributed package for those that are not."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 has cut a model, or a part of it, into shards."""
    return bool(_shards(model))


@contextlib.contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Let no group of layers be whole when the `with` block begins, nor when what follows it begins."""
    for module in _shards(model):
        module.reshard()
    try:
        yield
    finally:
        for module in _shards(model):
            module.reshard()


@torch.no_grad()
def gathered(parameters: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return sharded tensors whole, on the CPU, one after another; others as they are.

    Args:
        parameters: Tensors by name, in one order on all processes.
        keep: Whether this process wants them; else it gets none, but does its part.
    """
    found = {}
    for name, value in parameters.items():
        whole = value.full_tensor().cpu() if is_dtensor(value) else value  # type: ignore[operator]
        if keep:
            found[name] = whole
    return found


@torch.no_grad()
def set_shards(parameters: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Give sharded parameters other values, each whole or as shards of the same kind; nothing is sent."""
    for name, value in values.items():
        own = parameters[name]
        if is_dtensor(own):
            own.to_local().copy_(shard_of(value, own).to_local())
        elif own is not value:
            own.copy_(value)


def shard_of(value: Any, like: Any) -> Any:
    """Return this process's share of a whole tensor that all processes have, cut as `like` is, a copy of its own."""
    if is_dtensor(value):
        return value
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
        own = {name: p for name, p in model.named_parameters() if name in values}
        before = {name: p.detach().clone() for name, p in own.items()}
        set_shards(own, values)
        try:
            yield
        finally:
            for module in _shards(model):
                module.reshard()
            set_shards(own, before)
