"""What trainers are given, as lists of tokens; and batches as the dictionaries of tensors that trainers pass around.

Log-probabilities of the reference, weights of the objectives and β of its own may stand beside a list. They come from
columns of a data set's rows and end as entries of the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl._counted import counted
from mopl.conditioning.sampling import check_weights
from mopl.language_models import formats
from mopl.language_models.collate import ListBatch, ListCollator
from mopl.language_models.data import OnError, PreferenceData, PreferenceList, ReadReport, RowError, collect
from mopl.language_models.readers import FORMATS, detect_format, load_preferences
from mopl.language_models.tokenization import ListTokenizer, TokenizedData, TokenizedList, tokenize

WEIGHTS, BETA = "objective_weights", "objective_beta"
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
PREFERENCE = "preference"
SIDES = ("chosen", "rejected")


@dataclass(frozen=True, eq=False)
class Example:
    """One list of tokens and what stands beside it, if anything does."""

    tokens: TokenizedList
    reference: np.ndarray | None = None  # (K,) float32, log-probabilities under the reference in nats
    weights: np.ndarray | None = None  # (m,) its own w
    beta: np.ndarray | None = None  # (m,) its own β

    def __post_init__(self) -> None:
        if self.reference is not None and len(self.reference) != len(self.tokens.responses):
            raise ValueError(
                f"row {self.tokens.index + 1} has {len(self.reference)} log-probabilities of the reference but "
                f"{counted(len(self.tokens.responses), 'response')}; give one for each"
            )


class Examples(torch.utils.data.Dataset):
    """The data set that the trainers run on: lists of tokens for m objectives, made of so many `rows`."""

    def __init__(self, lists: Sequence[Example], objectives: Sequence[str], *, rows: int | None = None) -> None:
        if len(lists) == 0:
            raise ValueError("the data set has no list; give it at least one")
        self.lists, self.objectives = tuple(lists), tuple(objectives)
        self.rows = len(self.lists) if rows is None else rows

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, index: int) -> Example:
        return self.lists[index]

    @property
    def width(self) -> int:
        """Responses of the longest list."""
        return max(len(example.tokens.responses) for example in self.lists)

    @property
    def has_reference(self) -> bool:
        """Whether every list has log-probabilities of the reference."""
        return all(example.reference is not None for example in self.lists)

    def with_reference(self, reference: Tensor) -> Examples:  # (L, K)
        """Return the data with log-probabilities of the reference beside each list."""
        rows = reference.cpu().float().numpy()
        lists = [
            dataclasses.replace(example, reference=row[: len(example.tokens.responses)])
            for example, row in zip(self.lists, rows, strict=True)
        ]
        return Examples(lists, self.objectives, rows=self.rows)


# ---------------------------------------------------------------- reading


def examples_of(
    data: Any,
    *,
    processing_class: Any,
    objectives: Sequence[str] | None = None,
    max_length: int | None = 1024,
    template: str = "auto",
    on_error: OnError = "raise",
    table: bool = False,
) -> Examples:
    """Turn what a trainer was given into lists of tokens; see `MultiObjectiveTrainer` for the arguments.

    `table` says that rows in a list are of a table, as those of a stream may be.
    """
    if isinstance(data, Examples):
        return data
    if isinstance(data, TokenizedData):
        if objectives is not None and tuple(objectives) != data.objectives:
            raise ValueError(
                f"objectives are {tuple(objectives)} but the tokenised data has {data.objectives}; name the same"
            )
        return Examples([Example(item) for item in data], data.objectives)
    lists, beside = lists_of(data, objectives, on_error, table)
    if processing_class is None:
        raise ValueError("processing_class is missing; pass the tokenizer, or TokenizedData")
    how: Any = template
    tokens = tokenize(lists, ListTokenizer(processing_class, max_length=max_length, template=how), on_error=on_error)
    return Examples([Example(item, **beside[item.index]) for item in tokens], tokens.objectives, rows=len(lists))


def lists_of(
    data: Any, objectives: Sequence[str] | None, on_error: OnError, table: bool = False
) -> tuple[PreferenceData, list[dict[str, Any]]]:
    """Return what a trainer was given as lists of texts, and what stands beside each: keywords of `Example`."""
    if isinstance(data, PreferenceData):
        lists = data if objectives is None else PreferenceData(data.lists, objectives, name=data.name)
    else:
        rows = _rows(data)
        if not isinstance(rows[0], PreferenceList):
            return _read_rows(rows, objectives, on_error, table or formats.is_table(rows))
        lists = PreferenceData(rows, objectives)
    return lists, [{} for _ in lists]


def is_rows(data: Any) -> bool:
    """Say whether data are a sequence of rows that can be counted, not a stream, a name or a mapping."""
    return not isinstance(data, (str, Mapping)) and hasattr(data, "__len__") and hasattr(data, "__getitem__")


def without_format(data: Any) -> Any:
    """Return a data set of `datasets` whose rows hold numbers, texts and lists, not the arrays or tables of a format.

    A transform of the user's own stays; other data are returned as they are.
    """
    form = getattr(data, "format", {"type": "of a stream"})
    if not hasattr(data, "with_format") or form["type"] in (None, "custom"):
        return data
    shown = {} if form.get("output_all_columns", True) else {"columns": form["columns"]}
    return data.with_format(None, **shown)


def is_pairs(data: Any) -> bool:
    """Say whether data are rows that TRL's `DPOTrainer` would read."""
    first = next(iter(data), None) if isinstance(data, Iterable) and not isinstance(data, Iterator) else None
    return not isinstance(data, Mapping) and isinstance(first, Mapping) and is_pair(first)


def _rows(data: Any) -> Sequence[Any]:
    if not is_rows(data):
        raise TypeError(
            f"the data set is a {type(data).__name__} but must be PreferenceData, TokenizedData, a datasets.Dataset or "
            "IterableDataset, or a list of rows; files, and data sets by name, are read by "
            "mopl.language_models.load_preferences"
        )
    if len(data) == 0:
        raise ValueError("the data set has no rows; give it at least one")
    return data


def _read_rows(
    rows: Sequence[Any], objectives: Sequence[str] | None, on_error: OnError, table: bool
) -> tuple[PreferenceData, list[dict[str, Any]]]:
    """Read rows of a data set, and the columns that stand beside each list."""
    if not isinstance(rows[0], Mapping):
        raise TypeError(f"rows of the data set are {type(rows[0]).__name__} but must be dictionaries or PreferenceList")
    written: Iterable[Any] = map(formats.without_gaps, rows) if table else rows
    if is_pair(rows[0]):
        report = ReadReport("rows", rows=len(rows))
        drafts = drafts_of(written, lambda row: _pair(row, objectives))
        lists = collect(drafts, report, objectives=objectives, on_error=on_error)
    else:
        lists = load_preferences(written, objectives=objectives, on_error=on_error)
    return lists, beside_of(rows, lists)


def beside_of(rows: Sequence[Any], lists: PreferenceData) -> list[dict[str, Any]]:
    """Return what stands beside each list that rows made, as keywords of `Example`; raise where that is unknown."""
    # Rows of a table all have its columns; dictionaries in a list may have others than the first.
    some = [rows[0]] if formats.is_table(rows) else rows
    names = [name for name in (WEIGHTS, BETA, *REFERENCE_COLUMNS) if any(name in row for row in some)]
    if not names:
        return [{} for _ in lists]
    places = places_of(lists)
    kind = None if is_pair(rows[0]) else FORMATS[detect_format(rows[0])]
    if kind is not None and kind.group is not None and len(set(places)) < len(rows):
        raise ValueError(
            f"the rows have the columns {', '.join(names)} but {len(rows)} rows made {len(lists)} lists, so it is "
            "unknown which belongs to which; write one list a row"
        )
    sides = kind is None or set(kind.columns) >= set(SIDES)
    return [_beside(rows[place], len(lists.objectives), place + 1, sides) for place in places]


def places_of(lists: PreferenceData) -> list[int]:
    """Return which of the rows each list was made of, from 0: of several rows the first."""
    return [int(item.place.removeprefix("row ")) - 1 for item in lists]


def is_pair(row: Mapping[str, Any]) -> bool:
    """Say whether a row has TRL's preference format: `chosen`, `rejected`, and a prompt, or the prompt inside them.

    Other formats have these columns too, and the prompt in another: `instruction`, `conversations`.
    """
    return set(row) >= set(SIDES) and ("prompt" in row or detect_format(row) == "pairs")


def _pair(row: Mapping[str, Any], objectives: Sequence[str] | None) -> PreferenceList:
    if error := formats.unread_column(row):
        raise error
    return dataclasses.replace(formats.pair_of(row), labels=labels_of_row(row, objectives))


def drafts_of(
    rows: Iterable[Any], make: Callable[[Any], PreferenceList]
) -> Iterator[tuple[str, PreferenceList | RowError]]:
    """Yield where each row stands, and the list that is made of it or why it cannot be used."""
    for number, row in enumerate(rows, 1):
        try:
            yield f"row {number}", make(row)
        except RowError as error:
            yield f"row {number}", error


def labels_of_row(
    row: Mapping[str, Any], objectives: Sequence[str] | None
) -> dict[str, tuple[float | None, float | None]]:
    """Return the labels of a pair under each objective, see `labels_of_pair`; where none is named, chosen is better.

    Many data sets have a column `preference` that is no label, such as the number or the name of the better response,
    so it is not guessed what it means.
    """
    if objectives is None and PREFERENCE in row and not all(f"{PREFERENCE}_{side}" in row for side in SIDES):
        raise RowError(
            "column preference that objectives does not name",
            f"{PREFERENCE} is {row[PREFERENCE]!r}; pass objectives=['{PREFERENCE}'] if it is a label (positive: chosen "
            "is better), or leave the column out",
        )
    return {name: labels_of_pair(row, name) for name in objectives or (PREFERENCE,)}


def labels_of_pair(row: Mapping[str, Any], objective: str) -> tuple[float | None, float | None]:
    """Return the labels of chosen and rejected under an objective.

    In the columns `<objective>_chosen` and `<objective>_rejected`, two numbers. Else in the column `<objective>`: two
    numbers, or one, whose sign says which response is better (positive: chosen) and whose size by how much. None and
    NaN are missing labels. One truth value is a `RowError`: as a number, False would be a tie. Without a column, the
    objective `preference` prefers chosen, and others are a `RowError`.
    """
    columns = [f"{objective}_{side}" for side in SIDES]
    if all(column in row for column in columns):
        value: Any = [row[column] for column in columns]
    elif objective in row:
        value = row[objective]
    elif objective == PREFERENCE:
        return 1.0, 0.0
    else:
        raise RowError(
            "no label column",
            f"objective {objective} needs a column {objective}, or {columns[0]} and {columns[1]}; "
            f"there are {', '.join(map(str, row))}",
        )
    if hasattr(value, "tolist"):  # arrays, tensors and their numbers
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise RowError("label list of another length", f"{objective} has {counted(len(value), 'label')} for a pair")
        first, second = (side.tolist() if hasattr(side, "tolist") else side for side in value)
        return first, second
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None, None
    if isinstance(value, (bool, np.bool_)):
        raise RowError(
            "label is a truth value",
            f"{objective} is {value}; write 1 where chosen is better, -1 where rejected is, 0 for a tie",
        )
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise RowError("label is not a number", f"{objective} is {value!r}")
    value = float(value)
    return (1.0, 1.0) if value == 0 else (max(value, 0.0), max(-value, 0.0))


def _beside(row: Mapping[str, Any], objectives: int, number: int, sides: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if row.get(WEIGHTS) is not None:
        weights = check_weights(row[WEIGHTS], objectives, name=f"{WEIGHTS} of row {number}")
        found["weights"] = weights.float().numpy()
    if row.get(BETA) is not None:
        beta = np.asarray(row[BETA], dtype=np.float32)
        if beta.shape != (objectives,) or not (np.isfinite(beta) & (beta > 0)).all():
            wanted = counted(objectives, "positive number")
            raise ValueError(f"{BETA} of row {number} is {row[BETA]} but must be {wanted}")
        found["beta"] = beta
    if all(row.get(name) is not None for name in REFERENCE_COLUMNS):
        if not sides:
            raise ValueError(
                f"row {number} has {', '.join(REFERENCE_COLUMNS)} but no columns chosen and rejected that they could "
                "belong to; leave them out (precompute_ref_log_probs computes the reference once), or write pairs"
            )
        found["reference"] = np.array([row[name] for name in REFERENCE_COLUMNS], dtype=np.float32)
        if not np.isfinite(found["reference"]).all():
            raise ValueError(
                f"{', '.join(REFERENCE_COLUMNS)} of row {number} are {found['reference'].tolist()} but must be finite"
            )
    return found


# ---------------------------------------------------------------- batches


@dataclass(frozen=True, eq=False)
class Extras:
    """What stands beside the lists of a batch."""

    reference: Tensor | None = None  # (B, K) float32, 0 where no response is
    weights: Tensor | None = None  # (B, m)
    beta: Tensor | None = None  # (B, m)


_FIELDS = tuple(entry.name for entry in dataclasses.fields(ListBatch) if entry.name != "inputs")
_EXTRAS = tuple(entry.name for entry in dataclasses.fields(Extras))


class ExampleCollator:
    """Makes the dictionary of a batch, whose lists a `ListCollator` arranges; `batch_of` reads it."""

    def __init__(self, collator: ListCollator) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Make a batch of these lists; raise if only some have a reference, weights or β of their own."""
        batch = self.collator([example.tokens for example in examples])
        # A tensor with one row a list comes first: trainers read the size of a batch from the first entry.
        flat = {f"list_{name}": value for name in _FIELDS if (value := getattr(batch, name)) is not None}
        for name in _EXTRAS:
            values = [getattr(example, name) for example in examples]
            if all(value is None for value in values):
                continue
            if any(value is None for value in values):
                raise ValueError(f"some lists of a batch have {name} of their own and some have none; give all or none")
            width = batch.mask.shape[1] if name == "reference" else len(values[0])
            padded = np.zeros((len(values), width), dtype=np.float32)
            for row, value in enumerate(values):
                padded[row, : len(value)] = value
            flat[f"list_{name}"] = torch.from_numpy(padded)
        # "labels" would be taken for targets of a language model by transformers.
        return flat | {"token_labels" if key == "labels" else key: value for key, value in batch.inputs.items()}


def batch_of(inputs: Mapping[str, Any]) -> tuple[ListBatch, Extras]:
    """Return the batch, and what stands beside its lists, from the dictionary of an `ExampleCollator`."""
    missing = [f"list_{name}" for name in _FIELDS if f"list_{name}" not in inputs and name != "order"]
    if missing:
        raise ValueError(f"the batch has no {', '.join(missing)}; leave data_collator out, or pass a ListCollator")
    lists: dict[str, Any] = {name: inputs.get(f"list_{name}") for name in _FIELDS}
    beside = {name: inputs.get(f"list_{name}") for name in _EXTRAS}
    tokens = {key: value for key, value in inputs.items() if not key.startswith("list_")}
    tokens["labels"] = tokens.pop("token_labels")
    return ListBatch(inputs=tokens, **lists), Extras(**beside)
