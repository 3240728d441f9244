"""The Plackett–Luce likelihood on CPU: `mopl.ops.plackett_luce_nll` and `mopl.losses.plackett_luce`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mopl import reference
from mopl.losses import plackett_luce, presort
from mopl.ops import _rows
from mopl.ops.plackett_luce import Rule, cpu, plackett_luce_nll
from mopl.ops.plackett_luce.function import _plackett_luce_nll
from mopl.ops.plackett_luce.rankings import Rankings
from mopl.ops.plackett_luce.scaled import scaled

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
NAMES = ("loss", "scores", "beta")
TIES = ("breslow", "efron", "exact")


def run(op, scores: Tensor, labels: Tensor, beta: Tensor, upstream: Tensor, mask=None, **options):
    """Return the loss and the gradients of (upstream * loss).sum()."""
    leaves = [t.detach().clone().requires_grad_() for t in (scores, beta)]
    loss = op(leaves[0], labels, leaves[1], mask, **options)
    if not loss.requires_grad:  # the reference found nothing to charge
        return dict(zip(NAMES, (loss, *(torch.zeros_like(t) for t in leaves)), strict=True))
    gradients = torch.autograd.grad((loss * upstream.to(loss.dtype)).sum(), leaves, materialize_grads=True)
    return dict(zip(NAMES, (loss.detach(), *gradients), strict=True))


def value_and_gradient(scores: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Return the loss (B, m) of `plackett_luce` and the gradient of its sum."""
    scores = scores.detach().clone().requires_grad_()
    loss = plackett_luce(scores, labels, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def problem(batch: int, objectives: int, items: int, dtype=F32, scale=1.0, levels=None, common=False, masked=False):
    """Return random scores, labels, beta, upstream gradient and mask; masked slots hold NaN and inf."""
    scores = (torch.randn(batch, items, dtype=F64) * scale).to(dtype)
    labels = torch.rand(batch, objectives, items)
    if levels:
        labels = torch.randint(levels, labels.shape).float()
    beta = 2.0 ** torch.randint(-2, 3, (batch, 1 if common else objectives)).to(F64 if dtype == F64 else F32)
    mask = None
    if masked:
        mask = torch.rand(batch, items) < torch.rand(batch, 1)
        scores[~mask], labels[~mask[:, None].expand_as(labels)] = math.inf, math.nan
    return scores, labels, beta, torch.randn(batch, objectives, dtype=F64), mask


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest entry."""
    expected, actual = expected.double().nan_to_num(), actual.double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-37)) if expected.numel() else 0.0


OPTIONS = {
    "full": lambda shape: {},
    "top 2": lambda shape: {"top_k": 2},
    "top 1, last group free": lambda shape: {"top_k": 1, "last_group_free": True},
    "last group free": lambda shape: {"last_group_free": True},
    "position weights": lambda shape: {"position_weights": torch.rand(shape[2])},
    "position weights of every list, top 3": lambda shape: {"position_weights": torch.rand(shape), "top_k": 3},
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize(("batch", "objectives", "items"), [(7, 1, 2), (6, 2, 5), (3, 2, 40)])
def test_loss_and_gradients_equal_the_formula(batch, objectives, items, ties, levels, masked, kind) -> None:
    if ties == "exact" and levels and items > 9:
        pytest.skip("the reference visits every subset of a tied group")
    for dtype, scale, tolerance in (
        (F64, 1, 1e-10),
        (F64, 1e4, 1e-10),
        (F32, 1, 2e-6),
        (F32, 30, 2e-6),
        (F32, 1e4, 2e-6),
    ):
        scores, labels, beta, upstream, mask = problem(
            batch, objectives, items, dtype, scale, levels, common=scale == 30, masked=masked
        )
        options = {"ties": ties, **OPTIONS[kind](labels.shape)}
        ours = run(plackett_luce_nll, scores, labels, beta, upstream, mask, **options)
        options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
        theirs = run(reference.plackett_luce_nll, scores.double(), labels, beta.double(), upstream, mask, **options)
        for name in NAMES:
            # The gradient of the beta is a sum of terms as large as scores are.
            limit = tolerance * (5 if name == "beta" else 1)
            assert error(ours[name], theirs[name]) < limit, (name, dtype, scale)


SCORES = {
    "N(0, 1)": lambda n, k: torch.randn(n, k),
    "N(0, 10)": lambda n, k: torch.randn(n, k) * 10,
    "N(0, 100)": lambda n, k: torch.randn(n, k) * 100,
    "N(0, 1e4)": lambda n, k: torch.randn(n, k) * 1e4,
    "right order, step 5": lambda n, k: torch.arange(k, 0, -1.0).mul(5).expand(n, k),
    "right order, step 0.5": lambda n, k: torch.arange(k, 0, -1.0).mul(0.5).expand(n, k),
    "wrong order, step 5": lambda n, k: torch.arange(0.0, k).mul(5).expand(n, k),
    "N(0, 1) + 1e4": lambda n, k: torch.randn(n, k) + 1e4,
    "N(0, 1) - 1e4": lambda n, k: torch.randn(n, k) - 1e4,
}


@pytest.mark.parametrize("ties", ["none", "breslow", "efron"])
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("items", "tolerance"), [(8, 1e-6), (120, 1e-6), (1000, 4e-6)])
def test_float32_keeps_six_digits_for_any_scores(kind: str, items: int, tolerance: float, ties: str) -> None:
    scores = SCORES[kind](2, items)
    labels = torch.arange(items, 0, -1.0).expand(2, items)
    if ties != "none":
        labels = (labels / 3).floor()
    loss, gradient = value_and_gradient(scores, labels, ties="breslow" if ties == "none" else ties)
    exact_loss, exact = value_and_gradient(scores.double(), labels, ties="breslow" if ties == "none" else ties)
    u, z = scores.double().requires_grad_(), labels[:, None]
    if items <= 120:  # the formulas in plain loops; beyond, float64 stands for them
        exact_loss = reference.plackett_luce_nll(u, z, torch.ones(2, 1), ties="breslow" if ties == "none" else ties)
        (exact,) = torch.autograd.grad(exact_loss.sum(), u)
    assert ((loss - exact_loss).abs() / exact_loss).max() < tolerance
    assert ((gradient - exact).abs() / exact.abs().amax(-1, keepdim=True)).max() < tolerance


@pytest.mark.parametrize("gap", [3.0, 12.0, 30.0, 80.0])
def test_a_confident_ranking_keeps_every_digit_of_its_tiny_loss(gap: float) -> None:
    # powers of two keep the differences exact, so that float32 has no excuse
    scores = torch.tensor([[2 * gap, gap, 0.0]])
    loss, gradient = value_and_gradient(scores, torch.tensor([[2.0, 1.0, 0.0]]))
    p, first, second = math.exp(-gap), math.exp(-gap) + math.exp(-2 * gap), math.exp(-gap)
    assert float(loss) == pytest.approx(math.log1p(first) + math.log1p(second), rel=1e-6)
    q1, q2 = first / (1 + first), second / (1 + second)
    middle = p / (1 + first)
    expected = torch.tensor([-q1, middle - q2, math.exp(-2 * gap) / (1 + first) + q2], dtype=F64)
    torch.testing.assert_close(gradient[0].double(), expected, rtol=1e-6, atol=1e-6 * q1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("integer", [torch.int16, torch.int32, torch.int64])
def test_a_presorted_order_gives_what_sorting_gives(integer: torch.dtype, masked: bool) -> None:
    scores, labels, beta, upstream, mask = problem(6, 3, 9, F64, levels=4, masked=masked)
    order = presort(labels, mask).to(integer)
    for ties in TIES:
        sorted_here = run(plackett_luce_nll, scores, labels, beta, upstream, mask, ties=ties)
        presorted = run(plackett_luce_nll, scores, labels, beta, upstream, mask, ties=ties, order=order)
        torch.testing.assert_close(presorted, sorted_here, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ties", TIES)
def test_padding_and_the_order_of_items_change_nothing(ties: str) -> None:
    scores, labels, beta, upstream, _ = problem(5, 2, 6, F64, levels=3)
    place = torch.rand(5, 9).argsort(-1)[:, :6]  # every list's items go to random slots of nine
    wide, mask = torch.full((5, 9), math.nan, dtype=F64).scatter(1, place, scores), torch.zeros(5, 9, dtype=torch.bool)
    mask.scatter_(1, place, True)
    wide_labels = torch.full((5, 2, 9), math.inf).scatter(2, place[:, None].expand(5, 2, 6), labels)
    plain = run(plackett_luce_nll, scores, labels, beta, upstream, ties=ties)
    padded = run(plackett_luce_nll, wide, wide_labels, beta, upstream, mask, ties=ties)
    torch.testing.assert_close(padded["loss"], plain["loss"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(padded["beta"], plain["beta"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(padded["scores"].gather(1, place), plain["scores"], rtol=1e-10, atol=1e-12)
    assert not padded["scores"][~mask].any()


# ---------------------------------------------------------------- special values


def test_short_lists_cost_nothing_whatever_they_hold() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [math.nan, math.inf, 3.0], [3.0, 2.0, 1.0]])
    mask = torch.tensor([[False] * 3, [False, True, False], [False, False, True], [True] * 3])
    for ties in TIES:
        ours = run(
            plackett_luce_nll, scores, torch.tensor([[[1.0, 1.0, 0.0]]]).repeat(4, 1, 1), torch.ones(4, 1),
            torch.ones(4, 1), mask, ties=ties,
        )  # fmt: skip
        for value in ours.values():
            assert not value[:3].any()
            assert value[3].any()
    for shape in ((2, 0), (2, 1), (0, 3)):
        labels, beta = torch.ones(shape[0], 2, shape[1]), torch.ones(shape[0], 2)
        empty = run(plackett_luce_nll, torch.ones(shape), labels, beta, torch.ones(shape[0], 2))
        assert empty["loss"].shape == (shape[0], 2)
        assert not any(bool(value.any()) for value in empty.values())


@pytest.mark.parametrize("dtype", [F32, F64])
def test_an_item_that_cannot_be_chosen(dtype: torch.dtype) -> None:
    """At the bottom it changes nothing; above others the loss is infinite and the gradient finite, -1 for that item."""
    scores = torch.tensor([[0.0, 1.0, -math.inf]], dtype=dtype)
    loss, gradient = value_and_gradient(scores, torch.tensor([[2.0, 1.0, 0.0]]))
    plain, plain_gradient = value_and_gradient(scores[:, :2], torch.tensor([[2.0, 1.0]]))
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient[:, :2], plain_gradient)
    assert gradient[0, 2] == 0
    loss, gradient = value_and_gradient(scores, torch.tensor([[2.0, 0.0, 1.0]]))
    assert loss == math.inf
    assert gradient.isfinite().all()
    assert gradient[0, 2] == -1
    for ties in TIES:
        loss, gradient = value_and_gradient(scores, torch.tensor([[1.0, 0.0, 1.0]]), ties=ties)
        assert loss == math.inf
        assert gradient.isfinite().all()
        assert float(gradient[0, 2]) == pytest.approx(-1, rel=1e-10)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"last_group_free": True}, {"position_weights": True}], ids=str)
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_scores_of_minus_infinity_are_equal_and_below_all_others(dtype: torch.dtype, ties: str, options: dict) -> None:
    """The kernels say so as well; what costs thousands where they are finite costs inf."""
    torch.manual_seed(3)
    scores = torch.randn(60, 6, dtype=dtype).masked_fill(torch.rand(60, 6) < 0.4, -math.inf)
    scores[:3] = -math.inf
    labels, mask, beta = torch.randint(0, 4, (60, 2, 6)).float(), torch.rand(60, 6) < 0.8, torch.rand(60, 2) + 0.5
    if options.pop("position_weights", False):
        options = {"position_weights": torch.tensor([2.0, 0.0, 0.5, 1.0, 1.0, 3.0])}
    results = []
    for each in (scores, scores.clamp(min=-2e4)):
        leaves = each.clone().requires_grad_(), beta.to(dtype).requires_grad_()
        loss = plackett_luce_nll(leaves[0], labels, leaves[1], mask, ties=ties, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    (loss, gradient, of_beta), (finite, expected, of_finite) = results
    lost = finite > 1000
    assert loss[lost].isinf().all() and 0 < lost.sum() < lost.numel()
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loss[~lost], finite[~lost], **near)
    torch.testing.assert_close(gradient, expected, **near)
    assert (of_beta[lost] == math.inf).all()  # also where other scores of -inf are ranked against each other below
    if dtype == F64:  # -2e4 times a gradient that is rounded says little in float32
        torch.testing.assert_close(of_beta[~lost], of_finite[~lost], **near)


def test_an_infinite_part_that_is_not_charged_does_not_count() -> None:
    scores = torch.tensor([[2.0, -math.inf, 1.0]])
    loss, gradient = value_and_gradient(scores, torch.tensor([[2.0, 1.0, 0.0]]), top_k=1)
    assert float(loss) == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
    assert gradient.isfinite().all()


def test_nan_stays_in_its_own_list() -> None:
    scores, labels, beta, upstream, _ = problem(3, 2, 6, levels=3)
    for ties in TIES:
        for bad in (math.nan, math.inf):
            clean = run(plackett_luce_nll, scores, labels, beta, upstream, ties=ties)
            poisoned = scores.clone()
            poisoned[1, 4] = bad
            ours = run(plackett_luce_nll, poisoned, labels, beta, upstream, ties=ties)
            for name in ("loss", "scores"):
                assert ours[name][1].isnan().all()
                torch.testing.assert_close(ours[name][::2], clean[name][::2], rtol=2e-6, atol=2e-6)


def test_sixteen_bit_scores_give_the_float32_loss_of_the_rounded_scores() -> None:
    scores, labels, beta, upstream, _ = problem(4, 2, 12, scale=4, levels=5)
    rounded = scores.to(BF16)
    ours = run(plackett_luce_nll, rounded, labels, beta, upstream)
    full = run(plackett_luce_nll, rounded.float(), labels, beta, upstream)
    assert ours["loss"].dtype == F32
    assert ours["scores"].dtype == BF16
    assert torch.equal(ours["loss"], full["loss"])
    assert torch.equal(ours["scores"], full["scores"].to(BF16))


# ---------------------------------------------------------------- the forms of the CPU path


@pytest.mark.parametrize("ties", TIES)
def test_plain_sums_and_scaled_sums_agree(ties: str) -> None:
    leads = (torch.rand(20, 30) < 0.6).to(F64)
    leads[:, 0] = 1
    valid = torch.arange(30) < torch.randint(2, 31, (20, 1))
    leads[~valid] = 1
    for tied in (None, leads):
        rankings = Rankings(
            (torch.randn(20, 30, dtype=F64) * 5).masked_fill(~valid, 0),
            tied,
            valid,
            torch.rand(30, dtype=F64),
            Rule(12, ties, False),
        )
        torch.testing.assert_close(cpu.likelihood(rankings, True), scaled(rankings, True), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("ties", TIES)
def test_each_list_is_served_by_its_own_form(ties: str, monkeypatch) -> None:
    """Lists of small, wide and enormous range, with and without ties, in one batch and in blocks, or one at a time."""
    scale = torch.tensor([1.0, 40.0, 1e4, 1.0, 40.0, 1e4, 300.0, 1.0])
    scores = torch.randn(8, 12) * scale[:, None]
    labels = torch.rand(8, 2, 12)
    labels[3:, :] = labels[3:, :].mul(4).floor()
    beta, upstream = torch.ones(8, 2), torch.randn(8, 2)
    together = run(plackett_luce_nll, scores, labels, beta, upstream, ties=ties)
    monkeypatch.setattr(_rows, "_BLOCK_ITEMS", 100)
    blocks = run(plackett_luce_nll, scores, labels, beta, upstream, ties=ties)
    torch.testing.assert_close(blocks, together, rtol=1e-6, atol=1e-6)
    for b in range(8):
        part = slice(b, b + 1)
        alone = run(plackett_luce_nll, scores[part], labels[part], beta[part], upstream[part], ties=ties)
        for name in ("loss", "scores"):
            torch.testing.assert_close(together[name][part], alone[name], rtol=1e-6, atol=1e-6)


def test_a_negative_or_zero_beta_is_just_a_number() -> None:
    scores, labels, _, upstream, _ = problem(5, 2, 6, F64)
    beta = torch.tensor([[-1.5, 0.0]], dtype=F64).repeat(5, 1)
    ours = run(plackett_luce_nll, scores, labels, beta, upstream)
    theirs = run(reference.plackett_luce_nll, scores, labels, beta, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- the machinery of torch


def sample():
    scores, labels, beta, _, _ = problem(5, 3, 7, levels=4)
    return scores.requires_grad_(), labels, beta.requires_grad_(), torch.rand(5, 7) < 0.8


@pytest.mark.parametrize("ties", TIES)
def test_opcheck(ties: str) -> None:
    scores, labels, beta, mask = sample()
    order = presort(labels, mask)
    torch.library.opcheck(_plackett_luce_nll, (scores, labels, beta, mask, order, torch.rand(7), 3, ties, True, True))
    common = beta.detach()[:, :1].clone().requires_grad_()
    torch.library.opcheck(
        _plackett_luce_nll, (scores, labels, common, None, None, torch.rand(5, 3, 7), None, ties, False, True)
    )


def _train(scores: Tensor, labels: Tensor, base: Tensor, beta: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    return plackett_luce(scores, labels, reference=base, beta=beta, weights=weights, mask=mask, top_k=4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(backend: str) -> None:
    scores, labels, beta, mask = sample()
    arguments = (scores, labels, torch.randn(5, 7), beta, torch.rand(5, 3), mask)
    plain = torch.autograd.grad(_train(*arguments), (scores, beta))
    compiled = torch.compile(_train, fullgraph=True, backend=backend)
    found = torch.autograd.grad(compiled(*arguments), (scores, beta))
    torch.testing.assert_close(found, plain)


def test_random_ties_compile_to_one_graph() -> None:
    scores, labels = torch.randn(3, 6, requires_grad=True), torch.randint(0, 2, (3, 6))
    compiled = torch.compile(lambda s: plackett_luce(s, labels, ties="random"), fullgraph=True, backend="aot_eager")
    compiled(scores).backward()
    assert scores.grad is not None
    assert scores.grad.sum(1).abs().max() < 1e-5


def test_runs_on_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        scores, labels, beta, mask = (mode.from_tensor(t) for t in sample())
        loss = plackett_luce_nll(scores, labels, beta, mask)
        loss.sum().backward()
        assert loss.shape == (5, 3)
        assert scores.grad is not None
        assert scores.grad.shape == (5, 7)


def test_backward_can_be_repeated_and_changes_nothing_it_was_given() -> None:
    scores, labels, beta, mask = sample()
    order, weights = presort(labels, mask), torch.rand(5, 3, 7)
    given = (scores, labels, beta, mask, order, weights)
    before = [t.detach().clone() for t in given]
    loss = plackett_luce_nll(scores, labels, beta, mask, order, weights)
    upstream = torch.randn_like(loss)
    first = torch.autograd.grad(loss, (scores, beta), upstream, retain_graph=True)
    second = torch.autograd.grad(loss, (scores, beta), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


@pytest.mark.parametrize("ties", TIES)
def test_results_are_equal_bit_for_bit_from_run_to_run(ties: str) -> None:
    scores, labels, beta, upstream, mask = problem(200, 2, 30, scale=20, levels=10, masked=True)
    runs = [run(plackett_luce_nll, scores, labels, beta, upstream, mask, ties=ties) for _ in range(2)]
    for name in NAMES:
        assert torch.equal(runs[0][name], runs[1][name])


def test_without_gradients_none_are_made(monkeypatch) -> None:
    made = []
    likelihood = cpu.likelihood
    monkeypatch.setattr(
        "mopl.ops.plackett_luce.cpu.likelihood", lambda r, need: made.append(need) or likelihood(r, need)
    )
    scores, labels, beta, mask = sample()
    with torch.no_grad():
        plackett_luce_nll(scores, labels, beta, mask)
    plackett_luce_nll(scores.detach(), labels, beta.detach(), mask)
    plackett_luce_nll(scores, labels, beta.detach(), mask)
    assert made == [False, False, True]


def test_autocast_leaves_the_arithmetic_alone() -> None:
    scores, labels, beta, upstream, mask = problem(40, 3, 4, common=True, masked=True)
    plain = run(plackett_luce_nll, scores, labels, beta, upstream, mask)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(torch.ones(2, 2).mm(torch.full((2, 2), 1.001)), torch.full((2, 2), 2.0, dtype=BF16))
        cast = run(plackett_luce_nll, scores, labels, beta, upstream, mask)
    for name in NAMES:
        assert torch.equal(cast[name], plain[name])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"labels": torch.ones(4, 6)}, ["labels", "(4, 6)", "(B, m, K)", "labels[:, None]"]),
        ({"beta": torch.ones(3)}, ["beta", "(3,)", "(4, 3)", "(4, 1)"]),
        ({"beta": torch.ones(4, 3, dtype=torch.int64)}, ["beta", "int64", "floating point"]),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, ["mask", "(4, 5)", "(4, 6)"]),
        ({"ties": "random"}, ["ties", "'random'", "'breslow'", "'efron'", "'exact'"]),
        ({"order": torch.zeros(4, 6, dtype=torch.int64)}, ["order", "(4, 6)", "(4, 3, 6)"]),
        ({"position_weights": torch.ones(5)}, ["position_weights", "(5,)", "(K,) or (B, m, K)"]),
    ],
)
def test_the_op_itself_broadcasts_nothing(changed: dict, words: list[str]) -> None:
    arguments = {"scores": torch.ones(4, 6), "labels": torch.ones(4, 3, 6), "beta": torch.ones(4, 3)} | changed
    with pytest.raises(ValueError) as caught:
        plackett_luce_nll(**arguments)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


# ---------------------------------------------------------------- properties

extreme = st.one_of(
    st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 1.0, -1.0, 1e4, -1e4, 88.0, -104.0, 1e30, -1e30])
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_extreme_scores_give_what_float64_gives(data) -> None:
    items = data.draw(st.integers(1, 7))

    def several(values):
        return data.draw(st.lists(values, min_size=items, max_size=items))

    scores, labels, mask = (
        torch.tensor([several(extreme)]),
        torch.tensor([[several(st.integers(0, 3))]]),
        several(st.booleans()),
    )
    options = {
        "ties": data.draw(st.sampled_from(TIES)),
        "top_k": data.draw(st.sampled_from([None, 1, 3])),
        "last_group_free": data.draw(st.booleans()),
        "mask": torch.tensor([mask]),
    }
    beta, upstream = torch.tensor([[data.draw(st.sampled_from([1.0, 0.5, 2.0]))]]), torch.ones(1, 1)
    huge = scores[options["mask"] & (scores.abs() > 1e5)]
    # Where the reference adds logarithms of probabilities, 1e30 swamps the others; and log 2 where two items have it.
    if options["ties"] == "exact" or len(huge.unique()) < len(huge):
        scores = scores.clamp(-1e5, 1e5)
    ours = run(plackett_luce_nll, scores, labels, beta, upstream, **options)
    theirs = run(reference.plackett_luce_nll, scores.double(), labels, beta.double(), upstream, **options)
    torch.testing.assert_close(ours["loss"].double(), theirs["loss"], rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(ours["scores"].double(), theirs["scores"], rtol=3e-6, atol=2e-6)
    assert not ours["scores"][~options["mask"]].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(1, 6), st.floats(0.1, 1e4), st.sampled_from(TIES), st.integers(0, 2**31))
def test_gradients_of_a_list_sum_to_zero(items: int, levels: int, scale: float, ties: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, items, generator=generator) * scale
    labels = torch.randint(0, levels, (3, items), generator=generator)
    loss, gradient = value_and_gradient(scores, labels, ties=ties)
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert (gradient.double().sum(1).abs() <= 1e-5 * gradient.abs().sum(1).clamp(min=1e-30)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top", [None, 1])
def test_pairs_of_any_gap_have_the_loss_of_the_logistic_function(dtype: torch.dtype, top: int | None) -> None:
    gap = torch.tensor([-1e4, -300.0, -88.0, -20.5, -19.5, -1e-6, 0.0, 0.5, 19.5, 20.5, 39.0, 41.0, 300.0, 1e4, 3e38])
    scores = torch.stack([torch.zeros_like(gap), gap], -1).to(dtype).requires_grad_()
    labels, weight = torch.tensor([[1.0, 0.0]]).expand(len(gap), 2), torch.tensor([0.3, 7.0], dtype=dtype)
    loss = plackett_luce(scores, labels, position_weights=weight, top_k=top, reduction="none")[:, 0]
    exact = 0.3 * torch.logaddexp(torch.zeros_like(gap, dtype=torch.float64), gap.double())
    torch.testing.assert_close(loss.double(), exact, rtol=2e-7, atol=1e-37)
    upstream = torch.randn(len(gap), dtype=dtype)
    (gradient,) = torch.autograd.grad(loss, scores, upstream)
    share = 0.3 * upstream.double() * gap.double().sigmoid()
    torch.testing.assert_close(gradient.double(), torch.stack([-share, share], -1), rtol=4e-7, atol=1e-37)


def test_a_loss_that_overflows_has_a_derivative_in_beta_beside_scores_of_minus_infinity() -> None:
    """These are ranked against each other below, so they add 0, and not infinity times what rounding left."""
    scores = torch.tensor([[-3e38, 3e38, -math.inf, -math.inf, -math.inf]])
    beta = torch.tensor([[1.0]], requires_grad=True)
    for labels in ([4.0, 3.0, 2.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0, 0.0]):
        loss = plackett_luce_nll(
            scores, torch.tensor([[labels]]), beta, position_weights=torch.tensor([1, 1, 0.3, 2, 1])
        )
        (gradient,) = torch.autograd.grad(loss.sum(), beta)
        assert loss.item() == math.inf and gradient.item() == math.inf
