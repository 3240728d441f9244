"""Every op and loss under `torch.func`, in threads, without gradients, in kept graphs, with changed inputs."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
from derivative_cases import (
    CASES,
    EXTREMES,
    F64,
    LABELS,
    MASK,
    B,
    Case,
    K,
    M,
    contractions,
    derivable,
    every,
    refused,
    tracked,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mopl import losses, ops
from mopl.conditioning.value_head import ValueHead

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


@pytest.mark.parametrize("name", ["listwise_dpo", "plackett_luce", "pairwise_logistic", "lambda_loss", "approx_ndcg"])
def test_vmap_over_labels_and_masks(name: str) -> None:
    loss = getattr(losses, name)
    scores, labels = torch.randn(3, B, K, dtype=F64), torch.randint(0, 3, (3, B, M, K))
    mask = torch.stack([MASK, ~MASK, MASK.flip(0)])

    def one(s: Tensor, z: Tensor, exists: Tensor) -> Tensor:
        return loss(s, z, mask=exists, reduction="none")

    expected = torch.stack([one(s, z, exists) for s, z, exists in zip(scores, labels, mask, strict=True)])
    torch.testing.assert_close(torch.func.vmap(one)(scores, labels, mask), expected)
    moved = torch.func.vmap(one, in_dims=(1, 2, 1), out_dims=1)(
        scores.transpose(0, 1), labels.movedim(0, 2), mask.transpose(0, 1)
    )
    torch.testing.assert_close(moved.transpose(0, 1), expected)


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("listwise_dpo", {}),
        ("listwise_dpo", {"beta": -0.5}),
        ("plackett_luce", {}),
        ("plackett_luce", {"ties": "efron"}),
        ("plackett_luce", {"ties": "exact"}),
        ("pairwise_logistic", {}),
        ("lambda_loss", {"top_k": 2, "top_k_rule": "both"}),
        ("approx_ndcg", {}),
    ],
)
def test_extreme_scores_have_the_same_values_and_gradients_under_transforms(
    name: str, options: dict, kind: str
) -> None:
    labels = LABELS.double()
    labels[0, 0] = 0  # a list without labels, for one objective
    labels[1] = 0  # and for all
    scores = torch.where(MASK, EXTREMES[kind].double(), math.nan)
    if name == "listwise_dpo":
        scores[1, 0] = math.nan
        options = {"beta": 1.0} | options
        loss = ops.listwise_cross_entropy
        rate = torch.full((B, 1), options["beta"], dtype=F64)

        def value(s: Tensor) -> Tensor:
            return loss(s, labels, rate, MASK)

    else:

        def value(s: Tensor) -> Tensor:
            return getattr(losses, name)(s, labels, mask=MASK, reduction="none", **options)

    leaf = scores.clone().requires_grad_()
    expected = value(leaf)
    torch.testing.assert_close(torch.func.vmap(value)(scores[None])[0], expected, rtol=1e-8, atol=1e-8, equal_nan=True)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    found = torch.func.grad(lambda s: value(s).sum())(scores)
    torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-8, equal_nan=True)


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
def test_traced_graphs_hold_for_other_values(name: str) -> None:
    entry = CASES[name]
    if entry.reads_values:
        pytest.skip("checks values, which a trace of tensors' operations refuses")
    traced, others = make_fx(entry)(*entry.leaves()), entry.leaves(1)
    torch.testing.assert_close(traced(*others), entry(*others))


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
    single = tuple(leaf.float() for leaf in leaves)
    expected = entry(*single)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(entry(*single), expected, rtol=1e-6, atol=1e-6)


def test_copies_of_modules_are_whole_and_their_own() -> None:
    for module, inputs in (
        (losses.DPOLoss(0.3, 0.1), tuple(torch.randn(4, 3))),
        (ValueHead(4, 2), (torch.randn(3, 4), torch.tensor([0.4, 0.6]), 0.3)),
    ):
        other = copy.deepcopy(module)
        for a, b in zip(module(*inputs), other(*inputs), strict=True):
            assert torch.equal(a, b)
        assert not {id(p) for p in module.parameters()} & {id(p) for p in other.parameters()}


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
