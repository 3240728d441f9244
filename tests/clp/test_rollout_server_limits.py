"""Whatever a server says is an answer as asked for or one error, in time, which shows neither key nor password."""

import gzip
import json
import socketserver
import threading
import time

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("httpx")

from clp_problems import language_model, parts, settings
from tiny_language_models import tokenizer
from vllm_imitation import imitating

from mopl.clp import rollout_server
from mopl.clp.policies import new_policy
from mopl.clp.prompts import PromptSource
from mopl.clp.rollout import Sampler
from mopl.clp.rollout_server import KEY_VARIABLE, OpenAIServer, RolloutServerError
from mopl.clp.server_rollouts import ServerAnswers
from mopl.training import make_accelerator

OK = b"HTTP/1.1 200 OK\r\n"
REPLY = {"answers": 1, "tokens": 4, "temperature": 1.0, "seed": 1, "ends": [2], "stop": None}


@pytest.fixture
def raw():
    """A server that says bytes, one after another where `pause` is more than 0."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(65536)
            try:
                if not self.server.pause:
                    self.request.sendall(self.server.said)
                for i in range(len(self.server.said) if self.server.pause else 0):
                    self.request.sendall(self.server.said[i : i + 1])
                    if self.server.ended.wait(self.server.pause):
                        break
            except OSError:
                pass  # nobody waits for it

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.pause, server.ended = True, 0, threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


def answer(content, *headers, status=OK):
    lines = [f"content-length: {len(content)}", "connection: close", *headers]
    return status + "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n" + content


@pytest.mark.parametrize("said", [OK + b"x: " + b"y" * 99, answer(b" " * 99)], ids=["headers", "content"])
def test_an_answer_that_drips_ends_when_time_is_up(raw, said):
    raw.said, raw.pause = said, 0.05
    began = time.monotonic()
    with pytest.raises(RolloutServerError, match=r"no answer came in time, within rollout_timeout = 0\.6"):
        OpenAIServer(raw.url, 0.6).connect()
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (answer(b"[" * 50_000), "gives no JSON"),
        (answer(b'{"data": [{"id": "\xff"}]}'), "gives no JSON"),
        (answer(b'{"data": ' + b"9" * 5000 + b"}"), "gives no JSON"),
        (answer(b'{"data": ' + b"[" * 800 + b"]" * 800 + b"}"), "not as OpenAI's"),
        (answer(b"garbage", "content-encoding: gzip"), "is compressed"),
        (answer(gzip.compress(b" " * 40_000_000), "content-encoding: gzip"), "is compressed"),
        (answer(b"[" * 50_000, status=b"HTTP/1.1 400 no\r\n"), "400: "),
        (answer(b"\xff", "content-type: text/plain; charset=base64", status=b"HTTP/1.1 400 no\r\n"), "400: "),
        (answer(b"", "retry-after: \xb2", status=b"HTTP/1.1 503 no\r\n"), "503"),
        (b"nonsense\r\n\r\n", "it cannot be reached"),
        (answer(b"<html>Sign in</html>", "content-type: text/html"), "gives no JSON"),
        (answer(b"", "location: http://elsewhere/", status=b"HTTP/1.1 307 go\r\n"), "307: ; it sends to another"),
    ],
)
def test_odd_answers_are_errors_of_the_server(raw, said, message):
    raw.said = said
    with pytest.raises(RolloutServerError, match=rf"{raw.url}: .*{message}.*can be resumed"):
        OpenAIServer(raw.url, 0.6).connect()


def test_an_answer_in_chunks_without_an_end_is_read_up_to_a_size(raw, monkeypatch):
    monkeypatch.setattr(rollout_server, "_MOST_BYTES", 10_000)
    raw.said = OK + b"transfer-encoding: chunked\r\n\r\n" + b"3e8\r\n" + b" " * 1000 + b"\r\n"
    raw.said += (b"3e8\r\n" + b" " * 1000 + b"\r\n") * 20
    with pytest.raises(RolloutServerError, match="has more than 10,000 bytes"):
        OpenAIServer(raw.url, 5.0).connect()


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"1.5", b"-1e999", b'"x"'])
def test_log_probabilities_that_are_none_are_refused(raw, value):
    logs = b'{"tokens": ["a"], "token_logprobs": [' + value + b"]}"
    raw.said = answer(b'{"choices": [{"index": 0, "token_ids": [2], "logprobs": ' + logs + b"}]}")
    with pytest.raises(RolloutServerError, match=r"no JSON|no log-probability|not as OpenAI's"):
        OpenAIServer(raw.url, 5.0).complete([1, 7], {"model": "base"}, **REPLY)


def test_an_answer_is_read_up_to_a_size(raw, monkeypatch):
    monkeypatch.setattr(rollout_server, "_MOST_BYTES", 1000)
    raw.said = answer(b'{"data": [{"id": "base", "owned_by": "vllm"}]}' + b" " * 900)
    OpenAIServer(raw.url, 5.0).connect()
    raw.said = answer(b'{"data": [{"id": "base", "owned_by": "vllm"}]}' + b" " * 1000)
    with pytest.raises(RolloutServerError, match="has more than 1,000 bytes"):
        OpenAIServer(raw.url, 5.0).connect()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([62, 2], "the token 62, but the run's model has 62 tokens"),
        ([10**6, 2], "the token 1000000"),
        ([-1, 2], "not as OpenAI's"),
        ([2**40, 2], f"the token {2**40}"),
        ([2**70, 2], "not as OpenAI's"),
        ([9] * 200 + [2], "has 201 tokens, above max_new_tokens"),
    ],
)
def test_tokens_that_the_model_has_not_and_more_than_were_asked_for_are_refused(tmp_path, ids, message):
    def told(found):
        for choice in found["choices"]:
            choice["token_ids"] = ids
            choice["logprobs"] = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-1.0] * len(ids)}
        return found

    with imitating() as vllm:
        base = language_model()
        config = settings(
            rollout_server=vllm.url, rollout_folder=str(tmp_path), rollout_timeout=20.0, scope="lora-mixture"
        )
        sampler = Sampler(base, tokenizer(), config)
        answers = ServerAnswers(config, sampler, make_accelerator(cpu=True))
        answers.check([], [1, 7])
        vllm.change = told
        batch = PromptSource(parts(config)["train"], config, 2, trade_offs=2)(0)
        policy = new_policy(base, config, ("first", "second"), "clp")
        weights, kl_weight = batch.weights[:1], batch.kl_weight[:1]
        with pytest.raises(RolloutServerError, match=message):
            answers.answer(policy, [[1, 7]], weights, kl_weight, batch)


def test_names_of_tokens_that_are_no_numbers_are_refused(raw):
    logs = {"tokens": ["token_id:x"], "token_logprobs": [-1.0]}
    raw.said = answer(json.dumps({"choices": [{"index": 0, "token_ids": [2], "logprobs": logs}]}).encode())
    with pytest.raises(RolloutServerError, match="are not those of its answer"):
        OpenAIServer(raw.url, 5.0).complete([1, 7], {"model": "base"}, **REPLY)


@pytest.mark.parametrize("key", ["s\u00e9cret", "sec\nret", "sec\x7fret"])
def test_a_key_that_cannot_be_sent_is_said_without_the_key(monkeypatch, key):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE} has a character that no header") as refused:
        OpenAIServer("http://127.0.0.1:9", 0.3)
    assert "ret" not in str(refused.value)


@pytest.mark.parametrize(
    "said",
    [
        answer(b'{"error": "wrong key secretkey"}', status=b"HTTP/1.1 401 no\r\n"),
        answer(b"x" * 495 + b"secretkey", status=b"HTTP/1.1 401 no\r\n"),
        answer(b"x" * 9995 + b" secretkey", status=b"HTTP/1.1 401 no\r\n"),
        answer(b'{"data": [{"id": "base", "owned_by": "secretkey"}]}'),
        answer(b'{"data": "' + b"x" * 70 + b'secretkey"}'),
        answer(b'{"data": [{"id": {"secretkey": 1}}]}'),
    ],
)
def test_no_error_shows_the_key_or_a_part_of_it(raw, monkeypatch, said):
    monkeypatch.setenv(KEY_VARIABLE, "secretkey")
    raw.said = said
    with pytest.raises(RolloutServerError) as refused:
        OpenAIServer(raw.url, 5.0).connect()
    assert "secr" not in str(refused.value) and raw.url in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["http://me:hidden@127.0.0.1:9", "http://me:p/hidden@host", "me:hidden@host", "http://hidden@host",
     "http://host:1/v1?key=hidden", "http://host/#hidden"],
)  # fmt: skip
def test_an_address_with_a_password_is_refused_without_it(url):
    for options in ({"rollout_folder": "f"}, {}):
        with pytest.raises(ValueError, match=r"rollout_server has an @.*MOPL_API_KEY") as refused:
            settings(rollout_server=url, **options)
        assert "hidden" not in str(refused.value)
    assert settings(rollout_server="http://host:1/v1", rollout_folder="f").rollout_server == "http://host:1/v1"
