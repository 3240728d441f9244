"""The mechanics of linear_logprob on a CPU: cost in products and memory, autograd, repetition, the compiler."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mopl import reference_logprob
from mopl.ops import linear_logprob
from mopl.ops._logprob import Upstream
from mopl.ops.linear_logprob import cpu, stages
from mopl.ops.linear_logprob.records import Head, Inputs, Need, Want
from mopl.ops.linear_logprob.stages import run_backward, run_forward

ALL = dict(return_logsumexp=True, return_entropy=True)


def leaf(value: Tensor, wanted: bool = True) -> Tensor:
    return value.detach().clone().requires_grad_(wanted)


# ---------------------------------------------------------------- cost


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products, also of those in place."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def products(train: str, mask: Tensor | None = None, keep_rows: int = 0, upstream: Tensor | None = None) -> float:
    """Multiply-adds of forward and backward in units of one product of the counted rows with the head."""
    rows, vocabulary, size = 24, 50, 16
    hidden, weight = torch.randn(rows, size), torch.randn(vocabulary, size)
    target = torch.randint(vocabulary, (rows,))
    counted = rows if mask is None else int(mask.sum())
    target = target if mask is None else torch.where(mask, target, -1)
    frozen, upstream = train == "h", torch.randn(rows) if upstream is None else upstream
    with Products() as counter:
        head, inputs = Head(weight, None, 0.0, 1.0), Inputs(hidden, torch.ones(rows), target, None)
        want = Want(False, False, frozen, False, False, keep_rows, rows)
        saved = run_forward(head, inputs, want)
        if train and not frozen:
            need = Need("h" in train, "w" in train, False, False)
            run_backward(head, inputs, want, saved, Upstream(upstream, None, None), need)
    return counter.count / (counted * vocabulary * size)


def test_one_product_to_score_two_with_a_frozen_head_three_with_a_kept_trained_one() -> None:
    mask = torch.rand(24) > 0.5
    for kept in (None, mask):
        assert products("", kept) == 1
        assert products("h", kept) == 2
        assert products("hw", kept, keep_rows=24) == 3
        assert products("w", kept, keep_rows=24) == 2
        assert products("hw", kept, keep_rows=0) == 4
    assert products("hw", keep_rows=12) == 3.5


def test_rows_without_upstream_gradient_take_no_part_in_the_backward_products() -> None:
    upstream = torch.randn(24)
    upstream[::2] = 0
    assert products("hw", keep_rows=24, upstream=upstream) == 1 + 2 / 2
    assert products("hw", keep_rows=0, upstream=upstream) == 1 + 3 / 2


@pytest.mark.parametrize("workspace", [0, 100 * 40 * 4, 2**31])
@pytest.mark.parametrize("frozen", [True, False])
def test_logits_are_never_kept(frozen: bool, workspace: int) -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hidden, weight = leaf(torch.randn(100, 8)), leaf(torch.randn(400, 8), not frozen)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_logprob(hidden, weight, torch.randint(400, (100,)), workspace=workspace)
    pointers = {t.data_ptr() for t in kept}
    size = sum(t.nbytes for t in kept) - (0 if frozen else hidden.nbytes + weight.nbytes)
    if frozen:  # the direction takes the place of the hidden states
        assert hidden.data_ptr() not in pointers and weight.data_ptr() not in pointers
        assert size < hidden.nbytes + 100 * 8 * 8
    else:
        assert size < min(workspace, 50 * 400 * 4) + 100 * 8 * 8


# ---------------------------------------------------------------- compaction without a synchronisation


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("train", ["h", "hwbt"])
@pytest.mark.parametrize("bound", [None, 9, 5])
def test_compaction_on_the_device_gives_the_same_and_nan_beyond_its_bound(
    bound: int | None, train: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does: rows sorted by whether they count, how many do being known there only."""
    rows, width, vocabulary = 12, 6, 23
    hidden, temperature = torch.randn(rows, width).double(), torch.rand(rows).double() + 0.5
    row = torch.tensor([0, 0, 2, 3, 5, 5, 5, 7, 9, 9, 10, 11, 1, 4]) if shared else torch.arange(rows)
    mask = torch.isin(row, torch.tensor([0, 2, 3, 5, 7, 9, 10]))
    if shared:
        mask[5] = False  # one of three targets of row 5
    idle = torch.ones(rows, dtype=torch.bool).index_fill(0, row[mask], False)
    assert int((~idle).sum()) == 7
    hidden[idle], temperature[idle] = torch.nan, torch.nan
    weight, bias = torch.randn(vocabulary, width).double(), torch.randn(vocabulary).double()
    target, upstream = torch.randint(vocabulary, row.shape), torch.randn(len(row) + 2 * rows).double()

    def run(max_rows: int | None) -> tuple[list[Tensor], list[Tensor]]:
        h, w, b, t = (leaf(v, n in train) for v, n in zip((hidden, weight, bias, temperature), "hwbt", strict=True))
        outputs = linear_logprob(
            h, w, target, bias=b, temperature=t, mask=mask, row=row if shared else None, max_rows=max_rows, **ALL
        )
        inputs = [x for x in (h, w, b, t) if x.requires_grad]
        return list(outputs), list(torch.autograd.grad((torch.cat(outputs) * upstream).sum(), inputs))

    expected, gradients = run(None)
    monkeypatch.setattr(stages, "use_triton", lambda tensor: True)
    monkeypatch.setattr(stages, "backend_of", lambda tensor: cpu)
    outputs, others = run(bound)
    if bound == 5:  # rows 9 and 10 lie beyond it
        lost = torch.isin(torch.arange(rows), torch.tensor([9, 10]))
        for o, e, gone in zip(outputs, expected, (lost[row] & mask, lost, lost), strict=True):
            assert o[gone].isnan().all()
            torch.testing.assert_close(o[~gone], e[~gone])
        torch.testing.assert_close(others[0][~lost], gradients[0][~lost])
        assert others[0][lost].isnan().all()
    else:
        for o, e in zip(outputs + others, expected + gradients, strict=True):
            torch.testing.assert_close(o, e)


# ---------------------------------------------------------------- autograd and repetition


@pytest.mark.parametrize("train", ["h", "hw", "hwt"])
def test_backward_twice_gives_the_same_bits_and_changes_no_input(train: str) -> None:
    values = torch.randn(40, 16), torch.randn(300, 16), torch.rand(40) + 0.5
    hidden, weight, temperature = (leaf(v, n in train) for v, n in zip(values, "hwt", strict=True))
    target = torch.randint(300, (40,))
    runs = []
    for _ in range(2):
        logprob, entropy = linear_logprob(hidden, weight, target, temperature=temperature, return_entropy=True)
        loss = (logprob * torch.linspace(-1, 1, 40)).sum() + entropy.square().sum()
        inputs = [t for t in (hidden, weight, temperature) if t.requires_grad]
        for _ in range(2):
            runs.append((logprob, entropy, *torch.autograd.grad(loss, inputs, retain_graph=True)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    for now, before in zip((hidden, weight, temperature), values, strict=True):
        assert torch.equal(now, before)


def test_a_second_derivative_is_refused_and_not_silently_wrong() -> None:
    for train in ("h", "hw"):
        hidden, weight = leaf(torch.randn(3, 4)), leaf(torch.randn(7, 4), "w" in train)
        logprob = linear_logprob(hidden, weight, torch.tensor([0, 1, 2]))
        (gradient,) = torch.autograd.grad(logprob.square().sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_logprob has no second derivative"):
            gradient.sum().backward()


def test_without_gradients_and_in_inference_mode() -> None:
    hidden, weight, target = leaf(torch.randn(6, 4)), leaf(torch.randn(9, 4)), torch.randint(9, (6,))
    expected = linear_logprob(hidden, weight, target)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logprob = linear_logprob(hidden, weight, target)
            assert torch.equal(logprob, expected) and not logprob.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    hidden, weight, target = leaf(torch.randn(6, 4)), leaf(torch.randn(9, 4)), torch.randint(9, (6,))
    plain = torch.autograd.grad(linear_logprob(hidden, weight, target).sum(), (hidden, weight))
    again = checkpoint(lambda h, w: linear_logprob(h, w, target), hidden, weight, use_reentrant=reentrant)
    again.sum().backward()
    assert torch.equal(hidden.grad, plain[0]) and torch.equal(weight.grad, plain[1])


# ---------------------------------------------------------------- the compiler


@pytest.mark.parametrize("train", ["", "h", "hwbt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(train: str, dtype: torch.dtype) -> None:
    hidden, weight, bias = (
        leaf(torch.randn(*s).to(dtype), n in train) for s, n in (((5, 4), "h"), ((9, 4), "w"), ((9,), "b"))
    )
    temperature = leaf(torch.rand(5) + 0.5, "t" in train)
    frozen = train == "h"
    for row in (None, torch.tensor([0, 0, 3, 4, 4])):
        target = torch.tensor([1, 8, -1, 0, 4])
        want = Want(True, True, frozen, "t" in train, True, 2 if "w" in train else 0, 5)
        arguments = (hidden, weight, bias, temperature, target, row, 3.0, 1.5, want.numbers())
        torch.library.opcheck(torch.ops.mopl.linear_logprob.default, arguments)


def compiled(dynamic: bool | None, backend: str = "aot_eager"):
    """Return forward and backward as one compiled function, and a way to count its graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    def step(hidden, weight, target, mask, temperature):
        outputs = linear_logprob(hidden, weight, target, mask=mask, temperature=temperature, **ALL)
        return outputs[0] - outputs[1] * 0.1 + outputs[2]

    return step, lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def inputs(rows: int, frozen: bool) -> tuple[Tensor, ...]:
    weight = leaf(torch.randn(19, 6), not frozen)  # sizes of their own: the compiler takes equal ones for the same
    return leaf(torch.randn(rows, 6)), weight, torch.randint(19, (rows,)), torch.rand(rows) > 0.3


@pytest.mark.parametrize("frozen", [True, False])
def test_compiled_without_breaks_and_no_recompiles_for_rows_temperature_or_mask(frozen: bool) -> None:
    step, graphs = compiled(dynamic=True)
    for rows, temperature in ((8, 1.0), (13, 0.7), (40, 0.3), (7, 2.0)):
        hidden, weight, target, mask = inputs(rows, frozen)
        result = step(hidden, weight, target, mask, temperature)
        outputs = linear_logprob(hidden, weight, target, mask=mask, temperature=temperature, **ALL)
        expected = outputs[0] - outputs[1] * 0.1 + outputs[2]
        torch.testing.assert_close(result, expected)
        wanted = (hidden,) if frozen else (hidden, weight)
        upstream = torch.randn(rows)
        for a, e in zip(
            torch.autograd.grad(result, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
        ):
            torch.testing.assert_close(a, e)
    assert graphs() == 1

    step, graphs = compiled(dynamic=None)  # a first change of N makes N dynamic, a first change of a number that number
    for rows in (8, 13, 40):
        step(*inputs(rows, frozen), torch.rand(rows) + 0.5)
    assert graphs() == 2
    for temperature in (1.0, 0.5, 0.25, 0.7):
        step(*inputs(9, frozen), temperature)
    assert graphs() <= 4


@pytest.mark.slow
def test_inductor_compiles_forward_and_backward() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step, graphs = compiled(dynamic=True, backend="inductor")
        for rows in (8, 21):
            hidden, weight, target, mask = inputs(rows, False)
            result = step(hidden, weight, target, mask, torch.full((rows,), 0.8))
            expected = reference_logprob.linear_logprob(hidden, weight, target, mask=mask, temperature=0.8)
            expected = expected[0] - expected[1] * 0.1 + expected[2]
            torch.testing.assert_close(result, expected)
            pairs = [torch.autograd.grad(r.sum(), (hidden, weight)) for r in (result, expected)]
            for a, e in zip(*pairs, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
        assert graphs() == 1


def test_export_with_any_number_of_rows() -> None:
    class Scorer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(8, 19)

        def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
            result = linear_logprob(hidden, self.head.weight, target, bias=self.head.bias)
            assert isinstance(result, Tensor)
            return result

    model, rows = Scorer(), torch.export.Dim("rows", min=2)
    example = torch.randn(4, 8), torch.randint(19, (4,))
    program = torch.export.export(model, example, dynamic_shapes=({0: rows}, {0: rows}))
    hidden, target = torch.randn(11, 8), torch.randint(19, (11,))
    torch.testing.assert_close(program.module()(hidden, target), model(hidden, target))


@pytest.mark.parametrize(("given", "meant"), [(None, False), (0, False), (2, True), (-1, True)])
@pytest.mark.parametrize("option", ["return_logsumexp", "return_entropy"])
def test_switches_are_read_by_their_truth(option: str, given: int | None, meant: bool) -> None:
    """They travel to the operator as numbers, where None is none and 2 would be one more moment."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=generator, requires_grad=True) for n in (4, 9))
    found, expected = (linear_logprob(hidden, weight, torch.arange(4), **{option: value}) for value in (given, meant))
    assert isinstance(found, tuple) == isinstance(expected, tuple) == meant
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        gradients = [torch.autograd.grad(x.sum(), (hidden, weight), retain_graph=True) for x in (one, other)]
        assert all(map(torch.equal, *gradients))
