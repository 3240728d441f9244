"""The process: a socket, the loop that answers requests, the thread that asks the model, and how it all stops."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mopl._extras import require
from mopl.serving.api import Api

require("uvicorn", what="serving", extra="serve")
import uvicorn  # noqa: E402
from uvicorn.protocols.http.h11_impl import H11Protocol  # noqa: E402

LINGER_SECONDS = 2.0  # for what was given up to be told so, once the time to finish is over
HEAD_SECONDS = 30.0  # that the head of a request may take to come
MOST_CONNECTIONS = 2048  # that are open at once, idle ones too; more are answered 503


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket at an address, which takes no connections yet: known to be free before a model is loaded.

    Raises:
        ValueError: If the address is no address here, or taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise _unusable(host, port, error) from None
    return made


def _unusable(host: str, port: int, error: OSError) -> ValueError:
    of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
    remedy = "name another, as --port 8001, or --port 0 for any free one" if of_port else "name another --host"
    return ValueError(f"host {host} port {port} cannot be used ({error.strerror or error}); {remedy}")


def url_of(at: socket.socket) -> str:
    """Return where a socket is asked, "http://127.0.0.1:8000"."""
    host, port = at.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(at: socket.socket) -> bool:
    """Return whether only programs of this machine reach a socket."""
    return ipaddress.ip_address(at.getsockname()[0]).is_loopback


class Server:
    """Answers requests until it is stopped.

    Args:
        api: The application, whose engine this starts and ends.
        at: A socket that is bound.
        grace: Seconds that answers have to end once it is stopped.
        started: Called when it answers.
        stopping: Called when it is stopped, with how many answers have not ended.
    """

    def __init__(
        self,
        api: Api,
        at: socket.socket,
        *,
        grace: float = 30.0,
        started: Callable[[], None] = lambda: None,
        stopping: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._engine, self._at, self._grace, self._tell_stopping = api.engine, at, grace, stopping
        config = uvicorn.Config(
            api.app(), log_config=None, log_level="error", access_log=False, lifespan="off", ws="none", http=_Protocol,
            loop="asyncio", server_header=False, limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=grace + LINGER_SECONDS,  # type: ignore[arg-type]
        )  # fmt: skip
        self._uvicorn = _Uvicorn(config, started)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False

    def run(self) -> None:
        """Answer requests; SIGINT and SIGTERM stop it, if this is the main thread.

        Raises:
            ValueError: If another server has taken the address since the socket was bound.
        """
        try:
            self._at.listen()  # of several sockets that are bound to an address, one may
        except OSError as error:
            host, port = self._at.getsockname()[:2]
            raise _unusable(host, port, error) from None
        with self._signals():  # to the end: one more signal is not to kill what is ending
            self._engine.start()
            try:
                asyncio.run(self._serve())
            finally:
                self._engine.abort()
                self._engine.join(LINGER_SECONDS)

    def stop(self) -> None:
        """Take no more requests, finish those that are here within the grace period, and end; twice: at once.

        May be called from any thread, and by a signal's handler.
        """
        loop = self._loop
        if loop is None:
            self._uvicorn.should_exit = True  # before it began
        elif not loop.is_closed():
            loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._stopped:
            self._engine.abort()
            return
        self._stopped = self._uvicorn.should_exit = True
        self._engine.close()
        self._tell_stopping(self._engine.waiting + self._engine.running)
        asyncio.get_running_loop().call_later(self._grace, self._engine.abort)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._uvicorn.serve(sockets=[self._at])

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, lambda *_: self.stop()) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


class _Protocol(H11Protocol):
    """Closes connections whose requests do not come: uvicorn waits for the rest of a head without an end."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if not waits and self._late is not None:
            self._late.cancel()
            self._late = None
        elif waits and self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: uvicorn would end a stop that went well by the signal that asked for it."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell_started = started

    def capture_signals(self) -> Any:
        return contextlib.nullcontext()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._tell_started()
