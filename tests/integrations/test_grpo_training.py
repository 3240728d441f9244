"""Whole trainings by `MultiObjectiveGRPOTrainer`: resumed, evaluated, saved and exported, and what it refuses."""

import pytest
import torch

pytest.importorskip("transformers")
trl = pytest.importorskip("trl", minversion="1.15", reason="MultiObjectiveGRPOTrainer needs trl >= 1.15")
peft = pytest.importorskip("peft")

from grpo_cases import CONFIG, DATA, high, low, mixture, prompted, trained, trainer
from tiny_language_models import build, tokenizer

from mopl.cli import main
from mopl.conditioning import HyperPrompt, HyperPromptModel, LoraMixture, ParameterMixture, WeightedModel
from mopl.integrations._rollout_checks import check_release
from mopl.pareto import Front

# ---------------------------------------------------------------- resumed


@pytest.mark.parametrize("kind", ["LoraMixture", "HyperPromptModel", "ParameterMixture"])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, kind):
    """Interrupted in the middle of what one generation is used for, and while the scale of rewards follows them."""
    options = dict(
        max_steps=6, save_strategy="steps", save_steps=3, steps_per_generation=2, num_iterations=2,
        per_device_train_batch_size=4, reward_normalization="running", beta=0.1,
    )  # fmt: skip
    make = {
        "LoraMixture": mixture,
        "HyperPromptModel": prompted,
        "ParameterMixture": lambda: ParameterMixture(build(), 2),
    }
    if kind == "ParameterMixture":
        options |= dict(weights_per="step", beta=0.0)
    whole = trainer(tmp_path / "run", make[kind](), **options)
    whole.train()
    again = trainer(tmp_path / "other", make[kind](), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    expected = trained(whole)
    assert any(not torch.equal(p, q) for p, q in zip(expected.values(), trained_of(make[kind]()).values(), strict=True))
    for name, value in trained(again).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    rows = [{k: v for k, v in row.items() if "time" not in k} for row in whole.state.log_history if "loss" in row]
    others = [{k: v for k, v in row.items() if "time" not in k} for row in again.state.log_history if "loss" in row]
    assert rows == others and len(rows) == 6


def trained_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_a_checkpoint_without_its_rollouts_is_refused(tmp_path):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    trainer(tmp_path / "run", mixture(), **options).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "rollouts.pt").unlink()
    with pytest.raises(ValueError, match=r"has no rollouts.pt, so the training could not go on where it was"):
        trainer(tmp_path / "other", mixture(), **options).train(resume_from_checkpoint=str(checkpoint))


# ---------------------------------------------------------------- evaluated


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """A mixture trained on two rewards that ask for opposite tokens, its base model in a folder."""
    folder = tmp_path_factory.mktemp("steered")
    from transformers import AutoModelForCausalLM

    build(initializer_range=0.1).save_pretrained(folder / "base")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", exclude_modules="lm_head")
    one = trainer(
        folder / "run", LoraMixture(base, 2, config=config), max_steps=25, learning_rate=2e-2, eval_dataset=DATA,
        num_generations=8, per_device_train_batch_size=64, eval_points=3, reference_point=[-6.0, 0.0],
        max_completion_length=3, num_generations_eval=4, eval_strategy="steps", eval_steps=25, logging_steps=25,
    )  # fmt: skip
    one.train()
    one.save_model(str(folder / "saved"))
    return one, folder


def test_a_short_training_steers(steered):
    one, _ = steered
    (found,) = (row for row in one.state.log_history if "eval_hypervolume" in row)
    small = [found[f"eval_rewards/low@{w}"] for w in ("0.00,1.00", "0.50,0.50", "1.00,0.00")]
    large = [found[f"eval_rewards/high@{w}"] for w in ("0.00,1.00", "0.50,0.50", "1.00,0.00")]
    assert small[2] - small[0] > 0.8 and large[0] - large[2] > 0.8, (small, large)
    assert found["eval_reward@1.00,0.00"] == pytest.approx(small[2], abs=1e-5)
    assert found["eval_reward"] == pytest.approx(
        (small[2] + large[0] + (small[1] + large[1]) / 2) / 3, abs=1e-4
    )  # TRL's own figure, over the grid


def test_the_front_of_an_evaluation_is_one_of_mopl(steered, tmp_path):
    one, _ = steered
    (found,) = (row for row in one.state.log_history if "eval_hypervolume" in row)
    front = one.front("grpo", data="words")
    assert [point.weights for point in front.points] == [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    assert front.objectives == ["low", "high"] and front.hypervolume == pytest.approx(found["eval_hypervolume"])
    assert front.points[2].auxiliary[0] == pytest.approx(found["eval_rewards/low@1.00,0.00"])
    low_end, high_end = front.points[2].interval["auxiliary"][0]
    assert low_end <= front.points[2].auxiliary[0] <= high_end
    front.save(tmp_path / "front.json")
    assert Front.load(tmp_path / "front.json").hypervolume == front.hypervolume


def test_prompts_that_fill_up_a_batch_count_once_and_missing_rewards_stop_nothing(tmp_path):
    def never(completions, **_):
        return [None] * len(completions)

    one = trainer(tmp_path, mixture(), [low, never], reference_point=[-9.0, -9.0], eval_points=2, eval_dataset=DATA)
    with pytest.warns(UserWarning, match="no completion of the evaluation has a reward for never at 2 points"):
        found = one.evaluate()
    assert "eval_hypervolume" not in found and found["eval_rewards/low@1.00,0.00"] < 0
    with pytest.raises(ValueError, match="reward for never at 2 points, so it has no place on a front"):
        one.front()
    with pytest.raises(NotImplementedError, match=r"pass the prompts to evaluate\(\)"):
        one.predict(DATA)
    # As two processes leave it that share three prompts: the first is there again.
    one._found = [[rewards.clone() for rewards in torch.arange(32.0).view(4, 4, 2)] for _ in range(2)]
    one._prompts = 3
    assert one._rewards_of_grid().shape == (3, 2, 2)


def test_a_data_set_that_is_evaluated_by_its_name_counts_all_its_prompts(tmp_path):
    one = trainer(tmp_path, mixture(), eval_points=2, eval_dataset={"a": DATA})
    found = one.evaluate()["eval_a_rewards/low@1.00,0.00"]
    assert found == pytest.approx(float(one._rewards_of_grid()[:, 1, 0].mean()))
    assert len(one._rewards_of_grid()) == len(DATA)


def test_evaluations_do_not_move_the_training(tmp_path):
    plain = trainer(tmp_path / "a", mixture(), max_steps=3)
    plain.train()
    measured = trainer(
        tmp_path / "b", mixture(), max_steps=3, eval_dataset={"words": DATA}, eval_strategy="steps", eval_steps=1,
        eval_weights=[[0.3, 0.7]],
    )  # fmt: skip
    measured.train()
    for name, value in trained(measured).items():
        torch.testing.assert_close(value, trained(plain)[name], rtol=0, atol=0)
    rows = [row for row in measured.state.log_history if "eval_words_rewards/low@0.30,0.70" in row]
    assert len(rows) == 3 and all(row["eval_weights/low"] == pytest.approx(0.3) for row in rows)


# ---------------------------------------------------------------- saved and exported


def test_what_is_saved_opens_as_what_was_trained(steered):
    one, folder = steered
    loaded = WeightedModel.from_pretrained(folder / "saved")
    assert type(loaded) is LoraMixture
    assert loaded.record.objectives == ("low", "high") and loaded.record.concentration == 1.0
    ids, weights = torch.tensor([[1, 9, 11]]), torch.tensor([0.2, 0.8])
    one.model.eval()
    torch.testing.assert_close(loaded.eval()(ids, weights=weights).logits, one.model(ids, weights=weights).logits)


def test_what_is_saved_is_exported_merged_and_as_adapters(steered, tmp_path, capsys):
    one, folder = steered
    assert main(["export", str(folder / "saved"), "--weights", "0.2", "0.8", str(tmp_path / "plain")]) == 0
    from transformers import AutoModelForCausalLM

    plain, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), torch.tensor([[1, 9, 11]])
    wanted = one.model.eval()(ids, weights=torch.tensor([0.2, 0.8])).logits
    torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert main(["export", str(folder / "saved"), "--adapters", str(tmp_path / "adapters")]) == 0
    assert {"low", "high"} <= {path.name for path in (tmp_path / "adapters").iterdir()}


# ---------------------------------------------------------------- refused


def with_head(model):
    return LoraMixture(model, 2, config=peft.LoraConfig(**{**CONFIG, "target_modules": ["q_proj", "lm_head"]}))


def parameters():
    return ParameterMixture(build(), 2)


def with_beta():
    return HyperPromptModel(build(), HyperPrompt(2, 3, 2, 32, takes_beta=True))


@pytest.mark.parametrize(
    "make, options, words",
    [
        (lambda: with_head(build()), {}, "the head of the model is a Linear.*leave the head out"),
        (with_beta, {}, "conditioned on β, too"),
        (parameters, {}, "weights_per is 'prompt' but a ParameterMixture"),
        (parameters, {"weights_per": "step", "beta": 0.1}, "beta is 0.1 but a ParameterMixture"),
        (parameters, {"weights_per": "step", "gradient_checkpointing": True}, "gradient_checkpointing is True"),
        (mixture, {"use_vllm": True}, "use_vllm is True with a LoraMixture and weights_per is 'prompt', but vLLM"),
        (prompted, {"use_vllm": True, "weights_per": "step"}, "no merged model is a HyperPromptModel"),
        (mixture, {"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 is True with a LoraMixture"),
        (mixture, {"rewards": [low]}, "there is 1 reward function .low. but the model has 2 objectives"),
        (mixture, {"objectives": ["a", "a"]}, "a name of its own each"),
        (mixture, {"objectives": ["high", "low"]}, "put both in one order"),
        (mixture, {"objectives": ["a"]}, "name one for each"),
        (mixture, {"objective_weights": [0.5, 0.6]}, "does not sum to 1"),
        (mixture, {"objective_weights": [0.5, 0.5], "concentration": 2.0}, "leave concentration and weights_per out"),
        (build, {"concentration": 2.0}, "the model takes no weights that could be drawn"),
        (build, {"eval_points": 3}, "eval_points was passed but the model takes no weights"),
        (mixture, {"reference_point": [0.0]}, r"reference_point is \[0.0\]; pass one number an objective, 2"),
        (mixture, {"weights_per": "list"}, "weights_per"),
        (mixture, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "gradient_checkpointing_kwargs is"),
    ],
)  # fmt: skip
def test_what_cannot_be_exact_is_refused(tmp_path, make, options, words):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, make(), **options)


def test_options_of_trl_that_go_round_the_rows_are_refused(tmp_path):
    from mopl.integrations.grpo import MultiObjectiveGRPOConfig, MultiObjectiveGRPOTrainer

    args = MultiObjectiveGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    common = dict(args=args, train_dataset=DATA, processing_class=tokenizer())
    for name, value in (("peft_config", peft.LoraConfig(**CONFIG)), ("tools", [low]), ("rollout_func", low)):
        with pytest.raises(ValueError, match=f"{name} was passed with a LoraMixture"):
            MultiObjectiveGRPOTrainer(mixture(), [low, high], **common, **{name: value})


@pytest.mark.parametrize("whole", [True, False])
def test_parameters_that_train_in_16_bit_are_warned_of(tmp_path, whole):
    model = build().to(torch.bfloat16)
    with pytest.warns(UserWarning, match="bfloat16, which rounds away updates"):
        if whole:
            trainer(tmp_path, ParameterMixture(model, 2), weights_per="step")
        else:
            trainer(tmp_path, model, objective_weights=[0.5, 0.5])


def test_an_older_trl_is_refused_by_its_number():
    with pytest.raises(ImportError, match=r"needs trl >= 1.15.*but trl is 1.14.2"):
        check_release("1.14.2")
    check_release("1.15.0"), check_release("2.0.0.dev0"), check_release("1.16.0")


def test_the_names_of_a_model_are_those_of_the_log(tmp_path):
    torch.manual_seed(0)
    model = LoraMixture(build(), 2, config=peft.LoraConfig(**CONFIG), record=["brief", "rich"])
    one = trainer(tmp_path, model, max_steps=1, log_completions=True, weights_per="step")
    one.train()
    row = one.state.log_history[0]
    assert one.objectives == ("brief", "rich") and row["weights/brief"] + row["weights/rich"] == pytest.approx(1)
    assert row["reward"] == pytest.approx(
        row["weights/brief"] * row["rewards/brief/mean"] + row["weights/rich"] * row["rewards/rich/mean"], rel=1e-4
    )


# ---------------------------------------------------------------- vLLM, by a stand-in for its server


class Server:
    """What TRL's client of a vLLM server is asked, answered by a model of transformers."""

    def __init__(self, **_):
        self.model, self.sent, self.names = build(), [], None

    def init_communicator(self, device): ...

    def reset_prefix_cache(self): ...

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, parameters):
        given = {name: value.detach().clone() for name, value in parameters}
        assert [name for name, *_ in metadata] == list(given)
        missing, unexpected = self.model.load_state_dict(given, strict=False)
        assert not unexpected and not set(missing) - {"lm_head.weight"}
        self.sent.append(given)

    def generate(self, prompts, n, max_tokens, temperature, **_):
        found = {"prompt_ids": prompts, "completion_ids": [], "logprobs": []}
        for prompt in prompts:
            for _ in range(n):
                ids, logprobs = list(prompt), []
                for _ in range(max_tokens):
                    with torch.no_grad():
                        likely = (self.model(torch.tensor([ids])).logits[0, -1] / temperature).log_softmax(-1)
                    ids.append(int(likely.exp().multinomial(1)))
                    logprobs.append([float(likely[ids[-1]])])
                    if ids[-1] == 2:
                        break
                found["completion_ids"].append(ids[len(prompt) :])
                found["logprobs"].append(logprobs)
        return found


@pytest.mark.parametrize("make", [mixture, lambda: ParameterMixture(build(), 2)])
def test_vllm_gets_the_merged_model_of_each_steps_weights(tmp_path, monkeypatch, make):
    from trl.generation import vllm_generation

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *_: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", Server, raising=False)
    # Two generations in one step of the optimizer: their weights differ, the step does not.
    one = trainer(
        tmp_path, make(), max_steps=3, use_vllm=True, vllm_mode="server", weights_per="step", temperature=0.8,
        gradient_accumulation_steps=2, steps_per_generation=1, learning_rate=5e-2, max_completion_length=3,
    )  # fmt: skip
    server = one.vllm_generation.vllm_client
    one.train()
    assert len(server.sent) == 6
    rows = [row for row in one.state.log_history if "loss" in row]
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows)
    assert all(row["sampling/importance_sampling_ratio/min"] > 0.999 for row in rows)
    name = "model.layers.0.self_attn.q_proj.weight"
    with torch.no_grad():
        drawn = one._drawn(5)[0]
    assert not torch.equal(server.sent[-1][name], server.sent[0][name])
    assert drawn.sum() == pytest.approx(1)
