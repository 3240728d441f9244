"""`linear_logprob` on a GPU at real sizes, against float64, with every output poisoned beforehand.

`tests/interpreter/test_gpu_logprob_small.py` runs the same tests on a CPU in Triton's interpreter, at toy sizes: they
prove nothing there about a GPU, but no mistake in this file waits for one.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from gpu_problems import DEVICE, DTYPES, GIB, GPU, SLACK, capped, error, normal, size, wide_product
from torch import Tensor

from mopl.ops import linear_logprob

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]


def problem(kind: str, dtype: torch.dtype, rows: int, width: int, vocabulary: int) -> dict[str, Tensor]:
    """Hidden states and a head whose logits are flat (deviation 1), or peaked at the target or at another token."""
    weight = normal(vocabulary, width, scale=width**-0.5, dtype=dtype)
    hidden = normal(rows, width)
    target = torch.randint(vocabulary, (rows,), device=DEVICE)
    if kind == "peaked":
        liked = torch.where(torch.rand(rows, device=DEVICE) < 0.7, target, target.flip(0))
        own = weight[liked].float()
        strength = torch.linspace(0, 40, rows, device=DEVICE)[:, None]
        hidden += strength * own / own.square().sum(1, keepdim=True)
    target[rows // 3] = -100
    hidden[rows // 3] = math.nan  # a row that does not count may hold anything
    return {
        "hidden": hidden.to(dtype),
        "weight": weight,
        "target": target,
        "temperature": torch.rand(rows, device=DEVICE) + 0.5,
        "upstream": normal(rows),
    }


def chunks(rows: int, size: int = 256) -> list[slice]:
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def head_exactly(p: dict[str, Tensor], softcap: float | None = None) -> dict[str, Tensor]:
    """Values and gradients in float64 of the inputs as they are rounded, a few rows at a time."""
    weight = p["weight"].double()
    found = {"logprob": [], "logsumexp": [], "hidden": [], "weight": torch.zeros_like(weight)}
    for c in chunks(len(p["hidden"])):
        counts = p["target"][c] >= 0
        hidden = p["hidden"][c].double().masked_fill(~counts[:, None], 0)
        temperatures = p["temperature"][c].double()[:, None]
        a = hidden @ weight.T
        u = capped(a, softcap) / temperatures
        index = p["target"][c].clamp(min=0)[:, None]
        # Relative to the target: u - logsumexp would lose 1 - p below 1e-16 even in float64.
        e = (u - u.gather(1, index)).exp_().scatter_(1, index, 0)
        others = e.sum(1, keepdim=True)
        logprob = -others.log1p()
        found["logprob"].append(logprob[:, 0].where(counts, 0))
        found["logsumexp"].append((u.gather(1, index) - logprob)[:, 0].where(counts, 0))
        upstream = p["upstream"][c].double().where(counts, 0)[:, None] / temperatures
        share = upstream / (1 + others)
        grad = e.mul_(-share).scatter_(1, index, share * others)
        if softcap is not None:
            grad *= 1 - torch.tanh(a / softcap).square()
        found["hidden"].append(grad @ weight)
        found["weight"] += grad.T @ hidden
    return {k: torch.cat(v) if isinstance(v, list) else v for k, v in found.items()}


def head_plainly(p: dict[str, Tensor], softcap: float | None = None) -> dict[str, Tensor]:
    """What PyTorch gives with float32 logits and float32 accumulators; its gradients are rounded once, at the end."""
    weight = p["weight"]
    found = {"logprob": [], "hidden": [], "weight": torch.zeros_like(weight, dtype=torch.float32)}
    for c in chunks(len(p["hidden"])):
        counts = p["target"][c] >= 0
        hidden = p["hidden"][c].masked_fill(~counts[:, None], 0)
        a = wide_product(hidden, weight.T)
        temperatures = p["temperature"][c][:, None]
        log_p = F.log_softmax(capped(a, softcap) / temperatures, -1)
        index = p["target"][c].clamp(min=0)[:, None]
        found["logprob"].append(log_p.gather(1, index)[:, 0].where(counts, 0))
        upstream = p["upstream"][c].where(counts, 0)[:, None]
        grad = log_p.exp_().mul_(-upstream).scatter_add_(1, index, upstream).div_(temperatures)
        if softcap is not None:
            grad *= 1 - torch.tanh(a / softcap).square()
        found["hidden"].append((grad @ weight.float()).to(p["hidden"].dtype))
        found["weight"] += grad.T @ hidden.float()
    found["weight"] = found["weight"].to(weight.dtype)
    return {k: torch.cat(v) if isinstance(v, list) else v for k, v in found.items()}


NEEDS = {"scoring": (), "frozen": ("hidden",), "trained": ("hidden", "weight")}


def ours(p: dict[str, Tensor], mode: str, retain: bool = False, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log p and the gradients that a mode has."""
    leaves = {k: p[k].detach().clone().requires_grad_(k in NEEDS[mode]) for k in ("hidden", "weight")}
    value = linear_logprob(leaves["hidden"], leaves["weight"], p["target"], temperature=p["temperature"], **options)
    if not NEEDS[mode]:
        return value, {}
    gradients = torch.autograd.grad(value, [leaves[k] for k in NEEDS[mode]], p["upstream"], retain_graph=retain)
    return value.detach(), dict(zip(NEEDS[mode], gradients, strict=True))


SIZES = [(1500, 1024, 50257), (507, 252, 123)] if GPU else [(27, 21, 75)]


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(k, d) for d in DTYPES for k in ("flat", "peaked") if GPU or k == "peaked" or d == torch.bfloat16],
    ids=str,
)
def test_linear_errors_are_at_most_twice_those_of_a_float32_reference(
    kind: str, dtype: torch.dtype, sizes: tuple[int, int, int], softcap: float | None
) -> None:
    p = problem(kind, dtype, *sizes)
    exact, plain = head_exactly(p, softcap), head_plainly(p, softcap)
    room = 2e-7 * float(exact["logsumexp"].abs().max())  # a float32 logit has no more digits
    largest = float((plain["logprob"].double() - exact["logprob"]).abs().max())
    for mode, keep in (("scoring", 0), ("frozen", 0), ("trained", 2 * GIB), ("trained", 0)):
        value, gradients = ours(p, mode, softcap=softcap, workspace=keep)
        assert float((value.double() - exact["logprob"]).abs().max()) <= SLACK * largest + room, mode
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            limit = SLACK * error(plain[name], exact[name]) + 1e-6
            assert error(gradient, exact[name]) <= limit, (mode, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["frozen", "trained"])
def test_linear_gradients_of_confident_rows_are_right_in_relative_terms(mode: str, dtype: torch.dtype) -> None:
    rows, width, vocabulary = size(400, 6), size(512, 64), size(32000, 60)
    p = problem("flat", dtype, rows, width, vocabulary)
    own = p["weight"][p["target"].clamp(min=0)].float()
    strength = torch.linspace(20, 45, rows, device=DEVICE)[:, None]
    p["hidden"] = (normal(rows, width, scale=0.3) + strength * own / own.square().sum(1, keepdim=True)).to(dtype)
    p["upstream"] = torch.ones(rows, device=DEVICE)
    p["upstream"] = -1 / head_exactly(p)["logprob"].expm1().clamp(max=-1e-30)  # gradients of about 1
    p["upstream"] = p["upstream"].where(p["target"] >= 0, 0).float()
    exact = head_exactly(p)
    value, gradients = ours(p, mode)
    live = p["target"] >= 0
    # A logit of 45 / T nats is a float32 with steps of 4e-6 to 8e-6, which the exponential makes relative.
    apart = (value.double() / exact["logprob"] - 1)[live].abs()
    assert float(apart.max()) < 1e-4
    apart = (gradients["hidden"].double() - exact["hidden"]).norm(dim=1) / exact["hidden"].norm(dim=1)
    limit = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert float(apart[live].max()) < limit * SLACK / 2


@pytest.mark.parametrize("mode", list(NEEDS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_targets_of_probability_below_e_to_the_minus_128(mode: str, dtype: torch.dtype) -> None:
    rows, width, vocabulary = size(64, 6), size(512, 16), size(32000, 60)
    p = problem("flat", dtype, rows, width, vocabulary)
    other = p["weight"][p["target"].roll(1).clamp(min=0)].float()
    strength = torch.linspace(60, 400, rows, device=DEVICE)[:, None]
    p["hidden"] = (strength * other / other.square().sum(1, keepdim=True)).to(dtype)
    p["temperature"] = torch.ones(rows, device=DEVICE)
    exact, plain = head_exactly(p), head_plainly(p)
    assert float(exact["logprob"].min()) < -128
    value, gradients = ours(p, mode)
    room = 3e-4  # a float32 has steps of 3e-5 at 400
    if dtype == torch.float16 and NEEDS[mode]:
        # These rows have a second product by the library, whose tensor cores cut each step's sum of 16 products off
        # instead of rounding it: all terms of the other token's logit have one sign, and 3e-6 of it is lost.
        room = max(room, SLACK * float((plain["logprob"].double() - exact["logprob"]).abs().max()))
    assert float((value.double() - exact["logprob"]).abs().max()) < room
    for name, gradient in gradients.items():
        assert error(gradient, exact[name]) <= SLACK * error(plain[name], exact[name]) + 3e-4, name


@pytest.mark.parametrize("mode", list(NEEDS))
def test_linear_minus_infinite_logits_are_forbidden_tokens(mode: str) -> None:
    p = problem("flat", torch.bfloat16, size(300, 6), size(256, 16), size(5000, 60))
    bias = normal(len(p["weight"]))
    bias[::3] = -math.inf
    forbidden = (p["target"] >= 0) & (p["target"] % 3 == 0)
    p["upstream"] = p["upstream"].masked_fill(forbidden, 0)
    leaves = {k: p[k].clone().requires_grad_(k in NEEDS[mode]) for k in ("hidden", "weight")}
    value = linear_logprob(leaves["hidden"], leaves["weight"], p["target"], bias=bias, temperature=p["temperature"])
    logits = p["hidden"].double() @ p["weight"].double().T + bias.double()
    exact = (logits / p["temperature"].double()[:, None]).log_softmax(-1)
    exact = exact.gather(1, p["target"].clamp(min=0)[:, None])[:, 0]
    fine = (p["target"] >= 0) & ~forbidden
    assert bool((value[forbidden] == -math.inf).all()) and bool(forbidden.any())
    torch.testing.assert_close(value[fine].double(), exact[fine], rtol=1e-5, atol=2e-5)
    for gradient in torch.autograd.grad(value, [leaves[k] for k in NEEDS[mode]], p["upstream"]) if NEEDS[mode] else ():
        assert not bool(gradient.isnan().any())


@pytest.mark.parametrize("keep", [0, 2 * GIB])
@pytest.mark.parametrize("options", [{"softcap": 15.0}, {"return_entropy": True}, {}], ids=str)
def test_linear_a_logit_of_nan_is_seen_in_the_gradient_of_the_head(options: dict, keep: int) -> None:
    p = problem("flat", torch.bfloat16, size(300, 6), size(128, 16), size(3000, 60))
    p["target"][0], p["hidden"][0, 3] = 1, math.nan
    leaves = [p[k].detach().clone().requires_grad_() for k in ("hidden", "weight")]
    value = linear_logprob(*leaves, p["target"], workspace=keep, **options)
    total = sum(v[1:].sum() + v[0] for v in (value if isinstance(value, tuple) else (value,)))
    of_hidden, of_weight = torch.autograd.grad(total, leaves)
    assert bool(of_hidden[0].isnan().all()) and bool(of_hidden[1:].isfinite().all())
    assert bool(of_weight.isnan().all())


@pytest.mark.parametrize("mode", list(NEEDS))
def test_linear_more_rows_than_a_grid_has_in_its_second_dimension(mode: str) -> None:
    rows, width, vocabulary = size(70_000, 40), size(64, 16), size(1000, 50)
    p = problem("flat", torch.bfloat16, rows, width, vocabulary)
    exact = head_exactly(p)
    value, gradients = ours(p, mode)
    torch.testing.assert_close(value.double(), exact["logprob"], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert error(gradient, exact[name]) < 4e-3 * SLACK / 2, name


@pytest.mark.huge
def test_linear_cache_with_offsets_past_2_to_the_31() -> None:
    rows, width, vocabulary = size(17_500, 12), size(128, 16), size(128_256, 60)
    p = problem("flat", torch.bfloat16, rows, width, vocabulary)
    assert not GPU or rows * vocabulary > 2**31
    exact = head_exactly(p)
    value, gradients = ours(p, "trained", workspace=8 * GIB)
    torch.testing.assert_close(value.double(), exact["logprob"], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert error(gradient, exact[name]) < 4e-3 * SLACK / 2, name
    last = slice(-50, None)
    assert error(gradients["hidden"][last], exact["hidden"][last]) < 4e-3 * SLACK / 2


@pytest.mark.parametrize("mode", list(NEEDS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_all_rows_masked(mode: str, dtype: torch.dtype) -> None:
    p = problem("flat", dtype, size(300, 5), size(64, 16), size(1000, 30))
    p["target"] = torch.full_like(p["target"], -100)
    p["hidden"] = torch.full_like(p["hidden"], math.nan)
    value, gradients = ours(p, mode)
    assert not bool(value.any()) and not any(bool(g.any()) for g in gradients.values())


@pytest.mark.parametrize("mode", list(NEEDS))
@pytest.mark.parametrize("options", [{}, {"softcap": 15.0}, {"return_entropy": True}], ids=str)
def test_linear_repeats_bitwise_and_keeps_its_graph_and_inputs(mode: str, options: dict) -> None:
    p = problem("peaked", torch.bfloat16, size(2100, 9), size(512, 16), size(32001, 70))
    before = {k: v.clone() for k, v in p.items()}
    leaves = [p[k].detach().clone().requires_grad_(k in NEEDS[mode]) for k in ("hidden", "weight")]
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    runs = []
    for _ in range(2):
        value = linear_logprob(*leaves, p["target"], temperature=p["temperature"], **options)
        value = value if isinstance(value, tuple) else (value,)
        runs.append([v.detach() for v in value])
        if needed:
            upstream = [p["upstream"]] * len(value)
            runs[-1] += torch.autograd.grad(value, needed, upstream, retain_graph=True)
            runs.append([v.detach() for v in value])
            runs[-1] += torch.autograd.grad(value, needed, upstream)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(), p[name].nan_to_num()), f"{name} has changed"


@pytest.mark.parametrize("mode", list(NEEDS))
@pytest.mark.parametrize("options", [{}, {"softcap": 15.0, "return_entropy": True}], ids=str)
def test_linear_nothing_waits_for_the_gpu(mode: str, options: dict) -> None:
    p = problem("peaked", torch.bfloat16, size(1000, 6), size(256, 16), size(5000, 40))
    leaves = [p[k].detach().clone().requires_grad_(k in NEEDS[mode]) for k in ("hidden", "weight")]
    for careful in (False, True):  # kernels are compiled at the first call
        if GPU:
            torch.cuda.set_sync_debug_mode("error" if careful else "default")
        try:
            value = linear_logprob(*leaves, p["target"], temperature=p["temperature"], **options)
            value = value if isinstance(value, tuple) else (value,)
            if NEEDS[mode]:
                torch.autograd.backward(value, [p["upstream"]] * len(value))
        finally:
            if GPU:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", list(NEEDS))
def test_linear_rows_beyond_max_rows_are_nan_and_all_others_as_without(mode: str) -> None:
    p = problem("flat", torch.bfloat16, size(900, 8), size(128, 16), size(3000, 40))
    p["target"][::2] = -100
    many = int((p["target"] >= 0).sum())
    free, _ = ours(p, mode)
    exactly, gradients = ours(p, mode, max_rows=many)
    torch.testing.assert_close(exactly, free, rtol=1e-6, atol=1e-6)
    assert not any(bool(g.isnan().any()) for g in gradients.values())
    tight, _ = ours(p, mode, max_rows=many - 1)
    last = int((p["target"] >= 0).nonzero()[-1])
    assert bool(tight[last].isnan())
    rest = torch.arange(len(free), device=DEVICE) != last
    torch.testing.assert_close(tight[rest], free[rest], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("rows", [size(1, 1), size(16, 5), size(300, 20)])
def test_linear_fused_kernel_beside_the_librarys_product(
    rows: int, softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mopl.kernels.fused_logprob import TILES
    from mopl.ops.linear_logprob import choice

    p = problem("peaked", dtype, rows, size(516, 20), size(32001, 75))
    p["target"][rows // 3], p["hidden"][rows // 3] = 5, 0.0
    exact, plain = head_exactly(p, softcap), head_plainly(p, softcap)
    room = 3e-7 * float(exact["logsumexp"].abs().max())
    largest = float((plain["logprob"].double() - exact["logprob"]).abs().max())
    names = choice.usable(DEVICE, dtype.itemsize, softcap is not None) if GPU else ["few"]
    assert names
    for name in [None, *names]:
        monkeypatch.setattr(choice, "fused_tiles", lambda *_, name=name: None if name is None else TILES[name])
        value, _ = ours(p, "scoring", softcap=softcap)
        assert float((value.double() - exact["logprob"]).abs().max()) <= SLACK * largest + room, name


@pytest.mark.parametrize("mode", list(NEEDS))
def test_linear_targets_that_share_rows(mode: str) -> None:
    rows, width, vocabulary = size(200, 4), size(256, 16), size(5000, 60)
    hidden, weight = (
        normal(rows, width, dtype=torch.bfloat16),
        normal(vocabulary, width, scale=0.1, dtype=torch.bfloat16),
    )
    row = torch.randint(rows, (3 * rows,), device=DEVICE)
    target = torch.randint(vocabulary, (3 * rows,), device=DEVICE)
    target[::5] = -100
    upstream = normal(3 * rows)
    leaves = [
        hidden.clone().requires_grad_("hidden" in NEEDS[mode]),
        weight.clone().requires_grad_("weight" in NEEDS[mode]),
    ]
    value = linear_logprob(*leaves, target, row=row)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    log_p = (exact[0] @ exact[1].T).log_softmax(-1)[row].gather(1, target.clamp(min=0)[:, None])[:, 0]
    truth = log_p.where(target >= 0, 0)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)
    if needed := [leaf for leaf in leaves if leaf.requires_grad]:
        gradients = torch.autograd.grad(value, needed, upstream)
        wanted = torch.autograd.grad(truth, exact[: len(needed)], upstream.double())
        assert all(error(g, w) < 4e-3 * SLACK / 2 for g, w in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize("mode", list(NEEDS))
def test_linear_autocast_changes_nothing(mode: str) -> None:
    p = problem("flat", torch.float32, size(500, 6), size(256, 16), size(3000, 40))
    value, gradients = ours(p, mode)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        again, others = ours(p, mode)
    assert torch.equal(value, again) and all(torch.equal(gradients[k], others[k]) for k in gradients)


@pytest.mark.skipif(not GPU, reason="the interpreter's kernels cannot be compiled")
@pytest.mark.parametrize("mode", list(NEEDS))
def test_linear_compiles_once_whatever_the_rows_the_temperature_and_the_mask(mode: str) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(hidden: Tensor, weight: Tensor, target: Tensor, temperature: Tensor, mask: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, target, temperature=temperature, mask=mask).sum()

    for rows in (300, 500, 1234):
        p = problem("flat", torch.bfloat16, rows, 128, 3000)
        leaves = [p[k].detach().clone().requires_grad_(k in NEEDS[mode]) for k in ("hidden", "weight")]
        mask = torch.rand(rows, device=DEVICE) < 0.7
        value = step(*leaves, p["target"], p["temperature"], mask)
        with torch.no_grad():
            plain = linear_logprob(*leaves, p["target"], temperature=p["temperature"], mask=mask).sum()
        torch.testing.assert_close(value.detach(), plain, rtol=1e-5, atol=1e-5)
        if NEEDS[mode]:
            value.backward()
    assert counter.frame_count == 1


@pytest.mark.huge
@pytest.mark.skipif(not GPU, reason="measures the memory of a GPU")
@pytest.mark.parametrize(
    ("mode", "allowed"),
    # A tile of logits (0.13 GiB), (N, H) results in float32, exponentials of one chunk (1.0); for a trained head those
    # that are kept (1.0) and its gradient in float32 and bfloat16 (0.7): computed, not measured.
    [("scoring", 0.3), ("frozen", 1.6), ("trained", 3.5)],
)
def test_linear_the_logits_are_never_held(mode: str, allowed: float) -> None:
    p = problem("flat", torch.bfloat16, 16384, 1024, 128_256)  # logits of 3.9 GiB in bfloat16
    leaves = [p[k].detach().clone().requires_grad_(k in NEEDS[mode]) for k in ("hidden", "weight")]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = linear_logprob(*leaves, p["target"], temperature=p["temperature"], workspace=GIB)
    if NEEDS[mode]:
        value.backward(p["upstream"])
    assert (torch.cuda.max_memory_allocated() - before) / GIB < allowed
