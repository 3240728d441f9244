"""Every kernel compiled ahead of time for sm_80, sm_90, sm_100 and gfx942, in a process without the interpreter.

Once with this Triton, and once with the one of the Python that MOPL_TRITON_PYTHON names, where spills are an error; see
`tests/aot/compile_kernels.py`. The tests at the end make sure that the checks can fail.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = Path(__file__).resolve().parent / "aot" / "compile_kernels.py"


def compile_all(python: str, cache: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, str(SCRIPT), *options], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["this Triton", "the Triton of MOPL_TRITON_PYTHON"])
def test_every_kernel_compiles_for_every_target(which: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    python = sys.executable if which == "this Triton" else os.environ.get("MOPL_TRITON_PYTHON")
    if not python:
        pytest.skip(
            "MOPL_TRITON_PYTHON is not set; point it at the Python of an environment with triton==3.6.0, with which "
            "spilled registers are an error"
        )
    # Under xdist the other processors have tests of their own.
    jobs = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    result = compile_all(python, tmp_path, "--jobs", str(jobs))
    summary = re.search(r"\d+ compilations in .*", result.stdout)
    with capsys.disabled():
        first = result.stdout.partition("\n")[0].split(",")[0]
        print(f"\n  aot/{first}: {summary[0] if summary else 'nothing compiled'} ", end="", flush=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert summary, result.stdout


BAD_CASES = """
import triton
import triton.language as tl
from case import Case

@triton.jit
def shared(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.gather(tl.load(x + i), (i * 7) % N, 0))

@triton.jit
def refused(x, y, N: tl.constexpr):
    total = 0
    for i in range(0, N):
        total += tl.load(x + i)
    tl.store(y, total)

def cases():
    types = {"x": "*fp32", "y": "*fp32"}
    return [
        Case("fits", shared, types, {"N": 64}),
        Case("large", shared, types, {"N": 131072}, num_warps=32),
        Case("tensor core", shared, types, {"N": 64}, instructions={"sm_90": ("wgmma",)}),
        Case("unwanted", shared, types, {"N": 64}, absent={"sm_90": ("ld.global",)}),
        Case("refused", refused, types, {"N": 4}),
        Case("assembler", shared, types, {"N": 64}, options={"ptx_options": "--no-such-option"}),
        Case("without a type", shared, {"x": "*fp32"}, {"N": 64}),
    ]
"""


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    (tmp_path / "cases_bad.py").write_text(BAD_CASES)
    result = compile_all(sys.executable, tmp_path / "cache", "--cases", str(tmp_path), "--targets", "sm_90")
    assert result.returncode == 1, result.stdout + result.stderr
    violations: dict[str, list[str]] = {}
    for text in result.stdout.split("\nVIOLATION ")[1:]:
        name = re.match(r"bad +(.*?) +sm_90: ", text)[1]
        violations.setdefault(name, []).append(text)
    for case, problem in {
        "large": "bytes of shared memory, the target has",
        "tensor core": "no wgmma in the assembly",
        "unwanted": "ld.global in the assembly",
        "refused": "Loop-carried variable total",  # which the interpreter accepts
        "assembler": "--no-such-option",
        "without a type": "without a type ['y']",
    }.items():
        assert any(problem in violation for violation in violations[case]), (case, result.stdout)
    assert "fits" not in violations
    assert len(result.stdout.splitlines()) < 60, "a failing assembler prints a whole program"


def test_nothing_compiled_is_an_error(tmp_path: Path) -> None:
    result = compile_all(sys.executable, tmp_path, "--only", "no such table")
    assert result.returncode == 1, result.stdout
