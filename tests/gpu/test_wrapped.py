"""A model with a fused head inside DDP and FSDP2 on one GPU, in a process of its own, against the model alone.

`tests/interpreter/test_gpu_wrapped_small.py` runs the same test on a CPU, without kernels, so that no mistake in this
file waits for a GPU; several processes are a matter of `tests/language_models/test_fuse_distributed.py`.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytestmark = pytest.mark.gpu

TESTS = Path(__file__).resolve().parents[1]


def test_gradients_under_ddp_and_fsdp2_equal_those_of_the_model_alone() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    paths = {"PYTHONPATH": os.pathsep.join(str(path) for path in (TESTS.parent, TESTS, *sys.path) if str(path))}
    dtypes = ["float32", "bfloat16", "float16"] if torch.cuda.is_available() else ["float32"]
    settings = {"NCCL_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "distributed" / "fuse_gradients.py"), *dtypes],
        env={**os.environ, **group, **paths, **settings},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all gradients equal" in done.stdout
