"""The fields of a preference list: what a text and labels may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mopl._counted import counted
from mopl._lines import text_fault
from mopl.language_models._bad_rows import RowError

Message = Mapping[str, Any]
Text = str | tuple[Message, ...]
LARGEST_LABEL = float(np.finfo(np.float32).max)


def read_text(value: Any, what: str, number: int | None = None) -> Text:
    """Check a text or messages, and drop the None entries that tables put where a message has no such key."""
    where = what if number is None else f"{what} {number}"
    if fault := text_fault(value):
        raise RowError("no Unicode text", f"{where} {fault}")
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"empty {what}", f"{where} has no text")
        return value
    if isinstance(value, Mapping):
        value = (value,)
    if value is None:
        raise RowError(f"empty {what}", f"{where} is missing")
    if not isinstance(value, Sequence):
        raise RowError("wrong type", f"{where} is a {type(value).__name__} but must be a text or a list of messages")
    if len(value) == 0:
        raise RowError(f"empty {what}", f"{where} has no messages")
    messages = read_messages(value, where)
    if not any(message.get("content", "").strip() or message.get("tool_calls") for message in messages):
        raise RowError(f"empty {what}", f"no message of {where} has text")
    return messages


def read_messages(value: Sequence[Any], where: str) -> tuple[Message, ...]:
    """Check that messages have a role and a text, or calls of tools, and drop their None entries, as `read_text` does.

    A template would write another content as Python shows it: "None", or the list of parts with its brackets.
    """
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError("not a message", f"{where} holds {_short(message)}, which has no role and content")
        message = {key: entry for key, entry in message.items() if entry is not None}
        if not isinstance(message.get("content", "" if message.get("tool_calls") else None), str):
            raise RowError("not a message", f"{where} holds {_short(message)}, whose content is no text")
        messages.append(message)
    return tuple(messages)


def read_labels(objective: str, values: Any, count: int) -> tuple[float | None, ...]:
    """Check the labels of an objective, one for each response, and read NaN as None."""
    if isinstance(values, (str, Mapping)) or not isinstance(values, (Sequence, np.ndarray)):
        raise RowError("wrong type", f"the labels of {objective} are {_short(values)} but must be a list of numbers")
    if len(values) != count:
        many = f"{counted(len(values), 'label')} for {counted(count, 'response')}"
        raise RowError("label list of another length", f"{objective} has {many}")
    result: list[float | None] = []
    for number, value in enumerate(values):
        if value is None:
            result.append(None)
            continue
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise RowError("label is not a number", f"{objective} of response {number} is {_short(value)}")
        try:
            value = float(value)
        except OverflowError:
            raise RowError("label is too large", f"{objective} of response {number} is beyond float32") from None
        if math.isinf(value):
            raise RowError("label is not finite", f"{objective} of response {number} is {value}")
        if abs(value) > LARGEST_LABEL:
            raise RowError("label is too large", f"{objective} of response {number} is {value:g}, beyond float32")
        result.append(None if math.isnan(value) else value)
    return tuple(result)


def check_equal(responses: Sequence[Text], objective: str, labels: Sequence[float | None]) -> None:
    """Raise if two equal responses are judged differently: whatever is learnt from one is wrong for the other.

    Equal responses with equal labels are a tie, which is true, and stay.
    """
    if all(a not in responses[:k] for k, a in enumerate(responses)):
        return
    for k, label in enumerate(labels):
        for j in range(k):
            known = label is not None and labels[j] is not None
            if known and label != labels[j] and responses[k] == responses[j]:
                raise RowError(
                    "equal responses",
                    f"responses {j} and {k} are the same, but {objective!r} is {labels[j]:g} and {label:g}",
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
