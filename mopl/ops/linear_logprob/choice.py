"""How one call of `linear_logprob` on a GPU is cut, and by which algorithm: planned by a rule, or as it was measured.

For few rows reading the head bounds the time, and the fused kernel reads it once and writes nothing. For more, kernels
of our own multiply where the GPU is one they were measured on, and elsewhere the library, in chunks and tiles that
`plan` chooses. `tune` measures the alternatives and remembers
the winner on disk, by architecture, dtype, sizes of the head, what is wanted and the number of rows rounded up to a
power of two, never by the exact number of rows.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime import driver

from mopl._files import write_file
from mopl._records import DamagedFile, read_json
from mopl.kernels import fused_logprob as kernels
from mopl.ops._products import operand_dtype
from mopl.ops.linear_logprob import device as gpus
from mopl.ops.linear_logprob.own_products import describable
from mopl.ops.linear_logprob.plan import DESCRIPTORS, LIBRARY, Plan, Wanted, make_plan


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


def remember(key: str, measured: str) -> None:
    """Remember what was measured to be fastest."""
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps({**_choices(path), key: measured}, indent=1))
    _choices.cache_clear()


def key_of(hidden: Tensor, weight: Tensor, rows: int, wanted: Wanted, softcap: bool) -> str:
    """Return the key of a choice."""
    about = gpus.properties_of(hidden.device)
    maker = "hip " if about.maker == "AMD" else ""
    major, minor = about.capability
    rows = 1 << max(rows - 1, 0).bit_length()
    dtype = str(operand_dtype(hidden, weight)).removeprefix("torch.")
    flags = " softcap" * softcap + f" {wanted}" * (wanted != "scoring")
    return f"{maker}{major}.{minor} {dtype} H{weight.shape[1]} V{weight.shape[0]} N{rows}{flags}"


def usable(device: torch.device, itemsize: int, softcap: bool) -> list[str]:
    """Return the names of the tiles that fit a GPU, the current one if `device` has no index."""
    if device.type != "cuda":  # the interpreter has no limits
        return kernels.usable_tiles(itemsize, sys.maxsize, True, softcap)
    return _usable(gpus.index_of(device), itemsize, softcap)


@functools.lru_cache
def _usable(index: int, itemsize: int, softcap: bool) -> list[str]:
    limit = driver.active.utils.get_device_properties(index)["max_shared_mem"]  # type: ignore[attr-defined]
    every_stage = torch.cuda.get_device_capability(index)[0] >= 9 and not torch.version.hip
    return kernels.usable_tiles(itemsize, limit, every_stage, softcap)


def algorithms(hidden: Tensor, weight: Tensor, wanted: Wanted, softcap: bool, moments: int = 0) -> tuple[str, ...]:
    """Return the algorithms, beside the library's products, that can serve a call on a GPU.

    Kernels of our own are for what they were measured on, NVIDIA's compute capability 9 and 16-bit operands, and have
    no softcap and no moments.
    """
    dtype, device = operand_dtype(hidden, weight), gpus.properties_of(hidden.device)
    found = []
    if dtype != torch.float64 and wanted == "scoring" and not moments:
        found += usable(hidden.device, dtype.itemsize, softcap)
    known = device.maker == "NVIDIA" and device.capability[0] == 9 and dtype.itemsize == 2
    if known and not softcap and not moments and describable(hidden) and describable(weight):
        found.append(DESCRIPTORS)
    return tuple(found)


def plan_for(hidden: Tensor, weight: Tensor, wanted: Wanted, softcap: bool, moments: int = 0, buffers: int = 1) -> Plan:
    """Return how a call is cut: as `make_plan` says, and where `tune` has measured it as was fastest."""
    dtype, fits = operand_dtype(hidden, weight), ()
    if hidden.is_cuda:
        fits = algorithms(hidden, weight, wanted, softcap, moments)
    rows, (vocabulary, size) = hidden.shape[0], weight.shape
    plan = make_plan(gpus.properties_of(hidden.device), dtype, rows, size, vocabulary, wanted, fits, buffers)
    measured = _choices(cache_path()).get(key_of(hidden, weight, rows, wanted, softcap)) if hidden.is_cuda else None
    return plan if measured is None else remembered(plan, measured, fits)


# "library 4224x7943": rows of a chunk, columns of a tile; before there was a choice of them, the name alone.
_MEASURED = re.compile(r"([a-z0-9]+)(?: ([1-9]\d{0,6})x([1-9]\d{0,8}))?(?: keep (\d{1,12}))?")


def remembered(plan: Plan, measured: str, fits: tuple[str, ...]) -> Plan:
    """Return a plan with what was measured in its place; an entry that says nothing usable leaves it as it is.

    Chunks whose exponentials are held at once do not grow beyond what the plan has room for.
    """
    found = _MEASURED.fullmatch(measured)
    if found is None or found[1] not in (LIBRARY, *fits):
        return plan
    if found[2] is None:
        return plan._replace(algorithm=found[1])
    rows = int(found[2])
    if rows % plan.block[0]:
        return plan
    area = min(rows * int(found[3]), 4 * plan.area)
    return plan._replace(algorithm=found[1], rows=rows, buffer_rows=min(rows, plan.buffer_rows), area=area)


def rows_worth_keeping(hidden: Tensor, weight: Tensor, rows: int, softcap: bool) -> int:
    """Return how many of `rows` rows of a trained head are worth keeping: all, or as many as `tune` found best."""
    measured = _choices(cache_path()).get(key_of(hidden, weight, rows, "trained", softcap), "")
    found = _MEASURED.fullmatch(measured)
    return rows if found is None or found[4] is None else min(rows, int(found[4]))


def fused_tiles(plan: Plan) -> dict[str, int] | None:
    """Return the tiles of the fused kernel, or None where another algorithm is planned."""
    return kernels.TILES.get(plan.algorithm)
