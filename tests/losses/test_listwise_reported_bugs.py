"""Faults that users of other libraries reported in their listwise losses, as statements about ours."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mopl.losses import approx_ndcg, lambda_loss, listwise_dpo, pairwise_logistic, plackett_luce

LOSSES = pytest.mark.parametrize("loss", [listwise_dpo, plackett_luce])


def value_and_gradient(loss, scores: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    scores = scores.detach().clone().requires_grad_()
    value = loss(scores, labels, reduction="none", **options)
    return value.detach(), torch.autograd.grad(value.sum(), scores)[0]


@LOSSES
@pytest.mark.parametrize("padding", [0.0, -23.0, 1e4, math.inf, math.nan])
def test_padding_does_not_enter_the_normaliser(loss, padding: float) -> None:
    """sentence-transformers#3827 (the gradient changed sign), TF-Ranking#359 and its pads of log(1e-10) = -23."""
    scores, labels = torch.tensor([[-30.0, -31.0, -29.5]]), torch.tensor([[2.0, 1.0, 0.0]])
    wide = torch.tensor([[-30.0, -31.0, -29.5, padding, padding]])
    wide_labels = torch.tensor([[2.0, 1.0, 0.0, padding, padding]])
    mask = torch.tensor([[True, True, True, False, False]])
    plain = value_and_gradient(loss, scores, labels)
    padded = value_and_gradient(loss, wide, wide_labels, mask=mask)
    torch.testing.assert_close(padded[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(padded[1][:, :3], plain[1], rtol=1e-5, atol=1e-7)
    assert not padded[1][:, 3:].any()


@LOSSES
@pytest.mark.parametrize("scale", [100.0, 1000.0, 1e4])
def test_large_scores_do_not_overflow(loss, scale: float) -> None:
    """sentence-transformers#4012 (±1000), tensorflow#56749 (-inf), S-DPO's and pytorchltr's inf."""
    scores, labels = torch.randn(20, 8) * scale, torch.rand(20, 8)
    value, gradient = value_and_gradient(loss, scores, labels)
    exact, exact_gradient = value_and_gradient(loss, scores.double(), labels.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=2e-6)


def test_positions_are_counted_from_one() -> None:
    """sentence-transformers#4051: p-ListMLE's weights 2^(n - k) - 1 begin with 2^(n - 1) - 1 and end with 0."""
    scores, labels = torch.randn(3, 4, dtype=torch.float64), torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(3, 4)
    weights = 2.0 ** torch.tensor([3.0, 2.0, 1.0, 0.0]) - 1
    expected = sum(w * (scores[:, k:].logsumexp(1) - scores[:, k]) for k, w in enumerate((7.0, 3.0, 1.0, 0.0)))
    found = plackett_luce(scores, labels, position_weights=weights, reduction="none")[:, 0]
    torch.testing.assert_close(found, expected)


@LOSSES
def test_a_confident_right_list_has_its_small_loss_and_not_an_epsilon(loss) -> None:
    """allRank adds 1e-10 inside the logarithm: 20 times the loss and 50 times the gradient here."""
    value, gradient = value_and_gradient(loss, torch.tensor([[27.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert float(value) == pytest.approx(math.exp(-27), rel=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0]]) * math.exp(-27), rtol=1e-6, atol=0)


@LOSSES
def test_a_confident_wrong_list_keeps_its_full_gradient(loss) -> None:
    """allRank's listNet has no gradient past a gap of 23, exactly where one is needed most."""
    value, gradient = value_and_gradient(loss, torch.tensor([[-60.0, 60.0]]), torch.tensor([[1.0, 0.0]]))
    assert float(value) == pytest.approx(120, rel=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0]]))


@LOSSES
def test_labels_are_used(loss) -> None:
    """ptranking#4: the loss was the same whatever the labels said."""
    scores = torch.tensor([[1.0, 0.0, -1.0]])
    right, wrong = (loss(scores, torch.tensor([z])) for z in ([2.0, 1.0, 0.0], [0.0, 1.0, 2.0]))
    assert right < wrong


@LOSSES
def test_scores_of_minus_infinity_have_no_nan_in_their_gradient(loss) -> None:
    """pytorch#31829, #49724, #52213, #52947: logcumsumexp and logsumexp at -inf."""
    scores = torch.tensor([[1.0, 2.0, -math.inf, -math.inf]])
    value, gradient = value_and_gradient(loss, scores, torch.tensor([[2.0, 1.0, 0.0, 0.0]]))
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert not gradient[:, 2:].any()


@pytest.mark.parametrize("infinite", [-math.inf, math.inf])
def test_scores_that_are_all_infinite_are_equal(infinite: float) -> None:
    scores, labels = torch.full((1, 3), infinite), torch.tensor([[2.0, 1.0, 0.0]])
    for loss in (listwise_dpo, pairwise_logistic, lambda_loss, approx_ndcg):
        found, expected = (value_and_gradient(loss, each, labels) for each in (scores, torch.zeros(1, 3)))
        torch.testing.assert_close(found, expected)
        assert found[0] > 0 and found[1].any()
    for ties in ("breslow", "efron", "exact", "random"):
        found, expected = (
            value_and_gradient(plackett_luce, each, labels, ties=ties) for each in (scores, torch.zeros(1, 3))
        )
        if infinite > 0:
            assert found[0].isnan() and found[1].isnan().all()
        else:
            torch.testing.assert_close(found, expected)


@LOSSES
def test_an_empty_list_in_a_batch_is_not_nan_and_changes_no_other_list(loss) -> None:
    """allRank and sentence-transformers ListNet give NaN; LightGBM#1104 crashed."""
    scores, labels = torch.randn(3, 5), torch.rand(3, 5)
    mask = torch.tensor([[True] * 5, [False] * 5, [True] * 5])
    value, gradient = value_and_gradient(loss, scores, labels, mask=mask)
    alone, alone_gradient = value_and_gradient(loss, scores[::2], labels[::2])
    assert value[1] == 0
    assert not gradient[1].any()
    torch.testing.assert_close(value[::2], alone)
    torch.testing.assert_close(gradient[::2], alone_gradient)


@LOSSES
def test_a_query_without_relevant_documents_or_with_one_document_costs_nothing(loss) -> None:
    """scikit-learn#29521, #33199 (all-zero labels) and #21335 (one document)."""
    options = {"last_group": "free"} if loss is plackett_luce else {}
    value, gradient = value_and_gradient(loss, torch.randn(1, 4), torch.zeros(1, 4), **options)
    assert value == 0
    assert not gradient.any()
    one = torch.tensor([[True, False, False, False]])
    value, gradient = value_and_gradient(loss, torch.randn(1, 4), torch.ones(1, 4), mask=one)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
def test_ties_favour_nobody(ties: str) -> None:
    """openskill.py#155, #176 and scholar#360: tied items were ranked by their place, or in the model's favour."""
    scores, labels = torch.randn(1, 6, dtype=torch.float64), torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    value, gradient = value_and_gradient(plackett_luce, scores, labels, ties=ties)
    for order in ([0, 3, 1, 2, 5, 4], [0, 2, 3, 1, 4, 5], [5, 4, 3, 2, 1, 0]):
        moved = value_and_gradient(plackett_luce, scores[:, order], labels[:, order], ties=ties)
        torch.testing.assert_close(moved[0], value, rtol=1e-10, atol=0)
        torch.testing.assert_close(moved[1], gradient[:, order], rtol=1e-9, atol=1e-13)
    equal = scores.clone()
    equal[0, 1:4] = 0.3
    _, gradient = value_and_gradient(plackett_luce, equal, labels, ties=ties)
    torch.testing.assert_close(gradient[0, 1], gradient[0, 2], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient[0, 1], gradient[0, 3], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
def test_gaps_between_label_values_mean_nothing(ties: str) -> None:
    """R PlackettLuce#42, #54: unused tie orders broke its estimates."""
    scores, labels = torch.randn(5, 6), torch.randint(0, 3, (5, 6))
    stretched = torch.tensor([-7.0, 0.5, 1e6])[labels]
    assert torch.equal(plackett_luce(scores, labels, ties=ties), plackett_luce(scores, stretched, ties=ties))


@LOSSES
def test_weights_multiply_the_loss_of_their_list_and_objective_and_nothing_else(loss) -> None:
    """xgboost#2561, #4168, #8708, #11633: weights of items, of groups, or of neither."""
    scores, labels = torch.randn(3, 4), torch.rand(3, 2, 4)
    plain = loss(scores, labels, reduction="none")
    weights = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(loss(scores, labels, weights=weights, reduction="none"), plain * weights)
    torch.testing.assert_close(loss(scores, labels, weights=weights), (plain * weights).sum() / 3)
    assert (loss(scores, labels) - plain.sum(1).mean()).abs() < 1e-6


@LOSSES
def test_a_loss_is_not_always_zero(loss) -> None:
    """TF-Ranking#363."""
    value, gradient = value_and_gradient(loss, torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]]))
    assert (value > 0.5).all()
    assert (gradient.abs().sum(1) > 0.5).all()


@LOSSES
def test_a_weighted_sum_of_lists_has_the_weighted_gradient(loss) -> None:
    """ptranking's LogCumsumExp ignored the upstream gradient."""
    scores, labels, weights = torch.randn(6, 5), torch.rand(6, 5), torch.randn(6, 1)
    _, gradient = value_and_gradient(loss, scores, labels)
    _, weighted = value_and_gradient(loss, scores, labels, weights=weights)
    torch.testing.assert_close(weighted, gradient * weights)
