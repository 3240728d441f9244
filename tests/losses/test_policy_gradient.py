"""Policy gradients by enumeration: two tokens of a vocabulary of three, all nine responses, so means are exact."""

import math

import pytest
import torch
from torch import Tensor

from mopl.conditioning.value_head import ValueHead
from mopl.losses.policy_gradient import group_mean, kl_estimate, policy_gradient, reward_coefficient, value_loss

V = 3
FIRST, SECOND = (i.reshape(-1) for i in torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij"))
REWARDS = torch.tensor(
    [[1.0, -2.0, 0.5, 0.0, 3.0, 0.2, -1.0, 0.7, 2.0], [0.3, 1.0, -1.0, 2.0, 0.1, 0.0, 1.5, -0.4, 1.0]]
)
REWARDS = REWARDS.T.double().contiguous()
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
ALPHA = 0.4


def parameters() -> list[Tensor]:
    return [torch.randn(V, dtype=torch.float64), torch.randn(V, V, dtype=torch.float64)]


def logprobs(parts: list[Tensor]) -> Tensor:
    """log-probabilities (9, 2) of the tokens of every response."""
    return torch.stack([parts[0].log_softmax(-1)[FIRST], parts[1].log_softmax(-1)[FIRST, SECOND]], -1)


def positions_kl(parts: list[Tensor], reference: list[Tensor]) -> Tensor:
    """KL of each position over the vocabulary, (9, 2), differentiable."""
    kls = []
    for p, q in zip(parts, reference, strict=True):
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1))
    return torch.stack([kls[0].expand(9), kls[1][FIRST]], -1)


@pytest.fixture
def problem() -> tuple[list[Tensor], Tensor, list[Tensor]]:
    policy, reference = parameters(), parameters()
    return [p.requires_grad_() for p in policy], logprobs(reference), reference


def flat(value: Tensor, leaves: list[Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, leaves, retain_graph=True)])


def objective(policy: list[Tensor], reference: Tensor, kl_form: str = "complement") -> Tensor:
    logp = logprobs(policy).sum(-1)
    p = logp.exp()
    return (p * (reward_coefficient(ALPHA, kl_form) * (REWARDS @ WEIGHTS) - ALPHA * (logp - reference.sum(-1)))).sum()  # type: ignore


def mean_gradient(policy: list[Tensor], reference: Tensor, sampler: Tensor | None = None, **options) -> Tensor:
    """Mean over responses, drawn from the policy or from a `sampler` (9, 2), of the loss's gradient."""
    logprob = logprobs(policy)
    result = policy_gradient(
        logprob, REWARDS, WEIGHTS, kl_weight=ALPHA, reference=reference, behaviour=sampler, reduction="none", **options
    )
    share = (logprob if sampler is None else sampler).detach().sum(-1).exp()
    return flat((share * result.loss).sum(), policy)


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- the mean gradient is that of V


@pytest.mark.parametrize("kl_form", ["complement", "penalty"])
@pytest.mark.parametrize("to_go", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("baseline", [None, "constant", "prefix"])
def test_kl_in_the_reward_gives_the_gradient_of_v(problem, baseline, level, to_go, kl_form) -> None:
    policy, reference, _ = problem
    # A baseline may depend on the prefix of a token, not on the token.
    values = torch.stack([torch.full((9,), 1.7).double(), torch.randn(V).double()[FIRST]], -1)
    values = {None: None, "constant": torch.full((9,), 1.7), "prefix": values}[baseline]
    actual = mean_gradient(policy, reference, baseline=values, to_go=to_go, kl_level=level, kl_form=kl_form)
    exactly(actual, -flat(objective(policy, reference, kl_form), policy))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_of_sequences_in_the_loss_gives_the_gradient_of_v(problem, estimator) -> None:
    policy, reference, _ = problem
    actual = mean_gradient(policy, reference, kl_in="loss", kl_level="sequence", kl_estimator=estimator)
    exactly(actual, -flat(objective(policy, reference), policy))


def test_kl_of_tokens_in_the_loss_leaves_out_the_kl_of_later_tokens(problem) -> None:
    policy, reference, parts = problem
    share = logprobs(policy).detach().sum(-1).exp()
    reward = (logprobs(policy).sum(-1).exp() * (REWARDS @ WEIGHTS)).sum()
    local = (share[:, None] * positions_kl(policy, parts)).sum()  # prefixes as given
    expected = -flat((1 - ALPHA) * reward - ALPHA * local, policy)
    for options in ({"kl_estimator": "k1"}, {"kl_estimator": "k3"}):
        exactly(mean_gradient(policy, reference, kl_in="loss", **options), expected)
    exact = positions_kl(policy, parts)
    exactly(mean_gradient(policy, reference, kl_in="loss", kl_estimator="exact", exact_kl=exact), expected)
    assert (expected + flat(objective(policy, reference), policy)).abs().max() > 0.01


@pytest.mark.parametrize("to_go", [False, True])
def test_exact_kl_in_the_reward_gives_the_gradient_of_v(problem, to_go) -> None:
    policy, reference, parts = problem
    exact = positions_kl(policy, parts)
    actual = mean_gradient(policy, reference, kl_estimator="exact", exact_kl=exact, to_go=to_go)
    exactly(actual, -flat(objective(policy, reference), policy))


def test_k3_in_the_reward_has_the_difference_of_two_divergences_as_its_mean(problem) -> None:
    policy, reference, _ = problem
    logp, logq = logprobs(policy).sum(-1), reference.sum(-1)
    reverse, forward = (logp.exp() * (logp - logq)).sum(), (logq.exp() * (logq - logp)).sum()
    reward = (logp.exp() * (REWARDS @ WEIGHTS)).sum()
    expected = -flat((1 - ALPHA) * reward - ALPHA * (reverse - forward), policy)
    exactly(mean_gradient(policy, reference, kl_level="sequence", kl_estimator="k3"), expected)


def test_estimators_differentiated_as_they_stand_would_be_wrong(problem) -> None:
    """What `kl_estimate` avoids: k1's own gradient has mean 0, k3's is that of the other divergence."""
    policy, reference, _ = problem
    logp, logq = logprobs(policy).sum(-1), reference.sum(-1)
    share, x = logp.detach().exp(), logp - logq
    exactly(flat((share * x).sum(), policy), torch.zeros(V + V * V, dtype=torch.float64))
    forward = flat((logq.exp() * (logq - logp)).sum(), policy)
    exactly(flat((share * ((-x).exp() - 1 + x)).sum(), policy), forward)


# ---------------------------------------------------------------- estimators


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_in_value(problem, estimator, level) -> None:
    policy, reference, parts = problem
    logprob = logprobs(policy)
    share = logprob.sum(-1).exp()
    kl = (share * (logprob - reference).sum(-1)).sum()
    exactly((share * kl_estimate(logprob, reference, estimator=estimator, level=level)).sum(), kl)
    exactly((share * positions_kl(policy, parts).sum(-1)).sum(), kl)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradient_of_a_sequences_estimate_is_that_of_the_kl(problem, estimator) -> None:
    policy, reference, _ = problem
    logprob = logprobs(policy)
    share = logprob.detach().sum(-1).exp()
    estimate = kl_estimate(logprob, reference, estimator=estimator, level="sequence")
    kl = (logprob.sum(-1).exp() * (logprob - reference).sum(-1)).sum()
    exactly(flat((share * estimate).sum(), policy), flat(kl, policy))


def test_k3_is_never_negative_and_varies_less_for_close_policies(problem) -> None:
    policy, _, _ = problem
    reference = logprobs([p + 0.05 * torch.randn_like(p) for p in policy]).detach()
    logprob = logprobs(policy).detach()
    share = logprob.sum(-1).exp()
    values = {e: kl_estimate(logprob, reference, estimator=e) for e in ("k1", "k2", "k3")}
    assert (values["k3"] >= 0).all() and (values["k1"] < 0).any()
    deviation = {e: (share * (v - (share * v).sum()).square()).sum().sqrt() for e, v in values.items()}
    assert deviation["k3"] < 0.2 * deviation["k1"]


def test_k3_keeps_its_digits_for_equal_policies() -> None:
    logprob = torch.full((1, 1), -3.0)
    k3 = kl_estimate(logprob, logprob + 2**-9, estimator="k3")
    torch.testing.assert_close(k3, torch.tensor([(2.0**-9) ** 2 / 2 + (2.0**-9) ** 3 / 6]), rtol=1e-4, atol=0)


# ---------------------------------------------------------------- old samples


@pytest.mark.parametrize("kl", ["reward", "loss", "exact"])
def test_sequence_ratios_give_the_gradient_of_v_from_another_policys_samples(problem, kl) -> None:
    policy, reference, parts = problem
    sampler = logprobs(parameters())
    options = {"kl_level": "sequence", "kl_in": kl, "kl_estimator": "k3" if kl == "loss" else "k1"}
    if kl == "exact":
        options = {"kl_estimator": "exact", "exact_kl": positions_kl(policy, parts)}
    actual = mean_gradient(policy, reference, sampler, ratio_level="sequence", **options)
    exactly(actual, -flat(objective(policy, reference), policy))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_at_the_policy_that_sampled_ratios_change_nothing(problem, clip, level) -> None:
    policy, reference, _ = problem
    sampler = logprobs(policy).detach()
    actual = mean_gradient(policy, reference, sampler, ratio_level=level, clip=clip)
    exactly(actual, mean_gradient(policy, reference))


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.3)])
def test_token_clip_is_ppos_minimum(problem, low, high) -> None:
    policy, reference, _ = problem
    sampler = logprobs([p + 0.5 * torch.randn_like(p) for p in policy]).detach()
    logprob = logprobs(policy)
    clip = low if low == high else (low, high)
    result = policy_gradient(
        logprob, REWARDS, WEIGHTS, kl_weight=ALPHA, reference=reference, behaviour=sampler, clip=clip, reduction="none"
    )
    a, ratio = result.advantages, (logprob - sampler).exp()
    expected = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a).sum(-1)
    exactly(result.loss, expected)
    upstream = torch.randn(9).double()
    exactly(flat((upstream * result.loss).sum(), policy), flat((upstream * expected).sum(), policy))
    cut = ((ratio > 1 + high) & (a > 0)) | ((ratio < 1 - low) & (a < 0))
    assert 0 < cut.double().mean() < 1
    exactly(result.clip_share.double(), cut.double().mean())


@pytest.mark.parametrize("level", ["sequence", "sequence_mean"])
def test_sequence_clip_is_ppos_minimum_of_one_ratio_a_response(problem, level) -> None:
    policy, reference, _ = problem
    sampler = logprobs([p + 0.5 * torch.randn_like(p) for p in policy]).detach()
    logprob = logprobs(policy)
    result = policy_gradient(
        logprob, REWARDS, WEIGHTS, kl_weight=ALPHA, reference=reference, behaviour=sampler, clip=0.2, ratio_level=level,
        reduction="none",
    )  # fmt: skip
    x = (logprob - sampler).sum(-1)
    ratio, a = (x if level == "sequence" else x / 2).exp(), result.sequence_returns
    expected = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    exactly(result.loss, expected)
    exactly(result.ratio, ratio.detach())
    upstream = torch.randn(9).double()
    exactly(flat((upstream * result.loss).sum(), policy), flat((upstream * expected).sum(), policy))


def test_a_clipped_ratio_that_overflows_gives_no_nan() -> None:
    logprob = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    behaviour = torch.tensor([[-300.0], [-1.0]])
    result = policy_gradient(logprob, torch.ones(2, 1), torch.ones(1), kl_weight=0.0, behaviour=behaviour, clip=0.2)
    result.loss.backward()
    assert result.loss.isfinite() and logprob.grad.tolist() == [[0.0], [-0.5]]


# ---------------------------------------------------------------- baselines


def test_leave_one_out_is_unbiased_and_the_group_mean_shrinks_the_gradient(problem) -> None:
    """Mean over all 81 pairs of responses of one prompt, as two independent draws give them."""
    policy, reference, _ = problem
    logprob = logprobs(policy)
    one, two = (i.reshape(-1) for i in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
    pairs = torch.stack([one, two], -1).reshape(-1)
    share = logprob.detach().sum(-1).exp()
    share = (share[one] * share[two]).repeat_interleave(2) / 2
    expected = -flat(objective(policy, reference), policy)
    for baseline, factor in (("leave_one_out", 1.0), ("group", 0.5)):
        result = policy_gradient(
            logprob[pairs], REWARDS[pairs], WEIGHTS, kl_weight=ALPHA, reference=reference[pairs], baseline=baseline,
            group=2, reduction="none",
        )  # fmt: skip
        exactly(flat((share * result.loss).sum(), policy), factor * expected)


def test_group_means_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 6.0, 5.0, torch.nan])
    group, valid = torch.tensor([7, 0, 7, 7, 0]), torch.tensor([True, True, True, True, False])
    loo = group_mean(values, group, leave_one_out=True, valid=valid)
    assert loo[:4].tolist() == [5.5, 0.0, 3.0, 3.5]
    assert group_mean(values, group, leave_one_out=False, valid=valid)[:4].tolist() == [4.0, 2.0, 4.0, 4.0]
    assert group_mean(torch.arange(6.0), 3, leave_one_out=True).tolist() == [1.5, 1.0, 0.5, 4.5, 4.0, 3.5]


def test_equal_returns_have_no_advantage_however_they_are_rounded() -> None:
    rewards = torch.full((6, 1), 0.1)
    for options in ({"baseline": "leave_one_out"}, {"baseline": "group", "standardize": True}):
        result = policy_gradient(torch.randn(6, 2), rewards, torch.ones(1), kl_weight=0.0, group=3, **options)
        assert (result.advantages == 0).all()


def test_standardized_advantages_are_grpos() -> None:
    rewards = torch.randn(8, 1)
    options = dict(kl_weight=0.0, baseline="group", group=4, standardize=True)
    result = policy_gradient(torch.randn(8, 3), rewards, torch.ones(1), **options)
    of = rewards.view(2, 4)
    expected = (of - of.mean(-1, keepdim=True)) / (of.std(-1, correction=0, keepdim=True) + 1e-6)
    torch.testing.assert_close(result.advantages, expected.reshape(8, 1).expand(8, 3))


# ---------------------------------------------------------------- weights, kl_weight, masks, figures


def test_every_response_has_its_own_weights_and_kl_weight(problem) -> None:
    policy, reference, _ = problem
    logprob = logprobs(policy)
    w, kl_weight = torch.rand(9, 2).double(), torch.rand(9).double()
    whole = policy_gradient(logprob, REWARDS, w, kl_weight=kl_weight, reference=reference, reduction="none")
    for i in range(9):
        one = slice(i, i + 1)
        alone = policy_gradient(
            logprob[one], REWARDS[one], w[i], kl_weight=float(kl_weight[i]), reference=reference[one], reduction="none"
        )
        exactly(whole.loss[one], alone.loss)
        x = (logprob - reference)[i].sum().detach()
        exactly(whole.sequence_returns[i], (1 - kl_weight[i]) * (w[i] @ REWARDS[i]) - kl_weight[i] * x)
        exactly(whole.kl[i], x)
        exactly(whole.reward[i], w[i] @ REWARDS[i])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"to_go": True},
        {"kl_in": "loss", "kl_estimator": "k3"},
        {"kl_in": "loss", "kl_level": "sequence"},
        {"clip": 0.2},
        {"clip": 0.2, "ratio_level": "sequence_mean"},
        {"baseline": "leave_one_out", "group": 2},
        {"baseline": "group", "group": 2, "standardize": True},
        {"kl_estimator": "exact"},
    ],
    ids=str,
)
def test_what_is_masked_is_not_read(options, bad) -> None:
    """Response 1 has one token fewer, response 3 has none and a reward that could not be computed."""
    options, (rows, size) = dict(options), (4, 3)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 0]]).bool()
    parts = {name: -torch.rand(rows, size) for name in ("logprob", "reference", "behaviour", "exact_kl")}
    rewards = torch.randn(rows, 2)
    results = []
    for fill in (-7.0, bad):
        filled = {name: part.masked_fill(~mask, fill).requires_grad_() for name, part in parts.items()}
        earned = rewards.clone()
        earned[3] = fill
        given = dict(options, reference=filled["reference"], mask=mask)
        if "clip" in options:
            given["behaviour"] = filled["behaviour"]
        if "kl_estimator" in options and options["kl_estimator"] == "exact":
            given["exact_kl"] = filled["exact_kl"]
        result = policy_gradient(
            filled["logprob"], earned, torch.tensor([0.4, 0.6]), kl_weight=0.3, reduction="none", **given
        )
        (result.loss * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        gradient = filled["logprob"].grad
        assert gradient[~mask].eq(0).all() and gradient[mask].isfinite().all()
        assert result.loss[3] == 0 and all(part.isfinite().all() for part in result)
        assert filled["reference"].grad is None and filled["behaviour"].grad is None
        results.append((result, gradient))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(results[0][1], results[1][1])


def test_sixteen_bit_inputs_are_computed_in_float32() -> None:
    logprob = (-torch.rand(4, 5)).bfloat16().requires_grad_()
    reference = (-torch.rand(4, 5)).bfloat16()
    result = policy_gradient(logprob, torch.randn(4, 2), WEIGHTS, kl_weight=0.1, reference=reference)
    assert result.loss.dtype == torch.float32
    expected = policy_gradient(logprob.float(), torch.zeros(4, 2), WEIGHTS, kl_weight=0.1, reference=reference.float())
    assert torch.equal(result.kl, expected.kl)


def test_reductions_divide_by_the_number_of_responses_only() -> None:
    logprob, rewards = -torch.rand(5, 4), torch.randn(5, 2)
    mask = torch.rand(5, 4) > 0.4
    options = dict(kl_weight=0.2, reference=-torch.rand(5, 4), mask=mask)
    none = policy_gradient(logprob, rewards, torch.tensor([0.5, 0.5]), reduction="none", **options).loss
    for reduction, expected in (("sum", none.sum()), ("mean", none.sum() / 5)):
        actual = policy_gradient(logprob, rewards, torch.tensor([0.5, 0.5]), reduction=reduction, **options).loss
        torch.testing.assert_close(actual, expected)


# ---------------------------------------------------------------- learned baseline


def test_value_loss_is_half_the_squared_error_and_its_optimum_the_mean_return() -> None:
    values, returns = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    loss = value_loss(values, returns)
    loss.backward()
    torch.testing.assert_close(loss, 0.5 * (values - returns).square().mean())
    torch.testing.assert_close(values.grad, ((values - returns) / 4).detach())
    assert returns.grad is None
    mask = torch.tensor([[True, False], [False, False]])
    tokens = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])
    assert value_loss(tokens, torch.zeros(2, 2), mask=mask, reduction="none").tolist() == [0.5, 0.0]


def test_value_head_learns_returns_that_depend_on_the_trade_off() -> None:
    head = ValueHead(6, 2, width=32)
    hidden = torch.randn(256, 6, requires_grad=True)
    w = torch.rand(256, 1)
    w, kl_weight = torch.cat([w, 1 - w], -1), torch.rand(256)
    returns = (1 - kl_weight) * (w * hidden.detach()[:, :2]).sum(-1)
    assert (head(hidden, w, kl_weight) == 0).all()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        loss = value_loss(head(hidden, w, kl_weight), returns)
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * 0.5 * returns.square().mean()
    assert hidden.grad is None
    tokens = torch.randn(3, 4, 6)
    each = torch.stack([head(tokens[:, t], w[:3], kl_weight[:3]) for t in range(4)], -1)
    torch.testing.assert_close(head(tokens, w[:3], kl_weight[:3]), each)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reference": None}, "reference is missing"),
        ({"reference": torch.zeros(4, 2)}, r"reference has shape \(4, 2\)"),
        ({"kl_weight": torch.zeros(3)}, r"kl_weight has shape \(3,\)"),
        ({"kl_weight": -1.0}, "must not be negative"),
        ({"kl_estimator": "exact"}, "belong together"),
        ({"exact_kl": torch.zeros(4, 3)}, "belong together"),
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4'"),
        ({"clip": 0.2}, "pass behaviour"),
        ({"clip": -0.2, "behaviour": torch.zeros(4, 3)}, "clip is -0.2"),
        ({"ratio_level": "sequence", "to_go": True, "behaviour": torch.zeros(4, 3)}, "leave out to_go"),
        ({"baseline": "leave_one_out"}, "needs group"),
        ({"baseline": "group", "group": 3}, "divides B = 4"),
        ({"baseline": torch.zeros(3)}, r"baseline has shape \(3,\)"),
        ({"standardize": True}, "baseline='group'"),
        ({"kl_form": "other"}, "kl_form is 'other'"),
        ({"rewards": torch.zeros(4)}, r"rewards is \(4,\)"),
        ({"weights": torch.ones(3)}, r"weights has shape \(3,\)"),
        ({"mask": torch.ones(4, 2, dtype=torch.bool)}, r"mask has shape \(4, 2\)"),
    ],
)
def test_errors_name_the_argument(options, message) -> None:
    given = dict(
        logprob=torch.zeros(4, 3),
        rewards=torch.zeros(4, 2),
        weights=torch.ones(2),
        kl_weight=0.5,
        reference=torch.zeros(4, 3),
    )
    given.update(options)
    with pytest.raises(ValueError, match=message):
        policy_gradient(given.pop("logprob"), given.pop("rewards"), given.pop("weights"), **given)
