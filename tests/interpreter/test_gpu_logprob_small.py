"""The logic of `tests/gpu/test_logprob.py` and `test_gathered.py` at toy sizes: no mistake in them waits for a GPU.

The interpreter truncates to bfloat16 where a GPU rounds; here it is made to round, so that errors can be judged.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from mopl.ops.linear_logprob import device as _device
from mopl.ops.linear_logprob.plan import TOY

for name in ("logprob", "gathered"):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", Path(__file__).parents[1] / "gpu" / f"test_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {test: value for test, value in vars(module).items() if test.startswith("test_")}
    assert not found.keys() & globals().keys()
    globals().update(found)


@pytest.fixture(autouse=True)
def small_and_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and tiles, and conversions to bfloat16 that round to nearest."""
    toy = TOY._replace(block=(8, 32), height=24, tile=24 * 48 * 4)
    monkeypatch.setattr(_device, "properties_of", lambda device: toy)
    convert = interpreter._convert_float

    def rounding(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.array(data, dtype=np.float32))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
