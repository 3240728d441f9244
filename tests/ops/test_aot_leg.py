"""Every kernel compiled ahead of time for sm_80, sm_90, sm_100 and gfx942, in a process without the interpreter.

Once with this Triton, and once with the one of the Python that MOPL_TRITON_PYTHON names, where spills are an error; see
`tests/aot/compile_kernels.py`. Where both compile, this Triton leaves to the other what says least: kernels without
products on tensor cores, for sm_80 and sm_100, and all but one case of each for gfx942. Neither compiles a kernel anew
of whose compilation all figures are recorded. The other tests make sure that the checks can fail.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[2]

from bench.machine_code import Program

SCRIPT = ROOT / "tests" / "aot" / "compile_kernels.py"


def compile_all(python: str, cache: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, str(SCRIPT), *options], env=environment, capture_output=True, text=True)


def kept(which: str) -> Path:
    """Return the folder in which Triton keeps what it has compiled, by content; it never clears it, so this does."""
    folder = ROOT / ".aot-cache" / which.split()[0]
    if folder.is_dir() and len(os.listdir(folder)) > 4000:
        shutil.rmtree(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("which", ["this Triton", "the Triton of MOPL_TRITON_PYTHON"])
def test_every_kernel_compiles_for_every_target(which: str, capsys: pytest.CaptureFixture) -> None:
    python = sys.executable if which == "this Triton" else os.environ.get("MOPL_TRITON_PYTHON")
    if not python:
        pytest.skip(
            "MOPL_TRITON_PYTHON is not set; point it at the Python of an environment with triton==3.6.0, with which "
            "spilled registers are an error"
        )
    # Under xdist the other processors have tests of their own.
    jobs = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    brief = ("--brief",) if which == "this Triton" and os.environ.get("MOPL_TRITON_PYTHON") else ()
    result = compile_all(python, kept(which), "--jobs", str(jobs), *brief)
    summary = re.search(r"\d+ compilations in .*", result.stdout)
    with capsys.disabled():
        first = result.stdout.partition("\n")[0].split(",")[0]
        print(f"\n  aot/{first}: {summary[0] if summary else 'nothing compiled'} ", end="", flush=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert summary, result.stdout


KERNELS = """
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

@triton.jit
def copied(x, y, size, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i, mask=i < size), mask=i < size)

@triton.jit
def in_place(x, y, size, pivot, BARRIER: tl.constexpr, N: tl.constexpr):
    first = tl.load(x + pivot)
    if BARRIER:
        tl.debug_barrier()
    for start in range(0, size, N):
        i = start + tl.arange(0, N)
        tl.store(y + i, tl.exp(tl.load(x + i) - first))

@triton.jit(do_not_specialize=["size"])
def general(x, y, size, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i, mask=i < size), mask=i < size)

types = {"x": "*fp32", "y": "*fp32"}
order = {"types": types | {"size": "i32", "pivot": "i32"}, "barrier": {"x": "y"}, "wide": ("x", "y"), "elements": 1024}
copy = {"types": types | {"size": "i32"}, "constants": {"N": 1024}, "wide": ("x", "y")}
good = [
    Case("wide", copied, divisible=("size",), **copy),
    Case("same", copied, divisible=("size",), **copy),
    Case("ordered", in_place, constants={"BARRIER": True, "N": 1024}, **order),
]
"""

BAD_CASES = (
    KERNELS
    + """
def cases():
    return good + [
        Case("fits", shared, types, {"N": 64}),
        Case("narrow", copied, **copy),
        Case("race", in_place, constants={"BARRIER": False, "N": 1024}, **order),
        Case("nothing to order", copied, barrier={"y": "x"}, divisible=("size",), **copy),
        Case("never divisible", general, divisible=("size",), **copy),
        Case("never constant", general, types, {"N": 1024, "size": 1}, absent={"sm_90": (".param .u32",)}),
        Case("large", shared, types, {"N": 131072}, num_warps=32),
        Case("tensor core", shared, types, {"N": 64}, instructions={"sm_90": ("wgmma",)}),
        Case("unwanted", shared, types, {"N": 64}, absent={"sm_90": ("ld.global",)}),
        Case("refused", refused, types, {"N": 4}),
        Case("assembler", shared, types, {"N": 64}, options={"ptx_options": "--no-such-option"}),
        Case("without a type", shared, {"x": "*fp32"}, {"N": 64}),
    ]
"""
)


def violations_of(result: subprocess.CompletedProcess) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in result.stdout.split("\nVIOLATION ")[1:]:
        case = re.match(r"bad +(.*?) +sm_90: ", text)
        found.setdefault(case[1] if case else "", []).append(text)
    return found


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    (tmp_path / "cases_bad.py").write_text(BAD_CASES)
    result = compile_all(sys.executable, tmp_path / "cache", "--cases", str(tmp_path), "--targets", "sm_90")
    assert result.returncode == 1, result.stdout + result.stderr
    violations = violations_of(result)
    for case, problem in {
        "large": "bytes of shared memory, the target has",
        "tensor core": "no wgmma in the assembly",
        "unwanted": "ld.global in the assembly",
        "refused": "Loop-carried variable total",  # which the interpreter accepts
        "assembler": "--no-such-option",
        "without a type": "without a type ['y']",
        "narrow": "0 of 32 bytes of x are accessed 16 bytes a lane",
        "race": "y can be written before every warp has read x: no barrier between",
        "nothing to order": "no read of single elements of y, or no write of x, to order",
        "never divisible": "0 of 32 bytes of x are accessed 16 bytes a lane",
        "never constant": ".param .u32 in the assembly",
    }.items():
        assert any(problem in violation for violation in violations.pop(case)), (case, result.stdout)
    assert not violations, violations  # the good cases among them have none
    assert len(result.stdout.splitlines()) < 80, "a failing assembler prints a whole program"


def test_labels_of_inline_assembly_are_followed() -> None:
    # As Triton waits for a barrier on sm_100: the same label in one scope after another.
    wait = "{\nwaitLoop:\n mbarrier.try_wait.b64 complete, [%r1], 0;\n @!complete bra.uni waitLoop;\n}\n"
    program = Program(f"$L__BB0_1: // loop\n{2 * wait} @%p1 bra $L__BB0_1;\n ret;")
    assert program.successors == [[1], [0, 2], [3], [2, 4], [0, 5], []]


def test_a_change_of_the_instructions_an_element_is_found(tmp_path: Path) -> None:
    (tmp_path / "cases_bad.py").write_text(KERNELS + "cases = lambda: good")
    options = ("--cases", str(tmp_path), "--targets", "sm_90", "--figures")

    def run(recorded: dict) -> subprocess.CompletedProcess:
        (tmp_path / "recorded.json").write_text(json.dumps({"bad": recorded}))
        return compile_all(sys.executable, tmp_path / "cache", *options)

    result = run({})
    assert "no figures are recorded; record them with" in str(violations_of(result)["wide"])
    rows = re.findall(r"bad +(\w+) .* ([\d.]+) instructions an element, (\d+) in all", result.stdout)
    now = {name: {"instructions": float(cost), "program": int(program)} for name, cost, program in rows}
    assert 5 < now["ordered"]["instructions"] < 20, now  # load, subtract, exponential, store, and the loop
    assert now["wide"]["instructions"] == now["wide"]["program"], "without a loop all of the program counts"
    was = {name: {figure: n * 1.2 for figure, n in figures.items()} for name, figures in now.items()}
    was["wide"] = {"instructions": now["wide"]["instructions"], "program": now["wide"]["program"] / 1.2}
    violations = violations_of(run({**was, "same": now["same"], "gone": {}}))
    assert "(-17%): record that it saves this with python tests/aot/compile_kernels.py --record" in str(
        violations["ordered"]
    )
    assert "instructions in the whole program, recorded are" in str(violations["wide"])
    assert "(+20%): make it cheaper, or record that it costs this with" in str(violations["wide"])
    assert "figures are recorded of bad gone, which is no case" in str(violations[""])
    assert "same" not in violations


def test_what_is_recorded_is_compiled_where_it_changed(tmp_path: Path) -> None:
    cases, cache, version = tmp_path / "cases", tmp_path / "cache", triton.__version__.split("+")[0]
    file = cases / f"compiled_{version}.json"
    cases.mkdir()
    text = KERNELS + "cases = lambda: good"

    def run(source: str, *options: str) -> subprocess.CompletedProcess:
        (cases / "cases_bad.py").write_text(source)
        return compile_all(sys.executable, cache, "--cases", str(cases), "--targets", "sm_90", *options)

    def compiled(result: subprocess.CompletedProcess) -> tuple[int, int]:
        made, known = re.search(r"(\d+) compilations in .*?, (\d+) of 3 recorded", result.stdout).groups()
        return int(made), int(known)

    result = run(text, "--record")
    assert (result.returncode, compiled(result)) == (0, (3, 0)), result.stdout + result.stderr
    record = json.loads(file.read_text())
    assert record["bad"]["wide"]["sm_90"]["wide"] == {"x": [32, 32], "y": [32, 32]}
    assert record["bad"]["ordered"]["sm_90"]["order"] == {"x": "ordered"}

    # Neither a comment nor where the lines stand changes what the compiler is given.
    moved = text.replace("@triton.jit\ndef in_place", "# of this\n\n@triton.jit\ndef in_place")
    result = run(moved, "--sample", "0")
    assert (result.returncode, compiled(result)) == (0, (0, 3)), result.stdout + result.stderr
    assert len(re.findall(r"recorded  ok", result.stdout)) == 3

    # A changed kernel is compiled, and so is a case of which something else is asked.
    changed = text.replace("    if BARRIER:", "    if not BARRIER:")
    changed = changed.replace('("wide", copied', '("wide", copied, absent={"sm_90": ("ld.global",)}')
    result = run(changed, "--sample", "0")
    assert compiled(result) == (2, 1), result.stdout
    violations = violations_of(result)
    assert "no barrier between" in str(violations["ordered"])
    assert "ld.global in the assembly" in str(violations["wide"])

    # The checks read what is recorded, a part of which is compiled all the same.
    record["bad"]["same"]["sm_90"] |= {"shared": 10**6, "registers": 7}
    file.write_text(json.dumps(record))
    result = run(text, "--sample", "0")
    assert compiled(result) == (0, 3), result.stdout
    assert "1000000 bytes of shared memory" in str(violations_of(result))
    result = run(text)
    assert compiled(result) == (3, 3), result.stdout
    assert list(violations_of(result)) == ["same"], result.stdout
    assert "recorded are {'registers': 7, " in str(violations_of(result))
    result = run(text, "--all")
    assert (result.returncode, compiled(result)) == (0, (3, 0)), result.stdout

    # What is recorded anew leaves nothing of cases that are gone.
    run(text.replace('    Case("same"', '    # Case("same"'), "--record")
    assert set(json.loads(file.read_text())["bad"]) == {"wide", "ordered"}


def test_each_recorded_compilation_has_its_day(monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
import sys, datetime
sys.path[:0] = [sys.argv[1]]
import compile_kernels
keys = {(i, "sm_90"): f"{i:03}" for i in range(100)}
seen = set()
for day in range(13):
    class Day(datetime.datetime):
        now = classmethod(lambda cls, zone, day=day: datetime.datetime(2026, 11, 1 + day))
    compile_kernels.datetime = Day
    today = compile_kernels.todays(list(keys), keys, 8)
    assert 7 <= len(today) <= 8 and not today & seen, today
    seen |= today
assert seen == set(keys)
assert not compile_kernels.todays(list(keys), keys, 0)
"""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    subprocess.run([sys.executable, "-c", program, str(SCRIPT.parent)], check=True)


def test_nothing_compiled_is_an_error(tmp_path: Path) -> None:
    result = compile_all(sys.executable, tmp_path, "--only", "no such table")
    assert result.returncode == 1, result.stdout
