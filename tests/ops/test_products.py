"""Products of 16-bit operands with float32 results: every form that a torch may lack, and what is used instead."""

import warnings
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mopl._extras import version_of
from mopl.ops import _products as products

MM, ADDMM = torch.mm, torch.addmm


def mm(a, b, *, out_dtype=None, out=None):
    """Compute what a GPU does: exact products of 16-bit operands, summed in float32."""
    assert out_dtype is None or out_dtype == torch.float32
    return MM(a, b, out=out) if out_dtype is None else MM(a.float(), b.float(), out=out)


def addmm(base, a, b, *, out_dtype, out):
    assert base is out and out_dtype == torch.float32
    return ADDMM(base, a.float(), b.float(), out=out)


def refuse(*arguments, message: str, **options):
    raise RuntimeError(message)


@pytest.fixture
def torch_that_has(monkeypatch: pytest.MonkeyPatch):
    """Return a function that lets the CPU's torch have some of a GPU's products."""

    def have(*forms: str) -> None:
        products._form.cache_clear()
        no = {name: partial(refuse, message=f"{name} is not supported for ROCm\nC++ stack") for name in ("mm", "addmm")}

        def upcast_only(a, b, *, out_dtype=None, out=None):
            return no["mm"]() if out_dtype is not None else MM(a, b, out=out)

        monkeypatch.setattr(torch, "mm", mm if "mm" in forms else upcast_only)
        monkeypatch.setattr(torch, "addmm", addmm if "addmm" in forms else no["addmm"])

    yield have
    products._form.cache_clear()


def operands(dtype: torch.dtype, rows: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(50, rows, generator=generator).to(dtype).T  # as in the gradient of a head
    b = torch.randn(50, 21, generator=generator).to(dtype)
    base = torch.randn(rows, 21, generator=generator)
    return a, b, base, a.double() @ b.double()


CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("forms", "found"), [(("mm", "addmm"), "addmm"), (("mm",), "mm"), ((), "upcast")])
def test_what_a_torch_lacks_costs_no_digits(torch_that_has, monkeypatch, forms, found, dtype) -> None:
    torch_that_has(*forms)
    monkeypatch.setattr(products, "SCRATCH", 1)  # many parts: 128 rows each
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        form = [products._form(CPU, dtype, False) for _ in range(3)]
    assert form == [found] * 3
    assert len(caught) == (found == "upcast"), "a warning once, and only where it is slow"
    a, b, base, exact = operands(dtype, rows=300)
    out = torch.full_like(base, float("nan"))
    assert products.multiply(found, a, b, out, add=False) is out
    assert (out - exact).abs().max() < 1e-5  # rounding to 16 bit would cost 1e-2
    out = base.clone()
    assert products.multiply(found, a, b, out, add=True) is out
    assert (out - (exact + base)).abs().max() < 1e-5


def test_the_warning_says_what_was_refused_and_what_cures_it(torch_that_has, monkeypatch) -> None:
    torch_that_has()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.warns(UserWarning, match=r"bfloat16 operands .* on cpu \(mm is not supported for ROCm\).*torch 2\.10"):
        products._form(CPU, torch.bfloat16, False)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.warns(UserWarning, match=r"unset torch\.backends\.cuda\.matmul\.allow_fp16_accumulation"):
        products._form(CPU, torch.float16, True)
    with pytest.warns(UserWarning, match=r"compute capability 8\.0"):
        products._form(CPU, torch.float16, False)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_gpu_in_trouble_is_not_taken_for_one_that_lacks_a_form(torch_that_has, monkeypatch, error) -> None:
    torch_that_has("mm", "addmm")

    def trouble(*arguments, **options):
        raise error("trouble")

    monkeypatch.setattr(torch, "addmm", trouble)
    with pytest.raises(error):
        products._form(CPU, torch.bfloat16, False)
    monkeypatch.setattr(torch, "addmm", addmm)
    assert products._form(CPU, torch.bfloat16, False) == "addmm", "nor is it remembered"


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.float32)])
def test_operands_on_a_cpu_are_upcast(dtypes) -> None:
    a, b, base, _ = operands(torch.bfloat16)
    a, b = a.to(dtypes[0]), b.to(dtypes[1])
    result = products.product(a, b)
    assert result.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    torch.testing.assert_close(result.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    out = base.to(result.dtype, copy=True)
    assert products.product(a, b, out, add=True) is out
    torch.testing.assert_close(out, base + result)


def test_autocast_does_not_round_a_product() -> None:
    a, b, _, exact = operands(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        result = products.product(a, b)
    assert result.dtype == torch.float32
    assert (result - exact).abs().max() < 1e-5


@pytest.mark.skipif(version_of(torch.__version__) < (2, 9), reason="torch 2.8 has no shapes of these products")
def test_shapes_alone_multiply_without_a_gpu() -> None:
    with FakeTensorMode():
        a = torch.empty(8, 16, dtype=torch.bfloat16, device="cuda")
        b = torch.empty(16, 4, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(8, 4, device="cuda")
        assert products.product(a, b).dtype == torch.float32
        for add in (False, True):
            assert products.product(a, b, out, add=add) is out
