"""The kernels on CPU tensors in Triton's interpreter, the files of `tests/interpreter` in one process.

Triton reads TRITON_INTERPRET once, when it is imported, so its interpreter and its compiler cannot share a process. The
files share one: every further process would import torch, transformers and torch's compiler again.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from interpreting import BROKEN, REASON

FOLDER = Path(__file__).resolve().parents[1] / "interpreter"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's: it runs the files itself"
    ),
    pytest.mark.skipif(BROKEN, reason=REASON),
]


def run() -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTEST_ADDOPTS": "",
    }
    files = [str(FOLDER / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)


@pytest.mark.slow
def test_interpreter(capsys: pytest.CaptureFixture) -> None:
    result = run()
    output = result.stdout + result.stderr
    passed = re.search(r"(\d+) passed.* in [\d.]+s", output)
    with capsys.disabled():
        print(f"\n  interpreter: {passed[0] if passed else 'nothing passed'} ", end="", flush=True)
    assert result.returncode == 0, f"exit status {result.returncode} of the inner pytest:\n{output[-20000:]}"
    assert passed, f"no test ran:\n{output[-20000:]}"
    silent = [name for name in FILES if not re.search(rf"{name} \S*\.", output)]
    assert not silent, f"no test ran of {silent}:\n{output[-20000:]}"


def test_there_are_files_to_run() -> None:
    assert FILES
