"""Ranking data in memory: labels, targets, padding, splits, batches, normalisation, and the data set travel."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from torch import Tensor

from mopl.ranking.batch import Batch
from mopl.ranking.data import RankingData
from mopl.ranking.loading import load
from mopl.ranking.methods import Batches
from mopl.ranking.normalization import METHODS, FeatureNormalizer
from mopl.ranking.objectives import MSLR_OBJECTIVES, Objective, parse_objective, parse_objectives
from mopl.ranking.travel import travel


def make(lengths=(3, 1, 5, 2), columns=4, seed=0, specs="a=1,b=2:min,c=3:softmax:scale=2,d=4:softmax:min", **changes):
    """Data of random lists; labels of c are partly negative, d has large numbers."""
    g = torch.Generator().manual_seed(seed)
    items = sum(lengths)
    objectives = parse_objectives(specs)
    raw = torch.rand(items, len(objectives), generator=g) * torch.tensor([5.0, 40.0, 6.0, 3.0])[: len(objectives)]
    raw -= torch.tensor([0.0, 0.0, 3.0, 0.0])[: len(objectives)]
    raw[:, 0] = raw[:, 0].floor()
    fields = {
        "features": torch.randn(items, columns, generator=g),
        "raw_main": torch.randint(0, 5, (items,), generator=g).float(),
        "raw_auxiliary": raw,
        "offsets": torch.tensor([0, *np.cumsum(lengths)]),
        "query_ids": torch.arange(100, 100 + len(lengths)),
        "main": Objective("relevance"),
        "objectives": objectives,
    }
    return RankingData(**(fields | changes))


def equal(one: Batch, two: Batch) -> bool:
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a is b for a, b in pairs)


# --- objectives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "objective"),
    [
        ("clicks=134", Objective("clicks", column=134)),
        ("quality=132:softmax", Objective("quality", normalize="softmax", column=132)),
        ("price=7:min", Objective("price", maximise=False, column=7)),
        ("dwell=@dwell.txt", Objective("dwell", path="dwell.txt")),
        ("a=@{split}.a.txt:softmax:scale=std", Objective("a", True, "softmax", None, "{split}.a.txt", "std")),
        (" x=3:max:l1 ", Objective("x", column=3)),
        ("x=3:scale=2.5:softmax:min", Objective("x", False, "softmax", 3, None, 2.5)),
        ("url_clicks", MSLR_OBJECTIVES["url_clicks"]),
    ],
)  # fmt: skip
def test_objectives_are_read_from_text(spec, objective):
    assert parse_objective(spec) == objective
    assert Objective(**json.loads(json.dumps(objective.to_dict()))) == objective


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("url_click", r"'url_click' has no source \(did you mean url_clicks\?\); write NAME=COLUMN or NAME=@FILE"),
        ("clicks", "objective 'clicks' has no source; write NAME=COLUMN"),  # somebody's own, not MSLR's url_clicks
        ("price", "objective 'price' has no source; write NAME=COLUMN or NAME=@FILE, then any of"),
        ("clicks=x", "the source 'x', not a column number or @FILE"),
        ("clicks=@", "the source '@'"),
        ("clicks=-1", "the source '-1'"),
        ("clicks=0", "column of objective 'clicks' is 0 but columns are counted from 1"),
        ("=3", "objective name '' is empty"),
        ("clicks=3:up", "unknown option 'up'"),
        ("clicks=3:min:max", "says maximise twice"),
        ("clicks=3:scale=x", "the scale 'x', not a number"),
        ("clicks=3:scale=0", "scale of objective 'clicks' is 0.0 but must be a number above 0"),
        ("clicks=3:scale=nan", "must be a number above 0"),
        (
            "clicks=3:min:scale=std",
            r"scale of objective 'clicks' is 'std' but must be left out under l1, .*; add sof",
        ),
        (
            "clicks=3:l1:scale=1",
            r"is 1.0 but must be left out .*add softmax \(:softmax:scale=1.0\), or leave scale out",
        ),
        ("a=1,b=2,a=3", "two objectives have the same name"),
        ("", "no auxiliary objective"),
    ],
)
def test_malformed_objectives_say_how_to_write_them(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_objectives(spec)


def test_a_minimised_objective_is_turned_within_its_list():
    """labels = max - raw under both normalisations; for softmax that is softmax(-raw), as shifts do not matter."""
    raw = torch.tensor([[3.0, 3.0], [1.0, 1.0], [7.0, 7.0], [4.0, 4.0], [4.0, 4.0]])
    data = make((3, 2), specs="l=1:min,s=2:min:softmax:scale=2", raw_auxiliary=raw)
    assert data.labels[:, 0].tolist() == data.labels[:, 1].tolist() == [4, 6, 0, 0, 0]
    torch.testing.assert_close(data.targets[:3, 0], torch.tensor([0.4, 0.6, 0.0]))
    torch.testing.assert_close(data.targets[:3, 1], torch.softmax(-raw[:3, 1] / 2, 0))
    assert data.targets[3:, 0].tolist() == [0, 0]  # all equal: no mass, so no preference under l1
    assert data.targets[3:, 1].tolist() == [0.5, 0.5]


def test_negative_labels_of_a_softmax_objective_become_gains_and_keep_their_targets():
    raw = torch.tensor([[-2.0], [1.0], [0.5], [0.25]])
    data = make((2, 2), specs="q=1:softmax", raw_auxiliary=raw)
    assert data.labels[:, 0].tolist() == [0, 3, 0.5, 0.25]  # lists without negatives stay as they are
    torch.testing.assert_close(
        data.targets[:, 0], torch.cat([torch.softmax(raw[:2, 0], 0), torch.softmax(raw[2:, 0], 0)])
    )


def test_targets_sum_to_one_in_every_list_that_has_mass():
    data = make((4, 1, 7, 3), seed=3)
    zeroed = data.raw_auxiliary.clone()
    zeroed[4, 0] = 2
    zeroed[5:12, 0] = 0
    data = dataclasses.replace(data, raw_auxiliary=zeroed)
    sums = torch.zeros(4, 4).index_add_(0, data.owner, data.targets)
    wanted = torch.ones(4, 4)
    wanted[2, 0] = 0
    wanted[1, 1] = 0  # a single item that is minimised is its own worst
    torch.testing.assert_close(sums, wanted)


def test_extreme_labels_make_finite_targets():
    raw = torch.tensor([[3e38, 1e-45], [2e38, 0.0], [0.0, 0.0]])
    data = make((3,), specs="big=1,tiny=2", raw_auxiliary=raw)
    torch.testing.assert_close(data.targets, torch.tensor([[0.6, 1.0], [0.4, 0.0], [0.0, 0.0]]))
    soft = make((3,), specs="big=1:softmax,tiny=2:softmax", raw_auxiliary=raw)
    assert soft.targets[:, 0].tolist() == [1, 0, 0]


def test_std_scales_are_those_within_lists_of_the_training_split():
    train, other = make((40, 60), specs="a=1:softmax:scale=std"), make((5, 5), seed=9, specs="a=1:softmax:scale=std")
    with pytest.raises(ValueError, match=r"scale='std', .*resolve_scales\(train\)"):
        _ = other.targets
    resolved = other.resolve_scales(train)
    first, second = train.raw_auxiliary[:, 0].split((40, 60))
    within = torch.cat([first - first.mean(), second - second.mean()]).square().mean().sqrt()
    assert resolved.objectives[0].scale == pytest.approx(within.item(), rel=1e-6)
    constant = dataclasses.replace(train, raw_auxiliary=torch.ones(100, 1))
    assert constant.resolve_scales(constant).objectives[0].scale == 1.0


# --- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_holds_its_lists_and_zeros():
    data = make()
    batch = data.batch([2, 0, 1], order=True)
    assert (
        batch.features.shape == (3, 5, 4)
        and batch.labels.shape == (3, 4, 5)
        and batch.mask.sum(1).tolist() == [5, 3, 1]
    )
    for row, q in enumerate((2, 0, 1)):
        start, stop = data.offsets[q : q + 2].tolist()
        n = stop - start
        torch.testing.assert_close(batch.features[row, :n], data.features[start:stop], rtol=0, atol=0)
        torch.testing.assert_close(batch.labels[row, :, :n], data.labels[start:stop].T, rtol=0, atol=0)
        torch.testing.assert_close(batch.targets[row, :, :n], data.targets[start:stop].T, rtol=0, atol=0)
        torch.testing.assert_close(batch.main[row, :n], data.main_labels[start:stop], rtol=0, atol=0)
        for value in (
            batch.features[row, n:],
            batch.labels[row, :, n:],
            batch.main[row, n:],
            batch.main_targets[row, n:],
        ):
            assert not value.any()
        assert batch.mask[row].tolist() == [True] * n + [False] * (5 - n)
    assert torch.equal(data.pad(data.raw_main, [2, 0, 1]), data.batch([2, 0, 1]).main)
    assert torch.equal(data.pad(data.labels, [2, 0, 1])[batch.mask], data.labels[data.items_of([2, 0, 1])])


def test_presorted_orders_sort_the_labels_and_keep_masked_places_last():
    data = make((7, 2, 4), seed=5)
    batch = data.batch([1, 0, 2], order=True)
    assert batch.order.shape == batch.labels.shape
    for row in range(3):
        for j in range(4):
            places, n = batch.order[row, j].tolist(), int(batch.mask[row].sum())
            assert sorted(places) == list(range(7)) and places[n:] == list(range(n, 7))
            found = batch.labels[row, j][batch.order[row, j]][:n]
            assert bool((found.diff() <= 0).all())
            ties = [
                (a, b) for a, b in itertools.pairwise(places[:n]) if batch.labels[row, j, a] == batch.labels[row, j, b]
            ]
            assert all(a < b for a, b in ties)  # equal labels stay in the order of the file


def test_padding_to_a_width_changes_nothing_but_zeros():
    data = make()
    narrow, wide = data.batch([0, 3], order=True), data.batch([0, 3], width=9, order=True)
    assert wide.features.shape == (2, 9, 4)
    assert torch.equal(wide.labels[..., :3], narrow.labels) and not wide.labels[..., 3:].any()
    assert torch.equal(wide.order[..., :3], narrow.order) and wide.order[0, 0, 3:].tolist() == list(range(3, 9))
    with pytest.raises(ValueError, match="width is 2 but a list of this batch has 3 items"):
        data.batch([0], width=2)


def test_sequential_gives_every_list_once():
    data = make((2,) * 11)
    assert [b.queries.tolist() for b in data.sequential(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_any_step_can_be_had_at_any_time():
    data = make(tuple(np.random.default_rng(0).integers(1, 9, 23)))
    source = Batches(data, 5, seed=5)
    run = [source(step) for step in range(30)]
    assert all(equal(Batches(data, 5, seed=5)(step), run[step]) for step in (29, 0, 7, 22))
    assert any(not equal(Batches(data, 5, seed=6)(step), run[step]) for step in range(30))


def test_every_list_is_used_equally_often():
    data = make(tuple(np.random.default_rng(0).integers(1, 9, 20)))
    source = Batches(data, 5, seed=0)
    for epoch in range(3):
        used = torch.cat([source(4 * epoch + i).queries for i in range(4)])
        assert sorted(used.tolist()) == list(range(20))
    assert not torch.equal(source(0).queries, source(4).queries)


def test_parts_of_a_batch_make_up_the_batch():
    data = make((2,) * 12)
    source = Batches(data, 5, seed=2)
    for step in range(4):
        parts = [source(step, rank, 3).queries.tolist() for rank in range(3)]
        assert [q for part in parts for q in part] == source(step).queries.tolist()


def test_a_batch_never_has_more_lists_than_the_data():
    source = Batches(make(), 64, seed=0)
    assert source.batch_size == 4 and sorted(source(3).queries.tolist()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="must be at least 1"):
        Batches(make(), 0, seed=0)(0)


# --- splits, subsets, checks ----------------------------------------------------------------------------------------


def test_splits_are_by_query_disjoint_and_repeatable():
    data = make(tuple(np.random.default_rng(1).integers(1, 9, 50)))
    parts = data.split(seed=3)
    assert [len(p) for p in parts] == [30, 10, 10] and [p.name for p in parts] == [
        "data:train",
        "data:valid",
        "data:test",
    ]
    assert sorted(torch.cat([p.query_ids for p in parts]).tolist()) == list(range(100, 150))
    for part in parts:
        for i, q in enumerate((part.query_ids - 100).tolist()):
            assert torch.equal(part.features[part.items_of([i])], data.features[data.items_of([q])])
            assert torch.equal(part.targets[part.items_of([i])], data.targets[data.items_of([q])])
    assert [p.fingerprint for p in data.split(seed=3)] == [p.fingerprint for p in parts]
    assert data.split(seed=4)[0].fingerprint != parts[0].fingerprint
    assert [len(p) for p in data.split((0.5, 0.5))] == [25, 25]
    with pytest.raises(ValueError, match="must be above 0 and sum to 1"):
        data.split((0.5, 0.4))
    with pytest.raises(
        ValueError, match=r"has 4 queries, too few to be split into shares of 0\.98, 0\.01, 0\.01; give"
    ):
        make().split((0.98, 0.01, 0.01))
    for queries in (1, 2, 3):
        with pytest.raises(ValueError, match="give at least 4 queries, or a file for each of train, valid and test"):
            make((2,) * queries).split()
    assert all(min(map(len, make((2,) * queries).split())) for queries in range(4, 20))


def test_fingerprints_see_every_part_of_the_data():
    data = make()
    seen = {data.fingerprint}
    for change in (
        {"features": data.features + 1e-6},
        {"raw_main": data.raw_main + 1},
        {"raw_auxiliary": data.raw_auxiliary * 1.5},
        {"offsets": torch.tensor([0, 2, 4, 9, 11])},
        {"query_ids": data.query_ids + 1},
        {"objectives": (dataclasses.replace(data.objectives[0], maximise=False), *data.objectives[1:])},
        {"main": Objective("relevance", normalize="softmax")},
    ):
        seen.add(dataclasses.replace(data, **change).fingerprint)
    assert len(seen) == 8 and make().fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"raw_main": torch.zeros(3)}, r"raw_main has shape \(3,\) but must be \(11,\): 11 items, 4 lists"),
        ({"raw_auxiliary": torch.zeros(11, 3)}, r"raw_auxiliary has shape \(11, 3\) but must be \(11, 4\)"),
        ({"offsets": torch.tensor([0, 3, 3, 9, 11])}, "query 101 of data has no documents"),
        ({"offsets": torch.tensor([0, 3, 2, 9, 11])}, "must rise from 0"),
        ({"offsets": torch.tensor([0, 3, 4, 9, 12])}, "must rise from 0 to the number of items, 11"),
        ({"features": torch.full((11, 4), torch.nan)}, "feature 1 of data, query 100, item 1 is nan"),
        ({"raw_main": torch.tensor([0.0] * 9 + [torch.inf, 0])}, "main label of data, query 103, item 1 is inf"),
        ({"raw_auxiliary": torch.full((11, 4), -1.0)}, r"label -1 of objective 'a' \(data, query 100, item 1\)"),
        ({"raw_main": torch.full((11,), -1.0)}, "label -1 of objective 'relevance' .*; .* add one number to all of"),
        ({"feature_names": ("x",)}, "1 feature_names for 4 features"),
        ({"objectives": ()}, "no auxiliary objective"),
    ],
)  # fmt: skip
def test_bad_data_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_statistics_count_what_is_there():
    data = make(
        (2, 1, 3), specs="a=1,b=2:min", raw_auxiliary=torch.tensor([[0.0, 1], [0, 1], [2, 5], [0, 1], [1, 2], [8, 3]])
    )
    s = data.statistics()
    assert (s["queries"], s["items"], s["items_per_query"], s["single_item_queries"]) == (3, 6, [1, 2.0, 3], 1)
    assert s["objectives"]["a"]["positive_items"] == pytest.approx(3 / 6)
    assert s["objectives"]["a"]["empty_queries"] == pytest.approx(1 / 3) and s["objectives"]["a"]["largest"] == 8
    assert s["objectives"]["b"]["empty_queries"] == pytest.approx(2 / 3) and s["objectives"]["b"]["direction"] == "min"
    whole, _, a, b = data.describe().split("\n")
    assert "3 queries, 6 items (1 to 3 a query, mean 2.0)" in whole
    # Of the labels as they stand in the file: who reads a price of 5 there looks for it here.
    assert (
        a
        == "  auxiliary a (max, l1): 0 to 8, 4 values; 50.0% of the items above 0, 33.3% of the queries without labels"
    )
    assert b == "  auxiliary b (min, l1): 1 to 5, 4 values; 66.7% of the queries with equal labels only"
    json.dumps(s)
    negative = make((2, 2), specs="q=1:softmax", raw_auxiliary=torch.tensor([[-2.0], [1.0], [3.0], [3.0]])).describe()
    assert negative.endswith("q (max, softmax): -2 to 3, 3 values; 50.0% of the queries with equal labels only")


# --- normalisation --------------------------------------------------------------------------------------------------


def normalized(name, train, *others):
    normalizer = FeatureNormalizer.fit(name, train.features)
    return [part.normalized(normalizer) for part in (train, *others)]


def test_global_normalization_is_measured_on_the_training_split_alone():
    train, test = make((50, 50), columns=20), make((30,), columns=20, seed=1)
    shifted = dataclasses.replace(test, features=test.features * 7 + 3)
    a, b = normalized("global", train, shifted)
    torch.testing.assert_close(a.features.mean(0), torch.zeros(20), atol=1e-6, rtol=0)
    torch.testing.assert_close(a.features.std(0, correction=0), torch.ones(20))
    mean, std = train.features.double().mean(0), train.features.double().std(0, correction=0)
    torch.testing.assert_close(b.features, ((shifted.features - mean) / std).float())
    restored = FeatureNormalizer("global", **a.normalizer.tensors())
    assert torch.equal(shifted.normalized(restored).features, b.features)


@pytest.mark.parametrize("name", ["query", "query-minmax", "log1p+query"])
def test_query_normalization_sees_one_list_only(name):
    data = make((6, 1, 40), columns=18)
    whole = normalized(name, data)[0].features
    alone = normalized(name, data.subset([0]))[0].features
    torch.testing.assert_close(alone, whole[:6], rtol=1e-6, atol=1e-7)
    assert not whole[6].any()  # a single item is at its own mean, and at the foot of its own range
    first, last = whole[:6], whole[7:]
    for part in (first, last):
        if "minmax" in name:
            assert torch.equal(part.amin(0), torch.zeros(18)) and torch.equal(part.amax(0), torch.ones(18))
        else:
            torch.testing.assert_close(part.mean(0), torch.zeros(18), atol=1e-6, rtol=0)
            torch.testing.assert_close(part.std(0, correction=0), torch.ones(18))


def test_log1p_keeps_signs_and_order_and_tames_tails():
    features = torch.tensor([[0.0, -1e9], [1e9, -1.0], [1.0, 3.0]])
    data = make((3,), columns=2)
    out = normalized("log1p", dataclasses.replace(data, features=features))[0].features
    torch.testing.assert_close(out, features.sign() * features.abs().double().log1p().float())
    log, plain = make((3,), columns=2), make((3,), columns=2)
    log = normalized("log1p+global", dataclasses.replace(log, features=features))[0].features
    plain = normalized("global", dataclasses.replace(plain, features=out))[0].features
    torch.testing.assert_close(log, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [*METHODS, *(f"log1p+{m}" for m in METHODS[1:])])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e7, 3e38])
def test_constant_features_are_harmless(name, value):
    data = make((30, 7, 1))
    features = data.features.clone()
    features[:, 2] = value
    out = normalized(name, dataclasses.replace(data, features=features))[0].features
    assert bool(torch.isfinite(out).all())
    if name != "none":
        torch.testing.assert_close(out[:, 2], torch.zeros(38), atol=1e-6, rtol=0)


def test_normalization_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="normalization is 'zscore' but must be one of none, global, query"):
        FeatureNormalizer.fit("zscore", torch.zeros(3, 2))
    with pytest.raises(ValueError, match="normalization is None but must be one of none"):
        FeatureNormalizer.fit(None, torch.zeros(3, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs shift and scale"):
        FeatureNormalizer("global")
    data = make()
    done = normalized("global", data)[0]
    with pytest.raises(ValueError, match="has gone through normalization 'global' already"):
        done.normalized(FeatureNormalizer("query"))
    with pytest.raises(ValueError, match="has 3 columns but normalization 'global' was measured on 4"):
        make(columns=3).normalized(done.normalizer)


def test_splits_of_the_front_door_do_not_leak_into_the_normalization():
    """Changing the features of the test lists changes nothing in the training split."""
    pytest.importorskip("statsmodels")
    parts = travel().split(seed=0)
    train, _, test = load("travel", seed=0)
    wanted = FeatureNormalizer.fit("global", parts[0].features)
    torch.testing.assert_close(train.normalizer.shift, wanted.shift, rtol=0, atol=0)
    torch.testing.assert_close(test.features, wanted(parts[2].features, parts[2].offsets), rtol=0, atol=0)
    assert [o.scale for o in test.objectives] == [o.scale for o in parts[0].resolve_scales(parts[0]).objectives]


# --- travel and the front door --------------------------------------------------------------------------------------


def test_travel_reaches_greenes_conditional_logit():
    """Greene, Econometric Analysis, 7th edition, table 18.3 (statsmodels' reference values), by our listwise loss."""
    pytest.importorskip("statsmodels")
    data = travel("conditional_logit")
    data = data.resolve_scales(data)
    assert data.feature_names == ("asc_air", "asc_train", "asc_bus", "gc", "ttme", "hinc_x_air")
    batch = data.batch(range(210))
    features, targets = batch.features.double(), batch.main_targets.double()
    scale = features.abs().amax((0, 1))
    beta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [beta], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def nll() -> Tensor:
        optimizer.zero_grad()
        loss = -(targets * torch.log_softmax(features @ (beta / scale), dim=1)).sum()
        loss.backward()
        return loss

    optimizer.step(nll)
    estimates = (beta / scale).detach().tolist()
    wanted = [5.2074, 3.8690, 3.1632, -0.0155, -0.0961, 0.0133]
    assert estimates == pytest.approx(wanted, abs=5.1e-5)
    assert -nll().item() == pytest.approx(-199.1284, abs=5e-5)


def test_travel_inputs_determine_no_objective():
    """The labels of an objective are no linear function of the inputs, within lists; waiting is one of Greene's."""
    pytest.importorskip("statsmodels")

    def unexplained(data: RankingData, j: int) -> float:
        x = data.pad(data.features.double(), range(210))
        y = data.pad(data.raw_auxiliary[:, j].double(), range(210))
        x, y = (x - x.mean(1, keepdim=True)).flatten(0, 1), (y - y.mean(1, keepdim=True)).flatten()
        return float(
            (y - x @ torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]).square().sum() / y.square().sum()
        )

    for j in range(3):
        assert unexplained(travel(), j) > 0.03
    assert unexplained(travel("conditional_logit"), 2) < 1e-9


def test_travel_objectives_turn_towards_less():
    pytest.importorskip("statsmodels")
    data = travel().resolve_scales(travel())
    batch = data.batch(range(210))
    assert batch.mask.all() and batch.features.shape == (210, 4, 10) and batch.labels.shape == (210, 3, 4)
    raw = data.pad(data.raw_auxiliary, range(210)).movedim(-1, 1)
    assert torch.equal(batch.labels.argmax(-1), raw.argmin(-1))
    assert bool((batch.targets > 0).all()) and bool((batch.main.sum(1) == 1).all())
    assert bool((batch.labels[:, 2].argmax(-1) == 3).all())  # nobody waits for a car
    best = {
        o.name: batch.labels[:, j].argmax(-1).bincount(minlength=4).argmax().item()
        for j, o in enumerate(data.objectives)
    }
    assert len(set(best.values())) >= 2  # the objectives do not all want the same mode


def test_the_front_door_selects_objectives_and_options():
    pytest.importorskip("statsmodels")
    train, valid, test = load("travel", objectives="fast,cheap")
    assert [o.name for o in train.objectives] == ["fast", "cheap"] and (len(train), len(valid), len(test)) == (
        126,
        42,
        42,
    )
    whole = load("travel")[0]
    assert torch.equal(train.labels, whole.labels[:, [1, 0]])
    assert load("travel", normalization="none")[0].features[:, 3].max() > 100
    assert load("travel:features=conditional_logit")[0].num_features == 6
    train, _, _ = load("synthetic:queries=50,objectives=3,features=8", objectives=["aux3", "aux1"])
    assert train.truth is not None and train.truth.log_probs.shape == (train.num_items, 2) and len(train) == 30
    assert (
        train.fingerprint == load("synthetic:queries=50,objectives=3,features=8", objectives="aux3,aux1")[0].fingerprint
    )
    assert (
        train.fingerprint
        != load("synthetic:queries=50,objectives=3,features=8", objectives="aux3,aux1", seed=1)[0].fingerprint
    )


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ("travel:modes=3", {}, ValueError, "'travel' has no option modes; its options are features"),
        ("synthetic:queries", {}, ValueError, "has the option 'queries'; write KEY=VALUE"),
        (
            "synthetic:queries=many",
            {},
            ValueError,
            "option queries of data 'synthetic' is 'many' but must be of type int",
        ),
        (
            "travel:features=all",
            {},
            ValueError,
            "features is 'all' but must be one of 'situation', 'conditional_logit'",
        ),
        ("travel", {"objectives": "slow"}, ValueError, "objective 'slow' is unknown; travel has cheap, fast, waiting"),
        ("travel", {"normalization": "x"}, ValueError, "normalization is 'x'"),
        ("nowhere", {}, FileNotFoundError, "nowhere: there is no such file or folder"),
    ],
)
def test_the_front_door_says_what_it_cannot_do(data, options, error, message):
    if data == "travel":
        pytest.importorskip("statsmodels")
    with pytest.raises(error, match=message):
        load(data, **options)


def test_missing_statsmodels_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "statsmodels", None)
    with pytest.raises(ImportError, match=r"needs statsmodels, .* run: pip install .*\[demo\]'"):
        travel()
