"""The kernels of `gathered_logprob` in Triton's interpreter against float64 autograd."""

import math

import pytest
import torch
from torch import Tensor

from mopl.ops import gathered_logprob
from mopl.ops import gathered_logprob_triton as triton_path


def guarded(x: Tensor) -> Tensor:
    """Put a matrix between bands of NaN, with rows that are apart: reads and writes out of bounds show."""
    rows, columns = x.shape
    store = torch.full((rows + 2, columns + 24), math.nan, dtype=x.dtype)
    view = store[1:-1, 8 : 8 + columns]
    view.copy_(x)
    return view


def reference(
    logits: Tensor, target: Tensor, temperature: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u = softcap * torch.tanh(logits / softcap) if softcap else logits
    u = u / temperature[:, None]
    lse = u.logsumexp(-1)
    log_p = u - lse[:, None]
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0, p * log_p.masked_fill(p == 0, 0)).sum(-1)
    mean = torch.where(p == 0, 0, p * u.masked_fill(p == 0, 0)).sum(-1, keepdim=True)
    variance = torch.where(p == 0, 0, p * (u.masked_fill(p == 0, 0) - mean).square()).sum(-1)
    counts = target >= 0
    picked = log_p.gather(-1, target.clamp(min=0))
    live = counts.any(-1)
    return torch.where(counts, picked, 0), lse * live, entropy * live, variance * live


def case(rows: int, vocabulary: int, targets: int, dtype: torch.dtype, scale: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=generator) * scale).to(dtype)
    target = torch.randint(0, vocabulary, (rows, targets), generator=generator)
    target[torch.rand(rows, targets, generator=generator) < 0.2] = -1
    if rows > 1:
        target[1] = -1
    if targets > 2:
        target[0, :3] = target[0, 0].clamp(min=0)  # the same token several times
    temperature = torch.rand(rows, generator=generator) + 0.5
    upstream = [torch.randn(rows, targets, generator=generator), *torch.randn(2, rows, generator=generator)]
    return logits, target, temperature, upstream


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "targets", "dtype", "scale"),
    [
        (5, 37, 1, torch.float32, 3.0),
        (3, 1, 1, torch.float32, 1.0),
        (4, 9000, 1, torch.float32, 2.0),  # more than one block
        (4, 300, 5, torch.float32, 30.0),
        (4, 300, 1, torch.bfloat16, 8.0),
        (4, 2500, 3, torch.float64, 5.0),
        (2, 64, 1, torch.float32, 1e4),
    ],
)
def test_kernels_equal_float64(
    rows: int, vocabulary: int, targets: int, dtype: torch.dtype, scale: float, softcap: float
) -> None:
    logits, target, temperature, upstream = case(rows, vocabulary, targets, dtype, scale, rows + vocabulary)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    exact = logits.double().requires_grad_()
    expected = reference(exact, target, temperature.to(compute).double(), softcap)
    (expected_grad,) = torch.autograd.grad(
        (expected[0] * upstream[0]).sum() + (expected[1] * upstream[1]).sum() + (expected[2] * upstream[2]).sum(), exact
    )
    view = guarded(logits)
    temperature = temperature.to(compute)
    results = triton_path.launch_forward(view, target, temperature, softcap, True, True)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for name, ours, theirs in zip(("logprob", "logsumexp", "entropy", "variance"), results, expected, strict=True):
        size = max(1.0, float(theirs.detach().abs().max()))
        error = float((ours.double() - theirs).abs().max()) / size
        assert error <= tolerance * (30 if name == "variance" else 3), (name, error)
    grad = guarded(torch.full_like(logits, math.nan))
    triton_path.launch_backward(
        *(g.to(compute) for g in upstream), view, target, temperature, *results[:3], softcap, grad
    )
    error = float((grad.double() - expected_grad).abs().max()) / float(expected_grad.abs().max().clamp(min=1e-300))
    # bf16: the interpreter truncates where a GPU rounds, one unit in the last place.
    limit = {torch.bfloat16: 2**-7, torch.float64: 1e-12}.get(dtype, 3e-6)
    assert error <= limit, error
    assert not grad[1].any() if rows > 1 else True
    again = view
    triton_path.launch_backward(
        *(g.to(compute) for g in upstream), view, target, temperature, *results[:3], softcap, again
    )
    assert torch.equal(again, grad), "in place"


def test_a_confident_row_keeps_every_digit() -> None:
    logits = torch.zeros(1, 40)
    logits[0, 7] = 45.0
    target, one = torch.tensor([[7]]), torch.ones(1)
    logprob, lse, entropy, _ = triton_path.launch_forward(logits, target, one, 0.0, True, True)
    exact = -math.log1p(39 * math.exp(-45))
    assert float(logprob) == pytest.approx(exact, rel=2e-6)
    grad = torch.empty_like(logits)
    triton_path.launch_backward(torch.ones(1, 1), None, None, logits, target, one, logprob, lse, entropy, 0.0, grad)
    rest = 39 * math.exp(-45) / (1 + 39 * math.exp(-45))
    assert float(grad[0, 7]) == pytest.approx(rest, rel=5e-6)
    assert float(grad[0, 0]) == pytest.approx(-rest / 39, rel=5e-6)


def test_probabilities_keep_their_digits_where_another_token_is_likelier() -> None:
    """A float32 of 80 has steps of 8e-6: the logsumexp of such a row must not be rounded several times."""
    rows, vocabulary = 40, 60
    logits, temperature = torch.randn(rows, vocabulary), torch.rand(rows) + 0.5
    target, liked = torch.zeros(rows, 1, dtype=torch.int64), torch.arange(rows) % 50 + 1
    logits[torch.arange(rows), liked] += torch.linspace(10, 60, rows)
    upstream = torch.randn(rows, 1)
    results = triton_path.launch_forward(logits, target, temperature, 0.0, False, False)
    grad = torch.empty_like(logits)
    triton_path.launch_backward(upstream, None, None, logits, target, temperature, *results[:3], 0.0, grad)
    exact = logits.double().requires_grad_()
    value, lse, *_ = reference(exact, target, temperature.double(), 0.0)
    (wanted,) = torch.autograd.grad(value, exact, upstream.double())
    steps = torch.finfo(torch.float32).eps * lse.detach().abs()
    assert bool(((results[1].double() - lse).abs() <= 0.6 * steps).all())
    assert float((grad.double() - wanted).norm() / wanted.norm()) < 3e-7


def test_minus_infinity_is_a_forbidden_token_and_not_a_nan() -> None:
    logits = torch.randn(2, 50)
    logits[:, 10:20] = -math.inf
    target, ones = torch.tensor([[3], [12]]), torch.ones(2)
    logprob, lse, entropy, _ = triton_path.launch_forward(logits, target, ones, 0.0, True, True)
    assert float(logprob[0]) == pytest.approx(float(logits[0].double().log_softmax(-1)[3]), rel=1e-6)
    assert float(logprob[1]) == -math.inf
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    grad = torch.empty_like(logits)
    triton_path.launch_backward(
        torch.ones(2, 1), None, torch.ones(2), logits, target, ones, logprob, lse, entropy, 0.0, grad
    )
    assert not grad.isnan().any() and not grad[0, 10:20].any()


def test_rows_that_do_not_count_are_not_read_and_silent_rows_are_zeroed() -> None:
    logits = torch.full((3, 20), math.nan)
    logits[2] = torch.randn(20)
    target, ones = torch.tensor([[-1], [-1], [4]]), torch.ones(3)
    logprob, lse, entropy, variance = triton_path.launch_forward(logits, target, ones, 0.0, True, True)
    assert not any(x[:2].any() for x in (logprob, lse, entropy, variance))
    grad = torch.full_like(logits, math.nan)
    triton_path.launch_backward(torch.zeros(3, 1), None, None, logits, target, ones, logprob, lse, entropy, 0.0, grad)
    assert not grad.any()


@pytest.mark.usefixtures("careful_memory")
@pytest.mark.parametrize("vocabulary", [1, 37, 50, 9000])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_output_is_written_once_and_nothing_else_is_touched(
    dtype: torch.dtype, targets: int, vocabulary: int
) -> None:
    logits, target, temperature, upstream = case(4, vocabulary, targets, dtype, 2.0, 1)
    results = triton_path.launch_forward(logits, target, temperature, 0.0, True, True)
    assert not any(result.isnan().any() for result in results)
    grad = torch.full_like(logits, math.nan)
    triton_path.launch_backward(*upstream, logits, target, temperature, *results[:3], 0.0, grad)
    assert not grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aligned_rows_of_a_ragged_vocabulary_keep_their_padding(dtype: torch.dtype) -> None:
    logits, target, temperature, upstream = case(3, 9000, 2, dtype, 2.0, 5)
    view, grad = guarded(logits), guarded(torch.full_like(logits, math.nan))
    assert triton_path._padded(view) and not triton_path._padded(logits)
    results = triton_path.launch_forward(view, target, temperature, 0.0, True, True)
    plain = triton_path.launch_forward(logits, target, temperature, 0.0, True, True)
    assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))
    triton_path.launch_backward(*upstream, view, target, temperature, *results[:3], 0.0, grad)
    wanted = torch.empty_like(logits)
    triton_path.launch_backward(*upstream, logits, target, temperature, *results[:3], 0.0, wanted)
    assert torch.equal(grad, wanted)
    assert grad._base is not None and int(grad._base.isnan().sum()) == grad._base.numel() - grad.numel()


def test_gradients_of_padded_rows_are_padded() -> None:
    logits = torch.randn(3, 48)[:, :37].detach().requires_grad_()  # leaves may be views of the memory of others
    assert logits.stride() == (48, 1)
    target = torch.tensor([1, 36, 5])
    (gradient,) = torch.autograd.grad(gathered_logprob(logits, target).sum(), logits)
    assert gradient.stride() == (48, 1)
    exact = -logits.detach().double().softmax(-1)
    exact[torch.arange(3), target] += 1
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)
    compiled = torch.compile(lambda x: gathered_logprob(x, target).sum(), fullgraph=True, backend="aot_eager")
    (again,) = torch.autograd.grad(compiled(logits), logits)
    assert again.stride() == gradient.stride() and torch.equal(again, gradient)


def test_rows_beyond_what_a_launch_holds_go_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, temperature, upstream = case(7, 40, 2, torch.float32, 2.0, 5)

    def run() -> list[Tensor]:
        results = triton_path.launch_forward(logits, target, temperature, 0.0, True, True)
        grad = torch.empty_like(logits)
        triton_path.launch_backward(*upstream, logits, target, temperature, *results[:3], 0.0, grad)
        return [*results, grad]

    whole = run()
    monkeypatch.setattr(triton_path, "MAX_PROGRAMS", 3)
    assert all(torch.equal(a, b) for a, b in zip(run(), whole, strict=True))


@pytest.mark.parametrize("logit", [-2000.0, -89.0, 0.0, 89.0, 2000.0])
def test_one_allowed_token_is_certain_whatever_its_logit(logit: float) -> None:
    logits = torch.full((3, 40), -math.inf)
    logits[:2, 2] = logit  # the target, and not the target; the last row allows nothing
    target, temperature = torch.tensor([[2], [0], [1]]), torch.full((3,), 0.5)
    logprob, logsumexp, entropy, variance = triton_path.launch_forward(logits, target, temperature, 0.0, True, True)
    assert logprob[:, 0].tolist() == [0.0, -math.inf, -math.inf]
    torch.testing.assert_close(logsumexp, torch.tensor([2 * logit, 2 * logit, -math.inf]), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy[:2], torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance[:2], torch.zeros(2), rtol=0, atol=1e-6)
    assert entropy[2].isnan() and variance[2].isnan()
    gradient = torch.empty_like(logits[:2])
    upstream = (torch.tensor([[3.0], [0.0]]), torch.ones(2), torch.full((2,), 7.0))
    statistics = (logprob[:2], logsumexp[:2], entropy[:2])
    triton_path.launch_backward(
        *upstream, logits[:2], target[:2].contiguous(), temperature[:2], *statistics, 0.0, gradient
    )  # fmt: skip
    expected = torch.zeros(2, 40).index_fill(1, torch.tensor([2]), 2.0)
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=0)


def test_second_derivatives_through_the_kernels() -> None:
    from mopl.ops import gathered_logprob

    logits, target = torch.randn(3, 9, dtype=torch.float64, requires_grad=True), torch.tensor([1, -100, 8])
    temperature = torch.tensor([0.7, 1.0, 1.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, t: gathered_logprob(x, target, temperature=t, softcap=2.0, return_entropy=True),
        (logits, temperature),
        fast_mode=True,
    )
