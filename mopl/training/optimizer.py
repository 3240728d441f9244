"""The optimizer of every training, and what of its updates is lost where parameters are in 16 bit."""

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

    `rates` are those of the parameters whose names begin so, such as `{"value.": 1e-3}`; a group for each.
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


def rounding_of(model: nn.Module) -> str | None:
    """Return what to say of a model whose trained parameters are in 16 bit; None where they are not.

    An update of a bfloat16 number that is smaller than 1/256 of it is rounded away: at a learning rate of 1e-6 hardly
    any of AdamW's updates is left.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for dtype, digits in ((torch.bfloat16, 8), (torch.float16, 11)):
        count = sum(parameter.numel() for parameter in trained if parameter.dtype == dtype)
        if count:
            return (
                f"{count} of {sum(parameter.numel() for parameter in trained)} trained parameters are "
                f"{str(dtype).removeprefix('torch.')}, which rounds away updates below 1/{2**digits} of a value: at "
                "small learning rates hardly any moves. Train in float32"
            )
    return None
