"""What every test needs before torch is imported."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A process that finds no bytecode compiles all that it imports, the tests or torch: for ten seconds and more. Where
# none may be written beside the sources, this process and those that it starts keep theirs in the cache of pytest.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / ".pytest_cache" / "bytecode"))
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"]

# Processors that advertise AMX but trap its instructions (some virtual machines) kill the process on the first
# bf16 matrix product. The library itself never sets this: on sound machines it would only be slower.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Workers of pytest-xdist share the processors; so do the processes that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    )

import gc
import signal
from collections.abc import Iterator

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # the kernels' legs run where only the compiler is installed
    pass
else:
    # The same examples in every run: what failed yesterday can be repeated, and nobody's change fails for another's.
    # `HYPOTHESIS_PROFILE=search` looks for new ones, `night` does so for hours (tests/fuzz).
    settings.register_profile("repeatable", derandomize=True, print_blob=True)
    settings.register_profile("search", max_examples=1000, print_blob=True)
    settings.register_profile("night", max_examples=1000, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long tests first, so that several workers end together; leave out what is not for every run or machine."""
    if "claim" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if "claim" in item.keywords])
        items[:] = [item for item in items if "claim" not in item.keywords]
    items.sort(key=lambda item: "slow" not in item.keywords)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Take tests and libraries out of what `gc.collect` looks at: .8 s at the end of every training by accelerate."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or bindings say at the end that they leak


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; tests that use it are skipped where it is not there."""
    path = Path(os.environ.get("MOPL_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data sets at {path}; set MOPL_TEST_DATA to their folder")
    return path


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a shell; workers of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _share_of_the_gpu() -> None:
    """Give each worker its part of the GPU's memory: what needs more fails there, not in another worker's test."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(0.9 / workers)  # a tenth for six CUDA contexts
