"""The elementary functions of `kernels/_math.py` in Triton's interpreter, against float64 or higher."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from mopl.kernels._math import log1p

pytestmark = pytest.mark.usefixtures("careful_memory")


@triton.jit
def log1p_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, log1p(tl.load(x + i)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 6e-16)])
def test_log1p_keeps_every_digit_of_tiny_and_of_large_arguments(dtype: torch.dtype, tolerance: float) -> None:
    magnitudes = torch.logspace(-12, 4, 2048, dtype=torch.float64).to(dtype)
    negative = -torch.logspace(-12, -0.01, 2048, dtype=torch.float64).to(dtype)
    for x in (magnitudes, negative):
        y = torch.empty_like(x)
        log1p_kernel[(1,)](x, y, BLOCK=2048)
        exact = np.log1p(x.numpy().astype(np.longdouble))
        assert float(np.abs(y.numpy() / exact - 1).max()) < tolerance


def test_log1p_of_zero_is_zero() -> None:
    y = torch.empty(2)
    log1p_kernel[(1,)](torch.zeros(2), y, BLOCK=2)
    assert torch.equal(y, torch.zeros(2))
