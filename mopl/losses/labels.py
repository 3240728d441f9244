"""Labels of lists: their normalisation to target distributions, and the order that they put items in."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mopl._arguments import (
    KNOWN,
    NOT_INFINITE,
    POSITIVE,
    SOFTMAX,
    as_labels,
    check_choice,
    check_labels,
    check_mask,
    compute_dtype,
    per_objective,
    readable,
    refuse_negative,
    shape_of,
    wide_dtype,
)

Normalize = Literal["l1", "softmax"]


def normalize_labels(
    labels: Tensor,  # (B, K) or (B, m, K)
    mode: Normalize,
    mask: Tensor | None = None,  # (B, K) bool
    *,
    label_temperature: float | Tensor = 1.0,  # broadcasts to (B, m)
) -> Tensor:
    """Return labels as distributions over the items of each list (COS-DPO, section 2.2).

    Args:
        labels: (B, K) or (B, m, K), higher is better. `"l1"` needs labels that are not negative; `"softmax"` takes any
            real number, a reward for example, and -inf, whose target is 0.
        mode: `"l1"`: divide by the sum, for sparse labels such as clicks; `"softmax"`: for dense ones such as ratings.
            On binary labels `"softmax"` is not a one-hot distribution but (0.73, 0.27): label smoothing, if unmeant.
        mask: (B, K), true where an item exists; what stands elsewhere is not read.
        label_temperature: what labels are divided by before their softmax, positive, a number or a tensor that
            broadcasts to (B, m): their standard deviation within a list is a start; smaller is sharper.

    Returns:
        A tensor of labels' shape in float32 (float64 for float64) that sums to 1 over the existing items of a list,
        or is 0 throughout where `"l1"` finds no positive sum or no item exists. Differentiable in labels and in
        label_temperature.

    Raises:
        ValueError: A label is NaN or inf, or negative under `"l1"`, and can be read, which is not so on a GPU and
            under `torch.compile`: there its list is NaN. Or label_temperature is given for `"l1"` or is not positive.
    """
    check_choice(mode, ("l1", "softmax"), "mode")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__} but must be a torch.Tensor; pass torch.as_tensor(labels)")
    if mask is not None:
        check_mask(mask, labels if labels.ndim == 2 else labels[:, 0])
    check_labels(labels, mask, NOT_INFINITE)
    return to_distributions(labels, mode, mask, label_temperature, compute_dtype(labels), "mode")


def to_distributions(
    labels: Tensor,  # (B, K) or (B, m, K)
    mode: Normalize,
    mask: Tensor | None,  # (B, K) bool
    label_temperature: float | Tensor,
    dtype: torch.dtype,
    option: str,
) -> Tensor:
    """Do what `normalize_labels` does in `dtype`; `option` is what the caller has called the mode."""
    if mask is not None and labels.ndim == 3:
        mask = mask[:, None, :]
    sharpened = isinstance(label_temperature, Tensor) or label_temperature != 1
    if mode == "l1":
        if sharpened:
            raise ValueError(
                f"label_temperature has no part in {option}='l1'; pass {option}='softmax', or leave it out"
            )
        labels = (labels if mask is None else labels.masked_fill(~mask, 0)).to(dtype)
        labels = not_negative(labels, f"{option}='l1'")
        total = labels.sum(-1, keepdim=True)
        empty = total <= 0  # false for NaN
        return torch.where(empty, 0, labels / torch.where(empty, 1, total))
    if large_integers(labels) and labels.shape[-1]:
        # Differences are small where a floating-point number would stand for several.
        labels = labels.long()
        existing = labels if mask is None else labels.masked_fill(~mask, torch.iinfo(torch.int64).min)
        labels = integer_differences(labels, existing.amax(-1, keepdim=True), dtype)
    labels = labels.to(dtype)
    if mask is not None:
        # A list without items would be all -inf, whose softmax and gradient are NaN.
        gone = ~mask & mask.any(-1, keepdim=True)
        labels = labels.masked_fill(~mask, 0).masked_fill(gone, -torch.inf)
    if sharpened:
        shape = (labels.shape[0], 1 if labels.ndim == 2 else labels.shape[1])
        rate = per_objective(label_temperature, "label_temperature", shape, labels, POSITIVE)
        rate = rate if labels.ndim == 2 else rate[..., None]
        finite = labels.isfinite()  # an infinite label stays what it is, and its quotient would have no gradient
        labels = torch.where(finite, torch.where(finite, labels, 0) / rate, labels)
    targets = labels.softmax(-1)
    return targets if mask is None else targets * mask


def large_integers(labels: Tensor) -> bool:
    """Say whether labels are integers of a type that float32 or float64 cannot hold whole."""
    return not labels.is_floating_point() and not labels.is_complex() and labels.dtype.itemsize >= 4


def integer_differences(labels: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Return labels - other of int64 in a floating-point dtype, right where the numbers themselves would be rounded."""
    difference, down = labels - other, labels < other
    # Beyond 2^63 it came out with the other sign: then the numbers are far apart, and rounding them is harmless.
    wide = wide_dtype(labels.device)
    return torch.where((difference < 0) == down, difference.to(wide), labels.to(wide) - other.to(wide)).to(dtype)


def not_negative(labels: Tensor, where: str, remedy: str = SOFTMAX) -> Tensor:
    """Return labels (B, ..., K), 0 where no item exists; raise if one is negative, or make its list NaN."""
    if readable(labels):
        refuse_negative(labels.detach(), where, remedy)
        return labels
    return torch.where((labels < 0).any(-1, keepdim=True), math.nan, labels)


def presort(
    labels: Tensor,  # (B, K) or (B, m, K)
    mask: Tensor | None = None,  # (B, K) bool
    *,
    ties: Literal["stable", "random"] = "stable",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return each list's items best first, (B, m, K), to keep beside the data: `plackett_luce(..., order=order)`.

    Sorting costs more than the loss, and labels do not change between epochs.

    Args:
        labels: (B, K) or (B, m, K), higher is better.
        mask: (B, K), true where an item exists; other items come last.
        ties: keep the order of tied items as it is, or draw it at random.
        generator: source of the random order, with `ties="random"` only; None: the default one of the labels' device.

    Returns:
        int32 indices of shape (B, m, K).

    Raises:
        TypeError: If `generator` is none.
        ValueError: If a shape does not fit, `ties` is unknown, there is a generator for nothing, or, on a CPU, a label
            is NaN.
    """
    if isinstance(labels, Tensor) and labels.ndim not in (2, 3):
        raise ValueError(
            f"labels has shape {shape_of(labels)} but must be (B, K) or (B, m, K); for a single list pass labels[None]"
        )
    check_choice(ties, ("stable", "random"), "ties")
    if generator is not None:
        if ties != "random":
            raise ValueError(f'generator is given but ties={ties!r} draws nothing; pass ties="random", or no generator')
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator is {generator!r} but must be a torch.Generator; pass torch.Generator().manual_seed(0)"
            )
    labels = as_labels(labels, labels[:, 0] if isinstance(labels, Tensor) and labels.ndim == 3 else labels)
    key = labels if labels.is_floating_point() else labels.long()
    if mask is not None:
        check_mask(mask, labels[:, 0])
    check_labels(labels, mask, KNOWN)
    if mask is not None:
        key = key.masked_fill(~mask[:, None, :], 0)
    shuffle = None
    if ties == "random":
        # Where the labels are: numbers drawn on the host would be copied to a GPU, which waits, and which a CUDA graph
        # cannot capture.
        noise = torch.rand(key.shape, generator=generator, device=key.device if generator is None else generator.device)
        shuffle = noise.to(key.device).argsort(dim=-1)
        key = key.gather(-1, shuffle)
    order = torch.argsort(key, dim=-1, descending=True, stable=True)
    if shuffle is not None:
        order = shuffle.gather(-1, order)
    if mask is not None:
        # A second stable sort moves what does not exist to the end and changes nothing else.
        gone = (~mask)[:, None, :].expand(order.shape).gather(-1, order)
        order = order.gather(-1, torch.argsort(gone.to(torch.uint8), dim=-1, stable=True))
    return order.to(torch.int32)
