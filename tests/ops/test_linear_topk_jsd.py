"""Divergence from a teacher's cached top-k log-probabilities: plain formulas in float64, tiny tails, faulty caches."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from mopl import reference_logprob
from mopl.ops import _divergence_blocks as blocks
from mopl.ops import linear_jsd, linear_topk_jsd
from mopl.ops.linear_topk_jsd import _linear_topk_jsd

ROWS, WIDTH, VOCABULARY, K = 13, 6, 37, 5


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ragged blocks of rows and tiles of columns."""
    monkeypatch.setattr(blocks, "COLUMNS", {"cpu": 7, "else": 7})
    monkeypatch.setattr(blocks, "ROWS", {"cpu": 5, "else": 5})
    monkeypatch.setattr(blocks, "HELD", {"cpu": 3 * VOCABULARY * 8, "else": 3 * VOCABULARY * 8})


def cached(rows: int = ROWS, vocabulary: int = VOCABULARY, k: int = K, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return ids and log-probabilities of a teacher's likeliest tokens."""
    known, ids = (scale * torch.randn(rows, vocabulary, dtype=torch.float64)).log_softmax(-1).topk(k)
    return ids, known


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 1e-4, 0.3, 0.5, 0.9, 1.0])
def test_values_and_gradients_equal_the_plain_formula(beta: float, tail: bool) -> None:
    for softcap, train, ragged in itertools.product((None, 2.0), ("h", "hw", "hwb", "w"), (False, True)):
        hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64).requires_grad_("h" in train)
        weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64).requires_grad_("w" in train)
        bias = torch.randn(VOCABULARY, dtype=torch.float64).requires_grad_("b" in train)
        temperature = torch.rand(ROWS, dtype=torch.float64) + 0.5
        ids, known = cached()
        mask = None
        if ragged:
            ids[torch.rand(ids.shape) < 0.4] = -100
            ids[3] = -100
            mask = torch.rand(ROWS) > 0.3
        options = dict(temperature=temperature, softcap=softcap, logit_scale=1.3, mask=mask, tail=tail, beta=beta)
        actual = linear_topk_jsd(hidden, weight, ids, known, bias=bias, **options)
        u = 1.3 * (hidden @ weight.T + bias)
        u = (u if softcap is None else softcap * torch.tanh(u / softcap)) / temperature[:, None]
        expected = reference_logprob.topk_jsd(u, ids, known, beta, tail)
        expected = expected if mask is None else torch.where(mask, expected, 0)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-12)
        leaves = [t for t in (hidden, weight, bias) if t.requires_grad]
        upstream = torch.randn(ROWS, dtype=torch.float64)
        for _ in range(2):
            found = torch.autograd.grad(actual, leaves, upstream, retain_graph=True)
            exact = torch.autograd.grad(expected, leaves, upstream, retain_graph=True)
            for a, e in zip(found, exact, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_all_ids_give_the_divergence_over_the_vocabulary_and_fewer_give_less(beta: float) -> None:
    hidden, weight = torch.randn(2, 4, WIDTH).double().requires_grad_(), torch.randn(VOCABULARY, WIDTH).double()
    teacher = torch.randn(2, 4, WIDTH).double()
    known, ids = (teacher @ weight.T).log_softmax(-1).sort(-1, descending=True)
    whole = linear_jsd(hidden, weight, teacher, beta=beta)
    values = [linear_topk_jsd(hidden, weight, ids[..., :k], known[..., :k], beta=beta) for k in (1, 4, 20)]
    for less, more in itertools.pairwise([*values, whole]):
        assert (less <= more + 1e-12).all()
    full = linear_topk_jsd(hidden, weight, ids, known, beta=beta, tail=False)
    torch.testing.assert_close(full, whole, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(2, 4).double()
    gradients = [torch.autograd.grad(value, hidden, upstream)[0] for value in (full, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_tails_of_a_billionth_keep_their_digits_in_float32(beta: float, frozen: bool) -> None:
    """A student sure of the ids: 1 - Σ p would be 0 or rounding."""
    vocabulary = 40
    weight = torch.eye(vocabulary).requires_grad_(not frozen)
    hidden = torch.randn(6, vocabulary)
    hidden[:, :2] += 25
    hidden.requires_grad_()
    ids = torch.tensor([[0, 1]]).expand(6, 2)
    known = torch.tensor([0.25, 0.75], dtype=torch.float64).log() + torch.log1p(torch.tensor(-3e-9).double())
    known = known.expand(6, 2)
    actual = linear_topk_jsd(hidden, weight, ids, known, beta=beta)
    wide = hidden.detach().double().requires_grad_()
    student = torch.cat([wide[:, :2], wide[:, 2:].logsumexp(-1, keepdim=True)], -1)
    teacher = torch.cat([known, torch.full((6, 1), math.log(3e-9), dtype=torch.float64)], -1)
    expected = reference_logprob.jsd(student, teacher, beta)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-9)
    upstream = torch.randn(6)
    (gradient,) = torch.autograd.grad(actual, hidden, upstream)
    (exact,) = torch.autograd.grad(expected, wide, upstream.double())
    torch.testing.assert_close(gradient[:, 2:].double(), exact[:, 2:], rtol=1e-4, atol=0)


def test_extreme_logits_and_forbidden_tokens_stay_finite_between_the_ends() -> None:
    bias = torch.tensor([0.0, -math.inf, 0.0, -math.inf, 0.0])
    weight = torch.tensor([[1e4], [-1e4], [0.0], [1e4], [-1e4]])
    hidden = torch.tensor([[1.0], [-1.0], [0.0]]).requires_grad_()
    ids = torch.tensor([[1, 3], [0, 1], [0, 4]])
    known = torch.tensor([[0.5, 0.5], [0.2, 0.3], [1.0, 0.0]]).log()
    for beta in (1e-6, 0.5):
        value = linear_topk_jsd(hidden, weight, ids, known, beta=beta, bias=bias)
        (gradient,) = torch.autograd.grad(value.sum(), hidden)
        assert value.isfinite().all() and gradient.isfinite().all() and (value >= 0).all()
    entropy = math.log(2)  # disjoint: the student forbids what the teacher demands
    torch.testing.assert_close(
        linear_topk_jsd(hidden, weight, ids, known, bias=bias)[0].detach(), torch.tensor(entropy)
    )
    assert linear_topk_jsd(hidden, weight, ids, known, beta=0.0, bias=bias)[0].item() == math.inf


def test_the_student_of_a_teacher_who_is_itself_is_at_0() -> None:
    hidden, weight = torch.randn(5, 4).requires_grad_(), torch.randn(30, 4)
    known, ids = (hidden.detach().double() @ weight.double().T).log_softmax(-1).topk(8)
    for beta, tail in itertools.product((0.0, 0.5, 1.0), (True, False)):
        value = linear_topk_jsd(hidden, weight, ids, known, beta=beta, tail=tail)
        (gradient,) = torch.autograd.grad(value.sum(), hidden)
        assert float(value.detach().max()) < 1e-12 and float(gradient.abs().max()) < 1e-5


@pytest.mark.parametrize("frozen", [False, True])
def test_what_does_not_count_is_not_read(frozen: bool) -> None:
    hidden, weight = torch.randn(4, 3), torch.randn(9, 3).requires_grad_(not frozen)
    ids, known = torch.tensor([[1, 2], [-100, 4], [0, 0], [-100, -100]]), torch.full((4, 2), -1.0)
    mask = torch.tensor([True, True, False, True])
    hidden[2], known[1, 0], known[2], known[3] = math.nan, math.nan, math.nan, 7.0
    hidden.requires_grad_()
    value = linear_topk_jsd(hidden, weight, ids, known, mask=mask)
    (gradient,) = torch.autograd.grad(value, hidden, torch.tensor([1.0, 1.0, math.nan, math.nan]))
    assert value[2:].tolist() == [0.0, 0.0] and not gradient[2:].any()
    assert value.isfinite().all() and gradient.isfinite().all() and gradient[:2].any(-1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_operands_are_computed_in_float32(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(9, 16).to(dtype).requires_grad_(), torch.randn(300, 16).to(dtype).requires_grad_()
    ids, known = cached(9, 300)
    actual = linear_topk_jsd(hidden, weight, ids, known.float())
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = reference_logprob.topk_jsd(wide[0] @ wide[1].T, ids, known, 0.5, True)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(actual.sum(), (hidden, weight))
    for a, e in zip(gradients, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).abs().max() < 1.01 * (e.to(dtype).double() - e).abs().max() + 1e-5 * e.abs().max()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_operator_is_registered_for_the_compiler(frozen: bool) -> None:
    hidden, weight = torch.randn(5, 3).requires_grad_(), torch.randn(9, 3).requires_grad_(not frozen)
    ids, known = cached(5, 9, 3)
    counts = torch.arange(5) > 0
    torch.library.opcheck(
        _linear_topk_jsd, (hidden, weight, None, torch.ones(5), ids, known, counts, [0.0, 1.0, 0.3], True, frozen, True)
    )


def test_unchecked_faults_are_nan_in_their_rows_alone() -> None:
    hidden, weight = torch.randn(4, 3).requires_grad_(), torch.randn(9, 3)
    ids, known = torch.tensor([[1, 2], [3, 3], [4, 9], [5, 6]]), torch.full((4, 2), -1.0)
    known[3] = -0.1
    value = linear_topk_jsd(hidden, weight, ids, known, check_teacher=False)
    (gradient,) = torch.autograd.grad(value[:1].sum(), hidden)
    assert value.isnan().tolist() == [False, True, True, True] and gradient[0].isfinite().all()


def test_sums_of_1_by_rounding_are_taken_and_more_is_refused() -> None:
    hidden, weight, ids = torch.randn(1, 3), torch.randn(9, 3), torch.tensor([[1, 2]])
    known = torch.tensor([[0.6, 0.4]]).log()
    value = linear_topk_jsd(hidden, weight, ids, known + 2e-5)
    torch.testing.assert_close(value, linear_topk_jsd(hidden, weight, ids, known), rtol=1e-5, atol=1e-6)
    renormalised = linear_topk_jsd(hidden, weight, ids, known + 3, tail=False)
    torch.testing.assert_close(renormalised, linear_topk_jsd(hidden, weight, ids, known, tail=False))
    with pytest.raises(ValueError, match=r"a probability of 1\.001 in a row"):
        linear_topk_jsd(hidden, weight, ids, known + math.log(1.001))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"teacher_ids": torch.tensor([[1, 9]])}, ValueError, "not below the vocabulary size 9"),
        ({"teacher_ids": torch.tensor([[1, -1]])}, ValueError, "an id that is negative"),
        ({"teacher_ids": torch.tensor([[1, 1]])}, ValueError, "an id twice in a row"),
        ({"teacher_ids": torch.tensor([[1.0, 2.0]])}, TypeError, "teacher_ids is torch.float32"),
        ({"teacher_ids": torch.tensor([1, 2])}, ValueError, r"must be \(1, k\)"),
        ({"teacher_logprobs": torch.zeros(1, 3)}, ValueError, r"teacher_logprobs \(1, 3\)"),
        ({"teacher_logprobs": torch.zeros(1, 2, dtype=torch.long)}, TypeError, "teacher_logprobs has dtype"),
        ({"beta": -0.1}, ValueError, "beta is -0.1"),
        ({"mask": torch.ones(1)}, ValueError, "mask is torch.float32"),
        ({"temperature": 0.0}, ValueError, "must be positive"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type[Exception], message: str) -> None:
    given = dict(
        hidden=torch.zeros(1, 4), weight=torch.zeros(9, 4), teacher_ids=torch.tensor([[1, 2]]),
        teacher_logprobs=torch.full((1, 2), -2.0),
    )  # fmt: skip
    with pytest.raises(error, match=message):
        linear_topk_jsd(**{**given, **change})


@pytest.mark.parametrize("tail", [True, False])
def test_a_cache_with_nan_or_without_any_mass_is_refused(tail: bool) -> None:
    hidden, weight, ids = torch.randn(1, 3), torch.randn(9, 3), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="teacher_logprobs holds NaN, or a row without any probability"):
        linear_topk_jsd(hidden, weight, ids, torch.tensor([[-1.0, torch.nan]]), tail=tail)
    nothing = torch.full((1, 2), -torch.inf)
    if tail:  # all of its mass is in the tail
        assert linear_topk_jsd(hidden, weight, ids, nothing).isfinite().all()
    else:
        with pytest.raises(ValueError, match="row without any probability, which tail=False cannot renormalise"):
            linear_topk_jsd(hidden, weight, ids, nothing, tail=False)
