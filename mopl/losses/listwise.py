"""Listwise losses: the training loss of COS-DPO (listwise cross-entropy) and the Plackett–Luce likelihood.

Both are functions of u = beta * (scores - reference), so a model trained at β answers for c β by
`mopl.steering.rescale` (COS-DPO, proposition 3.1). The arithmetic is in `mopl.ops`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mopl._arguments import (
    FINITE,
    KNOWN,
    NOT_INFINITE,
    Reduction,
    check_choice,
    compute_dtype,
    or_nan,
    weigh_and_reduce,
)
from mopl._renamed import renamed_keywords
from mopl.losses._scores import prepare
from mopl.losses.labels import presort, to_distributions
from mopl.ops.listnet import cross_entropy
from mopl.ops.plackett_luce import Lists, Rule, check_ends, check_positions, nll

Ties = Literal["breslow", "efron", "exact", "random"]


@renamed_keywords(temperature="beta")
def listwise_dpo(
    scores: Tensor,  # (B, K)
    labels: Tensor,  # (B, K) or (B, m, K)
    *,
    reference: Tensor | None = None,  # (B, K)
    beta: float | Tensor = 1.0,  # broadcasts to (B, m)
    weights: float | Tensor | None = None,  # broadcasts to (B, m)
    mask: Tensor | None = None,  # (B, K) bool
    normalize: Literal["l1", "softmax"] | None = "l1",
    label_temperature: float | Tensor = 1.0,  # broadcasts to (B, m)
    reduction: Reduction = "mean",
) -> Tensor:
    """Listwise cross-entropy of β-scaled scores with label distributions, the training loss of COS-DPO.

    With scores s, reference s₀ and normalised labels z̄, for list b and objective j:

        loss[b, j] = -Σ_i z̄[b, j, i] log softmax_i(β[b, j] (s[b, i] - s₀[b, i]))

    Ren et al. 2025 (COS-DPO), equation 8; without a reference it is ListNet (Cao et al. 2007). With two items and
    one-hot labels it is DPO, with labels (1 - ε, ε) conservative DPO, with one-hot labels over more items the top-1
    Plackett–Luce likelihood.

    Args:
        scores: (B, K), sequence log-probabilities in nats or a ranker's scores; any floating dtype.
        labels: (B, K) for one objective or (B, m, K), higher is better; which numbers they may be is said by
            `normalize`.
        reference: (B, K), the base model's scores.
        beta: β > 0, a number or a tensor that broadcasts to (B, m).
        weights: factors of any sign on the result, a number or a tensor that broadcasts to (B, m).
        mask: (B, K), true where an item exists; other items may hold anything.
        normalize: `"l1"` divides each list's labels by their sum: sparse labels such as clicks, never negative.
            `"softmax"` takes their softmax: any real numbers, such as ratings or rewards. None takes them as they are,
            as targets of any sign that need not sum to 1, such as advantages.
        label_temperature: what labels are divided by before their softmax, positive, a number or a tensor that
            broadcasts to (B, m). See `normalize_labels`.
        reduction: `"none"` gives (B, m), `"sum"` its sum, `"mean"` the mean over lists of the sum over objectives.

    Returns:
        Nats in float32 (float64 for float64); differentiable in scores, reference, beta, weights and labels.
        Lists with fewer than two items, and with `"l1"` those whose labels are all 0, give 0 with gradient 0.

    Raises:
        TypeError: if scores are not floating point or the mask is not boolean.
        ValueError: if a shape does not fit, `normalize` or `reduction` is unknown, or, on a CPU, a β is not
            positive, a weight is not finite, or a label is NaN or infinite, or negative under `"l1"` (-inf is a target
            of 0 under `"softmax"`). On a GPU, where reading would wait, and under `torch.compile` such an entry makes
            its losses NaN.

    Examples:
        >>> scores, labels = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]])
        >>> round(float(listwise_dpo(scores, labels)), 6)
        0.798139
    """
    check_choice(normalize, ("l1", "softmax", None), "normalize")
    # A negative label, -inf too, has an error of its own under "l1".
    difference, labels, rate = prepare(
        scores, labels, reference, beta, mask, FINITE if normalize is None else NOT_INFINITE
    )
    if normalize == "softmax":
        dtype = compute_dtype(difference, labels)
        labels = to_distributions(labels, "softmax", mask, label_temperature, dtype, "normalize")
    elif isinstance(label_temperature, Tensor) or label_temperature != 1:
        raise ValueError(
            f"label_temperature has no part in normalize={normalize!r}; pass normalize='softmax', or leave it out"
        )
    loss = cross_entropy(difference, labels, rate, mask, normalize == "l1")
    return weigh_and_reduce(loss, weights, reduction)


@renamed_keywords(temperature="beta")
def plackett_luce(
    scores: Tensor,  # (B, K)
    labels: Tensor,  # (B, K) or (B, m, K)
    *,
    reference: Tensor | None = None,  # (B, K)
    beta: float | Tensor = 1.0,  # broadcasts to (B, m)
    weights: float | Tensor | None = None,  # broadcasts to (B, m)
    mask: Tensor | None = None,  # (B, K) bool
    top_k: int | None = None,
    ties: Ties = "breslow",
    last_group: Literal["charged", "free"] = "charged",
    position_weights: Tensor | None = None,  # (K,) or (B, m, K)
    order: Tensor | None = None,  # (B, m, K) integer, or (B, K) for one objective
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Negative log-likelihood of rankings under Plackett and Luce: items are chosen one after the other, best first.

    With scores s, reference s₀, position weights v and the items of a list numbered best first:

        u = β (s - s₀)
        loss = Σ_k v[k] (log(exp(u[k]) + exp(u[k+1]) + ... + exp(u[K])) - u[k])

    Plackett 1975; ListMLE (Xia et al. 2008); with a reference it is the listwise form of DPO (Rafailov et al. 2023,
    appendix A.3). It is also Cox's partial likelihood, from which the rules for ties come. Tied labels:

    * `"breslow"`: every tied item is chosen against all of its group and what is below (default: cheap, convex);
    * `"efron"`: the group's mass leaves the denominator step by step; nearer to the exact value;
    * `"exact"`: the probability of the group summed over all orders of its items (Kalbfleisch and Prentice 1973);
    * `"random"`: one order drawn at random at each call, as ListMLE implementations do.

    Args:
        scores: (B, K), sequence log-probabilities in nats or a ranker's scores; any floating dtype.
        labels: (B, K) for one objective or (B, m, K), higher is better, of any dtype and any real numbers or infinite:
            only their order and ties matter.
        reference: (B, K), the base model's scores.
        beta: β > 0, a number or a tensor that broadcasts to (B, m).
        weights: factors of any sign on the result, a number or a tensor that broadcasts to (B, m).
        mask: (B, K), true where an item exists; other items may hold anything.
        top_k: charge only items that fewer than this many items are better than; the rest are in the denominators.
        ties: the rule for equal labels.
        last_group: `"charged"`, or `"free"`: the lowest label group is an unranked tail that is never charged (the
            irrelevant documents, say). It costs 0 under `"exact"` anyway.
        position_weights: (K,) or (B, m, K), the weight of the choice made at each position (p-ListMLE:
            `2 ** (K - k) - 1`), averaged over the positions of a tied group. Not differentiable.
        order: (B, m, K), or (B, K) for one objective, items best first and masked ones last, as `presort` gives them;
            saves the sort.
        generator: source of the random order of `ties="random"`.
        reduction: `"none"` gives (B, m), `"sum"` its sum, `"mean"` the mean over lists of the sum over objectives.

    Returns:
        Nats in float32 (float64 for float64); differentiable in scores, reference, beta and weights.
        Lists with fewer than two items give 0 with gradient 0. A score of -inf above a finite one makes the loss inf,
        with a finite gradient; several of -inf are equal scores. A score of inf gives NaN.

    Raises:
        TypeError: if scores are not floating point, the mask is not boolean or the order is not integer.
        ValueError: if a shape does not fit, `top_k` is below 1, a choice is unknown, or, on a CPU, a β is not
            positive, a weight is not finite, a label or a position weight is NaN, or an order begins with a lower
            label than it ends with. On a GPU and under `torch.compile` such a number makes its losses NaN, and an
            order is not looked at.

    Examples:
        >>> scores, labels = torch.tensor([[0.5, 0.3]]), torch.tensor([[1.0, 0.0]])
        >>> round(float(plackett_luce(scores, labels)), 6)
        0.598139
    """
    difference, labels, rate = prepare(scores, labels, reference, beta, mask, KNOWN)
    check_choice(ties, ("breslow", "efron", "exact", "random"), "ties")
    check_choice(last_group, ("charged", "free"), "last_group")
    if top_k is not None and (isinstance(top_k, (float, str)) or top_k < 1):
        raise ValueError(f"top_k is {top_k} but must be an integer of at least 1; pass None to charge every position")
    if generator is not None and ties != "random":
        raise ValueError(f'generator is given but ties={ties!r} draws nothing; pass ties="random", or no generator')
    if isinstance(order, Tensor) and order.ndim == 2 and labels.shape[1] == 1:
        order = order[:, None]
    check_positions(order, position_weights, labels, mask)
    if order is not None:
        check_ends(order, labels, mask)
    given, free = labels, last_group == "free"
    if ties == "random":
        if order is not None:
            raise ValueError('order is given but ties="random" draws one; pass another rule for ties, or no order')
        order = presort(labels, mask, ties="random", generator=generator)
        if free:
            position_weights, free = _without_last_group(labels, mask, order, position_weights, difference), False
        labels = _strict_labels(order)
        ties = "breslow"
    loss = nll(Lists(difference, labels, rate, mask, order, position_weights, Rule(top_k, ties, free)))
    if labels is not given:
        loss = or_nan(loss, given, mask)
    return weigh_and_reduce(loss, weights, reduction)


def _strict_labels(order: Tensor) -> Tensor:
    """Return labels without ties that rank items as `order` does."""
    size = order.shape[-1]
    rank = torch.arange(size, 0, -1, dtype=torch.float32, device=order.device).expand(order.shape)
    return torch.zeros(order.shape, dtype=torch.float32, device=order.device).scatter_(-1, order.long(), rank)


def _without_last_group(
    labels: Tensor, mask: Tensor | None, order: Tensor, position_weights: Tensor | None, like: Tensor
) -> Tensor:
    """Return position weights (B, m, K) that are 0 where the lowest label group stands."""
    highest = torch.inf if labels.is_floating_point() else torch.iinfo(torch.int64).max
    key = labels if labels.is_floating_point() else labels.long()
    lowest = key if mask is None else key.masked_fill(~mask[:, None, :], highest)
    charged = (key > lowest.amin(-1, keepdim=True)).gather(-1, order.long())
    weights = (
        torch.ones((), dtype=compute_dtype(like), device=like.device) if position_weights is None else position_weights
    )
    return torch.where(charged, weights, 0)
