"""Which parameters the loss of a step depends on: under DeepSpeed all of them, in every process, as under DDP.

The engine of mopl's own loop asks for that before each update. Where accelerate steps an engine, in the trainers,
`CheckedSteps` does. DDP as `transformers.Trainer` sets it up lets a loss leave parameters out, and so may it there, if
an update with no gradient leaves them as they are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mopl._counted import counted


def clear_gradients(zero: Any) -> None:
    """Forget what an update was made with.

    Stage 3 leaves gradients to be written over, and so does the optimizer on the CPU of `offload_optimizer`: what the
    next step does not use would be updated with them once more.

    Args:
        zero: The engine's optimizer.
    """
    left = [getattr(zero, "grad_partitions_flat_buffer", None)]
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        left += [flat.grad for flat in getattr(zero, name, ())]
    for gradient in left:
        if gradient is not None:
            gradient.zero_()


class UsedParameters:
    """Which trained parameters have had a gradient since the last update.

    ZeRO sums up what has one, in that order: where processes differ it would add the gradients of one parameter to
    those of another, or wait without end. It would update what has none with 0: by weight decay and old momentum.

    Args:
        model: What the engine trains.
        zero: The engine's optimizer.
        accelerator: accelerate's.
        ignored: Parameters that may have none: DeepSpeed fills it up with zeros in its leaf modules (experts).
    """

    def __init__(self, model: nn.Module, zero: Any, accelerator: Any, ignored: Iterable[nn.Parameter] = ()) -> None:
        apart = set(map(id, ignored))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in apart]
        self._names, self._processes = [name for name, _ in trained], accelerator.num_processes
        self._device = accelerator.device
        self._now: set[int] = set()
        self._all: set[int] = set()
        self._before: set[int] = set()
        self._hooks = [p.register_hook(functools.partial(self._note, number)) for number, (_, p) in enumerate(trained)]
        self._parameters = [p for _, p in trained]
        # Stage 1 with bf16 and gradients in float32 has another optimizer, which sums them up as one and needs no
        # comparison before.
        self._zero, self._sum = zero, getattr(zero, "independent_gradient_partition_epilogue", None)
        if self._sum is not None:
            zero.independent_gradient_partition_epilogue = self._compare

    def _note(self, number: int, _: Tensor) -> None:
        self._now.add(number)

    def _compare(self) -> None:
        """Check that all processes have gradients of the same parameters, then sum them up."""
        counts = torch.zeros(len(self._names), dtype=torch.int32)
        counts[list(self._now)] = 1
        counts = counts.to(self._device)
        torch.distributed.all_reduce(counts)
        for name, count in zip(self._names, counts.tolist(), strict=True):
            if 0 < count < self._processes:
                raise RuntimeError(
                    f"{name} has a gradient in {count} of {self._processes} processes, and DeepSpeed adds up those of "
                    "all; let the loss use the same parameters for every part of a batch (a term of 0 * x does), or "
                    "freeze it"
                )
        self._all |= self._now
        self._now.clear()  # stage 1 sums up the parts of a step once, the others each part
        if self._sum is not None:
            self._sum()

    def recall(self) -> None:
        """Take what a checkpoint had momentum for as what has had a gradient; every process must call it."""
        counts = torch.tensor([_has_momentum(p, self._zero) for p in self._parameters], dtype=torch.int32)
        if self._processes > 1:
            counts = counts.to(self._device)
            torch.distributed.all_reduce(counts)  # each has the state of its share alone
        self._before.update(counts.nonzero().flatten().tolist())

    def check(self, *, unless_unchanged: bool = False) -> None:
        """Check that nothing is without a gradient, then begin anew.

        Args:
            unless_unchanged: Allow what an update leaves as it is: it has had no gradient since the first update of
                this training (no momentum, see `recall`), and nothing has weight decay.

        Raises:
            RuntimeError: If something is, or if processes have gradients of different parameters.
        """
        if self._sum is None:
            self._compare()
        missing = set(range(len(self._names))) - self._all
        if unless_unchanged and not any(group.get("weight_decay") for group in self._zero.optimizer.param_groups):
            missing &= self._before
        left_out = [self._names[number] for number in sorted(missing)]
        self._before |= self._all
        self._all.clear()
        if left_out:
            raise RuntimeError(
                f"the loss of this step does not depend on {counted(len(left_out), 'trained parameter')}, "
                f"{', '.join(left_out[:3])}{', ...' * (len(left_out) > 3)}, which DeepSpeed would update all the same, "
                "by weight decay and momentum; freeze what is not trained, let the loss use the same parameters in "
                "each step (a term of 0 * x does), or train in one process"
            )

    def clear(self) -> None:
        """Take the hooks off the parameters, and the comparison off the engine's optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._parameters = [], []
        self._zero.__dict__.pop("independent_gradient_partition_epilogue", None)


def _has_momentum(parameter: Any, zero: Any) -> bool:
    """Return whether the optimizer has momentum that is not zero for this process's share of a parameter."""
    if hasattr(parameter, "ds_id"):  # stage 3
        place = zero.grad_position.get(zero.get_param_id(parameter))
        if place is None:  # the optimizer is not told of it
            return False
        number, start, length = place
        flat = zero.fp32_partitioned_groups_flat[number]
    else:
        share = getattr(parameter, "_hp_mapping", None)
        if share is None:  # in the share of another process
            return False
        groups = getattr(zero, "single_partition_of_fp32_groups", None)
        flat = (zero.fp32_groups_flat_partition if groups is None else groups)[share.param_group_index]
        start, length = share.hp_fragment_address.start, share.hp_fragment_address.numel
    state = zero.optimizer.state.get(flat, {})
    found = [state[name] for name in ("exp_avg", "momentum_buffer") if torch.is_tensor(state.get(name))]
    return any(bool(one.flatten()[start : start + length].any()) for one in found)


class CheckedSteps:
    """Has an engine that accelerate steps check what it updates, and forget the gradients afterwards, until `clear`.

    Args:
        engine: DeepSpeed's, for a training, with any stage of ZeRO.
        accelerator: accelerate's.

    The optimizer's state must be there, as a checkpoint has it.
    """

    def __init__(self, engine: Any, accelerator: Any) -> None:
        self.engine, self._step = engine, engine.step
        leaves = getattr(engine.optimizer, "leaf_parameters", {}).values()
        ignored = itertools.chain.from_iterable(leaves)
        self._used = UsedParameters(engine.module, engine.optimizer, accelerator, ignored)
        self._used.recall()
        engine.step = self._checked

    def _checked(self, *args: Any, **kwargs: Any) -> None:
        self._used.check(unless_unchanged=True)
        self._step(*args, **kwargs)
        clear_gradients(self.engine.optimizer)

    def clear(self) -> None:
        """Leave the engine as it was."""
        self.engine.__dict__.pop("step", None)
        self._used.clear()
