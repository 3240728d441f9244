"""Plackett-Luce negative log-likelihood of m rankings of one list of scores, with ties, top-k and partial rankings.

For list b and objective j, `u = beta * scores` and the items fall into groups C_1 > C_2 > ... of equal label,
best first. Group g has n_g items, T_g = sum of exp(u) in it and R_g = sum of exp(u) in all lower groups. The loss is

    loss_bj = sum_g W_g N_g,     W_g = mean of the position weights over the positions that the group occupies

with W_g = 0 for a group that starts at or behind position `top_k` (so a group that straddles the cut is charged whole)
and, with `last_group_free`, for the lowest group (also if it is the only one). A group of one item costs
N_g = log1p(R_g / exp(u_i)). A group of tied items costs

    "breslow":  n_g log(R_g + T_g) - sum_{C_g} u
    "efron":    sum_{r < n_g} log(R_g + (1 - r / n_g) T_g) - sum_{C_g} u
    "exact":    -log of the probability of the group summed over all orders of its items (Kalbfleisch and Prentice)
                = -log int exp(y - exp(y)) prod_{i in C_g} (1 - exp(-exp(y + u_i - log R_g))) dy;   0 where R_g = 0

The gradient is closed: with b_g = (dN_g / du_i) / exp(u_i) for any item i below the group (it is the same for all),

    dloss/du_i = exp(u_i) sum_{h < g} W_h b_h + W_g dN_g/du_i          for i in C_g
    one item:   b_g = 1 / (R_g + T_g),                    dN_g/du_i = -R_g / (R_g + T_g)
    "breslow":  b_g = n_g / (R_g + T_g),                  dN_g/du_i = exp(u_i) b_g - 1
    "efron":    b_g = sum_r 1 / (R_g + (1 - r / n_g) T_g), dN_g/du_i = exp(u_i) sum_r (1 - r / n_g) / (...) - 1
    "exact":    b_g = sum_i E[phi_i] / R_g,               dN_g/du_i = -E[phi_i],  phi_i = t_i / (exp(t_i) - 1),
                t_i = exp(y + u_i - log R_g), E over y with the integrand as density

so the forward pass gives the gradient `G = dloss/du` (B, m, K), in the order of the items, along with the loss, and
backward is `dscores_bi = sum_j grad_loss_bj beta_bj G_bji` and `dbeta = grad_loss * beta_gradient`
with `beta_gradient_bj = sum_i G_bji scores_bi`, computed as sum_i G_i (scores_i - max scores): G sums to 0.

`order` (B, m, K) holds the items best first, masked items last: `labels.argsort(descending=True)`. It decides the
ranking; labels then only say which neighbours in that order are tied. Lists with fewer than two items have loss 0 and
gradient 0. A masked slot is never read into arithmetic. A score of -inf above finite ones makes the loss +inf and
keeps a finite gradient, -W; alone at the bottom it costs nothing, and several are equal scores. A score of inf makes
the loss NaN.

`cpu.py` and `gpu.py` say how either machine computes it.
"""

from functools import partial

import torch
from torch import Tensor

from mopl._arguments import KNOWN, check_choice, check_device, or_nan, readable, shape_of
from mopl._renamed import renamed_keywords
from mopl.ops import _derivatives as derivatives
from mopl.ops._backend import path_for, use_triton
from mopl.ops._rows import check_list_op
from mopl.ops.plackett_luce import cpu
from mopl.ops.plackett_luce.formula import formula
from mopl.ops.plackett_luce.rankings import Lists, Rule, new_results

TIES = ("breslow", "efron", "exact")


@renamed_keywords(temperature="beta")
def plackett_luce_nll(
    scores: Tensor,  # (B, K)
    labels: Tensor,  # (B, m, K)
    beta: Tensor,  # (B, m), or (B, 1) where it is common to all objectives
    mask: Tensor | None = None,  # (B, K) bool
    order: Tensor | None = None,  # (B, m, K) integer
    position_weights: Tensor | None = None,  # (K,) or (B, m, K), in the order of the positions
    top_k: int | None = None,
    ties: str = "breslow",
    last_group_free: bool = False,
) -> Tensor:
    """Return the negative log-likelihood (B, m) in nats; differentiable in scores and beta.

    Args:
        scores: (B, K), any floating dtype; arithmetic is in float32, in float64 for float64.
        labels: (B, m, K) of any dtype, higher is better, equal is tied; a NaN is an error on a
            CPU, and makes the loss of its list NaN elsewhere.
        beta: (B, m), or (B, 1) for one β a list.
        mask: (B, K), true where an item exists; None means everywhere.
        order: (B, m, K) indices of the items, best first, masked items last; None sorts the labels here.
        position_weights: (K,) or (B, m, K), the weight of the choice made at each position; None means 1.
        top_k: charge only groups that start before this position; None charges all.
        ties: "breslow", "efron" or "exact".
        last_group_free: do not charge the lowest group: its items are an unranked tail.

    Returns:
        (B, m) in the dtype of the arithmetic.

    Raises:
        TypeError: if scores are not floating point, the mask is not boolean or the order is not integer.
        ValueError: if a shape does not fit, nothing is broadcast here; if `ties` is unknown; or, on a CPU, if β is not
            finite or a label or a position weight is NaN.
    """
    check_list_op(scores, labels, beta, mask, KNOWN)
    check_choice(ties, TIES, "ties")
    check_positions(order, position_weights, labels, mask)
    rule = Rule(top_k, ties, last_group_free)
    return nll(Lists(scores, labels, beta, mask, order, position_weights, rule))


def check_positions(order: Tensor | None, position_weights: Tensor | None, labels: Tensor, mask: Tensor | None) -> None:
    """Raise unless an order and weights of positions are tensors that fit labels (B, m, K); none of these may be NaN.

    What stands at positions that a list lacks is not read.
    """
    if order is not None:
        is_tensor = isinstance(order, Tensor)
        if not is_tensor or order.dtype == torch.bool or order.is_floating_point() or order.is_complex():
            kind = f"dtype {order.dtype}" if is_tensor else f"type {type(order).__name__}"
            raise TypeError(f"order has {kind} but must be a tensor of integer indices; use mopl.losses.presort")
        if order.shape != labels.shape:
            raise ValueError(
                f"order has shape {shape_of(order)} but labels are {shape_of(labels)}; "
                "pass presort(labels, mask), one index an item and objective"
            )
        check_device(order, "order", labels, "labels")
    if position_weights is not None:
        is_tensor = isinstance(position_weights, Tensor)
        if not is_tensor or position_weights.shape not in (labels.shape, labels.shape[-1:]):
            got = f"has shape {shape_of(position_weights)}" if is_tensor else f"is a {type(position_weights).__name__}"
            raise ValueError(
                f"position_weights {got} but labels are {shape_of(labels)}; "
                f"pass a tensor (K,) or (B, m, K): ({labels.shape[-1]},) or {shape_of(labels)}"
            )
        check_device(position_weights, "position_weights", labels, "labels")
        if readable(position_weights) and (mask is None or readable(mask)):
            unknown = position_weights.isnan()
            if mask is not None:
                place = torch.arange(mask.shape[1], device=mask.device)
                unknown = unknown & (place < mask.sum(-1)[:, None, None])
            if bool(unknown.any()):
                raise ValueError("position_weights hold nan but every entry must be a number; pass 0 for no weight")


def check_ends(order: Tensor, labels: Tensor, mask: Tensor | None) -> None:
    """Raise if the first item of a list has a lower label than its last, or one of the two does not exist.

    That is cheap, where a look at all of an order would cost what it saves. It finds an order for another direction or
    another mask, and in a batch ranks that were taken for an order. The op takes any order.
    """
    if not order.numel() or (items := order.shape[-1]) < 2:
        return
    if not (readable(order) and readable(labels) and (mask is None or readable(mask))):
        return
    if mask is None:
        ends = order[..., :: items - 1]  # (B, m, 2)
    else:
        last = (mask.sum(-1) - 1).clamp(min=0)
        place = torch.stack([torch.zeros_like(last), last], -1)[:, None, :]
        ends = order.gather(-1, place.expand(*labels.shape[:2], 2))
    key = labels.detach() if labels.is_floating_point() else labels.long()  # torch does not gather all integers
    found = key.gather(-1, ends.long())
    bad = found[..., 0] < found[..., 1]
    if mask is not None:
        there = mask[:, None, :].expand(labels.shape).gather(-1, ends.long()).all(-1)
        bad = (bad | ~there) & (last[:, None] > 0)
    if bool(bad.any()):
        row, objective = bad.nonzero()[0].tolist()
        begin, end = ends[row, objective].tolist()
        raise ValueError(
            f"order of list {row} and objective {objective} goes from item {begin} to item {end}, which has a higher "
            "label, or one of them is masked; items must stand best first and masked ones last: pass "
            "presort(labels, mask)"
        )


def nll(given: Lists) -> Tensor:
    """Return what `plackett_luce_nll` does, of arguments that its caller has checked."""
    scores, labels, beta, mask, order, position_weights, rule = given
    position_weights = None if position_weights is None else position_weights.detach()
    if derivatives.transformed():
        return formula(given._replace(labels=labels.detach(), position_weights=position_weights))
    need_grad = torch.is_grad_enabled() and (scores.requires_grad or beta.requires_grad)
    need_beta = need_grad and beta.requires_grad
    loss = _plackett_luce_nll(scores, labels, beta, mask, order, position_weights, *rule, need_grad, need_beta)[0]
    # The kernels see what is NaN while they have the labels at hand; a look of its own costs as much as the loss.
    return loss if use_triton(scores) else or_nan(loss, labels, mask)


_path = partial(path_for, cpu, "mopl.ops.plackett_luce.gpu")


@torch.library.custom_op("mopl::plackett_luce_nll", mutates_args=())
def _plackett_luce_nll(
    scores: Tensor,
    labels: Tensor,
    beta: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    position_weights: Tensor | None,
    top_k: int | None,
    ties: str,
    last_group_free: bool,
    need_grad: bool,
    need_beta: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss (B, m), gradient (B, m, K), beta_gradient (B, m); the last two are empty if not needed.

    On a CPU the last says where the loss is infinite: the gradient of β costs as much when it is asked for.
    """
    given = Lists(scores, labels, beta, mask, order, position_weights, Rule(top_k, ties, last_group_free))
    return _path(scores).forward(given, need_grad, need_grad and need_beta)


@_plackett_luce_nll.register_fake
def _(scores, labels, beta, mask, order, position_weights, top_k, ties, last_group_free, need_grad, need_beta=True):
    return new_results(scores, labels, need_grad, need_grad and need_beta)


@torch.library.custom_op("mopl::plackett_luce_nll_backward", mutates_args=())
def _plackett_luce_nll_backward(
    grad_loss: Tensor,  # (B, m)
    beta: Tensor,  # (B, m) or (B, 1)
    gradient: Tensor,  # (B, m, K)
) -> Tensor:
    """Return sum_j grad_loss_bj beta_bj gradient_bji: (B, K) in the dtype of `gradient`."""
    return _path(gradient).backward(grad_loss, beta, gradient)


@_plackett_luce_nll_backward.register_fake
def _(grad_loss, beta, gradient):
    return gradient.new_empty((gradient.shape[0], gradient.shape[2]))


def _setup_context(ctx, inputs, output):
    scores, labels, beta, mask, order, position_weights, *options, ctx.need_grad, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.rule = Rule(*options)
    ctx.save_for_backward(scores, beta, mask, *output[1:])
    derivatives.keep(ctx, labels, order, position_weights)


def _backward(ctx, grad_loss, *_):
    if not ctx.need_grad:
        raise RuntimeError("plackett_luce_nll was called with need_grad=False, so it kept nothing for backward")
    scores, beta, mask, gradient, beta_gradient = ctx.saved_tensors
    labels, *rest = derivatives.kept(ctx)
    need = ctx.needs_input_grad

    def closed_form() -> tuple[Tensor | None, Tensor | None]:
        dscores = dbeta = None
        if need[0]:
            dscores = _plackett_luce_nll_backward(grad_loss, beta, gradient).to(scores.dtype)
        if need[2]:
            of_beta = beta_gradient
            if not use_triton(scores):
                of_beta = cpu.beta_gradient(beta_gradient, gradient, scores, mask)
            dbeta = (grad_loss * of_beta).sum_to_size(beta.shape).to(beta.dtype)
        return dscores, dbeta

    def plain(*arguments: Tensor) -> Tensor:
        return formula(Lists(*arguments, rule=ctx.rule))

    arguments = (scores, labels, beta, mask, *rest)
    return derivatives.gradients(ctx, (0, 2), (grad_loss,), closed_form, plain, arguments)


_plackett_luce_nll.register_autograd(_backward, setup_context=_setup_context)
