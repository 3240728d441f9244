"""Checks and broadcasts of arguments shared by every loss and op: one wording of each error, one meaning of a shape.

Shapes: `B` lists, `m` objectives, `K` items of a list. Nothing here reads a tensor's values, so nothing here
synchronises with a GPU or breaks `torch.compile`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

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


def check_scores(scores: Tensor, name: str = "scores") -> Tensor:
    """Raise unless `scores` is a floating-point tensor of shape (B, K); return it."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (B, K), got {type(scores).__name__}")
    if scores.ndim != 2:
        raise ValueError(
            f"{name} has shape {shape_of(scores)} but must be (B, K), one row a list; "
            "for a single list pass scores[None]"
        )
    if not scores.is_floating_point():
        raise TypeError(f"{name} has dtype {scores.dtype} but must be floating point; pass {name}.float()")
    return scores


def check_like_scores(value: Tensor | None, scores: Tensor, name: str) -> Tensor | None:
    """Raise unless `value` is None or has the shape (B, K) of `scores`; return it."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.shape != scores.shape:
        got = shape_of(value) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {got} but scores are {shape_of(scores)}; pass {name} with one entry an item")
    return value


def check_mask(mask: Tensor | None, scores: Tensor) -> Tensor | None:
    """Raise unless `mask` is None or a boolean (B, K); return it."""
    check_like_scores(mask, scores, "mask")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            f"mask has dtype {mask.dtype} but must be torch.bool, true where an item exists; pass mask.bool()"
        )
    return mask


def as_labels(labels: Tensor, scores: Tensor, name: str = "labels") -> Tensor:
    """Return labels as (B, m, K) in their own dtype; (B, K) is one objective."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (B, K) or (B, m, K), got {type(labels).__name__}")
    if labels.ndim == 2:
        labels = labels[:, None, :]
    if labels.ndim != 3 or labels.shape[0] != scores.shape[0] or labels.shape[2] != scores.shape[1]:
        raise ValueError(
            f"{name} has shape {shape_of(labels)} but scores are {shape_of(scores)}; "
            f"pass (B, K) for one objective or (B, m, K) for m objectives with B, K = {shape_of(scores)}"
        )
    return labels


def per_objective(value: float | Tensor, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
    """Return a number or a tensor that broadcasts to (B, m) as an expanded (B, m) tensor in `like`'s compute dtype.

    A vector `(m,)` is one value an objective, `(B, 1)` one value a list, as in ordinary broadcasting.
    """
    dtype = compute_dtype(like)
    # torch.full and not torch.tensor: filling does not wait for a GPU, copying a host value there does.
    if isinstance(value, list | tuple):
        raise TypeError(
            f"{name} is a {type(value).__name__} but must be a number or a torch.Tensor; pass torch.tensor({name})"
        )
    tensor = value if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=like.device)
    try:
        return tensor.to(device=like.device, dtype=dtype).expand(shape)
    except RuntimeError:
        batch, objectives = shape
        hint = f"; for one value a list pass {name}[:, None]" if tuple(tensor.shape) == (batch,) else ""
        raise ValueError(
            f"{name} has shape {shape_of(tensor)} but there are {batch} lists and {objectives} objectives; "
            f"pass a number, (m,) = ({objectives},), (B, 1) = ({batch}, 1) or (B, m) = ({batch}, {objectives}){hint}"
        ) from None


def check_choice(value: object, choices: tuple[object, ...], name: str) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r} but must be one of {', '.join(map(repr, choices))}")


def weigh_and_reduce(loss: Tensor, weights: float | Tensor | None, reduction: Reduction) -> Tensor:
    """Apply `weights` to a loss vector (B, m) and reduce it.

    `"none"` gives the weighted vector, `"sum"` its sum, `"mean"` the mean over the B lists of the sum over
    objectives. A list that contributes nothing still counts in B: no result depends on padding or on a hidden count.
    """
    check_choice(reduction, REDUCTIONS, "reduction")
    if weights is not None:
        loss = loss * per_objective(weights, "weights", (loss.shape[0], loss.shape[1]), loss)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / max(loss.shape[0], 1)
