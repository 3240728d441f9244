"""Every op and loss: first derivatives in both modes, second and third ones, transforms; right, or refused.

One table, `CASES`. What is in `mopl.ops`, `mopl.losses` or among the registered ops and in no case fails a test.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import mopl.losses
import mopl.ops
from mopl import losses, ops, reference, reference_logprob, steering
from mopl.losses import scalarize

F64 = torch.float64
B, M, K = 5, 2, 6
MASK = torch.tensor(
    [[1] * 6, [1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0] * 6], dtype=torch.bool
)  # ragged lists of 6, 4, 2, 1 and 0 items
LABELS = torch.tensor([[[3, 1, 1, 0, 2, 1], [0, 0, 1, 1, 2, 2]]] * B) + (torch.arange(B * M).view(B, M, 1) % 3 == 0)
ORDER = torch.where(MASK[:, None], LABELS, -1).argsort(dim=-1, descending=True, stable=True)

Function = Callable[..., Tensor]


@dataclass
class Case:
    """A function of differentiable float64 tensors, and what has been promised about its derivatives."""

    function: Function
    shapes: dict[str, tuple[int, ...]]  # the differentiable arguments
    oracle: Function | None = None  # the same function in plain loops
    positive: tuple[str, ...] = ("temperature", "labels", "alpha")
    refused: bool = False  # everything beyond the first derivative in reverse mode is an error
    surrogate: bool = False  # a loss that holds parts of itself constant, as documented: no derivative of its value
    reads_values: bool = False  # checks values, which PyTorch refuses under vmap

    def leaves(self, seed: int = 0, scale: float = 1.5) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        values = []
        for name, shape in self.shapes.items():
            value = torch.randn(shape, dtype=F64, generator=generator)
            values.append(value.abs() + 0.3 if name in self.positive else scale * value)
        return tuple(values)

    def __call__(self, *leaves: Tensor) -> Tensor:
        return self.function(**dict(zip(self.shapes, leaves, strict=True)))


LIST = {"scores": (B, K), "reference": (B, K), "temperature": (B, M), "weights": (B, M)}
COMMON = LIST | {"temperature": (B, 1)}


def case(loss: Function, plain: Function | None, shapes: dict | None = None, **options) -> Case:
    """Return a case of a list loss; its oracle is a plain formula on scores - reference with temperatures (B, m)."""
    shapes = shapes or LIST
    constants = {"labels": LABELS.double()} if "labels" not in shapes else {}
    oracle = None
    if plain is not None:

        def oracle(scores, reference, temperature, weights, **more):
            return weights * plain(scores - reference, temperature=temperature, mask=MASK, **constants, **more)

    return Case(partial(loss, mask=MASK, reduction="none", **constants, **options), shapes, oracle)


def plackett_luce(shapes: dict | None = None, **options) -> Case:
    plain = {k: v for k, v in options.items() if k != "last_group"}
    plain["last_group_free"] = options.get("last_group") == "free"
    return case(losses.plackett_luce, partial(reference.plackett_luce_nll, **plain), shapes, **options)


def lambda_loss(**options) -> Case:
    return case(losses.lambda_loss, partial(reference.lambda_loss, **options), **options)


TOKENS = {"logprob": (3, 4)}
TARGET = torch.tensor([[1, 4], [0, -100], [-100, -100], [2, 2]])
ROWS = {"logits": (4, 5), "temperature": (4,)}
HEAD = {"hidden": (3, 4), "weight": (7, 4), "bias": (7,)}
TOKEN_MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)


def all_of(function: Function, **options) -> Function:
    """Return a log-probability op with its three results in one tensor."""

    def joined(**leaves) -> Tensor:
        results = function(**leaves, **options, return_logsumexp=True, return_entropy=True)
        return torch.cat([part.reshape(-1) for part in results])

    return joined


def all_of_oracle(**leaves) -> Tensor:
    results = reference_logprob.gathered_logprob(leaves.pop("logits"), TARGET, **leaves, softcap=2.0)
    return torch.cat([part.reshape(-1) for part in results])


def pairs(chosen: Tensor, rejected: Tensor, temperature: Tensor, **options) -> Tensor:
    return losses.bradley_terry(chosen, rejected, temperature=temperature, reduction="none", **options)


CASES = {
    "listwise_dpo": case(
        losses.listwise_dpo, reference.listwise_cross_entropy, LIST | {"labels": (B, M, K)}
    ),
    "listwise_dpo-common": case(losses.listwise_dpo, reference.listwise_cross_entropy, COMMON),
    "listwise_dpo-unnormalized": case(
        losses.listwise_dpo,
        partial(reference.listwise_cross_entropy, normalize=False),
        LIST | {"labels": (B, M, K)},
        normalize=None,
    ),
    "listwise_dpo-softmax": case(losses.listwise_dpo, None, LIST | {"labels": (B, M, K)}, normalize="softmax"),
    "plackett_luce": plackett_luce(ties="breslow"),
    "plackett_luce-common": plackett_luce(COMMON, top_k=2),
    "plackett_luce-free": plackett_luce(last_group="free", position_weights=torch.rand(K, dtype=F64) + 0.1),
    "plackett_luce-efron": plackett_luce(ties="efron", position_weights=torch.rand(B, M, K, dtype=F64)),
    "plackett_luce-efron-order": plackett_luce(ties="efron", order=ORDER),
    "plackett_luce-exact": plackett_luce(ties="exact"),
    "pairwise_logistic": case(losses.pairwise_logistic, reference.pairwise_logistic, LIST | {"margin": (B, M)}),
    "pairwise_logistic-common": case(losses.pairwise_logistic, reference.pairwise_logistic, COMMON),
    "lambda_loss": lambda_loss(),
    "lambda_loss-ndcg": lambda_loss(normalize=True, top_k=2, top_k_rule="both", gain="linear"),
    "approx_ndcg": case(losses.approx_ndcg, reference.approx_ndcg),
    "approx_ndcg-labels": case(losses.approx_ndcg, None, LIST | {"labels": (B, M, K)}),
    "normalize_labels": Case(partial(losses.normalize_labels, mode="l1", mask=MASK), {"labels": (B, M, K)}),
    "bradley_terry": Case(pairs, {"chosen": (B, M), "rejected": (B, M), "temperature": (B, M)}),
    "bradley_terry-hyperbolic": Case(
        partial(pairs, loss_type="discopop", f_divergence="js_divergence"),
        {"chosen": (B, M), "rejected": (B, M), "temperature": (B, M)},
    ),
    "DPOLoss": Case(
        lambda chosen, rejected: losses.DPOLoss(0.5)(chosen, rejected, torch.ones(B), torch.zeros(B))[0],
        {"chosen": (B,), "rejected": (B,)},
    ),
    "policy_gradient": Case(
        lambda logprob: losses.policy_gradient(
            logprob, torch.ones(3, 2), torch.tensor([0.4, 0.6]), alpha=0.3, reference=torch.zeros(3, 4, dtype=F64),
            behaviour=torch.full((3, 4), -0.1, dtype=F64), mask=TOKEN_MASK, reduction="none",
        ).loss,
        TOKENS,
        surrogate=True,
    ),
    "kl_estimate": Case(
        partial(losses.kl_estimate, reference=torch.zeros(3, 4, dtype=F64), mask=TOKEN_MASK, estimator="k3"),
        TOKENS,
        surrogate=True,
    ),
    "value_loss": Case(
        lambda values: losses.value_loss(values, torch.zeros(3, 4, dtype=F64), mask=TOKEN_MASK, reduction="none"),
        {"values": (3, 4)},
    ),
    "group_mean": Case(partial(losses.group_mean, group=2, leave_one_out=True), {"values": (4,)}),
    "scalarize": Case(
        lambda vector, weights: torch.stack(
            [
                scalarize.linear(vector, weights.abs()),
                scalarize.chebyshev(vector, weights.abs(), rho=0.1),
                scalarize.smooth_chebyshev(vector, weights.abs(), mu=0.5),
                scalarize.cosine_penalty(vector, weights.abs()),
            ]
        ),
        {"vector": (B, M), "weights": (B, M)},
    ),
    "sequence_logprob": Case(
        lambda logprob: ops.sequence_logprob(
            logprob, torch.tensor([0, 1, 1, -1, 2, 0]), sequences=3, average=True
        ),
        {"logprob": (6,)},
    ),
    "sequence_logprob-padded": Case(partial(ops.sequence_logprob, mask=TOKEN_MASK), TOKENS),
    "gathered_logprob": Case(
        all_of(ops.gathered_logprob, target=TARGET, softcap=2.0), ROWS, all_of_oracle
    ),
    "gathered_logprob-plain": Case(
        partial(ops.gathered_logprob, target=TARGET[:, 0]),
        ROWS,
        lambda **leaves: reference_logprob.gathered_logprob(target=TARGET[:, 0], **leaves)[0],
    ),
    "gathered_logprob-inplace": Case(
        lambda logits: ops.gathered_logprob(logits * 1, TARGET[:, 0], inplace_backward=True),
        {"logits": (4, 5)},
        lambda logits: reference_logprob.gathered_logprob(logits, TARGET[:, 0])[0],
    ),
    "linear_logprob": Case(all_of(ops.linear_logprob, target=torch.tensor([1, 2, 6])), HEAD, refused=True),
    "linear_logprob-frozen": Case(
        partial(ops.linear_logprob, weight=torch.randn(7, 4).double(), target=torch.tensor([1, 2, 6])),
        {"hidden": (3, 4), "temperature": (3,)},
        refused=True,
    ),
    "linear_kl": Case(
        partial(ops.linear_kl, reference_hidden=torch.randn(3, 4).double(),
                reference_weight=torch.randn(7, 4).double()),
        HEAD,
        refused=True,
    ),
    "listwise_cross_entropy": Case(
        partial(ops.listwise_cross_entropy, mask=MASK),
        {"scores": (B, K), "labels": (B, M, K), "temperature": (B, M)},
        partial(reference.listwise_cross_entropy, mask=MASK),
    ),
    "plackett_luce_nll": Case(
        partial(ops.plackett_luce_nll, labels=LABELS, mask=MASK),
        {"scores": (B, K), "temperature": (B, M)},
        partial(reference.plackett_luce_nll, labels=LABELS, mask=MASK),
    ),
    "steering": Case(
        lambda scores, reference, strength: torch.stack(
            [
                steering.realign(scores, reference, strength),
                steering.rescale(scores, reference, strength.exp(), normalize=True),
                steering.mix_experts([scores, reference], torch.tensor([0.3, 0.7])),
            ]
        ),
        {"scores": (B, K), "reference": (B, K), "strength": (B,)},
        reads_values=True,
    ),
}  # fmt: skip

# Not functions of tensors with a derivative: orders, records, a module of functions that are in the case "scalarize".
WITHOUT = {"presort", "PolicyGradient"}

every = pytest.mark.parametrize("name", CASES)
derivable = pytest.mark.parametrize("name", [name for name, c in CASES.items() if not c.refused])
refused = pytest.mark.parametrize("name", [name for name, c in CASES.items() if c.refused])
with_oracle = pytest.mark.parametrize("name", [name for name, c in CASES.items() if c.oracle is not None])


def tracked(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)


def contractions(function: Function, leaves: tuple[Tensor, ...], orders: int) -> list[tuple[Tensor, ...]]:
    """Return gradients of increasing order, each the gradient of a random contraction of the one before.

    The upstream gradient of the function is an argument too.
    """
    generator = torch.Generator().manual_seed(7)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype, generator=generator)

    leaves = tracked(leaves)
    value = function(*leaves)
    upstream = random(value).requires_grad_()
    total, inputs, found = (value * upstream).sum(), (*leaves, upstream), []
    for _ in range(orders):
        gradients = torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True)
        found.append(tuple(g.detach() for g in gradients))
        total = sum((g * random(g)).sum() for g in gradients)
    return found


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

    torch.testing.assert_close(matrix(losses.listwise_dpo, temperature=0.7), 0.49 * spread(0.7 * scores[0]))
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


EXTREMES = {
    "ties": torch.zeros(B, K),
    "far apart": torch.tensor([1e4, -1e4, 0.0, 5.0, -5.0, 1e4]).repeat(B, 1),
    "impossible items": torch.tensor([0.0, -math.inf, 1.0, -math.inf, 2.0, 0.5]).repeat(B, 1),
    "nothing possible": torch.full((B, K), -math.inf),
}


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


def test_a_tie_has_the_curvature_of_its_neighbours() -> None:
    """Where scores are equal, maxima and differences of 0 inside a formula could lose half of it."""
    for name in ("listwise_dpo-common", "plackett_luce", "plackett_luce-efron", "pairwise_logistic-common"):
        entry = CASES[name]
        _, base, temperature, weights = entry.leaves()
        curves = []
        for offset in (0.0, 1e-6):
            scores = (base + offset * torch.arange(K)).clone()
            curves.append(contractions(lambda s, e=entry, rest=(base, temperature, weights): e(s, *rest), (scores,), 2))
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


# ---------------------------------------------------------------- transforms of torch.func


def stacked(entry: Case, count: int = 3) -> tuple[Tensor, ...]:
    return tuple(map(torch.stack, zip(*(entry.leaves(seed) for seed in range(count)), strict=True)))


@every
def test_vmap_gives_what_a_loop_gives(name: str) -> None:
    entry = CASES[name]
    many = stacked(entry)
    if entry.reads_values:
        with pytest.raises(RuntimeError, match="data-dependent control flow"):
            torch.func.vmap(entry)(*many)
        return
    expected = torch.stack([entry(*(x[i] for x in many)) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(entry)(*many), expected, rtol=1e-8, atol=1e-9)


@derivable
def test_gradients_of_each_sample(name: str) -> None:
    entry = CASES[name]
    if entry.reads_values:
        return
    many = stacked(entry)
    places = tuple(range(len(many)))

    def total(*leaves: Tensor) -> Tensor:
        return entry(*leaves).sin().sum()

    expected = []
    for i in range(3):
        leaves = tracked(tuple(x[i] for x in many))
        expected.append(torch.autograd.grad(total(*leaves), leaves, materialize_grads=True))
    expected = tuple(map(torch.stack, zip(*expected, strict=True)))
    found = torch.func.vmap(torch.func.grad(total, argnums=places))(*many)
    other = torch.func.grad(lambda *x: torch.func.vmap(total)(*x).sum(), argnums=places)(*many)
    for values in (found, other):
        for a, b in zip(values, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@refused
def test_refused_transforms_name_the_op_and_the_remedy(name: str) -> None:
    entry = CASES[name]
    match = rf"{name.split('-')[0]} cannot be differentiated under torch.func.*take"
    with pytest.raises(NotImplementedError, match=match):
        torch.func.grad(lambda *x: entry(*x).sum())(*entry.leaves())
    with pytest.raises(NotImplementedError, match=match):
        torch.func.grad(lambda *x: torch.func.vmap(entry)(*x).sum())(*stacked(entry))


@pytest.mark.parametrize("create_graph", [False, True])
@derivable
def test_batched_upstream_gradients(name: str, create_graph: bool) -> None:
    entry = CASES[name]
    if name.endswith("inplace"):  # one backward pass, by contract
        return
    leaves = tracked(entry.leaves())
    value = entry(*leaves)
    upstream = torch.randn(3, *value.shape, dtype=F64)
    options = dict(retain_graph=True, materialize_grads=True)
    expected = [torch.autograd.grad(value, leaves, g, **options) for g in upstream]
    found = torch.autograd.grad(value, leaves, upstream, is_grads_batched=True, create_graph=create_graph, **options)
    for a, b in zip(found, map(torch.stack, zip(*expected, strict=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_hessians_of_every_kind_agree() -> None:
    for name in ("listwise_dpo-common", "plackett_luce", "lambda_loss", "approx_ndcg"):
        entry = CASES[name]
        scores, *rest = entry.leaves()

        def loss(s: Tensor, entry=entry, rest=rest) -> Tensor:
            return entry(s, *rest).sum()

        expected = torch.autograd.functional.hessian(loss, scores)
        assert float(expected.abs().max()) > 1e-3
        for found in (
            torch.func.hessian(loss)(scores),
            torch.func.jacrev(torch.func.jacrev(loss))(scores),
            torch.func.jacfwd(torch.func.jacfwd(loss))(scores),
            torch.autograd.functional.hessian(loss, scores, vectorize=True),
            torch.autograd.functional.hessian(loss, scores, vectorize=True, outer_jacobian_strategy="forward-mode"),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_functional_call_and_a_gradient_penalty_of_a_model() -> None:
    model = torch.nn.Linear(3, 1).double()
    features = torch.randn(B, K, 3, dtype=F64)

    def loss(parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        scores = torch.func.functional_call(model, parameters, (x,))[..., 0]
        return losses.plackett_luce(scores, labels, mask=MASK)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(loss)(parameters, features, LABELS)
    losses.plackett_luce(model(features)[..., 0], LABELS, mask=MASK).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)

    def penalty(weight: Tensor) -> Tensor:
        scores = (features @ weight.T)[..., 0]
        value = losses.plackett_luce(scores, LABELS, mask=MASK)
        return torch.autograd.grad(value, scores, create_graph=True)[0].square().sum()

    assert torch.autograd.gradcheck(penalty, model.weight.detach().clone().requires_grad_())


def test_compiled_transforms() -> None:
    entry = CASES["plackett_luce"]
    scores, *rest = entry.leaves()
    gradient = torch.func.grad(lambda s: entry(s, *rest).sum())
    found = torch.compile(gradient, backend="aot_eager")(scores)
    torch.testing.assert_close(found, gradient(scores))


# ---------------------------------------------------------------- the rest of autograd


@every
def test_graphs_that_are_kept_and_arguments_that_are_not_used(name: str) -> None:
    entry = CASES[name]
    leaves = tracked(entry.leaves())
    if name.endswith("inplace"):  # one backward pass, by contract
        return
    with torch.autograd.set_detect_anomaly(True):
        value = entry(*leaves)
        unused = torch.ones(2, requires_grad=True)
        options = dict(retain_graph=True, allow_unused=True)
        first = torch.autograd.grad(value.sum(), (*leaves, unused), **options)
        second = torch.autograd.grad(value.sum(), (*leaves, unused), **options)
    assert first[-1] is None
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every
def test_threads_at_once_give_what_each_gives_alone(name: str) -> None:
    entry = CASES[name]
    orders = 1 if entry.refused else 2
    expected = [contractions(entry, entry.leaves(seed), orders) for seed in range(4)]
    found: dict[int, list] = {}

    def work(seed: int) -> None:
        for _ in range(3):
            found[seed] = contractions(entry, entry.leaves(seed), orders)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        torch.testing.assert_close(found[seed], expected[seed], rtol=0, atol=0)


@every
def test_modes_without_gradient_and_copies(name: str) -> None:
    entry = CASES[name]
    leaves = entry.leaves()
    expected = entry(*leaves)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = entry(*tracked(leaves))
            assert torch.equal(found, expected)
            assert not found.requires_grad
    with torch.inference_mode():
        made = tuple(leaf.clone() for leaf in leaves)
    assert torch.equal(entry(*made), expected)
    assert torch.equal(copy.deepcopy(entry(*made)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(entry(*leaves), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["plackett_luce", "pairwise_logistic", "lambda_loss", "approx_ndcg"])
def test_labels_that_were_made_in_inference_mode(name: str) -> None:
    entry = CASES[name]
    with torch.inference_mode():
        labels = LABELS.double()
    scores = torch.randn(B, K, dtype=F64, requires_grad=True)
    loss = getattr(losses, name)
    found = torch.autograd.grad(loss(scores, labels, mask=MASK), scores)
    assert torch.equal(found[0], torch.autograd.grad(loss(scores, labels.clone(), mask=MASK), scores)[0])
    assert entry.oracle is not None


def test_tensors_that_change_between_forward_and_backward() -> None:
    changed = "modified by an inplace operation"
    for loss in (losses.listwise_dpo, losses.plackett_luce):
        scores = torch.randn(B, K, dtype=F64, requires_grad=True)
        moved = scores * 1
        value = loss(moved, LABELS.double())
        with torch.no_grad():
            moved.zero_()
        with pytest.raises(RuntimeError, match=changed):
            value.backward()
    for loss in (losses.plackett_luce, losses.pairwise_logistic):
        scores, labels = torch.randn(B, K, dtype=F64, requires_grad=True), LABELS.double()
        expected = torch.autograd.grad(loss(scores, labels), scores)[0]
        value = loss(scores, labels)
        labels.zero_()  # the first derivative does not read them again
        assert torch.equal(torch.autograd.grad(value, scores, retain_graph=True)[0], expected)
        with pytest.raises(RuntimeError, match=changed):
            torch.autograd.grad(value, scores, create_graph=True)


def test_what_is_documented_as_a_constant_gets_no_gradient() -> None:
    scores = torch.randn(B, K, dtype=F64, requires_grad=True)
    weights = torch.rand(K, dtype=F64, requires_grad=True)
    labels = LABELS.double().requires_grad_()
    for value in (
        losses.plackett_luce(scores, labels, position_weights=weights),
        losses.lambda_loss(scores, labels),
        losses.pairwise_logistic(scores, labels),
    ):
        assert torch.autograd.grad(value, (scores, weights, labels), allow_unused=True)[1:] == (None, None)
    # Nor in forward mode, where no_grad does not hold.
    for loss in (losses.lambda_loss, losses.pairwise_logistic, losses.plackett_luce):
        _, tangent = torch.func.jvp(
            lambda z, loss=loss: loss(scores.detach(), z), (labels.detach(),), (labels.detach(),)
        )
        assert not tangent.any()
