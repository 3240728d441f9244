"""Training a sharded copy of a model in its place (FSDP2).

The sharded copy is made by `fully_shard`, not by accelerate's own preparation, for three reasons: accelerate shards on
accelerators only and would use DDP on CPUs without a word; it casts what a model is given to the training's precision,
trade-offs included, where DDP runs under autocast; and nothing takes the shards off a model again. Here the model comes
back whole, and a checkpoint is that of any other training: it is resumed by any number of processes, sharded or not.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require

_GATHER = "_mopl_gathered"


class CopiedModel:
    """A copy of a model, trained in its place by processes of which none has all of it.

    The model itself waits on the CPU, and its optimizer updates the copy until `finish`. The frozen parameters of both
    share their memory until the copy's shards are on the device. Trained parameters, buffers and the optimizer's state
    are gathered for a checkpoint and at the end.

    Raises:
        ValueError: If the optimizer has parameters that the model has not, or a parameter is quantised.
    """

    model: nn.Module  # what the loss is given

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._accelerator, self._plain, self._optimizer = accelerator, model, optimizer
        self._own = [list(group["params"]) for group in optimizer.param_groups]
        names = {id(p): name for name, p in model.named_parameters()}
        if not all(id(p) in names for group in self._own for p in group):
            raise ValueError("the optimizer has parameters that the model has not; make it of model.parameters()")
        for name, parameter in model.named_parameters():
            if type(parameter) is not nn.Parameter:  # quantised weights lose their meaning outside of their class
                raise ValueError(
                    f"{name} is a {type(parameter).__name__}, which cannot be sharded here; load the model without "
                    "quantisation, or train with DDP (`--multi_gpu`)"
                )
        broadcast_parameters(model, accelerator.device)
        self._before = optimizer.state_dict()
        model.to("cpu")
        frozen = (p for p in model.parameters() if not p.requires_grad)
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in frozen}
        self._copy = copy.deepcopy(model, shared)
        self._names = [[names[id(p)] for p in own] for own in self._own]

    def _update_copy(self) -> None:
        """Let the optimizer update the copy's parameters from now on."""
        parameters = dict(self._copy.named_parameters())
        for group, names in zip(self._optimizer.param_groups, self._names, strict=True):
            group["params"] = [parameters[name] for name in names]
        self._optimizer.state.clear()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """Give the plain model as it stands, on the training's device, inside a `with` block; every process must."""
        plain = self.plain()
        try:
            yield plain.to(self._accelerator.device)
        finally:
            plain.to("cpu")

    def plain(self) -> nn.Module:
        """Return the plain model, on the CPU, with what was trained so far; every process must call it."""
        raise NotImplementedError

    @torch.no_grad()
    def _copy_buffers(self) -> None:
        """Copy the buffers of the main process: running means, say, are of the part of a batch that a process has."""
        plain = dict(self._plain.named_buffers())
        for name, buffer in self._copy.named_buffers():
            there = buffer.detach().to(self._accelerator.device, copy=True).contiguous()
            torch.distributed.broadcast(there, 0)
            plain[name].copy_(there)

    def finish(self, *, gather: bool) -> None:
        """Give model and optimizer back to the caller: whole, on the device; the optimizer begins anew.

        With `gather` the model gets what was trained, and every process must do so. After an error in one of them the
        others cannot take part, and the model stays as it was at the last checkpoint.
        """
        if gather:
            self.plain()
        del self.model.__dict__[_GATHER]
        self._let_go()
        self._give_back()

    def _give_back(self) -> None:
        """Let the optimizer update the model itself again, and bring that back from the CPU."""
        for group, own in zip(self._optimizer.param_groups, self._own, strict=True):
            group["params"] = own
        self._optimizer.state.clear()
        self.model = self._copy = self._plain
        gc.collect()  # the shards hang in cycles; their memory is needed for the whole model
        self._plain.to(self._accelerator.device)

    def _let_go(self) -> None:
        """Undo what is left of the training outside of the copy."""


class ShardedModel(CopiedModel):
    """A copy of a model that FSDP2 has sharded; its attributes are those of `WholeModel`."""

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, plugin: Any) -> None:
        super().__init__(accelerator, model, optimizer)
        self.model = _shard(self._copy, accelerator, plugin)
        self._update_copy()
        # accelerate's `prepare` would shard the model its own way, and takes no optimizer alone.
        self.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        if self._before["state"]:
            self.load_optimizer(self._before)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        mark(self.model, self.on_device)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients; outside of `no_sync` they are averaged over the processes."""
        self._accelerator.backward(loss)

    def clip(self, limit: float) -> float:
        """Scale the gradient down to a norm of at most `limit`; return the norm that it had."""
        return float(whole_tensor(self._accelerator.clip_grad_norm_(self._trained, limit)))

    def _let_go(self) -> None:
        self._trained.clear()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave the gradients of the processes apart inside a `with` block; each keeps whole ones meanwhile."""
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Load what `whole` gave as the optimizer's state, whatever number of processes it came from."""
        from torch.distributed.tensor import distribute_tensor

        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]

        def shard(value: Any, parameter: Any) -> Any:
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                return value
            # Every process has read the whole tensor and keeps its own share: nothing is sent.
            value = value.to(self._accelerator.device)
            return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

        shares = {
            number: {name: shard(value, parameters[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        self._optimizer.load_state_dict({**state, "state": shares})

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """Return the plain model, on the CPU, with what was trained so far; every process must call it."""
        plain = dict(self._plain.named_parameters())
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                plain[name].copy_(whole_tensor(parameter))
        self._copy_buffers()
        return self._plain

    @torch.no_grad()
    def whole(self) -> tuple[nn.Module, dict[str, Any]]:
        """Return the plain model, on the CPU, and the optimizer's state as it stands; every process must call it.

        The optimizer's state is on the main process only.
        """
        plain, state = self.plain(), self._optimizer.state_dict()
        whole: dict[Any, dict[str, Any]] = {}
        for number, values in state["state"].items():
            whole[number] = {}
            for name, value in values.items():
                value = whole_tensor(value)  # every process takes part, one keeps it
                if self._accelerator.is_main_process:
                    whole[number][name] = value.cpu() if isinstance(value, Tensor) else value
        return plain, {**state, "state": whole}


def _shard(model: nn.Module, accelerator: Any, plugin: Any) -> nn.Module:
    """Shard a model in place: each layer that must not be split is a group of its own, and the rest is one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    asked = plugin.transformer_cls_names_to_wrap or os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    given = {name.strip() for name in asked if name.strip()}
    names = given or set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names and module is not model]
    unknown = given - {type(module).__name__ for module in layers}
    if unknown:
        raise ValueError(
            f"the model has no layers of class {', '.join(sorted(unknown))}; leave fsdp_transformer_layer_cls_to_wrap "
            "out, or name the class of its layers"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in reversed(layers):  # those inside others first
        fully_shard(layer, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(model, mesh=mesh)
    if accelerator.native_amp:
        run_under_autocast(model, accelerator)
    return model


def run_under_autocast(model: nn.Module, accelerator: Any) -> None:
    """Do to a model's forward what accelerate does to one that is not sharded."""
    require("accelerate")
    from accelerate.utils import convert_outputs_to_fp32

    forward = model.forward

    @functools.wraps(forward)
    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(under_autocast)  # type: ignore[method-assign]


@torch.no_grad()
def broadcast_parameters(model: nn.Module, device: torch.device) -> None:
    """Give every process the main one's parameters and buffers, as DDP does, one at a time."""
    for tensor in (*model.parameters(), *model.buffers()):
        there = tensor.detach().to(device).contiguous()
        torch.distributed.broadcast(there, 0)
        if there.data_ptr() != tensor.data_ptr():
            tensor.copy_(there)


def whole_tensor(value: Any) -> Any:
    """Return a sharded tensor whole, which every process must do; anything else as it is."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def mark(model: nn.Module, gather: Callable[[], contextlib.AbstractContextManager[nn.Module]]) -> None:
    """Let `gathered` find `gather`. It is set aside from the modules: the plain model is no part of the other."""
    model.__dict__[_GATHER] = gather


def gathered(model: nn.Module) -> contextlib.AbstractContextManager[nn.Module] | None:
    """Return what gives the plain model behind a sharded one, `CopiedModel.on_device`; None for any other model."""
    gather = model.__dict__.get(_GATHER)
    return None if gather is None else gather()
