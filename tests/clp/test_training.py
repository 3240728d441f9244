"""Policies trained on rewards: what a step samples, scores and changes, guards, resume, steering, soups beside it."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from launching import DISTRIBUTED, launch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from clp_problems import (
    PROMPTS,
    SCOPES,
    disturbed,
    language_model,
    make_loss,
    make_rewards,
    parts,
    settings,
    share,
)  # fmt: skip
from tiny_language_models import build, tokenizer

from mopl.alignment.recipe import RunInterrupted
from mopl.clp import ClpConfig, PolicyCollapsed, train_policies
from mopl.clp.policies import Policy, load_policy, new_policy, release, save_soup
from mopl.clp.prompts import PromptSource, placed_prompts
from mopl.clp.rollout import Rollout, Sampler, roll
from mopl.conditioning import LoraMixture, ParameterMixture
from mopl.decoding import MixedLogits
from mopl.language_models.data import DataError, RowError
from mopl.language_models.models import fingerprint
from mopl.language_models.tokenization import ListTokenizer
from mopl.losses import policy_gradient
from mopl.pareto import Front
from mopl.rewards import FunctionReward, Rewards
from mopl.rewards.scale import RewardScale, RunningScale
from mopl.training import CheckpointFolder, TrainingConfig, train

# ---------------------------------------------------------------- prompts


def read_prompts(path, **options):
    return [text for _, text in placed_prompts(path, **options)]


def test_prompts_are_read_from_text_json_lines_and_preference_data(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\none\n")
    assert read_prompts(str(tmp_path / "a.txt")) == ["one", "two"]
    chat = [{"role": "user", "content": "hello"}]
    rows = [{"prompt": "one"}, {"prompt": chat, "more": 1}, {"prompt": "one"}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_prompts(str(tmp_path / "b.jsonl")) == ["one", tuple(chat)]
    rows = [{"prompt": p, "responses": ["x", "y"], "labels": {"good": [1, 0]}} for p in ("one", "two", "three")]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    assert read_prompts(str(tmp_path / "c.json"), limit=2) == ["one", "two"]
    rows = [{"chosen": "\n\nHuman: one\n\nAssistant: x", "rejected": "\n\nHuman: one\n\nAssistant: y"},
            {"chosen": "\n\nHuman: two\n\nAssistant: x", "rejected": "\n\nHuman: two\n\nAssistant: y"}]  # fmt: skip
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert len(read_prompts(str(tmp_path / "e.jsonl"))) == 2  # the prompt of a pair without one is what both begin with
    (tmp_path / "d.txt").write_text("alone\n")
    with pytest.raises(ValueError, match="has 1 prompt but"):
        read_prompts(str(tmp_path / "d.txt"))


def test_prompts_of_preference_data_are_those_that_its_reader_gives_in_every_kind_of_file(tmp_path):
    said = [[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": a}]
            for a in "xy"]  # fmt: skip
    turn, human = "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nb", "\n\nHuman: q\n\nAssistant:"
    replies = [{"role": "assistant", "text": text, "rank": rank} for rank, text in enumerate("xy")]
    rows = [
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [{"answer": a, "rank": r} for r, a in enumerate("xy")]},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " x", "rejected": " y"},
        {"prompt": "q", "chosen": said[0], "rejected": said[1]},
        {"prompt": turn, "response_1": "x", "response_2": "y", "preference_strength": 1},
        {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "q", "replies": replies}},
        # The conversations go on where the prompt ends, or the column holds nothing.
        {
            "prompt": human,
            "chosen": f"{human} a\n\nHuman: b\n\nAssistant: x",
            "rejected": f"{human} a\n\nHuman: b\n\nAssistant: y",
        },
        {"prompt": None, "chosen": said[0], "rejected": said[1]},
        # The prompt of these formats stands in another column than `prompt`, or inside of it as JSON.
        {"prompt": "z", "instruction": "q", "chosen": "x", "rejected": "y"},
        {"prompt": "z", "context": said[0][:2], "response1": "x", "response2": "y", "overall_preference": 1},
        {"message_tree_id": "1", "prompt": json.dumps({"role": "prompter", "text": "q", "replies": replies})},
    ]
    for row in rows:
        both = json.dumps(row), json.dumps(row).replace("q", "p")  # keys such as "prompt" have no q
        (tmp_path / "a.jsonl").write_text("\n".join(both))
        (tmp_path / "a.json").write_text(f"[{', '.join(both)}]")
        found = read_prompts(str(tmp_path / "a.jsonl"))
        assert found == read_prompts(str(tmp_path / "a.json"))
        assert {"role": "user", "content": "p"} in found[1]
    # Empty entries, which tables put into messages, are left out of those of other rows, too.
    (tmp_path / "b.jsonl").write_text(
        '{"prompt": [{"role": "user", "content": "q", "tool_calls": null}]}\n{"prompt": "p"}'
    )
    assert read_prompts(str(tmp_path / "b.jsonl"))[0] == ({"role": "user", "content": "q"},)
    # One response a row is no list, but its prompt is a prompt.
    scores = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 1)
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps({"prompt": p, "response": "x", **scores}) for p in (turn, "p"))
    )
    assert [message["content"] for message in read_prompts(str(tmp_path / "c.jsonl"))[0]] == ["q", "a", "b"]
    calls = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in (calls, "p")))
    assert read_prompts(str(tmp_path / "d.jsonl"))[0] == tuple(calls)


PARTS = [{"type": "text", "text": "w1"}]
CALLS = {"tool_calls": [{"name": "f"}]}


@pytest.mark.parametrize(("content", "calls"), [(None, {}), (7, {}), (PARTS, {}), (7, CALLS), (PARTS, CALLS)])
def test_a_message_whose_content_is_no_text_is_refused_before_a_template_writes_it(tmp_path, content, calls):
    """It would stand there as Python shows it: as "None", or with the brackets of a list."""
    messages = [{"role": "user", "content": content, **calls}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": each}) for each in ("w1", messages, "w2")))
    with pytest.raises(DataError, match=r"not a message \(line 2: prompt holds .*, whose content is no text"):
        read_prompts(str(tmp_path / "a.jsonl"))
    encoder = ListTokenizer(tokenizer(chat=True), max_length=None, append_eos=False)
    with pytest.raises(RowError, match=r"the prompt holds .*, whose content is no text"):
        encoder.prompt_tokens(messages)
    calls = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert len(encoder.prompt_tokens(calls))
    for template in (True, False):
        encoder = ListTokenizer(tokenizer(chat=template), max_length=None, append_eos=False)
        with pytest.raises(RowError, match="the prompt has no messages"):
            encoder.prompt_tokens([])


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"promt": "two", "id": 3}, r"has no prompt \(it has id, promt\)"),
        ({"prompt": ""}, "has an empty prompt"),
        ({"prompt": None}, "neither a text nor a list of messages but null"),
        ({"prompt": 5}, "neither a text nor a list of messages but 5"),
        ({"prompt": [{"role": "user"}]}, "message 1 has no role or no content"),
        (["two"], "is a list and not an object"),
        (2, "is a int and not an object"),
    ],
)
@pytest.mark.parametrize("place", [1, 3])
def test_a_row_without_a_prompt_is_named_with_what_is_wrong(tmp_path, row, wrong, place):
    rows = [{"prompt": "one"}, {"prompt": "three"}]
    rows.insert(place - 1, row)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(each) for each in rows))
    with pytest.raises(ValueError, match=rf"(?s)a\.jsonl: .*line {place}: it .*{wrong}; each line must be") as error:
        read_prompts(str(tmp_path / "a.jsonl"))
    assert "nectar" not in str(error.value)


def test_a_row_of_pairs_of_another_shape_is_named(tmp_path):
    rows = [{"prompt": "one"}, {"prompt": "two", "chosen": [5], "rejected": [6]}, {"prompt": "three"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(each) for each in rows))
    with pytest.raises(DataError, match=r"wrong structure \(line 2: not a row of pairs"):
        read_prompts(str(tmp_path / "a.jsonl"))


def test_a_step_is_the_same_however_often_it_is_asked_for_and_however_it_is_cut():
    config = settings(prompts_per_step=5, trade_offs=3, kl_weight=(0.05, 0.2, 0.4), epochs=2, clip=0.2, steps=2)
    source = PromptSource(parts(config)["train"], config, 2, trade_offs=3)
    whole = source(6)
    assert whole.step == 6 and source(7).step == 6 and source(7).prompts == whole.prompts
    cut = [source(6, rank, 3) for rank in range(3)]
    assert sum((part.prompts.texts for part in cut), ()) == whole.prompts.texts
    assert torch.equal(torch.cat([part.weights for part in cut]), whole.weights)
    assert len(torch.unique(whole.weights, dim=0)) == 3
    drawn = torch.cat([source(2 * r).kl_weight for r in range(60)])
    assert set(drawn.tolist()) == set(torch.tensor(config.kl_weight).tolist())


# ---------------------------------------------------------------- what is sampled is what is scored


@pytest.mark.parametrize("scope", SCOPES)
def test_log_probabilities_are_of_the_distribution_that_was_sampled_from(scope):
    base = language_model()
    # What a model may bring along, and what would make samples come from another distribution.
    base.generation_config.update(top_p=0.3, top_k=2, repetition_penalty=2.0, temperature=3.0, do_sample=True)
    config = settings(scope=scope, temperature=0.7)
    policy = new_policy(base, config, ("first", "second"), "clp").eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    sampler = Sampler(base, tokenizer(), config)
    prompts = [[1, 7, 8, 9], [1, 20], [1, 30, 31]]
    w = torch.tensor([0.2, 0.8])
    with policy.at(w, 0.05) as model:
        answers = sampler.sample(model, prompts, processor=lambda mask: lambda ids, scores: scores)
        alone, _ = sampler.score(model, prompts, answers.tokens)
    inputs, place, exists = sampler.inputs(prompts, answers.tokens, "cpu")
    logprob, *_ = policy(inputs, w.expand(3, 2), torch.full((3,), 0.05), 0.7)
    together = logprob.gather(1, place).masked_fill(~exists, 0.0).sum(1).double()
    assert torch.allclose(answers.log_prob, alone.sum(1).double(), atol=1e-4)
    assert torch.allclose(answers.log_prob, together, atol=1e-4)
    assert base.generation_config.top_k == 2


def test_mixing_one_model_with_nothing_of_another_scores_as_that_model():
    config = settings()
    one, other = language_model(), language_model(hidden_size=16)
    sampler = Sampler(one, tokenizer(), config)
    prompts = [[1, 7, 8, 9], [1, 20]]
    answers = sampler.sample(one, prompts, processor=lambda mask: MixedLogits([other], torch.tensor([1.0, 0.0]), mask))
    scores, _ = sampler.score(one, prompts, answers.tokens)
    assert torch.allclose(answers.log_prob, scores.sum(1).double(), atol=1e-4)


# ---------------------------------------------------------------- the exact KL


def full_kl(policy: Policy, sampler: Sampler, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log π and KL of each token's position (R, n) from all logits, each row at its trade-off; which exist."""
    inputs, place, exists = sampler.inputs(rollout.prompts, rollout.responses, "cpu")
    rows = torch.arange(len(place))[:, None]
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), policy.reference() as reference:
        log_q = (reference(**text).logits / temperature).log_softmax(-1)
    logits = policy.model(**text, **policy.arguments(rollout.weights, rollout.kl_weight)).logits
    log_p = (logits / temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[rows, place].masked_fill(~exists, 0.0)
    logprob = log_p.gather(-1, inputs["targets"].clamp(min=0)[..., None])[..., 0][rows, place]
    return logprob, kl, exists


COPIED = {"lora_modules_to_save": ("lm_head", "norm"), "lora_rslora": True}


@pytest.mark.parametrize(
    ("scope", "family", "options"),
    [
        ("lora-mixture", "llama", {}),
        ("lora-mixture", "phi", {"lora_modules_to_save": ("lm_head",)}),
        ("logits", "llama", {}),
        ("hyper-prompt", "llama", {}),
        ("hyper-prompt", "llama", COPIED),
        ("full", "llama", {}),
        ("logits", "gemma2", {}),
    ],
)
def test_the_exact_kl_and_its_gradient_are_those_of_the_full_logits(scope, family, options):
    base = language_model(family=family)
    kl_weights = (0.05, 0.2)[: 1 + (scope == "lora-mixture")]
    config = settings(scope=scope, kl_estimator="exact", temperature=0.7, kl_weight=kl_weights, **options)
    policy = disturbed(new_policy(base, config, ("first", "second"), "clp"))
    sampler = Sampler(base, tokenizer(), config)
    batch = PromptSource(parts(config)["train"], config, 2, trade_offs=3)(0)
    rollout = roll(policy, batch, sampler, make_rewards(), config)
    _, expected, exists = full_kl(policy, sampler, rollout, 0.7)
    inputs, place, _ = sampler.inputs(rollout.prompts, rollout.responses, "cpu")
    hidden = torch.zeros(*inputs["targets"].shape, rollout.hidden.shape[-1])
    hidden[inputs["targets"] >= 0] = rollout.hidden[exists]
    every = policy(inputs, rollout.weights, rollout.kl_weight, 0.7, None, hidden)[2]
    found = every.gather(1, place).masked_fill(~exists, 0.0)
    assert expected[exists].min() > 1e-3 and torch.allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert (every[inputs["targets"] < 0] == 0).all()
    trained = [p for p in policy.parameters() if p.requires_grad]
    upstream = torch.randn_like(found)
    exact = torch.autograd.grad((expected * upstream).sum(), trained)
    for a, b in zip(torch.autograd.grad((found * upstream).sum(), trained), exact, strict=True):
        assert torch.allclose(a, b, atol=1e-5 + 1e-4 * float(b.abs().max()))
    release(policy)


@pytest.mark.parametrize("scope", ["lora-mixture", "logits", "hyper-prompt"])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_a_step_with_the_exact_kl_has_the_gradient_of_full_logits(tmp_path, scope, kl_in):
    base = language_model()
    config = settings(scope=scope, kl_estimator="exact", kl_in=kl_in, kl_weight=0.4)
    policy = disturbed(new_policy(base, config, ("first", "second"), "clp"))
    batch = PromptSource(parts(config)["train"], config, 2, trade_offs=2)(0)
    loss = make_loss(base, config, tmp_path)
    torch.manual_seed(3)
    value, logs = loss(policy, batch, 0)
    trained = [p for p in policy.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, trained)
    torch.manual_seed(3)  # the same rollout again
    rollout = roll(policy, batch, loss.sampler, make_rewards(), config)
    logprob, kl, exists = full_kl(policy, loss.sampler, rollout, 1.0)
    expected = policy_gradient(
        logprob, rollout.rewards, rollout.weights, kl_weight=rollout.kl_weight, mask=exists,
        baseline="leave_one_out", group=2, kl_in=kl_in, kl_estimator="exact", exact_kl=kl,
    )  # fmt: skip
    assert float(logs["kl"]) == pytest.approx(float(expected.kl.mean()), rel=1e-4)
    for a, b in zip(found, torch.autograd.grad(expected.loss, trained), strict=True):
        assert torch.allclose(a, b, atol=1e-5 + 1e-4 * float(b.abs().max()))
    release(policy)


def test_an_exact_kl_wants_hidden_states_of_the_right_shape_and_a_head_that_is_no_longer_trained():
    model = language_model()
    ids = torch.tensor([[1, 7, 8]])
    with pytest.raises(ValueError, match="reference_hidden has shape"):
        model(ids, targets=ids, reference_hidden=torch.zeros(1, 2, 32))
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="pass reference_head"):
        model(ids, targets=ids, reference_hidden=torch.zeros(1, 3, 32))


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("baseline", ["leave_one_out", "value"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_changes_what_the_scope_names_and_nothing_else(tmp_path, scope, baseline):
    base = language_model()
    config = settings(scope=scope, baseline=baseline, steps=1)
    before_base = fingerprint(base)
    policy = new_policy(base, config, ("first", "second"), "clp")
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    source = PromptSource(parts(config)["train"], config, 2, trade_offs=2)
    result = train(policy, source, make_loss(base, config, tmp_path), config.training())
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    named = {
        "full": lambda n: True,
        "attention": lambda n: "self_attn" in n,
        "logits": lambda n: "lm_head" in n,
        "lora-mixture": lambda n: "lora_B" in n,  # A has no gradient while B is 0
        "hyper-prompt": lambda n: "lora_B" in n or "hyper_prompt" in n,
    }[scope]
    model = policy.model
    own = {n for n in changed if not n.startswith("value.")}
    if isinstance(model, ParameterMixture):
        sets = {f"model.model.{n}" for n in model.names}
        assert all(named(n) for n in sets) and {n for n in own if ".others." not in n} == sets
        assert sum(".others." in n for n in own) == len(sets)
    else:
        assert own and all(named(n) for n in own)
        assert {n for n in before if "lora_B" in n} <= own
    assert any(n.startswith("value.") for n in changed) == (baseline == "value")
    assert ("value_loss" in result.last) == (baseline == "value")
    assert {"reward/first", "reward/second", "kl", "entropy", "return"} <= set(result.last)
    release(policy)
    assert fingerprint(base) == before_base


def test_a_mixture_at_a_vertex_trains_only_that_set(tmp_path):
    base = language_model()
    config = settings(scope="attention", steps=1)
    policy = new_policy(base, config, ("first", "second"), "clp")
    source = PromptSource(parts(config)["train"], config, 2, fixed=torch.tensor([0.0, 1.0]))
    before = [[p.detach().clone() for p in own] for own in policy.model.sets]
    train(policy, source, make_loss(base, config, tmp_path), config.training())
    pairs = zip(policy.model.sets, before, strict=True)
    same = [all(torch.equal(a, b) for a, b in zip(own, old, strict=True)) for own, old in pairs]
    assert same == [True, False]


def test_missing_rewards_leave_a_response_out(tmp_path):
    base = language_model()
    config = settings(scope="logits", steps=1)
    policy = new_policy(base, config, ("first", "second"), "clp")
    batch = PromptSource(parts(config)["train"], config, 2, trade_offs=1)(0)
    calls = []

    def first(texts, prompts):
        calls.append(len(texts))
        return [float("nan") if i == 3 else float(i) for i in range(len(texts))]

    rewards = Rewards([FunctionReward(first, "first", cacheable=False), share(20, 40, "second")])
    torch.manual_seed(3)
    loss, logs = make_loss(base, config, tmp_path, rewards)(policy, batch, 0)
    loss.backward()
    assert torch.isfinite(loss) and float(logs["missing"]) == pytest.approx(1 / 8)
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("options", "rewards", "message"),
    [
        ({"kl_limit": 1e-3, "learning_rate": 0.3}, None, "above kl_limit"),
        ({"entropy_floor": 50.0, "patience": 3}, None, "below entropy_floor"),
        ({"patience": 3}, lambda texts, prompts: [1.0] * len(texts), "same rewards for 3 rollouts"),
        ({}, lambda texts, prompts: [float("nan")] * len(texts), "is missing"),
    ],
    ids=["kl", "entropy", "constant", "nan"],
)
def test_guards_stop_a_training_before_the_update_and_name_the_last_checkpoint(tmp_path, options, rewards, message):
    base = language_model()
    config = settings(scope="logits", steps=20, checkpoint_every=1, **options)
    own = rewards and Rewards([FunctionReward(rewards, "first"), FunctionReward(rewards, "second")])
    policy = new_policy(base, config, ("first", "second"), "clp")
    source = PromptSource(parts(config)["train"], config, 2)
    folder = tmp_path / "checkpoints"
    with pytest.raises(PolicyCollapsed, match=message) as stop:
        train(policy, source, make_loss(base, config, tmp_path, own), config.training(), directory=folder)
    latest = CheckpointFolder(folder).latest()
    if latest is None:
        assert "no checkpoint had been written yet" in str(stop.value)
        return
    assert f"the last checkpoint is intact: {latest.path}" in str(stop.value)
    now = [p.detach().clone() for p in policy.parameters()]
    latest.load_model(policy)
    assert all(torch.equal(a, b) for a, b in zip(now, policy.parameters(), strict=True))


@pytest.mark.parametrize(("scope", "steps"), [("attention", 1), ("lora-mixture", 3)])
def test_parameters_that_ran_away_stop_a_training_even_after_its_last_step(place, scope, steps):
    """Activations overflow and the policy is uniform or constant: nothing is NaN, its KL to a flat model is small."""
    config = at(place, scope=scope, learning_rate=1e9, steps=steps, kl_limit=0.0, entropy_floor=0.0)
    with pytest.raises(PolicyCollapsed, match=r"times as large as at the start .* after step 1: .* lower lea") as stop:
        train_policies(config, place / "run", rewards=make_rewards(), say=lambda text: None)
    assert f"the run {place / 'run'} stays as it is: pass other settings with --overwrite" in str(stop.value)
    assert not (place / "run" / "model" / "training.json").exists()
    if steps == 1:  # resumed at its end, it fails as it did
        with pytest.raises(PolicyCollapsed, match="times as large as at the start"):
            train_policies(config, place / "run", resume=True, rewards=make_rewards(), say=lambda text: None)


def test_rewards_are_scaled_by_the_answers_of_the_untrained_model():
    values = torch.tensor([[1.0, 10.0], [3.0, float("nan")], [5.0, 30.0]])
    scale = RewardScale.of(values, ("a", "b"))
    scaled = scale(values)
    assert torch.allclose(scaled.nanmean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(scaled.square().nanmean(0), torch.ones(2))
    with pytest.raises(ValueError, match="the reward b is the same"):
        RewardScale.of(torch.tensor([[1.0, 2.0], [2.0, 2.0]]), ("a", "b"))


def stream(rollouts: int) -> Tensor:
    """Rewards (rollouts, 8, 2) of two units, one of them missing at times."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([5.0, -1e3]) + torch.tensor([3.0, 0.01]) * torch.randn(rollouts, 8, 2, generator=generator)
    values[:, :, 0][torch.rand(rollouts, 8, generator=generator) < 0.2] = torch.nan
    return values


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_a_running_scale_is_mean_and_deviation_of_what_was_seen_the_older_the_lighter(decay):
    values = stream(20).double()
    running = RunningScale(RewardScale.of(values[0], ("a", "b")), decay)
    for rollout in values[1:]:
        running.update(rollout)
    weight = decay ** torch.arange(19, -1, -1).double()[:, None, None] * ~values.isnan()
    mean = (weight * values.nan_to_num()).sum((0, 1)) / weight.sum((0, 1))
    square = (weight * (values.nan_to_num() - mean).square()).sum((0, 1)) / weight.sum((0, 1))
    assert torch.allclose(running.counts, weight.sum((0, 1)))
    # The untrained model's own figures are kept in float32.
    assert torch.allclose(running.mean, mean, rtol=1e-6) and torch.allclose(running.deviation, square.sqrt(), rtol=1e-3)


@pytest.mark.parametrize("decay", [1.0, 0.98])
def test_rewards_of_a_stationary_stream_get_mean_0_and_deviation_1(decay):
    values = stream(600)
    running, scaled = RunningScale(RewardScale.of(values[0], ("a", "b")), decay), []
    for rollout in values[1:]:
        scaled.append(running(rollout))  # by what was known before it
        running.update(rollout)
    late = torch.cat(scaled[200:]).double()
    mean = late.nanmean(0)
    assert mean.abs().max() < 0.05 and ((late - mean).square().nanmean(0).sqrt() - 1).abs().max() < 0.05
    assert torch.equal(scaled[5].isnan(), values[6].isnan())


def test_a_running_scale_forgets_a_beginning_that_was_otherwise_and_takes_a_reward_that_was_constant():
    values = torch.stack([torch.tensor([[0.0, 7.0], [1.0, 7.0]]), *2 + stream(300)[:, :2].nan_to_num(5.0)])
    with pytest.raises(ValueError, match="running"):
        RewardScale.of(values[0], ("a", "b"))
    running = RunningScale(RewardScale.of(values[0], ("a", "b"), constant=True), 0.9)
    assert running(torch.tensor([[0.5, 9.0]])).tolist() == [[0.0, 2.0]]
    for rollout in values[1:]:
        running.update(rollout)
    last = values[-100:].flatten(0, 1)
    assert torch.allclose(running.mean.float(), last.mean(0), rtol=0.3)
    assert running.deviation[1] < 0.1


# ---------------------------------------------------------------- soups


def test_a_soup_that_cannot_be_made_says_why_and_leaves_the_language_model_as_it_was(tmp_path):
    base, config = language_model(), settings(scope="lora-mixture")
    with pytest.raises(ValueError, match=r"would be called \['a_b', 'a_b'\]; give the objectives different names"):
        save_soup([tmp_path, tmp_path], tmp_path / "soup", base, config, ("a.b", "a_b"))
    expert = new_policy(base, config, ("first", "second"), "expert", "first")
    expert.model.save_pretrained(tmp_path / "first")
    release(expert)
    before = set(base.state_dict())
    with pytest.raises(FileNotFoundError, match="second holds no adapter_model"):
        save_soup([tmp_path / "first", tmp_path / "second"], tmp_path / "soup", base, config, ("first", "second"))
    assert set(base.state_dict()) == before


@pytest.mark.parametrize(
    ("scope", "options"),
    [
        *((scope, {"train_shared": shared}) for shared in (False, True) for scope in ("full", "attention", "logits")),
        ("lora-mixture", {}),
        ("lora-mixture", {**COPIED, "lora_rank_pattern": ("q_proj=3",), "lora_alpha_pattern": ("v_proj=2.5",)}),
        ("lora-mixture", {"lora_dora": True}),
    ],
)
def test_a_soup_of_experts_is_the_average_of_their_parameters(tmp_path, scope, options):
    base = language_model()
    config = settings(scope=scope, **options)
    merged = []
    for seed, name in enumerate(("first", "second")):
        expert = new_policy(base, config, ("first", "second"), "expert", name)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in expert.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        expert.model.save_pretrained(tmp_path / name)
        merged.append(expert.model.merge([1.0]))
        release(expert)
    save_soup([tmp_path / "first", tmp_path / "second"], tmp_path / "soup", base, config, ("first", "second"))
    soup = load_policy(tmp_path / "soup", base, config, ("first", "second"), "rewarded-soups")
    assert isinstance(soup.model, LoraMixture if scope == "lora-mixture" else ParameterMixture)
    mixed = soup.model.merge([0.3, 0.7])
    for name, parameter in mixed.named_parameters():
        expected = 0.3 * merged[0].get_parameter(name) + 0.7 * merged[1].get_parameter(name)
        assert torch.allclose(parameter, expected, atol=1e-6), name
    release(soup)


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def place(tmp_path: Path) -> Path:
    build(initializer_range=0.1).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path


def at(place: Path, **options) -> ClpConfig:
    values = settings(**options).to_dict() | {"model": str(place / "model"), "data": str(place / "prompts.txt")}
    return ClpConfig.from_dict(values)


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "lora-mixture", "normalize": "running"},
        {
            "scope": "attention",
            "epochs": 2,
            "clip": 0.2,
            "baseline": "value",
            "normalize": "running",
            "normalize_decay": 0.9,
        },
        {
            "scope": "logits",
            "epochs": 3,
            "clip": 0.2,
            "accumulation": 2,
            "checkpoint_every": 3,
            "steps": 9,
            "kl_estimator": "exact",
        },
    ],
    ids=["lora", "attention-epochs", "logits-accumulation"],
)
def test_a_stopped_training_continues_bit_for_bit_even_between_rollouts(place, options):
    config = at(place, **{"steps": 6, "log_every": 1, "checkpoint_every": 2, **options})
    whole = train_policies(config, place / "whole", rewards=make_rewards(), say=lambda text: None)
    calls = 0
    parts_of_step = config.accumulation

    def count(texts, prompts):
        nonlocal calls
        calls += 1
        # Call 1 judges answers of the untrained model, 2 its held-out ones; then one for each part of a rollout.
        if calls == 2 + 2 * parts_of_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return share(0, 20, "first")(texts, prompts)

    stopping = Rewards([FunctionReward(count, "first", cacheable=False), share(20, 40, "second")], batch_size=10**6)
    with pytest.raises(RunInterrupted):
        train_policies(config, place / "parts", rewards=stopping, say=lambda text: None)
    stopped = CheckpointFolder(place / "parts" / "model" / "checkpoints").latest()
    assert stopped is not None and stopped.step == config.epochs + 1
    parts = train_policies(config, place / "parts", resume=True, rewards=make_rewards(), say=lambda text: None)
    for file in sorted((whole / "model").rglob("*.safetensors")):
        assert file.read_bytes() == (parts / file.relative_to(whole)).read_bytes(), file.name

    def records(run: Path, name: str) -> list[dict]:
        found = [json.loads(line) for line in (run / name).read_text().splitlines()]
        return [{key: value for key, value in record.items() if key != "seconds"} for record in found]

    for name in ("log.jsonl", "samples.jsonl"):
        assert records(whole, name) == records(parts, name)
    if config.normalize == "running":
        done = [json.loads((run / "model" / "training.json").read_text()) for run in (whole, parts)]
        assert done[0]["mean"] == done[1]["mean"] and done[0]["deviation"] == done[1]["deviation"]
        # What was logged after each rollout, ending with what is written.
        logged = [record["mean/first"] for record in records(whole, "log.jsonl")]
        assert len(set(logged)) > 2 and logged[-1] == pytest.approx(done[0]["mean"][0])
    assert Front.load(whole / "front.json").points == Front.load(parts / "front.json").points
    assert not (parts / "model" / "rollouts").exists()


def test_several_epochs_begin_with_the_gradient_of_one(tmp_path):
    base = language_model()
    grads = []
    for epochs, clip in ((1, None), (2, 0.2)):
        config = settings(scope="logits", epochs=epochs, clip=clip)
        policy = new_policy(base, config, ("first", "second"), "clp")
        source = PromptSource(parts(config)["train"], config, 2)
        loss = make_loss(base, config, tmp_path / str(epochs))
        torch.manual_seed(5)
        loss(policy, source(0), 0)[0].backward()
        grads.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
        if epochs == 2:  # the second one, at unchanged parameters, has ratios of 1 and so the same gradient
            policy.zero_grad()
            loss(policy, source(1), 1)[0].backward()
            grads.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for later in grads[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads[0], later, strict=True))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train_one_policy(tmp_path):
    done = launch(2, str(DISTRIBUTED / "clp_policies.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "both processes have one policy" in done.stdout


@pytest.mark.slow
def test_rewards_follow_the_weights_and_fronts_and_values_are_no_worse_than_those_of_rewarded_soups(place):
    """Full scope, three seeds, equal updates in all: 60 of one policy, 30 of each of the soup's two experts."""
    volumes: dict[str, float] = {}
    values: dict[str, float] = {}
    for seed in range(3):
        for method, steps in (("clp", 60), ("rewarded-soups", 30)):
            config = at(
                place, method=method, scope="full", steps=steps, seed=seed, learning_rate=3e-3, concentration=0.3,
                trade_offs=1, samples_per_prompt=4, points=5, eval_samples=8, log_samples=0, log_every=50,
            )  # fmt: skip
            run = place / f"{method}-{seed}"
            train_policies(config, run, rewards=make_rewards(), say=lambda text: None)
            front = Front.load(run / "front.json")
            volumes[method] = volumes.get(method, 0.0) + front.hypervolume
            figures = json.loads((run / "evaluation.json").read_text())[0]
            values[method] = values.get(method, 0.0) + sum(figures["value"])
            if method == "clp":
                assert min(front.steerability["spearman"]) > 0.9
                assert front.hypervolume > Front.load(run / "base" / "front.json").hypervolume
    assert volumes["clp"] >= volumes["rewarded-soups"], volumes
    assert values["clp"] >= values["rewarded-soups"], values


@pytest.mark.slow
def test_one_policy_for_one_reward_answers_for_every_kl_weight(place):
    """The larger α, the less reward and the less KL; and more value there than DeRa gets out of the policy of α_min."""
    figures = {}
    for method in ("clp", "dera"):
        config = at(
            place, method=method, scope="full", rewards=("first",), kl_weight=(0.05, 0.1, 0.2, 0.5), steps=60,
            trade_offs=4, learning_rate=3e-3, samples_per_prompt=4, eval_samples=8, log_samples=0, log_every=100,
        )  # fmt: skip
        run = place / method
        train_policies(config, run, rewards=Rewards([share(0, 20, "first")]), say=lambda text: None)
        figures[method] = json.loads((run / "evaluation.json").read_text())
    rewards = [entry["rewards"][0][0] for entry in figures["clp"]]
    kl = [entry["kl"][0] for entry in figures["clp"]]
    assert sorted(rewards, reverse=True) == rewards and sorted(kl, reverse=True) == kl
    clp, dera = (sum(entry["value"][0] for entry in figures[m][:3]) for m in ("clp", "dera"))
    assert clp > dera
    assert [entry["model_runs_per_token"] for entry in figures["dera"]] == [2] * 4


def test_the_training_config_is_read_off_the_settings():
    config = settings(steps=7, gradient_clip=0.0, schedule="cosine")
    assert config.training() == TrainingConfig(
        steps=7, learning_rate=1e-2, gradient_clip=None, schedule="cosine", log_every=1, checkpoint_every=100
    )
