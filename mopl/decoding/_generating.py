"""One call of `generate` of transformers in which models are mixed: what can go with it, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import shape_of
from mopl.conditioning.causal_lm import generate_option, mask_of_prompts
from mopl.conditioning.weighted import causal_lm_of, keywords_for_prompts

ACT_BEFORE: dict[str, Any] = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "sequence_bias": None,
    "watermarking_config": None, "exponential_decay_length_penalty": None,
}  # fmt: skip
"""Options of `generate` of transformers that act on the scores of the first model, before the others are mixed in, with
the values that do nothing. Any other value is refused."""

# These would run it at other tokens.
_REFUSED = "assistant_model prompt_lookup_num_tokens prefill_chunk_size inputs_embeds past_key_values".split()


def strength_of(strength: float | Tensor, tokens: Tensor, meaning: str) -> Tensor:
    """Return λ as float64, () or (B,), checked."""
    share = torch.as_tensor(strength, dtype=torch.float64, device=tokens.device)
    if not bool(share.isfinite().all()):
        raise ValueError(f"strength is {share.tolist()} but must be finite: {meaning}")
    if tuple(share.shape) not in ((), (len(tokens),)):
        raise ValueError(f"strength has shape {shape_of(share)}; pass a number or one a prompt, ({len(tokens)},)")
    return share


def generate_by(
    processor: Callable[[Tensor], Any],
    model: Any,
    others: Sequence[nn.Module],
    tokens: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    """Run a model's `generate`, with the logits processor that `processor` makes of the prompts' mask in its place."""
    if len({id(causal_lm_of(one)) for one in (model, *others)}) != 1 + len(others):
        raise ValueError("a model is there twice; give each its own module, or add their weights")
    for one in (model, *others):
        if getattr(one.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(one).__name__} is an encoder-decoder; mixtures are for causal language models")
        if one.training:
            raise ValueError(
                f"{type(one).__name__} is in training mode, where dropout makes it another model; call eval()"
            )
    own = model.generation_config
    for name in (*ACT_BEFORE, *_REFUSED):
        value = generate_option(name, kwargs, own)
        if value is not None and value != ACT_BEFORE.get(name):
            raise ValueError(f"{name} acts on one model before the mixture, not on the mixture; leave it out")
    if mask is None:
        mask = mask_of_prompts(tokens, generate_option("pad_token_id", kwargs, own))
    check_left_padding(mask)
    positions, *_ = [keywords_for_prompts(one, mask) for one in (model, *others)]  # or refused, each
    kwargs = {**positions, **kwargs}
    processors = [processor(mask), *(kwargs.pop("logits_processor", None) or [])]
    return model.generate(input_ids=tokens, attention_mask=mask, logits_processor=processors, **kwargs)


def check_left_padding(mask: Tensor) -> None:
    """Raise unless a mask (B, T) is one of prompts padded on the left."""
    if mask.ndim != 2 or bool((mask[:, -1] == 0).any()):
        raise ValueError(
            f"attention_mask {shape_of(mask)} must be (B, T) of prompts padded on the left; set the tokenizer's "
            "padding_side='left'"
        )
