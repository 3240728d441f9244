"""Run by tests/training/test_gradient_cache.py on two processes: gradients of scores in mini-batches under DDP.

One rank has four mini-batches and the other two; in the second step gradients accumulate over two backward passes, of
which only the last adds those of the processes. The model has a buffer, which DDP sends in each step.
"""

import contextlib
import copy

import torch
import torch.distributed as dist
from ending import leave
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from mopl.training.gradient_cache import score_in_parts

ROWS = 8


def counted(reduced: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    reduced.append(1)
    return default_hooks.allreduce_hook(None, bucket)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8).eval(), nn.Tanh(), nn.Linear(8, 1))
    rows = torch.randn(2, ROWS, 5)

    def loss(scores: torch.Tensor) -> torch.Tensor:
        return scores[:, 0].logsumexp(0)

    for unused in (False, True):
        wrapped = DistributedDataParallel(copy.deepcopy(plain), find_unused_parameters=unused)
        reduced: list[int] = []
        wrapped.register_comm_hook(reduced, counted)
        for turns in (1, 2):
            plain.zero_grad(), wrapped.zero_grad(), reduced.clear()
            for turn in range(turns):
                (loss(plain(rows[0])) / 2 + loss(plain(rows[1])) / 2).backward()
                with wrapped.no_sync() if turn < turns - 1 else contextlib.nullcontext():
                    loss(score_in_parts(wrapped, rows[rank].split(2 + 2 * rank), wrapped)).backward()
            assert len(reduced) == 1, f"{len(reduced)} reductions"
            for one, other in zip(plain.parameters(), wrapped.module.parameters(), strict=True):
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main()
    leave()
