"""Which algorithm scores without gradient: the library's product with an epilogue, or one fused kernel.

Below about 256 rows reading the head bounds the time, and the fused kernel reads it once and writes nothing. Above,
it depends on the GPU: `tune` measures both and remembers the winner on disk, by architecture, dtype, sizes of the head
and the number of rows rounded up to a power of two, never by the exact number of rows.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime import driver

from mopl._files import write_file
from mopl._records import DamagedFile, read_json
from mopl.kernels import fused_logprob as kernels
from mopl.ops._backend import use_triton
from mopl.ops._device import index_of

FEW_ROWS = 256  # below which reading the head takes longer than multiplying by it (about 183 rows on an H200)


def cache_path() -> Path:
    """Return the file that holds measured choices: `linear_logprob.json` in $MOPL_CACHE, by default ~/.cache/mopl."""
    return Path(os.environ.get("MOPL_CACHE", Path.home() / ".cache" / "mopl")) / "linear_logprob.json"


@functools.lru_cache(maxsize=1)
def _choices(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        return read_json(path, dict[str, str], most=1 << 20, remedy="it is measured again")
    except (OSError, DamagedFile) as error:
        warnings.warn(f"the cache of tuned kernels cannot be read: {error}", stacklevel=2)
        return {}


def key_of(hidden: Tensor, weight: Tensor, softcap: bool) -> str:
    """Return the key of a choice."""
    major, minor = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (0, 0)
    maker = "hip " if torch.version.hip else ""
    rows = 1 << max(hidden.shape[0] - 1, 0).bit_length()
    dtype = str(hidden.dtype).removeprefix("torch.")
    return f"{maker}{major}.{minor} {dtype} H{weight.shape[1]} V{weight.shape[0]} N{rows}{' softcap' * softcap}"


def usable(device: torch.device, itemsize: int, softcap: bool) -> list[str]:
    """Return the names of the tiles that fit a GPU, the current one if `device` has no index."""
    if device.type != "cuda":  # the interpreter has no limits
        return kernels.usable_tiles(itemsize, sys.maxsize, True, softcap)
    return _usable(index_of(device), itemsize, softcap)


@functools.lru_cache
def _usable(index: int, itemsize: int, softcap: bool) -> list[str]:
    limit = driver.active.utils.get_device_properties(index)["max_shared_mem"]  # type: ignore[attr-defined]
    every_stage = torch.cuda.get_device_capability(index)[0] >= 9 and not torch.version.hip
    return kernels.usable_tiles(itemsize, limit, every_stage, softcap)


def pick(rows: int, itemsize: int, remembered: str | None, names: list[str]) -> str | None:
    """Return the name of a tile, None for the library's product: what was measured, or a rule where nothing was."""
    if remembered is not None:
        return remembered if remembered in names else None
    if rows > FEW_ROWS or itemsize != 2:
        return None
    name = "few" if rows <= 16 else "short"
    return name if name in names else None


def fused_tiles(hidden: Tensor, weight: Tensor, softcap: bool) -> dict[str, int] | None:
    """Return the tiles of the fused kernel, or None where the library's product is the better choice."""
    if hidden.dtype == torch.float64 or not hidden.is_cuda:
        return None
    remembered = _choices(cache_path()).get(key_of(hidden, weight, softcap))
    name = pick(hidden.shape[0], hidden.itemsize, remembered, usable(hidden.device, hidden.itemsize, softcap))
    return None if name is None else kernels.TILES[name]


def _milliseconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin) * 1e3
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
    return start.elapsed_time(end)


def tune(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> dict[str, float]:
    """Measure every algorithm on these tensors, remember the fastest, and return milliseconds by name.

    Args:
        hidden: (N, H) on a GPU (in Triton's interpreter on a CPU, to try the code: such times mean nothing).
        weight: (V, H) of the same dtype.
        softcap: as for `linear_logprob`; its value does not matter, that there is one does.

    Raises:
        ValueError: if the tensors are not on a GPU, or of float64, for which there is no fused kernel.
    """
    if not use_triton(hidden):
        raise ValueError("tune measures on a GPU; hidden is on the CPU")
    if hidden.dtype == torch.float64:
        raise ValueError("hidden is torch.float64, for which there is nothing to choose; pass 16-bit or float32")
    from mopl.ops import _linear_logprob_triton_head as shared
    from mopl.ops.linear_logprob_triton import target_logits

    rows, device = hidden.shape[0], hidden.device
    pivot = torch.randint(weight.shape[0], (rows,), device=device)
    ones = torch.ones(rows, device=device)
    shift = target_logits(hidden, weight, None, pivot, None, ones, softcap or 0.0, 1.0)

    def run(tiles: dict[str, int] | None) -> float:
        head = shared.Head(hidden, weight, None, pivot, shift.clone(), ones, softcap or 0.0, 1.0, None)
        sums = shared.Sums(rows, 0, head.dtype, device)

        def step() -> None:
            if tiles is None:
                for chunk in shared.chunks_of(0, rows, shared.ROWS):
                    head.scan(chunk, sums)
            else:
                head.fused(sums, tiles)

        times = [_milliseconds(step, device) for _ in range(6)][1:]  # the first one compiles
        return sorted(times)[len(times) // 2]

    names = usable(device, hidden.itemsize, softcap is not None)
    measured = {"library": run(None), **{name: run(kernels.TILES[name]) for name in names}}
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    fastest = min(measured, key=lambda name: measured[name])
    choices = {**_choices(path), key_of(hidden, weight, softcap is not None): fastest}
    write_file(path, json.dumps(choices, indent=1))
    _choices.cache_clear()
    return measured
