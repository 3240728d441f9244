"""Compile every kernel ahead of time for GPUs that need not be here, and fail on what can be known without one.

    python tests/aot/compile_kernels.py [--only listnet] [--targets sm_90,gfx942] [--brief] [--jobs 2] [--cases FOLDER]
    python tests/aot/compile_kernels.py --record [--only listnet]

A violation is: the compiler refuses; more shared memory than the target has; a missing or an unwanted instruction;
narrow accesses of tensors that should have wide ones; a missing barrier; and, with the Triton of the GPU machines
(3.6.0), registers spilled to memory, and on sm_90 instructions an element that are not within 10 % of those in
`recorded.json` beside the case tables. Other versions only report spills: theirs belong to a flag that they pass to
ptxas. Prints one row a compilation; exits with 1 after any violation. `--brief` leaves out what a second Triton need
not compile.

What is recorded in `recorded.json` of a case: `instructions` that a thread issues for one element in the hot loop (the
issue slots of a warp are a 32nd of that) and for the whole `program`, every loop run once; `registers` of a thread;
bytes of `shared` memory of a block.

Beside it, `compiled_VERSION.json` has the figures of every compilation with one version of Triton, by a hash of all
that the compiler is given. Where that is unchanged, the checks read these figures. Everything else is compiled, and so
is, each day, a part of the unchanged, which must have the figures that are recorded. `--all` compiles everything;
`--record` does so, too, and writes the file of this Triton and, with 3.6.0, `recorded.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path

sys.path[:0] = [str(folder) for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parents[2])]

import triton
from case import SHARED_KIB, WIDE_LOADS_AND_STORES, Case
from measure import TARGETS, TOOLS, Figures, compile_case, count, keys_of, measure, read

from bench import machine_code

VERSION = triton.__version__.split("+")[0]
THE_GPU_MACHINES = VERSION == "3.6.0"
BACKENDS = ("sm_90", "gfx942")  # a target of each of Triton's compilers
MACHINE_CODE = "sm_90"  # the one target that is disassembled: that of the GPU machines
SAMPLE = 8  # compilations a day, of those whose figures are recorded
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what is compiled, and so what is recorded, depends on it
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


def problems(case: Case, target: str, figures: Figures) -> tuple[list[str], list[str]]:
    """Return what is wrong with a compilation, and what is only reported."""
    violations, notes = [], []
    limit = SHARED_KIB[target] * 1024
    if figures.shared > limit:
        violations.append(f"{figures.shared} bytes of shared memory, the target has {limit}")
    violations += [
        f"no {name} in the assembly" for name in case.instructions.get(target, ()) if name not in figures.found
    ]
    violations += [f"{name} in the assembly" for name in case.absent.get(target, ()) if name in figures.found]
    for name, (wide, everything) in figures.wide.items():
        # The rest are single elements, such as that of a target, and a ragged end, for which code may stand twice.
        if 3 * wide < everything or not everything:
            violations.append(f"{wide} of {everything} bytes of {name} are accessed 16 bytes a lane")
    for source, order in figures.order.items():
        written = case.barrier[source]
        if order == "nothing":
            violations.append(f"no read of single elements of {source}, or no write of {written}, to order")
        elif order != "ordered":
            violations.append(f"{written} can be written before every warp has read {source}: no barrier between")
    if figures.spilled:
        fails = THE_GPU_MACHINES and target not in case.may_spill
        (violations if fails else notes).append(f"{figures.spilled} bytes of spilled registers")
    return violations, notes


@dataclass(frozen=True)
class Result:
    """What one compilation has shown: its figures, or why there are none.

    `binary` is the cubin of a case whose machine code is counted.
    """

    figures: Figures | None
    refused: str = ""
    binary: bytes | None = None
    how: str = "recorded"


_CASES: list[tuple[str, Case]] = []
Work = tuple[int, str]  # a case by its number, target


def label_of(index: int, target: str) -> str:
    table, case = _CASES[index]
    return f"{table:<16} {case.name:<46} {target:<7}"


def _compile(job: tuple[int, str, bool]) -> Result:
    index, target, counted = job
    start = time.perf_counter()
    case = _CASES[index][1]
    compiled, printed = compile_case(case, target)
    if compiled is None:
        lines = [line for line in printed.splitlines() if line.strip()]
        return Result(None, "\n    ".join(lines[:3] + lines[3:][-5:]))
    figures = measure(case, target, compiled)
    binary = compiled.asm["cubin"] if counted and target == MACHINE_CODE else None
    return Result(figures, binary=binary, how=f"{time.perf_counter() - start:.1f} s")


def _keys(job: tuple[int, list[str]]) -> dict[str, str]:
    return keys_of(_CASES[job[0]][1], job[1])


def report(work: Work, result: Result) -> list[str]:
    """Print a row of a compilation; return its violations."""
    index, target = work
    label, case, figures = label_of(index, target), _CASES[index][1], result.figures
    if figures is None:
        print(f"{label} does not compile", flush=True)
        return [f"{label.strip()}: {result.refused}"]
    violations, notes = problems(case, target, figures)
    size = f"{figures.registers:>4} registers {figures.shared / 1024:>6.1f} KiB shared {case.num_warps:>2} warps"
    print(f"{label} {size} {result.how:>8}  {'; '.join([*(violations or ['ok']), *notes])}", flush=True)
    return [f"{label.strip()}: {v}" for v in violations]


def count_instructions(results: dict[Work, Result]) -> dict[Work, Result]:
    """Return the results with the figures of their machine code."""
    counted = [work for work, result in results.items() if result.binary]
    programs = machine_code.disassemble([results[work].binary for work in counted], TOOLS) if counted else []
    found = dict(results)
    for work, program in zip(counted, programs, strict=True):
        figures = replace(results[work].figures, **count(_CASES[work[0]][1], program))
        found[work] = replace(results[work], figures=figures, binary=None)
    return found


def costs_of(results: dict[Work, Result]) -> dict[str, dict[str, dict]]:
    """Return what `recorded.json` has of the compilations whose machine code was counted."""
    costs: dict[str, dict[str, dict]] = {}
    for (index, _), result in results.items():
        if result.figures and result.figures.instructions is not None:
            names = ("instructions", "program", "registers", "shared")
            table, case = _CASES[index]
            costs.setdefault(table, {})[case.name] = {name: getattr(result.figures, name) for name in names}
    return costs


def compare_all(costs: dict[str, dict[str, dict]], recorded: dict[str, dict[str, dict]], stale: bool) -> list[str]:
    """Print the instructions of all that were counted; return what is wrong with them."""
    violations = []
    for table, cases in costs.items():
        for name, cost in cases.items():
            label = f"{table:<16} {name:<46} {MACHINE_CODE:<7}"
            print(f"{label} {cost['instructions']} instructions an element, {cost['program']} in all")
            violations += [f"{label.strip()}: {v}" for v in compare(cost, recorded.get(table, {}).get(name))]
    if stale and recorded:
        known = {(table, case.name) for table, case in _CASES}
        gone = [f"{t} {name}" for t, names in recorded.items() for name in names if (t, name) not in known]
        violations += [f"figures are recorded of {name}, which is no case: {RECORD}" for name in gone]
    return violations


def chosen_work(targets: list[str], brief: bool) -> list[Work]:
    """Return what is checked of `_CASES` for which targets."""
    work, kernels = [], set()
    for index, (_, case) in enumerate(_CASES):
        # A brief run has for AMD every kernel once, in its first case, and what only a target's own products can do.
        first = case.kernel.fn not in kernels
        kernels.add(case.kernel.fn)
        for target in targets:
            products = set(case.instructions.get(target, ())) - set(WIDE_LOADS_AND_STORES[target])
            wanted = not brief or target == MACHINE_CODE or products or (first and target in BACKENDS)
            if wanted and (case.targets is None or target in case.targets):
                work.append((index, target))
    return work


class Record:
    """The figures of every compilation with this Triton, in one file.

    Args:
        file: that file, which need not exist; then nothing is known.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries: dict[str, dict[str, dict]] = json.loads(file.read_text()) if file.exists() else {}

    def known(self, work: Work, key: str | None) -> Figures | None:
        """Return the figures of a compilation of that key; None where there are none, or those of something else."""
        table, case = _CASES[work[0]]
        found = read(self.entries.get(table, {}).get(case.name, {}).get(work[1], {}))
        return found[1] if found and key and found[0] == key else None

    def write(self, results: dict[Work, Result], keys: dict[Work, str], others: bool) -> None:
        """Write these results; with `others`, keep what is recorded of other tables."""
        entries: dict[str, dict[str, dict]] = {}
        for (index, target), result in results.items():
            table, case = _CASES[index]
            if result.figures and (index, target) in keys:
                entry = {"key": keys[index, target]} | result.figures.short()
                entries.setdefault(table, {}).setdefault(case.name, {})[target] = entry
        write(self.entries | entries if others else entries, self.file)


def all_keys(pool: ProcessPoolExecutor, work: list[Work]) -> dict[Work, str]:
    """Return the key of each compilation that has one."""
    targets: dict[int, list[str]] = {}
    for index, target in work:
        targets.setdefault(index, []).append(target)
    found = zip(targets, pool.map(_keys, targets.items()), strict=True)
    return {(index, target): key for index, keys in found for target, key in keys.items()}


def todays(known: list[Work], keys: dict[Work, str], size: int) -> set[Work]:
    """Return which compilations of recorded figures are made today all the same: after some weeks all of them were."""
    parts = -(-len(known) // size) if size else 0
    day = datetime.now(timezone.utc).toordinal()
    ordered = sorted(known, key=lambda one: (keys[one], one))  # neighbours in the tables cost much the same
    return {one for number, one in enumerate(ordered) if parts and number % parts == day % parts}


def run(
    work: list[Work], jobs: int, counted: bool, record: Record | None, size: int
) -> tuple[dict, dict, list[str], str]:
    """Check `work` of `_CASES`, printing a row each.

    Args:
        work: what is checked.
        jobs: processes.
        counted: whether instructions are counted.
        record: where known figures are; None compiles everything.
        size: how many compilations of known figures are made today.

    Returns:
        results and keys of all work, violations, and how much was compiled.
    """
    policy = "spills fail" if THE_GPU_MACHINES else "spills are reported"
    print(f"triton {triton.__version__}, {len(work)} compilations, {policy}")
    start = time.perf_counter()
    violations, results = [], {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        keys = all_keys(pool, work) if record is None or record.entries else {}
        known = {}
        for one in work if record else ():
            figures = record.known(one, keys.get(one))
            if figures and (figures.instructions is not None or not counted or one[1] != MACHINE_CODE):
                known[one] = figures
        again = todays(list(known), keys, size)
        compiled = [one for one in work if one not in known or one in again]
        made = iter(pool.map(_compile, [(*one, counted) for one in compiled]))
        for one in work:
            results[one] = next(made) if one not in known or one in again else Result(known[one])
            violations += report(one, results[one])
    results = count_instructions(results)
    for one in sorted(again):
        now, was = results[one].figures, known[one]
        if now is not None and now.short() != was.short():
            violations.append(
                f"{label_of(*one).strip()}: recorded are {was.short()}, but compiled it has {now.short()}: {RECORD}"
            )
    seconds = time.perf_counter() - start
    summary = f"{len(compiled)} compilations in {seconds:.0f} s, {len(known)} of {len(work)} recorded"
    return results, keys, violations, summary


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
    parser.add_argument("--all", action="store_true", help="compile also what is recorded and unchanged")
    parser.add_argument(
        "--sample", type=int, default=SAMPLE, help="how many recorded compilations are made and compared, those of "
        "today; %(default)s by default",
    )  # fmt: skip
    parser.add_argument(
        "--record", action="store_true", help="compile everything and write what it has: compiled_VERSION.json and, "
        "with Triton 3.6.0, recorded.json",
    )  # fmt: skip
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: Triton's interpreter and its compiler cannot share a process; unset it")
    chosen = options.targets.split(",") if options.targets else list(TARGETS)
    if options.record and THE_GPU_MACHINES and MACHINE_CODE not in chosen:
        parser.error(
            f"--record with Triton 3.6.0 needs {MACHINE_CODE} among --targets, whose instructions are recorded"
        )
    _CASES.extend(load_cases(options.cases, options.only))
    file = options.cases / "recorded.json"
    recorded = json.loads(file.read_text()) if file.exists() else {}
    record = Record(options.cases / f"compiled_{VERSION}.json")
    counted = THE_GPU_MACHINES or options.figures
    work = chosen_work(chosen, options.brief)
    use = None if options.all or options.record else record
    results, keys, violations, summary = run(work, options.jobs, counted, use, options.sample)
    costs = costs_of(results)
    if options.record:
        others = options.only is not None
        record.write(results, keys, others)
        if THE_GPU_MACHINES:
            write(recorded | costs if others else costs, file)
    elif counted:
        violations += compare_all(costs, recorded, options.only is None)
    print(f"{summary}, {len(violations)} violations")
    for violation in violations:
        print("VIOLATION", violation)
    return 1 if violations or not work else 0


if __name__ == "__main__":
    sys.exit(main())
