"""How a training uses several processes: the whole model on each of them (DDP), or a share of it (FSDP2, DeepSpeed).

| launched with                   | parameters on each process | what is trained                                      |
|---------------------------------|----------------------------|------------------------------------------------------|
| one process                     | all                        | the model itself                                     |
| several                         | all                        | the model inside `DistributedDataParallel`           |
| `--use_fsdp --fsdp_version 2`   | a share, one layer whole   | a sharded copy; the model itself waits on the CPU    |
| `--use_deepspeed --zero_stage 3`| a share, one layer whole   | the same                                             |
| `--use_deepspeed --zero_stage 2`| all; a share of updates    | a copy; the model itself waits on the CPU            |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mopl._extras import require
from mopl.training.sharded import ShardedModel, gathered
from mopl.training.zero import ZeroModel, is_engine
from mopl.training.zero_settings import hidden_from_accelerate, zero_settings


class WholeModel:
    """A model that every process has whole: alone, or inside DDP.

    The loss is given `model`; `optimizer` is accelerate's wrapper around the optimizer.
    """

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._accelerator, self._plain = accelerator, model
        self._forward = model.__dict__.get("forward")  # of a fused model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]

    def no_sync(self) -> AbstractContextManager[None]:
        """Leave the gradients of the processes apart inside a `with` block."""
        return self._accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients; outside of `no_sync` they are averaged over the processes."""
        self._accelerator.backward(loss)

    def clip(self, limit: float) -> float:
        """Scale the gradient down to a norm of at most `limit`; return the norm that it had."""
        return float(self._accelerator.clip_grad_norm_(self._trained, limit))

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
        self._trained.clear()
        self._accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        # accelerate looks for the forward by following `__wrapped__`, and may find what the model's own one is around.
        self._plain.__dict__.pop("forward", None)
        if self._forward is not None:
            self._plain.__dict__["forward"] = self._forward


Prepared = WholeModel | ShardedModel | ZeroModel


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

    It uses CUDA where present unless `cpu`, and what its launcher asks for: DDP for several processes, FSDP2
    (`accelerate launch --use_fsdp --fsdp_version 2`; see `mopl.training.parallel`) or DeepSpeed's ZeRO
    (`--use_deepspeed --zero_stage 3`, or 2). Gradient accumulation is the loop's own, because accelerate divides by the
    number of parts, whatever their sizes. Under DeepSpeed the accelerator is that of DDP; the loop makes the engine.

    Args:
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`.
        cpu: Whether to leave a GPU alone.
        sharding: Whether the training may be sharded. It cannot if its loss generates with the model it is given, or
            runs parts of it: parameters are whole only in the model's forward pass.

    Returns:
        The `accelerate.Accelerator`, for `train(..., accelerator=...)`.

    Raises:
        ImportError: If accelerate is not installed, or DeepSpeed where it is asked for.
        NotImplementedError: If the launcher asks for another kind of parallelism, or a setting of FSDP2 or DeepSpeed
            that does not work here; the message names what does.
    """
    require("accelerate")
    from accelerate import Accelerator
    from accelerate.utils import disable_fsdp_ram_efficient_loading

    if _fsdp_was_asked_for():
        # By default accelerate's launcher lets all processes but one load empty parameters.
        disable_fsdp_ram_efficient_loading()
    # By itself it would take each process of several for the only one where there is no GPU, or Apple's alone.
    alone = int(os.environ.get("WORLD_SIZE") or 1) == 1 or "LOCAL_RANK" not in os.environ
    device = torch.accelerator.current_accelerator(check_available=True)
    shared = device is not None and device.type != "mps"
    with hidden_from_accelerate():
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=cpu or not (alone or shared))
    sharded = fsdp_plugin(accelerator) is not None or zero_settings(accelerator) is not None
    if sharded and not sharding:
        raise NotImplementedError(
            "this training runs its model outside of the forward pass, where no process has whole parameters; launch "
            "it with DDP: `--multi_gpu` / `--num_processes` in place of `--use_fsdp` or `--use_deepspeed`"
        )
    return accelerator


def prepare(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> Prepared:
    """Return a model and its optimizer as the processes of a training use them."""
    plugin = fsdp_plugin(accelerator)
    if plugin is None and (settings := zero_settings(accelerator)) is not None:
        return ZeroModel(accelerator, model, optimizer, settings)
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
    if kind == "DEEPSPEED":
        raise NotImplementedError(
            "the loop makes DeepSpeed's engine itself, but accelerate was set up for DEEPSPEED; launch with "
            "`accelerate launch --use_deepspeed` and make the accelerator with mopl.training.make_accelerator, before "
            "any other"
        )
    if kind in ("MEGATRON_LM", "TP"):
        raise NotImplementedError(
            f"the loop trains on one device, with DDP, FSDP2 or DeepSpeed, but accelerate was set up for {kind}; "
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


def unwrapped(model: nn.Module) -> Any:
    """Return the model behind what DDP or DeepSpeed wraps around it."""
    wrapped: Any = model
    return wrapped.module if isinstance(model, DistributedDataParallel) or is_engine(model) else model


def whole_model(model: nn.Module) -> AbstractContextManager[Any]:
    """Give the plain model behind what a loss is given, inside a `with` block: to generate with, not to train.

    Under FSDP2 and ZeRO-3 the trained parameters are gathered, which every process must do, and the whole model is on
    the device meanwhile. Otherwise it is what `unwrapped` returns.
    """
    return gathered(model) or nullcontext(unwrapped(model))
