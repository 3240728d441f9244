"""Generalised Jensen-Shannon divergence of a student and a teacher over the vocabulary; [N, V] is never held.

    u_nv = softcap * tanh(logit_scale * (<hidden_n, W_v> + bias_v) / softcap) / T_n,      p_n = softmax(u_n)
    q_n likewise, of the teacher's hidden states and head;      m = beta q + (1 - beta) p

    0 < beta < 1   beta KL(q ‖ m) + (1 - beta) KL(p ‖ m)      d/du_v = (1 - beta) p_v (log(p_v / m_v) - KL(p ‖ m))
    beta = 0       KL(q ‖ p), "forward"                       d/du_v = p_v - q_v
    beta = 1       KL(p ‖ q), "reverse"                       d/du_v = p_v (log(p_v / q_v) - KL(p ‖ q))

(Agarwal et al. 2024, "On-policy distillation of language models", arXiv:2306.13649, with beta as TRL's
`DistillationTrainer` and `GKDTrainer` and Liger's `LigerFusedLinearJSDLoss` take it: the teacher's share of m.) The
ends are the limits of JSD / (beta (1 - beta)), not of JSD, which vanishes there.

**Cost** in products of 2NVH FLOP, one a head and pass: two without a gradient, whatever beta is; three where hidden
states want one and the head does not (frozen head: the direction is made in the forward pass and kept, N x H numbers,
nothing of the teacher or of the heads is; the backward pass scales it, as often as wanted); two forward and four
backward with a trainable head (three if hidden states want none), five numbers a row kept between. There is one path
for all devices, ordinary PyTorch, that of `linear_kl`: see `_divergence_blocks` for digits and memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from mopl.ops._divergence import Model, check_beta, divergence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_jsd(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (..., H')
    teacher_weight: Tensor | None = None,  # (V, H')
    *,
    beta: float = 0.5,
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # broadcastable to (...)
    teacher_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float | None = None,
    mask: Tensor | None = None,  # (...) bool
    group: ProcessGroup | None = None,
) -> Tensor:  # (...)
    """Return the divergence of student and teacher in each row in nats, over the full vocabulary.

    Args:
        hidden: (..., H), hidden states of the student, any floating dtype.
        weight: (V, H), the student's head.
        teacher_hidden: (..., H'), hidden states of the teacher at the same positions; width and dtype are its own.
        teacher_weight: (V, H'), the teacher's head. None: the student's head and bias, as with LoRA.
        beta: from 0 to 1, the teacher's share of m: JSD = beta KL(teacher ‖ m) + (1 - beta) KL(student ‖ m);
            0 is KL(teacher ‖ student) and 1 is KL(student ‖ teacher).
        bias: (V,) or None.
        teacher_bias: (V,) or None, with `teacher_weight`.
        temperature: divides the logits, positive; a number or a tensor that broadcasts to the rows. A constant.
        teacher_temperature: of the teacher; None: `temperature`.
        softcap: the student's logits become softcap * tanh(logits / softcap), before the temperature.
        logit_scale: multiplies the student's logits, the bias included.
        teacher_softcap: of the teacher; None: the student's; math.inf: the teacher has none.
        teacher_logit_scale: of the teacher; None: the student's.
        mask: true where a row counts; the others are not read.
        group: process group over which both vocabularies are sharded, as `linear_logprob` takes it: every rank has the
            same rows, its own consecutive rows of both heads, and the same upstream gradients.

    Returns:
        (...), at least 0; float32, float64 if an operand is. At 0 < beta < 1 it is finite whatever either model
        forbids; a KL is inf where its first distribution has mass that its second has none of, and then its gradient is
        NaN or infinite as the formula's is. What does not count is 0 with gradient exactly 0. Differentiable in hidden,
        weight and bias, once, in reverse mode; anything beyond is an error. Nothing flows into the teacher: where it
        shares the head, the head's gradient is that of the student's use of it.

    Raises:
        TypeError: wrong dtypes, a beta that is no number, or a sharded (DTensor) operand without `group`.
        ValueError: shapes or devices that do not fit, a beta outside of [0, 1], a mask that is no boolean tensor, or a
            temperature that wants a gradient.
    """
    beta = check_beta(beta)
    if teacher_weight is None:
        if teacher_bias is not None:
            raise ValueError("teacher_bias is for a head of the teacher's own; pass teacher_weight with it")
        teacher_weight, teacher_bias = weight, bias
    student = Model(hidden, weight, bias, temperature, softcap, logit_scale)
    teacher = Model(
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        temperature if teacher_temperature is None else teacher_temperature,
        softcap if teacher_softcap is None else None if teacher_softcap == math.inf else teacher_softcap,
        logit_scale if teacher_logit_scale is None else teacher_logit_scale,
    )
    return divergence("linear_jsd", student, teacher, "teacher", beta, mask, group)
