"""Optima of the list losses that are known in closed form: scores free to move must reach them.

Two label distributions over three items, softmax(2, 1, 0) and softmax(0, 1, 2.5), weights (0.25, 0.75); the numbers
follow from the formulas in the docstrings.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mopl.losses import listwise_dpo, plackett_luce

F64 = torch.float64
LABELS = torch.stack([torch.tensor(v, dtype=F64).softmax(0) for v in ([2.0, 1, 0], [0.0, 1, 2.5])])[None]  # (1, 2, 3)
WEIGHTS = torch.tensor([[0.25, 0.75]], dtype=F64)
BASE = torch.tensor([[0.3, -1.2, 0.7]], dtype=F64)


def optimum(loss, shape: tuple[int, ...]) -> Tensor:
    """Return the scores that minimise `loss`, found by LBFGS, with mean 0 in each list."""
    scores = torch.zeros(shape, dtype=F64, requires_grad=True)
    search = torch.optim.LBFGS(
        [scores], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(scores)
        value.backward()
        return value

    for _ in range(3):
        search.step(closure)
    return (scores - scores.mean(-1, keepdim=True)).detach()


def centred(values: Tensor) -> Tensor:
    return values - values.mean(-1, keepdim=True)


def weighted(scores: Tensor, beta, weights: Tensor = WEIGHTS) -> Tensor:
    return listwise_dpo(scores, LABELS, reference=BASE, beta=beta, weights=weights, normalize="l1", reduction="sum")


@pytest.mark.parametrize(
    ("beta", "distance"),
    [
        (0.5, (-0.605937, -0.845315, 1.451252)),
        (1.0, (-0.302969, -0.422657, 0.725626)),
        (2.0, (-0.151484, -0.211329, 0.362813)),
    ],
)
def test_free_scores_reach_the_arithmetic_mixture_of_the_labels(beta: float, distance) -> None:
    """One beta β: s - s0 = log(sum_j w_j z_j) / β up to a constant, and the losses do not depend on β or s0."""
    scores = optimum(lambda s: weighted(s, beta), (1, 3))
    mixture = (WEIGHTS[:, :, None] * LABELS).sum(1)
    torch.testing.assert_close(mixture, torch.tensor([[0.213478, 0.189397, 0.597126]], dtype=F64), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores, centred(BASE + mixture.log() / beta), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores - centred(BASE), torch.tensor([distance], dtype=F64), atol=2e-6, rtol=0)
    losses = listwise_dpo(scores, LABELS, reference=BASE, beta=beta, reduction="none")
    torch.testing.assert_close(losses, torch.tensor([[1.480909, 0.776619]], dtype=F64), atol=1e-6, rtol=0)


def test_the_front_of_the_two_losses() -> None:
    """L_j(w) = H(z_j) + KL(z_j || z_w) at eleven weights."""
    first = [
        2.296563,
        1.847623,
        1.581934,
        1.393640,
        1.248982,
        1.133021,
        1.038108,
        0.960250,
        0.897953,
        0.852592,
        0.832396,
    ]
    second = [
        0.680022,
        0.701333,
        0.747353,
        0.809673,
        0.887330,
        0.982127,
        1.098239,
        1.243272,
        1.431435,
        1.692885,
        2.110873,
    ]
    w = torch.linspace(0, 1, 11, dtype=F64)
    weights = torch.stack([w, 1 - w], 1)
    scores = optimum(
        lambda s: listwise_dpo(s, LABELS.expand(11, 2, 3), beta=0.7, weights=weights, reduction="sum"), (11, 3)
    )
    losses = listwise_dpo(scores, LABELS.expand(11, 2, 3), beta=0.7, reduction="none")
    torch.testing.assert_close(losses, torch.tensor([first, second], dtype=F64).T, atol=1e-6, rtol=0)


def test_unequal_betas_reach_the_root_of_their_gradient_and_scale_as_one() -> None:
    """c times the betas is a distance from the base divided by c (the linear transformation property)."""
    scores = optimum(lambda s: weighted(s, torch.tensor([0.5, 2.0])), (1, 3)) - centred(BASE)
    torch.testing.assert_close(scores, torch.tensor([[-0.429771, -0.157445, 0.587216]], dtype=F64), atol=1e-6, rtol=0)
    losses = listwise_dpo(scores, LABELS, beta=torch.tensor([0.5, 2.0]), reduction="none")
    torch.testing.assert_close(losses, torch.tensor([[1.258173, 0.687310]], dtype=F64), atol=1e-6, rtol=0)
    tripled = optimum(lambda s: weighted(s, torch.tensor([1.5, 6.0])), (1, 3)) - centred(BASE)
    torch.testing.assert_close(tripled, scores / 3, atol=1e-7, rtol=0)


@pytest.mark.parametrize("objective", [0, 1])
def test_at_a_vertex_of_the_weights_only_one_objective_counts(objective: int) -> None:
    weights = torch.eye(2, dtype=F64)[objective : objective + 1]
    beta = torch.tensor([0.5, 2.0])
    scores = optimum(lambda s: weighted(s, beta, weights), (1, 3)) - centred(BASE)
    expected = centred(LABELS[:, objective].log() / beta[objective])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


def test_softmax_labels_lead_to_the_policy_of_reinforcement_learning() -> None:
    """With labels softmax(r) the optimum is s0 + r / β, the policy p0 exp(r / β)."""
    rewards = torch.randn(4, 6, dtype=F64)
    base = torch.randn(4, 6, dtype=F64)
    scores = optimum(
        lambda s: listwise_dpo(s, rewards, reference=base, beta=0.4, normalize="softmax", reduction="sum"),
        (4, 6),
    )
    torch.testing.assert_close(scores, centred(base + rewards / 0.4), atol=1e-5, rtol=0)


def test_two_responses_with_preference_rates_meet_at_the_logit_of_the_mean_rate() -> None:
    rates = torch.tensor([0.9, 0.3], dtype=F64)
    labels = torch.stack([rates, 1 - rates], 1)[None]
    scores = optimum(lambda s: listwise_dpo(s, labels, beta=0.1, weights=WEIGHTS, reduction="sum"), (1, 2))
    mean = float((WEIGHTS[0] * rates).sum())
    assert float(scores[0, 0] - scores[0, 1]) == pytest.approx(math.log(mean / (1 - mean)) / 0.1, rel=1e-6)


def test_the_population_plackett_luce_loss_is_smallest_at_the_true_utilities() -> None:
    """Fisher consistency, over the 24 rankings of four items."""
    utilities = centred(torch.tensor([[1.0, 0.2, -0.5, -1.4]], dtype=F64))
    orders = torch.tensor(list(itertools.permutations(range(4))))
    labels = torch.empty(24, 4).scatter_(1, orders, torch.arange(4, 0, -1.0).expand(24, 4))
    chance = (-plackett_luce(utilities.expand(24, 4), labels, reduction="none")).exp()
    assert float(chance.sum()) == pytest.approx(1, rel=1e-12)

    def population(scores: Tensor) -> Tensor:
        return plackett_luce(scores.expand(24, 4), labels, beta=0.5, weights=chance, reduction="sum")

    at_truth = (utilities / 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(population(at_truth), at_truth)
    assert gradient.abs().max() < 1e-15
    torch.testing.assert_close(optimum(population, (1, 4)), utilities / 0.5, atol=1e-6, rtol=0)


def test_a_mixture_of_plackett_luce_objectives_scales_with_its_betas() -> None:
    labels = torch.randint(0, 4, (6, 2, 5))
    weights = torch.rand(6, 2, dtype=F64)
    # A little of every ranking keeps the optimum finite.
    reverse = 3 - labels

    def loss(beta: Tensor):
        return lambda s: sum(
            share * plackett_luce(s, z, beta=beta, weights=weights, reduction="sum")
            for share, z in ((0.8, labels), (0.2, reverse))
        )

    beta = torch.tensor([0.5, 1.0], dtype=F64)
    one, three = optimum(loss(beta), (6, 5)), optimum(loss(3 * beta), (6, 5))
    torch.testing.assert_close(three, one / 3, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- one loss is another


def pairs() -> tuple[Tensor, Tensor]:
    return torch.randn(50, 2, dtype=F64) * 5, torch.randn(50, 2, dtype=F64) * 5


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_with_two_items_listwise_dpo_and_plackett_luce_are_dpo(beta: float) -> None:
    scores, base = pairs()
    labels = torch.tensor([[1.0, 0.0]], dtype=F64).expand(50, 2)
    margin = (scores - base)[:, 0] - (scores - base)[:, 1]
    dpo = -torch.nn.functional.logsigmoid(beta * margin)
    for loss in (listwise_dpo, plackett_luce):
        found = loss(scores, labels, reference=base, beta=beta, reduction="none")[:, 0]
        torch.testing.assert_close(found, dpo, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 0.5])
def test_labels_of_one_minus_epsilon_and_epsilon_are_conservative_dpo(smoothing: float) -> None:
    scores, base = pairs()
    labels = torch.tensor([[1 - smoothing, smoothing]], dtype=F64).expand(50, 2)
    margin = 0.3 * ((scores - base)[:, 0] - (scores - base)[:, 1])
    logsigmoid = torch.nn.functional.logsigmoid
    conservative = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    found = listwise_dpo(scores, labels, reference=base, beta=0.3, reduction="none")[:, 0]
    torch.testing.assert_close(found, conservative, rtol=1e-12, atol=1e-15)


def test_softmax_of_binary_labels_is_conservative_dpo_with_27_percent() -> None:
    scores, base = pairs()
    binary = torch.tensor([[1.0, 0.0]], dtype=F64).expand(50, 2)
    epsilon = 1 / (1 + math.e)
    smoothed = torch.tensor([[1 - epsilon, epsilon]], dtype=F64).expand(50, 2)
    torch.testing.assert_close(
        listwise_dpo(scores, binary, reference=base, normalize="softmax"),
        listwise_dpo(scores, smoothed, reference=base),
    )


def test_top_1_plackett_luce_is_listnet_with_a_one_hot_label() -> None:
    scores, base = torch.randn(20, 7, dtype=F64), torch.randn(20, 7, dtype=F64)
    labels = torch.nn.functional.one_hot(torch.randint(0, 7, (20,)), 7).to(F64)
    listnet = listwise_dpo(scores, labels, reference=base, beta=0.5, reduction="none")
    for options in ({"top_k": 1}, {"last_group": "free"}):
        top = plackett_luce(scores, labels, reference=base, beta=0.5, reduction="none", **options)
        torch.testing.assert_close(top, listnet, rtol=1e-12, atol=1e-15)


def test_one_chosen_against_many_is_the_softmax_form_of_dpo() -> None:
    """S-DPO: -log sigmoid(-log sum exp(rejected - chosen)), here with scores that overflow its usual code."""
    scores = torch.randn(10, 5, dtype=F64) * 400
    chosen, rejected = scores[:, :1], scores[:, 1:]
    expected = -torch.nn.functional.logsigmoid(-torch.logsumexp(rejected - chosen, 1))
    labels = torch.tensor([[1.0, 0, 0, 0, 0]]).expand(10, 5)
    for loss in (
        listwise_dpo(scores, labels, reduction="none"),
        plackett_luce(scores, labels, top_k=1, reduction="none"),
    ):
        torch.testing.assert_close(loss[:, 0], expected, rtol=1e-10, atol=1e-30)
