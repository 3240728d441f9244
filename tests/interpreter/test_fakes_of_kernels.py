"""`tests/ops/test_fakes.py` where the kernels run: what they return is what the compiler was told."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("fakes", Path(__file__).parents[1] / "ops" / "test_fakes.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
globals().update({name: value for name, value in vars(module).items() if name.startswith("test_")})
