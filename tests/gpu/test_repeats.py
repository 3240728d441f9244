"""Every op gives the same bits in 100 runs, forward and backward, at sizes that are cut into several chunks.

`tests/interpreter/test_gpu_repeats_small.py` runs the same tests on a CPU in Triton's interpreter, at toy sizes and
twice: they prove nothing there, but no mistake in this file waits for a GPU.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from gpu_problems import BF16, DEVICE, F32, FP16, GPU, normal, size
from torch import Tensor

from mopl.losses import bradley_terry, listwise_dpo, plackett_luce
from mopl.ops import gathered_logprob, linear_kl, linear_logprob

RUNS = 100 if GPU else 2
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

pytestmark = pytest.mark.gpu


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    kind = BITS[a.element_size()]
    return (a.contiguous().view(kind) == b.contiguous().view(kind)).all()


def check(run: Callable[..., Tensor | tuple[Tensor, ...]], leaves: list[Tensor]) -> None:
    """Compare the results and gradients of all runs with those of the first, other work going on beside them."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    beside = torch.cuda.Stream() if GPU else None
    noise = torch.randn(size(2048, 8), size(2048, 8), device=DEVICE)
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    first, upstream = [], []
    for number in range(RUNS):
        moved = torch.full((1 + 1000 * number,), math.nan, device=DEVICE)  # what is allocated next lies elsewhere
        if beside is not None:
            with torch.cuda.stream(beside):  # blocks of the op find other processors busy each time
                for _ in range(number % 4):
                    torch.mm(noise, noise)
        values = run(*leaves)
        values = values if isinstance(values, tuple) else (values,)
        upstream = upstream or [torch.randn_like(value) for value in values]
        found = [*(value.detach() for value in values), *torch.autograd.grad(values, leaves, upstream)]
        if not first:
            assert all(value.isfinite().all() and bool(value.any()) for value in found)
        first = first or [value.clone() for value in found]
        for a, b in zip(first, found, strict=True):
            same &= same_bits(a, b)
        del moved
    assert bool(same)


def head(rows: int, dtype: torch.dtype, vocabulary: int = size(8000, 60)) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of which one in five does not count, others repeat a target, and others prefer another token by far."""
    width = size(256, 16)
    weight = normal(vocabulary, width, scale=width**-0.5, dtype=dtype)
    hidden, target = normal(rows, width), torch.randint(vocabulary, (rows,), device=DEVICE)
    target[::7] = target[0].clone()
    liked = weight[target.flip(0)].float()
    hidden[::11] += (120 * liked / liked.square().sum(1, keepdim=True))[::11]  # these are computed again
    target[::5] = -100
    return hidden.to(dtype), weight, target


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("dtype", [BF16, FP16, F32], ids=str)
@pytest.mark.parametrize("mode", ["frozen", "trained", "trained, shared rows"])
def test_linear_logprob(mode: str, dtype: torch.dtype, softcap: float | None) -> None:
    rows = size(10_000, 20)
    hidden, weight, target = head(rows, dtype)
    options: dict = {"softcap": softcap, "return_logsumexp": True, "return_entropy": softcap is not None}
    # A third of the exponentials are kept; the default depends on how much memory is free.
    options["workspace"] = rows // 3 * len(weight) * dtype.itemsize
    if mode == "trained, shared rows":
        options["row"] = torch.randint(rows, target.shape, device=DEVICE)
    run = partial(linear_logprob, check_targets=False, **options)
    if mode == "frozen":
        check(lambda h: run(h, weight, target), [hidden])
    else:
        check(lambda h, w: run(h, w, target), [hidden, weight])


@pytest.mark.parametrize("rows", [size(1, 1), size(200, 5), size(10_000, 20)])
def test_linear_logprob_without_gradients(rows: int) -> None:
    hidden, weight, target = head(rows, BF16)
    target[0] = 3
    values = [linear_logprob(hidden, weight, target) for _ in range(RUNS)]
    assert all(torch.equal(values[0], value) for value in values)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype"),
    [(size(2_000, 5), size(32_003, 75), BF16), (size(2, 2), size(128_256, 300), BF16), (size(500, 4), 4_096, F32)],
    ids=str,
)
def test_gathered_logprob(rows: int, vocabulary: int, dtype: torch.dtype, inplace: bool) -> None:
    vocabulary = size(vocabulary, min(vocabulary, 300))
    target = torch.randint(vocabulary, (rows, 2), device=DEVICE)

    def run(logits: Tensor) -> tuple[Tensor, ...]:
        copy = logits.clone() if inplace else logits
        return gathered_logprob(copy, target, return_entropy=True, inplace_backward=inplace)

    check(run, [normal(rows, vocabulary, scale=4.0, dtype=dtype)])


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_linear_kl(dtype: torch.dtype) -> None:
    rows = size(3_000, 9)
    (hidden, weight, _), (other, reference, _) = head(rows, dtype), head(rows, dtype)
    check(lambda h, w: linear_kl(h, w, other, reference), [hidden, weight])


LISTS = (8, 40, 1_500, 20_000) if GPU else (3, 20)


def lists(items: int) -> dict[str, Tensor]:
    batch = max(2, size(400_000, 40) // items)
    mask = torch.rand(batch, items, device=DEVICE) > 0.2
    mask[:, :2] = True
    return {
        "scores": normal(batch, items),
        "labels": torch.randint(1, 6, (batch, 2, items), device=DEVICE).float(),
        "beta": torch.rand(batch, 2, device=DEVICE) + 0.5,
        "mask": mask,
    }


@pytest.mark.parametrize("items", LISTS)
def test_listwise_dpo(items: int) -> None:
    p = lists(items)
    check(
        lambda s, z, b: listwise_dpo(s, z, beta=b, mask=p["mask"], reduction="none"),
        [p["scores"], p["labels"], p["beta"]],
    )


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
@pytest.mark.parametrize("items", LISTS)
def test_plackett_luce(items: int, ties: str) -> None:
    if ties == "exact" and items > 100:
        pytest.skip("integrals of longer lists take long, and their kernels are those of short ones")
    p = lists(items)
    check(
        lambda s, b: plackett_luce(s, p["labels"], beta=b, mask=p["mask"], ties=ties, reduction="none"),  # type: ignore[arg-type]
        [p["scores"], p["beta"]],
    )


def test_bradley_terry() -> None:
    batch = size(100_003, 9)
    check(partial(bradley_terry, beta=0.1, reduction="none"), [normal(batch), normal(batch)])
