"""The list ops on a GPU at real sizes, against float64, with every output poisoned beforehand.

`tests/interpreter/test_gpu_list_small.py` runs the same tests on a CPU in Triton's interpreter, at toy sizes: they
prove nothing there about a GPU, but no mistake in this file waits for one.
"""

import math
from dataclasses import replace

import pytest
import torch
from gpu_problems import DEVICE, GPU, on_a_gpu, size
from list_problems import Problem, best_first, compare, in_float64, infinite_scores, make, padded, poisoned, results
from torch import Tensor

from mopl.ops.listnet import listwise_cross_entropy
from mopl.ops.plackett_luce import Lists, Rule, cpu, plackett_luce_nll

F64 = torch.float64
# exp is ex2.approx of a rounded product on NVIDIA GPUs: its relative error grows with the exponent.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-11, torch.bfloat16: 2**-8 if GPU else 2**-7}
DTYPES = [torch.float32, torch.float64, torch.bfloat16] if GPU else [torch.float32]

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]


def listnet_formula(scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    """Return the loss in float64 by log softmax."""
    u = beta[:, :, None] * scores[:, None]
    z = labels.to(u.dtype)
    if mask is not None:
        u, z = u.masked_fill(~mask[:, None], -1e30), z.masked_fill(~mask[:, None], 0)
    mass = z.sum(-1)
    loss = -(z * u.log_softmax(-1)).sum(-1)
    return torch.where(mass > 0, loss / mass.masked_fill(mass <= 0, 1), 0) if normalize else loss


def plackett_luce_results(problem: Problem) -> dict[str, Tensor]:
    """Return what `results` would, in float64 from the CPU path, which has its own tests against plain formulas."""
    p = in_float64(problem)
    options = {"order": None, "position_weights": None, "top_k": None, "ties": "breslow", "last_group_free": False}
    order, position_weights, *rule = (options | p.options).values()
    given = Lists(p.scores, p.labels, p.beta, p.mask, order, position_weights, Rule(*rule))
    loss, gradient, infinite = cpu.forward(given, True, True)
    dbeta = p.upstream * cpu.beta_gradient(infinite, gradient, p.scores, p.mask)
    return {
        "loss": loss,
        "scores": ((p.upstream * p.beta)[:, :, None] * gradient).sum(1),
        "beta": dbeta.sum_to_size(p.beta.shape),
    }


def check_plackett_luce(problem: Problem) -> None:
    expected = plackett_luce_results(problem)
    found = results(plackett_luce_nll, on_device(problem))
    compare(found, expected, TOLERANCE[problem.scores.dtype])


def on_device(problem: Problem) -> Problem:
    """Return the problem with poison in all that must not be read, on the device."""
    return poisoned(problem).to(str(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize(
    ("batch", "objectives", "items"),
    [
        (size(100_003, 5), 3, 2),
        (size(20_001, 3), 5, size(8, 3)),
        (size(3_000, 3), 5, size(120, 9)),
        (size(500, 2), 2, size(1_000, 10)),
        (size(50, 1), 3, size(8_192, 17)),
        (size(20, 1), 2, size(50_000, 20)),
    ],
)
def test_listnet(batch: int, objectives: int, items: int, common: bool, dtype: torch.dtype) -> None:
    label_dtype = F64 if dtype == F64 else torch.float32
    problem = make(
        batch, objectives, items, scale=3, dtype=dtype, label_dtype=label_dtype, common=common, normalize=True
    )
    expected = results(listnet_formula, in_float64(problem), with_labels=True)
    found = results(listwise_cross_entropy, on_device(problem), with_labels=True)
    compare(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
@pytest.mark.parametrize(
    ("batch", "objectives", "items"),
    [
        (size(50_003, 5), 3, 2),
        (size(2_001, 3), 2, size(32, 5)),
        (size(1_000, 2), 3, size(120, 9)),
        (size(20, 1), 2, size(16_384, 20)),
        *on_a_gpu((10_001, 3, 8), (300, 2, 300), (100, 1, 2_048)),
    ],
)
def test_plackett_luce(batch: int, objectives: int, items: int, ties: str) -> None:
    check_plackett_luce(make(batch, objectives, items, scale=3, levels=max(2, items // 4), ties=ties))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("items", [100, 1_000, 5_000])
def test_plackett_luce_in_other_dtypes(items: int, dtype: torch.dtype) -> None:
    check_plackett_luce(make(50, 2, items, dtype=dtype, levels=7, label_dtype=torch.int64))


@pytest.mark.parametrize("items", [size(100, 5), size(1_000, 11), size(5_000, 12)])
def test_partial_rankings_with_weights_and_a_given_order(items: int) -> None:
    problem = make(size(100, 2), 2, items, levels=5, top_k=items // 3, last_group_free=True)
    problem.options["order"] = best_first(problem)
    check_plackett_luce(problem)
    problem.options["position_weights"] = torch.rand(items)
    check_plackett_luce(problem)
    problem.options |= {"position_weights": torch.rand(problem.labels.shape), "ties": "efron"}
    check_plackett_luce(problem)


@pytest.mark.parametrize("scale", [1e4, *on_a_gpu(1e2)])
@pytest.mark.parametrize("items", [size(100, 5), size(1_000, 11), size(5_000, 12)])
def test_extreme_scores(items: int, scale: float) -> None:
    check_plackett_luce(make(size(100, 2), 2, items, scale=scale, levels=items))
    problem = make(size(100, 2), 2, items, scale=scale, normalize=True)
    expected = results(listnet_formula, in_float64(problem), with_labels=True)
    found = results(listwise_cross_entropy, on_device(problem), with_labels=True)
    compare(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
@pytest.mark.parametrize("items", [3, size(100, 9), size(5_000, 12), *on_a_gpu(30, 1_000)])
def test_scores_of_minus_infinity(items: int, ties: str) -> None:
    """They are equal and below all others: ranked against each other they add nothing to the gradient of beta."""
    for levels in (2, 1000):
        problem = make(size(max(8, 10_000 // items), 6), 2, items, levels=levels, ties=ties)
        problem.scores[torch.rand(problem.scores.shape) < 2 / items] = -math.inf
        problem.scores[:3] = -math.inf
        if levels == 2:  # where all of them are at the bottom no loss is infinite
            problem.labels.masked_fill_((problem.scores == -math.inf)[:, None], -1)
        check_plackett_luce(problem)
        problem.beta, problem.scores = -problem.beta, -problem.scores
        problem.options |= {"position_weights": torch.rand(items), "top_k": max(2, items // 2)}
        check_plackett_luce(problem)


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
@pytest.mark.parametrize("items", [3, size(100, 9), size(5_000, 12), *on_a_gpu(30, 1_000)])
def test_scores_of_infinity(items: int, ties: str) -> None:
    """A ranking has no likelihood then; with a negative beta they are what minus infinity is with another."""
    problem = make(size(max(8, 10_000 // items), 4), 2, items, levels=3, masked=False, ties=ties)
    problem.scores[::2, items // 2] = math.inf
    problem.beta[::4] *= -1
    check_plackett_luce(problem)


def test_listnet_of_infinite_scores() -> None:
    problem, expected = infinite_scores()
    found = results(listwise_cross_entropy, on_device(problem))["beta"].cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("items", [size(100, 5), size(1_000, 11), size(5_000, 12)])
def test_confident_rankings_keep_their_digits(items: int) -> None:
    scores = torch.arange(items, 0, -1.0)[None] * 20
    problem = Problem(scores, scores[:, None], torch.ones(1, 1), None, torch.ones(1, 1, dtype=F64))
    found = results(plackett_luce_nll, problem.to(str(DEVICE)))
    chance = math.exp(-20) / (1 - math.exp(-20))
    assert found["loss"].item() == pytest.approx((items - 1) * math.log1p(chance), rel=5e-6)
    assert found["scores"][0, 0].item() == pytest.approx(-chance / (1 + chance), rel=5e-6)
    assert found["scores"][0, -1].item() == pytest.approx(chance / (1 + chance), rel=5e-6)


@pytest.mark.parametrize("op", [listwise_cross_entropy, plackett_luce_nll])
@pytest.mark.parametrize("items", [size(8, 3), size(20_000, 12), *on_a_gpu(120, 1_500)])
def test_repeats_are_equal_to_the_last_bit(op, items: int) -> None:
    problem = make(size(400_000 // items, 2), 3, items, levels=5).to(str(DEVICE))
    first = results(op, problem)
    for _ in range(size(3, 1)):
        again = results(op, problem)
        for name, value in first.items():
            assert torch.equal(value.nan_to_num(7), again[name].nan_to_num(7)), name


@pytest.mark.parametrize("op", [listwise_cross_entropy, plackett_luce_nll])
@pytest.mark.parametrize("items", [size(1_500, 11), *on_a_gpu(8, 20_000)])
def test_nothing_waits_for_the_gpu(op, items: int) -> None:
    variants = [{}] if op is listwise_cross_entropy else [{"ties": t} for t in ("breslow", "efron", "exact")]
    for options in variants:
        problem = make(size(200, 2), 2, items, levels=5, **options).to(str(DEVICE))
        results(op, problem)  # compiles the kernels, which may wait
        mode = torch.cuda.get_sync_debug_mode() if GPU else None
        try:
            if GPU:
                torch.cuda.set_sync_debug_mode("error")
            leaf = problem.scores.clone().requires_grad_()
            loss = op(leaf, problem.labels, problem.beta, problem.mask, **options)
            loss.backward(problem.upstream.to(loss.dtype))
        finally:
            if GPU:
                torch.cuda.set_sync_debug_mode(mode)
        assert leaf.grad.shape == leaf.shape


@pytest.mark.huge
def test_offsets_past_two_to_the_31st_in_listnet() -> None:
    """More than 2^31 labels and gradients of labels: the last lists come out as they do alone."""
    items, objectives = size(128, 10), 3
    batch = size(2**31 // (items * objectives) + 5_000, 9)
    require(batch * items * (4 + 4 + objectives * (2 + 2)) * 1.3)
    scores = torch.randn(batch, items, device=DEVICE)
    labels = torch.empty(batch, objectives, items, device=DEVICE, dtype=torch.bfloat16).uniform_()
    beta = torch.rand(batch, objectives, device=DEVICE) + 0.5
    problem = Problem(scores, labels, beta, None, torch.randn(batch, objectives, device=DEVICE))
    check_the_ends(listwise_cross_entropy, problem, with_labels=True)


@pytest.mark.huge
@pytest.mark.parametrize(
    ("items", "ties", "order"), [(100, "breslow", None), (1_500, "breslow", "own"), (2_500, "efron", "shared")]
)
def test_offsets_past_two_to_the_31st_in_plackett_luce(items: int, ties: str, order: str | None) -> None:
    """More than 2^31 labels, with their order, and with the state between the steps of tied groups.

    Sorting by torch would need 60 GB, so longer lists bring their order; all of it, its labels and the state would need
    88, so that with groups one order and one ranking serve all lists, by strides of 0. At most 70 GB remain.
    """
    items, objectives = size(items, {100: 4, 1_500: 11}.get(items, 12)), 2
    batch = size(2**31 // (items * objectives) + 5_000, 5)
    state = {"breslow": 0, "efron": 24}[ties]  # six arrays of 4 bytes
    ranking = {None: 1 + 1, "own": 1 + 8, "shared": 0}[order]
    require(batch * items * (4 + 4 + objectives * (4 + state + ranking)))
    shape = (batch, objectives, items)
    scores = torch.randn(batch, items, device=DEVICE)
    beta = torch.rand(batch, objectives, device=DEVICE) + 0.5
    options: dict = {"ties": ties}
    if order is None:
        labels = torch.randint(0, 40, shape, device=DEVICE, dtype=torch.uint8)
    else:
        falling = torch.arange(items, device=DEVICE).flip(0).div(-(-items // 40), rounding_mode="floor")
        labels, options["order"] = falling.byte().expand(shape), torch.arange(items, device=DEVICE).expand(shape)
        if order == "own":
            labels, options["order"] = labels.contiguous(), options["order"].contiguous()
    problem = Problem(scores, labels, beta, None, torch.randn(batch, objectives, device=DEVICE), options)
    check_the_ends(plackett_luce_nll, problem)


def require(bytes_needed: float) -> None:
    """Skip where the GPU has too little free memory."""
    if GPU:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < bytes_needed * 1.1:
            pytest.skip(f"needs {bytes_needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")


def check_the_ends(op, problem: Problem, with_labels: bool = False) -> None:
    found = results(op, problem, with_labels)
    for part in (slice(0, 3), slice(-3, None)):
        fields = ("scores", "labels", "beta", "upstream")
        few = replace(problem, **{name: getattr(problem, name)[part].clone() for name in fields})
        few.options = {k: v[part].clone() if isinstance(v, Tensor) else v for k, v in problem.options.items()}
        expected = {name: value.double().cpu() for name, value in results(op, few, with_labels).items()}
        compare({name: value[part] for name, value in found.items()}, expected, 1e-6)


def test_compiled_losses_equal_eager_ones() -> None:
    if not GPU:
        pytest.skip("the compiler of the CPU is tested elsewhere")
    problem = make(300, 3, 50, levels=5).to(str(DEVICE))

    def loss(scores: Tensor, beta: Tensor) -> Tensor:
        both = listwise_cross_entropy(scores, problem.labels, beta, problem.mask)
        return (both + plackett_luce_nll(scores, problem.labels, beta, problem.mask)).sum()

    leaves = [t.detach().requires_grad_() for t in (problem.scores, problem.beta)]
    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for a, b in zip(plain, compiled, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("items", "ties"),
    [
        (size(100, 5), "breslow"),
        (size(128, 16), "breslow"),
        (size(96, 16), "efron"),
        *on_a_gpu((12, "breslow"), (128, "exact"), (1_500, "efron"), (5_008, "breslow"), (5_000, "breslow")),
    ],
)
def test_bits_do_not_depend_on_where_rows_lie_in_memory(items: int, ties: str) -> None:
    """Aligned or not: with gaps, at an odd offset, behind one another or one row for all lists."""
    problem = make(size(300, 3), 2, items, levels=max(items // 3, 2)).to(str(DEVICE))
    if ties == "efron":
        problem.options["position_weights"] = torch.rand(problem.labels.shape, device=DEVICE)
        problem.options["order"] = best_first(problem)
    for op in (listwise_cross_entropy, plackett_luce_nll):
        options = problem.options | {"ties": ties} if op is plackett_luce_nll else {}
        plain = results(op, replace(problem, options=options))
        for gap, ahead in ((3, 1), (16, 16), (0, 1), (1, 0), (4, 4)):

            def moved(x, gap=gap, ahead=ahead):
                return padded(x, gap, ahead) if isinstance(x, Tensor) else x

            apart = replace(
                problem,
                scores=moved(problem.scores),
                labels=moved(problem.labels),
                mask=moved(problem.mask),
                options={name: moved(value) for name, value in options.items()},
            )
            for name, value in results(op, apart).items():
                assert torch.equal(value, plain[name]), (op, name, gap, ahead)
        shared = replace(problem, labels=problem.labels[:1].expand_as(problem.labels), options=options)
        one = replace(shared, labels=shared.labels.contiguous())
        for name, value in results(op, shared).items():
            assert torch.equal(value, results(op, one)[name]), (op, name, "one row for all")
