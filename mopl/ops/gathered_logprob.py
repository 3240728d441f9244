"""Log-probabilities of tokens from logits that are already there.

N rows of logits, V vocabulary entries, J targets a row.

    u_nv = softcap * tanh(logits_nv / softcap) / T_n                                  (logits_nv / T_n without softcap)
    logprob_nj = u_{n y_j} - logsumexp_n,  p_nv = exp(u_nv - logsumexp_n),  entropy_n = logsumexp_n - sum_v p_nv u_nv

Each row leaves one column q out of its sums, the *pivot*: its target, or the one with the largest logit of its
targets (the first of equal ones). With m the largest u_v off the pivot, s = sum_{v != q} exp(u_v - m):

    log odds = (m - u_q) + log s,   logprob_q = -softplus(log odds),   logsumexp = u_q - logprob_q
    logprob_j = (u_{y_j} - u_q) + logprob_q

so a confident row keeps every digit. The gradient, for upstream g_j, l (logsumexp) and h (entropy), G = sum_j g_j - l:

    dL/du_v = sum_{j: y_j = v} g_j - p_v G - h p_v (log p_v + H)
    dL/du_q = g_q (1 - p_q) - p_q (G - g_q) - h p_q (log p_q + H),   1 - p_q = -expm1(logprob_q)
    dL/dlogits_v = dL/du_v (1 - tanh^2) / T

with g_q the sum of g_j over the targets equal to q. Divide by the temperature, do not multiply by its reciprocal: the
logits are exact, and the second rounding would double the error. The forward pass saves (N,)-vectors beside the logits
it was given; the backward pass computes the exponentials again. Rows without a target that counts are not read; their
gradient is written as 0, and so is that of rows whose upstream gradients are all 0. The temperature's gradient needs
no pass over the vocabulary: see `temperature_gradient`.

Backends: `_forward_cpu`, `_backward_cpu` here; `launch_forward`, `launch_backward` in `gathered_logprob_triton` have
the same arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.ops._backend import use_triton
from mopl.ops._logprob import check_target_range, temperature_gradient


@torch.library.custom_op("mopl::gathered_logprob", mutates_args=())
def _gathered_logprob(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, J) int64, negative where it does not count
    temperature: Tensor,  # (N,) in the compute dtype
    softcap: float,  # 0.0: none
    want_entropy: bool,
    want_variance: bool,
    check_targets: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob (N, J), logsumexp (N,), entropy (N,), variance of u under p (N,); empty if not wanted.

    0 for targets and rows that do not count. Unchecked targets outside the vocabulary give NaN.
    """
    if check_targets:
        check_target_range(target, logits.shape[-1])
    if use_triton(logits):
        from mopl.ops.gathered_logprob_triton import launch_forward as forward
    else:
        forward = _forward_cpu
    return forward(logits, target, temperature, softcap, want_entropy, want_variance)


@_gathered_logprob.register_fake
def _(logits, target, temperature, softcap, want_entropy, want_variance, check_targets):
    rows, dtype = logits.shape[0], compute_dtype(logits)

    def new(*shape: int, wanted: bool = True) -> Tensor:
        return logits.new_empty(shape if wanted else (0,), dtype=dtype)

    return new(rows, target.shape[1]), new(rows), new(rows, wanted=want_entropy), new(rows, wanted=want_variance)


def _backward_of(logits: Tensor):
    if use_triton(logits):
        from mopl.ops.gathered_logprob_triton import launch_backward as backward
    else:
        backward = _backward_cpu
    return backward


@torch.library.custom_op("mopl::gathered_logprob_backward", mutates_args=())
def _gathered_logprob_backward(
    grad_logprob: Tensor | None,  # (N, J)
    grad_logsumexp: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    logprob: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    variance: Tensor,
    softcap: float,
    need_logits: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of logits (N, V) and temperature (N,); one that is not needed is empty."""
    upstream = (grad_logprob, grad_logsumexp, grad_entropy)
    statistics = (logprob, logsumexp, entropy)
    grad = logits.new_empty(logits.shape if need_logits else 0)
    if need_logits:
        _backward_of(logits)(*upstream, logits, target, temperature, *statistics, softcap, grad)
    return grad, _temperature_gradient(*upstream, target, temperature, *statistics, variance, need_temperature)


@_gathered_logprob_backward.register_fake
def _(
    grad_logprob, grad_logsumexp, grad_entropy, logits, target, temperature, logprob, logsumexp, entropy, variance,
    softcap, need_logits, need_temperature,
):  # fmt: skip
    rows = temperature.shape[0]
    return logits.new_empty(logits.shape if need_logits else 0), temperature.new_empty(rows if need_temperature else 0)


@torch.library.custom_op("mopl::gathered_logprob_backward_", mutates_args=("logits",))
def _gathered_logprob_backward_(
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,  # becomes its own gradient
    target: Tensor,
    temperature: Tensor,
    logprob: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    variance: Tensor,
    softcap: float,
    need_temperature: bool,
) -> Tensor:
    """Write the gradient of the logits over them; return that of the temperature (N,), empty if not needed."""
    upstream = (grad_logprob, grad_logsumexp, grad_entropy)
    statistics = (logprob, logsumexp, entropy)
    _backward_of(logits)(*upstream, logits, target, temperature, *statistics, softcap, logits)
    return _temperature_gradient(*upstream, target, temperature, *statistics, variance, need_temperature)


@_gathered_logprob_backward_.register_fake
def _(
    grad_logprob, grad_logsumexp, grad_entropy, logits, target, temperature, logprob, logsumexp, entropy, variance,
    softcap, need_temperature,
):  # fmt: skip
    return temperature.new_empty(temperature.shape[0] if need_temperature else 0)


def _temperature_gradient(
    grad_logprob: Tensor | None, grad_logsumexp: Tensor | None, grad_entropy: Tensor | None, target: Tensor,
    temperature: Tensor, logprob: Tensor, logsumexp: Tensor, entropy: Tensor, variance: Tensor, needed: bool,
) -> Tensor:  # fmt: skip
    if not needed:
        return temperature.new_empty(0)
    times = None
    if grad_logprob is not None:
        grad_logprob = grad_logprob.masked_fill(target < 0, 0)
        times = (grad_logprob * logprob).sum(-1)
        grad_logprob = grad_logprob.sum(-1)
    return temperature_gradient(
        grad_logprob, times, grad_logsumexp, grad_entropy, temperature, logsumexp, entropy, variance
    )


def _forward_cpu(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float,
    want_entropy: bool,
    want_variance: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, logsumexp, entropy and variance; the last two are empty if not wanted."""
    raise NotImplementedError


def _backward_cpu(
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    logprob: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    softcap: float,
    grad: Tensor,  # (N, V), may be `logits` itself
) -> None:
    """Write the gradient of the logits into `grad`."""
    raise NotImplementedError
