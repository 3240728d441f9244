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

On a GPU rows are read 16 bytes at a time where they begin at multiples of 16 elements, and element by element where
they do not: logits of a ragged vocabulary, such as 50,257, are best views of a padded matrix. The order of the sums is
that of the lanes, so that the last bits of one and the other differ; the same memory gives the same bits at every call.

Backends: `_gathered_logprob_cpu` and `gathered_logprob_triton` have `launch_forward` and `launch_backward`, with the
same arguments.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from mopl._arguments import check_floating, compute_dtype, shape_of
from mopl.ops import _derivatives as derivatives
from mopl.ops import _gathered_logprob_cpu
from mopl.ops._backend import path_for, use_triton
from mopl.ops._logprob import Upstream, check_scalar, check_target_range, merge_targets, per_row, temperature_gradient


@overload
def gathered_logprob(
    logits: Tensor, target: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None,
    ignore_index: int = -100, softcap: float | None = None, return_logsumexp: Literal[False] = False,
    return_entropy: Literal[False] = False, inplace_backward: bool = False, check_targets: bool | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def gathered_logprob(
    logits: Tensor, target: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None,
    ignore_index: int = -100, softcap: float | None = None, return_logsumexp: bool = ...,
    return_entropy: bool = ..., inplace_backward: bool = False, check_targets: bool | None = None,
) -> tuple[Tensor, ...]: ...  # fmt: skip
def gathered_logprob(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...) token ids, or (..., J) for J of them a row
    *,
    temperature: float | Tensor = 1.0,  # broadcastable to (...)
    mask: Tensor | None = None,  # target's shape, bool
    ignore_index: int = -100,
    softcap: float | None = None,
    return_logsumexp: bool = False,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    check_targets: bool | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Return log p(target) in nats under softmax(logits / temperature).

    Args:
        logits: (..., V), any floating dtype.
        target: (...) integer token ids, or (..., J) for several of them a row.
        temperature: divides the logits; a number or a tensor that broadcasts to (...). Positive.
        mask: true where a target counts; shape of `target`. Rows without a target that counts are not read.
        ignore_index: targets with this value do not count.
        softcap: logits become softcap * tanh(logits / softcap) before they are divided by the temperature.
        return_logsumexp: also return the log of the normaliser of the scaled logits (...).
        return_entropy: also return the entropy in nats of each row's distribution (...).
        inplace_backward: the backward pass writes the gradient over `logits`, whose values are then lost: no second
            (..., V) tensor. Nothing else may need the logits afterwards; autograd raises if something does, a second
            backward pass included. Under torch.compile the compiler plans the memory and this option does nothing, as
            for rows that share their memory (`expand`) or, on a GPU, are not contiguous.
        check_targets: raise if a target lies outside the vocabulary; costs a synchronisation on a GPU. None: on a CPU
            only. Unchecked targets outside the vocabulary give NaN.

    Returns:
        logprob, of target's shape; or a tuple (logprob, logsumexp?, entropy?) of what was asked for. float32, float64
        for float64 logits. What does not count is 0 with gradient exactly 0. All three are differentiable in logits
        and temperature; derivatives beyond the first hold several tensors of the size of the logits.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes or devices that do not fit, targets outside the vocabulary.
    """
    check_floating(logits, "logits", "(..., V)")
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {shape_of(logits)} but must be (..., V) with at least one token")
    lead, vocabulary = logits.shape[:-1], logits.shape[-1]
    merged = merge_targets(target, mask, ignore_index, vocabulary)
    if target.shape[: len(lead)] != lead or target.ndim > len(lead) + 1:
        raise ValueError(
            f"target has shape {shape_of(target)} but logits have {shape_of(logits)}; pass target of shape "
            f"{tuple(lead)}, or ({', '.join(map(str, (*lead, 'J')))}) for J targets a row"
        )
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device} but logits are on {logits.device}; move target there")
    flat_target = merged.reshape(math.prod(lead), math.prod(target.shape[len(lead) :]))
    divisor = per_row(temperature, "temperature", lead, logits, lambda: (flat_target >= 0).any(1))
    need_temperature = divisor.requires_grad and torch.is_grad_enabled()
    flat = logits.reshape(-1, vocabulary)
    # Rows that share memory have none that could hold a gradient of their own; kernels want contiguous rows.
    apart = 0 not in flat.stride() and (flat.stride(-1) == 1 or not use_triton(flat))
    rows = (flat, flat_target, divisor)
    cap = check_scalar(softcap, "softcap")
    if derivatives.transformed():
        # No transform lets values be read: a target outside the vocabulary gives NaN.
        logprob, logsumexp, entropy = _formula(*rows, softcap=cap)
    else:
        logprob, logsumexp, entropy, _ = _gathered_logprob(
            *rows,
            cap,
            return_entropy or need_temperature,
            return_entropy and need_temperature,
            inplace_backward and apart and not torch.compiler.is_compiling(),
            not logits.is_cuda if check_targets is None else check_targets,
        )
    results = [logprob.view(target.shape)]
    if return_logsumexp:
        results.append(logsumexp.view(lead))
    if return_entropy:
        results.append(entropy.view(lead))
    return results[0] if len(results) == 1 else tuple(results)


_path = partial(path_for, _gathered_logprob_cpu, "mopl.ops.gathered_logprob_triton")


def _formula(logits: Tensor, target: Tensor, temperature: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprob, logsumexp and entropy in differentiable functions of PyTorch, for what the op does not give."""
    keep, vocabulary = target >= 0, logits.shape[1]
    used = keep.any(-1)
    u, beyond = derivatives.finite(torch.where(used[:, None], logits, 0).to(temperature.dtype))
    if softcap:  # which makes a logit of infinity one of the cap
        u = softcap * torch.tanh((u + beyond) / softcap)
    u = u / torch.where(used, temperature, 1)[:, None]
    u = u if softcap else u + beyond
    logp = derivatives.log_softmax(u)
    column = target.clamp(min=0, max=vocabulary - 1)
    logprob = logp.gather(1, column)
    if not softcap:  # which makes -inf possible
        logprob = torch.where(logits.gather(1, column) == -torch.inf, logprob.detach() - torch.inf, logprob)
    logprob = torch.where(target >= vocabulary, torch.nan, logprob)
    # From the likeliest token: the logarithm of what the others add to it is exact.
    likeliest = u.detach().argmax(-1, keepdim=True)
    logsumexp = (u.gather(1, likeliest) - logp.gather(1, likeliest))[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.where(keep, logprob, 0), torch.where(used, logsumexp, 0), torch.where(used, entropy, 0)


@torch.library.custom_op("mopl::gathered_logprob", mutates_args=())
def _gathered_logprob(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N, J) int64, negative where it does not count
    temperature: Tensor,  # (N,) in the compute dtype
    softcap: float,  # 0.0: none
    want_entropy: bool,
    want_variance: bool,
    inplace_backward: bool,
    check_targets: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob (N, J), logsumexp (N,), entropy (N,), variance of u under p (N,); empty if not wanted.

    0 for targets and rows that do not count. Unchecked targets outside the vocabulary give NaN.
    """
    if check_targets:
        check_target_range(target, logits.shape[-1])
    return _path(logits).launch_forward(logits, target, temperature, softcap, want_entropy, want_variance)


@_gathered_logprob.register_fake
def _(logits, target, temperature, softcap, want_entropy, want_variance, inplace_backward, check_targets):
    rows, dtype = logits.shape[0], compute_dtype(logits)

    def new(*shape: int, wanted: bool = True) -> Tensor:
        return logits.new_empty(shape if wanted else (0,), dtype=dtype)

    return new(rows, target.shape[1]), new(rows), new(rows, wanted=want_entropy), new(rows, wanted=want_variance)


def _empty_gradient(logits: Tensor) -> Tensor:
    """Return memory for the gradient of the logits (N, V).

    On a GPU its rows begin at multiples of 16 elements where those of the logits do, whatever the vocabulary: stores
    are then as wide as loads, and so are the accesses of the product that comes next.
    """
    rows, vocabulary = logits.shape
    if use_triton(logits) and vocabulary % 16 != 0 and logits.stride(0) % 16 == 0:
        return logits.new_empty(rows, -(-vocabulary // 16) * 16)[:, :vocabulary]
    return logits.new_empty(logits.shape)


# Their tensors are no lists, for which vmap has no rule: upstream gradients may be batched (`is_grads_batched`).
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
    softcap: float,
) -> Tensor:
    """Return the gradient of the logits (N, V)."""
    upstream, results = (grad_logprob, grad_logsumexp, grad_entropy), (logprob, logsumexp, entropy)
    grad = _empty_gradient(logits)
    _path(logits).launch_backward(*upstream, logits, target, temperature, *results, softcap, grad)
    return grad


@_gathered_logprob_backward.register_fake
def _(grad_logprob, grad_logsumexp, grad_entropy, logits, *_):
    return _empty_gradient(logits)


@torch.library.custom_op("mopl::gathered_logprob_backward_", mutates_args=("logits",))
def _gathered_logprob_backward_(
    grad_logprob: Tensor | None, grad_logsumexp: Tensor | None, grad_entropy: Tensor | None, logits: Tensor,
    target: Tensor, temperature: Tensor, logprob: Tensor, logsumexp: Tensor, entropy: Tensor, softcap: float,
) -> None:  # fmt: skip
    """Write the gradient of the logits over them."""
    upstream, results = (grad_logprob, grad_logsumexp, grad_entropy), (logprob, logsumexp, entropy)
    _path(logits).launch_backward(*upstream, logits, target, temperature, *results, softcap, logits)


@_gathered_logprob_backward_.register_fake
def _(*_):
    return None


def _setup_context(ctx, inputs, output):
    logits, target, temperature, ctx.softcap, _, _, ctx.inplace, _ = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, temperature, *output)


def _backward(ctx, grad_logprob, grad_logsumexp, grad_entropy, _):
    need = ctx.needs_input_grad
    logits, target, temperature, logprob, logsumexp, entropy, variance = ctx.saved_tensors
    upstream = Upstream(grad_logprob, grad_logsumexp, grad_entropy)
    # Derivatives of the gradient read the logits again, so that nothing may be written over them.
    inplace = ctx.inplace and not torch.is_grad_enabled()

    def closed_form() -> tuple[Tensor | None, Tensor | None]:
        grad = by_temperature = None
        given = (*upstream, logits, target, temperature, logprob, logsumexp, entropy, ctx.softcap)
        if need[0] and inplace:
            _gathered_logprob_backward_(*given)
            grad = logits.detach()
        elif need[0]:
            grad = _gathered_logprob_backward(*given)
        if need[2]:
            by_temperature = temperature_gradient(
                upstream, target, logprob, lambda t: t.sum(-1), temperature, logsumexp, entropy, variance,
                (target < 0).all(-1),
            )  # fmt: skip
        return grad, by_temperature

    arguments = (logits, target, temperature)
    return derivatives.gradients(ctx, (0, 2), upstream, closed_form, partial(_formula, softcap=ctx.softcap), arguments)


_gathered_logprob.register_autograd(_backward, setup_context=_setup_context)
