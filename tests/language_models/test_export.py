"""Exported directories: transformers alone loads them and computes what the conditioned model computes."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_language_models import CHAT, PROMPTS, TEMPLATE, VOCABULARY, K, build, conditioned, lora, prompt, tokenizer

from mopl.alignment import fuse, is_fused
from mopl.conditioning import HyperPromptModel, TextPrompt, TextPromptModel, TuningRecord
from mopl.language_models._export_tokenizer import check_saved, prepare_tokenizer
from mopl.language_models.export import export
from mopl.language_models.generate import generate

W = [0.7, 0.3]
PAIR = TextPrompt(("helpful", "harmless"), template="[{weights}] ")
NEW = list(range(VOCABULARY, VOCABULARY + K))
GREEDY = {"do_sample": False, "max_new_tokens": 8}
FAMILIES = ["llama", "gpt2", "gemma2", "gemma3", "phi"]


def load(folder: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def encoded(tokens, texts: list[str], side: str) -> dict:
    tokens.padding_side = side
    batch = tokens(texts, return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_padded_batch_are_those_of_the_conditioned_model(tmp_path: Path, family: str, tied: bool) -> None:
    model, words = conditioned(family, tie_word_embeddings=tied), tokenizer()
    folder = export(model, words, W, tmp_path / "plain")
    plain, made = load(folder)
    assert type(plain) is type(model.causal_lm) and not plain.config.tie_word_embeddings
    for side in ("left", "right"):
        ours, theirs = encoded(words, PROMPTS, side), encoded(made, PROMPTS, side)
        with torch.no_grad():
            wanted = model(**ours, weights=torch.tensor(W)).logits
            positions = (theirs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            given = plain(**theirs, position_ids=positions).logits[:, K:, :VOCABULARY]
        kept = ours["attention_mask"].bool()
        torch.testing.assert_close(given[kept], wanted[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapters", [False, True], ids=["prompt", "prompt and LoRA"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_greedy_answers_to_text_and_chat(tmp_path: Path, family: str, adapters: bool) -> None:
    model, words = conditioned(family, adapters=adapters), tokenizer(chat=True)
    plain, made = load(export(model, words, W, tmp_path / "plain"))
    wanted = [a.tokens for a in generate(model, words, PROMPTS, W, template="plain", max_new_tokens=8)]
    made.padding_side = "left"
    batch = made(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    width = batch["input_ids"].shape[1]
    given = plain.generate(**batch, **GREEDY)[:, width:]
    for mine, theirs in zip(wanted, given.tolist(), strict=True):
        assert theirs[: len(mine)] == list(mine)
    batch = made.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    given = plain.generate(**batch, **GREEDY)[0, batch["input_ids"].shape[1] :].tolist()
    mine = generate(model, words, [CHAT], W, max_new_tokens=8)[0].tokens
    assert given[: len(mine)] == list(mine)
    # Our own generation reads an export as any model of fixed weights.
    assert [a.tokens for a in generate(plain, made, PROMPTS, template="plain", max_new_tokens=8)] == wanted


def test_the_front_stands_once_and_before_the_beginning_of_sequence_token(tmp_path: Path) -> None:
    words = tokenizer(chat=True)
    _, made = load(export(conditioned(), words, W, tmp_path / "plain"))
    assert made("w1 w2")["input_ids"] == [*NEW, *words("w1 w2")["input_ids"]]
    assert made("w1", "w2")["input_ids"] == [*NEW, *words("w1", "w2")["input_ids"]]
    assert made("w1 w2", add_special_tokens=False)["input_ids"] == words("w1 w2", add_special_tokens=False)["input_ids"]
    chat = made.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert chat == [*NEW, *words.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]]
    assert chat.count(made.bos_token_id) == 1 and len(made) == VOCABULARY + K
    assert made.decode(made("w1 w2")["input_ids"], skip_special_tokens=True) == "w1 w2"
    assert made.model_input_names == words.model_input_names
    assert len(words) == VOCABULARY and words.chat_template == TEMPLATE  # the one passed is not changed


def test_new_tokens_are_never_generated_and_never_the_most_probable(tmp_path: Path) -> None:
    model, words = conditioned("gpt2"), tokenizer()
    plain, made = load(export(model, words, W, tmp_path / "plain"))
    assert plain.generation_config.suppress_tokens == NEW and not plain.generation_config._from_model_config
    batch = made("w1 w2", return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(0)
    drawn = plain.generate(
        **batch, do_sample=True, temperature=50.0, top_k=0, max_new_tokens=12, num_return_sequences=64
    )
    new = drawn[:, batch["input_ids"].shape[1] :]
    assert not torch.isin(new, torch.tensor(NEW)).any() and len(new.unique()) > VOCABULARY // 2
    # Without suppress_tokens, as in a server that does not know it: the mean of the others' logits.
    with torch.no_grad():
        logits = plain(torch.randint(0, VOCABULARY, (64, 10))).logits
    old = logits[..., :VOCABULARY]
    torch.testing.assert_close(
        logits[..., NEW], old.mean(-1, keepdim=True).expand(*old.shape[:-1], K), atol=1e-4, rtol=0
    )
    assert (logits.softmax(-1)[..., NEW] <= 1 / VOCABULARY).all() and (logits.argmax(-1) < VOCABULARY).all()
    bias, _ = load(export(conditioned("phi"), words, W, tmp_path / "phi"))
    with torch.no_grad():
        assert (bias(torch.randint(0, VOCABULARY, (8, 10))).logits.softmax(-1)[..., NEW] == 0).all()


def test_a_tied_head_can_stay_tied(tmp_path: Path) -> None:
    model = conditioned("gemma2", tie_word_embeddings=True)
    plain, made = load(export(model, tokenizer(), W, tmp_path / "plain", keep_tied=True))
    assert plain.config.tie_word_embeddings and plain.lm_head.weight is plain.model.embed_tokens.weight
    ids = torch.tensor([tokenizer()(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        wanted = model(ids, weights=torch.tensor(W)).logits
        given = plain(torch.tensor([made(PROMPTS[0])["input_ids"]])).logits[:, K:, :VOCABULARY]
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    assert plain.generation_config.suppress_tokens == NEW


@pytest.mark.parametrize("spare", [2, 9])
def test_unused_places_of_a_padded_vocabulary_are_taken_first(tmp_path: Path, spare: int) -> None:
    model, words = conditioned(vocabulary=VOCABULARY + spare), tokenizer()
    plain, made = load(export(model, words, W, tmp_path / "plain"))
    assert plain.config.vocab_size == max(VOCABULARY + spare, VOCABULARY + K)
    assert made("w1")["input_ids"][:K] == NEW
    ids = torch.tensor([words(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        wanted = model(ids, weights=torch.tensor(W)).logits[..., :VOCABULARY]
        given = plain(torch.tensor([made(PROMPTS[0])["input_ids"]])).logits[:, K:, :VOCABULARY]
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)


def test_the_record_and_the_model_that_stays_as_it_was(tmp_path: Path) -> None:
    model = conditioned()
    fuse(model.causal_lm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder = export(model, tokenizer(), torch.tensor(W), tmp_path / "a" / "plain", origin="runs/chat")
    record = json.loads((folder / "mopl.json").read_text())
    assert record["kind"] == "export" and record["objectives"] == ["helpful", "harmless"]
    assert record["weights"] == pytest.approx(W) and record["origin"] == "runs/chat" and record["beta"] == [0.1, 0.1]
    assert record["virtual_tokens"] == {"ids": NEW, "tokens": [f"<|mopl_{i}|>" for i in range(K)]}
    assert is_fused(model.causal_lm) and model.causal_lm.config.vocab_size == VOCABULARY
    assert model.causal_lm.generation_config.suppress_tokens is None
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["plain"]


def test_half_precision_keeps_its_dtype_and_nearly_its_logits(tmp_path: Path) -> None:
    model = conditioned()
    model.causal_lm.to(torch.bfloat16)
    plain, made = load(export(model, tokenizer(), W, tmp_path / "plain"))
    assert plain.dtype == torch.bfloat16
    ids = torch.tensor([tokenizer()(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        wanted = model(ids, weights=torch.tensor(W)).logits.float()
        given = plain(torch.tensor([made(PROMPTS[0])["input_ids"]])).logits[:, K:, :VOCABULARY].float()
    assert float((given - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_a_direction_of_temperatures_can_be_exported_and_other_sums_cannot(tmp_path: Path) -> None:
    model = conditioned(takes_beta=True)
    beta = [0.75, 0.25]
    plain, made = load(export(model, tokenizer(), W, tmp_path / "plain", beta=beta))
    ids = torch.tensor([tokenizer()(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        wanted = model(ids, weights=torch.tensor(W), beta=torch.tensor(beta)).logits
        given = plain(torch.tensor([made(PROMPTS[0])["input_ids"]])).logits[:, K:, :VOCABULARY]
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"sums to 2.*Export at 0\.75, 0\.25"):
        export(model, tokenizer(), W, tmp_path / "other", beta=[1.5, 0.5])


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("around", [True, False])
def test_weights_in_words_are_written_by_the_tokenizer(tmp_path: Path, bos: bool, around: bool) -> None:
    model, words = lora(build()), tokenizer(chat=True, bos=bos)
    # Words may also be written by a model around that one.
    source = TextPromptModel(model, PAIR, words) if around else model
    options = {} if around else {"text_prompt": PAIR}
    plain, made = load(export(source, words, W, tmp_path / "plain", **options))
    ids = words("w1 w2")["input_ids"]
    wanted = PAIR.prepend_ids(ids, W, words)
    assert made("w1 w2")["input_ids"] == wanted and len(wanted) == len(ids) + 4
    chat = words.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert made.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"] == PAIR.prepend_ids(chat, W, words)
    with torch.no_grad():
        torch.testing.assert_close(
            plain(torch.tensor([wanted])).logits, model(torch.tensor([wanted])).logits, atol=1e-5, rtol=1e-5
        )
    assert json.loads((tmp_path / "plain" / "mopl.json").read_text())["text"] == "[helpful: 0.70, harmless: 0.30] "
    if around:
        text = torch.tensor([ids])
        with torch.no_grad():
            given = source(text, weights=torch.tensor(W)).logits
            torch.testing.assert_close(
                plain(torch.tensor([wanted])).logits[:, -2:], given[:, -2:], atol=1e-5, rtol=1e-5
            )
        assert json.loads((tmp_path / "plain" / "mopl.json").read_text())["reference"] == "self"
    folder = export(source, words, W, tmp_path / "adapter", kind="adapter", **options)
    adapted = peft.PeftModel.from_pretrained(build(), folder).eval()
    made = transformers.AutoTokenizer.from_pretrained(folder)
    assert made("w1 w2")["input_ids"] == wanted
    with torch.no_grad():
        assert torch.equal(adapted(torch.tensor([wanted])).logits, model(torch.tensor([wanted])).logits)


def test_fixed_weights_need_no_front(tmp_path: Path) -> None:
    model, words = lora(build("gpt2")), tokenizer()
    plain, made = load(export(model, words, None, tmp_path / "plain"))
    ids = torch.tensor([made(PROMPTS[0])["input_ids"]])
    assert made(PROMPTS[0])["input_ids"] == words(PROMPTS[0])["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_prompt_alone_is_pefts_prompt_tuning(tmp_path: Path, family: str) -> None:
    model = conditioned(family, adapters=False)
    base = copy.deepcopy(model.causal_lm)
    folder = export(model, tokenizer(), W, tmp_path / "adapter", kind="adapter")
    tuned = peft.PeftModel.from_pretrained(base, folder).eval()
    batch = encoded(tokenizer(), PROMPTS, "right")
    with torch.no_grad():
        wanted = model(**batch, weights=torch.tensor(W)).logits
        given = tuned(**batch).logits[:, K:]
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(given[kept], wanted[kept], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- tokenizers


def byte_level():
    """As GPT-2 and SmolLM2 have it: bytes, nothing in front, ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<|im_start|>": 256, "<|im_end|>": 257}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor, backend.decoder = processors.ByteLevel(trim_offsets=True), decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}\n"
    )
    return made


def metaspace(legacy: bool):
    """As Llama 2 has it: a mark for spaces, a beginning-of-sequence token."""
    letters = "▁abcdefghijklmnopqrstuvwxyzHETBU:[]().,0123456789\n<s>/|_"
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for letter in letters:
        vocabulary.setdefault(letter, len(vocabulary))
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    if legacy:
        from tokenizers import normalizers

        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.mark.parametrize(
    "make", [byte_level, lambda: metaspace(True), lambda: metaspace(False)], ids=["bytes", "Llama 2", "Llama 2, new"]
)
@pytest.mark.parametrize("text", [None, "[a: 0.70, b: 0.30]\n"], ids=["virtual", "words"])
def test_tokenizers_of_real_kinds(tmp_path: Path, make, text: str | None) -> None:
    original = make()
    if original.chat_template is None and text is None:  # in words, what follows is tokenised with them
        original.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
        )
    front = prepare_tokenizer(original, 3, text=text)
    front.tokenizer.save_pretrained(tmp_path)
    check_saved(tmp_path, original, front)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = original("Be kind.")["input_ids"]
    start = int(text is not None and ids[0] == original.bos_token_id)
    assert made("Be kind.")["input_ids"] == [*ids[:start], *front.ids, *ids[start:]]
    pair = made("a", "b")["input_ids"]
    assert sum(pair[i : i + len(front.ids)] == front.ids for i in range(len(pair))) == 1


def test_a_template_that_begins_with_bare_text_is_refused_where_its_tokens_would_change(tmp_path: Path) -> None:
    original = metaspace(False)
    original.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}"
    front = prepare_tokenizer(original, 3)
    front.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chat_template = None"):
        check_saved(tmp_path, original, front)


# ---------------------------------------------------------------- errors


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path: Path) -> None:
    model = conditioned(adapters=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        export(model, tokenizer(), W, tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        export(model, tokenizer(), W, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export(model, tokenizer(), W, tmp_path / "empty", kind="adapter")
    broken = metaspace(False)
    broken.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}"
    small = HyperPromptModel(build(vocabulary=len(broken)), prompt(), record=TuningRecord(("a", "b"))).eval()
    with pytest.raises(ValueError, match="chat_template = None"):
        export(small, broken, W, tmp_path / "broken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: conditioned(positions="paper"), {}, "no plain model has"),
        (conditioned, {"kind": "adapter"}, "a prompt and adapters.*kind='model'"),
        (conditioned, {"kind": "weights"}, "kind is 'weights'"),
        (conditioned, {"weights": None}, "weights are missing; pass one for each of helpful, harmless"),
        (conditioned, {"weights": [0.9, 0.3]}, "does not sum to 1"),
        (conditioned, {"weights": [[0.7, 0.3]]}, "one trade-off"),
        (conditioned, {"beta": [0.5, 0.5]}, "not conditioned on it; leave it out"),
        (conditioned, {"text_prompt": PAIR}, "takes weights by itself"),
        (lambda: conditioned(takes_beta=True), {}, "beta is missing"),
        (lambda: lora(build()), {}, "the model has none: pass a HyperPromptModel or a mixture, or text_prompt"),
        (build, {"weights": None, "kind": "adapter"}, "has no adapter"),
        (lambda: conditioned(vocabulary=20), {}, "are they of one model"),
    ],
)
def test_bad_calls_are_named(tmp_path: Path, make, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(make(), tokenizer(), **{"weights": W, "directory": tmp_path / "x", **arguments})
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_exported_from_an_export_is_named(tmp_path: Path) -> None:
    _, made = load(export(conditioned(adapters=False), tokenizer(), W, tmp_path / "one"))
    with pytest.raises(ValueError, match=r"has <\|mopl_0\|> already"):
        export(conditioned(adapters=False), made, W, tmp_path / "two")
