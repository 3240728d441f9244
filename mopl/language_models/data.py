"""Preference data for language models: a prompt, K >= 2 responses, and labels for m objectives; text, before tokens.

A *prompt* is a text, or chat messages `({"role": ..., "content": ...}, ...)`; a *response* is a text, or the messages
that answer (usually one of the assistant). Lists may differ in K. Labels are real numbers, higher is better.

A label may be missing. `None` and NaN mean the same: this response was not judged under this objective. An objective
that is absent from a list's labels is missing for all its responses. Nothing is ever filled in: missing labels stay
NaN in `PreferenceData.label_array`, and the collator turns them into masks (`mopl.language_models.collate`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from mopl._files import write_file
from mopl._lines import text_fault
from mopl.language_models._bad_rows import (
    ON_ERROR,
    SHOWN,
    DataError,
    OnError,
    ReadReport,
    RowError,
    no_labels_for,
    refuse_text,
    template_refusals,
)
from mopl.language_models._list_fields import Message, Text, check_equal, read_labels, read_text

__all__ = [
    "DataError",
    "Message",
    "ON_ERROR",
    "OnError",
    "PreferenceData",
    "PreferenceList",
    "ReadReport",
    "RowError",
    "SHOWN",
    "Text",
    "collect",
    "concatenate",
    "template_refusals",
]

SPLIT_STREAM = 1_000_000_011  # a stream of random numbers of its own; the epochs of a run take small integers


@dataclass(frozen=True)
class PreferenceList:
    """One prompt, its K responses, and their labels.

    Args:
        prompt: text or chat messages.
        responses: K >= 2 texts or sequences of messages.
        labels: for each objective K numbers, higher is better; None where a response has no label. NaN is read as None.
        place: where it was read ("line 3"), for messages; no part of the data.

    Raises:
        RowError: if a prompt or response is empty, malformed or no Unicode text, there are fewer than two responses,
            an objective does not have K labels, a label is infinite, too large for float32, or no number, or two equal
            responses have different labels.
    """

    prompt: Text
    responses: tuple[Text, ...]
    labels: Mapping[str, tuple[float | None, ...]]
    place: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        # Frozen dataclasses are assigned through object: lists from JSON become tuples, NaN becomes None, once.
        object.__setattr__(self, "prompt", read_text(self.prompt, "prompt"))
        if isinstance(self.responses, (str, Mapping)) or not isinstance(self.responses, Sequence):
            raise RowError("wrong type", f"responses is a {type(self.responses).__name__} but must be a list")
        if len(self.responses) < 2:
            raise RowError("fewer than two responses", f"it has {len(self.responses)}")
        responses = tuple(read_text(response, "response", number) for number, response in enumerate(self.responses))
        object.__setattr__(self, "responses", responses)
        if not isinstance(self.labels, Mapping):
            raise RowError("wrong type", f"labels is a {type(self.labels).__name__} but must map objectives to lists")
        labels = {}
        for objective, values in self.labels.items():
            if values is None:  # tables write an absent objective so
                continue
            if fault := text_fault(objective):
                raise RowError("no Unicode text", f"the name of an objective {fault}")
            labels[str(objective)] = read_labels(objective, values, len(responses))
            check_equal(responses, str(objective), labels[str(objective)])
        if not any(value is not None for values in labels.values() for value in values):
            raise RowError("no labels", "no response has a label under any objective")
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.responses)

    def to_json(self) -> dict[str, Any]:
        """Return the list as what a line of a JSON lines file holds: `{"prompt", "responses", "labels"}`."""

        def plain(text: Text) -> Any:
            return text if isinstance(text, str) else [dict(message) for message in text]

        return {
            "prompt": plain(self.prompt),
            "responses": [plain(response) for response in self.responses],
            "labels": {objective: list(values) for objective, values in self.labels.items()},
        }


class PreferenceData(Sequence[PreferenceList]):
    """Lists of responses with labels for the same m objectives. Never changed after it is made.

    Args:
        lists: the lists, at least one.
        objectives: names and order of the m objectives; default the order in which the lists first name them. Labels
            under other names are left out.
        name: of the data set, for messages.
        report: what reading it gave.

    Raises:
        ValueError: if there is no list, an objective is named twice or never labelled, or a list has no label under
            any of the objectives.
    """

    def __init__(
        self,
        lists: Iterable[PreferenceList],
        objectives: Sequence[str] | None = None,
        *,
        name: str = "data",
        report: ReadReport | None = None,
    ) -> None:
        self.lists = tuple(lists)
        self.name, self.report = name, report
        if not self.lists:
            raise ValueError(f"{name} has no list; give it at least one")
        named = dict.fromkeys(objective for item in self.lists for objective in item.labels)
        refuse_text(objectives)
        self.objectives = tuple(named if objectives is None else objectives)
        if len(set(self.objectives)) != len(self.objectives) or not self.objectives:
            raise ValueError(f"objectives are {self.objectives} but must be different names, at least one")
        unknown = [objective for objective in self.objectives if objective not in named]
        if unknown:
            raise ValueError(no_labels_for(unknown, named, name))
        for number, item in enumerate(self.lists):
            if not any(value is not None for o in self.objectives for value in item.labels.get(o, ())):
                raise ValueError(
                    f"list {number} of {name} has no label under {', '.join(self.objectives)}, only under "
                    f"{', '.join(item.labels)}; leave it out, or name more objectives"
                )

    @classmethod
    def _trusted(cls, lists: tuple[PreferenceList, ...], objectives: tuple[str, ...], name: str) -> PreferenceData:
        """Make a part of checked data; a small part may well have no label under some objective."""
        data = cls.__new__(cls)
        data.lists, data.objectives, data.name, data.report = lists, objectives, name, None
        return data

    def __len__(self) -> int:
        return len(self.lists)

    @overload
    def __getitem__(self, index: int) -> PreferenceList: ...
    @overload
    def __getitem__(self, index: slice) -> PreferenceData: ...
    def __getitem__(self, index: int | slice) -> PreferenceList | PreferenceData:
        if isinstance(index, slice):
            return PreferenceData._trusted(self.lists[index], self.objectives, self.name)
        return self.lists[index]

    def label_array(self, index: int) -> np.ndarray:
        """Return the labels of a list, float32 (m, K), NaN where missing.

        Args:
            index: Place of the list in the data.
        """
        item = self.lists[index]
        rows = [item.labels.get(objective) or (None,) * len(item) for objective in self.objectives]
        return np.array([[math.nan if value is None else value for value in row] for row in rows], dtype=np.float32)

    def split(self, fraction: float, *, seed: int = 0) -> tuple[PreferenceData, PreferenceData]:
        """Split at random into a part of `fraction` of the lists and the rest; lists of one prompt stay together.

        Args:
            fraction: share of the second part, between 0 and 1; both parts get at least one prompt.
            seed: of the permutation.

        Returns:
            (the larger rest for training, the part of `fraction` held out).

        Raises:
            ValueError: if `fraction` is not between 0 and 1, or there is only one prompt.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction is {fraction} but must lie between 0 and 1")
        keys = [json.dumps(item.to_json()["prompt"], sort_keys=True) for item in self.lists]
        prompts = list(dict.fromkeys(keys))
        if len(prompts) < 2:
            raise ValueError(f"{self.name} has one prompt only and cannot be split")
        bits = np.random.Philox(np.random.SeedSequence([seed, SPLIT_STREAM]))
        shuffled = np.random.Generator(bits).permutation(len(prompts))
        count = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)
        held = {prompts[number] for number in shuffled[:count]}
        parts = ([], [])
        for key, item in zip(keys, self.lists, strict=True):
            parts[key in held].append(item)
        return (
            PreferenceData._trusted(tuple(parts[0]), self.objectives, f"{self.name} (train)"),
            PreferenceData._trusted(tuple(parts[1]), self.objectives, f"{self.name} (held out)"),
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 of objectives, prompts, responses and labels: what is stored beside data can be checked."""
        digest = hashlib.sha256(json.dumps(self.objectives).encode())
        for item in self.lists:
            digest.update(json.dumps(item.to_json(), sort_keys=True, ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return counts: lists, responses, lengths of lists, and for each objective how many lists are labelled.

        Returns:
            `{"lists", "responses", "list_sizes": {K: count}, "objectives": {name: {"complete", "partial", "missing"}}}`
        """
        sizes = Counter(len(item) for item in self.lists)
        objectives = {objective: {"complete": 0, "partial": 0, "missing": 0} for objective in self.objectives}
        for item in self.lists:
            for objective, counts in objectives.items():
                labelled = sum(value is not None for value in item.labels.get(objective, ()))
                counts["missing" if labelled == 0 else "complete" if labelled == len(item) else "partial"] += 1
        return {
            "lists": len(self),
            "responses": sum(len(item) for item in self.lists),
            "list_sizes": dict(sorted(sizes.items())),
            "objectives": objectives,
        }

    def write_jsonl(self, path: str | Path) -> None:
        """Write one list a line: `{"prompt", "responses": [...], "labels": {objective: [...]}}`.

        Args:
            path: the file, compressed by gzip if it ends in .gz; one that is there is replaced.

        Raises:
            OSError: if it cannot be written.
        """

        def fill(place: Path) -> None:
            open_text = gzip.open if place.suffix == ".gz" else open
            with open_text(place, "wt", encoding="utf-8") as file:
                for item in self.lists:
                    file.write(json.dumps(item.to_json(), ensure_ascii=False, allow_nan=False) + "\n")

        write_file(path, fill)


def concatenate(datasets: Sequence[PreferenceData], *, name: str = "data") -> PreferenceData:
    """Put data sets one after another; their objectives are united, and what a data set lacks is missing in its lists.

    So pairs judged for helpfulness and other pairs judged for harmlessness become one data set of two objectives.

    Args:
        datasets: the data sets; objectives are in the order in which these first name them.
        name: of the result, for messages.

    Returns:
        A new data set of all lists.

    Raises:
        ValueError: if there is no list.
    """
    objectives = tuple(dict.fromkeys(objective for data in datasets for objective in data.objectives))
    kept = [
        PreferenceList(
            item.prompt, item.responses, {o: item.labels[o] for o in data.objectives if o in item.labels}, item.place
        )
        for data in datasets
        for item in data
    ]
    return PreferenceData(kept, objectives or None, name=name)


def collect(
    drafts: Iterator[tuple[str, PreferenceList | RowError]],
    report: ReadReport,
    *,
    objectives: Sequence[str] | None = None,
    on_error: OnError = "raise",
) -> PreferenceData:
    """Make a data set of what a reader yields.

    Args:
        drafts: pairs of a place ("line 3") and the list that was read there, or the error.
        report: where errors and lists are counted.
        objectives: which labels to take, and their order; by default all.
        on_error: "raise" or "skip" rows that cannot be used.

    Raises:
        DataError: see `ReadReport.settle`; or if no list has labels under any of the objectives.
    """
    refuse_text(objectives)
    lists: list[PreferenceList] = []
    named: dict[str, None] = {}
    for place, draft in drafts:
        if isinstance(draft, PreferenceList) and objectives is not None:
            named |= dict.fromkeys(draft.labels)
            labelled = any(value is not None for o in objectives for value in draft.labels.get(o, ()))
            if not labelled:
                draft = RowError("no labels", f"none under {', '.join(objectives)}, only {', '.join(draft.labels)}")
        if isinstance(draft, RowError):
            report.add(place, draft)
        else:
            object.__setattr__(draft, "place", place)  # a fault that shows later is still named by where it stands
            lists.append(draft)
    report.lists = len(lists)
    if named and objectives is not None and not any(objective in named for objective in objectives):
        raise DataError(no_labels_for(objectives, named, report.source))  # no row is to blame
    report.settle(on_error)
    return PreferenceData(lists, objectives, name=report.source, report=report)
