"""Where a prompt ends and a response begins and ends: training, generation and CLP read the same prompt."""

import json

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_language_models as tiny

from mopl.clp.config import ClpConfig
from mopl.clp.prompts import placed_prompts, split_prompts
from mopl.language_models._generation_arguments import prompt_tokens
from mopl.language_models.data import DataError, PreferenceData, PreferenceList, RowError
from mopl.language_models.readers import load_preferences
from mopl.language_models.tokenization import ListTokenizer, tokenize

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<bot>", "<end>", "<think>", "</think>"]
TEXTS = [
    "why is the sky blue? light scatters in the air",
    "how? like so, and no idea at all",
    "who? a model of few words",
]
TURNS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<bot>THINK{{ m['content'] }}END{% else %}"
    "<user>{{ m['content'] }}END{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>OPEN{% endif %}"
)


def template(end: str = "<end>\n", thought: str = "", opening: str = "") -> str:
    return TURNS.replace("END", end).replace("THINK", thought).replace("OPEN", opening)


def tokenizer(chat_template: str | None = None, eos: str = "<eos>", **options):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.merging(TEXTS, SPECIAL, **options), pad_token="<pad>", eos_token=eos,
        additional_special_tokens=SPECIAL[3:], chat_template=chat_template,
    )  # fmt: skip


def run(encoder: ListTokenizer, prompt, *responses):
    return encoder(PreferenceList(prompt, responses, {"h": (1.0, 0.0)}), np.zeros((1, 2), dtype=np.float32))


def prompts_of(encoder: ListTokenizer, prompt) -> list[list[int]]:
    """The tokens of a prompt in training, in generation and in CLP."""
    config = ClpConfig(model="m", data="d", rewards=("brevity", "sentiment"), max_prompt=64)
    parts, _ = split_prompts([("first", prompt), ("second", "how?")], encoder, config)
    clp = {text: tokens for part in parts.values() for text, tokens in zip(part.texts, part.tokens, strict=True)}
    return [run(encoder, prompt, "a", "b").prompt.tolist(), prompt_tokens(encoder, prompt, 0), list(clp[prompt])]


# ---------------------------------------------------------------- the seam


@pytest.mark.parametrize("across_words", [False, True])
@pytest.mark.parametrize("chat", [None, template()])
@pytest.mark.parametrize("prompt", ["why is the sky blue? ", "how? like ", "who? a\n", "how? like s"])
def test_a_prompt_has_the_tokens_that_are_answered_even_where_the_whole_text_would_merge(prompt, chat, across_words):
    made = tokenizer(chat, use_regex=not across_words)
    encoder = ListTokenizer(made)
    item = run(encoder, prompt, "light scatters", "o, and no idea")
    assert {tuple(found) for found in prompts_of(encoder, prompt)} == {tuple(item.prompt.tolist())}
    end = "<eos>" if chat is None else "<end>"
    for response, text in zip(item.responses, ("light scatters", "o, and no idea"), strict=True):
        ids = [*item.prompt.tolist(), *response.tolist()]
        written = prompt + text if chat is None else f"<user>{prompt}<end>\n<bot>{text}"
        assert made.decode(ids) == written + end
        # What is scored is what a model that read the prompt can go on with: whole tokens, and then the end.
        assert made.decode(response.tolist()) == text + end and end not in made.decode(response.tolist()[:-1])


def test_the_prompts_of_these_tests_do_merge_with_what_follows():
    made = tokenizer()
    alone, whole = made("why is the sky blue? ")["input_ids"], made("why is the sky blue? light")["input_ids"]
    assert whole[: len(alone)] != alone
    made = tokenizer(use_regex=False)
    alone, whole = made("how? like s")["input_ids"], made("how? like so, and no idea")["input_ids"]
    assert whole[: len(alone)] != alone


# ---------------------------------------------------------------- the end of a turn


@pytest.mark.parametrize(
    ("end", "eos", "token"),
    [
        ("<end>\n", "<end>", "<end>"),  # a line break after the end token, as in most templates
        ("<end>\n", "<eos>", "<end>"),  # the turn ends with a token of its own
        ("<end>\n<eos>", "<eos>", "<end>"),  # and the conversation with another
        ("\n<end>", "<eos>", "<end>"),
        ("<eos>", "<eos>", "<eos>"),
        (" ###\n", "<eos>", " ###"),  # in text, which is stopped at
        ("\n\n", "<eos>", None),  # in white space alone: nothing can be left out
    ],
)
def test_a_response_ends_with_the_token_that_ends_the_turn(end, eos, token):
    made = tokenizer(template(end), eos)
    encoder = ListTokenizer(made)
    if token in SPECIAL:
        assert encoder.turn_end == made.convert_tokens_to_ids(token)
    elif token is not None:
        assert encoder.turn_end == token.strip()
    item = run(encoder, "how?", "like so", "no")
    kept = end if token is None else end[: end.index(token) + len(token)]
    assert [made.decode(response.tolist()) for response in item.responses] == [f"like so{kept}", f"no{kept}"]
    several = [
        {"role": role, "content": text} for role, text in (("assistant", "a"), ("user", "how?"), ("assistant", "so"))
    ]
    item = run(encoder, "how?", several, "no")
    assert made.decode(item.responses[0].tolist()) == f"a{end}<user>how?{end}<bot>so{kept}"


def test_text_without_a_template_and_templates_that_refuse_to_be_asked_have_no_end_of_turn():
    assert ListTokenizer(tokenizer()).turn_end is None
    assert ListTokenizer(tokenizer(template()), template="plain").turn_end is None
    assert ListTokenizer(tokenizer("{{ raise_exception('only with tools') }}")).turn_end is None


# ---------------------------------------------------------------- thoughts


def test_a_thought_that_only_the_generation_prompt_opens_is_refused_before_a_run():
    encoder = ListTokenizer(tokenizer(template(opening="<think>\n")))
    with pytest.raises(RowError, match=r"(?s)no continuation of its prompt.*<bot><think>.*enable_thinking"):
        run(encoder, "how?", "like so", "no")
    data = PreferenceData([PreferenceList("how?", ("so", "no"), {"h": (1.0, 0.0)}, "line 7")])
    with pytest.raises(DataError, match="1 x no continuation of its prompt"):
        tokenize(data, encoder)
    # CLP trains on what was sampled after the very tokens that generation reads.
    assert prompt_tokens(encoder, "how?", 0) == encoder.prompt_tokens("how?").tolist()
    assert encoder.tokenizer.decode(prompt_tokens(encoder, "how?", 0)).endswith("<bot><think>\n")


def test_a_thought_that_the_answer_holds_or_both_open_is_trained():
    empty = ListTokenizer(tokenizer(template(thought="<think></think>")))
    item = run(empty, "how?", "like so", "no")
    decode = empty.tokenizer.decode
    assert decode(item.prompt.tolist()) == "<user>how?<end>\n<bot>"
    assert decode(item.responses[0].tolist()) == "<think></think>like so<end>"
    both = ListTokenizer(tokenizer(template(thought="<think>\n", opening="<think>\n")))
    item = run(both, "how?", "hm</think>like so", "no")
    assert decode(item.prompt.tolist()).endswith("<bot><think>\n")
    assert decode(item.responses[0].tolist()) == "hm</think>like so<end>"
    switch = template(opening="{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}")
    off = ListTokenizer(tokenizer(switch), template_options={"enable_thinking": False})
    assert decode(run(off, "how?", "like so", "no").prompt.tolist()).endswith("<bot>")


# ---------------------------------------------------------------- what stands beside a prompt


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs", "image", "images"])
def test_columns_that_would_change_a_prompt_are_refused_in_files(tmp_path, column):
    row = {"prompt": "q", "responses": ["a", "b"], "labels": {"h": [1, 0]}}
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = tmp_path / "rows.jsonl"
    for first in (row, pair, {"prompt": "q"}):
        for value, good in ((None, True), ([], True), ({}, True), ("[]", True), ("x", False), ([{"a": 1}], False)):
            rows = [{**first, "prompt": "other"}, {**first, column: value}]
            path.write_text("\n".join(map(json.dumps, rows)))
            read = placed_prompts if first == {"prompt": "q"} else load_preferences
            if good:
                assert len(read(str(path))) == 2
            else:
                with pytest.raises(DataError, match=f"line 2: (it has )?.*{column}.* is part of what a model sees"):
                    read(str(path))
