"""Log-probabilities from hidden states on a CPU: plain formulas, exactness, what does not count, errors."""

import importlib
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mopl
from mopl import reference_logprob
from mopl.ops import linear_logprob
from mopl.ops.linear_logprob import cpu

ALL = dict(return_logsumexp=True, return_entropy=True)


def test_the_function_bears_the_name_of_its_package() -> None:
    """And is found by either way of importing it, by pickle, too."""
    package = importlib.import_module("mopl.ops.linear_logprob")
    assert package.linear_logprob is mopl.ops.linear_logprob is mopl.linear_logprob
    assert pickle.loads(pickle.dumps(linear_logprob)) is linear_logprob


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ragged tiles in each direction."""
    for name, value in {"COLUMNS": 7, "ROWS": 5, "GATHER": 3}.items():
        monkeypatch.setattr(cpu, name, value)


def leaf(value: Tensor, wanted: bool = True) -> Tensor:
    return value.detach().clone().requires_grad_(wanted)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest error as a share of the largest entry."""
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------- every mode equals the plain formulas


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "shared rows"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("train", ["h", "w", "b", "t", "ht", "hw", "hwbt"])
def test_outputs_and_gradients_equal_the_plain_formulas(train: str, softcap: float | None, shared: bool) -> None:
    for masked, workspace, biased in itertools.product((False, True), (0, 8 * 37 * 4, 2**31), (False, True)):
        rows, entries = 13, 17 if shared else 13
        kinds = dict(dtype=torch.float64)
        hidden, weight = (
            leaf(torch.randn(rows, 6, **kinds), "h" in train),
            leaf(torch.randn(37, 6, **kinds), "w" in train),
        )
        bias = leaf(torch.randn(37, **kinds), "b" in train) if biased or "b" in train else None
        temperature = leaf(torch.rand(rows, **kinds) + 0.5, "t" in train)
        row = torch.randint(rows, (entries,)) if shared else None
        target = torch.randint(37, (entries,))
        mask = torch.rand(entries) > 0.4 if masked else None
        options = dict(bias=bias, temperature=temperature, softcap=softcap, logit_scale=1.3, mask=mask, row=row)
        actual = linear_logprob(hidden, weight, target, workspace=workspace, **options, **ALL)
        expected = reference_logprob.linear_logprob(hidden, weight, target, **options)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)

        inputs = [t for t in (hidden, weight, bias, temperature) if t is not None and t.requires_grad]
        upstream = [torch.randn_like(a) for a in actual]
        for chosen in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
            gradients = []
            for outputs in (actual, expected):
                loss = sum((o * u).sum() for o, u, use in zip(outputs, upstream, chosen, strict=True) if use)
                parts = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
                gradients.append([torch.zeros_like(i) if g is None else g for g, i in zip(parts, inputs, strict=True)])
            for a, e in zip(*gradients, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap: float | None) -> None:
    hidden, weight, bias = (leaf(torch.randn(*s, dtype=torch.float64)) for s in ((6, 4), (11, 4), (11,)))
    temperature = leaf(torch.rand(6, dtype=torch.float64) + 0.5)
    target, row = torch.randint(11, (9,)), torch.tensor([0, 1, 1, 2, 2, 2, 5, 5, 3])

    def run(h: Tensor, w: Tensor, b: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return linear_logprob(h, w, target, bias=b, temperature=t, softcap=softcap, row=row, **ALL)  # type: ignore

    assert torch.autograd.gradcheck(run, (hidden, weight, bias, temperature))
    assert torch.autograd.gradcheck(lambda h: run(h, weight.detach(), bias.detach(), temperature.detach()), (hidden,))


@pytest.mark.parametrize("shape", [(2, 3), (5,), (1, 1, 4)])
def test_shapes_follow_hidden_and_target(shape: tuple[int, ...]) -> None:
    hidden, weight = torch.randn(*shape, 8), torch.randn(10, 8)
    logprob, logsumexp, entropy = linear_logprob(hidden, weight, torch.randint(10, shape), **ALL)
    assert logprob.shape == logsumexp.shape == entropy.shape == shape
    row = torch.zeros(3, 2, dtype=torch.int32)
    logprob, logsumexp = linear_logprob(
        hidden, weight, torch.randint(10, (3, 2)), row=row, return_logsumexp=True, temperature=torch.ones(shape[-1])
    )
    assert logprob.shape == (3, 2) and logsumexp.shape == shape
    assert isinstance(linear_logprob(hidden, weight, torch.randint(10, shape)), Tensor)


def test_it_is_minus_the_cross_entropy_of_torch() -> None:
    hidden, weight = leaf(torch.randn(50, 16)), leaf(torch.randn(300, 16))
    target, upstream = torch.randint(300, (50,)), torch.randn(50)
    target[::7] = -100
    pairs = []
    for logprob in (
        linear_logprob(hidden, weight, target),
        -F.cross_entropy(hidden @ weight.T, target, reduction="none"),
    ):
        pairs.append((logprob, *torch.autograd.grad((logprob * upstream).sum(), (hidden, weight))))
    for a, e in zip(*pairs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-5)


def test_more_rows_than_65536() -> None:
    hidden, weight, target = torch.randn(70_000, 3), torch.randn(5, 3), torch.randint(5, (70_000,))
    hidden.requires_grad_()
    logprob = linear_logprob(hidden, weight, target)
    expected = reference_logprob.linear_logprob(hidden, weight, target)[0]
    torch.testing.assert_close(logprob, expected)
    upstream = torch.randn(70_000)
    for a, e in zip(*(torch.autograd.grad(x, hidden, upstream) for x in (logprob, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_rows_are_the_same_whatever_the_other_rows_are() -> None:
    hidden, weight, target = torch.randn(9, 8), torch.randn(40, 8), torch.randint(40, (9,))
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1], dtype=torch.bool)
    whole, some = linear_logprob(hidden, weight, target), linear_logprob(hidden, weight, target, mask=mask)
    torch.testing.assert_close(some[mask], whole[mask], rtol=1e-6, atol=1e-6)
    assert not some[~mask].any()


# ---------------------------------------------------------------- exactness


def fp32_reference(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> list[Tensor]:
    """Log-probability and gradients from float32 logits; gradients rounded once to the dtype of the operands."""
    h, w = leaf(hidden.float()), leaf(weight.float())
    logprob = reference_logprob.linear_logprob(h, w, target)[0]
    gradients = torch.autograd.grad((logprob * upstream).sum(), (h, w))
    return [logprob.detach(), *(g.to(hidden.dtype) for g in gradients)]


@pytest.mark.parametrize("peak", [1.0, 12.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_that_of_float32_logits(dtype: torch.dtype, peak: float) -> None:
    rows, vocabulary, size = 252, 507, 123
    hidden, weight = torch.randn(rows, size).to(dtype), (torch.randn(vocabulary, size) * peak / size**0.5).to(dtype)
    target, upstream = torch.randint(vocabulary, (rows,)), torch.randn(rows)
    target[::3] = (hidden.float() @ weight.float().T).argmax(1)[::3]
    h, w = leaf(hidden.double()), leaf(weight.double())
    exact = reference_logprob.linear_logprob(h, w, target)[0]
    truth = [exact, *torch.autograd.grad((exact * upstream).sum(), (h, w))]
    theirs = fp32_reference(hidden, weight, target, upstream)
    for frozen, workspace in ((True, 0), (False, 0), (False, 2**31)):
        a, b = leaf(hidden), leaf(weight, not frozen)
        logprob = linear_logprob(a, b, target, workspace=workspace)
        assert logprob.dtype == torch.float32
        ours = [logprob, *torch.autograd.grad((logprob * upstream).sum(), (a,) if frozen else (a, b))]
        for mine, reference, exactly in zip(ours, theirs, truth, strict=False):
            assert relative(mine, exactly) <= 2 * relative(reference, exactly) + 1e-8
            norm = (mine.double() - exactly).norm() / exactly.norm()
            assert norm <= 2 * (reference.double() - exactly).norm() / exactly.norm() + 1e-8


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_confident_rows_keep_every_digit(dtype: torch.dtype, frozen: bool) -> None:
    """1 - p runs from 1e-2 to 1e-11: log-probability and gradient are right in relative terms."""
    gap = torch.linspace(5, 25, 9)
    hidden = torch.cat([gap[:, None], torch.randn(9, 7) * 0.1], 1).to(dtype)
    weight = torch.cat([torch.tensor([1.0] + [0.0] * 29)[:, None], torch.randn(30, 7) * 0.1], 1).to(dtype)
    h, w, target = leaf(hidden.double()), leaf(weight.double(), not frozen), torch.zeros(9, dtype=torch.long)
    exact = -((h @ w.T)[:, 1:] - (h @ w.T)[:, :1]).exp().sum(1).log1p()
    a, b = leaf(hidden), leaf(weight, not frozen)
    logprob = linear_logprob(a, b, target)
    torch.testing.assert_close(logprob.double(), exact, rtol=2e-5, atol=0)
    # One row at a time, scaled up as a loss scaler does, lest float16 cannot hold the gradient.
    for row in range(9):
        scale = (1 / -exact[row]).item()
        mine = torch.autograd.grad(logprob[row] * scale, a, retain_graph=True)[0][row].double()
        truth = torch.autograd.grad(exact[row] * scale, h, retain_graph=True)[0][row]
        assert (mine - truth).norm() / truth.norm() < (1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
        if not frozen:
            mine = torch.autograd.grad(logprob[row] * scale, b, retain_graph=True)[0].double()
            truth = torch.autograd.grad(exact[row] * scale, w, retain_graph=True)[0]
            assert (mine - truth).norm() / truth.norm() < (
                1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("train", ["h", "hw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_of_probability_below_e_to_minus_128(dtype: torch.dtype, train: str) -> None:
    """The shift is raised in any tile, more than once, and what was kept before is scaled along."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for order in (1, -1):
        levels = order * torch.linspace(-300, 300, 37, dtype=dtype)
        hidden = torch.cat([torch.ones(6, 1, dtype=dtype), torch.randn(6, 4, dtype=dtype)], 1)
        weight = torch.cat([levels[:, None], torch.randn(37, 4, dtype=dtype)], 1)
        target, upstream = torch.tensor([0, 5, 11, 18, 30, 36]), torch.randn(3, 6, dtype=dtype)
        results = []
        for kind in (dtype, torch.float64):
            a, b = leaf(hidden.to(kind)), leaf(weight.to(kind), "w" in train)
            run = linear_logprob if kind is dtype and not results else reference_logprob.linear_logprob
            outputs = run(a, b, target, **(ALL if run is linear_logprob else {}))
            loss = sum((o * u).sum() for o, u in zip(outputs, upstream.to(kind), strict=True))
            results.append([*outputs, *torch.autograd.grad(loss, (a, b) if "w" in train else (a,))])
        assert results[1][0].min() < -500
        for number, (a, e) in enumerate(zip(*results, strict=True)):
            # The entropy of these rows is 1e-6 and less: right to the dtype's absolute precision.
            assert relative(a, e) * (e.abs().max() if number == 2 else 1) < tolerance


@pytest.mark.parametrize("train", ["h", "hw"])
def test_logits_of_minus_infinity_have_probability_and_gradient_zero(train: str) -> None:
    bias = torch.zeros(12)
    bias[[3, 7, 11]] = -math.inf
    target, upstream = torch.tensor([0, 1, 2, 4]), torch.randn(3, 4)
    keep = bias == 0
    hidden, weight = torch.randn(4, 5), torch.randn(12, 5)
    a, b = leaf(hidden), leaf(weight, "w" in train)
    outputs = linear_logprob(a, b, target, bias=bias, **ALL)
    sum((o * u).sum() for o, u in zip(outputs, upstream, strict=True)).backward()
    c, d = leaf(hidden), leaf(weight[keep], "w" in train)
    expected = reference_logprob.linear_logprob(c, d, torch.tensor([0, 1, 2, 3]))
    sum((o * u).sum() for o, u in zip(expected, upstream, strict=True)).backward()
    for actual, e in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, e)
    torch.testing.assert_close(a.grad, c.grad)
    if "w" in train:
        torch.testing.assert_close(b.grad[keep], d.grad)
        assert not b.grad[~keep].any()
    # A target that cannot be has log-probability -inf, and its row's gradient is that of the others.
    logprob = linear_logprob(a, b, torch.tensor([3, 1, 2, 4]), bias=bias)
    assert logprob[0] == -math.inf and logprob[1:].isfinite().all()
    assert torch.autograd.grad(logprob.sum(), a)[0].isfinite().all()


def test_logits_are_not_rounded_to_16_bit_as_in_trl() -> None:
    chunked = pytest.importorskip("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    hidden, weight = torch.randn(64, 96).bfloat16(), torch.randn(500, 96).mul_(0.5).bfloat16()
    target = torch.randint(500, (64,))
    exact = reference_logprob.linear_logprob(hidden.double(), weight.double(), target)[0]
    theirs = chunked.apply(hidden, weight, None, target, 1.0, 8192, None, 1.0, ())[0]
    assert relative(linear_logprob(hidden, weight, target), exact) < relative(theirs, exact) / 100


def test_a_head_in_another_dtype_than_the_hidden_states() -> None:
    hidden, weight, target = torch.randn(5, 8).bfloat16(), torch.randn(11, 8), torch.randint(11, (5,))
    expected = linear_logprob(hidden.float(), weight, target)
    a, b = leaf(hidden), leaf(weight)
    logprob = linear_logprob(a, b, target)
    torch.testing.assert_close(logprob, expected, rtol=0, atol=0)
    logprob.sum().backward()
    assert a.grad.dtype == torch.bfloat16 and b.grad.dtype == torch.float32
    assert linear_logprob(hidden, weight.double(), target).dtype == torch.float64


# ---------------------------------------------------------------- what does not count


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("train", ["h", "w", "hwbt"])
@pytest.mark.parametrize("shared", [False, True])
def test_masked_rows_of_nan_are_not_read(train: str, shared: bool) -> None:
    hidden, weight, bias = (
        torch.randn(9, 6),
        leaf(torch.randn(23, 6), "w" in train),
        leaf(torch.randn(23), "b" in train),
    )
    temperature = torch.rand(9) + 0.5
    dead = torch.tensor([0, 4, 5, 8])
    hidden[dead], temperature[dead] = math.nan, math.nan
    hidden, temperature = leaf(hidden, "h" in train), leaf(temperature, "t" in train)
    target, mask = torch.randint(23, (9,)), torch.ones(9, dtype=torch.bool)
    mask[dead[:2]], target[dead[2:]] = False, -7
    row = torch.arange(9) if shared else None
    outputs = linear_logprob(
        hidden, weight, target, bias=bias, temperature=temperature, mask=mask, ignore_index=-7, row=row, **ALL
    )
    assert all(not o[dead].any() and o.isfinite().all() for o in outputs)
    # Upstream gradients of what does not count may be anything.
    upstream = torch.randn(3, 9).index_fill_(1, dead, math.nan)
    inputs = [t for t in (hidden, weight, bias, temperature) if t.requires_grad]
    for gradient in torch.autograd.grad(outputs, inputs, tuple(upstream)):
        assert gradient.isfinite().all() and gradient.any()
        if len(gradient) == 9:
            assert not gradient[dead].any()


@pytest.mark.parametrize("train", ["", "h", "hw"])
def test_all_rows_masked_and_no_rows_at_all(train: str) -> None:
    for rows, mask in ((4, torch.zeros(4, dtype=torch.bool)), (0, None)):
        hidden, weight = leaf(torch.full((rows, 6), math.nan), "h" in train), leaf(torch.randn(9, 6), "w" in train)
        for row in (None, torch.zeros(rows, dtype=torch.long)):
            target = torch.zeros(rows, dtype=torch.long)
            outputs = linear_logprob(hidden, weight, target, mask=mask, row=row, **ALL)
            assert all(o.shape == (rows,) and not o.any() for o in outputs)
            if train:
                inputs = [t for t in (hidden, weight) if t.requires_grad]
                gradients = torch.autograd.grad(sum(o.sum() for o in outputs), inputs)
                assert all(not g.any() for g in gradients)


def test_rows_that_no_target_points_at_are_not_read() -> None:
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    hidden[[1, 3]] = math.nan
    hidden.requires_grad_()
    row, target = torch.tensor([0, 2, 2, 5, 4, 4]), torch.randint(9, (6,))
    logprob, entropy = linear_logprob(hidden, weight, target, row=row, return_entropy=True)
    assert logprob.isfinite().all() and (entropy == 0).nonzero()[:, 0].tolist() == [1, 3]
    assert not torch.autograd.grad(logprob.sum() + entropy.sum(), hidden)[0][[1, 3]].any()


# ---------------------------------------------------------------- errors


def test_errors_name_the_argument_its_shape_and_the_remedy() -> None:
    hidden, weight, target = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 2])
    cases = [
        ((hidden, weight.T, target), {}, ValueError, r"weight \(4, 7\).*transpose"),
        ((hidden, torch.randn(0, 4), target), {}, ValueError, "no vocabulary"),
        ((hidden, weight.long(), target), {}, TypeError, r"weight\.float\(\)"),
        ((hidden.long(), weight, target), {}, TypeError, r"hidden\.float\(\)"),
        ((hidden, weight, target.float()), {}, TypeError, r"target\.long\(\)"),
        ((hidden, weight, target[:2]), {}, ValueError, r"target has shape \(2,\).*\(3,\)"),
        ((hidden, weight, target + 5), {}, ValueError, "vocabulary size 7"),
        ((hidden, weight, target - 1), {}, ValueError, "ignore_index"),
        ((hidden, weight, target), {"bias": torch.zeros(6)}, ValueError, r"bias has shape \(6,\).*\(7,\)"),
        ((hidden, weight, target), {"mask": torch.ones(3)}, TypeError, r"mask\.bool\(\)"),
        ((hidden, weight, target), {"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask has shape \(2,\)"),
        ((hidden, weight, target), {"row": torch.zeros(2).long()}, ValueError, r"row has shape \(2,\)"),
        ((hidden, weight, target), {"row": torch.tensor([0, 1, 3])}, ValueError, "hidden has 3 rows"),
        ((hidden, weight, target), {"temperature": torch.ones(2)}, ValueError, r"temperature has shape \(2,\)"),
        ((hidden, weight, target), {"temperature": 0.0}, ValueError, "temperature is 0"),
        ((hidden, weight, target), {"softcap": -1.0}, ValueError, "softcap is -1"),
        ((hidden, weight, target), {"workspace": -1}, ValueError, "workspace is -1"),
        ((hidden, weight, target), {"max_rows": 2}, ValueError, "max_rows is 2 but 3 rows count"),
        ((hidden, weight.to("meta"), target), {}, ValueError, "weight is on meta but hidden is on cpu"),
    ]
    for arguments, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            linear_logprob(*arguments, **options)


def test_unchecked_targets_outside_the_vocabulary_give_nan() -> None:
    hidden, weight = leaf(torch.randn(4, 4)), torch.randn(7, 4)
    target = torch.tensor([0, 9, -3, 6])
    for row in (None, torch.arange(4)):
        logprob = linear_logprob(hidden, weight, target, row=row, check_targets=False)
        assert logprob.isnan().tolist() == [False, True, True, False]
        gradient = torch.autograd.grad(logprob.sum(), hidden)[0]
        assert gradient.isnan().any(1).tolist() == [False, True, True, False]
