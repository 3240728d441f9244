"""CUDA graphs: every op captured, forward and backward, with some values, and replayed with others.

A replay gives the bits of an eager call: what capture records depends on shapes and options alone, and the number of
rows that count, the order of a list or a row that needs a larger shift is found on the GPU. Sizes are small enough for
the default workspace to be the same in both, see `mopl.ops.linear_logprob.device.default_workspace`.

`tests/interpreter/test_gpu_graphs_small.py` runs the same tests on a CPU in Triton's interpreter, at toy sizes and
without a graph: they prove nothing there about capture, but no mistake in this file waits for a GPU.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from gpu_problems import BF16, DEVICE, F32, FP16, GPU, normal, size
from torch import Tensor

from mopl.losses import bradley_terry, listwise_dpo, plackett_luce
from mopl.ops import gathered_logprob, linear_kl, linear_logprob

pytestmark = pytest.mark.gpu

Inputs = dict[str, Tensor]


def captured(step: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """Capture a step as PyTorch's notes on CUDA graphs say; return its static results and what replays it.

    The first calls, on a stream of their own, compile and load kernels and make the handles of libraries. Without a
    GPU a replay is another call.
    """
    if not GPU:
        results = step()

        def repeat() -> None:
            for result, new in zip(results, step(), strict=True):
                result.copy_(new)

        return results, repeat
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return results, graph.replay


def step_of(run: Callable[[Inputs], Tensor], wanted: tuple[str, ...], inputs: Inputs) -> list[Tensor]:
    """Return the value and the wanted gradients."""
    if not wanted:
        with torch.no_grad():
            return [run(inputs)]
    value = run(inputs)
    upstream = inputs["upstream"] if value.ndim else None  # None: 1, of a scalar
    return [value.detach(), *torch.autograd.grad(value, [inputs[k] for k in wanted], upstream)]


def leaves(inputs: Inputs, wanted: tuple[str, ...]) -> Inputs:
    return {k: v.clone().requires_grad_(k in wanted) for k, v in inputs.items()}


def check(run: Callable[[Inputs], Tensor], wanted: tuple[str, ...], first: Inputs, *others: Inputs) -> None:
    """Capture with the first values and replay with each of the others, then with the first again."""
    static = leaves(first, wanted)
    results, replay = captured(lambda: step_of(run, wanted, static))
    before = None
    for values in (*others, first):
        with torch.no_grad():
            for name, tensor in static.items():
                tensor.copy_(values[name])
            for result in results:
                result.fill_(math.nan)  # what a replay does not write shows
        replay()
        eager = step_of(run, wanted, leaves(values, wanted))
        for name, result, right in zip(("value", *wanted), results, eager, strict=True):
            assert right.isfinite().all(), name
            assert bool(right.any()), name
            assert torch.equal(result, right), name
        assert before is None or not torch.equal(before, results[0]), "both values give the same result"
        before = results[0].clone()


# ---------------------------------------------------------------- log-probabilities and the KL divergence


def head(dtype: torch.dtype, rows: int, idle: float, peak: float = 0.0) -> Inputs:
    """Rows and a head. A part `idle` of the rows does not count; `peak` nats are added to another token's logit."""
    width, vocabulary = size(256, 12), size(5003, 53)
    weight, hidden = normal(vocabulary, width, scale=width**-0.5, dtype=dtype), normal(rows, width)
    target = torch.randint(vocabulary, (rows,), device=DEVICE)
    liked = weight[target.flip(0)].float()
    hidden += peak * liked / liked.square().sum(1, keepdim=True)
    off = torch.rand(rows, device=DEVICE) < idle
    target[off], hidden[off] = -100, math.nan  # a row that does not count may hold anything
    return {
        "hidden": hidden.to(dtype),
        "weight": weight,
        "target": target,
        "temperature": torch.rand(rows, device=DEVICE) + 0.5,
        "upstream": normal(rows),
    }


class Head(NamedTuple):
    wanted: tuple[str, ...] = ("hidden", "weight")
    dtype: torch.dtype = BF16
    rows: int = size(400, 11)
    options: dict[str, Any] = {}  # noqa: RUF012


FROZEN = ("hidden",)
HEADS = {
    "scoring": Head(()),
    "scoring few rows": Head((), rows=size(100, 5)),
    "scoring float32": Head((), F32),
    "frozen": Head(FROZEN),
    "frozen float16": Head(FROZEN, FP16),
    "frozen softcap": Head(FROZEN, options={"softcap": 15.0}),
    "trained": Head(),
    "trained float16": Head(dtype=FP16),
    "trained float32": Head(dtype=F32),
    "trained, nothing kept": Head(options={"workspace": 0}),
    "trained softcap": Head(options={"softcap": 15.0}),
    "trained temperature": Head(("hidden", "weight", "temperature")),
    "trained, bounded": Head(options={"max_rows": size(390, 10)}),
}


@pytest.mark.parametrize("name", HEADS)
def test_linear_logprob(name: str) -> None:
    wanted, dtype, rows, options = HEADS[name]

    def run(p: Inputs) -> Tensor:
        operands = (p["hidden"], p["weight"], p["target"])
        return linear_logprob(*operands, temperature=p["temperature"], check_targets=False, **options)

    # Other rows count in the second, and a token that no target is takes nearly all: rows that a larger shift serves.
    check(run, wanted, head(dtype, rows, 0.3), head(dtype, rows, 0.5, peak=60.0))


@pytest.mark.parametrize("wanted", [(), FROZEN, ("hidden", "weight")], ids=str)
def test_linear_logprob_of_targets_that_share_rows(wanted: tuple[str, ...]) -> None:
    rows, targets = size(300, 10), size(900, 20)

    def problem(idle: float) -> Inputs:
        found = head(BF16, rows, 0.0)
        found["target"] = torch.randint(len(found["weight"]), (targets,), device=DEVICE)
        found["target"][torch.rand(targets, device=DEVICE) < idle] = -100
        return {**found, "row": torch.randint(rows, (targets,), device=DEVICE), "upstream": normal(targets)}

    def run(p: Inputs) -> Tensor:
        return linear_logprob(p["hidden"], p["weight"], p["target"], row=p["row"], temperature=p["temperature"])

    check(run, wanted, problem(0.2), problem(0.6))


@pytest.mark.parametrize("wanted", [(), ("logits",), ("logits", "temperature")], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_gathered_logprob(dtype: torch.dtype, wanted: tuple[str, ...]) -> None:
    rows, vocabulary = size(200, 7), size(32003, 75)

    def problem(idle: float) -> Inputs:
        target = torch.randint(vocabulary, (rows, 2), device=DEVICE)
        target[torch.rand(rows, device=DEVICE) < idle] = -100
        return {
            "logits": normal(rows, vocabulary, scale=4.0, dtype=dtype),
            "target": target,
            "temperature": torch.rand(rows, device=DEVICE) + 0.5,
            "upstream": normal(rows, 2),
        }

    def run(p: Inputs) -> Tensor:
        return gathered_logprob(p["logits"], p["target"], temperature=p["temperature"])

    check(run, wanted, problem(0.2), problem(0.6))


@pytest.mark.parametrize("dtype", [BF16, FP16, F32], ids=str)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_linear_kl(direction: str, dtype: torch.dtype) -> None:
    rows = size(200, 7)

    def problem(idle: float) -> Inputs:
        found, other = head(dtype, rows, idle), head(dtype, rows, 0.0)
        reference = {"reference_hidden": other["hidden"], "reference_weight": other["weight"]}
        return {**found, **reference, "mask": found.pop("target") >= 0}

    def run(p: Inputs) -> Tensor:
        policy, reference = (p["hidden"], p["weight"]), (p["reference_hidden"], p["reference_weight"])
        return linear_kl(*policy, *reference, temperature=p["temperature"], mask=p["mask"], direction=direction)  # type: ignore[arg-type]

    check(run, ("hidden", "weight"), problem(0.2), problem(0.6))


# ---------------------------------------------------------------- losses of lists and pairs


def ranking(items: int, missing: float) -> Inputs:
    """Lists with two objectives, tied labels and items that are not there; the first two items always are."""
    batch = size(300, 2)
    mask = torch.rand(batch, items, device=DEVICE) >= missing
    mask[:, :2] = True
    labels = torch.randint(1, 6, (batch, 2, items), device=DEVICE).float()
    scores = normal(batch, items).masked_fill(~mask, math.nan)
    key = labels.masked_fill(~mask[:, None], -1)
    return {
        "scores": scores,
        "labels": labels,
        "order": torch.argsort(key, dim=-1, descending=True, stable=True).to(torch.int32),
        "reference": normal(batch, items),
        "beta": torch.rand(batch, 2, device=DEVICE) + 0.5,
        "weights": torch.rand(batch, 2, device=DEVICE),
        "mask": mask,
    }


LENGTHS = (8, 40, 5000) if GPU else (3, 20)


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
@pytest.mark.parametrize("sorts", ["order given", "sorted by the op"])
@pytest.mark.parametrize("items", LENGTHS)
def test_plackett_luce(items: int, sorts: str, ties: str) -> None:
    def run(p: Inputs) -> Tensor:
        order = p["order"] if sorts == "order given" else None
        return plackett_luce(
            p["scores"], p["labels"], reference=p["reference"], beta=p["beta"], weights=p["weights"],
            mask=p["mask"], order=order, ties=ties,  # type: ignore[arg-type]
        )  # fmt: skip

    if ties == "exact" and items > size(100, 3):
        pytest.skip("integrals of longer lists take long, and their kernels are those of short ones")
    check(run, ("scores", "beta"), ranking(items, 0.1), ranking(items, 0.5))


def test_plackett_luce_draws_another_order_at_each_replay() -> None:
    static = leaves(ranking(size(40, 20), 0.2), ("scores",))

    def run(p: Inputs) -> Tensor:
        return plackett_luce(p["scores"], p["labels"], mask=p["mask"], ties="random")

    results, replay = captured(lambda: step_of(run, ("scores",), static))
    found = []
    for _ in range(2):
        replay()
        found.append([result.clone() for result in results])
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all() and b.isfinite().all() and not torch.equal(a, b)


@pytest.mark.parametrize("normalize", ["l1", "softmax", None])
@pytest.mark.parametrize("items", LENGTHS)
def test_listwise_cross_entropy(items: int, normalize: str | None) -> None:
    def run(p: Inputs) -> Tensor:
        return listwise_dpo(
            p["scores"], p["labels"], reference=p["reference"], beta=p["beta"], weights=p["weights"],
            mask=p["mask"], normalize=normalize,  # type: ignore[arg-type]
        )  # fmt: skip

    check(run, ("scores", "labels", "beta"), ranking(items, 0.1), ranking(items, 0.5))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "aot"])
def test_bradley_terry(loss_type: str) -> None:
    batch = size(1000, 9)

    def problem() -> Inputs:
        names = ("chosen", "rejected", "reference_chosen", "reference_rejected")
        return {name: normal(batch, scale=5.0) for name in names}

    def run(p: Inputs) -> Tensor:
        references = {name: p[name] for name in ("reference_chosen", "reference_rejected")}
        return bradley_terry(p["chosen"], p["rejected"], **references, beta=0.1, loss_type=loss_type)  # type: ignore[arg-type]

    check(run, ("chosen", "rejected"), problem(), problem())
