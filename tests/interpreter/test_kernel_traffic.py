"""What the performance model says that a kernel moves is what it moves: counted address by address at small sizes."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bench.kernel_traffic import KERNELS, Arguments, kernel
from mopl.ops import gathered_logprob, linear_logprob, listwise_cross_entropy, plackett_luce_nll


class Counted:
    """One launch: the addresses that were read and written, once each, by the bytes of an element."""

    def __init__(self, name: str, arguments: Arguments) -> None:
        self.name, self.arguments = name, arguments
        self.read: dict[int, list[np.ndarray]] = {}
        self.written: dict[int, list[np.ndarray]] = {}

    @staticmethod
    def note(record: dict[int, list[np.ndarray]], pointers, mask) -> None:
        shape = np.shape(pointers.data)
        chosen = np.broadcast_to(np.asarray(mask.data), shape).ravel().astype(bool)
        width = max(pointers.dtype.scalar.element_ty.primitive_bitwidth // 8, 1)
        record.setdefault(width, []).append(np.asarray(pointers.data).astype(np.uint64).ravel()[chosen])

    @staticmethod
    def bytes(record: dict[int, list[np.ndarray]]) -> int:
        return sum(width * np.unique(np.concatenate(parts)).size for width, parts in record.items())


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Counted]]:
    """Collect every launch."""
    from triton.runtime import interpreter

    found: list[Counted] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def counted_load(self, pointers, mask, *rest, **named):
        Counted.note(found[-1].read, pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self, pointers, value, mask, *rest, **named):
        Counted.note(found[-1].written, pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    def counted_call(self, *arguments, **options):
        given = dict(zip(self.arg_names, arguments, strict=False)) | options
        grid = self.grid(given) if callable(self.grid) else self.grid
        name = f"{self.fn.__module__.rsplit('.', 1)[-1]}.{self.fn.__name__}"
        found.append(Counted(name, Arguments(given, int(np.prod(grid)))))
        return call(self, *arguments, **options)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    monkeypatch.setattr(executor, "__call__", counted_call)
    yield found


def as_declared(launches: list[Counted]) -> None:
    """Compare every launch with its declaration, and begin anew."""
    assert launches
    for one in launches:
        declared = kernel(one.name).traffic(one.arguments).values()
        counted = one.bytes(one.read), one.bytes(one.written)
        assert (sum(r for r, _ in declared), sum(w for _, w in declared)) == counted, one.name
    launches.clear()


def distinct_targets(rows: int, vocabulary: int) -> torch.Tensor:
    return torch.randperm(vocabulary)[:rows]


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0, "return_logsumexp": True}, {"return_entropy": True}, {"bias": True}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["scoring", "frozen", "trained", "trained, nothing kept"])
def test_linear_logprob(mode: str, options: dict, launches: list[Counted]) -> None:
    rows, size, vocabulary = 6, 24, 70
    hidden = torch.randn(rows, size, requires_grad=mode != "scoring")
    weight = torch.randn(vocabulary, size, requires_grad=mode.startswith("trained"))
    options = dict(options)
    if "bias" in options:
        options["bias"] = torch.randn(vocabulary, requires_grad=mode.startswith("trained"))
    if mode == "trained, nothing kept":
        options["workspace"] = 0
    out = linear_logprob(hidden, weight, distinct_targets(rows, vocabulary), **options)
    if mode != "scoring":
        sum(x.sum() for x in (out if isinstance(out, tuple) else (out,))).backward()
    as_declared(launches)


def test_the_fused_product(launches: list[Counted], monkeypatch: pytest.MonkeyPatch) -> None:
    from mopl.ops.linear_logprob import choice

    tiles = {"BM": 16, "BV": 32, "BH": 16, "GROUP": 2, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(choice, "fused_tiles", lambda plan: tiles)
    linear_logprob(torch.randn(20, 24), torch.randn(70, 24), distinct_targets(20, 70))
    assert "fused_logprob.fused_sum_kernel" in {one.name for one in launches}
    as_declared(launches)


@pytest.mark.parametrize("mode", ["scoring", "frozen", "trained"])
def test_products_of_our_own(
    mode: str, launches: list[Counted], own_products: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mopl.ops.linear_logprob import function

    monkeypatch.setattr(function, "kept_rows", lambda hidden, weight, rows, *_: rows)  # as on a GPU: all of them
    hidden = torch.randn(37, 24).bfloat16().requires_grad_(mode != "scoring")
    weight = torch.randn(107, 24).bfloat16().requires_grad_(mode == "trained")
    out = linear_logprob(hidden, weight, distinct_targets(37, 107))
    if mode != "scoring":
        out.sum().backward()
    launched = {one.name for one in launches}
    assert "linear_logprob_products.exponential_kernel" in launched
    assert ("linear_logprob_products.weight_gradient_kernel" in launched) == (mode == "trained")
    as_declared(launches)


def test_linear_logprob_with_several_targets_a_row(launches: list[Counted]) -> None:
    hidden, weight = torch.randn(4, 24, requires_grad=True), torch.randn(70, 24)
    row = torch.tensor([0, 1, 2, 3])
    linear_logprob(hidden, weight, distinct_targets(4, 70), row=row).sum().backward()
    as_declared([one for one in launches if one.name != "linear_logprob.combine_kernel"])


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"return_entropy": True}], ids=str)
@pytest.mark.parametrize("targets", [1, 3])
def test_gathered_logprob(targets: int, options: dict, launches: list[Counted]) -> None:
    logits = torch.randn(5, 70, requires_grad=True)
    out = gathered_logprob(logits, torch.randint(70, (5, targets)), **options)
    sum(x.sum() for x in (out if isinstance(out, tuple) else (out,))).backward()
    as_declared(launches)


@pytest.mark.parametrize("items", [3, 40, 2100, 9000])
@pytest.mark.parametrize("objectives", [1, 2])
def test_listwise_cross_entropy(items: int, objectives: int, launches: list[Counted]) -> None:
    scores = torch.randn(2, items, requires_grad=True)
    labels = torch.rand(2, objectives, items) + 0.1
    temperature = torch.ones(2, objectives, requires_grad=objectives > 1)
    listwise_cross_entropy(scores, labels, temperature).sum().backward()
    as_declared(launches)


@pytest.mark.parametrize("options", ["", "order", "weights", "efron"])
@pytest.mark.parametrize("items", [3, 40, 150])
def test_plackett_luce(items: int, options: str, launches: list[Counted]) -> None:
    """Without ties; scans over long lists are slow in the interpreter."""
    scores, labels = torch.randn(2, items, requires_grad=True), torch.rand(2, 1, items)
    given = {
        "order": {"order": labels.argsort(-1, descending=True)}, "weights": {"position_weights": torch.rand(items)},
        "efron": {"ties": "efron"},
    }.get(options, {})  # fmt: skip
    plackett_luce_nll(scores, labels, torch.ones(2, 1), **given).sum().backward()
    as_declared(launches)


def test_every_kernel_that_is_described_exists() -> None:
    import importlib

    for name in KERNELS:
        module, function = name.split(".")
        assert hasattr(importlib.import_module(f"mopl.kernels.{module}"), function), name
