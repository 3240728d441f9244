"""Lists of texts as a sequence classifier sees them: tokens of each prompt with each response, labels, batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl.integrations._data import BETA, REFERENCE_COLUMNS, WEIGHTS, is_pair, lists_of, places_of, without_format
from mopl.integrations._streams import is_stream
from mopl.language_models.data import OnError, PreferenceData, PreferenceList, ReadReport, RowError, template_refusals
from mopl.language_models.tokenization import TokenizedData
from mopl.rewards.writing import SequenceWriter

MARGIN = "margin"  # TRL's column for pairs
BESIDE = ("weights", "beta", "margin")
_FILL = {"attention_mask": 0, "token_type_ids": 0}


@dataclass(frozen=True, eq=False)
class ScoredList:
    """One list: K sequences of tokens, their labels, and what stands beside them."""

    sequences: list[dict[str, list[int]]]  # what the tokenizer made of each
    labels: np.ndarray  # (m, K) float32, NaN where one is missing
    index: int  # which row of the data
    weights: np.ndarray | None = None  # (m,) its own w
    beta: np.ndarray | None = None  # (m,) its own β
    margin: float | None = None


class ScoredLists(torch.utils.data.Dataset):
    """The data set that `RewardListTrainer` runs on."""

    def __init__(self, lists: Sequence[ScoredList], objectives: Sequence[str]) -> None:
        self.lists, self.objectives = tuple(lists), tuple(objectives)

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, index: int) -> ScoredList:
        return self.lists[index]


@dataclass(frozen=True, eq=False)
class Texts:
    """Lists before they are tokens, and what stands beside each: keywords of `ScoredList`."""

    lists: PreferenceData
    beside: list[dict[str, Any]]

    def write(self, writer: SequenceWriter, on_error: OnError = "raise") -> ScoredLists:
        """Return the tokens that a classifier sees; lists that cannot be written are named, and left out if asked."""
        report, found = ReadReport(f"{self.lists.name} (tokens)", rows=len(self.lists)), []
        for number, item in enumerate(self.lists):
            try:
                rows = _sequences(item, writer)
            except RowError as error:
                report.add(item.place or f"list {number + 1}", error)
                continue
            found.append(ScoredList(rows, self.lists.label_array(number), number, **self.beside[number]))
        report.lists = len(found)
        if report.errors:
            report.settle(on_error)
        return ScoredLists(found, self.lists.objectives)


def _sequences(item: PreferenceList, writer: SequenceWriter) -> list[dict[str, list[int]]]:
    """Return the tokens of each response of a list; a `RowError` if there are none, or a template refuses it."""
    texts = []
    for response in item.responses:
        with template_refusals(item.prompt, response):
            texts.append(writer.text(response, item.prompt))
    tokens = writer.tokens(texts)
    rows = [{key: tokens[key][place] for key in tokens} for place in range(len(item))]
    empty = next((place for place, row in enumerate(rows) if not row["input_ids"]), None)
    if empty is not None:
        raise RowError("empty response", f"response {empty} has no tokens")
    return rows


def read_texts(data: Any, *, objectives: Sequence[str] | None, on_error: OnError) -> Texts:
    """Read what a trainer was given; see `RewardListTrainer` for the arguments."""
    if isinstance(data, TokenizedData):
        raise TypeError(
            "the data set is TokenizedData, whose tokens are those of a language model; pass the texts, PreferenceData "
            "or rows, which are written as the classifier will see them"
        )
    data = without_format(data)
    if is_stream(data):
        raise TypeError(
            f"the data set is a {type(data).__name__}, a stream, which this trainer does not read; pass rows that can "
            "be counted, such as a datasets.Dataset"
        )
    lists, beside = lists_of(data, objectives, on_error)
    if any("reference" in extra for extra in beside):
        raise ValueError(
            f"the data has the columns {', '.join(REFERENCE_COLUMNS)}, log-probabilities of a reference, which a score "
            "does not have; leave them out"
        )
    margins = _margins(data, lists, objectives)
    return Texts(lists, [{**extra, "margin": margin} for extra, margin in zip(beside, margins, strict=True)])


def _margins(data: Any, lists: PreferenceData, objectives: Sequence[str] | None) -> list[float | None]:
    """Return TRL's margin of each pair, where rows of pairs have one that is no objective."""
    first = data[0] if len(data) and not hasattr(data, "objectives") else None
    if not isinstance(first, Mapping) or MARGIN not in first or MARGIN in (objectives or ()) or not is_pair(first):
        return [None] * len(lists)
    return [float(data[place][MARGIN]) for place in places_of(lists)]


class ScoredListCollator:
    """Makes the dictionary of a batch: tokens (N, T) of all sequences, and labels and masks of the lists."""

    def __init__(self, tokenizer: Any, pad_to_multiple_of: int | None = None) -> None:
        self.pad_id, self.left = tokenizer.pad_token_id, tokenizer.padding_side == "left"
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, examples: Sequence[ScoredList]) -> dict[str, Any]:
        """Make a batch of these lists; raise if only some have weights, β or a margin of their own."""
        width = max(len(example.sequences) for example in examples)
        objectives = len(examples[0].labels)
        labels = np.full((len(examples), objectives, width), np.nan, dtype=np.float32)
        exists = np.zeros((len(examples), width), dtype=bool)
        for row, example in enumerate(examples):
            labels[row, :, : len(example.sequences)] = example.labels
            exists[row, : len(example.sequences)] = True
        mask = ~np.isnan(labels)
        # A tensor with one row a list comes first: trainers read the size of a batch from the first entry.
        batch: dict[str, Any] = {
            "list_labels": torch.from_numpy(np.where(mask, labels, np.float32(0))),
            "list_mask": torch.from_numpy(mask),
            "list_exists": torch.from_numpy(exists),
        }
        for name in BESIDE:
            values = [getattr(example, name) for example in examples]
            if any(value is None for value in values):
                if any(value is not None for value in values):
                    columns = {"weights": WEIGHTS, "beta": BETA, "margin": MARGIN}
                    raise ValueError(
                        f"some lists of a batch have {columns[name]} and some have none; give it to all rows or to none"
                    )
                continue
            batch[f"list_{name}"] = torch.from_numpy(np.array(values, dtype=np.float32))
        batch["list_index"] = torch.from_numpy(np.argwhere(exists))
        rows = [row for example in examples for row in example.sequences]
        longest = -(-max(len(row["input_ids"]) for row in rows) // self.multiple) * self.multiple
        for key in rows[0]:
            padded = np.full((len(rows), longest), _FILL.get(key, self.pad_id), dtype=np.int64)
            for place, row in enumerate(rows):
                size = len(row[key])
                padded[place, longest - size if self.left else 0 :][:size] = row[key]
            batch[key] = torch.from_numpy(padded)
        return batch


def tokens_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the model takes of a batch."""
    return {key: value for key, value in batch.items() if not key.startswith("list_")}


def parts_of(tokens: Mapping[str, Tensor], size: int) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Cut sequences into mini-batches of like length, without the padding that all of one have.

    Returns:
        The mini-batches, and which place in them, one after the other, each sequence has (N,).
    """
    lengths = tokens["attention_mask"].sum(-1)
    order = lengths.argsort(stable=True)
    parts = list(_cut(tokens, order.split(size)))
    return parts, order.argsort()


def _cut(tokens: Mapping[str, Tensor], chosen: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
    for rows in chosen:
        used = tokens["attention_mask"][rows].any(0).nonzero()[:, 0]
        first, last = int(used[0]), int(used[-1]) + 1
        yield {key: value[rows, first:last] for key, value in tokens.items()}
