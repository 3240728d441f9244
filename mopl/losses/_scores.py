"""What losses of lists begin with: their arguments checked, scores less those of the reference, options of (B, m)."""

from __future__ import annotations

from torch import Tensor

from mopl._arguments import (
    Domain,
    as_labels,
    check_like_scores,
    check_mask,
    check_scores,
    compute_dtype,
    per_objective,
)


def check_lists(scores: Tensor, labels: Tensor, reference: Tensor | None, mask: Tensor | None) -> Tensor:
    """Raise unless scores, reference and mask are (B, K) and labels fit them; return labels (B, m, K)."""
    check_scores(scores)
    labels = as_labels(labels, scores)
    check_mask(mask, scores)
    check_like_scores(reference, scores, "reference")
    return labels


def less_reference(scores: Tensor, reference: Tensor | None) -> Tensor:
    """Return scores - reference (B, K) in the dtype of the arithmetic; without a reference scores as they are."""
    if reference is None:
        return scores
    dtype = compute_dtype(scores, reference)
    return scores.to(dtype) - reference.to(dtype)


def shared_by_objectives(
    value: float | Tensor, name: str, labels: Tensor, like: Tensor, domain: Domain | None = None
) -> Tensor:
    """Return an option as (B, m), or as (B, 1) where all objectives share one: so do they one softmax or set of pairs.

    Its errors and its domain are those of `per_objective`.
    """
    full = per_objective(value, name, labels.shape[:2], like, domain)
    shape = value.shape if isinstance(value, Tensor) else ()
    return full[:, :1] if not shape or shape[-1] == 1 else full
