"""Compile every kernel ahead of time for GPUs that need not be here, and fail on what can be known without one.

    python tests/aot/compile_kernels.py [--only listnet] [--targets sm_90,gfx942] [--brief] [--jobs 2] [--cases FOLDER]
    python tests/aot/compile_kernels.py --record [--only listnet]

A violation is: the compiler refuses; more shared memory than the target has; a missing or an unwanted instruction;
narrow accesses of tensors that should have wide ones; a missing barrier; and, with the Triton of the GPU machines
(3.6.0), registers spilled to memory, and on sm_90 instructions an element that are not within 10 % of those in
`recorded.json` beside the case tables. Other versions only report spills: theirs belong to a flag that they pass to
ptxas. Prints one row a compilation; exits with 1 after any violation. `--record` writes `recorded.json` anew, `--brief`
leaves out what a second Triton need not compile.

What is recorded of a case: `instructions` that a thread issues for one element in the hot loop (the issue slots of a
warp are a 32nd of that) and for the whole `program`, every loop run once; `registers` of a thread; bytes of `shared`
memory of a block.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path[:0] = [str(folder) for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parents[2])]

import triton
from case import SHARED_KIB, WIDE_LOADS_AND_STORES, Case
from triton.backends.compiler import GPUTarget

from bench import machine_code

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
THE_GPU_MACHINES = triton.__version__.split("+")[0] == "3.6.0"
BACKENDS = ("sm_90", "gfx942")  # a target of each of Triton's compilers
MACHINE_CODE = "sm_90"  # the one target that is disassembled: that of the GPU machines
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
if triton.__version__.startswith("3.4."):
    # It links for AMD with ROCm's linker, which is not in its wheel; nothing here reads what is linked.
    os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "")
RECORD = "python tests/aot/compile_kernels.py --record"


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


def signature_of(case: Case) -> tuple[dict[str, str], set[str]]:
    """Return the type of every argument, "constexpr" where its value is known, and which are not specialized."""
    general = {p.name for p in case.kernel.params if p.do_not_specialize and not p.is_constexpr}
    types = dict.fromkeys(general, "i32") | dict(case.types)
    known = {name for name, value in case.constants.items() if name not in general or value is None}
    return {name: "constexpr" if name in known else types[name] for name in case.kernel.arg_names}, general


def compile_case(case: Case, target: str) -> tuple[object, str]:
    """Return the compiled kernel, or None, and what the compiler printed: after an error that can be a whole PTX."""
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    unknown = sorted((set(case.types) | set(case.constants) | set(case.divisible)) - set(names))
    missing = sorted(set(names) - set(case.types) - set(case.constants))
    if unknown or missing:
        return None, f"the case does not fit the kernel's arguments: unknown {unknown}, without a type {missing}"
    signature, general = signature_of(case)
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (name in case.divisible and name not in general)
    }
    constants = {name: value for name, value in case.constants.items() if signature[name] == "constexpr"}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, **case.options}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    with tempfile.TemporaryFile("w+") as printed:
        kept = [os.dup(1), os.dup(2)]
        try:
            sys.stdout.flush()
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            compiled, error = triton.compile(source, target=TARGETS[target], options=options), ""
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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    return int(found[1]), int(found[2])


def wide_accesses(case: Case, program: machine_code.Program) -> list[str]:
    """Return what is wrong with the widths and the order of accesses in the PTX of a case."""
    signature, _ = signature_of(case)
    parameters = [n if t.startswith("*") else "" for n, t in signature.items() if t != "constexpr"]
    found = machine_code.accesses(program, parameters)
    violations = []
    for name in case.wide:
        everything = sum(access.size for access in found[name])
        wide = sum(access.size for access in found[name] if access.size >= 16)
        # The rest are single elements, such as that of a target, and a ragged end, for which code may stand twice.
        if 3 * wide < everything or not everything:
            violations.append(f"{wide} of {everything} bytes of {name} are accessed 16 bytes a lane")
    for source, written in case.barrier.items():
        stores = {access.index for access in found[written] if access.kind == "st"}
        single = [access.index for access in found[source] if access.kind == "ld" and access.size < 16]
        if not stores or not single:
            violations.append(f"no read of single elements of {source}, or no write of {written}, to order")
        if any(program.reaches(index, stores, "bar") for index in single):
            violations.append(f"{written} can be written before every warp has read {source}: no barrier between")
    return violations


def figures(case: Case, program: machine_code.Program) -> dict[str, float]:
    """Return what is recorded of the machine code of a case."""
    threads = 32 * case.num_warps
    return {
        "instructions": float(f"{len(program.hot_path()) * threads / (case.elements or threads):.4g}"),
        "program": len(program.path(0)),
    }


def compare(now: dict[str, float], recorded: dict[str, float] | None) -> list[str]:
    """Return what is wrong with the instructions of a case."""
    if recorded is None:
        return [f"no figures are recorded; record them with {RECORD}"]
    violations = []
    for name, what in (("instructions", "instructions an element"), ("program", "instructions in the whole program")):
        ratio = now[name] / recorded[name]
        if abs(ratio - 1) > 0.1:
            remedy = "make it cheaper, or record that it costs" if ratio > 1 else "record that it saves"
            violations.append(
                f"{now[name]} {what}, recorded are {recorded[name]} ({ratio - 1:+.0%}): {remedy} this with {RECORD}"
            )
    return violations


@dataclass(frozen=True)
class Result:
    """What one compilation has shown: a row to print, violations, and what follows only where it compiled.

    `binary` is the cubin of a case whose machine code is counted.
    """

    row: str
    violations: list[str]
    registers: int = 0
    shared: int = 0
    binary: bytes | None = None


def label_of(table: str, case: Case, target: str) -> str:
    return f"{table:<16} {case.name:<46} {target:<7}"


def check(table: str, case: Case, target: str, counted: bool) -> Result:
    """Compile a case and check all but how many instructions that are."""
    start = time.perf_counter()
    compiled, printed = compile_case(case, target)
    label = label_of(table, case, target)
    if compiled is None:
        lines = [line for line in printed.splitlines() if line.strip()]
        return Result(f"{label} does not compile", [f"{label.strip()}: " + "\n    ".join(lines[:3] + lines[3:][-5:])])
    text = assembly(compiled)
    used, spilled = registers(compiled)
    shared = compiled.metadata.shared
    violations, notes = [], []
    limit = SHARED_KIB[target] * 1024
    if shared > limit:
        violations.append(f"{shared} bytes of shared memory, the target has {limit}")
    for wanted in case.instructions.get(target, ()):
        if wanted not in text:
            violations.append(f"no {wanted} in the assembly")
    for unwanted in case.absent.get(target, ()):
        if unwanted in text:
            violations.append(f"{unwanted} in the assembly")
    if (case.wide or case.barrier) and "ptx" in compiled.asm:
        violations += wide_accesses(case, machine_code.Program(text))
    if spilled:
        fails = THE_GPU_MACHINES and target not in case.may_spill
        (violations if fails else notes).append(f"{spilled} bytes of spilled registers")
    seconds = time.perf_counter() - start
    remarks = "; ".join([*(violations or ["ok"]), *notes])
    row = f"{label} {used:>4} registers {shared / 1024:>6.1f} KiB shared {case.num_warps:>2} warps {seconds:>5.1f} s"
    binary = compiled.asm["cubin"] if counted and target == MACHINE_CODE else None
    return Result(f"{row}  {remarks}", [f"{label.strip()}: {v}" for v in violations], used, shared, binary)


_CASES: list[tuple[str, Case]] = []


def _check_number(job: tuple[int, str, bool]) -> Result:
    return check(*_CASES[job[0]], *job[1:])


def count_instructions(
    results: list[tuple[int, Result]], recorded: dict
) -> tuple[list[str], dict[str, dict[str, dict]]]:
    """Print the instructions of all cases that have machine code; return violations and figures."""
    violations, costs = [], {}
    binaries = [(index, result) for index, result in results if result.binary]
    programs = machine_code.disassemble([result.binary for _, result in binaries], TOOLS) if binaries else []
    for (index, result), program in zip(binaries, programs, strict=True):
        table, case = _CASES[index]
        label = label_of(table, case, MACHINE_CODE)
        cost = figures(case, program) | {"registers": result.registers, "shared": result.shared}
        print(f"{label} {cost['instructions']} instructions an element, {cost['program']} in all")
        violations += [f"{label.strip()}: {v}" for v in compare(cost, recorded.get(table, {}).get(case.name))]
        costs.setdefault(table, {})[case.name] = cost
    return violations, costs


def chosen_work(targets: list[str], brief: bool, counted: bool) -> list[tuple[int, str, bool]]:
    """Return what is compiled of `_CASES` for which targets."""
    work, kernels = [], set()
    for index, (_, case) in enumerate(_CASES):
        # A brief run has for AMD every kernel once, in its first case, and what only a target's own products can do.
        first = case.kernel.fn not in kernels
        kernels.add(case.kernel.fn)
        for target in targets:
            products = set(case.instructions.get(target, ())) - set(WIDE_LOADS_AND_STORES[target])
            wanted = not brief or target == MACHINE_CODE or products or (first and target in BACKENDS)
            if wanted and (case.targets is None or target in case.targets):
                work.append((index, target, counted))
    return work


def compile_all(
    targets: list[str], jobs: int, recorded: dict | None, brief: bool = False
) -> tuple[int, list[str], dict[str, dict[str, dict]]]:
    """Compile `_CASES`, printing a row each; return how many compilations that was, violations and figures."""
    work = chosen_work(targets, brief, recorded is not None)
    policy = "spills fail" if THE_GPU_MACHINES else "spills are reported"
    print(f"triton {triton.__version__}, {len(work)} compilations, {policy}")
    results = []
    start = time.perf_counter()
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        for (index, *_), result in zip(work, pool.map(_check_number, work), strict=True):
            print(result.row, flush=True)
            results.append((index, result))
    violations, costs = count_instructions(results, recorded or {})
    print(f"{len(work)} compilations in {time.perf_counter() - start:.0f} s", end=", ")
    return len(work), [v for _, result in results for v in result.violations] + violations, costs


def write(recorded: dict[str, dict[str, dict]], file: Path) -> None:
    """Write figures with a line for every case, so that a change of one is a change of one line."""
    tables = []
    for table, costs in sorted(recorded.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(cost)}" for name, cost in sorted(costs.items()))
        tables.append(f" {json.dumps(table)}: {{\n{lines}\n }}")
    file.write_text("{\n" + ",\n".join(tables) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="compile only the case tables whose name contains this")
    parser.add_argument("--targets", help="comma-separated; all of " + ", ".join(TARGETS) + " by default")
    parser.add_argument(
        "--brief", action="store_true", help=f"compile for targets other than {MACHINE_CODE} only what must contain "
        f"instructions of tensor cores, each target's own, and for {BACKENDS[1]} each kernel once: another Triton "
        "compiles the rest",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--cases", type=Path, default=Path(__file__).resolve().parent, help="folder of case tables")
    parser.add_argument("--figures", action="store_true", help="compare with recorded.json whatever the Triton")
    parser.add_argument("--record", action="store_true", help="write recorded.json anew; needs Triton 3.6.0")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: Triton's interpreter and its compiler cannot share a process; unset it")
    if options.record and not THE_GPU_MACHINES:
        parser.error(f"--record needs Triton 3.6.0, that of the GPU machines; this is {triton.__version__}")
    chosen = options.targets.split(",") if options.targets else list(TARGETS)
    _CASES.extend(load_cases(options.cases, options.only))
    file = options.cases / "recorded.json"
    recorded = json.loads(file.read_text()) if file.exists() else {}
    compared = {} if options.record else recorded if THE_GPU_MACHINES or options.figures else None
    if options.record:
        chosen = [MACHINE_CODE]
    count, violations, costs = compile_all(chosen, options.jobs, compared, options.brief)
    if options.record:
        write(costs if options.only is None else recorded | costs, file)
        violations = [v for v in violations if RECORD not in v]
    elif compared and options.only is None:
        known = {(table, case.name) for table, case in _CASES}
        stale = [f"{t} {name}" for t, names in recorded.items() for name in names if (t, name) not in known]
        violations += [f"figures are recorded of {name}, which is no case: {RECORD}" for name in stale]
    print(f"{len(violations)} violations")
    for violation in violations:
        print("VIOLATION", violation)
    return 1 if violations or not count else 0


if __name__ == "__main__":
    sys.exit(main())
