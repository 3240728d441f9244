"""The GPU path of Plackett-Luce: launches of its Triton kernels; arguments and results are those of `cpu.py`.

`mopl/kernels/plackett_luce_plan.py` says which kernel serves which list: one that holds whole lists in registers along
their order (given, or found on the GPU), one that takes short lists pair by pair and needs no order, and three that go
along lists of any length, with the state between them in memory.
"""

# Pyright takes a kernel for the plain function below `@triton.jit`.
# pyright: reportIndexIssue=false

import torch
import triton
from torch import Tensor

from mopl._arguments import unknown_labels
from mopl.kernels import list_order
from mopl.kernels import plackett_luce as pairwise
from mopl.kernels import plackett_luce_fused as fused
from mopl.kernels import plackett_luce_groups as groups
from mopl.kernels import plackett_luce_plan as plans
from mopl.kernels import plackett_luce_sorted as scans
from mopl.ops._rows import list_strides, rows_contiguous
from mopl.ops.plackett_luce.rankings import Lists, Rule, masked_lowest, new_results


def forward(given: Lists, need_grad: bool, need_beta: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, gradient and beta_gradient; the last two are empty if not needed."""
    scores, labels, beta, mask, order, position_weights, rule = given
    batch, objectives, items = labels.shape
    loss, gradient, beta_gradient = new_results(scores, labels, need_grad, need_beta)
    if items < 2 or labels.numel() == 0:
        return loss.zero_(), gradient.zero_(), beta_gradient.zero_()
    ordered = order is not None
    plan = plans.plan(items, loss.itemsize, rule.ties, position_weights is not None, ordered, labels.element_size())
    if ordered and plan.kernel != "fused":
        gradient.zero_()  # an order that leaves items out leaves their gradients unwritten
    labels, mask = rows_contiguous(labels), rows_contiguous(mask)
    if plan.sort == "argsort":
        order = _best_first(labels, mask)
    elif plan.sort == "kernel":
        order = _sorted(labels, mask)
    scores, order = rows_contiguous(scores), rows_contiguous(order)
    weights = None if position_weights is None else rows_contiguous(position_weights.expand(labels.shape))
    beta = beta.expand(batch, objectives)
    ranking = (scores, labels, beta, mask, order)
    results = (loss, gradient if need_grad else None, beta_gradient if need_beta else None)
    # No list has more positions than items, so this top_k charges all of them.
    top_k = items if rule.top_k is None else min(rule.top_k, items)
    strides = list_strides(scores, labels, beta, mask) + ((0, 0) if order is None else order.stride()[:2])
    weight_strides = (0, 0) if weights is None else weights.stride()[:2]
    with torch.cuda.device_of(scores):
        if plan.kernel == "pairs":
            pairwise.pairwise_kernel[(triton.cdiv(batch, plan.tile["LISTS"]),)](
                *ranking, weights, *results, batch, items, top_k, *strides, *weight_strides,
                M=objectives, EFRON=rule.ties == "efron", LAST_GROUP_FREE=rule.last_group_free, **plan.tile,
            )  # fmt: skip
        elif plan.kernel == "fused":
            fused.fused_kernel[(triton.cdiv(batch * objectives, plan.tile["LISTS"]),)](
                *ranking[:4], None if order is None else order.contiguous(), *results, batch * objectives, items,
                top_k if top_k < items else None, *strides[:-2],
                M=objectives, LAST_GROUP_FREE=rule.last_group_free, FILL=ordered or mask is not None, **plan.tile,
            )  # fmt: skip
        else:
            _by_steps(ranking, weights, results, rule._replace(top_k=top_k), strides, weight_strides)
    if plan.kernel != "fused" and labels.is_floating_point():  # which sees it for itself
        unknown = unknown_labels(labels, mask)
        loss.masked_fill_(unknown, torch.nan)
        if need_grad:
            gradient.masked_fill_(unknown[..., None], 0)
        if need_beta:
            beta_gradient.masked_fill_(unknown, 0)
    return loss, gradient, beta_gradient


def _by_steps(
    ranking: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],  # scores, labels, beta, mask, order
    weights: Tensor | None,
    results: tuple[Tensor, Tensor | None, Tensor | None],  # loss, gradient, beta_gradient
    rule: Rule,
    strides: tuple[int, ...],
    weight_strides: tuple[int, ...],
) -> None:
    """Write `results` by one kernel for each of the steps that `plackett_luce_sorted.py` describes."""
    labels, loss = ranking[1], results[0]
    batch, objectives, items = labels.shape
    efron, exact = rule.ties == "efron", rule.ties == "exact"

    def state(wanted: bool = True, dtype: torch.dtype = loss.dtype) -> Tensor | None:
        return torch.empty(labels.shape, dtype=dtype, device=loss.device) if wanted else None

    lists, tied = batch * objectives, efron or exact
    masses = (state(), state(), state(dtype=torch.int32))
    terms = (state(tied), state(tied), state(efron), state(weights is not None), state(exact))
    scans.suffix_kernel[plans.folded(lists)](
        *ranking, *masses, lists, items, *strides, M=objectives, **plans.scan_tile(items)
    )
    if tied or weights is not None:
        tile = plans.group_tile(items, exact)
        programs = lists * triton.cdiv(items, tile["SPAN"])
        groups.group_kernel[plans.folded(programs)](
            *ranking, weights, *masses, *terms, programs, items, rule.top_k, *strides, *weight_strides,
            M=objectives, EFRON=efron, EXACT=exact, **tile,
        )  # fmt: skip
    scans.chain_kernel[plans.folded(lists)](
        *ranking, weights, *masses, *terms, *results, lists, items, rule.top_k, *strides, *weight_strides,
        # In any order the lowest group comes last: ties="exact" never charges it.
        M=objectives, BOTTOM_FREE=rule.last_group_free or exact, **plans.scan_tile(items),
    )  # fmt: skip


def backward(grad_loss: Tensor, beta: Tensor, gradient: Tensor) -> Tensor:
    """Return sum_j grad_loss_bj beta_bj gradient_bji (B, K)."""
    batch, objectives, items = gradient.shape
    dscores = gradient.new_empty((batch, items))
    if gradient.numel() == 0:
        return dscores.zero_()
    gradient = gradient.contiguous()
    beta = beta.expand(batch, objectives)
    tile = plans.backward_tile(items)
    grid = (triton.cdiv(batch, tile["LISTS"]) * triton.cdiv(items, tile["BLOCK"]),)
    with torch.cuda.device_of(gradient):
        pairwise.backward_kernel[grid](
            grad_loss, beta, gradient, dscores, batch, items, *grad_loss.stride(), *beta.stride(),
            M=objectives, **tile,
        )  # fmt: skip
    return dscores


def _sorted(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Return the order (B, m, K) of falling labels, masked items last, in the fewest bytes that hold an index."""
    batch, objectives, items = labels.shape
    order = torch.empty(labels.shape, dtype=torch.uint8 if items <= 256 else torch.int16, device=labels.device)
    tile = plans.order_tile(items)
    with torch.cuda.device_of(labels):
        list_order.order_kernel[(triton.cdiv(batch * objectives, tile["LISTS"]),)](
            labels, mask, order, batch * objectives, items, *labels.stride()[:2],
            0 if mask is None else mask.stride(0), M=objectives, **tile,
        )  # fmt: skip
    return order


def _best_first(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Return the order (B, m, K) of falling labels, masked items last."""
    if mask is None:
        return (labels.to(torch.uint8) if labels.dtype == torch.bool else labels).argsort(-1, descending=True)
    return masked_lowest(labels, mask).argsort(-1, descending=True)
