"""Listwise cross-entropy on CPU: `mopl.ops.listwise_cross_entropy` and `mopl.losses.listwise_dpo`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from list_problems import infinite_scores, results
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mopl import reference
from mopl.losses import listwise_dpo, normalize_labels
from mopl.ops import _rows
from mopl.ops.listnet import cpu, listwise_cross_entropy
from mopl.ops.listnet.function import _listwise_cross_entropy

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
NAMES = ("loss", "scores", "labels", "beta")


def run(op, scores: Tensor, labels: Tensor, beta: Tensor, upstream: Tensor, *options) -> dict[str, Tensor]:
    """Return the loss and the gradients of (upstream * loss).sum()."""
    leaves = [t.detach().clone().requires_grad_() for t in (scores, labels, beta)]
    loss = op(*leaves, *options)
    if not loss.requires_grad:  # the reference found nothing to charge
        return dict(zip(NAMES, (loss, *(torch.zeros_like(t) for t in leaves)), strict=True))
    gradients = torch.autograd.grad((loss * upstream.to(loss.dtype)).sum(), leaves, materialize_grads=True)
    return dict(zip(NAMES, (loss.detach(), *gradients), strict=True))


def problem(batch: int, objectives: int, items: int, dtype=F32, scale=1.0, common=False, masked=False):
    """Return random scores, labels, beta, upstream gradient and mask; masked slots hold NaN and inf."""
    scores = (torch.randn(batch, items, dtype=F64) * scale).to(dtype)
    labels = torch.rand(batch, objectives, items, dtype=F64).to(dtype) * (torch.rand(batch, objectives, items) < 0.7)
    beta = 2.0 ** torch.randint(-2, 3, (batch, 1 if common else objectives)).to(F64 if dtype == F64 else F32)
    mask = None
    if masked:
        mask = torch.rand(batch, items) < torch.rand(batch, 1)
        scores[~mask], labels[~mask[:, None].expand_as(labels)] = math.nan, math.inf
    return scores, labels, beta, torch.randn(batch, objectives, dtype=F64), mask


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest entry."""
    expected, actual = expected.double(), actual.double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300)) if expected.numel() else 0.0


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize(("batch", "objectives", "items"), [(7, 1, 2), (7, 3, 3), (5, 2, 8), (4, 3, 40), (2, 2, 130)])
def test_loss_and_gradients_equal_the_formula(batch, objectives, items, common, masked, normalize) -> None:
    for dtype, scale, tolerance in ((F64, 1, 1e-12), (F64, 100, 1e-12), (F32, 1, 2e-6), (F32, 100, 2e-6)):
        scores, labels, beta, upstream, mask = problem(
            batch, objectives, items, dtype, scale, common=common, masked=masked
        )
        ours = run(listwise_cross_entropy, scores, labels, beta, upstream, mask, normalize)
        doubles = (t.double() for t in (scores, labels, beta))
        theirs = run(reference.listwise_cross_entropy, *doubles, upstream, mask, normalize)
        for name in NAMES:
            assert error(ours[name], theirs[name].nan_to_num()) < tolerance, (name, dtype, scale)


SCORES = {
    "N(0, 1)": lambda n, k: torch.randn(n, k),
    "N(0, 10)": lambda n, k: torch.randn(n, k) * 10,
    "N(0, 100)": lambda n, k: torch.randn(n, k) * 100,
    "N(0, 1e4)": lambda n, k: torch.randn(n, k) * 1e4,
    "right order, step 5": lambda n, k: torch.arange(k, 0, -1.0).mul(5).expand(n, k),
    "wrong order, step 5": lambda n, k: torch.arange(0.0, k).mul(5).expand(n, k),
    "N(0, 1) + 1e4": lambda n, k: torch.randn(n, k) + 1e4,
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("items", "tolerance"), [(8, 1e-6), (120, 1e-6), (1000, 4e-6)])
def test_float32_keeps_six_digits_for_any_scores(kind: str, items: int, tolerance: float) -> None:
    scores = SCORES[kind](4, items)
    labels = torch.zeros(4, 3, items)
    labels[:, 0, 0] = 1
    labels[:, 1] = torch.arange(items, 0, -1.0) ** 2
    labels[:, 2] = torch.rand(4, items)
    beta = torch.ones(4, 1)
    for j in range(3):  # one at a time: the gradient of each is judged by its own largest entry
        ours = run(listwise_cross_entropy, scores, labels[:, j : j + 1], beta, torch.ones(4, 1))
        u = scores.double().requires_grad_()
        z = (labels[:, j] / labels[:, j].sum(-1, keepdim=True).double()).double()
        # lse of the others, by items: no digit is lost where one item has all the mass
        others = u[:, None].expand(4, items, items).masked_fill(torch.eye(items, dtype=torch.bool), -torch.inf)
        loss = (z * -torch.nn.functional.logsigmoid(u - others.logsumexp(-1))).sum(-1)
        (gradient,) = torch.autograd.grad(loss.sum(), u)
        relative = ((ours["loss"][:, 0].double() - loss) / loss.clamp(min=1e-37)).abs().max()
        assert relative < tolerance
        size = gradient.abs().amax(-1, keepdim=True).clamp(min=1e-37)
        assert ((ours["scores"].double() - gradient).abs() / size).max() < tolerance


@pytest.mark.parametrize("items", [2, 3, 7, 8, 31, 120])
@pytest.mark.parametrize("gap", [3.0, 12.0, 20.0, 60.0])
def test_a_confident_list_keeps_every_digit_of_its_tiny_loss(items: int, gap: float) -> None:
    scores = torch.zeros(1, items)
    scores[0, 1] = gap
    labels = torch.zeros(1, 1, items)
    labels[0, 0, 1] = 1
    ours = run(listwise_cross_entropy, scores, labels, torch.ones(1, 1), torch.ones(1, 1))
    rest = (items - 1) * math.exp(-gap)
    assert float(ours["loss"]) == pytest.approx(math.log1p(rest), rel=1e-6)
    expected = torch.full((items,), math.exp(-gap) / (1 + rest), dtype=F64)
    expected[1] = -rest / (1 + rest)
    torch.testing.assert_close(ours["scores"][0].double(), expected, rtol=1e-6, atol=0)


def test_the_loss_of_one_list_does_not_depend_on_its_neighbours_or_on_blocks(monkeypatch) -> None:
    scores, labels, beta, upstream, _ = problem(40, 3, 9, F64, scale=5)
    whole = run(listwise_cross_entropy, scores, labels, beta, upstream)
    monkeypatch.setattr(_rows, "_BLOCK_ITEMS", 64)
    for name, value in run(listwise_cross_entropy, scores, labels, beta, upstream).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-13, atol=1e-15)


def test_one_beta_for_all_objectives_equals_the_same_beta_for_each() -> None:
    scores, labels, beta, upstream, mask = problem(6, 4, 11, F64, common=True, masked=True)
    one = run(listwise_cross_entropy, scores, labels, beta, upstream, mask)
    each = run(listwise_cross_entropy, scores, labels, beta.repeat(1, 4), upstream, mask)
    for name in ("loss", "scores", "labels"):
        torch.testing.assert_close(one[name], each[name], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(one["beta"], each["beta"].sum(-1, keepdim=True), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("number", [1.0, 0.5])
@pytest.mark.parametrize("items", [2, 5, 40, 300])
def test_one_number_expanded_to_all_objectives_equals_the_same_number_for_each(items: int, number: float) -> None:
    scores, labels, _, upstream, _ = problem(5, 3, items, scale=5)  # the scale makes some lists confident
    one = torch.full((1, 1), number)
    expanded = run(lambda s, z, t: listwise_cross_entropy(s, z, t.expand(5, 3)), scores, labels, one, upstream)
    each = run(listwise_cross_entropy, scores, labels, one.repeat(5, 3), upstream)
    for name in ("loss", "scores", "labels"):
        assert error(expanded[name], each[name]) <= 1e-6
    assert error(expanded["beta"], each["beta"].sum()) <= 1e-5


def test_a_negative_or_zero_beta_is_just_a_number() -> None:
    scores, labels, _, upstream, _ = problem(5, 2, 6, F64)
    beta = torch.tensor([[-1.5, 0.0]], dtype=F64).repeat(5, 1)
    ours = run(listwise_cross_entropy, scores, labels, beta, upstream)
    theirs = run(reference.listwise_cross_entropy, scores, labels, beta, upstream)
    for name in NAMES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalize", ["l1", "softmax", None])
@pytest.mark.parametrize("beta_shape", [(), (2,), (3, 1), (3, 2)])
def test_gradcheck_of_every_differentiable_argument(normalize, beta_shape) -> None:
    def leaf(*shape: int) -> Tensor:
        return (torch.rand(shape, dtype=F64) + 0.2).requires_grad_()

    mask = torch.tensor([[True, True, True, True], [True, False, True, True], [True, True, False, False]])

    def loss(scores, labels, base, beta, weights):
        return listwise_dpo(
            scores, labels, reference=base, beta=beta, weights=weights, mask=mask,
            normalize=normalize, reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (leaf(3, 4), leaf(3, 2, 4), leaf(3, 4), leaf(*beta_shape), leaf(3, 2)))


def test_reductions_and_weights() -> None:
    scores, labels, _, _, _ = problem(4, 3, 5)
    weights = torch.rand(4, 3)
    vector = listwise_dpo(scores, labels, weights=weights, reduction="none")
    torch.testing.assert_close(vector, weights * listwise_dpo(scores, labels, reduction="none"))
    torch.testing.assert_close(listwise_dpo(scores, labels, weights=weights, reduction="sum"), vector.sum())
    torch.testing.assert_close(listwise_dpo(scores, labels, weights=weights), vector.sum(1).mean())
    one = listwise_dpo(scores, labels[:, 1], reduction="none")
    assert one.shape == (4, 1)
    torch.testing.assert_close(one[:, 0], listwise_dpo(scores, labels, reduction="none")[:, 1])


def test_only_the_difference_to_the_reference_counts() -> None:
    scores, labels, _, _, _ = problem(4, 2, 6, F64)
    base = torch.randn(4, 6, dtype=F64)
    with_reference = listwise_dpo(scores, labels, reference=base, beta=0.3)
    torch.testing.assert_close(with_reference, listwise_dpo(scores - base, labels, beta=0.3))
    shifted = listwise_dpo(scores, labels, reference=base + torch.randn(4, 1, dtype=F64), beta=0.3)
    torch.testing.assert_close(with_reference, shifted)


@pytest.mark.parametrize("normalize", ["l1", "softmax", None])
def test_padding_and_the_order_of_items_change_nothing(normalize) -> None:
    scores, labels, _, upstream, _ = problem(5, 2, 6, F64)
    place = torch.rand(5, 9).argsort(-1)[:, :6]  # every list's items go to random slots of nine
    wide, mask = torch.full((5, 9), math.nan, dtype=F64).scatter(1, place, scores), torch.zeros(5, 9, dtype=torch.bool)
    mask.scatter_(1, place, True)
    index = place[:, None].expand(5, 2, 6)
    wide_labels = torch.full((5, 2, 9), -math.inf, dtype=F64).scatter(2, index, labels)

    def op(s, z, t, mask=None):
        return listwise_dpo(s, z, beta=t, mask=mask, normalize=normalize, reduction="none")

    beta = torch.rand(5, 2, dtype=F64) + 0.5
    plain = run(op, scores, labels, beta, upstream)
    padded = run(op, wide, wide_labels, beta, upstream, mask)
    torch.testing.assert_close(padded["loss"], plain["loss"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(padded["scores"].gather(1, place), plain["scores"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(padded["labels"].gather(2, index), plain["labels"], rtol=1e-12, atol=1e-14)
    assert not padded["scores"][~mask].any()
    assert not padded["labels"][~mask[:, None].expand(5, 2, 9)].any()


def test_short_lists_and_lists_without_labels_cost_nothing() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [math.nan, math.inf, 3.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[False] * 3, [False, True, False], [False, False, True], [True] * 3])
    labels = torch.ones(4, 2, 3)
    labels[3, 0] = 0
    ours = run(listwise_cross_entropy, scores, labels, torch.ones(4, 2), torch.ones(4, 2), mask)
    assert not ours["loss"][:3].any()
    assert not ours["loss"][3, 0]
    assert ours["loss"][3, 1] > 0
    assert not ours["scores"][:3].any()
    assert not ours["labels"][:3].any()
    assert not ours["labels"][3, 0].any()
    assert not ours["beta"][:3].any()
    for shape in ((2, 0), (2, 1), (0, 3)):
        empty = run(
            listwise_cross_entropy, torch.ones(shape), torch.ones(shape[0], 2, shape[1]),
            torch.ones(shape[0], 2), torch.ones(shape[0], 2),
        )  # fmt: skip
        assert empty["loss"].shape == (shape[0], 2)
        assert not empty["loss"].any()
        assert not empty["scores"].any()


def test_an_item_that_cannot_be_chosen() -> None:
    scores = torch.tensor([[0.0, -math.inf, 1.0], [0.0, -math.inf, 1.0]])
    labels = torch.tensor([[[1.0, 0.0, 1.0]], [[1.0, 1.0, 0.0]]])
    ours = run(listwise_cross_entropy, scores, labels, torch.ones(2, 1), torch.ones(2, 1))
    two = run(listwise_cross_entropy, scores[:1, ::2], labels[:1, :, ::2], torch.ones(1, 1), torch.ones(1, 1))
    torch.testing.assert_close(ours["loss"][0], two["loss"][0])
    torch.testing.assert_close(ours["scores"][0, ::2], two["scores"][0])
    assert ours["scores"][0, 1] == 0
    assert ours["loss"][1] == math.inf
    assert ours["scores"][1, 1] == -0.5
    assert ours["scores"].isfinite().all()


def test_nan_stays_in_its_own_list() -> None:
    scores, labels, beta, upstream, _ = problem(3, 2, 9)
    clean = run(listwise_cross_entropy, scores, labels, beta, upstream)
    scores[1, 4] = math.nan
    ours = run(listwise_cross_entropy, scores, labels, beta, upstream)
    for name in ("loss", "scores"):
        assert ours[name][1].isnan().all()
        torch.testing.assert_close(ours[name][::2], clean[name][::2], rtol=1e-6, atol=1e-6)


def test_signed_labels_that_are_taken_as_they_are() -> None:
    """Group-relative advantages: their sum is 0, and sum_i A_i (-log p_i) is the policy gradient's loss."""
    scores = torch.randn(3, 5, dtype=F64, requires_grad=True)
    advantages = torch.randn(3, 5, dtype=F64)
    advantages -= advantages.mean(1, keepdim=True)
    loss = listwise_dpo(scores, advantages, normalize=None, reduction="sum")
    torch.testing.assert_close(loss, -(advantages * scores.log_softmax(-1)).sum())
    (gradient,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient, -advantages)


def test_sixteen_bit_scores_give_the_float32_loss_of_the_rounded_scores() -> None:
    scores, labels, beta, upstream, _ = problem(4, 2, 12, scale=4)
    rounded = scores.to(BF16)
    ours = run(listwise_cross_entropy, rounded, labels, beta, upstream)
    full = run(listwise_cross_entropy, rounded.float(), labels, beta, upstream)
    assert ours["loss"].dtype == F32
    assert ours["scores"].dtype == BF16
    assert torch.equal(ours["loss"], full["loss"])
    assert torch.equal(ours["scores"], full["scores"].to(BF16))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 2, 3), (6, 8, 64), (1, 2, 30)])
@pytest.mark.parametrize("common", [False, True])
def test_a_beta_of_another_dtype_is_taken_in_that_of_the_arithmetic(shape: tuple, common: bool, dtype) -> None:
    scores, labels, beta, upstream, _ = problem(*shape, scale=4)
    scores, labels = (scores.float(), labels.float()) if dtype == torch.float64 else (scores.double(), labels.double())
    beta, upstream = beta.bfloat16().to(dtype), upstream.to(scores.dtype)  # exact in every dtype

    def op(s: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return listwise_cross_entropy(s, z, t[:1, :1].expand_as(t) if common else t)

    ours = run(op, scores, labels, beta, upstream)
    same = run(op, scores, labels, beta.to(scores.dtype), upstream)
    for name in ("loss", "scores", "labels"):
        assert torch.equal(ours[name], same[name])
    torch.testing.assert_close(ours["beta"], same["beta"].to(dtype), rtol=0.02, atol=0.02)


def test_integer_labels_are_weights_like_any_other() -> None:
    scores, labels = torch.randn(4, 6), torch.randint(0, 5, (4, 2, 6))
    assert torch.equal(listwise_dpo(scores, labels), listwise_dpo(scores, labels.float()))


def test_softmax_labels_are_the_softmax_of_the_existing_ones() -> None:
    labels = torch.randn(4, 2, 6)
    mask = torch.rand(4, 6) < 0.6
    mask[0] = False
    found = normalize_labels(labels, "softmax", mask)
    for b in range(4):
        torch.testing.assert_close(found[b][:, mask[b]], labels[b][:, mask[b]].softmax(-1))
    assert not found[~mask[:, None].expand_as(found)].any()


# ---------------------------------------------------------------- the machinery of torch


def sample(masked: bool = True, common: bool = False):
    scores, labels, beta, _, mask = problem(5, 3, 7, common=common)
    leaves = [t.requires_grad_() for t in (scores, labels, beta)]
    mask = torch.rand(5, 7) < 0.7 if masked else None
    return (*leaves, mask)


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(normalize: bool, common: bool) -> None:
    torch.library.opcheck(_listwise_cross_entropy, (*sample(common=common), normalize))
    torch.library.opcheck(_listwise_cross_entropy, (*sample(masked=False, common=common), normalize))


def _train(scores: Tensor, labels: Tensor, base: Tensor, beta: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    return listwise_dpo(scores, labels, reference=base, beta=beta, weights=weights, mask=mask)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(backend: str) -> None:
    scores, labels, beta, mask = sample()
    arguments = (scores, labels, torch.randn(5, 7), beta, torch.rand(5, 3), mask)
    plain = torch.autograd.grad(_train(*arguments), (scores, labels, beta))
    compiled = torch.compile(_train, fullgraph=True, backend=backend)
    found = torch.autograd.grad(compiled(*arguments), (scores, labels, beta))
    torch.testing.assert_close(found, plain)


def test_runs_on_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        scores, labels, beta, mask = (mode.from_tensor(t) for t in sample())
        loss = listwise_cross_entropy(scores, labels, beta, mask)
        loss.sum().backward()
        assert loss.shape == (5, 3)
        assert scores.grad is not None
        assert scores.grad.shape == (5, 7)


def test_backward_can_be_repeated_and_changes_nothing_it_was_given() -> None:
    scores, labels, beta, mask = sample()
    before = [t.detach().clone() for t in (scores, labels, beta, mask)]
    loss = listwise_cross_entropy(scores, labels, beta, mask)
    kept = loss.detach().clone()
    upstream = torch.randn_like(loss)
    first = torch.autograd.grad(loss, (scores, labels, beta), upstream, retain_graph=True)
    second = torch.autograd.grad(loss, (scores, labels, beta), upstream)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(before, (scores, labels, beta, mask), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(kept, loss)


def test_results_are_equal_bit_for_bit_from_run_to_run() -> None:
    scores, labels, beta, upstream, mask = problem(300, 2, 50, masked=True)
    runs = [run(listwise_cross_entropy, scores, labels, beta, upstream, mask) for _ in range(3)]
    for name in NAMES:
        assert torch.equal(runs[0][name], runs[1][name])
        assert torch.equal(runs[0][name], runs[2][name])


def test_only_the_gradients_that_are_asked_for_are_computed(monkeypatch) -> None:
    asked = []
    backward = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *a: asked.append(a[-1]) or backward(*a))
    scores, labels, beta, mask = sample()
    listwise_cross_entropy(scores, labels.detach(), beta.detach(), mask).sum().backward()
    listwise_cross_entropy(scores.detach(), labels, beta.detach(), mask).sum().backward()
    assert asked == [(True, False, False), (False, True, False)]


def test_autocast_leaves_the_arithmetic_alone() -> None:
    scores, labels, beta, upstream, mask = problem(40, 3, 4, common=True, masked=True)
    plain = run(listwise_cross_entropy, scores, labels, beta, upstream, mask)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(torch.ones(2, 2).mm(torch.full((2, 2), 1.001)), torch.full((2, 2), 2.0, dtype=BF16))
        cast = run(listwise_cross_entropy, scores, labels, beta, upstream, mask)
    for name in NAMES:
        assert torch.equal(cast[name], plain[name])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"labels": torch.ones(4, 6)}, ["labels", "(4, 6)", "(B, m, K)", "labels[:, None]"]),
        ({"beta": torch.ones(3)}, ["beta", "(3,)", "(4, 3)", "(4, 1)"]),
        ({"beta": torch.ones(4, 3, dtype=torch.int64)}, ["beta", "int64", "floating point"]),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, ["mask", "(4, 5)", "(4, 6)"]),
    ],
)
def test_the_op_itself_broadcasts_nothing(changed: dict, words: list[str]) -> None:
    arguments = {"scores": torch.ones(4, 6), "labels": torch.ones(4, 3, 6), "beta": torch.ones(4, 3)} | changed
    with pytest.raises(ValueError) as caught:
        listwise_cross_entropy(**arguments)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


# ---------------------------------------------------------------- properties

extreme = st.one_of(
    st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 1.0, -1.0, 1e4, -1e4, 88.0, -104.0, 1e30, -1e30, 3e37])
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_extreme_scores_give_what_float64_gives(data) -> None:
    items = data.draw(st.integers(1, 9))
    scores = torch.tensor([data.draw(st.lists(extreme, min_size=items, max_size=items))])
    labels = torch.tensor(
        [[data.draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, 3.0]), min_size=items, max_size=items))]]
    )
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=items, max_size=items))])
    beta = torch.tensor([[data.draw(st.sampled_from([1.0, 0.5, 2.0]))]])
    upstream = torch.ones(1, 1)
    ours = run(listwise_cross_entropy, scores, labels, beta, upstream, mask)
    theirs = run(reference.listwise_cross_entropy, scores.double(), labels.double(), beta.double(), upstream, mask)
    expected = theirs["loss"].clamp(max=torch.finfo(F32).max)
    torch.testing.assert_close(ours["loss"].double(), expected, rtol=3e-6, atol=1e-36)
    torch.testing.assert_close(ours["scores"].double(), theirs["scores"], rtol=3e-6, atol=2e-6)
    assert ours["scores"].isfinite().all()
    assert not ours["scores"][~mask].any()


def test_infinite_scores_of_either_sign_of_beta() -> None:
    problem, expected = infinite_scores()
    torch.testing.assert_close(results(listwise_cross_entropy, problem)["beta"], expected, rtol=1e-5, atol=1e-6)
