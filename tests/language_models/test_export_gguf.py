"""Exports for llama.cpp, against the models that they were made of: its server's answers beside those of mopl."""

import copy
import json

import peft
import pytest
import torch
import transformers
from gguf_cases import TEXTS, TOLERANCE, build, byte_level, sequences
from huggingface_hub import ModelCard
from llama_engine import Engine
from real_model import smollm2
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
from tests.commands.test_generate_and_export import printed, refused

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
def test_scales_of_a_request_are_the_weights_of_the_objectives(alpha, tokenizer, tmp_path, monkeypatch):
    options = {} if alpha is None else {"coefficients": KLWeightCoefficients(0.1, anchor=False)}
    mixed = mixture(tokenizer, **options)
    before = {name: value.clone() for name, value in mixed.state_dict().items()}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))  # it may be too small, and nobody clears it
    folder = export_gguf(mixed, tokenizer, tmp_path / "out", kl_weight=alpha)
    monkeypatch.undo()
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
    assert "llama-server -m base.gguf --lora-scaled helpful.gguf:0.7,not_harmful_2.gguf:0.3" in card
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


@pytest.mark.parametrize(
    "template", ["\n{{ messages[0]['content'] }}   ", "<s>{% if true %}a{% endif %}\n   ", "\n\na\n\n"]
)
def test_words_change_no_white_space_of_a_template(template, tokenizer):
    from mopl.language_models._export_tokenizer import prepare_tokenizer

    def written(template):
        return tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)

    before = copy.deepcopy(tokenizer)
    before.chat_template = template
    made, own = written(prepare_tokenizer(before, text="[a: 1]").tokenizer.chat_template), written(template)
    start = 3 * own.startswith("<s>")
    assert made == own[:start] + "[a: 1]" + own[start:]


# ---------------------------------------------------------------- refusals


def test_what_llama_cpp_could_not_put_in_front_is_refused(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = None
    model = HyperPromptModel(build(tokenizer), prompt(32), record=RECORD).eval()
    with pytest.raises(ValueError, match=r"there is none\. Give the tokenizer a chat template"):
        export_gguf_model(model, tokenizer, [0.7, 0.3], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_all_trade_offs_of_what_is_no_mixture_are_refused_with_what_is_possible(tokenizer, tmp_path):
    model = HyperPromptModel(build(tokenizer), prompt(32), record=RECORD).eval()
    with pytest.raises(ValueError, match=r"virtual tokens.*--weights W\.\. --gguf DIR"):
        export_gguf(model, tokenizer, tmp_path / "out")
    with pytest.raises(FileExistsError, match="name another"):
        export_gguf(mixture(tokenizer), tokenizer, tmp_path.parent)


def test_a_base_model_of_another_family_is_refused_before_anything_is_computed(tmp_path):
    from tiny_language_models import build as build_tiny
    from tiny_language_models import tokenizer as words

    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    mixed = LoraMixture(build_tiny("gpt2"), 2, config=config, record=RECORD)
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be written as GGUF"):
        export_gguf(mixed, words(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """A mixture of adapters, as save_pretrained writes it, on a base model in a folder."""
    folder = tmp_path_factory.mktemp("run")
    build(tokenizer, "llama-3").save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    spread(LoraMixture(base, 2, config=config, record=RECORD)).save_pretrained(folder / "run")
    return folder / "run"


def test_the_command_writes_what_the_server_answers_with(run, tokenizer, tmp_path, capsys):
    said = printed(capsys, "export", str(run), "--gguf", str(tmp_path / "all"))
    assert "the scale of each is its weight" in said
    every = [tmp_path / "all" / name for name in ("base.gguf", "helpful.gguf", "not_harmful_2.gguf")]
    assert f"llama-server -m {every[0]} --lora-scaled {every[1]}:0.5,{every[2]}:0.5" in said
    printed(capsys, "export", str(run), "--weights", "0.7", "0.3", "--gguf", str(tmp_path / "one"))
    mixed = LoraMixture.from_pretrained(run).eval()
    record = json.loads((tmp_path / "all" / "mopl.json").read_text())
    given = sequences(mixed.causal_lm, (1, 20))
    files = [tmp_path / "all" / file for file in (record["base"], *record["adapters"])]
    with Engine(*files, scales=(0.4, 0.6)) as engine:
        for weights in ASKED:
            assert engine.error(at(mixed, weights=weights), given, weights) < TOLERANCE
        assert engine.error(at(mixed, weights=(0.4, 0.6)), given, None) < TOLERANCE
    with Engine(tmp_path / "one" / "model.gguf") as engine:
        assert engine.error(at(mixed, weights=(0.7, 0.3)), given) < TOLERANCE
    for folder in (tmp_path / "all", tmp_path / "one"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.to_dict()["library_name"] == "gguf"
        for file in folder.iterdir():
            assert str(run.parent).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize(
    "options, words",
    [
        (["--adapters", "B"], "two formats"),
        (["--grid", "3"], "--grid 3 is for --adapters"),
        (["--kind", "adapter"], "--kind adapter has no effect"),
        (["--weights", "0.7", "0.3", "--keep-tied"], "leave out --keep-tied"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words, run, tmp_path, capsys):
    assert words in refused(capsys, "export", str(run), "--gguf", str(tmp_path / "A"), *options)


def test_a_folder_of_gguf_files_is_not_asked_for_weights(run, tmp_path, capsys):
    printed(capsys, "export", str(run), "--gguf", str(tmp_path / "A"))
    error = refused(capsys, "generate", str(tmp_path / "A"), "--weights", "1", "0", "Hi")
    assert "has GGUF files for servers; name the run" in error


# ---------------------------------------------------------------- a real model


@pytest.mark.slow
def test_smollm2_answers_as_the_mixture_does(tmp_path_factory):
    """Log-probabilities and greedy answers at three trade-offs, of adapters that change the answers."""
    folder, name = tmp_path_factory.mktemp("smollm2"), smollm2(tmp_path_factory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(name))
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(str(name), dtype=torch.float32)
    mixed = LoraMixture(base, 2, config=config, record=RECORD).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in mixed.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.02)
    out = export_gguf(mixed, tokenizer, folder / "out")
    record = json.loads((out / "mopl.json").read_text())
    chats = [[{"role": "user", "content": text}] for text in ("Why is the sky blue?",)]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]
    answers = set()
    with Engine(out / record["base"], *(out / file for file in record["adapters"])) as engine:
        for text in TEXTS:
            assert engine.tokens(text) == tokenizer(text)["input_ids"], text
        for weights in ASKED:
            assert engine.error(at(mixed, weights=weights), prompts, weights, most=2000) < 1e-4
            scales = [{"id": i, "scale": scale} for i, scale in enumerate(weights)]
            for chat, ids in zip(chats, prompts, strict=True):
                own = mixed.generate(
                    input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    weights=weights, max_new_tokens=8, do_sample=False,
                )  # fmt: skip
                answer = engine.ask(
                    "/v1/chat/completions", messages=chat, lora=scales, temperature=0, max_tokens=8, cache_prompt=False
                )
                wanted = tokenizer.decode(own[0, len(ids) :], skip_special_tokens=True)
                assert answer["choices"][0]["message"]["content"] == wanted
                answers.add(wanted)
    assert len(answers) > 1
