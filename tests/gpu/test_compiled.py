"""`torch.compile` of the ops, forward and backward in one graph without breaks, against eager calls.

`tests/interpreter/test_gpu_compiled_small.py` runs the same tests on a CPU in Triton's interpreter, at toy sizes and
traced by the compiler but not compiled by Inductor: no mistake in this file waits for a GPU.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._inductor.config
from gpu_problems import BF16, DEVICE, F32, GPU, normal, size
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mopl.losses import listwise_dpo, plackett_luce
from mopl.ops import gathered_logprob, linear_kl, linear_logprob

BACKEND = "inductor" if GPU else "aot_eager"

pytestmark = pytest.mark.gpu

Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    if GPU:
        with torch._inductor.config.patch(compile_threads=1):  # there are workers beside this one
            yield
    else:
        yield
    torch._dynamo.reset()


def gradients(run: Callable[[Inputs], Tensor], inputs: Inputs, wanted: tuple[str, ...]) -> list[Tensor]:
    leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in inputs.items()}
    value = run(leaves)
    if not wanted:
        return [value]
    return [value.detach(), *torch.autograd.grad(value, [leaves[k] for k in wanted], inputs["upstream"])]


def check(run: Callable[[Inputs], Tensor], wanted: tuple[str, ...], *cases: Inputs, graphs: int = 1) -> None:
    """Compare compiled calls with eager ones; `graphs` says how often all the cases may be compiled."""
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for inputs in cases if GPU else cases[:2]:
        eager, found = gradients(run, inputs, wanted), gradients(compiled, inputs, wanted)
        for name, a, b in zip(("value", *wanted), eager, found, strict=True):
            assert a.isfinite().all() and bool(a.any()), name
            assert a.dtype == b.dtype and a.shape == b.shape, name
            # What the compiler fuses around an op it rounds otherwise.
            digits = 1e-2 if a.dtype == BF16 else 2e-5
            assert float((a.double() - b.double()).norm()) <= digits * float(a.double().norm()), name
    assert counter.frame_count <= graphs, f"compiled {counter.frame_count} times"


def head(rows: int, dtype: torch.dtype = BF16) -> Inputs:
    width, vocabulary = size(256, 12), size(5003, 53)
    target = torch.randint(vocabulary, (rows,), device=DEVICE)
    target[rows // 4] = -100
    return {
        "hidden": normal(rows, width, dtype=dtype),
        "weight": normal(vocabulary, width, scale=width**-0.5, dtype=dtype),
        "target": target,
        "temperature": torch.rand(rows, device=DEVICE) + 0.5,
        "upstream": normal(rows),
    }


HEADS = {
    "scoring": ((), {}),
    "frozen": (("hidden",), {}),
    "trained": (("hidden", "weight"), {}),
    "trained, nothing kept, softcap": (("hidden", "weight"), {"workspace": 0, "softcap": 15.0}),
    "trained, bounded": (("hidden", "weight", "temperature"), {"max_rows": size(500, 10)}),
}


@pytest.mark.parametrize("name", HEADS)
def test_linear_logprob(name: str) -> None:
    wanted, options = HEADS[name]

    def run(p: Inputs) -> Tensor:
        operands = (2 * p["hidden"], p["weight"], p["target"])
        return linear_logprob(*operands, temperature=p["temperature"], check_targets=False, **options).sin()

    # The first number of rows is compiled as it is, the second for any number, the others not at all.
    check(run, wanted, *(head(size(many, few)) for many, few in ((300, 7), (500, 10), (421, 9))), graphs=2)


@pytest.mark.parametrize("wanted", [("hidden",), ("hidden", "weight")], ids=str)
def test_linear_logprob_of_a_transposed_head_and_of_targets_that_share_rows(wanted: tuple[str, ...]) -> None:
    """Inductor asserts the strides that the compiler was told of."""
    inputs = head(size(300, 7), F32)
    inputs["weight"] = inputs["weight"].T.contiguous().T
    inputs["row"] = torch.randint(len(inputs["hidden"]), inputs["target"].shape, device=DEVICE)

    def run(p: Inputs) -> Tensor:
        return linear_logprob(p["hidden"], p["weight"], p["target"], row=p["row"], check_targets=False)

    check(run, wanted, inputs)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_gathered_logprob(dtype: torch.dtype) -> None:
    def problem(rows: int) -> Inputs:
        vocabulary = size(32003, 75)
        return {
            "logits": normal(rows, vocabulary, scale=4.0, dtype=dtype),
            "target": torch.randint(vocabulary, (rows, 2), device=DEVICE),
            "temperature": torch.rand(rows, device=DEVICE) + 0.5,
            "upstream": normal(rows, 2),
        }

    def run(p: Inputs) -> Tensor:
        # In place an eager call would write over what the compiled one is given.
        return gathered_logprob(p["logits"], p["target"], temperature=p["temperature"], check_targets=False).sin()

    check(run, ("logits", "temperature"), *(problem(size(many, few)) for many, few in ((64, 3), (100, 4))), graphs=2)


def test_linear_kl() -> None:
    policy, reference = head(size(200, 7)), head(size(200, 7))
    inputs = policy | {"reference_hidden": reference["hidden"], "reference_weight": reference["weight"]}

    def run(p: Inputs) -> Tensor:
        return linear_kl(p["hidden"], p["weight"], p["reference_hidden"], p["reference_weight"])

    check(run, ("hidden", "weight"), inputs)


def lists(batch: int, items: int) -> Inputs:
    mask = torch.rand(batch, items, device=DEVICE) > 0.2
    mask[:, :2] = True
    return {
        "scores": normal(batch, items),
        "labels": torch.randint(1, 6, (batch, 2, items), device=DEVICE).float(),
        "reference": normal(batch, items),
        "beta": torch.rand(batch, 2, device=DEVICE) + 0.5,
        "mask": mask,
        "upstream": normal(batch, 2),
    }


@pytest.mark.parametrize("loss", [listwise_dpo, plackett_luce])
@pytest.mark.parametrize("items", [size(8, 3), size(200, 13)])
def test_losses_of_lists(loss: Callable, items: int) -> None:
    def run(p: Inputs) -> Tensor:
        return loss(
            p["scores"], p["labels"], reference=p["reference"], beta=p["beta"], mask=p["mask"], reduction="none"
        )

    check(run, ("scores", "beta"), *(lists(size(many, few), items) for many, few in ((300, 2), (500, 3))), graphs=2)
