"""Prompts to answer: read from text, JSON lines or preference data, split, and cut into batches by the step number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mopl._counted import counted
from mopl._lines import TextError, byte_lines, decode, text_fault
from mopl.clp.config import ClpConfig
from mopl.conditioning import samplers
from mopl.language_models.data import OnError, ReadReport, RowError, Text
from mopl.language_models.formats import Format, prompt_of, unread_column
from mopl.language_models.readers import format_of, load_preferences, rows_of_json
from mopl.language_models.tokenization import ListTokenizer
from mopl.rewards import prompt_key
from mopl.training import part_of_batch, shuffled_indices

WANTED = (
    'each line must be an object with a prompt, such as {"prompt": "How do I make tea?"} or {"prompt": [{"role": '
    '"user", "content": "Hello"}]}, or all must be preference data of a known format'
)


@dataclass(frozen=True)
class Prompts:
    """Prompts of one part of the data."""

    texts: tuple[Text, ...]  # texts, or chat messages
    tokens: tuple[tuple[int, ...], ...]  # the tokens of each, as the model gets them to answer

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """Return a SHA-256 of texts and tokens."""
        digest = hashlib.sha256()
        for text, tokens in zip(self.texts, self.tokens, strict=True):
            digest.update(json.dumps([prompt_key(text), list(tokens)]).encode())
        return digest.hexdigest()

    def at(self, places: Iterable[int]) -> Prompts:
        """Return those at these places, in this order."""
        rows = list(places)
        return Prompts(tuple(self.texts[i] for i in rows), tuple(self.tokens[i] for i in rows))

    def first(self, count: int) -> Prompts:
        """Return the first of them, at most `count`."""
        return self.at(range(min(count, len(self))))

    def repeated(self, times: int) -> Prompts:
        """Return each of them several times, side by side."""
        return self.at(i for i in range(len(self)) for _ in range(times))


def placed_prompts(source: str, *, limit: int | None = None, on_error: OnError = "raise") -> list[tuple[str, Text]]:
    """Return the different prompts of a source, in its order, each behind the place where it was read.

    Args:
        source: A `.txt` file with a prompt a line; a `.jsonl` file of objects with `"prompt"` (a text or messages) and
            whatever else; or anything that `mopl.alignment.load_preferences` reads.
        limit: Return no more than this many.
        on_error: `"raise"` refuses a file with lines that hold no prompt, all of them named; `"skip"` leaves them out
            and logs their counts.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If there are no prompts, or lines without one (see `on_error`).
    """
    path = Path(source)
    rows = {".txt": _text_rows, ".jsonl": _prompt_rows}.get(path.suffix)
    found = _settled(path, rows(path), on_error) if rows is not None and path.is_file() else None
    if found is None:
        found = [(item.place, item.prompt) for item in load_preferences(source, on_error=on_error)]
    different: dict[str, tuple[str, Text]] = {}
    for place, prompt in found:
        # The place is that of the first of equal prompts, as their order is.
        different.setdefault(prompt_key(prompt), (place, prompt))
    prompts = list(different.values())[:limit]
    if len(prompts) < 2:
        raise ValueError(f"{source} has {counted(len(prompts), 'prompt')} but training and evaluation need one each")
    return prompts


Placed = tuple[str, Text | RowError]


def _settled(path: Path, rows: Iterable[Placed | None], on_error: OnError) -> list[tuple[str, Text]] | None:
    """Count what holds no prompt and raise or go on as asked; None where the file is preference data instead."""
    report = ReadReport(str(path), what="prompts")
    found: list[tuple[str, Text]] = []
    for row in rows:
        if row is None:
            return None
        report.rows += 1
        place, prompt = row
        if isinstance(prompt, RowError):
            report.add(place, prompt)
        else:
            found.append((place, prompt))
    report.lists = len(found)
    if report.errors:
        report.settle(on_error)
    return found


def _text_rows(path: Path) -> Iterator[Placed]:
    for number, line in byte_lines(path):
        try:
            text = decode(line)
        except TextError as error:
            yield f"line {number}", RowError("no UTF-8 text", str(error))
            continue
        if text.strip():
            yield f"line {number}", text


def _prompt_rows(path: Path) -> Iterator[Placed | None]:
    """Yield the prompts of JSON lines, and None where a row is preference data of a known format without such a prompt.

    That of preference data is what the reader of its format makes of it, whichever kind of file it stands in.
    """
    for place, row in rows_of_json(path):
        if isinstance(row, RowError):
            yield place, row
            continue
        entry = format_of(row) if isinstance(row, dict) else None
        if entry is not None and _asks_elsewhere(row, entry):
            yield None
            continue
        try:
            yield place, _prompt_of(row, entry)
        except RowError as error:
            yield place, error


def _asks_elsewhere(row: Mapping[str, Any], entry: Format) -> bool:
    """Say whether the reader of a format finds the prompt in another column than `prompt`, or inside of this one."""
    read = row.get("prompt") is not None if entry.name == "pairs" else "prompt" in entry.columns
    return not read or isinstance(row["prompt"], dict) or entry.name == "oasst-trees"


def _prompt_of(row: Any, entry: Format | None) -> Text:
    """Return the prompt of a row; raise a `RowError` where there is none, or no model can be asked it."""
    if (wrong := _what_is_wrong(row)) is not None:
        raise RowError("no prompt", f"it {wrong}; {WANTED}")
    return prompt_of(row, None if entry is None else entry.name)


def _what_is_wrong(row: Any) -> str | None:
    """Return what a row lacks that should hold a prompt, or None."""
    if not isinstance(row, dict):
        return f"is a {type(row).__name__} and not an object"
    if "prompt" not in row:
        return f"has no prompt (it has {', '.join(sorted(row)) or 'nothing'})"
    if error := unread_column(row):
        return f"has {error.detail}"
    prompt = row["prompt"]
    if fault := text_fault(prompt):
        return f"has a prompt that {fault}"
    if isinstance(prompt, str):
        return None if prompt.strip() else "has an empty prompt"
    if not isinstance(prompt, list):
        return f"has a prompt that is neither a text nor a list of messages but {json.dumps(prompt)[:40]}"
    if not prompt:
        return "has an empty prompt"
    for place, message in enumerate(prompt, start=1):
        if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & set(message):
            return f"has a prompt whose message {place} has no role or no content"
    return None


def split_prompts(
    placed: Sequence[tuple[str, Text]], tokenizer: ListTokenizer, config: ClpConfig
) -> tuple[dict[str, Prompts], int]:
    """Return the prompts of training and of evaluation as `"train"` and `"test"`, and how many were too long.

    Args:
        placed: The prompts, each behind the place where it was read.
        tokenizer: How they become tokens.
        config: Settings; its `on_error` says what becomes of prompts that have no tokens or that the chat template
            refuses.

    Raises:
        ValueError: If prompts cannot be answered (see `on_error`), or fewer than two are short enough.
    """
    texts: list[Text] = []
    kept: list[tuple[int, ...]] = []
    report = ReadReport(f"{config.data} (tokens)", rows=len(placed), what="prompts")
    for place, text in placed:
        try:
            tokens = tuple(int(t) for t in tokenizer.prompt_tokens(text))
            if not tokens:
                raise RowError(
                    "empty prompt", f"{prompt_key(text)!r} has no tokens, and the tokenizer adds none in front"
                )
        except RowError as error:
            report.add(place, error)
            continue
        report.lists += 1
        if len(tokens) <= config.max_prompt:
            texts.append(text)
            kept.append(tokens)
    if report.errors:
        report.settle(config.on_error)
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} of {report.lists} prompts have at most {config.max_prompt} tokens; raise max_prompt"
        )
    order = np.random.default_rng(config.data_seed).permutation(len(kept))
    held = min(max(1, round(config.held_out * len(kept))), len(kept) - 1)
    parts = {"train": sorted(order[held:].tolist()), "test": order[:held].tolist()}
    whole = Prompts(tuple(texts), tuple(kept))
    return {name: whole.at(rows) for name, rows in parts.items()}, report.lists - len(kept)


@dataclass(frozen=True)
class PromptBatch:
    """One part of a step's prompts with the trade-offs at which they are answered."""

    prompts: Prompts  # P prompts
    weights: Tensor  # (P, m) float32; where rollouts are shared (K, m), of the trade-offs of the step
    kl_weight: Tensor  # (P,) float32, or (K,)
    step: int  # the step whose rollout this is: the first of its `epochs`
    part: int  # which part of the step it is, of `parts`
    parts: int  # parts of the step
    sources: Tensor | None = None  # (P, S) int64, which of the K trade-offs each answer is sampled at

    def __len__(self) -> int:
        return len(self.prompts)


class PromptSource:
    """The prompts and trade-offs of each step, by index arithmetic: the step number is the whole state.

    Args:
        prompts: The training prompts.
        config: Settings.
        objectives: m.
        fixed: (m,) weights of every step, for an expert; None: drawn from the Dirichlet distribution.
        trade_offs: Different trade-offs in a step; at most the prompts of a step, unless rollouts are shared.
    """

    def __init__(
        self, prompts: Prompts, config: ClpConfig, objectives: int, *, fixed: Tensor | None = None, trade_offs: int = 1
    ) -> None:
        self.prompts, self.config, self.batch_size = prompts, config, config.prompts_per_step
        choices = config.kl_weight if fixed is None else config.kl_weight[:1]
        self.shared = config.share_rollouts and fixed is None
        # Prompts of one trade-off stand side by side, so that they are generated together.
        rows, per = (trade_offs, "list") if self.shared else (self.batch_size, trade_offs)
        self.kl_weight = samplers.one_of(choices, rows, per=per, seed=config.seed)
        if fixed is not None:
            self.weights = samplers.fixed(fixed, self.batch_size)
        else:
            self.weights = samplers.dirichlet_weights(
                objectives, rows, concentration=config.concentration, per=per, seed=config.seed, balanced=self.shared
            )
        # At random for each answer by itself: then an average of a prompt's other answers is a baseline.
        self.sources = samplers.one_of(
            range(trade_offs), self.batch_size * config.samples_per_prompt, per="list", seed=config.seed, stream=1
        )

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> PromptBatch:
        """Return part `rank` of `world_size` of the prompts of `step`."""
        rollout = step // self.config.epochs
        rows = part_of_batch(self.batch_size, rank, world_size)
        chosen = shuffled_indices(len(self.prompts), self.batch_size, seed=self.config.seed, step=rollout)[rows]
        weights, kl_weight, sources = self.weights(rollout), self.kl_weight(rollout), None
        if self.shared:
            sources = self.sources(rollout).long().view(self.batch_size, -1)[rows]
        else:
            weights, kl_weight = weights[rows], kl_weight[rows]
        return PromptBatch(
            self.prompts.at(chosen), weights, kl_weight, rollout * self.config.epochs, rank, world_size, sources
        )


def describe(prompts: dict[str, Prompts]) -> dict[str, Any]:
    """Return what a run remembers of its prompts."""
    return {
        name: {"prompts": len(part), "tokens": sum(map(len, part.tokens)), "longest": max(map(len, part.tokens))}
        for name, part in prompts.items()
    }
