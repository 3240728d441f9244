"""What the tests on a GPU share: where they run, sizes there and in Triton's interpreter, random tensors, errors.

The files of `tests/interpreter` named `test_gpu_*_small.py` run the same tests on a CPU, at the toy sizes.
"""

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
BF16, FP16, F32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SLACK = 2.0  # errors are at most so many times those of a float32 reference
GIB = 2**30


def size(real: int, small: int) -> int:
    """Return the size of a GPU, or that of the interpreter."""
    return real if GPU else small


def on_a_gpu(*cases) -> list:
    """Return cases that only a GPU has: in the interpreter, `tests/interpreter` takes every path at every size."""
    return list(cases) if GPU else []


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).mul_(scale).to(dtype)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype = F32) -> Tensor:
    """Return a product with accumulators and a result in float32, by the vendor's library as it is, or in float64."""
    if a.is_cuda and dtype == F32 and a.dtype != F32:
        return torch.mm(a, b, out_dtype=F32)
    return a.to(dtype) @ b.to(dtype)


def error(ours: Tensor, exact: Tensor) -> float:
    """Return the root mean square error over the root mean square."""
    return float((ours.double() - exact).norm() / exact.norm())
