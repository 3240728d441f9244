"""Launches of the kernels of `gathered_logprob`; the arguments are those of the CPU functions there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.kernels import gathered_logprob as kernels
from mopl.ops._backend import MAX_PROGRAMS
from mopl.ops._rows import rows_contiguous


def _launches(rows: int, *tensors: Tensor | None) -> list[tuple[int, Sequence[Tensor | None]]]:
    """Cut tensors of one entry a row into what one launch holds, a program a row; as a rule that is all."""
    if rows <= MAX_PROGRAMS:
        return [(rows, tensors)]
    parts = [slice(first, first + MAX_PROGRAMS) for first in range(0, rows, MAX_PROGRAMS)]
    return [(len(range(rows)[part]), [None if x is None else x[part] for x in tensors]) for part in parts]


def _padded(logits: Tensor) -> bool:
    """Say whether rows begin at multiples of 16 elements, as Triton knows of strides, but do not end at one."""
    return logits.stride(0) % 16 == 0 and logits.shape[1] % 16 != 0


def launch_forward(
    logits: Tensor, target: Tensor, temperature: Tensor, softcap: float, want_entropy: bool, want_variance: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob (N, J), logsumexp (N,), entropy (N,), variance (N,); the last two are empty if not wanted."""
    (rows, vocabulary), targets, dtype = logits.shape, target.shape[1], compute_dtype(logits)
    logits, target, temperature = rows_contiguous(logits), target.contiguous(), temperature.contiguous()

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    logprob, logsumexp = new(rows, targets), new(rows)
    # The variance is formed from the moments of the entropy.
    entropy = new(rows if want_entropy or want_variance else 0)
    variance = new(rows if want_variance else 0)
    if rows and targets:
        with torch.cuda.device_of(logits):
            optional = (entropy if entropy.numel() else None, variance if want_variance else None)
            tile = kernels.forward_tile(vocabulary, logits.element_size(), softcap)
            for many, part in _launches(rows, logits, target, temperature, logprob, logsumexp, *optional):
                kernels.forward_kernel[(many,)](
                    *part, vocabulary, targets, logits.stride(0), SOFTCAP=softcap, PADDED=_padded(logits),
                    TARGETS=max(triton.next_power_of_2(targets), 2), **tile,
                )  # fmt: skip
    else:
        for result in (logprob, logsumexp, entropy, variance):
            result.zero_()
    return logprob, logsumexp, entropy if want_entropy else new(0), variance


def launch_backward(
    grad_logprob: Tensor | None, grad_logsumexp: Tensor | None, grad_entropy: Tensor | None, logits: Tensor,
    target: Tensor, temperature: Tensor, logprob: Tensor, logsumexp: Tensor, entropy: Tensor, softcap: float,
    grad: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of the logits into `grad`, which may be `logits`."""
    (rows, vocabulary), targets = logits.shape, target.shape[1]
    if not grad.numel():
        return
    if not targets:
        grad.zero_()
        return
    if grad.stride(-1) != 1:
        raise ValueError(f"grad has strides {grad.stride()} but its rows must be contiguous")
    logits = rows_contiguous(logits)
    tile = kernels.backward_tile(vocabulary, logits.element_size())
    # In place a program must have its row for itself: every one reads the pivot's logit.
    parts = 1 if grad.data_ptr() == logits.data_ptr() else kernels.backward_parts(rows, vocabulary, tile)
    columns = tile["DEPTH"] * tile["WIDTH"]
    width = -(-vocabulary // (parts * columns)) * columns  # columns of a program
    given = (
        grad_logprob, grad_logsumexp, grad_entropy, logits, target, temperature, logprob, logsumexp,
        entropy if entropy.numel() else logsumexp, grad,
    )  # fmt: skip
    given = [x if x is None or x is grad or x is logits else x.contiguous() for x in given]
    with torch.cuda.device_of(logits):
        for many, part in _launches(rows, *given):
            kernels.backward_kernel[(many, -(-vocabulary // width))](
                *part, vocabulary, targets, logits.stride(0), grad.stride(0), width, SOFTCAP=softcap,
                PADDED=_padded(logits), TARGETS=max(triton.next_power_of_2(targets), 2), **tile,
            )  # fmt: skip
