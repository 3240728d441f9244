"""Exports for llama.cpp, against the models that they were made of: its server's answers beside those of mopl."""

import json

import peft
import pytest
import torch
from gguf_cases import TOLERANCE, build, byte_level, sequences
from llama_engine import Engine
from tiny_language_models import prompt

from mopl.conditioning import (
    HyperPromptModel,
    KLWeightCoefficients,
    LoraMixture,
    TextPrompt,
    TextPromptModel,
    TuningRecord,
)
from mopl.language_models.export_gguf import export_gguf, export_gguf_model

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="xllamacpp, which holds llama.cpp's server, is not installed")

NAMES = ("helpful", "not harmful/2")
ASKED = [(0.2, 0.8), (0.7, 0.3), (1.0, 0.0)]
CHAT = [{"role": "user", "content": "Hello there, it's 12 o'clock"}]
RECORD = TuningRecord(NAMES, beta=[0.1, 0.2], concentration=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def at(model, **conditions):
    """A model at one trade-off as one that is called with tokens alone."""
    return lambda ids: model(input_ids=ids, **conditions)


@torch.no_grad()
def spread(model):
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def mixture(tokenizer, name="llama", **options):
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "k_proj", "down_proj"], task_type="CAUSAL_LM",
        rank_pattern={"q_proj": 5}, alpha_pattern={"k_proj": 3},
    )  # fmt: skip
    return spread(LoraMixture(build(tokenizer, name), 2, config=config, record=RECORD, **options))


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_scales_of_a_request_are_the_weights_of_the_objectives(alpha, tokenizer, tmp_path):
    options = {} if alpha is None else {"coefficients": KLWeightCoefficients(0.1, anchor=False)}
    mixed = mixture(tokenizer, **options)
    before = {name: value.clone() for name, value in mixed.state_dict().items()}
    folder = export_gguf(mixed, tokenizer, tmp_path / "out", kl_weight=alpha)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "base.gguf", "helpful.gguf", "mopl.json", "not_harmful_2.gguf"
    ]  # fmt: skip
    record = json.loads((folder / "mopl.json").read_text())
    assert record["kind"] == "gguf" and record["objectives"] == list(NAMES) and record["base"] == "base.gguf"
    with Engine(folder / record["base"], *(folder / file for file in record["adapters"])) as engine:
        given = sequences(mixed.causal_lm, (1, 33))
        for weights in ASKED:
            asked = {"weights": weights} if alpha is None else {"weights": weights, "kl_weight": alpha}
            assert engine.error(at(mixed, **asked), given, weights) < TOLERANCE
    assert all(torch.equal(value, before[name]) for name, value in mixed.state_dict().items())
    card = (folder / "README.md").read_text()
    assert '"lora": [{"id": 0, "scale": 0.7}, {"id": 1, "scale": 0.3}]' in card
    assert "llama-server -m base.gguf --lora helpful.gguf --lora not_harmful_2.gguf --lora-init-without-apply" in card
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_a_hyper_prompt_at_one_trade_off_stands_in_front_of_chats(tokenizer, tmp_path):
    model = HyperPromptModel(build(tokenizer, "qwen3"), prompt(32), record=RECORD).eval()
    folder = export_gguf_model(model, tokenizer, [0.7, 0.3], tmp_path / "out")
    front = json.loads((folder / "mopl.json").read_text())["front"]
    assert front == "".join(f"<|mopl_{i}|>" for i in range(5)) and front in (folder / "README.md").read_text()
    with Engine(folder / "model.gguf") as engine:
        ids = engine.tokens(front)
        vocabulary = len(tokenizer)
        assert ids == list(range(vocabulary, vocabulary + 5))
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        written = engine.ask("/apply-template", messages=CHAT)["prompt"]
        assert engine.tokens(written, add=True) == [*ids, *own]

        def conditioned(given):
            found = model(input_ids=given[:, 5:], weights=[0.7, 0.3])
            found.logits = found.logits[..., :vocabulary]  # the tokens in front replace rows that have no token
            return found

        assert engine.error(conditioned, [[*ids, *own], [*ids, 7]]) < TOLERANCE
        made = model.generate(torch.tensor([own]), weights=[0.7, 0.3], max_new_tokens=12, do_sample=False)
        wanted = tokenizer.decode(made[0, len(own) :], skip_special_tokens=True)
        for path, body in (("/v1/chat/completions", {"messages": CHAT}), ("/completion", {"prompt": front + text})):
            answer = engine.ask(path, **body, max_tokens=12, n_predict=12, temperature=0)
            found = answer["content"] if "content" in answer else answer["choices"][0]["message"]["content"]
            assert found == wanted, path


def test_weights_in_words_stand_in_front_of_chats(tokenizer, tmp_path):
    words = TextPrompt(NAMES)
    model = TextPromptModel(build(tokenizer), words, tokenizer, record=RECORD).eval()
    folder = export_gguf_model(model, tokenizer, [0.7, 0.3], tmp_path / "out")
    front = json.loads((folder / "mopl.json").read_text())["front"]
    assert front == words.render([0.7, 0.3])
    with Engine(folder / "model.gguf") as engine:
        written = engine.ask("/apply-template", messages=CHAT)["prompt"]
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        assert engine.tokens(written, add=True) == engine.tokens("<s>" + front) + engine.tokens(text)[1:]
