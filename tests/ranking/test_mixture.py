"""The mixture of objectives: its formula, what it is the optimum of, any size of scores, and the model that uses it."""

import math

import pytest
import torch
from torch import nn

from mopl import reference
from mopl.experiments.cos_dpo import ListLoss, StepBatch, scalarized_loss
from mopl.ranking import ListTransformer, RankingModel, RankingModelConfig
from mopl.ranking.batch import Batch
from mopl.ranking.methods import score_batch
from mopl.ranking.mixture import mix_objectives

NAMES = ("clicks", "dwell", "quality")
W = torch.tensor([0.2, 0.5, 0.3])


def ragged(batch=5, items=6, dtype=torch.float64):
    lengths = torch.tensor([[items], [1], [0], [3], [items]])[:batch]
    return torch.randn(batch, items, 3, dtype=dtype), torch.arange(items) < lengths


def model(**changes):
    torch.manual_seed(1)
    settings = RankingModelConfig(7, NAMES, hidden=16, conditioning="mixture", **changes)
    ranker = RankingModel(settings, ListTransformer(7, hidden=8)).eval()
    nn.init.normal_(ranker.network.output.weight)
    return ranker


@pytest.mark.parametrize("beta", [(1.0, 1.0, 1.0), (0.3, 0.3, 0.3), (0.5, 1.0, 3.0)])
def test_values_and_gradients_are_those_of_the_plain_formula(beta):
    scores, mask = ragged()
    weights = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((5,))
    weights[0] = torch.tensor([0.4, 0.0, 0.6])
    betas = torch.tensor(beta, dtype=torch.float64).expand(5, 3)
    ours, plain = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    found, wanted = (
        mix_objectives(ours, weights, betas, mask), reference.mixture_of_objectives(plain, weights, betas, mask)
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(found)
    (found * towards).sum().backward()
    (wanted * towards).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-12)
    assert (ours.grad[0, :, 1] == 0).all()  # its weight is 0
    assert (found[~mask] == 0).all() and (ours.grad[~mask] == 0).all()
    torch.testing.assert_close(
        mix_objectives(scores[:1], weights[0], betas[0]), mix_objectives(scores[:1], weights[:1], betas[:1], mask[:1])
    )
    given = (scores, weights[1:].contiguous(), betas[1:].contiguous())
    for rows in (given, (scores, weights[1], betas[1])):  # of each list, and of all of them
        inputs = [x.clone().requires_grad_() for x in (rows[0][1:], *rows[1:])]
        assert torch.autograd.gradcheck(lambda s, w, b: mix_objectives(s, w, b, mask[1:]), inputs)


def test_at_the_end_of_an_objective_it_is_that_objectives_scores():
    scores, mask = ragged()
    for j, w in enumerate(torch.eye(3, dtype=torch.float64)):
        found = mix_objectives(scores, w, torch.tensor([0.5, 1.0, 3.0]), mask)
        shift = (found - scores[..., j]).masked_fill(~mask, 0.0)
        for moved, there in zip(shift, mask, strict=True):
            torch.testing.assert_close(moved[there], moved[there][:1].expand(int(there.sum())))


def gradient_at_the_mixture(labels, weights, beta):
    """Return the largest gradient of the weighted loss at the mixture of what is best for each objective alone."""
    mixed = mix_objectives((labels.log() / beta[:, None]).movedim(1, -1), weights, beta).requires_grad_()
    (reference.listwise_cross_entropy(mixed, labels, beta[None]) * weights).sum().backward()
    return float(mixed.grad.abs().max())


def test_the_best_scores_of_each_objective_make_the_best_of_every_trade_off():
    drawn, weights = torch.randn(4, 3, 5, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    for b in (0.4, 2.0):
        assert gradient_at_the_mixture(drawn.softmax(-1), weights, torch.full((3,), b, dtype=torch.float64)) < 1e-12
    # With other entries of β it is first order: a tenth of the conflict leaves a hundredth of the gradient.
    beta = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    far, near = (gradient_at_the_mixture((c * drawn).softmax(-1), weights, beta) for c in (1e-2, 1e-3))
    assert 1e-9 < near < far / 50


@pytest.mark.parametrize("size", [1e3, 1e8, 1e30])
def test_scores_of_any_size_are_exact(size):
    scores = (torch.tensor([[[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]]) * size).requires_grad_()
    found = mix_objectives(scores, torch.tensor([0.25, 0.75]), torch.ones(2))
    torch.testing.assert_close(found, torch.tensor([[math.log(0.25), math.log(0.75), -size]]))
    found[0, 2].backward()
    assert torch.isfinite(scores.grad).all()
    one = mix_objectives(scores, torch.tensor([1.0, 0.0]), torch.ones(2))
    torch.testing.assert_close(one, torch.tensor([[0.0, -2 * size, -size]]))


def test_scores_of_16_bits_are_mixed_in_32():
    scores, w = ragged(dtype=torch.float16)[0], torch.tensor([0.2, 0.5, 0.3])
    found = mix_objectives(scores, w, torch.ones(3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, mix_objectives(scores.float(), w, torch.ones(3)))


@pytest.mark.parametrize("parametrisation", ["augment", "scratch"])
def test_the_model_mixes_what_its_network_says_of_each_objective(parametrisation):
    ranker = model(parametrisation=parametrisation, mixture_beta=(0.5, 0.5, 0.5))
    features, mask = torch.randn(5, 6, 7), ragged()[1]
    outputs, base = ranker.network(features, mask), ranker.reference(features, mask)
    moved = outputs if parametrisation == "augment" else outputs - base[..., None]
    wanted = base + mix_objectives(moved, W, torch.full((3,), 0.5), mask)
    torch.testing.assert_close(ranker(features, W, mask=mask), wanted)
    torch.testing.assert_close(ranker(features, W.expand(5, 3), mask=mask, reference=base), wanted)
    both = ranker(features, W, mask=mask, alone=True)
    torch.testing.assert_close(both[:, 0], wanted)
    torch.testing.assert_close(both[:, 1:], (moved + base[..., None]).movedim(-1, 1))
    assert (both.movedim(1, -1)[~mask] == 0).all()
    # What stands in masked places is ignored, and the scores of a list do not depend on its padding.
    poisoned = features.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(ranker(poisoned, W, mask=mask), wanted)
    torch.testing.assert_close(ranker.score(features[3:4, :3], W), ranker.score(features, W, mask=mask)[3:4, :3])


def test_the_network_has_an_output_for_each_objective_and_never_sees_the_weights():
    plain = RankingModel(RankingModelConfig(7, NAMES, hidden=16, conditioned=False), ListTransformer(7, hidden=8))
    assert model().num_parameters == plain.num_parameters + 2 * 16
    assert model(takes_beta=True).num_parameters == plain.num_parameters + 2 * 16 + 3 * 16
    alone = RankingModel(RankingModelConfig(7, NAMES[:1], conditioning="mixture"), ListTransformer(7, hidden=8)).eval()
    features = torch.randn(2, 4, 7)
    torch.testing.assert_close(alone(features, torch.ones(1)), alone.network(features))


def test_training_starts_at_the_base_model():
    settings = RankingModelConfig(7, NAMES, hidden=16, conditioning="mixture", parametrisation="augment")
    ranker, features = RankingModel(settings, ListTransformer(7, hidden=8)), torch.randn(2, 4, 7)
    shift = ranker(features, W) - ranker.reference(features)
    torch.testing.assert_close(shift, shift[:, :1].expand(2, 4))


def test_a_model_that_takes_beta_mixes_by_the_beta_it_is_given():
    ranker, features = model(takes_beta=True, parametrisation="augment"), torch.randn(2, 4, 7)
    beta = torch.tensor([0.5, 1.0, 2.5])
    inputs = torch.cat([features, (beta / 4).expand(2, 4, 3)], -1)
    wanted = mix_objectives(ranker.network(inputs), W, beta / 4) + ranker.reference(features)
    torch.testing.assert_close(ranker(features, W, beta=beta), wanted)
    torch.testing.assert_close(ranker(features, W, beta=2 * beta), wanted)
    with pytest.raises(ValueError, match="beta is missing"):
        ranker(features, W)


def test_what_does_not_fit_is_refused():
    ranker, features = model(), torch.randn(2, 4, 7)
    with pytest.raises(ValueError, match="weights are missing; pass one for each of clicks, dwell, quality"):
        ranker(features)
    with pytest.raises(ValueError, match=r"weights has shape \(2,\) but there are 2 lists and 3 objectives"):
        ranker(features, torch.tensor([0.5, 0.5]))
    for given in ((1.0, 2.0), (1.0, 0.0, 1.0), (1.0, -1.0, 2.0)):
        with pytest.raises(ValueError, match=r"mixture_beta is 1 .* but must be β of the training, a positive number"):
            model(mixture_beta=given)
    concat = RankingModel(RankingModelConfig(7, NAMES, hidden=16), ListTransformer(7, hidden=8))
    with pytest.raises(ValueError, match="alone=True was passed to a model that does not mix"):
        concat(features, W, alone=True)


@pytest.mark.parametrize("kind", ["listnet", "plackett-luce"])
def test_a_list_trains_at_its_weights_and_at_each_objective_alone(kind):
    ranker, mask = model(parametrisation="augment"), torch.ones(4, 5, dtype=torch.bool)
    labels = torch.rand(4, 3, 5)
    targets = labels / labels.sum(-1, keepdim=True)
    lists = Batch(torch.randn(4, 5, 7), labels, targets, labels[:, 0], targets[:, 0], mask, torch.arange(4))
    weights = torch.distributions.Dirichlet(torch.ones(3)).sample((4,))
    batch = StepBatch(lists, weights, torch.ones(4, 3), torch.zeros(4, 5))
    loss = ListLoss(kind)
    value, logs = scalarized_loss(score_batch, loss, NAMES)(ranker, batch, 0)
    wanted = [
        (loss(ranker(lists.features, w, mask=mask, reference=batch.reference), lists, 1.0, batch.reference) * w).sum(1)
        for w in (weights, *torch.eye(3))
    ]
    torch.testing.assert_close(value, torch.stack(wanted).mean())
    common, _ = scalarized_loss(score_batch, loss, NAMES, common_beta=1.0)(ranker, batch, 0)
    torch.testing.assert_close(common, value)
    assert set(logs) == {f"loss/{name}" for name in NAMES}
    value.backward()
    assert (ranker.network.output.weight.grad.abs().sum(1) > 0).all()
