"""Log-probabilities of tokens beside the peers, and beside the limit of the machine.

    python -m bench.logprob {tune,gathered,forward,frozen,trained,error} [OUT.json] [--sizes 8192x4096x128256 ...]

`tune` measures which algorithm scores fastest and remembers it; `gathered` starts from logits; `forward`, `frozen` and
`trained` start from hidden states, with nothing, the hidden states, or the head too to differentiate; `error` compares
errors alone. Sizes are rows x width x vocabulary. Without a GPU everything runs at toy sizes, to try the command.

Every variant of a size is run in turn, round by round. Columns: median milliseconds; `share`, the least time that its
own products (bytes, for `gathered`) need on this machine over that time; `x mopl`, its time over mopl's; `extra`, peak
memory beyond what was there before (gradients included); `log p`, the largest error against float64 over a sample of
rows in nats; `grad`, that of their gradient, root mean square relative to its size. A sum has no `log p` to compare.
At sizes that have targets, those are printed beside what was measured.

Each command ends within 100 seconds and writes its file anew with every row: it is safe to cut off.
"""

from __future__ import annotations

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.limits import rates
from bench.logprob_peers import HEAD_FLOP, Found, Peer, float32_head, head_peers, logit_peers
from bench.logprob_problems import exactly, problem, relative
from bench.measuring import DEVICE, ON_GPU, Report, extra_memory, interleaved
from mopl.ops._backend import INTERPRETED

BUDGET_S = 85.0  # no size is begun after this
SIZE_S = 20.0  # rounds of one size end after this
SAMPLE = 256 if ON_GPU else 64  # rows whose error is measured
ROUNDS = 1 if INTERPRETED else 12

TARGET_SHARE = {"forward": 0.88, "frozen": 0.92, "trained": 0.92, "gathered": 0.9}
TARGET_RATIO = {"frozen": 1.8, "trained": 1.25}  # times of those who give a log-probability per token, over mopl's
RIVALS = ("TRL chunked", "Liger scaled CE")

HEADS = ["8192x4096x128256", "4096x4096x32000", "16384x2048x151936", "16384x4096x128256"]
if ON_GPU:
    SIZES = {
        "tune": ["16x4096x128256", "128x4096x128256", "512x4096x128256", "2048x4096x128256", "8192x4096x128256"],
        "gathered": ["4096x0x128256", "16384x0x32000", "16384x0x128256"],
        **dict.fromkeys(("forward", "frozen", "trained"), HEADS),
        "error": ["2048x1024x50257"],
    }
else:  # the interpreter takes seconds for what takes a processor milliseconds
    SMALL = "5x16x40" if INTERPRETED else "256x128x4096"
    SIZES = {command: [SMALL] for command in ("tune", "gathered", "forward", "frozen", "trained", "error")}
    if INTERPRETED:
        SIZES["gathered"] = ["1x0x40"]
DTYPES = (torch.bfloat16,) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)


def prepare(
    peers: list[Peer], run: Callable[[Peer], object], report: Report, size: str
) -> tuple[dict[str, Callable[[], object]], dict[str, float | None]]:
    """Run every peer once, for its memory; leave out, with their reasons, those that fail here."""
    steps, memory = {}, {}
    for peer in peers:
        try:
            run(peer)
            memory[peer.name] = extra_memory(lambda peer=peer: run(peer))
            steps[peer.name] = lambda peer=peer: run(peer)
        except Exception as error:  # other people's code, out of memory, not for this machine: reported, not hidden
            report.fail(size, peer.name, error)
            gc.collect()
    return steps, memory


def large(rows: int, width: int, vocabulary: int) -> bool:
    """Say whether the targets are for this size."""
    return ON_GPU and rows >= 8192 and width >= 4096 and vocabulary >= 128256


def parse(size: str) -> tuple[int, int, int]:
    rows, width, vocabulary = (int(n) for n in size.split("x"))
    return rows, width, vocabulary


def run_head(peer: Peer, mode: str, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> Tensor:
    """Run a peer in a mode and return its log-probabilities; gradients are left in `hidden.grad` and `weight.grad`."""
    hidden.requires_grad_(mode != "forward").grad = None
    weight.requires_grad_(mode == "trained").grad = None
    with torch.set_grad_enabled(mode != "forward"):
        value = peer.run(hidden, weight, target)
    if mode != "forward":
        value.backward(upstream.to(value.dtype) if peer.per_token else None)
    return value.detach()


def run_logits(
    peer: Peer, logits: Tensor, target: Tensor, upstream: Tensor, backward: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Run a peer on logits and return its log-probabilities and the gradient of the logits."""
    leaf = logits.detach().requires_grad_(backward)
    value = peer.run(leaf, target)
    if backward:
        value.backward(upstream.to(value.dtype))
    return value.detach(), leaf.grad


TIMES = {"ms": ".3f", "share": ".1%", "x mopl": ".2f", "extra GB": ".2f", "log p": ".1e", "grad": ".1e"}


def head(mode: str, sizes: list[str], report: Report, end: float) -> None:
    """Bench scoring, a frozen head or a trained head."""
    _, flops = rates()
    for size in sizes:
        if time.monotonic() > end:
            print(f"\n{size}: left out, the time is up")
            continue
        rows, width, vocabulary = parse(size)
        hidden, weight, target, upstream = problem("peaked", rows, width, vocabulary)
        peers, absent = head_peers(rows, vocabulary, weight.itemsize, ON_GPU)
        peers = [peer for peer in peers if mode in peer.modes]

        def run(peer: Peer, case=(hidden, weight, target, upstream)) -> Tensor:
            return run_head(peer, mode, *case)

        report.head(f"{mode}, {rows} rows, width {width}, vocabulary {vocabulary}, bf16, {report.about['device']}")
        steps, memory = prepare(peers, run, report, size)
        part = slice(0, SAMPLE)
        few = (hidden.detach()[part], weight.detach(), target[part])
        exact, wanted, _ = exactly(*few, upstream[part])
        _, wanted_of_sum, _ = exactly(*few, torch.ones_like(upstream[part]))
        errors = {}
        for peer in peers:
            if peer.name in steps:
                value = run(peer)
                gradient = None if hidden.grad is None else hidden.grad[part]
                truth = wanted if peer.per_token else wanted_of_sum
                errors[peer.name] = {
                    "log p": float((value[part].double() - exact).abs().max()) if peer.per_token else None,
                    "grad": None if gradient is None else relative(gradient, truth),
                }
        seconds = interleaved(steps, min(end + 10, time.monotonic() + SIZE_S), ROUNDS)
        for peer in peers:
            if peer.name in seconds:
                took = seconds[peer.name]
                least = peer.flop[mode] * rows * vocabulary * width / flops
                beside = took / seconds["mopl"] if "mopl" in seconds else None
                report.add(
                    size, peer.name, ms=took * 1e3, share=least / took, **{"x mopl": beside},
                    **{"extra GB": memory[peer.name], "FLOP": peer.flop[mode]}, **errors[peer.name],
                )  # fmt: skip
        report.note(absent=absent, mode=mode, flop_per_second=flops)
        if large(rows, width, vocabulary) and "mopl" in seconds:
            own = next(peer.flop[mode] for peer in peers if peer.name == "mopl") * rows * vocabulary * width
            report.target(size, "share of the limit", TARGET_SHARE[mode], own / flops / seconds["mopl"])
            for name in RIVALS if mode in TARGET_RATIO else ():
                if name in seconds:
                    report.target(
                        size, f"time of {name} over mopl's", TARGET_RATIO[mode], seconds[name] / seconds["mopl"]
                    )
        del hidden, weight, few, steps
        gc.collect()
    _list_absent(head_peers(1, 1, 2, ON_GPU))


def gathered(sizes: list[str], report: Report, end: float) -> None:
    """Bench log-probabilities from logits, forward alone and with the gradient."""
    bandwidth, _ = rates()
    for size in sizes:
        if time.monotonic() > end:
            print(f"\n{size}: left out, the time is up")
            continue
        rows, _, vocabulary = parse(size)
        generator = torch.Generator(DEVICE).manual_seed(0)
        logits = torch.randn(rows, vocabulary, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        target = torch.randint(vocabulary, (rows,), generator=generator, device=DEVICE)
        logits.scatter_add_(1, target[:, None], 20 * torch.rand(rows, 1, device=DEVICE).bfloat16())
        upstream = torch.randn(rows, generator=generator, device=DEVICE)
        peers, absent = logit_peers()
        part = slice(0, SAMPLE)
        exact = logits[part].double().log_softmax(-1)
        wanted = -exact.exp() * upstream[part, None].double()
        wanted.scatter_add_(1, target[part, None], upstream[part, None].double())
        exact = exact.gather(1, target[part, None])[:, 0]
        for mode, passes in (("forward", 2), ("forward and backward", 6)):
            if mode == "forward":
                chosen = [peer for peer in peers if "in place" not in peer.name]
            else:
                chosen = peers
            # What works in place gets logits of its own.
            own = {peer.name: logits.clone() if "in place" in peer.name else logits for peer in chosen}

            def run(peer: Peer, own=own, mode=mode, more=(target, upstream)) -> tuple[Tensor, Tensor | None]:
                return run_logits(peer, own[peer.name], *more, backward=mode != "forward")

            report.head(f"gathered, {mode}, {rows} rows, vocabulary {vocabulary}, bf16, {report.about['device']}")
            errors = {}
            for peer in chosen:  # before anything is written in place
                try:
                    value, gradient = run(peer)
                    errors[peer.name] = {
                        "log p": float((value[part].double() - exact).abs().max()),
                        "grad": None if gradient is None else relative(gradient[part], wanted),
                    }
                except Exception:  # `prepare` says why
                    errors[peer.name] = {}
                value = gradient = None
            steps, memory = prepare(chosen, run, report, size)
            seconds = interleaved(steps, min(end + 10, time.monotonic() + SIZE_S / 2), ROUNDS)
            for peer in chosen:
                if peer.name in seconds:
                    took = seconds[peer.name]
                    least = passes * rows * vocabulary / bandwidth
                    beside = took / seconds["mopl"] if "mopl" in seconds else None
                    report.add(
                        f"{size} {mode}", peer.name, ms=took * 1e3, share=least / took,
                        **{"x mopl": beside, "extra GB": memory[peer.name]}, **errors[peer.name],
                    )  # fmt: skip
            own.clear()
            report.note(absent=absent, bytes_per_second=bandwidth)
            if ON_GPU and "mopl" in seconds:
                least = passes * rows * vocabulary / bandwidth
                report.target(
                    size, f"share of copy bandwidth, {mode}", TARGET_SHARE["gathered"], least / seconds["mopl"]
                )
        del logits, wanted
        gc.collect()
    _list_absent(logit_peers())


def tune(sizes: list[str], report: Report, end: float) -> None:
    """Measure every algorithm that can score, and remember the fastest of each size."""
    if not ON_GPU and not INTERPRETED:
        print("nothing to choose: on a processor there is one algorithm")
        report.write()
        return
    from mopl.ops import _linear_logprob_choice as choice

    bandwidth, flops = rates()
    for size in sizes:
        if time.monotonic() > end:
            print(f"\n{size}: left out, the time is up")
            continue
        rows, width, vocabulary = parse(size)
        hidden, weight, _, _ = problem("flat", rows, width, vocabulary)
        for softcap in (None, 30.0):
            report.head(f"scoring, {rows} x {width} x {vocabulary}{' with a softcap' if softcap else ''}, bf16")
            measured = choice.tune(hidden, weight, softcap)
            least = max(2 * rows * vocabulary * width / flops, 2 * vocabulary * width / bandwidth)
            for name, milliseconds in sorted(measured.items(), key=lambda item: item[1]):
                report.add(
                    f"{size}{' softcap' if softcap else ''}", name, ms=milliseconds, share=least / milliseconds * 1e3
                )
            remembered = json.loads(choice.cache_path().read_text())
            report.note(remembered=remembered, flop_per_second=flops, bytes_per_second=bandwidth)


def error(sizes: list[str], report: Report, end: float) -> None:
    """Compare errors against float64 on the same rounded inputs."""
    for size in sizes:
        rows, width, vocabulary = parse(size)
        for dtype in DTYPES:
            for kind in ("flat", "peaked"):
                if time.monotonic() > end:
                    print(f"\n{size} {dtype} {kind}: left out, the time is up")
                    continue
                _errors(size, problem(kind, rows, width, vocabulary, dtype), kind, report)
    _list_absent(head_peers(1, 1, 2, ON_GPU))


def _errors(size: str, case: tuple[Tensor, Tensor, Tensor, Tensor], kind: str, report: Report) -> None:
    hidden, weight, target, upstream = case
    kind_of = str(hidden.dtype).removeprefix("torch.")
    report.head(f"errors, {kind} logits, {kind_of}, {size.replace('x', ' x ')}, {report.about['device']}")
    exact, *wanted = exactly(hidden, weight, target, upstream, whole=True)
    _, *wanted_of_sum = exactly(hidden, weight, target, torch.ones_like(upstream), whole=True)
    peers, absent = head_peers(len(hidden), len(weight), weight.itemsize, ON_GPU)
    reference = Peer("float32 throughout", float32_head, flop=dict(HEAD_FLOP))
    for peer in [*peers, reference]:
        # With a frozen head the gradient of the hidden states takes another way than with a trained one.
        found: dict[str, float | None] = {}
        try:
            for frozen in (True, False):
                h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
                value = peer.run(h, w, target)
                value.backward(upstream.to(value.dtype) if peer.per_token else None)
                truth = wanted if peer.per_token else wanted_of_sum
                assert h.grad is not None
                scale = truth[0].norm(dim=1).clamp(min=1e-30)
                if frozen:
                    found["dh frozen"] = relative(h.grad, truth[0])
                    found["worst row"] = float(((h.grad.double() - truth[0]).norm(dim=1) / scale).max())
                else:
                    assert w.grad is not None
                    found["dh trained"], found["dW"] = relative(h.grad, truth[0]), relative(w.grad, truth[1])
            if peer.per_token:
                apart = (value.detach().double() - exact).abs()
                found["log p max"], found["log p rms"] = float(apart.max()), float(apart.square().mean().sqrt())
        except Exception as problem_:  # other people's code: reported, not hidden
            report.fail(size, peer.name, problem_, logits=kind, dtype=kind_of)
            continue
        report.add(size, peer.name, **found, logits=kind, dtype=kind_of)
    report.note(absent=absent)


ERRORS = dict.fromkeys(("log p max", "log p rms", "dh frozen", "worst row", "dh trained", "dW"), ".1e")


def _list_absent(found: Found) -> None:
    for name, reason in found[1].items():
        print(f"absent: {name} ({reason})")


def main() -> None:
    """Run one command."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=list(SIZES))
    parser.add_argument("out", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--sizes", nargs="+", metavar="NxHxV", help="rows x width x vocabulary (width 0 for gathered)")
    arguments = parser.parse_args()
    sizes = arguments.sizes or SIZES[arguments.command]
    if not all(len(size.split("x")) == 3 and size.replace("x", "").isdigit() for size in sizes):
        parser.error(f"--sizes takes rows x width x vocabulary, such as 8192x4096x128256; got {' '.join(sizes)}")
    end = start + BUDGET_S
    if arguments.command == "tune":
        tune(sizes, Report(arguments.out, {"ms": ".3f", "share": ".1%"}), end)
    elif arguments.command == "gathered":
        gathered(sizes, Report(arguments.out, TIMES), end)
    elif arguments.command == "error":
        error(sizes, Report(arguments.out, ERRORS), end)
    else:
        head(arguments.command, sizes, Report(arguments.out, TIMES), end)


if __name__ == "__main__":
    main()
