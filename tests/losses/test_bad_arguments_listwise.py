"""Errors of the listwise losses: they name the argument, what it was, what it should be, and what to do."""

from __future__ import annotations

import pytest
import torch

from mopl.losses import listwise_dpo, normalize_labels, plackett_luce, presort

SCORES, LABELS = torch.randn(4, 6), torch.rand(4, 3, 6)
BOTH = pytest.mark.parametrize("loss", [listwise_dpo, plackett_luce])


@BOTH
@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"scores": [[1.0, 2.0]]}, TypeError, ["scores", "torch.Tensor", "(B, K)", "list"]),
        ({"scores": torch.randn(6)}, ValueError, ["scores", "(6,)", "(B, K)", "scores[None]"]),
        ({"scores": torch.ones(4, 6, dtype=torch.int64)}, TypeError, ["scores", "int64", "float"]),
        ({"labels": [1, 2]}, TypeError, ["labels", "torch.Tensor", "(B, m, K)"]),
        ({"weights": [0.7, 0.3, 0.0]}, TypeError, ["weights is a list", "torch.tensor(weights)"]),
        ({"labels": torch.rand(4, 5)}, ValueError, ["labels", "(4, 1, 5)", "(4, 6)", "(B, m, K)"]),
        ({"labels": torch.rand(6)}, ValueError, ["labels", "(6,)", "(4, 6)"]),
        ({"labels": torch.rand(3, 4, 6)}, ValueError, ["labels", "(3, 4, 6)", "(4, 6)"]),
        ({"reference": torch.randn(4, 1)}, ValueError, ["reference", "(4, 1)", "(4, 6)"]),
        ({"reference": 1.0}, ValueError, ["reference", "float", "(4, 6)"]),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, ValueError, ["mask", "(4, 5)", "(4, 6)"]),
        ({"mask": torch.ones(4, 6)}, TypeError, ["mask", "float32", "bool", "mask.bool()"]),
        ({"beta": torch.ones(4)}, ValueError, ["beta", "(4,)", "(4, 3)", "beta[:, None]"]),
        ({"beta": torch.ones(2, 3)}, ValueError, ["beta", "(2, 3)", "(4, 3)"]),
        ({"beta": torch.ones(5, 1)}, ValueError, ["beta", "(5, 1)", "(4, 3)"]),
        ({"weights": torch.ones(4)}, ValueError, ["weights", "(4,)", "(4, 3)", "weights[:, None]"]),
        ({"reduction": "average"}, ValueError, ["reduction", "'average'", "'none'", "'sum'", "'mean'"]),
    ],
)
def test_a_wrong_argument_is_named_with_its_remedy(loss, changed: dict, error: type, words: list[str]) -> None:
    arguments = {"scores": SCORES, "labels": LABELS} | changed
    with pytest.raises(error) as caught:
        loss(arguments.pop("scores"), arguments.pop("labels"), **arguments)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ties": "average"}, ValueError, ["ties", "'average'", "'breslow'", "'efron'", "'exact'", "'random'"]),
        ({"last_group": True}, ValueError, ["last_group", "'charged'", "'free'"]),
        ({"top_k": 0}, ValueError, ["top_k", "0", "at least 1", "None"]),
        ({"top_k": 2.5}, ValueError, ["top_k", "2.5", "integer"]),
        ({"order": torch.rand(4, 3, 6)}, TypeError, ["order", "float32", "integer", "presort"]),
        ({"order": torch.ones(4, 3, 6, dtype=torch.bool)}, TypeError, ["order", "bool", "presort"]),
        ({"order": [0, 1]}, TypeError, ["order", "list", "presort"]),
        ({"order": torch.zeros(4, 6, dtype=torch.int64)}, ValueError, ["order", "(4, 6)", "(4, 3, 6)", "presort"]),
        ({"position_weights": torch.ones(5)}, ValueError, ["position_weights", "(5,)", "(6,)", "(4, 3, 6)"]),
        ({"position_weights": [1.0] * 6}, ValueError, ["position_weights", "list", "(6,)"]),
        ({"ties": "random", "order": presort(LABELS)}, ValueError, ["order", "random"]),
        ({"generator": torch.Generator()}, ValueError, ["generator", "'breslow'", "random"]),
    ],
)
def test_a_wrong_option_of_plackett_luce_is_named_with_its_remedy(options: dict, error: type, words: list[str]) -> None:
    with pytest.raises(error) as caught:
        plackett_luce(SCORES, LABELS, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def test_an_unknown_normalisation_is_named() -> None:
    with pytest.raises(ValueError, match=r"normalize is 'l2' but must be one of 'l1', 'softmax', None"):
        listwise_dpo(SCORES, LABELS, normalize="l2")
    with pytest.raises(ValueError, match=r"mode is 'l2' but must be one of 'l1', 'softmax'"):
        normalize_labels(LABELS, "l2")
    with pytest.raises(ValueError, match=r"mask has shape \(4, 5\) but scores has \(4, 6\)"):
        normalize_labels(LABELS, "l1", torch.ones(4, 5, dtype=torch.bool))


def test_one_objective_needs_no_dimension_of_its_own() -> None:
    labels = LABELS[:, 0]
    order = presort(labels)
    assert order.shape == (4, 1, 6)
    expected = plackett_luce(SCORES, labels)
    torch.testing.assert_close(plackett_luce(SCORES, labels, order=order), expected)
    torch.testing.assert_close(plackett_luce(SCORES, labels, order=order[:, 0]), expected)


def test_a_failed_call_leaves_no_trace() -> None:
    scores = SCORES.clone().requires_grad_()
    with pytest.raises(ValueError, match="top_k"):
        plackett_luce(scores, LABELS, top_k=-1)
    assert scores.grad is None
    plackett_luce(scores, LABELS).backward()
    assert scores.grad is not None
