"""What the Plackett–Luce likelihood means: probabilities of rankings, rules for ties, and each argument of the loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mopl.losses import plackett_luce, presort
from mopl.ops.plackett_luce.exact_ties import any_order

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
TIES = ("breslow", "efron", "exact")


def value_and_gradient(scores: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Return the loss (B, m) of `plackett_luce` and the gradient of its sum."""
    scores = scores.detach().clone().requires_grad_()
    loss = plackett_luce(scores, labels, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest entry."""
    return float((actual.double() - expected).abs().max() / expected.abs().max())


# ---------------------------------------------------------------- probability


@pytest.mark.parametrize("items", [4, 5])
def test_probabilities_of_all_rankings_sum_to_one(items: int) -> None:
    orders = torch.tensor(list(itertools.permutations(range(items))))
    labels = torch.empty(len(orders), items).scatter_(
        1, orders, torch.arange(items, 0, -1.0).expand(len(orders), items)
    )
    scores = (torch.randn(items, dtype=F64) * 3).expand(len(orders), items)
    assert float((-plackett_luce(scores, labels, reduction="none")).exp().sum()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_probabilities_of_all_top_k_rankings_sum_to_one(top_k: int) -> None:
    items = 5
    orders = torch.tensor(list(itertools.permutations(range(items), top_k)))
    labels = torch.zeros(len(orders), items)
    labels.scatter_(1, orders, torch.arange(top_k, 0, -1.0).expand(len(orders), top_k))
    scores = torch.randn(items, dtype=F64).expand(len(orders), items)
    for options in ({"top_k": top_k}, {"last_group": "free"}):
        total = (-plackett_luce(scores, labels, reduction="none", **options)).exp().sum()
        assert float(total) == pytest.approx(1, rel=1e-12)


def test_probabilities_of_all_weak_orders_with_ties_in_any_order_cover_each_order() -> None:
    """P(a tied group in any order) is the sum over its orders: brute force over the rankings of five items."""
    scores = torch.randn(5, dtype=F64) * 2
    for labels in (
        [2, 2, 1, 1, 0],
        [3, 3, 3, 1, 0],
        [1, 1, 1, 1, 0],
        [2, 1, 1, 1, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
    ):
        total = 0.0
        for order in itertools.permutations(range(5)):
            ranked = [labels[i] for i in order]
            if ranked == sorted(labels, reverse=True):
                strict = torch.empty(5).scatter_(0, torch.tensor(order), torch.arange(5, 0, -1.0))
                total += math.exp(-float(plackett_luce(scores[None], strict[None])))
        marginal = plackett_luce(scores[None], torch.tensor([labels]), ties="exact")
        assert float(marginal) == pytest.approx(-math.log(total), rel=1e-10, abs=1e-12)


def test_random_ties_cost_on_average_what_all_orders_cost_on_average() -> None:
    scores = torch.tensor([[2.0, 0.0, 1.0, -1.0]], dtype=F64)
    labels = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    costs = [
        float(plackett_luce(scores, torch.tensor([[4.0 - a, 4.0 - (1 - a), 2.0 - c, 2.0 - (1 - c)]])))
        for a in (0, 1)
        for c in (0, 1)
    ]
    assert sum(costs) / 4 == pytest.approx(3.445, abs=1e-3)
    draws = plackett_luce(
        scores.expand(4000, 4), labels.expand(4000, 4), ties="random", reduction="none",
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert {round(float(v), 9) for v in draws} == {round(v, 9) for v in costs}
    assert float(draws.mean()) == pytest.approx(sum(costs) / 4, abs=0.06)


def test_random_ties_repeat_with_the_generator_and_leave_the_free_group_alone() -> None:
    scores, labels = torch.randn(20, 6), torch.randint(0, 3, (20, 2, 6))

    def draw(seed: int, **options) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return plackett_luce(scores, labels, ties="random", generator=generator, reduction="none", **options)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    two_levels = torch.tensor([[2.0, 0.0, 0.0, 1.0]])
    free = plackett_luce(scores[:1, :4], two_levels, ties="random", last_group="free")
    assert float(free) == pytest.approx(float(plackett_luce(scores[:1, :4], two_levels, last_group="free")), rel=1e-6)


def test_the_worked_example_of_tied_pairs() -> None:
    scores, labels = torch.tensor([[2.0, 0.0, 1.0, -1.0]], dtype=F64), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    for ties, value in {"breslow": 5.134, "efron": 3.986, "exact": 1.518}.items():
        assert float(plackett_luce(scores, labels, ties=ties)) == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize("size", [2, 3, 10, 30, 100, 1000])
@pytest.mark.parametrize("log_odds", [-40.0, -3.0, 0.0, 2.0, 9.0, 25.0, 60.0])
def test_a_group_of_equal_scores_in_any_order_is_a_beta_function(size: int, log_odds: float) -> None:
    """int exp(-t) (1 - exp(-a t))^n dt = Gamma(n + 1) Gamma(1 + 1/a) / Gamma(n + 1 + 1/a)."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        c = mpmath.exp(-log_odds)
        expected = -(mpmath.loggamma(size + 1) + mpmath.loggamma(1 + c) - mpmath.loggamma(size + 1 + c))
        slope = c * (mpmath.digamma(size + 1 + c) - mpmath.digamma(1 + c)) / size  # -d expected / d log odds, each
        for dtype, tolerance in ((F64, 1e-10), (F32, 3e-7)):
            loss, phi = any_order(
                torch.full((size,), log_odds, dtype=F64),
                torch.zeros(size, dtype=torch.int64),
                torch.tensor([size]),
                dtype,
            )
            assert abs(float(loss) / float(expected) - 1) < tolerance
            assert abs(float(phi[0]) / float(slope) - 1) < tolerance
            assert float((phi - phi[0]).abs().max()) <= 1e-12 * float(phi[0])


def test_ties_in_any_order_of_groups_of_every_size_at_once() -> None:
    size = torch.tensor([2, 7, 3, 90, 2, 15])
    group = torch.arange(6).repeat_interleave(size)
    odds = torch.randn(len(group), dtype=F64) * 3
    loss, phi = any_order(odds, group, size, F64)
    for j in range(6):
        alone = any_order(odds[group == j], torch.zeros(int(size[j]), dtype=torch.int64), size[j : j + 1], F64)
        torch.testing.assert_close(loss[j : j + 1], alone[0], rtol=1e-10, atol=0)
        torch.testing.assert_close(phi[group == j], alone[1], rtol=1e-9, atol=1e-14)


# ---------------------------------------------------------------- what the arguments mean


def test_items_of_one_label_group_are_charged_or_not_together() -> None:
    """A tied group that straddles the cut is charged whole; one that starts behind it is not."""
    scores = torch.randn(1, 5, dtype=F64)
    labels = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    for ties in TIES:
        upto = [float(plackett_luce(scores, labels, top_k=k, ties=ties)) for k in range(1, 6)]
        assert upto[1] == upto[2] == upto[3]
        assert upto[0] < upto[1]
        assert upto[4] == pytest.approx(upto[3], rel=1e-12)  # the last item has nothing below
        assert upto[4] == pytest.approx(float(plackett_luce(scores, labels, ties=ties)), rel=1e-12)


def test_a_free_last_group_is_an_unranked_tail() -> None:
    scores, labels = torch.randn(4, 6, dtype=F64), torch.tensor([[5.0, 4.0, 3.0, 0.0, 0.0, 0.0]]).expand(4, 6)
    free = value_and_gradient(scores, labels, last_group="free")
    top = value_and_gradient(scores, labels, top_k=3)
    torch.testing.assert_close(free, top)
    charged, _ = value_and_gradient(scores, labels)
    assert (charged > free[0]).all()
    same = torch.zeros(4, 6)
    loss, gradient = value_and_gradient(scores, same, last_group="free")
    assert not loss.any()
    assert not gradient.any()


def test_the_last_group_is_free_in_any_order() -> None:
    scores, labels = torch.randn(4, 6, dtype=F64), torch.tensor([[5.0, 5.0, 3.0, 0.0, 0.0, 0.0]]).expand(4, 6)
    torch.testing.assert_close(
        value_and_gradient(scores, labels, ties="exact"),
        value_and_gradient(scores, labels, ties="exact", last_group="free"),
    )


def test_position_weights_multiply_the_choices_and_are_averaged_over_ties() -> None:
    scores = torch.randn(3, 4, dtype=F64)
    labels = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(3, 4)
    parts = [plackett_luce(scores, labels, position_weights=torch.eye(4)[k], reduction="none")[:, 0] for k in range(4)]
    for k in range(4):
        torch.testing.assert_close(parts[k], scores[:, k:].logsumexp(1) - scores[:, k])
    weights = torch.rand(4)
    total = plackett_luce(scores, labels, position_weights=weights, reduction="none")[:, 0]
    torch.testing.assert_close(total, sum(w * p for w, p in zip(weights.double(), parts, strict=True)))
    tied = torch.tensor([[2.0, 2.0, 1.0, 0.0]]).expand(3, 4)
    uneven, even = torch.tensor([0.2, 1.8, 1.0, 1.0]), torch.ones(4)
    for ties in TIES:
        torch.testing.assert_close(
            plackett_luce(scores, tied, position_weights=uneven, ties=ties, reduction="none"),
            plackett_luce(scores, tied, position_weights=even, ties=ties, reduction="none"),
        )


def test_huge_position_weights_do_not_overflow() -> None:
    """p-ListMLE's 2^(n-k) - 1 over 100 items spans thirty orders of magnitude."""
    scores, labels = torch.randn(2, 100) * 10, torch.rand(2, 100)
    weights = 2.0 ** torch.arange(99, -1, -1.0) - 1
    loss, gradient = value_and_gradient(scores, labels, position_weights=weights)
    exact_loss, exact = value_and_gradient(scores.double(), labels, position_weights=weights.double())
    assert error(loss, exact_loss) < 1e-6
    assert error(gradient, exact) < 1e-6


def test_presort_is_a_permutation_best_first_with_masked_items_last() -> None:
    labels = torch.randint(-3, 3, (8, 2, 10)).float()
    mask = torch.rand(8, 10) < 0.6
    labels[0, 0, :3] = -math.inf  # a label like any other
    mask[0, :3] = True
    for ties in ("stable", "random"):
        order = presort(labels.masked_fill(~mask[:, None], math.nan), mask, ties=ties)
        assert order.dtype == torch.int32
        assert torch.equal(order.sort(-1).values, torch.arange(10, dtype=torch.int32).expand(8, 2, 10))
        exists = mask[:, None].expand(8, 2, 10).gather(2, order.long())
        assert torch.equal(exists, exists.sort(-1, descending=True).values)
        ranked = labels.gather(2, order.long())
        assert ((ranked[..., 1:] <= ranked[..., :-1]) | ~exists[..., 1:]).all()


def test_labels_of_minus_infinity_still_come_before_masked_items() -> None:
    scores = torch.randn(1, 5, dtype=F64)
    mask = torch.tensor([[True, False, True, True, False]])
    labels = torch.tensor([[-math.inf, math.inf, 1.0, 0.0, math.nan]])
    plain = plackett_luce(scores[:, [2, 3, 0]], torch.tensor([[2.0, 1.0, 0.0]]))
    torch.testing.assert_close(plackett_luce(scores, labels, mask=mask), plain)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, F64, BF16])
def test_labels_of_any_dtype_rank_alike(dtype: torch.dtype) -> None:
    scores, labels = torch.randn(5, 7), torch.randint(0, 2, (5, 2, 7))
    mask = torch.rand(5, 7) < 0.7
    assert torch.equal(
        plackett_luce(scores, labels.to(dtype), mask=mask), plackett_luce(scores, labels.float(), mask=mask)
    )


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
@pytest.mark.parametrize("beta_shape", [(), (2,), (3, 1), (3, 2)])
def test_gradcheck_of_every_differentiable_argument(ties: str, beta_shape) -> None:
    def leaf(*shape: int) -> Tensor:
        return (torch.rand(shape, dtype=F64) * 2 + 0.2).requires_grad_()

    mask = torch.tensor(
        [[True, True, True, True, True], [True, False, True, True, True], [True, False, True, False, False]]
    )
    labels = torch.tensor([[[2, 1, 1, 0, 1], [4, 2, 3, 1, 0]]]).expand(3, 2, 5)

    def loss(scores, base, beta, weights):
        return plackett_luce(
            scores, labels, reference=base, beta=beta, weights=weights, mask=mask, ties=ties,
            position_weights=torch.tensor([1.0, 0.7, 0.5, 0.4, 0.1]), reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (leaf(3, 5), leaf(3, 5), leaf(*beta_shape), leaf(3, 2)))
