"""How linear_logprob is cut on GPUs that are not here: what a plan claims is counted again, and beside other plans."""

import functools
import itertools
import math

import pytest
import torch

from bench.cards import CARDS
from bench.head_costs import cost_of, pass_step, product_step
from mopl.ops.linear_logprob.plan import TOY, Device, Plan, make_plan

SIZES = [
    (16384, 4096, 128256),
    (8192, 2048, 151936),
    (1024, 4096, 128256),
    (256, 4096, 128256),
    (65536, 4096, 262144),
    (16384, 4096, 50257),
    (5000, 2560, 262144 + 3),
    (1, 64, 7),
]
WANTED = ["scoring", "frozen", "trained"]
BF16 = torch.bfloat16
SIZE_IDS = ["x".join(map(str, size)) for size in SIZES]


def every(test):
    """Run a test for every device and size."""
    return pytest.mark.parametrize("name", CARDS)(pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)(test))


def kept(device: Device, rows: int, vocabulary: int, itemsize: int = 2) -> int:
    return min(rows, device.memory // 32 // (vocabulary * itemsize))


def tiles_of(plan: Plan, rows: slice, vocabulary: int) -> list[tuple[int, int]]:
    """Return (rows, columns) of every tile of logits, cut as the scan of a chunk does."""
    many = rows.stop - rows.start
    wide = plan.columns(many, vocabulary)
    return [(many, min(wide, vocabulary - first)) for first in range(0, vocabulary, wide)]


def counted_waves(plan: Plan, device: Device, rows: int, size: int, vocabulary: int, wanted: str, keep: int) -> int:
    """Count the waves of every product one by one, 128 x 256 a block."""

    def waves(high: int, wide: int) -> int:
        blocks = sum(1 for _ in range(0, high, 128)) * sum(1 for _ in range(0, wide, 256))
        return -(-blocks // device.processors)

    def scan(chunk: slice) -> int:
        return sum(waves(*tile) for tile in tiles_of(plan, chunk, vocabulary))

    if wanted == "scoring":
        return sum(scan(chunk) for chunk in plan.chunks(0, rows))
    buffered = plan.chunks(keep, rows, buffered=True)
    again = sum(scan(c) + waves(c.stop - c.start, size) for c in buffered)
    if wanted == "frozen":
        return again
    total = again + sum(scan(c) for c in [*plan.chunks(0, keep), *plan.chunks(keep, rows)])
    parts = [*([slice(0, keep)] if keep else []), *buffered]
    return total + waves(keep, size) + len(parts) * waves(vocabulary, size)


@every
@pytest.mark.parametrize("wanted", WANTED)
def test_claims_are_what_is_counted(name: str, size: tuple[int, int, int], wanted: str) -> None:
    card, (rows, width, vocabulary) = CARDS[name], size
    device = card.plan
    plan = make_plan(device, BF16, rows, width, vocabulary, wanted)
    keep = kept(device, rows, vocabulary) if wanted == "trained" else 0
    cost = cost_of(plan, card, BF16, rows, width, vocabulary, wanted, keep)
    assert cost.waves == counted_waves(plan, device, rows, width, vocabulary, wanted, keep)
    # Every logit is multiplied once, and once more where it is not kept; each is read by its epilogue.
    flop = sum(2 * s.times * s.rows * s.columns * s.inner for s in cost.steps)
    products = {"scoring": 1, "frozen": 2, "trained": 3 + (rows - keep) / rows}[wanted]
    assert flop == round(products * 2 * rows * width * vocabulary)
    scanned = {"scoring": 1, "frozen": 1, "trained": 1 + (rows - keep) / rows}[wanted]
    stored = {"scoring": 0, "frozen": 1, "trained": 1}[wanted]
    epilogues = sum(s.times * s.bytes for s in cost.steps if s.name == "exp")
    assert epilogues == round(rows * vocabulary * (4 * scanned + 2 * stored))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_chunks_cover_every_row_once_within_bounds(name: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    card, (rows, width, vocabulary) = CARDS[name], size
    device = card.plan
    compute = max(4, dtype.itemsize)
    for wanted, buffers in itertools.product(WANTED, (1, 2)):
        plan = make_plan(device, dtype, rows, width, vocabulary, wanted, buffers=buffers)
        for start, buffered in itertools.product((0, rows // 3), (False, True)):
            chunks = plan.chunks(start, rows, buffered)
            assert [i for c in chunks for i in (c.start, c.stop)][1:-1:2] == [c.start for c in chunks[1:]]
            assert chunks[0].start == start and chunks[-1].stop == rows
            heights = [c.stop - c.start for c in chunks]
            assert all(h % 128 == 0 for h in heights[:-1]) and 0 < heights[-1] <= heights[0]
            for height in {heights[0], heights[-1]}:
                tile = plan.columns(height, vocabulary)
                assert 0 < tile <= vocabulary and (tile % 64 == 0 or tile == vocabulary)
                assert height * tile * compute <= 2**27
            if buffered and heights[0] > 128:
                assert heights[0] * vocabulary * dtype.itemsize * buffers <= device.memory // 64
    assert plan.chunks(5, 5) == []


@functools.cache
def best_scan(name: str, height: int, size: int, vocabulary: int, stored: bool) -> float:
    """Return the seconds of the fastest pass over the vocabulary, of all widths of tile that the area has room for."""
    card, block = CARDS[name], -(-height // 128) * 128
    room = 2**25 // (block * 256)

    def seconds(blocks: int) -> float:
        total, wide = 0.0, min(blocks * 256, vocabulary)
        for times, columns in ((vocabulary // wide, wide), (1, vocabulary % wide)):
            if times and columns:
                step = product_step(card, BF16, "", 1, height, columns, size)
                moved = height * columns * (6 if stored else 4)
                total += times * (step.seconds + pass_step(card, "", 1, moved).seconds)
        return total

    return min(map(seconds, range(1, min(room, -(-vocabulary // 256)) + 1)))


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("size", SIZES[:5], ids=SIZE_IDS[:5])
def test_the_rule_is_within_two_percent_of_a_search(name: str, size: tuple[int, int, int]) -> None:
    """By the same prediction, for every height of chunks and every width of tiles; the rule itself takes no search."""
    card, (rows, width, vocabulary) = CARDS[name], size
    device = card.plan
    for wanted in ("scoring", "frozen"):
        room = device.memory // 64 // (vocabulary * 2 * 128) if wanted == "frozen" else 99
        most = min(-(-rows // 128), room, 49)
        best = math.inf
        for high in range(max(1, min(most, 16)), most + 1):
            total = 0.0
            for times, height in ((rows // (128 * high), 128 * high), (1, rows % (128 * high))):
                if times and height:
                    one = best_scan(name, height, width, vocabulary, wanted == "frozen")
                    if wanted == "frozen":
                        one += product_step(card, BF16, "", 1, height, width, vocabulary).seconds
                    total += times * one
            best = min(best, total)
        plan = make_plan(device, BF16, rows, width, vocabulary, wanted)
        seconds = sum(s.times * s.seconds for s in cost_of(plan, card, BF16, rows, width, vocabulary, wanted).steps)
        assert seconds <= 1.02 * best, (wanted, plan, seconds / best)


def test_goals_on_an_h200() -> None:
    """Predicted, not measured, for 16384 x 4096 x 128256 in bf16: what a plan leaves out is small beside it."""
    card, size = CARDS["H200"], (16384, 4096, 128256)
    limit = 2 * math.prod(size) / 788e12 * 1e3

    def predicted(wanted: str, keep: int = 0) -> float:
        return cost_of(make_plan(card.plan, BF16, *size, wanted), card, BF16, *size, wanted, keep).milliseconds

    plan = make_plan(card.plan, BF16, *size, "frozen")
    assert plan.rows == plan.buffer_rows == 33 * 128 and plan.columns(plan.rows, 128256) == 7168
    assert limit / predicted("scoring") >= 0.88
    assert predicted("scoring") == pytest.approx(24.1, abs=0.1)
    assert predicted("frozen") == pytest.approx(47.0, abs=0.1)  # the goal is 47.5
    assert kept(card.plan, 16384, 128256) == 16384
    assert predicted("trained", 16384) == pytest.approx(69.0, abs=0.1)  # the goal is 71
    assert predicted("trained", 2**31 // (2 * 128256)) > 78  # with 2 GiB
    # As it was: 2048 columns a tile, rows cut evenly into 4096 and 2048.
    before = Plan("library", 4096, 2048, 4096 * 2048, (128, 256), 132)
    assert limit / cost_of(before, card, BF16, *size, "scoring").milliseconds < 0.82


def test_few_rows_get_wide_tiles_and_the_fused_kernel() -> None:
    device = CARDS["H200"].plan
    plan = make_plan(device, BF16, 1024, 4096, 128256, "scoring", ("few", "short"))
    assert plan.algorithm == "library" and plan.columns(1024, 128256) == 115 * 256
    for rows, wanted, fits, name in (
        (256, "scoring", ("few", "short"), "short"), (16, "scoring", ("few", "short"), "few"),
        (16, "scoring", (), "library"), (16, "frozen", ("few", "short"), "library"),
        (257, "scoring", ("few", "short"), "library"),
    ):  # fmt: skip
        assert make_plan(device, BF16, rows, 4096, 128256, wanted, fits).algorithm == name
    assert make_plan(device, torch.float32, 16, 4096, 128256, "scoring", ("float32",)).algorithm == "library"


def test_products_of_our_own_take_the_librarys_place_but_for_few_rows() -> None:
    fits = ("wide", "few", "short", "descriptors")
    for rows, wanted, name in (
        (16, "scoring", "few"), (64, "scoring", "short"), (65, "scoring", "descriptors"),
        (16, "frozen", "descriptors"), (16384, "trained", "descriptors"),
    ):  # fmt: skip
        plan = make_plan(CARDS["H200"].plan, BF16, rows, 4096, 128256, wanted, fits)
        assert plan.algorithm == name and plan.rows % 128 == 0
        if name == "descriptors":
            assert plan.rows == plan.buffer_rows == 4096
    small = Device(114, 25 * 10**9, (9, 0))
    plan = make_plan(small, BF16, 16384, 4096, 128256, "frozen", fits)
    assert plan.rows == 4096 and plan.buffer_rows * 128256 * 2 <= small.memory // 64


def test_float16_costs_one_more_product() -> None:
    card, size = CARDS["H200"], (4096, 4096, 128256)
    plan = make_plan(card.plan, torch.float16, *size, "frozen")
    more, less = (cost_of(plan, card, d, *size, "frozen") for d in (torch.float16, BF16))
    one = cost_of(plan, card, BF16, *size, "scoring")
    assert more.waves == less.waves + one.waves and more.launches == less.launches + one.launches


def test_exponentials_fit_into_the_memory_of_smaller_gpus() -> None:
    for processors, memory, capability in ((114, 85 * 10**9, (9, 0)), (128, 25 * 10**9, (8, 9))):  # H100 PCIe, RTX 4090
        plan = make_plan(Device(processors, memory, capability), BF16, 16384, 4096, 128256, "frozen")
        assert plan.buffer_rows * 128256 * 2 <= memory // 64 and plan.buffer_rows % 128 == 0


def test_the_toy_of_the_interpreter_cuts_its_tests() -> None:
    plan = make_plan(TOY, torch.float32, 11, 20, 107, "frozen")
    assert [c.stop - c.start for c in plan.chunks(0, 11, buffered=True)] == [8, 3]
    assert plan.columns(8, 107) == 48
    for dtype, rows, area in itertools.product(
        (torch.float64, torch.float32, BF16), (1, 3, 8, 11, 40), (1, 100, 384, 900)
    ):
        plan = make_plan(TOY, dtype, 11, 20, 107, "frozen")._replace(area=area)
        columns = plan.columns(rows, 107)
        assert columns == 107 or columns > 0 == columns % 16  # as kernels write
