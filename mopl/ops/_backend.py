"""The one place that chooses between a kernel and its PyTorch twin."""

from __future__ import annotations

import os

from torch import Tensor

# Read once: Triton itself reads the variable when a kernel is decorated, so a later change could not be honoured.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Say whether ops on `tensor` run as Triton kernels: on a GPU, and on a CPU in Triton's interpreter."""
    return tensor.is_cuda or INTERPRETED
