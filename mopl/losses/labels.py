"""Labels of lists: their normalisation to target distributions, and the order that they put items in."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mopl._arguments import as_labels, check_choice, check_mask, check_scores, compute_dtype

Normalize = Literal["l1", "softmax"]


def normalize_labels(
    labels: Tensor,  # (B, K) or (B, m, K)
    mode: Normalize,
    mask: Tensor | None = None,  # (B, K) bool
) -> Tensor:
    """Return labels as distributions over the items of each list (COS-DPO, section 2.2).

    Args:
        labels: (B, K) or (B, m, K), higher is better; `"l1"` needs labels that are not negative.
        mode: `"l1"`: divide by the sum, for sparse labels such as clicks; `"softmax"`: for dense ones such as ratings.
            On binary labels `"softmax"` is not a one-hot distribution but (0.73, 0.27): label smoothing, if unmeant.
        mask: (B, K), true where an item exists.

    Returns:
        A tensor of labels' shape in float32 (float64 for float64) that sums to 1 over the existing items of a list,
        or is 0 throughout where `"l1"` finds no positive sum or no item exists. Differentiable in labels.
    """
    check_choice(mode, ("l1", "softmax"), "mode")
    dtype = compute_dtype(labels)
    if mask is not None:
        check_mask(mask, labels if labels.ndim == 2 else labels[:, 0])
        mask = mask if labels.ndim == 2 else mask[:, None, :]
        labels = labels.masked_fill(~mask, 0)
    labels = labels.to(dtype)
    if mode == "l1":
        total = labels.sum(-1, keepdim=True)
        positive = total > 0
        return torch.where(positive, labels / torch.where(positive, total, 1), 0)
    if mask is None:
        return labels.softmax(-1)
    # A list without items would be all -inf, whose softmax and gradient are NaN.
    some = mask.any(-1, keepdim=True)
    return labels.masked_fill(~mask & some, -torch.inf).softmax(-1) * mask


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
        generator: source of the random order.

    Returns:
        int32 indices of shape (B, m, K).
    """
    labels = as_labels(labels, check_scores(labels.new_zeros((labels.shape[0], labels.shape[-1]), dtype=torch.float32)))
    key = labels if labels.is_floating_point() else labels.to(torch.float64)
    if mask is not None:
        check_mask(mask, labels[:, 0])
        key = key.masked_fill(~mask[:, None, :], 0)
    shuffle = None
    if ties == "random":
        noise = torch.rand(key.shape, generator=generator, device=None if generator is None else generator.device)
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
