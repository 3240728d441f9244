"""Training a model in the shares of DeepSpeed's ZeRO: of gradients and updates (stage 2), of parameters too (stage 3).

As under FSDP2, a copy is trained in the model's place, and the model comes back whole. DeepSpeed's engine runs it: its
passes, the sums of gradients and the update, by the optimizer of the training, of a flat float32 tensor for a group of
parameters, of which each process has its share. Autocast, accumulation, schedule and checkpoints are those of any other
training. The engine is not accelerate's: that one clips and updates in the backward pass, when the loop has not yet
looked at what it would update with.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl.training.sharded import CopiedModel, mark, run_under_autocast
from mopl.training.zero_gradients import UsedParameters, clear_gradients

# What these do to an element of a parameter depends on no other, so that they may have a share of several at once.
ELEMENTWISE = ("Adadelta", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
_ENGINE = "_mopl_engine"


class ZeroModel(CopiedModel):
    """A copy of a model that DeepSpeed has cut; its attributes are those of `WholeModel`.

    Args:
        accelerator: One of DDP.
        model: The model.
        optimizer: Its optimizer, of `torch.optim`, for all trained parameters; they are in float32.
        settings: DeepSpeed's config; see `mopl.training.zero_settings`.

    Raises:
        ValueError: If the optimizer leaves out a trained parameter, one is not in float32, or one is a scalar.
        NotImplementedError: If the optimizer looks at whole parameters, stage 3 is asked for and the model is one that
            does, or DeepSpeed is set up for another device.
    """

    def __init__(
        self, accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
    ) -> None:
        _check(accelerator, model, optimizer, settings["zero_optimization"]["stage"])
        super().__init__(accelerator, model, optimizer)
        logging.getLogger("DeepSpeed").addFilter(_is_news)
        self._stage = settings["zero_optimization"]["stage"]
        self._linear = nn.functional.linear  # DeepSpeed puts another in its place, which keeps no gathered weights
        self._groups = list(optimizer.param_groups)
        try:
            engine = self._engine(settings)
        except BaseException:
            nn.functional.linear = self._linear
            self._give_back()
            raise
        self.model: Any = engine
        self._shares = _Shares(engine.optimizer, self._stage, accelerator)
        self.optimizer = _Stepper(engine, self._groups)
        self._used = UsedParameters(self._copy, engine.optimizer, accelerator)
        engine.__dict__[_ENGINE] = True
        mark(engine, self.on_device)
        if self._before["state"]:
            self.load_optimizer(self._before)

    def _engine(self, settings: dict[str, Any]) -> Any:
        """Return DeepSpeed's engine around the copy, which it cuts."""
        require("deepspeed")
        import deepspeed

        accelerator = self._accelerator
        if accelerator.native_amp:
            run_under_autocast(self._copy, accelerator)
        self._update_copy()
        with _quiet():
            if self._stage == 3:
                # One parameter at a time: by itself, `initialize` puts the whole model on the device.
                deepspeed.zero.Init(module=self._copy, config_dict_or_path=settings)
                for buffer in self._copy.buffers():
                    buffer.data = buffer.to(accelerator.device)
            engine, *_ = deepspeed.initialize(
                model=self._copy, optimizer=self._optimizer, config=settings, dist_init_required=False
            )
        return engine

    @contextlib.contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """Give the plain model as it stands, on the training's device, inside a `with` block; every process must."""
        if self._stage == 2:  # every process has it
            yield self._copy
            return
        with super().on_device() as plain:
            yield plain

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave the update for later inside a `with` block; gradients are added up over the processes all the same."""
        self.model.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.model.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients, averaged over the processes.

        Raises:
            RuntimeError: If parameters that have a gradient in one process have none in another.
        """
        self.model.backward(loss, scale_wrt_gas=False)

    def clip(self, limit: float) -> float:
        """Have the next update scale the gradient down to a norm of at most `limit`; return the norm that it has.

        Raises:
            RuntimeError: If a trained parameter has no gradient, as under DDP.
        """
        self._used.check()
        zero = self.model.optimizer
        zero.clip_grad = 0.0 if math.isinf(limit) else limit
        groups = zero.fp16_groups if self._stage == 3 else zero.params_in_partition
        norms = [
            float(zero.get_grad_norm_direct(zero.averaged_gradients[number], group))
            for number, group in enumerate(groups)
        ]
        # It says -1 of what is no number or infinite.
        return math.inf if any(not norm >= 0 for norm in norms) else math.hypot(*norms)

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """Return the plain model, on the CPU, with what was trained so far; every process must call it."""
        plain = dict(self._plain.named_parameters())
        trained = {name: p for name, p in self._copy.named_parameters() if p.requires_grad}
        if self._stage == 2:
            for name, parameter in trained.items():
                plain[name].copy_(parameter)
        else:
            names = {id(parameter): name for name, parameter in trained.items()}
            for number, flat in enumerate(self._shares.flat):
                for parameter, value in self._shares.whole(number, flat):
                    plain[names[id(parameter)]].copy_(value)
        self._copy_buffers()
        return self._plain

    @torch.no_grad()
    def whole(self) -> tuple[nn.Module, dict[str, Any]]:
        """Return the plain model, on the CPU, and the optimizer's state as it stands; every process must call it.

        The optimizer's state is on the main process only.
        """
        keep = self._accelerator.is_main_process
        found: dict[int, dict[str, Any]] = {}
        for number, flat in enumerate(self._shares.flat):
            for name, value in self._optimizer.state.get(flat, {}).items():
                if isinstance(value, Tensor) and value.shape == flat.shape:
                    of_each = self._shares.whole(number, value, keep=keep)
                else:
                    of_each = [(p, value) for p in self._shares.parameters[number]]
                for parameter, item in of_each:
                    own = item.detach().cpu().clone() if isinstance(item, Tensor) else item
                    found.setdefault(id(parameter), {})[name] = own
        state: dict[int, dict[str, Any]] = {}
        groups = []
        parameters, count = dict(self._copy.named_parameters()), 0
        for group, names in zip(self._groups, self._names, strict=True):
            groups.append({**group, "params": list(range(count, count + len(names)))})
            for place, name in enumerate(names, count):
                if keep and id(parameters[name]) in found:
                    state[place] = found[id(parameters[name])]
            count += len(names)
        return self.plain(), {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Load what `whole` gave as the optimizer's state, whatever number of processes it came from.

        Raises:
            ValueError: If it has updated some of the parameters more often than others.
        """
        for group, saved in zip(self._groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        parameters = dict(self._copy.named_parameters())
        order = [id(parameters[name]) for names in self._names for name in names]
        states = {order[number]: values for number, values in state["state"].items()}
        for number, flat in enumerate(self._shares.flat):
            of_group = [(p, states[id(p)]) for p in self._shares.parameters[number] if id(p) in states]
            if of_group:
                self._optimizer.state[flat] = self._own_share(number, of_group)

    def _own_share(self, number: int, of_group: list[tuple[nn.Parameter, dict[str, Any]]]) -> dict[str, Any]:
        """Return this process's share of the states of a group's parameters."""
        flat, found = self._shares.flat[number], {}
        for name, first in of_group[0][1].items():
            values = [(parameter, state[name]) for parameter, state in of_group]
            if isinstance(first, Tensor) and first.shape == self._shares.shape(of_group[0][0]) and first.ndim:
                found[name] = self._shares.own(number, values)
                continue
            if any(value != first for _, value in values):
                raise ValueError(
                    f"{name} in the optimizer's state differs between parameters, which DeepSpeed updates together; "
                    "resume with FSDP2 (`--use_fsdp --fsdp_version 2`) or DDP (`--multi_gpu`)"
                )
            on_device = self._optimizer.defaults.get("fused") or self._optimizer.defaults.get("capturable")
            tensor = isinstance(first, Tensor)
            found[name] = (first.to(flat.device, copy=True) if on_device else first.clone()) if tensor else first
        return found

    def _let_go(self) -> None:
        with _quiet():
            self.model.destroy()
        if self._stage == 3:
            _free(self._copy, self.model.optimizer)
        nn.functional.linear = self._linear
        self._shares.clear()
        self._used.clear()


class _Stepper:
    """What the loop needs of an optimizer: the engine updates with it."""

    def __init__(self, engine: Any, groups: list[dict[str, Any]]) -> None:
        self._engine, self.param_groups = engine, groups

    def step(self) -> None:
        self._engine.step()
        clear_gradients(self._engine.optimizer)

    def zero_grad(self) -> None:
        """Do nothing: the update has cleared the gradients."""


class _Shares:
    """Where each trained parameter lies in the flat tensors that ZeRO updates, of which each process has a share.

    A share of stage 2 is a part of all parameters of a group after each other, a share of stage 3 a part of each of
    them. What surrounds parameters in it fills it up.

    Attributes:
        flat: This process's shares, one for a group of parameters, each as long as those of the other processes.
        parameters: The parameters of each group, which may be empty.
    """

    def __init__(self, zero: Any, stage: int, accelerator: Any) -> None:
        self._by_parameter = stage == 3
        self._rank, self._processes = accelerator.process_index, accelerator.num_processes
        if self._by_parameter:
            self.flat, groups, places = (
                zero.fp32_partitioned_groups_flat,
                zero.fp16_groups,
                zero.fp16_partitioned_groups_flat,
            )
        else:
            self.flat, groups = zero.single_partition_of_fp32_groups, zero.bit16_groups
            places = zero.bit16_groups_flat
        self.parameters: list[list[nn.Parameter]] = [list(group) for group in groups]
        self._start: dict[int, int] = {}
        for group, place in zip(self.parameters, places, strict=True):
            for parameter in group:
                here = self._here(parameter)
                self._start[id(parameter)] = (here.data_ptr() - place.data_ptr()) // here.element_size()

    def _here(self, parameter: Any) -> Tensor:
        return parameter.ds_tensor if self._by_parameter else parameter.data

    def shape(self, parameter: Any) -> torch.Size:
        """Return the shape of a parameter that may be cut."""
        return parameter.ds_shape if self._by_parameter else parameter.shape

    def whole(self, number: int, share: Tensor, keep: bool = True) -> list[tuple[nn.Parameter, Tensor]]:
        """Return what a group's shares hold for each parameter, on the CPU; every process must, and some may `keep` it.

        One share at a time is sent to all: the device needs the memory of one.
        """
        rows = []
        for rank in range(self._processes):
            sent = share.detach().contiguous() if rank == self._rank else torch.empty_like(share)
            torch.distributed.broadcast(sent, rank)
            if keep:
                rows.append(sent.cpu())
        if not keep:
            return []
        together, found = torch.stack(rows), []
        for parameter in self.parameters[number]:
            start, shape = self._start[id(parameter)], self.shape(parameter)
            if self._by_parameter:
                values = together[:, start : start + self._here(parameter).numel()].reshape(-1)[: shape.numel()]
            else:
                values = together.view(-1)[start : start + shape.numel()]
            found.append((parameter, values.view(shape)))
        return found

    def own(self, number: int, values: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """Return this process's share of what all have for each of a group's parameters; 0 for those left out."""
        flat = self.flat[number]
        share = torch.zeros_like(flat, requires_grad=False)
        for parameter, value in values:
            start, value = self._start[id(parameter)], value.detach().reshape(-1)
            length = self._here(parameter).numel() if self._by_parameter else value.numel()
            # The part of the parameter that lies here, and where.
            first = self._rank * length if self._by_parameter else self._rank * len(flat) - start
            place = start if self._by_parameter else max(-first, 0)
            first = max(first, 0)
            room = length if self._by_parameter else len(flat) - place
            part = value[first : first + max(room, 0)]
            share[place : place + len(part)] = part.to(share)
        return share

    def clear(self) -> None:
        self.flat, self.parameters = [], []
        self._start.clear()


def _free(model: nn.Module, zero: Any) -> None:
    """Free the memory of stage 3's shares, because caches of DeepSpeed's own keep an engine that it has destroyed."""
    held: list[Any] = [getattr(parameter, "ds_tensor", None) for parameter in model.parameters()]
    held += [*zero.fp16_partitioned_groups_flat, *zero.fp32_partitioned_groups_flat, zero.grad_partitions_flat_buffer]
    for tensor in held:
        if tensor is not None:
            tensor.untyped_storage().resize_(0)


def is_engine(model: nn.Module) -> bool:
    """Return whether a model is the engine around a copy, `ZeroModel.model`."""
    return model.__dict__.get(_ENGINE, False)


def _check(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> None:
    check_device(accelerator)
    for module in model.modules():
        if stage == 3 and not getattr(module, "SHARDS", True):
            raise NotImplementedError(
                f"a {type(module).__name__} reads the parameters of layers before they run, and ZeRO-3 has none whole "
                "then; pass `--zero_stage 2`, train with FSDP2 (`--use_fsdp --fsdp_version 2`), or take a LoraMixture "
                "(`mopl clp --scope lora-mixture`)"
            )
    name = type(optimizer).__name__
    if name not in ELEMENTWISE or getattr(torch.optim, name) is not type(optimizer):
        raise NotImplementedError(
            f"the optimizer is {type(optimizer).__name__}, and DeepSpeed's shares of a parameter can be updated by "
            f"torch.optim's {', '.join(ELEMENTWISE)} alone; take one of these, or train with DDP (`--multi_gpu`)"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.ndim:
            raise ValueError(
                f"{name} has the shape (), and DeepSpeed shares out no scalars; give it the shape (1,), or train with "
                "DDP (`--multi_gpu`)"
            )
        if not parameter.requires_grad:
            continue
        if id(parameter) not in held:
            raise ValueError(f"{name} is trained but not in the optimizer; make that of model.parameters()")
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"{name} is trained in {str(parameter.dtype).removeprefix('torch.')}, of which DeepSpeed would train a "
                "copy in float32; load the model in float32, with mopl's --mixed-precision bf16 for less memory"
            )


def check_device(accelerator: Any) -> None:
    """Raise unless DeepSpeed is set up for the training's kind of device."""
    require("deepspeed")
    from deepspeed.accelerator import get_accelerator

    kind = get_accelerator().device_name()
    if kind != accelerator.device.type:
        raise NotImplementedError(
            f"DeepSpeed is set up for {kind}, and the training runs on {accelerator.device.type}; set DS_ACCELERATOR="
            f"{accelerator.device.type} in the environment"
        )


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out that DeepSpeed sees no tensors in a `FusedOutput`: modules that return one have no parameters."""
    return "unknown inputs or outputs type" not in record.getMessage()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what DeepSpeed says of its own beginnings and ends away from the standard output."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
