"""A server with OpenAI's API that answers prompts in tokens: what it is, what it is told to load, what it answered.

Two kinds of server are known, by what `/v1/models` says owns its models:

| server                          | how it gets the policy                              | a request names      |
|---------------------------------|-----------------------------------------------------|----------------------|
| `mopl serve MODEL --policies F` | POST /v1/load_policy: the policy itself             | the policy, weights  |
| vLLM                            | POST /v1/load_lora_adapter: one adapter a trade-off | the adapter          |

Answers come as the tokens that were sampled, never as text to be tokenised again, each with its log-probability at the
temperature of the run. Whatever else comes back is an error: no answer is made up, cut or left out.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from mopl._extras import require
from mopl._records import Count, Finite, in_words
from mopl.clp.bounded_http import BoundedClient, GivenUp, UnreadableAnswer

require("httpx", "msgspec", what="rollouts from a server")
import httpx  # noqa: E402
import msgspec  # noqa: E402

KEY_VARIABLE = "MOPL_API_KEY"
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # of HTTP: what may be otherwise the next time
_MOST_FAILURES = 6  # answers of 500 and above in a row: with the waiting between them about 15 seconds
_LEAST = -9000.0  # servers write -9999 for a log-probability of minus infinity, which no sampled token has
_MOST_BYTES, _MOST_OF_TOKEN = 16 << 20, 1 << 10  # of what is read of an answer, and more for each token of completions
_PROBED = 1e-3  # nats: log-probabilities at two temperatures that differ by less are the same


class RolloutServerError(ConnectionError):
    """The server did not answer, or not as it must; the training has not used anything of it."""


class Completion(msgspec.Struct):
    """One answer in tokens."""

    token_ids: list[int]
    log_probs: list[float]


class _LogProbs(msgspec.Struct):
    token_logprobs: list[float | None]
    tokens: list[str] = []
    top_logprobs: list[dict[str, Finite] | None] | None = None


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[Count] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: _LogProbs | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice]


class _Model(msgspec.Struct):
    id: str
    owned_by: str = ""


class _Models(msgspec.Struct):
    data: list[_Model]


class OpenAIServer:
    """A server and what it is asked; safe for several threads.

    Args:
        url: Its address, with or without `/v1`.
        seconds: How long a request may take, with all that is tried again.

    Attributes:
        url: The address, without `/v1`.
        kind: `"mopl"` or `"vllm"`, once `connect` has asked.
        model: What it calls the base model.
        after: What errors say of the run.

    Raises:
        ValueError: If the key in MOPL_API_KEY cannot be sent.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url = url.strip().rstrip("/").removesuffix("/v1")
        self.seconds, self.kind, self.model = seconds, "", ""
        self.after = "the last checkpoint is intact, so the run can be resumed"
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"{KEY_VARIABLE} has a character that no header of HTTP can have, such as one that is not "
                "ASCII, or a line break; set it to the key of the server alone"
            )
        self._key = key
        self._client = BoundedClient({"authorization": f"Bearer {key}"} if key else {})
        self._broken = threading.Event()  # one request of several has failed for good: the others are given up
        self._failure = ""  # what that one says

    def connect(self) -> None:
        """Ask what the server is.

        Raises:
            RolloutServerError: If it does not answer, or is none that is known here.
        """
        found = self._read(self._ask("GET", "/v1/models"), _Models, "/v1/models")
        owners = {model.owned_by for model in found.data}
        kind = next((kind for kind in ("mopl", "vllm") if kind in owners), None)
        if kind is None:
            said = ", ".join(sorted(filter(None, owners))) or "nobody"
            raise self.error(
                f"its models are owned by {said}, and policies can be loaded into mopl and vllm only",
                "start `mopl serve MODEL --policies FOLDER`, or vLLM",
            )
        self.kind, self.model = kind, next(model.id for model in found.data if model.owned_by == kind)

    def check_temperature(self, prompt: Sequence[int], temperature: float) -> None:
        """Raise unless log-probabilities are of what is sampled at a temperature; vLLM's are not by default.

        Raises:
            RolloutServerError: If they are the same at temperature 1.
        """
        if self.kind == "mopl" or temperature == 1:
            return
        seen = []
        for each in (temperature, 1.0):
            body = self._body(prompt, each, 1, 1) | {"model": self.model, "logprobs": 5}
            reply = self._read(self.post("/v1/completions", body), _Reply, "/v1/completions")
            logs = reply.choices[0].logprobs if reply.choices else None
            if logs is None or not logs.top_logprobs or not logs.top_logprobs[0]:
                raise self.error("its answers have no top_logprobs", "start it without --max-logprobs 0")
            seen.append(logs.top_logprobs[0])
        shared = seen[0].keys() & seen[1].keys()
        if all(abs(seen[0][token] - seen[1][token]) < _PROBED for token in shared):
            raise self.error(
                f"its log-probabilities are those of temperature 1, but the run samples at {temperature:g}",
                "start vLLM with --logprobs-mode processed_logprobs",
            )

    # ---------------------------------------------------------------- what it loads

    def load_policy(self, name: str, path: str) -> None:
        """Have a server of mopl answer with the policy of a folder, named from its own folder of policies."""
        self.post("/v1/load_policy", {"name": name, "path": path})

    def load_adapter(self, name: str, path: str) -> None:
        """Have vLLM load a LoRA adapter under a name that it does not know."""
        self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload_adapter(self, name: str, seconds: float | None = None) -> None:
        """Have vLLM forget an adapter; `seconds` are all that may take, by default those of any request."""
        self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, seconds=seconds)

    # ---------------------------------------------------------------- what it answers

    def complete(
        self,
        prompt: Sequence[int],
        asked: dict[str, Any],
        *,
        answers: int,
        tokens: int,
        temperature: float,
        seed: int,
        ends: Sequence[int],
        stop: str | None,
    ) -> list[Completion]:
        """Return several answers to a prompt.

        Args:
            prompt: Its tokens.
            asked: Whom: the model, and at which trade-off.
            answers: How many.
            tokens: The most of each.
            temperature: Of the sampling, from all tokens.
            seed: Of the server's generator.
            ends: Tokens that end an answer.
            stop: A text that does, or None.

        Raises:
            RolloutServerError: If they do not come, or not as asked for.
        """
        body = self._body(prompt, temperature, answers, tokens) | asked | {"seed": seed, "stop_token_ids": list(ends)}
        if stop is not None:
            body["stop"] = [stop]
        more = _MOST_OF_TOKEN * answers * (len(prompt) + tokens)
        reply = self._read(self._ask("POST", "/v1/completions", body, more), _Reply, "/v1/completions")
        if sorted(choice.index for choice in reply.choices) != list(range(answers)):
            raise self.error(f"it gave {len(reply.choices)} answers of {answers} to a prompt", "look at its log")
        return [self._completion(each, prompt) for each in sorted(reply.choices, key=lambda choice: choice.index)]

    def _body(self, prompt: Sequence[int], temperature: float, answers: int, tokens: int) -> dict[str, Any]:
        """Return what asks for samples of softmax(logits / temperature) and nothing else."""
        body: dict[str, Any] = {
            "prompt": list(prompt), "n": answers, "max_tokens": tokens, "temperature": temperature, "top_p": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        if self.kind == "mopl":
            return body | {"top_k": 0, "logprobs_mode": "processed_logprobs"}
        # vLLM takes what is not said from the model's generation_config.
        return body | {
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0, "ignore_eos": False,
            "return_tokens_as_token_ids": True, "add_special_tokens": False, "skip_special_tokens": True,
        }  # fmt: skip

    def _completion(self, choice: _Choice, prompt: Sequence[int]) -> Completion:
        ids, logs = choice.token_ids, choice.logprobs
        if ids is None or logs is None:
            missing = "token_ids" if ids is None else "logprobs"
            raise self.error(f"its answers have no {missing}", "use vLLM 0.10.2 or later, or mopl serve")
        if choice.prompt_token_ids is not None and choice.prompt_token_ids != list(prompt):
            raise self.error("it read other tokens of the prompt than were sent", "use the model of the run there")
        values = logs.token_logprobs
        if not ids or len(values) != len(ids):
            raise self.error(f"it gave {len(values)} log-probabilities for {len(ids)} tokens", "look at its log")
        named = [text.removeprefix("token_id:") for text in logs.tokens if text.startswith("token_id:")]
        if named and named != [str(token) for token in ids]:
            raise self.error("the tokens of its log-probabilities are not those of its answer", "look at its log")
        known = [value for value in values if value is not None and _LEAST < value <= 1e-3]
        if len(known) != len(ids):
            raise self.error("a sampled token has no log-probability, or one that is none", "look at its log")
        return Completion(ids, known)

    # ---------------------------------------------------------------- requests

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """Return what the server says to a request, asked again where that may help; errors as `_ask`."""
        return self._ask("POST", path, body)

    def begin(self) -> None:
        """Forget that a request has failed, or was given up: the next ones are new."""
        self._failure = ""
        self._broken.clear()
        self._client.renew()

    def give_up(self) -> None:
        """End at once what is asked in any thread, with an error there; so what is asked from now on, until `begin`."""
        self._broken.set()
        self._client.cancel()

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, more: int = 0, seconds: float | None = None
    ) -> bytes:
        """Ask until it is answered, at most for `seconds`; the answer may be `more` bytes larger than usual.

        Raises:
            RolloutServerError: If it is refused, keeps failing, time is up, or another request has failed meanwhile.
        """
        limit = self.seconds if seconds is None else seconds
        deadline, tries, failures, why = time.monotonic() + limit, 0, 0, ""
        while not self._broken.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            tries, pause = tries + 1, min(0.25 * 2**tries, 8.0)
            try:
                answer, content = self._client.request(method, f"{self.url}{path}", body, left, _MOST_BYTES + more)
            except GivenUp:
                break
            except TimeoutError:
                why = "no answer came in time"
                continue
            except UnreadableAnswer as error:
                raise self._failed(f"its answer to {path} {error}", "check the address, and what is between") from None
            except (httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError) as error:
                raise self._failed(str(error), "give an address such as http://127.0.0.1:8000") from None
            except httpx.RequestError as error:
                why = f"it cannot be reached ({error or type(error).__name__})"
            else:
                if answer.is_success:
                    return content
                said = self._message(content)
                why = f"it answered {path} with {answer.status_code}: {said}"
                if tries > 1 and path == "/v1/load_lora_adapter" and "already been loaded" in said:
                    return b""  # by the request before, whose answer was lost
                failures += answer.status_code >= 500
                if answer.status_code not in _AGAIN or failures >= _MOST_FAILURES:
                    raise self._failed(why, _remedy(answer.status_code, path, said))
                pause = max(pause, _seconds(answer.headers.get("retry-after", "")))
            self._broken.wait(min(pause, max(deadline - time.monotonic(), 0)))
        if self._broken.is_set():
            if self._failure:
                raise RolloutServerError(self._failure)
            raise self.error("a request was given up", "see the error before")
        raise self._failed(
            f"{why or 'no answer came in time'}, within "
            + (f"rollout_timeout = {limit:g} seconds" if seconds is None else f"{limit:g} seconds"),
            "start it, or raise rollout_timeout",
        )

    def _failed(self, what: str, remedy: str) -> RolloutServerError:
        """Give up the requests of other threads, which say the same; return what `error` does."""
        found = self.error(what, remedy)
        self._failure = self._failure or str(found)
        self.give_up()
        return found

    def error(self, what: str, remedy: str) -> RolloutServerError:
        """Return an error that names the server, what happened and the remedy."""
        if self._key:
            what = what.replace(self._key, "***")  # a server may say back what it was sent
        return RolloutServerError(f"the rollout server {self.url}: {what}; {remedy}; {self.after}")

    def _message(self, content: bytes) -> str:
        """Return what an answer of an error says, in a line: OpenAI's form, vLLM's, or any text."""
        try:
            said = msgspec.json.decode(content)
            if isinstance(said, dict):
                inner = said.get("error", said)
                said = inner.get("message", inner.get("detail", inner)) if isinstance(inner, dict) else inner
            said = str(said)
        except (ValueError, RecursionError):
            said = content.decode("utf-8", "replace")
        if self._key:
            said = said.replace(self._key, "***")  # before it is cut: no part of the key may be left
        return " ".join(said[:10_000].split())[:500]

    def _read(self, raw: bytes, schema: Any, path: str) -> Any:
        try:
            values = msgspec.json.decode(raw)
        except (ValueError, RecursionError):  # not UTF-8, numbers without an end, nested too deep
            raise self.error(f"{path} gives no JSON that can be read", "check the address") from None
        try:
            return msgspec.convert(values, schema)
        except msgspec.ValidationError as error:
            why = str(error)
            # What is there is shown if it is not nested too deep for that, and no part of it may be the key.
            if not (self._key and self._key.encode() in raw):
                with contextlib.suppress(RecursionError):
                    why = in_words(error, values, "")
            raise self.error(f"{path} is not as OpenAI's: {why}", "check the address") from None


def _remedy(status: int, path: str, said: str) -> str:
    """Return what may help against a status of HTTP."""
    if status in (401, 403):
        return f"put its key into {KEY_VARIABLE}"
    if path == "/v1/load_lora_adapter":
        return (
            "start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, a --max-lora-rank of all adapters "
            "together, and a rollout_folder that it sees under the same path"
        )
    if path == "/v1/load_policy" and status in (400, 413):
        return "let it serve the model of this run, and see what it says"
    if path == "/v1/load_policy" and status < 500:
        return "start `mopl serve MODEL --policies FOLDER` with the rollout_folder of this run"
    if status in (404, 409):
        return "another training uses the server, or it was started again: give each training a server of its own"
    if status == 400 and "max_tokens" in said:
        return (
            "start it with a limit of at least the run's max_new_tokens (mopl serve --max-tokens, vLLM "
            "--max-model-len), or lower that"
        )
    if status == 400:
        return "change the setting of this run that it names, or ask a server that takes it"
    if 300 <= status < 400:
        return "it sends to another address: give that of the server itself"
    return "look at its log"


def _seconds(text: str) -> float:
    """Return what a Retry-After header says in seconds; 0 for a date."""
    return min(float(text), 60.0) if text.isascii() and text.isdigit() else 0.0
