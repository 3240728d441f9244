"""The logic of `tests/gpu/test_linear_kl.py` at toy sizes, so that no mistake in it waits for a GPU."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("gpu_linear_kl", Path(__file__).parents[1] / "gpu" / "test_linear_kl.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
globals().update({name: value for name, value in vars(module).items() if name.startswith("test_")})
