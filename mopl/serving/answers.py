"""What a request gets: one JSON object, or a stream of them, of OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from mopl.serving.engine import Engine, QueueFull, Replaced, Stopping
from mopl.serving.errors import ApiError
from mopl.serving.model import ServedModel
from mopl.serving.requests import Asked
from mopl.serving.rows import Piece, Row, Scored

RETRY = {"retry-after": "1"}
_LEAST = -9999.0  # of a log-probability, as OpenAI's: JSON has no infinity


class Answering:
    """The rows of one request while they are answered.

    Args:
        engine: Answers them.
        asked: The request.
        seconds: How long it may take.
        served: The model that the request was read for.

    Raises:
        ApiError: 429 if the queue is full, 503 if the server is being stopped, 409 if another model is served by now.
    """

    def __init__(self, engine: Engine, asked: Asked, seconds: float, served: ServedModel) -> None:
        self.asked, self._engine = asked, engine
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
        self._pieces: asyncio.Queue[tuple[Row, Piece]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(row: Row, piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._pieces.put_nowait, (row, piece))

        self.rows = asked.rows(served, send)
        try:
            engine.submit(self.rows, served)
        except Replaced as error:
            raise ApiError(f"{error}; ask for the one that is there", status=409, code="replaced") from None
        except QueueFull as error:
            raise ApiError(f"{error}; try again later", status=429, code="queue_full", headers=RETRY) from None
        except Stopping as error:
            raise ApiError(str(error), status=503, code="stopping", headers=RETRY) from None

    async def pieces(self) -> AsyncIterator[tuple[Row, Piece]]:
        """Yield what comes until all rows have ended.

        Raises:
            ApiError: 504 if that takes too long, 503 if the server stops meanwhile, 409 if another model takes the
                place of the one that was asked, 500 if the model fails.
        """
        left = set(map(id, self.rows))
        while left:
            try:
                rest = self._deadline - time.monotonic()
                row, piece = await asyncio.wait_for(self._pieces.get(), max(rest, 0))
            except (TimeoutError, asyncio.TimeoutError):
                message = f"the answer took longer than {self._seconds:g} seconds; ask for fewer tokens"
                raise ApiError(message, status=504, code="timeout") from None
            if id(row) not in left:  # it was given up just when it ended
                continue
            if isinstance(piece.error, Stopping):
                raise ApiError(str(piece.error), status=503, code="stopping", headers=RETRY)
            if isinstance(piece.error, Replaced):
                raise ApiError(str(piece.error), status=409, code="replaced")
            if piece.error is not None:
                raise ApiError(f"the model failed: {piece.error}", status=500, code="model_failed")
            left -= {id(row)} if piece.finish else set()
            yield row, piece

    def cancel(self) -> None:
        """Give up what has not ended."""
        self._engine.cancel([row for row in self.rows if not row.ended])


class Answer:
    """Writes the objects that a request gets.

    Args:
        served: The model.
        answering: The request.
    """

    def __init__(self, served: ServedModel, answering: Answering) -> None:
        self._served, self._answering, self._asked = served, answering, answering.asked
        self.broken_off = ""  # why a stream ended before its answers had, for the log
        chat, at = self._asked.chat, self._asked.at
        trade = {"weights": dict(zip(served.objectives, at.weights, strict=True)), "scale": at.scale}
        self._common = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": self._asked.model,
            "mopl": trade | ({"beta": dict(zip(served.objectives, at.beta, strict=True))} if at.beta else {}),
        }

    async def whole(self) -> dict[str, Any]:
        """Return the one object of a request without a stream; errors as `Answering.pieces`."""
        chat = self._asked.chat
        found = {row.index: (row, piece) async for row, piece in self._answering.pieces()}
        choices = []
        for index in range(len(found)):
            row, piece = found[index]
            content = {"message": {"role": "assistant", "content": piece.text}} if chat else {"text": piece.text}
            ids = {"token_ids": row.tokens, "prompt_token_ids": list(row.prompt)} if self._asked.token_ids else {}
            logs = self._log_probs(row.every if ids else piece.scored)
            choices.append({"index": index, **content, **ids, "logprobs": logs, "finish_reason": piece.finish})
        kind = "chat.completion" if chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": self.usage}

    async def events(self) -> AsyncIterator[str]:
        """Yield the lines of a stream; an error is a line, too, and the last one then."""
        chat, begun = self._asked.chat, set()
        try:
            async for row, piece in self._answering.pieces():
                content: dict[str, Any] = {"text": piece.text}
                if chat:
                    delta = {} if row.index in begun else {"role": "assistant"}
                    content = {"delta": delta | ({"content": piece.text} if piece.text or delta else {})}
                begun.add(row.index)
                logs = self._log_probs(piece.scored)
                yield self._event([{"index": row.index, **content, "logprobs": logs, "finish_reason": piece.finish}])
        except ApiError as error:
            if not begun:
                raise  # nothing was sent: the status of the answer can say it
            self.broken_off = f"broken off: {error.status} {error.code}"
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        if self._asked.usage:
            yield self._event([], usage=self.usage)
        yield "data: [DONE]\n\n"

    def _event(self, choices: Sequence[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        return f"data: {json.dumps({**self._common, 'object': kind, 'choices': choices, **more})}\n\n"

    @property
    def usage(self) -> dict[str, int]:
        """Counts of tokens: of the prompts, once each, and of the answers, with those that end them."""
        read = sum(map(len, self._asked.prompts))
        made = sum(len(row.tokens) for row in self._answering.rows)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def _log_probs(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if self._asked.sampling.top_log_probs is None:
            return None
        text = self._served.detokenizer.of_one
        if self._asked.chat:
            content = [
                {**self._entry(each.token, each.log_prob), "top_logprobs": [self._entry(*pair) for pair in each.top]}
                for each in scored
            ]
            return {"content": content, "refusal": None}
        tops = []
        for each in scored:
            top: dict[str, float] = {}
            for token, value in (*each.top, (each.token, each.log_prob)):  # with the chosen one, as OpenAI's
                top.setdefault(text(token), max(value, _LEAST))
            tops.append(top)
        return {
            "tokens": [text(each.token) for each in scored],
            "token_logprobs": [max(each.log_prob, _LEAST) for each in scored],
            "top_logprobs": tops,
            "text_offset": [each.offset for each in scored],
        }

    def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self._served.detokenizer.of_one(token)
        data = None if "\ufffd" in text else list(text.encode())  # a part of a character has no text of its own
        return {"token": text, "logprob": max(log_prob, _LEAST), "bytes": data}
