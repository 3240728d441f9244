"""Listwise cross-entropy (ListNet, the training loss of COS-DPO): m label distributions over one list of scores.

For list b and objective j, with `u = temperature * scores` and `z` the labels (divided by their sum if `normalize`):

    loss_bj = sum_i z_i (logsumexp(u) - u_i),   q = softmax(u),   M = sum_i z_i
    dloss/du_i = M q_i - z_i,   dloss/dtemperature = sum_i (M q_i - z_i) scores_i,   dloss/dz_i = logsumexp(u) - u_i

Written so that a tiny loss keeps every digit. Let a be the first item with the largest u (the *peak*), `rest` the sum
of exp(u_i - u_a) over the other items and `others` the sum of z_i over the other items. Then every term below has one
sign and nothing is a difference of close numbers:

    loss = M log1p(rest) + sum_{i != a} z_i (u_a - u_i)
    dloss/du_i = M exp(u_i - u_a) / (1 + rest) - z_i       for i != a
    dloss/du_a = others - M rest / (1 + rest)
    dloss/dtemperature = sum_{i != a} dloss/du_i (scores_i - scores_a)           (because the gradient sums to 0)

Lists with fewer than two items, and with `normalize` also lists whose label sum is not positive, have loss 0 and
gradient 0. Without `normalize` the loss is linear in the labels: no labels, no loss, and labels of either sign count.
A masked slot is never read into arithmetic. A label of exactly 0 contributes 0 even where the score is -inf; an item
with score -inf and a positive label makes the loss +inf and keeps a finite gradient.

The forward pass gives (loss, peak, rest, mass, others), all of shape (B, m), but (B, 1) for `peak` and `rest` where
the temperature is common to all objectives: (B, 1) instead of (B, m). One softmax then serves every objective.
`mass` is the sum of the labels as given, `others` the part of it off the peak; neither is divided by the mass.
The backward pass computes the exponentials again: that costs as much as reading saved ones from memory.
"""

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.ops._backend import use_triton


def listwise_cross_entropy(
    scores: Tensor,  # (B, K)
    labels: Tensor,  # (B, m, K)
    temperature: Tensor,  # (B, m), or (B, 1) where it is common to all objectives
    mask: Tensor | None = None,  # (B, K) bool
    normalize: bool = True,
) -> Tensor:
    """Return the listwise cross-entropy (B, m) in nats; differentiable in scores, labels and temperature.

    Args:
        scores: (B, K), any floating dtype; arithmetic is in float32, in float64 for float64.
        labels: (B, m, K), the target weight of every item, not negative if `normalize`.
        temperature: (B, m), or (B, 1) for one temperature a list: then one softmax serves all objectives.
        mask: (B, K), true where an item exists; None means everywhere.
        normalize: divide each list's labels by their sum.

    Returns:
        (B, m) in the dtype of the arithmetic.
    """
    return _listwise_cross_entropy(scores, labels, temperature, mask, normalize)[0]


@torch.library.custom_op("mopl::listwise_cross_entropy", mutates_args=())
def _listwise_cross_entropy(
    scores: Tensor, labels: Tensor, temperature: Tensor, mask: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if use_triton(scores):
        from mopl.ops.listnet_triton import launch_forward

        return launch_forward(scores, labels, temperature, mask, normalize)
    return _forward_cpu(scores, labels, temperature, mask, normalize)


@_listwise_cross_entropy.register_fake
def _(scores, labels, temperature, mask, normalize):
    batch, objectives, _ = labels.shape
    dtype = compute_dtype(scores)
    loss = scores.new_empty((batch, objectives), dtype=dtype)
    peak = scores.new_empty((batch, temperature.shape[1]), dtype=torch.int64)
    return loss, peak, torch.empty_like(peak, dtype=dtype), torch.empty_like(loss), torch.empty_like(loss)


@torch.library.custom_op("mopl::listwise_cross_entropy_backward", mutates_args=())
def _listwise_cross_entropy_backward(
    grad_loss: Tensor,  # (B, m)
    scores: Tensor,
    labels: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    loss: Tensor,
    peak: Tensor,
    rest: Tensor,
    mass: Tensor,
    others: Tensor,
    normalize: bool,
    need_scores: bool,
    need_labels: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of scores, labels and temperature in their dtypes; one that is not needed is empty (0,)."""
    if use_triton(scores):
        from mopl.ops.listnet_triton import launch_backward as backward
    else:
        backward = _backward_cpu
    return backward(
        grad_loss, scores, labels, temperature, mask, loss, peak, rest, mass, others,
        normalize, need_scores, need_labels, need_temperature,
    )  # fmt: skip


@_listwise_cross_entropy_backward.register_fake
def _(
    grad_loss, scores, labels, temperature, mask, loss, peak, rest, mass, others,
    normalize, need_scores, need_labels, need_temperature,
):  # fmt: skip
    def like(tensor: Tensor, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else (0,))

    return like(scores, need_scores), like(labels, need_labels), like(temperature, need_temperature)


def _setup_context(ctx, inputs, output):
    scores, labels, temperature, mask, ctx.normalize = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, labels, temperature, mask, *output)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return None, None, None, None, None
    need = ctx.needs_input_grad[:3]
    gradients = _listwise_cross_entropy_backward(grad_loss, *ctx.saved_tensors, ctx.normalize, *need)
    return (*(g if needed else None for g, needed in zip(gradients, need, strict=True)), None, None)


_listwise_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def _forward_cpu(
    scores: Tensor, labels: Tensor, temperature: Tensor, mask: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, peak, rest, mass, others)."""
    raise NotImplementedError


def _backward_cpu(
    grad_loss: Tensor, scores: Tensor, labels: Tensor, temperature: Tensor, mask: Tensor | None, loss: Tensor,
    peak: Tensor, rest: Tensor, mass: Tensor, others: Tensor,
    normalize: bool, need_scores: bool, need_labels: bool, need_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of scores, labels and temperature; one that is not needed is empty."""
    raise NotImplementedError
