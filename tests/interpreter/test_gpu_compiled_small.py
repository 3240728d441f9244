"""The logic of `tests/gpu/test_compiled.py` at toy sizes, so that no mistake in it waits for a GPU."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("gpu_compiled", Path(__file__).parents[1] / "gpu" / "test_compiled.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
names = ("test_", "compiled_anew")
globals().update({name: value for name, value in vars(module).items() if name.startswith(names)})
