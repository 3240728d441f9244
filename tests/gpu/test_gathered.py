"""`gathered_logprob` on a GPU at real sizes, against float64, with every output poisoned beforehand.

`tests/interpreter/test_gpu_logprob_small.py` runs the same tests on a CPU in Triton's interpreter, at toy sizes: they
prove nothing there about a GPU, but no mistake in this file waits for one.
"""

import math

import pytest
import torch
from gpu_problems import DEVICE, DTYPES, GPU, SLACK, capped, error, normal, size
from torch import Tensor

from mopl.ops import gathered_logprob

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]


def table(kind: str, dtype: torch.dtype, rows: int, vocabulary: int, targets: int) -> dict[str, Tensor]:
    logits = normal(rows, vocabulary)
    target = torch.randint(vocabulary, (rows, targets), device=DEVICE)
    if kind == "peaked":
        liked = torch.where(torch.rand(rows, device=DEVICE) < 0.7, target[:, 0], target[:, 0].flip(0))
        logits.scatter_add_(1, liked[:, None], torch.linspace(0, 40, rows, device=DEVICE)[:, None])
    target[rows // 3] = -100
    logits[rows // 3] = math.nan
    return {
        "logits": logits.to(dtype),
        "target": target,
        "temperature": torch.rand(rows, device=DEVICE) + 0.5,
        "upstream": normal(rows, targets),
    }


def softmax_gradient(p: dict[str, Tensor], dtype: torch.dtype, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return log p and the gradient of the logits by PyTorch in some dtype."""
    logits = p["logits"].to(dtype).nan_to_num().requires_grad_()
    counts = p["target"] >= 0
    log_p = (capped(logits, softcap) / p["temperature"].to(dtype)[:, None]).log_softmax(-1)
    value = log_p.gather(1, p["target"].clamp(min=0)).where(counts, 0)
    (gradient,) = torch.autograd.grad(value, logits, p["upstream"].to(dtype))
    return value.detach(), gradient


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("kind", ["flat", "peaked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_at_most_twice_those_of_a_float32_reference(
    dtype: torch.dtype, kind: str, targets: int, softcap: float | None
) -> None:
    for vocabulary in (size(50257, 75), size(32000, 96)):
        p = table(kind, dtype, size(700, 6), vocabulary, targets)
        exact, truth = softmax_gradient(p, torch.float64, softcap)
        plain, rounded = softmax_gradient(p, torch.float32, softcap)
        logits = p["logits"].clone().requires_grad_()
        value = gathered_logprob(logits, p["target"], temperature=p["temperature"], softcap=softcap)
        (gradient,) = torch.autograd.grad(value, logits, p["upstream"])
        room = 2e-7 * float(p["logits"].nan_to_num().abs().max() / p["temperature"].min())
        largest = float((plain.double() - exact).abs().max())
        assert float((value.detach().double() - exact).abs().max()) <= SLACK * largest + room
        assert error(gradient, truth) <= SLACK * error(rounded.to(dtype), truth) + 1e-6


def test_confident_rows_are_right_in_relative_terms() -> None:
    rows, vocabulary = size(500, 6), size(32000, 60)
    p = table("flat", torch.float32, rows, vocabulary, 1)
    p["logits"] = p["logits"].nan_to_num()
    p["target"] = p["target"].clamp(min=0)
    p["logits"].scatter_(1, p["target"], torch.linspace(25, 70, rows, device=DEVICE)[:, None])
    p["temperature"] = torch.ones(rows, device=DEVICE)
    logits = p["logits"].clone().requires_grad_()
    value = gathered_logprob(logits, p["target"])
    (gradient,) = torch.autograd.grad(value, logits, p["upstream"])
    # log_softmax itself loses 1 - p below 1e-16 in float64: the sum of the others has it.
    others = p["logits"].double().scatter(1, p["target"], -math.inf).logsumexp(1, keepdim=True)
    exact = -(others - p["logits"].double().gather(1, p["target"])).exp().log1p()
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-37)
    wanted = -exact.expm1() * p["upstream"].double()
    torch.testing.assert_close(gradient.gather(1, p["target"]).double(), wanted, rtol=1e-5, atol=1e-37)


def test_minus_infinite_logits() -> None:
    p = table("flat", torch.bfloat16, size(400, 6), size(30000, 60), 1)
    p["logits"][:, ::3] = -math.inf
    forbidden = (p["target"] >= 0) & (p["target"] % 3 == 0)
    logits = p["logits"].clone().requires_grad_()
    value, lse, entropy = gathered_logprob(logits, p["target"], return_logsumexp=True, return_entropy=True)
    assert bool((value[forbidden] == -math.inf).all()) and bool(forbidden.any())
    live = (p["target"] >= 0)[:, 0]
    exact = p["logits"].double().log_softmax(-1)
    torch.testing.assert_close(lse[live].double(), p["logits"].double().logsumexp(-1)[live], rtol=1e-6, atol=1e-6)
    surprise = torch.where(exact == -math.inf, 0, exact)
    torch.testing.assert_close(entropy[live].double(), -(exact.exp() * surprise).sum(-1)[live], rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad([value, lse, entropy], logits, [p["upstream"], lse.detach(), entropy.detach()])
    assert not bool(gradient.isnan().any()) and not bool(gradient[live][:, ::3][~forbidden[live][:, 0]].any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_of_any_size_is_one_of_minus_infinity(dtype: torch.dtype) -> None:
    """A few allowed tokens; the others at what libraries write there, so that whole lanes hold nothing else."""
    rows, vocabulary = size(64, 5), size(50257, 300)
    allowed = torch.randint(vocabulary, (rows, 3), device=DEVICE)
    spread, target = normal(rows, 3, dtype=dtype), allowed[:, :1]
    temperature = torch.linspace(0.5, 2, rows, device=DEVICE)
    found = []
    for number in (-math.inf, torch.finfo(dtype).min, -1e30, -1e10):
        logits = torch.full((rows, vocabulary), number, device=DEVICE).to(dtype)
        logits = logits.scatter(1, allowed, spread).requires_grad_()
        options = {"temperature": temperature, "return_logsumexp": True, "return_entropy": True}
        results = gathered_logprob(logits, target, **options)
        (gradient,) = torch.autograd.grad(sum(part.sum() for part in results), logits)
        found.append([*results, gradient])
    exact = (logits.detach().double() / temperature[:, None].double()).log_softmax(-1)
    torch.testing.assert_close(found[0][0].double(), exact.gather(1, target), rtol=1e-6, atol=1e-6)
    for run in found[1:]:
        for ours, wanted in zip(run, found[0], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    forbidden = logits.detach()[:, :1].fill_(torch.finfo(dtype).min).expand(-1, vocabulary)
    value = gathered_logprob(forbidden.contiguous(), target)
    torch.testing.assert_close(value, torch.full_like(value, -math.log(vocabulary)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_temperature_near_zero_takes_the_largest_logit(dtype: torch.dtype) -> None:
    rows, vocabulary = size(64, 8), size(32000, 300)
    logits = normal(rows, vocabulary, scale=9.0, dtype=dtype)
    best = logits.argmax(-1)
    logits[1::2].scatter_(1, (best[1::2, None] + 7) % vocabulary, logits.amax(-1)[1::2, None])  # two of them
    temperature = 10.0 ** -torch.arange(rows, device=DEVICE).remainder(8).add(9)
    target = torch.stack([best, (best + 3) % vocabulary], -1)
    alone = 1 / (logits == logits.amax(-1, keepdim=True)).sum(-1)
    for order in (target, target[:, 1:]):  # also where the largest is no target
        value, entropy = gathered_logprob(logits, order, temperature=temperature, return_entropy=True)
        wide = temperature.to(value.dtype).double()
        exact = (logits.gather(1, order).double() - logits.amax(-1, keepdim=True).double()) / wide[:, None]
        torch.testing.assert_close(value.double(), exact + alone.double().log()[:, None], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy.double(), -alone.double().log(), rtol=1e-6, atol=1e-6)


def test_a_row_without_a_distribution_says_so_and_spoils_no_other() -> None:
    p = table("flat", torch.float32, 6, size(5000, 60), 1)
    p["target"] = p["target"].clamp(min=0)
    p["logits"] = p["logits"].nan_to_num()
    p["logits"][1], p["logits"][2, 4:], p["logits"][3, 5] = -math.inf, math.nan, math.inf
    p["target"][3] = 5
    options = {"return_logsumexp": True, "return_entropy": True}
    logits = p["logits"].clone().requires_grad_()
    value, lse, entropy = gathered_logprob(logits, p["target"], **options)
    assert value[1].item() == -math.inf and lse[1].item() == -math.inf and bool(entropy[1:4].isnan().all())
    assert bool(value[2:4].isnan().all()) and bool(lse[2].isnan()) and lse[3].item() == math.inf
    for parts in ([value], [value, lse], [value, entropy], [value, lse, entropy]):
        given = [p["upstream"], lse.detach(), entropy.detach().nan_to_num()][: len(parts)]
        (gradient,) = torch.autograd.grad(parts, logits, given, retain_graph=True)
        assert bool(gradient[1].isnan().any()) and bool(gradient[2].isnan().any()) and bool(gradient[3].isnan().any())
        assert bool(gradient[[0, 4, 5]].isfinite().all())
        given = [part.index_fill(0, torch.arange(1, 4, device=DEVICE), 0) for part in given]
        (gradient,) = torch.autograd.grad(parts, logits, given, retain_graph=True)
        assert bool(gradient.isfinite().all()) and not bool(gradient[1:4].any())


def test_more_than_65536_rows() -> None:
    p = table("flat", torch.bfloat16, size(70_000, 20), size(500, 40), 1)
    exact, truth = softmax_gradient(p, torch.float64, None)
    logits = p["logits"].clone().requires_grad_()
    value = gathered_logprob(logits, p["target"], temperature=p["temperature"])
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(value, logits, p["upstream"])
    assert error(gradient, truth) < 4e-3 * SLACK / 2


@pytest.mark.huge
@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_past_2_to_the_31(inplace: bool) -> None:
    rows, vocabulary = size(17_000, 6), size(128_256, 60)
    assert not GPU or rows * vocabulary > 2**31
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device=DEVICE).normal_()
    target = torch.randint(vocabulary, (rows,), device=DEVICE)
    upstream = normal(rows)
    part = slice(-40, None) if GPU else slice(None)
    small = logits[part].double()
    leaf = logits.requires_grad_()
    value = gathered_logprob(leaf.view_as(leaf), target, inplace_backward=inplace)
    exact = small.log_softmax(-1)
    torch.testing.assert_close(value[part].double(), exact.gather(1, target[part, None])[:, 0], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    wanted = -exact.exp() * upstream[part, None].double()
    wanted.scatter_add_(1, target[part, None], upstream[part, None].double())
    assert error(gradient[part], wanted) < 4e-3 * SLACK / 2
    sums = torch.stack([gradient[c : c + 1000].float().sum(1).abs().max() for c in range(0, rows, 1000)])
    assert float(sums.max()) < 0.1  # each row's gradient adds up to 0, up to the rounding of its entries


def test_in_place_no_warp_overtakes_another() -> None:
    """Every warp of a row reads the pivot's logit, which one of them overwrites: a million rows show a race.

    All pivots lie in the first tile, which is written soonest.
    """
    rows, vocabulary, rounds = size(2**17, 8), size(4096, 60), size(8, 1)
    for dtype in [torch.bfloat16] * rounds + [torch.float32] * (rounds // 4):
        many = 2 * rows // dtype.itemsize
        logits = torch.empty(many, vocabulary, dtype=dtype, device=DEVICE).normal_().mul_(8)
        target = torch.randint(min(vocabulary, 2048), (many,), device=DEVICE)
        upstream = normal(many)
        gradients = []
        for inplace in (False, True):
            leaf = logits.clone().requires_grad_()
            value = gathered_logprob(leaf.view_as(leaf), target, inplace_backward=inplace)
            gradients += torch.autograd.grad(value, leaf, upstream)
            assert (gradients[-1].data_ptr() == leaf.data_ptr()) == inplace
            del leaf, value
        assert torch.equal(*gradients)


def test_repeats_bitwise_keeps_its_graph_and_never_waits() -> None:
    p = table("peaked", torch.bfloat16, size(600, 6), size(32000, 60), 2)
    logits, before = p["logits"].clone().requires_grad_(), p["logits"].clone()
    runs = []
    for careful in (False, True):
        if GPU:
            torch.cuda.set_sync_debug_mode("error" if careful else "default")
        try:
            value = gathered_logprob(logits, p["target"], temperature=p["temperature"])
            for retain in (True, False):
                gradient = torch.autograd.grad(value, logits, p["upstream"], retain_graph=retain)
                runs.append([value.detach(), *gradient])
        finally:
            if GPU:
                torch.cuda.set_sync_debug_mode("default")
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    assert torch.equal(logits.detach().nan_to_num(), before.nan_to_num())


def test_all_masked_and_few_rows() -> None:
    logits = torch.full((size(100, 4), size(5000, 40)), math.nan, device=DEVICE, requires_grad=True)
    value = gathered_logprob(logits, torch.full((len(logits),), -100, device=DEVICE))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert not bool(value.any()) and not bool(gradient.any())
    for rows in (1, 2, 5):  # several programs share a row of the gradient
        p = table("peaked", torch.bfloat16, rows, size(128_256, 5000), 1)
        leaf = p["logits"].clone().requires_grad_()
        exact, truth = softmax_gradient(p, torch.float64, None)
        value = gathered_logprob(leaf, p["target"], temperature=p["temperature"])
        (gradient,) = torch.autograd.grad(value, leaf, p["upstream"])
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
        if rows > 1:
            assert error(gradient, truth) < 4e-3 * SLACK / 2
