"""What `linear_kl` and `linear_jsd` share: checks of their arguments, which rows are in play, operators and autograd.

`beta` is the other model's share of the mixture: 0 is KL(other ‖ policy), 1 is KL(policy ‖ other), see
`_divergence_blocks`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mopl._arguments import compute_dtype, shape_of, wide_dtype
from mopl.ops import _derivatives as derivatives
from mopl.ops._divergence_blocks import Head, Need, Sums, backward, forward
from mopl.ops._logprob import check_operands, check_scalar, per_row
from mopl.ops.linear_logprob.rows import Places
from mopl.ops.linear_logprob.shard import VocabularyShard, head_parts, shard_or_whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REMEDY = (
    "take log_softmax of both models' logits, logit_scale * (hidden @ weight.T + bias), or detach hidden and weight"
)


class Model(NamedTuple):
    """What makes the logits of one model, as the caller gave it."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float


def divergence(
    name: str, policy: Model, other: Model, called: str, beta: float, mask: Tensor | None, group: ProcessGroup | None
) -> Tensor:
    """Check what is given and return the divergence (...); `called` is the other model's name in its arguments."""
    derivatives.refuse_transforms(derivatives.Refusal(name, REMEDY), policy.hidden, policy.weight, policy.bias)
    check_operands(policy.hidden, policy.weight, policy.bias)
    try:
        check_operands(other.hidden, other.weight, other.bias)
    except (TypeError, ValueError) as error:
        raise type(error)(f"of the {called}: {error}") from None
    hidden, lead = policy.hidden, policy.hidden.shape[:-1]
    if other.hidden.shape[:-1] != lead or other.weight.shape[0] != policy.weight.shape[0]:
        raise ValueError(
            f"hidden has shape {shape_of(hidden)} and weight {shape_of(policy.weight)}, but of the {called} they are "
            f"{shape_of(other.hidden)} and {shape_of(other.weight)}; rows and vocabularies must agree"
        )
    if other.hidden.device != hidden.device:
        raise ValueError(f"{called}_hidden is on {other.hidden.device} but hidden is on {hidden.device}")
    check_rows_mask(mask, lead)
    shard, weight, bias = shard_or_whole(hidden, policy.weight, policy.bias, group)
    # By name: torch.compile of 2.8 follows neither `_replace` nor slices of such a record.
    policy = Model(hidden, weight, bias, policy.temperature, policy.softcap, policy.logit_scale)
    rows, shift = head_parts(other.weight, other.bias, group, f"{called}_")
    other = Model(other.hidden, rows, shift, other.temperature, other.softcap, other.logit_scale)
    if len(rows) != len(weight):
        raise ValueError(f"here are {len(weight)} rows of weight and {len(rows)} of the {called}'s; shard both alike")
    dtype = compute_dtype(hidden, policy.weight, other.hidden, other.weight)
    divisor = temperatures(policy.temperature, "temperature", hidden, mask, dtype)
    other_divisor = temperatures(other.temperature, f"{called}_temperature", hidden, mask, dtype)
    options = [
        check_scalar(policy.softcap, "softcap"),
        check_scalar(policy.logit_scale, "logit_scale"),
        check_scalar(other.softcap, f"{called}_softcap"),
        check_scalar(other.logit_scale, f"{called}_logit_scale"),
        beta,
    ]
    flat = (
        hidden.reshape(-1, hidden.shape[-1]),
        policy.weight,
        policy.bias,
        divisor,
        other.hidden.detach().reshape(-1, other.hidden.shape[-1]),
        other.weight.detach(),
        None if other.bias is None else other.bias.detach(),
        other_divisor,
        None if mask is None else mask.reshape(-1),
        options,
        frozen_head(hidden, policy.weight, policy.bias),
        name,
    )
    found = _linear_divergence(*flat)[0] if shard is None else _Sharded.apply(*flat, shard)
    return found.view(lead)  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def check_beta(beta: float) -> float:
    """Return `beta` as float; raise unless it is a number from 0 to 1."""
    if isinstance(beta, Tensor) or not isinstance(beta, (int, float)) or isinstance(beta, bool):
        raise TypeError(f"beta is {type(beta).__name__} but must be a Python number from 0 to 1")
    if not 0 <= beta <= 1 or math.isnan(beta):
        raise ValueError(
            f"beta is {beta} but must lie between 0, KL(teacher ‖ student), and 1, KL(student ‖ teacher), both included"
        )
    return float(beta)


def check_rows_mask(mask: Tensor | None, lead: torch.Size) -> None:
    """Raise unless `mask` is None or a boolean tensor with an entry for each row."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != lead):
        got = f"{mask.dtype} {shape_of(mask)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask is {got} but must be torch.bool of shape {tuple(lead)}, true where a row counts")


def temperatures(
    value: float | Tensor, name: str, hidden: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:  # (N,)
    """Return a temperature for each row in the compute dtype; raise unless it is a positive constant."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} wants a gradient but is a constant here; pass {name}.detach()")
    lead, device = hidden.shape[:-1], hidden.device
    like = torch.empty((), dtype=dtype, device=device)
    counts = (lambda: mask) if mask is not None else lambda: torch.ones(lead, dtype=torch.bool, device=device)
    return per_row(value, name, lead, like, counts)


def frozen_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether hidden states want a gradient and the head does not."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and hidden.requires_grad and not trained


def rows_in_play(mask: Tensor | None, rows: int) -> Places:
    """Return which rows are in play.

    On a CPU rows that do not count are left out. On a GPU, where counting them would wait for it, they are 0 in place.
    """
    places = Places(rows)
    if mask is None:
        return places
    on_host = mask.device.type == "cpu"
    return places._replace(index=mask.nonzero()[:, 0]) if on_host else places._replace(blank=~mask)


def _heads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, other_hidden: Tensor,
    other_weight: Tensor, other_bias: Tensor | None, other_temperature: Tensor, mask: Tensor | None,
    options: list[float],
) -> tuple[Head, Head, Places]:  # fmt: skip
    """Return both models with the rows in play, and which these are."""
    places = rows_in_play(mask, len(hidden))
    softcap, logit_scale, other_softcap, other_logit_scale, _ = options

    def taken(rows: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
        return places.take(rows), places.take(divisor, fill=1)

    rows, divisor = taken(hidden, temperature)
    policy = Head(rows, weight, bias, divisor, softcap, logit_scale)
    rows, divisor = taken(other_hidden, other_temperature)
    return policy, Head(rows, other_weight, other_bias, divisor, other_softcap, other_logit_scale), places


def _run_forward(*arguments, shard: VocabularyShard | None = None) -> tuple[Tensor, ...]:
    """Return the divergence (N,), the fields of `Sums` and the direction (N, H), or empty, put in place."""
    *operands, options, frozen, _ = arguments
    with torch.autocast(operands[0].device.type, enabled=False):
        policy, other, places = _heads(*operands, options)  # pyright: ignore[reportCallIssue]
        value, sums, direction = forward(policy, other, options[-1], frozen, shard)
        direction = places.put(direction) if frozen else direction
        return *(places.put(part) for part in (value, *sums)), direction


def _run_backward(*arguments, shard: VocabularyShard | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias for `grad` (N,); one that is not needed is empty (0,)."""
    *operands, options, saved, grad, need = arguments
    hidden, need = operands[0], Need(*need)
    with torch.autocast(hidden.device.type, enabled=False):
        policy, other, places = _heads(*operands, options)  # pyright: ignore[reportCallIssue]
        # Rows that do not count left zeros: as sums they would divide by 0.
        sums = Sums(*(places.take(part, fill=1) for part in saved))
        of_hidden, *of_head = backward(places.take(grad), policy, other, sums, options[-1], need, shard)
        if need.hidden:
            of_hidden = places.put(of_hidden.to(hidden.dtype))
        return of_hidden, *of_head  # pyright: ignore[reportReturnType]


@torch.library.custom_op("mopl::linear_divergence", mutates_args=())
def _linear_divergence(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, other_hidden: Tensor,
    other_weight: Tensor, other_bias: Tensor | None, other_temperature: Tensor, mask: Tensor | None,
    options: list[float], frozen: bool, name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what `_run_forward` does; `options` are both softcaps and logit scales, and beta; `name` the caller's."""
    return _run_forward(
        hidden, weight, bias, temperature, other_hidden, other_weight, other_bias, other_temperature, mask, options,
        frozen, name,
    )  # fmt: skip  # pyright: ignore[reportReturnType]


@_linear_divergence.register_fake
def _(hidden, weight, bias, temperature, *arguments):
    rows, dtype, wide = hidden.shape[0], temperature.dtype, wide_dtype(hidden.device)
    frozen = arguments[-2]
    vectors = [hidden.new_empty((rows,), dtype=each) for each in (dtype, dtype, wide, dtype, wide, wide)]
    return *vectors, hidden.new_empty(hidden.shape if frozen else (0,), dtype=dtype)


@torch.library.custom_op("mopl::linear_divergence_backward", mutates_args=())
def _linear_divergence_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, other_hidden: Tensor,
    other_weight: Tensor, other_bias: Tensor | None, other_temperature: Tensor, mask: Tensor | None,
    options: list[float], saved: list[Tensor], grad: Tensor, need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _run_backward(
        hidden, weight, bias, temperature, other_hidden, other_weight, other_bias, other_temperature, mask, options,
        saved, grad, need,
    )  # fmt: skip


@_linear_divergence_backward.register_fake
def _(hidden, weight, bias, *arguments):
    *_, grad, need = arguments
    return tuple(
        like.new_empty(like.shape) if needed and like is not None else grad.new_empty(0)
        for like, needed in zip((hidden, weight, bias), need, strict=True)
    )


def scaled_direction(grad: Tensor, direction: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the gradient of hidden states (N, H) from the directions that a frozen head left."""
    counted = grad if mask is None else grad.masked_fill(~mask, 0)
    return (counted[:, None] * direction).to(dtype)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, ...], shard: VocabularyShard | None) -> None:
    """Keep what the backward pass needs: of a frozen head the directions alone, and nothing of the other model."""
    *tensors, options, frozen, name = inputs
    value, *sums, direction = output
    ctx.options, ctx.frozen, ctx.name, ctx.shard, ctx.dtype = options, frozen, name, shard, tensors[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(value, *((tensors[8], direction) if frozen else (*tensors, *sums)))


def _pull_back(ctx, grad: Tensor | None, *_: None):
    refusal = derivatives.Refusal(ctx.name, REMEDY)
    value, *saved = ctx.saved_tensors
    if ctx.frozen:
        mask, direction = saved

        def closed_form() -> tuple[Tensor | None, ...]:
            return scaled_direction(grad, direction, mask, ctx.dtype), None, None  # type: ignore[arg-type]

        # The result stands for the hidden states, which a frozen head does not keep.
        return derivatives.gradients(ctx, range(3), (grad,), closed_form, refusal, (value, None, None))
    tensors, sums, need = saved[:9], saved[9:], [*ctx.needs_input_grad[:3]]
    if ctx.shard is None:
        closed_form = partial(_linear_divergence_backward, *tensors, ctx.options, sums, grad, need)
    else:
        closed_form = partial(_run_backward, *tensors, ctx.options, sums, grad, need, shard=ctx.shard)
    return derivatives.gradients(ctx, range(3), (grad,), closed_form, refusal, tensors[:3])


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output, None)


_linear_divergence.register_autograd(_pull_back, setup_context=_setup_context)


class _Sharded(torch.autograd.Function):
    """The same for a sharded head, as a plain Function: an operator would hide collectives from what traces them."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, shard = arguments
        output = _run_forward(*inputs, shard=shard)
        _keep(ctx, tuple(inputs), output, shard)
        return output[0]

    backward = staticmethod(_pull_back)
