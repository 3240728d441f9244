"""The causal language models that take weights, seen from outside: virtual tokens or mixed adapters, used alike.

Both have `record`, `causal_lm`, `reference()`, `forward(..., weights=)`, `generate(..., weights=)` and
`save_pretrained`; `isinstance(model, WeightedModel)` tells them from models with weights of their own.
"""

from __future__ import annotations

from typing import Any

from mopl.conditioning._parameter_mixture_lora import LoraMixture
from mopl.conditioning.causal_lm import is_peft
from mopl.conditioning.hyper_prompt_model import HyperPromptModel

WeightedModel = HyperPromptModel | LoraMixture


def causal_lm_of(model: Any) -> Any:
    """Return the causal language model inside a `WeightedModel` or a PEFT model, or the model itself."""
    if isinstance(model, WeightedModel):
        return model.causal_lm
    return model.get_base_model() if is_peft(model) else model


def takes_beta(model: Any) -> bool:
    """Say whether a model is conditioned on β of the objectives too."""
    return isinstance(model, HyperPromptModel) and model.hyper_prompt.takes_beta
