"""`front.json`: what goes in comes out, nothing wrong gets in, and no reader sees half a file."""

import collections
import copy
import json
import math
import re

import pytest
import torch

from mopl.pareto import Front, Point, hypervolume, weight_grid

SCHEMA = """{"method": "weight-cos-dpo", "objectives": ["cheap", "fast"], "main": "chosen",
"points": [{"weights": [0.25, 0.75], "main": 0.5, "auxiliary": [0.5, 0.25],
            "interval": {"main": [0.4, 0.6], "auxiliary": [[0.4, 0.6], null]}}],
"hypervolume": 0.125, "reference_point": [0, 0], "seconds": 1.5, "parameters": 10, "seed": 0, "data": "travel"}"""


def example(**changes):
    return Front.from_json(json.dumps(json.loads(SCHEMA) | changes))


def measured(**changes):
    w = weight_grid(2)
    arguments = {
        "objectives": ["cheap", "fast"],
        "main": "chosen",
        "weights": w,
        "main_values": torch.linspace(0.1, 0.2, 11),
        "auxiliary_values": w / w.norm(dim=1, keepdim=True),
        "reference_point": [0.0, 0.0],
        "seconds": 2.0,
        "parameters": 7,
        "seed": 3,
        "data": {"name": "synthetic", "queries": 5},
    }
    return Front.measure("weight-cos-dpo", **(arguments | changes))


def test_a_file_with_the_keys_of_the_schema_is_read_and_written_unchanged():
    front = Front.from_json(SCHEMA)
    assert front.points[0].interval["main"] == [0.4, 0.6] and front.maximise is True
    assert json.loads(front.to_json()) == json.loads(SCHEMA)
    assert list(json.loads(front.to_json())) == list(json.loads(SCHEMA))


def test_optional_keys_survive_the_round_trip():
    front = measured(interval={"hypervolume": (0.5, 0.9)}, maximise=[True, True])
    front.points.append(Point([0.5, 0.5], 0.3, [0.4, 0.4], scale=2.0))
    again = Front.from_json(front.to_json())
    assert again == front and again.points[-1].scale == 2.0 and again.interval == {"hypervolume": [0.5, 0.9]}


def test_data_of_any_mapping_is_written_as_it_is():
    counts = collections.Counter(a=2, b=1)
    assert json.loads(measured(data=counts).to_json())["data"] == counts
    front = measured(data=collections.defaultdict(list, {"queries": [5]}))
    assert json.loads(front.to_json())["data"] == {"queries": [5]}


def test_a_measured_front_holds_its_hypervolume_and_its_regret():
    front = measured()
    weights, main, auxiliary = front.tensors()
    assert torch.equal(weights, weight_grid(2)) and main.shape == (11,)
    assert front.hypervolume == hypervolume(auxiliary, (0, 0), maximise=True)
    assert front.regret == pytest.approx(0, abs=1e-15) and front.steerability["nondominated_fraction"] == 1
    worse = measured(auxiliary_values=auxiliary.flip(0))
    assert worse.regret > 0.1 and worse.hypervolume == pytest.approx(front.hypervolume)


def test_a_measured_front_of_losses_is_minimised():
    points = torch.tensor([[0.5, 1.0], [1.0, 0.5]])
    front = measured(
        weights=[[1.0, 0.0], [0.0, 1.0]],
        main_values=[0.1, 0.2],
        auxiliary_values=points,
        reference_point=[1.1, 1.1],
        maximise=False,
        reference_front=points,
    )
    assert front.hypervolume == pytest.approx(0.6 * 0.1 * 2 - 0.1 * 0.1) and front.regret == 0
    assert front.steerability["igd_plus"] == 0 and Front.from_json(front.to_json()).maximise is False


def test_a_model_without_weights_has_points_without_weights():
    base = measured(weights=None, main_values=[0.4], auxiliary_values=[[0.5, 0.5]])
    assert base.points == [Point([], 0.4, [0.5, 0.5])] and base.regret is None and base.hypervolume == 0.25
    assert Front.from_json(base.to_json()) == base


def test_saving_replaces_the_file_whole_and_keeps_the_old_one_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "front.json"
    front = example()
    front.save(path)
    assert Front.load(path) == front
    broken = copy.deepcopy(front)
    broken.points[0].main = math.nan
    with pytest.raises(ValueError, match=r"points\[0\].main is nan"):
        broken.save(path)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("mopl.pareto.front.os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        example(method="other").save(path)
    assert Front.load(path) == front and [p.name for p in tmp_path.iterdir()] == ["front.json"]


def test_errors_of_a_file_begin_with_its_path(tmp_path):
    path = tmp_path / "front.json"
    path.write_text(SCHEMA.replace('"seed": 0, ', ""))
    with pytest.raises(ValueError, match=re.escape(f"{path}: seed is missing")):
        Front.load(path)
    path.write_text(SCHEMA[:50])
    with pytest.raises(ValueError, match="is not JSON"):
        Front.load(path)


GOOD_POINT = {"weights": [0.25, 0.75], "main": 0.5, "auxiliary": [0.5, 0.25], "interval": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": 3}, "method is 3 but must be a string"),
        ({"objectives": []}, r"objectives is \[\]"),
        ({"points": []}, r"points is \[\] but must be at least one point"),
        ({"points": {}}, "points must be a list"),
        ({"points": [3]}, r"points\[0\] must be an object, got int"),
        (
            {"points": [GOOD_POINT, GOOD_POINT | {"weights": [0.5, 0.6]}]},
            r"points\[1\].weights = \(0.5, 0.6\).*sum to 1",
        ),
        ({"points": [GOOD_POINT | {"weights": [1.0]}]}, r"points\[0\].weights is \[1.0\] but must be a list of 2"),
        ({"points": [GOOD_POINT | {"auxiliary": [0.1, "x"]}]}, r"points\[0\].auxiliary\[1\] is 'x'"),
        ({"points": [GOOD_POINT | {"auxiliary": [0.1, True]}]}, r"points\[0\].auxiliary\[1\] is True"),
        ({"points": [GOOD_POINT | {"scale": 0}]}, r"points\[0\].scale is 0"),
        (
            {"points": [GOOD_POINT | {"interval": {"main": [2, 1]}}]},
            r"points\[0\].interval.main is \[2, 1\].*low <= high",
        ),
        ({"points": [GOOD_POINT | {"interval": {"auxiliary": [[0, 1]]}}]}, r"interval.auxiliary is .* list of 2"),
        ({"points": [GOOD_POINT | {"interval": {"auxiliary": [None, [1]]}}]}, r"interval.auxiliary\[1\] is \[1\]"),
        ({"points": [GOOD_POINT | {"interval": {"mean": [0, 1]}}]}, r"interval.mean is not a key"),
        ({"points": [GOOD_POINT | {"note": 1}]}, r"points\[0\].note is not a key of front.json"),
        ({"hypervolume": -1}, "hypervolume is -1"),
        ({"seconds": None}, "seconds is None"),
        ({"reference_point": [0]}, r"reference_point is \[0\] but must be a list of 2"),
        ({"parameters": 1.5}, "parameters is 1.5 but must be an integer"),
        ({"seed": True}, "seed is True"),
        ({"data": None}, "data is None"),
        ({"maximise": [True]}, r"maximise is \[True\]"),
        ({"interval": {"hypervolume": [0]}}, r"interval.hypervolume is \[0\]"),
        ({"regret": "low"}, "regret is 'low'"),
        ({"steerability": []}, "steerability is"),
        ({"hypervolumes": 1}, "hypervolumes is not a key of front.json; known are method, objectives"),
    ],
)
def test_a_wrong_key_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        example(**change)


@pytest.mark.parametrize("key", list(json.loads(SCHEMA)))
def test_a_missing_key_is_named(key):
    content = json.loads(SCHEMA)
    del content[key]
    with pytest.raises(ValueError, match=f"^{key} is missing"):
        Front.from_json(json.dumps(content))


def test_a_missing_key_of_a_point_is_named():
    point = {name: value for name, value in GOOD_POINT.items() if name != "main"}
    with pytest.raises(ValueError, match=r"^points\[0\].main is missing"):
        example(points=[point])


def test_not_a_number_never_gets_into_the_file():
    with pytest.raises(ValueError, match="point 10 of auxiliary_values"):
        measured(auxiliary_values=torch.full((11, 2), 0.5).index_fill(0, torch.tensor([10]), math.nan))
    with pytest.raises(ValueError, match=r"points\[4\].main is nan"):
        measured(main_values=torch.ones(11).index_fill(0, torch.tensor([4]), math.nan))
    front = example()
    front.steerability = {"spacing": math.nan}
    with pytest.raises(ValueError, match="steerability cannot be written as JSON"):
        front.to_json()


def test_measured_columns_must_have_one_entry_a_point():
    with pytest.raises(ValueError, match="11 auxiliary_values, 3 main_values"):
        measured(main_values=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="weights has 2 rows"):
        measured(weights=weight_grid(2, 2))
