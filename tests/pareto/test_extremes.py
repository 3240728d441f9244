"""Figures of points of any size: the right value, or an error that says so; blocks of rows change no digit."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mopl import pareto, steering
from mopl.pareto import _exact, bootstrap_interval, bootstrap_means

pytest.importorskip("moocore")

BIG, SMALL = 1e200, 1e-200
RANDOM = np.random.default_rng(0).random((40, 3))
WEIGHTS = torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(3), 40))


def figures(points, **options):
    return {
        "hypervolume": pareto.hypervolume(points, [0.0] * 3, maximise=True),
        "epsilon": pareto.epsilon_additive(points[:20], points[20:], maximise=True),
        "igd": pareto.igd_plus(points[:20], points[20:], maximise=True),
        "gd": pareto.gd_plus(points[:20], points[20:], maximise=True),
        "spacing": pareto.spacing(points),
        "max_gap": pareto.max_gap(points),
        **{f"steering {k}": v for k, v in pareto.steerability(WEIGHTS, points, maximise=True, **options).items()},
    }


@pytest.mark.parametrize("scale", [2.0**300, 2.0**-300, 2.0**-340, 2.0**340])
def test_figures_of_points_on_another_scale_have_the_same_digits(scale):
    plain, other = figures(RANDOM), figures(RANDOM * scale)
    for name, value in plain.items():
        if name in ("steering kendall_tau", "steering spearman", "steering nondominated_fraction"):
            assert other[name] == value
        else:
            power = 3 if name == "hypervolume" else 1
            assert math.isclose(other[name] / scale ** (power / 2) / scale ** (power / 2), value, rel_tol=1e-12), name


@pytest.mark.parametrize("size", [BIG, SMALL, 1e308, 5e-324])
def test_the_widest_gap_of_two_points(size):
    assert pareto.max_gap([[0.0, 0.0], [size, 0.0]]) == size
    assert pareto.max_gap([[0.0, size], [0.0, size], [0.0, 0.0]]) == size
    assert pareto.max_gap([[1.0, 0.0], [1.0, size]]) == size
    assert pareto.spacing([[0.0], [size], [2 * size if size < 1e308 else 0.0]]) == pytest.approx(
        0.0 if size < 1e308 else size / math.sqrt(3)
    )


def test_diagonal_gaps_and_distances_do_not_overflow():
    assert pareto.max_gap([[0.0, 0.0], [3 * BIG, 4 * BIG]]) == pytest.approx(5 * BIG, rel=1e-15)
    assert pareto.max_gap([[0.0, 0.0], [3 * SMALL, 4 * SMALL]]) == pytest.approx(5 * SMALL, rel=1e-15)
    assert pareto.igd_plus([[0.0, 0.0]], [[3 * BIG, 4 * BIG]], maximise=True) == pytest.approx(5 * BIG, rel=1e-15)
    assert pareto.gd_plus([[0.0, 0.0]], [[3 * SMALL, 4 * SMALL]], maximise=True) == pytest.approx(5 * SMALL, rel=1e-15)


@pytest.mark.parametrize(
    "measure", [pareto.max_gap, lambda p: pareto.igd_plus(p[:1], p[1:], maximise=True),
                lambda p: pareto.epsilon_additive(p[:1], p[1:], maximise=True),
                lambda p: pareto.hypervolume(p[1:], p[0], maximise=True)],
)  # fmt: skip
def test_what_float64_cannot_hold_is_said(measure):
    with pytest.raises(ValueError, match="beyond the largest float64"):
        measure([[-1.5e308, -1.5e308], [1.5e308, 1.5e308]])


def test_the_hypervolume_survives_products_that_leave_float64():
    # In three objectives the product of two already overflows, or is 0.
    assert pareto.hypervolume([[BIG, BIG, 1e-300]], [0.0] * 3, maximise=True) == pytest.approx(1e100, rel=1e-14)
    assert pareto.hypervolume([[SMALL, SMALL, 1e300]], [0.0] * 3, maximise=True) == pytest.approx(1e-100, rel=1e-14)
    assert pareto.hypervolume([[-BIG, BIG]], [0.0, 0.0], maximise=True) == 0.0
    with pytest.raises(ValueError, match="beyond the largest float64"):
        pareto.hypervolume([[BIG, BIG]], [0.0, 0.0], maximise=True)
    with pytest.raises(ValueError, match="below the smallest float64"):
        pareto.hypervolume([[SMALL, SMALL]], [0.0, 0.0], maximise=True)


@pytest.mark.parametrize("points", [[[1.0, 2.0]], [[1.0, 2.0]] * 3, np.ones((3, 2), np.float32), torch.zeros(4, 2)])
def test_one_point_and_equal_points(points):
    n = len(points)
    assert pareto.max_gap(points) == pareto.spacing(points) == 0.0
    assert pareto.non_dominated(points, maximise=True).all()
    found = pareto.steerability(torch.full((n, 2), 0.5), points, maximise=True, reference_point=[-1.0, -1.0])
    assert found["steering_regret"] == 0.0 and found["spearman"] == found["kendall_tau"] == [0.0, 0.0]
    assert found["hypervolume"] == float((points[0][0] + 1) * (points[0][1] + 1))
    assert pareto.igd_plus(points, points, maximise=True) == pareto.gd_plus(points, points, maximise=True) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "measure",
    [pareto.max_gap, pareto.spacing, lambda p: pareto.non_dominated(p, maximise=True),
     lambda p: pareto.hypervolume(p, [0, 0], maximise=True), lambda p: pareto.igd_plus(p, [[0, 0]], maximise=True),
     lambda p: pareto.gd_plus([[0, 0]], p, maximise=True), lambda p: pareto.attainment([p], maximise=True),
     lambda p: pareto.epsilon_additive(p, [[0, 0]], maximise=True),
     lambda p: pareto.steerability([[0.5, 0.5]] * 2, p, maximise=True)],
)  # fmt: skip
def test_points_that_are_no_numbers_are_refused(measure, bad):
    with pytest.raises(ValueError, match=r"point 1 of .* every point must be finite"):
        measure([[0.0, 1.0], [bad, 0.0]])


@pytest.mark.parametrize("correlation", [pareto.spearman, pareto.kendall_tau])
def test_rank_correlations_of_any_figures(correlation):
    up = torch.tensor([0.0, 1.0, 2.0])
    assert correlation(up, torch.tensor([-1.7e308, 0.0, 1.7e308], dtype=torch.float64)) == pytest.approx(1.0)
    assert correlation(up, torch.tensor([5e-324, 0.0, -5e-324], dtype=torch.float64)) == pytest.approx(-1.0)
    assert correlation(up, torch.tensor([-math.inf, 0.0, math.inf])) == pytest.approx(1.0)
    # Two infinities are equal, not something that is no number.
    assert correlation(up, torch.tensor([math.inf, math.inf, 0.0])) == correlation(up, torch.tensor([1.0, 1.0, 0.0]))
    assert correlation(up[:1], up[:1]) == correlation(up, torch.ones(3)) == 0.0
    with pytest.raises(ValueError, match="y holds NaN at 1"):
        correlation(up, torch.tensor([0.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="vectors of one length"):
        correlation(up, up[:2])


def test_blocks_of_rows_change_no_digit(monkeypatch):
    points = np.random.default_rng(2).random((301, 3)).round(2)
    weights = np.random.default_rng(3).dirichlet(np.ones(3), 301)
    ask = [lambda: pareto.steerability(weights, points, maximise=True), lambda: pareto.spacing(points),
           lambda: pareto.non_dominated(points, maximise=True).tolist()]  # fmt: skip
    whole = [each() for each in ask]
    monkeypatch.setattr(_exact, "BLOCK", 5000)
    assert len(list(_exact.row_blocks(301))) > 10
    assert [each() for each in ask] == whole


def test_blocked_figures_are_those_of_the_whole_tables():
    points = torch.from_numpy(np.random.default_rng(2).random((301, 2)).round(2))
    x, y = points.T
    a, b = (torch.sign(v[:, None] - v[None]) for v in (x, y))
    tau = float((a * b).sum() / torch.sqrt((a * a).sum() * (b * b).sum()))
    ranks = [(v[:, None] > v[None]).double().sum(1) + 0.5 * (v[:, None] == v[None]).double().sum(1) for v in (x, y)]
    a, b = (rank - rank.mean() for rank in ranks)
    assert pareto.kendall_tau(x, y) == tau and pareto.spearman(x, y) == float((a @ b) / (a.norm() * b.norm()))
    distance = torch.cdist(points, points, p=1).fill_diagonal_(torch.inf)
    assert pareto.spacing(points) == float(distance.min(1).values.std())
    better = points
    dominated = ((better[:, None] >= better[None]).all(-1) & (better[:, None] > better[None]).any(-1)).any(0)
    assert torch.equal(pareto.non_dominated(points, maximise=True), ~dominated)


def test_bootstrap_means_of_any_size():
    values = torch.tensor([[SMALL, 1.0], [2 * SMALL, 2.0], [3 * SMALL, 3.0]], dtype=torch.float64)
    found = bootstrap_interval(values, samples=50)
    torch.testing.assert_close(found.low[0] / SMALL, found.low[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(bootstrap_means(values * BIG, 20) / BIG, bootstrap_means(values, 20), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"values go up to 1.7e\+308, .*divide them"):
        bootstrap_interval(torch.full((3, 1), 1.7e308, dtype=torch.float64), samples=5)


@pytest.mark.parametrize("c", [1e-60, 1e-200])
def test_a_coefficient_that_float32_cannot_hold_is_refused(c):
    scores, base = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])
    with pytest.raises(ValueError, match="beyond float32"):
        steering.rescale(scores, base, c)
    if c > 1e-100:
        torch.testing.assert_close(steering.rescale(scores.double(), base, c), scores.double() / c)
    torch.testing.assert_close(steering.rescale(scores, base, 1 / c), base)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple) else (result,):
            self.numel = max(self.numel, each.numel() if isinstance(each, torch.Tensor) else 0)
        return result


def test_no_table_of_all_pairs_is_held_at_once(monkeypatch):
    monkeypatch.setattr(_exact, "BLOCK", 20_000)
    points, weights = (np.random.default_rng(seed).dirichlet(np.ones(2), 1000) for seed in (0, 1))
    with Largest() as seen:
        pareto.steerability(weights, points, maximise=True)
    assert 15_000 < seen.numel <= 20_000
