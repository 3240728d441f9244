"""How one call of `linear_logprob` on a GPU is cut, and by which algorithm: planned by a rule, or as it was measured.

Below about 256 rows reading the head bounds the time, and the fused kernel reads it once and writes nothing. Above,
the library multiplies, in chunks and tiles that `plan` chooses. `tune` measures the alternatives and remembers
the winner on disk, by architecture, dtype, sizes of the head, what is wanted and the number of rows rounded up to a
power of two, never by the exact number of rows.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime import driver

from mopl._arguments import compute_dtype
from mopl._files import write_file
from mopl._records import DamagedFile, read_json
from mopl.kernels import fused_logprob as kernels
from mopl.ops._backend import use_triton
from mopl.ops.linear_logprob import device as _device
from mopl.ops.linear_logprob.plan import LIBRARY, Plan, Wanted, make_plan

SECONDS = 3.0  # how long `tune` measures, the compilation of kernels not counted


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


def key_of(hidden: Tensor, weight: Tensor, rows: int, wanted: Wanted, softcap: bool) -> str:
    """Return the key of a choice."""
    about = _device.properties_of(hidden.device)
    maker = "hip " if about.maker == "AMD" else ""
    major, minor = about.capability
    rows = 1 << max(rows - 1, 0).bit_length()
    dtype = str(_dtype(hidden, weight)).removeprefix("torch.")
    flags = " softcap" * softcap + f" {wanted}" * (wanted != "scoring")
    return f"{maker}{major}.{minor} {dtype} H{weight.shape[1]} V{weight.shape[0]} N{rows}{flags}"


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the operands of the products."""
    return hidden.dtype if hidden.dtype == weight.dtype else compute_dtype(hidden, weight)


def usable(device: torch.device, itemsize: int, softcap: bool) -> list[str]:
    """Return the names of the tiles that fit a GPU, the current one if `device` has no index."""
    if device.type != "cuda":  # the interpreter has no limits
        return kernels.usable_tiles(itemsize, sys.maxsize, True, softcap)
    return _usable(_device.index_of(device), itemsize, softcap)


@functools.lru_cache
def _usable(index: int, itemsize: int, softcap: bool) -> list[str]:
    limit = driver.active.utils.get_device_properties(index)["max_shared_mem"]  # type: ignore[attr-defined]
    every_stage = torch.cuda.get_device_capability(index)[0] >= 9 and not torch.version.hip
    return kernels.usable_tiles(itemsize, limit, every_stage, softcap)


def plan_for(hidden: Tensor, weight: Tensor, wanted: Wanted, softcap: bool, buffers: int = 1) -> Plan:
    """Return how a call is cut: as `make_plan` says, and where `tune` has measured it as was fastest."""
    dtype = _dtype(hidden, weight)
    fits = ()
    if hidden.is_cuda and dtype != torch.float64 and wanted == "scoring":
        fits = usable(hidden.device, dtype.itemsize, softcap)
    rows, (vocabulary, size) = hidden.shape[0], weight.shape
    plan = make_plan(_device.properties_of(hidden.device), dtype, rows, size, vocabulary, wanted, tuple(fits), buffers)
    measured = _choices(cache_path()).get(key_of(hidden, weight, rows, wanted, softcap)) if hidden.is_cuda else None
    return plan if measured is None else remembered(plan, measured, tuple(fits))


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
    """Return the tiles of the fused kernel, or None where the library multiplies."""
    return None if plan.algorithm == LIBRARY else kernels.TILES[plan.algorithm]


def _milliseconds(step: Callable[[], object], device: torch.device) -> float:
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


def _alternatives(plan: Plan, fits: tuple[str, ...]) -> Iterator[Plan]:
    """Yield what may beat a plan, what is nearest to it first: the fused kernel, then other heights and areas."""
    for name in fits:
        yield plan._replace(algorithm=name)
    high = plan.rows // plan.block[0]
    for area in (plan.area, plan.area * 2, plan.area // 2, plan.area // 4):
        for rows in (plan.block[0] * n for n in (high, high // 2, high * 2) if n):
            yield plan._replace(algorithm=LIBRARY, rows=rows, buffer_rows=min(rows, plan.buffer_rows), area=area)


def tune(
    hidden: Tensor, weight: Tensor, softcap: float | None = None, wanted: Wanted = "scoring",
    workspace: int | None = None, seconds: float = SECONDS,
) -> dict[str, float]:  # fmt: skip
    """Measure alternatives to the plan of a call on these tensors, remember the fastest, and return milliseconds.

    Rows of a chunk by columns of a tile; for scoring each tile of the fused kernel, too; for a trained head, also fewer
    rows kept. Those nearest to the plan come first, and none is begun after `seconds`.

    Args:
        hidden: (N, H) on a GPU (in Triton's interpreter on a CPU, to try the code: such times mean nothing).
        weight: (V, H) of the same dtype.
        softcap: as for `linear_logprob`; its value does not matter, that there is one does.
        wanted: scoring without gradient, a frozen head's directions, or forward and backward of a trained head.
        workspace: as for `linear_logprob`: what may be kept with a trained head.
        seconds: how long to measure.

    Returns:
        Milliseconds by what was measured, "library 4224x7943" being chunks of 4224 rows and tiles of 7943 columns or a
        little less, "... keep 8192" a trained head that keeps that many rows, other names tiles of the fused kernel.

    Raises:
        ValueError: if the tensors are not on a GPU, or of float64, for which there is no fused kernel.
    """
    if not use_triton(hidden):
        raise ValueError("tune measures on a GPU; hidden is on the CPU")
    if hidden.dtype == torch.float64:
        raise ValueError("hidden is torch.float64, for which there is nothing to choose; pass 16-bit or float32")
    capped, rows = softcap is not None, hidden.shape[0]
    fits = tuple(usable(hidden.device, hidden.itemsize, capped)) if wanted == "scoring" else ()
    plan = make_plan(_device.properties_of(hidden.device), hidden.dtype, rows, weight.shape[1], weight.shape[0], wanted)
    keep = 0
    if wanted == "trained":
        row = weight.shape[0] * hidden.itemsize
        keep = min(rows, (_device.default_workspace(hidden.device) if workspace is None else workspace) // row)

    kept = [keep, *([keep // plan.rows * plan.rows] if keep % plan.rows and keep > plan.rows else [])]
    measured, begin = {}, time.monotonic()
    for other, many in itertools.product(_alternatives(plan, fits), kept):
        if measured and time.monotonic() - begin > seconds:
            break
        step = _step(hidden, weight, softcap or 0.0, wanted, other, many)
        first = time.monotonic()
        _milliseconds(step, hidden.device)  # compiles
        begin += time.monotonic() - first
        times = sorted(_milliseconds(step, hidden.device) for _ in range(3))
        name = other.algorithm
        if name == LIBRARY:
            name += f" {other.rows}x{other.area // other.rows}" + f" keep {many}" * (wanted == "trained")
        measured[name] = times[1]
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    fastest = min(measured, key=lambda name: measured[name])
    if fastest.endswith(f" keep {keep}"):  # as many as the workspace holds, whatever it will be
        fastest = fastest.partition(" keep")[0]
    choices = {**_choices(path), key_of(hidden, weight, rows, wanted, capped): fastest}
    write_file(path, json.dumps(choices, indent=1))
    _choices.cache_clear()
    return measured


def _step(
    hidden: Tensor, weight: Tensor, softcap: float, wanted: Wanted, plan: Plan, keep: int
) -> Callable[[], object]:
    """Return a call of the stages that depend on a plan."""
    from mopl.ops.linear_logprob import gpu as backend
    from mopl.ops.linear_logprob.rows import Batch, Head, LogitGradient
    from mopl.ops.linear_logprob.stages import cache_columns, cache_dtype

    hidden, weight = hidden.detach(), weight.detach()  # the stages' products have no derivatives
    rows, device = hidden.shape[0], hidden.device
    pivot = torch.arange(rows, device=device) % weight.shape[0]
    ones = torch.ones(rows, dtype=compute_dtype(hidden, weight), device=device)
    head, batch = Head(weight, None, softcap, 1.0), Batch(hidden, ones, None)
    shift = backend.target_logits(head, batch, pivot, None)
    cache = hidden.new_empty(keep * cache_columns(hidden, weight), dtype=cache_dtype(hidden, weight))

    def step() -> object:
        sums = backend.accumulate(head, batch, pivot, shift, 0, int(wanted == "frozen"), cache, keep, plan)
        if wanted != "trained":
            return sums
        gradient = LogitGradient(ones, None, pivot, torch.arange(rows, device=device), ones)
        need = (True, True, False)
        return backend.backward(head, batch, pivot, shift, gradient, cache, keep, need, hidden.dtype, plan)

    return step
