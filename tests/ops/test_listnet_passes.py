"""What ListNet does on a CPU, counted: times say little on a machine that others use, passes over memory do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mopl.losses import listwise_dpo
from mopl.ops import _rows
from mopl.ops.listnet import cpu, listwise_cross_entropy
from mopl.ops.listnet.function import _listwise_cross_entropy


class Passes(TorchDispatchMode):
    """Lists the calls that touch at least `least` numbers, views apart."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.names = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        touched = max((t.numel() for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)), default=0)
        name = func.__name__.split(".")[0]
        if touched >= self.least and not func.is_view and not name.startswith(("new_", "empty", "split")):
            self.names.append(name)
        return result


def passes(batch: int, objectives: int, items: int, normalize: bool = True, masked: bool = False) -> tuple[list, list]:
    """Return the names of the passes forward and backward over lists in which nothing is likely."""
    scores, labels = torch.rand(batch, items), torch.rand(batch, objectives, items)
    beta = torch.ones(()).expand(batch, 1)
    mask = torch.ones(batch, items, dtype=torch.bool) if masked else None
    with Passes(batch * items) as forward:
        loss, saved = cpu.forward(scores, labels, beta, mask, normalize)
    assert (saved[0] == -1).all()
    upstream = torch.ones(batch, objectives)
    with Passes(batch * items) as backward:
        cpu.backward(upstream, scores, labels, beta, mask, loss, saved, normalize, [True, False, False])
    return forward.names, backward.names


# A bare log_softmax with labels that are distributions takes 3 and 2: log_softmax, mul, sum; mul, its backward.
@pytest.mark.parametrize("items", [32, 120, 1000])
def test_one_objective_takes_three_passes_more_than_a_bare_log_softmax(items: int) -> None:
    forward, backward = passes(64, 1, items)
    names = {"mv": "sum", "addmv_": "sum", "amax": "max or sum"}
    found = [names.get(name, name) for name in forward]
    # the product with the labels; the labels' sign and their sum; a sign of rows that may be confident
    assert found[:2] == ["log_softmax", "mul"]
    assert found.count("amin") == 1
    assert len(found) == 6, forward
    assert backward == ["mul", "_log_softmax_backward_data"]
    assert len(passes(64, 1, items, normalize=False)[0]) == 4


@pytest.mark.parametrize("items", [8, 32, 120])
def test_five_objectives_read_their_labels_four_times_and_share_one_softmax(items: int) -> None:
    forward, backward = passes(64, 5, items)
    one = len(passes(64, 1, items)[0])
    assert len(forward) <= one, forward
    merged = 1 if 5 * items >= 400 else 5
    assert len(backward) <= merged + (1 if items >= 32 else 5), backward


def test_only_confident_lists_are_done_again(monkeypatch) -> None:
    rows = []
    again = cpu._do_again
    monkeypatch.setattr(cpu, "_do_again", lambda row, *more: rows.extend(row.tolist()) or again(row, *more))
    torch.manual_seed(0)
    for items in (3, 8, 40, 300):
        for masked in (False, True):
            rows.clear()
            scores, labels = torch.randn(200, items) * 4, torch.rand(200, 2, items)
            scores[7, 1] = -torch.inf
            mask = torch.ones(200, items, dtype=torch.bool) if masked else None
            listwise_cross_entropy(scores, labels, torch.ones(200, 1), mask)
            likely = scores.double().log_softmax(-1).amax(-1) >= -0.1
            likely[7] = True
            assert 10 < int(likely.sum()) < 190
            assert rows == likely.nonzero()[:, 0].tolist()


def test_rows_that_are_done_again_in_several_turns_are_the_same(monkeypatch) -> None:
    scores, labels = torch.randn(300, 5, dtype=torch.float64) * 20, torch.rand(300, 2, 5, dtype=torch.float64)
    whole = listwise_cross_entropy(scores, labels, torch.ones(300, 2, dtype=torch.float64))
    monkeypatch.setattr(_rows, "_BLOCK_ITEMS", 20)
    parts = listwise_cross_entropy(scores, labels, torch.ones(300, 2, dtype=torch.float64))
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)


def test_a_negative_label_is_named_by_its_list_in_any_block(monkeypatch) -> None:
    monkeypatch.setattr(_rows, "_BLOCK_ITEMS", 12)
    labels = torch.rand(40, 3)
    labels[31, 1] = -2
    with pytest.raises(ValueError, match="list 31 hold -2"):
        listwise_dpo(torch.rand(40, 3), labels)


def test_past_the_dispatcher_and_through_it_are_equal_bit_for_bit() -> None:
    results, watch = [], Passes(0)
    for watched in (False, True):
        torch.manual_seed(0)
        leaves = [(torch.randn(9, 6) * 5).requires_grad_(), torch.rand(9, 2, 6, requires_grad=True)]
        leaves.append(torch.full((9, 2), 0.7).requires_grad_())
        if watched:
            with watch:
                loss = listwise_cross_entropy(leaves[0], leaves[1], leaves[2])
                loss.square().sum().backward()
        else:
            loss = listwise_cross_entropy(leaves[0], leaves[1], leaves[2])
            loss.square().sum().backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert any("listwise_cross_entropy" in name for name in watch.names)
    for direct, dispatched in zip(*results, strict=True):
        assert torch.equal(direct, dispatched)
    op = _listwise_cross_entropy(leaves[0].detach(), leaves[1].detach(), leaves[2].detach(), None, True)
    assert torch.equal(op[0], results[0][0])


def test_a_trace_before_autograd_has_the_op_whole() -> None:
    arguments = torch.rand(4, 40), torch.rand(4, 2, 40), torch.ones(4, 1)

    def gradient(scores: Tensor, labels: Tensor, beta: Tensor) -> Tensor:
        leaf = scores.detach().requires_grad_()
        return torch.autograd.grad(listwise_cross_entropy(leaf, labels, beta).sum(), leaf)[0]

    def loss(scores: Tensor, labels: Tensor, beta: Tensor) -> Tensor:
        return listwise_cross_entropy(scores, labels, beta)

    for function in (loss, gradient):
        traced = make_fx(function, pre_dispatch=True)(*arguments)
        assert "mopl.listwise_cross_entropy" in traced.code
        assert torch.equal(traced(*arguments), function(*arguments))


def test_a_mode_that_watches_functions_sees_the_op() -> None:
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Watch():
        listwise_cross_entropy(torch.rand(4, 40), torch.rand(4, 2, 40), torch.ones(4, 1))
    assert not any("log_softmax" in name for name in names)
    assert any("mopl.listwise_cross_entropy" in name for name in names)


def test_rows_are_copied_only_where_contiguous_ones_are_better_aligned() -> None:
    spread = torch.arange(5 * 3 * 104.0).view(5, 3, 104)
    for rows, align, same in [
        (spread[..., :100], 4, True),
        (spread[..., 1:101], 4, False),  # begins at 4 bytes
        (torch.arange(5 * 103.0).view(5, 103)[:, :100], 4, False),
        (torch.arange(5 * 103.0).view(5, 103)[:, :101], 1, True),
        (spread.transpose(1, 2), 1, False),
        (torch.arange(101.0)[1:].expand(5, 3, 100), 4, False),
        (torch.arange(100.0).expand(5, 3, 100), 4, True),
    ]:
        found = _rows.rows_aligned(rows, align)
        assert torch.equal(found, rows) and (found.data_ptr() == rows.data_ptr()) == same
        assert found.stride(-1) == 1 and all(stride % align == 0 for stride in found.stride()[:-1])
        assert [s == 0 for s in found.stride()] == [s == 0 for s in rows.stride()], "what is expanded stays so"
    assert _rows.rows_aligned(None, 4) is None
