"""What plans need to know of a GPU: its properties, and how much of its memory is unused. The host never waits.

Plans take properties from `properties_of` alone, so that a tool can plan for an absent GPU by replacing it.
"""

from __future__ import annotations

import functools

import torch

from mopl.ops.linear_logprob.plan import H100, TOY, Device

GIB = 2**30
# Of a GPU's memory: 4.4 GiB on an H200, where exponentials of 16384 x 128256 take 3.9 GiB.
WORKSPACE_SHARE = 32


def properties_of(device: torch.device) -> Device:
    """Return what a plan needs to know of a device; of the current GPU if it has no index.

    Tensors of a CPU are planned for in Triton's interpreter alone, and fake tensors of a GPU where there is none as on
    an H100: only their shapes matter.
    """
    if device.type != "cuda":
        return TOY
    if not torch.cuda.is_available():
        return H100
    return _read(index_of(device))


def index_of(device: torch.device) -> int:
    """Return the index of a GPU: that of the current one where a device has none."""
    return torch.cuda.current_device() if device.index is None else device.index


@functools.lru_cache
def _read(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    maker = "AMD" if torch.version.hip else "NVIDIA"
    return Device(found.multi_processor_count, found.total_memory, (found.major, found.minor), maker)


def default_workspace(device: torch.device, wanted: int | None = None) -> int:
    """Return how many bytes may be kept from a forward to a backward pass.

    2 GiB on a CPU. On a GPU a 32nd of its memory (`WORKSPACE_SHARE`), or half of what is unused if that is less.
    Compiled code, deterministic algorithms and a graph under capture take the 32nd as it is: what is unused varies
    from call to call, and results with it in their last bits. A call that `wanted` few bytes is not worth a query.
    """
    if device.type != "cuda":
        return 2 * GIB
    if torch.compiler.is_compiling():
        # The compiler makes a constant of this call, but not of a cached one.
        there = torch.cuda.is_available()
        memory = torch.cuda.get_device_properties(device).total_memory if there else H100.memory
        return memory // WORKSPACE_SHARE
    share = properties_of(device).memory // WORKSPACE_SHARE
    if (
        (wanted is not None and wanted * 16 <= share)
        or torch.are_deterministic_algorithms_enabled()
        or not torch.cuda.is_available()
        or torch.cuda.is_current_stream_capturing()
    ):
        return share
    return min(share, unused_bytes(device) // 2)


def unused_bytes(device: torch.device) -> int:
    """Return the memory of a GPU that is free, or held by the caching allocator and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
