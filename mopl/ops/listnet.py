"""Listwise cross-entropy (ListNet, the training loss of COS-DPO): m label distributions over one list of scores.

For list b and objective j, with `u = temperature * scores` and `z` the labels (divided by their sum if `normalize`):

    loss_bj = sum_i z_i (logsumexp(u) - u_i),   q = softmax(u),   M = sum_i z_i
    dloss/du_i = M q_i - z_i,   dloss/dtemperature = sum_i (M q_i - z_i) scores_i,   dloss/dz_i = logsumexp(u) - u_i

Written so that a tiny loss keeps every digit. Let a be the first item with the largest u (the *peak*), `rest` the sum
of exp(u_i - u_a) over the other items and `others` the sum of z_i over the other items. Then nothing below is a
difference of numbers that close in on each other as the model becomes confident:

    loss = M log1p(rest) + sum_{i != a} z_i (u_a - u_i)
    dloss/du_i = M exp(u_i - u_a) / (1 + rest) - z_i       for i != a
    dloss/du_a = others - M rest / (1 + rest)   where rest < 1, else M / (1 + rest) - z_a
    dloss/dtemperature = sum_{i != a} dloss/du_i (scores_i - scores_a)           (because the gradient sums to 0)

Lists with fewer than two items, and with `normalize` also lists whose labels are all 0, have loss 0 and gradient 0.
Without `normalize` the loss is linear in the labels: no labels, no loss, and labels of either sign count. A masked slot
is never read into arithmetic. A label of exactly 0 contributes 0 even where the score is -inf; an item with score -inf
and a positive label makes the loss +inf and keeps a finite gradient.

Forward also gives what backward needs: `peak` and `rest` of the shape of `temperature`, (B, 1) where it is common to
all objectives, so that one softmax serves them all; `mass` (B, m), the sum of the labels as given, and `others` (B, m),
the part of it off the peak. The kernels compute the exponentials again in backward. On CPU, where memory is not the
limit, log softmax itself is kept, (B, 1, K) or (B, m, K): the plain formula with torch's fused softmax serves all
lists in which no item is likely, and only the others, *confident* lists, are done again as above. There `peak` is -1
for a list that is not confident, and `rest` and `others` are empty, as `logp` is with the kernels.
"""

from functools import partial

import torch
from torch import Tensor

from mopl._arguments import compute_dtype, refuse_negative
from mopl.ops import _derivatives as derivatives
from mopl.ops._backend import use_triton
from mopl.ops._rows import (
    blocks,
    check_list_op,
    existing,
    in_full_precision,
    is_number,
    log_softmax,
    log_softmax_backward,
    maybe_confident,
    merge,
    row_dot,
    row_sum,
)


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
        labels: (B, m, K), the target weight of every item, not negative if `normalize`: a negative one is an error on
            a CPU, and makes the losses of its list NaN on a GPU and in the transforms of `torch.func`.
        temperature: (B, m), or (B, 1) for one temperature a list: then one softmax serves all objectives.
        mask: (B, K), true where an item exists; None means everywhere.
        normalize: divide each list's labels by their sum.

    Returns:
        (B, m) in the dtype of the arithmetic.

    Raises:
        TypeError: if scores are not floating point or the mask is not boolean.
        ValueError: if a shape does not fit, nothing is broadcast here; or if a label is negative with `normalize`.
    """
    check_list_op(scores, labels, temperature, mask)
    if derivatives.transformed():
        return _formula(scores, labels, temperature, mask, normalize=normalize)
    return _listwise_cross_entropy(scores, labels, temperature, mask, normalize)[0]


def _formula(scores: Tensor, labels: Tensor, temperature: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
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
    rate = temperature.to(dtype)[:, :, None]
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
    return torch.where(charged[..., 0], lost - (z * logp).sum(-1), 0)


@torch.library.custom_op("mopl::listwise_cross_entropy", mutates_args=())
def _listwise_cross_entropy(
    scores: Tensor, labels: Tensor, temperature: Tensor, mask: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, peak, rest, mass, others and logp."""
    if use_triton(scores):
        from mopl.ops.listnet_triton import launch_forward

        loss, peak, rest, mass, others = launch_forward(scores, labels, temperature, mask, normalize)
        return loss, peak, rest, mass, others, loss.new_empty(0)
    loss, peak, mass, logp = _forward_cpu(scores, labels, temperature, mask, normalize)
    return loss, peak, loss.new_empty(0), mass, loss.new_empty(0), logp


@_listwise_cross_entropy.register_fake
def _(scores, labels, temperature, mask, normalize):
    batch, objectives, size = labels.shape
    shared = (batch, temperature.shape[1])
    kernels, dtype = use_triton(scores), compute_dtype(scores)

    def new(shape, dtype=dtype):
        return scores.new_empty(shape, dtype=dtype)

    return (
        new((batch, objectives)),
        new(shared, torch.int64),
        new(shared if kernels else (0,)),
        new((batch, objectives)),
        new((batch, objectives) if kernels else (0,)),
        new((0,) if kernels else (*shared, size)),
    )


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
    logp: Tensor,
    normalize: bool,
    need_scores: bool,
    need_labels: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of scores, labels and temperature in their dtypes; one that is not needed is empty (0,)."""
    inputs = (grad_loss, scores, labels, temperature, mask)
    need = (need_scores, need_labels, need_temperature)
    if use_triton(scores):
        from mopl.ops.listnet_triton import launch_backward

        return launch_backward(*inputs, loss, peak, rest, mass, others, normalize, *need)
    return _backward_cpu(*inputs, loss, peak, mass, logp, normalize, *need)


@_listwise_cross_entropy_backward.register_fake
def _(
    grad_loss, scores, labels, temperature, mask, loss, peak, rest, mass, others, logp,
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
    need, saved = ctx.needs_input_grad[:3], ctx.saved_tensors

    def closed_form() -> list[Tensor | None]:
        found = _listwise_cross_entropy_backward(grad_loss, *saved, ctx.normalize, *need)
        return [g if needed else None for g, needed in zip(found, need, strict=True)]

    formula = partial(_formula, normalize=ctx.normalize)
    return *derivatives.gradients(closed_form, formula, saved[:4], (0, 1, 2), need, (grad_loss,)), None, None


_listwise_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


# A list is confident where its most likely item has at least this log probability. Below it the plain formula is off
# by a float32 rounding (6e-8) in a loss of at least 0.1, which is inside 1e-6 relative.
_CONFIDENT = -0.1


@in_full_precision
def _forward_cpu(
    scores: Tensor, labels: Tensor, temperature: Tensor, mask: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, peak, mass, logp); `mass` is 0 without `normalize`."""
    batch, objectives, size = labels.shape
    shared = temperature.shape[1]
    dtype = compute_dtype(scores)
    loss, mass = (scores.new_zeros((batch, objectives), dtype=dtype) for _ in range(2))
    peak = scores.new_full((batch, shared), -1, dtype=torch.int64)
    logp = scores.new_empty((batch, shared, size), dtype=dtype)
    if size < 2 or labels.numel() == 0:
        return loss, peak, mass, logp.zero_()
    valid = existing(mask)
    doubtful = []
    for part in blocks(batch, objectives * size):
        some = None if valid is None else valid[part]
        z, rows = _labels(labels[part], some, dtype), logp[part]
        log_softmax(_logits(scores[part], temperature[part], some, dtype), out=rows)
        if normalize:
            refuse_negative(z, "normalize='l1'", first=part.start)
            mass[part] = row_sum(z)
        dot = row_dot(z, rows)
        loss[part] = _weigh(dot, mass[part] if normalize else None)
        dot = dot.view(len(dot), shared, -1)
        # Rows that the plain formula does not serve: confident ones, and any that hold -inf, inf or NaN.
        doubt = maybe_confident(rows, _CONFIDENT, valid is not None)
        doubt |= ~(dot[..., 0] if dot.shape[-1] == 1 else row_sum(dot)).isfinite()
        doubtful.append(doubt.view(-1).nonzero()[:, 0] + part.start * shared)
    row = torch.cat(doubtful)
    if len(row):
        # One row is one softmax: list `item` with all objectives, or with objective `which` where temperatures differ.
        item, which = row // shared, slice(None) if shared == 1 else row % shared
        some = None if valid is None else valid[item]
        logits = _logits(scores[item], temperature.reshape(-1, 1)[row], some, dtype, careful=True)
        first = logits.max(-1, keepdim=True).indices
        rest = row_sum(logits.exp().scatter_(-1, first, 0))[..., None]
        log_total = torch.log1p(rest)
        rows = (logits - log_total).scatter_(-1, first, -log_total)
        z = _labels(labels[item, which].view(len(row), -1, size), some, dtype)
        if normalize:  # before the product, which may then be as large as a score
            whole = mass[item, which].view(len(row), -1, 1)
            z = torch.where(whole <= 0, 0, z / whole)
        dot = torch.where(z == 0, 0, z * rows).sum(-1)
        loss[item, which] = -dot.view(loss[item, which].shape)
        logp.view(batch * shared, size)[row] = rows[:, 0]
        peak.view(-1)[row] = torch.where(rest < 1, first, -1)[:, 0, 0]
    return loss, peak, mass, logp


def _weigh(dot: Tensor, mass: Tensor | None) -> Tensor:
    """Return the loss: minus the product of labels and log probabilities, divided by the mass of the labels."""
    return -dot if mass is None else torch.div(dot, mass).neg_().masked_fill_(mass <= 0, 0)


def _labels(labels: Tensor, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return labels (n, m, K) in the dtype of the arithmetic, 0 where masked."""
    labels = labels.to(dtype)
    return labels if valid is None else labels.masked_fill(~valid[:, None], 0)


def _logits(
    scores: Tensor, temperature: Tensor, valid: Tensor | None, dtype: torch.dtype, careful: bool = False
) -> Tensor:
    """Return temperature * scores (n, m, K) or (n, 1, K) up to a constant a row; `careful` makes the largest exactly 0.

    The largest score is subtracted before the temperature multiplies: the difference of close floats is exact, so a
    common offset of all scores costs no digits. Masked slots hold a number that no sum can notice.
    """
    scores = scores.to(dtype)[:, None]
    lowest = torch.finfo(dtype).min / 2
    uniform = is_number(temperature)
    if uniform and not careful and float(temperature[0, 0]) == 1:
        return scores if valid is None else scores.masked_fill(~valid[:, None], lowest)
    rate = temperature[0, 0] if uniform else temperature[:, :, None]
    if bool((temperature < 0).any()):
        scores, rate = scores * rate.sign() + 0.0, rate.abs()
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    logits = scores - top
    if careful:
        logits.masked_fill_(scores == top, 0)  # where -inf is the largest
    logits = logits * rate
    return logits if valid is None else logits.masked_fill_(~valid[:, None], lowest)


@in_full_precision
def _backward_cpu(
    grad_loss: Tensor, scores: Tensor, labels: Tensor, temperature: Tensor, mask: Tensor | None, loss: Tensor,
    peak: Tensor, mass: Tensor, logp: Tensor,
    normalize: bool, need_scores: bool, need_labels: bool, need_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of scores, labels and temperature; one that is not needed is empty."""
    batch, objectives, size = labels.shape
    dtype = loss.dtype
    new = torch.zeros if size < 2 or labels.numel() == 0 else torch.empty
    du = new((batch, temperature.shape[1], size), dtype=dtype)  # upstream gradient of u, summed over equal temperatures
    dlabels = new(labels.shape if need_labels else (0,), dtype=labels.dtype)
    if size >= 2 and labels.numel():
        valid = existing(mask)
        share = -grad_loss.to(dtype)  # minus the upstream gradient of a label's share in the loss
        if normalize:
            share = torch.where(mass <= 0, 0, share / mass)
        for part in blocks(batch, objectives * size):
            if need_labels:
                dz = logp[part] + loss[part][:, :, None] if normalize else logp[part]
                dz = share[part][:, :, None] * dz
                dlabels[part] = dz if valid is None else dz.masked_fill_(~valid[part][:, None], 0)
            if need_scores or need_temperature:
                z = _labels(labels[part], None if valid is None else valid[part], dtype)
                g = merge(share[part], z)[:, None] if du.shape[1] == 1 else share[part][:, :, None] * z
                log_softmax_backward(g, logp[part], out=du[part])
        if need_scores or need_temperature:
            _sharpen(du, peak)
            dead = (mass <= 0).all(-1).nonzero()[:, 0] if normalize else peak.new_empty(0)
            if len(dead):  # lists without labels, which may hold NaN
                du[dead] = 0
    dtemperature = du.new_empty(0)
    if need_temperature:
        s = scores.to(dtype)
        s = s if mask is None else s.masked_fill(~mask, -torch.inf)
        away = s - s.amax(-1, keepdim=True) if size else s  # du sums to 0, so the origin of the scores is free
        dtemperature = torch.where(du == 0, 0, du * away[:, None]).sum(-1)
    dscores = _times_temperature(du, temperature) if need_scores else du.new_empty(0)
    return dscores.to(scores.dtype), dlabels, dtemperature.to(temperature.dtype)


def _times_temperature(du: Tensor, temperature: Tensor) -> Tensor:
    """Return sum_j temperature_j du_j (B, K); `du` may be overwritten."""
    if du.shape[1] > 1:
        return merge(temperature, du)
    du = du[:, 0]
    if is_number(temperature):
        return du if float(temperature[0, 0]) == 1 else du.mul_(temperature[0, 0])
    return du.mul_(temperature)


def _sharpen(du: Tensor, peak: Tensor) -> None:
    """Set the gradient at the peak of confident lists to minus the sum of the others, which keeps every digit."""
    index = (peak >= 0).nonzero(as_tuple=True)
    if len(index[0]):
        rows, at = du[index], peak[index][:, None]
        du[index] = rows.scatter_(-1, at, 0).scatter_(-1, at, -row_sum(rows)[:, None])
