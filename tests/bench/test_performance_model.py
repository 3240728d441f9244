"""What each op launches on a GPU, recorded without one: a change that adds kernels, products or bytes is seen here.

`bench/model_counts.json` holds what was recorded last; `python -m bench.model --record` writes it anew.
"""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton")

from bench.cards import CARDS
from bench.model import COMPARED, COUNTS, counts_of, device_seconds, evaluate, judge, measure, table
from bench.model_cases import TOY, cases
from bench.recording import DEVICE, Launch, Recording, Waits, record

H200 = CARDS["H200"]
ANEW = "python -m bench.model --record"


def worse(case: str, was: dict, now: dict) -> list[str]:
    """Say what a case does more of: kernels and products exactly, bytes by more than 1 %."""
    found = []
    for what in COMPARED:
        allowed = was[what] * 1.01 if what == "bytes" else was[what]
        if now[what] > allowed:
            found.append(f"{case}: {what} were {was[what]:,}, are {now[what]:,}")
    for kind in ("by name", "by size") if found else ():
        for name in sorted({*was[kind], *now[kind]}):
            before, after = was[kind].get(name, 0), now[kind].get(name, 0)
            if after > before:
                found.append(f"    {name}: {before} -> {after}")
    return found


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10),
    reason="an older torch has no product that adds 16-bit operands to float32, and takes more steps by design",
)
def test_no_op_launches_multiplies_or_moves_more_than_was_recorded() -> None:
    recorded, now = json.loads(COUNTS.read_text()), counts_of(H200)
    assert recorded.keys() == now.keys(), f"the cases have changed; {ANEW}"
    found = [text for case in now for text in worse(case, recorded[case], now[case])]
    assert not found, "\n".join([*found, f"if that is meant: {ANEW}"])
    if recorded != now:
        print(f"fewer launches or bytes than recorded: {ANEW}")


def test_what_is_more_is_named() -> None:
    was = {"launches": 3, "products": 1, "flop": 10, "bytes": 1000, "by name": {"mm": 1}, "by size": {}}
    assert worse("x", was, {**was, "bytes": 1009}) == []
    assert worse("x", was, {**was, "bytes": 1011}) == ["x: bytes were 1,000, are 1,011"]
    more = {**was, "launches": 4, "by name": {"mm": 2}}
    assert worse("x", was, more) == ["x: launches were 3, are 4", "    mm: 1 -> 2"]
    assert worse("x", was, {**was, "launches": 1}) == []


def recorded(step) -> Recording:
    return record(H200, lambda: step)


def test_products_and_bytes_of_torch_are_counted() -> None:
    def step() -> None:
        a, b = torch.empty(64, 32, device=DEVICE), torch.empty(32, 16, device=DEVICE)
        torch.mm(a, b).add_(1.0)
        a.expand(3, 64, 32).sum()

    counts = recorded(step).counts()
    assert counts["by size"] == {"64 x 16 x 32 float32": 1} and counts["flop"] == 2 * 64 * 16 * 32
    assert counts["by name"] == {"torch.mm": 1, "torch.add_": 1, "torch.sum": 1}
    assert counts["bytes"] == 4 * (64 * 32 + 32 * 16 + 64 * 16) + 4 * 2 * 64 * 16 + 4 * (64 * 32 + 1)


def test_the_backward_pass_is_recorded() -> None:
    def step() -> None:
        a = torch.empty(8, 4, device=DEVICE, requires_grad=True)
        (a @ torch.empty(4, 2, device=DEVICE)).backward(torch.empty(8, 2, device=DEVICE))

    assert recorded(step).counts()["by size"] == {"8 x 2 x 4 float32": 1, "8 x 4 x 2 float32": 1}


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: bool(x.any())]
)
def test_what_waits_for_the_gpu_is_refused(wait) -> None:
    with pytest.raises(Waits):
        recorded(lambda: wait(torch.empty(4, device=DEVICE)))


def test_a_kernel_without_a_description_is_named() -> None:
    import triton

    with pytest.raises(LookupError, match=r"unknown_kernel.*bench/kernel_traffic.py"):
        recorded(lambda: triton.jit(unknown_kernel)[(1,)]())


def unknown_kernel() -> None:
    """Stands for a kernel that is new."""


def test_one_tile_more_than_a_wave_is_felt() -> None:
    def seconds(tiles: int) -> float:
        launch = Launch("mm", "product", (), product=(128 * tiles, 256, 4096), dtype=torch.bfloat16)
        return device_seconds(Recording([launch]), H200)[0]

    assert seconds(H200.plan.processors + 1) > 1.4 * seconds(H200.plan.processors)
    assert seconds(2 * H200.plan.processors) < 2.1 * seconds(H200.plan.processors)


def test_every_case_is_measured_at_toy_sizes() -> None:
    """The measured column, tried without a GPU."""
    chosen = [case for case in cases(TOY) if case.op != "linear_kl"]
    results = [evaluate(case, H200)[0] for case in chosen]
    kept: list[int] = []
    measure(
        chosen, results, torch.device("cpu"), 30, lambda: kept.append(sum(r.measured_ms is not None for r in results))
    )
    assert kept == sorted(kept) and kept[0] == 1, "what was measured is kept at once"
    judge(results, chosen, H200)
    assert len(table(results).splitlines()) > len(results)
    assert all(result.measured_ms for case, result in zip(chosen, results, strict=True) if case.make is not None)
    assert not any(result.failed for result in results)
    assert {result.goal for result in results} >= {"not behind", "<= 47.5 ms", "share >= 0.88"}
