"""Compile every kernel ahead of time for GPUs that need not be here, and fail on what can be known without one.

    python tests/aot/compile_kernels.py [--only listnet] [--targets sm_90,gfx942] [--jobs 2] [--cases FOLDER]

A violation is: the compiler refuses; more shared memory than the target has; a missing or an unwanted instruction;
and, with the Triton of the GPU machines (3.6.0), registers spilled to memory. Other versions only report spills:
theirs belong to a flag that they pass to ptxas. Prints one row a compilation; exits with 1 after any violation.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton
from case import Case
from triton.backends.compiler import GPUTarget

# Architecture and the shared memory of one block (KiB), from the vendors' tables of compute capabilities.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
SPILLS_FAIL = triton.__version__.split("+")[0] == "3.6.0"


def load_cases(folder: Path, only: str | None) -> list[tuple[str, Case]]:
    """Return (table, case) for every `cases_<table>.py` in the folder."""
    found = []
    for path in sorted(folder.glob("cases_*.py")):
        table = path.stem.removeprefix("cases_")
        if only is None or only in table:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
            found += [(table, case) for case in module.cases()]
    return found


def compile_case(case: Case, target: str) -> tuple[object, str]:
    """Return the compiled kernel, or None, and what the compiler printed: after an error that can be a whole PTX."""
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    unknown = sorted((set(case.types) | set(case.constants) | set(case.divisible)) - set(names))
    missing = sorted(set(names) - set(case.types) - set(case.constants))
    if unknown or missing:
        return None, f"the case does not fit the kernel's arguments: unknown {unknown}, without a type {missing}"
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in case.divisible
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=attributes)
    options = {"num_warps": case.num_warps, **case.options}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    with tempfile.TemporaryFile("w+") as printed:
        kept = [os.dup(1), os.dup(2)]
        try:
            sys.stdout.flush()
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            compiled, error = triton.compile(source, target=TARGETS[target][0], options=options), ""
        except Exception as problem:
            compiled, error = None, f"{type(problem).__name__}: {problem}"
        finally:
            sys.stdout.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            for descriptor in kept:
                os.close(descriptor)
        printed.seek(0)
        return compiled, error or printed.read()


def assembly(compiled) -> str:
    """Return the text of the last readable stage."""
    return compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]


def registers(compiled) -> tuple[int, int]:
    """Return the registers of a thread and its bytes of stack, which is where spilled registers go."""
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        counts = [int(n) for n in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text)]
        return int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]), sum(counts)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    return int(found[1]), int(found[2])


def check(table: str, case: Case, target: str) -> tuple[str, list[str]]:
    """Return the row to print and the violations."""
    start = time.perf_counter()
    compiled, printed = compile_case(case, target)
    label = f"{table:<16} {case.name:<46} {target:<7}"
    if compiled is None:
        lines = [line for line in printed.splitlines() if line.strip()]
        return f"{label} does not compile", [f"{label.strip()}: " + "\n    ".join(lines[:3] + lines[3:][-5:])]
    text = assembly(compiled)
    used, spilled = registers(compiled)
    shared = compiled.metadata.shared
    violations, notes = [], []
    limit = TARGETS[target][1] * 1024
    if shared > limit:
        violations.append(f"{shared} bytes of shared memory, the target has {limit}")
    for wanted in case.instructions.get(target, ()):
        if wanted not in text:
            violations.append(f"no {wanted} in the assembly")
    for unwanted in case.absent.get(target, ()):
        if unwanted in text:
            violations.append(f"{unwanted} in the assembly")
    if spilled:
        fails = SPILLS_FAIL and target not in case.may_spill
        (violations if fails else notes).append(f"{spilled} bytes of spilled registers")
    seconds = time.perf_counter() - start
    remarks = "; ".join([*violations, *notes]) or "ok"
    row = f"{label} {used:>4} registers {shared / 1024:>6.1f} KiB shared {case.num_warps:>2} warps {seconds:>5.1f} s"
    return f"{row}  {remarks}", [f"{label.strip()}: {v}" for v in violations]


_CASES: list[tuple[str, Case]] = []


def _check_number(job: tuple[int, str]) -> tuple[str, list[str]]:
    return check(*_CASES[job[0]], job[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="compile only the case tables whose name contains this")
    parser.add_argument("--targets", help="comma-separated; all of " + ", ".join(TARGETS) + " by default")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--cases", type=Path, default=Path(__file__).resolve().parent, help="folder of case tables")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: Triton's interpreter and its compiler cannot share a process; unset it")
    chosen = options.targets.split(",") if options.targets else list(TARGETS)
    _CASES.extend(load_cases(options.cases, options.only))
    jobs = [
        (index, target)
        for index, (_, case) in enumerate(_CASES)
        for target in chosen
        if case.targets is None or target in case.targets
    ]
    print(f"triton {triton.__version__}, {len(jobs)} compilations, spills {'fail' if SPILLS_FAIL else 'are reported'}")
    violations = []
    start = time.perf_counter()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        for row, found in pool.map(_check_number, jobs):
            print(row, flush=True)
            violations += found
    print(f"{len(jobs)} compilations in {time.perf_counter() - start:.0f} s, {len(violations)} violations")
    for violation in violations:
        print("VIOLATION", violation)
    return 1 if violations or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
