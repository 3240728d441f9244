"""Log-probabilities of tokens from hidden states and a language-model head; the logits [N, V] are never held.

N rows of `hidden`, V vocabulary entries, E targets (one a row, or several that share a row through `row`).

    a_nv = <hidden_n, W_v> + bias_v
    u_nv = softcap * tanh(logit_scale * a_nv / softcap) / T_n              (logit_scale * a_nv / T_n without softcap)
    logprob_k = u_{n y} - logsumexp_n,  p_nv = exp(u_nv - logsumexp_n),  entropy_n = logsumexp_n - sum_v p_nv u_nv
    du_nv/da_nv = (logit_scale / T_n) f_nv,  f = 1 - tanh^2

**The pivot.** Each row leaves one column q out of its sums: its target, or the likeliest of its targets. With
`shift` = u_q and e_v = exp(u_v - shift), `others` = sum_{v != q} e_v, `total` = others + exp(u_q - shift):

    logprob_q = -log1p(others),   1 - p_q = others / total,   p_v = e_v / total

so a confident row (p_q near 1) keeps every digit of its log-probability and of its gradient. One shift that is known
before the product means that partial sums over the vocabulary just add. Only where some u_v exceeds u_q so far that
exp would overflow (a token of probability below e^-40) is a larger shift taken for that row.

**The gradient of the logits** for upstream g_k on the log-probabilities, l on the logsumexp and h on the entropy of a
row is, with G = sum_k g_k - l,

    dL/du_v = sum_{k: y_k = v} g_k - p_v G - h p_v (log p_v + H)

Off the pivot that is the row-wise factor -(alpha + gamma (u_v - shift)) times e_v, plus single entries at targets; at
the pivot it is g_q (1 - p_q) - p_q (G - g_q) - h p_q (log p_q + H). See `logit_gradient`.

**Three modes**, by what needs a gradient:

1. nothing: one product, 2NVH FLOP.
2. hidden but not the head (frozen head): the directions
       d logprob_k / d hidden = sum_v (1[v = y_k] - p_v) (logit_scale / T) f_v W_v        (E, H)
       d logsumexp / d hidden = sum_v p_v (logit_scale / T) f_v W_v                       (N, H), if that is an output
       d entropy / d hidden = -sum_v p_v (log p_v + H) (logit_scale / T) f_v W_v          (N, H), if that is an output
   do not depend on the loss. They are formed in the forward pass (4NVH) and saved in place of the hidden states; the
   backward pass only scales rows, for any upstream gradient, as often as wanted.
3. the head (trainable head): e_v of the first `keep_rows` rows in play is kept within the workspace (`cache`), the
   other rows are computed again in the backward pass: 6NVH + 2 (N - keep_rows) V H. Off the pivot the gradient is a
   row factor times e_v, so the two products run on the cache as it is, and the factor scales (N, H) matrices. Softcap
   and entropy need u_v as well: it is log e_v + shift, and 0 wherever e_v is 0.

The temperature's gradient needs no pass over the vocabulary: see `temperature_gradient`.

**Memory** on a GPU, beside operands and results: for a frozen head's gradients, or rows that are not kept, the
exponentials of a chunk of rows over the whole vocabulary, 1 GiB for 4096 bf16 rows and V = 128256 and at most a 64th of
the GPU's memory; for a trained head the kept exponentials (`workspace`). Where the library multiplies (see `choice`), a
tile of logits in the compute dtype as well, at most 128 MiB (512 if `tune` found that faster), and with a trained head
its gradient in float32 (V, H), which is also held where not all rows are kept. See `plan`.

**Backends.** `cpu` and `gpu` have the same functions with the same arguments: `target_logits`, `accumulate`, `combine`,
`backward`, `scaled`. Which rows count is known on the device alone: a CPU leaves the others out by index, a GPU's
kernels skip them (`rows`); where `max_rows` spares some of them, a stable sort of the mask puts those that count first.
The vocabulary-parallel form runs the same functions on each rank's shard.

**From here** `hidden` goes through `operators` (autograd) to `stages` (the order of things), which takes the rows in
play to a backend and puts what comes back in its place.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from mopl.ops import _derivatives as derivatives
from mopl.ops._logprob import (
    check_bound,
    check_operands,
    check_row,
    check_scalar,
    merge_targets,
    per_row,
    rows_that_count,
)
from mopl.ops.linear_logprob.keeping import kept_rows
from mopl.ops.linear_logprob.operators import REFUSAL, differentiable
from mopl.ops.linear_logprob.records import Head, Inputs, Want
from mopl.ops.linear_logprob.shard import shard_or_whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, temperature: float | Tensor = 1.0,
    softcap: float | None = None, logit_scale: float = 1.0, mask: Tensor | None = None, ignore_index: int = -100,
    row: Tensor | None = None, return_logsumexp: Literal[False] = False, return_entropy: Literal[False] = False,
    workspace: int | None = ..., max_rows: int | None = None, check_targets: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, temperature: float | Tensor = 1.0,
    softcap: float | None = None, logit_scale: float = 1.0, mask: Tensor | None = None, ignore_index: int = -100,
    row: Tensor | None = None, return_logsumexp: bool = ..., return_entropy: bool = ...,
    workspace: int | None = ..., max_rows: int | None = None, check_targets: bool | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, ...]: ...  # fmt: skip
def linear_logprob(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (...) token ids; any shape with `row`
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # broadcastable to hidden's (...)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # target's shape, bool
    ignore_index: int = -100,
    row: Tensor | None = None,  # target's shape
    return_logsumexp: bool = False,
    return_entropy: bool = False,
    workspace: int | None = None,
    max_rows: int | None = None,
    check_targets: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Return log p(target) in nats from hidden states and the head's weight, without holding the logits.

    Args:
        hidden: (..., H) hidden states, any floating dtype.
        weight: (V, H), the head's weight. With `group`, this rank's rows of it.
        target: (...), integer token ids, one for each row of `hidden`; with `row`, any shape.
        bias: (V,) or None.
        temperature: divides the logits; a number or a tensor that broadcasts to hidden's leading shape. Positive.
        softcap: logits become softcap * tanh(logits / softcap), after `logit_scale` and before `temperature`.
        logit_scale: multiplies the logits, the bias included.
        mask: true where a target counts; shape of `target`. Rows without a target that counts are not computed.
        ignore_index: targets with this value do not count.
        row: index of each target's row in `hidden` with its leading dimensions flattened; several targets may share
            a row, whose logits are then computed once.
        return_logsumexp: also return the log of the normaliser of the scaled logits, one value a row of `hidden`.
        return_entropy: also return the entropy in nats of each row's distribution.
        workspace: bytes that may be kept between forward and backward to spare a trainable head the second
            computation of its logits. On a CPU at most half of the rows are kept. None: 2 GiB on a CPU; on a GPU a
            32nd of its memory (4.4 GiB on an H200, where 16384 bf16 rows of a vocabulary of 128256 take 3.9 GiB), or
            half of what is unused at that moment if that is less. How much is kept can change the last bits of
            gradients: for runs that repeat bit by bit where memory is short, pass a number or call
            `torch.use_deterministic_algorithms(True)`; it, compiled code and graph capture take the 32nd as it is.
        max_rows: an upper bound, known on the host, on the number of rows that count. On a GPU, where counting them
            would cost a synchronisation, rows beyond it are not computed; should more rows count, theirs are NaN. On
            a CPU more rows are an error.
        check_targets: raise if a target lies outside the vocabulary; costs a synchronisation on a GPU. None: on a CPU
            only. Unchecked targets outside the vocabulary give NaN.
        group: process group over which the vocabulary is sharded: every rank has the same `hidden`, `target` and so
            on (global token ids), and its own consecutive rows of `weight` and `bias`, in the order of the ranks. The
            gradient of `hidden` is summed over the group, so upstream gradients must be the same on every rank.

    Returns:
        logprob, of target's shape; or a tuple (logprob, logsumexp?, entropy?) of what was asked for, the latter two of
        hidden's leading shape. float32, float64 if `hidden` or `weight` is float64. What does not count is 0 with
        gradient exactly 0. All three are differentiable in hidden, weight, bias and temperature, once, in reverse mode;
        anything beyond is an error.

    Raises:
        TypeError: wrong dtypes; a workspace or max_rows that is no whole number; a sharded (DTensor) head without
            `group`.
        ValueError: shapes or devices that do not fit, targets outside the vocabulary.
    """
    check_operands(hidden, weight, bias)
    warm = temperature if isinstance(temperature, Tensor) else None
    derivatives.refuse_transforms(REFUSAL, hidden, weight, bias, warm)
    shard, weight, bias = shard_or_whole(hidden, weight, bias, group)
    vocabulary = len(weight) if shard is None else shard.vocabulary
    lead, rows = hidden.shape[:-1], math.prod(hidden.shape[:-1])
    merged = merge_targets(target, mask, ignore_index, vocabulary)
    row = check_row(row, target, hidden)
    if target.device != hidden.device:
        raise ValueError(f"target is on {target.device} but hidden is on {hidden.device}; move target there")
    flat_target, like = merged.reshape(-1), hidden if hidden.dtype == torch.float64 else weight
    divisor = per_row(temperature, "temperature", lead, like, lambda: rows_that_count(flat_target, row, rows))
    cap = check_scalar(softcap, "softcap")
    scale = check_scalar(logit_scale, "logit_scale")
    check_bound(workspace, "workspace")
    check_bound(max_rows, "max_rows")

    need_hidden, need_weight, need_bias, need_temperature = (
        t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias, divisor)
    )
    need_head = need_weight or need_bias
    bound = rows if max_rows is None else min(max_rows, rows)
    want = Want(
        logsumexp=bool(return_logsumexp),
        entropy=bool(return_entropy),
        frozen=need_hidden and not need_head,
        temperature=need_temperature,
        check_targets=not hidden.is_cuda if check_targets is None else bool(check_targets),
        keep_rows=kept_rows(hidden, weight, bound, workspace, cap > 0) if need_head else 0,
        max_rows=bound,
    )
    head = Head(weight, bias, cap, scale, shard)
    inputs = Inputs(hidden.reshape(-1, hidden.shape[-1]), divisor, flat_target, row)
    logprob, logsumexp, entropy = differentiable(head, inputs, want)
    results = [logprob.view(target.shape)]
    if return_logsumexp:
        results.append(logsumexp.view(lead))
    if return_entropy:
        results.append(entropy.view(lead))
    return results[0] if len(results) == 1 else tuple(results)
