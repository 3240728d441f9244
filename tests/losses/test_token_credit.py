"""Credit of single tokens by enumeration: rewards of tokens, and weights of their advantages.

Two tokens of a vocabulary of three, all nine responses, a table of logits for each prefix: means are exact.
"""

import math

import pytest
import torch
from torch import Tensor

from mopl import reference_policy
from mopl.losses.policy_gradient import policy_gradient

V = 3
FIRST, SECOND = (i.reshape(-1) for i in torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij"))
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
ALPHA = 0.4


def tables() -> list[Tensor]:
    """Return logits of the first token (V,), and of the second one after each first (V, V)."""
    return [torch.randn(V, dtype=torch.float64), torch.randn(V, V, dtype=torch.float64)]


def logprobs(policy: list[Tensor]) -> Tensor:
    """Return the log-probabilities (9, 2) of the tokens of every response."""
    return torch.stack([policy[0].log_softmax(-1)[FIRST], policy[1].log_softmax(-1)[FIRST, SECOND]], -1)


def gradients(value: Tensor, policy: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, policy, retain_graph=True)


def mean_gradient(policy: list[Tensor], rewards: Tensor, reference: Tensor, **options) -> tuple[Tensor, ...]:
    """Return the mean over sampled responses of the gradient of minus the loss."""
    logprob = logprobs(policy)
    loss = policy_gradient(
        logprob, rewards, WEIGHTS, kl_weight=ALPHA, reference=reference, reduction="none", **options
    ).loss
    return gradients(-(logprob.detach().sum(-1).exp() * loss).sum(), policy)


def exactly(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture
def policy() -> list[Tensor]:
    return [table.requires_grad_() for table in tables()]


def process_rewards() -> Tensor:
    """Return rewards (9, 2, 2) of two objectives: of the first token given that one, of the second given both."""
    first = torch.randn(2, V, dtype=torch.float64)[:, FIRST].T
    return torch.stack([first, torch.randn(9, 2, dtype=torch.float64)], -1)


@pytest.mark.parametrize("form", ["complement", "penalty"])
@pytest.mark.parametrize("to_go", [False, True])
def test_rewards_of_tokens_give_the_gradient_of_their_expected_sum(policy, to_go, form) -> None:
    rewards, reference = process_rewards(), logprobs(tables())
    logprob = logprobs(policy)
    scale = 1 - ALPHA if form == "complement" else 1.0
    gain = scale * (WEIGHTS @ rewards.sum(-1).T) - ALPHA * (logprob - reference).sum(-1)
    expected = gradients((logprob.sum(-1).exp() * gain).sum(), policy)
    exactly(mean_gradient(policy, rewards, reference, to_go=to_go, kl_form=form), expected)


def test_returns_of_tokens_are_the_rewards_and_the_kl_from_them_on(policy) -> None:
    rewards, reference = process_rewards(), logprobs(tables())
    logprob = logprobs(policy)
    options = dict(kl_weight=ALPHA, reference=reference)
    whole = policy_gradient(logprob, rewards, WEIGHTS, **options)
    later = policy_gradient(logprob, rewards, WEIGHTS, to_go=True, **options)
    oracle = reference_policy.returns_to_go(rewards, WEIGHTS, (logprob - reference).detach(), ALPHA)
    torch.testing.assert_close(later.returns, oracle, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.returns, oracle[:, :1].expand(9, 2), rtol=1e-12, atol=1e-12)
    for result in (whole, later):
        torch.testing.assert_close(result.sequence_returns, oracle[:, 0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.reward, WEIGHTS @ rewards.sum(-1).T)


def test_one_reward_at_the_last_token_is_the_reward_of_the_response(policy) -> None:
    rewards, reference = torch.randn(9, 2, dtype=torch.float64), logprobs(tables())
    spread = torch.stack([torch.zeros_like(rewards), rewards], -1)
    for options in ({}, {"to_go": True}, {"baseline": "leave_one_out", "group": 3}):
        exactly(
            mean_gradient(policy, spread, reference, **options), mean_gradient(policy, rewards, reference, **options)
        )


def test_weights_of_prefixes_stretch_the_gradient_at_each_prefix(policy) -> None:
    """The blocks of a tabular policy's gradient are those of its prefixes: each is multiplied by its own weight."""
    rewards, reference = torch.randn(9, 2, dtype=torch.float64), logprobs(tables())
    plain = mean_gradient(policy, rewards, reference)
    start, after = torch.tensor(0.7, dtype=torch.float64), torch.tensor([0.0, 2.0, 1.3], dtype=torch.float64)
    weights = torch.stack([start.expand(9), after[FIRST]], -1)
    found = mean_gradient(policy, rewards, reference, token_weights=weights, baseline=torch.full((9,), 1.7).double())
    exactly(found, (start * plain[0], after[:, None] * plain[1]))


def test_weights_of_the_token_itself_are_no_gradient_of_v(policy) -> None:
    rewards, reference = torch.randn(9, 2, dtype=torch.float64), logprobs(tables())
    weights = torch.rand(V, dtype=torch.float64)
    found = mean_gradient(policy, rewards, reference, token_weights=torch.stack([weights[FIRST], weights[SECOND]], -1))
    plain = mean_gradient(policy, rewards, reference)
    ratio = found[1] / plain[1]
    assert (ratio.max(-1).values - ratio.min(-1).values).min() > 1e-3


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_weights_multiply_the_advantage_and_neither_ratio_nor_clip(level, clip) -> None:
    rows, size = 12, 4
    logprob = (-2 * torch.rand(rows, size, dtype=torch.float64)).requires_grad_()
    behaviour = logprob.detach() + 0.3 * torch.randn(rows, size, dtype=torch.float64)
    weights = torch.rand(rows, size, dtype=torch.float64) * (torch.rand(rows, size) > 0.2)
    rewards, upstream = torch.randn(rows, 2, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    options = dict(
        kl_weight=0.0, behaviour=behaviour, ratio_level=level, clip=clip, reduction="none", baseline="group", group=3,
        standardize=True,
    )  # fmt: skip
    plain = policy_gradient(logprob, rewards, WEIGHTS, **options)
    found = policy_gradient(logprob, rewards, WEIGHTS, token_weights=weights, **options)
    (actual,) = torch.autograd.grad((upstream * found.loss).sum(), logprob)
    expected = reference_policy.token_credit_gradient(
        logprob.detach(), plain.advantages, weights, behaviour, ratio_level=level, clip=clip
    )
    exactly((actual,), (upstream[:, None] * expected,))
    torch.testing.assert_close(found.advantages, weights * plain.advantages)
    torch.testing.assert_close(found.ratio, plain.ratio, rtol=0, atol=0)
    assert clip is None or 0 < plain.clip_share < 1
    ones = policy_gradient(logprob, rewards, WEIGHTS, token_weights=torch.ones_like(logprob), **options)
    torch.testing.assert_close(ones.loss, plain.loss, rtol=1e-14, atol=1e-14)


def test_the_kl_in_the_loss_is_not_weighted() -> None:
    logprob = (-torch.rand(4, 3, dtype=torch.float64)).requires_grad_()
    reference = -torch.rand(4, 3, dtype=torch.float64)
    options = dict(kl_weight=0.5, reference=reference, kl_in="loss", kl_estimator="k3")
    nothing = policy_gradient(
        logprob, torch.randn(4, 2).double(), WEIGHTS, token_weights=torch.zeros(4, 3), **options
    ).loss
    alone = policy_gradient(logprob, torch.zeros(4, 2).double(), WEIGHTS, **options).loss
    exactly(torch.autograd.grad(nothing, logprob), torch.autograd.grad(alone, logprob))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -3.0])
def test_masked_weights_and_rewards_are_not_read(bad) -> None:
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]]).bool()
    found = []
    for fill in (0.5, bad):
        logprob = torch.full((3, 3), -0.5, requires_grad=True)
        rewards = torch.linspace(-1, 1, 18).view(3, 2, 3).masked_fill(~mask[:, None], fill)
        credit = torch.linspace(0, 2, 9).view(3, 3).masked_fill(~mask, fill)
        result = policy_gradient(
            logprob, rewards, WEIGHTS, kl_weight=0.0, mask=mask, token_weights=credit, to_go=True, reduction="none"
        )
        (gradient,) = torch.autograd.grad(result.loss.sum(), logprob)
        assert gradient[~mask].eq(0).all() and result.loss[2] == 0
        found.append((*result, gradient))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"token_weights": torch.full((4, 3), -1.0)}, ValueError, "token_weights holds -1"),
        ({"token_weights": torch.ones(4)}, ValueError, r"token_weights has shape \(4,\)"),
        ({"token_weights": torch.ones(4, 3, dtype=torch.long)}, TypeError, "token_weights"),
        ({"rewards": torch.zeros(4, 2, 2)}, ValueError, r"\(B, m, T\)"),
        ({"rewards": torch.zeros(4, 3, 2)}, ValueError, r"rewards is \(4, 3, 2\)"),
    ],
    ids=str,
)
def test_errors_name_the_argument(options, error, message) -> None:
    given = dict(rewards=torch.zeros(4, 2), weights=torch.ones(2), kl_weight=0.0) | options
    with pytest.raises(error, match=message):
        policy_gradient(torch.zeros(4, 3), **given)
