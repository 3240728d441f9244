"""Generation ends where the chat template's turn ends, whatever its token is called and however many it takes."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_language_models import WORDS, build
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mopl._rows import finding
from mopl.clp import ClpConfig
from mopl.clp.rollout import Sampler
from mopl.language_models.export import export
from mopl.language_models.generate import generate
from mopl.language_models.prompt_rows import prompt_rows
from mopl.language_models.tokenization import ListTokenizer
from mopl.language_models.turns import turn_ends

MARKS = ["<pad>", "<s>", "</s>", "<unk>"]
LOOP = "{% for m in messages %}"
TABLE = {  # template, marks besides the four, what ends a turn
    "chatml": (
        LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_start|>", "<|im_end|>"], "<|im_end|>",
    ),
    "gemma": (
        "{{ bos_token }}" + LOOP + "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>",
    ),
    "llama-3": (
        "{{ bos_token }}" + LOOP + "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>",
    ),
    "mistral": (
        "{{ bos_token }}" + LOOP + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} "
        "{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}", ["[INST]", "[/INST]"], "</s>",
    ),
    "phi-3": (
        LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>",
    ),
    "zephyr": (
        LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}", ["<|user|>", "<|assistant|>"], "</s>",
    ),
    "two marks, the last differs": (
        LOOP + "<start>{{ m['role'] }}<message>{{ m['content'] }}{% if loop.last %}<return>{% else %}<end>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<start>assistant<message>{% endif %}",
        ["<start>", "<message>", "<end>", "<return>"], "<return>",
    ),
    "an end only before another turn": (
        "{{ bos_token }}" + LOOP + "<|{{ m['role'] }}|>{{ m['content'] }}{% if not loop.last %}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|end|><|assistant|>{% endif %}",
        ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>",
    ),
    "no end, marked turns": (
        "{{ bos_token }}" + LOOP + "<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}", ["<|user|>", "<|assistant|>"], None,
    ),
    "no end": (LOOP + "{{ m['role'] }} : {{ m['content'] }} \n{% endfor %}", [], None),
    "several tokens": (
        LOOP + "{{ m['role'] }} : {{ m['content'] }} w7 w8\n{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}", [], "w7 w8",
    ),
    "one word": (
        LOOP + "{{ m['role'] }} : {{ m['content'] }} w7\n{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}", [], "w7",
    ),
    "an end that is no token": (
        LOOP + "{{ m['role'] }} : {{ m['content'] }} <|unknown|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}", [], None,
    ),
    "answers are refused": ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('no') }}"
                            "{% endif %}{{ m['content'] }}{% endfor %}", [], None),
}  # fmt: skip
OTHERS = ["user", "assistant", ":", "model"]


def words(name: str):
    template, marks, end = TABLE[name]
    vocabulary = {token: i for i, token in enumerate([*MARKS, *marks, *WORDS, *OTHERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in MARKS])
    # Not special, as in some tokenizers: they would be part of the text.
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in marks])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    made.chat_template = template
    return made, len(vocabulary), end


class Scripted(torch.nn.Module):
    """An output head whose greedy answer to whatever stood there is the next word of a script."""

    def __init__(self, model, script):
        super().__init__()
        head, self.script, self.at = model.lm_head, script, 0
        self.weight = head.weight

    def forward(self, hidden):
        logits = torch.zeros(*hidden.shape[:-1], self.weight.shape[0])
        logits[..., self.script[min(self.at, len(self.script) - 1)]] = 50.0
        self.at += 1
        return logits


def scripted(size: int, script: list[int], **options):
    model = build(vocabulary=size, **options)
    for kind in ("alone", "padded", "generate"):
        finding(model, kind)  # measured before the head answers by the number of its calls
    model.lm_head = Scripted(model, script)
    return model


@pytest.mark.parametrize("name", TABLE)
def test_the_end_is_read_off_the_template(name):
    tokenizer, _, end = words(name)
    found = turn_ends(ListTokenizer(tokenizer, append_eos=False))
    eos = tokenizer.eos_token_id
    if end == "w7 w8":
        assert found.ids == (eos,) and found.text == end
    else:
        extra = [] if end in (None, "</s>") else [tokenizer.convert_tokens_to_ids(end)]
        assert found.ids == (eos, *extra) and found.text is None
    kept = turn_ends(ListTokenizer(tokenizer), transformers.GenerationConfig(eos_token_id=[9, 5])).ids
    assert kept[:2] == (9, 5) and set(found.ids) <= set(kept)
    assert turn_ends(ListTokenizer(tokenizer, template="plain")).ids == (eos,)


@pytest.mark.parametrize("name", [name for name in TABLE if name != "answers are refused"])
def test_generation_stops_where_the_turn_ends(name):
    tokenizer, size, end = words(name)
    answer = tokenizer.convert_tokens_to_ids(["w1", "w2"])
    ending = tokenizer(end or "</s>", add_special_tokens=False)["input_ids"]
    script = [*answer, *ending, *tokenizer.convert_tokens_to_ids(["w9", "w9"])]
    found = generate(scripted(size, script), tokenizer, ["w3", "w4 w5"], template="chat", max_new_tokens=9)
    for one in found:
        assert one.text == "w1 w2" or one.text.strip() == "w1 w2"
        assert one.finished and list(one.tokens) == [*answer, *ending]
    cut = generate(scripted(size, script), tokenizer, "w3", template="chat", max_new_tokens=2)[0]
    assert not cut.finished and list(cut.tokens) == answer
    chosen = generate(scripted(size, script), tokenizer, "w3", template="chat", max_new_tokens=9, eos_token_id=2)[0]
    assert chosen.finished == (ending == [2])


def test_an_end_in_words_stops_the_model_itself_and_not_only_its_answer():
    tokenizer, size, end = words("several tokens")
    script = tokenizer(f"w1 w2 {end} w9 w9", add_special_tokens=False)["input_ids"]
    model, encoder = scripted(size, script), ListTokenizer(tokenizer, append_eos=False)
    ends = turn_ends(encoder, model.generation_config)
    assert ends.text is not None
    rows = [encoder.prompt_tokens("w3").tolist()]
    (part,) = prompt_rows(model, rows, encoder.pad_id, ends, at_once=4)
    assert part.generate(max_new_tokens=9)[0].tolist() == [script[:-2]]


@pytest.mark.parametrize("name", ["chatml", "several tokens", "zephyr", "no end"])
def test_policies_on_rewards_are_sampled_to_the_end_of_their_turn_and_scored_with_it(name):
    tokenizer, size, end = words(name)
    config = ClpConfig("m", "d", rewards=("length",), max_new_tokens=9, template="chat")
    answer = tokenizer.convert_tokens_to_ids(["w1", "w2"])
    ending = tokenizer(end or "</s>", add_special_tokens=False)["input_ids"]
    model = scripted(size, [*answer, *ending, 9, 9])
    encoder = ListTokenizer(tokenizer, max_length=None, append_eos=False)
    prompts = [encoder.prompt_tokens("w3").tolist()] * 2
    answers = Sampler(model, tokenizer, config).sample(model, prompts)
    assert answers.tokens == [[*answer, *ending]] * 2
    assert [text.strip() for text in answers.texts] == ["w1 w2"] * 2
    # As training data have it, up to the white space that follows.
    if end is not None:
        written = tokenizer.apply_chat_template(
            [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w1 w2"}], tokenize=False
        )
        whole = tokenizer(written, add_special_tokens=False)["input_ids"]
        assert whole[-len(answers.tokens[0]) :] == answers.tokens[0]


def test_an_export_stops_where_the_turn_ends(tmp_path):
    tokenizer, size, _ = words("gemma")
    model = build(vocabulary=size)
    export(model, tokenizer, None, tmp_path / "gemma")
    settings = json.loads((tmp_path / "gemma" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gemma")
    assert loaded.generation_config.eos_token_id == settings["eos_token_id"]
    assert model.generation_config.eos_token_id == 2
    zephyr, size, _ = words("zephyr")
    export(build(vocabulary=size), zephyr, None, tmp_path / "zephyr")
    assert json.loads((tmp_path / "zephyr" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_samples_that_end_with_a_text_are_ranked_as_whole_responses():
    tokenizer, size, _ = words("several tokens")
    script = tokenizer.convert_tokens_to_ids(["w1", "w7", "w8", "w9"])
    model = build(vocabulary=size)
    drawn = generate(model, tokenizer, "w3", template="chat", candidates=3, max_new_tokens=6, seed=1)[0]
    assert len(drawn.candidates) == 3 and tokenizer.pad_token_id not in drawn.tokens
    one = generate(scripted(size, script), tokenizer, "w3", template="chat", max_new_tokens=6)[0]
    assert one.finished and one.text.strip() == "w1" and list(one.tokens) == script[:3]
