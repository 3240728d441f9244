"""Lists as tokens: what tokenising gives, and how a list is cut to a length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mopl.language_models.data import ReadReport


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
        return fingerprint_of(self.lists)

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


def fingerprint_of(lists: Sequence[TokenizedList]) -> str:
    """Return a SHA-256 of all tokens of lists and of where responses begin: equal exactly if a model sees the same."""
    digest = hashlib.sha256()
    for item in lists:
        starts = [np.array(item.prompt_starts)] if item.prompt_starts else []
        for tokens in (item.prompt, *item.responses, *starts):
            digest.update(len(tokens).to_bytes(8, "little") + tokens.astype("<i8").tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def truncate(
    prompt: np.ndarray, responses: Sequence[np.ndarray], *, max_length: int, min_prompt: int, bos: int | None = None
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Shorten a list to at most `max_length` tokens of prompt and longest response; see `ListTokenizer`.

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
