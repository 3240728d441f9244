"""A classifier gives a text what it gives it alone, whichever side its tokenizer pads on."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
import tiny_language_models as tiny

from mopl.integrations.scorers import RewardListConfig, RewardListTrainer
from mopl.rewards import ClassifierReward
from mopl.rewards.writing import settle_padding

TEXTS = ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w3 w4", "w9 w8 w7 w6 w5"]
FAMILIES = {
    "gpt2": ("GPT2Config", tiny.FAMILIES["gpt2"][1]),  # counts positions from the left edge
    "bert": ("BertConfig", {}),  # reads the first token
    "llama": ("LlamaConfig", {}),
}


def classifier(family: str):
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**tiny.COMMON, **options, "num_labels": 2})
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    return transformers.AutoModelForSequenceClassification.from_config(config).eval(), tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_of_a_batch_are_those_of_its_texts_alone(family: str, tmp_path, monkeypatch) -> None:
    model, tokenizer = classifier(family)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    reward = ClassifierReward(tmp_path, label=0, max_length=32)
    alone = torch.cat([reward([text], [text]) for text in TEXTS])
    torch.testing.assert_close(reward(TEXTS, TEXTS), alone, rtol=1e-4, atol=1e-4)
    assert tokenizer.padding_side == ("left" if family == "llama" else "right")  # what is right stays


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_a_training_are_those_of_the_responses_alone(family: str, tmp_path) -> None:
    model, tokenizer = classifier(family)
    rows = [
        {"prompt": "w1 w2", "chosen": "w3 w4 w5 w6 w7", "rejected": "w9", "a": [1, 0], "b": [0, 1]},
        {"prompt": "w1", "chosen": "w3", "rejected": "w9 w8", "a": [1, 0], "b": [0, 1]},
    ]
    args = RewardListConfig(
        str(tmp_path), objectives=["a", "b"], max_length=32, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = RewardListTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    lists = [trainer.train_dataset[place] for place in range(2)]
    model.eval()
    with torch.no_grad():
        found = trainer.scores(model, trainer.data_collator(lists))
        alone = [
            model(**{key: torch.tensor([value]) for key, value in row.items()}).logits[0]
            for each in lists
            for row in each.sequences
        ]
    torch.testing.assert_close(found, torch.stack(alone).view(2, 2, 2).mT, rtol=1e-4, atol=1e-4)


def test_a_side_that_is_right_stays_and_the_model_is_left_as_it_was() -> None:
    model, tokenizer = classifier("bert")
    tokenizer.padding_side = "right"
    model.train()
    before = torch.get_rng_state()
    settle_padding(model, tokenizer)
    assert tokenizer.padding_side == "right" and model.training and torch.equal(before, torch.get_rng_state())


def reward_of(model, tokenizer, folder, monkeypatch, **options) -> ClassifierReward:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    return ClassifierReward(folder, label=0, **{"max_length": 32, **options})


def plain(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """What the model gives each text alone, the first of its outputs."""
    with torch.no_grad():
        return torch.cat([model(**tokenizer([text], return_tensors="pt")).logits[:, 0] for text in texts])


NEITHER = {
    "convbert": ("ConvBertConfig", {"embedding_size": tiny.HIDDEN}),  # its convolutions run on into padding
    "fnet": ("FNetConfig", {}),  # takes no mask
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", NEITHER)
def test_texts_are_scored_as_alone_where_padding_is_wrong_on_either_side(family, side, tmp_path, monkeypatch) -> None:
    name, options = NEITHER[family]
    monkeypatch.setitem(FAMILIES, family, (name, options))
    model, tokenizer = classifier(family)
    tokenizer.padding_side = side
    texts = [*TEXTS, "w7 w8", "w9"]  # two of one length
    reward = reward_of(model, tokenizer, tmp_path, monkeypatch)
    torch.testing.assert_close(reward(texts, texts), plain(model, tokenizer, texts), rtol=1e-4, atol=1e-4)


def training(model, tokenizer, tmp_path, **options) -> RewardListTrainer:
    rows = [{"prompt": "w1 w2", "chosen": "w3 w4 w5 w6 w7", "rejected": "w9", "a": [1, 0], "b": [0, 1]}] * 2
    args = RewardListConfig(
        str(tmp_path), objectives=["a", "b"], report_to="none", use_cpu=True, disable_tqdm=True,
        **{"max_length": 32, **options},
    )  # fmt: skip
    return RewardListTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


def scores_and_alone(trainer: RewardListTrainer, model) -> tuple[torch.Tensor, torch.Tensor]:
    each = trainer.train_dataset[0]
    with torch.no_grad():
        found = trainer.scores(model.eval(), trainer.data_collator([each]))[0]
        alone = [
            model(**{key: torch.tensor([value]) for key, value in row.items()}).logits[0] for row in each.sequences
        ]
    return found, torch.stack(alone).T


def test_a_training_whose_scores_would_not_be_those_alone_is_refused(tmp_path, monkeypatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setitem(FAMILIES, "fnet", NEITHER["fnet"])
    model, tokenizer = classifier("fnet")
    with pytest.raises(ValueError, match=r"FNetForSequenceClassification gives a text other.*mini_batch_size=1"):
        training(model, tokenizer, tmp_path)
    found, alone = scores_and_alone(training(model, tokenizer, tmp_path, mini_batch_size=1), model)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    model, tokenizer = classifier("llama")  # a prompt of PEFT's in front hides where a row ends
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="gives a text other scores beside a longer one"):
        training(prompted, tokenizer, tmp_path)


def test_positions_that_change_little_from_one_to_the_next_are_noticed() -> None:
    """Learned positions are smooth."""
    model, tokenizer = classifier("gpt2")
    with torch.no_grad():
        turns = torch.arange(64)[:, None] / 64 * torch.linspace(0.1, 1.0, tiny.HIDDEN)
        model.transformer.wpe.weight.copy_(0.02 * turns.sin())
    assert settle_padding(model, tokenizer) and tokenizer.padding_side == "right"


def test_a_head_that_begins_at_zero_says_nothing_of_the_side(tmp_path) -> None:
    model, tokenizer = classifier("gpt2")
    head = model.score.weight.detach().clone()
    torch.nn.init.zeros_(model.score.weight)
    trainer = training(model, tokenizer, tmp_path)
    with torch.no_grad():
        model.score.weight.copy_(head)
    torch.testing.assert_close(*scores_and_alone(trainer, model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_empty_text_is_the_end_of_a_sequence(side: str, tmp_path, monkeypatch) -> None:
    model, _ = classifier("llama")
    tokenizer = tiny.tokenizer(bos=False)
    tokenizer.padding_side = side
    reward = reward_of(model, tokenizer, tmp_path, monkeypatch)
    expected = plain(model, tokenizer, ["</s>", "w3 w4"])
    torch.testing.assert_close(reward(["", "w3 w4"], ["", ""]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reward([""], [""]), expected[:1], rtol=1e-4, atol=1e-4)
    assert reward([], []).shape == (0,)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="text 2 has no token"):
        reward(["w3", ""], ["", ""])


def test_the_text_part_of_a_model_knows_the_padding_token(tmp_path, monkeypatch) -> None:
    tokenizer = tiny.tokenizer()
    text = {**tiny.COMMON, "query_pre_attn_scalar": 8, "sliding_window": 8, "pad_token_id": 9}
    config = transformers.Gemma3Config(
        text_config=text, num_labels=2, pad_token_id=0, boi_token_index=59, eoi_token_index=60, image_token_index=61,
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    reward = reward_of(model, tokenizer, tmp_path, monkeypatch)
    model.config.get_text_config().pad_token_id = 0
    texts = [*TEXTS, "w3 w3 w3"]  # w3 is token 9
    torch.testing.assert_close(reward(texts, texts), plain(model, tokenizer, texts), rtol=1e-4, atol=1e-4)


def test_texts_on_both_sides_of_a_length_at_which_positions_change_are_scored_as_alone(tmp_path, monkeypatch) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4, "original_max_position_embeddings": 8,
    }  # fmt: skip
    monkeypatch.setitem(FAMILIES, "turning", ("LlamaConfig", {"rope_parameters": rope}))
    model, tokenizer = classifier("turning")
    with pytest.raises(ValueError, match=r"max_length is 32.*'longrope'.*pass max_length=8 at most"):
        training(model, tokenizer, tmp_path)
    training(model, tokenizer, tmp_path, max_length=8)
    model, tokenizer = classifier("turning")
    reward = reward_of(model, tokenizer, tmp_path, monkeypatch)
    torch.testing.assert_close(reward(TEXTS, TEXTS), plain(model, tokenizer, TEXTS), rtol=1e-4, atol=1e-4)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    monkeypatch.setitem(FAMILIES, "turning", ("LlamaConfig", {"rope_parameters": rope, "max_position_embeddings": 16}))
    model, tokenizer = classifier("turning")
    with pytest.raises(ValueError, match=r"max_length is 32.*'dynamic'.*max_length=16 at most"):
        reward_of(model, tokenizer, tmp_path, monkeypatch)
