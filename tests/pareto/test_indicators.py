"""Hypervolume and its relatives against brute force and published values; grids, steerability."""

import itertools
import json
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from mopl.pareto import (
    attainment,
    epsilon_additive,
    front_distance,
    gd_plus,
    hypervolume,
    igd_plus,
    kendall_tau,
    max_gap,
    non_dominated,
    spacing,
    spearman,
    steerability,
    weight_grid,
)

# Two label distributions of three items; the front of their cross-entropies is known in closed form.
LABELS = torch.softmax(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.5]], dtype=torch.float64), -1)


def losses_of(policies):
    return -torch.log(policies) @ LABELS.T


def arithmetic_front(weights):
    return losses_of(weights @ LABELS)


def geometric_front(weights):
    return losses_of(torch.softmax(weights @ torch.log(LABELS), -1))


def brute_force_hypervolume(points, reference):
    """Inclusion and exclusion over all subsets, in exact rational numbers; minimisation."""
    total = Fraction(0)
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            sides = [max(Fraction(r) - max(xs), 0) for xs, r in zip(zip(*subset, strict=True), reference, strict=True)]
            total += (-1) ** (size + 1) * math.prod(sides)
    return float(total)


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_hypervolume_is_inclusion_and_exclusion_on_a_grid_with_ties_duplicates_and_dominated_points(objectives):
    rng = np.random.default_rng(objectives)
    for _ in range(6):
        points = rng.integers(0, 5, size=(8, objectives))
        points[3] = points[5]
        exact = brute_force_hypervolume([tuple(map(int, p)) for p in points], (4,) * objectives)
        assert hypervolume(points, [4.0] * objectives, maximise=False) == exact
        assert hypervolume(-torch.from_numpy(points).float(), [-4.0] * objectives, maximise=True) == exact
        flags = [j % 2 == 0 for j in range(objectives)]
        signs = np.where(flags, -1, 1)
        assert hypervolume(points * signs, 4.0 * signs, maximise=flags) == exact


def test_hypervolume_of_published_point_sets(shared_data):
    values = json.loads((shared_data / "pl_bt" / "reference_values.json").read_text())["hypervolume"]
    square = hypervolume([[5, 5], [4, 6], [2, 7], [7, 4]], (10, 10), maximise=False)
    cube = hypervolume([[1, 0, 1], [0, 1, 0]], (2, 2, 2), maximise=False)
    assert square == values["[[5,5],[4,6],[2,7],[7,4]] ref (10,10)"] == 38.0
    assert cube == values["[[1,0,1],[0,1,0]] ref (2,2,2)"] == 5.0
    sets = pytest.importorskip("moocore").get_dataset("input1.dat")  # comes with the package; last column: the set
    for number, name in ((1, "set 1, ref (10,10), minimise"), (2, "set 2")):
        volume = hypervolume(sets[sets[:, 2] == number, :2], (10, 10), maximise=False)
        assert volume == pytest.approx(values[f"moocore input1.dat {name}"], abs=1e-8)


def test_hypervolume_of_even_points_on_a_line():
    points = [[i / 10, 1 - i / 10] for i in range(11)]
    assert hypervolume(points, [0, 0], maximise=True) == pytest.approx((1 - 1 / 10) / 2)


def test_front_of_the_closed_form_and_its_hypervolumes():
    front = arithmetic_front(weight_grid(2))
    first = [2.296563, 1.847623, 1.581934, 1.39364, 1.248982, 1.133021, 1.038108, 0.96025, 0.897953, 0.852592, 0.832396]
    second = [0.680022, 0.701333, 0.747353, 0.809673, 0.88733, 0.982127, 1.098239, 1.243272, 1.431435, 1.692885]
    torch.testing.assert_close(front[:, 0], torch.tensor(first, dtype=torch.float64), rtol=0, atol=5e-7)
    torch.testing.assert_close(front[:10, 1], torch.tensor(second, dtype=torch.float64), rtol=0, atol=5e-7)
    assert hypervolume(front, (1.5, 1.5), maximise=False) == pytest.approx(0.284496, abs=5e-7)
    soup = geometric_front(weight_grid(2))
    assert hypervolume(soup, (1.5, 1.5), maximise=False) == pytest.approx(0.247210, abs=5e-7)


def test_hypervolume_of_ever_denser_fronts_tends_to_the_area_under_the_curve():
    curve = arithmetic_front(
        torch.linspace(0, 1, 200_001, dtype=torch.float64)[:, None] * torch.tensor([-1, 1]) + torch.tensor([1, 0])
    )
    inside = curve[(curve < 1.5).all(1)]
    area = torch.trapezoid(1.5 - inside[:, 1], inside[:, 0]).item()
    assert area == pytest.approx(0.317462, abs=1e-5)
    volumes = [hypervolume(arithmetic_front(weight_grid(2, n)), (1.5, 1.5), maximise=False) for n in (11, 101, 1001)]
    assert volumes[0] < volumes[1] < volumes[2] < area and volumes[2] == pytest.approx(area, abs=4e-4)


def test_every_interior_point_of_the_geometric_front_is_dominated_by_the_arithmetic_one():
    both = torch.cat([geometric_front(weight_grid(2)[1:-1]), arithmetic_front(weight_grid(2, 2001))])
    assert not non_dominated(both, maximise=False)[:9].any()
    assert non_dominated(arithmetic_front(weight_grid(2)), maximise=False).all()


def test_points_beyond_the_reference_point_and_no_points_have_no_volume():
    assert hypervolume([[2.0, 0.0], [3.0, 3.0]], (1, 1), maximise=False) == 0.0
    assert hypervolume(torch.empty(0, 2), (1, 1), maximise=False) == 0.0
    assert hypervolume([[0.25], [0.5]], [1], maximise=False) == 0.75


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_points_and_reference_points_of_any_dtype_are_widened(dtype):
    points = torch.tensor([[1, 3], [2, 1]], dtype=dtype)
    assert hypervolume(points, torch.zeros(2, dtype=dtype), maximise=True) == 4.0
    assert igd_plus(points, points, maximise=True) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_point_that_is_not_finite_is_an_error_that_names_it(bad):
    points = torch.tensor([[0.1, 0.2], [0.3, bad], [bad, 0.1]])
    with pytest.raises(ValueError, match=r"point 1 of points is \[0.3"):
        hypervolume(points, (0, 0), maximise=True)
    with pytest.raises(ValueError, match="point 1 of points"):
        non_dominated(points, maximise=True)
    with pytest.raises(ValueError, match="point 1 of objective_vectors"):
        steerability(weight_grid(2, 3), points, maximise=True)
    with pytest.raises(ValueError, match="point 0 of front"):
        igd_plus([[1.0, 1.0]], [[bad, 1.0]], maximise=True)


def test_bad_shapes_and_directions_are_named():
    with pytest.raises(ValueError, match=r"points has shape \(3,\) but must be \(n, m\)"):
        hypervolume([1.0, 2.0, 3.0], (0, 0), maximise=True)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="all of one length"):
        hypervolume([[1.0, 2.0], [3.0]], (0, 0), maximise=True)
    with pytest.raises(ValueError, match=r"reference is .* but must be 2 finite numbers"):
        hypervolume([[1.0, 2.0]], (0,), maximise=True)
    with pytest.raises(ValueError, match=r"maximise is .* 2 of them"):
        hypervolume([[1.0, 2.0]], (0, 0), maximise=[True])
    with pytest.raises(ValueError, match="maximise is 1"):
        non_dominated([[1.0, 2.0]], maximise=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"front has shape \(1, 3\) but must be \(n, 2\)"):
        igd_plus([[1.0, 2.0]], [[1.0, 2.0, 3.0]], maximise=True)
    with pytest.raises(ValueError, match="points is empty"):
        epsilon_additive(torch.empty(0, 2), [[1.0, 2.0]], maximise=True)


def test_without_moocore_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "moocore", None)
    with pytest.raises(ImportError, match=r"needs moocore, .* run: pip install .*\[eval\]'"):
        hypervolume([[1.0, 2.0]], (0, 0), maximise=True)
    assert non_dominated([[1.0, 2.0]], maximise=True).all()


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
def test_non_dominated_points_are_moocores(objectives):
    moocore = pytest.importorskip("moocore")
    rng = np.random.default_rng(objectives)
    flags = [j % 2 == 1 for j in range(objectives)]
    for size in (1, 2, 30, 80):
        points = rng.integers(0, 6, size=(size, objectives)).astype(float)
        for maximise in (False, True, flags):
            theirs = moocore.is_nondominated(points, maximise=maximise, keep_weakly=True)
            assert non_dominated(torch.from_numpy(points), maximise=maximise).tolist() == theirs.tolist()


def shortfall(points, front, maximise):
    """(n, r): how far each point falls short of each point of the front."""
    sign = 1.0 if maximise else -1.0
    return (sign * (front[None] - points[:, None])).clamp_min(0).norm(dim=-1)


@pytest.mark.parametrize("maximise", [True, False])
def test_distances_to_a_front_are_their_definitions(maximise):
    points, front = torch.rand(7, 3, dtype=torch.float64), torch.rand(9, 3, dtype=torch.float64)
    distance = shortfall(points, front, maximise)
    sign = 1.0 if maximise else -1.0
    epsilon = (sign * (front[None] - points[:, None])).max(-1).values.min(0).values.max()
    found = front_distance(points, front, maximise=maximise)
    assert found["igd_plus"] == pytest.approx(distance.min(0).values.mean().item(), abs=1e-14)
    assert found["gd_plus"] == pytest.approx(distance.min(1).values.mean().item(), abs=1e-14)
    assert found["epsilon_additive"] == pytest.approx(epsilon.item(), abs=1e-14)


def test_the_closed_form_front_lies_on_the_dense_one_and_the_soup_does_not():
    dense = arithmetic_front(weight_grid(2, 2001))
    on, off = (front_distance(f(weight_grid(2)), dense, maximise=False) for f in (arithmetic_front, geometric_front))
    assert on["gd_plus"] == pytest.approx(0, abs=1e-15) and off["gd_plus"] > 0.01
    assert igd_plus(dense, dense, maximise=False) == 0 and epsilon_additive(dense, dense, maximise=False) == 0
    assert off["igd_plus"] > on["igd_plus"] > 0
    mixed = dense * torch.tensor([-1.0, 1.0])
    assert gd_plus(geometric_front(weight_grid(2)) * torch.tensor([-1.0, 1.0]), mixed, maximise=[True, False]) > 0.01


def test_spacing_and_gap_of_points_on_a_line():
    even = [[i, 5 - i] for i in range(6)]
    assert spacing(even) == 0.0 and max_gap(even) == pytest.approx(math.sqrt(2))
    gap = [[0, 9], [1, 8], [4, 5], [5, 4]]
    assert max_gap(gap) == pytest.approx(3 * math.sqrt(2))
    assert spacing([[0.0, 3.0], [1.0, 2.0], [3.0, 0.0]]) == pytest.approx(np.std([2, 2, 4], ddof=1))
    assert spacing([[1.0, 2.0]]) == 0.0 and max_gap([[1.0, 2.0]]) == 0.0


def test_the_widest_gap_is_the_longest_edge_of_scipys_spanning_tree():
    sparse = pytest.importorskip("scipy.sparse.csgraph")
    for seed in range(5):
        points = np.random.default_rng(seed).uniform(size=(25, 3))
        distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
        assert max_gap(points) == pytest.approx(sparse.minimum_spanning_tree(distances).data.max(), abs=1e-15)


def test_attainment_of_two_seeds():
    seeds = [[[0.2, 0.8], [0.8, 0.2]], torch.tensor([[0.4, 0.6]])]
    surfaces = attainment(seeds, maximise=True, percentiles=(50, 100))
    some = {tuple(round(x, 6) for x in row) for row in surfaces[50].tolist()}
    every = {tuple(round(x, 6) for x in row) for row in surfaces[100].tolist()}
    assert some == {(0.2, 0.8), (0.4, 0.6), (0.8, 0.2)} and every == {(0.2, 0.6), (0.4, 0.2)}
    with pytest.raises(ValueError, match="2 or 3 objectives"):
        attainment([[[1.0, 1.0, 1.0, 1.0]]], maximise=True)
    with pytest.raises(ValueError, match="fronts is empty"):
        attainment([], maximise=True)


def test_eleven_weights_for_two_objectives_are_exact_tenths():
    assert weight_grid(2).tolist() == [[i / 10, (10 - i) / 10] for i in range(11)]


@pytest.mark.parametrize(("objectives", "size"), [(1, 1), (2, 11), (3, 66), (4, 84), (5, 126), (6, 126), (9, 126)])
def test_grids_have_their_size_the_vertices_and_no_duplicates(objectives, size):
    grid = weight_grid(objectives)
    assert grid.shape == (size, objectives) and torch.equal(grid, weight_grid(objectives))
    assert (grid >= 0).all()
    torch.testing.assert_close(grid.sum(1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-15)
    assert len(grid.unique(dim=0)) == size
    rows = grid.tolist()
    assert all(vertex in rows for vertex in torch.eye(objectives).tolist())


def test_lattice_is_all_multiples():
    expected = sorted(c for c in itertools.product(range(4), repeat=3) if sum(c) == 3)
    assert [[round(3 * x) for x in row] for row in weight_grid(3, 10).tolist()] == [list(c) for c in expected]


def test_grids_of_many_objectives_cover_the_simplex_better_than_their_vertices_and_as_well_as_measured():
    random = torch.from_numpy(np.random.default_rng(0).dirichlet([1.0] * 5, 5000))
    mean_distance = torch.cdist(random, weight_grid(5), p=1).min(1).values.mean().item()
    assert mean_distance == pytest.approx(0.218, abs=0.01)  # Sobol spacings with the vertices, 126 points


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 50), "has 46 or 55 points"),  # 45, and equal weights
        ((3, 8), "has 7 or 10 points"),
        ((4, 36), "has 35 or 56 points"),
        ((1, 3), "has 1 point"),
        ((3, 11), "has 10 or 15 points"),  # ten vectors hold equal weights already
        ((2, 1), "has at least 2 points"),
        ((6, 5), "pass at least 6"),
        ((0,), "objectives is 0"),
    ],
)
def test_impossible_grids_name_the_possible_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        weight_grid(*arguments)


@pytest.mark.parametrize(
    ("density", "sizes"),
    [("fine", {20: 126, 130: 132}), ("dense", {1: 1, 2: 11, 3: 28, 4: 35, 5: 32, 40: 42}),
     ("medium", {1: 1, 2: 11, 3: 10, 4: 11, 5: 12, 12: 14}), ("coarse", {1: 1, 2: 5, 3: 10, 4: 11, 5: 16, 20: 22})],
)  # fmt: skip
def test_a_default_grid_is_as_dense_as_its_use_affords_and_holds_equal_weights(density, sizes):
    for objectives, size in sizes.items():
        grid = weight_grid(objectives, density=density)
        assert grid.shape == (size, objectives) and len(grid.unique(dim=0)) == size
        if density != "fine":
            assert float((grid - 1 / objectives).abs().amax(1).min()) < 1e-12
            assert all(vertex in grid.tolist() for vertex in torch.eye(objectives).tolist())


def test_equal_weights_come_after_a_lattice_that_lacks_them_and_after_the_vertices_of_other_grids():
    assert torch.equal(weight_grid(4, 11)[:10], weight_grid(4, 10)) and weight_grid(4, 11)[10].tolist() == [0.25] * 4
    assert weight_grid(3, 4)[3].tolist() == [1 / 3] * 3
    assert weight_grid(5, 6)[5].tolist() == [0.2] * 5 and weight_grid(5, 12)[5].tolist() == [0.2] * 5


def test_smallest_grids_are_the_vertices():
    assert weight_grid(2, 2).tolist() == [[0, 1], [1, 0]]
    assert torch.equal(weight_grid(5, 5), torch.eye(5, dtype=torch.float64))


def circle(weights):
    """Best point of a quarter circle for each weight: the maximiser of w.f is w / |w|."""
    return weights / weights.norm(dim=1, keepdim=True)


def test_a_perfect_front_has_no_steering_regret():
    w = weight_grid(2)
    figures = steerability(w, circle(w), maximise=True, reference_point=(0, 0), reference_front=circle(weight_grid(2)))
    assert figures["steering_regret"] == pytest.approx(0, abs=1e-15)
    assert figures["achieved_utility"] == pytest.approx(figures["front_utility"])
    assert figures["achieved_utility"] == pytest.approx(w.norm(dim=1).mean().item())
    assert figures["kendall_tau"] == pytest.approx([1, 1]) and figures["spearman"] == pytest.approx([1, 1])
    assert figures["nondominated_fraction"] == 1 and figures["normalized_hypervolume"] == 1
    assert figures["igd_plus"] == figures["epsilon_additive"] == figures["gd_plus"] == 0
    json.dumps(figures, allow_nan=False)


def test_the_closed_form_model_has_no_regret_in_its_own_losses():
    w = weight_grid(2)  # the row of weight w minimises w.L over all policies
    figures = steerability(w, arithmetic_front(w), maximise=False, reference_point=(1.5, 1.5))
    assert figures["steering_regret"] == pytest.approx(0, abs=1e-15)
    assert figures["kendall_tau"] == pytest.approx([1, 1])
    assert figures["achieved_utility"] == pytest.approx(-(w * arithmetic_front(w)).sum(1).mean().item())
    assert figures["hypervolume"] == pytest.approx(0.284496, abs=5e-7)


def test_a_shuffled_front_has_regret_though_its_hypervolume_is_the_same():
    w = weight_grid(3)
    shuffled = circle(w)[torch.randperm(len(w))]
    good, bad = (steerability(w, f, maximise=True, reference_point=(0, 0, 0)) for f in (circle(w), shuffled))
    assert bad["steering_regret"] > 0.05 and good["steering_regret"] == pytest.approx(0, abs=1e-15)
    assert bad["front_utility"] == pytest.approx(good["front_utility"])
    assert bad["hypervolume"] == pytest.approx(good["hypervolume"], rel=1e-12)
    assert max(map(abs, bad["spearman"])) < 0.4 < min(good["kendall_tau"])


def test_a_model_that_ignores_the_weights_has_correlation_zero():
    w = weight_grid(2)
    figures = steerability(w, torch.full((11, 2), 0.5), maximise=True)
    assert figures["kendall_tau"] == [0, 0] and figures["spearman"] == [0, 0] and figures["spacing"] == 0
    reverse = steerability(w, circle(w.flip(1)), maximise=True)
    assert reverse["kendall_tau"] == pytest.approx([-1, -1]) and reverse["steering_regret"] > 0.1


def test_one_ideal_point_as_reference_front_gives_the_share_of_the_box():
    w = weight_grid(2)
    options = {"maximise": [True, False], "reference_point": (0, 1), "reference_front": [[1.0, 0.0]]}
    points = torch.stack([w[:, 0], 1 - w[:, 1]], 1)
    assert steerability(w, points, **options)["normalized_hypervolume"] == pytest.approx(0.45)
    with pytest.raises(ValueError, match="move reference_point"):
        steerability(w, points, **(options | {"reference_point": (1, 0)}))


def test_rank_correlations_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for seed in range(5):
        x, y = torch.from_numpy(np.random.default_rng(seed).integers(0, 6, size=(2, 40)).astype(float))
        assert kendall_tau(x, y) == pytest.approx(stats.kendalltau(x.numpy(), y.numpy()).statistic, abs=1e-14)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-14)


def test_steerability_names_bad_arguments():
    with pytest.raises(ValueError, match=r"weights\[1\].*does not sum to 1"):
        steerability([[0.5, 0.5], [0.5, 0.6]], [[1.0, 2.0], [2.0, 1.0]], maximise=True)
    with pytest.raises(ValueError, match="weights has 1 row and objective_vectors 2"):
        steerability([[0.5, 0.5]], [[1.0, 2.0], [2.0, 1.0]], maximise=True)
    with pytest.raises(ValueError, match=r"weights has shape \(1, 3\)"):
        steerability([[0.5, 0.5, 0.0]], [[1.0, 2.0]], maximise=True)
