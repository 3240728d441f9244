"""KL divergence of two policies over the whole vocabulary, from hidden states and heads; [N, V] is never held.

    u_nv = softcap * tanh(logit_scale * (<hidden_n, W_v> + bias_v) / softcap) / T_n,      p_n = softmax(u_n)
    q_n likewise, of the reference's hidden states and head

    reverse  KL(p ‖ q) = Σ_v p_v (log p_v - log q_v)      d/du_v = p_v (log p_v - log q_v - KL)
    forward  KL(q ‖ p) = Σ_v q_v (log q_v - log p_v)      d/du_v = p_v - q_v

"reverse" is what KL-regularised policies are penalised with. The reference is a constant.

**Cost**: two products with the heads forward, three backward (four with a trainable head); each pass goes over the
vocabulary once, in tiles, and what is kept between them is five numbers a row. There is one path for all devices,
ordinary PyTorch, see `_linear_kl_chunks`.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mopl._arguments import check_choice, compute_dtype, shape_of, wide_dtype
from mopl.ops import _derivatives as derivatives
from mopl.ops._linear_kl_chunks import Head, Sums, backward, forward
from mopl.ops._logprob import check_operands, check_scalar, is_dtensor, per_row
from mopl.ops.linear_logprob.rows import Places

Direction = Literal["reverse", "forward"]

REFUSAL = derivatives.Refusal(
    "linear_kl",
    "take log_softmax of both models' logits, logit_scale * (hidden @ weight.T + bias), or detach hidden and weight",
)


def linear_kl(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    reference_hidden: Tensor,  # (..., H')
    reference_weight: Tensor | None = None,  # (V, H')
    *,
    bias: Tensor | None = None,  # (V,)
    reference_bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # broadcastable to (...)
    reference_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # (...) bool
    direction: Direction = "reverse",
) -> Tensor:  # (...)
    """Return KL(π ‖ π_ref) of each row in nats, over the full vocabulary.

    Args:
        hidden: (..., H), hidden states of the policy, any floating dtype.
        weight: (V, H), the policy's head.
        reference_hidden: (..., H'), hidden states of the reference at the same positions.
        reference_weight: (V, H'), the reference's head. None: the policy's head and bias, as with LoRA.
        bias: (V,) or None.
        reference_bias: (V,) or None, with `reference_weight`.
        temperature: divides the logits, positive; a number or a tensor that broadcasts to the rows. A constant.
        reference_temperature: of the reference; None: `temperature`.
        softcap: logits become softcap * tanh(logits / softcap) before the temperature, in both models.
        logit_scale: multiplies the logits of both, the bias included.
        mask: true where a row counts; the others are not read.
        direction: "reverse" for KL(π ‖ π_ref), "forward" for KL(π_ref ‖ π).

    Returns:
        (...), at least 0; float32, float64 if an operand is. What does not count is 0 with gradient exactly 0.
        Differentiable in hidden, weight and bias, once, in reverse mode; anything beyond is an error. Nothing flows
        into the reference: where it shares the head, the head's gradient is that of the policy's use of it.

    Raises:
        TypeError: wrong dtypes, or a sharded (DTensor) operand.
        ValueError: shapes or devices that do not fit, a mask that is no boolean tensor, an unknown direction, or a
            temperature that wants a gradient.
    """
    check_choice(direction, ("reverse", "forward"), "direction")
    check_operands(hidden, weight, bias)
    derivatives.refuse_transforms(REFUSAL, hidden, weight, bias)
    if reference_weight is None:
        if reference_bias is not None:
            raise ValueError("reference_bias is for a head of the reference's own; pass reference_weight with it")
        reference_weight, reference_bias = weight, bias
    try:
        check_operands(reference_hidden, reference_weight, reference_bias)
    except (TypeError, ValueError) as error:
        raise type(error)(f"of the reference: {error}") from None
    if is_dtensor(weight) or is_dtensor(reference_weight):
        raise TypeError("weight is a DTensor but the vocabulary must be whole here; pass weight.full_tensor()")
    lead = hidden.shape[:-1]
    if reference_hidden.shape[:-1] != lead or reference_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"hidden has shape {shape_of(hidden)} and weight {shape_of(weight)}, but of the reference they are "
            f"{shape_of(reference_hidden)} and {shape_of(reference_weight)}; rows and vocabularies must agree"
        )
    if reference_hidden.device != hidden.device:
        raise ValueError(f"reference_hidden is on {reference_hidden.device} but hidden is on {hidden.device}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != lead):
        got = f"{mask.dtype} {shape_of(mask)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask is {got} but must be torch.bool of shape {tuple(lead)}, true where a row counts")
    dtype = compute_dtype(hidden, weight, reference_hidden, reference_weight)
    if reference_temperature is None:
        reference_temperature = temperature
    for value, name in ((temperature, "temperature"), (reference_temperature, "reference_temperature")):
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} wants a gradient but is a constant here; pass {name}.detach()")
    like = torch.empty((), dtype=dtype, device=hidden.device)
    counts = (lambda: mask) if mask is not None else lambda: torch.ones(lead, dtype=torch.bool, device=hidden.device)
    divisor = per_row(temperature, "temperature", lead, like, counts)
    reference_divisor = per_row(reference_temperature, "reference_temperature", lead, like, counts)
    return _linear_kl(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        divisor,
        reference_hidden.detach().reshape(-1, reference_hidden.shape[-1]),
        reference_weight.detach(),
        None if reference_bias is None else reference_bias.detach(),
        reference_divisor,
        None if mask is None else mask.reshape(-1),
        check_scalar(softcap, "softcap"),
        check_scalar(logit_scale, "logit_scale"),
        direction == "reverse",
    )[0].view(lead)


def _heads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, reference_hidden: Tensor,
    reference_weight: Tensor, reference_bias: Tensor | None, reference_temperature: Tensor, mask: Tensor | None,
    softcap: float, logit_scale: float,
) -> tuple[Head, Head, Places]:  # fmt: skip
    """Return policy and reference with the rows in play, and which these are.

    On a CPU rows that do not count are left out. On a GPU, where counting them would wait for it, they are 0 in place.
    """
    places = Places(len(hidden))
    if mask is not None:
        on_host = mask.device.type == "cpu"
        places = places._replace(index=mask.nonzero()[:, 0]) if on_host else places._replace(blank=~mask)

    def in_play(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor) -> Head:
        return Head(places.take(hidden), weight, bias, places.take(temperature, fill=1), softcap, logit_scale)

    reference = in_play(reference_hidden, reference_weight, reference_bias, reference_temperature)
    return in_play(hidden, weight, bias, temperature), reference, places


@torch.library.custom_op("mopl::linear_kl", mutates_args=())
def _linear_kl(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, reference_hidden: Tensor,
    reference_weight: Tensor, reference_bias: Tensor | None, reference_temperature: Tensor, mask: Tensor | None,
    softcap: float, logit_scale: float, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the KL (N,) and the fields of `Sums`, of the rows that count first, each (N,)."""
    with torch.autocast(hidden.device.type, enabled=False):
        policy, reference, places = _heads(
            hidden, weight, bias, temperature, reference_hidden, reference_weight, reference_bias,
            reference_temperature, mask, softcap, logit_scale,
        )  # fmt: skip
        kl, sums = forward(policy, reference, reverse)
        return tuple(places.put(part) for part in (kl, *sums))  # pyright: ignore[reportReturnType]


@_linear_kl.register_fake
def _(hidden, weight, bias, temperature, *_):
    rows, wide = hidden.shape[0], wide_dtype(hidden.device)
    dtypes = (temperature.dtype, temperature.dtype, wide, temperature.dtype, wide, wide)
    return tuple(hidden.new_empty((rows,), dtype=dtype) for dtype in dtypes)


@torch.library.custom_op("mopl::linear_kl_backward", mutates_args=())
def _linear_kl_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, reference_hidden: Tensor,
    reference_weight: Tensor, reference_bias: Tensor | None, reference_temperature: Tensor, mask: Tensor | None,
    softcap: float, logit_scale: float, reverse: bool, saved: list[Tensor], grad: Tensor, need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of hidden, weight and bias for `grad` (N,); one that is not needed is empty (0,)."""
    need_hidden, need_weight, need_bias = need
    with torch.autocast(hidden.device.type, enabled=False):
        policy, reference, places = _heads(
            hidden, weight, bias, temperature, reference_hidden, reference_weight, reference_bias,
            reference_temperature, mask, softcap, logit_scale,
        )  # fmt: skip
        # Rows that do not count left zeros: as sums they would divide by 0.
        sums = Sums(*(places.take(part, fill=1) for part in saved))
        of_hidden, of_weight, of_bias = backward(
            places.take(grad), policy, reference, sums, reverse, need_hidden, need_weight, need_bias
        )
        if need_hidden:
            of_hidden = places.put(of_hidden.to(hidden.dtype))
        return of_hidden, of_weight, of_bias


@_linear_kl_backward.register_fake
def _(hidden, weight, bias, *arguments):
    *_, grad, need = arguments
    return tuple(
        like.new_empty(like.shape) if needed and like is not None else grad.new_empty(0)
        for like, needed in zip((hidden, weight, bias), need, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, softcap, logit_scale, reverse = inputs
    _, *sums = output
    ctx.options = softcap, logit_scale, reverse
    ctx.mark_non_differentiable(*sums)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *sums)


def _backward(ctx, grad, *_):
    *tensors, top, total, reference_top, reference_total, mean = ctx.saved_tensors
    sums, need = [top, total, reference_top, reference_total, mean], [*ctx.needs_input_grad[:3]]
    closed_form = partial(_linear_kl_backward, *tensors, *ctx.options, sums, grad, need)
    return derivatives.gradients(ctx, range(3), (grad,), closed_form, REFUSAL, tensors[:3])


_linear_kl.register_autograd(_backward, setup_context=_setup_context)
