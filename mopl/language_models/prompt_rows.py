"""Prompts as rows for `generate` of transformers: some at a time, padded on the left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mopl.conditioning.weighted import causal_lm_of, keywords_for_prompts, reads_left_padding
from mopl.language_models.collate import padded
from mopl.language_models.turns import TurnEnds


@dataclass(frozen=True)
class PromptRows:
    """Some of the prompts that a model answers."""

    model: Any
    ends: TurnEnds
    rows: slice  # which of the prompts they are
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)

    def generate(self, **options: Any) -> tuple[Tensor, Any]:
        """Return the new tokens (R, n) and all that `generate` gives; R is B, or B times the samples of a prompt."""
        criteria = [*(options.get("stopping_criteria") or []), *self.ends.criteria(self.ids.shape[1])]
        options |= {"stopping_criteria": criteria, **keywords_for_prompts(self.model, self.mask)}
        output = self.model.generate(input_ids=self.ids, attention_mask=self.mask, **options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        return sequences[:, self.ids.shape[1] :], output


def prompt_rows(
    model: Any, prompts: Sequence[Sequence[int]], pad: int, ends: TurnEnds, at_once: int
) -> Iterator[PromptRows]:
    """Yield prompts in their order, `at_once` together; one by one where the model cannot read padding on the left."""
    device = causal_lm_of(model).get_input_embeddings().weight.device
    if not reads_left_padding(model):
        at_once = 1  # with nothing to pad
    for first in range(0, len(prompts), at_once):
        rows = slice(first, min(first + at_once, len(prompts)))
        yield PromptRows(model, ends, rows, *pad_left(prompts[rows], pad, device))


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return prompts as (B, T), padded on the left as generation needs it, and their mask."""
    found = padded([(row, ()) for row in rows], pad, left=True)
    return found["input_ids"].to(device), found["attention_mask"].to(device)


@contextlib.contextmanager
def generating_by(model: Any, config: Any) -> Iterator[None]:
    """Put a `GenerationConfig` in the place of a model's own, which may ask for beams or penalties, for a moment."""
    causal_lm = causal_lm_of(model)
    before, causal_lm.generation_config = causal_lm.generation_config, config
    try:
        yield
    finally:
        causal_lm.generation_config = before
