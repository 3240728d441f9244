"""Control after training against closed forms: optima on the simplex, KL-regularised policies, convex solves."""

import itertools

import pytest
import torch

from mopl.steering import beta_conditioned, guide, log_mix, mix_experts, modpo_reward, realign, rescale, soup

F64 = torch.float64
LABELS = torch.softmax(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.5]], dtype=F64), -1)  # zbar_1, zbar_2
W = torch.tensor([0.25, 0.75], dtype=F64)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def centred(scores):
    return scores - scores.mean(-1, keepdim=True)


def listnet(delta, beta):
    """(m,) losses of the two label distributions at temperatures beta."""
    return -(LABELS * torch.log_softmax(beta[:, None] * delta, -1)).sum(-1)


def plackett_luce(delta, beta):
    """(m,) losses of one full ranking an objective, with a little of its reverse so that the optimum is finite."""
    total = []
    for j, order in enumerate(([0, 1, 2], [2, 0, 1])):
        for weight, ranking in ((0.8, order), (0.2, order[::-1])):
            u = beta[j] * delta[ranking]
            total.append(weight * sum(u[k:].logsumexp(0) - u[k] for k in range(3)))
    return torch.stack([total[0] + total[1], total[2] + total[3]])


def with_penalty(losses):
    def penalised(delta, beta):
        vector = losses(delta, beta)
        cosine = (W @ vector) / (W.norm() * vector.norm())
        return vector + 0.05 * cosine  # W sums to 1, so W @ adds the penalty once

    return penalised


def optimum(losses, beta):
    """Newton's method on the sum-zero scores: d with gradient 0 of W @ losses(d, beta)."""
    d = torch.zeros(3, dtype=F64)
    for _ in range(60):
        gradient = torch.autograd.functional.jacobian(lambda x: W @ losses(x, beta), d)
        hessian = torch.autograd.functional.hessian(lambda x: W @ losses(x, beta), d)
        step = torch.linalg.solve(hessian + torch.ones(3, 3, dtype=F64), gradient)
        d = centred(d - step / max(1.0, step.norm().item()))
    assert gradient.norm() < 1e-12 * max(1.0, beta.max().item())
    return d


# --- the linear transformation property ---------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [listnet, plackett_luce, with_penalty(listnet), with_penalty(plackett_luce)])
@pytest.mark.parametrize("beta", [[1.0, 1.0], [0.5, 2.0]])
def test_rescaling_the_optimum_at_beta_gives_the_optimum_at_c_beta(losses, beta):
    reference = torch.tensor([0.3, -2.0, 5.0], dtype=F64)
    beta = torch.tensor(beta, dtype=F64)
    trained = reference + optimum(losses, beta)
    for c in (0.25, 0.5, 2.0, 7.0):
        close(rescale(trained, reference, c), reference + optimum(losses, c * beta), atol=1e-8)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.5, [-0.605937, -0.845315, 1.451252]),
        (1.0, [-0.302969, -0.422657, 0.725626]),
        (2.0, [-0.151484, -0.211329, 0.362813]),
    ],
)
def test_common_temperature_optimum_of_the_arithmetic_mixture(beta, expected):
    reference = torch.tensor([1.0, 4.0, -2.0], dtype=F64)
    at_one = reference + centred(torch.log(W @ LABELS))
    rescaled = rescale(at_one, reference, beta)
    close(rescaled - reference, expected, atol=1e-6)
    close(listnet(rescaled - reference, torch.tensor([beta, beta])), [1.480909, 0.776619], atol=1e-6)
    close(optimum(listnet, torch.tensor([beta, beta], dtype=F64)), expected, atol=1e-6)


def test_unequal_temperature_optimum_and_its_third():
    reference, beta = torch.tensor([1.0, 4.0, -2.0], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    delta = torch.tensor([-0.429771, -0.157445, 0.587216], dtype=F64)
    close(optimum(listnet, beta), delta, atol=1e-6)
    close(listnet(delta, beta), [1.258173, 0.687310], atol=1e-6)
    close(rescale(reference + delta, reference, 3.0) - reference, optimum(listnet, 3 * beta), atol=1e-6)


def test_rescale_is_the_formula_for_one_c_and_for_one_c_a_list():
    s, s0, c = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64), torch.rand(4, dtype=F64) * 3 + 0.1
    expected = (1 - 1 / c[:, None]) * s0 + s / c[:, None]
    close(rescale(s, s0, c), expected)
    close(rescale(s, s0, c[:, None]), expected)
    close(rescale(s, s0, 2), 0.5 * s0 + 0.5 * s)
    close(rescale(rescale(s, s0, 0.7), s0, 1 / 0.7), s)


def test_c_one_returns_the_trained_scores_bit_by_bit_and_large_c_the_reference():
    s, s0 = torch.randn(100, 8) * 1e3, torch.randn(100, 8)
    assert torch.equal(rescale(s, s0, 1.0), s)
    torch.testing.assert_close(rescale(s, s0, 1e12), s0)


def test_extrapolation_keeps_the_digits_of_scores_that_are_close_to_the_reference():
    s0 = -500 - torch.rand(50, 8) * 100
    s = s0 + torch.randn(50, 8) * 0.1
    exact = rescale(s.double(), s0.double(), 0.01)
    assert (rescale(s, s0, 0.01).double() - exact).abs().max() < 1e-4
    assert (((1 - 1 / 0.01) * s0 + s / 0.01).double() - exact).abs().max() > 1e-3  # the formula as it is printed


def test_distance_from_the_base_falls_as_c_grows():
    s, s0 = torch.randn(20, 5, dtype=F64), torch.randn(20, 5, dtype=F64)
    divergences = []
    for c in (0.25, 0.5, 1.0, 2.0, 5.0, 50.0):
        log_p = rescale(s, s0, c, normalize=True)
        divergences.append((log_p.exp() * (log_p - torch.log_softmax(s0, -1))).sum(-1))
    assert all((a > b).all() for a, b in itertools.pairwise(divergences))


# --- temperature conditioning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (7, 3)])
def test_beta_conditioned_scores_depend_on_beta_only_through_its_direction(shape):
    net, s0, beta = torch.randn(7, 5, dtype=F64), torch.randn(7, 5, dtype=F64), torch.rand(shape, dtype=F64) * 4 + 0.1
    s = beta_conditioned(net, s0, beta)
    normalized = beta / beta.sum(-1, keepdim=True)
    close(beta[..., None] * (s - s0).unsqueeze(-2), normalized[..., None] * (net - s0).unsqueeze(-2))


def test_beta_conditioned_optimum_is_the_optimum():
    s0, beta = torch.tensor([0.5, -1.0, 2.0], dtype=F64), [1.5, 0.75]
    direction = torch.tensor(beta, dtype=F64) / sum(beta)
    net = s0 + optimum(listnet, direction)
    close(beta_conditioned(net, s0, beta) - s0, optimum(listnet, torch.tensor(beta, dtype=F64)), atol=1e-9)


# --- policies ----------------------------------------------------------------------------------------------------

POLICY_REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
REWARDS = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.6]], dtype=F64)


def kappa(alpha):
    return (1 - alpha) / alpha


def best_policy(weights, alpha):
    """The maximiser of (1 - alpha) E[w.R] - alpha KL to the reference."""
    return torch.softmax(POLICY_REFERENCE.log() + kappa(alpha) * torch.as_tensor(weights, dtype=F64) @ REWARDS, -1)


@pytest.mark.parametrize(
    ("weights", "policy", "divergence"),
    [
        ((1.0, 0.0), (0.915962, 0.010066, 0.073972), 0.446749),
        ((0.5, 0.5), (0.455222, 0.273133, 0.271645), 0.014835),
        ((0.25, 0.75), (0.141733, 0.628364, 0.229902), 0.317930),
    ],
)
def test_mixture_of_exact_experts_is_the_optimum_of_the_mixed_reward(weights, policy, divergence):
    experts = [best_policy(vertex, 0.2).log() for vertex in ((1.0, 0.0), (0.0, 1.0))]
    mixture = mix_experts(experts, weights)
    close(mixture, best_policy(weights, 0.2).log())
    close(mixture.exp(), policy, atol=1e-6)
    assert (mixture.exp() * (mixture - POLICY_REFERENCE.log())).sum().item() == pytest.approx(divergence, abs=1e-6)


def test_mixture_at_a_small_kl_weight():
    experts = [best_policy(vertex, 0.01).log() for vertex in ((1.0, 0.0), (0.0, 1.0))]
    close(mix_experts(experts, [0.5, 0.5]).exp(), (0.000125, 0.000075, 0.999799), atol=1e-6)


def test_mixtures_take_one_weight_vector_a_list_and_unnormalised_logits():
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]], dtype=F64)
    experts = [best_policy(v, 0.2).log().expand(3, 3) + torch.randn(3, 1, dtype=F64) for v in ((1.0, 0.0), (0.0, 1.0))]
    close(mix_experts(experts, weights), torch.stack([best_policy(w, 0.2) for w in weights]).log())


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.9])
def test_realignment_moves_the_optimum_from_one_kl_weight_to_another(alpha):
    trained = best_policy((0.25, 0.75), 0.2).log()
    strength = kappa(alpha) / kappa(0.2)
    moved = realign(trained, POLICY_REFERENCE.log(), strength)
    close(moved, best_policy((0.25, 0.75), alpha).log())
    close(rescale(trained, POLICY_REFERENCE.log(), 1 / strength, normalize=True), moved)


def test_realignment_of_strength_zero_is_the_reference_and_one_the_model():
    s, s0 = torch.randn(4, 5), torch.randn(4, 5)
    torch.testing.assert_close(realign(s, s0, 0.0), torch.log_softmax(s0, -1))
    torch.testing.assert_close(realign(s, s0, torch.ones(4)), torch.log_softmax(s, -1))


def test_mixing_experts_and_realigning_are_one_mixture():
    experts, strength, s0 = [torch.randn(4, 5, dtype=F64) for _ in range(2)], 1.7, torch.randn(4, 5, dtype=F64)
    in_steps = realign(mix_experts(experts, W), s0, strength)
    close(log_mix(experts, [strength * w for w in W.tolist()], reference=s0, normalize=True), in_steps)


def test_collapsed_experts_cannot_be_mixed_into_what_both_would_like():
    rewards = torch.tensor([[1.0, 0.0, 0.9], [0.0, 1.0, 0.9]], dtype=F64)
    smooth = 1e-3
    experts = torch.tensor([[1 - smooth, smooth / 2, smooth / 2], [smooth / 2, 1 - smooth, smooth / 2]], dtype=F64)
    value = (mix_experts(list(experts.log()), [0.5, 0.5]).exp() * rewards.mean(0)).sum().item()
    assert value == pytest.approx(0.504, abs=5e-4) and rewards.mean(0).max().item() == 0.9


def test_mixing_token_by_token_is_not_mixing_sequences():
    first, first0 = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=F64)
    second, second0 = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.1, 0.9], [0.5, 0.5]]], dtype=F64)
    sequences, sequences0 = ((a[:, None] * b).reshape(-1).log() for a, b in ((first, second), (first0, second0)))
    exact = realign(sequences, sequences0, 3.0).exp()
    tokens = [realign(a.log(), b.log(), 3.0).exp() for a, b in ((first, first0), (second, second0))]
    by_token = (tokens[0][:, None] * tokens[1]).reshape(-1)
    assert (exact - by_token).abs().sum() / 2 > 1e-3
    one_step = realign(first.log(), first0.log(), 3.0)
    close(one_step.exp(), (first**3 / first0**2) / (first**3 / first0**2).sum())


# --- MO-DPO ------------------------------------------------------------------------------------------------------


# --- a small model guides a large one -----------------------------------------------------------------------------


@pytest.mark.parametrize("w", [[1.0, 0.0], [0.3, 0.7], [0.5, 0.5]])
@pytest.mark.parametrize("c", [0.4, 1.0, 3.0])
def test_guided_by_an_optimum_the_large_model_is_at_its_own_for_the_same_reward(w, c):
    """All responses of two tokens out of four: p is the optimum of w R at β for p0, the result that at c β for p_L."""
    generator, beta = torch.Generator().manual_seed(3), 0.8
    small, large = torch.randn(2, 16, dtype=F64, generator=generator).log_softmax(-1).unbind()
    reward = torch.tensor(w, dtype=F64) @ (2 * torch.randn(2, 16, dtype=F64, generator=generator))
    tuned = (small + reward / beta).log_softmax(-1)
    found = guide(tuned, small, large, 1 / c)
    close(found, (large + reward / (c * beta)).log_softmax(-1))

    def value(log_q):
        return (log_q.exp() * (reward - c * beta * (log_q - large))).sum(-1)

    close(value(found), c * beta * (large + reward / (c * beta)).logsumexp(-1))
    others = found + 0.3 * torch.randn(500, 16, dtype=F64, generator=generator)
    assert bool((value(others.log_softmax(-1)) < value(found)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_guided_by_itself_the_reference_is_rescaled_to_the_bit(dtype):
    generator = torch.Generator().manual_seed(4)
    scores, reference = (40 * torch.randn(2, 5, 33, dtype=F64, generator=generator)).to(dtype).unbind()
    scores[0, 3] = reference[1, 4] = reference[2, 5] = scores[2, 5] = -torch.inf
    c = torch.tensor([0.3, 1.0, 1.7, 3.0, 1e6], dtype=F64)
    for normalize in (True, False):
        given = guide(scores, reference, reference, 1 / c, normalize=normalize)
        assert torch.equal(given, rescale(scores, reference, c, normalize=normalize))


def test_what_one_of_the_three_models_has_not_is_impossible():
    log = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64))
    parts = [log.clone(), log.flip(0), log.roll(1)]
    for i, part in enumerate(parts):
        part[i] = -torch.inf
    found = guide(*parts, 2.0)
    assert found.tolist() == [-torch.inf, -torch.inf, -torch.inf, 0.0]
    alone = guide(*parts, 0.0).exp()  # the tuned model has no say
    close(alone, torch.tensor([parts[2][0].exp(), 0, 0, parts[2][3].exp()], dtype=F64) / parts[2][[0, 3]].exp().sum())


@pytest.mark.parametrize("anchor", [0, 1])
def test_modpo_with_any_anchor_has_its_optimum_at_the_geometric_mixture(anchor):
    beta, s0 = 0.7, torch.randn(2, 3, dtype=F64)
    experts = [s0 + LABELS[j].log() / beta + torch.randn(2, 1, dtype=F64) for j in range(2)]
    weights = torch.tensor([[0.25, 0.75], [0.6, 0.4]], dtype=F64)
    scores = s0 + weights @ LABELS.log() / beta
    reward = modpo_reward(scores, s0, experts, weights, anchor)
    close(torch.softmax(beta * reward, -1), LABELS[anchor].expand(2, 3))


def test_modpo_reward_is_its_formula_and_does_not_read_the_anchors_expert():
    s, s0, e0, e2 = torch.randn(4, 5, 6, dtype=F64)
    w = [0.2, 0.5, 0.3]
    reward = modpo_reward(s, s0, [e0, None, e2], w, anchor=1)
    close(reward, (s - s0 - 0.2 * (e0 - s0) - 0.3 * (e2 - s0)) / 0.5)
    close(modpo_reward(s, s0, [e0, torch.full_like(s, torch.nan), e2], w, anchor=1), reward)


def test_modpo_at_a_vertex_is_the_loss_of_that_objective():
    s, s0, expert = torch.randn(3, 4, 5)
    assert torch.equal(modpo_reward(s, s0, [None, expert], [1.0, 0.0]), s - s0)


def test_modpo_names_what_is_wrong():
    s = torch.randn(4, 5)
    with pytest.raises(ValueError, match="choose an anchor whose weight is not 0"):
        modpo_reward(s, s, [None, s], [0.0, 1.0])
    with pytest.raises(ValueError, match=r"experts\[1\] is None"):
        modpo_reward(s, s, [None, None], [0.5, 0.5])
    with pytest.raises(ValueError, match="anchor is 2 but there are 2"):
        modpo_reward(s, s, [s, s], [0.5, 0.5], anchor=2)
    with pytest.raises(ValueError, match="does not sum to 1"):
        modpo_reward(s, s, [s, s], [0.5, 0.6])


# --- log_mix -----------------------------------------------------------------------------------------------------


def test_log_mix_is_differentiable_in_everything():
    scores = [torch.randn(3, 4, dtype=F64, requires_grad=True) for _ in range(2)]
    reference = torch.randn(3, 4, dtype=F64, requires_grad=True)
    coefficients = [torch.rand(3, dtype=F64, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)

    def mixed(a, b, r, c, d):
        return log_mix([a, b], [c, d], reference=r, normalize=True, mask=mask).masked_fill(~mask, 0.0)

    assert torch.autograd.gradcheck(mixed, (*scores, reference, *coefficients))
    assert torch.autograd.gradcheck(lambda a, r, c: log_mix(a, c, reference=r), (scores[0], reference, coefficients[0]))
    assert torch.autograd.gradcheck(lambda a, b, c, d: log_mix([a, b], [c, d]), (*scores, *coefficients))


def test_what_does_not_exist_touches_nothing_even_if_it_is_nan():
    mask = torch.tensor([[True, True, False], [False, False, False]])
    s, s0 = torch.randn(2, 3), torch.randn(2, 3)
    s[~mask], s0[~mask] = torch.nan, torch.inf
    s.requires_grad_()
    mixed = rescale(s, s0, 0.5, normalize=True, mask=mask)
    assert mixed[mask].isfinite().all() and (mixed[~mask] == -torch.inf).all()
    assert mixed[mask].exp().sum().item() == pytest.approx(1)
    mixed[mask].square().sum().backward()
    assert s.grad.isfinite().all() and (s.grad[~mask] == 0).all() and (s.grad[mask] != 0).any()


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_what_is_impossible_stays_impossible_without_nan(strength):
    s, s0 = torch.randn(1, 4), torch.randn(1, 4)
    s[0, 0] = s0[0, 0] = s[0, 1] = s0[0, 2] = -torch.inf
    s.requires_grad_()
    mixed = realign(s, s0, strength)
    assert (mixed == -torch.inf).tolist() == [[True, True, True, False]] and mixed[0, 3].item() == pytest.approx(0)
    mixed[0, 3].backward()
    assert s.grad.isfinite().all()


def test_a_score_of_coefficient_zero_has_no_say():
    s, other = torch.randn(2, 3), torch.randn(2, 3)
    other[0, 0] = -torch.inf
    assert torch.equal(log_mix([s, other], [1.0, 0.0]), s)
    per_list = log_mix([s, other], [torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5])])
    assert torch.equal(per_list[0], s[0])
    torch.testing.assert_close(per_list[1], (s[1] + other[1]) / 2)
    torch.testing.assert_close(realign(other, s, 0.0), torch.log_softmax(s, -1))


def test_mixing_is_done_in_float32_at_least():
    s, s0 = torch.randn(2, 3).bfloat16(), torch.randn(2, 3).bfloat16()
    assert torch.equal(rescale(s, s0, 0.7), rescale(s.float(), s0.float(), 0.7))
    assert rescale(s, s0, 0.7).dtype == torch.float32 and rescale(s, s0.double(), 0.7).dtype == F64
    c = torch.tensor([0.7, 1.3])
    close(rescale(s.double(), s0.double(), c), rescale(s.double(), s0.double(), c.double()))


def test_inputs_are_not_changed():
    s, s0 = torch.randn(2, 3), torch.randn(2, 3)
    s[0, 0] = -torch.inf
    before = s.clone(), s0.clone()
    log_mix([s, s], [0.5, 0.5], reference=s0, normalize=True, mask=torch.tensor([[True, True, False]] * 2))
    assert torch.equal(s, before[0]) and torch.equal(s0, before[1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: rescale(s, s, 0.0), ValueError, "c is 0.0 but must be positive"),
        (lambda s: rescale(s, s, -1), ValueError, "c is -1 but must be positive"),
        (lambda s: rescale(s, s, torch.tensor([1.0, float("nan")])), ValueError, "c is .*must be positive"),
        (
            lambda s: rescale(s, s, torch.ones(3)),
            ValueError,
            r"shape \(3,\) but the scores are \(2, 3\).*one value a list",
        ),
        (lambda s: rescale(s, s[:1], 2.0), ValueError, r"reference has shape \(1, 3\) but must be .*\(2, 3\)"),
        (lambda s: rescale(s.long(), s, 2.0), TypeError, "scores must be a floating-point"),
        (lambda s: rescale(s, s.tolist(), 2.0), TypeError, "reference must be .* got list"),
        (lambda s: beta_conditioned(s, s, 1.0), ValueError, "one for each objective"),
        (lambda s: beta_conditioned(s, s, [1.0, 0.0]), ValueError, "beta is .* must be positive"),
        (lambda s: mix_experts([s, s], [0.5, 0.6]), ValueError, "does not sum to 1"),
        (lambda s: mix_experts([s, s], [1.0]), ValueError, r"weights has shape \(1,\) but must be \(2,\)"),
        (lambda s: log_mix([s, s], [1.0]), ValueError, "scores has 2 tensors and coefficients 1"),
        (lambda s: log_mix([s, s[0]], [1.0, 1.0]), ValueError, r"scores\[1\] has shape \(3,\)"),
        (lambda s: log_mix(s, 1.0, mask=s), ValueError, "mask is torch.float32"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3))


# --- soups -------------------------------------------------------------------------------------------------------


def networks(count=3, dtype=torch.float32):
    models = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).to(dtype) for _ in range(count)]
    return [model.state_dict() for model in models]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_soup_is_the_exact_average_rounded_once(dtype):
    states, weights = networks(dtype=dtype), [0.2, 0.3, 0.5]
    mixed = soup(states, weights)
    for key, tensor in mixed.items():
        assert tensor.dtype == states[0][key].dtype
        if tensor.is_floating_point():
            exact = sum(w * s[key].double() for w, s in zip(weights, states, strict=True))
            assert torch.equal(tensor, exact.to(dtype)) or dtype == F64
            torch.testing.assert_close(tensor, exact.to(dtype), rtol=1e-15, atol=1e-15)


def test_soup_at_a_vertex_is_that_model_exactly_and_a_copy():
    states = networks()
    states[0]["0.weight"].fill_(torch.nan)
    mixed = soup(states, torch.tensor([0.0, 1.0, 0.0]))
    assert all(torch.equal(mixed[key], states[1][key]) for key in mixed)
    mixed["0.bias"].zero_()
    assert states[1]["0.bias"].abs().sum() > 0


def test_soup_of_a_log_linear_policy_is_exact_and_of_a_product_is_not():
    parameters = [{"theta": best_policy(vertex, 0.2).log()} for vertex in ((1.0, 0.0), (0.0, 1.0))]
    close(torch.softmax(soup(parameters, [0.25, 0.75])["theta"], -1), best_policy((0.25, 0.75), 0.2))
    reward = REWARDS[0]
    product = [{"a": torch.ones(1, dtype=F64), "b": reward}, {"a": -torch.ones(1, dtype=F64), "b": -reward}]
    mixed = soup(product, [0.5, 0.5])  # both experts have the logits `reward`
    assert (mixed["a"] * mixed["b"]).abs().max() == 0


def test_soup_names_the_key_that_differs():
    first, second = networks(2)
    with pytest.raises(ValueError, match=r"state_dicts\[1\] and state_dicts\[0\] do not both hold '0.bias'"):
        soup([first, {k: v for k, v in second.items() if k != "0.bias"}], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"'0.weight' is torch.float32 \(3, 5\) in state_dicts\[1\].*\(3, 4\)"):
        soup([first, second | {"0.weight": torch.ones(3, 5)}], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"'0.weight' is torch.float64"):
        soup([first, second | {"0.weight": torch.ones(3, 4, dtype=F64)}], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"'1.num_batches_tracked' is torch.int64 and differs"):
        soup([first, second | {"1.num_batches_tracked": torch.tensor(5)}], [0.5, 0.5])
    with pytest.raises(ValueError, match="does not sum to 1"):
        soup([first, second], [0.5, 0.4])
    with pytest.raises(ValueError, match="pass one state dict for each objective"):
        soup([], [])
    with pytest.raises(ValueError, match="a soup is one model"):
        soup([first, second], torch.tensor([[0.5, 0.5]]))
