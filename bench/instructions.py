"""How many instructions a warp of each launched kernel issues: from the machine code of exactly what ops launch.

    python -m bench.instructions          # compile what is not in kernel_instructions.json yet, for an H200

Triton compiles without a GPU. The figures belong to one version of Triton, 3.6 where it matters: that of GPU machines.
A kernel whose figures are missing is predicted by its bytes alone, and the table says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mopl._files import write_file

FILE = Path(__file__).with_name("kernel_instructions.json")

# Sizes whose rows are aligned where they are multiples of 16.
SIZES = ("items", "columns", "vocabulary", "size")


def specialisation(name: str, given: Mapping[str, Any], constant: set[str], warps: int) -> str:
    """Return what of a launch decides its machine code."""
    parts = []
    for argument, value in given.items():
        if isinstance(value, Tensor):
            parts.append(f"{argument}:{str(value.dtype).removeprefix('torch.')}")
        elif argument in constant:
            parts.append(f"{argument}={value}")
        elif value is None:
            parts.append(f"{argument}=None")
        elif argument in SIZES:
            parts.append(f"{argument}%16{'=' if value % 16 == 0 else '!'}=0")
    return f"{name} warps={warps} {' '.join(parts)}"


def recorded() -> dict[str, list[int]]:
    """Return for every specialisation the instructions of the whole program, every loop run once, and of its loop."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def main() -> None:
    """Compile what ops launch at the goal sizes and note what is new."""
    argparse.ArgumentParser(description=__doc__).parse_args()  # a word it does not know must not rewrite the file
    import triton
    from triton.runtime.jit import JITFunction

    from bench import machine_code, recording
    from bench.cards import CARDS
    from bench.model_cases import cases

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    known, used, launch = recorded(), set(), JITFunction.run
    observe = recording.record_triton

    def compiling(into: recording.Recording) -> Callable:
        note = observe(into)

        def run(self, *args, grid, warmup=False, **options):
            note(self, *args, grid=grid, **options)
            code = into.launches[-1].code
            used.add(code)
            if code and code not in known:
                compiled = launch(self, *args, grid=grid, warmup=True, **options)
                [program] = machine_code.disassemble([compiled.asm["cubin"]], tools)
                loop = len(program.hot_path()) if program.loops else 0
                known[code] = [len(program.path(0)), loop]
                print(known[code], code, flush=True)

        return run

    with mock.patch.object(recording, "record_triton", compiling):
        for case in cases():
            if case.make is not None and case.peer_of is None:
                make = case.make
                recording.record(CARDS["H200"], lambda make=make: make(recording.DEVICE))
    rows = (f"{json.dumps(code)}: {json.dumps(known[code])}" for code in sorted(used & known.keys()))
    write_file(FILE, "{\n" + ",\n".join(rows) + "\n}\n")
    print(f"{len(known)} kernels with Triton {triton.__version__} and torch {torch.__version__}")


if __name__ == "__main__":
    main()
