"""Gradients of pair losses where a probability rounds to 1: small, and neither 0 nor noise."""

import math

import pytest
import torch
from torch import Tensor

from mopl.losses import bradley_terry


def slopes(chosen: float, rejected: float, **options) -> list[Tensor]:
    """Return the gradients by chosen, rejected and beta, in float32."""
    leaves = [torch.tensor([[value]], requires_grad=True) for value in (chosen, rejected, options.pop("beta"))]
    bradley_terry(leaves[0], leaves[1], beta=leaves[2], **options).backward()
    return [leaf.grad for leaf in leaves]


def saturated(x: float) -> float:
    """Return s'(x) = s(x) s(-x), 2e-9 at 20."""
    return math.exp(-abs(x)) / (1 + math.exp(-abs(x))) ** 2


@pytest.mark.parametrize("x", [20.0, -20.0, 3.0])
def test_apo_has_the_slope_of_the_sigmoid_on_both_sides(x: float) -> None:
    by_chosen, by_rejected, _ = slopes(x, 1.0, beta=1.0, loss_type="apo_zero")
    assert float(by_chosen) == pytest.approx(-saturated(x), rel=1e-6)
    by_chosen, by_rejected, _ = slopes(1.0, x, beta=1.0, loss_type="apo_zero")
    assert float(by_rejected) == pytest.approx(saturated(x), rel=1e-6)
    by_chosen, by_rejected, _ = slopes(x, 0.0, beta=1.0, loss_type="apo_down")
    assert float(by_rejected) == pytest.approx(saturated(x), rel=1e-6)


def test_apo_down_of_close_responses_subtracts_before_it_multiplies() -> None:
    pair = torch.tensor([[-3001.0]]), torch.tensor([[-3091.0]])
    loss = bradley_terry(*pair, beta=0.1, loss_type="apo_down")
    assert float(loss) == pytest.approx(1 / (1 + math.exp(9.0)), rel=2e-6)


def test_discopop_and_exo_keep_the_slope_of_a_won_pair() -> None:
    # -(1 - g) log s(x) + g e^-x with g = s(20 x) has the slope (20 g' log s(x)) - (1 - g) s(-x) + (20 g' - g) e^-x.
    x, g = 2.0, saturated(40.0)
    expected = 20 * g * -math.log1p(math.exp(-x)) + (20 * g - 1) * math.exp(-x)
    by_chosen, *_ = slopes(x, 0.0, beta=1.0, loss_type="discopop")
    assert float(by_chosen) == pytest.approx(expected, rel=1e-6)
    # KL((s(x), s(-x)) from (1 - e, e)) has the slope s'(x) (x - log((1 - e) / e)).
    by_chosen, *_ = slopes(20.0, 0.0, beta=1.0, loss_type="exo_pair", label_smoothing=0.4)
    assert float(by_chosen) == pytest.approx(saturated(20.0) * (20 - math.log(1.5)), rel=1e-6)


def test_alpha_divergence_of_likely_responses_keeps_its_slope() -> None:
    # f' = (e^((a - 1) w) - 1) / (a - 1), so the slope by w is e^((a - 1) w), times -s(-x) of the logistic loss.
    w, l = 40.0, 39.0
    x = (math.exp(-w / 2) - math.exp(-l / 2)) / -0.5
    by_chosen, by_rejected, _ = slopes(w, l, beta=1.0, f_divergence="alpha_divergence")
    assert float(by_chosen) == pytest.approx(-math.exp(-w / 2) / (1 + math.exp(x)), rel=1e-5)
    assert float(by_rejected) == pytest.approx(math.exp(-l / 2) / (1 + math.exp(x)), rel=1e-5)


@pytest.mark.parametrize(("x", "tau"), [(-math.inf, 0.05), (-math.inf, 1.0), (-1e3, 2.0), (math.inf, 1.0)])
def test_discopop_and_its_slopes_go_to_their_limits(x: float, tau: float) -> None:
    # To the left it is -x + exp((1 / tau - 1) x), to the right 0; in beta, the slope by x times the log-ratio.
    limit = 0.0 if x > 0 else -math.inf if tau > 1 else -1.0
    pair = [torch.tensor([[value]]) for value in (x, 0.0)]
    assert float(bradley_terry(*pair, beta=1.0, loss_type="discopop", discopop_tau=tau)) == (0.0 if x > 0 else math.inf)
    by_chosen, by_rejected, by_beta = slopes(x, 0.0, beta=1.0, loss_type="discopop", discopop_tau=tau)
    assert (float(by_chosen), float(by_rejected)) == (limit, -limit)
    assert float(by_beta) == (0.0 if x > 0 else math.inf)
