"""Lists with scores of -inf: equal to each other and below all others, in every loss of lists and every derivative."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mopl.losses import approx_ndcg, bradley_terry, lambda_loss, listwise_dpo, pairwise_logistic, plackett_luce
from mopl.losses.pairwise import LOSS_TYPES

INF = math.inf
LOSSES: dict[str, Callable[..., Tensor]] = {
    "listwise": listwise_dpo,
    "plackett-luce": plackett_luce,
    "plackett-luce efron": lambda *a, **k: plackett_luce(*a, ties="efron", **k),
    "plackett-luce exact": lambda *a, **k: plackett_luce(*a, ties="exact", **k),
    "pairwise": pairwise_logistic,
    "lambda": lambda_loss,
    "approx-ndcg": approx_ndcg,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def both_ways(loss: Callable[..., Tensor], scores: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """Return loss, dscores and dbeta by the op, and by its formula in the transforms of torch.func."""

    def value(s: Tensor, beta: Tensor) -> Tensor:
        return loss(s, labels, beta=beta, reduction="none")

    leaves = [scores.clone().requires_grad_(), torch.full((len(scores), 1), 0.7, requires_grad=True)]
    found = value(*leaves)
    plain = [t.detach() for t in leaves]
    return [
        [found.detach(), *torch.autograd.grad(found.sum(), leaves)],
        [value(*plain), *torch.func.grad(lambda s, b: value(s, b).sum(), (0, 1))(*plain)],
    ]


@every_loss
def test_scores_of_minus_infinity_at_the_bottom_have_a_finite_gradient_of_beta(loss: Callable[..., Tensor]) -> None:
    scores = torch.tensor([[2.0, 1.0, -INF], [1.0, -INF, -INF], [-INF, -INF, -INF], [0.5, 2.0, -INF]])
    labels = torch.tensor([[[3.0, 2.0, 0.0]], [[3.0, 0.0, 0.0]], [[3.0, 2.0, 0.0]], [[3.0, 2.0, 0.0]]])
    expected = loss(scores.clamp(min=-200.0), labels, beta=torch.full((4, 1), 0.7), reduction="none")
    for value, of_scores, of_beta in both_ways(loss, scores, labels):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert of_scores.isfinite().all()
        # Where the others say nothing about β its derivative is 0; else it is sum_i dscores_i scores_i / β.
        known = torch.where(scores.isinf(), 0, of_scores * scores).sum(-1, keepdim=True) / 0.7
        torch.testing.assert_close(of_beta, known, rtol=1e-4, atol=1e-6)


@every_loss
def test_an_infinite_loss_has_an_infinite_derivative_in_beta(loss: Callable[..., Tensor]) -> None:
    scores, labels = torch.tensor([[-INF, 1.0, -INF, 2.0]]), torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    for value, of_scores, of_beta in both_ways(loss, scores, labels):
        assert of_scores.isfinite().all()
        if loss is approx_ndcg:  # which is bounded
            assert value.isfinite().all() and of_beta.isfinite().all()
        else:
            assert value.item() == INF and of_beta.item() == INF


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
def test_a_score_of_infinity_makes_plackett_luce_nan(ties: str) -> None:
    scores, labels = torch.tensor([[INF, 1.0, 2.0]]), torch.tensor([[[3.0, 2.0, 0.0]]])
    for value, of_scores, of_beta in both_ways(
        LOSSES[f"plackett-luce {ties}".removesuffix(" breslow")], scores, labels
    ):
        assert value.isnan().all() and of_scores.isnan().any() and of_beta.isnan().all()


@pytest.mark.parametrize("loss", [pairwise_logistic, lambda_loss])
def test_an_item_in_no_pair_has_no_gradient_whatever_its_score(loss: Callable[..., Tensor]) -> None:
    for value, of_scores, _ in both_ways(loss, torch.tensor([[math.nan, 1.0]]), torch.ones(1, 1, 2)):
        assert not value.any() and not of_scores.any()


def test_a_pair_whose_gains_are_equal_costs_nothing_however_wrong() -> None:
    labels = torch.tensor([[[1.0, 0.0, 200.0]]])  # beside a gain of 2^200, one of 2 is 0 in float32
    loss = functools.partial(lambda_loss, normalize=True)
    for value, of_scores, of_beta in both_ways(loss, torch.tensor([[-INF, 0.0, 1.0]]), labels):
        assert value.isfinite().all() and of_scores.isfinite().all() and of_beta.isfinite().all()


def test_a_list_without_labels_has_no_gradient_of_its_labels() -> None:
    labels = torch.zeros(1, 1, 2, requires_grad=True)
    loss = listwise_dpo(torch.tensor([[math.nan, 1.0]]), labels, reduction="none")
    assert not torch.autograd.grad(loss.sum(), labels)[0].any()


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
@pytest.mark.parametrize(
    ("scores", "beta"),
    [([-INF, -3.6, 1.0, -INF], 3e38), ([0.0, 1e37, -INF, 3e37], 100.0), ([2.0, 1e20, 3e20, -1e20], 1e30)],
)
def test_scores_that_beta_takes_past_float32_stay_apart(scores: list[float], beta: float, ties: str) -> None:
    """Infinite products would all be equal, and the loss log 2 an item."""
    loss = LOSSES[f"plackett-luce {ties}".removesuffix(" breslow")]
    for labels in ([3.0, 2.0, 1.0, 0.0], [0.0, 2.0, 1.0, 2.0], [0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 2.0]):
        found = []
        for dtype in (torch.float32, torch.float64):
            leaves = [torch.tensor([scores], dtype=torch.float32).to(dtype), torch.tensor([[beta]]).to(dtype)]
            s, rate = (leaf.requires_grad_() for leaf in leaves)
            value = loss(s, torch.tensor([labels]), beta=rate)
            found.append([value.detach().float(), *(g.float() for g in torch.autograd.grad(value, (s, rate)))])
        torch.testing.assert_close(*found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss_type", sorted({*LOSS_TYPES} - {"exo_pair"}))
def test_impossible_responses_leave_the_derivative_of_beta_a_number_where_the_loss_is_one(loss_type: str) -> None:
    for chosen, rejected in ((-1.0, -INF), (-INF, -1.0)):

        def value(beta: Tensor, chosen: float = chosen, rejected: float = rejected) -> Tensor:
            pair = torch.tensor([chosen]), torch.tensor([rejected])
            return bradley_terry(*pair, beta=beta, loss_type=loss_type, reduction="sum")

        beta = torch.tensor(0.7, requires_grad=True)
        loss = value(beta)
        (found,) = torch.autograd.grad(loss, beta)
        assert found.item() == torch.func.grad(value)(beta.detach()).item()
        if loss.isfinite():
            nearly = bradley_terry(
                torch.tensor([max(chosen, -200.0)]), torch.tensor([max(rejected, -200.0)]), beta=beta,
                loss_type=loss_type, reduction="sum",
            )  # fmt: skip
            torch.testing.assert_close(found, torch.autograd.grad(nearly, beta)[0], rtol=1e-4, atol=1e-6)
        else:
            assert found.isinf()
