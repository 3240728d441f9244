"""`MultiObjectiveGRPOTrainer` against TRL itself, plain formulas and an exact gradient."""

import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", minversion="1.15", reason="MultiObjectiveGRPOTrainer needs trl >= 1.15")
peft = pytest.importorskip("peft")

from grpo_cases import CONFIG, DATA, arguments, high, low, mixture, prompted, trained, trainer
from tiny_language_models import VOCABULARY, build, tokenizer

from mopl._rows import UnsupportedModelError
from mopl.conditioning import LoraMixture, ParameterMixture

STEPS = dict(
    max_steps=5, num_iterations=2, steps_per_generation=2, gradient_accumulation_steps=2, gradient_checkpointing=True,
    per_device_train_batch_size=4,
)  # fmt: skip


def history(one):
    """Return the figures of the log that both trainers have and that are no times."""
    names = ("loss", "grad_norm", "kl", "entropy", "reward", "reward_std", "clip_ratio/region_mean")
    return [{name: row[name] for name in names if name in row} for row in one.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """TRL's own training of one adapter on the first reward."""
    torch.manual_seed(2)
    model = peft.get_peft_model(build(), peft.LoraConfig(**CONFIG))
    one = trainer(
        tmp_path_factory.mktemp("trl"), model, [low], trl.GRPOTrainer, trl.GRPOConfig, beta=0.2, **STEPS
    )  # fmt: skip
    one.train()
    return one


@pytest.mark.parametrize("objectives", [1, 2])
def test_one_objective_and_one_hot_weights_are_trl_step_for_step(theirs, tmp_path, objectives):
    model = mixture(objectives, trained=False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {} if objectives == 1 else {"objective_weights": [1.0, 0.0]}
    one = trainer(tmp_path, model, [low, high][:objectives], beta=0.2, **options, **STEPS)
    one.train()
    ours, expected = history(one), history(theirs)
    assert len(ours) == len(expected) == 5 and ours[-1]["kl"] > 1e-4
    for a, b in zip(ours, expected, strict=True):
        assert a.keys() == b.keys() and all(abs(a[name] - b[name]) <= 1e-5 * max(1, abs(b[name])) for name in a)
    found = {name.removeprefix("model."): value for name, value in trained(one).items()}
    first = {name.replace(model.adapters[0], "default"): v for name, v in found.items() if model.adapters[0] in name}
    wanted = {name: value for name, value in trained(theirs).items()}
    assert first.keys() == wanted.keys() and len(first) == 8
    for name, value in wanted.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
    for name, value in trained(one).items():
        moved = not torch.equal(value, start[name])
        assert moved == (model.adapters[0] in name)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_fixed_weights_of_a_plain_model_are_reward_weights_of_trl(tmp_path, aggregation):
    options = dict(multi_objective_aggregation=aggregation, max_steps=2)
    weights, scale = [0.25, 0.75], [2.0, 0.5]
    own = trainer(tmp_path, build(), objective_weights=weights, reward_weights=scale, **options)
    own.train()
    scaled = [w * s for w, s in zip(weights, scale, strict=True)]
    other = trainer(tmp_path, build(), kind=trl.GRPOTrainer, args=trl.GRPOConfig, reward_weights=scaled, **options)
    other.train()
    for a, b in zip(history(own), history(other), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------- rows


def rows_of(one):
    """Return a batch of rows as TRL makes them from its own completions, at weights of their own."""
    one.model.train()
    return one._generate_and_score_completions([DATA[i // 4] for i in range(8)])


@pytest.mark.parametrize("make", [mixture, prompted, lambda: prompted("paper")])
def test_rows_of_different_weights_score_as_each_alone(tmp_path, make):
    one = trainer(tmp_path, make(), temperature=0.7)
    batch = rows_of(one)
    assert len(set(map(tuple, batch["objective_weights"].tolist()))) == 2
    batch["objective_weights"] = torch.rand(8, 1).expand(8, 2) * torch.tensor([1.0, -1.0]) + torch.tensor([0.0, 1.0])
    one.model.eval()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    assert bool((batch["prompt_mask"] == 0).any())
    one._rows, keep = batch["objective_weights"], batch["completion_ids"].shape[1]
    with torch.no_grad():  # in chunks of three rows, as TRL cuts a batch
        found, entropy, _ = one._get_per_token_logps_and_entropies(
            one.model, ids, mask, keep, batch_size=3, compute_entropy=True
        )
        for row in range(8):
            real = ids[row][mask[row].bool()][None]
            with one.model.at(batch["objective_weights"][row]) as alone:
                logp = (alone(real, torch.ones_like(real)).logits[0].double() / 0.7).log_softmax(-1)
            length = int(batch["completion_mask"][row].sum())
            at = logp[-length - 1 : -1]
            torch.testing.assert_close(
                found[row, :length].double(), at.gather(1, real[0, -length:, None])[:, 0], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(entropy[row, :length].double(), -(at.exp() * at).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapters", [True, False])
def test_prompts_padded_on_the_left_score_as_alone_where_a_model_counts_positions_from_the_edge(tmp_path, adapters):
    model, options = build("gpt2"), {}
    if adapters:
        config = peft.LoraConfig(
            **{**CONFIG, "target_modules": ["c_attn"]}, fan_in_fan_out=True, init_lora_weights=False
        )
        model = LoraMixture(model, 2, config=config)
    else:
        options["objective_weights"] = [0.5, 0.5]
    one = trainer(tmp_path, model, **options)
    batch = rows_of(one)
    one.model.eval()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    assert bool((batch["prompt_mask"] == 0).any())
    one._rows = batch["objective_weights"]
    with torch.no_grad():
        found, _, _ = one._get_per_token_logps_and_entropies(one.model, ids, mask, batch["completion_ids"].shape[1])
        for row in range(8):
            real = ids[row][mask[row].bool()][None]
            weights = {"weights": batch["objective_weights"][row]} if adapters else {}
            logp, length = (
                one.model(real, **weights).logits[0].log_softmax(-1),
                int(batch["completion_mask"][row].sum()),
            )
            wanted = logp[-length - 1 : -1].gather(1, real[0, -length:, None])[:, 0]
            torch.testing.assert_close(found[row, :length], wanted, rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_take_prompts_padded_on_the_left_is_refused(tmp_path):
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        lru_width=32, attention_window_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.RecurrentGemmaForCausalLM(config)
    one = trainer(tmp_path, model, objective_weights=[0.5, 0.5], max_steps=4)  # all prompts
    with pytest.raises(UnsupportedModelError, match="cannot take rows padded on the left"):
        one.train()


def test_a_head_that_does_more_than_multiply_is_refused(tmp_path):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        is_decoder=True, pad_token_id=0,
    )  # fmt: skip
    model = LoraMixture(transformers.BertLMHeadModel(config), 2, config=peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match=r"the head of the model is cls.predictions.decoder, inside of a BertLM"):
        trainer(tmp_path, model)


@pytest.mark.parametrize("kind", ["LoraMixture", "ParameterMixture"])
def test_a_merged_copy_computes_by_itself_and_not_through_trls_head_of_the_mixture(tmp_path, kind):
    model = mixture() if kind == "LoraMixture" else ParameterMixture(build(), 2)
    one = trainer(tmp_path, model, weights_per="step")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights, ids = torch.tensor([0.3, 0.7]), torch.tensor([[1, 9, 11]])
    merged = one.model.eval().merge(weights)
    torch.testing.assert_close(merged(ids).logits, one.model(ids, weights=weights).logits, rtol=1e-4, atol=1e-4)
    labels = torch.tensor([[-100, 9, 11]])
    assert "forward" in vars(one.model.causal_lm)  # which keeps its head
    assert one.model(ids, weights=weights, labels=labels, fused_lm_head=True).log_probs.shape == (1, 2)


def test_weights_are_those_of_the_prompt_and_travel_with_the_row(tmp_path):
    one = trainer(tmp_path, mixture(), steps_per_generation=4, per_device_train_batch_size=4, num_generations=2)
    one.model.train()
    drawn = one._drawn(0)  # of 8 prompts
    assert len(set(map(tuple, drawn.tolist()))) == 8
    parts = []
    for step in range(4):
        one._step = step
        parts.append(one._prepare_inputs([DATA[i // 2] for i in range(16)]))
    texts = one.processing_class.batch_decode(torch.cat([p["prompt_ids"] for p in parts]), skip_special_tokens=True)
    weights = torch.cat([part["objective_weights"] for part in parts])
    assert texts != sorted(texts)  # they were shuffled
    for text, row in zip(texts, weights, strict=True):
        torch.testing.assert_close(row, drawn[DATA["prompt"].index(text)].float())


def test_every_step_draws_others_and_a_step_the_same_again(tmp_path):
    one, again = (trainer(tmp_path, mixture(), seed=5) for _ in range(2))
    torch.rand(7)  # no global generator is asked
    assert torch.equal(one._drawn(3), again._drawn(3)) and not torch.equal(one._drawn(3), one._drawn(4))
    shared = trainer(tmp_path, mixture(), weights_per="step")._drawn(0)
    assert shared.shape == (2, 2) and torch.equal(shared[0], shared[1])


def test_the_reference_of_a_trained_mixture_is_the_mixture_as_it_was_at_each_rows_weights(tmp_path):
    one, untouched = trainer(tmp_path, mixture(), beta=0.1), mixture()
    with torch.no_grad():
        for parameter in one.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    batch = rows_of(one)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    keep = batch["completion_ids"].shape[1]
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = untouched.eval()(ids, mask, weights=batch["objective_weights"], position_ids=positions).logits
    wanted = logits[:, -keep - 1 : -1].log_softmax(-1).gather(2, batch["completion_ids"][..., None])[..., 0]
    exists = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["ref_per_token_logps"][exists], wanted[exists], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- scalarised rewards


def advantages(rewards, weights, group, aggregation, scale):
    """The formulas of TRL's documentation in float64, for w of each row; NaN is a reward that is missing."""
    groups = [slice(i, i + group) for i in range(0, len(rewards), group)]
    lost = (rewards.isnan() | (weights == 0)).all(1)

    def total(values):
        return (values * weights).nansum(1).masked_fill(lost, torch.nan)

    def deviation(values, dim=0):
        known = (~values.isnan()).sum(dim)
        return ((values - values.nanmean(dim, keepdim=True)) ** 2).nansum(dim).div(known - 1).sqrt()

    if aggregation == "normalize_then_sum":
        parts = [(rewards[g] - rewards[g].nanmean(0)) / (deviation(rewards[g]) + 1e-4) for g in groups]
        found = total(torch.cat(parts))
        return ((found - found.nanmean()) / (deviation(found) + 1e-4)).nan_to_num(0.0)
    found = total(rewards)
    by = {"group": [deviation(found[g]) + 1e-4 for g in groups], "batch": [deviation(found) + 1e-4] * len(groups)}
    by["none"] = [torch.tensor(1.0)] * len(groups)
    centred = [(found[g] - found[g].nanmean()) / d for g, d in zip(groups, by[scale], strict=True)]
    return torch.cat(centred).nan_to_num(0.0)


@pytest.mark.parametrize(
    "aggregation, scale",
    [("sum_then_normalize", "group"), ("sum_then_normalize", "batch"), ("sum_then_normalize", "none"),
     ("normalize_then_sum", "group")],
)  # fmt: skip
@pytest.mark.parametrize("normalization", ["none", "running"])
def test_advantages_are_those_of_the_plain_formula_at_each_rows_weights(tmp_path, aggregation, scale, normalization):
    if normalization == "running" and aggregation == "normalize_then_sum":
        with pytest.raises(ValueError, match="which standardises each reward within its group already"):
            arguments(tmp_path, multi_objective_aggregation=aggregation, reward_normalization=normalization)
        return
    table = torch.randn(8, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * torch.tensor([1, 30.0])
    table[1, 0] = table[5, 1] = table[6, 0] = table[6, 1] = torch.nan

    def column(j):
        def reward(completions, **_):
            return [None if x != x else x for x in table[:, j].tolist()]

        reward.__name__ = f"reward_{j}"
        return reward

    factors = [2.0, 0.5]
    one = trainer(
        tmp_path, mixture(), [column(0), column(1)], multi_objective_aggregation=aggregation, scale_rewards=scale,
        reward_weights=factors, reward_normalization=normalization,
    )  # fmt: skip
    batch = rows_of(one)
    weights = batch["objective_weights"].double() * torch.tensor(factors, dtype=torch.float64)
    if normalization == "running":  # the first rewards: over themselves
        known = ~table.isnan()
        weights = weights / ((table - table.nanmean(0)) ** 2).nansum(0).div(known.sum(0)).sqrt()
    wanted = advantages(table, weights, 4, aggregation, scale)
    torch.testing.assert_close(batch["advantages"].double(), wanted, rtol=1e-4, atol=1e-4)
    assert batch["advantages"][6] == 0
    logged = (table * weights).nansum(1)[~table.isnan().all(1)].mean()
    assert one._metrics["train"]["reward"][0] == pytest.approx(float(logged), rel=1e-4)
    assert one._logs["extra"]["weight/reward_1"][0] == pytest.approx(float(batch["objective_weights"][0, 1]))


def test_a_completion_whose_only_reward_has_the_weight_zero_counts_for_nothing(tmp_path):
    def sometimes(completions, **_):
        return [1.0, None, 3.0, 5.0] * 2

    def always(completions, **_):
        return [9.0] * 8

    one = trainer(tmp_path, mixture(), [sometimes, always], objective_weights=[1.0, 0.0], scale_rewards="none")
    assert rows_of(one)["advantages"].tolist() == pytest.approx([-2.0, 0.0, 0.0, 2.0] * 2)


# ---------------------------------------------------------------- an exact gradient


@pytest.mark.parametrize("kind", ["LoraMixture", "HyperPromptModel", "ParameterMixture"])
def test_the_expected_update_is_the_gradient_of_the_expected_scalarised_reward(tmp_path, kind):
    """All pairs of one-token answers of three prompts, each pair as likely as the policy makes it."""
    size, group = 8, 2
    if kind == "ParameterMixture":
        model = ParameterMixture(build(vocabulary=size), 2)
        with torch.no_grad():
            for parameter in model.others.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    else:
        model = (mixture if kind == "LoraMixture" else prompted)(vocabulary=size)
    per = "step" if kind == "ParameterMixture" else "prompt"
    values = torch.randn(size, 2, generator=torch.Generator().manual_seed(1))

    def reward(j):
        def function(completion_ids, **_):
            return [float(values[ids[0], j]) for ids in completion_ids]

        function.__name__ = f"r{j}"
        return function

    one = trainer(
        tmp_path, model, [reward(0), reward(1)], num_generations=group, scale_rewards="none", loss_type="dr_grpo",
        max_completion_length=1, per_device_train_batch_size=6, weights_per=per, concentration=0.5,
        processing_class=tokenizer(size=size),
    )  # fmt: skip
    one.current_gradient_accumulation_steps = 1
    model.train()
    prompts = [{"prompt": text} for text in ("w0 w1", "w1", "w1 w0 w0")]
    tokens = [one.processing_class(each["prompt"])["input_ids"] for each in prompts]
    pairs = torch.tensor(list(itertools.product(range(size), repeat=2)))
    drawn = one._drawn(0)
    assert per == "step" or len(set(map(tuple, drawn.tolist()))) == 3
    one._drawn = lambda step: drawn.repeat_interleave(len(pairs), 0)  # every pair of a prompt is a group of its own
    one._generate_single_turn = lambda *_: (pairs.view(-1, 1).repeat(3, 1).tolist(), None)
    batch = one._generate_and_score_completions([each for each in prompts for _ in range(2 * len(pairs))])
    assert torch.equal(batch["objective_weights"][:: 2 * len(pairs)], drawn.float())

    def policy(n):
        return model(torch.tensor([tokens[n]]), weights=drawn[n]).logits[0, -1].softmax(-1)

    with torch.no_grad():
        likely = torch.cat([policy(n)[pairs].prod(1) for n in range(3)])  # (3 * 64,), 1 for each prompt
    # The loss is a mean over the groups; here each counts as often as it would be sampled.
    batch["advantages"] = batch["advantages"] * (likely * len(pairs)).repeat_interleave(2)
    model.zero_grad()
    one._compute_loss(model, batch).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = sum((policy(n) * (values @ drawn[n].float())).sum() / 3 for n in range(3))
    # The mean of the group holds the answer itself, so the estimate is (1 - 1/G) of the gradient.
    (-expected * (1 - 1 / group)).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and max(float(g.abs().max()) for g in wanted.values()) > 1e-3
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-6)


# ---------------------------------------------------------------- the head of mopl


@pytest.mark.parametrize("make", [mixture, prompted])
def test_a_trainer_patched_by_patch_trl_trains_the_same(tmp_path, make):
    heads = pytest.importorskip("mopl.integrations.trl_heads", reason="this version of mopl has no patch_trl")
    found = []
    for patched in (False, True):
        one = trainer(tmp_path, make(), max_steps=2, beta=0.1, num_iterations=2)
        if patched:
            heads.patch_trl(one)
        one.train()
        found.append((history(one), trained(one)))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-4, atol=1e-5)
