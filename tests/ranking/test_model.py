"""The ranking model: attention against PyTorch's own layer, sets and padding, conditioning, both parametrisations."""

import dataclasses

import pytest
import torch
from torch import nn

from mopl.ranking import ListTransformer, RankingModel, RankingModelConfig

F, OBJECTIVES = 7, ("clicks", "dwell", "quality")
W = torch.tensor([0.2, 0.5, 0.3])


def ragged(batch=4, items=6):
    features = torch.randn(batch, items, F)
    mask = torch.arange(items) < torch.tensor([[items], [1], [0], [3]][:batch])
    return features, mask


def model(**changes):
    torch.manual_seed(1)
    settings = RankingModelConfig(F, OBJECTIVES, hidden=16, **changes)
    return RankingModel(settings, ListTransformer(F, hidden=8)).eval()


def test_the_blocks_are_pytorchs_own_encoder_layers():
    ours = ListTransformer(F, hidden=16, layers=2, heads=4, feedforward=24).eval()
    features, mask = ragged(2)
    x = ours.input(features)
    for block in ours.blocks:
        twin = nn.TransformerEncoderLayer(16, 4, 24, 0.0, "gelu", batch_first=True, norm_first=True)
        pairs = {
            "self_attn.in_proj_": block.query_key_value, "self_attn.out_proj.": block.attention_out,
            "linear1.": block.feedforward_in, "linear2.": block.feedforward_out,
            "norm1.": block.attention_norm, "norm2.": block.feedforward_norm,
        }  # fmt: skip
        state = {name + kind: getattr(layer, kind) for name, layer in pairs.items() for kind in ("weight", "bias")}
        twin.load_state_dict(state)
        x = twin(x, src_key_padding_mask=~mask)
    expected = ours.output(ours.output_norm(x))[..., 0]
    torch.testing.assert_close(ours(features, mask)[mask], expected[mask], rtol=1e-5, atol=1e-6)


def test_permuting_the_items_permutes_the_scores():
    ranker, (features, mask) = model(), ragged()
    features, mask = features.double(), mask
    ranker.double()
    permuted = torch.stack([torch.randperm(features.shape[1]) for _ in features])
    rows = torch.arange(len(features))[:, None]
    scores = ranker(features, W.double(), mask=mask)
    torch.testing.assert_close(
        ranker(features[rows, permuted], W.double(), mask=mask[rows, permuted]), scores[rows, permuted],
        rtol=1e-10, atol=1e-12,
    )  # fmt: skip


def test_padding_and_what_stands_in_it_change_nothing():
    ranker, (features, mask) = model(), ragged()
    poisoned = features.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    scores = ranker(poisoned, W, mask=mask)
    for row, length in enumerate([6, 1, 0, 3]):
        if length:
            alone = ranker(features[row : row + 1, :length], W)
            torch.testing.assert_close(scores[row, :length], alone[0], rtol=1e-4, atol=1e-6)
    assert (scores[~mask] == 0).all()
    (scores * torch.randn_like(scores)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ranker.network.parameters())
    assert (poisoned.grad[~mask] == 0).all() and (poisoned.grad[mask] != 0).any()


def test_a_network_of_several_outputs_comes_back_as_it_was(tmp_path):
    network, (features, mask) = ListTransformer(F, hidden=8, outputs=3).eval(), ragged()
    network.save_pretrained(tmp_path)
    scores = network(features, mask)
    assert scores.shape == (4, 6, 3) and (scores[~mask] == 0).all()
    assert torch.equal(ListTransformer.from_pretrained(tmp_path)(features, mask), scores)
    with pytest.raises(ValueError, match="outputs is 0"):
        ListTransformer(F, outputs=0)
    with pytest.raises(ValueError, match="conditioning"):
        RankingModelConfig(F, OBJECTIVES, conditioning="film")


def test_a_batch_of_empty_lists_is_finite_with_no_gradient():
    ranker = model()
    scores = ranker(torch.full((2, 3, F), torch.nan), W, mask=torch.zeros(2, 3, dtype=torch.bool))
    scores.sum().backward()
    assert (scores == 0).all() and all((p.grad == 0).all() for p in ranker.network.parameters())


@pytest.mark.parametrize(
    ("objectives", "takes_beta", "extra"), [(5, False, 5 * 64), (5, True, 10 * 64), (2, False, 128)]
)
def test_conditioning_adds_exactly_m_times_hidden_parameters(objectives, takes_beta, extra):
    # The check of Table 1 of the paper: 50,432 = 50,112 + 5 x 64.
    names = tuple(f"o{j}" for j in range(objectives))
    base = ListTransformer(131, hidden=128)
    conditioned = RankingModel(RankingModelConfig(131, names, takes_beta=takes_beta), base)
    plain = RankingModel(RankingModelConfig(131, names, conditioned=False), base)
    assert conditioned.num_parameters - plain.num_parameters == extra
    assert plain.num_parameters == sum(p.numel() for p in ListTransformer(131, hidden=64).parameters())
    assert sum(p.numel() for p in conditioned.parameters() if p.requires_grad) == conditioned.num_parameters


def test_weights_change_the_scores_and_each_list_has_its_own():
    ranker, (features, mask) = model(), ragged()
    per_list = torch.distributions.Dirichlet(torch.ones(3)).sample((4,))
    scores = ranker(features, per_list, mask=mask)
    for row in (0, 3):
        torch.testing.assert_close(scores[row], ranker(features, per_list[row], mask=mask)[row], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(scores[0], ranker(features, W, mask=mask)[0], atol=1e-4)


def test_only_the_direction_of_beta_reaches_the_network():
    ranker, (features, mask) = model(takes_beta=True), ragged()
    beta = torch.tensor([0.7, 1.1, 1.4])
    raw = ranker(features, W, beta=beta, mask=mask)
    torch.testing.assert_close(ranker(features, W, beta=3 * beta, mask=mask), raw, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ranker(features, W, beta=beta.flip(0), mask=mask), raw, atol=1e-4)
    # Equation (15): (1 - 1/|beta|) s0 + net/|beta|.
    base = ranker.reference(features, mask)
    expected = ((1 - 1 / 3.2) * base + raw / 3.2).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(ranker.score(features, W, beta=beta, mask=mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parametrisation", ["scratch", "augment"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_scale_moves_the_scores_along_the_line_from_the_base(parametrisation, scale):
    ranker, (features, mask) = model(parametrisation=parametrisation), ragged()
    nn.init.normal_(ranker.network.output.weight)
    base, scores = ranker.reference(features, mask), ranker(features, W, mask=mask)
    expected = ((1 - 1 / scale) * base + scores / scale).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(ranker.score(features, W, scale=scale, mask=mask), expected, rtol=1e-5, atol=1e-5)


def test_augment_starts_at_the_base_model_and_learns_only_what_is_added():
    ranker, (features, mask) = model(parametrisation="augment"), ragged()
    base = ranker.reference(features, mask)
    assert torch.equal(ranker(features, W, mask=mask), base)
    scores = ranker(features, W, mask=mask, reference=base)
    (scores * torch.randn_like(scores)).sum().backward()
    assert ranker.network.output.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in ranker.base.parameters())
    known = ranker(features, W, mask=mask, reference=base + 1.0)
    torch.testing.assert_close(known, base + 1.0)


def test_heads_are_one_for_each_objective_summed_with_the_weights():
    ranker, (features, mask) = model(parametrisation="augment", conditioning="heads"), ragged()
    plain = model(parametrisation="augment", conditioned=False)
    assert ranker.num_parameters == plain.num_parameters + 3 * 16 + 2 * 16
    base = ranker.reference(features, mask)
    assert torch.equal(ranker(features, W, mask=mask), base)
    nn.init.normal_(ranker.network.output.weight)
    # Before training, weights only choose among the outputs.
    ends = torch.stack([ranker(features, w, mask=mask) - base for w in torch.eye(3)], -1)
    torch.testing.assert_close(ranker(features, W, mask=mask), base + ends @ W)
    each = torch.distributions.Dirichlet(torch.ones(3)).sample((4,))
    wanted = base + (ends * each[:, None]).sum(-1)
    torch.testing.assert_close(ranker(features, each, mask=mask), wanted)
    assert not torch.allclose(wanted, base + ends @ W, atol=1e-3)
    # Afterwards they may do more: the network sees them.
    nn.init.normal_(ranker.network.input.weight[:, F:])
    assert not torch.allclose(ranker(features, W, mask=mask), base + ends @ W, atol=1e-3)


def test_only_lists_that_want_an_objective_train_its_head():
    ranker, (features, mask) = model(parametrisation="augment", conditioning="heads"), ragged()
    scores = ranker(features, torch.tensor([0.4, 0.6, 0.0]), mask=mask)
    (scores * torch.randn_like(scores)).sum().backward()
    first, second, third = ranker.network.output.weight.grad
    torch.testing.assert_close(first / 0.4, second / 0.6)
    assert first.abs().sum() > 0 and (third == 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"parametrisation": "augment"}, {"takes_beta": True}, {"conditioned": False}, {"conditioning": "heads"},
        {"conditioning": "heads", "takes_beta": True}, {"conditioning": "mixture", "mixture_beta": (0.5, 1.0, 2.0)},
        {"conditioning": "mixture", "takes_beta": True},
    ],
)  # fmt: skip
def test_a_saved_model_comes_back_with_the_same_scores(tmp_path, changes):
    ranker, (features, mask) = model(**changes), ragged()
    ranker.save_pretrained(tmp_path)
    again = RankingModel.from_pretrained(tmp_path)
    condition = () if not ranker.config.conditioned else (W,)
    options = {"beta": torch.ones(3)} if ranker.config.takes_beta else {}
    assert again.config == ranker.config and not again.training
    for c in (1.0, 2.0):
        before = ranker.score(features, *condition, scale=c, mask=mask, **options)
        assert torch.equal(again.score(features, *condition, scale=c, mask=mask, **options), before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_base_stays_in_evaluation_mode_and_dropout_acts_only_in_training():
    ranker, (features, mask) = model(dropout=0.5, parametrisation="augment"), ragged()
    nn.init.normal_(ranker.network.output.weight)
    still = ranker(features, W, mask=mask)
    assert torch.equal(still, ranker(features, W, mask=mask))
    assert not ranker.train().base.training
    assert not torch.equal(still, ranker(features, W, mask=mask))


def test_scores_to_rank_by_are_of_a_trade_off_or_refused():
    ranker, (features, mask) = model(), ragged()
    expected = ranker.score(features, W, mask=mask)
    torch.testing.assert_close(ranker.score(features, W.tolist(), mask=mask), expected)
    torch.testing.assert_close(ranker.score(features, W.double(), mask=mask), expected)
    for given, message in (
        ({"weights": torch.tensor([0.9, 0.5, 0.1])}, "does not sum to 1; divide it by its sum"),
        ({"weights": [0.5, 0.5]}, r"weights has shape \(2,\) but must be \(3,\)"),
        ({"scale": 0.0}, "scale is 0.0 but must be positive and finite: above 1 is closer to the base model"),
        (
            {"features": features.double()},
            r"features is torch.float64 but must be torch.float32, as the model; pass fea",
        ),
        ({"features": features.long()}, "features is torch.int64 but must be torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            ranker.score(**{"features": features, "weights": W, "mask": mask, **given})


def test_errors_name_what_is_wrong(tmp_path):
    ranker, (features, mask) = model(), ragged()
    with pytest.raises(ValueError, match="weights are missing; pass one for each of clicks, dwell, quality"):
        ranker(features, mask=mask)
    with pytest.raises(ValueError, match=r"weights has shape \(2,\) but there are 4 lists and 3 objectives"):
        ranker(features, torch.tensor([0.5, 0.5]), mask=mask)
    with pytest.raises(ValueError, match=r"F = 10"):
        ranker(features[..., :5], W, mask=mask)
    with pytest.raises(ValueError, match=r"mask is torch.float32"):
        ranker(features, W, mask=mask.float())
    with pytest.raises(ValueError, match="not conditioned"):
        model(conditioned=False)(features, beta=W, mask=mask)
    with pytest.raises(ValueError, match="trained on 7 features but the data has 8"):
        RankingModel(dataclasses.replace(ranker.config, features=8), ListTransformer(F, hidden=8))
    with pytest.raises(ValueError, match="heads must divide hidden"):
        ListTransformer(F, hidden=10, heads=4)
    with pytest.raises(FileNotFoundError, match=r"no model.json and no model.safetensors"):
        RankingModel.from_pretrained(tmp_path)
    ranker.base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a ListTransformer but a RankingModel"):
        RankingModel.from_pretrained(tmp_path)
