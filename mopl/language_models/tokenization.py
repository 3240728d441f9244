r"""From texts to tokens: chat templates, the boundary between prompt and response, truncation.

Where a response begins is exact by construction: prompt and response are tokenised apart and their tokens put one
after the other. So the prompt has the tokens which it has when the model is asked to answer it, all K responses of a
list have the very same prompt, and that prompt is tokenised once. Where tokens of the whole text would merge across the
seam (a prompt that ends in a space, under BPE), they are not merged: a model that has read the prompt cannot take its
last token back. (TRL tokenises the whole text and trains on a prompt without that token.) Two ways to write a list as
text:

* *chat*: the tokenizer's chat template. The prompt is the conversation with the opening of the assistant's turn; the
  response is what the template writes after that, with the token or text that ends the turn (`turn_end`), which need
  not be the tokenizer's end-of-sequence token. What follows it (the line break that many templates put there,
  another end token) is left out, because generation stops before it. A text prompt is one turn of the user. Nothing is
  added that the template does not write. A template that opens the turn in another way than it writes an answered
  conversation (`<think>` in the generation prompt only) has no place where the response begins and is refused.
* *plain*: a text prompt as it is, the separator, then the response as it is. Messages are written as Anthropic's
  transcripts, `\n\nHuman: ...\n\nAssistant: ...`. A beginning-of-sequence token comes first if the tokenizer adds one
  by itself, an end-of-sequence token ends each response.

Truncation never cuts a response to nothing. Where the prompt and the longest response of a list exceed `max_length`
tokens, the prompt loses tokens from the left (never a leading beginning-of-sequence token) down to `min_prompt`; only
then do responses lose tokens from the right, which always leaves `max_length - min_prompt` of them. All responses of a
list keep the same prompt: they are compared, so they must answer the same question.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mopl._arguments import check_choice
from mopl._lines import lone_surrogate
from mopl.language_models._list_fields import read_messages
from mopl.language_models.data import (
    Message,
    OnError,
    PreferenceData,
    PreferenceList,
    ReadReport,
    RowError,
    Text,
    template_refusals,
)
from mopl.language_models.tokenized import TokenizedData, TokenizedList, truncate

__all__ = ["TEMPLATES", "ListTokenizer", "ReadReport", "TokenizedData", "TokenizedList", "tokenize", "truncate"]

TEMPLATES = ("auto", "chat", "plain")
QUESTION, ANSWER, NEXT = "Qk7question", "Qk7answer", "Qk7next"  # words that templates neither cut nor look for


class ListTokenizer:
    """Turns lists into tokens.

    Args:
        tokenizer: a tokenizer of transformers.
        max_length: most tokens of prompt and response together; None never cuts.
        min_prompt: what a longer prompt is never cut below; default a quarter of `max_length`, at least 1.
        template: "chat", "plain", or "auto": chat if the tokenizer has a chat template.
        chat_template: a template to use in place of the tokenizer's own.
        template_options: keywords for the chat template (`{"enable_thinking": False}`).
        separator: text between prompt and response in plain text of text prompts.
        append_eos: end every response of plain text with the end-of-sequence token.

    Raises:
        ValueError: if the template is missing, the tokenizer has no end-of-sequence token to append, or the lengths do
            not fit.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None = 1024,
        min_prompt: int | None = None,
        template: Literal["auto", "chat", "plain"] = "auto",
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        separator: str = "",
        append_eos: bool = True,
    ) -> None:
        check_choice(template, TEMPLATES, "template")
        if max_length is not None and max_length < 2:
            raise ValueError(
                f"max_length is {max_length} but must be at least 2, one token each of prompt and response"
            )
        if min_prompt is None:
            min_prompt = 1 if max_length is None else max(max_length // 4, 1)
        if min_prompt < 1 or (max_length is not None and min_prompt >= max_length):
            raise ValueError(
                f"min_prompt is {min_prompt} but must be at least 1 and less than max_length = {max_length}"
            )
        has_template = chat_template is not None or bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_template:
            raise ValueError(
                "template is 'chat' but the tokenizer has no chat template; pass chat_template=... or template='plain'"
            )
        self.tokenizer, self.max_length, self.min_prompt = tokenizer, max_length, min_prompt
        self.chat = has_template if template == "auto" else template == "chat"
        self.chat_template, self.template_options = chat_template, dict(template_options or {})
        self.separator, self.append_eos = separator, append_eos
        if not self.chat and append_eos and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token to end responses with; set it, or pass append_eos=False")
        self._prefix = self._find_prefix()
        self._front = self._find_front()

    @functools.cached_property
    def turn_end(self) -> int | str | None:
        r"""The token, or where there is none the text, with which the chat template ends the assistant's turn.

        It is often not the tokenizer's `eos_token`. It is found by writing a conversation and reading what follows the
        answer, as it stands in training data:

            ... <|assistant|>\nANSWER<|end|>\n<|endoftext|>    the first token after the answer that is no text: <|end|>
            ... [/INST] ANSWER ###END                          no such token: the text itself, "###END"
            ... Assistant: ANSWER                              nothing: only the end-of-sequence token ends a response
        """
        if not self.chat:
            return None
        question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
        try:
            tail = self._write([question, answer]).rpartition(ANSWER)[2]
            found = self._first_mark(tail)
            if found is not None or tail.strip():
                return self._text_end(tail.strip()) if found is None else found
            # Some templates write the end only where another turn follows, and then its opening.
            following = self._write([question, answer, {"role": "user", "content": NEXT}])
            between = following.rpartition(ANSWER)[2].partition(NEXT)[0]
            opening = self._write([question]).partition(QUESTION)[0]
        except RowError:  # a template that writes no answers has no end of one
            return None
        return None if opening.endswith(between) else self._first_mark(between)

    def _first_mark(self, text: str) -> int | None:
        """Return the first token of a text that is no text: a special or an added one, but white space."""
        tokenizer = self.tokenizer
        marks = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())} - {tokenizer.unk_token_id}
        found = (token for token in self._encode(text).tolist() if token in marks and tokenizer.decode([token]).strip())
        return next(found, None)

    def _text_end(self, text: str) -> int | str | None:
        tokens = self._encode(text).tolist()
        if self.tokenizer.unk_token_id in tokens:
            return None  # no model can write it
        return tokens[0] if len(tokens) == 1 else text

    @property
    def pad_id(self) -> int:
        """The token to pad with; never seen by a model, because padding is masked."""
        return pad_token(self.tokenizer)

    def __call__(self, item: PreferenceList, labels: np.ndarray, index: int = 0) -> TokenizedList:
        """Tokenise one list.

        Args:
            item: the list.
            labels: (m, K) float32, NaN where missing.
            index: which list of the data it is.

        Raises:
            RowError: if the prompt or a response has no token, messages cannot be written in plain text, the chat
                template refuses them, or it does not write a conversation as the continuation of its prompt.
        """
        prompt, responses = self._chat(item) if self.chat else self._plain(item)
        if len(prompt) == 0:
            raise RowError("empty prompt", "the prompt has no tokens, and the tokenizer adds none at the beginning")
        for number, response in enumerate(responses):
            if len(response) == 0:
                raise RowError("empty response", f"response {number} has no tokens")
        kept, shorter = prompt, tuple(responses)
        if self.max_length is not None:
            bos, least = self.tokenizer.bos_token_id, self.min_prompt
            kept, shorter = truncate(prompt, responses, max_length=self.max_length, min_prompt=least, bos=bos)
        cut = tuple(len(before) - len(after) for before, after in zip(responses, shorter, strict=True))
        return TokenizedList(kept, shorter, labels, index, len(prompt) - len(kept), cut)

    # ------------------------------------------------------------ writing

    def _chat(self, item: PreferenceList) -> tuple[np.ndarray, list[np.ndarray]]:
        messages = list(_as_messages(item.prompt, "user"))
        opening = self._opening(item.prompt)
        responses = []
        for response in item.responses:
            whole = self._write([*messages, *_as_messages(response, "assistant")])
            if not whole.startswith(opening):
                raise RowError(
                    "no continuation of its prompt",
                    "the chat template does not write an answered conversation as the continuation of its prompt, so "
                    f"where the response begins is undefined. The prompt ends in {opening[-60:]!r}, the conversation "
                    f"has there {whole[max(len(opening) - 60, 0) : len(opening)]!r}. Pass a chat_template that does, "
                    "or template_options that switch off what differs (such as enable_thinking)",
                )
            responses.append(self._without_tail(whole[len(opening) :]))
        return self.prompt_tokens(item.prompt), responses

    def prompt_tokens(self, prompt: Text) -> np.ndarray:
        """Return the tokens (P,) of a prompt as a model gets them when it is to answer, never cut.

        Args:
            prompt: a text or chat messages.

        Raises:
            RowError: if it is no Unicode text, there is no message, or one without a text, messages cannot be written
                in plain text, or the chat template refuses them.
        """
        if not isinstance(prompt, str):
            prompt = read_messages(prompt, "the prompt")
            if not prompt:
                raise RowError("empty prompt", "the prompt has no messages")
        tokens = self._encode(self._opening(prompt), first=True)
        return tokens if self.chat else np.concatenate([self._front, tokens])

    def _opening(self, prompt: Text) -> str:
        """Return a prompt as text, up to where the response begins."""
        if self.chat:
            return self._write(list(_as_messages(prompt, "user")), add_generation_prompt=True)
        return prompt + self.separator if isinstance(prompt, str) else _transcript(prompt, True)

    def _write(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        with template_refusals(messages):
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.template_options,
            )

    def _without_tail(self, text: str) -> np.ndarray:
        """Return the tokens of a response without what follows the end of its last turn and is never generated.

        That is white space, and special tokens after a token of the template's own.
        """
        if isinstance(self.turn_end, str) and text.rstrip().endswith(self.turn_end):
            text = text.rstrip()
        tokens = self._encode(text)
        for end, special in ((self.turn_end, True), (self.tokenizer.eos_token_id, False)):
            ends = np.flatnonzero(tokens == end) if isinstance(end, int) else []
            if (
                len(ends)
                and not self.tokenizer.decode(tokens[ends[-1] + 1 :].tolist(), skip_special_tokens=special).strip()
            ):
                return tokens[: ends[-1] + 1]
        return tokens

    def _plain(self, item: PreferenceList) -> tuple[np.ndarray, list[np.ndarray]]:
        as_text = isinstance(item.prompt, str)
        responses = []
        for response in item.responses:
            messages = _as_messages(response, "assistant")
            text = str(messages[0].get("content", "")) + _transcript(messages[1:], False)
            tokens = self._encode(text if as_text else " " + text)
            if len(tokens) and self.append_eos and tokens[-1] != self.tokenizer.eos_token_id:
                tokens = np.append(tokens, self.tokenizer.eos_token_id)
            responses.append(tokens)
        return self.prompt_tokens(item.prompt), responses

    # ------------------------------------------------------------ encoding

    def _ids(self, text: str) -> list[int]:
        if fault := lone_surrogate(text):
            raise RowError("no Unicode text", f"the text {fault}")
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _find_front(self) -> np.ndarray:
        """Return the tokens that the tokenizer puts before any text by itself: a beginning-of-sequence token, or none.

        Models of `mopl export` have their virtual tokens there.
        """
        whole, text = list(self.tokenizer("a")["input_ids"]), self._ids("a")
        places = range(len(whole) - len(text) + 1)
        front = whole[: next((i for i in places if whole[i : i + len(text)] == text), 0)]
        return np.array(front, dtype=np.int64)

    def _find_prefix(self) -> str:
        """Return a text to put before a response while it is tokenised, if the tokenizer treats beginnings apart.

        Some tokenizers (SentencePiece) write a space before any text. In the middle of a sequence there is none, and a
        model never generates it: such a tokenizer is given a line break first, whose tokens are then taken away.
        """
        before, alone, together = self._ids("\n"), self._ids("x"), self._ids("\nx")
        return "\n" if before and together[: len(before)] == before and together[len(before) :] != alone else ""

    def _encode(self, text: str, first: bool = False) -> np.ndarray:
        if self._prefix and not first:
            before, together = self._ids(self._prefix), self._ids(self._prefix + text)
            if together[: len(before)] == before:
                return np.array(together[len(before) :], dtype=np.int64)
        return np.array(self._ids(text), dtype=np.int64)


def pad_token(tokenizer: Any) -> int:
    """Return the token to pad with: the tokenizer's, or else its end-of-sequence token, or 0.

    Args:
        tokenizer: A tokenizer of transformers.
    """
    tokens = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((int(token) for token in tokens if token is not None), 0)


def _as_messages(text: Text, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def _transcript(messages: Sequence[Message], opened: bool) -> str:
    """Write messages in Anthropic's notation, with the opening of the assistant's turn if it is to be `opened`."""
    turns = []
    for message in messages:
        heading = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}.get(str(message.get("role")))
        if heading is None or not isinstance(message.get("content"), str):
            raise RowError(
                "needs a chat template",
                f"a message of {message.get('role')} with tools cannot be written in plain text",
            )
        turns.append(heading + message["content"])
    return "".join(turns) + ("\n\nAssistant:" if opened else "")


def tokenize(data: PreferenceData, tokenizer: ListTokenizer, *, on_error: OnError = "raise") -> TokenizedData:
    """Tokenise a data set.

    Args:
        data: the lists.
        tokenizer: how.
        on_error: "raise" refuses data with lists that cannot be tokenised, named by where they were read; "skip" leaves
            them out and logs their counts.

    Returns:
        The tokens; `TokenizedList.index` is the place in `data`.

    Raises:
        DataError: see `ReadReport.settle`.
    """
    report = ReadReport(f"{data.name} (tokens)", rows=len(data))
    lists = []
    for index, item in enumerate(data):
        try:
            lists.append(tokenizer(item, data.label_array(index), index))
        except RowError as error:
            report.add(item.place or f"list {index}", error)
    report.lists = len(lists)
    report.settle(on_error)
    return TokenizedData(tuple(lists), data.objectives, data.name, report)
