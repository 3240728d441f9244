"""What losses of lists begin with: their arguments checked, scores less those of the reference, options of (B, m)."""

from __future__ import annotations

from torch import Tensor

from mopl._arguments import (
    POSITIVE,
    Domain,
    as_labels,
    check_labels,
    check_like_scores,
    check_mask,
    check_scores,
    compute_dtype,
    per_objective,
)


def prepare(
    scores: Tensor,
    labels: Tensor,
    reference: Tensor | None,
    beta: float | Tensor,
    mask: Tensor | None,
    allowed: Domain,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check what every loss of lists is given; return scores - reference (B, K), labels (B, m, K) and β, shared or not.

    The difference is in the dtype of the arithmetic; without a reference it is the scores as they are. `allowed` says
    which labels the loss has a meaning for.
    """
    check_scores(scores)
    labels = as_labels(labels, scores)
    check_mask(mask, scores)
    check_like_scores(reference, scores, "reference")
    check_labels(labels, mask, allowed)
    if reference is not None:
        dtype = compute_dtype(scores, reference)
        scores = scores.to(dtype) - reference.to(dtype)
    return scores, labels, shared_by_objectives(beta, "beta", labels, scores, POSITIVE)


def shared_by_objectives(
    value: float | Tensor, name: str, labels: Tensor, like: Tensor, domain: Domain | None = None
) -> Tensor:
    """Return an option as (B, m), or as (B, 1) where all objectives share one: so do they one softmax or set of pairs.

    Its errors and its domain are those of `per_objective`.
    """
    full = per_objective(value, name, labels.shape[:2], like, domain)
    shape = value.shape if isinstance(value, Tensor) else ()
    return full[:, :1] if not shape or shape[-1] == 1 else full
