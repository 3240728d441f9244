"""How the weights of the objectives (and their betas) enter a model."""

from mopl._renamed import renamed_names
from mopl.conditioning.concat import ConcatCondition
from mopl.conditioning.hooked import HookedModel
from mopl.conditioning.hyper_prompt import HyperPrompt
from mopl.conditioning.hyper_prompt_model import HyperPromptModel
from mopl.conditioning.parameter_mixture import KLWeightCoefficients, LoraMixture, ParameterMixture
from mopl.conditioning.sampling import (
    Betas,
    check_weights,
    sample_betas,
    sample_weights,
    weights_name,
    weights_of_name,
)
from mopl.conditioning.saved_models import TuningRecord
from mopl.conditioning.text_prompt import TextPrompt
from mopl.conditioning.text_prompt_model import TextPromptModel
from mopl.conditioning.value_head import ValueHead
from mopl.conditioning.weighted import WeightedModel

__all__ = [
    "KLWeightCoefficients",
    "Betas",
    "ConcatCondition",
    "HookedModel",
    "HyperPrompt",
    "HyperPromptModel",
    "LoraMixture",
    "ParameterMixture",
    "TextPrompt",
    "TextPromptModel",
    "TuningRecord",
    "ValueHead",
    "WeightedModel",
    "check_weights",
    "sample_betas",
    "sample_weights",
    "weights_name",
    "weights_of_name",
]

__getattr__ = renamed_names(
    __name__, AlphaCoefficients="KLWeightCoefficients", Temperatures="Betas", sample_temperatures="sample_betas"
)
