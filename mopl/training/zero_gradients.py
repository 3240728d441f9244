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
        self._zero, self._sum = zero, zero.independent_gradient_partition_epilogue
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
        self._sum()

    def check(self, *, unless_unchanged: bool = False) -> None:
        """Check that nothing is without a gradient, then begin anew.

        Args:
            unless_unchanged: Allow what an update leaves as it is: it has had no gradient since the first update of
                this training (no momentum), and nothing has weight decay.
        """
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
        self._hooks = []
        self._zero.__dict__.pop("independent_gradient_partition_epilogue", None)


class CheckedSteps:
    """Has an engine that accelerate steps check what it updates, and forget the gradients afterwards, until `clear`.

    Args:
        engine: DeepSpeed's, for a training, with any stage of ZeRO.
        accelerator: accelerate's.
    """

    def __init__(self, engine: Any, accelerator: Any) -> None:
        self.engine, self._step, self._used = engine, engine.step, None
        if hasattr(engine.optimizer, "independent_gradient_partition_epilogue"):
            leaves = getattr(engine.optimizer, "leaf_parameters", {}).values()
            ignored = itertools.chain.from_iterable(leaves)
            self._used = UsedParameters(engine.module, engine.optimizer, accelerator, ignored)
        engine.step = self._checked

    def _checked(self, *args: Any, **kwargs: Any) -> None:
        if self._used is not None:
            self._used.check(unless_unchanged=True)
        self._step(*args, **kwargs)
        clear_gradients(self.engine.optimizer)

    def clear(self) -> None:
        """Leave the engine as it was."""
        self.engine.__dict__.pop("step", None)
        if self._used is not None:
            self._used.clear()
