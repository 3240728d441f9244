"""How the weights of the objectives (and the temperatures) enter a model."""

from mopl.conditioning.concat import ConcatCondition
from mopl.conditioning.sampling import Temperatures, check_weights, sample_temperatures, sample_weights

__all__ = ["ConcatCondition", "Temperatures", "check_weights", "sample_temperatures", "sample_weights"]
