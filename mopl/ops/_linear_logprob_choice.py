"""Which algorithm scores without gradient: the library's product with an epilogue, or one fused kernel.

Below about 256 rows reading the head bounds the time, and the fused kernel reads it once and writes nothing. Above,
it depends on the GPU: `tune` measures both and remembers the winner on disk, by architecture, dtype, sizes of the head
and the number of rows rounded up to a power of two, never by the exact number of rows.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

FEW_ROWS = 256

# Tiles by what they are for. 128 x 256 x 64 needs 8 warps and stays within 255 registers; 64 rows serve short batches.
TILES = {
    "wide": {"BM": 128, "BV": 256, "BH": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
    "square": {"BM": 128, "BV": 128, "BH": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
    "short": {"BM": 64, "BV": 128, "BH": 64, "GROUP": 4, "num_warps": 4, "num_stages": 3},
    "few": {"BM": 16, "BV": 128, "BH": 64, "GROUP": 16, "num_warps": 4, "num_stages": 4},
    "float32": {"BM": 32, "BV": 64, "BH": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2},
}


def cache_path() -> Path:
    """Return the file that holds measured choices: `linear_logprob.json` in $MOPL_CACHE, by default ~/.cache/mopl."""
    return Path(os.environ.get("MOPL_CACHE", Path.home() / ".cache" / "mopl")) / "linear_logprob.json"


@functools.lru_cache(maxsize=1)
def _choices(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def key_of(hidden: Tensor, weight: Tensor) -> str:
    """Return the key of a choice."""
    major, minor = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (0, 0)
    rows = 1 << max(hidden.shape[0] - 1, 0).bit_length()
    return f"{major}.{minor} {str(hidden.dtype).removeprefix('torch.')} H{weight.shape[1]} V{weight.shape[0]} N{rows}"


def fused_tiles(hidden: Tensor, weight: Tensor) -> dict[str, int] | None:
    """Return the tiles of the fused kernel, or None where the library's product is the better choice."""
    if hidden.dtype == torch.float64:
        return None
    chosen = _choices(cache_path()).get(key_of(hidden, weight))
    if chosen is None:
        if hidden.shape[0] > FEW_ROWS or hidden.dtype == torch.float32:
            return None
        chosen = "few" if hidden.shape[0] <= 16 else "short"
    return TILES.get(chosen)


def tune(hidden: Tensor, weight: Tensor) -> dict[str, float]:
    """Measure every algorithm on these tensors, remember the fastest, and return milliseconds by name.

    Args:
        hidden: (N, H) on a GPU.
        weight: (V, H) of the same dtype.

    Raises:
        ValueError: if the tensors are not on a GPU.
    """
    if not hidden.is_cuda:
        raise ValueError("tune measures on a GPU; hidden is on the CPU")
    from mopl.ops import linear_logprob_triton as backend

    rows, device = hidden.shape[0], hidden.device
    pivot = torch.randint(weight.shape[0], (rows,), device=device)
    ones = torch.ones(rows, device=device)
    shift = backend.target_logits(hidden, weight, None, pivot, None, ones, 0.0, 1.0)

    def run(tiles: dict[str, int] | None) -> float:
        head = backend._Head(hidden, weight, None, pivot, shift.clone(), ones, 0.0, 1.0, None)
        times = []
        for turn in range(6):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            sums = backend._Sums(rows, 0, head.dtype, device)
            start.record()
            if tiles is None:
                for chunk in backend._chunks(0, rows, backend.ROWS):
                    head.scan(chunk, sums)
            else:
                head.fused(sums, tiles)
            end.record()
            torch.cuda.synchronize()
            if turn:
                times.append(start.elapsed_time(end))
        return sorted(times)[len(times) // 2]

    names = ["float32"] if hidden.dtype == torch.float32 else [name for name in TILES if name != "float32"]
    measured = {"library": run(None), **{name: run(TILES[name]) for name in names}}
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    choices = {**_choices(path), key_of(hidden, weight): min(measured, key=lambda name: measured[name])}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(choices, file, indent=1)
    os.replace(file.name, path)
    _choices.cache_clear()
    return measured
