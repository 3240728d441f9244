"""Derivatives of every op and loss: the second and third in reverse mode, the first and second in forward mode."""

from __future__ import annotations

import math

import pytest
import torch
from derivative_cases import (
    CASES,
    EXTREMES,
    F64,
    LABELS,
    MASK,
    WITHOUT,
    B,
    Case,
    Function,
    K,
    contractions,
    derivable,
    refused,
    tracked,
    with_oracle,
)
from torch import Tensor
from torch.autograd import forward_ad

import mopl.losses
import mopl.ops
from mopl import losses, ops, reference

# ---------------------------------------------------------------- the table is whole


def test_every_public_function_is_in_the_table() -> None:
    names = {name.split("-")[0] for name in CASES}
    assert set(mopl.losses.__all__) | set(mopl.ops.__all__) <= names | WITHOUT


def test_every_registered_op_is_reached_by_a_case() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for entry in CASES.values():
            entry(*tracked(entry.leaves())).sum().backward()
    reached = {event.key for event in profile.key_averages()}
    registered = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mopl::")}
    assert registered - reached == set()


# ---------------------------------------------------------------- second and third derivatives


@with_oracle
def test_derivatives_of_three_orders_are_those_of_the_plain_formula(name: str) -> None:
    entry = CASES[name]
    found = contractions(entry, entry.leaves(), 3)
    plain = Case(entry.oracle, entry.shapes)  # type: ignore[arg-type]
    expected = contractions(plain, entry.leaves(), 3)
    for order, (ours, theirs) in enumerate(zip(found, expected, strict=True), start=1):
        for argument, a, b in zip((*entry.shapes, "upstream"), ours, theirs, strict=True):
            # The integral over orders of tied items is good to 1e-9.
            tolerance = 1e-6 if "exact" in name else 1e-10
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance * float(b.abs().max() + 1),
                msg=lambda text, order=order, argument=argument: f"order {order} in {argument}: {text}",
            )  # fmt: skip


@derivable
def test_second_derivatives_are_those_of_finite_differences(name: str) -> None:
    entry = CASES[name]
    if entry.surrogate:
        return
    assert torch.autograd.gradgradcheck(entry, tracked(entry.leaves()), fast_mode=True, atol=1e-4)


def test_closed_forms_of_hessians() -> None:
    """Listwise: T^2 (diag q - q q^T). Pairs: the logistic density. Plackett-Luce: the sum over its softmaxes."""
    scores = torch.tensor([[0.3, -1.0, 2.0]], dtype=F64)
    labels = torch.tensor([[3.0, 2.0, 1.0]], dtype=F64)

    def spread(u: Tensor) -> Tensor:
        q = u.softmax(-1)
        return q.diag() - torch.outer(q, q)

    hessian = torch.autograd.functional.hessian

    def matrix(loss: Function, **options) -> Tensor:
        return hessian(lambda s: loss(s, labels, **options), scores)[0, :, 0]  # type: ignore[index]

    torch.testing.assert_close(matrix(losses.listwise_dpo, beta=0.7), 0.49 * spread(0.7 * scores[0]))
    last = torch.zeros(3, 3, dtype=F64)
    last[1:, 1:] = spread(scores[0, 1:])
    torch.testing.assert_close(matrix(losses.plackett_luce), spread(scores[0]) + last)
    expected = torch.zeros(3, 3, dtype=F64)
    for high, low in ((0, 1), (0, 2), (1, 2)):
        gap = scores[0, high] - scores[0, low]
        e = torch.zeros(3, dtype=F64)
        e[high], e[low] = 1, -1
        expected += torch.sigmoid(gap) * torch.sigmoid(-gap) * torch.outer(e, e)
    torch.testing.assert_close(matrix(losses.pairwise_logistic), expected)


@derivable
def test_the_first_derivative_is_the_same_with_a_graph(name: str) -> None:
    entry = CASES[name]
    leaves = tracked(entry.leaves())
    value = entry(*leaves)
    upstream = torch.randn_like(value)
    options = dict(retain_graph=True, allow_unused=True)
    with_graph = torch.autograd.grad(value, leaves, upstream, create_graph=True, **options)
    again = torch.autograd.grad(value, leaves, upstream, **options)
    assert all(torch.equal(a, b) for a, b in zip(with_graph, again, strict=True))


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_second_derivatives_at_extreme_scores_are_finite_and_0_where_masked(kind: str, dtype: torch.dtype) -> None:
    for name in ("listwise_dpo", "plackett_luce", "plackett_luce-efron", "plackett_luce-exact", "pairwise_logistic",
                 "lambda_loss", "approx_ndcg"):  # fmt: skip
        entry = CASES[name]
        scores = torch.where(MASK, EXTREMES[kind], math.nan).to(dtype)
        scores.requires_grad_()
        loss = entry.function(scores=scores, **({"labels": LABELS.float()} if "labels" in entry.shapes else {}))
        loss = torch.where(loss.isfinite(), loss, 0)
        (gradient,) = torch.autograd.grad(loss.sum(), scores, create_graph=True)
        (second,) = torch.autograd.grad((gradient * torch.randn_like(gradient)).sum(), scores)
        assert second.dtype == dtype
        assert second.isfinite().all(), name
        assert not second[~MASK].any(), name


@pytest.mark.parametrize("distance", [-20.0, 0.0, 4.0, 20.0])
def test_tied_groups_far_from_the_rest_in_any_order(distance: float) -> None:
    scores = torch.tensor([[distance, distance - 0.7, distance + 0.4, 0.3, -0.5]], dtype=F64)
    labels, one = torch.tensor([[[2, 2, 2, 1, 0]]]), torch.ones(1, 1, dtype=F64)
    ours = contractions(lambda s: ops.plackett_luce_nll(s, labels, one, ties="exact"), (scores,), 2)
    plain = contractions(lambda s: reference.plackett_luce_nll(s, labels, one, ties="exact"), (scores,), 2)
    for a, b in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-15)


def test_items_that_cannot_be_chosen_take_no_part_in_second_derivatives() -> None:
    """At the bottom of a ranking and without a label they cost a constant, and nothing in the beta's derivatives."""
    labels = torch.tensor([[[3.0, 2.0, 1.0, 0.0, 0.0]] * 2] * 2)
    scores = torch.tensor([[0.3, -0.2, 0.9, -math.inf, -math.inf], [1e4, 0.0, 1.0, -math.inf, -math.inf]])
    beta = torch.tensor([[0.7, 1.3]] * 2)
    for loss, dtype in ((losses.listwise_dpo, torch.float32), (losses.plackett_luce, F64)):

        def value(s: Tensor, t: Tensor, loss=loss) -> Tensor:
            tied = 2 * math.log(2) if loss is losses.plackett_luce and s.shape[1] == 3 else 0  # two equal scores
            return (loss(s, labels[..., : s.shape[1]], beta=t, reduction="none") + tied).sin()

        whole = contractions(value, (scores.to(dtype), beta.to(dtype)), 2)
        short = contractions(value, (scores[:, :3].to(dtype), beta.to(dtype)), 1)
        torch.testing.assert_close(whole[0][1], short[0][1])
        assert all(part.isfinite().all() for part in whole[1])
        hessian = torch.func.hessian(lambda s, t, value=value: value(s, t).sum(), argnums=(0, 1))
        found = hessian(scores.to(dtype), beta.to(dtype))
        expected = hessian(scores[:, :3].to(dtype), beta.to(dtype))
        torch.testing.assert_close(found[1][1], expected[1][1])
        torch.testing.assert_close(found[0][1][:, :3], expected[0][1])
        assert found[0][1][:, 3:].abs().max() < 1e-11


@pytest.mark.parametrize("scale", [0.1, 10.0, 1e4])
def test_second_derivatives_in_float32_are_those_of_float64(scale: float) -> None:
    """Of scores that are far apart, close to each other beside a far one, or equal."""
    scores = torch.randn(B, K, dtype=F64).mul(2).round().div(2).mul(scale)
    scores[:, 3] = scores[:, 2] + 0.5
    scores = scores.float()
    for name in ("listwise_dpo-common", "plackett_luce", "plackett_luce-efron", "plackett_luce-exact",
                 "lambda_loss-ndcg"):  # fmt: skip
        entry = CASES[name]
        _, _, beta, weights = entry.leaves()
        base = torch.zeros(B, K)
        small = contractions(entry, (scores, base, beta.float(), weights.float()), 2)
        large = contractions(
            Case(entry.oracle, entry.shapes),  # type: ignore[arg-type]
            (scores.double(), base.double(), beta.float().double(), weights.float().double()),
            2,
        )
        for argument, a, b in zip(entry.shapes, small[1], large[1], strict=False):
            limit = 3e-5 * float(b.abs().max() + (scale if argument == "beta" else 1))
            torch.testing.assert_close(
                a.double(), b, rtol=0, atol=limit, msg=lambda text, n=name, g=argument: f"{n}, {g}: {text}"
            )


def test_log_probabilities_of_rows_with_impossible_tokens() -> None:
    """Where a token has no probability its logit has no derivative; a row with one token has none at all."""
    logits = torch.randn(4, 5, dtype=F64)
    logits[0, 2:] = logits[1, :4] = logits[3, 0] = -math.inf
    logits[1, 4] = -300.0
    target, temperature = torch.tensor([0, 4, -100, 0]), torch.full((4,), 0.7, dtype=F64)
    leaves = tracked((logits, temperature))

    def results(x: Tensor, t: Tensor) -> Tensor:
        parts = ops.gathered_logprob(x, target, temperature=t, return_logsumexp=True, return_entropy=True)
        return torch.stack(parts)

    value = results(*leaves)
    assert value[0, 3] == -math.inf
    under = torch.func.vmap(results, in_dims=(0, None))(logits[None], temperature)[0]
    torch.testing.assert_close(under, value)
    finite = torch.where(value.isfinite(), value, 0)
    first = torch.autograd.grad(finite.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((g * torch.randn_like(g)).sum() for g in first), leaves)
    for tensor in (*first, *second):
        assert tensor.isfinite().all()
    assert not second[0][logits == -math.inf].any()
    assert not second[0][2].any()
    # A row is what it is without its impossible tokens.
    found = []
    for x in (logits[:1], logits[:1, :2]):
        x = x.clone().requires_grad_()
        parts = ops.gathered_logprob(x, target[:1], temperature=0.7, return_logsumexp=True, return_entropy=True)
        (gradient,) = torch.autograd.grad(torch.stack(parts).sin().sum(), x, create_graph=True)
        found.append((gradient[:, :2], torch.autograd.grad(gradient[0, 0], x)[0][:, :2]))
    torch.testing.assert_close(*found)


def test_a_tie_has_the_curvature_of_its_neighbours() -> None:
    """Where scores are equal, maxima and differences of 0 inside a formula could lose half of it."""
    for name in ("listwise_dpo-common", "plackett_luce", "plackett_luce-efron", "pairwise_logistic-common"):
        entry = CASES[name]
        _, base, beta, weights = entry.leaves()
        curves = []
        for offset in (0.0, 1e-6):
            scores = (base + offset * torch.arange(K)).clone()
            curves.append(contractions(lambda s, e=entry, rest=(base, beta, weights): e(s, *rest), (scores,), 2))
        torch.testing.assert_close(curves[0][1][0], curves[1][1][0], rtol=1e-4, atol=1e-4)


@refused
def test_a_refused_second_derivative_names_the_op_and_the_remedy(name: str) -> None:
    entry = CASES[name]
    leaves = tracked(entry.leaves())
    value = entry(*leaves)
    first = torch.autograd.grad(value.square().sum(), leaves, create_graph=True)
    for gradient in first:
        with pytest.raises(NotImplementedError, match=rf"{name.split('-')[0]} has no second derivative.*take"):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True, allow_unused=True)
    weights = torch.ones_like(value, requires_grad=True)  # also in the upstream gradient alone
    (first,) = torch.autograd.grad((weights * entry(*leaves)).sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(first.sum(), weights)


# ---------------------------------------------------------------- forward mode


def directional(function: Function, leaves: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """Return the derivative along tangents by reverse mode alone: linear in an upstream gradient."""
    leaves = tracked(leaves)
    value = function(*leaves)
    upstream = torch.zeros_like(value, requires_grad=True)
    gradients = torch.autograd.grad(value, leaves, upstream, create_graph=True, materialize_grads=True)
    total = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    return torch.autograd.grad(total, upstream)[0]


@derivable
def test_forward_mode_agrees_with_reverse_mode(name: str) -> None:
    entry = CASES[name]
    leaves = entry.leaves()
    tangents = tuple(torch.randn_like(leaf) for leaf in leaves)
    value, found = torch.func.jvp(entry, leaves, tangents)
    torch.testing.assert_close(value, entry(*leaves), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found, directional(entry, leaves, tangents), rtol=1e-8, atol=1e-9)
    for tracking in (False, True):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(leaf.clone().requires_grad_(tracking), tangent)
                for leaf, tangent in zip(leaves, tangents, strict=True)
            ]
            torch.testing.assert_close(forward_ad.unpack_dual(entry(*duals)).tangent, found)


@refused
def test_a_refused_forward_mode_names_the_op_and_the_remedy(name: str) -> None:
    entry = CASES[name]
    leaves = entry.leaves()
    match = rf"{name.split('-')[0]} has no forward-mode derivative.*take"
    with pytest.raises(NotImplementedError, match=match):
        torch.func.jvp(entry, leaves, leaves)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=match):
        entry(*(forward_ad.make_dual(leaf, leaf) for leaf in leaves))
    # What has no tangent is served inside of a forward-mode level, too.
    _, found = torch.func.jvp(lambda x: x * entry(*leaves).detach().sum(), (leaves[0],), (leaves[0],))
    torch.testing.assert_close(found, leaves[0] * entry(*leaves).sum())


@derivable
def test_forward_over_reverse_agrees_with_reverse_over_reverse(name: str) -> None:
    entry = CASES[name]
    leaves = entry.leaves()
    tangents = tuple(torch.randn_like(leaf) for leaf in leaves)
    places = tuple(range(len(leaves)))
    gradient = torch.func.grad(lambda *x: entry(*x).sin().sum(), argnums=places)
    _, found = torch.func.jvp(gradient, leaves, tangents)
    _, expected = torch.autograd.functional.vhp(lambda *x: entry(*x).sin().sum(), leaves, tangents)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_forward_mode_through_the_backward_pass_of_an_earlier_forward_pass() -> None:
    for name in ("listwise_dpo", "plackett_luce", "pairwise_logistic", "approx_ndcg", "gathered_logprob"):
        entry = CASES[name]
        leaves = tracked(entry.leaves())
        value = entry(*leaves)
        upstream, tangent = torch.randn_like(value), torch.randn_like(value)
        expected = torch.autograd.grad(value, leaves, tangent, retain_graph=True)
        with forward_ad.dual_level():
            found = torch.autograd.grad(value, leaves, forward_ad.make_dual(upstream, tangent))
            found = [forward_ad.unpack_dual(g).tangent for g in found]
        torch.testing.assert_close(found, list(expected), rtol=1e-8, atol=1e-9)
