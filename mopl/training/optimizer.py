"""The optimizer of every training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from mopl.training.loop import TrainingConfig


def adamw(
    model: nn.Module, config: TrainingConfig, device: torch.device, rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """Return AdamW on the trained parameters of a model.

    Args:
        model: The model.
        config: Learning rate and weight decay.
        device: Of the training.
        rates: Learning rates of the parameters whose names begin so, such as `{"value.": 1e-3}`; a group for each.
    """
    groups: dict[str, list[nn.Parameter]] = {prefix: [] for prefix in ("", *(rates or {}))}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[next((prefix for prefix in rates or () if name.startswith(prefix)), "")].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": (rates or {}).get(prefix, config.learning_rate)}
            for prefix, parameters in groups.items()
            if parameters
        ],
        weight_decay=config.weight_decay,
        # The fused update is one call for all parameters: for a small model most of a step is the cost of calls.
        fused=device.type in ("cpu", "cuda"),
    )
