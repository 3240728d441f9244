"""The endpoint by its users' client, the official one of OpenAI: what it gives is what `generate` gives."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from served_models import OBJECTIVES, Running, running, served
from tiny_language_models import conditioned, merging, tokenizer

from mopl.language_models.generate import generate

TALK = [{"role": "user", "content": "w1 w2 w3"}]
WEIGHTS = [[0.7, 0.3], [0.2, 0.8], [1.0, 0.0]]


@pytest.fixture(scope="module")
def server():
    with running(served(weights=[0.25, 0.75])) as made:
        yield made


def chat(server: Running, talk=TALK, *, model="tiny", temperature=0.0, max_tokens=8, **options):
    body = {name: options.pop(name) for name in ("weights", "scale", "beta", "top_k") if name in options}
    return server.client.chat.completions.create(
        model=model, messages=talk, temperature=temperature, max_tokens=max_tokens, extra_body=body, **options
    )


def complete(server: Running, prompt="w1 w2 w3", *, temperature=0.0, max_tokens=8, **options):
    body = {name: options.pop(name) for name in ("weights", "scale") if name in options}
    return server.client.completions.create(
        model="tiny", prompt=prompt, temperature=temperature, max_tokens=max_tokens, extra_body=body, **options
    )


def expected(server: Running, prompts, weights, **options):
    options = {"max_new_tokens": 8, **options}
    return generate(server.model.model, server.model.chat.encoder, prompts, weights, **options)


def text(answer) -> str:
    return answer.choices[0].message.content


# ---------------------------------------------------------------- the answer that generate gives


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_an_answer_at_temperature_0_is_that_of_generate(server, scale):
    for w in WEIGHTS:
        (wanted,) = expected(server, TALK, w, scale=scale)
        found = chat(server, weights=w, scale=scale)
        assert text(found) == wanted.text and found.choices[0].finish_reason == "length"
        assert found.usage.completion_tokens == len(wanted.tokens) and found.usage.prompt_tokens == 6
    assert len({text(chat(server, weights=w)) for w in WEIGHTS}) == len(WEIGHTS)


def test_weights_stand_in_the_body_by_place_or_name_in_the_models_name_or_nowhere(server):
    wanted = text(chat(server, weights=[0.7, 0.3]))
    assert text(chat(server, weights={"harmless": 0.3, "helpful": 0.7})) == wanted
    found = chat(server, model="tiny@0.7,0.3")
    assert text(found) == wanted and found.model == "tiny@0.7,0.3"
    assert found.model_extra["mopl"] == {"weights": {"helpful": 0.7, "harmless": 0.3}, "scale": 1.0}
    assert text(chat(server)) == text(chat(server, weights=[0.25, 0.75])) != wanted


def test_a_completion_continues_texts_and_tokens_as_they_are(server):
    words = server.model.plain.encoder
    texts = ["w1 w2 w3", "w9 w8"]
    wanted = [a.text for a in generate(server.model.model, words, texts, [0.25, 0.75], max_new_tokens=8)]
    found = complete(server, texts)
    assert [choice.text for choice in found.choices] == wanted and [c.index for c in found.choices] == [0, 1]
    ids = [words.prompt_tokens(each).tolist() for each in texts]
    assert [choice.text for choice in complete(server, ids).choices] == wanted
    assert complete(server, ids[0]).choices[0].text == wanted[0]
    assert found.usage.prompt_tokens == sum(map(len, ids))
    assert len(server.client.completions.create(model="tiny", prompt="w1", logprobs=0).choices[0].logprobs.tokens) <= 16


def test_an_answer_ends_where_generate_ends_it(server):
    """With the token that the template ends a turn with, which is no part of the text."""
    model, encoder = server.model.model, server.model.chat.encoder
    talks = [[{"role": "user", "content": f"w{i} w{i + 1}"}] for i in range(40)]
    answers = generate(model, encoder, talks, [0.5, 0.5], max_new_tokens=32)
    ended = [number for number, answer in enumerate(answers) if answer.finished]
    assert ended
    for number in ended[:3]:
        found = chat(server, talks[number], weights=[0.5, 0.5], max_tokens=32)
        assert text(found) == answers[number].text and found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens == len(answers[number].tokens)
        parts = list(chat(server, talks[number], weights=[0.5, 0.5], max_tokens=32, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == answers[number].text
        assert parts[-1].choices[0].finish_reason == "stop"


def test_two_hundred_at_once_lose_none_and_are_what_generate_gives(server):
    """At 200 trade-offs and scales of 1 and 2, half of them as streams, in batches as they come."""
    count = 200
    weights = torch.linspace(0, 1, count, dtype=torch.float64)
    weights = torch.stack([weights, 1 - weights], -1).tolist()
    talks = [[{"role": "user", "content": f"w{i % 40} w{i % 7}" + " w3" * (i % 3)}] for i in range(count)]
    scales = [1.0 + i % 2 for i in range(count)]
    wanted = [each.text for each in expected(server, talks, weights, scale=scales)]

    async def ask(client, number: int) -> str:
        options = {
            "model": "tiny", "messages": talks[number], "temperature": 0, "max_tokens": 8,
            "extra_body": {"weights": weights[number], "scale": scales[number]},
        }  # fmt: skip
        if number % 2:
            parts = await client.chat.completions.create(**options, stream=True)
            return "".join([part.choices[0].delta.content or "" async for part in parts])
        return (await client.chat.completions.create(**options)).choices[0].message.content

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(count)))

    assert asyncio.run(all_of_them()) == wanted
    assert server.http.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}


# ---------------------------------------------------------------- streams and stops


def test_the_pieces_of_a_stream_are_the_answer(server):
    whole = chat(server, max_tokens=12)
    parts = list(chat(server, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == text(whole)
    assert len(parts) > 8 and parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage == whole.usage and parts[-1].choices == []
    found = [part.choices[0].text for part in complete(server, stream=True)]
    assert "".join(found) == complete(server).choices[0].text and len(found) > 5


def test_an_answer_ends_before_a_stop_string(server):
    words = text(chat(server, max_tokens=12)).split()
    stop = " ".join(words[3:5])
    for given in (stop, ["w99 w99", stop]):
        found = chat(server, max_tokens=12, stop=given)
        assert text(found) == " ".join(words[:3]) + " " and found.choices[0].finish_reason == "stop"
        parts = list(chat(server, max_tokens=12, stop=given, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == text(found)
        assert parts[-1].choices[0].finish_reason == "stop"


def test_a_special_token_ends_an_answer_as_a_token(server):
    """No text has it, so as a string it would never be found."""
    bias = {str(tokenizer().convert_tokens_to_ids("<unk>")): 100}
    found = complete(server, stop="<unk>", logit_bias=bias)
    assert found.choices[0].text == "" and found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == 1
    assert complete(server, stop="w99", logit_bias=bias).choices[0].finish_reason == "length"
    assert text(chat(server, stop=["</s>", "<unk>"])) == text(chat(server))


# ---------------------------------------------------------------- samples


def test_a_seed_gives_the_same_samples_whatever_else_is_answered(server):
    options = {"temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 10}
    alone = [choice.message.content for choice in chat(server, **options).choices]
    assert len(set(alone)) == 3

    async def together() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            others = [
                client.chat.completions.create(
                    model="tiny@0.9,0.1", messages=[{"role": "user", "content": "w5 w6 w7 w8"}], max_tokens=5 + i
                )
                for i in range(6)
            ]
            same = [client.chat.completions.create(model="tiny", messages=TALK, **options) for _ in range(2)]
            found = await asyncio.gather(*others[:3], *same, *others[3:])
            return [[choice.message.content for choice in each.choices] for each in found[3:5]]

    assert asyncio.run(together()) == [alone, alone]
    assert [choice.message.content for choice in chat(server, **{**options, "seed": 8}).choices] != alone
    assert text(chat(server, temperature=1.0)) != text(chat(server, temperature=1.0))  # without a seed
    assert text(chat(server, temperature=1.0, top_p=1e-6)) == text(chat(server))
    assert text(chat(server, temperature=2.0, top_k=1)) == text(chat(server))


def test_a_bias_and_penalties_change_what_is_chosen(server):
    greedy = complete(server, logprobs=0).choices[0]
    first = greedy.logprobs.tokens[0].strip()
    token = tokenizer().convert_tokens_to_ids(first)
    assert not complete(server, logit_bias={str(token): -100}).choices[0].text.startswith(first)
    assert set(complete(server, logit_bias={str(token): 100}).choices[0].text.split()) == {first}
    once = complete(server, logit_bias={str(token): 3}, presence_penalty=2, max_tokens=6).choices[0].text.split()
    never = complete(server, logit_bias={str(token): 3}, max_tokens=6).choices[0].text.split()
    assert never.count(first) >= once.count(first)


# ---------------------------------------------------------------- log-probabilities


def test_log_probabilities_are_those_of_a_forward_pass(server):
    """Of the model at the trade-off, whatever the temperature: one row, without a cache or padding."""
    model, words = server.model.model, server.model.plain.encoder
    ids = words.prompt_tokens("w1 w2 w3").tolist()
    for temperature in (0.0, 1.5):
        found = complete(server, weights=[0.7, 0.3], logprobs=5, temperature=temperature, seed=3, max_tokens=6)
        logs = found.choices[0].logprobs
        tokens = tokenizer().convert_tokens_to_ids([token.strip() for token in logs.tokens])
        with torch.no_grad():
            logits = model(torch.tensor([ids + tokens]), weights=torch.tensor([0.7, 0.3]), use_cache=False).logits[0]
        wanted = logits.double().log_softmax(-1)[len(ids) - 1 : -1]
        chosen = wanted.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logs.token_logprobs, dtype=torch.float64), chosen, atol=1e-5, rtol=0)
        for row, top, token in zip(wanted, logs.top_logprobs, logs.tokens, strict=True):
            best = [f" {tokenizer().decode([i])}" for i in row.topk(5).indices.tolist()]
            assert set(top) == {*best, token}
        places = zip(logs.text_offset, logs.tokens, strict=True)
        assert all(found.choices[0].text[place:].lstrip().startswith(token.strip()) for place, token in places)
    content = chat(server, logprobs=True, top_logprobs=2, max_tokens=4).choices[0].logprobs.content
    assert [len(each.top_logprobs) for each in content] == [2] * 4
    assert all(each.top_logprobs[0].logprob == each.logprob for each in content)  # greedy
    assert bytes(content[0].bytes).decode() == content[0].token
    parts = list(chat(server, logprobs=True, top_logprobs=2, max_tokens=4, stream=True))
    streamed = [each for part in parts for each in part.choices[0].logprobs.content]
    assert [each.token for each in streamed] == [each.token for each in content]


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_done_is_refused_by_name(server):
    for fields, param, words in (
        ({"weights": [0.7, 0.4]}, "weights", "must lie on the simplex"),
        ({"weights": [0.7]}, "weights", "has 1 number; give one for each of helpful, harmless"),
        ({"weights": [1.5, -0.5]}, "weights", "negative"),
        ({"weights": {"helpful": 1.0}}, "weights", "'harmless' is missing"),
        ({"weights": {"helpful": 0.5, "harmless": 0.5, "funny": 0}}, "weights", "'funny' is no objective"),
        ({"weights": "high"}, "weights", "but must be object | array"),
        ({"model": "tiny@0.7,0.3", "weights": [0.7, 0.3]}, "weights", "give them once"),
        ({"model": "tiny@0.7,0.4"}, "model", "simplex"),
        ({"model": "tiny@high"}, "model", "must have 2"),
        ({"scale": 0}, "scale", "positive"),
        ({"scale": 1e999}, "scale", "scale is"),
        ({"scale": 1e-40}, "scale", "1e-40 but must be from 1e-06 to 1e+06"),
        ({"scale": 2e6}, "scale", "2e+06 but must be from 1e-06 to 1e+06"),
        ({"beta": [0.1, 0.1]}, "beta", "not conditioned on it"),
        ({"temperature": 3}, "temperature", "temperature is 3 but must be float <= 2"),
        ({"temperature": "1"}, "temperature", "but must be float"),
        ({"temperature": float("nan")}, "temperature", "temperature is NaN"),
        ({"presence_penalty": float("nan")}, "presence_penalty", "NaN"),
        ({"logit_bias": {"3": float("nan")}}, "logit_bias", "float >= -100"),
        ({"weights": [float("nan"), 1]}, "weights", "NaN"),
        ({"top_p": 0}, "top_p", "> 0"),
        ({"n": 17}, "n", "<= 16"),
        ({"max_tokens": 33}, "max_tokens", "gives at most 32"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "two names"),
        (
            {"messages": [{"role": "user", "content": "w1 " * 40}], "max_tokens": 30},
            "max_tokens",
            "the prompt has 43 tokens, 5 more tell the trade-off, and its answer up to 30",
        ),
        ({"messages": [{"role": "user", "content": "w1 " * 80}]}, None, "shorten the prompt"),
        ({"messages": []}, "messages", "length >= 1"),
        (
            {"messages": [{"role": "tool", "content": "w1"}]},
            "messages",
            "messages[0].role is 'tool' but must be one of",
        ),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content is missing"),
        ({"messages": [{"role": 1, "content": "w1"}]}, "messages", "messages[0].role is 1"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages", "messages[0].tool_calls is not supp"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "content[0]"),
        ({"messages": [{"role": "user", "content": "w1", "name": "Ann"}]}, "messages", "messages[0].name is not supp"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported with the value [{"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"kl_weight": 0.1}, "kl_weight", "kl_weight was passed but the model is not conditioned on it"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"stream_options": {}}, "stream_options", "stream=true"),
        ({"logit_bias": {"w1": 1}}, "logit_bias", "tokens, from 0"),
        ({"logit_bias": {"100": 1}}, "logit_bias", "tokens, from 0"),
        ({"logit_bias": {"61": 1, "061": 2}}, "logit_bias", "'061'"),
        ({"weights": [10**400, 1]}, "weights", "a number that 64 bits hold"),
        ({"model": "tiny@70,30"}, "model", "'70,30': weights = (70, 30) must lie on"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "length <= 4"),
        ({"stop": ""}, "stop", "length >= 1"),
    ):
        answer = server.http.post("/v1/chat/completions", content=json.dumps({"messages": TALK, **fields}),
                                  headers={"content-type": "application/json"})  # fmt: skip
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["type"] == "invalid_request_error", (fields, error)
        assert words in error["message"] and error["param"] == param, (fields, error)
    for fields, words in (
        ({"prompt": "w1", "echo": True}, "echo is not supported with the value true"),
        ({"prompt": "w1", "best_of": 2}, "best_of"),
        ({"prompt": ["w1", [3]]}, "mixes"),
        ({"prompt": [3, 99]}, "token 99"),
        ({"prompt": []}, "length >= 1"),
        ({"prompt": ["w1"] * 17, "n": 16}, "272 answers"),
        ({"prompt": "\ud800"}, "half a character"),
        ({}, "prompt is missing"),
    ):
        answer = server.http.post("/v1/completions", content=json.dumps(fields),
                                  headers={"content-type": "application/json"})  # fmt: skip
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], (fields, answer.json())


def test_fields_that_ask_for_nothing_are_taken(server):
    idle = {"user": "ann", "metadata": {}, "store": False, "tools": [], "parallel_tool_calls": True, "seed": None,
            "response_format": {"type": "text"}, "service_tier": "auto", "function_call": None}  # fmt: skip
    answer = server.http.post(
        "/v1/chat/completions", json={"messages": TALK, "temperature": 0, "max_tokens": 4, **idle}
    )
    assert answer.status_code == 200
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2 w3"}]
    assert text(chat(server, [{"role": "user", "content": parts}])) == text(chat(server))


def test_an_answer_can_be_sent_back_as_the_client_has_it(server):
    """With its empty fields, as programs do that hold a conversation."""
    first = chat(server).choices[0].message
    talk = [*TALK, first.model_dump(), {"role": "user", "content": "w4"}]
    assert len(talk[1]) > 3
    plain = [*TALK, {"role": "assistant", "content": first.content}, talk[2]]
    assert text(chat(server, talk)) == text(chat(server, plain))


def test_a_long_prompt_that_is_read_holds_up_nobody(server, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()

    def read(encoder, prompt):
        reading.set()
        assert go_on.wait(10)
        return inner(encoder, prompt)

    encoder = server.model.plain.encoder
    inner = type(encoder).prompt_tokens
    monkeypatch.setattr(encoder, "prompt_tokens", lambda prompt: read(encoder, prompt), raising=False)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(complete, server)
        try:
            assert reading.wait(10) and server.http.get("/health", timeout=5).status_code == 200
        finally:
            go_on.set()
        assert asked.result().choices[0].text


def test_bodies_that_are_no_requests(server):
    post = server.http.post
    json_kind = {"content-type": "application/json"}
    for body, words in (
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b"\xff", "cannot be read"),
        (b'{"n":1,"n":2}', "twice"),
    ):
        answer = post("/v1/chat/completions", content=body, headers=json_kind)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.json()
    assert post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    large = json.dumps({"prompt": "w1 " * 400_000})
    answer = post("/v1/completions", content=large, headers=json_kind)
    assert answer.status_code == 413 and "1,048,576 bytes" in answer.json()["error"]["message"]
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405), ("GET", "/v1/engines", 404), ("POST", "/v1/embeddings", 404),
    ):  # fmt: skip
        answer = server.http.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError, match=r"no model 'big'; this server has 'tiny'"):
        chat(server, model="big")


# ---------------------------------------------------------------- what is here


def test_models_tell_what_they_can_be_asked(server):
    (model,) = server.client.models.list().data
    assert model.id == "tiny" and model.owned_by == "mopl"
    about = model.model_extra["mopl"]
    assert about["objectives"] == list(OBJECTIVES) and about["weights"] == [0.25, 0.75]
    assert about["takes_beta"] is False and about["scale"] is True and about["positions"] == 64
    assert server.client.models.retrieve("tiny@0.7,0.3").model_extra["mopl"]["weights"] == [0.7, 0.3]
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("big")


def test_streams_never_have_half_a_character():
    """A byte-level vocabulary, in which most characters of these texts are several tokens."""
    backend = merging(["äöü €uro 東京 😀"], ["<pad>", "<s>", "</s>", "<unk>"])
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    with running(served(conditioned(vocabulary=len(words)), words)) as server:
        letters = {str(words.convert_tokens_to_ids(each)): 9 for each in "æĿ±äº¬ð"}  # bytes of 東京 and of an emoji
        options = {"temperature": 1.5, "max_tokens": 24, "logit_bias": letters, "logprobs": 0}
        halves = 0
        for seed in range(5):
            whole = complete(server, seed=seed, **options).choices[0]
            parts = [part.choices[0] for part in complete(server, seed=seed, stream=True, **options)]
            assert "".join(part.text for part in parts) == whole.text
            assert [t for part in parts for t in part.logprobs.tokens] == whole.logprobs.tokens
            assert not any(part.text.endswith("\ufffd") for part in parts[:-1])
            halves += "\ufffd" in "".join(whole.logprobs.tokens)
        assert halves
