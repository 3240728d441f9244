"""Log-probabilities of tokens beside the peers, and beside the limit of the machine.

    python -m bench.logprob MODE ... [--json FILE] [--sizes 8192x4096x128256 ...] [--more] [--variants mopl ...]

MODE is `gathered` or `gathered-forward`, from logits; `forward`, `frozen` or `trained`, from hidden states, with
nothing, the hidden states, or the head too to differentiate; `error`, which compares errors alone; `tune`, which
measures which chunks, tiles and algorithm are fastest and remembers them. Sizes are rows x width x vocabulary: by
default those that have goals, with --more the others. Without a GPU everything runs at toy sizes, to try the command.

Every variant runs in a process of its own, mopl once more at the end, so that a drift of the clock shows. Columns:
median milliseconds between events on the GPU and their spread, (largest - smallest) / median; the host's own
milliseconds; `share`, the least time that the mode needs on this machine (2, 4 or 6 products of N V H by the rate of a
large product, 2 or 6 bytes a logit by the bandwidth of a copy) over that time; `own`, the time of "its products alone"
(from logits: "its bytes alone") over that time, which is what the goals are about (`bench.goals` says why); `x mopl`,
the time over mopl's; `extra GB`, peak memory beyond what was there before (gradients included); `log p`, the largest
error against float64 over a sample of rows in nats; `grad`, that of their gradient, root mean square relative to its
size. A sum has no `log p` to compare. "its products alone" are bare matrix products of those sizes with float32
results, "its bytes alone" a copy of as many bytes: what is left for everything else is the distance to them.

The file is written anew with every row: it is safe to cut off, and goes on where it was. The exit status says whether
a row of mopl failed.
"""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench import goals
from bench.limits import rates, times_of
from bench.logprob_peers import HEAD_MODES, HEADS, Peer, Run, float32_head, peers
from bench.logprob_problems import exactly, logits_problem, problem, products, relative
from bench.measuring import ON_GPU, Report, apart, each, extra_memory
from mopl.ops._backend import INTERPRETED

PRODUCTS = {"forward": 2, "frozen": 4, "trained": 6}  # N V H multiply-adds, two FLOP each
BYTES = {"gathered-forward": 2, "gathered": 6}  # a bf16 logit: read; read twice and written once
SAMPLE = 256 if ON_GPU else 64  # rows whose error is measured
REPEATS, WARMUP = (1, 0) if INTERPRETED else (12, 2)
SIZE_LIMIT_S = 60.0 if ON_GPU else 600.0  # a process that takes longer for a size is ended

# The goal's size first, then rows from few to many, then vocabularies that are not whole (50257) or wide.
ROWS = [f"{rows}x4096x128256" for rows in (1, 16, 128, 256, 512, 1024, 4096)]
HEAD_SIZES = [goals.HEAD, goals.WIDE_HEAD, *ROWS, "8192x1024x50257", "4096x4096x32000"]
LOGIT_SIZES = [goals.LOGITS, "16384x0x50257", "16384x0x32000", "4096x0x128256", "64x0x128256"]
ERRORS = [
    f"2048x1024x50257 {dtype} {kind}" for dtype in ("bfloat16", "float16", "float32") for kind in ("flat", "peaked")
]
SIZES = {
    **dict.fromkeys(HEAD_MODES, HEAD_SIZES),
    **dict.fromkeys(BYTES, LOGIT_SIZES),
    "tune": [*(f"{HEAD_SIZES[0]} {mode}" for mode in HEAD_MODES), *(f"{size} forward" for size in ROWS[1:])],
    "error": ERRORS,
}
if not ON_GPU:  # the interpreter takes seconds for what takes a processor milliseconds
    SMALL = "5x16x40" if INTERPRETED else "256x128x4096"
    SIZES = {mode: [SMALL] for mode in SIZES}
    SIZES["tune"] = [f"{SMALL} {mode}" for mode in HEAD_MODES]
    SIZES["error"] = [f"{SMALL} {size.split(' ', 1)[1]}" for size in ERRORS[: 2 if INTERPRETED else 6]]
TIMES = {
    "ms": ".3f", "spread": ".1%", "host ms": ".3f", "share": ".1%", "own": ".1%", "x mopl": ".2f", "extra GB": ".2f",
    "log p": ".1e", "grad": ".1e",
}  # fmt: skip
COLUMNS = {
    "error": dict.fromkeys(("log p max", "log p rms", "dh frozen", "worst row", "dh trained", "dW"), ".1e"),
    "tune": {"ms": ".3f", "fastest": "s"},
}
ALONE, AGAIN = (
    {**dict.fromkeys(HEAD_MODES, "its products alone"), **dict.fromkeys(BYTES, "its bytes alone")},
    "mopl, again",
)


def parse(size: str) -> tuple[int, int, int]:
    """Return rows, width and vocabulary."""
    rows, width, vocabulary = (int(n) for n in size.split("x"))
    return rows, width, vocabulary


def run_head(
    run: Run, per_token: bool, mode: str, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor
) -> Tensor:
    """Run a peer in a mode and return its log-probabilities; gradients are left in `hidden.grad` and `weight.grad`."""
    hidden.requires_grad_(mode != "forward").grad = None
    weight.requires_grad_(mode == "trained").grad = None
    with torch.set_grad_enabled(mode != "forward"):
        value = run(hidden, weight, target)
    if mode != "forward":
        value.backward(upstream.to(value.dtype) if per_token else None)
    return value.detach()


def run_logits(
    run: Run, logits: Tensor, target: Tensor, upstream: Tensor, backward: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Run a peer on logits and return its log-probabilities and the gradient of the logits."""
    leaf = logits.detach().requires_grad_(backward)
    value = run(leaf, target)
    if backward:
        value.backward(upstream.to(value.dtype))
    return value.detach(), leaf.grad


def timed(step: Callable[[], object]) -> dict[str, float | None]:
    """Return times and memory of a step that has run once."""
    memory = extra_memory(step)
    return {**times_of(step, REPEATS, WARMUP), "extra GB": memory}


def measure_head(peer: Peer, mode: str, size: str) -> dict:
    """Measure a peer that starts from hidden states."""
    run = peer.load()
    hidden, weight, target, upstream = problem("peaked", *parse(size))
    value = run_head(run, peer.per_token, mode, hidden, weight, target, upstream)
    part = slice(0, SAMPLE)
    above = upstream[part] if peer.per_token else torch.ones_like(upstream[part])
    exact, wanted, _ = exactly(hidden.detach()[part], weight.detach(), target[part], above)
    errors = {
        "log p": float((value[part].double() - exact).abs().max()) if peer.per_token else None,
        "grad": None if hidden.grad is None else relative(hidden.grad[part], wanted),
    }
    del value, exact, wanted
    return {**timed(lambda: run_head(run, peer.per_token, mode, hidden, weight, target, upstream)), **errors}


def measure_logits(peer: Peer, mode: str, size: str) -> dict:
    """Measure a peer that starts from logits."""
    run, backward = peer.load(), mode == "gathered"
    rows, _, vocabulary = parse(size)
    logits, target, upstream = logits_problem(rows, vocabulary)
    part = slice(0, SAMPLE)
    exact = logits[part].double().log_softmax(-1)
    wanted = -exact.exp() * upstream[part, None].double()
    wanted.scatter_add_(1, target[part, None], upstream[part, None].double())
    value, gradient = run_logits(run, logits, target, upstream, backward)
    errors = {
        "log p": float((value[part].double() - exact.gather(1, target[part, None])[:, 0]).abs().max()),
        "grad": None if gradient is None else relative(gradient[part], wanted),
    }
    del value, gradient, exact, wanted
    return {**timed(lambda: run_logits(run, logits, target, upstream, backward)), **errors}


def measure_alone(mode: str, size: str) -> dict:
    """Measure the products or the bytes of a mode without anything else, and the limits of this machine."""
    rows, width, vocabulary = parse(size)
    bandwidth, flops = rates()
    if mode in BYTES:
        source = torch.empty(rows * vocabulary * BYTES[mode] // 2, dtype=torch.int8, device="cuda" if ON_GPU else None)
        copy = torch.empty_like(source)

        def step() -> object:
            return copy.copy_(source)
    else:
        step = products(mode, rows, width, vocabulary)
    step()
    return {**timed(step), "bytes per second": bandwidth, "FLOP per second": flops}


def measure_errors(peer: Peer, size: str) -> dict:
    """Compare errors against float64 on the same rounded inputs."""
    shape, dtype, kind = size.split(" ")
    run = peer.load()
    hidden, weight, target, upstream = problem(kind, *parse(shape), getattr(torch, dtype))
    above = upstream if peer.per_token else torch.ones_like(upstream)
    exact, dh, dw = exactly(hidden, weight, target, above, whole=True)
    found: dict[str, float] = {}
    for frozen in (True, False):  # the gradient of the hidden states takes another way with a trained head
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        value = run(h, w, target)
        value.backward(upstream.to(value.dtype) if peer.per_token else None)
        assert h.grad is not None and dw is not None
        if frozen:
            found["dh frozen"] = relative(h.grad, dh)
            found["worst row"] = float(((h.grad.double() - dh).norm(dim=1) / dh.norm(dim=1).clamp(min=1e-30)).max())
        else:
            assert w.grad is not None
            found["dh trained"], found["dW"] = relative(h.grad, dh), relative(w.grad, dw)
        if peer.per_token:
            apart_ = (value.detach().double() - exact).abs()
            found["log p max"], found["log p rms"] = float(apart_.max()), float(apart_.square().mean().sqrt())
    return found


def measure_choices(size: str) -> dict:
    """Let mopl measure other chunks, tiles and algorithms than its own, and remember the fastest."""
    from mopl.ops.linear_logprob.tune import tune

    shape, wanted = size.split(" ")
    hidden, weight, _, _ = problem("flat", *parse(shape))
    measured = tune(hidden, weight, wanted="scoring" if wanted == "forward" else wanted)
    fastest = min(measured, key=lambda name: measured[name])
    return {"ms": measured[fastest], "fastest": fastest, "measured": measured}


def measure(variant: str, case: str) -> dict:
    """Measure one variant in this process."""
    mode, size = case.split(" ", 1)
    if mode == "tune":
        return measure_choices(size)
    if variant == ALONE.get(mode):
        return measure_alone(mode, size)
    variant = variant.removesuffix(", again")
    if mode == "error":
        every = [*HEADS, Peer("float32 throughout", lambda: float32_head)]
        return measure_errors(next(peer for peer in every if peer.name == variant), size)
    peer = next(peer for peer in peers(mode) if peer.name == variant)
    return (measure_logits if mode in BYTES else measure_head)(peer, mode, size)


def variants(mode: str, heavy: bool) -> list[str]:
    """Return the names of what is measured in a mode, in order."""
    if mode == "tune":
        return ["mopl"]
    if mode == "error":
        return [*(peer.name for peer in HEADS if peer.heavy == heavy), *(["float32 throughout"] if not heavy else [])]
    others = [peer.name for peer in peers(mode) if peer.heavy == heavy and peer.name != "mopl"]
    return [ALONE[mode], "mopl", *others, *([] if heavy else [AGAIN])]


def complete(report: Report) -> None:
    """Add to every row what needs another one: the share of the limit and the ratio to mopl's time."""
    for row in report.rows:
        mode, size = row["size"].split(" ", 1)
        mopl, alone = report.find(row["size"], "mopl"), report.find(row["size"], ALONE.get(mode, ""))
        if "ms" not in row or mode not in ALONE:
            continue
        if alone and "ms" in alone:
            rows, width, vocabulary = parse(size)
            work = BYTES[mode] * rows * vocabulary if mode in BYTES else PRODUCTS[mode] * rows * vocabulary * width
            rate = alone["bytes per second" if mode in BYTES else "FLOP per second"]
            least = work / rate
            if mode in HEAD_MODES:  # few rows: the head has to be read
                least = max(least, 2 * width * vocabulary / alone["bytes per second"])
            row["share"] = least * 1e3 / row["ms"]
        if mopl and "ms" in mopl:
            row["x mopl"] = row["ms"] / mopl["ms"]
    goals.add_own(report.rows)
    report.targets.clear()
    for goal in goals.judge(report.rows) if ON_GPU else ():
        report.target(*goal)
    report.write()


def main() -> int:
    """Measure each variant in a process of its own, or be such a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="+", metavar="MODE", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--sizes", nargs="+", metavar="NxHxV", help="rows x width x vocabulary (width 0 from logits)")
    parser.add_argument("--more", action="store_true", help="all sizes but those that have goals")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--heavy", action="store_true", help="the peers that need CuTe, beside mopl")
    parser.add_argument("--alone", metavar="NAME", help="measure a variant in this process; MODEs are then cases")
    arguments = parser.parse_args()
    if arguments.alone:
        return each(arguments.modes, lambda case: measure(arguments.alone, case))
    if unknown := set(arguments.modes) - set(SIZES):
        parser.error(f"no mode {', '.join(sorted(unknown))}; there are {', '.join(SIZES)}")
    for size in arguments.sizes or []:
        if len(size.split("x")) != 3 or not size.replace("x", "").isdigit():
            parser.error(f"--sizes takes rows x width x vocabulary, such as 8192x4096x128256; got {size}")
    report = Report(arguments.json, COLUMNS.get(arguments.modes[0], TIMES))
    if arguments.modes == ["tune"] and not ON_GPU and not INTERPRETED:
        print("nothing to choose: on a processor there is one algorithm")
    else:
        _measure_all(arguments, report)
    report.table()
    report.write()
    return 1 if report.failures() else 0


def _measure_all(arguments: argparse.Namespace, report: Report) -> None:
    every = list(dict.fromkeys(name for mode in arguments.modes for name in variants(mode, arguments.heavy)))
    every.sort(key=lambda name: name == AGAIN)
    for name in arguments.variants or every:
        cases = []
        for mode in arguments.modes:
            if name in variants(mode, arguments.heavy):
                own, first = arguments.sizes or SIZES[mode], 2 if mode in HEAD_MODES else 1
                if mode not in COLUMNS and not arguments.sizes and ON_GPU:
                    own = own[first:] if arguments.more else own[:first]
                cases += [f"{mode} {size}" for size in own]
        apart(report, name, cases, ["-m", "bench.logprob", "--alone", name], SIZE_LIMIT_S)
        complete(report)


if __name__ == "__main__":
    sys.exit(main())
