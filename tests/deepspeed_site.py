"""DeepSpeed for the processes that tests launch: the installed one, or the one in a folder of its own.

DeepSpeed is not in the test environment, because its installation needs torch to be there already. It is found in the
folder that MOPL_DEEPSPEED_SITE names:

    DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation --target FOLDER \
        deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest

PATIENCE = 240.0  # seconds; .ci/run installs DeepSpeed beside the tests


def launch_environment() -> dict[str, str]:
    """Return what processes on CPUs need in their environment to import DeepSpeed; skip the test where it is not.

    A script that they run calls `without_compiled_ops` before it initialises DeepSpeed.
    """
    paths = os.environ.get("PYTHONPATH", "")
    if importlib.util.find_spec("deepspeed") is None:
        site = os.environ.get("MOPL_DEEPSPEED_SITE")
        if site is None:
            pytest.skip("DeepSpeed is neither installed nor in a folder that MOPL_DEEPSPEED_SITE names")
        until = time.monotonic() + PATIENCE
        while not (Path(site) / "deepspeed").is_dir():
            assert time.monotonic() < until, f"MOPL_DEEPSPEED_SITE is {site}, where there is no deepspeed"
            time.sleep(1.0)
        paths = os.pathsep.join(filter(None, [paths, str(Path(site).resolve())]))
    return {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}


def settings_of(place: Path, stage: int) -> Path:
    """Write DeepSpeed's settings, under which even the smallest parameters are cut."""
    file = place / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    return file


def without_compiled_ops() -> None:
    """Let DeepSpeed compile nothing: its collectives on shared memory would take minutes first, and gloo serves.

    Nor does it import what only its autotuner uses, or mark the ranges of a profiler; and what it has imported is no
    garbage, which it looks for wherever it makes an engine.
    """
    sys.modules.setdefault("xgboost", None)
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # which it imports with the first engine, and torch's compiler
    import deepspeed.utils.nvtx

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.nvtx.enable_nvtx = False
    gc.freeze()
