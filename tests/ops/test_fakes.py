"""What the compiler is told of every op, its fake, against what the op returns: shapes, strides and dtypes."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mopl.losses import lambda_loss
from mopl.ops import (
    gathered_logprob,
    linear_jsd,
    linear_kl,
    linear_logprob,
    linear_topk_jsd,
    listwise_cross_entropy,
    plackett_luce_nll,
)
from mopl.ops.pairs import pairwise_logistic, smooth_ranks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Inductor asserts the strides that a fake announced, for every dimension longer than 1.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def layout_of(t: Tensor) -> tuple:
    strides = [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1] if t.numel() else []
    return tuple(t.shape), strides, t.dtype, t.device.type


class FakesAgree(TorchDispatchMode):
    """Runs the fake of every op of this package after the op, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = args, kwargs or {}
        if func.namespace != "mopl":
            return func(*given[0], **given[1])
        self.seen.add(func.name())
        with FakeTensorMode() as mode:
            fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, given)
            fakes = func(*fake_args, **fake_kwargs)
        real = func(*given[0], **given[1])
        for place, (fake, one) in enumerate(zip(*map(_tuple, (fakes, real)), strict=True)):
            assert layout_of(fake) == layout_of(one), f"{func.name()}, result {place}"
        return real


def _tuple(result: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else () if result is None else (result,)


def check(loss: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> set[str]:
    """Run a loss and its gradients on these inputs, and return the names of the ops that ran."""
    leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    with FakesAgree() as agree:
        results = _tuple(loss(*inputs))
        # Upstream gradients of a sum are expanded numbers.
        torch.autograd.grad(sum(r.sum() for r in results), leaves, allow_unused=True)
        torch.autograd.grad(results := _tuple(loss(*inputs)), leaves, [torch.randn_like(r) for r in results])
    return agree.seen


def heads() -> list[tuple[torch.dtype, str, str, bool]]:
    """Return dtypes, layouts, what is trained and whether targets share rows: each two of them, where not all."""
    trained = [("h", True), ("w", False), ("hwbt", False), ("hwbt", True)]
    dtypes, interpreted = (torch.float32, torch.bfloat16), os.environ.get("TRITON_INTERPRET") == "1"  # a second each
    return [
        (dtype, layout, *train)
        for i, train in enumerate(trained)
        for j, layout in enumerate(LAYOUTS)
        for k, dtype in enumerate(dtypes)
        if not interpreted or (i + j + k) % 2 == 0
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "layout", "train", "shared"), heads())
def test_linear_logprob(device: str, dtype: torch.dtype, layout: str, train: str, shared: bool) -> None:
    make, many, size, vocabulary = LAYOUTS[layout], 6, 5, 19
    hidden, weight = (make(torch.randn(n, size, dtype=dtype, device=device)) for n in (many, vocabulary))
    bias, temperature = LAYOUTS["sliced"](torch.randn(vocabulary, device=device)), torch.rand(1, device=device) + 0.5
    bias, temperature = bias if layout == "sliced" else bias.contiguous(), temperature.expand(many)
    row = torch.tensor([0, 0, 1, 4, 5, 5, 5], device=device) if shared else None
    target = torch.randint(vocabulary, (many if row is None else len(row),), device=device)
    target[1] = -100

    def loss(*given: Tensor) -> tuple[Tensor, ...]:
        values = dict(
            zip("hwbt", (hidden, weight, bias, temperature), strict=True), **dict(zip(train, given, strict=True))
        )
        results = linear_logprob(
            values["h"], values["w"], target, bias=values["b"], temperature=values["t"], row=row, return_entropy=True,
            return_logsumexp=True, workspace=2 * vocabulary * 4,
        )  # fmt: skip
        return results

    seen = check(
        loss, *(t.detach() for t, n in zip((hidden, weight, bias, temperature), "hwbt", strict=True) if n in train)
    )
    assert seen == {"mopl::linear_logprob", "mopl::linear_logprob_backward"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_logprob_alone(device: str, dtype: torch.dtype, frozen: bool) -> None:
    """Without other outputs the gradient of hidden states is rounded where it is made."""
    hidden, weight = (torch.randn(n, 8, dtype=dtype, device=device) for n in (6, 19))
    target = torch.randint(19, (6,), device=device)
    target[1] = -100
    inputs = (hidden,) if frozen else (hidden, weight)
    check(lambda h, w=weight: linear_logprob(h, w, target), *inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_rows", [0, 1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_linear_logprob_with_a_bound_and_no_workspace(device: str, max_rows: int, shared: bool) -> None:
    hidden, weight = torch.randn(5, 4, device=device), torch.randn(9, 4, device=device)
    target = torch.tensor([3, -100, -100, -100, -100], device=device)
    if max_rows == 0:
        target[0] = -100
    row = torch.arange(5, device=device) if shared else None
    check(lambda h, w: linear_logprob(h, w, target, max_rows=max_rows, row=row, workspace=0), hidden, weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_linear_kl(device: str, layout: str, masked: bool) -> None:
    hidden, weight = (LAYOUTS[layout](torch.randn(n, 4, device=device)) for n in (6, 11))
    bias = LAYOUTS["sliced"](torch.randn(11, device=device)) if layout == "sliced" else torch.randn(11, device=device)
    mask = torch.tensor([True, False, True, True, True, False], device=device) if masked else None
    reference = hidden + 0.1
    seen = check(lambda h, w, b: linear_kl(h, w, reference, bias=b, mask=mask), hidden, weight, bias)
    assert seen == {"mopl::linear_divergence", "mopl::linear_divergence_backward"}
    other = torch.randn(11, 5, device=device)
    check(lambda h: linear_jsd(h, weight, reference[:, [0, 1, 2, 3, 0]], other, mask=mask), hidden.detach())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", [False, True])
def test_linear_topk_jsd(device: str, layout: str, tail: bool) -> None:
    hidden, weight = (LAYOUTS[layout](torch.randn(n, 4, device=device)) for n in (6, 11))
    ids = torch.tensor([[1, 2, 3]] * 5 + [[-100] * 3], device=device)
    known = LAYOUTS[layout](torch.full((6, 3), -2.0, device=device))
    seen = check(lambda h, w: linear_topk_jsd(h, w, ids, known, tail=tail), hidden, weight)
    assert seen == {"mopl::linear_topk_jsd", "mopl::linear_topk_jsd_backward"}
    check(lambda h: linear_topk_jsd(h, weight.detach(), ids, known, tail=tail), hidden.detach())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_gathered_logprob(device: str, dtype: torch.dtype, layout: str, inplace: bool) -> None:
    base = torch.randn(5, 13, dtype=dtype, device=device).requires_grad_()
    temperature = (torch.rand(1, device=device) + 0.5).expand(5)
    for target in (torch.randint(13, (5,), device=device), torch.randint(13, (2, 5), device=device).t()):

        def loss(given: Tensor, t: Tensor, target: Tensor = target) -> tuple[Tensor, ...]:
            logits = LAYOUTS[layout](given * 1)
            options = dict(return_logsumexp=True, return_entropy=True, inplace_backward=inplace)
            return gathered_logprob(logits, target, temperature=t, **options)

        seen = check(loss, base.detach(), temperature.detach())
        assert "mopl::gathered_logprob" in seen and len(seen) == 2, seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "items"), [(torch.float32, 1), (torch.bfloat16, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("common", [False, True])
def test_list_ops(device: str, dtype: torch.dtype, layout: str, common: bool, items: int) -> None:
    make, batch, objectives = LAYOUTS[layout], 2, 3
    scores = make(torch.randn(batch, items, dtype=dtype, device=device))
    labels = make(torch.rand(batch, objectives, items, device=device))
    temperature = make(torch.rand(batch, 1 if common else objectives, device=device) + 0.5)
    mask = make(torch.ones(batch, items, device=device)).bool()
    seen = check(lambda s, y, t: listwise_cross_entropy(s, y, t, mask, normalize=True), scores, labels, temperature)
    assert seen == {"mopl::listwise_cross_entropy", "mopl::listwise_cross_entropy_backward"}
    for ties in ("breslow", "efron"):
        seen = check(lambda s, t, ties=ties: plackett_luce_nll(s, labels, t, mask, ties=ties), scores, temperature)
        assert seen == {"mopl::plackett_luce_nll", "mopl::plackett_luce_nll_backward"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("common", [False, True])
def test_pairs(device: str, layout: str, common: bool) -> None:
    make = LAYOUTS[layout]
    scores = make(torch.randn(4, 1 if common else 3, 5, device=device))
    labels, margin = make(torch.rand(4, 3, 5, device=device)), make(torch.rand(4, 1 if common else 3, device=device))
    seen = check(lambda s, m: pairwise_logistic(s, labels, m), scores, margin)
    assert seen == {"mopl::pairwise_logistic"}
    assert check(smooth_ranks, scores) == {"mopl::smooth_ranks", "mopl::smooth_ranks_backward"}
    check(lambda s: lambda_loss(s[:, 0], labels), scores)


def test_every_op_is_here() -> None:
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mopl::")}
    assert names == {
        f"mopl::{op}{suffix}"
        for op in (
            "linear_logprob", "linear_divergence", "linear_topk_jsd", "gathered_logprob", "listwise_cross_entropy",
            "plackett_luce_nll", "smooth_ranks",
        )
        for suffix in ("", "_backward")
    } | {"mopl::pairwise_logistic", "mopl::gathered_logprob_backward_"}  # fmt: skip
