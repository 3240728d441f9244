"""Losses over all pairs of a list: pairwise logistic, LambdaLoss and ApproxNDCG, beside loops and boosted trees."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from mopl import _arguments
from mopl import reference as oracle
from mopl.losses import approx_ndcg, bradley_terry, lambda_loss, pairwise_logistic
from mopl.ops import pairs

F64 = torch.float64
SETTINGS: list[tuple[str, Callable, Callable, dict]] = [
    ("pairwise_logistic", pairwise_logistic, oracle.pairwise_logistic, {}),
    ("lambda_loss", lambda_loss, oracle.lambda_loss, {}),
    ("lambda_loss-linear-ndcg", lambda_loss, oracle.lambda_loss, {"gain": "linear", "normalize": True}),
    ("lambda_loss-top2", lambda_loss, oracle.lambda_loss, {"top_k": 2, "normalize": True}),
    ("lambda_loss-top2-both", lambda_loss, oracle.lambda_loss, {"top_k": 2, "top_k_rule": "both"}),
    ("approx_ndcg", approx_ndcg, oracle.approx_ndcg, {}),
    ("approx_ndcg-linear", approx_ndcg, oracle.approx_ndcg, {"gain": "linear"}),
]
every_loss = pytest.mark.parametrize(
    ("loss", "plain", "options"), [s[1:] for s in SETTINGS], ids=[s[0] for s in SETTINGS]
)


def ragged(
    lists: int = 7, items: int = 9, objectives: int = 3, seed: int = 0, dtype: torch.dtype = F64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scores with ties, labels with ties, reference and mask; lists of 0, 1, 2 items and one of equal labels."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(lists, items, generator=generator, dtype=F64)
    scores[:, -1] = scores[:, 1]
    labels = torch.randint(0, 4, (lists, objectives, items), generator=generator).to(F64)
    labels[3] = 2.0
    reference = torch.randint(-1, 2, (lists, items), generator=generator).to(F64)
    mask = torch.rand(lists, items, generator=generator) < 0.8
    mask[0], mask[1], mask[2] = False, False, False
    mask[1, 4], mask[2, 0], mask[2, 3] = True, True, True
    return scores.to(dtype).requires_grad_(), labels, reference.to(dtype).requires_grad_(), mask


def spoil(values: Tensor, mask: Tensor) -> Tensor:
    """Put NaN and infinities where no item exists."""
    junk = torch.tensor([math.nan, math.inf, -math.inf], dtype=values.dtype).repeat(values.numel())
    exists = mask if values.ndim == 2 else mask[:, None, :]
    return torch.where(exists, values.detach(), junk[: values.numel()].reshape(values.shape)).requires_grad_()


# ---------------------------------------------------------------- loops


@pytest.mark.parametrize("budget", [1, 20, 150, 1 << 17])
@pytest.mark.parametrize("common", [True, False])
@every_loss
def test_values_and_gradients_are_those_of_loops(
    loss: Callable, plain: Callable, options: dict, common: bool, budget: int, monkeypatch
) -> None:
    """Also where the pairs of one list, or of one row, are more than a block may hold."""
    monkeypatch.setattr(pairs, "_PAIRS_CPU", budget)
    scores, labels, reference, mask = ragged()
    lists, objectives = labels.shape[:2]
    beta = (0.3 + torch.rand(lists, 1 if common else objectives, dtype=F64)).requires_grad_()
    weights = torch.randn(lists, objectives, dtype=F64, requires_grad=True)
    expected = weights * plain(scores - reference, labels, beta, mask, **options)
    leaves = [scores, reference, beta, weights]
    upstream = torch.randn(lists, objectives, dtype=F64)
    wanted = torch.autograd.grad(expected, leaves, upstream)

    junk_scores, junk_reference = spoil(scores, mask), spoil(reference, mask)
    ours = loss(
        junk_scores,
        spoil(labels, mask),
        reference=junk_reference,
        beta=beta,
        weights=weights,
        mask=mask,
        reduction="none",
        **options,
    )
    got = torch.autograd.grad(ours, [junk_scores, junk_reference, beta, weights], upstream)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert not ours[:2].any()  # lists of no and of one item
    assert not ours[3].any()  # equal labels
    assert not got[0][~mask].any()
    assert not got[1][~mask].any()
    assert ours[4:].all() or options.get("top_k_rule") == "both"  # which may leave one pair, and that tied


@pytest.mark.parametrize("per_objective", [True, False])
def test_the_margin_of_pairwise_logistic(per_objective: bool) -> None:
    scores, labels, _, mask = ragged()
    margin = torch.randn(7, 3 if per_objective else 1, dtype=F64, requires_grad=True)
    beta = torch.tensor([0.4, 0.9, 1.3], dtype=F64)
    expected = oracle.pairwise_logistic(scores, labels, beta, mask, margin)
    ours = pairwise_logistic(scores, labels, mask=mask, beta=beta, margin=margin, reduction="none")
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn(7, 3, dtype=F64)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (scores, margin), upstream), torch.autograd.grad(expected, (scores, margin), upstream)
    )
    torch.testing.assert_close(
        pairwise_logistic(scores, labels, mask=mask, margin=0.7, reduction="none"),
        oracle.pairwise_logistic(scores, labels, torch.ones(1), mask, torch.tensor(0.7, dtype=F64)),
    )


@every_loss
def test_closed_form_gradients_against_differences(loss: Callable, plain: Callable, options: dict) -> None:
    scores, labels, reference, mask = ragged(lists=5, items=5, objectives=2)
    scores = (scores.detach() + 0.1 * torch.arange(5)).requires_grad_()  # no ties: there ranks jump
    beta = torch.tensor([0.7, 1.4], dtype=F64, requires_grad=True)
    weights = torch.randn(5, 2, dtype=F64, requires_grad=True)

    def vector(s: Tensor, s0: Tensor, beta: Tensor, w: Tensor) -> Tensor:
        return loss(s, labels, reference=s0, beta=beta, weights=w, mask=mask, reduction="none", **options)

    reference = (0.01 * reference).detach().requires_grad_()
    assert torch.autograd.gradcheck(vector, (scores, reference, beta, weights))


@pytest.mark.parametrize("gain", ["exponential", "linear"])
def test_approx_ndcg_is_differentiable_in_soft_labels(gain: str) -> None:
    scores, _, _, mask = ragged()
    labels = (3 * torch.rand(7, 2, 9, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y: approx_ndcg(scores.detach(), y, mask=mask, gain=gain, reduction="none"), labels
    )


def test_scores_that_differ_by_less_than_an_ulp_of_the_best_one_are_still_ranked() -> None:
    scores, labels = torch.tensor([[0.001, -1e-45, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    exact = lambda_loss(scores.double(), labels.double(), reduction="none")
    torch.testing.assert_close(lambda_loss(scores, labels, reduction="none").double(), exact, rtol=1e-6, atol=0)


@given(
    data=st.lists(
        st.tuples(
            st.sampled_from([-1e4, -300.0, -20.0, -1.0, 0.0, 1e-3, 2.0, 20.0, 300.0, 1e4])
            | st.floats(-50, 50, width=32),
            st.integers(0, 3),
            st.booleans(),
        ),
        max_size=8,
    ),
    index=st.integers(0, len(SETTINGS) - 1),
    beta=st.sampled_from([0.0625, 0.5, 1.0, 8.0]),
)
@settings(max_examples=150, deadline=None)
def test_float32_against_float64_loops(data: list, index: int, beta: float) -> None:
    _, loss, plain, options = SETTINGS[index]
    scores = torch.tensor([[d[0] for d in data]], dtype=F64, requires_grad=True)
    labels = torch.tensor([[[d[1] for d in data]]], dtype=F64)
    mask = torch.tensor([[d[2] for d in data]], dtype=torch.bool)
    narrow = scores.detach().float().requires_grad_()
    ours = loss(narrow, labels.float(), beta=beta, mask=mask, reduction="none", **options)
    exact = plain(scores, labels, torch.tensor([[beta]], dtype=F64), mask, **options)
    # In float32 u of 1e4 has steps of 1e-3, which no loss can give back.
    steps = 1e-6 + 2e-7 * (float(scores.detach().abs().max()) * beta if data else 0.0)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=10 * steps)
    if exact.requires_grad:
        got, wanted = torch.autograd.grad(ours.sum(), narrow)[0], torch.autograd.grad(exact.sum(), scores)[0]
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=10 * beta * steps)


# ---------------------------------------------------------------- identities


def test_two_items_are_bradley_terry_and_lambda_weights_scale_it() -> None:
    chosen, rejected = torch.randn(2, 5, dtype=F64)
    scores, labels = torch.stack([rejected, chosen], 1), torch.tensor([[1.0, 3.0]]).expand(5, 2)
    pair = bradley_terry(chosen, rejected, beta=0.3, reduction="none")
    torch.testing.assert_close(pairwise_logistic(scores, labels, beta=0.3, reduction="none"), pair)
    swap = (2.0**3 - 2.0**1) * (1 - 1 / math.log2(3))
    torch.testing.assert_close(lambda_loss(scores, labels, beta=0.3, reduction="none"), swap * pair)
    ideal = (2.0**3 - 1) + (2.0**1 - 1) / math.log2(3)
    torch.testing.assert_close(
        lambda_loss(scores, labels, beta=0.3, normalize=True, reduction="none"), swap / ideal * pair
    )


@pytest.mark.parametrize("c", [0.25, 3.0])
@every_loss
def test_beta_c_on_transformed_scores_is_the_same_problem(
    loss: Callable, plain: Callable, options: dict, c: float
) -> None:
    """Equation 13 of COS-DPO; ranks are those of scores - reference, or LambdaLoss would not have the property."""
    scores, labels, reference, mask = ragged()
    beta = torch.tensor([0.5, 0.8, 2.0], dtype=F64)
    moved = (1 - 1 / c) * reference + scores / c
    common = {"reference": reference, "mask": mask, "reduction": "none", **options}
    torch.testing.assert_close(loss(moved, labels, beta=c * beta, **common), loss(scores, labels, beta=beta, **common))


@every_loss
def test_order_of_items_and_padding_change_nothing(loss: Callable, plain: Callable, options: dict) -> None:
    scores, labels, _, mask = ragged()
    scores = scores.detach() + 0.01 * torch.arange(9)  # without ties, whose ranks go by position
    before = loss(scores, labels, mask=mask, reduction="none", **options)
    shuffled = torch.randperm(9)
    after = loss(scores[:, shuffled], labels[..., shuffled], mask=mask[:, shuffled], reduction="none", **options)
    torch.testing.assert_close(after, before)
    for b in range(len(scores)):
        kept = mask[b]
        alone = loss(scores[b : b + 1, kept], labels[b : b + 1, :, kept], reduction="none", **options)
        torch.testing.assert_close(alone, before[b : b + 1])


@pytest.mark.parametrize("gain", ["linear", "exponential"])
def test_approx_ndcg_tends_to_one_minus_ndcg(gain: str) -> None:
    ndcg_score = pytest.importorskip("sklearn.metrics").ndcg_score
    scores = torch.rand(4, 12, dtype=F64)
    labels = torch.randint(0, 4, (4, 12))
    gains = labels if gain == "linear" else 2**labels - 1
    ours = approx_ndcg(scores, labels, beta=1e6, gain=gain, reduction="none")[:, 0]
    for b in range(4):
        assert float(ours[b]) == pytest.approx(1 - ndcg_score(gains[b : b + 1], scores[b : b + 1]), abs=1e-12)


# ---------------------------------------------------------------- boosted trees

SIZES = [5, 8, 12, 1, 7, 6]


def boosting_data() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=sum(SIZES)) * 1.5, generator.integers(0, 5, size=sum(SIZES)).astype(float)


def our_gradient(loss: Callable) -> np.ndarray:
    """Return the gradient of the summed loss over the lists of `boosting_data`, one number a document."""
    scores, labels = boosting_data()
    mask = torch.arange(max(SIZES))[None] < torch.tensor(SIZES)[:, None]
    padded = torch.zeros(mask.shape, dtype=F64)
    padded[mask] = torch.tensor(scores)
    relevance = torch.zeros(mask.shape, dtype=F64)
    relevance[mask] = torch.tensor(labels)
    padded.requires_grad_()
    return torch.autograd.grad(loss(padded, relevance, mask=mask, reduction="sum"), padded)[0][mask].numpy()


def gradient_from_leaves(leaf: Callable[[int, float], float]) -> np.ndarray:
    """Recover the gradient of each document from trees of one split that isolate it.

    A leaf's value is -g / (h + λ); two values of λ give g and h. Where no split was made both leaves are 0.
    """
    gradient = np.full(sum(SIZES), np.nan)
    for i in range(sum(SIZES)):
        weak, strong = leaf(i, 0.5), leaf(i, 2.0)
        if weak != strong:
            hessian = (2.0 * strong - 0.5 * weak) / (weak - strong)
            gradient[i] = -weak * (hessian + 0.5)
    return gradient


def assert_same_gradient(theirs: np.ndarray, ours: np.ndarray, tolerance: float) -> None:
    compared = ~np.isnan(theirs)
    scale = np.abs(ours).max()
    # Not compared: the lonely document, and documents whose gradient is too small to be worth a split.
    assert compared.sum() >= len(ours) - 3
    assert (np.abs(ours[~compared]) < 5e-3 * scale).all()
    np.testing.assert_allclose(theirs[compared], ours[compared], atol=tolerance * scale)


@pytest.mark.parametrize(
    ("parameters", "options"),
    [
        ({"lambdarank_truncation_level": 100}, {}),
        ({"lambdarank_truncation_level": 3}, {"top_k": 3}),
        ({"lambdarank_truncation_level": 100, "label_gain": [0, 1, 2, 3, 4]}, {"gain": "linear"}),
    ],
    ids=["all", "top3", "linear"],
)
def test_lightgbm_lambdarank_has_our_gradient(parameters: dict, options: dict) -> None:
    """With `lambdarank_norm=False`. LightGBM takes the sigmoid from a table, which is good for 1e-5."""
    lightgbm = pytest.importorskip("lightgbm")
    scores, labels = boosting_data()
    copies = 64  # LightGBM estimates the documents of a leaf from Hessians, and refuses leaves of less than one

    def leaf(i: int, penalty: float) -> float:
        feature = (np.arange(len(scores)) == i).astype(float)[:, None]
        data = lightgbm.Dataset(
            np.tile(feature, (copies, 1)),
            label=np.tile(labels, copies),
            group=SIZES * copies,
            init_score=np.tile(scores, copies),
        )
        booster = lightgbm.train(
            {
                "objective": "lambdarank", "lambdarank_norm": False, "lambda_l2": penalty * copies, "num_leaves": 2,
                "min_data_in_leaf": 1, "min_data_in_bin": 1, "min_sum_hessian_in_leaf": 0.0, "learning_rate": 1.0,
                "feature_pre_filter": False, "verbose": -1, "num_threads": 1, **parameters,
            },
            data,
            num_boost_round=1,
        )  # fmt: skip
        return float(booster.predict(np.ones((1, 1)), raw_score=True)[0])

    assert_same_gradient(
        gradient_from_leaves(leaf), our_gradient(partial(lambda_loss, normalize=True, **options)), 2e-5
    )


@pytest.mark.parametrize(
    ("objective", "parameters", "loss"),
    [
        ("rank:pairwise", {}, pairwise_logistic),
        ("rank:ndcg", {}, partial(lambda_loss, normalize=True)),
        ("rank:ndcg", {"ndcg_exp_gain": False}, partial(lambda_loss, normalize=True, gain="linear")),
        ("rank:ndcg", {"lambdarank_num_pair_per_sample": 3}, partial(lambda_loss, normalize=True, top_k=3)),
    ],
    ids=["pairwise", "ndcg", "ndcg-linear", "ndcg-top3"],
)
def test_xgboost_ranking_objectives_have_our_gradient(objective: str, parameters: dict, loss: Callable) -> None:
    """With all pairs and without XGBoost's two normalisations; its Hessian is twice the true one."""
    xgboost = pytest.importorskip("xgboost")
    scores, labels = boosting_data()

    def leaf(i: int, penalty: float) -> float:
        feature = (np.arange(len(scores)) == i).astype(float)[:, None]
        data = xgboost.DMatrix(feature, label=labels)
        data.set_group(SIZES)
        data.set_base_margin(scores)
        booster = xgboost.train(
            {
                "objective": objective, "max_depth": 1, "min_child_weight": 0, "eta": 1, "lambda": penalty,
                "nthread": 1, "tree_method": "exact", "lambdarank_pair_method": "topk",
                "lambdarank_num_pair_per_sample": 100, "lambdarank_normalization": False,
                "lambdarank_score_normalization": False, **parameters,
            },
            data,
            1,
        )  # fmt: skip
        probe = xgboost.DMatrix(np.ones((1, 1)))
        probe.set_base_margin(np.zeros(1))
        return float(booster.predict(probe, output_margin=True)[0])

    gradient = gradient_from_leaves(leaf)
    gradient[np.abs(gradient) < 1e-6] = np.nan  # no split: the value of the root, which holds all documents
    assert_same_gradient(gradient, our_gradient(loss), 1e-6)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("gap", [10.0, 16.0, 25.0, 60.0])
def test_confident_lists_keep_every_digit(gap: float) -> None:
    scores = torch.tensor([[2 * gap, gap, 0.0]], requires_grad=True)
    loss = pairwise_logistic(scores, torch.tensor([[2, 1, 0]]))
    (gradient,) = torch.autograd.grad(loss, scores)
    near, far = math.log1p(math.exp(-gap)), math.log1p(math.exp(-2 * gap))
    assert float(loss.detach()) == pytest.approx(2 * near + far, rel=1e-6)
    assert float(gradient[0, 0]) == pytest.approx(-1 / (1 + math.exp(gap)) - 1 / (1 + math.exp(2 * gap)), rel=1e-6)


@every_loss
def test_extreme_scores_are_finite(loss: Callable, plain: Callable, options: dict) -> None:
    scores = torch.tensor([[-1e4, 1e4, 0.0, 1e-30], [3.4e36, -2.1e26, 42.0, -3.4e36]], requires_grad=True)
    labels = torch.tensor([[3, 0, 1, 2], [0, 1, 2, 3]])
    vector = loss(scores, labels, reduction="none", **options)
    (gradient,) = torch.autograd.grad(vector.sum(), scores)
    assert vector.isfinite().all()
    assert gradient.isfinite().all()
    assert (vector > 0).all()


def test_infinite_scores() -> None:
    """-inf above others costs +inf with a finite gradient, below others nothing; two of them are tied."""
    scores = torch.tensor([[-math.inf, 0.0], [0.0, -math.inf], [-math.inf, -math.inf]], requires_grad=True)
    labels = torch.tensor([[1, 0]]).expand(3, 2)
    vector = pairwise_logistic(scores, labels, reduction="none")[:, 0]
    (gradient,) = torch.autograd.grad(vector, scores, torch.ones(3))
    torch.testing.assert_close(vector, torch.tensor([math.inf, 0.0, math.log(2)]))
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0], [0.0, 0.0], [-0.5, 0.5]]))
    smooth = approx_ndcg(scores, labels, reduction="none")[:, 0]
    half_way = 1 - 1 / math.log2(2.5)
    torch.testing.assert_close(smooth, torch.tensor([1 - 1 / math.log2(3), 0.0, half_way]))
    assert torch.autograd.grad(smooth.sum(), scores)[0].isfinite().all()


@every_loss
def test_nan_stays_in_its_list(loss: Callable, plain: Callable, options: dict, monkeypatch) -> None:
    scores, labels, _, _ = ragged()
    clean = loss(scores, labels, reduction="none", **options)
    bad_scores, bad_labels = scores.detach().clone(), labels.clone()
    bad_scores[5, 2], bad_labels[6, 1, 0] = math.nan, math.nan
    bad_scores.requires_grad_()
    monkeypatch.setattr(_arguments, "readable", lambda tensor: False)  # as on a GPU; what can be read is refused
    vector = loss(bad_scores, bad_labels, reduction="none", **options)
    assert vector[5].isnan().all()
    assert vector[6, 1].isnan()
    fine = torch.ones_like(vector, dtype=torch.bool)
    fine[5], fine[6, 1] = False, False
    torch.testing.assert_close(vector[fine], clean[fine])
    (gradient,) = torch.autograd.grad(vector, bad_scores, torch.ones_like(vector))
    (expected,) = torch.autograd.grad(clean, scores, torch.ones_like(clean))
    torch.testing.assert_close(gradient[:5], expected[:5])
    assert gradient[5].isnan().any()


def test_large_labels_have_finite_normalised_gains() -> None:
    """2^label overflows for counts and times; divided by the ideal DCG it need not."""
    scores, labels = torch.randn(1, 4), torch.tensor([[300.0, 298.0, 12.0, 0.0]])
    for loss in (approx_ndcg, partial(lambda_loss, normalize=True)):
        exact = loss(scores.double(), labels.double(), reduction="none")
        ours = loss(scores, labels, reduction="none")
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-7)
        assert 0 < float(ours) < math.inf


def test_a_label_whose_gain_is_infinite_is_refused() -> None:
    scores, labels = torch.randn(2, 3), torch.tensor([[1.0, 0.0, 2.0], [0.0, 128.0, 1.0]])
    with pytest.raises(ValueError, match=r"labels of list 1 hold 128, whose gain .* pass gain='linear' or normalize"):
        lambda_loss(scores, labels)
    mask = torch.tensor([[True] * 3, [True, False, True]])
    for options in ({"gain": "linear"}, {"normalize": True}, {"mask": mask}):
        assert lambda_loss(scores, labels, **options).isfinite()
    assert lambda_loss(scores.double(), labels.double()).isfinite()


@pytest.mark.parametrize(
    ("label", "gain", "remedy"),
    [
        (-math.inf, "linear", "-inf, whose gain .*float32; leave the item out with mask, or give it a finite label"),
        (math.inf, "linear", "inf, whose gain .*float32; leave the item out with mask, or give it a finite label"),
        (math.inf, "exponential", "inf, whose gain .*float32; leave the item out with mask, or give it a finite label"),
        (1e39, "linear", r"1e\+39, whose gain .*float32; divide the labels"),
    ],
)
def test_an_infinite_gain_is_refused_with_a_remedy_that_helps(label: float, gain: str, remedy: str) -> None:
    scores, labels = torch.randn(1, 3), torch.tensor([[1.0, 0.0, label]], dtype=torch.float64)
    with pytest.raises(ValueError, match=f"labels of list 0 hold {remedy}"):
        lambda_loss(scores, labels, gain=gain)
    assert lambda_loss(scores, labels, gain=gain, mask=torch.tensor([[True, True, False]])).isfinite()


def test_a_label_whose_gain_is_infinite_costs_nothing_where_it_forms_no_pair() -> None:
    scores = torch.randn(3, 3, requires_grad=True)
    labels = torch.tensor([[200.0, 200.0, 200.0], [150.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    mask = torch.tensor([[True] * 3, [True, False, False], [True] * 3])
    loss = lambda_loss(scores, labels, mask=mask, reduction="none")[:, 0]
    (slope,) = torch.autograd.grad(loss.sum(), scores, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), scores)
    assert loss[:2].tolist() == [0, 0] and loss[2] > 0
    assert not slope[:2].any() and not second[:2].any() and slope.isfinite().all() and second.isfinite().all()
    assert float(lambda_loss(scores[:, :1], labels[:, :1])) == 0


def test_a_list_without_a_positive_ideal_dcg_contributes_nothing() -> None:
    scores = torch.randn(2, 3, requires_grad=True)
    labels = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    for loss in (partial(approx_ndcg, gain="linear"), partial(lambda_loss, gain="linear", normalize=True)):
        vector = loss(scores, labels, reduction="none")
        (gradient,) = torch.autograd.grad(vector.sum(), scores)
        assert vector[0] == 0 < vector[1]
        assert not gradient[0].any()
        assert gradient[1].isfinite().all()
        assert gradient[1].any()


def test_small_labels_keep_their_differences() -> None:
    """Labels near 0 give 2^label - 1 near 0: written as it stands, float32 loses the digits that NDCG consists of."""
    scores, labels = torch.randn(1, 5), torch.tensor([[1e-4, 2e-4, 3e-4, 1.5e-4, 0.0]])
    for loss in (approx_ndcg, partial(lambda_loss, normalize=True), lambda_loss):
        exact = loss(scores.double(), labels.double(), reduction="none")
        torch.testing.assert_close(loss(scores, labels, reduction="none").double(), exact, rtol=1e-5, atol=0)


def test_neighbouring_ranks_deep_in_a_list_keep_their_weights() -> None:
    """1/log2(1001) - 1/log2(1002) is 1e-5: a float32 difference of the two has three digits."""
    items = 1500
    scores = torch.linspace(5, 0, items)[None]
    labels = torch.zeros(1, items)
    labels[0, 1401] = 1  # all its pairs with neighbours
    near = torch.zeros(1, items, dtype=torch.bool)
    near[0, 1400:1402] = True
    exact = (1 / math.log2(1402) - 1 / math.log2(1403)) * -logsigmoid(
        scores[0, 1401].double() - scores[0, 1400].double()
    )
    everything = lambda_loss(scores, labels, gain="linear", reduction="none")
    assert everything.shape == (1, 1)
    ranks_1401_1402 = pairs.pairwise_logistic(
        scores[:, None, :],
        torch.where(near, labels, math.nan)[:, None],
        torch.zeros(1, 1),
        labels[:, None],
        1 / torch.log2(torch.arange(2, items + 2, dtype=F64))[None],
    )
    assert float(ranks_1401_1402) == pytest.approx(float(exact), rel=1e-6)
    torch.testing.assert_close(
        everything.double(), lambda_loss(scores.double(), labels, gain="linear", reduction="none"), rtol=1e-6, atol=0
    )


def test_the_gradient_of_the_beta_survives_a_common_offset() -> None:
    scores, labels, *_ = ragged(dtype=torch.float32)
    gradients = []
    for offset in (0.0, 8192.0):  # a power of two, so that adding it only rounds
        moved = (scores.detach() * 4).round() / 4 + offset
        beta = torch.tensor(0.7, requires_grad=True)
        gradients.append(torch.autograd.grad(pairwise_logistic(moved, labels, beta=beta), beta)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=0)


@every_loss
def test_sixteen_bit_inputs_are_computed_in_float32(loss: Callable, plain: Callable, options: dict) -> None:
    scores = ragged()[0].detach().bfloat16().requires_grad_()
    labels = ragged()[1]
    wide = scores.detach().float().requires_grad_()
    vector, expected = (loss(s, labels, beta=0.3, reduction="none", **options) for s in (scores, wide))
    assert vector.dtype == torch.float32
    assert torch.equal(vector, expected)
    upstream = torch.randn_like(vector)
    got, wanted = torch.autograd.grad(vector, scores, upstream)[0], torch.autograd.grad(expected, wide, upstream)[0]
    assert torch.equal(got, wanted.bfloat16())


# ---------------------------------------------------------------- memory, graphs, registrations


@pytest.mark.parametrize("budget", [1, 10, 100, 1000, 10**6])
def test_blocks_cover_every_pair_once_within_the_budget(budget: int, monkeypatch) -> None:
    monkeypatch.setattr(pairs, "_PAIRS_CPU", budget)
    lists, objectives, items = 5, 3, 11
    seen = torch.zeros(lists, items, dtype=torch.int)
    for rows in pairs._blocks(torch.empty(lists, objectives, items)):
        block = seen[rows]
        assert block.numel() * objectives * items <= max(budget, objectives * items)
        block += 1
    assert (seen == 1).all()


@every_loss
def test_nothing_of_size_k_squared_is_kept(loss: Callable, plain: Callable, options: dict) -> None:
    items = 200
    scores = torch.randn(2, items, requires_grad=True)
    labels = torch.randint(0, 5, (2, 3, items))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vector = loss(scores, labels, reduction="none", **options)
    assert max(kept) <= 2 * 3 * items
    vector.sum().backward()


@every_loss
def test_backward_twice_gives_the_same_and_second_derivatives_are_those_of_loops(
    loss: Callable, plain: Callable, options: dict
) -> None:
    scores, labels, *_ = ragged()
    vector = loss(scores, labels, reduction="none", **options)
    upstream = torch.randn_like(vector)
    first = torch.autograd.grad(vector, scores, upstream, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(vector, scores, upstream, retain_graph=True)[0], first)
    again = loss(scores, labels, reduction="none", **options)
    assert torch.equal(again, vector)
    direction = torch.randn_like(scores)
    found = []
    for value in (vector, plain(scores, labels, torch.ones(7, 1, dtype=F64), **options)):
        (gradient,) = torch.autograd.grad(value, scores, upstream, create_graph=True)
        found.append(torch.autograd.grad((gradient * direction).sum(), scores)[0])
    torch.testing.assert_close(*found)


@every_loss
def test_without_gradient_the_value_is_the_same(loss: Callable, plain: Callable, options: dict) -> None:
    scores, labels, *_ = ragged()
    vector = loss(scores, labels, reduction="none", **options)
    with torch.no_grad():
        assert torch.equal(loss(scores, labels, reduction="none", **options), vector)
    assert not loss(scores.detach(), labels, reduction="none", **options).requires_grad


@every_loss
def test_compiles_to_one_graph(loss: Callable, plain: Callable, options: dict) -> None:
    torch.compiler.reset()
    scores, labels, reference, mask = ragged()
    beta = torch.tensor([0.5, 1.0, 2.0], dtype=F64)

    def vector(s: Tensor) -> Tensor:
        return loss(s, labels, reference=reference, beta=beta, mask=mask, reduction="none", **options)

    expected, got = vector(scores), torch.compile(vector, fullgraph=True, backend="aot_eager")(scores)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, scores, upstream), torch.autograd.grad(expected, scores, upstream)
    )


def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    scores, labels, _, mask = ragged(dtype=torch.float32)

    def total(s: Tensor) -> Tensor:
        smooth = approx_ndcg(s, labels, mask=mask)
        return smooth + lambda_loss(s, labels, mask=mask) + pairwise_logistic(s, labels, mask=mask, margin=0.1)

    expected, got = total(scores), torch.compile(total, fullgraph=True)(scores)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, scores), torch.autograd.grad(expected, scores))


@pytest.mark.parametrize("common", [True, False])
def test_registrations_of_the_ops(common: bool) -> None:
    _, labels, _, mask = ragged()
    u = torch.randn(7, 1 if common else 3, 9, dtype=F64, requires_grad=True)
    margin = torch.randn(7, 1 if common else 3, dtype=F64, requires_grad=True)
    y = torch.where(mask[:, None], labels, math.nan)
    discounts = torch.rand(7, 9, dtype=F64)
    for rest in ((None, None, None, False, True), (labels, discounts, discounts > 0.5, True, True)):
        torch.library.opcheck(torch.ops.mopl.pairwise_logistic, (u, y, margin, *rest))
    torch.library.opcheck(
        torch.ops.mopl.pairwise_logistic, (u.detach(), y, margin.detach(), None, None, None, False, False)
    )
    torch.library.opcheck(torch.ops.mopl.smooth_ranks, (u, mask))
    torch.library.opcheck(torch.ops.mopl.smooth_ranks, (u, None))
    torch.library.opcheck(torch.ops.mopl.smooth_ranks_backward, (torch.randn_like(u), u.detach(), mask))


@pytest.mark.gpu
@every_loss
def test_a_gpu_gives_the_same(loss: Callable, plain: Callable, options: dict) -> None:
    scores, labels, reference, mask = ragged(lists=40, items=33)
    upstream = torch.randn(40, 3, dtype=F64)
    results = []
    for device in ("cpu", "cuda"):
        s = scores.detach().to(device).requires_grad_()
        vector = loss(s, labels.to(device), reference=reference.to(device), mask=mask.to(device), reduction="none",
                      beta=torch.tensor([0.5, 1.0, 2.0], dtype=F64, device=device), **options)  # fmt: skip
        results.append((vector.cpu(), torch.autograd.grad(vector, s, upstream.to(device))[0].cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- shapes and errors


@every_loss
def test_shapes_reductions_and_empty_batches(loss: Callable, plain: Callable, options: dict) -> None:
    scores, labels, _, mask = ragged()
    weights = torch.rand(3, dtype=F64)
    vector = loss(scores, labels, mask=mask, weights=weights, reduction="none", **options)
    assert vector.shape == (7, 3)
    torch.testing.assert_close(
        loss(scores, labels, mask=mask, weights=weights, reduction="sum", **options), vector.sum()
    )
    torch.testing.assert_close(loss(scores, labels, mask=mask, weights=weights, **options), vector.sum(1).mean())
    single = loss(scores, labels[:, 0], mask=mask, reduction="none", **options)
    torch.testing.assert_close(single, vector[:, :1] / weights[0])
    for shape in ((0, 5), (4, 0), (0, 0)):
        empty = torch.zeros(shape, requires_grad=True)
        nothing = loss(empty, torch.zeros(shape), reduction="sum", **options)
        assert float(nothing.detach()) == 0.0
        nothing.backward()


def test_labels_may_be_integers() -> None:
    scores, labels, *_ = ragged()
    for _, loss, _, options in SETTINGS:
        assert torch.equal(loss(scores, labels.long(), **options), loss(scores, labels, **options))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(4)}, ValueError, r"scores has shape \(4,\)"),
        ({"scores": torch.zeros(2, 4, dtype=torch.long)}, TypeError, "floating-point"),
        ({"labels": torch.zeros(2, 5)}, ValueError, r"labels has shape \(2, 1, 5\) but scores are \(2, 4\)"),
        ({"reference": torch.zeros(2, 1)}, ValueError, "reference"),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask is torch.float32"),
        ({"beta": torch.ones(2)}, ValueError, r"beta\[:, None\]"),
        ({"weights": torch.ones(2, 3)}, ValueError, "weights has shape"),
        ({"reduction": "batchmean"}, ValueError, "reduction"),
    ],
)
@every_loss
def test_errors_name_the_argument(
    loss: Callable, plain: Callable, options: dict, change: dict, error: type, message: str
) -> None:
    arguments = {"scores": torch.zeros(2, 4), "labels": torch.zeros(2, 4), **options, **change}
    with pytest.raises(error, match=message):
        loss(arguments.pop("scores"), arguments.pop("labels"), **arguments)


def test_errors_of_the_options() -> None:
    scores = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="margin has shape"):
        pairwise_logistic(scores, scores, margin=torch.zeros(3))
    with pytest.raises(ValueError, match="gain is 'log'"):
        lambda_loss(scores, scores, gain="log")
    with pytest.raises(ValueError, match="gain is 'log'"):
        approx_ndcg(scores, scores, gain="log")
    with pytest.raises(ValueError, match="top_k is 0"):
        lambda_loss(scores, scores, top_k=0)
    with pytest.raises(ValueError, match="top_k_rule is 'any'"):
        lambda_loss(scores, scores, top_k_rule="any")
