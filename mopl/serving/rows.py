"""One answer in the making: its tokens become text that can be sent, until it ends.

What is sent is never taken back: a piece of text leaves only when no later token can change it (no half character, no
part of a stop string), so the pieces put one after the other are the text that a request without a stream gets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # how tokenizers with a fallback for unknown characters call their bytes
_CLEANED = 8  # characters: longer than what the clean-up of spaces looks for, such as " n't"


@dataclass(frozen=True)
class TradeOff:
    """At what a request is answered: w (m,), c, and β (m,) or α of a model that takes it."""

    weights: tuple[float, ...]
    scale: float = 1.0
    beta: tuple[float, ...] | None = None
    kl_weight: float | None = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from scores h.

    Attributes:
        temperature: 0 takes the most probable token.
        top_p: From the most probable tokens of this mass.
        top_k: From the k most probable ones; 0 from all.
        presence_penalty: Subtracted from h of tokens that the answer has.
        frequency_penalty: Subtracted once for each time that it has them.
        logit_bias: Added to h of a token.
        seed: Of the samples; None: another one each time.
        top_log_probs: How many tokens are told with log-probabilities beside the chosen one; None tells none.
        processed: Log-probabilities are of what was drawn from: after temperature, bias, penalties, top_k and top_p.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    top_log_probs: int | None = None
    processed: bool = False


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability in nats, the most probable ones at its place, and where in the text that is."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...]
    offset: int = 0


@dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    Attributes:
        text: Characters that follow what was sent.
        scored: Their tokens, where log-probabilities were asked for.
        finish: "stop" or "length" with the last piece.
        error: Why there will be no answer, or no more of it.
    """

    text: str = ""
    scored: tuple[Scored, ...] = ()
    finish: str | None = None
    error: BaseException | None = None


class Detokenizer:
    """Texts of tokens, as `generate` gives them: without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._bytes = frozenset(token for name, token in tokenizer.get_vocab().items() if _BYTE.fullmatch(name))
        self._skipped = frozenset(tokenizer.all_special_ids)  # before bytes are put together
        self._margin = _CLEANED if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self._before = next(iter(tokenizer("a", add_special_tokens=False)["input_ids"]), None)
        self._known: dict[int, str] = {}

    def text(self, tokens: Sequence[int]) -> str:
        """Return tokens as text."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def settled(self, tokens: Sequence[int], text: str) -> int:
        """Return how many characters of the text of tokens stay what they are, whatever token comes next."""
        whole = len(tokens) if self._bytes else 0  # one wrong byte spoils all those in front of it
        while whole and (tokens[whole - 1] in self._bytes or tokens[whole - 1] in self._skipped):
            whole -= 1
        if self._bytes and whole < len(tokens):
            text = self.text(tokens[:whole])
        return max(len(text.rstrip("\ufffd")) - self._margin, 0)

    def of_one(self, token: int) -> str:
        """Return what a token is inside a text; special tokens by their names."""
        if token not in self._known:
            alone = self.tokenizer.decode([token])
            if self._before is not None:  # some tokenizers drop the space that a text begins with
                front, both = (self.tokenizer.decode(ids) for ids in ([self._before], [self._before, token]))
                alone = both[len(front) :] if both.startswith(front) else alone
            self._known[token] = alone
        return self._known[token]


@dataclass(eq=False)
class Row:
    """One answer that was asked for.

    Attributes:
        prompt: Tokens.
        at: The trade-off.
        form: How the prompt was written: its `ends` say where the answer ends.
        sampling: How tokens are chosen.
        max_tokens: The most that are generated.
        stop: Texts before which it ends.
        streams: Whether pieces are sent as they come, and not all at the end.
        index: Which answer of its request it is.
        positions: How many the prompt takes in the model.
        send: Called with each `Piece`, from the thread that generates.
        tokens: What was generated.
        every: The log-probability of each of these, also of those that the text does not show.
        ended: Whether the last piece was sent.
        cancelled: Set, by whoever asked, when nobody waits for it any more.
    """

    prompt: Sequence[int]
    at: TradeOff
    form: Any
    sampling: Sampling
    max_tokens: int
    detokenizer: Detokenizer
    send: Callable[[Row, Piece], None]
    stop: tuple[str, ...] = ()
    streams: bool = False
    index: int = 0
    positions: int = 0
    tokens: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    every: list[Scored] = field(default_factory=list)
    scored: Scored | None = None  # of the token that was chosen last, before `push` has it
    ended: bool = False
    cancelled: bool = False
    _sent: int = 0  # characters
    _sent_text: str = ""
    _offset: int = 0  # of the last token in the text
    _waiting: list[Scored] = field(default_factory=list)  # not sent yet

    def push(self, token: int) -> bool:
        """Take the next token, send what is ready, and return whether the answer has ended."""
        ends = self.form.ends
        self.counts[token] += 1
        if self.scored is not None:
            self.every.append(self.scored)
        if token in ends.ids:
            self.tokens.append(token)
            self._finish(self.detokenizer.text(self.tokens[:-1]), "stop")
            return True
        stops = self.stop if ends.text is None else (*self.stop, ends.text)
        watched = self.streams or bool(stops) or self.sampling.top_log_probs is not None
        if watched and self.scored is not None:
            before = self.detokenizer.text(self.tokens)
            self._offset = max(self._offset, len(before.rstrip("\ufffd")))
            self._waiting.append(replace(self.scored, offset=self._offset))
        self.tokens.append(token)
        last = len(self.tokens) >= self.max_tokens
        if not watched and not last:
            return False
        text = self.detokenizer.text(self.tokens)
        # What was sent holds no part of a stop string.
        places = [place for stop in stops if (place := text.find(stop, self._sent)) >= 0]
        if places:
            text = text[: min(places)]  # and tokens of the stop string, or after it, are no part of the answer
            self._waiting = [each for each in self._waiting if each.offset < len(text)]
            self._finish(text, "stop")
        elif last:
            self._finish(text, "length")
        elif self.streams:
            ready = self.detokenizer.settled(self.tokens, text)
            self._send(text[: ready - _begun(text[:ready], stops)])
        return bool(places) or last

    def fail(self, error: BaseException) -> None:
        """End it without an answer."""
        if not self.ended:
            self.ended = True
            self.send(self, Piece(error=error))

    def _send(self, text: str) -> None:
        """Send what is new of a text that stays."""
        if len(text) <= self._sent or not text.startswith(self._sent_text):
            return
        scored = tuple(each for each in self._waiting if each.offset < len(text))
        self._waiting = self._waiting[len(scored) :]
        piece, self._sent, self._sent_text = Piece(text[self._sent :], scored), len(text), text
        self.send(self, piece)

    def _finish(self, text: str, reason: str) -> None:
        if not text.startswith(self._sent_text):
            self.fail(RuntimeError("the tokenizer changed a text that was sent already; ask without a stream"))
            return
        self.ended = True
        self.send(self, Piece(text[self._sent :], tuple(self._waiting), reason))


def _begun(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
