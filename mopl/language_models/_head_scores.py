"""What a fused head computes in the place of its logits: log-probabilities of targets, and the KL to a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopl.conditioning.adapted import mixed_copies
from mopl.ops import linear_kl, linear_logprob

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Transform:
    """What a model does to the output of its head."""

    logit_scale: float
    softcap: float | None

    def __call__(self, t: Tensor) -> Tensor:
        scaled = self.logit_scale * t
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def numbers_of(model: Any) -> list[Any]:
    """Return every number by which a model's forward could change its logits, to see whether one is changed.

    They are the attributes of the model, of its parts (the head is one) and of its configuration, and single values
    among its parameters and buffers; private ones and the counters of DeepSpeed are not. It takes some microseconds.
    """
    config: Any = getattr(model, "config", None)
    # A wrapper of PEFT has the numbers of what it is around, and is around something of the same kind.
    holders = [model, *(getattr(part, "original_module", part) for part in model._modules.values()), config]
    if hasattr(config, "get_text_config"):
        holders.append(config.get_text_config())
    found: list[Any] = [
        (name, value)
        for holder in holders
        if holder is not None
        for name, value in vars(holder).items()
        if (type(value) is float or type(value) is int) and not name.startswith(("_", "ds_", "applied_"))
    ]
    for tensors in (model._parameters, model._buffers):
        found += [(id(value), value._version) for value in tensors.values() if value is not None and value.numel() == 1]
    return found


def fit_transform(probe: Tensor, answer: Tensor) -> Transform:
    """Fit `softcap * tanh(scale * t / softcap)`, or `scale * t`, to pairs (t, f(t)) that reach from tiny to huge t."""
    magnitude = probe.abs()
    tiny = magnitude.argsort()[: max(4, len(probe) // 16)]
    scale = float((answer[tiny] / probe[tiny]).median())
    largest = magnitude.argmax()
    if (answer[largest] / probe[largest] - scale).abs() <= 1e-2 * abs(scale):
        # Least squares over everything: the rounding of single entries averages out.
        return Transform(_tidy(float((answer @ probe) / (probe @ probe))), None)
    return Transform(_tidy(scale), _tidy(float(answer[largest].abs())))


def _tidy(value: float) -> float:
    """Snap to a number of few digits within rounding: configurations hold numbers such as 30.0 or 0.0625."""
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= 2e-6 * abs(value) else value


def _operands(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states, weight and bias as the head itself would multiply them: on its device, in one dtype."""
    weight, bias = head.weight, getattr(head, "bias", None)
    hidden = hidden.to(weight.device)
    if (copies := mixed_copies(head)) is not None:
        hidden, weight = copies.operands(hidden)
        bias = None
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden.to(weight.dtype), weight, bias


def score_hidden(
    head: Any,
    hidden: Tensor,  # (N, k + T, H)
    targets: Tensor,  # (N, T)
    transform: Transform,
    temperature: float | Tensor,
    *,
    return_logsumexp: bool,
    return_entropy: bool,
    reference_hidden: Tensor | None,  # (N, T, H')
    reference_head: Any,
) -> list[Tensor]:  # (N, T) each
    """Run `linear_logprob`, and `linear_kl` where there is a reference, on the last T positions that a head was given.

    Returns:
        Log-probabilities, and what else is asked for of logsumexp, entropy and KL(model ‖ reference), in this order.
    """
    if hidden.ndim != 3 or targets.ndim != 2 or hidden.shape[0] != targets.shape[0]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)} but the head got hidden states {tuple(hidden.shape)}; "
            "pass targets (N, T) for input_ids (N, T)"
        )
    length = targets.shape[1]
    if hidden.shape[1] < length:
        raise ValueError(
            f"targets has {length} positions but only {hidden.shape[1]} reached the head; do not pass logits_to_keep"
        )
    own, weight, bias = _operands(head, hidden[:, -length:])
    targets = targets.to(weight.device)
    options: dict[str, Any] = {
        "bias": bias,
        "temperature": temperature,
        "softcap": transform.softcap,
        "logit_scale": transform.logit_scale,
    }
    parts = linear_logprob(
        own,
        weight,
        targets,
        ignore_index=IGNORE_INDEX,
        return_logsumexp=return_logsumexp,
        return_entropy=return_entropy,
        **options,
    )
    found: list[Tensor] = list(parts) if isinstance(parts, tuple) else [parts]
    if reference_hidden is None:
        return found
    if reference_hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"reference_hidden has shape {tuple(reference_hidden.shape)} but targets {tuple(targets.shape)}; pass what "
            "the head of the reference got at the same positions, (N, T, H)"
        )
    # A cast of its own, so that gradients of the two are not added up in 16 bits.
    own, weight, options["bias"] = _operands(head, hidden[:, -length:])
    *other, other_bias = _operands(head if reference_head is None else reference_head, reference_hidden)
    if reference_head is None and any(p.requires_grad for p in (weight, bias) if p is not None):
        raise ValueError("the model's head is trained, so it is not that of the reference; pass reference_head")
    mask = targets != IGNORE_INDEX
    return [*found, linear_kl(own, weight, *other, reference_bias=other_bias, mask=mask, **options)]
