"""Samples of another engine count by their importance: the mean gradient is that of the policy's own samples."""

import itertools

import pytest
import torch
from torch import Tensor

from mopl.losses import balance_weights, importance_weights, policy_gradient

F64 = torch.float64
WORDS, LENGTH, OBJECTIVES = 3, 2, 2
WEIGHTS, ALPHA = torch.tensor([0.7, 0.3], dtype=F64), 0.2
ALL = torch.tensor(list(itertools.product(range(WORDS), repeat=LENGTH)))  # every response, (9, 2)


class Engine:
    """A distribution of responses of two words: the second depends on the first."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.first = torch.randn(WORDS, dtype=F64).requires_grad_()
        self.second = torch.randn(WORDS, WORDS, dtype=F64).requires_grad_()

    def logprob(self) -> Tensor:  # (9, 2)
        first = self.first.log_softmax(-1)[ALL[:, 0]]
        return torch.stack([first, self.second.log_softmax(-1)[ALL[:, 0], ALL[:, 1]]], -1)

    def chances(self) -> Tensor:  # (9,)
        return self.logprob().detach().sum(-1).exp()


def rewards() -> Tensor:
    torch.manual_seed(9)
    return torch.rand(len(ALL), OBJECTIVES, dtype=F64)


def mean_gradient(policy: Engine, by: Engine, importance=None, exact=False, **options) -> Tensor:
    """The gradient of the loss in the mean over what `by` samples."""
    logprob, reference = policy.logprob(), Engine(5).logprob().detach()
    if exact:  # a differentiable KL of each position, whose samples are of `by`
        other = Engine(5)
        at_first = torch.nn.functional.kl_div(
            other.first.log_softmax(-1), policy.first.log_softmax(-1), log_target=True, reduction="sum"
        )
        rows = policy.second.log_softmax(-1), other.second.log_softmax(-1)
        at_second = (rows[0].exp() * (rows[0] - rows[1])).sum(-1)[ALL[:, 0]]
        options |= {"kl_estimator": "exact", "exact_kl": torch.stack([at_first.expand(len(ALL)), at_second], -1)}
    found = policy_gradient(
        logprob, rewards(), WEIGHTS, kl_weight=ALPHA, reference=reference, importance=importance, reduction="none",
        **options,
    )  # fmt: skip
    (by.chances() * found.loss).sum().backward()
    gradient = torch.cat([policy.first.grad, policy.second.grad.flatten()])
    policy.first.grad = policy.second.grad = None
    return gradient


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_in": "loss", "kl_level": "sequence"},
        {"kl_in": "loss", "kl_estimator": "k3", "kl_level": "sequence"},
        {"kl_in": "loss", "exact": True},
        {"kl_in": "reward", "exact": True},
        {"to_go": True},
        {"baseline": torch.full((len(ALL),), 0.4, dtype=F64)},
    ],
    ids=str,
)
def test_the_gradient_from_another_engines_samples_is_that_of_the_policys_own(options):
    policy, stale = Engine(1), Engine(2)
    own = mean_gradient(policy, policy, **options)
    assert not torch.allclose(mean_gradient(policy, stale, **options), own, atol=1e-2), "uncorrected it is another one"
    weights = importance_weights(policy.logprob(), stale.logprob().detach(), cap=None).weights
    assert torch.allclose(mean_gradient(policy, stale, weights, **options), own, atol=1e-12)


def test_tokens_count_by_their_own_ratio_and_the_first_one_exactly():
    """A token has no prefix at the start of a response, so there its own ratio is all of it."""
    policy, stale = Engine(1), Engine(2)
    stale.second = policy.second  # a prefix is sampled otherwise, what follows it is not
    weights = importance_weights(policy.logprob(), stale.logprob().detach(), level="token", cap=None).weights
    assert weights.shape == ALL.shape and torch.allclose(weights[:, 1], torch.ones(len(ALL), dtype=F64))
    options = {"kl_in": "loss", "kl_estimator": "k1"}
    own, found = mean_gradient(policy, policy, **options), mean_gradient(policy, stale, weights, **options)
    logprob, reference = policy.logprob(), Engine(5).logprob().detach()
    advantage = (1 - ALPHA) * (rewards() * WEIGHTS).sum(-1)[:, None] - ALPHA * (logprob - reference).detach()
    loss = -(stale.chances()[:, None] * weights * advantage * logprob).sum()
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [policy.first, policy.second])])
    assert torch.allclose(found, by_hand, atol=1e-12) and not torch.allclose(found, own, atol=1e-3)


def test_weights_of_one_engine_are_one_and_a_cap_cuts_the_others():
    policy, stale = Engine(1), Engine(2)
    same = importance_weights(policy.logprob(), policy.logprob())
    assert torch.equal(same.weights, torch.ones(len(ALL), dtype=F64))
    assert (same.ratio, same.truncated, same.kl) == (1, 0, 0)
    found = importance_weights(policy.logprob(), stale.logprob(), cap=1.25)
    ratio = policy.chances() / stale.chances()
    assert torch.allclose(found.weights, ratio.clamp(max=1.25)) and torch.allclose(found.ratio, ratio.mean())
    assert float(found.truncated) == float((ratio > 1.25).double().mean()) > 0
    # In the mean over the samples: KL(μ ‖ π) of a token.
    exact = (stale.chances() * (stale.logprob() - policy.logprob()).sum(-1)).sum() / LENGTH
    estimates = torch.stack([
        importance_weights(policy.logprob()[i : i + 1], stale.logprob()[i : i + 1]).kl for i in range(len(ALL))
    ])  # fmt: skip
    assert torch.allclose((stale.chances() * estimates).sum(), exact)


def test_what_is_masked_is_not_read_and_counts_for_nothing():
    logprob = torch.tensor([[-1.0, torch.nan], [torch.nan, torch.nan]])
    mask = torch.tensor([[True, False], [False, False]])
    for level, shape in (("sequence", (2,)), ("token", (2, 2))):
        found = importance_weights(logprob, logprob + 0.1, mask=mask, level=level)
        assert found.weights.shape == shape and float(found.weights.sum()) == pytest.approx(0.904837)
        assert float(found.ratio) == pytest.approx(0.904837)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cap": 0.5}, ValueError, "cap is 0.5 but must be at least 1"),
        ({"level": "row"}, ValueError, "level is 'row'"),
        ({"sampled": torch.zeros(2, 2)}, ValueError, r"sampled has shape \(2, 2\)"),
    ],
)
def test_what_cannot_be_is_refused(options, error, message):
    given = {"logprob": torch.zeros(3, 2), "sampled": torch.zeros(3, 2), **options}
    with pytest.raises(error, match=message):
        importance_weights(**given)


@pytest.mark.parametrize("importance", [torch.ones(2), torch.ones(3, 1), torch.tensor([1.0, -1.0, 1.0])])
def test_importance_of_another_shape_or_sign_is_refused(importance):
    with pytest.raises(ValueError, match=r"^importance (has shape|holds)"):
        policy_gradient(torch.zeros(3, 2), torch.zeros(3, 1), torch.ones(1), kl_weight=0.0, importance=importance)


# ---------------------------------------------------------------- responses that trade-offs share


@pytest.mark.parametrize(
    "options", [{}, {"baseline": "leave_one_out"}, {"kl_in": "loss", "kl_level": "sequence"}], ids=str
)
def test_responses_of_all_trade_offs_have_the_mean_gradient_of_each_ones_own(options):
    policies, w = [Engine(1), Engine(2)], torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=F64)
    reference, count = Engine(5).logprob().detach(), len(ALL)
    common = {"kl_weight": ALPHA, "reduction": "none", **options}
    for policy, each in zip(policies, w, strict=True):  # what is wanted: no baseline changes the mean
        loss = policy_gradient(
            policy.logprob(), rewards(), each, reference=reference, **{**common, "baseline": None}
        ).loss  # fmt: skip
        (policy.chances() * loss).sum().backward()
    wanted = [[p.grad.clone() for p in (each.first, each.second)] for each in policies]
    for policy in policies:
        policy.first.grad = policy.second.grad = None
    # Two responses, each of the mixture by itself: all pairs of them.
    one, other = (rows.flatten() for rows in torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij"))
    pairs = torch.stack([one, other], 1).flatten()
    chances = sum(policy.chances() for policy in policies) / 2
    logprob = torch.cat([policy.logprob()[pairs] for policy in policies])
    importance = balance_weights(torch.stack([policy.logprob().detach().sum(-1)[pairs] for policy in policies]))
    assert importance.max() < 2 and torch.allclose(importance.mean(0), torch.ones(len(pairs), dtype=F64))
    more = common | ({"group": 2} if "baseline" in options else {})
    loss = policy_gradient(
        logprob, rewards()[pairs].repeat(2, 1), w.repeat_interleave(len(pairs), 0),
        reference=reference[pairs].repeat(2, 1), importance=importance.flatten(), **more,
    ).loss  # fmt: skip
    of_pair = (chances[one] * chances[other]).repeat_interleave(2).repeat(2)
    (0.5 * of_pair * loss).sum().backward()
    for policy, gradients in zip(policies, wanted, strict=True):
        torch.testing.assert_close(policy.first.grad, gradients[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(policy.second.grad, gradients[1], rtol=1e-10, atol=1e-12)


def test_balance_weights_of_long_and_of_impossible_responses():
    inf = float("inf")
    logs = torch.tensor([[-4000.0, -9000.0, -inf, -inf], [-4000.0, -4000.0, -5.0, -inf]])
    assert balance_weights(logs).tolist() == [[1, 0, 0, 1], [1, 2, 2, 1]]
    with pytest.raises(ValueError, match=r"log_probs has shape \(4,\) but must be \(K, B\)"):
        balance_weights(logs[0])
    with pytest.raises(ValueError, match="log_probs has NaN"):
        balance_weights(logs * float("nan"))
