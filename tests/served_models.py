"""Tiny models that tests serve, and a server of each in a thread."""

import contextlib
import threading
from collections.abc import Iterator

import httpx
import openai
from tiny_language_models import conditioned, tokenizer

from mopl.language_models.tokenization import ListTokenizer
from mopl.serving.api import Api
from mopl.serving.engine import Engine
from mopl.serving.model import ServedModel
from mopl.serving.requests import Limits
from mopl.serving.server import Server, bound_socket, url_of

OBJECTIVES = ("helpful", "harmless")


def served(model=None, words=None, **options) -> ServedModel:
    encoder = ListTokenizer(words or tokenizer(chat=True), max_length=None, append_eos=False)
    return ServedModel(model or conditioned(), encoder, OBJECTIVES, name="tiny", **options)


def layer_of(model):
    """The module that every step of a model of this file runs first: `generate` may call any of those around it."""
    return model.causal_lm.model.layers[0]


class Gate:
    """Lets a model run step by step: each call of it waits until the gate is open."""

    def __init__(self, model) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()
        self.remove = layer_of(model).register_forward_pre_hook(self._wait).remove

    def _wait(self, *_) -> None:
        self.reached.set()
        assert self.open.wait(30)

    @contextlib.contextmanager
    def closed(self):
        self.reached.clear()
        self.open.clear()
        try:
            yield self
        finally:
            self.open.set()


class Running:
    """A server in a thread of this process."""

    def __init__(
        self,
        model: ServedModel,
        *,
        key=None,
        seconds=60.0,
        grace=5.0,
        max_batch=16,
        max_batch_tokens=65_536,
        max_queue=256,
        **limits,
    ):
        self.engine = Engine(model, max_batch=max_batch, max_batch_tokens=max_batch_tokens, max_queue=max_queue)
        self.model, started = model, threading.Event()
        self.api = Api(
            self.engine, Limits(**{"max_tokens": 32, "max_queue": max_queue, **limits}), seconds, key, log=False
        )
        self.socket = bound_socket("127.0.0.1", 0)
        self.server = Server(self.api, self.socket, grace=grace, started=started.set)
        self.url = url_of(self.socket)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        assert started.wait(10)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=30)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def stop(self) -> None:
        self.client.close()
        self.http.close()
        self.server.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(*args, **options) -> Iterator[Running]:
    server = Running(*args, **options)
    try:
        yield server
    finally:
        server.stop()
