"""Mixing a model with its reference while it generates, at every token: (1 - 1/c) h0 + h/c, or hL + (h - h0)/c.

The second is what a small model makes of a large one that it guides (`mopl.steering.guide`); with p_L = p0 it is the
first, to the bit. The mixture is a `LogitsProcessor`, so everything that `generate` of transformers does after it
(sampling, top-p, beams, stopping) works on the mixed distribution. The others run beside it, each with a cache.

This is the usual approximation of p_c(y) ∝ p_L(y) (p(y) / p0(y))^(1/c), which is a statement about whole responses:
each token's mixture is normalised by itself, so a response is drawn with q(y) = Π_t mixture_t(y_t), and p_c(y) / q(y)
is proportional to the product of those normalisers. `log_proposal` gives log q(y), by which samples are weighed back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopl._arguments import shape_of
from mopl._extras import require
from mopl.conditioning.references import Reference
from mopl.decoding import Follower, copies_of, mask_so_far, on_vocabulary
from mopl.steering import guide, rescale

require("transformers", what="generation")
from transformers import LogitsProcessor  # noqa: E402


class ReferenceMixture(LogitsProcessor):
    """Turns scores h of the next token into log-probabilities of (1 - 1/c) h0 + h/c (COS-DPO, equation 14, by tokens).

    One object serves one call of `generate`. Rows may be repeated (samples, beams) and beams may change places: the
    caches of the others follow. Needs one new token a call.

    Args:
        reference: p0.
        input_ids: (B, T) the prompts as the reference reads them, padded on the left.
        attention_mask: (B, T).
        c: (B,) factor of the temperature, positive.
        prompt_length: Length of the prompts that `generate` was called with; differs from T where weights are written
            in the prompt.
        record: Whether `log_proposal` will be asked for.
        guided: p_L, a causal language model that reads the prompts as the reference does; then the scores are
            hL + (h - h0)/c. Its embeddings may hold more tokens than the model's, or fewer: one that a model has not is
            impossible.
    """

    def __init__(
        self,
        reference: Reference,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T)
        c: Tensor,  # (B,)
        prompt_length: int,
        *,
        record: bool = False,
        guided: Any = None,
    ) -> None:
        self.reference, self.ids, self.mask, self.c = reference, input_ids, attention_mask, c
        self.prompt_length, self.record = prompt_length, record
        self._follower = Follower(reference.model, reference.active, last_only=True)
        self._guided = None if guided is None else Follower(guided, last_only=True)
        self._length: int | None = None  # new tokens that the reference has read
        self._mixed: Tensor | None = None  # (R, V) the last mixture
        self._chosen: list[Tensor] = []  # (R,) log-probabilities of the tokens drawn so far

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the mixture's log-probabilities (R, V) for rows `input_ids` (R, prompt + t) with scores (R, V)."""
        new = input_ids[:, self.prompt_length :]
        if self.record and self._mixed is not None:
            self._chosen.append(self._mixed.gather(-1, new[:, -1:])[:, 0])
        tokens, mask = self._rows(new)
        base = self._follower.scores(tokens, mask, len(self.ids)).to(scores.device)
        if base.shape != scores.shape:
            raise ValueError(
                f"the reference gives logits {shape_of(base)} but the model {shape_of(scores)}; "
                "the two must share one vocabulary"
            )
        c = copies_of(self.c, scores)
        if self._guided is None:
            mixed = rescale(scores, base, c, normalize=True)
        else:
            large = self._guided.scores(tokens, mask, len(self.ids)).to(scores.device)
            mixed = guide(scores, base, on_vocabulary(large, scores.shape[-1]), 1 / c)
        if self.record:
            self._mixed = mixed
        return mixed.to(torch.promote_types(scores.dtype, torch.float32))

    def log_proposal(self, new: Tensor, counted: Tensor) -> Tensor:  # (R, n), (R, n) bool -> (R,) float64
        """Return log q of what was drawn: the sum over counted tokens of the log-probabilities they were drawn with.

        Right only where nothing came between the mixture and the draw: no temperature, top-k, top-p or beams.
        """
        assert self._mixed is not None
        chosen = list(self._chosen)
        if len(chosen) < new.shape[1]:
            chosen.append(self._mixed.gather(-1, new[:, len(chosen)][:, None].to(self._mixed.device))[:, 0])
        total = torch.stack(chosen[: new.shape[1]], 1).double()
        return total.masked_fill(~counted.to(total.device), 0.0).sum(-1)

    def _rows(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows as the reference reads them, (R, L), and their mask; raise unless each got one token more."""
        if self._length is not None and new.shape[1] != self._length + 1:
            raise ValueError(
                "scale and guided_model need a decoding strategy that adds one token to the same rows at a time; leave "
                "out assisted and speculative decoding"
            )
        self._length = new.shape[1]
        tokens = torch.cat([copies_of(self.ids, new), new], 1)
        return tokens, mask_so_far(self.mask, tokens)
