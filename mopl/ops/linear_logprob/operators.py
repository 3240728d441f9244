"""`linear_logprob` as PyTorch operators, for autograd and the compiler. Here alone records become flat arguments."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.ops import _derivatives as derivatives
from mopl.ops._logprob import Upstream
from mopl.ops.linear_logprob.keeping import cache_layout, direction_dtype
from mopl.ops.linear_logprob.records import Forward, Head, Inputs, Need, Want
from mopl.ops.linear_logprob.shard import VocabularyShard
from mopl.ops.linear_logprob.stages import run_backward, run_forward

REFUSAL = derivatives.Refusal(
    "linear_logprob",
    "take mopl.ops.gathered_logprob of the logits, logit_scale * (hidden @ weight.T + bias), or detach the operands",
)


def differentiable(head: Head, inputs: Inputs, want: Want) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprob (E,), logsumexp (N,) and entropy (N,), with their derivatives; entropies not wanted are empty."""
    hidden, temperature, target, row = inputs
    weight, bias, softcap, logit_scale, shard = head
    flat = hidden, weight, bias, temperature, target, row, softcap, logit_scale, want.numbers()
    logprob, logsumexp, entropy, *_ = _linear_logprob(*flat) if shard is None else _Sharded.apply(*flat, shard)
    return logprob, logsumexp, entropy


def _records(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, target: Tensor, row: Tensor | None,
    softcap: float, logit_scale: float, want: list[int], shard: VocabularyShard | None = None,
) -> tuple[Head, Inputs, Want]:  # fmt: skip
    """Return the records of the flat arguments of an operator; torch wants them so."""
    head = Head(weight, bias, softcap, logit_scale, shard)
    return head, Inputs(hidden, temperature, target, row), Want(*want)  # type: ignore[arg-type]


@torch.library.custom_op("mopl::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, target: Tensor, row: Tensor | None,
    softcap: float, logit_scale: float, want: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the fields of Forward."""
    records = _records(hidden, weight, bias, temperature, target, row, softcap, logit_scale, want)
    return tuple(run_forward(*records))  # pyright: ignore[reportReturnType]


@_linear_logprob.register_fake
def _(*arguments):
    head, inputs, want = _records(*arguments)
    operands, shared = (inputs.hidden, head.weight), inputs.row is not None
    (rows, size), (targets,) = inputs.hidden.shape, inputs.target.shape
    wide, narrow, (columns, dtype) = compute_dtype(*operands), direction_dtype(*operands), cache_layout(*operands)

    def new(*shape: int, wanted: bool = True, dtype: torch.dtype = wide) -> Tensor:
        return inputs.hidden.new_empty(shape if wanted else (0,), dtype=dtype)

    return tuple(
        Forward(
            logprob=new(targets),
            logsumexp=new(rows),
            entropy=new(rows, wanted=want.moments > 0),
            variance=new(rows, wanted=want.moments > 1),
            direction=new(targets, size, wanted=want.frozen, dtype=narrow),
            direction_logsumexp=new(rows, size, wanted=want.frozen and want.logsumexp, dtype=narrow),
            direction_entropy=new(rows, size, wanted=want.frozen and want.entropy, dtype=narrow),
            shift=new(rows),
            total=new(rows),
            pivot=new(rows, wanted=shared, dtype=torch.int64),
            pivot_logprob=new(rows, wanted=shared),
            cache=new(want.keep_rows * columns, dtype=dtype),
        )
    )


@torch.library.custom_op("mopl::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, temperature: Tensor, target: Tensor,
    row: Tensor | None, softcap: float, logit_scale: float, want: list[int], saved: list[Tensor],
    upstream: list[Tensor | None], need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of hidden, weight, bias and temperature; one that is not needed is empty (0,)."""
    records = _records(hidden, weight, bias, temperature, target, row, softcap, logit_scale, want)  # type: ignore[arg-type]
    found = run_backward(*records, Forward(*saved), Upstream(*upstream), Need(*need))
    return tuple(temperature.new_empty(0) if g is None else g for g in found)  # pyright: ignore[reportReturnType]


@_linear_logprob_backward.register_fake
def _(hidden, weight, bias, temperature, target, row, softcap, logit_scale, want, saved, upstream, need):
    if hidden is None:
        direction = Forward(*saved).direction
        alone = row is None and upstream[0] is not None and upstream[1] is None and upstream[2] is None
        dtype = direction.dtype if alone else temperature.dtype  # see `scale_directions`
        hidden = temperature.new_empty((temperature.shape[0], direction.shape[-1]), dtype=dtype)
    return tuple(
        like.new_empty(like.shape) if needed and like is not None else temperature.new_empty(0)
        for like, needed in zip((hidden, weight, bias, temperature), need, strict=True)
    )


def _keep(ctx, head: Head, inputs: Inputs, want: Want, saved: Forward) -> None:
    """Keep what the backward pass needs: with a frozen head directions, in place of the hidden states and the head."""
    ctx.set_materialize_grads(False)
    hidden, temperature, target, row = inputs
    operands = (None, None, None) if want.frozen else (hidden, head.weight, head.bias)
    ctx.save_for_backward(*operands, temperature, target, row, *saved)
    ctx.options = head.softcap, head.logit_scale, want.numbers(), head.shard


def _pull_back(ctx, logprob: Tensor | None, logsumexp: Tensor | None, entropy: Tensor | None, *_: None):
    """Return the gradients of all arguments of an operator; there are some for its first four."""
    hidden, weight, bias, temperature, target, row, *saved = ctx.saved_tensors
    softcap, logit_scale, want, shard = ctx.options
    flat = hidden, weight, bias, temperature, target, row, softcap, logit_scale, want
    upstream, results = Upstream(logprob, logsumexp, entropy), Forward(*saved)
    need = Need(*ctx.needs_input_grad[:4])

    if shard is None:
        closed_form = partial(_linear_logprob_backward, *flat, saved, list(upstream), list(need))
    else:
        closed_form = partial(run_backward, *_records(*flat, shard), results, upstream, need)
    # The results stand for the hidden states, which a frozen head does not keep.
    inputs = hidden, weight, bias, temperature, results.logprob, results.logsumexp, results.entropy
    return derivatives.gradients(ctx, range(4), upstream, closed_form, REFUSAL, inputs)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[3:])
    _keep(ctx, *_records(*inputs), Forward(*output))


_linear_logprob.register_autograd(_pull_back, setup_context=_setup_context)


class _Sharded(torch.autograd.Function):
    """The same for a sharded head, as a plain Function: an operator would hide collectives from what traces them."""

    @staticmethod
    def forward(ctx, *arguments):
        records = _records(*arguments)
        saved = run_forward(*records)
        _keep(ctx, *records, saved)
        return saved.logprob, saved.logsumexp, saved.entropy

    backward = staticmethod(_pull_back)
