"""Requests over HTTP whose time and size have bounds: httpx bounds each read alone, and there may be many."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Mapping
from concurrent import futures
from typing import Any

from mopl._extras import require

require("httpx", what="rollouts from a server")
import httpx  # noqa: E402


class UnreadableAnswer(Exception):
    """An answer is compressed, or too large; the message says which."""


class GivenUp(Exception):
    """The request was cancelled by `BoundedClient.cancel`."""


class BoundedClient:
    """Sends requests; safe for several threads.

    Args:
        headers: Of every request.
    """

    def __init__(self, headers: Mapping[str, str]) -> None:
        # Compressed answers are neither asked for nor read: a small one can become one that fills the memory.
        headers = {"accept-encoding": "identity", **headers}
        client = httpx.AsyncClient(headers=headers, limits=httpx.Limits(max_connections=64))
        self._client, self._loop = client, asyncio.new_event_loop()
        self._running: set[futures.Future[Any]] = set()
        self._cancelled, self._lock = False, threading.Lock()
        # A thread of its own, as the caller's may have a loop that runs, such as a notebook's.
        threading.Thread(target=_run, args=(self._loop,), daemon=True).start()
        weakref.finalize(self, _end, client, self._loop)

    def cancel(self) -> None:
        """End what is running at once, in all threads, by `GivenUp`; so what is asked from now on, until `renew`."""
        with self._lock:
            self._cancelled, running = True, list(self._running)
        for future in running:
            future.cancel()

    def renew(self) -> None:
        """Send requests again after `cancel`."""
        with self._lock:
            self._cancelled = False

    def request(self, method: str, url: str, body: Any, seconds: float, most: int) -> tuple[httpx.Response, bytes]:
        """Return what answers a request, and what the answer holds.

        Args:
            method: Of HTTP.
            url: The address.
            body: What is sent as JSON, or None.
            seconds: How long all of it may take.
            most: How many bytes the answer may have.

        Raises:
            TimeoutError: If it takes longer.
            UnreadableAnswer: If the answer is compressed, or larger.
            GivenUp: If it was cancelled.
            httpx.RequestError, httpx.InvalidURL: As of httpx.
        """

        async def send(client: httpx.AsyncClient) -> tuple[httpx.Response, bytes]:
            content = bytearray()
            async with client.stream(method, url, json=body, timeout=seconds) as answer:
                coding = answer.headers.get("content-encoding", "").strip().lower()
                if coding not in ("", "identity"):
                    raise UnreadableAnswer(f"is compressed ({coding!r:.80}), which was not asked for")
                async for part in answer.aiter_raw():
                    content += part
                    if len(content) > most:
                        raise UnreadableAnswer(f"has more than {most:,} bytes")
            return answer, bytes(content)

        with self._lock:
            if self._cancelled:
                raise GivenUp
            future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(send(self._client), seconds), self._loop)
            self._running.add(future)
        try:
            return future.result()
        except (httpx.TimeoutException, asyncio.TimeoutError, futures.TimeoutError):  # three classes before Python 3.11
            raise TimeoutError("no answer came in time") from None
        except (asyncio.CancelledError, futures.CancelledError):
            raise GivenUp from None
        finally:
            future.cancel()  # where waiting for it was interrupted
            with self._lock:
                self._running.discard(future)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _end(client: httpx.AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
    """Close the connections of what is not used any more, and end its thread."""

    async def end() -> None:
        await client.aclose()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)
