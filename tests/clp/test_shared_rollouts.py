"""Rollouts that the trade-offs of a step share: each answer is drawn at one of them and counts at all."""

import dataclasses
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from clp_problems import disturbed, language_model, make_loss, parts, settings
from tiny_language_models import tokenizer

from mopl.clp.loss import overlap_of
from mopl.clp.policies import new_policy, release
from mopl.clp.prompts import PromptSource
from mopl.clp.rollout import Sampler
from mopl.conditioning import sample_weights
from mopl.losses import policy_gradient
from mopl.rewards.scale import RewardScale, RunningScale
from mopl.training import RunLog, TrainingConfig, train

NAMES = ("first", "second")


def shared(**options):
    return settings(share_rollouts=True, scope="lora-mixture", **options)


def source_of(config, **options):
    count = config.trade_offs_of("clp", 2)
    return PromptSource(parts(config)["train"], config, 2, trade_offs=count, **options)


def test_balanced_draws_are_rotations_of_one_and_each_row_has_the_distribution():
    rows = sample_weights(3, 7, 0.5, seed=1, step=4, balanced=True)
    assert rows.shape == (7, 3)
    for first in (0, 3):
        for turn in range(3):
            assert torch.equal(rows[first + turn], rows[first].roll(turn))
    assert torch.equal(rows[6], sample_weights(3, 3, 0.5, seed=1, step=4)[2])
    assert torch.equal(rows[:4], sample_weights(3, 4, 0.5, seed=1, step=4, balanced=True)), "the first are the same"
    with pytest.raises(ValueError, match=r"concentration is .* must be one number for balanced draws"):
        sample_weights(2, 2, [1.0, 2.0], seed=0, step=0, balanced=True)


def test_a_step_has_the_same_trade_offs_and_draws_however_it_is_cut():
    config = shared(trade_offs=3, kl_weight=(0.05, 0.2))
    source = source_of(config)
    whole, halves = source(5), [source(5, rank, 2) for rank in range(2)]
    assert whole.weights.shape == (3, 2) and whole.kl_weight.shape == (3,) and whole.sources.shape == (4, 2)
    for half in halves:
        assert torch.equal(half.weights, whole.weights) and torch.equal(half.kl_weight, whole.kl_weight)
    assert torch.equal(torch.cat([half.sources for half in halves]), whole.sources)
    drawn = torch.cat([source(step).sources for step in range(200)]).flatten()
    assert torch.allclose(
        drawn.bincount().double() / len(drawn), torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.04
    )
    assert source_of(config, fixed=torch.tensor([1.0, 0.0]))(5).sources is None, "an expert has one trade-off"


@pytest.mark.parametrize("kind", ["clp", "prompting"])
def test_every_answer_stands_at_every_trade_off_with_the_weight_of_the_mixture(tmp_path, kind):
    config, base = shared(kl_weight=0.1), language_model()
    policy = disturbed(new_policy(base, config, NAMES, kind))
    loss, batch = make_loss(base, config, tmp_path), source_of(config)(3)
    kept = {}
    loss.store.keep = lambda of, rollout: kept.update(rollout=rollout)
    value, logs = loss(policy, batch, 3)
    rollout = kept["rollout"]
    rows, each = len(rollout.responses), 8
    assert rows == 2 * each and rollout.responses[:each] == rollout.responses[each:]
    assert torch.equal(rollout.source[:each].sort().values, rollout.source[:each])
    assert sorted(rollout.prompt[:each].tolist()) == [p for p in range(4) for _ in range(2)]
    assert torch.equal(rollout.own % each, torch.arange(each))
    for row in range(rows):
        assert torch.equal(rollout.weights[row], batch.weights[row // each])
        text = batch.prompts.tokens[int(rollout.prompt[row])]
        assert rollout.prompts[row] == policy.tokens(text, rollout.weights[row], 0.1, tokenizer())
    # The same by hand: log-probabilities of every row by itself, weights and groups by their definitions.
    sampler, logprob = Sampler(base, tokenizer(), config), []
    mask = torch.zeros_like(rollout.behaviour, dtype=torch.bool)
    for row, response in enumerate(rollout.responses):
        arguments = policy.arguments(rollout.weights[row : row + 1], rollout.kl_weight[row : row + 1])
        found, _ = sampler.score(policy.model, [rollout.prompts[row]], [response], arguments)
        logprob.append(torch.nn.functional.pad(found[0], (0, mask.shape[1] - found.shape[1])))
        mask[row, : len(response)] = True
    logprob = torch.stack(logprob)
    torch.testing.assert_close(logprob, rollout.behaviour * mask, rtol=1e-4, atol=1e-5)
    chances = logprob.sum(1).view(2, each).double().exp()
    weights = (chances / chances.mean(0)).float().flatten()
    group = [int(rollout.prompt[row]) + 4 * (row // each) for row in range(rows)]
    by_hand = policy_gradient(
        logprob, rollout.rewards, rollout.weights, kl_weight=0.1, reference=rollout.reference, mask=mask,
        importance=weights, baseline="leave_one_out", group=torch.tensor(group),
    )  # fmt: skip
    torch.testing.assert_close(value.detach(), by_hand.loss, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logs["kl"], (by_hand.kl * weights).sum() / weights.sum(), rtol=1e-3, atol=1e-4)
    shares = weights.view(2, each) / 2
    assert float(logs["overlap"]) == pytest.approx(float((2 * (1 - shares.square().sum(0))).mean()), abs=1e-4)
    assert kind == "prompting" or 0 < float(logs["overlap"]) < 0.999
    release(policy)


def test_an_untrained_policy_gives_every_trade_off_all_answers(tmp_path):
    config, base = shared(), language_model()
    policy = new_policy(base, config, NAMES, "clp")
    _, logs = make_loss(base, config, tmp_path)(policy, source_of(config)(0), 0)
    assert float(logs["overlap"]) == pytest.approx(1.0)
    release(policy)


def test_overlap_is_of_each_answer_and_not_of_the_few_with_large_weights():
    apart = torch.zeros(3, 9)
    apart[torch.arange(9) % 3, torch.arange(9)] = 3.0
    assert float(overlap_of(apart)) == pytest.approx(0.0, abs=1e-6)
    assert float(overlap_of(torch.ones(3, 9))) == pytest.approx(1.0)
    half = torch.cat([apart[:, :6], torch.ones(3, 6)], 1)
    assert float(overlap_of(half)) == pytest.approx(0.5)
    assert float(overlap_of(torch.tensor([[2.0, 1.5], [0.0, 0.5]]))) == pytest.approx((0 + 0.75) / 2)


def test_a_running_scale_counts_each_answer_once_and_the_log_has_answers_where_they_were_sampled(tmp_path):
    config, base = shared(normalize="running", trade_offs=4, log_samples=9), language_model()
    policy = new_policy(base, config, NAMES, "clp")
    policy.running = RunningScale(RewardScale(torch.zeros(2), torch.ones(2), torch.full((2,), 10.0)), 1.0)
    log = RunLog(tmp_path)
    loss, batch = dataclasses.replace(make_loss(base, config, tmp_path), log=log), source_of(config)(0)
    before = {name: value.clone() for name, value in policy.running.state_dict().items()}
    loss(policy, batch, 0)
    grown = {k: float((v - before[k]).max()) for k, v in policy.running.state_dict().items() if "count" in k}
    assert list(grown.values()) == [8.0], grown
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    trade_offs = {tuple(round(x, 4) for x in row) for row in batch.weights.tolist()}
    assert {tuple(line["weights"]) for line in lines} <= trade_offs
    assert len(lines) == len({(tuple(line["weights"]), line["prompt"]) for line in lines})
    asked = {(p, int(k)) for p, row in enumerate(batch.sources) for k in row}
    assert len(lines) == len(asked), "one for each prompt and trade-off at which it was answered"
    release(policy)


@pytest.mark.parametrize(
    "options", [{}, {"epochs": 2, "clip": 0.2, "steps": 4}, {"baseline": "value", "kl_estimator": "exact"}]
)
def test_a_training_is_the_same_in_two_pieces(tmp_path, options):
    config, base = shared(**options), language_model()
    found = []
    for pieces in ((4,), (3, 4)):
        policy, folder = new_policy(base, config, NAMES, "clp"), tmp_path / str(len(pieces))
        for steps in pieces:
            plan = TrainingConfig(steps=4, learning_rate=1e-2, checkpoint_every=1, log_every=9)
            loss = make_loss(base, config, folder)

            def stopping(model, batch, step, loss=loss, last=steps):
                if step == last:
                    raise KeyboardInterrupt
                return loss(model, batch, step)

            if steps < 4:
                with pytest.raises(KeyboardInterrupt):
                    train(policy, source_of(config), stopping, plan, directory=folder / "checkpoints")
                release(policy)
                policy = new_policy(base, config, NAMES, "clp")
            else:
                train(policy, source_of(config), stopping, plan, directory=folder / "checkpoints", resume=True)
        found.append([p.detach().clone() for p in policy.parameters() if p.requires_grad])
        release(policy)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"trade_offs": 1}, "trade_offs 1 does not go with; raise trade_offs"),
        ({"baseline": "group"}, "baseline 'group' does not go with; take baseline='leave_one_out'"),
        (
            {"rollout_server": "http://x", "rollout_folder": "y", "importance_level": "token"},
            "importance_level='sequence'",
        ),
        ({"method": "rewarded-soups"}, "rewarded-soups trains an expert for each objective; leave share_rollouts out"),
    ],
)
def test_what_does_not_go_with_shared_rollouts_is_refused(options, wrong):
    with pytest.raises(ValueError, match=wrong):
        shared(**options)


def test_options_of_a_rollout_server_without_one_are_refused():
    assert shared(method="clp-all").share_rollouts
    for name, value in (
        ("importance_level", "token"), ("importance_cap", 3.0), ("engine_kl_limit", 0.5), ("rollout_timeout", 5.0)
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is {value} but it is about answers of a rollout_server"):
            settings(**{name: value})
