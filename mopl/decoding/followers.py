"""Models that run behind a generation, each with a cache of its own, and what belongs to the rows of one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mopl._rows import arranged
from mopl._rows.styles import positions_of
from mopl.conditioning.weighted import causal_lm_of, has_own_prompt


class Follower:
    """A model that runs behind a generation it does not lead, with a cache of its own.

    Args:
        model: A causal language model of transformers, plain or with adapters, or one around it.
        active: Gives the context in which it is called; by default it is called as it is.
        last_only: Whether to ask for the logits of the last token alone, where the model can be asked so.
        conditions: Keywords of the model, each (B, ...) for the prompts: what a model that takes weights is told.

    Attributes:
        tokens: (rows, L), those that are in the cache; None before the first call.
    """

    def __init__(
        self,
        model: Any,
        active: Callable[[], Any] = contextlib.nullcontext,
        *,
        last_only: bool = False,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self._active, self._conditions = model, active, conditions or {}
        self._inner = causal_lm_of(model)
        takes = inspect.signature(type(self._inner).forward).parameters
        # Models that take weights may arrange rows by themselves.
        self._arranges = not getattr(model, "arranges_rows", False)
        self._takes_positions = self._arranges and "position_ids" in takes
        self._options = {"logits_to_keep": 1} if last_only and "logits_to_keep" in takes else {}
        self.tokens: Tensor | None = None  # (rows, L) in the cache
        self.past: Any = None

    @torch.no_grad()
    def scores(self, tokens: Tensor, mask: Tensor, prompts: int) -> Tensor:
        """Return the scores of the next token, (rows, V).

        Args:
            tokens: (rows, L), prompts and what was generated.
            mask: (rows, L).
            prompts: How many prompts the rows are copies of, those of one prompt one after another. Beams of a prompt
                change places: the cache follows.

        Raises:
            ValueError: If PEFT puts virtual tokens in front of the model's rows.
        """
        device = next(self.model.parameters()).device
        tokens, mask = tokens.to(device), mask.to(device)
        known = 0 if self.past is None else self._reorder(tokens, prompts)
        if not known:
            self.past = None
        options: dict[str, Any] = {**self._options, "input_ids": tokens[:, known:], "attention_mask": mask}
        if self.past is not None:
            options["past_key_values"] = self.past
        if self._takes_positions:
            options["position_ids"] = positions_of(mask)[:, known:]
        if self._arranges:
            options = arranged(self._inner, options)
        options |= {name: copies_of(value, tokens) for name, value in self._conditions.items()}
        with self._active():
            if has_own_prompt(self.model):
                raise ValueError(
                    f"the {type(self.model).__name__} has a prompt of PEFT's, which would be put in front of each new "
                    "token, too; take a model with LoRA or the like, or a plain one, beside the one that generates"
                )
            output = self.model(use_cache=True, **options)
        self.past, self.tokens = getattr(output, "past_key_values", None), tokens  # some models keep none
        return output.logits[:, -1]

    def _reorder(self, tokens: Tensor, prompts: int) -> int:
        """Bring the cache's rows into the order of `tokens` (beams move); return how many tokens it holds, or 0."""
        before = self.tokens
        assert before is not None
        known = before.shape[1]
        if tokens.shape[1] <= known or len(tokens) != len(before):
            return 0
        if torch.equal(tokens[:, :known], before):
            return known
        same = (tokens[:, None, :known] == before[None]).all(-1)
        # Rows of different prompts never stand for each other, even where their tokens are equal: paddings differ.
        prompt = torch.arange(len(tokens), device=tokens.device) // (len(tokens) // prompts)
        same &= prompt[:, None] == prompt
        if not bool(same.any(-1).all()):
            return 0
        self.past.reorder_cache(same.to(torch.uint8).argmax(-1))
        return known


def copies_of(prompts: Tensor, rows: Tensor) -> Tensor:
    """Return what belongs to prompts, for rows that are copies of them: beams or samples.

    Args:
        prompts: (B, ...), an entry for each prompt.
        rows: (R, ...), of which only the number and the device are read; those of one prompt one after another.

    Returns:
        (R, ...), each entry R / B times.

    Raises:
        ValueError: If R is no multiple of B.
    """
    copies = len(rows) // max(len(prompts), 1)
    if copies * len(prompts) != len(rows):
        raise ValueError(f"{len(rows)} rows were generated from {len(prompts)} prompts; rows must be whole copies")
    return prompts.to(rows.device).repeat_interleave(copies, 0)


def mask_so_far(mask: Tensor, tokens: Tensor) -> Tensor:
    """Return the mask of rows that are being generated from that of their prompts; what was generated counts.

    Args:
        mask: (B, T), of the prompts.
        tokens: (R, L), prompts and what was generated, R a multiple of B.

    Returns:
        (R, L), with 1 at the L - T places that were generated.

    Raises:
        ValueError: If R is no multiple of B.
    """
    mask = copies_of(mask, tokens)
    return torch.cat([mask, mask.new_ones(len(tokens), tokens.shape[1] - mask.shape[1])], 1)


def on_vocabulary(scores: Tensor, size: int) -> Tensor:  # (rows, V') -> (rows, size)
    """Return scores of a vocabulary of another size: cut, or with -inf for the tokens that it lacks.

    Models of one tokenizer may have embeddings of different sizes, padded to some multiple.

    Args:
        scores: (rows, V') of a model.
        size: V, of the vocabulary that is wanted.

    Returns:
        (rows, V).
    """
    return nn.functional.pad(scores, (0, size - scores.shape[-1]), value=-torch.inf)  # a negative number cuts
