"""Mixing a model with its reference while it generates: (1 - 1/c) h0 + h/c at every token.

The mixture is a `LogitsProcessor`, so everything that `generate` of transformers does after it (sampling, top-p, beams,
stopping) works on the mixed distribution. The reference runs beside the model with a cache of its own.

This is the usual approximation of p_c(y) ∝ p0(y)^(1-1/c) p(y)^(1/c), which is a statement about whole responses: each
token's mixture is normalised by itself, so a response is drawn with q(y) = Π_t mixture_t(y_t), and p_c(y) / q(y) is
proportional to the product of those normalisers. `log_proposal` gives log q(y), with which samples can be weighed back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import shape_of
from mopl._extras import require
from mopl.conditioning import WeightedModel
from mopl.conditioning.causal_lm import adapters_off, is_peft
from mopl.decoding import Follower, copies_of, mask_so_far
from mopl.steering import rescale

require("transformers", what="generation")
from transformers import LogitsProcessor  # noqa: E402

# How a run says that the reference is the model itself, with everything that was trained switched off.
OWN_REFERENCE = ("self", "precomputed")


class Reference:
    """The distribution p0 that a model is mixed with.

    Args:
        model: The tuned model.
        reference: Another model that stands for p0; None: the tuned model with adapters and prompt off.

    Raises:
        ValueError: If `reference` is None and the model cannot be its own reference.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None = None) -> None:
        if reference is None and isinstance(model, WeightedModel) and model.record.reference not in OWN_REFERENCE:
            raise ValueError(
                f"the model was regularised towards {model.record.reference!r}; load that and pass it as reference"
            )
        if reference is None and not isinstance(model, WeightedModel) and not is_peft(model):
            raise ValueError(
                f"a plain {type(model).__name__} holds no reference to mix with; pass the model that it was tuned from "
                "as reference, or leave scale at 1"
            )
        self.own = reference is None
        self.model: Any = model if reference is None else reference

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """Give the model that is p0 inside a `with` block."""
        switched: Any = contextlib.nullcontext()
        if isinstance(self.model, WeightedModel):
            switched = self.model.reference()
        elif self.own:
            switched = adapters_off(self.model)
        with switched:
            yield self.model


class ReferenceMixture(LogitsProcessor):
    """Turns scores h of the next token into log-probabilities of (1 - 1/c) h0 + h/c (COS-DPO, equation 14, by tokens).

    One object serves one call of `generate`. Rows may be repeated (samples, beams) and beams may change places: the
    reference's cache follows. Needs one new token a call.

    Args:
        reference: p0.
        input_ids: (B, T) the prompts as the reference reads them, padded on the left.
        attention_mask: (B, T).
        c: (B,) factor of the temperature, positive.
        prompt_length: Length of the prompts that `generate` was called with; differs from T where weights are written
            in the prompt.
        record: Whether `log_proposal` will be asked for.
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
    ) -> None:
        self.reference, self.ids, self.mask, self.c = reference, input_ids, attention_mask, c
        self.prompt_length, self.record = prompt_length, record
        self._follower = Follower(reference.model, reference.active, last_only=True)
        self._length: int | None = None  # new tokens that the reference has read
        self._mixed: Tensor | None = None  # (R, V) the last mixture
        self._chosen: list[Tensor] = []  # (R,) log-probabilities of the tokens drawn so far

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the mixture's log-probabilities (R, V) for rows `input_ids` (R, prompt + t) with scores (R, V)."""
        new = input_ids[:, self.prompt_length :]
        if self.record and self._mixed is not None:
            self._chosen.append(self._mixed.gather(-1, new[:, -1:])[:, 0])
        base = self._base_logits(new).to(scores.device)
        if base.shape != scores.shape:
            raise ValueError(
                f"the reference gives logits {shape_of(base)} but the model {shape_of(scores)}; "
                "the two must share one vocabulary"
            )
        mixed = rescale(scores, base, copies_of(self.c, scores), normalize=True)
        if self.record:
            self._mixed = mixed
        return mixed

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

    def _base_logits(self, new: Tensor) -> Tensor:
        """Bring the reference up to date with the rows and return its logits (R, V)."""
        if self._length is not None and new.shape[1] != self._length + 1:
            raise ValueError(
                "scale needs a decoding strategy that adds one token to the same rows at a time; leave out "
                "assisted and speculative decoding"
            )
        self._length = new.shape[1]
        tokens = torch.cat([copies_of(self.ids, new), new], 1)
        return self._follower.scores(tokens, mask_so_far(self.mask, tokens), len(self.ids)).float()
