"""What is asked: bodies of OpenAI's form, checked and made rows.

Fields with an effect are those of the structs here. A field of OpenAI's that has none is taken only at a value that
asks for nothing, and everything else is refused by name: what is not obeyed is never passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec

from mopl._records import Finite, in_words, parse_json
from mopl.conditioning import weights_of_name
from mopl.serving.errors import ApiError
from mopl.serving.model import ServedModel
from mopl.serving.rows import Row, Sampling, TradeOff

MOST_CHOICES = 16  # answers to one prompt
ROLES = ("system", "developer", "user", "assistant")
COMPLETION_TOKENS = 16  # of /v1/completions where a request does not say, as OpenAI's

Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
Whole = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream tells beside the text; the padding against eavesdroppers is not needed on a loopback."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of requests have."""

    model: str | None = None
    weights: list[Finite] | dict[str, Finite] | None = None
    scale: Finite | None = None
    beta: list[Finite] | dict[str, Finite] | None = None
    kl_weight: Finite | None = None
    max_tokens: Whole | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Bias] = {}
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MOST_CHOICES)] = 1
    stop: Stop | Annotated[list[Stop], msgspec.Meta(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """A piece of a message."""

    text: str
    type: Annotated[str, msgspec.Meta(pattern="^text$")]


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One turn of a conversation; `developer` is how newer clients call `system`."""

    role: str  # of ROLES
    content: str | list[Part]


class ChatBody(Body, kw_only=True):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: Whole | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] = 0


class CompletionBody(Body, kw_only=True):
    """A body of /v1/completions."""

    prompt: str | Annotated[list[str | int | list[int]], msgspec.Meta(min_length=1)]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    return_token_ids: bool = False
    stop_token_ids: list[int] = []


_NOTHING = ([], {}, "")  # of a field beside what an answer has, such as annotations
_ANY = object()
# Fields of OpenAI's without an effect here, and the values at which that is what they ask for.
_IDLE: dict[str, tuple[Any, ...]] = {
    "user": (_ANY,), "metadata": (_ANY,), "safety_identifier": (_ANY,), "prompt_cache_key": (_ANY,),
    "prompt_cache_retention": (_ANY,), "store": (False,), "service_tier": ("auto", "default"), "tools": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (_ANY,), "functions": ([],), "function_call": ("none",),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "echo": (False,), "suffix": ("",),
    "best_of": (1,), "reasoning_effort": ("none",),
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_tokens: Most tokens of an answer, and how many a conversation gets that does not say.
        max_queue: Most answers that wait.
    """

    max_tokens: int = 512
    max_queue: int = 256


@dataclass(frozen=True)
class Asked:
    """A request that can be answered.

    Attributes:
        chat: Whether it is a conversation.
        model: How it called the model.
        prompts: Tokens of each.
        choices: Answers to each of them.
        at: The trade-off.
        sampling: How tokens are chosen.
        max_tokens: Of the answers to each prompt.
        stop: Texts before which they end.
        stop_tokens: Special tokens, which no text has, at which they end.
        stream: Whether they are sent as they come.
        usage: Whether a stream ends with the counts of tokens.
        token_ids: Whether answers come as tokens, too, with the log-probability of each of them.
    """

    chat: bool
    model: str
    prompts: Sequence[Sequence[int]]
    choices: int
    at: TradeOff
    sampling: Sampling
    max_tokens: Sequence[int]
    stop: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    stream: bool
    usage: bool
    token_ids: bool = False

    def rows(self, served: ServedModel, send: Callable[[Row, Any], None]) -> list[Row]:
        """Return a row for each answer, those to one prompt one after another."""
        form = served.chat if self.chat else served.plain
        form = replace(form, ends=replace(form.ends, ids=(*form.ends.ids, *self.stop_tokens)))
        return [
            Row(
                prompt, self.at, form, self.sampling, most, served.detokenizer, send, self.stop, self.stream,
                number * self.choices + choice, served.length(prompt, self.at),
            )
            for number, (prompt, most) in enumerate(zip(self.prompts, self.max_tokens, strict=True))
            for choice in range(self.choices)
        ]  # fmt: skip


def asked_of(raw: bytes, served: ServedModel, limits: Limits, *, chat: bool) -> Asked:
    """Read the body of a request.

    Raises:
        ApiError: 400 if it is not as it should be, 404 if it calls for another model.
    """
    body = _read(raw, ChatBody if chat else CompletionBody)
    named = weights_in_name(body.model, served)
    if named is not None and body.weights is not None:
        raise ApiError("the name of the model has weights, and the body has weights too; give them once", "weights")
    at = _at(served, body, named)
    form = served.chat if chat else served.plain
    with_logs: int | None = body.logprobs  # type: ignore[assignment]
    most = body.max_tokens
    if isinstance(body, ChatBody):
        with_logs = body.top_logprobs if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise ApiError("top_logprobs is set but logprobs is not; pass logprobs=true", "top_logprobs")
        if most is not None and body.max_completion_tokens is not None:
            raise ApiError("max_tokens and max_completion_tokens are two names of one thing; give one", "max_tokens")
        most = most or body.max_completion_tokens
        prompts = [_conversation(body.messages)]
    else:
        prompts = _prompts(body.prompt)  # type: ignore[attr-defined]
    token_ids, more_stops = _token_fields(body, served)
    if body.logprobs_mode != "raw_logprobs" and not body.temperature:
        raise ApiError(
            f"logprobs_mode is {body.logprobs_mode!r} but nothing is drawn at temperature 0; leave it out",
            "logprobs_mode",
        )
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options are set but stream is not; pass stream=true", "stream_options")
    if (count := len(prompts) * body.n) > limits.max_queue:
        raise ApiError(f"the request asks for {count} answers but {limits.max_queue} can wait; split it", "n")
    tokens = [_tokens(form.encoder, prompt, number, served, chat) for number, prompt in enumerate(prompts)]
    wanted = most or (limits.max_tokens if chat else min(COMPLETION_TOKENS, limits.max_tokens))
    if wanted > limits.max_tokens:
        raise ApiError(f"max_tokens is {wanted} but this server gives at most {limits.max_tokens}", "max_tokens")
    lengths = [_room(served, ids, at, wanted, said=most is not None) for ids in tokens]
    sampling = Sampling(
        body.temperature, body.top_p, body.top_k, body.presence_penalty, body.frequency_penalty,
        _bias(body.logit_bias, served), body.seed, with_logs, body.logprobs_mode == "processed_logprobs",
    )  # fmt: skip
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    special = dict(zip(served.tokenizer.all_special_tokens, served.tokenizer.all_special_ids, strict=True))
    stop_tokens = (*(special[text] for text in stop if text in special), *more_stops)
    stop = tuple(text for text in stop if text not in special)
    usage = body.stream_options is not None and body.stream_options.include_usage
    name = body.model or served.name
    return Asked(chat, name, tokens, body.n, at, sampling, lengths, stop, stop_tokens, body.stream, usage, token_ids)


def weights_in_name(model: str | None, served: ServedModel) -> Any:
    """Return the weights in the name of a model, as in "NAME@0.7,0.3"; None of a name without.

    Raises:
        ApiError: If the model is another one, or what follows the @ is no trade-off.
    """
    if model is None or model == served.name:
        return None
    name, mark, text = model.rpartition("@")
    if not mark or name != served.name:
        raise ApiError(
            f"there is no model {model!r:.200}; this server has {served.name!r}, and {served.name}@W,W,... is that "
            "model at weights",
            "model", status=404, code="model_not_found",
        )  # fmt: skip
    try:
        return weights_of_name(text, len(served.objectives), name="the trade-off in the model's name").tolist()
    except ValueError as error:
        raise ApiError(str(error), "model") from None


def _read(raw: bytes, schema: type[Body]) -> Any:
    try:
        values = parse_json(raw.decode("utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ApiError(f"the body cannot be read: {error}") from None
    if not isinstance(values, Mapping):
        raise ApiError("the body must be a JSON object")
    values = {name: value for name, value in values.items() if value is not None}  # null is what is left out
    known = schema.__struct_fields__
    for name in list(values):
        if name in known:
            continue
        allowed = _IDLE.get(name, ())
        if values[name] not in allowed and _ANY not in allowed:
            here = f" with the value {msgspec.json.encode(values[name]).decode()[:80]}" if allowed else ""
            raise ApiError(f"{name} is not supported{here}; leave it out", name, code="unsupported_parameter")
        del values[name]
    if isinstance(messages := values.get("messages"), list):
        values["messages"] = [_message(number, message) for number, message in enumerate(messages)]
    try:
        return msgspec.convert(values, schema)
    except msgspec.ValidationError as error:
        text = in_words(error, values, "").replace(" | null", "")  # which is how to leave a field out
        param = next((name for name in known if text.startswith(name)), None)
        raise ApiError(text, param) from None


def _message(number: int, given: Any) -> Any:
    """Return a message without the fields that say nothing, which clients send back with the answers they got."""
    if not isinstance(given, Mapping):
        return given
    known, where = ChatMessage.__struct_fields__, f"messages[{number}]"
    found = {name: value for name, value in given.items() if value is not None}
    for name in [name for name in found if name not in known]:
        if found[name] not in _NOTHING:
            raise ApiError(
                f"{where}.{name:.80} is not supported; leave it out", "messages", code="unsupported_parameter"
            )
        del found[name]
    if (role := found.get("role")) not in (None, *ROLES):
        raise ApiError(f"{where}.role is {role!r:.80} but must be one of {', '.join(ROLES)}", "messages")
    return found


def _at(served: ServedModel, body: Body, named: Any) -> TradeOff:
    try:
        return served.trade_off(body.weights if named is None else named, body.scale, body.beta, body.kl_weight)
    except ValueError as error:
        param = next((name for name in ("weights", "scale", "beta", "kl_weight") if str(error).startswith(name)), None)
        raise ApiError(str(error), param) from None


def _token_fields(body: Body, served: ServedModel) -> tuple[bool, tuple[int, ...]]:
    """Return whether a completion is asked for as tokens, and at which more of them it ends."""
    if not isinstance(body, CompletionBody):
        return False, ()
    if body.return_token_ids and body.stream:
        raise ApiError("return_token_ids is not for streams; leave one of them out", "return_token_ids")
    if wrong := [token for token in body.stop_token_ids if not 0 <= token < served.vocabulary]:
        message = f"stop_token_ids has {wrong[0]}; the model has tokens from 0 to {served.vocabulary - 1}"
        raise ApiError(message, "stop_token_ids")
    return body.return_token_ids, tuple(body.stop_token_ids)


def _conversation(messages: Sequence[ChatMessage]) -> tuple[dict[str, str], ...]:
    return tuple(
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "".join(part.text for part in message.content),
        }
        for message in messages
    )


def _prompts(given: Any) -> list[Any]:
    """Return the prompts of a completion: a text, texts, tokens, or several lists of tokens."""
    if isinstance(given, str):
        return [given]
    kinds = {type(part) for part in given}
    if len(kinds) > 1:
        raise ApiError("prompt mixes texts and tokens; pass either", "prompt")
    return [given] if kinds == {int} else given


def _tokens(encoder: Any, prompt: Any, number: int, served: ServedModel, chat: bool) -> list[int]:
    param = "messages" if chat else "prompt"
    if isinstance(prompt, list):
        tokens = prompt
    else:
        try:
            tokens = encoder.prompt_tokens(prompt).tolist()
        except ValueError as error:  # the tokenizer refuses the text, or the template the conversation
            raise ApiError(f"{param} cannot be answered: {error}", param) from None
    if not tokens:
        raise ApiError(f"prompt {number} has no tokens", param)
    size = served.vocabulary
    if wrong := [token for token in tokens if not 0 <= token < size]:
        raise ApiError(f"prompt {number} has the token {wrong[0]}; the model has those below {size}", param)
    return tokens


def _room(served: ServedModel, tokens: Sequence[int], at: TradeOff, wanted: int, *, said: bool) -> int:
    """Return how many tokens an answer may have; raise if there is no room for what was asked for."""
    if served.positions is None:
        return wanted
    length = served.length(tokens, at)
    left = served.positions - length
    if left < 1 or (said and left < wanted):
        before = f", {length - len(tokens)} more tell the trade-off," if length > len(tokens) else ""
        remedy = f"ask for max_tokens of {left} or less" if left > 0 else "shorten the prompt"
        raise ApiError(
            f"the prompt has {len(tokens)} tokens{before} and its answer up to {wanted}, but the model knows "
            f"{served.positions} positions; {remedy}",
            "max_tokens" if left > 0 else None, code="context_length_exceeded",
        )  # fmt: skip
    return min(wanted, left)


def _bias(given: Mapping[str, float], served: ServedModel) -> tuple[tuple[int, float], ...]:
    size = served.vocabulary
    for name in given:
        if not (name.isascii() and name.isdigit() and len(name) < 12 and int(name) < size and str(int(name)) == name):
            raise ApiError(f"logit_bias has {name!r:.80} but its keys are tokens, from 0 to {size - 1}", "logit_bias")
    return tuple((int(name), value) for name, value in given.items())
