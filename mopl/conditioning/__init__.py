"""How the weights of the objectives (and the temperatures) enter a model."""

from mopl.conditioning.concat import ConcatCondition
from mopl.conditioning.hyper_prompt import HyperPrompt
from mopl.conditioning.hyper_prompt_model import HyperPromptModel
from mopl.conditioning.parameter_mixture import AlphaCoefficients, LoraMixture, ParameterMixture
from mopl.conditioning.sampling import Temperatures, check_weights, sample_temperatures, sample_weights
from mopl.conditioning.saved_models import TuningRecord
from mopl.conditioning.text_prompt import TextPrompt
from mopl.conditioning.value_head import ValueHead
from mopl.conditioning.weighted import WeightedModel

__all__ = [
    "AlphaCoefficients",
    "ConcatCondition",
    "HyperPrompt",
    "HyperPromptModel",
    "LoraMixture",
    "ParameterMixture",
    "Temperatures",
    "TextPrompt",
    "TuningRecord",
    "ValueHead",
    "WeightedModel",
    "check_weights",
    "sample_temperatures",
    "sample_weights",
]
