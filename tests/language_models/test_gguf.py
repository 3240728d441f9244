"""GGUF files against llama.cpp itself: its server's log-probabilities and tokens beside those of transformers."""

import itertools
import json
import random
import re

import peft
import pytest
import torch
import transformers
from gguf_cases import LLAMA3, MODELS, TEXTS, TOLERANCE, YARN, build, byte_level, sequences
from llama_engine import Engine
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from mopl.language_models.generate import generate
from mopl.language_models.gguf_files import write_gguf_adapter, write_gguf_model
from mopl.language_models.gguf_files.tokenizer import PRE_TOKENIZERS, check_overlaps

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="xllamacpp, which holds llama.cpp's server, is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_computes(name, tokenizer, tmp_path):
    model = build(tokenizer, name)
    with Engine(write_gguf_model(model, tokenizer, tmp_path / "model.gguf")) as engine:
        assert engine.error(model, sequences(model)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_keep_every_bit_and_vectors_become_float32(dtype, tokenizer, tmp_path):
    import gguf

    model = build(tokenizer, "qwen2").to(dtype)
    path = write_gguf_model(model, tokenizer, tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    matrix, vector = found["blk.1.ffn_up.weight"], found["blk.1.attn_q.bias"]
    read = gguf.dequantize(matrix.data, matrix.tensor_type)
    layer = model.model.layers[1]
    assert matrix.tensor_type.name == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert torch.equal(torch.from_numpy(read.copy()), layer.mlp.up_proj.weight.float())
    assert vector.tensor_type.name == "F32"
    assert torch.equal(torch.from_numpy(vector.data.copy()), layer.self_attn.q_proj.bias.float())
    with Engine(path) as engine:  # which rounds activations to 16 bit before each product, as files of 16 bit are used
        assert engine.error(model.float(), sequences(model)) < 0.02


def test_transformers_reads_the_file_as_the_model_that_was_written(tokenizer, tmp_path):
    model = build(tokenizer, "llama", attention_bias=False, mlp_bias=False)  # which its loader does not know
    write_gguf_model(model, tokenizer, tmp_path / "model.gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="model.gguf")
    ids = torch.tensor(sequences(model, (33,)))
    assert torch.allclose(read(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("mistral", {"sliding_window": 16}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type"),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "beta_fast"),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "attention_factor"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, options, words, tokenizer, tmp_path):
    model = build(tokenizer, name, **options)
    with pytest.raises(ValueError, match=words):
        write_gguf_model(model, tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_other_families_and_options_that_a_later_transformers_has_are_refused(tokenizer, tmp_path):
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be written"):
        write_gguf_model(transformers.GPT2LMHeadModel(config), tokenizer, tmp_path / "model.gguf")

    class Later(transformers.LlamaConfig):
        residual_multiplier: float = 1.0

    model = build(tokenizer)
    model.config = Later(**model.config.to_dict())
    write_gguf_model(model, tokenizer, tmp_path / "model.gguf")
    model.config.residual_multiplier = 0.5
    with pytest.raises(ValueError, match="residual_multiplier"):
        write_gguf_model(model, tokenizer, tmp_path / "other.gguf")
    lora = peft.get_peft_model(build(tokenizer), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no name for"):
        write_gguf_model(lora.base_model.model, tokenizer, tmp_path / "other.gguf")


def test_a_file_that_does_not_read_as_it_was_written_is_not_kept(tokenizer, tmp_path, monkeypatch):
    import gguf

    path = tmp_path / "model.gguf"
    path.write_text("before")
    write = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda self, data, *rest: write(self, 0 * data, *rest))
    with pytest.raises(OSError, match="does not read as it was written"):
        write_gguf_model(build(tokenizer), tokenizer, path)
    assert path.read_text() == "before" and [path] == list(tmp_path.iterdir())


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("found, ignore_merges", PRE_TOKENIZERS, ids=PRE_TOKENIZERS.values())
def test_llama_cpp_splits_hard_texts_as_transformers_does(found, ignore_merges, tmp_path):
    tokenizer = byte_level(found, ignore_merges, normalizers.NFC() if not ignore_merges else None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    with Engine(write_gguf_model(build(tokenizer), tokenizer, tmp_path / "model.gguf")) as engine:
        for text in TEXTS:
            for add in (False, True) if text else (False,):
                assert engine.tokens(text, add=add) == tokenizer(text, add_special_tokens=add)["input_ids"], text
        chat = [{"role": "user", "content": "Hello  there, it's 123"}]
        written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert engine.ask("/apply-template", messages=chat)["prompt"].removeprefix("<s>") == written.removeprefix("<s>")
        assert engine.ask("/props")["bos_token"] == "<s>"
        wanted = tokenizer(written, add_special_tokens=False)["input_ids"]
        answer = engine.ask("/v1/chat/completions", messages=chat, max_tokens=1, temperature=0)
        assert answer["usage"]["prompt_tokens"] == len(wanted)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits texts by"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")), "splits texts by"),
        (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "normalizer is a Lowercase"),
        (lambda t: setattr(t.model, "dropout", 0.5), "dropout"),
        (lambda t: t.add_tokens([AddedToken("<x>", lstrip=True)]), "lstrip"),
        (lambda t: setattr(t, "post_processor", processors.TemplateProcessing(
            single="<s> <s> $A", special_tokens=[("<s>", 0)])), "adds .0, 0. before"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(change, words, tmp_path):
    tokenizer = byte_level()
    model = build(tokenizer)
    change(tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=words):
        write_gguf_model(model, tokenizer, tmp_path / "model.gguf")


def test_added_tokens_that_overlap_are_found_as_in_transformers_or_refused(tmp_path):
    for tokens, words in (
        (("ab", "bcd"), r"'ab' and 'bcd' overlap, and llama.cpp splits 'abcd' into \['a', 'bcd'\] where"),
        (("ab", "bc"), "overlap"),
        (
            (AddedToken("xbcx", normalized=True), "bc"),
            r"into \['xbcx'\] where the tokenizer splits it into \['x', 'bc'",
        ),
        (("   ", "  ", "    ", "bcd", "cd", "é", "<a>", "<b>"), None),
    ):
        tokenizer = byte_level()
        tokenizer.add_tokens([AddedToken(t, normalized=False) if isinstance(t, str) else t for t in tokens])
        model = build(tokenizer)
        if words is not None:
            with pytest.raises(ValueError, match=words):
                write_gguf_model(model, tokenizer, tmp_path / "model.gguf")
            continue
        with Engine(write_gguf_model(model, tokenizer, tmp_path / "model.gguf")) as engine:
            for text in ("       a", "abcdcd", "  \n   ", "<a><b>>", "é  é"):
                assert engine.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_tokens_that_pass_are_found_alike_in_every_text_of_two_letters():
    numbers, passed = random.Random(0), 0
    texts = ["".join(letters) for n in range(1, 8) for letters in itertools.product("ab", repeat=n)]
    for _ in range(150):
        made = ["".join(numbers.choices("ab", k=numbers.randint(1, 4))) for _ in range(3)]
        tokens = {text: numbers.random() < 0.3 for text in made}
        backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        backend.add_tokens([AddedToken(text, normalized=late) for text, late in tokens.items()])
        try:
            check_overlaps(list(tokens.items()))
        except ValueError:
            continue
        passed += 1
        for text in texts:
            pieces = [text]  # the longest one first, in the whole text: llama.cpp's tokenizer_st_partition
            for token in sorted(tokens, key=len, reverse=True):
                pieces = [part for piece in pieces for part in (
                    [piece] if piece in tokens else re.split(f"({token})", piece))]  # fmt: skip
            letters = [p for piece in pieces for p in ([piece] if piece in tokens else piece)]
            assert backend.encode(text).tokens == letters, (tokens, text)
    assert passed > 20


def test_a_chat_template_that_forgets_what_the_tokenizer_adds_is_refused(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    with pytest.raises(ValueError, match="would put it before chats"):
        write_gguf_model(build(tokenizer), tokenizer, tmp_path / "model.gguf")


def test_no_end_stands_behind_a_prompt_where_the_tokenizer_writes_one_behind_texts(tmp_path):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|> <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    model, chat = build(tokenizer), [{"role": "user", "content": "Hello there"}]
    (own,) = generate(model, tokenizer, [chat], max_new_tokens=8)
    (plain,) = generate(model, tokenizer, ["Hello there"], max_new_tokens=8, template="plain")
    with Engine(write_gguf_model(model, tokenizer, tmp_path / "model.gguf")) as engine:
        answer = engine.ask("/v1/chat/completions", messages=chat, max_tokens=8, temperature=0)
        assert answer["choices"][0]["message"]["content"] == own.text
        assert engine.complete("Hello there", 8)["content"] == plain.text


def test_every_token_that_ends_an_answer_ends_it_there(tokenizer, tmp_path):
    model = build(tokenizer)
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<pad>", "<tool>"])]
    model.generation_config.eos_token_id = ends
    with Engine(write_gguf_model(model, tokenizer, tmp_path / "model.gguf")) as engine:
        for token, stops in [(token, "eos") for token in ends] + [(engine.tokens("a")[0], "limit")]:
            assert engine.complete([5, 6], 3, logit_bias=[[token, 1e4]])["stop_type"] == stops
    model.generation_config.eos_token_id = [*ends, 7]
    with pytest.raises(ValueError, match="one to three"):
        write_gguf_model(model, tokenizer, tmp_path / "other.gguf")


# ---------------------------------------------------------------- adapters


SCALES = [(0.2, 0.8), (0.7, 0.3), (1.0, 0.0)]
ADAPTED = {
    "llama": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "mistral": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "lm_head"]},
    "llama-3": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"], "layers_to_transform": [1]},
    "qwen2": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"0.mlp.up_proj": 3},
              "alpha_pattern": {"q_proj": 5}},
    "qwen3": {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["k_proj", "down_proj", "embed_tokens"],
              "rank_pattern": {"down_proj": 7}},
}  # fmt: skip


def adapters(model, folder, options, names=("helpful", "harmless")):
    """Adapters of random factors, in folders of PEFT, and the model with them."""
    torch.manual_seed(2)
    tuned = None
    for name in names:
        config = peft.LoraConfig(**options, init_lora_weights=False, task_type="CAUSAL_LM")
        if tuned is None:
            tuned = peft.get_peft_model(model, config, name)
        else:
            tuned.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    return tuned.eval(), [folder / name for name in names]


def mixed(tuned, names, scales):
    """The model with Σ scale · adapter, by PEFT's own arithmetic."""
    names_ = [name for name, scale in zip(names, scales, strict=True) if scale]
    tuned.base_model.set_adapter(names_)
    for module in tuned.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            for name, scale in zip(names, scales, strict=True):
                if name in module.scaling and scale:
                    module.set_scale(name, scale)
    return tuned


@pytest.mark.parametrize("name", ADAPTED)
def test_scales_of_a_request_are_the_weights_of_the_adapters(name, tokenizer, tmp_path):
    model = build(tokenizer, name)
    base = write_gguf_model(model, tokenizer, tmp_path / "model.gguf")
    plain = build(tokenizer, name)
    tuned, folders = adapters(model, tmp_path / "adapters", ADAPTED[name])
    files = [write_gguf_adapter(folder, model.config, tmp_path / f"{folder.name}.gguf") for folder in folders]
    with Engine(base, *files) as engine:
        given = sequences(model, (1, 33))
        for scales in SCALES:
            assert engine.error(mixed(tuned, ["helpful", "harmless"], scales), given, scales) < TOLERANCE
        assert engine.error(plain, given, (0.0, 0.0)) < TOLERANCE
        assert engine.error(plain, given, SCALES[0]) > 0.01


def test_factors_of_one_scale_are_written_bit_by_bit(tokenizer, tmp_path):
    import gguf

    model = build(tokenizer, "qwen2")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    _, (folder, _) = adapters(model, tmp_path / "adapters", options)
    reader = gguf.GGUFReader(str(write_gguf_adapter(folder, model.config, tmp_path / "a.gguf")))
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    saved = load_file(str(folder / "adapter_model.safetensors"))
    for part in "AB":
        name = f"base_model.model.model.layers.1.mlp.up_proj.lora_{part}.weight"
        assert torch.equal(tensors[f"blk.1.ffn_up.weight.lora_{part.lower()}"], saved[name])
    assert reader.get_field("adapter.lora.alpha").contents() == 8


@pytest.mark.parametrize(
    "options, words",
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_modules": ["lm_head"]}, "tied"),
        ({"target_modules": ["embed_tokens"]}, "tied"),
    ],
)
def test_an_adapter_that_is_more_than_a_lora_is_refused(options, words, tokenizer, tmp_path):
    model = build(tokenizer, "llama-3")
    _, (folder, *_) = adapters(model, tmp_path / "a", {"r": 2, "target_modules": ["v_proj"], **options}, ("helpful",))
    with pytest.raises(ValueError, match=words):
        write_gguf_adapter(folder, model.config, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_an_adapter_of_another_base_or_with_strange_files_is_refused(tokenizer, tmp_path):
    model = build(tokenizer)
    _, (folder, _) = adapters(model, tmp_path / "adapters", {"r": 2, "target_modules": ["v_proj"]})
    other = build(tokenizer, hidden_size=64).config
    with pytest.raises(ValueError, match="is it the adapter's base"):
        write_gguf_adapter(folder, other, tmp_path / "a.gguf")
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    for change, words in (
        ({"r": 3}, "rank 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "kind LOHA"),
        ({"use_later": True}, "use_later of helpful is True"),
    ):
        file.write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=words):
            write_gguf_adapter(folder, model.config, tmp_path / "a.gguf")
    file.write_text(json.dumps(settings))
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    tensors["base_model.model.model.norm.weight"] = torch.ones(32)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match="no factor of a LoRA"):
        write_gguf_adapter(folder, model.config, tmp_path / "a.gguf")
