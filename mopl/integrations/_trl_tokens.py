"""Rows in TRL's preference format as the tokens that `trl.DPOTrainer` makes of them, to the id.

TRL's rules differ from those of `mopl.language_models.tokenization`, and from release to release: texts are tokenised
as they are, with the tokenizer's special tokens; what follows the end token stays; prompt and answer are tokenised
together and parted where the prompt's own tokens end (to 1.13), or where the two first differ (from 1.14), which under
tokens that merge across the seam are other places; each sequence is cut by itself. So none of them is written here: the
installed release's own `DPOTrainer` prepares the rows, without being made. That method is private, but the same in all
releases from 1.10 to 1.16; where a release lacks it, or gives something else, an error says so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mopl._arguments import check_choice
from mopl._extras import require
from mopl._lines import text_fault
from mopl.integrations._data import (
    SIDES,
    Example,
    Examples,
    beside_of,
    drafts_of,
    labels_of_row,
    places_of,
    without_format,
)
from mopl.language_models import formats
from mopl.language_models.data import (
    DataError,
    OnError,
    PreferenceData,
    PreferenceList,
    ReadReport,
    RowError,
    collect,
    template_refusals,
)
from mopl.language_models.tokenization import TokenizedList

TOKENIZATIONS = ("trl", "mopl")
_ROW = "row_of_the_data"
_OPTIONS = ("tools", "chat_template_kwargs")
_IMAGES = ("image", "images")

logger = logging.getLogger(__name__)


def refuse_options(args: Any) -> None:
    """Raise for an option of TRL's preparation of pairs that is set for other data, or for mopl's tokens."""
    if args.dataset_num_proc is not None:
        raise ValueError(
            f"dataset_num_proc is {args.dataset_num_proc} but only rows of pairs are tokenised by TRL, in several "
            "processes; leave it out, or pass mopl.language_models.tokenization.TokenizedData that others made"
        )
    if args.truncation_mode != "keep_start":
        raise ValueError(
            f"truncation_mode is {args.truncation_mode!r} but only rows of pairs are cut by TRL; lists are cut as "
            "mopl.language_models.tokenization says, the prompt first, responses at their end: leave it at 'keep_start'"
        )


def examples_of_pairs(
    rows: Any,
    args: Any,
    *,
    processing_class: Any,
    objectives: Sequence[str] | None = None,
    on_error: OnError = "raise",
) -> Examples:
    """Turn rows of pairs into the tokens that `trl.DPOTrainer` would train on with the same arguments.

    Rows that TRL leaves out, because with `truncation_mode="keep_start"` their prompt alone fills `max_length`, are
    left out with a warning. Of the arguments `max_length`, `truncation_mode` and `dataset_num_proc` are read.

    Raises:
        ValueError: If the tokenizer is missing or has no end token, images stand beside the text, labels cannot be
            used, or no row is left.
        RuntimeError: If the installed release of TRL prepares data in another way.
    """
    if processing_class is None:
        raise ValueError("processing_class is missing; pass the tokenizer, or TokenizedData")
    rows = without_format(rows)
    lists, usable = _labels(rows, objectives, on_error)
    count = len(rows)
    beside = beside_of(rows, lists)
    if len(usable) < count:
        rows = rows.select(usable) if hasattr(rows, "select") else [rows[number] for number in usable]
    kept = range(len(rows))
    try:
        prepared = _prepare(rows, args, processing_class)
    except Exception:
        refused = _refused_rows(rows, args, processing_class)
        if not refused:
            raise
        report = ReadReport("rows", rows=count, lists=len(rows) - len(refused))
        for number, error in refused.items():
            report.add(f"row {usable[number] + 1}", error)
        report.settle(on_error)
        kept = [number for number in kept if number not in refused]
        prepared = _prepare([rows[number] for number in kept], _in_one_process(args), processing_class)
    examples = []
    for row in prepared:
        number = kept[int(row[_ROW])]
        tokens = [np.asarray(row[name], dtype=np.int64) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        cut = _cut(tokens[0], tokens[1:], args.max_length, args.truncation_mode)
        item = TokenizedList(tokens[0], cut[0], lists.label_array(number), usable[number], prompt_starts=cut[1])
        examples.append(Example(item, **beside[number]))
    if len(examples) < len(kept):
        message = (
            f"{len(kept) - len(examples)} of {len(kept)} rows are left out as in TRL: their prompt alone fills "
            f"max_length = {args.max_length}"
        )
        if not examples:
            raise DataError(f"{message}; raise max_length")
        logger.warning("%s", message)
    return Examples(examples, lists.objectives, rows=count)


def without_labels(rows: Any) -> Any:
    """Return rows of pairs with only those columns that their tokens are made of, or that are refused beside them."""
    read = ("prompt", *SIDES, *_OPTIONS, *_IMAGES)
    if hasattr(rows, "select_columns"):
        return rows.select_columns([name for name in rows.column_names if name in read])
    return [{name: row[name] for name in read if name in row} for row in rows]


def _cut(
    prompt: np.ndarray, responses: Sequence[np.ndarray], max_length: int | None, mode: str
) -> tuple[tuple[np.ndarray, ...], tuple[int, ...]]:
    """Cut each sequence by itself, as TRL's collator does; return the responses and where each one's prompt begins."""
    check_choice(mode, ("keep_start", "keep_end"), "truncation_mode")
    if max_length is None:
        return tuple(responses), ()
    if mode == "keep_start":
        return tuple(response[: max(max_length - len(prompt), 0)] for response in responses), ()
    over = [max(len(prompt) + len(response) - max_length, 0) for response in responses]
    starts = tuple(min(cut, len(prompt)) for cut in over)
    kept = (response[cut - start :] for response, cut, start in zip(responses, over, starts, strict=True))
    return tuple(kept), starts if any(starts) else ()


# ---------------------------------------------------------------- rows


def _labels(rows: Any, objectives: Sequence[str] | None, on_error: OnError) -> tuple[PreferenceData, list[int]]:
    """Return the labels of the rows, as lists of two texts that stand for the responses, and which rows have some.

    What TRL would not check is checked.
    """
    first = rows[0]

    def labelled(row: Mapping[str, Any]) -> PreferenceList:
        _check(row, first)
        # Only labels are wanted, with their checks: TRL trains on texts that a list may not have.
        return PreferenceList("prompt", SIDES, labels_of_row(row, objectives))

    report = ReadReport("rows", rows=len(rows))
    lists = collect(drafts_of(rows, labelled), report, objectives=objectives, on_error=on_error)
    return lists, places_of(lists)


def _texts(first: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which columns are texts or messages that TRL is to read, from the first row.

    Not a prompt in text beside answers in messages: these are whole conversations, whose beginning is the prompt, as
    TRL's own `maybe_extract_prompt` has it; its trainer fails there.
    """
    beside = isinstance(first.get("prompt"), str) and isinstance(first["chosen"], list)
    return ("prompt", *SIDES) if "prompt" in first and not beside else SIDES


def _check(row: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raise for a row whose tokens would be wrong without a word, or whose fault TRL would not name."""
    if error := formats.unread_column(row, _IMAGES):
        raise error
    if not isinstance(row.get("chat_template_kwargs", {}), Mapping):
        raise RowError("wrong type", "chat_template_kwargs is no dictionary; give each row one, or none to any")
    # TRL looks at the first row to see whether texts need an end token.
    wanted, other = ("a list of messages", str) if isinstance(first["chosen"], list) else ("a text", list)
    for name in _texts(first):
        value = row.get(name)
        if not isinstance(value, (str, list)) or isinstance(value, other):
            raise RowError(
                "wrong type", f"{name} is a {type(value).__name__} but must be {wanted}, as in the first row"
            )
        if value == [] and name != "prompt":
            raise RowError("no messages", f"{name} holds no message; a response needs one at least")
        if fault := text_fault(value):
            raise RowError("no Unicode text", f"{name} {fault}")
        for message in () if isinstance(value, str) else value:
            parts = message.get("content") if isinstance(message, Mapping) else None
            for part in () if parts is None or isinstance(parts, str) else parts:
                if isinstance(part, Mapping) and part.get("type", "text") != "text":
                    raise RowError("no text", f"{name} holds a part of type {part['type']!r}; only text can be trained")
    if "prompt" in _texts(first) and other is str and row["prompt"]:
        if all(row[side][: len(row["prompt"])] == row["prompt"] for side in SIDES):
            raise RowError("prompt twice", "chosen and rejected begin with the prompt; leave the column prompt out")


def _refused_rows(rows: Any, args: Any, processing_class: Any) -> dict[int, RowError]:
    """Return which rows the chat template refuses, and why: TRL does not say, so each is prepared by itself."""
    found = {}
    for number in range(len(rows)):
        row = rows[number]
        try:
            with template_refusals(*(row[name] for name in _texts(row) if isinstance(row[name], list))):
                _prepare([row], _in_one_process(args), processing_class)
        except RowError as error:
            found[number] = error
    return found


def _in_one_process(args: Any) -> Any:
    args = copy.copy(args)
    args.dataset_num_proc = None
    return args


class _Rows:
    """Rows in memory with what TRL calls of a stream of `datasets`.

    Arrow would give every row the keys of all others, filled with None, and templates may tell the two apart.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def map(self, function: Callable[..., Mapping[str, Any]], fn_kwargs: Mapping[str, Any] | None = None) -> _Rows:
        return _Rows([{**row, **function(dict(row), **(fn_kwargs or {}))} for row in self.rows])

    def filter(self, function: Callable[[Mapping[str, Any]], bool]) -> _Rows:
        return _Rows([row for row in self.rows if function(row)])


def _prepare(rows: Any, args: Any, processing_class: Any) -> Any:
    """Let TRL extract prompts, append end tokens, tokenise and leave out what is too long."""
    require("datasets", "trl")
    from datasets import Dataset
    from trl import DPOTrainer, __version__  # type: ignore[attr-defined]

    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if getattr(tokenizer, "eos_token", None) is None:
        raise ValueError("the tokenizer has no eos_token, which ends the responses of texts; set it")
    data: Any
    read = (*_texts(rows[0]), *_OPTIONS)
    if isinstance(rows, Dataset):
        data = rows.select_columns([name for name in rows.column_names if name in read])
        data = data.add_column(_ROW, list(range(len(rows))))  # type: ignore[call-arg]
    else:
        if args.dataset_num_proc is not None:
            raise ValueError(
                f"dataset_num_proc is {args.dataset_num_proc} but the rows are a {type(rows).__name__}; several "
                "processes tokenise a datasets.Dataset only"
            )
        data = _Rows(
            [{**{name: row[name] for name in read if name in row}, _ROW: number} for number, row in enumerate(rows)]
        )
    trainer: Any = object.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    prepare = getattr(trainer, "_prepare_dataset", None)
    prepared = prepare(data, processing_class, args, "train") if prepare is not None else None
    first = next(iter(prepared), None) if prepared is not None else None
    if prepared is None or (first is not None and not {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(first)):
        raise RuntimeError(
            f"TRL {__version__} prepares pairs in a way that is not known here (1.10 to 1.16 are); install one of "
            "those, or pass tokenization='mopl'"
        )
    return prepared
