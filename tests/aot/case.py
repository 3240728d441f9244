"""What one ahead-of-time compilation is; every `cases_<name>.py` beside this file has `cases() -> list[Case]`.

Nothing here or in the case tables imports torch, so that the leg also runs where only Triton is installed.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What a kernel with tl.dot on 16-bit operands must contain: the tensor core instruction of each target.
TENSOR_CORES = {"sm_80": ("mma.sync",), "sm_90": ("wgmma",), "sm_100": ("tcgen05.mma",), "gfx942": ("v_mfma",)}

# Shared memory that one block may have (KiB), from CUDA's table of compute capabilities and AMD's size of the LDS.
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}

# What a kernel that reads (and writes) aligned rows must contain: accesses of 16 bytes a lane.
WIDE_LOADS = {**dict.fromkeys(("sm_80", "sm_90", "sm_100"), ("ld.global.v4",)), "gfx942": ("global_load_dwordx4",)}
WIDE_LOADS_AND_STORES = {
    target: (*names, names[0].replace("ld.", "st.").replace("load", "store")) for target, names in WIDE_LOADS.items()
}

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}  # bytes of an element, by its type in Triton's words

# Approximate logarithms have a large relative error near 1, where the digits of tiny losses are. What NVIDIA's compiler
# calls approximate, AMD's instruction is not: v_log_f32 is good to one unit in the last place.
NO_APPROXIMATE_LOG = {target: ("lg2.approx",) for target in ("sm_80", "sm_90", "sm_100")}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    Args:
        name: what the table prints, such as "forward bf16 K=120 m=5".
        kernel: the `@triton.jit` function.
        types: the type of every argument that is no constant, in Triton's words: "*fp32", "*i1" (a boolean mask),
            "i32", "tensordesc<bf16[128,64]>".
        constants: the value of every constexpr argument, and of arguments that are None or 1 at launch.
        divisible: names of the integer arguments that are multiples of 16 at launch; pointers always are. As in a
            launch, the compiler is told of neither a 1 nor a multiple that the kernel does not specialize.
        num_warps: as at launch.
        num_stages: as at launch; None leaves the target's default.
        options: further options of `triton.compile`.
        instructions: for each target named, the substrings that the assembly must contain; see `TENSOR_CORES`.
        absent: for each target named, the substrings that it must not contain.
        targets: the targets to compile for; None means all.
        may_spill: targets where register spills are only reported, never an error.
        wide: names of the tensors that NVIDIA's GPUs read and write 16 bytes a lane, but for single elements.
        barrier: for each tensor, one written in its place: between what every warp reads of the first (less than 16
            bytes) and the first write to the second, all warps of the program must meet.
        elements: elements that a program works on in one iteration of its hot loop, or at all without a loop: what
            instructions are counted by; by default one a thread.
    """

    name: str
    kernel: object
    types: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    divisible: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    instructions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    absent: Mapping[str, Sequence[str]] = field(default_factory=dict)
    targets: Sequence[str] | None = None
    may_spill: Sequence[str] = ()
    wide: Sequence[str] = ()
    barrier: Mapping[str, str] = field(default_factory=dict)
    elements: int | None = None


def load_kernels(name: str) -> types.ModuleType:
    """Import `mopl.kernels.<name>` without running `mopl/__init__.py`, which may want packages that are not here."""
    if "mopl" not in sys.modules:
        package = types.ModuleType("mopl")
        package.__path__ = [str(ROOT / "mopl")]
        sys.modules["mopl"] = package
    return importlib.import_module(f"mopl.kernels.{name}")
