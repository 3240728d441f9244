"""The causal language models that take weights, seen from outside: virtual tokens or mixed adapters, used alike.

Both have `record`, `causal_lm`, `reference()`, `forward(..., weights=)`, `generate(..., weights=)` and
`save_pretrained`; `isinstance(model, WeightedModel)` tells them from models with weights of their own.
"""

from __future__ import annotations

from typing import Any

from mopl.conditioning._parameter_mixture_lora import LoraMixture
from mopl.conditioning.hyper_prompt_model import HyperPromptModel

WeightedModel = HyperPromptModel | LoraMixture


def takes_temperature(model: Any) -> bool:
    """Say whether a model is conditioned on temperatures of the objectives too."""
    return isinstance(model, HyperPromptModel) and model.hyper_prompt.temperature
