"""The logic of `tests/gpu/test_list_kernels.py` at toy sizes, so that no mistake in it waits for a GPU."""

import importlib.util
from pathlib import Path

import pytest

from mopl.kernels import listnet, plackett_luce_plan

spec = importlib.util.spec_from_file_location(
    "gpu_list_kernels", Path(__file__).parents[1] / "gpu" / "test_list_kernels.py"
)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
globals().update({name: value for name, value in vars(module).items() if name.startswith("test_")})


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the toy sizes take the paths that the real ones take."""
    monkeypatch.setattr(listnet, "registers_limit", lambda itemsize: 17)
    monkeypatch.setattr(plackett_luce_plan, "PAIRWISE_ITEMS", 5)
    monkeypatch.setattr(plackett_luce_plan, "fused_limit", lambda itemsize: 11)
