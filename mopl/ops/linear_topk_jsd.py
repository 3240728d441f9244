"""Divergence of a student from a teacher of whom the likeliest tokens are known, as cached top-k log-probabilities.

The distributions compared are over k + 1 events: each of the k ids, and all of the rest of the vocabulary. With p and q
the student's and the teacher's on these, and m = beta q + (1 - beta) p, the result is that of `linear_jsd` on them:

    0 < beta < 1   beta KL(q ‖ m) + (1 - beta) KL(p ‖ m);      beta = 0   KL(q ‖ p);      beta = 1   KL(p ‖ q)

It is a lower bound of the divergence over the whole vocabulary (data processing) and grows to it with k. Without the
tail both are renormalised over the ids, as TRL's self-distillation does by default: what the student does outside of
them then costs nothing.

**The tail's mass** is never a difference of the student's rounded probabilities: his is a sum over the other tokens,
the teacher's is log1mexp of the logarithm of the sum over the ids, which is as exact as what was cached.

**Cost** in products of 2NVH FLOP: one without a gradient; two where hidden states want one and the head does not (the
direction is made in the forward pass and kept, N x H numbers; the backward pass scales it); one forward and three
backward with a trainable head (two if hidden states want none). See `_divergence_buckets`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mopl._arguments import check_floating, compute_dtype, shape_of, wide_dtype
from mopl.ops import _derivatives as derivatives
from mopl.ops import _divergence_buckets as buckets
from mopl.ops._divergence import (
    REMEDY,
    check_beta,
    check_rows_mask,
    frozen_head,
    rows_in_play,
    scaled_direction,
    temperatures,
)
from mopl.ops._divergence_blocks import Head, Need
from mopl.ops._logprob import SKIP, as_index, check_operands, check_scalar
from mopl.ops.linear_logprob.rows import Places
from mopl.ops.linear_logprob.shard import VocabularyShard, shard_or_whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REFUSAL = derivatives.Refusal("linear_topk_jsd", REMEDY)


def linear_topk_jsd(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    teacher_ids: Tensor,  # (..., k)
    teacher_logprobs: Tensor,  # (..., k)
    *,
    beta: float = 0.5,
    tail: bool = True,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # broadcastable to (...)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # (...) bool
    ignore_index: int = -100,
    check_teacher: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:  # (...)
    """Return the divergence of the student from a teacher known by k log-probabilities a row, in nats.

    Args:
        hidden: (..., H), hidden states of the student, any floating dtype.
        weight: (V, H), the student's head. With `group`, this rank's rows of it.
        teacher_ids: (..., k), integer token ids in any order, none twice in a row. Entries of `ignore_index` are none:
            rows may have fewer than k.
        teacher_logprobs: (..., k), the teacher's natural log-probabilities of these ids over the whole vocabulary, at
            the teacher's temperature; -inf is a probability of 0. Read at the precision of their dtype. Constants.
        beta: from 0 to 1, the teacher's share of the mixture, as in `linear_jsd`.
        tail: compare the mass outside of the ids as one event more. False: both are renormalised over the ids.
        bias: (V,) or None.
        temperature: divides the student's logits, positive; a number or a tensor that broadcasts to the rows.
        softcap: the student's logits become softcap * tanh(logits / softcap), before the temperature.
        logit_scale: multiplies the student's logits, the bias included.
        mask: true where a row counts; the others are not read.
        ignore_index: marks entries of `teacher_ids` that do not count. A row without any does not count.
        check_teacher: raise if ids repeat or lie outside of the vocabulary, or if with `tail` the probabilities of a
            row add up to more than 1 by more than rounding (1e-4, or 4 units in the last place of their dtype at 1);
            costs a synchronisation on a GPU. None: on a CPU only. Unchecked, such rows are NaN.
        group: process group over which the vocabulary is sharded, as `linear_logprob` takes it: every rank has the same
            rows, global ids and upstream gradients, and its own consecutive rows of `weight` and `bias`.

    Returns:
        (...), at least 0; float32, float64 if `hidden` or `weight` is. At 0 < beta < 1 it is finite, but NaN with
        tail=False where the student forbids every id, which leaves nothing to renormalise; a KL is inf where its first
        distribution has mass that its second has none of (with beta = 1 and a tail, also where the teacher's k
        probabilities add up to 1 as they were rounded: pass tail=False), and then its gradient is NaN or infinite.
        What does not count is 0 with gradient exactly 0. Differentiable in hidden, weight and bias, once, in reverse
        mode; anything beyond is an error.

    Raises:
        TypeError: wrong dtypes, a beta that is no number, or a sharded (DTensor) operand without `group`.
        ValueError: shapes or devices that do not fit, a beta outside of [0, 1], a temperature that wants a gradient,
            and what `check_teacher` names.
    """
    beta = check_beta(beta)
    check_operands(hidden, weight, bias)
    derivatives.refuse_transforms(REFUSAL, hidden, weight, bias)
    ids = as_index(teacher_ids, "teacher_ids", "token ids")
    check_floating(teacher_logprobs, "teacher_logprobs", "(..., k)")
    lead = hidden.shape[:-1]
    if ids.shape != teacher_logprobs.shape or ids.shape[:-1] != lead or ids.ndim != hidden.ndim or not ids.shape[-1]:
        raise ValueError(
            f"teacher_ids has shape {shape_of(ids)} and teacher_logprobs {shape_of(teacher_logprobs)}, but hidden has "
            f"{shape_of(hidden)}; both must be ({', '.join(map(str, (*lead, 'k')))}) with at least one id a row"
        )
    for value, name in ((ids, "teacher_ids"), (teacher_logprobs, "teacher_logprobs")):
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device} but hidden is on {hidden.device}; move {name} there")
    check_rows_mask(mask, lead)
    shard, weight, bias = shard_or_whole(hidden, weight, bias, group)
    vocabulary = len(weight) if shard is None else shard.vocabulary
    # A negative id that is not ignore_index is a mistake: it becomes one past the vocabulary.
    column = torch.where(ids == ignore_index, SKIP, torch.where(ids < 0, vocabulary, ids))
    counts = (column != SKIP).any(-1)
    counts = (counts if mask is None else counts & mask).reshape(-1)
    divisor = temperatures(temperature, "temperature", hidden, mask, compute_dtype(hidden, weight))
    k = ids.shape[-1]
    flat = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        divisor,
        column.reshape(-1, k),
        teacher_logprobs.detach().reshape(-1, k),
        counts,
        [check_scalar(softcap, "softcap"), check_scalar(logit_scale, "logit_scale"), beta],
        bool(tail),
        frozen_head(hidden, weight, bias),
        not hidden.is_cuda if check_teacher is None else bool(check_teacher),
    )
    found = _linear_topk_jsd(*flat)[0] if shard is None else _Sharded.apply(*flat, shard)
    return found.view(lead)  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def _faulty(column: Tensor, known: Tensor, vocabulary: int | Tensor, dtype: torch.dtype, tail: bool) -> list[Tensor]:
    """Return which rows (M,) have ids outside of the vocabulary, ids that repeat, and too much probability."""
    ordered = column.sort(-1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1)
    excess = max(1e-4, 4 * torch.finfo(dtype).eps)
    fine = (known <= excess) if tail else (known.abs() < torch.inf)  # NaN is neither
    some = (column >= 0).any(-1)
    return [(column >= vocabulary).any(-1), twice, some & ~fine]


def _raise_if_any(faults: list[Tensor], vocabulary: int | Tensor, known: Tensor) -> None:
    outside, twice, heavy = (bool(fault.any()) for fault in faults)
    if outside:
        raise ValueError(
            f"teacher_ids holds an id that is negative or not below the vocabulary size {int(vocabulary)}; give "
            "entries that do not count ignore_index, or mask their rows"
        )
    if twice:
        raise ValueError(
            f"teacher_ids holds an id twice in a row ({int(faults[1].sum())} rows do); add up their probabilities in "
            "one entry and give the others ignore_index"
        )
    if heavy and not bool((known[faults[2]] > 0).any()):
        raise ValueError(
            "teacher_logprobs holds NaN, or a row without any probability, which tail=False cannot renormalise; give "
            "entries that do not count ignore_index, or mask their rows"
        )
    if heavy:
        raise ValueError(
            f"teacher_logprobs add up to a probability of {float(known.exp().max()):.6g} in a row, but no more than 1 "
            "is there; pass log-probabilities over the whole vocabulary (logits.log_softmax(-1)), or tail=False, which "
            "renormalises them over the ids"
        )


def _policy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, counts: Tensor, options: list[float]
) -> tuple[Head, Places]:
    """Return the student with the rows in play, and which these are."""
    places = rows_in_play(counts, len(hidden))
    head = Head(places.take(hidden), weight, bias, places.take(temperature, fill=1), options[0], options[1])
    return head, places


def _run_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, column: Tensor, logprob: Tensor,
    counts: Tensor, options: list[float], tail: bool, frozen: bool, check: bool, shard: VocabularyShard | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the divergence (N,), the fields of `Found` and the direction (N, H), or empty, put in place."""
    with torch.autocast(hidden.device.type, enabled=False):
        policy, places = _policy(hidden, weight, bias, temperature, counts, options)
        column, logprob = places.take(column, fill=SKIP), places.take(logprob)
        teacher, known = buckets.teacher_buckets(logprob, column != SKIP, tail)
        vocabulary = len(weight) if shard is None else shard.vocabulary
        faults = _faulty(column, known, vocabulary, logprob.dtype, tail)
        if check:
            _raise_if_any(faults, vocabulary, known)
        column = torch.where(column < vocabulary, column, SKIP)
        value, found, direction = buckets.forward(policy, column, teacher, options[-1], tail, frozen, shard)
        lost = torch.stack(faults).any(0)
        value = value.masked_fill_(lost, torch.nan)
        found.gradient.masked_fill_(lost[:, None], torch.nan)
        if frozen:
            direction = places.put(direction.masked_fill_(lost[:, None], torch.nan))
        return *(places.put(part) for part in (value, *found)), direction


def _run_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, column: Tensor, counts: Tensor,
    options: list[float], tail: bool, saved: list[Tensor], grad: Tensor, need: list[bool],
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of hidden, weight and bias for `grad` (N,); one that is not needed is empty (0,)."""
    with torch.autocast(hidden.device.type, enabled=False):
        policy, places = _policy(hidden, weight, bias, temperature, counts, options)
        found = buckets.Found(*(places.take(part) for part in saved))
        of_hidden, of_weight, of_bias = buckets.backward(
            places.take(grad), policy, places.take(column, fill=SKIP), found, tail, Need(*need), shard
        )
        if need[0]:
            of_hidden = places.put(of_hidden.to(hidden.dtype))
        return of_hidden, of_weight, of_bias


@torch.library.custom_op("mopl::linear_topk_jsd", mutates_args=())
def _linear_topk_jsd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, column: Tensor, logprob: Tensor,
    counts: Tensor, options: list[float], tail: bool, frozen: bool, check: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what `_run_forward` does; `options` are softcap, logit scale and beta."""
    return _run_forward(hidden, weight, bias, temperature, column, logprob, counts, options, tail, frozen, check)  # pyright: ignore[reportReturnType]


@_linear_topk_jsd.register_fake
def _(hidden, weight, bias, temperature, column, logprob, counts, options, tail, frozen, check):
    (rows, k), dtype, wide = column.shape, temperature.dtype, wide_dtype(hidden.device)

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    direction = new(*(hidden.shape if frozen else (0,)))
    return new(rows), new(rows), new(rows, dtype=wide), new(rows, k + int(tail), dtype=wide), direction


@torch.library.custom_op("mopl::linear_topk_jsd_backward", mutates_args=())
def _linear_topk_jsd_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, column: Tensor, counts: Tensor,
    options: list[float], tail: bool, saved: list[Tensor], grad: Tensor, need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _run_backward(hidden, weight, bias, temperature, column, counts, options, tail, saved, grad, need)


@_linear_topk_jsd_backward.register_fake
def _(hidden, weight, bias, *arguments):
    *_, grad, need = arguments
    return tuple(
        like.new_empty(like.shape) if needed and like is not None else grad.new_empty(0)
        for like, needed in zip((hidden, weight, bias), need, strict=True)
    )


def _keep(ctx, inputs: tuple, output: tuple[Tensor, ...], shard: VocabularyShard | None) -> None:
    """Keep what the backward pass needs: of a frozen head the directions alone."""
    hidden, weight, bias, temperature, column, _, counts, options, tail, frozen, _ = inputs
    value, *found, direction = output
    ctx.options, ctx.tail, ctx.frozen, ctx.shard, ctx.dtype = options, tail, frozen, shard, hidden.dtype
    ctx.set_materialize_grads(False)
    kept = (direction,) if frozen else (hidden, weight, bias, temperature, column, *found)
    ctx.save_for_backward(value, counts, *kept)


def _pull_back(ctx, grad: Tensor | None, *_: None):
    value, counts, *saved = ctx.saved_tensors
    if ctx.frozen:

        def closed_form() -> tuple[Tensor | None, ...]:
            return scaled_direction(grad, saved[0], counts, ctx.dtype), None, None  # type: ignore[arg-type]

        # The result stands for the hidden states, which a frozen head does not keep.
        return derivatives.gradients(ctx, range(3), (grad,), closed_form, REFUSAL, (value, None, None))
    operands, found, need = saved[:5], saved[5:], [*ctx.needs_input_grad[:3]]
    flat = (*operands, counts, ctx.options, ctx.tail, found, grad, need)
    if ctx.shard is None:
        closed_form = partial(_linear_topk_jsd_backward, *flat)
    else:
        closed_form = partial(_run_backward, *flat, shard=ctx.shard)
    return derivatives.gradients(ctx, range(3), (grad,), closed_form, REFUSAL, operands[:3])


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output, None)


_linear_topk_jsd.register_autograd(_pull_back, setup_context=_setup_context)


class _Sharded(torch.autograd.Function):
    """The same for a sharded head, as a plain Function: an operator would hide collectives from what traces them."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, shard = arguments
        output = _run_forward(*inputs, shard=shard)
        _keep(ctx, tuple(inputs), output, shard)
        return output[0]

    backward = staticmethod(_pull_back)
