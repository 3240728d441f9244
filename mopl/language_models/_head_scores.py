"""A model's output head, and what a fused one computes in the place of its logits.

A call asks by a `HeadRequest`; `score_hidden` answers with named tensors, all float32 of shape (N, T); `FusedOutput` is
filled from these. Something new to ask for is a field of the request, a line in `score_hidden` and a field of the
output.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from mopl._rows import UnsupportedModelError
from mopl._sharded import is_dtensor, whole_shape
from mopl.conditioning.adapted import mixed_copies
from mopl.language_models._split_head import SplitHead
from mopl.ops import linear_jsd, linear_kl, linear_logprob
from mopl.ops.head_statistics import head_statistics

IGNORE_INDEX = -100
_DIVERGENCE = "divergence "  # with the number of the teacher


@dataclass(frozen=True, eq=False)
class HeadStates:
    """What the head of a model computes the logits of the targets from: S of them, in the order of the batch.

    Attributes:
        hidden: (S, H), what the head got where a target is predicted, as it multiplies it.
        weight: (V, H), its matrix in that dtype.
        bias: (V,) or None.
        transform: what the model does to the product.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: Transform

    @classmethod
    def of(cls, head: Any, hidden: Tensor, targets: Tensor, transform: Transform) -> HeadStates:
        """Take them from hidden states (N, k + T, H) for targets (N, T)."""
        hidden, weight, bias = _operands(head, hidden[:, -targets.shape[1] :])
        return cls(hidden[targets.to(hidden.device) != IGNORE_INDEX], weight, bias, transform)


@dataclass(frozen=True)
class Distillation:
    """Which divergence is taken between a teacher and a student; see `mopl.ops.linear_jsd`.

    Attributes:
        beta: weight of the teacher in the mixture; 0: KL(teacher ‖ student), 1: KL(student ‖ teacher).
        temperature: divides the logits of both.
    """

    beta: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True)
class HeadRequest:
    """What a call asks of a fused head: these are the keywords of a fused forward.

    Attributes:
        temperature: a number, or (N, T), by which logits are divided.
        return_logsumexp: also give the log of the normaliser.
        return_entropy: also give the entropy.
        reference_hidden: (N, T, H'), what the head of a reference got at the same positions, for the KL to it.
        reference_head: that head; None: the model's own.
        statistics: which figures to give that pass no gradient, of `mopl.ops.head_statistics.NAMES`.
        autocast: whether the head takes part in autocast, as it does by itself; else it multiplies in its own dtype.
        teachers: what the heads of teachers got for the same targets, for the divergence to each.
        distillation: which divergence that is.
        return_log_probs: give the log-probabilities of the targets; without them there must be something else.
        return_states: give the model's own `HeadStates`, and nothing else.
    """

    temperature: float | Tensor = 1.0
    return_logsumexp: bool = False
    return_entropy: bool = False
    reference_hidden: Tensor | None = None
    reference_head: Any = None
    statistics: tuple[str, ...] = ()
    autocast: bool = True
    teachers: Sequence[HeadStates] = ()
    distillation: Distillation = Distillation()
    return_log_probs: bool = True
    return_states: bool = False

    @classmethod
    def taken(cls, keywords: dict[str, Any]) -> HeadRequest:
        """Take a request out of the keywords of a call, of which the model's own are left."""
        return cls(**{one.name: keywords.pop(one.name) for one in fields(cls) if one.name in keywords})


@dataclass
class FusedOutput:
    """What a fused forward returns for `targets` (N, T).

    Attributes:
        log_probs: float32 (N, T), log p(targets[n, t]) in nats; 0 where targets are ignored. None if these were not
            asked for.
        logsumexp: float32 (N, T) if asked for.
        entropy: float32 (N, T), in nats, if asked for.
        model_output: what the model's own forward returned, without its logits (router losses and the like).
        kl: float32 (N, T), KL to the reference over the whole vocabulary, in nats, if `reference_hidden` was given.
        statistics: float32 (N, T) each, without a gradient, by name: what `statistics` asked for.
        divergences: float32 (N, T) each, the divergence to each of `teachers` in nats; 0 where targets are ignored.
    """

    log_probs: Tensor
    logsumexp: Tensor | None
    entropy: Tensor | None
    model_output: Any
    kl: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    divergences: list[Tensor] = field(default_factory=list)

    @classmethod
    def filled(cls, parts: dict[str, Tensor], model_output: Any) -> FusedOutput:
        """Make one from what `score_hidden` gave."""
        collected = ("model_output", "statistics", "divergences")
        named = {one.name: parts.get(one.name) for one in fields(cls) if one.name not in collected}
        divergences = [part for name, part in parts.items() if name.startswith(_DIVERGENCE)]
        others = {n: part.detach() for n, part in parts.items() if n not in named and not n.startswith(_DIVERGENCE)}
        return cls(**named, model_output=model_output, statistics=others, divergences=divergences)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the head


def find_head(model: nn.Module) -> Any:
    """Return the linear layer that turns hidden states into logits, through the wrappers of PEFT."""
    getter = getattr(model, "get_output_embeddings", None)
    head: Any = getter() if getter is not None else None
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} names no output head: get_output_embeddings() gives None. "
            "Pass a causal language model (AutoModelForCausalLM)"
        )
    if hasattr(head, "modules_to_save") and hasattr(head, "active_adapters") and mixed_copies(head) is None:
        disabled = getattr(head, "disable_adapters", False)
        adapters = [name for name in head.active_adapters if name in head.modules_to_save and not disabled]
        head = head.modules_to_save[adapters[0]] if adapters else head.original_module
    if hasattr(head, "base_layer"):
        raise UnsupportedModelError(
            f"the output head carries an adapter ({type(head).__name__}), whose product with the hidden states is not "
            "one matrix. Leave the head out of target_modules, train it whole with modules_to_save, or merge it first"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or len(whole_shape(weight)) != 2:
        raise UnsupportedModelError(
            f"the output head is a {type(head).__name__} without a weight of shape (vocabulary, hidden); "
            "only linear heads can be fused"
        )
    if not weight.is_floating_point():
        raise UnsupportedModelError(
            f"the output head's weight has dtype {weight.dtype}; a quantised head cannot be fused. "
            "Keep the head out of the quantisation (llm_int8_skip_modules=['lm_head'])"
        )
    return head


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
    request: HeadRequest,
) -> dict[str, Tensor]:  # (N, T) each
    """Answer a request with the last T positions that a head was given: named tensors, `log_probs` first."""
    outside = contextlib.nullcontext() if request.autocast else torch.autocast(hidden.device.type, enabled=False)
    with outside:
        return _score_hidden(head, hidden, targets, transform, request)


def _score_hidden(
    head: Any, hidden: Tensor, targets: Tensor, transform: Transform, request: HeadRequest
) -> dict[str, Tensor]:
    """Run `linear_logprob`, and `linear_kl` where there is a reference, on the last T positions that a head was given.

    Returns:
        `log_probs`, and what else is asked for of `logsumexp`, `entropy`, `kl`, KL(model ‖ reference), and statistics.
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
    split = SplitHead.of(head)
    with_logsumexp = request.return_logsumexp or bool(request.statistics)
    options: dict[str, Any] = {
        "bias": bias,
        "temperature": request.temperature,
        "softcap": transform.softcap,
        "logit_scale": transform.logit_scale,
        "group": None if split is None else split.group,
    }
    parts: dict[str, Tensor] = {}
    if request.return_log_probs or with_logsumexp or request.return_entropy:
        scores = linear_logprob(
            own,
            weight,
            targets,
            ignore_index=IGNORE_INDEX,
            return_logsumexp=with_logsumexp,
            return_entropy=request.return_entropy,
            **options,
        )
        asked = {"log_probs": True, "logsumexp": with_logsumexp, "entropy": request.return_entropy}
        names = [name for name, wanted in asked.items() if wanted]
        parts |= zip(names, scores if isinstance(scores, tuple) else (scores,), strict=True)
    if request.statistics:
        figures = parts["log_probs"], parts["logsumexp"] if request.return_logsumexp else parts.pop("logsumexp")
        parts |= head_statistics(own, weight, targets, *figures, names=request.statistics, **options)
    if request.reference_hidden is not None:
        own, weight, options["bias"] = _operands(head, hidden[:, -length:])  # a cast of its own: see `_reference_kl`
        parts["kl"] = _reference_kl(head, own, weight, targets, request, options)
    frozen: HeadStates | None = None
    for number, teacher in enumerate(request.teachers):
        student = HeadStates.of(head, hidden, targets, transform)  # a cast of its own, as above
        if frozen is not None:  # one copy of what gets no gradient is enough
            student = replace(student, weight=frozen.weight, bias=frozen.bias)
        elif not student.weight.requires_grad and (student.bias is None or not student.bias.requires_grad):
            frozen = student
        parts[f"{_DIVERGENCE}{number}"] = _divergence(student, teacher, targets, request.distillation)
    if not parts:
        raise ValueError("return_log_probs is False and nothing else is asked for; pass teachers, or leave it out")
    return parts


def _divergence(student: HeadStates, teacher: HeadStates, targets: Tensor, how: Distillation) -> Tensor:  # (N, T)
    """Return the divergence to a teacher where there are targets, and 0 elsewhere."""
    rows, width = student.hidden.shape[0], student.weight.shape[0]
    if teacher.hidden.shape[0] != rows or teacher.weight.shape[0] != width:
        raise ValueError(
            f"a teacher predicts {teacher.hidden.shape[0]} tokens of a vocabulary of {teacher.weight.shape[0]}, the "
            f"model {rows} of {width}; give both the same responses, and take a teacher of the model's family and size "
            "of vocabulary"
        )
    given: dict[str, Any] = {"beta": how.beta, "temperature": how.temperature}
    for prefix, side in (("", student), ("teacher_", teacher)):
        given[f"{prefix}bias"] = None if side.bias is None else side.bias.to(student.weight.device)
        given[f"{prefix}logit_scale"], given[f"{prefix}softcap"] = side.transform.logit_scale, side.transform.softcap
    if teacher.transform.softcap is None:
        given["teacher_softcap"] = math.inf  # None would be the student's
    if is_dtensor(student.weight):
        given["group"] = SplitHead(student.weight).group
    found = linear_jsd(
        student.hidden, student.weight, teacher.hidden.to(student.weight.device),
        teacher.weight.to(student.weight.device), **given,
    )  # fmt: skip
    return found.new_zeros(targets.shape).masked_scatter(targets != IGNORE_INDEX, found)


def _reference_kl(
    head: Any, own: Tensor, weight: Tensor, targets: Tensor, request: HeadRequest, options: dict[str, Any]
) -> Tensor:
    """Return the KL of the model to the reference.

    The model's operands are cast for it alone, so that its gradients and those of the log-probabilities are not added
    up in 16 bits.
    """
    assert request.reference_hidden is not None
    reference, reference_head = request.reference_hidden, request.reference_head
    if reference.shape[:-1] != targets.shape:
        raise ValueError(
            f"reference_hidden has shape {tuple(reference.shape)} but targets {tuple(targets.shape)}; pass what "
            "the head of the reference got at the same positions, (N, T, H)"
        )
    *other, other_bias = _operands(head if reference_head is None else reference_head, reference)
    if reference_head is None and any(p.requires_grad for p in (weight, options["bias"]) if p is not None):
        raise ValueError("the model's head is trained, so it is not that of the reference; pass reference_head")
    mask = targets != IGNORE_INDEX
    return linear_kl(own, weight, *other, reference_bias=other_bias, mask=mask, **options)
