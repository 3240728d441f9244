"""Mixtures of models while they decode: decoding-time realignment, and one expert for each objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import shape_of
from mopl._counted import counted, there_are
from mopl.conditioning.sampling import check_weights
from mopl.decoding._generating import check_left_padding, generate_by, strength_of
from mopl.decoding.followers import Follower, copies_of, mask_so_far
from mopl.steering import log_mix


class MixedLogits:
    """A logits processor for `generate` of transformers: the generating model's scores mixed with other models'.

    Use one for one call of `generate`. For the first model itself pass its coefficient first.

    Args:
        others: models with the vocabulary of the generating one: causal language models of transformers, plain or with
            adapters, each a module of its own.
        coefficients: c, (1 + len(others),), or (B, 1 + len(others)) for each prompt: log p = Σ_e c_e log p_e + const.
        attention_mask: (B, T), of the prompts; padded on the left.

    Raises:
        ValueError: If shapes do not fit or prompts are padded on the right.
    """

    def __init__(self, others: Sequence[nn.Module], coefficients: Tensor, attention_mask: Tensor) -> None:
        check_left_padding(attention_mask)
        rows, models = len(attention_mask), 1 + len(others)
        if tuple(coefficients.shape) not in ((models,), (rows, models)):
            raise ValueError(
                f"coefficients has shape {shape_of(coefficients)} but {there_are(rows, 'prompt')} and "
                f"{counted(models, 'model')}; pass {(models,)} or {(rows, models)}"
            )
        self.coefficients = coefficients.expand(rows, models)
        self.mask = attention_mask.long()
        self._followers = [Follower(model) for model in others]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the mixture's log-probabilities (rows, V) in the place of the generating model's scores.

        Args:
            input_ids: (rows, L), prompts and what was generated; rows are B, or B times beams or samples.
            scores: (rows, V); what is -inf stays impossible.

        Raises:
            ValueError: If another model has a vocabulary of another size.
        """
        parts, mask = [scores], mask_so_far(self.mask, input_ids)
        for e, follower in enumerate(self._followers, start=1):
            other = follower.scores(input_ids, mask, len(self.mask)).to(scores.device)
            if other.shape != scores.shape:
                raise ValueError(f"model {e} has scores {shape_of(other)} but the first {shape_of(scores)}; mix models "
                                 "of one tokenizer and vocabulary")  # fmt: skip
            parts.append(other)
        shares = copies_of(self.coefficients, scores)
        allowed = scores != -torch.inf
        return log_mix(parts, list(shares.unbind(-1)), normalize=True, mask=allowed).to(scores.dtype)


def dera(
    model: nn.Module,
    reference: nn.Module,
    strength: float | Tensor,  # number or (B,)
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
    **kwargs: Any,
) -> Any:
    """Generate from p ∝ p_ref^(1-λ) p^λ, token by token (decoding-time realignment).

    Args:
        model: the aligned model, whose `generate` runs.
        reference: the reference model, a module of its own.
        strength: λ, a number or one a prompt (B,): 0 the reference, 1 the aligned model, above 1 beyond it. From KL
            weight α to α' it is κ(α')/κ(α), κ = (1 - α)/α or 1/α by the form of the objective.
        input_ids: (B, T), padded on the left.
        attention_mask: (B, T); may be left out where nothing is padded.
        **kwargs: keywords of `generate` of transformers.

    Returns:
        What `generate` returns.

    Raises:
        ValueError: If shapes do not fit, or an option cannot go with a mixture.
    """
    share = strength_of(strength, input_ids, "0 is the reference, 1 the aligned model")
    return _generate(model, [reference], torch.stack([share, 1 - share], -1), input_ids, attention_mask, kwargs)


def logit_mixing(
    experts: Sequence[nn.Module],
    weights: Sequence[float] | Sequence[Sequence[float]] | Tensor,  # (m,) or (B, m)
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
    **kwargs: Any,
) -> Any:
    """Generate from p ∝ Π_i p_i^(w_i), token by token, with one expert for each objective.

    Args:
        experts: m models, each a module of its own; the first one's `generate` runs and its configuration counts.
        weights: w on the simplex, (m,) or one vector a prompt (B, m).
        input_ids: (B, T), padded on the left.
        attention_mask: (B, T); may be left out where nothing is padded.
        **kwargs: keywords of `generate` of transformers.

    Returns:
        What `generate` returns.

    Raises:
        ValueError: If weights are off the simplex, shapes do not fit, or an option cannot go with a mixture.
    """
    if not experts:
        raise ValueError("experts is empty; pass one model for each objective")
    w = check_weights(weights, len(experts))
    return _generate(experts[0], experts[1:], w, input_ids, attention_mask, kwargs)


def _generate(
    model: Any, others: Sequence[nn.Module], coefficients: Tensor, tokens: Tensor, mask: Tensor | None, kwargs: dict
) -> Any:
    return generate_by(lambda mask: MixedLogits(others, coefficients, mask), model, others, tokens, mask, kwargs)
