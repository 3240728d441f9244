"""A front from the figures of each list, and its points as a table."""

import csv
import math

import pytest
import torch

from mopl.pareto import Front, Point, bootstrap_interval, csv_text, hypervolume, weight_grid

pytest.importorskip("moocore")

LISTS, GRID = 12, weight_grid(2, 3)


def figures(seed=0):
    """Main (L, n) and auxiliary (L, n, m) figures; the first list has no label of the second objective."""
    drawn = torch.rand(LISTS, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn[0, :, 2] = torch.nan
    return drawn[..., 0], drawn[..., 1:]


def made(main, auxiliary, **changes):
    said = {
        "weights": GRID, "objectives": ["cheap", "fast"], "main": "chosen", "reference_point": [0.0, 0.0], "seconds": 1,
        "parameters": 7, "seed": 3, "data": "lists", "samples": 40,
    }  # fmt: skip
    return Front.of(main, auxiliary, "ours", **(said | changes))


def test_a_front_of_lists_has_their_means_and_the_intervals_of_the_bootstrap():
    main, auxiliary = figures()
    front = made(main, auxiliary, level=0.8, notes=["small data"])
    means = auxiliary.nanmean(0)
    assert front.tensors()[1].tolist() == main.mean(0).tolist() and front.tensors()[2].tolist() == means.tolist()
    ends = bootstrap_interval(torch.cat([main[..., None], auxiliary], -1), 0.8, 40, seed=3)
    for n, point in enumerate(front.points):
        assert point.weights == GRID[n].tolist() and point.scale == 1
        assert point.intervals == torch.stack([ends.low[n], ends.high[n]], -1).tolist()
    volume = bootstrap_interval(auxiliary, 0.8, 40, 3, lambda x: hypervolume(x, [0, 0], maximise=True))
    assert front.interval == {"hypervolume": [float(volume.low), float(volume.high)]}
    assert front.hypervolume == hypervolume(means, [0, 0], maximise=True)
    assert front.interval["hypervolume"][0] < front.hypervolume < front.interval["hypervolume"][1]
    assert front.notes == ["small data"] and front.regret is not None


def test_points_at_other_distances_from_the_base_follow_and_leave_the_hypervolume_alone():
    main, auxiliary = figures()
    moved = figures(1)
    front = made(main, auxiliary, rescaled=[(2.0, *moved), (0.5, main, auxiliary)])
    assert [point.scale for point in front.points] == [1.0] * 3 + [2.0] * 3 + [0.5] * 3
    assert front.trained_points == front.points[:3] == made(main, auxiliary).points
    other = made(*moved)
    assert [(p.weights, p.figures, p.interval) for p in front.points[3:6]] == [
        (p.weights, p.figures, p.interval) for p in other.points
    ]
    assert front.hypervolume == made(main, auxiliary).hypervolume != other.hypervolume


def test_there_are_no_intervals_without_resamples_or_of_one_list():
    main, auxiliary = figures()
    for front in (made(main, auxiliary, samples=0), made(main[1:2], auxiliary[1:2])):
        assert front.interval == {} and all(point.interval == {} for point in front.points)


def test_an_objective_that_counts_in_no_list_is_refused():
    main, auxiliary = figures()
    auxiliary[..., 0] = torch.nan
    for samples in (0, 40):
        with pytest.raises(ValueError, match=r"no query that counts|point 0 of auxiliary_values"):
            made(main, auxiliary, samples=samples)


def test_a_base_without_weights_has_one_point():
    main, auxiliary = figures()
    front = made(main[:, :1], auxiliary[:, :1], weights=None, maximise=False, reference_point=[2.0, 2.0])
    assert [point.weights for point in front.points] == [[]] and front.regret is None
    assert front.rising == [False, False] and made(*figures()).rising == [True, True]


COLUMNS = [
    "method", "seed", "scale", "w_cheap", "w_fast", "main", "main_low", "main_high", "cheap", "cheap_low", "cheap_high",
    "fast", "fast_low", "fast_high",
]  # fmt: skip


def test_a_table_has_a_row_for_each_point_and_every_digit(tmp_path):
    pandas = pytest.importorskip("pandas")
    main, auxiliary = figures()
    front = made(main, auxiliary, rescaled=[(1 / 3, *figures(1))])
    table = front.to_frame()
    assert list(table.columns) == COLUMNS and len(table) == 6
    assert table["w_cheap"].tolist() == [*GRID[:, 0].tolist()] * 2 and table["scale"].tolist()[3] == 1 / 3
    assert table["fast"].tolist() == [point.auxiliary[1] for point in front.points]
    assert table["main_high"].tolist() == [point.interval["main"][1] for point in front.points]
    front.to_csv(tmp_path / "new" / "points.csv")
    with (tmp_path / "new" / "points.csv").open() as lines:
        again = pandas.DataFrame(csv.DictReader(lines))
    numbers = [name for name in COLUMNS if name != "method"]
    assert again["method"].tolist() == table["method"].tolist()
    assert (again[numbers].astype(float) == table[numbers]).all(axis=None)


def test_what_a_point_lacks_is_empty_and_names_stay_on_their_line(tmp_path):
    front = made(*figures(), samples=0, objectives=["main", 'a,"b"\x1b\n'])
    front.points = [Point([], 0.25, [0.5, 1e-17])]
    front.to_csv(tmp_path / "points.csv")
    text = (tmp_path / "points.csv").read_text()
    header, row = csv.reader(text.splitlines())
    assert header[3:] == [
        "w_main", 'w_a,"b"\\x1b\\n', "main", "main_low", "main_high", "main_", "main_low_", "main_high_",
        'a,"b"\\x1b\\n', 'a,"b"\\x1b\\n_low', 'a,"b"\\x1b\\n_high',
    ]  # fmt: skip
    assert row == ["ours", "3", "1.0", "", "", "0.25", "", "", "0.5", "", "", "1e-17", "", ""]


def test_figures_that_do_not_exist_pass_only_where_they_may():
    front = made(*figures())
    front.points[1].main = front.seconds = math.nan
    front.check(missing=True)
    with pytest.raises(ValueError, match=r"points\[1\].main is nan"):
        front.check()
    front.points[1].main = math.inf
    with pytest.raises(ValueError, match=r"points\[1\].main is inf"):
        front.check(missing=True)


@pytest.mark.parametrize("count", [-1, 2.5, True, 2**64])
def test_parameters_of_inference_are_a_whole_number_or_not_said(count):
    assert "inference_parameters" not in made(*figures()).to_json()
    front = made(*figures(), inference_parameters=2**40)
    assert Front.from_json(front.to_json()).inference_parameters == 2**40
    with pytest.raises(ValueError, match="inference_parameters is"):
        made(*figures(), inference_parameters=count)


def test_fronts_of_other_objectives_are_no_table():
    one = made(*figures())
    with pytest.raises(ValueError, match="a column can hold one objective alone"):
        csv_text([one, made(*figures(), objectives=["fast", "cheap"])])
    with pytest.raises(ValueError, match="fronts is empty"):
        csv_text([])
    assert csv_text([one, one]).count("\n") == 1 + 2 * len(one.points)
