import math
from collections.abc import Iterator

import pytest
import torch
from gpu_problems import DEVICE, GPU


@pytest.fixture
def poison() -> Iterator[None]:
    """Leave NaN in the memory that the allocator hands out next: an output that nobody writes shows."""
    if GPU:
        sizes = (2**30, 2**28, 2**26, *[2**20] * 64, *[2**12] * 512)
        blocks = [torch.full((n,), math.nan, device=DEVICE) for n in sizes]
        del blocks
    yield
    if GPU:
        torch.cuda.empty_cache()
