"""Baselines that mix models while they decode: one model a trade-off could have been, run as several.

    dera(model, reference, λ, input_ids)       p ∝ p_ref^(1-λ) p^λ       DeRa (Liu et al., ICML 2024)
    logit_mixing(experts, w, input_ids)        p ∝ Π_i p_i^(w_i)         multi-objective decoding (Shi et al., 2024)

Each next token is drawn from the normalised mixture (`mopl.steering.log_mix`). Every model runs on every token, with a
cache of its own, so m models cost m times one; a conditioned model (`mopl.conditioning.ParameterMixture`) costs one.

The mixtures of *whole responses* are what the theory is about: exact experts give the exact optimum of Σ_i w_i R_i, and
λ = κ(α')/κ(α) turns the optimum at α into that at α'. Token by token, each token is normalised by itself, which is
another distribution, the more so the more the models disagree about how a response goes on.

All options of `generate` of transformers work that read or warp scores: sampling, beams, several samples, padding on
the left. What forbids tokens (`min_new_tokens`, `bad_words_ids`, ...) acts on the mixture.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import shape_of
from mopl._rows import arranged, generation_keywords
from mopl._rows.styles import positions_of
from mopl.conditioning.causal_lm import mask_of_prompts
from mopl.conditioning.sampling import check_weights
from mopl.conditioning.weighted import causal_lm_of
from mopl.steering import log_mix

# These would act on the first model's scores, before the others are mixed in, or run it at other tokens.
_REFUSED = (
    "repetition_penalty encoder_repetition_penalty sequence_bias guidance_scale watermarking_config "
    "assistant_model prompt_lookup_num_tokens prefill_chunk_size inputs_embeds past_key_values"
).split()
_IDLE = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0}


class Follower:
    """A model that runs behind a generation it does not lead, with a cache of its own.

    Args:
        model: A causal language model of transformers, plain or with adapters, or one around it.
        active: Gives the context in which it is called; by default it is called as it is.
        last_only: Whether to ask for the logits of the last token alone, where the model can be asked so.
    """

    def __init__(
        self, model: Any, active: Callable[[], Any] = contextlib.nullcontext, *, last_only: bool = False
    ) -> None:
        self.model, self._active = model, active
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
        with self._active():
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
    """Return what belongs to prompts (B, ...) for rows (R, ...) that are copies of them, beams or samples: (R, ...)."""
    copies = len(rows) // len(prompts)
    if copies * len(prompts) != len(rows):
        raise ValueError(f"{len(rows)} rows were generated from {len(prompts)} prompts; rows must be whole copies")
    return prompts.to(rows.device).repeat_interleave(copies, 0)


def mask_so_far(mask: Tensor, tokens: Tensor) -> Tensor:
    """Return the mask (R, L) of rows (R, L) from that of their prompts (B, T); what was generated counts."""
    mask = copies_of(mask, tokens)
    return torch.cat([mask, mask.new_ones(len(tokens), tokens.shape[1] - mask.shape[1])], 1)


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
        if attention_mask.ndim != 2 or bool((attention_mask[:, -1] == 0).any()):
            raise ValueError(
                f"attention_mask {shape_of(attention_mask)} must be (B, T) of prompts padded on the left; set the "
                "tokenizer's padding_side='left'"
            )
        rows, models = len(attention_mask), 1 + len(others)
        if tuple(coefficients.shape) not in ((models,), (rows, models)):
            raise ValueError(
                f"coefficients has shape {shape_of(coefficients)} but there are {rows} prompts and {models} models; "
                f"pass {(models,)} or {(rows, models)}"
            )
        self.coefficients = coefficients.expand(rows, models)
        self.mask = attention_mask.long()
        self._followers = [Follower(model) for model in others]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the mixture's log-probabilities (rows, V) in the place of one model's scores.

        Args:
            input_ids: (rows, L), prompts and what was generated; rows are B, or B times beams or samples.
            scores: (rows, V); what is -inf stays impossible.
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
    share = torch.as_tensor(strength, dtype=torch.float64, device=input_ids.device)
    if not bool(share.isfinite().all()):
        raise ValueError(f"strength is {share.tolist()} but must be finite: 0 is the reference, 1 the aligned model")
    if tuple(share.shape) not in ((), (len(input_ids),)):
        raise ValueError(f"strength has shape {shape_of(share)}; pass a number or one a prompt, ({len(input_ids)},)")
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
    if len({id(one) for one in (model, *others)}) != 1 + len(others):
        raise ValueError("a model is there twice; give each its own module, or add their weights")
    for one in (model, *others):
        if getattr(one.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(one).__name__} is an encoder-decoder; mixtures are for causal language models")
        if one.training:
            raise ValueError(
                f"{type(one).__name__} is in training mode, where dropout makes it another model; call eval()"
            )
    config = kwargs.get("generation_config") or model.generation_config
    for name in _REFUSED:
        value = kwargs.get(name, getattr(config, name, None))
        if value is not None and value != _IDLE.get(name):
            raise ValueError(f"{name} acts on one model before the mixture, not on the mixture; leave it out")
    if mask is None:
        mask = mask_of_prompts(tokens, kwargs.get("pad_token_id", getattr(config, "pad_token_id", None)))
    positions, *_ = [generation_keywords(causal_lm_of(one), mask) for one in (model, *others)]  # or refused, each
    kwargs = {**positions, **kwargs}
    processors = [MixedLogits(others, coefficients, mask), *(kwargs.pop("logits_processor", None) or [])]
    return model.generate(input_ids=tokens, attention_mask=mask, logits_processor=processors, **kwargs)
