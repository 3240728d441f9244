"""The paths: conversations, completions, models, health, and the page.

A server on the loopback is reached by more than its owner's programs: every web page that he visits may send requests
to 127.0.0.1 from his browser. It may send them, but not read answers, unless its own name is made to point to 127.0.0.1
(DNS rebinding); then the `Host` header bears that name, so only the loopback's own names are answered. And it may send
only what forms send without being asked back for leave, so a body must say that it is JSON. There is no leave for other
origins (CORS). A server with a key needs none of that: a page has no key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from mopl._extras import require
from mopl._terminal import say
from mopl.serving.answers import Answer, Answering
from mopl.serving.engine import Engine, Stopping
from mopl.serving.errors import ApiError
from mopl.serving.page import HEADERS, PATHS, page_part
from mopl.serving.policies import PolicyFolder, load_body
from mopl.serving.requests import Asked, Limits, asked_of, weights_in_name

require("starlette", what="serving", extra="serve")
from starlette.applications import Starlette  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.requests import ClientDisconnect, Request  # noqa: E402
from starlette.responses import JSONResponse, Response, StreamingResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

MOST_BYTES = 1 << 20  # of a body: a prompt of about 200,000 tokens
CLOSED = 499  # nobody was there any more: a status for the log alone, as of nginx


@dataclass
class Api:
    """The application.

    Args:
        engine: Answers rows.
        limits: What a request may ask for.
        seconds: How long a request may take.
        key: What requests must bear; None asks for nothing.
        any_host: Whether requests to any name are answered; else only to the loopback's.
        log: Whether a line tells of each request.
        policies: Where policies are loaded from; None loads none.
    """

    engine: Engine
    limits: Limits = field(default_factory=Limits)
    seconds: float = 300.0
    key: str | None = None
    any_host: bool = False
    log: bool = True
    policies: PolicyFolder | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    def app(self) -> Starlette:
        """Return it as an application of ASGI."""
        routes = [
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
            Route("/v1/load_policy", self._guarded(self._load), methods=["POST"]),
            Route("/v1/models", self._guarded(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._guarded(self._one_model), methods=["GET"]),
            Route("/health", self._guarded(self._health, open=True), methods=["GET"]),
            *(Route(path, self._guarded(self._page, open=True), methods=["GET"]) for path in PATHS),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: self._http_error})  # type: ignore[dict-item]

    # ---------------------------------------------------------------- around every path

    def _guarded(self, act: Any, *, open: bool = False) -> Any:
        """Return an endpoint that checks who asks, answers errors in one form, and tells of the request in a line."""

        async def endpoint(request: Request) -> Response:
            began = time.monotonic()
            request.state.said = ""
            try:
                self._check(request, open)
                response = await act(request)
            except ApiError as error:
                response = JSONResponse(error.body, error.status, error.headers)
                request.state.said = " ".join(filter(None, [error.code, error.param]))
            except ClientDisconnect:
                response = Response(status_code=CLOSED)
            if not isinstance(response, StreamingResponse) and not open:
                self._tell(request, response.status_code, began)
            return response

        return endpoint

    def _check(self, request: Request, open: bool) -> None:
        if self.key is None and not self.any_host and not _is_loopback(request.headers.get("host", "")):
            raise ApiError(
                "this server answers to names of the loopback only; ask localhost or 127.0.0.1",
                status=403, code="forbidden_host",
            )  # fmt: skip
        given = request.headers.get("authorization", "")
        if self.key is not None and not open and not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            raise ApiError(
                "the key is missing or another one; send the header Authorization: Bearer KEY",
                status=401, code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    def _tell(self, request: Request, status: int, began: float, error: str = "") -> None:
        if self.log:
            seconds, path = time.monotonic() - began, request.url.path
            line = f"{time.strftime('%H:%M:%S')} {request.method} {path} {status} {seconds:.2f} s"
            say("  ".join(filter(None, [line, request.state.said, error])), file=sys.stderr)

    # ---------------------------------------------------------------- answers

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        began = time.monotonic()
        body, served = await self._body(request), self.engine.served
        async with self._reading:  # a long prompt takes a tokenizer a while, in which others get their tokens
            asked = await asyncio.to_thread(asked_of, body, served, self.limits, chat=chat)
        answering = Answering(self.engine, asked, self.seconds, served)
        answer = Answer(served, answering)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            if not asked.stream:
                found = await _unless(gone, answer.whole())
                request.state.said = _said(asked, answer)
                return JSONResponse(found)
            events = answer.events()
            first = await _unless(gone, anext(events))  # until then an error has a status of its own
        except BaseException:
            answering.cancel()
            raise
        finally:
            gone.cancel()

        async def lines() -> AsyncIterator[str]:
            yield first
            async for event in events:
                yield event

        def end() -> None:
            unread = any(not row.ended for row in answering.rows)
            answering.cancel()
            request.state.said = _said(asked, answer)
            self._tell(request, 200, began, answer.broken_off or ("given up" if unread else ""))

        return _Stream(lines(), end)

    async def _load(self, request: Request) -> Response:
        """Serve the policy of a folder in the place of the one that is there."""
        if self.policies is None:
            raise ApiError("this server loads no policies; start it by mopl serve MODEL --policies FOLDER", status=404)
        body = load_body(await self._body(request))
        try:
            make = self.policies.maker(body.name, body.path)
            await asyncio.wrap_future(self.engine.replace(make))
        except Stopping as error:
            raise ApiError(str(error), status=503, code="stopping") from None
        request.state.said = body.name
        return JSONResponse(self._model(body.name))

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError("the body must be JSON; send the header Content-Type: application/json", status=415)

        async def read() -> bytes:
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise ApiError(f"the body has more than {MOST_BYTES:,} bytes", status=413)
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), self.seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise ApiError("the body did not come in time", status=408) from None

    # ---------------------------------------------------------------- what is here

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(self.engine.served.name)]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        weights = weights_in_name(name, self.engine.served)
        return JSONResponse(self._model(name, weights))

    def _model(self, name: str, weights: Any = None) -> dict[str, Any]:
        served = self.engine.served
        about = {
            "objectives": list(served.objectives),
            "weights": list(served.weights if weights is None else weights),
            "fixed": served.fixed,
            "takes_beta": served.takes_beta,
            "beta": None if served.beta is None else list(served.beta),
            "kl_weight": served.kl_weight,
            "scale": served.can_scale,
            "guided": served.guided_model is not None,
            "chat_template": served.chat.encoder.chat,
            "max_tokens": self.limits.max_tokens,
            "positions": served.positions,
        }
        return {"id": name, "object": "model", "created": self.created, "owned_by": "mopl", "mopl": about}

    async def _health(self, request: Request) -> Response:
        engine, alive = self.engine, self.engine.alive
        about = {"status": "ok" if alive else "ended", "waiting": engine.waiting, "running": engine.running}
        return JSONResponse(about, 200 if alive else 503)

    async def _page(self, request: Request) -> Response:
        part, kind = page_part(request.url.path)
        return Response(part, media_type=kind, headers=HEADERS)

    async def _http_error(self, request: Request, error: Any) -> Response:
        """Answer for a path or a method that is not there."""
        found = ApiError(f"{request.method} {request.url.path:.200}: {error.detail}", status=error.status_code)
        request.state.said = ""
        self._tell(request, error.status_code, time.monotonic())
        return JSONResponse(found.body, found.status, error.headers)


class _Stream(StreamingResponse):
    """A stream of events, and what is done when it ends: also where it never began, since nobody is there any more."""

    def __init__(self, lines: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._end = end

    async def __call__(self, *call: Any) -> None:
        try:
            await super().__call__(*call)
        finally:
            self._end()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: asyncio.Future[None], work: Any) -> Any:
    """Return what a coroutine gives; raise ClientDisconnect if whoever asked has gone before."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()


def _said(asked: Asked, answer: Answer) -> str:
    """Return what a line of the log tells of a request: never its words."""
    w, usage = ",".join(f"{each:g}" for each in asked.at.weights), answer.usage
    scale = "" if asked.at.scale == 1 else f" scale={asked.at.scale:g}"
    return f"w={w}{scale}  {usage['prompt_tokens']}+{usage['completion_tokens']} tokens"


def _is_loopback(host: str) -> bool:
    """Return whether a `Host` header names the loopback, with or without a port."""
    name = host[1 : host.find("]")] if host.startswith("[") else host.rpartition(":")[0] or host
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
