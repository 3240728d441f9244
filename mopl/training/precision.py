"""What is lost where parameters of 16 bit are trained."""

from __future__ import annotations

import torch
from torch import nn


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
