"""Several outputs of one classifier as rewards, and rewards in the shape that TRL calls."""

import pytest
import torch

from mopl.clp.reward_modules import make_rewards
from mopl.rewards import (
    Brevity,
    ClassifierReward,
    FunctionReward,
    Length,
    Rewards,
    classifier_rewards,
    for_trl,
    make,
    make_all,
)

TEXTS = [f"w{i} w{i * 7 % 50}" for i in range(70)]  # more than one batch of `Rewards`
PROMPTS = [f"w{i % 5}" for i in range(70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from tiny_language_models import VOCABULARY, tokenizer

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=1.0, pad_token_id=0, id2label={0: "helpful", 1: "harmless"},
    )  # fmt: skip
    config.mopl_inputs = "pair"
    place = tmp_path_factory.mktemp("heads")
    transformers.BertForSequenceClassification(config).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def passes(model):
    """Count the sequences that a model is run on."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    return seen


def test_the_outputs_of_a_classifier_are_rewards_that_share_one_pass(folder):
    rewards = make_rewards((f"classifier:directory={folder}", "length:target=3"))
    assert rewards.names == ("helpful", "harmless", "length")
    seen = passes(rewards.rewards[0].model)
    values = rewards(TEXTS, PROMPTS)
    assert sum(seen) == len(TEXTS)  # not twice as many
    for column, label in enumerate(("helpful", "harmless")):
        alone = ClassifierReward(folder, label=label, inputs="pair")(TEXTS, PROMPTS)
        torch.testing.assert_close(values[:, column], alone, rtol=1e-5, atol=1e-5)
    assert (values[:, 0] - values[:, 1]).abs().min() > 1e-4


def test_what_a_softmax_of_shared_outputs_adds_up_to(folder):
    both = classifier_rewards(folder, activation="softmax")
    torch.testing.assert_close(sum(reward(TEXTS, PROMPTS) for reward in both), torch.ones(len(TEXTS)))
    assert both[0]([], []).shape == (0,)


def test_a_name_stands_for_one_reward_or_says_how_many(folder):
    with pytest.raises(ValueError, match="stands for 2 rewards, helpful, harmless; say which as label"):
        make(f"classifier:directory={folder}")
    with pytest.raises(ValueError, match="name is 'x' but the model has 2 outputs"):
        make(f"classifier:directory={folder},name=x")
    assert [r.name for r in make_all([f"classifier:directory={folder},label=harmless,name=safe"])] == ["safe"]


def test_an_adapter_is_no_classifier(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a PEFT adapter.*save the whole model"):
        ClassifierReward(tmp_path)


def test_rewards_in_the_shape_of_trl():
    said = []
    reward = FunctionReward(lambda texts, prompts: said.append(prompts) or [float(len(t)) for t in texts], "letters")
    function = for_trl(reward)
    assert function.__name__ == "letters"
    assert function(prompts=["p", "q"], completions=["a", "bcd"], completion_ids=[[1], [2]], column=[0, 0]) == [1, 3]
    chat = [[{"role": "user", "content": "p"}]]
    answers = [[
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "abcde"},
    ]]  # fmt: skip
    assert function(prompts=chat, completions=answers) == [5] and said[-1] == chat


def test_failures_are_none_and_less_is_more_where_it_is(tmp_path):
    def fails(texts, prompts):
        if "bad" in texts:
            raise RuntimeError("no")
        return [1.0] * len(texts)

    rewards = Rewards(
        [FunctionReward(fails, "fails"), FunctionReward(lambda t, p: [2.0] * len(t), "cost", maximise=False)]
    )
    first, second = for_trl(rewards)
    assert first(["p", "p"], ["good", "bad"]) == [1.0, None] and first.rewards.report.failed() == 1
    assert second(["p"], ["good"]) == [-2.0]
    assert [f.__name__ for f in for_trl([Length(target=3), Brevity()])] == ["length", "brevity"]


def test_trl_trains_on_both_heads(folder, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tiny_language_models import build, tokenizer

    functions = for_trl(classifier_rewards(folder))
    args = trl.GRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, max_completion_length=3,
        use_cpu=True, report_to="none", logging_steps=1, disable_tqdm=True, bf16=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        build(),
        functions,
        args,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2"] * 2}),
        processing_class=tokenizer(),
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert {"rewards/helpful/mean", "rewards/harmless/mean"} <= set(logs)
