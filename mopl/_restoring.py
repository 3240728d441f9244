"""What is switched for a moment, or saved, and comes back: modes of modules, what is trained, generators."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import nn

from mopl._modules import modules_of


@contextlib.contextmanager
def modes_kept(*models: nn.Module | None) -> Iterator[None]:
    """Leave every module in the mode, training or evaluation, that it had before the `with` block.

    `model.train(before)` would give all of a model's modules the mode of the outermost, a frozen part included.
    """
    before = [(module, module.training) for model in models if model is not None for module in modules_of(model)]
    try:
        yield
    finally:
        for module, training in before:
            _set_mode(module, training)


def _set_mode(module: nn.Module, training: bool) -> None:
    if type(module).__setattr__ is nn.Module.__setattr__:
        vars(module)["training"] = training  # a tenth of the time: it is no parameter, module or buffer
    else:
        module.training = training


@contextlib.contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Put models into evaluation mode (no dropout) for the `with` block."""
    with modes_kept(*models):
        for model in models:
            if model is not None:
                _evaluate(model)
        yield


# Where what `train` and `eval` do is known: set the mode of all modules. That of transformers also exchanges kernels
# for those of the mode, which compute the same; as nothing would exchange them back, they stay.
_SETTING_MODES = {"torch.nn.modules.module", "transformers.modeling_utils"}


def _evaluate(model: nn.Module) -> None:
    modules = modules_of(model)
    methods = {method for kind in set(map(type, modules)) for method in (kind.train, kind.eval)}
    own = any("train" in vars(module) or "eval" in vars(module) for module in modules)
    if own or any(method.__module__ not in _SETTING_MODES for method in methods):
        model.eval()  # which sets every mode one level after another, in twenty times the time
        return
    for module in modules:
        _set_mode(module, False)


@contextlib.contextmanager
def requires_grad_kept(model: nn.Module) -> Iterator[None]:
    """Leave `requires_grad` of every parameter as it was before the `with` block.

    PEFT sets it anew for every adapter that it switches.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, wanted in before:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)


def frozen_parameters(model: nn.Module) -> list[str]:
    """Return the names of a model's parameters that are not trained."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def freeze(model: nn.Module, names: Collection[str]) -> None:
    """Train these parameters no more; others stay as they are."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave torch's default generators as they were before the `with` block, whatever is drawn or seeded in it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        yield


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch's default generators for the `with` block; None leaves them alone, inside and after."""
    if seed is None:
        yield
        return
    with generators_kept():
        torch.manual_seed(seed)
        yield
