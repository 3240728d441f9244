"""How a training uses several processes: the whole model on each of them (DDP), or a shard of it on each (FSDP2).

| launched with                   | parameters on each process | what is trained                                      |
|---------------------------------|----------------------------|------------------------------------------------------|
| one process                     | all                        | the model itself                                     |
| several                         | all                        | the model inside `DistributedDataParallel`           |
| `--use_fsdp --fsdp_version 2`   | a share, one layer whole   | a sharded copy; the model itself waits on the CPU    |

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
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mopl._extras import require


class WholeModel:
    """A model that every process has whole: alone, or inside DDP.

    The loss is given `model`; `optimizer` is accelerate's wrapper around the optimizer.
    """

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._accelerator, self._plain = accelerator, model
        self._forward = model.__dict__.get("forward")  # of a fused model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def no_sync(self) -> AbstractContextManager[None]:
        """Leave the gradients of the processes apart inside a `with` block."""
        return self._accelerator.no_sync(self.model)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Load what `whole` gave as the optimizer's state."""
        self.optimizer.load_state_dict(state)

    def plain(self) -> nn.Module:
        """Return the plain model as it stands; every process must call it."""
        return self._accelerator.unwrap_model(self.model)

    def whole(self) -> tuple[nn.Module, dict[str, Any]]:
        """Return the plain model as it stands and the optimizer's state; every process must call it."""
        return self.plain(), self.optimizer.state_dict()

    def finish(self, *, gather: bool) -> None:
        """Give the caller the plain model back: the prepared one's forward is wrapped in autocast."""
        self._accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        # accelerate looks for the forward by following `__wrapped__`, and may find what the model's own one is around.
        self._plain.__dict__.pop("forward", None)
        if self._forward is not None:
            self._plain.__dict__["forward"] = self._forward


class ShardedModel:
    """A sharded copy of a model, trained in its place; its attributes are those of `WholeModel`.

    The model itself waits on the CPU, and its optimizer updates the copy until `finish`. The frozen parameters of both
    share their memory until the copy's shards are on the device. Trained parameters, buffers and the optimizer's state
    are gathered for a checkpoint and at the end.

    Raises:
        ValueError: If the optimizer has parameters that the model has not, or a parameter is quantised.
    """

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, plugin: Any) -> None:
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
        before = optimizer.state_dict()
        model.to("cpu")
        frozen = (p for p in model.parameters() if not p.requires_grad)
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in frozen}
        self.model = _shard(copy.deepcopy(model, shared), accelerator, plugin)
        sharded = dict(self.model.named_parameters())
        for group, own in zip(optimizer.param_groups, self._own, strict=True):
            group["params"] = [sharded[names[id(p)]] for p in own]
        optimizer.state.clear()
        # accelerate's `prepare` would shard the model its own way, and takes no optimizer alone.
        self.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        if before["state"]:
            self.load_optimizer(before)

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
        plain, buffers = dict(self._plain.named_parameters()), dict(self._plain.named_buffers())
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                plain[name].copy_(whole_tensor(parameter))
        for name, buffer in self.model.named_buffers():
            buffers[name].copy_(buffer)
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

    def finish(self, *, gather: bool) -> None:
        """Give model and optimizer back to the caller: whole, on the device; the optimizer begins anew.

        With `gather` the model gets what was trained, and every process must do so. After an error in one of them the
        others cannot take part, and the model stays as it was at the last checkpoint.
        """
        if gather:
            self.plain()
        for group, own in zip(self._optimizer.param_groups, self._own, strict=True):
            group["params"] = own
        self._optimizer.state.clear()
        self.model = self._plain
        gc.collect()  # the shards hang in cycles; their memory is needed for the whole model
        self._plain.to(self._accelerator.device)


def on_main(accelerator: Any, act: Callable[[], Any]) -> Any:
    """Return what `act` returns on the main process, or raise what it raises, on every process; no other runs it."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except Exception as error:
            if accelerator.num_processes == 1:
                raise
            outcome[1] = error
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def exists_on_main(accelerator: Any, path: Path) -> bool:
    """Return whether a path exists, as the main process sees it, on every process.

    Where processes look for themselves, a late one may find what another has written meanwhile; it then leaves out
    work in which the others wait for it.
    """
    return on_main(accelerator, path.exists)


def make_accelerator(mixed_precision: str = "no", *, cpu: bool = False, sharding: bool = True) -> Any:
    """Return accelerate's `Accelerator` as the loop needs it; make it before a model is loaded.

    It uses CUDA where present unless `cpu`, and what its launcher asks for: DDP for several processes, or FSDP2
    (`accelerate launch --use_fsdp --fsdp_version 2`; see `mopl.training.parallel`). Gradient accumulation is the loop's
    own, because accelerate divides by the number of parts, whatever their sizes.

    Args:
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`.
        cpu: Whether to leave a GPU alone.
        sharding: Whether the training may be sharded. It cannot if it runs the model otherwise than by its forward
            pass, as generation does: parameters are whole only there.

    Returns:
        The `accelerate.Accelerator`, for `train(..., accelerator=...)`.

    Raises:
        ImportError: If accelerate is not installed.
        NotImplementedError: If the launcher asks for another kind of parallelism, or a setting of FSDP2 that does not
            work here; the message names what does.
    """
    require("accelerate")
    from accelerate import Accelerator
    from accelerate.utils import disable_fsdp_ram_efficient_loading

    if _fsdp_was_asked_for():
        # By default accelerate's launcher lets all processes but one load empty parameters.
        disable_fsdp_ram_efficient_loading()
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=cpu)
    if fsdp_plugin(accelerator) is not None and not sharding:
        raise NotImplementedError(
            "this training runs its model outside of the forward pass, where FSDP2 has no whole parameters; launch it "
            "with DDP: `--multi_gpu` / `--num_processes` in place of `--use_fsdp`"
        )
    return accelerator


def prepare(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> WholeModel | ShardedModel:
    """Return a model and its optimizer as the processes of a training use them."""
    plugin = fsdp_plugin(accelerator)
    if plugin is None:
        return WholeModel(accelerator, model, optimizer)
    return ShardedModel(accelerator, model, optimizer, plugin)


# ---------------------------------------------------------------- accelerate's settings


def distribution_of(accelerator: Any) -> str:
    """Return the name of accelerate's way of using several processes: `"NO"`, `"MULTI_GPU"`, `"FSDP"`, ..."""
    return str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))


def fsdp_plugin(accelerator: Any) -> Any:
    """Return accelerate's settings of FSDP2, or None where nothing is to be sharded.

    Raises:
        NotImplementedError: If accelerate was set up for a kind of sharding, or with a setting, that is not supported.
    """
    kind = distribution_of(accelerator)
    if kind in ("DEEPSPEED", "MEGATRON_LM", "TP"):
        raise NotImplementedError(
            f"the loop trains on one device, with DDP or with FSDP2, but accelerate was set up for {kind}; "
            "run `accelerate config` again or pass `--multi_gpu` / `--num_processes` alone"
        )
    if kind != "FSDP" and not (_fsdp_was_asked_for() and accelerator.num_processes > 1):
        return None
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:  # on CPUs accelerate reads its settings and drops them
        from accelerate import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
    _check(accelerator, plugin)
    return plugin


def _check(accelerator: Any, plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise NotImplementedError(
            f"the loop trains with FSDP2, but accelerate was set up for version {plugin.fsdp_version} of FSDP; pass "
            "`--fsdp_version 2`, or `--multi_gpu` for DDP"
        )
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    parallel = getattr(accelerator, "parallelism_config", None)
    compiled = getattr(getattr(accelerator.state, "dynamo_plugin", None), "backend", None)
    offload = plugin.cpu_offload is not None and type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"
    refused = {
        "mixed_precision fp16": (accelerator.mixed_precision == "fp16", "pass bf16"),
        "fsdp_offload_params": (offload, "leave it out"),
        "fsdp_activation_checkpointing": (plugin.activation_checkpointing, "use gradient_checkpointing of the model"),
        "fsdp_ignored_modules": (plugin.ignored_modules is not None, "leave it out"),
        "fsdp_cpu_ram_efficient_loading": (
            plugin.cpu_ram_efficient_loading,
            "every process needs the model: make the accelerator with mopl.training.make_accelerator before the model "
            "is loaded",
        ),
        "SIZE_BASED_WRAP": (
            getattr(policy, "__name__", "") == "size_based_auto_wrap_policy", "pass TRANSFORMER_BASED_WRAP"
        ),
        "parallelism_config": (parallel is not None, "leave it out"),
        "dynamo_backend": (getattr(compiled, "value", "NO") not in (None, "NO"), "pass `--dynamo_backend no`"),
    }  # fmt: skip
    for name, (present, remedy) in refused.items():
        if present:
            raise NotImplementedError(
                f"{name} does not work with FSDP2 here; {remedy}, or train with DDP (`--multi_gpu`)"
            )


def _fsdp_was_asked_for() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


# ---------------------------------------------------------------- sharding


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
        _run_under_autocast(model, accelerator)
    return model


def _run_under_autocast(model: nn.Module, accelerator: Any) -> None:
    """Do to a model's forward what accelerate does to one that is not sharded."""
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


def unwrapped(model: nn.Module) -> Any:
    """Return the model behind whatever DDP wraps around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model
