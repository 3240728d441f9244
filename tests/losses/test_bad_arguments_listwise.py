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
        ({"labels": LABELS.to("meta")}, ValueError, ["labels is on meta", "scores on cpu", "labels.to(scores.device)"]),
        ({"reference": SCORES.to("meta")}, ValueError, ["reference is on meta", "scores on cpu"]),
        ({"mask": torch.ones(4, 6).bool().to("meta")}, ValueError, ["mask is on meta", "scores on cpu"]),
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
        ({"top_k": "2"}, ValueError, ["top_k", "2", "integer"]),
        ({"order": presort(LABELS).to("meta")}, ValueError, ["order is on meta", "labels on cpu"]),
        ({"position_weights": torch.ones(6, device="meta")}, ValueError, ["position_weights is on meta"]),
        (
            {"order": LABELS.argsort()},
            ValueError,
            ["order", "list 0 and objective 0", "higher", "presort(labels, mask)"],
        ),
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


def test_an_order_that_forgets_the_mask_is_refused() -> None:
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [0]])
    labels = torch.arange(6.0).expand(4, 1, 6)  # the best items are masked in list 1
    with pytest.raises(ValueError, match=r"order of list 1 and objective 0 goes from item 5 .* one of them is masked"):
        plackett_luce(SCORES, labels, mask=mask, order=presort(labels))
    right = plackett_luce(SCORES, labels, mask=mask, order=presort(labels, mask))
    torch.testing.assert_close(right, plackett_luce(SCORES, labels, mask=mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.bfloat16])
def test_a_right_order_goes_with_labels_of_any_dtype(dtype: torch.dtype) -> None:
    labels = (LABELS > LABELS.mean()).to(dtype)
    torch.testing.assert_close(
        plackett_luce(SCORES, labels, order=presort(labels)), plackett_luce(SCORES, labels), rtol=1e-6, atol=1e-6
    )


def test_presort_says_what_labels_must_be() -> None:
    with pytest.raises(ValueError, match=r"labels has shape \(6,\) but must be .*pass labels\[None\]"):
        presort(LABELS[0, 0])
    with pytest.raises(TypeError, match=r"got list; pass torch.as_tensor\(labels\)"):
        presort([[1.0, 2.0]])


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
