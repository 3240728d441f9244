"""NDCG against other people's implementations and against brute force; bootstrap against theory."""

import itertools
import math

import numpy as np
import pytest
import torch

from mopl.pareto import bootstrap_interval, bootstrap_means, hypervolume
from mopl.ranking.metrics import ndcg


def ragged(seed=0, batch=12, length=15, levels=4):
    """Ragged lists with many tied scores, graded labels, a list without relevant documents and a one-document list."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (batch, length), generator=g).float()
    labels = torch.randint(0, 5, (batch, length), generator=g)
    sizes = torch.randint(2, length + 1, (batch,), generator=g)
    sizes[1] = 1
    labels[2] = 0
    return scores, labels, torch.arange(length) < sizes[:, None]


def dcg_of(gains, discounts, k):
    return sum(g * d for g, d in list(zip(gains, discounts, strict=False))[:k])


LOG2 = [1 / math.log2(rank + 1) for rank in range(1, 100)]


@pytest.mark.parametrize("k", [1, 3, 10, None])
def test_linear_ndcg_with_averaged_ties_is_sklearns(k):
    from sklearn.metrics import ndcg_score

    scores, labels, mask = ragged()
    result = ndcg(scores, labels, k=k, empty=0, mask=mask)
    for b in range(len(scores)):
        there = mask[b]
        if there.sum() > 1:  # scikit-learn refuses lists of one document
            theirs = ndcg_score(labels[b, there][None].numpy(), scores[b, there][None].numpy(), k=k)
            assert result.values[b].item() == pytest.approx(theirs, abs=1e-14)


def test_exponential_ndcg_with_averaged_ties_is_sklearns_on_two_to_the_label_minus_one():
    from sklearn.metrics import ndcg_score

    scores, labels, _ = ragged(1)
    theirs = ndcg_score((2.0**labels - 1).numpy(), scores.numpy(), k=10)
    assert ndcg(scores, labels, gain="exponential", empty=0).mean().item() == pytest.approx(theirs, abs=1e-14)


def groups_of(scores, labels, mask):
    flat = mask.reshape(-1)
    return scores.reshape(-1)[flat].numpy(), labels.reshape(-1)[flat].numpy(), mask.sum(1).tolist()


@pytest.mark.parametrize("gain", ["exponential", "linear"])
@pytest.mark.parametrize("empty", [0, 1])
def test_ndcg_with_first_come_ties_is_xgboosts(gain, empty):
    xgboost = pytest.importorskip("xgboost")
    scores, labels, mask = ragged(2)
    s, y, sizes = groups_of(scores, labels, mask)
    data = xgboost.DMatrix(np.zeros((len(s), 1), dtype=np.float32), label=y, base_margin=s)
    data.set_group(sizes)
    metric = "ndcg@5" if empty else "ndcg@5-"
    options = {"objective": "rank:ndcg", "eval_metric": metric, "ndcg_exp_gain": gain == "exponential"}
    theirs = float(xgboost.Booster(options, [data]).eval(data).split(":")[1])
    ours = ndcg(scores, labels, k=5, gain=gain, ties="first", empty=empty, mask=mask).mean().item()
    assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("gain", ["exponential", "linear"])
def test_ndcg_with_first_come_ties_is_lightgbms(gain):
    lightgbm = pytest.importorskip("lightgbm")
    scores, labels, mask = ragged(3)
    s, y, sizes = groups_of(scores, labels, mask)
    options = {"objective": lambda p, _: (np.zeros_like(p), np.ones_like(p)), "metric": "ndcg", "eval_at": [5]}
    options |= {"verbosity": -1, "num_threads": 1}
    if gain == "linear":
        options["label_gain"] = list(range(31))
    features = np.arange(float(len(s)))[:, None]  # zero gradients: no tree splits on it
    data = lightgbm.Dataset(features, label=y, group=sizes, init_score=s.astype(float))
    seen: dict = {}
    callbacks = [lightgbm.record_evaluation(seen)]
    lightgbm.train(options, data, num_boost_round=1, valid_sets=[data], callbacks=callbacks)
    theirs = seen["training"]["ndcg@5"][0]
    ours = ndcg(scores, labels, k=5, gain=gain, ties="first", empty=1, mask=mask).mean().item()
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_ndcg_by_the_rules_of_the_mslr_script():
    scores, labels, mask = ragged(4, batch=20)
    ours = ndcg(
        scores, labels, gain="exponential", discount="mslr", ties="first", empty=0, short_lists="zero", mask=mask
    )
    gains, discounts = (0, 1, 3, 7, 15), [1.0] + [1 / math.log2(rank) for rank in range(2, 100)]
    for b in range(len(scores)):
        items = [(s, gains[y]) for s, y, m in zip(scores[b].tolist(), labels[b].tolist(), mask[b], strict=True) if m]
        ranked = [gain for _, gain in sorted(items, key=lambda item: -item[0])]
        ideal = dcg_of(sorted(ranked, reverse=True), discounts, 10)
        value = dcg_of(ranked, discounts, 10) / ideal if ideal > 0 and len(items) >= 10 else 0.0
        assert ours.values[b].item() == pytest.approx(value, abs=1e-14)
    assert (mask.sum(1) < 10).any() and (ours.values > 0).any()


@pytest.mark.parametrize("ties", ["average", "worst", "first"])
def test_ties_are_the_mean_the_minimum_or_the_first_of_all_orders(ties):
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0, 0.0]])
    labels = torch.tensor([[0.5, 1.0, 3.0, 2.0, 0.0, 4.0]])
    values = []
    for order in itertools.permutations(range(6)):
        if all(scores[0, a] >= scores[0, b] for a, b in itertools.pairwise(order)):
            values.append(dcg_of([labels[0, i].item() for i in order], LOG2, 4))
    ideal = dcg_of(sorted(labels[0].tolist(), reverse=True), LOG2, 4)
    expected = {"average": sum(values) / len(values), "worst": min(values), "first": values[0]}[ties] / ideal
    assert len(values) == 12  # 3! x 2! orders; the first in lexicographic order is the order of the input
    assert ndcg(scores, labels, k=4, ties=ties).values.item() == pytest.approx(expected, abs=1e-14)


def test_worst_ties_differ_between_objectives():
    scores, labels = torch.zeros(1, 3), torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    assert ndcg(scores, labels, k=3, ties="worst").values.tolist() == [[0.5, 0.5]]
    assert ndcg(scores, labels, k=3, ties="first").values.tolist() == [[1.0, 0.5]]


def test_objectives_are_scored_one_by_one_on_one_ranking():
    scores, labels, mask = ragged(5)
    more = torch.stack([labels.float(), torch.rand(labels.shape), labels.float().flip(1)], 1)
    for ties in ("average", "first", "worst"):
        together = ndcg(scores, more, ties=ties, mask=mask)
        assert together.values.shape == (12, 3)
        for j in range(3):
            alone = ndcg(scores, more[:, j], ties=ties, mask=mask)
            torch.testing.assert_close(together.values[:, j], alone.values, rtol=0, atol=1e-15, equal_nan=True)
            assert torch.equal(together.empty[:, j], alone.empty)


def test_padding_changes_nothing_whatever_it_holds():
    scores, labels, mask = ragged(6)
    labels = labels.double()
    scores[0, mask[0]] = -torch.inf  # a document may have any score; it still stands before one that does not exist
    dirty_scores, dirty_labels = scores.clone(), labels.clone()
    dirty_scores[~mask] = torch.tensor([torch.nan, torch.inf, 9.0]).repeat(99)[: (~mask).sum()]
    dirty_labels[~mask] = torch.tensor([-1.0, torch.nan, torch.inf]).double().repeat(99)[: (~mask).sum()]
    for ties in ("average", "first", "worst"):
        result = ndcg(dirty_scores, dirty_labels, ties=ties, mask=mask)
        for b in range(len(scores)):
            alone = ndcg(scores[b : b + 1, mask[b]], labels[b : b + 1, mask[b]], ties=ties)
            torch.testing.assert_close(result.values[b : b + 1], alone.values, rtol=0, atol=1e-15, equal_nan=True)


def test_a_perfect_ranking_scores_one_and_one_document_scores_one():
    labels = torch.rand(5, 9)
    assert torch.equal(ndcg(labels, labels, k=None).values, torch.ones(5, dtype=torch.float64))
    assert ndcg(torch.tensor([[-3.0]]), torch.tensor([[0.25]])).values.item() == 1.0


def test_empty_queries_are_skipped_or_count_as_told_and_their_share_is_known():
    scores, labels = torch.rand(4, 3), torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 2, 1]])
    skipped, zero, one = (ndcg(scores, labels, empty=empty) for empty in ("skip", 0, 1))
    assert skipped.valid.tolist() == [False, True, False, True] and skipped.values.isnan().tolist() == [True, False] * 2
    assert skipped.empty_share.item() == 0.5 and "50.0%" in str(skipped) and "2 of 4" in str(skipped)
    assert skipped.mean().item() == pytest.approx(skipped.values[[1, 3]].mean().item())
    assert zero.mean().item() == pytest.approx(skipped.mean().item() / 2)
    assert one.mean().item() == pytest.approx(skipped.mean().item() / 2 + 0.5)
    assert one.valid.all() and one.empty.tolist() == skipped.empty.tolist()


def test_lists_without_documents_are_empty():
    everything_masked = ndcg(torch.rand(2, 3), torch.ones(2, 3), mask=torch.zeros(2, 3, dtype=torch.bool))
    no_columns = ndcg(torch.rand(2, 0), torch.ones(2, 4, 0))
    assert everything_masked.empty.all() and no_columns.empty.all() and no_columns.values.shape == (2, 4)


def test_gain_and_discount_may_be_functions():
    scores, labels, mask = ragged(7)
    mine = ndcg(scores, labels, gain=lambda z: 2**z - 1, discount=lambda r: 1 / torch.log2(r + 1), mask=mask)
    theirs = ndcg(scores, labels, gain="exponential", mask=mask)
    torch.testing.assert_close(mine.values, theirs.values, rtol=0, atol=1e-15, equal_nan=True)


def test_precision_of_the_input_does_not_limit_the_result():
    scores, labels = torch.arange(8.0)[None], torch.full((1, 8), 2.0**20)
    labels[0, 0] += 1
    expected = ndcg(scores.double(), labels.double(), k=None).values
    assert torch.equal(ndcg(scores, labels, k=None).values, expected) and expected.item() < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])}, "scores hold NaN in list 1"),
        ({"labels": torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])}, "labels hold NaN in list 1"),
        ({"labels": torch.tensor([[0.0, 1.0], [-1.0, 1.0]])}, "gains of list 1 are negative; shift"),
        (
            {"labels": torch.tensor([[0.0, 1.0], [2000.0, 1.0]]), "gain": "exponential"},
            "list 1 are not finite.*gain='linear'",
        ),
        ({"gain": "cubic"}, "gain is 'cubic'"),
        ({"discount": "log10"}, "discount is 'log10'"),
        ({"discount": lambda ranks: ranks[:1]}, "discount must return 2 finite factors"),
        ({"gain": lambda z: z.sum(-1)}, r"gain returned shape \(2, 1\)"),
        ({"ties": "best"}, "ties is 'best'"),
        ({"empty": 0.5}, "empty is 0.5"),
        ({"short_lists": "skip"}, "short_lists is 'skip'"),
        ({"k": 0}, "k is 0"),
        ({"labels": torch.ones(2, 3)}, r"labels has shape \(2, 1, 3\) but scores are \(2, 2\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"scores": torch.rand(2, 2), "labels": torch.rand(2, 2)} | change
    with pytest.raises(ValueError, match=message):
        ndcg(arguments.pop("scores"), arguments.pop("labels"), **arguments)


def test_bootstrap_is_deterministic_by_seed_and_does_not_move_global_generators():
    values, state = torch.rand(50, 3), torch.get_rng_state()
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    first, again, other = (bootstrap_interval(values, 0.9, 200, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.low, other.low) and torch.equal(first.estimate, other.estimate)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == before).all()
    assert (first.low < first.estimate).all() and (first.estimate < first.high).all()


def test_bootstrap_means_are_means_of_the_same_draws_in_every_column():
    values = torch.arange(1.0, 21.0)[:, None] * torch.tensor([1.0, -2.0])
    means = bootstrap_means(values, 300, seed=4)
    torch.testing.assert_close(means[:, 1], -2 * means[:, 0])
    assert abs(means[:, 0].mean().item() - 10.5) < 4 * math.sqrt(33.25 / 20 / 300)
    assert means[:, 0].var().item() == pytest.approx(33.25 / 20, rel=0.3)
    assert torch.equal(means * 20, (means * 20).round())  # sums of 20 drawn integers


def test_bootstrap_in_chunks_equals_bootstrap_in_one_piece():
    values = torch.rand(100_001, 1)  # 39 resamples a chunk
    means = bootstrap_means(values, 60, seed=0)
    draws = np.random.Generator(np.random.Philox(key=[0, 0])).integers(0, 100_001, size=(60, 100_001))
    torch.testing.assert_close(means[:, 0], values[:, 0].double()[torch.from_numpy(draws)].mean(1))


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    covered, repetitions = 0, 400
    data = torch.from_numpy(np.random.default_rng(0).exponential(size=(repetitions, 60)))
    for i in range(repetitions):
        interval = bootstrap_interval(data[i], 0.9, 200, seed=i)
        covered += bool(interval.low <= 1.0 <= interval.high)
    assert 0.83 < covered / repetitions < 0.94  # a percentile interval on 60 skewed values covers a little less


def test_bootstrap_takes_ratios_and_hypervolumes():
    rng = np.random.default_rng(1)
    per_query = torch.from_numpy(rng.uniform(size=(400, 5, 2)))
    ratio = bootstrap_interval(per_query[:, 0], statistic=lambda means: means[0] / means[1])
    assert ratio.low < 1 < ratio.high and ratio.estimate.shape == ()
    own_error = (ratio.high - ratio.low).item()
    assert own_error == pytest.approx(2 * 1.96 * math.sqrt(2 / 12 / 400) / 0.5, rel=0.2)  # the delta method
    volume = bootstrap_interval(per_query, samples=200, statistic=lambda m: hypervolume(m, [0, 0], maximise=True))
    assert volume.estimate.item() == hypervolume(per_query.mean(0), [0, 0], maximise=True)
    assert volume.low < volume.high


def test_bootstrap_leaves_skipped_queries_out_of_their_column_only():
    values = torch.rand(30, 2)
    values[::2, 0] = torch.nan
    interval = bootstrap_interval(values, samples=100)
    torch.testing.assert_close(interval.estimate, torch.stack([values[1::2, 0].mean(), values[:, 1].mean()]).double())
    full = bootstrap_means(torch.where(values.isnan(), 0.0, values), 100)
    share = bootstrap_means(~values.isnan(), 100)
    torch.testing.assert_close(bootstrap_means(values, 100), full / share)


def test_a_resample_without_any_valid_query_is_left_out():
    values = torch.full((3, 1), torch.nan)
    values[0] = 0.5
    assert bootstrap_means(values, 100).isnan().any()
    interval = bootstrap_interval(values, samples=100)
    assert interval == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(0, 2),), "at least one query"),
        ((torch.tensor([[1.0, torch.nan], [2.0, torch.nan]]),), "column 1 of values has no query that counts"),
        ((torch.tensor([1.0, torch.inf]),), "infinite entry in row 1"),
        ((torch.rand(3), 1.5), "level is 1.5"),
        ((torch.rand(3), 0.9, 0), "samples is 0"),
    ],
)
def test_bad_bootstrap_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(*arguments)
