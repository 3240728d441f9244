"""β, temperatures, weights and KL weights: which numbers and forms are taken, and what becomes of the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from mopl import _arguments, steering
from mopl.conditioning import check_weights, sample_betas
from mopl.losses import (
    DPOLoss,
    approx_ndcg,
    bradley_terry,
    lambda_loss,
    listwise_dpo,
    pairwise_logistic,
    plackett_luce,
    policy_gradient,
    scalarize,
)
from mopl.ops import gathered_logprob, linear_kl, linear_logprob, listwise_cross_entropy, plackett_luce_nll

SCORES, LABELS = torch.randn(3, 4), torch.rand(3, 2, 4)
TOKENS = torch.randint(0, 5, (3,))
HIDDEN, HEAD = torch.randn(3, 4), torch.randn(5, 4)
LIST_LOSSES = (listwise_dpo, plackett_luce, pairwise_logistic, lambda_loss, approx_ndcg)

# name -> what it does with one value a row (3,) or (3, 2), or with a number: results (3, ...)
TEMPERATURES: dict[str, Callable[..., Tensor]] = {
    **{f.__name__: lambda v, f=f: f(SCORES, LABELS, beta=v, reduction="none") for f in LIST_LOSSES},
    "bradley_terry": lambda v: bradley_terry(SCORES[:, :2], SCORES[:, 2:], beta=v, reduction="none"),
    "gathered_logprob": lambda v: gathered_logprob(torch.randn(3, 5), TOKENS, temperature=_rows(v)),
    "linear_logprob": lambda v: linear_logprob(HIDDEN, HEAD, TOKENS, temperature=_rows(v)),
    "linear_kl": lambda v: linear_kl(HIDDEN, HEAD, 2 * HIDDEN, temperature=_rows(v)),
    "linear_kl reference": lambda v: linear_kl(HIDDEN, HEAD, 2 * HIDDEN, reference_temperature=_rows(v)),
}
GRADIENT = partial(policy_gradient, SCORES, torch.randn(3, 2), reference=SCORES - 1, reduction="none")
NOT_NEGATIVE: dict[str, Callable[..., Tensor]] = {
    **{
        f.__name__: lambda v, f=f: f(torch.rand(3, 2), v)
        for f in (scalarize.linear, scalarize.chebyshev, scalarize.smooth_chebyshev, scalarize.cosine_penalty)
    },
    "policy_gradient": lambda v: GRADIENT(v, kl_weight=0.1).loss,
    "kl_weight": lambda v: GRADIENT(torch.full((2,), 0.5), kl_weight=_rows(v), kl_form="penalty").loss,
    "kl_weight in the complement form": lambda v: GRADIENT(torch.full((2,), 0.5), kl_weight=_rows(v)).loss,
}
every_temperature = pytest.mark.parametrize("use", TEMPERATURES.values(), ids=TEMPERATURES.keys())
every_weight = pytest.mark.parametrize("use", NOT_NEGATIVE.values(), ids=NOT_NEGATIVE.keys())
EVERYTHING = TEMPERATURES | NOT_NEGATIVE


def _rows(value):
    """Return one value a row, of one value a row and objective."""
    return value[:, 0] if isinstance(value, Tensor) and value.ndim == 2 else value


def in_the_second_row(bad: float) -> Tensor:
    return torch.tensor([[0.5, 0.5], [bad, bad], [0.5, 0.5]])


@every_temperature
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_beta_or_temperature_that_is_not_positive_is_refused(use: Callable[..., Tensor], bad: float) -> None:
    for value in (bad, np.float32(bad), np.array(bad), torch.tensor(bad), in_the_second_row(bad)):
        with pytest.raises(
            ValueError, match=r"(beta|temperature) (is|holds) (0|-1|nan|inf|-inf) but .*must be positive"
        ):
            use(value)


@every_weight
@pytest.mark.parametrize("bad", [-0.25, math.nan, -math.inf])
def test_a_weight_that_is_negative_is_refused(use: Callable[..., Tensor], bad: float) -> None:
    for value in (bad, torch.tensor(bad), in_the_second_row(bad)):
        with pytest.raises(
            ValueError, match=r"(weights|kl_weight) (is|holds) (-0.25|nan|-inf) but .*must not be negative"
        ):
            use(value)
    use(torch.zeros(3, 2))


def test_a_kl_weight_above_one_is_refused_in_the_complement_form_only() -> None:
    for value in (1.5, torch.tensor([0.5, 1.5, 0.5])):
        with pytest.raises(ValueError, match=r"kl_weight .* 1.5 but .*at most 1"):
            GRADIENT(torch.full((2,), 0.5), kl_weight=value)
        GRADIENT(torch.full((2,), 0.5), kl_weight=value, kl_form="penalty")


@pytest.mark.parametrize("use", EVERYTHING.values(), ids=EVERYTHING.keys())
@pytest.mark.parametrize("value", [[0.7, 0.3], (0.7, 0.3), np.array([0.7, 0.3]), "0.7", None])
def test_sequences_and_arrays_are_refused_with_the_remedy(use: Callable[..., Tensor], value) -> None:
    if value is None and use in (TEMPERATURES["linear_kl reference"],):
        return  # None means the temperature of the policy
    remedy = "$" if value is None or isinstance(value, str) else r"; pass torch.tensor\("
    with pytest.raises(TypeError, match="must be a number or a torch.Tensor" + remedy):
        use(value)


@pytest.mark.parametrize("use", EVERYTHING.values(), ids=EVERYTHING.keys())
def test_every_form_of_a_number_gives_the_same(use: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    expected = use(0.5)
    for value in (np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).double(),
                  torch.full((3, 2), 0.5), torch.full((3, 2), 0.5).half()):  # fmt: skip
        torch.manual_seed(0)
        torch.testing.assert_close(use(value), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("use", EVERYTHING.values(), ids=EVERYTHING.keys())
def test_where_values_cannot_be_read_the_row_is_nan_and_no_other(use: Callable[..., Tensor], monkeypatch) -> None:
    """As on a GPU: nothing may wait for it."""
    monkeypatch.setattr(_arguments, "readable", lambda tensor: False)
    bad = use(in_the_second_row(-1.0)).reshape(3, -1)
    assert bad[1].isnan().all()
    assert bad[::2].isfinite().all()


@pytest.mark.parametrize("loss", [listwise_dpo, pairwise_logistic])
def test_a_compiled_loss_is_nan_at_a_beta_out_of_range(loss: Callable[..., Tensor]) -> None:
    @partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=True)
    def step(beta) -> Tensor:
        return loss(SCORES, LABELS, beta=beta, reduction="none")

    assert step(torch.tensor([0.5, 1.0])).isfinite().all()
    bad = step(torch.tensor([0.5, -1.0]))
    assert bad[:, 0].isfinite().all() and bad[:, 1].isnan().all()
    assert step(-1.0).isnan().all()


def test_a_row_that_does_not_count_may_have_any_temperature() -> None:
    logits, target = torch.randn(2, 3, 5), torch.tensor([[1, -100, 2], [3, -100, 4]])
    wide = torch.tensor([[1.0, 0.0, 2.0], [0.5, math.nan, 2.0]])
    found = gathered_logprob(logits, target, temperature=wide)
    torch.testing.assert_close(found, gathered_logprob(logits, target, temperature=wide.nan_to_num().clamp(min=0.5)))
    assert gathered_logprob(logits, target, temperature=torch.tensor([[1.0, -1.0, 2.0]])).isfinite().all()
    hidden, head = torch.randn(2, 3, 4), torch.randn(5, 4)
    linear_logprob(hidden, head, target, temperature=wide)
    linear_logprob(hidden, head, torch.tensor([1, 1]), row=torch.tensor([0, 5]), temperature=wide)
    linear_kl(hidden, head, hidden, mask=target >= 0, temperature=wide)
    for use in (
        lambda: gathered_logprob(logits, target.clamp(min=0), temperature=wide),
        lambda: linear_logprob(hidden, head, torch.tensor([1]), row=torch.tensor([4]), temperature=wide),
        lambda: linear_kl(hidden, head, hidden, temperature=wide),
    ):
        with pytest.raises(ValueError, match="temperature holds"):
            use()


@pytest.mark.parametrize("loss", LIST_LOSSES)
def test_weights_of_a_loss_are_factors_of_any_sign(loss: Callable[..., Tensor]) -> None:
    plain, factors = loss(SCORES, LABELS, reduction="none"), torch.tensor([[1.0, -2.0], [0.0, 0.5], [3.0, -1.0]])
    torch.testing.assert_close(loss(SCORES, LABELS, weights=factors, reduction="none"), plain * factors)
    for weights in (torch.rand(7, 3), torch.rand(3), torch.rand(2, 2)):
        with pytest.raises(ValueError, match=r"weights has shape .* there are 3 lists and 2 objectives"):
            loss(SCORES, LABELS, weights=weights)


PAIRS = partial(bradley_terry, SCORES[:, :2], SCORES[:, 2:4], reduction="none")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_factors_are_finite_and_a_margin_is_a_number(bad: float, monkeypatch) -> None:
    use: dict[str, list[Callable[..., Tensor]]] = {
        "weights": [PAIRS, *(partial(loss, SCORES, LABELS, reduction="none") for loss in LIST_LOSSES)],
        "ideal": [partial(f, SCORES[:, :2], 0.5) for f in (scalarize.chebyshev, scalarize.smooth_chebyshev)],
        "margin": [PAIRS, partial(pairwise_logistic, SCORES, LABELS, reduction="none")],
    }
    if not math.isnan(bad):
        del use["margin"], use["ideal"]  # those that are infinite leave a pair or an objective out
    for name, functions in use.items():
        for function in functions:
            for value in (bad, torch.tensor(bad), in_the_second_row(bad)):
                with pytest.raises(ValueError, match=f"{name} (is|holds) {bad:g} but .*must be (finite|a number)$"):
                    function(**{name: value})
    monkeypatch.setattr(_arguments, "readable", lambda tensor: False)
    for name, functions in use.items():
        for function in functions:
            found = function(**{name: in_the_second_row(bad)}).reshape(3, -1)
            assert not found[1].isfinite().any() and found[::2].isfinite().all()


def test_an_infinite_ideal_leaves_an_objective_out() -> None:
    losses, w, ideal = torch.tensor([[2.0, 9.0]]), torch.tensor([0.5, 0.5]), torch.tensor([1.0, math.inf])
    for f in (scalarize.chebyshev, partial(scalarize.smooth_chebyshev, mu=0.1)):
        torch.testing.assert_close(f(losses, w, ideal), torch.tensor([0.5]))


def test_label_smoothing_is_a_rate_in_every_form() -> None:
    chosen, rejected = SCORES[:, :1], SCORES[:, 1:2]
    for loss_type, bad, words in (
        ("sigmoid", 1.5, "rate of flipped labels"), ("sigmoid", -0.1, "rate of flipped labels"),
        ("robust", 0.5, "divides by 1 - 2ε"), ("exo_pair", 0.0, "its paper takes 1e-3"),
    ):  # fmt: skip
        for value in (bad, torch.tensor(bad), torch.tensor([[0.1], [bad], [0.1]])):
            with pytest.raises(ValueError, match=words):
                bradley_terry(chosen, rejected, loss_type=loss_type, label_smoothing=value)
    with pytest.raises(TypeError, match="label_smoothing is a list"):
        bradley_terry(chosen, rejected, label_smoothing=[0.1])
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"beta is .* must be positive"):
            DPOLoss(beta)


def test_the_ops_of_lists_take_betas_of_any_sign_as_they_say() -> None:
    for op in (listwise_cross_entropy, plackett_luce_nll):
        turned = op(-SCORES, LABELS, torch.full((3, 2), 2.0))
        torch.testing.assert_close(op(SCORES, LABELS, torch.full((3, 2), -2.0)), turned)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_what_steers_a_trained_model_is_checked_with_the_same_words(bad: float) -> None:
    for use in (
        lambda: steering.rescale(SCORES, SCORES, bad),
        lambda: steering.rescale(SCORES, SCORES, torch.tensor([1.0, bad, 1.0])),
        lambda: steering.beta_conditioned(SCORES, SCORES, [1.0, bad]),
        lambda: sample_betas(2, 3, [1.0, bad], 2.0, seed=0, step=0),
    ):
        with pytest.raises(ValueError, match="must be positive and finite"):
            use()
    if not bad == 0:
        with pytest.raises(ValueError, match="must lie on the simplex"):
            check_weights([bad, 1 - bad])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for() -> None:
    scores, labels = SCORES.cuda(), LABELS.cuda()
    beta = in_the_second_row(-1.0).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [f(scores, labels, beta=beta, weights=beta, reduction="none") for f in LIST_LOSSES]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value in found:
        assert value[1].isnan().all() and value[::2].isfinite().all()
