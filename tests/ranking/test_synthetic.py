"""The generated data set: what it looks like, and that its known optimum is the optimum."""

import pytest
import torch

from mopl.ranking.loading import load
from mopl.ranking.metrics import ndcg
from mopl.ranking.synthetic import distance_to_optimum, expected_losses, synthetic, true_mixture, true_scores
from mopl.ranking.travel import travel

WEIGHTS = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.05, 0.9, 0.05]], dtype=torch.float64)


def listwise_losses(data, scores, beta, reference):
    """(Q, m): the l1 listwise loss of the data's own labels, in plain torch, without the targets of the data."""
    queries = range(len(data))
    mask = data.pad(torch.ones(data.num_items, dtype=torch.bool), queries)
    labels = data.pad(data.raw_auxiliary.double(), queries).movedim(-1, 1)
    u = data.pad(beta * (scores - reference), queries).masked_fill(~mask, -torch.inf)
    log_q = torch.log_softmax(u, dim=1).masked_fill(~mask, 0.0)
    mass = labels.sum(-1, keepdim=True)
    zbar = torch.where(mass > 0, labels / mass.clamp(min=1), 0.0)
    return -(zbar * log_q[:, None]).sum(-1)


def test_same_arguments_same_data_and_every_argument_counts():
    base = {
        "queries": 40,
        "items": 8,
        "features": 12,
        "objectives": 3,
        "labels": "counts",
        "spread": 2.0,
        "conflict": 0.5,
        "seed": 1,
    }
    changes = {
        "queries": 41, "items": 9, "features": 13, "objectives": 4, "labels": "dense", "spread": 2.1, "conflict": 0.6,
        "seed": 2,
    }  # fmt: skip
    prints = [synthetic(**base).fingerprint] + [synthetic(**(base | {k: v})).fingerprint for k, v in changes.items()]
    assert len(set(prints)) == 9 and synthetic(**base).fingerprint == prints[0]


def test_shape_is_that_of_mslr_in_small():
    data = synthetic(4000)
    assert (data.lengths.min(), data.lengths.max()) == (10, 30)
    shares = torch.bincount(data.raw_main.long(), minlength=5) / data.num_items
    torch.testing.assert_close(shares, torch.tensor([0.52, 0.32, 0.13, 0.02, 0.01]), atol=1e-3, rtol=0)
    labels = data.raw_auxiliary
    assert labels.shape[1] == 5 and bool((labels == labels.floor()).all())
    assert bool(((labels == 0).double().mean(0) > 0.8).all())  # mostly zero
    totals = torch.zeros(4000, 5).index_add_(0, data.owner, labels)
    empty = (totals == 0).double().mean(0)
    torch.testing.assert_close(empty, 1 - data.truth.rates, atol=0.03, rtol=0)
    busy = totals[:, 0][totals[:, 0] > 0]
    assert busy.max() > 20 * busy.median() and busy.mean() > 1.4 * busy.median()  # heavy-tailed


def test_objectives_conflict_with_each_other_and_some_with_the_main_one():
    data = synthetic(2000)
    logs = data.truth.log_probs
    batch = data.batch(range(2000))
    centred = (
        logs
        - torch.zeros(2000, 5, dtype=torch.float64).index_add_(0, data.owner, logs)[data.owner]
        / data.lengths[data.owner, None]
    )
    correlation = torch.corrcoef(centred.T)
    assert bool((correlation[~torch.eye(5, dtype=torch.bool)] < -0.05).all())
    main, own = [], []
    for j in range(5):
        scores = data.pad(true_scores(data, torch.eye(5)[j]), batch.queries).float()
        main.append(ndcg(scores, batch.main, mask=batch.mask).mean().item())
        own.append(ndcg(scores, batch.labels, mask=batch.mask).mean())
    own = torch.stack(own)
    assert min(main[0::2]) > max(main[1::2]) + 0.05
    assert bool((own.diagonal() > 2 * (own - torch.diag(own.diagonal())).amax(0)).all())  # a wide front


def centred_logs(data):
    """(N, m) log p_j less its mean over the list: the utilities, up to their mean."""
    logs, owner = data.truth.log_probs, data.owner
    totals = torch.zeros(len(data), logs.shape[1], dtype=torch.float64).index_add_(0, owner, logs)
    return logs - totals[owner] / data.lengths[owner, None]


def test_spread_and_conflict_are_the_deviation_and_the_correlation_of_the_utilities():
    own = ~torch.eye(3, dtype=torch.bool)
    for conflict in (0.0, 0.3, 1.0):
        logs = centred_logs(synthetic(1000, objectives=3, spread=0.7, conflict=conflict))
        wanted = torch.full((6,), 1 - conflict - 0.32 * conflict, dtype=torch.float64)
        torch.testing.assert_close(torch.corrcoef(logs.T)[own], wanted, atol=0.08, rtol=0)
        torch.testing.assert_close(logs.std(0), torch.full_like(logs[0], 0.7), atol=0.05, rtol=0)
    same = synthetic(30, objectives=3, conflict=0.0)
    assert bool((same.truth.log_probs == same.truth.log_probs[:, :1]).all())
    # The conflict changes the objectives and nothing else.
    other = synthetic(30, objectives=3)
    assert torch.equal(same.features, other.features) and torch.equal(same.raw_main, other.raw_main)


def test_spread_and_conflict_are_options_of_the_command_line():
    train, _, _ = load("synthetic:queries=30,features=8,objectives=2,spread=3,conflict=.25")
    whole = synthetic(30, features=8, objectives=2, spread=3.0, conflict=0.25)
    assert torch.equal(train.truth.log_probs, whole.split((0.6, 0.2, 0.2), seed=0)[0].truth.log_probs)
    for option, named in (("spread=0", "spread is 0"), ("conflict=1.5", "conflict is 1.5"), ("spread=wide", "float")):
        with pytest.raises(ValueError, match=named):
            load(f"synthetic:queries=30,{option}")


@pytest.mark.parametrize("labels", ["counts", "dense"])
def test_normalized_labels_have_the_expectation_that_the_truth_says(labels):
    """E[z / sum z | sum z > 0] = p_j, tested over many draws of the same lists."""
    data = synthetic(20_000, items=4, features=8, objectives=3, labels=labels)
    p = data.truth.log_probs.exp()
    has = torch.zeros(20_000, 3).index_add_(0, data.owner, data.raw_auxiliary) > 0
    torch.testing.assert_close(has.double().mean(0), data.truth.rates, atol=0.015, rtol=0)
    # Sums over groups of items chosen by p itself: any tilt of the labels against p would show.
    for j in range(3):
        seen = has[data.owner, j]
        for low, high in ((0, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1)):
            group = seen & (p[:, j] > low) & (p[:, j] <= high)
            error = (data.targets[group, j].double() - p[group, j]).mean()
            spread = data.targets[group, j].double().std() / group.sum().sqrt()
            assert group.sum() > 200 and error.abs() < 5 * spread


@pytest.mark.parametrize("labels", ["counts", "dense"])
def test_the_gradient_of_the_loss_vanishes_at_the_optimum_on_average(labels):
    """Along directions that a model could move in, the mean gradient at the optimum is 0 within its own error.

    The same statistic is many errors away from 0 at the reference, and at the optimum for other weights or without
    the rates: the test can fail.
    """
    data = synthetic(20_000, items=6, features=8, objectives=3, labels=labels, seed=3)
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(data.num_items, generator=generator, dtype=torch.float64)
    p = data.truth.log_probs.exp()
    directions = torch.cat([data.features[:, :4].double(), p, data.features[:, :1].double() ** 2], dim=1)

    def errors(scores, weights, beta):
        """|mean| / standard error of the directional derivative over lists, one for each direction."""
        scores = scores.clone().requires_grad_()
        loss = (listwise_losses(data, scores, beta, reference) * weights).sum()
        (gradient,) = torch.autograd.grad(loss, scores)
        per_list = torch.zeros(len(data), directions.shape[1], dtype=torch.float64)
        per_list.index_add_(0, data.owner, gradient[:, None] * directions)
        return per_list.mean(0).abs() / (per_list.std(0) / len(data) ** 0.5)

    for weights, beta in zip(WEIGHTS, (1.0, 0.5, 3.0, 1.0), strict=True):
        at_optimum = errors(true_scores(data, weights, beta, reference), weights, beta)
        assert at_optimum.max() < 4, (weights, at_optimum)
        assert errors(reference, weights, beta).max() > 20
        assert (
            errors(
                true_scores(data, weights.flip(0) * 0.5 + weights.roll(1) * 0.5, beta, reference),
                weights,
                beta,
            ).max()
            > 15
        )
    if labels == "counts":
        weights = WEIGHTS[0]
        without_rates = true_scores(data, weights / data.truth.rates, 1.0, reference)
        assert errors(without_rates, weights, 1.0).max() > 6


def test_expected_losses_are_the_mean_of_the_losses_of_the_labels():
    data = synthetic(20_000, items=6, features=8, objectives=3, seed=4)
    generator = torch.Generator().manual_seed(0)
    scores, reference = torch.randn(2, data.num_items, generator=generator, dtype=torch.float64)
    losses = listwise_losses(data, scores, 1.7, reference)
    standard_error = losses.std(0) / len(data) ** 0.5
    wanted = expected_losses(data, scores, 1.7, reference)
    assert bool(((losses.mean(0) - wanted).abs() < 4 * standard_error).all())
    assert bool((standard_error < 0.02 * wanted).all())


def test_distance_to_optimum_is_the_excess_of_the_expected_loss():
    data = synthetic(200, objectives=3, features=8, items=9)
    generator = torch.Generator().manual_seed(1)
    for weights in WEIGHTS:
        scores, reference = torch.randn(2, data.num_items, generator=generator, dtype=torch.float64)
        best = true_scores(data, weights, 0.7, reference)
        excess = (expected_losses(data, scores, 0.7, reference) - expected_losses(data, best, 0.7, reference)) @ weights
        assert distance_to_optimum(data, scores, weights, 0.7, reference) == pytest.approx(excess.item(), rel=1e-10)
        assert distance_to_optimum(data, best, weights, 0.7, reference) == pytest.approx(0, abs=1e-12)
        moved = best + torch.randn(data.num_items, generator=generator) * 0.1
        assert distance_to_optimum(data, moved, weights, 0.7, reference) > 1e-4
        shifted = best + torch.arange(len(data))[data.owner]  # a constant of each list is free
        assert distance_to_optimum(data, shifted, weights, 0.7, reference) == pytest.approx(0, abs=1e-12)


def test_the_mixture_is_that_of_the_probabilities_with_rates():
    data = synthetic(30, objectives=3, features=8, items=5)
    p, rates = data.truth.log_probs.exp(), data.truth.rates
    for weights in WEIGHTS:
        shares = weights * rates / (weights * rates).sum()
        torch.testing.assert_close(true_mixture(data, weights).exp(), p @ shares)
    sums = torch.zeros(30, 3, dtype=torch.float64).index_add_(0, data.owner, p)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_free_scores_trained_on_the_expected_loss_meet_the_optimum():
    data = synthetic(20, objectives=3, features=8, items=5, seed=7)
    reference = torch.randn(data.num_items, dtype=torch.float64)
    weights = WEIGHTS[0]
    scores = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=300, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    mask = data.batch(range(20)).mask
    p = data.pad(data.truth.log_probs.exp() * data.truth.rates, range(20))

    def closure():
        optimizer.zero_grad()
        u = data.pad(2.0 * (scores - reference), range(20)).masked_fill(~mask, -torch.inf)
        log_q = torch.log_softmax(u, 1).masked_fill(~mask, 0)
        loss = -((p * log_q[..., None]).sum((0, 1)) * weights).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert distance_to_optimum(data, scores, weights, 2.0, reference) < 1e-12
    found, best = scores.detach(), true_scores(data, weights, 2.0, reference)
    means = torch.zeros(20, dtype=torch.float64).index_add_(0, data.owner, found - best) / data.lengths
    torch.testing.assert_close(found - means[data.owner], best, atol=1e-5, rtol=0)


def test_the_truth_follows_splits_and_subsets():
    train, valid, test = load("synthetic:queries=60,items=6")
    whole = synthetic(60, items=6)
    weights = torch.full((5,), 0.2)
    every = true_scores(whole, weights)
    for part in (train, valid, test):
        torch.testing.assert_close(true_scores(part, weights), every[whole.items_of(part.query_ids)])
    pair = true_scores(load("synthetic:queries=60,items=6", objectives="aux4,aux2")[0], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(pair, true_scores(train, torch.tensor([0, 0.5, 0, 0.5, 0])))


def test_dense_labels_are_positive_on_every_item():
    data = synthetic(300, labels="dense")
    assert bool((data.raw_auxiliary > 0).all()) and bool((data.truth.rates == 1).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": 0}, "must be at least 1, 2, 4, 0"),
        ({"items": 1}, "must be at least 1, 2, 4, 0"),
        ({"features": 3}, "must be at least 1, 2, 4, 0"),
        ({"objectives": 12}, "objectives is 12 but must be from 1 to 11 with 16 features"),
        ({"objectives": 0}, "objectives is 0"),
        ({"labels": "clicks"}, "labels is 'clicks' but must be one of 'counts', 'dense'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic(**arguments)


def test_wrong_shapes_and_data_without_truth_are_refused():
    data = synthetic(10, objectives=3, features=8)
    with pytest.raises(ValueError, match="its optimum is not known"):
        true_scores(travel(), torch.ones(3) / 3)
    for weights in (torch.ones(2) / 2, torch.tensor([0.5, -0.5, 1.0]), torch.zeros(3)):
        with pytest.raises(ValueError, match="must be 3 numbers, none below 0 and one above"):
            true_scores(data, weights)
    with pytest.raises(ValueError, match=r"reference has shape \(2,\) but must be"):
        true_scores(data, torch.ones(3) / 3, reference=torch.zeros(2))
    with pytest.raises(ValueError, match=r"scores has shape \(2,\) but must be"):
        expected_losses(data, torch.zeros(2))


def test_the_smallest_data_sets_exist():
    data = synthetic(1, items=2, features=4, objectives=1)
    assert len(data) == 1 and data.truth.log_probs.shape[1] == 1
    assert true_scores(data, torch.ones(1)).shape == (data.num_items,)
