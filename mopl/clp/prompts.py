"""Prompts to answer: read from text, JSON lines or preference data, split, and cut into batches by the step number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl.alignment.data import DataError, Text
from mopl.alignment.readers import detect_format, load_preferences
from mopl.alignment.tokenization import ListTokenizer
from mopl.clp.config import ClpConfig
from mopl.conditioning import sample_temperatures, sample_weights
from mopl.rewards import prompt_key
from mopl.training import part_of_batch, shuffled_indices


@dataclass(frozen=True)
class Prompts:
    """Prompts of one part of the data.

    Attributes:
        texts: Texts, or chat messages.
        tokens: The tokens of each, as the model gets them to answer.
    """

    texts: tuple[Text, ...]
    tokens: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """Return a SHA-256 of texts and tokens."""
        digest = hashlib.sha256()
        for text, tokens in zip(self.texts, self.tokens, strict=True):
            digest.update(json.dumps([prompt_key(text), list(tokens)]).encode())
        return digest.hexdigest()

    def first(self, count: int) -> Prompts:
        """Return the first of them, at most `count`."""
        return Prompts(self.texts[:count], self.tokens[:count])


def read_prompts(source: str, *, limit: int | None = None) -> list[Text]:
    """Return the different prompts of a source, in its order.

    Args:
        source: A `.txt` file with a prompt a line; a `.jsonl` file of objects with `"prompt"` (a text or messages) and
            whatever else; or anything that `mopl.alignment.load_preferences` reads.
        limit: Return no more than this many.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If there are no prompts.
    """
    path = Path(source)
    found: list[Text] = []
    if path.suffix == ".txt" and path.is_file():
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif path.suffix == ".jsonl" and path.is_file() and (rows := _prompt_rows(path)) is not None:
        found = rows
    else:
        found = [item.prompt for item in load_preferences(source)]
    different = {prompt_key(prompt): prompt for prompt in found}
    prompts = list(different.values())[:limit]
    if len(prompts) < 2:
        raise ValueError(f"{source} has {len(prompts)} prompts but training and evaluation need one each")
    return prompts


def _prompt_rows(path: Path) -> list[Text] | None:
    """Return the prompts of JSON lines, or None where a row is preference data of a known format without a prompt.

    Raises:
        ValueError: If a row is neither; the message names it.
    """
    found: list[Text] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
        wrong = _what_is_wrong(row)
        if wrong is not None:
            if isinstance(row, dict) and _is_known_format(row):
                return None
            raise ValueError(
                f"line {number} of {path} {wrong}; each line must be an object with a prompt, such as "
                '{"prompt": "How do I make tea?"} or {"prompt": [{"role": "user", "content": "Hello"}]}, or all must '
                "be preference data of a known format"
            )
        prompt = row["prompt"]
        found.append(prompt if isinstance(prompt, str) else tuple(prompt))
    return found


def _is_known_format(row: dict[str, Any]) -> bool:
    try:
        detect_format(row)
    except DataError:
        return False
    return True


def _what_is_wrong(row: Any) -> str | None:
    """Return what a row lacks that should hold a prompt, or None."""
    if not isinstance(row, dict):
        return f"is a {type(row).__name__} and not an object"
    if "prompt" not in row:
        return f"has no prompt (it has {', '.join(sorted(row)) or 'nothing'})"
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return None if prompt.strip() else "has an empty prompt"
    if not isinstance(prompt, list):
        return f"has a prompt that is neither a text nor a list of messages but {json.dumps(prompt)[:40]}"
    if not prompt:
        return "has an empty prompt"
    for place, message in enumerate(prompt, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return f"has a prompt whose message {place} has no role or no content"
    return None


def split_prompts(texts: Sequence[Text], tokenizer: ListTokenizer, config: ClpConfig) -> tuple[dict[str, Prompts], int]:
    """Return the prompts of training and of evaluation as `"train"` and `"test"`, and how many were too long.

    Raises:
        ValueError: If prompts have no tokens, or fewer than two are short enough.
    """
    kept: list[tuple[Text, tuple[int, ...]]] = []
    for text in texts:
        tokens = tuple(int(t) for t in tokenizer.prompt_tokens(text))
        if not tokens:
            raise ValueError(f"the prompt {prompt_key(text)!r} has no tokens, and the tokenizer adds none in front")
        if len(tokens) <= config.max_prompt:
            kept.append((text, tokens))
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} of {len(texts)} prompts have at most {config.max_prompt} tokens; raise max_prompt"
        )
    order = np.random.default_rng(config.data_seed).permutation(len(kept))
    held = min(max(1, round(config.held_out * len(kept))), len(kept) - 1)
    parts = {"train": sorted(order[held:].tolist()), "test": order[:held].tolist()}
    return {
        name: Prompts(tuple(kept[i][0] for i in rows), tuple(kept[i][1] for i in rows)) for name, rows in parts.items()
    }, len(texts) - len(kept)


@dataclass(frozen=True)
class PromptBatch:
    """One part of a step's prompts with the trade-offs at which they are answered.

    Attributes:
        texts: P prompts.
        tokens: Their tokens.
        weights: (P, m) float32.
        alpha: (P,) float32.
        step: The step whose rollout this is: the first of its `epochs`.
        part: Which part of the step it is, of `parts`.
        parts: Parts of the step.
    """

    texts: tuple[Text, ...]
    tokens: tuple[tuple[int, ...], ...]
    weights: Tensor
    alpha: Tensor
    step: int
    part: int
    parts: int

    def __len__(self) -> int:
        return len(self.texts)


class PromptSource:
    """The prompts and trade-offs of each step, by index arithmetic: the step number is the whole state.

    Args:
        prompts: The training prompts.
        config: Settings.
        objectives: m.
        fixed: (m,) weights of every step, for an expert; None: drawn from the Dirichlet distribution.
        trade_offs: Different trade-offs in a step; at most the prompts of a step.
    """

    def __init__(
        self, prompts: Prompts, config: ClpConfig, objectives: int, *, fixed: Tensor | None = None, trade_offs: int = 1
    ) -> None:
        self.prompts, self.config, self.objectives, self.fixed = prompts, config, objectives, fixed
        self.batch_size = config.prompts_per_step
        self.trade_offs = min(trade_offs, self.batch_size)

    def trade_off(self, rollout: int) -> tuple[Tensor, Tensor]:
        """Return the weights (P, m) and KL weights (P,) of a step's prompts."""
        config, count = self.config, self.batch_size
        choices = torch.tensor(config.kl_weight)
        if self.fixed is not None:
            return self.fixed.float().expand(count, -1), choices[:1].expand(count)
        w = sample_weights(self.objectives, self.trade_offs, config.alpha, seed=config.seed, step=rollout)
        uniform = (
            sample_temperatures(1, self.trade_offs, 1.0, 2.0, seed=config.seed, step=rollout).temperature[:, 0] - 1
        )
        alpha = choices[(uniform * len(choices)).long().clamp(max=len(choices) - 1)]
        # Prompts of one trade-off stand side by side, so that they are generated together.
        place = torch.arange(count) * self.trade_offs // count
        return w[place], alpha[place]

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> PromptBatch:
        """Return part `rank` of `world_size` of the prompts of `step`."""
        rollout = step // self.config.epochs
        rows = part_of_batch(self.batch_size, rank, world_size)
        chosen = shuffled_indices(len(self.prompts), self.batch_size, seed=self.config.seed, step=rollout)[rows]
        w, alpha = self.trade_off(rollout)
        return PromptBatch(
            tuple(self.prompts.texts[i] for i in chosen), tuple(self.prompts.tokens[i] for i in chosen),
            w[rows], alpha[rows], rollout * self.config.epochs, rank, world_size,
        )  # fmt: skip


def describe(prompts: dict[str, Prompts]) -> dict[str, Any]:
    """Return what a run remembers of its prompts."""
    return {
        name: {"prompts": len(part), "tokens": sum(map(len, part.tokens)), "longest": max(map(len, part.tokens))}
        for name, part in prompts.items()
    }
