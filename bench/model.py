"""What every op costs on a GPU by what its code launches, beside the limit and the goals; no GPU is needed.

    python -m bench.model                              # every case on an H200
    python -m bench.model --card B200 --op listnet     # another GPU, cases whose name holds a word
    python -m bench.model --record                     # write bench/model_counts.json, which a test compares with
    python -m bench.model --measure --json FILE        # on a GPU: a measured column; --toy tries it without one

Launches, bytes and products are recorded (`recording.py`), instructions counted in machine code (`instructions.py`);
the times are *predicted* from them by the few constants below. A kernel takes as long as its bytes, its product or its
instructions, whichever is most; a case as long as the device or the host, whichever is longer. Share is the limit
divided by that time: what the products, or the bytes, cannot go below on that card. Of PyTorch's own kernels, and of
compiled peers, instructions are not known: they are predicted by their bytes alone. Peers say how many times mopl's
time, or bytes, theirs is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.cards import CARDS, Card
from bench.head_costs import GAP
from bench.instructions import recorded as recorded_instructions
from bench.measuring import about
from bench.model_cases import TOY, Case, Sizes, cases
from bench.recording import DEVICE, Launch, Recording, Touch, record
from mopl._files import write_file

NONE: Mapping[str, list[int]] = {}
COUNTS = Path(__file__).with_name("model_counts.json")
COMPARED = ("launches", "products", "flop", "bytes")

# ---- constants of the model; every one is predicted, none was measured on a GPU unless it says so ----
# Output tiles of the vendor's products and what they reach of the card's rate.
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9), (64, 64, 0.6))
FUSED = 0.85  # of that rate: products in Triton; measured, .86 on an H200 with the sums of exponentials
L2_SHARE = 0.8  # of the L2 cache that holds what was touched last; an H200's is two halves
L2_SPEED = 1.3  # of the copy bandwidth: reads that hit (33 MB in about 6 us on an H200)
ISSUED = 4 * 0.7  # warp instructions a processor issues in a cycle: four schedulers, seven of ten slots filled
# The host: an aten call, a view, a launch of a Triton kernel, a custom op with its autograd.
HOST = {"torch": 5e-6, "view": 1.5e-6, "triton": 20e-6, "custom op": 50e-6}
COMPILED_HOST = 60e-6  # a call of a compiled function, each way
ALIKE = 0.01  # of the time: two that move the bytes that nobody can avoid are alike


@dataclass
class Result:
    """One row of the table."""

    op: str
    name: str
    flop: int = 0
    bytes: int = 0
    launches: int = 0
    products: int = 0
    fill: float | None = None  # share of the products' tile slots that hold a tile
    device_ms: float = 0.0
    host_ms: float = 0.0
    limit_ms: float = 0.0
    goal: str = ""
    met: bool | None = None
    measured_ms: float | None = None
    measured_host_ms: float | None = None  # until the host had launched everything
    failed: str = ""
    uncounted: int = 0  # kernels whose instructions are not known

    @property
    def ms(self) -> float:
        return max(self.device_ms, self.host_ms)

    @property
    def share(self) -> float:
        return self.limit_ms / self.ms if self.ms else 0.0


def product_seconds(launch: Launch, card: Card) -> tuple[float, float]:
    """Return the seconds of a product's arithmetic and the share of its tile slots that it fills."""
    assert launch.product is not None
    m, n, k = launch.product
    rate, processors = card.rate(launch.dtype.itemsize), card.plan.processors
    # The rate was measured on 8192 x 8192, whose last wave is not full either.
    square = 8192**2 / (128 * 256)
    rate *= math.ceil(square / processors) * processors / square
    if launch.tiles is not None:
        waves = math.ceil(launch.tiles / processors)
        fill = launch.tiles / (waves * processors)
        return launch.flop / (rate * FUSED * fill), fill
    best = None
    for height, width, reached in TILES:
        tiles = launch.batch * math.ceil(m / height) * math.ceil(n / width)
        waves = math.ceil(tiles / processors)
        seconds = waves * 2 * height * width * k / (reached * rate / processors)
        # The last wave's results are written when there is nothing left to multiply.
        seconds += min(tiles, processors) * height * width * 4 / card.bandwidth
        if best is None or seconds < best[0]:
            best = seconds, m * n * launch.batch / (waves * processors * height * width)
    assert best is not None
    return best


class Cache:
    """Which memory the L2 cache still holds: what was touched within as many bytes as fit."""

    def __init__(self, size: float) -> None:
        self.size, self.held = size, OrderedDict[tuple[int, int], int]()

    def touch(self, one: Touch) -> bool:
        """Say whether it was held, and hold it."""
        many = max(one.read, one.written)
        hit = self.held.pop(one.where, 0) >= many > 0
        if many <= self.size:
            self.held[one.where] = many
            while sum(self.held.values()) > self.size:
                self.held.popitem(last=False)
        return hit


def issued(launch: Launch, instructions: Mapping[str, list[int]]) -> float:
    """Return the instructions that all warps of a Triton kernel issue; 0 where that is not known."""
    program, loop = instructions.get(launch.code, (0, 0))
    return launch.warps * (program + max(0, launch.turns - 1) * loop)


def device_seconds(
    recording: Recording, card: Card, instructions: Mapping[str, list[int]] = NONE
) -> tuple[float, float | None]:
    """Return the time of all kernels one after another, and how full the products' waves are."""
    cache, total, slots, filled = Cache(card.cached * L2_SHARE), 0.0, 0.0, 0.0
    bandwidth, slots_a_second = card.bandwidth, ISSUED * card.clock * card.plan.processors
    for launch in recording.launches:
        far = near = 0.0
        for one in launch.touched:
            hit = cache.touch(one)
            near, far = near + hit * one.read, far + one.read * (not hit)
            # What stays in the cache until it is overwritten reaches DRAM at leisure, if at all.
            inside = one.written <= cache.size and launch.passes == 1
            near, far = near + inside * one.written, far + one.written * (not inside)
        seconds = launch.passes * (far / bandwidth + near / (L2_SPEED * bandwidth))
        if launch.product is not None:
            arithmetic, fill = product_seconds(launch, card)
            seconds = max(seconds, arithmetic)
            slots, filled = slots + launch.flop / fill, filled + launch.flop
        seconds = max(seconds, issued(launch, instructions) / slots_a_second)
        total += seconds + launch.kernels * GAP
    return total, filled / slots if slots else None


def evaluate(case: Case, card: Card) -> tuple[Result, Recording | None]:
    """Record a case and predict its time on a card."""
    limit = max(case.flop / card.rate(2), case.bytes / card.bandwidth)
    result = Result(case.op, case.name, limit_ms=1e3 * limit)
    if case.make is None:
        result.bytes, result.launches = case.traffic, 2
        result.device_ms = 1e3 * (case.traffic / card.bandwidth + 2 * GAP)
        result.host_ms = 2e3 * COMPILED_HOST
        return result, None
    make = case.make
    recording = record(card, lambda: make(DEVICE))
    counts = recording.counts()
    for name in COMPARED:
        setattr(result, name, counts[name])
    instructions = recorded_instructions()
    device, result.fill = device_seconds(recording, card, instructions)
    result.uncounted = len({x.code for x in recording.launches if x.code and x.code not in instructions})
    result.device_ms = 1e3 * device
    result.host_ms = 1e3 * sum(HOST[kind] * many for kind, many in recording.host.items())
    return result, recording


def judge(results: list[Result], chosen: list[Case], card: Card) -> None:
    """Fill in goals: milliseconds are those of an H200, shares and being ahead of peers are for every card."""
    by_name = {(r.op, r.name): r for r in results}
    for case, result in zip(chosen, results, strict=True):
        ms = result.measured_ms or result.ms
        if case.ms is not None and card.name == "H200":
            result.goal, result.met = f"<= {case.ms:g} ms", ms <= case.ms
        elif case.share is not None:
            result.goal, result.met = f"share >= {case.share:g}", result.limit_ms / ms >= case.share
        own = by_name.get((case.op, case.peer_of or ""))
        if own is not None:
            if case.make is None:  # whose instructions, and time, are not known
                times, what = result.bytes / own.bytes, "bytes"
            elif own.measured_ms is None or result.measured_ms is None:
                times, what = result.ms / own.ms, "time"
            else:
                times, what = result.measured_ms / own.measured_ms, "time"
            result.goal = f"{times:.2f} x {what}"
            own.goal, own.met = "not behind", own.met is not False and times >= 1 - ALIKE


def measure(
    chosen: list[Case], results: list[Result], device: torch.device, seconds: float, keep: Callable[[], None]
) -> None:
    """Fill in measured times: by events on a GPU, cases with a goal first, none begun after so many seconds.

    `keep` is called after each, so that what was measured is there if the process is cut off.
    """
    from bench.limits import times_of

    end = time.monotonic() + seconds
    pairs = list(zip(chosen, results, strict=True))
    pairs.sort(key=lambda pair: pair[0].ms is None and pair[0].share is None)
    for case, result in pairs:
        if case.make is None or time.monotonic() > end:
            continue
        try:
            times = times_of(case.make(device), repeats=5, warmup=2, seconds=2)
            result.measured_ms, result.measured_host_ms = times["ms"], times["host ms"]
        except Exception as error:
            result.failed = f"{type(error).__name__}: {error}".splitlines()[0][:110]
            print(f"{case.key} failed: {result.failed}", file=sys.stderr)
        keep()


def line(r: Result) -> str:
    """Return a row of the table."""
    fill, open_ = "" if r.fill is None else f"{r.fill:.2f}", "*" if r.uncounted else " "
    verdict = "" if r.met is None else "met" if r.met else "missed"
    own = "failed" if r.failed else "" if r.measured_ms is None else f"{r.measured_ms:.3f}"
    return (
        f"  {r.name:36s}{r.flop / 1e12:8.2f}{r.bytes / 1e9:9.2f}{r.launches:9d}{r.products:9d}{fill:>6s}"
        f"{r.device_ms:9.3f}{open_}{r.host_ms:8.3f}{r.ms:10.3f}{r.limit_ms:9.3f}{r.share:7.2f}{own:>10s}"
        f"  {r.goal:14s}{verdict}"
    )


HEAD = (
    f"  {'':36s}{'TFLOP':>8s}{'GB':>9s}{'launches':>9s}{'products':>9s}{'fill':>6s}{'device':>9s}{'host':>9s}"
    f"{'predicted':>10s}{'limit':>9s}{'share':>7s}{'measured':>10s}  goal"
)


def table(results: list[Result]) -> str:
    """Return all rows, op by op; times in milliseconds."""
    lines = []
    for op in dict.fromkeys(r.op for r in results):
        lines += ["", op, HEAD, *(line(r) for r in results if r.op == op)]
    return "\n".join(lines)


def counts_of(card: Card, sizes: Sizes | None = None) -> dict[str, dict]:
    """Return the counts of every case of mopl's own."""
    found = {}
    for case in cases(sizes):
        if case.make is not None and case.peer_of is None:
            make = case.make
            found[case.key] = record(card, lambda make=make: make(DEVICE)).counts()
    return found


def main() -> None:
    """Print the table, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=list(CARDS), default="H200", help="the GPU to predict for (default H200)")
    parser.add_argument("--op", default="", help="only cases whose op and name contain this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to this file")
    parser.add_argument("--record", action="store_true", help=f"write the counts of an H200 to {COUNTS.name}")
    parser.add_argument("--measure", action="store_true", help="run the cases on this GPU, too")
    parser.add_argument("--seconds", type=float, default=45, help="begin no measurement after so many (default 45)")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, measured on the CPU: to try the command")
    options = parser.parse_args()
    if options.record:
        rows = (f"{json.dumps(key)}: {json.dumps(counts)}" for key, counts in counts_of(CARDS["H200"]).items())
        write_file(COUNTS, "{\n" + ",\n".join(rows) + "\n}\n")
        print(f"wrote {COUNTS.name}")
        return
    if options.measure and not (options.toy or torch.cuda.is_available()):
        sys.exit("no GPU here: torch.cuda.is_available() is False; --measure needs one, --toy tries it without")
    card, device = CARDS[options.card], torch.device("cpu" if options.toy else "cuda")
    chosen = [case for case in cases(TOY if options.toy else None) if options.op in case.key]
    if not chosen:
        sys.exit(f"no case contains {options.op!r}")
    results = [evaluate(case, card)[0] for case in chosen]

    def keep() -> None:
        judge(results, chosen, card)
        if options.json:
            rows = [{**asdict(r), "ms": r.ms, "share": r.share} for r in results]
            described = {"name": card.name, **card.plan._asdict()}
            write_file(options.json, json.dumps({**about(), "card": described, "results": rows}, indent=1) + "\n")

    if options.measure:
        measure(chosen, results, device, options.seconds, keep)
    keep()
    rate, bandwidth = card.rate(2) / 1e12, card.bandwidth / 1e12
    print(f"{card.name}: {rate:.0f} TFLOP/s, {bandwidth:.2f} TB/s; times in ms, predicted")
    print(table(results))
    if any(r.uncounted for r in results):
        print("\n* without the instructions of a kernel; count them: python -m bench.instructions")
    if any(r.failed for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
