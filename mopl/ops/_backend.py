"""The one place that chooses between a kernel and its PyTorch twin."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from mopl._extras import version_of

# Read once: Triton itself reads the variable when a kernel is decorated, so a later change could not be honoured.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# The oldest that kernels work with, as in pyproject.toml; .ci/run compiles them with this Triton. With 3.3 the
# Plackett-Luce kernels do not compile. Torch 2.8 is the first with products of 16-bit operands that keep float32
# results, and what it brings is Triton 3.4.
OLDEST_TORCH = (2, 8)
OLDEST_TRITON = (3, 4)
# Programs of one launch: CUDA's limit of a grid's first dimension (Programming Guide, table of technical
# specifications); HIP's is 2^32 threads (hipModuleLaunchKernel), 8 warps of 64 a program.
MAX_PROGRAMS = 2**32 // 512 - 1 if torch.version.hip else 2**31 - 1


def use_triton(tensor: Tensor) -> bool:
    """Say whether ops on `tensor` run as Triton kernels: on a GPU, and on a CPU in Triton's interpreter.

    Raises:
        ImportError: if they do, but Triton is missing, or it or torch is older than the kernels need.
    """
    if not (tensor.is_cuda or INTERPRETED):
        return False
    if not torch.compiler.is_compiling():  # which cannot trace an import; what it makes of this calls the ops again
        _require_kernels()
    return True


def path_for(cpu: ModuleType, kernels: str, tensor: Tensor) -> ModuleType:
    """Return the module with the passes of an op for a tensor: that of the CPU, or the one that launches its kernels.

    Not for what a compiler traces: it cannot trace the import.
    """
    return importlib.import_module(kernels) if use_triton(tensor) else cpu


@functools.cache
def _require_kernels() -> None:
    """Raise unless kernels can run; what can be said of that does not change once they can."""
    found_torch = torch.__version__
    if version_of(found_torch) < OLDEST_TORCH:
        raise ImportError(_message("torch", OLDEST_TORCH, found_torch), name="torch")
    try:
        import triton
    except ImportError as error:
        found = f"none beside torch {found_torch}"
        raise ImportError(_message("Triton", OLDEST_TRITON, found), name="triton") from error
    if version_of(triton.__version__) < OLDEST_TRITON:
        found = f"{triton.__version__} beside torch {found_torch}"
        raise ImportError(_message("Triton", OLDEST_TRITON, found), name="triton")


def _message(what: str, oldest: tuple[int, int], found: str) -> str:
    torch_needed = ".".join(map(str, OLDEST_TORCH))
    return (
        f"mopl's kernels need {what} {'.'.join(map(str, oldest))} or later, but found {found}; "
        f"pip install --upgrade 'torch>={torch_needed}' brings both, in a build for a GPU"
    )
