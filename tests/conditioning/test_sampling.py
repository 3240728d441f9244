"""Draws of trade-offs: their distribution, their independence, exact repeatability; the concatenation."""

import itertools

import numpy as np
import pytest
import torch

from mopl.conditioning import ConcatCondition, check_weights, sample_betas, sample_weights, sampling

N = 40_000


def draw(m=3, count=N, concentration=1.0, seed=0, step=0, rank=0):
    return sample_weights(m, count, concentration, seed=seed, step=step, rank=rank, dtype=torch.float64)


@pytest.mark.parametrize("concentration", [1.0, 0.2, 5.0, [0.3, 1.0, 2.5], 0.01])
def test_weights_have_the_moments_of_the_dirichlet_distribution(concentration):
    w = draw(concentration=concentration)
    a = torch.as_tensor(concentration, dtype=torch.float64).expand(3)
    total = a.sum()
    mean = a / total
    covariance = (torch.diag(mean) - mean[:, None] * mean) / (total + 1)
    error = 5 * (covariance.diagonal() / N).sqrt()  # 5 standard errors
    assert ((w.mean(0) - mean).abs() < error).all()
    torch.testing.assert_close(w.T.cov(), covariance, rtol=0.05, atol=0.005)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-14)


def test_weights_of_two_objectives_at_concentration_one_are_uniform():
    stats = pytest.importorskip("scipy.stats")
    assert stats.kstest(draw(2)[:, 0].numpy(), "uniform").pvalue > 1e-3


def test_one_objective_has_weight_one():
    assert torch.equal(draw(1, 5), torch.ones(5, 1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("concentration", [1e-3, 0.02, 0.3, 1.0, 50.0, 1e3, [1e-3, 1e3, 1.0], [1e-3, 1e-3, 0.2]])
def test_every_draw_is_on_the_simplex_in_every_dtype(concentration, dtype):
    w = sample_weights(3, 3000, concentration, seed=4, step=0, dtype=dtype)
    check_weights(w)
    assert ((w.double().sum(1) - 1).abs() <= 3 * torch.finfo(dtype).eps).all()
    many = sample_weights(
        3000, 20, 1e-3 if isinstance(concentration, list) else concentration, seed=4, step=0, dtype=dtype
    )
    assert ((many.double().sum(1) - 1).abs() <= 1e-2).all()


@pytest.mark.parametrize("concentration", [1e-2, 1e-8, 1e-300, 5e-324, [1e-300, 1.0, 0.5], [1e-5, 1e-3, 0.09]])
def test_a_tiny_concentration_gives_vertices_and_never_nan(concentration):
    w = draw(concentration=concentration, count=5000)
    assert w.isfinite().all() and ((w.sum(1) - 1).abs() < 1e-12).all()
    if isinstance(concentration, float) and concentration >= 1e-300:  # the smallest number has no digits for a third
        assert (w.max(1).values > 0.999).double().mean() > (0.85 if concentration > 1e-3 else 0.9999)
        assert (w.mean(0) - 1 / 3).abs().max() < 0.05
    assert sample_weights(3, 50, concentration, seed=0, step=0).isfinite().all()  # float32


def test_draws_depend_on_seed_step_and_rank_and_on_nothing_else():
    first = draw(count=64, seed=5, step=7, rank=2)
    torch.manual_seed(123)
    np.random.seed(9)
    state = torch.get_rng_state()
    assert torch.equal(draw(count=64, seed=5, step=7, rank=2), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in ({"seed": 6}, {"step": 8}, {"rank": 3}):
        assert not torch.equal(draw(count=64, **({"seed": 5, "step": 7, "rank": 2} | other)), first)


def test_a_resumed_run_draws_what_the_interrupted_one_would_have():
    def run(steps):
        return [
            (sample_weights(4, 8, 0.7, seed=1, step=t), sample_betas(4, 8, 0.5, 2.0, seed=1, step=t)) for t in steps
        ]

    whole, resumed = run(range(6)), run(range(3, 6))
    for (w, t), (w_again, t_again) in zip(whole[3:], resumed, strict=True):
        assert torch.equal(w, w_again) and all(map(torch.equal, t, t_again))


@pytest.mark.parametrize("concentration", [1.0, 0.05])
def test_the_first_rows_do_not_depend_on_the_count(concentration):
    assert torch.equal(draw(count=100, concentration=concentration)[:9], draw(count=9, concentration=concentration))
    betas = [sample_betas(3, n, 0.5, 2.0, seed=0, step=0).beta for n in (9, 100)]
    assert torch.equal(betas[1][:9], betas[0])


def correlation(a, b):
    return torch.stack([a.reshape(-1), b.reshape(-1)]).corrcoef()[0, 1].abs().item()


def test_streams_of_neighbouring_seeds_steps_and_ranks_and_of_betas_are_independent():
    streams = [draw(2, seed=s, step=t, rank=r)[:, 0] for s, t, r in itertools.product((0, 1), repeat=3)]
    streams += [draw(2, seed=2**64 - 1)[:, 0], draw(2, step=2**64 - 1)[:, 0], draw(2, rank=2**64 - 1)[:, 0]]
    streams += [sample_betas(2, N, 1.0, 2.0, seed=s, step=0, dtype=torch.float64)[0][:, 0] for s in (0, 1)]
    for a, b in itertools.combinations(streams, 2):
        assert correlation(a, b) < 5 / N**0.5
        assert correlation(a[1:], b[:-1]) < 5 / N**0.5 and correlation(a[:-1], b[1:]) < 5 / N**0.5


def test_no_two_streams_share_a_number():
    # The generators are private, but overlapping streams would hardly show in the draws that are made from them.
    streams = itertools.product((0, 1, 2), (0, 1, 2), (0, 1, 2), (sampling._WEIGHTS, sampling._BETAS))
    raw = [sampling._generator(*which).integers(0, 2**64, size=256, dtype=np.uint64) for which in streams]
    assert len(np.unique(np.concatenate(raw))) == 3 * 3 * 3 * 2 * 256


def test_one_draw_a_step_is_as_random_as_one_draw_a_list():
    over_steps = torch.cat([draw(2, 1, step=t) for t in range(5000)])[:, 0]
    assert abs(over_steps.mean().item() - 0.5) < 5 * (1 / 12 / 5000) ** 0.5
    assert over_steps.var().item() == pytest.approx(1 / 12, rel=0.1)
    assert correlation(over_steps[1:], over_steps[:-1]) < 5 / 5000**0.5


def test_betas_are_uniform_in_their_box_and_normalised():
    low, high = torch.tensor([0.67, 0.1], dtype=torch.float64), [1.5, 0.1]
    beta, normalized = sample_betas(2, N, low, high, seed=0, step=0, dtype=torch.float64)
    assert (beta[:, 0] >= 0.67).all() and (beta[:, 0] <= 1.5).all() and beta[:, 1].unique().numel() == 1
    assert abs(beta[:, 0].mean().item() - 1.085) < 5 * 0.83 / (12 * N) ** 0.5
    torch.testing.assert_close(normalized, beta / beta.sum(1, keepdim=True))
    check_weights(normalized)


def test_default_dtype_is_float32_on_the_simplex():
    w = sample_weights(6, 1000, 0.1, seed=0, step=0)
    assert w.dtype == torch.float32 and w.shape == (1000, 6)
    assert torch.equal(check_weights(w), w)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concentration": 0.0}, "concentration is 0.0 but must be positive"),
        ({"concentration": [1.0, -1.0, 1.0]}, "concentration is .* must be positive"),
        ({"concentration": float("nan")}, "concentration is nan"),
        ({"concentration": [1.0, 1.0]}, r"concentration has shape \(2,\) but there are 3 objectives"),
        ({"m": 0}, "objectives is 0"),
        ({"seed": -1}, "seed is -1 but must be an integer"),
        ({"step": 1.5}, "step is 1.5"),
        ({"rank": 2**64}, "rank is 18446744073709551616"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        draw(**change)


def test_bad_boxes_are_named():
    with pytest.raises(ValueError, match="pass high >= low"):
        sample_betas(2, 1, 1.0, [2.0, 0.5], seed=0, step=0)
    with pytest.raises(ValueError, match="must be positive"):
        sample_betas(2, 1, 0.0, 1.0, seed=0, step=0)


def test_a_box_that_the_dtype_cannot_hold_is_refused():
    for low, high in ((1e-9, 1.0), (1.0, 1e6)):
        with pytest.raises(ValueError, match="float16 makes 0 or infinity; pass another dtype"):
            sample_betas(2, 3, low, high, seed=0, step=0, dtype=torch.float16)
        assert (sample_betas(2, 3, low, high, seed=0, step=0).beta > 0).all()


def test_weights_on_the_simplex_pass_and_numbers_become_float64():
    given = torch.tensor([[0.25, 0.75], [0.0, 1.0]], dtype=torch.bfloat16)
    assert check_weights(given) is given
    assert check_weights([0.1, 0.9]).dtype == torch.float64 and check_weights([0, 1], 2).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.6], r"weights = \(0.5, 0.6\) must lie on the simplex but does not sum to 1; divide it by its sum"),
        ([[0.5, 0.5], [1.5, -0.5]], r"weights\[1\] = \(1.5, -0.5\).*negative entry; set it to 0"),
        ([[0.5, float("nan")]], r"weights\[0\].*not finite"),
        ([0.3, 0.3, 0.4], r"weights has shape \(3,\) but must be \(2,\) or \(..., 2\)"),
        (0.5, r"weights has shape \(\)"),
    ],
)
def test_weights_off_the_simplex_get_the_remedy(weights, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weights, 2)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (4, 3)])
def test_concatenation_appends_the_weights_to_every_item(shape):
    features, weights = torch.rand(4, 5, 7), torch.rand(shape)
    out = ConcatCondition(3)(features, weights)
    assert out.shape == (4, 5, 10) and torch.equal(out[..., :7], features)
    assert torch.equal(out[..., 7:], weights.expand(4, 3)[:, None].expand(4, 5, 3))


def test_concatenation_knows_only_the_direction_of_beta():
    condition, features = ConcatCondition(2, takes_beta=True), torch.rand(3, 4, 5)
    weights, beta = torch.rand(3, 2), torch.rand(3, 2) + 0.5
    out = condition(features, weights, beta)
    assert out.shape == (3, 4, 5 + condition.extra_features) and condition.extra_features == 4
    torch.testing.assert_close(out[..., 7:], (beta / beta.sum(1, keepdim=True))[:, None].expand(3, 4, 2))
    torch.testing.assert_close(condition(features, weights, 4.0 * beta), out)
    torch.testing.assert_close(condition(features, weights, beta / beta.sum(1, keepdim=True)), out)


def test_concatenation_is_differentiable_has_no_parameters_and_keeps_the_dtype():
    condition = ConcatCondition(2, takes_beta=True)
    inputs = [torch.rand(2, 3, 4), torch.rand(2, 2), torch.rand(2, 2) + 0.5]
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(condition, inputs)
    assert not list(condition.parameters()) and not condition.state_dict()
    assert condition(inputs[0].bfloat16(), *inputs[1:]).dtype == torch.bfloat16


def test_a_first_layer_grows_by_m_times_its_width():
    def parameters(features):
        return sum(p.numel() for p in torch.nn.Linear(features, 64).parameters())

    assert parameters(131 + ConcatCondition(5).extra_features) - parameters(131) == 320


def test_concatenation_names_bad_shapes():
    features = torch.rand(4, 5, 7)
    with pytest.raises(ValueError, match=r"features has shape \(5, 7\)"):
        ConcatCondition(2)(features[0], torch.rand(2))
    with pytest.raises(ValueError, match=r"weights has shape \(3, 2\) but there are 4 lists and 2 objectives"):
        ConcatCondition(2)(features, torch.rand(3, 2))
    with pytest.raises(ValueError, match=r"beta has shape \(3,\)"):
        ConcatCondition(2, takes_beta=True)(features, torch.rand(2), torch.rand(3))
    with pytest.raises(ValueError, match="beta is missing"):
        ConcatCondition(2, takes_beta=True)(features, torch.rand(2))
    with pytest.raises(ValueError, match="make it with takes_beta=True"):
        ConcatCondition(2)(features, torch.rand(2), torch.rand(2))
    with pytest.raises(ValueError, match="objectives is 0"):
        ConcatCondition(0)


@pytest.mark.parametrize("wrong", [{"helpful": 0.5, "harmless": 0.5}, None, [[0.5, 0.5], [1.0]], "0.5"])
def test_what_is_no_vector_of_numbers_is_named(wrong):
    with pytest.raises(ValueError, match=r"mine is .*; pass \(m,\) or \(..., m\) numbers, in the order of the objec"):
        check_weights(wrong, name="mine")
