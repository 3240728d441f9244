"""Sums over all pairs of a list, with O(K) memory: the pairwise logistic loss and smooth ranks.

Both keep (B, m, K) for the backward pass and never more than one block of pairs at a time. Blocks are whole lists, or a
part of one list where its K x K pairs are too many. There is no Triton kernel: the same code runs on every device.

**Pairwise logistic.** For the pairs with label_i > label_j, d = u_i - u_j - margin and pair weights W (no gradient):

    loss = sum_ij W_ij softplus(-d_ij),   c_ij = -W_ij sigmoid(-d_ij),   dloss/du_i += c_ij,   dloss/du_j -= c_ij,
    dloss/dmargin = -sum_ij c_ij

W = 1, or |gain_i - gain_j| |discount_i - discount_j| (LambdaRank, LiPO-lambda). Loss and gradient come out of one pass
over the pairs, so that backward is a product.

**Smooth ranks.** rank_i = 1 + sum_{j != i} sigmoid(u_j - u_i), and for an upstream gradient c:

    dloss/du_k = sum_j (c_j - c_k) sigmoid'(u_j - u_k)

which is a second pass over the pairs instead of a stored K x K matrix (Qin, Liu, Li 2010; ApproxNDCG, ApproxMRR).

Equal scores have difference 0 even where both are infinite. Second derivatives, forward mode and transforms go through
the formulas at the end of the file, which hold all pairs of all lists at once.
"""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mopl.ops import _derivatives as derivatives
from mopl.ops._rows import slices

# Pairs (times objectives) in a block. On a CPU the temporaries should stay in the caches, on a GPU a block should
# fill the device; either way they are a few dozen bytes a pair.
_PAIRS_CPU, _PAIRS_GPU = 1 << 17, 1 << 24


def times_beta(value: Tensor, beta: Tensor) -> Tensor:
    """Return beta * value of tensors that broadcast, for β > 0.

    An infinite value adds nothing to the derivative in β: of finite losses it has a derivative of 0, or of several that
    are equal, derivatives that sum to 0; 0 times infinity would make it NaN. `or_infinite` adds those of infinite
    losses.
    """
    if torch.compiler.is_compiling():  # which neither traces what follows nor has second derivatives
        fixed, known = beta.detach(), torch.where(value.isinf(), 0, value).detach()
        return fixed * value + (beta - fixed) * known
    clean, _ = derivatives.finite(value)
    value = value.detach()
    return beta * clean + torch.where(value.isinf(), value, 0)


def or_infinite(loss: Tensor, beta: Tensor) -> Tensor:
    """Return a loss (B, m) of such products whose derivative in β is infinite where it is."""
    return loss + beta * torch.where(loss.isinf(), loss.detach(), 0)


def pairwise_logistic(
    scores: Tensor,  # (B, m, K) or (B, 1, K)
    labels: Tensor,  # (B, m, K)
    margin: Tensor,  # (B, m) or (B, 1)
    gains: Tensor | None = None,  # (B, m, K)
    discounts: Tensor | None = None,  # (B, K)
    top: Tensor | None = None,  # (B, K) bool
    both_in_top: bool = False,
) -> Tensor:
    """Return the pairwise logistic loss (B, m) in nats and in the scores' dtype; differentiable in scores and margin.

    Args:
        scores: (B, m, K), or (B, 1, K) where one set serves all objectives; float32 or float64, β included.
        labels: (B, m, K). An item whose label is NaN takes part in no pair, whatever its score.
        margin: (B, m), or (B, 1), in the dtype of the scores.
        gains: (B, m, K); with `discounts` the pair weights are |gain_i - gain_j| |discount_i - discount_j|.
        discounts: (B, K); float64 keeps the differences of neighbouring ranks exact.
        top: (B, K), true for the items of the top k: pairs of two others are dropped.
        both_in_top: drop also the pairs of which only one item is in `top`.
    """
    with_gradient = torch.is_grad_enabled() and (scores.requires_grad or margin.requires_grad)
    gains = None if gains is None else gains.detach()
    if derivatives.transformed():
        return _pairwise_formula(scores, labels.detach(), margin, gains, discounts, top, both_in_top=both_in_top)
    return _pairwise_logistic(scores, labels.detach(), margin, gains, discounts, top, both_in_top, with_gradient)[0]


def smooth_ranks(
    scores: Tensor,  # (B, m, K)
    mask: Tensor | None = None,  # (B, K) bool
) -> Tensor:
    """Return 1 + sum_{j != i} sigmoid(u_j - u_i) over the existing items, (B, m, K), and 1 where no item exists.

    Scores are float32 or float64, β included; the result has their dtype and is differentiable in them.
    """
    if derivatives.transformed():
        return _smooth_ranks_formula(scores, mask)
    return _smooth_ranks(scores, mask)


# ---------------------------------------------------------------------------------------------------------------------
# Pairwise logistic


@torch.library.custom_op("mopl::pairwise_logistic", mutates_args=())
def _pairwise_logistic(
    scores: Tensor,
    labels: Tensor,
    margin: Tensor,
    gains: Tensor | None,
    discounts: Tensor | None,
    top: Tensor | None,
    both_in_top: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss (B, m), dloss/dscores (B, m, K) and dloss/dmargin (B, m); without gradient the latter are empty."""
    loss, by_score, by_margin = _zeros(scores, labels, with_gradient)
    for lists, rows in _blocks(labels):
        u, y = scores[lists], labels[lists]
        d = _differences(u[..., rows], u) - margin[lists, :, None, None]
        weight = y[..., rows, None] > y[..., None, :]
        if top is not None:
            first, second = top[lists, None, rows, None], top[lists, None, None, :]
            weight &= first & second if both_in_top else first | second
        pair = weight
        if gains is not None and discounts is not None:
            gain, discount = gains[lists], discounts[lists, None]
            weight = (gain[..., rows, None] - gain[..., None, :]).abs_()
            weight *= (discount[..., rows, None] - discount[..., None, :]).abs_().to(u.dtype)
            pair = pair & (weight != 0)
        # Select, do not multiply by 0: the difference of a pair that does not count may be infinite or NaN.
        loss[lists] += torch.where(pair, weight * -torch.nn.functional.logsigmoid(d), 0).sum((-2, -1))
        if with_gradient:
            c = torch.where(pair, weight * torch.sigmoid(d.neg_()), 0)
            by_score[lists, :, rows] -= c.sum(-1)
            by_score[lists] += c.sum(-2)
            by_margin[lists] += c.sum((-2, -1))
    return loss, by_score, by_margin


def _zeros(scores: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    by_score, by_margin = (labels.shape, labels.shape[:2]) if with_gradient else ((0,), (0,))
    return scores.new_zeros(labels.shape[:2]), scores.new_zeros(by_score), scores.new_zeros(by_margin)


@_pairwise_logistic.register_fake
def _(scores, labels, margin, gains, discounts, top, both_in_top, with_gradient):
    return _zeros(scores, labels, with_gradient)


def _pairwise_logistic_setup(ctx, inputs, output):
    scores, labels, margin, gains, discounts, top, ctx.both_in_top, with_gradient = inputs
    _, by_score, by_margin = output
    if not with_gradient:
        raise RuntimeError("mopl::pairwise_logistic was called without gradient; pass with_gradient=True")
    ctx.mark_non_differentiable(by_score, by_margin)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(by_score, by_margin, scores, margin)
    derivatives.keep(ctx, labels, gains, discounts, top)


def _pairwise_logistic_grad(ctx, grad_loss, *_):
    by_score, by_margin, scores, margin = ctx.saved_tensors
    labels, *weights = derivatives.kept(ctx)
    need = ctx.needs_input_grad

    def closed_form() -> tuple[Tensor | None, Tensor | None]:
        of_scores = (grad_loss[..., None] * by_score).sum_to_size(scores.shape) if need[0] else None
        return of_scores, (grad_loss * by_margin).sum_to_size(margin.shape) if need[2] else None

    formula = partial(_pairwise_formula, both_in_top=ctx.both_in_top)
    arguments = (scores, labels, margin, *weights)
    return derivatives.gradients(ctx, (0, 2), (grad_loss,), closed_form, formula, arguments)


_pairwise_logistic.register_autograd(_pairwise_logistic_grad, setup_context=_pairwise_logistic_setup)


# ---------------------------------------------------------------------------------------------------------------------
# Smooth ranks


@torch.library.custom_op("mopl::smooth_ranks", mutates_args=())
def _smooth_ranks(scores: Tensor, mask: Tensor | None) -> Tensor:
    ranks = torch.empty_like(scores, memory_format=torch.contiguous_format)
    for lists, rows in _blocks(scores):
        u = scores[lists]
        above = torch.sigmoid(_differences(u[..., rows], u).neg_())
        if mask is not None:
            above.masked_fill_(~mask[lists, None, None, :], 0)
        ranks[lists, :, rows] = above.sum(-1) + 0.5  # sigmoid(0) of the item itself is the other half
    return ranks if mask is None else ranks.masked_fill_(~mask[:, None, :], 1)


@_smooth_ranks.register_fake
def _(scores, mask):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.custom_op("mopl::smooth_ranks_backward", mutates_args=())
def _smooth_ranks_backward(grad_ranks: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
    gradient = torch.empty_like(scores, memory_format=torch.contiguous_format)
    for lists, rows in _blocks(scores):
        u, c = scores[lists], grad_ranks[lists]
        d = _differences(u[..., rows], u)
        slope = torch.sigmoid(d)
        slope *= torch.sigmoid(d.neg_())
        slope *= c[..., None, :] - c[..., rows, None]
        if mask is not None:
            slope.masked_fill_(~mask[lists, None, None, :], 0)
        gradient[lists, :, rows] = slope.sum(-1)
    return gradient if mask is None else gradient.masked_fill_(~mask[:, None, :], 0)


@_smooth_ranks_backward.register_fake
def _(grad_ranks, scores, mask):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _smooth_ranks_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _smooth_ranks_grad(ctx, grad_ranks):
    given = ctx.saved_tensors
    return derivatives.gradients(
        ctx, (0,), (grad_ranks,), lambda: [_smooth_ranks_backward(grad_ranks, *given)], _smooth_ranks_formula, given
    )


_smooth_ranks.register_autograd(_smooth_ranks_grad, setup_context=_smooth_ranks_setup)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of pairs


def _blocks(like: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield (lists, rows): all pairs of several of the lists (B, m, K), or some rows of the K x K pairs of one list."""
    budget, (batch, objectives, items) = _PAIRS_CPU if like.device.type == "cpu" else _PAIRS_GPU, like.shape
    a_list, a_row = max(1, objectives * items * items), max(1, objectives * items)
    lists, rows = max(1, budget // a_list), max(1, min(items, budget // a_row))
    return itertools.product(slices(0, batch, lists), slices(0, items, rows))


def _differences(rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows_i - columns_j as (..., I, K), 0 where they are equal, which inf - inf would not be."""
    first, second = rows[..., :, None], columns[..., None, :]
    return (first - second).masked_fill_(first == second, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The same in differentiable functions of PyTorch


def _pairwise_formula(
    scores: Tensor,
    labels: Tensor,
    margin: Tensor,
    gains: Tensor | None,
    discounts: Tensor | None,
    top: Tensor | None,
    both_in_top: bool,
) -> Tensor:
    pair = labels[..., :, None] > labels[..., None, :]
    if top is not None:
        first, second = top[:, None, :, None], top[:, None, None, :]
        pair = pair & (first & second if both_in_top else first | second)
    weight = pair.to(scores.dtype)
    if gains is not None and discounts is not None:
        change = (discounts[:, None, :, None] - discounts[:, None, None, :]).abs().to(scores.dtype)
        weight = torch.where(pair, (gains[..., :, None] - gains[..., None, :]).abs() * change, 0)
        pair = weight != 0
    hopeless = pair & (scores[..., :, None] < scores[..., None, :])
    hopeless = hopeless & ((scores == -torch.inf)[..., :, None] | (scores == torch.inf)[..., None, :])
    clean, beyond = derivatives.finite(scores)
    u = clean + beyond
    d = u[..., :, None] - u[..., None, :] - margin[..., None, None]
    d = torch.where(pair, d, 0)  # NaN of another pair would reach its gradient
    lost = torch.where(hopeless, weight * torch.inf, 0).sum((-2, -1))
    return lost - torch.where(pair, weight * logsigmoid(d), 0).sum((-2, -1))


def _smooth_ranks_formula(scores: Tensor, mask: Tensor | None) -> Tensor:
    exists = None if mask is None else mask[:, None, :]
    clean, beyond = derivatives.finite(scores if exists is None else torch.where(exists, scores, 0))
    u = clean + beyond
    above = torch.sigmoid(u[..., None, :] - u[..., :, None])
    if exists is None:
        return above.sum(-1) + 0.5
    return torch.where(exists, torch.where(exists[..., None, :], above, 0).sum(-1) + 0.5, 1)
