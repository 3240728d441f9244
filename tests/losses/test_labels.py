"""What labels may be: which numbers each loss takes, what it refuses, NaN and infinity among that."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mopl import _arguments, ops
from mopl import losses as mopl_losses
from mopl.losses import (
    approx_ndcg,
    lambda_loss,
    listwise_dpo,
    normalize_labels,
    pairwise_logistic,
    plackett_luce,
    presort,
)

SCORES = torch.randn(4, 5)
ONES = torch.ones(4, 2)


def normalized(scores: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: str = "none") -> Tensor:
    return normalize_labels(labels, "l1", mask).sum(-1)


def op(scores: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: str = "none") -> Tensor:
    return ops.listwise_cross_entropy(scores, labels, ONES, mask)


NOT_NEGATIVE: dict[str, Callable[..., Tensor]] = {
    "listwise_dpo": listwise_dpo,
    "listwise_cross_entropy": op,
    "normalize_labels": normalized,
    "approx_ndcg": approx_ndcg,
    "approx_ndcg linear": partial(approx_ndcg, gain="linear"),
    "lambda_loss normalized": partial(lambda_loss, normalize=True),
}
ANY_SIGN: dict[str, Callable[..., Tensor]] = {
    "softmax": partial(listwise_dpo, normalize="softmax"),
    "as they are": partial(listwise_dpo, normalize=None),
    "plackett_luce": plackett_luce,
    "plackett_luce random": partial(plackett_luce, ties="random"),
    "pairwise_logistic": pairwise_logistic,
    "lambda_loss": lambda_loss,
}
LISTWISE = (listwise_dpo, plackett_luce, pairwise_logistic, lambda_loss, approx_ndcg)
MASK = torch.arange(5) < torch.tensor([5, 4, 3, 5])[:, None]


def labels_with(bad: float) -> Tensor:
    """Labels (4, 2, 5) whose list 2 has `bad` under objective 1, and whose masked places have it too."""
    labels = torch.rand(4, 2, 5) + 0.1
    labels[2, 1, 1] = bad
    return labels


@pytest.mark.parametrize("loss", NOT_NEGATIVE.values(), ids=NOT_NEGATIVE.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_negative_label_is_refused_with_the_remedy(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"labels of list 2 hold -1 but must not be negative .*normalize='softmax'"):
        loss(SCORES, (labels_with(-1.0) * 1.0).to(dtype), mask=MASK)
    labels = labels_with(1.0)
    labels.masked_fill_(~MASK[:, None], -1.0)  # no item is there
    assert loss(SCORES, labels.to(dtype), mask=MASK, reduction="none").isfinite().all()


def test_rewards_are_refused_where_they_would_cost_nothing() -> None:
    with pytest.raises(ValueError, match="such as rewards, pass normalize='softmax'"):
        listwise_dpo(SCORES, -torch.rand(4, 2, 5))
    with pytest.raises(ValueError, match="plackett_luce"):
        listwise_dpo(SCORES, torch.randn(4, 2, 5))


def test_a_negative_label_is_named_by_its_list_in_any_block() -> None:
    many = torch.ones(200_000, 1, 2)
    many[150_000, 0, 1] = -0.5
    with pytest.raises(ValueError, match=r"labels of list 150000 hold -0\.5"):
        listwise_dpo(torch.zeros(200_000, 2), many)


@pytest.mark.parametrize("loss", ANY_SIGN.values(), ids=ANY_SIGN.keys())
def test_the_other_losses_take_any_real_number(loss: Callable[..., Tensor]) -> None:
    scores, labels = SCORES.clone().requires_grad_(), torch.randn(4, 2, 5) * 3
    found = loss(scores, labels, mask=MASK, reduction="none")
    assert found.isfinite().all() and (found != 0).all()
    assert torch.autograd.grad(found.sum(), scores)[0][MASK].all()


@pytest.mark.parametrize("loss", (NOT_NEGATIVE | ANY_SIGN).values(), ids=(NOT_NEGATIVE | ANY_SIGN).keys())
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])
def test_a_nan_is_refused_or_where_it_cannot_be_read_makes_its_own_losses_nan(
    loss: Callable[..., Tensor], mask: Tensor | None, monkeypatch
) -> None:
    with pytest.raises(ValueError, match=r"labels of list 2 hold nan but every label must be .*; leave .* with mask"):
        loss(SCORES, labels_with(math.nan).to(torch.bfloat16), mask=mask)
    absent = labels_with(1.0).masked_fill(~MASK[:, None], math.nan)
    assert loss(SCORES, absent, mask=MASK, reduction="none").isfinite().all()
    unreadable(monkeypatch)
    found = loss(SCORES, labels_with(math.nan), mask=mask, reduction="none")
    bad = torch.zeros(4, 2, dtype=torch.bool)
    bad[2, 1] = True
    assert found[bad].isnan().all() and found[~bad].isfinite().all()


def test_labels_to_keep_an_order_of_are_checked_as_those_of_a_loss() -> None:
    with pytest.raises(ValueError, match="labels of list 2 hold nan"):
        presort(labels_with(math.nan))
    with pytest.raises(ValueError, match="labels of list 2 hold nan"):
        ops.plackett_luce_nll(SCORES, labels_with(math.nan), ONES)
    with pytest.raises(ValueError, match="labels of list 2 hold inf but every label must be finite"):
        ops.listwise_cross_entropy(SCORES, labels_with(math.inf), ONES, normalize=False)
    for op_of_lists in (ops.plackett_luce_nll, ops.listwise_cross_entropy):
        with pytest.raises(ValueError, match="beta holds nan but every entry must be finite"):
            op_of_lists(SCORES, labels_with(1.0), ONES * math.nan)


def test_what_draws_an_order_is_checked() -> None:
    labels = labels_with(1.0)
    for draw in (presort, partial(plackett_luce, SCORES)):
        with pytest.raises(TypeError, match=r"generator is 0 but must be a torch.Generator; pass torch.Generator\(\)"):
            draw(labels, ties="random", generator=0)
    with pytest.raises(ValueError, match="generator is given but ties='stable' draws nothing"):
        presort(labels, generator=torch.Generator())
    with pytest.raises(ValueError, match="ties is 'breslow' but must be one of 'stable', 'random'"):
        presort(labels, ties="breslow")


def test_position_weights_of_nan_are_refused_where_a_list_has_the_position() -> None:
    labels, weights = labels_with(1.0), torch.tensor([1.0, 2.0, 1.0, 1.0, math.nan])
    for use in (plackett_luce, partial(plackett_luce, order=presort(labels))):
        with pytest.raises(ValueError, match="position_weights hold nan but every entry must be a number; pass 0"):
            use(SCORES, labels, position_weights=weights)
    short = MASK & (torch.arange(5) < 4)
    given = torch.where(short[:, None].expand(4, 2, 5), 1.0, math.nan)
    for each in (weights, given):
        expected = plackett_luce(SCORES, labels, mask=short, position_weights=each.nan_to_num())
        torch.testing.assert_close(plackett_luce(SCORES, labels, mask=short, position_weights=each), expected)


def test_infinite_labels_are_ranks_or_targets_or_refused() -> None:
    highest, lowest = labels_with(math.inf), labels_with(-math.inf)
    for loss in (plackett_luce, pairwise_logistic):
        for infinite, large in ((highest, 1e30), (lowest, -1e30)):
            expected = loss(SCORES, labels_with(0).copy_(infinite).clamp(-1e30, 1e30), reduction="none")
            assert torch.equal(loss(SCORES, infinite, reduction="none"), expected), large
    targets = normalize_labels(lowest, "softmax")
    assert targets[2, 1, 1] == 0 and torch.allclose(targets.sum(-1), torch.ones(4, 2))
    for use in (*NOT_NEGATIVE.values(), ANY_SIGN["softmax"], ANY_SIGN["as they are"]):
        with pytest.raises(ValueError, match=r"labels of list 2 hold inf but every label must be"):
            use(SCORES, highest)
    with pytest.raises(ValueError, match=r"labels of list 2 hold -inf but every label must be finite"):
        listwise_dpo(SCORES, lowest, normalize=None)
    with pytest.raises(ValueError, match=r"labels of list 2 hold -inf but must not be negative"):
        listwise_dpo(SCORES, lowest)


def unreadable(monkeypatch) -> None:
    for module in (_arguments, mopl_losses.labels):
        monkeypatch.setattr(module, "readable", lambda tensor: False)


@pytest.mark.parametrize("loss", [normalized, approx_ndcg, partial(lambda_loss, normalize=True)])
def test_where_labels_cannot_be_read_the_list_is_nan(loss: Callable[..., Tensor], monkeypatch) -> None:
    """As on a GPU, which nothing may wait for; for the kernel of listwise_dpo see the tests in the interpreter."""
    unreadable(monkeypatch)
    found = loss(SCORES, labels_with(-1.0), mask=MASK, reduction="none")
    assert found[2, 1].isnan()
    found[2, 1] = 0
    assert found.isfinite().all()


@pytest.mark.parametrize(
    "loss", [approx_ndcg, partial(lambda_loss, normalize=True), partial(normalize_labels, mode="l1")]
)
def test_compiled_the_list_is_nan(loss: Callable[..., Tensor]) -> None:
    labels_only = getattr(loss, "func", None) is normalize_labels

    @partial(torch.compile, fullgraph=True, backend="aot_eager")
    def step(labels: Tensor) -> Tensor:
        return loss(labels).sum(-1) if labels_only else loss(SCORES, labels, reduction="none")

    found = step(labels_with(-1.0))
    assert found[2, 1].isnan() and found[:2].isfinite().all() and found[3].isfinite().all()


@pytest.mark.parametrize("loss", LISTWISE)
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_graph_is_traced_without_a_look_at_values_and_its_list_is_nan(
    loss: Callable[..., Tensor], pre_dispatch: bool
) -> None:
    def step(labels: Tensor, weights: Tensor) -> Tensor:
        return loss(SCORES, labels, weights=weights, mask=MASK, reduction="none")

    weights, labels = torch.rand(2), labels_with(1.0)
    traced = make_fx(step, pre_dispatch=pre_dispatch)(labels, weights)
    torch.testing.assert_close(traced(labels, weights), step(labels, weights))
    found = traced(labels_with(math.nan), weights)
    assert found[2, 1].isnan() and found[:2].isfinite().all() and found[3].isfinite().all()
    assert not traced(labels, weights * math.nan).isfinite().any()


def test_transformed_the_list_is_nan() -> None:
    for bad in (-1.0, math.nan):
        found = torch.func.vmap(lambda s, y: listwise_dpo(s[None], y[None], reduction="none")[0])(
            SCORES, labels_with(bad)
        )
        assert found[2, 1].isnan() and found[:2].isfinite().all() and found[3].isfinite().all()


def test_the_label_temperature_divides_labels_before_their_softmax() -> None:
    rewards = torch.randn(4, 2, 5) * 20
    rate = torch.tensor([[2.0, 5.0]])
    targets = (rewards / rate[..., None]).masked_fill(~MASK[:, None], -math.inf).softmax(-1)
    torch.testing.assert_close(normalize_labels(rewards, "softmax", MASK, label_temperature=rate), targets)
    found = listwise_dpo(
        SCORES, rewards, mask=MASK, normalize="softmax", label_temperature=rate, reduction="none"
    )  # fmt: skip
    expected = listwise_dpo(SCORES, targets, mask=MASK, normalize=None, reduction="none")
    torch.testing.assert_close(found, expected)
    one = normalize_labels(rewards[:, 0], "softmax", label_temperature=torch.tensor([[2.0]]))
    torch.testing.assert_close(one, (rewards[:, 0] / 2).softmax(-1))
    assert torch.equal(normalize_labels(rewards, "softmax", label_temperature=1.0), rewards.softmax(-1))
    rate64, rewards64 = rate.double().requires_grad_(), rewards.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, t: listwise_dpo(SCORES.double(), y, mask=MASK, normalize="softmax", label_temperature=t),
        (rewards64, rate64),
    )


def test_a_label_temperature_is_positive_and_belongs_to_softmax() -> None:
    for bad in (0.0, -1.0, math.nan, torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match=r"label_temperature (is|holds) .* must be positive"):
            listwise_dpo(SCORES, torch.rand(4, 2, 5), normalize="softmax", label_temperature=bad)
    for mode in ("l1", None):
        with pytest.raises(ValueError, match=r"label_temperature has no part in normalize=.*'softmax'"):
            listwise_dpo(SCORES, torch.rand(4, 2, 5), normalize=mode, label_temperature=2.0)
    with pytest.raises(ValueError, match="label_temperature has no part in mode='l1'"):
        normalize_labels(torch.rand(4, 5), "l1", label_temperature=2.0)


def test_the_softmax_of_large_integer_labels_keeps_their_differences() -> None:
    near = torch.tensor([[3, 1, 0, 2]])
    expected = near.float().softmax(-1)
    assert torch.equal(normalize_labels(near, "softmax"), expected)
    assert torch.equal(normalize_labels(near + 1_700_000_000, "softmax"), expected)


def test_labels_of_any_positive_sum_are_divided_by_it() -> None:
    expected = torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.0, 0.0]])
    torch.testing.assert_close(normalize_labels(torch.tensor([[0.1, 0.3], [2.0, 6.0], [0.0, 0.0]]), "l1"), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64], ids=str)
def test_labels_that_only_float32_would_make_equal_are_a_pair(dtype: torch.dtype) -> None:
    large = torch.tensor([[[2**24, 2**24 + 1, 2**24]]], dtype=dtype)
    scores = torch.tensor([[0.5, -0.2, 0.1]])
    found = pairwise_logistic(scores, large)
    assert found > 0 and torch.equal(found, pairwise_logistic(scores, large - 2**24))
    gained = lambda_loss(scores, large, gain="linear")
    assert gained > 0 and torch.equal(gained, lambda_loss(scores, large - 2**24, gain="linear"))
    garbage = torch.tensor([[True, True, True, False]])
    padded = lambda_loss(
        torch.cat([scores, scores[:, :1]], 1), torch.cat([large, large[..., :1] - 7], -1), mask=garbage, gain="linear"
    )
    assert torch.equal(padded, gained)


def test_a_random_order_is_drawn_where_the_labels_are() -> None:
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
                copied.append((kwargs or {}).get("device"))
            return func(*args, **(kwargs or {}))

    # Copying numbers that were drawn on the host waits for a GPU, and a CUDA graph cannot capture it.
    labels = torch.zeros(2, 3, device="meta")
    with Copies():
        assert presort(labels, ties="random").device == labels.device
    assert not copied


LARGE: dict[str, Callable[..., Tensor]] = {
    "presorted": lambda scores, labels, **more: plackett_luce(scores, labels, order=presort(labels, MASK), **more),
    "random": lambda *given, **more: plackett_luce(
        *given, ties="random", generator=torch.Generator().manual_seed(0), **more
    ),
    "random, last group free": lambda *given, **more: plackett_luce(
        *given, ties="random", last_group="free", generator=torch.Generator().manual_seed(0), **more
    ),
    "pairs": pairwise_logistic,
    "lambda, linear gains": lambda *given, **more: lambda_loss(*given, gain="linear", **more),
    "softmax": lambda *given, **more: listwise_dpo(*given, normalize="softmax", **more),
}


@pytest.mark.parametrize("loss", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [2**53, -(2**60)])
def test_neighbouring_integers_of_any_size_stay_apart(loss: Callable[..., Tensor], dtype: torch.dtype, offset) -> None:
    """Times in nanoseconds, for example: float64 makes one number of several."""
    labels = torch.randint(4, (4, 2, 5))
    scores, options = SCORES.to(dtype), {"mask": MASK, "reduction": "none"}
    torch.testing.assert_close(
        loss(scores, labels + offset, **options), loss(scores, labels, **options), rtol=0, atol=0
    )


def test_the_ends_of_int64_are_sorted() -> None:
    ends = torch.iinfo(torch.int64)
    labels = torch.tensor([[5, ends.min, ends.max, 7]])
    assert presort(labels).tolist() == [[[2, 3, 0, 1]]]
    # Their difference is beyond int64.
    assert normalize_labels(labels, "softmax").tolist() == [[0.0, 0.0, 1.0, 0.0]]
    assert normalize_labels(labels, "softmax", label_temperature=1e30).tolist() == [[0.25] * 4]
    scores, ranks = torch.tensor([[0.1, 0.4, 0.3, 0.2]]), torch.tensor([[1, 0, 3, 2]])
    assert torch.equal(pairwise_logistic(scores, labels), pairwise_logistic(scores, ranks))
    wide = torch.tensor([[0, ends.min, ends.max]])
    pair = [lambda_loss(scores[:, :3], each, gain="linear") for each in (wide, wide.double())]
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("loss", [listwise_dpo, plackett_luce, lambda scores, labels: presort(labels)])
def test_labels_beyond_int64_are_refused(loss):
    with pytest.raises(TypeError, match=r"labels has dtype torch.uint64 but must fit int64; pass labels\.long\(\)"):
        loss(torch.zeros(1, 3), torch.tensor([[2**63 + 1, 1, 2]], dtype=torch.uint64))
