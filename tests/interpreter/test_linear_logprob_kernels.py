"""`linear_logprob` through its kernels in Triton's interpreter, against float64 autograd: every mode, every path."""

import math

import pytest
import torch
from torch import Tensor

from mopl.kernels import linear_logprob_flagged as flagged
from mopl.ops.linear_logprob import choice, function, linear_logprob

SMALL_TILES = {"BM": 16, "BV": 32, "BH": 16, "GROUP": 2, "num_warps": 4, "num_stages": 2}


def problem(rows: int = 11, size: int = 20, vocabulary: int = 107, seed: int = 0, scale: float = 1.0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    target[2], target[-1] = -100, -100
    hidden = normal(rows, size) * scale
    hidden[2] = math.nan  # a row that does not count may hold anything
    return {
        "hidden": hidden,
        "weight": normal(vocabulary, size),
        "bias": normal(vocabulary),
        "target": target,
        "temperature": torch.rand(rows, generator=generator) + 0.5,
        "upstream": [normal(rows) for _ in range(3)],
    }


def reference(hidden, weight, bias, target, temperature, softcap=None, logit_scale=1.0, row=None):
    """Return logprob, logsumexp, entropy by `log_softmax`, 0 where nothing counts."""
    counts = target >= 0
    used = (
        counts
        if row is None
        else torch.zeros(len(hidden), dtype=torch.bool).index_put((row[counts],), torch.tensor(True))
    )
    a = (torch.where(used[:, None], hidden, 0) @ weight.T + (0 if bias is None else bias)) * logit_scale
    u = (a if softcap is None else softcap * torch.tanh(a / softcap)) / temperature[:, None]
    log_p = u.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    where = torch.arange(len(hidden)) if row is None else row
    picked = log_p[where, target.clamp(min=0)]
    return torch.where(counts, picked, 0), u.logsumexp(-1) * used, entropy * used


def compare(p: dict, needs: tuple[str, ...], outputs: int = 3, tolerance: float = 2e-6, row=None, **options) -> None:
    """Compare values and gradients, both taken twice, with float64 autograd on the same (rounded) inputs."""
    names = ("hidden", "weight", "bias", "temperature")
    ours = {n: None if p[n] is None else p[n].clone().requires_grad_(n in needs) for n in names}
    exact = {n: None if p[n] is None else p[n].detach().double().requires_grad_(n in needs) for n in names}
    workspace = options.pop("workspace", 2**31)
    expected = reference(
        exact["hidden"], exact["weight"], exact["bias"], p["target"], exact["temperature"], row=row, **options
    )
    result = linear_logprob(
        ours["hidden"], ours["weight"], p["target"], bias=ours["bias"], temperature=ours["temperature"], row=row,
        return_logsumexp=True, return_entropy=True, workspace=workspace, **options,
    )  # fmt: skip
    for value, truth in zip(result, expected, strict=True):
        error = float((value.detach().double() - truth.detach()).abs().max()) / max(
            1.0, float(truth.detach().abs().max())
        )
        assert error <= tolerance, error
    if not needs:
        return
    upstream = p["upstream"][:outputs]
    total = sum((r * u).sum() for r, u in zip(result, upstream, strict=False))
    truth = sum((r * u.double()).sum() for r, u in zip(expected, upstream, strict=False))
    gradients = torch.autograd.grad(total, [ours[n] for n in needs], retain_graph=True)
    again = torch.autograd.grad(total, [ours[n] for n in needs])
    wanted = torch.autograd.grad(truth, [exact[n] for n in needs])
    for name, a, b, w in zip(needs, gradients, again, wanted, strict=True):
        assert torch.equal(a, b), f"{name}: two backward passes differ"
        w = torch.where(w.isnan(), 0, w)
        error = float((a.double() - w).abs().max()) / float(w.abs().max())
        assert error <= tolerance * 5, (name, error)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "needs", [(), ("hidden",), ("hidden", "temperature"), ("weight",), ("hidden", "weight", "bias", "temperature")]
)
def test_every_mode_equals_float64(needs: tuple[str, ...], bias: bool, softcap: float | None) -> None:
    p = problem()
    if not bias:
        p["bias"] = None
        needs = tuple(n for n in needs if n != "bias")
    compare(p, needs, softcap=softcap, logit_scale=0.7)


@pytest.mark.parametrize("keep", [0, 4, 11])
@pytest.mark.parametrize("outputs", [1, 3])
def test_rows_beyond_the_workspace_are_computed_again(keep: int, outputs: int) -> None:
    compare(problem(), ("hidden", "weight", "bias"), outputs=outputs, workspace=keep * 107 * 4)


def test_several_targets_share_a_row() -> None:
    p = problem(rows=6)
    p["hidden"][2] = torch.randn(20)
    row = torch.tensor([0, 0, 0, 1, 3, 3, 5, 4, 4])
    p["target"] = torch.tensor([5, 5, 9, -100, 3, 100, 50, -100, -100])
    p["upstream"][0] = torch.randn(9)
    p["hidden"][4] = math.nan
    for needs in ((), ("hidden",), ("hidden", "weight", "bias")):
        compare(p, needs, row=row)


@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight", "bias")])
def test_a_target_far_below_another_token_is_redone_with_the_true_maximum(needs: tuple[str, ...]) -> None:
    p = problem(scale=60.0)  # logits of hundreds of nats: most targets have p < exp(-128)
    logits = torch.nan_to_num(p["hidden"]) @ p["weight"].T
    counts = p["target"] >= 0
    gap = logits.amax(-1) - logits[torch.arange(11), p["target"].clamp(min=0)]
    assert float(gap[counts].max()) > 128
    # Rows beyond the workspace get their logits again from another product; at 1000 nats a float32 has steps of 6e-5.
    compare(p, needs, tolerance=5e-5 if "weight" in needs else 4e-6)


def test_a_target_with_logit_minus_infinity_does_not_spread() -> None:
    p = problem()
    p["bias"][7] = -math.inf
    p["target"][0], p["target"][1] = 7, 8
    hidden = p["hidden"].clone().requires_grad_()
    value, lse = linear_logprob(hidden, p["weight"], p["target"], bias=p["bias"], return_logsumexp=True)
    exact = reference(p["hidden"].double(), p["weight"].double(), p["bias"].double(), p["target"], torch.ones(11))
    assert float(value[0]) == -math.inf
    torch.testing.assert_close(value[1:].double(), exact[0][1:], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse.double(), exact[1], rtol=2e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(value[1:].sum(), hidden)
    assert not gradient.isnan().any()


@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")])
def test_a_confident_row_keeps_every_digit(needs: tuple[str, ...]) -> None:
    hidden, weight = torch.zeros(3, 4), torch.zeros(50, 4)
    hidden[:, 0], weight[9, 0] = torch.tensor([30.0, 40.0, 60.0]), 1.0
    hidden.requires_grad_("hidden" in needs), weight.requires_grad_("weight" in needs)
    value = linear_logprob(hidden, weight, torch.full((3,), 9))
    rest = [49 * math.exp(-x) for x in (30.0, 40.0, 60.0)]
    torch.testing.assert_close(value.detach(), torch.tensor([-math.log1p(r) for r in rest]), rtol=3e-6, atol=0)
    if "hidden" in needs:
        (gradient,) = torch.autograd.grad(value.sum(), hidden, retain_graph=True)
        torch.testing.assert_close(gradient[:, 0], torch.tensor([r / (1 + r) for r in rest]), rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")])
def test_sixteen_bit_inputs(dtype: torch.dtype, needs: tuple[str, ...]) -> None:
    p = problem()
    p["hidden"][2] = 0.0
    for name in ("hidden", "weight"):
        p[name] = p[name].to(dtype)
    p["bias"] = None
    # Stored exponentials have the dtype of the products; the interpreter truncates where a GPU rounds.
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype] if needs else 2e-6
    values = linear_logprob(p["hidden"], p["weight"], p["target"], temperature=p["temperature"])
    exact = reference(p["hidden"].double(), p["weight"].double(), None, p["target"], p["temperature"].double())[0]
    torch.testing.assert_close(values.double(), exact, rtol=2e-6, atol=4e-6)
    compare(p, needs, tolerance=tolerance)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")])
@pytest.mark.parametrize("case", ["confident rows", "small upstream gradients"])
def test_float16_has_no_range_and_loses_nothing_by_it(case: str, needs: tuple[str, ...], softcap: float | None) -> None:
    """Exponentials of 1e-9 and products with gradients of 1e-6 would have few bits in float16, or none."""
    torch.manual_seed(1)
    weight, target = torch.randn(60, 64).half(), torch.randint(0, 60, (40,))
    if case == "confident rows":
        own = weight[target].float()
        hidden = (own * 30 / own.square().sum(1, keepdim=True)).half()
    else:
        hidden, target = torch.randn(64).mul(0.3).half().expand(40, 64).contiguous(), target[:1].expand(40)
    ours = {"hidden": hidden.clone().requires_grad_(), "weight": weight.clone().requires_grad_("weight" in needs)}
    exact = {"hidden": hidden.double().requires_grad_(), "weight": weight.double().requires_grad_()}
    value = linear_logprob(ours["hidden"], ours["weight"], target, softcap=softcap)
    truth = reference(exact["hidden"], exact["weight"], None, target, torch.ones(40).double(), softcap)[0]
    if case == "confident rows":
        assert float(truth.detach().max()) > (-1e-8 if softcap is None else -1e-5)
        upstream = -1 / truth.detach().expm1()  # so that every row's gradient is about 1
    else:
        upstream = 1e-6 * (torch.rand(40).double() + 0.5)
    gradients = torch.autograd.grad(value, [ours[n] for n in needs], upstream.float())
    wanted = torch.autograd.grad(truth, [exact[n] for n in needs], upstream)
    for name, gradient, wish in zip(needs, gradients, wanted, strict=True):
        # What the smallest step of float16 takes from the result itself does not count.
        error = ((gradient.double() - wish).abs() - 6e-8).clamp(min=0)
        assert float(error.norm() / wish.norm()) < 2e-3, name


@pytest.mark.usefixtures("careful_memory")
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_equals_the_librarys_product(
    dtype: torch.dtype, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "fused_tiles", lambda plan: SMALL_TILES)
    p = problem(rows=37)
    hidden, weight = p["hidden"].to(dtype), p["weight"].to(dtype)
    value = linear_logprob(
        hidden, weight, p["target"], bias=p["bias"], temperature=p["temperature"], softcap=softcap or None
    )
    exact = reference(
        hidden.double(), weight.double(), p["bias"].double(), p["target"], p["temperature"].double(), softcap or None
    )[0]
    torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=5e-6)


def test_all_rows_masked_and_no_rows_at_all() -> None:
    hidden = torch.full((4, 8), math.nan, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    value = linear_logprob(hidden, weight, torch.full((4,), -100))
    value.sum().backward()
    assert not value.any() and not hidden.grad.any() and not weight.grad.any()
    assert linear_logprob(torch.zeros(0, 8), torch.randn(30, 8), torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight", "bias")])
def test_an_unchecked_target_past_the_vocabulary_gives_nan_in_its_row_alone(
    needs: tuple[str, ...], shared: bool
) -> None:
    """And reads nothing there: the head's memory ends after its last row."""
    p = problem()
    ours = {n: p[n].clone().requires_grad_(n in needs) for n in ("hidden", "weight", "bias")}
    target, wild = p["target"].clone(), 5
    target[wild] = 10**9
    row = torch.arange(11) if shared else None
    value = linear_logprob(ours["hidden"], ours["weight"], target, bias=ours["bias"], row=row, check_targets=False)
    exact = reference(p["hidden"].double(), p["weight"].double(), p["bias"].double(), p["target"], torch.ones(11))[0]
    others = torch.arange(11) != wild
    assert value[wild].isnan()
    torch.testing.assert_close(value[others].double(), exact[others], rtol=3e-6, atol=3e-6)
    if needs:
        (gradient,) = torch.autograd.grad(value.sum(), ours["hidden"])
        assert gradient[wild].isnan().all() and not gradient[others].isnan().any()


def test_many_flagged_rows_in_several_programs_and_parts_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flagged, "ROWS", 4)
    monkeypatch.setattr(flagged, "PARTS", 3)
    p = problem(rows=10, vocabulary=200)
    assert -(-200 // flagged.part_of(200, 4)) > 1
    likely = (p["target"].clamp(min=0) + torch.tensor([150, 3])[torch.arange(10) % 2]) % 200
    strong = 200 * p["weight"][likely] / p["weight"][likely].square().sum(1, keepdim=True)
    p["hidden"] = torch.where(torch.arange(10)[:, None] % 3 != 1, strong, p["hidden"].nan_to_num())
    given = p["hidden"], p["weight"], p["target"]
    results = linear_logprob(*given, return_logsumexp=True, return_entropy=True)
    again = linear_logprob(*given, return_logsumexp=True, return_entropy=True)
    exact = reference(p["hidden"].double(), p["weight"].double(), None, p["target"], torch.ones(10).double())
    assert int((exact[0] < -90).sum()) >= 4
    for found, same, truth in zip(results, again, exact, strict=True):
        assert torch.equal(found, same)
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight", "bias")], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_memory_that_nobody_wrote_changes_nothing(
    needs: tuple[str, ...], shared: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels read and write the padding of rows: fresh memory is NaN here, and the same bits come out."""
    p = problem(rows=7, size=12, vocabulary=51)
    leaves = {
        name: p[name].nan_to_num().bfloat16().requires_grad_(name in needs) for name in ("hidden", "weight", "bias")
    }
    row = torch.arange(7) if shared else None

    def run() -> list[Tensor]:
        results = linear_logprob(
            leaves["hidden"], leaves["weight"], p["target"], bias=leaves["bias"], row=row, softcap=softcap,
            return_entropy=True, return_logsumexp=True, workspace=3 * 64 * 2,
        )  # fmt: skip
        wanted = [leaves[name] for name in needs]
        upstream = [torch.linspace(-1, 1, 7) + k for k in range(3)]
        return [*results, *(torch.autograd.grad(results, wanted, upstream) if wanted else ())]

    expected = run()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_gradient_of_a_bf16_head_has_the_error_of_its_last_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all rows kept, for any upstream gradient: the pivots' entries, the largest ones, are rounded but once."""
    # As on a GPU; on a CPU, which this is, at most half of the rows are kept.
    monkeypatch.setattr(function, "kept_rows", lambda hidden, weight, rows, *_: rows)
    p = problem(rows=16, size=16, vocabulary=64, scale=0.05)
    hidden, weight = (p[name].nan_to_num().bfloat16().requires_grad_() for name in ("hidden", "weight"))
    logprob = linear_logprob(hidden, weight, p["target"], temperature=p["temperature"])
    for seed in (0, 1):
        upstream = torch.randn(16, generator=torch.Generator().manual_seed(seed))
        (found,) = torch.autograd.grad(logprob, weight, upstream, retain_graph=True)
        gradients = []
        for dtype in (torch.float32, torch.float64):
            leaf = weight.detach().to(dtype).requires_grad_()
            exact = reference(hidden.detach().to(dtype), leaf, None, p["target"], p["temperature"].to(dtype))[0]
            gradients += torch.autograd.grad(exact, leaf, upstream.to(dtype))
        single, truth = gradients
        apart, floor = (float((g.double() - truth).norm() / truth.norm()) for g in (found, single.bfloat16()))
        assert apart < 1.2 * floor, (apart, floor)
