"""Pairs of responses as Anthropic and TRL write them: `chosen` and `rejected`, with a prompt or around one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mopl._words import last_boundary
from mopl.language_models.data import PreferenceList, RowError

Row = Mapping[str, Any]
make_list: Callable[..., PreferenceList] = PreferenceList  # which takes sequences of any kind


def transcript(text: Any) -> Any:
    """Turn Anthropic's notation into messages, without the empty turn that the assistant is to fill; else return it."""
    if not isinstance(text, str) or not text.lstrip().startswith("Human:"):
        return text
    pieces = re.split(r"(?:^|\r?\n\r?\n)(Human|Assistant):", text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[role], "content": content.strip()}
        for role, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def parse_pair(row: Row, *, objective: str = "preference") -> Iterator[PreferenceList]:
    """Anthropic HH, and every preference data set of TRL: chosen and rejected, as texts or messages.

    Without a prompt, or with whole conversations in chosen and rejected, the prompt is what both begin with: whole
    messages, and in plain text whole words (the space before the first different word goes to the responses); whole
    characters, where both begin without a space in a script that has none.
    """
    prompt, pair = row.get("prompt"), [row["chosen"], row["rejected"]]
    labels = {objective: (1.0, 0.0)}
    for what, value in zip(("chosen", "rejected"), pair, strict=True):
        if value is None or len(value) == 0:
            raise RowError("empty response", f"{what} has no text")
    if pair[0] == pair[1]:
        raise RowError("equal responses", "chosen and rejected are the same")
    if isinstance(prompt, Mapping):
        prompt = (prompt,)
    elif is_repeated(prompt, pair):
        prompt = None
    if prompt is None and all(isinstance(text, str) and text.lstrip().startswith("Human:") for text in pair):
        # Split by hand and not by `transcript`: an empty last turn is an empty response, not a turn to be filled.
        before, after = zip(*(_last_turn(text) for text in pair), strict=True)
        if before[0] and before[0] == before[1]:
            yield make_list(transcript(before[0]), [text.strip() for text in after], labels)
            return
        pair = [transcript(text) for text in pair]
    if isinstance(pair[0], str) != isinstance(pair[1], str):
        raise RowError("wrong type", "one of chosen and rejected is text and the other is messages")
    if isinstance(pair[0], str):
        if prompt is None:
            prompt, pair = _common_words(*pair)
        elif (turns := transcript(prompt)) is not prompt:
            # The notation, and no model, writes a space in front of what the assistant says.
            prompt, pair = turns, [text.strip() for text in pair]
        yield make_list(prompt, pair, labels)
        return
    if prompt is None or any(messages[0].get("role") != "assistant" for messages in pair):
        common = 0
        # The last message of each is always a response, even where one conversation is the beginning of the other.
        while common < min(map(len, pair)) - 1 and pair[0][common] == pair[1][common]:
            common += 1
        if common == 0:
            raise RowError("no common prompt", "chosen and rejected differ from their first message on")
        if _says_more(prompt, pair[0][:common]):
            raise RowError(
                "prompt beside conversations",
                "chosen and rejected are whole conversations, and the prompt has messages that they lack; begin both "
                "with these, or leave the column out",
            )
        prompt, pair = pair[0][:common], [messages[common:] for messages in pair]
        if any(messages[0].get("role") != "assistant" for messages in pair):
            raise RowError("no common prompt", f"they part at message {common}, which is not the assistant's")
    yield make_list(transcript(prompt), pair, labels)


def pair_of(row: Row) -> PreferenceList:
    """Return what `parse_pair` makes of a row; raise a `RowError` where something inside has another shape, too."""
    try:
        return next(parse_pair(row))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise RowError("wrong structure", f"not a row of pairs ({type(error).__name__}: {error})") from None


def _last_turn(text: str) -> tuple[str, str]:
    """Return what stands before the last turn of the assistant in Anthropic's notation, and that turn."""
    *_, last = [None, *re.finditer(r"\r?\n\r?\nAssistant:", text)]
    return ("", text) if last is None else (text[: last.start()], text[last.end() :])


def _turns_of(text: Any) -> list[Row]:
    """Return the messages of a text in Anthropic's notation, none of anything else."""
    turns = transcript(text)
    return turns if turns is not text else []


def is_repeated(prompt: Any, pair: Sequence[Any]) -> bool:
    """Say whether a pair of texts are whole conversations in Anthropic's notation that hold the prompt, a text, too.

    Raises:
        RowError: if one of them is, or both are such conversations of another prompt in this notation.
    """
    if not isinstance(prompt, str):
        return False
    asked, talks = transcript(prompt), [_turns_of(text) for text in pair]
    if isinstance(asked, str):  # as it stands, it is what the user says in one of the turns
        holds = [{"role": "user", "content": asked.strip()} in talk[:-1] for talk in talks]
        alike = False  # they may well be responses that write a dialogue
    else:
        cut = asked[-1]["role"] == "assistant"  # within an answer, with which the responses go on
        holds = [
            talk[: len(asked)] == asked or (cut and len(talk) > 0 and text.lstrip().startswith(prompt.strip()))
            for talk, text in zip(talks, pair, strict=True)
        ]
        alike = all(talks) and (talks[0][0] == talks[1][0] or min(map(len, talks)) > 1)
    if not all(holds) and (any(holds) or alike):
        raise RowError(
            "prompt beside conversations",
            "chosen and rejected hold whole conversations that do not both begin with the prompt; write it in both, or "
            "in neither, or leave the column out",
        )
    return all(holds)


def _says_more(prompt: Any, messages: Sequence[Row]) -> bool:
    """Say whether a prompt has messages that a conversation has not; a text is some rendering of it."""
    have = [(message.get("role"), message.get("content")) for message in messages]
    asked = () if prompt is None or isinstance(prompt, str) else prompt
    return any((message.get("role"), message.get("content")) not in have for message in asked)


def _common_words(chosen: str, rejected: str) -> tuple[str, list[str]]:
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    cut = max((match.start() for match in re.finditer(r"\s+", chosen[:common])), default=0)
    if cut == 0:
        cut = last_boundary(chosen[:common], (chosen[common:], rejected[common:]))
    if cut == 0:
        raise RowError("no common prompt", "chosen and rejected share no first word, and the row has no prompt")
    return chosen[:cut], [chosen[cut:], rejected[cut:]]
