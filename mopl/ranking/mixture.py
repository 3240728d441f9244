"""A trade-off as a mixture of what the objectives want: the scores of `conditioning="mixture"`.

An objective alone is served best by scores h_j with softmax(β_j (h_j - s0)) = its labels' distribution p_j. The losses
of several, summed with weights w, are served best where the softmax is the mixture Σ_j w_j p_j, if all have one β. So

    s = s0 + (1/b) log Σ_j v_j softmax(b (h_j - s0))    with v_j ∝ w_j β_j², Σ_j v_j = 1, and b = Σ_j v_j β_j,

the softmax being over the items of a list. With one β, v is w and b is β, and h_j that are best for their objective
give the best s for every w (`mopl.reference.mixture_of_objectives` is the same in plain loops). Where the entries of β
differ no formula is exact; this one is so at the ends, where one weight is 1, and to first order in the differences
between the objectives: where Σ_j w_j β_j (softmax(β_j (s - s0)) - p_j) = 0 is linear, Σ_j w_j β_j² (s - h_j) = 0.

A sum Σ_j w_j h_j is the geometric mixture Π_j p_j^(w_j) instead: it ranks an item low that one objective rules out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopl._arguments import compute_dtype


def mix_objectives(
    scores: Tensor,  # (B, K, m)
    weights: Tensor,  # (m,) or (B, m)
    beta: Tensor,  # (m,) or (B, m)
    mask: Tensor | None = None,  # (B, K) bool
) -> Tensor:  # (B, K)
    """Return (1/b) log Σ_j v_j softmax(b h_j), see above; add s0 to what it gives for h_j - s0.

    Exact for scores of any size, as far as their dtype holds them: nothing is exponentiated that could overflow, and
    an objective of weight 0 has neither influence nor gradient.

    Args:
        scores: h_j - s0 of each objective, (B, K, m).
        weights: w on the simplex, (m,) or (B, m).
        beta: β, positive, (m,) or (B, m).
        mask: (B, K), true where an item exists; what stands elsewhere is ignored.

    Returns:
        Scores (B, K), 0 in masked places, in float32, or float64 where `scores` is.
    """
    dtype = compute_dtype(scores)
    exists = torch.ones_like(scores[..., 0], dtype=torch.bool) if mask is None else mask
    shares = weights.to(dtype) * beta.to(dtype).square()
    shares = shares / shares.sum(-1, keepdim=True)
    b = (shares * beta.to(dtype)).sum(-1)[..., None, None]  # (1, 1) or (B, 1, 1)
    # A list without items has a softmax over its padding, which is discarded, where one over nothing would be NaN.
    counted = exists | ~exists.any(-1, keepdim=True)
    h = scores.to(dtype).masked_fill(~exists[..., None], 0.0) * b
    log_p = h.masked_fill(~counted[..., None], -torch.inf).log_softmax(1).masked_fill(~exists[..., None], 0.0)
    there = shares > 0
    terms = log_p + torch.where(there, shares, 1.0).log().masked_fill(~there, -torch.inf)[..., None, :]
    # Not torch.logsumexp: its gradient is exp(terms - result), whose rounding grows with the size of the terms.
    top = terms.detach().amax(-1, keepdim=True)
    mixed = ((terms - top).exp().sum(-1).log() + top[..., 0]) / b[..., 0]
    return mixed.masked_fill(~exists, 0.0)
