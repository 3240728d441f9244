"""Scores of many sequences under one loss, with the memory of one mini-batch: exact gradients by gradient caching.

A loss of lists needs the scores of all sequences of a list at once, and so autograd would keep the activations of all
of them. But the loss needs no more of the model than its scores: dL/dθ = Σ_i (dL/ds_i) ds_i/dθ. So (Gao et al. 2021,
2101.06983, for contrastive losses)

1. every mini-batch is scored without a graph;
2. the loss of all scores gives dL/ds, which is small;
3. every mini-batch is scored again, with a graph, and its slice of dL/ds is propagated back, after which its graph is
   freed.

It costs one more forward pass. `score_in_parts` does this as an autograd function: what it returns is an ordinary
tensor of scores, any loss follows, and whatever scales that loss (accumulation, a `GradScaler`) scales the gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from mopl._arguments import shape_of

Part = TypeVar("Part")
# How far apart the scores of two equal passes may be, beside the largest of them: kernels may add in another order.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
TOLERANCE_16 = 0.03


def score_in_parts(score: Callable[[Part], Tensor], parts: Sequence[Part], model: nn.Module) -> Tensor:
    """Score mini-batches one after the other, so that the backward pass needs the memory of one of them.

    Both passes see the same dropout masks and the same autocast; under `DistributedDataParallel` the gradients of all
    processes are added once, with the last mini-batch, whose number may differ between processes. Gradient
    checkpointing inside the model works as usual. Gradients go into `.grad` of the model's parameters, which are in no
    graph: call `backward()` without `inputs`; `torch.autograd.grad` finds no parameter.

    Args:
        score: Called with a mini-batch, twice if gradients are enabled; gives its scores (n_i, ...) by calling the
            model as it is wrapped.
        parts: The mini-batches, one at least.
        model: What `score` calls.

    Returns:
        The scores of all, (Σ n_i, ...), in the order of the parts; those of a single part have an ordinary graph.

    Raises:
        ValueError: If there is no part.
        RuntimeError: In the backward pass, if a mini-batch has other scores than before, because something else than
            torch's generators is random.

    Examples:
        >>> model = nn.Linear(3, 1)
        >>> scores = score_in_parts(model, torch.randn(6, 3).split(2), model)
        >>> scores.square().sum().backward()  # as of model(all) at once
    """
    if not len(parts):
        raise ValueError("parts is empty but must have one mini-batch at least")
    if len(parts) == 1:
        return score(parts[0])
    if not torch.is_grad_enabled():
        return torch.cat([score(part) for part in parts])
    call = _Call(score, parts, model)
    return _Scores.apply(call, torch.zeros((), requires_grad=True))  # pyright: ignore[reportReturnType]


@dataclass
class _Pass:
    """What a mini-batch was scored with, and what came out."""

    scores: Tensor
    cpu: Tensor  # states of torch's generators
    devices: Any
    states: Any


class _Call:
    def __init__(self, score: Callable[[Any], Tensor], parts: Sequence[Any], model: nn.Module) -> None:
        self.score, self.parts, self.model = score, parts, model
        self.device = next(iter(model.parameters())).device
        self.passes: list[_Pass] = []
        kind = self.device.type
        self.amp = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind)

    def first(self) -> Tensor:
        found = []
        for part in self.parts:
            cpu, (devices, states) = torch.get_rng_state(), get_device_states(_on(self.device))
            scores = self.score(part)
            self.passes.append(_Pass(scores, cpu, devices, states))
            found.append(scores)
        # Autocast keeps weights that it has cast, and releases of torch differ in whether those cast without a graph
        # are taken again where one is wanted, and the gradient so lost.
        torch.clear_autocast_cache()
        return torch.cat(found)

    def again(self, gradient: Tensor) -> None:
        differences, largest = [], []
        start = 0
        for number, (part, before) in enumerate(zip(self.parts, self.passes, strict=True)):
            slice_ = gradient[start : start + len(before.scores)]
            start += len(before.scores)
            last = number == len(self.parts) - 1
            with contextlib.nullcontext() if last else _no_sync(self.model):
                with torch.enable_grad(), self._as_before(before):
                    scores = self.score(part)
                if scores.shape != before.scores.shape:
                    raise RuntimeError(
                        f"a mini-batch gave scores {shape_of(before.scores)} and then {shape_of(scores)}; score must "
                        "give the same each time"
                    )
                differences.append((scores.detach() - before.scores).abs().amax())
                largest.append(before.scores.abs().amax())
                if scores.requires_grad:
                    torch.autograd.backward(scores, slice_)
        allowed = TOLERANCE_16 if self.amp else TOLERANCE.get(self.passes[0].scores.dtype, TOLERANCE_16)
        apart = torch.stack(differences).amax() > allowed * torch.stack(largest).amax()
        if apart:  # one wait for the device, after all its work; a NaN passes, as the loss has shown it
            raise RuntimeError(
                "a mini-batch that was scored again, for its gradient, has other scores than before, so the gradient "
                "would be of another loss; something random beside torch's default generators, or a state that calls "
                "change, is in the model. Leave mini_batch_size out, or take it out of the model"
            )

    @contextlib.contextmanager
    def _as_before(self, before: _Pass) -> Any:
        with (
            torch.random.fork_rng(devices=before.devices, device_type=self._kind()),
            torch.autocast(self.device.type, dtype=self.dtype, enabled=self.amp),
        ):
            torch.set_rng_state(before.cpu)
            if before.devices:
                set_device_states(before.devices, before.states, device_type=self.device.type)
            torch.clear_autocast_cache()
            yield

    def _kind(self) -> str:
        return "cuda" if self.device.type == "cpu" else self.device.type


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, _: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.call = call
        return call.first()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.call.again(gradient)
        return None, None


def _on(device: torch.device) -> Tensor:
    return torch.empty(0, device=device)


def _no_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which `DistributedDataParallel` adds no gradients of processes up."""
    no_sync = getattr(model, "no_sync", None)
    return contextlib.nullcontext() if no_sync is None else no_sync()
