"""Weights written into the prompt: texts, chat messages and tokens."""

import copy
import dataclasses
import json

import pytest
import torch

from mopl.conditioning import TextPrompt

HELPFUL = ("helpful", "harmless")


def test_the_default_reads_as_documented() -> None:
    prompt = TextPrompt(HELPFUL)
    assert prompt.render((0.7, 0.3)) == "[helpful: 0.70, harmless: 0.30]\n"
    assert prompt.apply("Hello", torch.tensor([0.7, 0.3])) == "[helpful: 0.70, harmless: 0.30]\nHello"


@pytest.mark.parametrize(("digits", "expected"), [(0, "a 0 b 1"), (1, "a 0.1 b 0.9"), (3, "a 0.125 b 0.875")])
def test_format_and_digits(digits: int, expected: str) -> None:
    prompt = TextPrompt(("a", "b"), template="{weights}", item="{name} {value}", separator=" ", digits=digits)
    assert prompt.render([0.125, 0.875]) == expected


def test_vectors_that_agree_to_the_digits_give_the_same_prompt_and_others_do_not() -> None:
    prompt = TextPrompt(HELPFUL)
    assert prompt.render((0.7, 0.3)) == prompt.render((0.701, 0.299)) != prompt.render((0.71, 0.29))
    assert prompt.render((1.0, 0.0)) != prompt.render((0.0, 1.0))


def test_braces_and_betas_in_a_template() -> None:
    prompt = TextPrompt(HELPFUL, template="{{w}} {weights} | {betas} ")
    assert prompt.takes_beta and not TextPrompt(HELPFUL).takes_beta
    text = prompt.render((0.5, 0.5), beta=(1.0, 3.0))
    assert text == "{w} helpful: 0.50, harmless: 0.50 | helpful: 0.25, harmless: 0.75 "
    assert text == prompt.render((0.5, 0.5), beta=torch.tensor([2.0, 6.0]))


def test_chat_messages_take_the_text_in_the_system_message() -> None:
    prompt = TextPrompt(HELPFUL)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    before = copy.deepcopy(messages)
    changed = prompt.apply(messages, (1.0, 0.0))
    assert changed[0]["content"] == "[helpful: 1.00, harmless: 0.00]\nBe brief." and changed[1] == messages[1]
    assert messages == before
    made = prompt.apply(messages[1:], (1.0, 0.0))
    assert made == [{"role": "system", "content": "[helpful: 1.00, harmless: 0.00]"}, messages[1]]


def test_chat_messages_take_the_text_in_the_first_message_of_the_user() -> None:
    prompt = TextPrompt(HELPFUL, placement="user")
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    changed = prompt.apply(turns, (0.5, 0.5))
    assert [message["content"] for message in changed] == ["[helpful: 0.50, harmless: 0.50]\nA", "B", "C"]
    with pytest.raises(ValueError, match="role 'user'"):
        prompt.apply(turns[1:2], (0.5, 0.5))


def test_messages_of_parts_take_the_text_in_the_first_text() -> None:
    prompt = TextPrompt(("a",), template="{weights}:", placement="user")
    parts = [{"type": "image", "url": "x"}, {"type": "text", "text": "What?"}]
    changed = prompt.apply([{"role": "user", "content": parts}], [1.0])
    assert (
        changed[0]["content"] == [parts[0], {"type": "text", "text": "a: 1.00:What?"}] and parts[1]["text"] == "What?"
    )
    changed = prompt.apply([{"role": "user", "content": parts[:1]}], [1.0])
    assert changed[0]["content"] == [{"type": "text", "text": "a: 1.00:"}, parts[0]]


def test_tokens_go_in_after_the_token_that_begins_the_text() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "w", "0.70", "0.30", "Hello", "there"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    prompt = TextPrompt(("w", "v"), template="w {weights} ", item="{value}", separator=" ")
    ids = tokenizer("Hello there")["input_ids"]
    assert ids == [1, 5, 6]
    expected = tokenizer(prompt.apply("Hello there", (0.7, 0.3)))["input_ids"]
    assert prompt.prepend_ids(ids, (0.7, 0.3), tokenizer) == expected == [1, 2, 3, 4, 5, 6]
    assert prompt.prepend_ids(torch.tensor(ids[1:]), (0.7, 0.3), tokenizer) == expected[1:]
    assert prompt.prepend_ids([], (0.7, 0.3), tokenizer) == [2, 3, 4]
    with pytest.raises(ValueError, match="one prompt"):
        prompt.prepend_ids(torch.tensor([ids]), (0.7, 0.3), tokenizer)


def test_it_survives_json() -> None:
    prompt = TextPrompt(HELPFUL, digits=1, placement="user")
    assert TextPrompt(**json.loads(json.dumps(dataclasses.asdict(prompt)))) == prompt


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TextPrompt(()), "one or more different names"),
        (lambda: TextPrompt(("a", "a")), "one or more different names"),
        (lambda: TextPrompt(HELPFUL, template="no field"), r"must contain \{weights\}"),
        (lambda: TextPrompt(HELPFUL, template="{weights} {prompt}"), "no other field"),
        (lambda: TextPrompt(HELPFUL, item="{name}"), "item is '{name}' but must contain {value}"),
        (lambda: TextPrompt(HELPFUL, digits=-1), "digits is -1"),
        (lambda: TextPrompt(HELPFUL, placement="assistant"), "placement is 'assistant'"),  # type: ignore[arg-type]
        (lambda: TextPrompt(HELPFUL).render((0.5, 0.6)), "does not sum to 1"),
        (lambda: TextPrompt(HELPFUL).render((0.2, 0.3, 0.5)), r"must be \(2,\)"),
        (lambda: TextPrompt(HELPFUL).render(torch.tensor([[0.5, 0.5]])), "loop over rows"),
        (lambda: TextPrompt(HELPFUL).render((0.5, 0.5), (1.0, 1.0)), "no {betas}"),
        (lambda: TextPrompt(HELPFUL, template="{weights}{betas}").render((0.5, 0.5)), "beta is missing"),
        (
            lambda: TextPrompt(HELPFUL, template="{weights}{betas}").render((0.5, 0.5), (1.0, 0.0)),
            "positive numbers",
        ),
    ],
)
def test_bad_settings_and_bad_weights_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
