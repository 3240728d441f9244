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
