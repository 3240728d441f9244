r"""The public formats of preference data: how a row, or consecutive rows, of each become lists with labels.

Labels are always "higher is better":

* a preference between two responses is 1 for the preferred one and 0 for the other, a tie 1 for both;
* a rank (1 or 0 is best) becomes `worst rank of the list + 1 - rank`, so that the last response has label 1;
* a rating is taken as it is.

Transcripts in Anthropic's notation (`\n\nHuman: ...\n\nAssistant: ...`) become chat messages, so that a model sees them
through its own chat template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mopl._lines import TextError, parse_json
from mopl.language_models._list_fields import Text, read_text
from mopl.language_models._pairs import Row, is_repeated, make_list, pair_of, transcript
from mopl.language_models.data import PreferenceList, RowError

Draft = PreferenceList | RowError

ULTRAFEEDBACK = ("helpfulness", "honesty", "instruction_following", "truthfulness")
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@dataclass(frozen=True)
class Format:
    """One public format.

    Attributes:
        name: by which it is asked for.
        columns: columns that a row must have; they also tell the format when it is not named.
        parse: makes lists of a row, or of the rows that belong together; options are keywords of it.
        group: the key by which consecutive rows belong together; None: every row by itself.
        about: where the format is met, for messages.
    """

    name: str
    columns: tuple[str, ...]
    parse: Callable[..., Iterator[Draft]]
    group: Callable[[Row], Any] | None = None
    about: str = ""


def from_json(value: Any, what: str) -> Any:
    """Read a column that a CSV file holds as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except TextError as error:
        raise RowError("not JSON", f"{what} is text that is no JSON ({error})") from None


def _records(row: Row, column: str) -> Sequence[Row]:
    records = from_json(row[column], column)
    if not isinstance(records, Sequence) or not all(isinstance(record, Mapping) for record in records):
        raise RowError("wrong type", f"{column} must be a list of records")
    return records


# What a template would write besides the messages, or a model read besides the text.
BESIDE_THE_TEXT = {
    "tools": "write the tools into a system message, or leave the column out",
    "chat_template_kwargs": "pass template options for the whole data, or leave the column out",
    "image": "only text can be trained",
    "images": "only text can be trained",
}


def unread_column(row: Row, columns: Sequence[str] = tuple(BESIDE_THE_TEXT)) -> RowError | None:
    """Return the error of a row with something in a column that would change the tokens, or what a model sees."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, str) and value in ("[]", "{}", "null"):
            continue
        if value is not None and (not hasattr(value, "__len__") or len(value) > 0):
            return RowError(
                "column that is not read",
                f"{column} is part of what a model sees and is not read here; {BESIDE_THE_TEXT[column]}",
            )
    return None


def is_table(rows: Any) -> bool:
    """Say whether rows are those of `datasets`, which all have the same keys."""
    return hasattr(rows, "column_names")


def without_gaps(value: Any, within: bool = False) -> Any:
    """Return a row of a table without the None that stand in tool calls where those of other rows have a key.

    Args:
        value: the row, or a part of it.
        within: whether the part lies in tool calls.
    """
    if isinstance(value, Mapping):
        kept = {key: part for key, part in value.items() if part is not None or not within}
        return {key: without_gaps(part, within or key == "tool_calls") for key, part in kept.items()}
    return [without_gaps(part, within) for part in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- mopl's own


def parse_lists(row: Row) -> Iterator[Draft]:
    """`{"prompt", "responses": [...], "labels": {objective: [...]}}`; JSON texts in CSV files."""
    yield make_list(row["prompt"], from_json(row["responses"], "responses"), from_json(row["labels"], "labels"))


# ---------------------------------------------------------------- two objectives on pairs


def parse_safe_rlhf(row: Row) -> Iterator[Draft]:
    """PKU-SafeRLHF: which response is better and which is safer; no id or None is a missing label."""
    labels = {}
    for objective, column in (("helpful", "better_response_id"), ("harmless", "safer_response_id")):
        chosen = row.get(column)
        if chosen is None:
            continue
        if isinstance(chosen, str) and chosen.strip() in ("0", "1"):
            chosen = int(chosen)
        if chosen not in (0, 1):
            raise RowError("unknown response id", f"{column} is {chosen!r} but must be 0 or 1")
        labels[objective] = (float(chosen == 0), float(chosen == 1))
    yield make_list(row["prompt"], (row["response_0"], row["response_1"]), labels)


# ---------------------------------------------------------------- ratings


def parse_ultrafeedback(row: Row, *, aspects: Sequence[str] = ULTRAFEEDBACK) -> Iterator[Draft]:
    """UltraFeedback: an instruction and completions with a rating of each aspect; "N/A" is a missing label.

    The system prompts by which single completions were made are not part of the prompt, which all responses share.
    """
    completions = _records(row, "completions")
    labels = {aspect: tuple(_aspect_rating(completion, aspect) for completion in completions) for aspect in aspects}
    yield make_list(row["instruction"], [completion.get("response") for completion in completions], labels)


def _aspect_rating(completion: Row, aspect: str) -> float | None:
    annotation = (completion.get("annotations") or {}).get(aspect)
    rating = annotation.get("Rating") if isinstance(annotation, Mapping) else annotation
    if rating is None or (isinstance(rating, str) and rating.strip().upper() in ("", "N/A", "NA", "NONE")):
        return None
    try:
        return float(rating)
    except (TypeError, ValueError, OverflowError):
        raise RowError("label is not a number", f"the rating of {aspect} is {rating!r}") from None


def parse_generations(row: Row) -> Iterator[Draft]:
    """Lists of distilabel: `generations` and one rating of each."""
    generations, ratings = from_json(row["generations"], "generations"), from_json(row["ratings"], "ratings")
    yield make_list(row["instruction"], generations, {"rating": ratings})


def parse_attributes(
    rows: Sequence[Row], *, prompt: str, response: str, attributes: Sequence[str] | None, scores: str | None = None
) -> Iterator[Draft]:
    """One response a row with numeric attributes; consecutive rows of one prompt are a list."""
    records = [from_json(row[scores], scores) if scores else row for row in rows]
    if not all(isinstance(record, Mapping) for record in records):
        raise RowError("wrong type", f"{scores} must be a record of numbers")
    names = attributes if attributes is not None else tuple(dict.fromkeys(n for record in records for n in record))
    labels = {name: tuple(record.get(name) for record in records) for name in names}
    yield make_list(_turns_of(rows[0][prompt]), [row[response] for row in rows], labels)


_HELPSTEER_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")


def _turns_of(prompt: Any) -> Any:
    """HelpSteer2 writes later turns as `<extra_id_1>Assistant` and `<extra_id_1>User` inside the prompt."""
    if not isinstance(prompt, str) or "<extra_id_1>" not in prompt:
        return prompt
    first, *rest = _HELPSTEER_TURN.split(prompt)
    messages = [{"role": "user", "content": first}]
    messages += [{"role": role.lower(), "content": text} for role, text in zip(rest[::2], rest[1::2], strict=True)]
    return messages


def parse_helpsteer_preference(row: Row) -> Iterator[Draft]:
    """HelpSteer2/3 preferences: -3 (the first is much better) to 3 (the second is much better).

    The labels are the strength for the preferred response and 0 for the other; a tie is 1 for both.
    """
    strength = row.get("overall_preference", row.get("preference_strength"))
    if strength is None:
        raise RowError("no labels", "the preference is missing")
    if isinstance(strength, str) or strength not in range(-3, 4):
        raise RowError("unknown preference", f"it is {strength!r} but must be a whole number from -3 to 3")
    first, second = (row.get(f"response{n}", row.get(f"response_{n}")) for n in (1, 2))
    tied = float(strength == 0)
    labels = (max(-float(strength), tied), max(float(strength), tied))
    prompt = row["context"] if "context" in row else _turns_of(row["prompt"])
    yield make_list(prompt, (first, second), {"preference": labels})


# ---------------------------------------------------------------- rankings


def labels_of_ranks(ranks: Sequence[Any]) -> tuple[float | None, ...]:
    """Turn ranks, lowest best, into labels: worst rank + 1 - rank; a missing rank is a missing label."""
    for rank in ranks:
        if rank is not None and (isinstance(rank, str) or rank != rank or rank < 0):
            raise RowError("unknown rank", f"a rank is {rank!r} but must be a number of at least 0")
    worst = max((rank for rank in ranks if rank is not None), default=0)
    return tuple(None if rank is None else float(worst + 1 - rank) for rank in ranks)


def parse_ranked_answers(row: Row) -> Iterator[Draft]:
    """Nectar: a prompt and answers with their ranks, 1 the best."""
    answers = _records(row, "answers")
    labels = {"preference": labels_of_ranks([answer.get("rank") for answer in answers])}
    yield make_list(transcript(row["prompt"]), [answer.get("answer") for answer in answers], labels)


def parse_oasst_tree(row: Row) -> Iterator[Draft]:
    """Open Assistant trees: every message whose assistant replies were ranked is a list; deleted ones are left out."""
    root = from_json(row["prompt"], "prompt")
    if not isinstance(root, Mapping):
        raise RowError("wrong type", "prompt must be the first message of a tree")
    yield from _ranked_replies(root, ())


def _ranked_replies(node: Row, before: tuple[Row, ...]) -> Iterator[Draft]:
    role = {"prompter": "user", "assistant": "assistant"}.get(str(node.get("role")))
    if role is None:
        yield RowError("not a message", f"a message of the tree has the role {node.get('role')!r}")
        return
    prompt = (*before, {"role": role, "content": node.get("text")})
    replies = [reply for reply in node.get("replies") or () if not reply.get("deleted")]
    ranked = [reply for reply in replies if reply.get("role") == "assistant" and reply.get("rank") is not None]
    if len(ranked) > 1:  # one ranked reply says nothing; most messages of a tree have none
        try:
            labels = {"preference": labels_of_ranks([reply["rank"] for reply in ranked])}
            yield make_list(prompt, [reply.get("text") for reply in ranked], labels)
        except RowError as error:
            yield error
    for reply in replies:
        yield from _ranked_replies(reply, prompt)


def parse_oasst_messages(rows: Sequence[Row]) -> Iterator[Draft]:
    """Open Assistant as on the hub: consecutive rows are the messages of one tree."""
    nodes = {row["message_id"]: {**row, "replies": []} for row in rows}
    for row in rows:
        parent = row.get("parent_id")
        if parent is None:
            continue
        if parent not in nodes:
            raise RowError("unknown parent", f"message {row['message_id']} answers {parent}, which is not in its tree")
        nodes[parent]["replies"].append(nodes[row["message_id"]])
    for row in rows:
        if row.get("parent_id") is None:
            yield from _ranked_replies(nodes[row["message_id"]], ())


# ---------------------------------------------------------------- pairs


def prompt_of(row: Row, name: str | None = None) -> Text:
    """Return the prompt of a row that has this column, as the reader of its format has it, whatever the responses are.

    Args:
        row: the row.
        name: of its format; None: of no known one.

    Raises:
        RowError: if it is no prompt, or is in the responses, too, and these cannot be read.
    """
    prompt = row["prompt"]
    beside = name == "pairs" and isinstance(row["chosen"], str)
    if name in ("helpsteer2", "helpsteer2-preference"):
        prompt = _turns_of(prompt)
    elif name == "nectar" or (beside and not is_repeated(prompt, (row["chosen"], row["rejected"]))):
        prompt = transcript(prompt)
    elif name == "pairs":
        prompt = pair_of(row).prompt
    return read_text(prompt, "prompt")


_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "function_call": "assistant",
    "system": "system", "observation": "tool", "tool": "tool",
}  # fmt: skip


def _sharegpt(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("from") not in _SHAREGPT_ROLES:
        raise RowError("not a message", f"{str(message)[:60]} has no from and value, or an unknown from")
    return {"role": _SHAREGPT_ROLES[message["from"]], "content": message.get("value")}


def parse_sharegpt_pair(row: Row, *, objective: str = "preference") -> Iterator[Draft]:
    """LLaMA-Factory's preferences in ShareGPT style: conversations, and chosen and rejected messages."""
    prompt = [_sharegpt(message) for message in from_json(row["conversations"], "conversations")]
    if row.get("system"):
        prompt.insert(0, {"role": "system", "content": row["system"]})
    pair = [(_sharegpt(from_json(row[side], side)),) for side in ("chosen", "rejected")]
    yield make_list(prompt, pair, {objective: (1.0, 0.0)})


def parse_alpaca_pair(row: Row, *, objective: str = "preference") -> Iterator[Draft]:
    """LLaMA-Factory's preferences in Alpaca style: instruction, input, system, history, chosen, rejected."""
    content = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    prompt = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history") or ():
        prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt.append({"role": "user", "content": content})
    yield make_list(prompt, (row["chosen"], row["rejected"]), {objective: (1.0, 0.0)})
