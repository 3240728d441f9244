"""What one ahead-of-time compilation shows, as figures; and the key of a compilation, by which its figures are kept.

A compiler makes the same of the same: the key is a hash of all that it is given, and of what reads the figures.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import triton
from case import Case
from triton._C.libtriton import get_cache_invalidating_env_vars, ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from bench import machine_code

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Figures:
    """What is read of one compilation.

    Args:
        registers: of a thread.
        spilled: bytes of a thread's stack, which is where spilled registers go.
        shared: bytes of shared memory of a block.
        found: what of the case's `instructions` and `absent` the assembly contains.
        wide: for each tensor of the case's `wide`, the bytes that are accessed 16 bytes a lane, and all bytes.
        order: for each source of the case's `barrier`, "ordered", "race", or "nothing" to order.
        instructions: that a thread issues for one element in the hot loop; None where machine code is not read.
        program: instructions of the whole program, every loop run once.
    """

    registers: int
    spilled: int
    shared: int
    found: list[str] = field(default_factory=list)
    wide: dict[str, list[int]] = field(default_factory=dict)
    order: dict[str, str] = field(default_factory=dict)
    instructions: float | None = None
    program: int | None = None

    def short(self) -> dict[str, object]:
        """Return the figures that say something."""
        return {name: value for name, value in asdict(self).items() if value not in (None, [], {})}


def signature_of(case: Case) -> tuple[dict[str, str], set[str]]:
    """Return the type of every argument, "constexpr" where its value is known, and which are not specialized."""
    general = {p.name for p in case.kernel.params if p.do_not_specialize and not p.is_constexpr}
    types = dict.fromkeys(general, "i32") | dict(case.types)
    known = {name for name, value in case.constants.items() if name not in general or value is None}
    return {name: "constexpr" if name in known else types[name] for name in case.kernel.arg_names}, general


def misfit(case: Case) -> str:
    """Return what does not fit between a case and the arguments of its kernel."""
    names = case.kernel.arg_names
    unknown = sorted((set(case.types) | set(case.constants) | set(case.divisible)) - set(names))
    missing = sorted(set(names) - set(case.types) - set(case.constants))
    if unknown or missing:
        return f"the case does not fit the kernel's arguments: unknown {unknown}, without a type {missing}"
    return ""


def source_of(case: Case) -> tuple[ASTSource, dict[str, object]]:
    """Return what is compiled, and the options."""
    signature, general = signature_of(case)
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(case.kernel.arg_names)
        if signature[name].startswith("*") or (name in case.divisible and name not in general)
    }
    constants = {name: value for name, value in case.constants.items() if signature[name] == "constexpr"}
    options = {"num_warps": case.num_warps, **case.options}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    return ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes), options


@functools.cache
def _content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _plain(options: object) -> str:
    """Return the options of a backend without paths: of a library, its content counts."""
    given = dict(vars(options))
    given["extern_libs"] = [(name, _content(Path(path))) for name, path in given.get("extern_libs") or ()]
    return repr(sorted((name, repr(value)) for name, value in given.items()))


def _front_end(source: ASTSource, backend: object, target: GPUTarget, options: object) -> str:
    """Return what the compiler starts from, without paths and line numbers."""
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    arguments = {
        "target": target,
        "options": options,
        "codegen_fns": backend.get_codegen_implementation(options),
        "module_map": backend.get_module_map(),
        "context": context,
    }
    wanted = inspect.signature(source.make_ir).parameters  # Triton 3.4 has no `target` among them
    return source.make_ir(**{name: arguments[name] for name in wanted}).str_nodebug()


def keys_of(case: Case, targets: list[str]) -> dict[str, str]:
    """Return the key of each compilation of a case; none where the front end refuses, which the compiler then reports.

    What the front end makes is the same for all targets of one backend, unless it has floats of 8 bits.
    """
    if misfit(case):
        return {}
    texts: dict[str, str] = {}
    found = {}
    signature, _ = signature_of(case)
    readers = [_content(Path(file)) for file in (__file__, machine_code.__file__)]  # others may read other figures
    for target in targets:
        source, options = source_of(case)
        backend, kind = make_backend(TARGETS[target]), TARGETS[target].backend
        try:
            parsed = backend.parse_options(dict(options, **source.parse_options()))
            if kind not in texts or "f8E" in texts[kind]:
                texts[kind] = _front_end(source, backend, TARGETS[target], parsed)
        except Exception:
            continue  # to be compiled, which reports it
        compiler = (triton.__version__, backend.hash(), sorted(get_cache_invalidating_env_vars().items()))
        asked = (case.instructions.get(target), case.absent.get(target), case.wide, case.barrier, case.elements)
        given = (texts[kind], target, _plain(parsed), signature)
        text = json.dumps([compiler, given, asked, readers], default=list)
        found[target] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return found


def compile_case(case: Case, target: str) -> tuple[object, str]:
    """Return the compiled kernel, or None, and what the compiler printed: after an error that can be a whole PTX."""
    if problem := misfit(case):
        return None, problem
    source, options = source_of(case)
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


def _assembly(compiled) -> str:
    """Return the text of the last readable stage."""
    return compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]


def _registers(compiled) -> tuple[int, int]:
    """Return the registers of a thread and its bytes of stack."""
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


def _accesses(case: Case, program: machine_code.Program) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return the widths and the order of accesses in the PTX of a case."""
    signature, _ = signature_of(case)
    parameters = [n if t.startswith("*") else "" for n, t in signature.items() if t != "constexpr"]
    found = machine_code.accesses(program, parameters)
    wide, order = {}, {}
    for name in case.wide:
        sizes = [access.size for access in found[name]]
        wide[name] = [sum(size for size in sizes if size >= 16), sum(sizes)]
    for source, written in case.barrier.items():
        stores = {access.index for access in found[written] if access.kind == "st"}
        single = [access.index for access in found[source] if access.kind == "ld" and access.size < 16]
        race = any(program.reaches(index, stores, "bar") for index in single)
        order[source] = "race" if race else "ordered" if stores and single else "nothing"
    return wide, order


def measure(case: Case, target: str, compiled) -> Figures:
    """Return the figures of a compiled case but for those of its machine code."""
    text = _assembly(compiled)
    used, spilled = _registers(compiled)
    asked = [*case.instructions.get(target, ()), *case.absent.get(target, ())]
    wide, order = {}, {}
    if (case.wide or case.barrier) and "ptx" in compiled.asm:
        wide, order = _accesses(case, machine_code.Program(text))
    return Figures(
        used, spilled, compiled.metadata.shared, [name for name in dict.fromkeys(asked) if name in text], wide, order
    )


def count(case: Case, program: machine_code.Program) -> dict[str, float]:
    """Return the figures of a case's machine code."""
    threads = 32 * case.num_warps
    return {
        "instructions": float(f"{len(program.hot_path()) * threads / (case.elements or threads):.4g}"),
        "program": len(program.path(0)),
    }


def read(entry: dict) -> tuple[str, Figures] | None:
    """Return the key and the figures of one entry of a record; None where it is no such entry."""
    known = {f.name for f in fields(Figures)}
    if not {"key", "registers", "spilled", "shared"} <= set(entry) <= known | {"key"}:
        return None
    return entry["key"], Figures(**{name: value for name, value in entry.items() if name != "key"})
