"""`linear_logprob` with a head whose vocabulary is sharded over a process group (tensor parallelism).

Every rank holds the same rows and targets and its own consecutive part of the vocabulary. Collectives of the forward
pass: the targets' logits (sum, E numbers), the shift (max, N numbers) and the sums over the vocabulary (sum, N numbers
for each). The backward pass adds one: the gradient of the hidden states (sum, N x H numbers, in the compute dtype).
Gradients of weight and bias stay on their ranks; kept exponentials and directions are each rank's own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mopl._arguments import shape_of
from mopl._counted import counted
from mopl.ops._logprob import is_dtensor


class VocabularyShard:
    """This rank's part of the vocabulary, and the collectives over all parts."""

    def __init__(self, size: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.size = group, size
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("this process is no member of group; only its ranks can pass it")
        # Sizes may differ between ranks. They stay on the device: reading them would cost a synchronisation.
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        sizes[rank] = size
        self.sum(sizes)
        self.start, self.vocabulary = sizes[:rank].sum(), sizes.sum()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        dist.all_reduce(values, dist.ReduceOp.SUM, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Return the largest of all ranks."""
        largest = values.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def largest(self) -> int:
        """Return the size of the largest part; waits for the device, on which the sizes are."""
        return int(self.max(self.vocabulary.new_tensor(self.size)))

    def local(self, column: Tensor) -> Tensor:
        """Return indices into this rank's part of the vocabulary, -1 for those of other ranks."""
        own = column - self.start
        return torch.where((own >= 0) & (own < self.size), own, -1)


def shard_or_whole(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[VocabularyShard | None, Tensor, Tensor | None]:
    """Return the shard and this rank's plain tensors of weight and bias; None and both as they are without `group`.

    Raises:
        TypeError: If they are DTensors and `group` is None.
        ValueError: If they are no vocabulary shards over `group`.
    """
    weight, bias = head_parts(weight, bias, group)
    return None if group is None else VocabularyShard(weight.shape[0], group, hidden.device), weight, bias


def head_parts(
    weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None, of: str = ""
) -> tuple[Tensor, Tensor | None]:
    """Return this rank's plain tensors of weight and bias, or both as they are; errors as `shard_or_whole`.

    Args:
        weight: (V, H), a DTensor of it, or this rank's rows.
        bias: (V,), likewise; None for none.
        group: None where nothing is sharded.
        of: What their names begin with in messages.
    """
    if group is None:
        refuse_split(weight, f"{of}weight")
        refuse_split(bias, f"{of}bias")
        return weight, bias
    rows, shift = local_part(weight, f"{of}weight", group), local_part(bias, f"{of}bias", group)
    assert rows is not None
    if shift is not None and shift.shape != rows.shape[:1]:
        raise ValueError(
            f"this rank's {of}bias has shape {shape_of(shift)} and its {of}weight {shape_of(rows)}; shard both alike"
        )
    return rows, shift


def refuse_split(value: Tensor | None, name: str) -> None:
    """Raise TypeError if a weight or bias is a DTensor; None is none."""
    if value is None or not is_dtensor(value):
        return
    raise TypeError(
        f"{name} is a DTensor and group is None. If every rank has the same hidden rows (tensor parallelism), pass "
        f"group={name}.device_mesh.get_group(). If ranks have different rows (FSDP2), pass the gathered head: "
        f'{name}.full_tensor(grad_placements=[Partial("avg")])'
    )


def rows_of_rank(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return how many of `length` rows a DTensor of `Shard(0)` leaves a rank, and the first; torch 2.8 does not say."""
    size = -(-length // ranks)
    first = min(rank * size, length)
    return min(size, length - first), first


def local_part(value: Tensor | None, name: str, group: dist.ProcessGroup) -> Tensor | None:
    """Return this rank's plain tensor of a weight or bias; raise if it is a DTensor that `group` does not shard."""
    if value is None or not is_dtensor(value):
        return value
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(value, DTensor)
    if tuple(value.placements) != (Shard(0),):
        raise ValueError(
            f"{name} is a DTensor with placements {tuple(value.placements)} but must be (Shard(0),) on a mesh of one "
            f"dimension; redistribute it, or pass {name}.full_tensor() and no group"
        )
    if dist.get_process_group_ranks(value.device_mesh.get_group()) != dist.get_process_group_ranks(group):
        raise ValueError(f"group is not the group over which {name} is sharded; pass {name}.device_mesh.get_group()")
    ranks = value.device_mesh.size()
    if rows_of_rank(len(value), ranks, ranks - 1)[0] == 0:  # on every rank alike: none must wait
        raise ValueError(
            f"{name} has {counted(len(value), 'row')} over {ranks} ranks, of which the last has none; take fewer ranks"
        )
    return value.to_local()
