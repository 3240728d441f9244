"""What a server does besides answering: it bounds queue and time, knows who may ask, and stops in good order."""

import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from launching import started
from served_models import Gate, layer_of, running, served
from tiny_language_models import build, conditioned, lora, prompt, tokenizer

from mopl.cli import main
from mopl.conditioning import HyperPromptModel, TuningRecord
from mopl.serving.api import Api
from mopl.serving.engine import Engine
from mopl.serving.server import Server, bound_socket

BODY = {"prompt": "w1 w2", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def model():
    return conditioned()


@pytest.fixture
def gate(model):
    made = Gate(model)
    yield made
    made.remove()


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def ask(server, **more):
    return server.http.post("/v1/completions", json={**BODY, **more})


# ---------------------------------------------------------------- queue and time


def test_a_full_queue_is_said_at_once_and_what_waits_is_answered(model, gate):
    with running(served(model), max_batch=2, max_queue=3) as server, ThreadPoolExecutor(8) as pool:
        with gate.closed():
            first = pool.submit(ask, server)
            assert gate.reached.wait(10)
            waiting = [pool.submit(ask, server) for _ in range(3)]
            until(lambda: server.engine.waiting == 3)
            refused = ask(server)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "queue_full"
            with pytest.raises(openai.RateLimitError):
                server.client.completions.create(model="tiny", **BODY)
            assert ask(server, n=4).status_code == 400  # never fits
        answers = {each.result().json()["choices"][0]["text"] for each in (first, *waiting)}
        assert len(answers) == 1 and ask(server).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_too_long_is_given_up(model, gate, stream):
    with running(served(model), seconds=0.3, max_batch=1) as server, ThreadPoolExecutor(2) as pool:
        with gate.closed():
            running_, waiting = pool.submit(ask, server, stream=stream), pool.submit(ask, server, stream=stream)
            for answer in (running_.result(), waiting.result()):
                assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
            assert server.engine.waiting == 0
        until(lambda: server.engine.running == 0)
        assert ask(server).status_code == 200


def test_an_error_in_the_middle_of_a_stream_is_an_event(model, gate, capfd):
    with running(served(model), seconds=1.0) as server:
        server.api.log = True
        stream = server.client.completions.create(
            model="tiny", prompt="w1 w2", temperature=0, max_tokens=20, stream=True
        )
        assert next(stream).choices[0].text
        with gate.closed(), pytest.raises(openai.APIError, match="longer than 1 seconds"):
            list(stream)
    assert re.search(r" 200 .* tokens  broken off: 504 timeout\n", capfd.readouterr().err)


def test_a_head_that_never_ends_is_not_waited_for(model, gate, monkeypatch):
    """Neither of the first request of a connection nor of a later one; an answer may take its time."""
    monkeypatch.setattr("mopl.serving.server.HEAD_SECONDS", 0.3)
    with running(served(model)) as server, ThreadPoolExecutor(1) as pool:
        for before in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            with socket.create_connection(server.socket.getsockname()) as at:
                at.settimeout(10)
                at.sendall(before)
                got = b""
                while before and not got.endswith(b"}"):
                    got += at.recv(4096)
                at.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
                assert at.recv(4096) == b""
        with gate.closed():
            answer = pool.submit(ask, server)
            assert gate.reached.wait(10)
            time.sleep(0.5)
        assert answer.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_row(model, gate, stream):
    """Its row leaves the batch with the next token; one that waits leaves the queue."""
    with running(served(model), max_batch=1) as server:
        rows = []
        submit = server.engine.submit
        server.engine.submit = lambda given, *of: (rows.extend(given), submit(given, *of))
        with gate.closed():
            clients = []
            for _ in range(2):
                at = socket.create_connection(server.socket.getsockname())
                body = b'{"prompt": "w1 w2", "max_tokens": 30, "stream": %s}' % str(stream).lower().encode()
                at.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
                clients.append(at)
                until(lambda: len(rows) == len(clients))
            assert gate.reached.wait(10) and server.engine.waiting == 1
            for at in clients:
                at.close()
            until(lambda: all(row.cancelled for row in rows))
            assert server.engine.waiting == 0
        until(lambda: server.engine.running == 0)
        assert all(len(row.tokens) < 3 for row in rows) and ask(server).status_code == 200


def test_a_model_that_fails_is_a_500_and_the_next_is_answered(model, caplog):
    with running(served(model)) as server:

        def fail(*_) -> None:
            raise MemoryError("no memory")

        hook = layer_of(model).register_forward_pre_hook(fail)
        answer = ask(server)
        hook.remove()
        assert answer.status_code == 500 and answer.json()["error"]["message"] == "the model failed: no memory"
        assert answer.json()["error"]["type"] == "server_error" and "MemoryError: no memory" in caplog.text
        assert ask(server).status_code == 200


@pytest.mark.parametrize("error", [MemoryError, SystemExit])
def test_what_fails_in_a_batch_fails_alone(model, gate, error, caplog):
    """After three tokens, some of which streams have sent: the others go on where they were, with their own draws."""
    from mopl.serving.sampling import Chooser

    more = {"temperature": 1.0, "max_tokens": 9}
    with running(served(model)) as server, ThreadPoolExecutor(4) as pool:
        wanted = ask(server, seed=5, **more).json()["choices"][0]["text"]
        inner = Chooser._changed

        def fail(self, scores, live):
            if self._step >= 3 and any(self._rows[i].sampling.seed == 13 for i in live):
                raise error("the row of 13")
            return inner(self, scores, live)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Chooser, "_changed", fail)
            with gate.closed():
                first = pool.submit(ask, server)
                assert gate.reached.wait(10)
                asked = [pool.submit(ask, server, seed=seed, **more) for seed in (5, 13)]
                asked.append(pool.submit(ask, server, seed=5, stream=True, **more))
                until(lambda: server.engine.waiting == 3)
            good, bad, stream = (each.result() for each in asked)
        assert first.result().status_code == good.status_code == 200
        assert good.json()["choices"][0]["text"] == wanted
        events = [json.loads(line[6:]) for line in stream.text.split("\n\n") if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == wanted and len(events) > 5
        assert bad.status_code == 500 and bad.json()["error"]["message"] == "the model failed: the row of 13"
        assert caplog.text.count("an answer failed") == 1 and ask(server).status_code == 200


# ---------------------------------------------------------------- who may ask


def test_only_names_of_the_loopback_are_answered_and_no_form_of_a_web_page(model):
    with running(served(model)) as server:
        port = server.url.rpartition(":")[2]
        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST", "127.9.9.9"):
            assert server.http.get("/v1/models", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "192.168.0.1", ""):
            for path in ("/v1/models", "/health", "/"):
                answer = server.http.get(path, headers={"host": host})
                assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden_host", host
        form = {"content-type": "application/x-www-form-urlencoded", "origin": "http://evil.example"}
        assert server.http.post("/v1/completions", content=b'{"prompt": "w1"}', headers=form).status_code == 415
        asked = {"origin": "http://evil.example", "access-control-request-method": "POST",
                 "access-control-request-headers": "content-type"}  # fmt: skip
        answer = server.http.options("/v1/completions", headers=asked)
        assert answer.status_code == 405 and not [name for name in answer.headers if name.startswith("access-control")]


def test_a_key_is_asked_for(model):
    with running(served(model), key="secret") as server:
        assert server.client.models.list().data[0].id == "tiny"
        assert server.http.get("/health").status_code == 200
        for given in (
            {},
            {"authorization": "Bearer other"},
            {"authorization": "secret"},
            {"authorization": "Bearer sécret"},
        ):
            answer = server.http.get("/v1/models", headers={k: v.encode() for k, v in given.items()})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0).models.list()


def test_the_log_tells_of_what_is_refused_and_of_paths_that_are_not_there(model, capfd):
    with running(served(model)) as server:
        server.api.log = True
        ask(server, temperature=9)
        server.http.post("/v1/embeddings", json={})
    said = capfd.readouterr().err
    assert re.search(r"POST /v1/completions 400 \d\.\d\d s  temperature\n", said), said
    assert re.search(r"POST /v1/embeddings 404 \d\.\d\d s\n", said), said


# ---------------------------------------------------------------- stopping


def test_a_stop_lets_answers_end_and_takes_no_new_ones(model, gate):
    with running(served(model), max_batch=1) as server, ThreadPoolExecutor(4) as pool:
        with gate.closed():
            answers = [pool.submit(ask, server) for _ in range(2)]  # one is answered, one waits
            until(lambda: server.engine.waiting == 1)
            open_before = httpx.Client(base_url=server.url)
            open_before.get("/health")
            server.server.stop()
            until(lambda: server.engine._closed)
            with pytest.raises(httpx.HTTPError):
                for _ in range(50):  # until the socket is closed
                    answer = httpx.post(f"{server.url}/v1/completions", json=BODY)
                    assert answer.status_code == 503 and answer.json()["error"]["code"] == "stopping"
                    time.sleep(0.02)
        assert [each.result().status_code for each in answers] == [200, 200]
        server.thread.join(10)
        assert not server.thread.is_alive() and server.engine.join(1)


@pytest.mark.parametrize(("grace", "stops"), [(0.2, 1), (30.0, 2)])
def test_what_has_not_ended_within_the_grace_or_at_a_second_stop_is_given_up(model, gate, grace, stops):
    with running(served(model), grace=grace) as server, ThreadPoolExecutor(2) as pool, gate.closed():
        answer = pool.submit(ask, server)
        assert gate.reached.wait(10)
        told = []
        server.server._tell_stopping = told.append
        for _ in range(stops):
            server.server.stop()
        assert answer.result().status_code == 503 and "before the answer had ended" in answer.result().text
        assert told == [1]


def test_an_engine_that_is_closed_takes_nothing(model):
    engine = Engine(served(model))
    engine.start()
    engine.close()
    assert engine.join(5) and not engine.alive


def test_a_server_whose_thread_has_ended_says_so(model):
    with running(served(model)) as server:
        server.engine.close()
        assert server.engine.join(5)
        server.engine._closed = False  # as if it had ended by itself
        assert server.http.get("/health").status_code == 503
        answer = ask(server)
        assert answer.status_code == 503 and "start it again" in answer.json()["error"]["message"]


def test_signals_are_handled_until_the_engine_has_ended(model, monkeypatch):
    """The third one of somebody impatient came in the seconds in which the engine is waited for, and killed."""
    engine = Engine(served(model))
    at = bound_socket("127.0.0.1", 0)
    server = Server(Api(engine, log=False), at, started=lambda: os.kill(os.getpid(), signal.SIGTERM))
    seen, join = [], engine.join

    def late(timeout):
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(signal.getsignal(signal.SIGTERM) is not before)
        return join(timeout)

    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("killed"))
    try:
        monkeypatch.setattr(engine, "join", late)
        server.run()
        assert seen == [True]
    finally:
        signal.signal(signal.SIGTERM, before)
        at.close()


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `mopl serve` is given: a saved model."""
    place = tmp_path_factory.mktemp("served")
    build(num_hidden_layers=1).save_pretrained(place / "base")
    tokenizer(chat=True).save_pretrained(place / "base")
    tuned = lora(transformers.AutoModelForCausalLM.from_pretrained(place / "base"))
    record = TuningRecord(("helpful", "harmless"), beta=[0.1, 0.1])
    HyperPromptModel(tuned, prompt(), record=record).save_pretrained(place / "tuned")
    return place / "tuned"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_answers_and_a_signal_ends_it_in_good_order(folder, stop, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    command = ["serve", str(folder), "--port", "0", "--weights", "0.7", "0.3", "--name", "house"]
    given = ("-m", "mopl.cli", *command, "--api-key-file", str(tmp_path / "key"))
    with started(*given, MOPL_API_KEY="other") as (number, out, err, wait):
        until(lambda: out.is_file() and out.read_text().count("\n") == 2, 60)
        line, example = out.read_text().splitlines()
        weights = "default weights: helpful 0.7, harmless 0.3"
        found = re.search(rf"house at (http://127\.0\.0\.1:\d+) \({weights}", line)
        assert found, line
        assert example.startswith(f"curl {found[1]}/v1/chat/completions") and "secret" not in example
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="secret", max_retries=0)
        got = []

        def answer() -> None:
            talk = [{"role": "user", "content": "w1 w2"}]
            parts = client.chat.completions.create(model="house", messages=talk, max_tokens=40, seed=1, stream=True)
            got.extend(part.choices[0] for part in parts)

        thread = threading.Thread(target=answer)
        thread.start()
        until(lambda: got)
        os.kill(number, stop)
        thread.join(20)
        assert got[-1].finish_reason in ("stop", "length")
        assert wait(30) == 0
        said = err.read_text()
        assert "Traceback" not in said and "w1 w2" not in said and said.endswith("mopl serve: stopped\n")
        assert re.search(r"POST /v1/chat/completions 200 \d+\.\d\d s  w=0.7,0.3  5\+\d+ tokens\n", said), said


def test_a_signal_while_the_model_is_loaded_ends_the_command_with_a_word(folder, capsys, monkeypatch):
    monkeypatch.setattr("mopl.commands.serve.load_tuned_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(folder), "--port", "0"])
    assert ended.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "mopl serve: stopped before the model was loaded\n"


def test_of_two_servers_that_load_at_one_port_the_second_says_what_to_do(model):
    with bound_socket("127.0.0.1", 0) as first, bound_socket(*first.getsockname()) as second:
        first.listen()  # both were free to bind; the first has loaded its model sooner
        with pytest.raises(ValueError, match=r"port \d+ cannot be used \(.* in use\); name another, as --port 8001"):
            Server(Api(Engine(served(model)), log=False), second).run()


def test_what_cannot_be_served_is_an_error_of_one_line(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("MOPL_API_KEY", raising=False)
    (tmp_path / "empty").write_text("\n")
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        for more, words in (
            (["--host", "0.0.0.0"], "--host 0.0.0.0 is reached from other machines, so requests need a key: "),
            (["--host", "192.0.2.1"], "host 192.0.2.1 port 0 cannot be used"),
            (
                ["--port", port],
                f"port {port} cannot be used (Address already in use); name another, as --port 8001, or",
            ),
            (["--port", "70000"], "from 0 to 65535"),
            (
                ["--weights", "0.5", "0.6"],
                "--weights is 0.5 0.6, of the sum 1.1, but must sum to 1; pass --weights 0.455 0.545",
            ),
            (["--weights", "1"], "--weights has 1 number but there are 2 objectives"),
            (["--max-batch", "0"], "--max-batch is 0 but must be at least 1"),
            (["--timeout", "nan"], "timeout is nan"),
            (["--name", "a@b"], "what follows an @ are weights"),
            (["--api-key-file", str(tmp_path / "empty")], "must be visible ASCII characters"),
            (["--api-key-file", str(tmp_path / "none")], "is missing; write the key there"),
            (["--kl-weight", "0.1"], "leave it out"),
        ):
            given = more if "--port" in more else ["--port", "0", *more]
            assert main(["serve", str(folder), *given]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and words in error, error
