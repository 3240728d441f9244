"""Output heads whose vocabulary tensor parallelism has split: the group is found in the head, and nothing is passed.

The weight is a DTensor with `Shard(0)` on a mesh of one dimension, and every process of it has the same rows:

| split by                                    | what the head is given          | what stands behind the head        |
|---------------------------------------------|---------------------------------|------------------------------------|
| `tp_plan=` of transformers                  | a tensor, whole on each process | nothing: its forward is replaced   |
| `parallelize_module` with `ColwiseParallel` | a DTensor, replicated           | hooks that lay its output out anew |

FSDP2 has gathered its shards when a head runs, also where both are there: what is a DTensor then is split by tensor
parallelism. Should somebody go past FSDP2's hooks, processes have other rows; so their targets are compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopl._rows import UnsupportedModelError
from mopl._sharded import is_dtensor
from mopl.conditioning.adapted import mixed_copies
from mopl.ops.linear_logprob.shard import rows_of_rank


class SplitHead:
    """The processes over which the vocabulary of a head is split.

    Raises:
        UnsupportedModelError: If the head is cut in another way.
    """

    def __init__(self, weight: Any) -> None:
        from torch.distributed.tensor import Shard

        if tuple(weight.placements) != (Shard(0),):
            raise UnsupportedModelError(
                f"the output head's weight is a DTensor with placements {tuple(weight.placements)}, which is no "
                "vocabulary split over one group of processes: (Shard(dim=0),) on a mesh of one dimension. Split the "
                "head with ColwiseParallel on such a mesh (mesh['tp'] of a larger one) or by tp_plan='auto'"
            )
        self.mesh, self.vocabulary = weight.device_mesh, weight.shape[0]
        self.group = self.mesh.get_group()
        self._width: int | None = None  # of what was handed on, if hooks behind the head lay it out anew

    @classmethod
    def of(cls, head: Any) -> SplitHead | None:
        """Return that of a head that runs now, or None where the vocabulary is whole.

        Raises:
            UnsupportedModelError: If the head is cut in another way, or a mixture.
        """
        if not is_dtensor(head.weight):
            return None
        if mixed_copies(head) is not None:
            raise UnsupportedModelError(
                "the output head is a mixture of copies (modules_to_save) and split over processes, which is not known "
                "here; leave the head out of modules_to_save, or out of the plan of tensor parallelism"
            )
        return cls(head.weight)

    def is_laid_out(self, hidden: Any) -> bool:
        """Say whether hooks around the head speak of DTensors; raise if they give it other rows on each process."""
        if not is_dtensor(hidden):
            return False
        from torch.distributed.tensor import Replicate

        if tuple(hidden.placements) != (Replicate(),) or hidden.device_mesh != self.mesh:
            raise UnsupportedModelError(
                f"the output head is given a DTensor with placements {tuple(hidden.placements)}, but every process "
                "needs the same rows, (Replicate(),) on the mesh of the head's weight; use ColwiseParallel for the "
                "head, whose hooks see to that"
            )
        return True

    def plain(self, hidden: Any) -> Tensor:
        """Return what the head is given as a tensor; the gradient that comes back must be the sum over the group."""
        self._width = 0 if self.is_laid_out(hidden) else None
        if self._width is None:
            return hidden
        from torch.distributed.tensor import Replicate

        return hidden.to_local(grad_placements=[Replicate()])

    def handed_on(self, output: Tensor, width: int | None = None) -> Any:
        """Return an output (..., P) as what stands behind the head expects it.

        Args:
            output: P numbers, which every process has; or, with `width`, this process's part of so many.
            width: The number of all of them.
        """
        if self._width is None and width is None:
            return output
        from torch.distributed.tensor import DTensor, Shard

        self._width = output.shape[-1]
        shape = torch.Size([*output.shape[:-1], self.mesh.size() * output.shape[-1] if width is None else width])
        stride = torch.empty(shape, device="meta").stride()
        # As the head's own output is: then whatever layout it is to get can be made.
        return DTensor.from_local(output, self.mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride)

    def taken_back(self, value: Any) -> Tensor:
        """Return this process's (..., P) of what came through the hooks behind the head."""
        if self._width is None:
            return value
        value = value.to_local() if is_dtensor(value) else value
        if value.shape[-1] == self._width * self.mesh.size():  # gathered
            first = self._width * self.mesh.get_local_rank()
            return value[..., first : first + self._width].clone()
        if value.shape[-1] != self._width:
            raise UnsupportedModelError(
                f"what stands behind the output head gives {value.shape[-1]} outputs where its layout has "
                f"{self._width}; pass output_layouts=Replicate() or Shard(-1) to ColwiseParallel"
            )
        return value

    def seen_behind(self, logits: Any) -> Tensor:
        """Return whole logits (..., V) of a model; raise if a process gets its part of them."""
        if is_dtensor(logits):
            return logits.full_tensor()
        parts = self.part(torch.empty(self.vocabulary, device="meta"))
        if logits.shape[-1] == len(parts) < self.vocabulary:
            raise UnsupportedModelError(
                f"the model gives each process its part of the logits, {len(parts)} of {self.vocabulary}, as plain "
                "tensors that do not say so; pass output_layouts=Replicate() to ColwiseParallel for the head, or "
                "use_local_output=False"
            )
        return logits

    def part(self, value: Tensor) -> Tensor:
        """Return this process's part of something with an entry for each token of the vocabulary, last."""
        length, first = rows_of_rank(value.shape[-1], self.mesh.size(), self.mesh.get_local_rank())
        return value[..., first : first + length]

    def check_targets(self, targets: Tensor) -> None:
        """Raise unless all processes of the group ask for the same targets; it waits for the device."""
        if torch.compiler.is_compiling():
            return
        from torch.distributed import ReduceOp, all_reduce

        flat = targets.detach().reshape(-1).to(self.mesh.device_type, torch.int64)
        places = torch.arange(1, len(flat) + 1, device=flat.device)
        own = torch.stack([places.new_tensor(len(flat)), flat.sum(), (flat * places).sum(), (flat**2 * places).sum()])
        ends = torch.cat([own, -own])
        all_reduce(ends, ReduceOp.MAX, group=self.group)
        if bool((ends[:4] != -ends[4:]).any()):
            raise ValueError(
                "targets differ between the processes over which the output head's vocabulary is split; give all "
                "processes of a tensor-parallel group the same batch"
            )
