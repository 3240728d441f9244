"""Conditioning by concatenation: the trade-off as extra input features (Ren et al., UAI 2025, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mopl._arguments import check_beta_given, shape_of
from mopl._counted import counted, there_are
from mopl._renamed import renamed_attribute, renamed_keywords


class ConcatCondition(nn.Module):
    """Appends the weights, and on request the normalised betas, to the features of every item.

    It has no parameters: a first layer of width H grows by m × H weights, or 2 m × H with betas.

    Args:
        objectives: m.
        takes_beta: Whether the model is also conditioned on β.
        takes_weights: Whether the weights are appended; false for a model that applies them to what it gives, as
            `mopl.ranking.mixture` does.

    Attributes:
        extra_features: Number of features that are appended.
    """

    temperature = renamed_attribute("ConcatCondition.temperature", "takes_beta")

    @renamed_keywords(temperature="takes_beta")
    def __init__(self, objectives: int, *, takes_beta: bool = False, takes_weights: bool = True):
        super().__init__()
        if objectives < 1:
            raise ValueError(f"objectives is {objectives} but must be at least 1")
        self.objectives = objectives
        self.takes_beta, self.takes_weights = takes_beta, takes_weights
        self.extra_features = objectives * (takes_beta + takes_weights)

    @renamed_keywords(temperature="beta")
    def forward(
        self,
        features: Tensor,  # (B, K, F)
        weights: Tensor,  # (m,), (1, m) or (B, m)
        beta: Tensor | None = None,  # the same
    ) -> Tensor:  # (B, K, F + extra_features)
        """Append the condition to the features.

        Args:
            features: (B, K, F) floating point.
            weights: (m,), (1, m) or (B, m).
            beta: β in the same shapes; only β / ‖β‖₁ is appended, so that the output cannot depend on ‖β‖₁
                (equation 15). Required if and only if the module was made with `takes_beta=True`.

        Returns:
            (B, K, F + extra_features) in the dtype of `features`, differentiable in all three.

        Raises:
            ValueError: If a shape is wrong, or `beta` is missing or not expected.
        """
        if features.ndim != 3:
            raise ValueError(f"features has shape {shape_of(features)} but must be (B, K, F)")
        unwanted = "to a model that is not conditioned on it; make it with takes_beta=True"
        check_beta_given(beta, self.takes_beta, unwanted)
        parts, w = [features], self._per_item(weights, features, "weights")
        if self.takes_weights:
            parts.append(w)
        if beta is not None:
            parts.append(self._per_item(beta / beta.sum(-1, keepdim=True), features, "beta"))
        return torch.cat(parts, -1)

    def _per_item(self, condition: Tensor, features: Tensor, name: str) -> Tensor:
        """Return a condition (m,), (1, m) or (B, m) as (B, K, m) in the dtype of the features."""
        batch, items, _ = features.shape
        if tuple(condition.shape) not in ((self.objectives,), (1, self.objectives), (batch, self.objectives)):
            raise ValueError(
                f"{name} has shape {shape_of(condition)} but {there_are(batch, 'list')} and "
                f"{counted(self.objectives, 'objective')}; "
                f"pass (m,) = ({self.objectives},) or (B, m) = ({batch}, {self.objectives})"
            )
        per_list = condition.to(features).expand(batch, self.objectives)
        return per_list[:, None, :].expand(batch, items, self.objectives)

    def extra_repr(self) -> str:
        """Describe the module in its repr."""
        shown = f"objectives={self.objectives}, takes_beta={self.takes_beta}"
        return shown if self.takes_weights else f"{shown}, takes_weights=False"
