"""KL divergence of two policies over the whole vocabulary, from hidden states and heads; [N, V] is never held.

    u_nv = softcap * tanh(logit_scale * (<hidden_n, W_v> + bias_v) / softcap) / T_n,      p_n = softmax(u_n)
    q_n likewise, of the reference's hidden states and head

    reverse  KL(p ‖ q) = Σ_v p_v (log p_v - log q_v)      d/du_v = p_v (log p_v - log q_v - KL)
    forward  KL(q ‖ p) = Σ_v q_v (log q_v - log p_v)      d/du_v = p_v - q_v

"reverse" is what KL-regularised policies are penalised with. The reference is a constant. These are the ends of
`linear_jsd`, whose machinery this is, see `_divergence_blocks`; there is one path for all devices, ordinary PyTorch.

**Cost** in products of 2NVH FLOP, one a head and pass: two without a gradient; three where hidden states want one and
the head does not (the direction is made in the forward pass and kept, N x H numbers; the backward pass scales it); two
forward and four backward with a trainable head (three if hidden states want none), five numbers a row kept between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from mopl._arguments import check_choice
from mopl.ops._divergence import Model, divergence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Direction = Literal["reverse", "forward"]


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
    group: ProcessGroup | None = None,
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
        group: process group over which both vocabularies are sharded, as `linear_logprob` takes it: every rank has the
            same rows, its own consecutive rows of both heads, and the same upstream gradients.

    Returns:
        (...), at least 0; float32, float64 if an operand is; inf where the first distribution has mass that the second
        has none of, and then its gradient is NaN or infinite as the formula's is. What does not count is 0 with
        gradient exactly 0. Differentiable in hidden, weight and bias, once, in reverse mode; anything beyond is an
        error. Nothing flows into the reference: where it shares the head, the head's gradient is that of the policy's
        use of it.

    Raises:
        TypeError: wrong dtypes, or a sharded (DTensor) operand without `group`.
        ValueError: shapes or devices that do not fit, a mask that is no boolean tensor, an unknown direction, or a
            temperature that wants a gradient.
    """
    check_choice(direction, ("reverse", "forward"), "direction")
    if reference_weight is None:
        if reference_bias is not None:
            raise ValueError("reference_bias is for a head of the reference's own; pass reference_weight with it")
        reference_weight, reference_bias = weight, bias
    second = temperature if reference_temperature is None else reference_temperature
    policy = Model(hidden, weight, bias, temperature, softcap, logit_scale)
    reference = Model(reference_hidden, reference_weight, reference_bias, second, softcap, logit_scale)
    return divergence("linear_kl", policy, reference, "reference", float(direction == "reverse"), mask, group)
