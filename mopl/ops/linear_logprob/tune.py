"""Measure how a call of `linear_logprob` on a GPU is best cut, for `choice` to remember."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mopl._arguments import compute_dtype
from mopl.ops._backend import use_triton
from mopl.ops.linear_logprob import choice, gpu
from mopl.ops.linear_logprob import device as gpus
from mopl.ops.linear_logprob.keeping import cache_layout
from mopl.ops.linear_logprob.plan import LIBRARY, Plan, Wanted, make_plan
from mopl.ops.linear_logprob.records import Batch, Entries, Head, LogitGradient, Need, Want

SECONDS = 3.0  # how long `tune` measures, the compilation of kernels not counted


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
    """Yield a plan, then what may beat it: the other algorithms, then other heights and areas of the library's."""
    for name in sorted(fits, key=lambda name: name != plan.algorithm):
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

    The algorithms that the GPU has, of the library's products rows of a chunk by columns of a tile, too; for a trained
    head, also fewer rows kept. Those nearest to the plan come first, and none is begun after `seconds`.

    Args:
        hidden: (N, H) on a GPU (in Triton's interpreter on a CPU, to try the code: such times mean nothing).
        weight: (V, H) of the same dtype.
        softcap: as for `linear_logprob`; its value does not matter, that there is one does.
        wanted: scoring without gradient, a frozen head's directions, or forward and backward of a trained head.
        workspace: as for `linear_logprob`: what may be kept with a trained head.
        seconds: how long to measure.

    Returns:
        Milliseconds by what was measured, "library 4224x7943" being chunks of 4224 rows and tiles of 7943 columns or a
        little less, "... keep 8192" a trained head that keeps that many rows, "descriptors" the products of mopl's own
        kernels, other names tiles of the fused kernel.

    Raises:
        ValueError: if the tensors are not on a GPU, or of float64, for which there is no fused kernel.
    """
    if not use_triton(hidden):
        raise ValueError("tune measures on a GPU; hidden is on the CPU")
    if hidden.dtype == torch.float64:
        raise ValueError("hidden is torch.float64, for which there is nothing to choose; pass 16-bit or float32")
    capped, rows = softcap is not None, hidden.shape[0]
    fits = choice.algorithms(hidden, weight, wanted, capped)
    plan = make_plan(
        gpus.properties_of(hidden.device), hidden.dtype, rows, weight.shape[1], weight.shape[0], wanted, fits
    )
    keep = 0
    if wanted == "trained":
        row = weight.shape[0] * hidden.itemsize
        keep = min(rows, (gpus.default_workspace(hidden.device) if workspace is None else workspace) // row)

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
        name = other.algorithm + f" {other.rows}x{other.area // other.rows}" * (other.algorithm == LIBRARY)
        name += f" keep {many}" * (wanted == "trained")
        measured[name] = times[1]
    fastest = min(measured, key=lambda name: measured[name])
    if fastest.endswith(f" keep {keep}"):  # as many as the workspace holds, whatever it will be
        fastest = fastest.partition(" keep")[0]
    choice.remember(choice.key_of(hidden, weight, rows, wanted, capped), fastest)
    return measured


def _step(
    hidden: Tensor, weight: Tensor, softcap: float, wanted: Wanted, plan: Plan, keep: int
) -> Callable[[], object]:
    """Return a call of the stages that depend on a plan."""
    hidden, weight = hidden.detach(), weight.detach()  # the stages' products have no derivatives
    rows, device = hidden.shape[0], hidden.device
    pivot = torch.arange(rows, device=device) % weight.shape[0]
    ones = torch.ones(rows, dtype=compute_dtype(hidden, weight), device=device)
    head, batch = Head(weight, None, softcap, 1.0), Batch(hidden, ones, None)
    shift = gpu.target_logits(head, batch, pivot, None)
    want = Want(
        logsumexp=False, entropy=False, frozen=wanted == "frozen", temperature=False, check_targets=False,
        keep_rows=keep, max_rows=rows,
    )  # fmt: skip
    columns, dtype = cache_layout(hidden, weight)
    cache = hidden.new_empty(keep * columns, dtype=dtype)

    def step() -> object:
        sums = gpu.accumulate(head, batch, pivot, shift, want, cache, plan)
        if wanted != "trained":
            return sums
        gradient = LogitGradient(ones, None, Entries(pivot, torch.arange(rows, device=device), ones))
        need = Need(hidden=True, weight=True, bias=False, temperature=False)
        return gpu.backward(head, batch, pivot, shift, gradient, cache, keep, need, hidden.dtype, plan)

    return step
