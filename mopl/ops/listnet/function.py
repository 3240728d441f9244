"""Listwise cross-entropy (ListNet, the training loss of COS-DPO): m label distributions over one list of scores.

For list b and objective j, with `u = beta * scores` and `z` the labels (divided by their sum if `normalize`):

    loss_bj = sum_i z_i (logsumexp(u) - u_i),   q = softmax(u),   M = sum_i z_i
    dloss/du_i = M q_i - z_i,   dloss/dbeta = sum_i (M q_i - z_i) scores_i,   dloss/dz_i = logsumexp(u) - u_i

Written so that a tiny loss keeps every digit. Let a be the first item with the largest u (the *peak*), `rest` the sum
of exp(u_i - u_a) over the other items and `others` the sum of z_i over the other items. Then nothing below is a
difference of numbers that close in on each other as the model becomes confident:

    loss = M log1p(rest) + sum_{i != a} z_i (u_a - u_i)
    dloss/du_i = M exp(u_i - u_a) / (1 + rest) - z_i       for i != a
    dloss/du_a = others - M rest / (1 + rest)   where rest < 1, else M / (1 + rest) - z_a
    dloss/dbeta = sum_{i != a} dloss/du_i (scores_i - scores_a)           (because the gradient sums to 0)

Lists with fewer than two items, and with `normalize` also lists whose labels are all 0, have loss 0 and gradient 0.
Without `normalize` the loss is linear in the labels: no labels, no loss, and labels of either sign count. A masked slot
is never read into arithmetic. A label of exactly 0 contributes 0 even where the score is -inf; an item with score -inf
and a positive label makes the loss +inf and keeps a finite gradient.

Forward also *saves* what backward needs: `peak` of the shape of `beta`, (B, 1) where it is common to all objectives, so
that one softmax serves them all, and `mass` (B, m), the sum of the labels as given. The kernels save `rest`, like
`peak`, and `others` (B, m), the labels off the peak, too, and compute the exponentials again in backward; of lists that
one program holds in registers these four too: they are empty then. On CPU, where memory is not the limit, log softmax
itself is kept, `logp` (B, 1, K) or (B, m, K): the plain formula with torch's fused softmax serves all lists in which no
item is likely, and only the others, *confident* lists, are done again as above. There `peak` is -1 for a list that is
not confident, and `rest` and `others` are empty, as `logp` is with the kernels.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mopl._arguments import FINITE, NOT_INFINITE, compute_dtype
from mopl._renamed import renamed_keywords
from mopl.ops import _derivatives as derivatives
from mopl.ops._backend import path_for
from mopl.ops._rows import check_list_op, existing
from mopl.ops.listnet import cpu


@renamed_keywords(temperature="beta")
def listwise_cross_entropy(
    scores: Tensor,  # (B, K)
    labels: Tensor,  # (B, m, K)
    beta: Tensor,  # (B, m), or (B, 1) where it is common to all objectives
    mask: Tensor | None = None,  # (B, K) bool
    normalize: bool = True,
) -> Tensor:
    """Return the listwise cross-entropy (B, m) in nats; differentiable in scores, labels and beta.

    Args:
        scores: (B, K), any floating dtype; arithmetic is in float32, in float64 for float64.
        labels: (B, m, K), the target weight of every item, finite, and not negative if `normalize`: another one is an
            error on a CPU, and makes the losses of its list NaN on a GPU and in the transforms of `torch.func`.
        beta: (B, m), or (B, 1) for one β a list: then one softmax serves all objectives.
        mask: (B, K), true where an item exists; None means everywhere.
        normalize: divide each list's labels by their sum.

    Returns:
        (B, m) in the dtype of the arithmetic.

    Raises:
        TypeError: if scores are not floating point or the mask is not boolean.
        ValueError: if a shape does not fit, nothing is broadcast here; or, on a CPU, if β or a label is NaN or infinite
            or, with `normalize`, a label is negative.
    """
    check_list_op(scores, labels, beta, mask, NOT_INFINITE if normalize else FINITE)
    return cross_entropy(scores, labels, beta, mask, normalize)


def cross_entropy(scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    """Return what `listwise_cross_entropy` does, of arguments that its caller has checked."""
    if derivatives.transformed():
        return _formula(scores, labels, beta, mask, normalize=normalize)
    if derivatives.undispatched(scores, labels, beta, mask):
        return _Undispatched.apply(scores, labels, beta, mask, normalize)[0]  # pyright: ignore[reportReturnType]
    return _listwise_cross_entropy(scores, labels, beta, mask, normalize)[0]


def _formula(scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    """Return the loss in differentiable functions of PyTorch, for the derivatives that the op itself does not give."""
    dtype = compute_dtype(scores)
    if labels.shape[-1] < 2 or labels.numel() == 0:
        return scores.new_zeros(labels.shape[:2], dtype=dtype)
    valid = existing(mask)
    s, z = scores.to(dtype), labels.to(dtype)
    if valid is not None:
        s, z = torch.where(valid, s, 0), torch.where(valid[:, None], z, 0)
    if normalize:
        z = torch.where(z < 0, torch.nan, z)  # a transform has no value that an error could be raised for
    mass = z.sum(-1, keepdim=True)
    charged = ~(mass <= 0) if normalize else torch.ones_like(mass, dtype=torch.bool)
    if normalize:
        z = torch.where(charged, z / torch.where(charged, mass, 1), 0)
    # Lists that cost nothing may hold NaN.
    s = torch.where(charged.any(1), s, 0)
    rate = beta.to(dtype)[:, :, None]
    # What lies infinitely far below the likeliest item costs infinitely much.
    way = s.detach()[:, None] * rate.detach().sign()
    if valid is not None:
        way = torch.where(valid[:, None], way, -torch.inf)
    top = way.amax(-1, keepdim=True)
    hopeless = (way < top) & ((way == -torch.inf) | (top == torch.inf))
    infinite = s.isinf()
    absent = infinite if valid is None else infinite | ~valid
    origin = torch.where(absent, -torch.inf, s.detach()).amax(-1, keepdim=True)
    s, beyond = derivatives.finite(s)
    away = torch.where(infinite | origin.isinf(), s, s - origin)
    u = rate * away[:, None] + rate.detach().sign() * beyond[:, None]
    if valid is not None:
        u = torch.where(valid[:, None], u, torch.finfo(dtype).min / 2)
    logp = derivatives.log_softmax(u)
    if valid is not None:
        logp = torch.where(valid[:, None], logp, 0)
    lost = torch.where(hopeless & (z != 0), z.detach() * torch.inf, 0).sum(-1)
    # Not a constant: where a loss is infinite, so is its derivative in β.
    return torch.where(charged[..., 0], rate[..., 0].abs() * lost - (z * logp).sum(-1), 0)


_path = partial(path_for, cpu, "mopl.ops.listnet.gpu")


def _forward(
    scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, peak, rest, mass, others and logp."""
    loss, saved = _path(scores).forward(scores, labels, beta, mask, normalize)
    return loss, *saved


_listwise_cross_entropy = torch.library.custom_op("mopl::listwise_cross_entropy", _forward, mutates_args=())


@_listwise_cross_entropy.register_fake
def _(scores, labels, beta, mask, normalize):
    loss = scores.new_empty(labels.shape[:2], dtype=compute_dtype(scores))
    return loss, *_path(scores).new_saved(loss, labels, beta)


def _gradients(
    grad_loss: Tensor,  # (B, m)
    scores: Tensor,
    labels: Tensor,
    beta: Tensor,
    mask: Tensor | None,
    loss: Tensor,
    peak: Tensor,
    rest: Tensor,
    mass: Tensor,
    others: Tensor,
    logp: Tensor,
    normalize: bool,
    need_scores: bool,
    need_labels: bool,
    need_beta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of scores, labels and beta in their dtypes; one that is not needed is empty (0,)."""
    saved, need = (peak, rest, mass, others, logp), (need_scores, need_labels, need_beta)
    return _path(scores).backward(grad_loss, scores, labels, beta, mask, loss, saved, normalize, need)


_listwise_cross_entropy_backward = torch.library.custom_op(
    "mopl::listwise_cross_entropy_backward", _gradients, mutates_args=()
)


@_listwise_cross_entropy_backward.register_fake
def _(grad_loss, scores, labels, beta, mask, loss, peak, rest, mass, others, logp, normalize, *need):
    return tuple(
        x.new_empty(x.shape if needed else (0,)) for x, needed in zip((scores, labels, beta), need, strict=True)
    )


def _setup_context(ctx, inputs, output):
    scores, labels, beta, mask, ctx.normalize = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, labels, beta, mask, *output)


def _backward(ctx, grad_loss, *_, compute: Callable = _listwise_cross_entropy_backward):
    saved = ctx.saved_tensors
    closed_form = partial(compute, grad_loss, *saved, ctx.normalize, *ctx.needs_input_grad[:3])
    formula = partial(_formula, normalize=ctx.normalize)
    return derivatives.gradients(ctx, (0, 1, 2), (grad_loss,), closed_form, formula, saved[:4])


_listwise_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


class _Undispatched(torch.autograd.Function):
    """The op on plain tensors of a CPU, where the detour over the dispatcher would be a fourth of a small call."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[override]
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *upstream):  # type: ignore[override]
        plain = derivatives.undispatched(upstream[0])
        return _backward(ctx, *upstream, compute=_gradients if plain else _listwise_cross_entropy_backward)
