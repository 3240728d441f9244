"""KL over the full vocabulary from hidden states: plain formulas in float64, digits, memory, what does not count."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mopl import reference_policy
from mopl.ops import _divergence_blocks as chunks
from mopl.ops import linear_kl
from mopl.ops._divergence import _linear_divergence

DIRECTIONS = ("reverse", "forward")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ragged tiles in each direction."""
    monkeypatch.setattr(chunks, "COLUMNS", {"cpu": 7, "else": 7})
    monkeypatch.setattr(chunks, "ROWS", {"cpu": 5, "else": 5})
    monkeypatch.setattr(chunks, "HELD", {"cpu": 5 * 37 * 8, "else": 5 * 37 * 8})


def leaf(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=dtype)).requires_grad_()


def plain(hidden, weight, reference_hidden, reference_weight, bias, reference_bias, logit_scale, **options) -> Tensor:
    """The formula on whole logits."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    second = reference_hidden @ reference_weight.T + (0 if reference_bias is None else reference_bias)
    return reference_policy.full_vocabulary_kl(logits * logit_scale, second.detach() * logit_scale, **options)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shared", [False, True], ids=["own head", "shared head"])
def test_values_and_gradients_equal_the_plain_formula(shared: bool, softcap: float | None, direction: str) -> None:
    rows = 13
    for biased, masked, train_head in itertools.product((False, True), repeat=3):
        hidden, weight = leaf(rows, 6), leaf(37, 6).requires_grad_(train_head)
        bias = leaf(37).requires_grad_(train_head) if biased else None
        of_reference = leaf(rows, 6 if shared else 4)
        head, head_bias = (weight, bias) if shared else (leaf(37, 4), leaf(37) if biased else None)
        temperature, second = torch.rand(rows).double() + 0.5, torch.rand(rows).double() + 0.5
        options = dict(
            temperature=temperature, reference_temperature=second, softcap=softcap, logit_scale=1.3, direction=direction
        )
        mask = torch.rand(rows) > 0.4 if masked else None
        own = () if shared else (head,)
        extra = {} if shared else {"reference_bias": head_bias}
        actual = linear_kl(hidden, weight, of_reference, *own, bias=bias, mask=mask, **options, **extra)
        # In the oracle the reference's use of a shared head is a constant, too.
        expected = plain(hidden, weight, of_reference, head, bias, head_bias, **options)
        expected = expected if mask is None else torch.where(mask, expected, 0)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)

        inputs = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
        upstream = torch.randn_like(actual)
        for a, e in zip(
            torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
        ):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction: str) -> None:
    hidden, weight, bias = leaf(6, 4), leaf(11, 4), leaf(11)
    reference, head = torch.randn(6, 3).double(), torch.randn(11, 3).double()
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()

    def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kl(h, w, reference, head, bias=b, temperature=0.7, softcap=3.0, mask=mask, direction=direction)  # type: ignore

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h: run(h, weight.detach(), bias.detach()), (hidden,))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 30.0, 300.0])
def test_float32_keeps_its_digits_from_equal_to_peaked_policies(scale: float, direction: str) -> None:
    """`scale` is how far apart the policies are, and how peaked."""
    hidden = torch.randn(64, 8)
    reference = hidden + scale * torch.randn(64, 8)
    hidden, weight = (hidden * max(1.0, scale)).requires_grad_(), torch.randn(50, 8)
    actual = linear_kl(hidden, weight, reference, direction=direction)
    wide = hidden.detach().double().requires_grad_()
    expected = plain(wide, weight.double(), reference.double(), weight.double(), None, None, 1.0, direction=direction)
    upstream = torch.randn(64)
    (gradient,) = torch.autograd.grad(actual, hidden, upstream)
    (exact,) = torch.autograd.grad(expected, wide, upstream.double())
    # Products round logits by 1e-7 of their size, which a small KL (quadratic in the difference) hardly sees.
    size = (hidden.abs() @ weight.abs().T).max().item()
    noise = 3e-8 + (2e-7 * size * (scale + 2e-7 * size) if scale < 1 else 2e-7 * size)
    assert (actual - expected).abs().max() < 4 * noise
    assert (gradient - exact).abs().max() < 4 * max(2e-7 * size, 1e-5 * exact.abs().max())
    assert (actual >= 0).all()


def test_equal_policies_have_no_kl_and_no_gradient() -> None:
    hidden, weight = leaf(20, 8, dtype=torch.float32, scale=5.0), torch.randn(5000, 8)
    for direction in DIRECTIONS:
        kl = linear_kl(hidden, weight, hidden.detach().clone(), direction=direction)
        kl.sum().backward()
        assert (kl == 0).all() and (hidden.grad == 0).all()


def test_logits_of_a_thousand_neither_overflow_nor_vanish() -> None:
    weight = torch.tensor([[1000.0, 0.0], [0.0, 1000.0], [-1000.0, 0.0]])
    hidden = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    reference = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    kl = linear_kl(hidden, weight, reference)
    assert kl.tolist() == [1000.0, 0.0, 0.0]
    kl.sum().backward()
    assert hidden.grad.isfinite().all()
    forward = linear_kl(hidden, weight, reference, direction="forward")
    assert forward.tolist() == [1000.0, 0.0, 0.0]


def test_uniform_against_one_hot_is_known() -> None:
    weight = torch.zeros(6, 1)
    bias = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf, -torch.inf])
    hidden = torch.zeros(1, 1)
    kl = linear_kl(hidden, weight, hidden, weight, bias=bias, reference_bias=torch.zeros(6))
    torch.testing.assert_close(kl, torch.tensor([math.log(6)]))
    assert linear_kl(hidden, weight, hidden, weight, bias=torch.zeros(6), reference_bias=bias).item() == math.inf


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tokens_that_both_policies_forbid_do_not_matter(direction: str) -> None:
    hidden, weight, reference = leaf(9, 5), leaf(30, 5), torch.randn(9, 5).double()
    bias = torch.zeros(30).double()
    forbidden = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 20, 29])  # a whole tile among them
    bias[forbidden] = -torch.inf
    allowed = torch.ones(30).bool()
    allowed[forbidden] = False
    actual = linear_kl(hidden, weight, reference, bias=bias, direction=direction)
    expected = linear_kl(hidden, weight[allowed], reference, direction=direction)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(9).double()
    for a, e in zip(
        torch.autograd.grad(actual, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_rows_are_not_read_and_get_no_gradient(bad: float) -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]]).bool()
    hidden, reference = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    weight = leaf(12, 4, dtype=torch.float32)
    results = []
    for fill in (0.0, bad):
        h = hidden.masked_fill(~mask[..., None], fill).requires_grad_()
        weight.grad = None
        kl = linear_kl(h, weight, reference.masked_fill(~mask[..., None], fill), mask=mask)
        upstream = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).masked_fill(~mask, fill)
        kl.backward(upstream)
        assert kl.shape == (2, 3) and (kl[~mask] == 0).all() and (h.grad[~mask] == 0).all()
        results.append((kl.detach(), h.grad, weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    nothing = linear_kl(hidden.requires_grad_(), weight, reference, mask=torch.zeros(2, 3).bool())
    nothing.sum().backward()
    assert (nothing == 0).all() and (hidden.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_operands_are_computed_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, reference = (torch.randn(*s).to(dtype) for s in ((9, 16), (300, 16), (9, 16)))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_kl(hidden, weight, reference)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = plain(*wide, reference.double(), wide[1].detach(), None, None, 1.0)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(9)
    gradients = torch.autograd.grad(actual, (hidden, weight), upstream)
    exact = torch.autograd.grad(expected, wide, upstream.double())
    for a, e in zip(gradients, exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).abs().max() < 1.01 * (e.to(dtype).double() - e).abs().max() + 1e-5 * e.abs().max()


class Largest(TorchDispatchMode):
    """Remember the largest tensor that any call returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self.numel = max(self.numel, part.numel())
        return result


def test_nothing_as_large_as_the_logits_is_held() -> None:
    rows, width, vocabulary = 700, 8, 30_000
    hidden, reference, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(vocabulary, width)
    heads = [chunks.Head(h, weight, None, torch.ones(rows), 0.0, 1.0) for h in (hidden, reference)]
    with Largest() as seen:
        _, sums, _ = chunks.forward(*heads, 1.0, True)
        chunks.backward(torch.ones(rows), *heads, sums, 1.0, chunks.Need(True, True, False))
    assert seen.numel <= max(chunks.ROWS["cpu"] * chunks.COLUMNS["cpu"], vocabulary * width)
    assert seen.numel < rows * vocabulary / 15


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    hidden, weight, bias = leaf(5, 4), leaf(9, 4), leaf(9)
    mask = torch.tensor([1, 0, 1, 1, 0]).bool() if masked else None
    torch.library.opcheck(
        _linear_divergence,
        (hidden, weight, bias, torch.ones(5).double(), torch.randn(5, 3).double(), torch.randn(9, 3).double(), None,
         torch.ones(5).double(), mask, [0.0, 1.0, 0.0, 1.0, 1.0], False, "linear_kl"),
        raise_exception=True,
    )  # fmt: skip


def test_backward_may_run_twice_and_rejects_a_second_derivative() -> None:
    hidden, weight = leaf(4, 3), leaf(8, 3)
    kl = linear_kl(hidden, weight, torch.randn(4, 3).double())
    first = torch.autograd.grad(kl.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(kl.sum(), (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(kl.sum(), hidden, create_graph=True)
        gradient.sum().backward()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"reference_hidden": torch.zeros(3, 4)}, ValueError, r"of the reference they are \(3, 4\)"),
        ({"reference_weight": torch.zeros(8, 4)}, ValueError, "rows and vocabularies must agree"),
        ({"reference_hidden": torch.zeros(2, 5)}, ValueError, "of the reference: hidden has shape"),
        ({"reference_bias": torch.zeros(9)}, ValueError, "pass reference_weight with it"),
        ({"mask": torch.ones(2)}, ValueError, "mask is torch.float32"),
        ({"direction": "sideways"}, ValueError, "direction is 'sideways'"),
        ({"temperature": torch.ones(2, requires_grad=True)}, ValueError, "temperature wants a gradient"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature has shape"),
        ({"temperature": 0.0}, ValueError, "must be positive"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.long)}, TypeError, "hidden has dtype"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type[Exception], message: str) -> None:
    given = dict(hidden=torch.zeros(2, 4), weight=torch.zeros(9, 4), reference_hidden=torch.zeros(2, 4))
    with pytest.raises(error, match=message):
        linear_kl(**{**given, **change})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bf16_products_of_a_gpu_leave_gradients_their_digits(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    """Operands that stay bf16 there meet the gradient of the logits in two parts; here products of them are exact."""
    used = []

    def parts(value: Tensor, operand: Tensor, cut=chunks._parts) -> tuple[Tensor, ...]:
        used.append(operand.dtype)
        return cut(value, operand)

    rows, width, vocabulary = 48, 64, 1500
    hidden, weight = torch.randn(rows, width), torch.randn(vocabulary, width) * 4 / width**0.5
    near = (hidden + torch.randn(rows, width) / 4).bfloat16()
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    upstream = torch.randn(rows) / rows

    def gradients(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
        kl = linear_kl(hidden.to(dtype), weight.to(dtype), near.to(dtype), direction=direction)
        return torch.autograd.grad(kl, (hidden, weight), upstream.to(kl.dtype))

    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    value = linear_kl(*leaves, near.double(), direction=direction)
    exact = torch.autograd.grad(value, leaves, upstream.double())
    with_floats = gradients()
    monkeypatch.setattr(chunks, "_narrow", lambda operand, dtype: operand.dtype == torch.bfloat16)
    monkeypatch.setattr(chunks, "_parts", parts)
    narrow = gradients()
    assert set(used) == {torch.bfloat16}
    for ours, theirs, truth in zip(narrow, with_floats, exact, strict=True):
        error, allowed = ((x.double() - truth).norm(dim=1) / truth.norm(dim=1) for x in (ours, theirs))
        assert float((error / allowed).max()) < 1.05
