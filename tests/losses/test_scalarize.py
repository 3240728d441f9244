"""Scalarisers of loss vectors: values by hand, derivatives, both signs of the cosine penalty, and what they reach."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mopl.losses import scalarize
from mopl.losses.scalarize import chebyshev, cosine_penalty, linear, smooth_chebyshev

F64 = torch.float64
SCALARISERS: dict[str, Callable] = {
    "linear": linear,
    "chebyshev": lambda losses, w: chebyshev(losses, w, ideal=0.1, rho=0.05),
    "smooth_chebyshev": lambda losses, w: smooth_chebyshev(losses, w, ideal=0.1, mu=0.3),
    "cosine-as_printed": cosine_penalty,
    "cosine-cosmos": lambda losses, w: cosine_penalty(losses, w, sign="cosmos"),
}
every_scalariser = pytest.mark.parametrize("scalariser", SCALARISERS.values(), ids=SCALARISERS)


def test_values_by_hand() -> None:
    losses, weights = torch.tensor([[3.0, 4.0]]), torch.tensor([0.75, 0.25])
    assert float(linear(losses, weights)) == 3.25
    assert float(chebyshev(losses, weights)) == 2.25
    assert float(chebyshev(losses, weights, ideal=torch.tensor([2.0, -6.0]))) == 2.5
    assert float(chebyshev(losses, weights, ideal=torch.tensor([2.0, -6.0]), rho=0.5)) == 2.5 + 0.5 * 3.25
    smooth = 2.0 * math.log(math.exp(2.25 / 2) + math.exp(1.0 / 2))
    assert float(smooth_chebyshev(losses, weights, mu=2.0)) == pytest.approx(smooth, rel=1e-6)
    cosine = 3.25 / (5 * math.sqrt(0.625))
    assert float(cosine_penalty(losses, weights)) == pytest.approx(cosine, rel=1e-6)
    assert float(cosine_penalty(losses, weights, sign="cosmos")) == pytest.approx(-cosine, rel=1e-6)


def test_the_module_is_exported() -> None:
    from mopl import losses

    assert losses.scalarize is scalarize


@every_scalariser
def test_a_vector_is_a_batch_of_one(scalariser: Callable) -> None:
    losses, weights = torch.rand(4, 3, dtype=F64), torch.rand(4, 3, dtype=F64)
    batch = scalariser(losses, weights)
    assert batch.shape == (4,)
    for b in range(4):
        single = scalariser(losses[b], weights[b])
        assert single.shape == ()
        torch.testing.assert_close(single, batch[b])
    torch.testing.assert_close(scalariser(losses, weights[0]), scalariser(losses, weights[:1].expand(4, 3)))
    assert scalariser(losses.bfloat16(), 0.5).dtype == torch.float32


@every_scalariser
def test_derivatives(scalariser: Callable) -> None:
    losses = torch.randn(4, 3, dtype=F64, requires_grad=True)
    weights = torch.rand(4, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(scalariser, (losses, weights))
    assert torch.autograd.gradgradcheck(scalariser, (losses, weights))


def test_the_ideal_point_is_differentiable() -> None:
    losses, weights = torch.randn(4, 3, dtype=F64), torch.rand(3, dtype=F64)
    ideal = torch.randn(4, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: chebyshev(losses, weights, z), ideal)
    assert torch.autograd.gradcheck(lambda z: smooth_chebyshev(losses, weights, z, mu=0.2), ideal)


def test_the_gradient_of_the_smooth_maximum_is_a_weighted_softmax() -> None:
    losses, weights = torch.randn(5, 3, dtype=F64, requires_grad=True), torch.rand(5, 3, dtype=F64)
    upstream = torch.randn(5, dtype=F64)
    (gradient,) = torch.autograd.grad(smooth_chebyshev(losses, weights, 0.2, mu=0.1), losses, upstream)
    expected = weights * torch.softmax(weights * (losses.detach() - 0.2) / 0.1, 1)
    torch.testing.assert_close(gradient, upstream[:, None] * expected)


def test_objectives_that_tie_share_the_gradient_of_the_maximum() -> None:
    losses = torch.tensor([2.0, 2.0, 1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(chebyshev(losses, 1.0), losses)
    assert gradient.tolist() == [0.5, 0.5, 0.0]


@given(st.integers(1, 5), st.floats(1e-3, 10), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_the_smooth_maximum_is_within_mu_log_m(objectives: int, mu: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = 10 ** (4 * torch.rand(3, objectives, generator=generator, dtype=F64) - 2)
    weights = torch.rand(3, objectives, generator=generator, dtype=F64)
    gap = smooth_chebyshev(losses, weights, mu=mu) - chebyshev(losses, weights)
    assert (gap >= -1e-9).all()
    assert (gap <= mu * math.log(objectives) + 1e-9).all()


# ---------------------------------------------------------------- the cosine penalty


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_the_cosine_does_not_depend_on_scale(scale: float) -> None:
    """Squares of float32 underflow below 1e-23 and overflow above 1e19."""
    losses, weights = torch.tensor([[0.3, 2.0, -1.0]]), torch.tensor([0.2, 0.5, 0.3])
    expected = torch.nn.functional.cosine_similarity(losses, weights[None])
    scaled = (losses * scale).requires_grad_()
    penalty = cosine_penalty(scaled, weights)
    torch.testing.assert_close(penalty, expected)
    (gradient,) = torch.autograd.grad(penalty.sum(), scaled)
    plain = losses.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(torch.nn.functional.cosine_similarity(plain, weights[None]).sum(), plain)
    torch.testing.assert_close(gradient.double() * scale, wanted.double())


@pytest.mark.parametrize("sign", ["as_printed", "cosmos"])
def test_zero_losses_and_zero_weights_have_a_finite_gradient(sign: str) -> None:
    losses = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [3.0, 0.0]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.0, 0.0], [0.5, 0.5]], requires_grad=True)
    penalty = cosine_penalty(losses, weights, sign=sign)
    gradients = torch.autograd.grad(penalty.sum(), (losses, weights))
    assert not penalty[:3].any()
    assert all(not g[:3].any() and g[3].isfinite().all() and g[3].any() for g in gradients)


def test_nan_losses_are_not_hidden() -> None:
    penalty = cosine_penalty(torch.tensor([[math.nan, 1.0], [1.0, 1.0]]), 0.5)
    assert penalty.isnan().tolist() == [True, False]


@pytest.mark.parametrize(("sign", "direction"), [("as_printed", 1), ("cosmos", -1)])
def test_the_two_signs_push_the_optimum_outwards_and_inwards(sign: str, direction: int) -> None:
    """Free scores trained at w = (1, 0), lambda = 0.05, on label distributions z_1, z_2 at a common beta.

    The optimum is sum_j w'_j z_j with w'_j proportional to w_j ± lambda (w_j / (|w||L|) - cos L_j / |L|²): with the
    printed sign beyond the end of the front, with the other one short of it.
    """
    z = torch.softmax(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.5]], dtype=F64), 1)
    weights = torch.tensor([1.0, 0.0], dtype=F64)
    scores = torch.zeros(3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def loss_vector() -> Tensor:
        return -(z @ torch.log_softmax(scores, 0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = loss_vector()
        value = linear(losses, weights) + 0.05 * cosine_penalty(losses, weights, sign=sign)
        value.backward()
        return value

    optimizer.step(closure)
    losses = loss_vector().detach()
    length = losses.norm()
    cosine = (weights @ losses) / length
    effective = weights + direction * 0.05 * (weights / length - cosine * losses / length**2)
    effective = effective / effective.sum()
    torch.testing.assert_close(torch.softmax(scores.detach(), 0), effective @ z, rtol=1e-7, atol=1e-7)
    assert 0.005 < direction * (float(effective[0]) - 1) < 0.01


# ---------------------------------------------------------------- what they reach


def test_only_tchebycheff_reaches_the_middle_of_a_concave_front() -> None:
    """The front L1² + L2² = 1: weighted sums end in a corner, Tchebycheff on the diagonal."""
    angle = torch.linspace(0, math.pi / 2, 1001, dtype=F64)
    front = torch.stack([angle.cos(), angle.sin()], 1)
    weights = torch.tensor([0.5, 0.5], dtype=F64)
    assert int(linear(front, weights).argmin()) in (0, 1000)
    assert int(chebyshev(front, weights).argmin()) == 500
    assert int(smooth_chebyshev(front, weights, mu=1e-3).argmin()) == 500


def test_augmentation_excludes_weakly_optimal_points() -> None:
    points = torch.tensor([[1.0, 1.0], [1.0, 0.5]])  # the second dominates, and has the same maximum
    plain, augmented = chebyshev(points, 1.0), chebyshev(points, 1.0, rho=0.05)
    assert plain[0] == plain[1]
    assert augmented[1] < augmented[0]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear(torch.zeros(2, 3, 4), 1.0), ValueError, r"loss_vector has shape \(2, 3, 4\)"),
        (lambda: linear(torch.zeros(()), 1.0), ValueError, 'reduction="none"'),
        (lambda: linear(torch.zeros(2, 0), 1.0), ValueError, "m >= 1"),
        (lambda: linear(torch.zeros(2, dtype=torch.long), 1.0), TypeError, "floating-point"),
        (lambda: linear([1.0, 2.0], 1.0), TypeError, "list"),
        (lambda: linear(torch.zeros(4, 3), torch.ones(4)), ValueError, r"weights\[:, None\]"),
        (lambda: chebyshev(torch.zeros(4, 3), 1.0, torch.ones(2)), ValueError, "ideal has shape"),
        (lambda: chebyshev(torch.zeros(4, 3), 1.0, rho=-1.0), ValueError, "rho is -1.0"),
        (lambda: smooth_chebyshev(torch.zeros(4, 3), 1.0, mu=0.0), ValueError, "take chebyshev"),
        (lambda: cosine_penalty(torch.zeros(3), 1.0, sign="plus"), ValueError, "'as_printed', 'cosmos'"),
    ],
)
def test_errors(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_smooth_chebyshev_of_close_losses_keeps_the_digits_of_their_differences() -> None:
    """The division by mu = 0.01 would round losses of 300 to 2e-3 before the softmax."""
    losses = torch.tensor([[300.0, 300.0078125]], requires_grad=True)
    scalarize.smooth_chebyshev(losses, 1.0).backward()
    assert float(losses.grad[0, 0]) == pytest.approx(1 / (1 + math.exp(0.78125)), rel=1e-6)
    infinite = scalarize.smooth_chebyshev(torch.tensor([[math.inf, 1.0], [-math.inf, 1.0]]), 1.0)
    assert infinite.tolist() == [math.inf, 1.0]
