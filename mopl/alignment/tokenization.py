r"""From texts to tokens: chat templates, the boundary between prompt and response, truncation.

Where a response begins is exact by construction: prompt and response are tokenised apart and their tokens put one
after the other. So the prompt has the tokens which it has when the model is asked to answer it, all K responses of a
list have the very same prompt, and that prompt is tokenised once. Two ways to write a list as text:

* *chat*: the tokenizer's chat template. The prompt is the conversation with the opening of the assistant's turn; the
  response is what the template writes after that, with the end of the turn. Tokens after the last end-of-sequence token
  (the line break that many templates put there) are left out, because no model generates them. A text prompt is one
  turn of the user. Nothing is added that the template does not write.
* *plain*: a text prompt as it is, the separator, then the response as it is. Messages are written as Anthropic's
  transcripts, `\n\nHuman: ...\n\nAssistant: ...`. A beginning-of-sequence token comes first if the tokenizer adds one
  by itself, an end-of-sequence token ends each response.

Truncation never cuts a response to nothing. Where the prompt and the longest response of a list exceed `max_length`
tokens, the prompt loses tokens from the left (never a leading beginning-of-sequence token) down to `min_prompt`; only
then do responses lose tokens from the right, which always leaves `max_length - min_prompt` of them. All responses of a
list keep the same prompt: they are compared, so they must answer the same question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mopl._arguments import check_choice
from mopl._lines import lone_surrogate
from mopl.alignment.data import Message, OnError, PreferenceData, PreferenceList, ReadReport, RowError, Text

TEMPLATES = ("auto", "chat", "plain")


@dataclass(frozen=True, eq=False)
class TokenizedList:
    """One list as tokens.

    Attributes:
        prompt: (P,) int64, P >= 1, the tokens all responses follow.
        responses: K arrays (R_k,) int64, R_k >= 1.
        labels: (m, K) float32, NaN where missing.
        index: which list of the data this is.
        prompt_cut: how many tokens truncation took from the prompt.
        response_cut: how many it took from each response.
        prompt_starts: where the prompt begins that a response follows, if that is not everywhere at 0; only TRL's
            `truncation_mode="keep_end"` cuts the prompt of each response by itself.
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    labels: np.ndarray
    index: int = 0
    prompt_cut: int = 0
    response_cut: tuple[int, ...] = ()
    prompt_starts: tuple[int, ...] = ()

    def prompt_of(self, response: int) -> np.ndarray:
        """Return the tokens that a response follows."""
        return self.prompt[self.prompt_starts[response] :] if self.prompt_starts else self.prompt

    @property
    def lengths(self) -> np.ndarray:
        """(K,) tokens of each sequence, prompt and response."""
        return np.array([len(self.prompt_of(k)) + len(response) for k, response in enumerate(self.responses)])


@dataclass(frozen=True, eq=False)
class TokenizedData(Sequence[TokenizedList]):
    """Lists as tokens, in the order of the data.

    Attributes:
        lists: the lists.
        objectives: names of the m objectives.
        name: of the data set.
        report: which lists could not be tokenised.
    """

    lists: tuple[TokenizedList, ...]
    objectives: tuple[str, ...]
    name: str
    report: ReadReport

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return TokenizedData(self.lists[index], self.objectives, self.name, self.report)
        return self.lists[index]

    def fingerprint(self) -> str:
        """Return a SHA-256 of all tokens and of where responses begin: equal exactly if a model sees the same."""
        digest = hashlib.sha256()
        for item in self.lists:
            starts = [np.array(item.prompt_starts)] if item.prompt_starts else []
            for tokens in (item.prompt, *item.responses, *starts):
                digest.update(len(tokens).to_bytes(8, "little") + tokens.astype("<i8").tobytes())
            digest.update(b"|")
        return digest.hexdigest()

    def describe(self) -> dict[str, int]:
        """Return how many lists, sequences and tokens there are and how many truncation touched."""
        return {
            "lists": len(self.lists),
            "sequences": sum(len(item.responses) for item in self.lists),
            "tokens": int(sum(item.lengths.sum() for item in self.lists)),
            "longest_sequence": int(max((item.lengths.max() for item in self.lists), default=0)),
            "prompts_cut": sum(item.prompt_cut > 0 for item in self.lists),
            "responses_cut": sum(cut > 0 for item in self.lists for cut in item.response_cut),
        }


def truncate(
    prompt: np.ndarray, responses: Sequence[np.ndarray], *, max_length: int, min_prompt: int, bos: int | None = None
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Shorten a list so that prompt and longest response have at most `max_length` tokens; see the module's text.

    Args:
        prompt: (P,) tokens.
        responses: arrays (R_k,).
        max_length: most tokens of a sequence.
        min_prompt: what a longer prompt is never cut below, at least 1 and less than `max_length`.
        bos: a token that stays if the prompt begins with it.

    Returns:
        The prompt and the responses.
    """
    longest = max(len(response) for response in responses)
    keep = min(len(prompt), max(max_length - longest, min_prompt))
    if keep < len(prompt):
        head = prompt[:1] if bos is not None and prompt[0] == bos else prompt[:0]
        prompt = np.concatenate([head, prompt[len(prompt) - (keep - len(head)) :]])
    return prompt, tuple(response[: max_length - keep] for response in responses)


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

    @property
    def pad_id(self) -> int:
        """The token to pad with; never seen by a model, because padding is masked."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

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
        whole = (prompt, responses)
        if self.max_length is not None:
            prompt, responses = truncate(
                prompt,
                responses,
                max_length=self.max_length,
                min_prompt=self.min_prompt,
                bos=self.tokenizer.bos_token_id,
            )
        return TokenizedList(
            prompt,
            tuple(responses),
            labels,
            index,
            len(whole[0]) - len(prompt),
            tuple(len(before) - len(after) for before, after in zip(whole[1], responses, strict=True)),
        )

    # ------------------------------------------------------------ writing

    def _chat(self, item: PreferenceList) -> tuple[np.ndarray, list[np.ndarray]]:
        messages = list(_as_messages(item.prompt, "user"))
        opening = self._opening(item.prompt)
        responses = []
        for response in item.responses:
            whole = self._write([*messages, *_as_messages(response, "assistant")], add_generation_prompt=False)
            if not whole.startswith(opening):
                raise RowError(
                    "no continuation of its prompt",
                    "the chat template does not write an answered conversation as the continuation of its prompt, so "
                    f"where the response begins is undefined. The prompt ends in {opening[-60:]!r}, the conversation "
                    f"has there {whole[max(len(opening) - 60, 0) : len(opening)]!r}. Pass a chat_template that does, "
                    "or template_options that switch off what differs (such as enable_thinking)",
                )
            responses.append(self._without_tail(self._encode(whole[len(opening) :])))
        return self.prompt_tokens(item.prompt), responses

    def prompt_tokens(self, prompt: Text) -> np.ndarray:
        """Return the tokens (P,) of a prompt as a model gets them when it is to answer, never cut.

        Args:
            prompt: a text or chat messages.

        Raises:
            RowError: if it is no Unicode text, messages cannot be written in plain text, or the chat template refuses
                them.
        """
        tokens = self._encode(self._opening(prompt), first=True)
        return tokens if self.chat else np.concatenate([self._front, tokens])

    def _opening(self, prompt: Text) -> str:
        """Return a prompt as text, up to where the response begins."""
        if self.chat:
            return self._write(list(_as_messages(prompt, "user")), add_generation_prompt=True)
        return prompt + self.separator if isinstance(prompt, str) else _transcript(prompt, True)

    def _write(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.template_options,
            )
        except ImportError:
            raise
        except Exception as error:
            from jinja2 import TemplateError, TemplateSyntaxError

            # Templates refuse conversations that their model was not trained on, and stumble over fields that a
            # message lacks. A template that is wrong by itself is no fault of a row.
            if isinstance(error, TemplateSyntaxError) or not isinstance(error, (TemplateError, TypeError, LookupError)):
                raise
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise RowError(
                "refused by the chat template", f"{str(error) or type(error).__name__} (roles: {roles})"
            ) from error

    def _without_tail(self, tokens: np.ndarray) -> np.ndarray:
        """Leave out white space after the last end-of-sequence token."""
        ends = np.flatnonzero(tokens == self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id is not None else []
        if len(ends) and not self.tokenizer.decode(tokens[ends[-1] + 1 :].tolist()).strip():
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
