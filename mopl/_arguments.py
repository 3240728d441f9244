"""Checks and broadcasts of arguments shared by every loss and op: one wording of each error, one meaning of a shape.

Shapes: `B` lists, `m` objectives, `K` items of a list.

Numbers that are out of range (a temperature of 0, a negative weight) are never computed with. Python's numbers raise a
ValueError, and so do tensors on a CPU. To read a tensor on a GPU would wait for it, and under `torch.compile` or a
transform of `torch.func` there is nothing to read: what depends on such an entry is NaN there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from mopl._counted import counted, there_are

Reduction = Literal["none", "sum", "mean"]
REDUCTIONS = ("none", "sum", "mean")


def shape_of(tensor: Tensor) -> str:
    """Return a shape as errors print it."""
    return str(tuple(tensor.shape))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32: the dtype in which all arithmetic is done."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where a device has none: for sums whose terms cancel."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_floating(value: Any, name: str, shape: str) -> None:
    """Raise unless `value` is a floating-point tensor; `shape` is what it should have."""
    if not isinstance(value, Tensor):
        got = f"got {type(value).__name__}; pass a torch.Tensor"
    elif not value.is_floating_point():
        got = f"but {name} has dtype {value.dtype}; pass {name}.float()"
    else:
        return
    raise TypeError(f"{name} must be a floating-point tensor of shape {shape}, {got}")


def check_scores(scores: Tensor) -> Tensor:
    """Raise unless `scores` is a floating-point tensor of shape (B, K); return it."""
    check_floating(scores, "scores", "(B, K)")
    if scores.ndim != 2:
        raise ValueError(
            f"scores has shape {shape_of(scores)} but must be (B, K), one row a list; "
            "for a single list pass scores[None]"
        )
    return scores


def check_device(value: Tensor, name: str, like: Tensor, of: str) -> None:
    """Raise unless `value` is where `like` is, which its caller knows as `of`: kernels would read another's memory."""
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but {of} on {like.device}; pass {name}.to({of}.device)")


def check_like_scores(value: Tensor | None, scores: Tensor, name: str) -> None:
    """Raise unless `value` is None or has the shape (B, K) of `scores` and is on their device."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.shape != scores.shape:
        got = shape_of(value) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {got} but scores are {shape_of(scores)}; pass {name} with one entry an item")
    check_device(value, name, scores, "scores")


def check_mask(mask: Tensor | None, like: Tensor, name: str = "scores", entry: str = "item") -> None:
    """Raise unless `mask` is None or boolean with an entry for each of `like`, which its caller knows by `name`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask is {got} but must be torch.bool, true where the {entry} counts; pass mask.bool()")
    if mask.shape != like.shape:
        raise ValueError(
            f"mask has shape {shape_of(mask)} but {name} has {shape_of(like)}; pass one entry for each {entry}"
        )
    check_device(mask, "mask", like, name)


def as_labels(labels: Tensor, scores: Tensor) -> Tensor:
    """Return labels as (B, m, K) in their own dtype; (B, K) is one objective."""
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be a torch.Tensor of shape (B, K) or (B, m, K), got {type(labels).__name__}; "
            "pass torch.as_tensor(labels)"
        )
    if labels.dtype == torch.uint64:  # PyTorch can neither sort these nor take them as int64 without a wrap
        raise TypeError("labels has dtype torch.uint64 but must fit int64; pass labels.long() if they do, or ranks")
    if labels.ndim == 2:
        labels = labels[:, None, :]
    if labels.ndim != 3 or labels.shape[0] != scores.shape[0] or labels.shape[2] != scores.shape[1]:
        raise ValueError(
            f"labels has shape {shape_of(labels)} but scores are {shape_of(scores)}; "
            f"pass (B, K) for one objective or (B, m, K) for m objectives with B, K = {shape_of(scores)}"
        )
    check_device(labels, "labels", scores, "scores")
    return labels


class Domain(NamedTuple):
    """An interval that the entries of an argument must lie in; `holds` is false for NaN."""

    holds: Callable[[Any], Any]  # of a number or, entry by entry, of a tensor
    words: str
    marked: bool = True  # what cannot be read is made NaN out of it; False where it spoils its loss by itself


KNOWN = Domain(lambda x: x == x, "must be a number", marked=False)
FINITE = Domain(lambda x: (x > -math.inf) & (x < math.inf), "must be finite", marked=False)
NOT_INFINITE = Domain(lambda x: x < math.inf, "must be a number below infinity", marked=False)
POSITIVE = Domain(lambda x: (x > 0) & (x < math.inf), "must be positive and finite")
NOT_NEGATIVE = Domain(lambda x: (x >= 0) & (x < math.inf), "must not be negative, NaN or infinite")


_TRACING = torch._C._TorchDispatchModeKey.PROXY  # torch.fx.experimental.proxy_tensor.make_fx


def readable(tensor: Tensor) -> bool:
    """Say whether a tensor's values can be read without waiting: on a CPU, not compiled, transformed or traced."""
    return (
        tensor.is_cpu
        and type(tensor) in (Tensor, Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and torch._C._get_dispatch_mode(_TRACING) is None
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
    )


def check_positive(value: Any, name: str, meaning: str = "") -> Tensor:
    """Return a number, a sequence or a tensor as a tensor; raise unless every entry is positive and finite.

    Reads the values on any device: for where a program takes them, not for a training step.
    """
    # A number keeps its digits: the default dtype would make 0 of 1e-60.
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    if not bool(POSITIVE.holds(tensor.detach()).all()):
        given = value.tolist() if isinstance(value, Tensor) else value
        raise ValueError(f"{name} is {given} but {POSITIVE.words}{meaning and ': ' + meaning}")
    return tensor


def _bounds(tensor: Tensor) -> list[float] | None:
    """Return numbers that lie in an interval where all entries do; None under a mode that makes fakes of tensors."""
    if tensor.ndim == 1 and len(tensor) <= 8:  # one an objective: all of them cost less than their extremes
        return tensor.tolist()
    low, high = tensor.detach().aminmax()
    return [float(low), float(high)] if type(low) is Tensor else None


def as_value(
    value: float | Tensor,
    name: str,
    like: Tensor,
    domain: Domain | None = None,
    excused: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return a number or a tensor of any shape on the device and in the compute dtype of `like`, in its domain.

    The top of the file says what becomes of entries outside of it; `excused`, called only where there are some, says
    which of them do not count.
    """
    dtype, reading = compute_dtype(like), not torch.compiler.is_compiling()
    if not isinstance(value, Tensor):
        several = isinstance(value, (list, tuple)) or (reading and getattr(value, "ndim", 0) > 0)
        if several or value is None or isinstance(value, (str, set, dict)):
            got = "None" if value is None else f"a {type(value).__name__}"
            remedy = f"; pass torch.tensor({name})" if several else ""
            raise TypeError(f"{name} is {got} but must be a number or a torch.Tensor{remedy}")
        # While tracing, a comparison or `torch.full` would compile one graph for each number.
        if not reading:
            value = torch.ones((), dtype=dtype, device=like.device) * value
        elif domain is not None and not domain.holds(float(value)):
            raise ValueError(f"{name} is {float(value):g} but {domain.words}")
        else:
            # Filling does not wait for a GPU, copying a host value there does.
            return torch.full((), float(value), dtype=dtype, device=like.device)
    if domain is not None and value.numel() and readable(value):
        bounds = _bounds(value)
        for bound in bounds or ():
            if not domain.holds(bound):
                bad = ~domain.holds(value.detach())
                if excused is None or bool((bad & ~excused(bad)).any()):
                    raise ValueError(f"{name} holds {float(value[bad][0]):g} but every entry {domain.words}")
        domain = None if bounds else domain
    value = value.to(device=like.device, dtype=dtype)
    return torch.where(domain.holds(value), value, math.nan) if domain is not None and domain.marked else value


# Rewards have either sign.
SOFTMAX = (
    "for labels of either sign, such as rewards, pass normalize='softmax' (label_temperature says how sharp), or use "
    "their ranks: plackett_luce, pairwise_logistic"
)


def refuse_negative(labels: Tensor, where: str, remedy: str = SOFTMAX, first: int = 0) -> None:
    """Raise if a label (B, ..., K) is negative, which `where` asks for; reads the values. `first` numbers the lists."""
    # NaN, which passes, hides the lowest label.
    if not labels.numel() or float(labels.amin()) >= 0 or not bool((labels < 0).any()):
        return
    place = (labels < 0).nonzero()[0].tolist()
    found = f"labels of list {first + place[0]} hold {float(labels[tuple(place)]):g}"
    raise ValueError(f"{found} but must not be negative with {where}; {remedy}")


def check_labels(labels: Tensor, mask: Tensor | None, domain: Domain) -> None:
    """Raise where labels (B, ..., K) of existing items lie outside `domain` and can be read."""
    if not labels.is_floating_point() or not readable(labels):
        return
    labels = labels.detach()
    total = labels.sum()  # of finite numbers finite; one pass where there is nothing to find
    if type(total) is not Tensor or math.isfinite(total.item()):
        return
    bad = ~domain.holds(labels)
    if mask is not None:
        bad &= mask if labels.ndim == 2 else mask[:, None, :]
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"labels of list {place[0]} hold {float(labels[tuple(place)]):g} but every label {domain.words}; "
            "leave the item out with mask, or give it a label"
        )


def unknown_labels(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Return for which lists (B, m) an existing item has the label NaN, which no comparison would show."""
    unknown = labels.isnan() if mask is None else labels.isnan() & mask[:, None, :]
    return unknown.any(-1)


def or_nan(loss: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Return the loss (B, m), NaN where `unknown_labels` says so; `check_labels` has refused what can be read."""
    if not labels.is_floating_point() or readable(labels):
        return loss
    return torch.where(unknown_labels(labels, mask), math.nan, loss)


def per_objective(
    value: float | Tensor, name: str, shape: Sequence[int], like: Tensor, domain: Domain | None = None
) -> Tensor:
    """Return a number or a tensor that broadcasts to (B, m) as an expanded (B, m) tensor in `like`'s compute dtype.

    A vector `(m,)` is one value an objective, `(B, 1)` one value a list, as in ordinary broadcasting.
    """
    tensor = as_value(value, name, like, domain)
    try:
        return tensor.expand(shape)
    except RuntimeError:
        batch, objectives = shape
        hint = f"; for one value a list pass {name}[:, None]" if tuple(tensor.shape) == (batch,) else ""
        raise ValueError(
            f"{name} has shape {shape_of(tensor)} but {there_are(batch, 'list')} "
            f"and {counted(objectives, 'objective')}; "
            f"pass a number, (m,) = ({objectives},), (B, 1) = ({batch}, 1) or (B, m) = ({batch}, {objectives}){hint}"
        ) from None


def check_choice(value: object, choices: tuple[object, ...], name: str) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r} but must be one of {', '.join(map(repr, choices))}")


def check_beta_given(beta: object, takes_beta: bool, unwanted: str) -> None:
    """Raise unless β is given where, and only where, a model takes it; `unwanted` says why another does not."""
    if (beta is not None) != takes_beta:
        remedy = "is missing; pass one for each objective" if takes_beta else f"was passed {unwanted}"
        raise ValueError(f"beta {remedy}")


def weigh_and_reduce(loss: Tensor, weights: float | Tensor | None, reduction: Reduction) -> Tensor:
    """Apply `weights` to a loss vector (B, m) and reduce it; they are finite factors of any sign.

    `"none"` gives the weighted vector, `"sum"` its sum, `"mean"` the mean over the B lists of the sum over
    objectives. A list that contributes nothing still counts in B: no result depends on padding or on a hidden count.
    """
    check_choice(reduction, REDUCTIONS, "reduction")
    if weights is not None:
        loss = loss * per_objective(weights, "weights", loss.shape, loss, FINITE)
    return reduced(loss, reduction)


def reduced(loss: Tensor, reduction: Reduction) -> Tensor:
    """Return a loss (B, ...) as it is, its sum, or its sum divided by B."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / max(loss.shape[0], 1)
