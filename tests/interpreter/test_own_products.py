"""`linear_logprob` by products of its own, in Triton's interpreter, against float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mopl.kernels import linear_logprob_products as kernels
from mopl.ops.linear_logprob import function, linear_logprob, own_products
from mopl.ops.linear_logprob.records import Entries

pytestmark = pytest.mark.usefixtures("own_products")
ROWS, WIDTH, VOCABULARY = 37, 24, 107
MODES = {"scoring": (), "frozen": ("hidden",), "trained": ("hidden", "weight"), "biased": ("hidden", "weight", "bias")}
# The interpreter truncates what a GPU rounds.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3}


def problem(dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(VOCABULARY, (ROWS,))
    target[3], target[-1] = -100, -100
    target[8:19] = target[7]  # more entries of one column than are added at a time
    hidden = torch.randn(ROWS, WIDTH) * scale
    hidden[3] = math.nan  # a row that does not count may hold anything
    return {
        "hidden": hidden.to(dtype),
        "weight": torch.randn(VOCABULARY, WIDTH).to(dtype),
        "bias": torch.randn(VOCABULARY).to(dtype),
        "target": target,
        "temperature": torch.rand(ROWS) + 0.5,
        "upstream": torch.randn(ROWS),
    }


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the kernels that are launched."""
    names: list[str] = []
    for name in ("exponential_kernel", "weight_gradient_kernel", "pivot_kernel"):
        kernel = getattr(kernels, name)

        class Noted:
            def __init__(self, kernel: object, name: str) -> None:
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid: tuple[int, ...]) -> Callable:
                names.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(kernels, name, Noted(kernel, name))
    return names


def run(p: dict[str, Tensor], needs: tuple[str, ...], exactly: bool = False, row: Tensor | None = None, **options):
    """Return log-probabilities and gradients, in float64 by `log_softmax` if `exactly`."""
    names = ("hidden", "weight", "bias")
    leaves = {n: (p[n].double() if exactly else p[n].clone()).detach().requires_grad_(n in needs) for n in names}
    hidden, weight, bias = leaves.values()
    if exactly:
        counts = p["target"] >= 0
        where = torch.arange(ROWS) if row is None else row
        used = torch.zeros(ROWS, dtype=torch.bool).index_put((where[counts],), torch.tensor(True))
        a = torch.where(used[:, None], hidden, 0) @ weight.T + bias
        log_p = (a * options.get("logit_scale", 1.0) / p["temperature"].double()[:, None]).log_softmax(-1)
        value = log_p[where, p["target"].clamp(min=0)] * counts
    else:
        value = linear_logprob(hidden, weight, p["target"], bias=bias, temperature=p["temperature"], row=row, **options)
    found = [leaves[n] for n in needs]
    return value.detach(), torch.autograd.grad(value, found, p["upstream"].to(value.dtype)) if found else ()


def compare(p: dict[str, Tensor], mode: str, tolerance: float = 4e-6, **options) -> None:
    value, gradients = run(p, MODES[mode], **options)
    options.pop("workspace", None)
    truth, wanted = run(p, MODES[mode], exactly=True, **options)
    assert float((value - truth).abs().max()) <= tolerance * max(1.0, float(truth.abs().max()))
    for name, gradient, wish in zip(MODES[mode], gradients, wanted, strict=True):
        assert float((gradient.double() - wish).norm() / wish.norm()) < TOLERANCE[p["hidden"].dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_float64(
    mode: str, dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU; on a CPU, which this is, at most half of the rows are kept.
    monkeypatch.setattr(function, "kept_rows", lambda hidden, weight, rows, *_: rows)
    compare(problem(dtype), mode, logit_scale=0.7)
    assert "exponential_kernel" in launched
    assert ("weight_gradient_kernel" in launched) == (mode in ("trained", "biased"))


@pytest.mark.parametrize("kept", [0, 5, ROWS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_that_are_not_kept_are_multiplied_again(
    kept: int, dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "kept_rows", lambda *_: kept)
    compare(problem(dtype), "biased")
    assert "pivot_kernel" in launched and ("weight_gradient_kernel" in launched) == (kept == ROWS)


@pytest.mark.parametrize("mode", ["scoring", "frozen", "biased"])
def test_targets_that_share_rows(mode: str) -> None:
    p = problem(torch.bfloat16)
    row = torch.randint(ROWS, (50,))
    p["hidden"][3] = 0.0
    p["target"], p["upstream"] = torch.randint(VOCABULARY, (50,)), torch.randn(50)
    p["target"][::4] = -100
    p["target"][1:9:2] = p["target"][1]
    compare(p, mode, row=row)


@pytest.mark.parametrize("mode", ["scoring", "frozen", "trained"])
def test_a_target_far_below_another_token_is_computed_again(mode: str) -> None:
    compare(problem(torch.bfloat16, scale=60.0), mode, tolerance=5e-5)


def test_what_has_no_kernel_here_goes_to_the_library(launched: list[str]) -> None:
    p = problem(torch.bfloat16)
    run(p, ("hidden", "weight"), softcap=5.0)
    linear_logprob(p["hidden"], p["weight"], p["target"], return_entropy=True)
    linear_logprob(p["hidden"].float(), p["weight"].float(), p["target"])
    odd = torch.randn(ROWS, 20), torch.randn(VOCABULARY, 20)  # rows of 40 bytes
    linear_logprob(*(x.bfloat16() for x in odd), p["target"])
    cut = torch.randn(ROWS, 32)[:, :20], torch.randn(VOCABULARY, 32)[:, :20]  # a copy would have rows of 40 bytes
    linear_logprob(*(x.bfloat16() for x in cut), p["target"])
    wide = [torch.randn(n, 32).bfloat16()[:, :20].requires_grad_() for n in (ROWS, VOCABULARY)]
    linear_logprob(*wide, p["target"]).sum().backward()
    apart = torch.randn(ROWS, WIDTH + 1).bfloat16()[:, 1:]
    linear_logprob(apart, p["weight"], p["target"])
    linear_logprob(p["hidden"][:1].expand(ROWS, WIDTH), p["weight"], p["target"])  # rows that share their memory
    linear_logprob(p["hidden"], p["weight"][:1].expand(VOCABULARY, WIDTH), p["target"])
    assert not launched or set(launched) == {"pivot_kernel"}


def test_a_transposed_head_is_copied(launched: list[str]) -> None:
    p = problem(torch.bfloat16)
    p["weight"] = torch.randn(WIDTH, 112).bfloat16().T
    compare(p | {"bias": torch.randn(112).bfloat16()}, "trained")
    assert "exponential_kernel" in launched


@pytest.mark.parametrize(
    ("mode", "step", "scale"),  # from logits of hundreds of nats on rows are computed again
    [("scoring", 2, 1.0), ("frozen", 0, 1.0), ("biased", 0, 1.0), ("biased", 2, 60.0)],
)
def test_a_bias_need_not_be_contiguous(mode: str, step: int, scale: float) -> None:
    p = problem(torch.bfloat16, scale)
    memory = torch.randn(2 * VOCABULARY).bfloat16()
    p["bias"] = memory.as_strided((VOCABULARY,), (step,))
    value, gradients = run(p | {"bias": p["bias"].contiguous()}, MODES[mode])
    leaves = {n: p[n].detach().requires_grad_(n in MODES[mode]) for n in ("hidden", "weight", "bias")}
    hidden, weight, bias = leaves.values()
    found = linear_logprob(hidden, weight, p["target"], bias=bias, temperature=p["temperature"])
    assert torch.equal(found, value)
    for name, wish in zip(MODES[mode], gradients, strict=True):
        assert torch.equal(torch.autograd.grad(found, leaves[name], p["upstream"], retain_graph=True)[0], wish), name


@pytest.mark.parametrize("apart", [False, True])
def test_entries_of_a_column_are_added_in_their_order(apart: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, 20).bfloat16()
    hidden[4] = math.nan
    column = torch.randint(6, (60,))
    column[:30], column[40:44] = 2, VOCABULARY  # the last ones belong nowhere
    position, coefficient = torch.randint(ROWS, (60,)), torch.randn(60)
    coefficient[position == 4] = 0  # what does not count adds 0, whatever it holds
    exact = torch.zeros(VOCABULARY + 1, 20).double()
    exact.index_add_(0, column, coefficient.double()[:, None] * hidden.nan_to_num().double()[position])
    place = torch.full((VOCABULARY,), -1, dtype=torch.int32) if apart else None
    out = torch.full((60, 20), math.nan) if apart else torch.ones(VOCABULARY, 20)
    own_products.add_entries(hidden, Entries(column, position, coefficient), out, place, VOCABULARY)
    if place is None:
        found = out - 1
    else:
        assert (place[6:] == -1).all()
        found = torch.where((place >= 0)[:, None], out[place.long()], 0)
    torch.testing.assert_close(found.double(), exact[:-1], rtol=1e-5, atol=2e-6)
