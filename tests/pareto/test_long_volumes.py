"""Hypervolumes of many points in many objectives: bounded, announced, refused, and the interval still right."""

import math
import threading
import time

import numpy as np
import pytest
import torch

from mopl import pareto
from mopl.pareto import bootstrap_interval, hypervolume_interval, volumes
from mopl.report.table import as_text, summarise

pytest.importorskip("moocore")


def queries(n, m, count=40, seed=0):
    """Figures (Q, n, m) of queries around a front that bulges."""
    generator = np.random.default_rng(seed)
    front = np.sqrt(generator.dirichlet(np.ones(m), n))
    return torch.from_numpy(np.clip(front + 0.1 * generator.standard_normal((count, n, m)), 0, None))


@pytest.mark.parametrize(("n", "m"), [(11, 2), (66, 3), (84, 4), (126, 5), (40, 6), (20, 8)])
def test_what_takes_seconds_is_exact(n, m):
    values, origin = queries(n, m), [0.0] * m
    found, notes = hypervolume_interval(values, origin, maximise=True, samples=50)
    wanted = bootstrap_interval(
        values, samples=50, statistic=lambda means: pareto.hypervolume(means, origin, maximise=True)
    )
    assert found == {"hypervolume": [float(wanted.low), float(wanted.high)]} and notes == []
    assert hypervolume_interval(values, origin, maximise=True, samples=0) == ({}, [])


def test_a_longer_bootstrap_is_approximate_says_so_and_is_right(monkeypatch):
    values, origin = queries(50, 6), [0.0] * 6
    exact, _ = hypervolume_interval(values, origin, maximise=True, samples=200)
    monkeypatch.setattr("mopl.pareto.indicators.BOOTSTRAP", 0.0)
    rough, notes = hypervolume_interval(values, origin, maximise=True, samples=200)
    assert notes == ["the interval of its hypervolume is from volumes along 10,000 directions, scaled to the exact one"]
    width = exact["hypervolume"][1] - exact["hypervolume"][0]
    for one, other in zip(exact["hypervolume"], rough["hypervolume"], strict=True):
        assert one != other and abs(one - other) < 0.1 * width
    assert rough == hypervolume_interval(values, origin, maximise=True, samples=200)[0]
    # Losses: smaller is better, and the reference point is above.
    losses, reference = 2 - values, [2.0] * 6
    lower, _ = hypervolume_interval(losses, reference, maximise=False, samples=200)
    assert lower["hypervolume"] == pytest.approx(rough["hypervolume"], rel=1e-6)


def test_a_bootstrap_in_eight_objectives_is_over_in_seconds():
    values = queries(120, 8, count=10)
    began = time.process_time()
    volume, note = pareto.hypervolume_of_resamples(values[0, :60], [0.0] * 8, maximise=True, samples=100_000)
    assert note and volume(values[1, :60]) > 0 and time.process_time() - began < 5


def test_the_note_is_in_front_table_and_file(tmp_path):
    front = pareto.Front.measure(
        "m", objectives=["a", "b"], main="main", weights=[[0.5, 0.5]], main_values=[1.0], auxiliary_values=[[1.0, 1.0]],
        reference_point=[0.0, 0.0], seconds=0.0, parameters=1, seed=0, data="d", notes=["what to know"],
    )  # fmt: skip
    front.save(tmp_path / "front.json")
    assert pareto.Front.load(tmp_path / "front.json").notes == ["what to know"]
    assert as_text(summarise(front)).endswith("\nNote: m: what to know.\n")
    front.notes = []
    assert '"notes"' not in front.to_json()
    front.notes = [1]
    with pytest.raises(ValueError, match=r"notes is .* but must be a list of strings"):
        front.to_json()


def test_a_volume_that_takes_hours_is_refused_before_it_begins():
    points = np.sqrt(np.random.default_rng(0).dirichlet(np.ones(12), 126))
    with pytest.raises(ValueError, match=r"126 points in 12 objectives would take about \d+ days; take fewer points"):
        pareto.hypervolume(points, [0.0] * 12, maximise=True)
    # What adds nothing costs nothing: points that others dominate, or that are behind the reference point.
    assert pareto.hypervolume([[1.0] * 12] + [[0.5] * 12] * 200, [0.0] * 12, maximise=True) == 1.0
    assert pareto.hypervolume(points, [1.0] * 12, maximise=True) == 0.0


def test_a_run_whose_front_would_take_hours_is_refused_before_it_trains(tmp_path):
    pytest.importorskip("accelerate")
    from mopl.ranking.config import RankConfig
    from mopl.ranking.recipe import rank

    config = RankConfig(data="synthetic:queries=30,items=5,features=26,objectives=12", points=126)
    with pytest.raises(ValueError, match="126 points in 12 objectives would take"):
        rank(config, tmp_path / "run", say=lambda text: None)
    assert not (tmp_path / "run").exists()


def test_a_long_volume_is_announced_and_can_be_stopped(monkeypatch):
    points = np.sqrt(np.random.default_rng(0).dirichlet(np.ones(5), 20))
    plain = pareto.hypervolume(points, [0.0] * 5, maximise=True)
    monkeypatch.setattr(volumes, "LONG", 0.0)
    with pytest.warns(RuntimeWarning, match="hypervolume of 20 points in 5 objectives takes about 0 seconds"):
        assert pareto.hypervolume(points, [0.0] * 5, maximise=True) == plain
    with pytest.warns(RuntimeWarning), pytest.raises(MemoryError):
        volumes.patiently(lambda: (_ for _ in ()).throw(MemoryError()), 20, 5)
    waiting = threading.Event()

    def stop(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", stop)
    with pytest.warns(RuntimeWarning), pytest.raises(KeyboardInterrupt):
        volumes.patiently(lambda: waiting.wait(20), 20, 5)
    waiting.set()


def test_the_estimate_of_the_time_grows_as_the_algorithm_does():
    assert volumes.seconds(120, 8) == pytest.approx(2, rel=0.5) and volumes.seconds(66, 10) < 15
    assert math.isclose(volumes.seconds(200, 8) / volumes.seconds(100, 8), 2**5)
    assert volumes.seconds(10_000, 3) < 20
