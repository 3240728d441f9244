"""JSD to a teacher from hidden states: plain formulas in float64, digits, forbidden tokens, other people's software."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from mopl import reference_logprob
from mopl.ops import _divergence_blocks as blocks
from mopl.ops import linear_jsd, linear_kl, linear_topk_jsd
from mopl.ops._divergence import _linear_divergence

BETAS = (0.0, 1e-4, 0.3, 0.5, 0.9, 1 - 1e-4, 1.0)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ragged blocks of rows and tiles of columns."""
    monkeypatch.setattr(blocks, "COLUMNS", {"cpu": 7, "else": 7})
    monkeypatch.setattr(blocks, "ROWS", {"cpu": 5, "else": 5})
    monkeypatch.setattr(blocks, "HELD", {"cpu": 3 * 2 * 37 * 8, "else": 3 * 2 * 37 * 8})


def draw(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=dtype)


def logits(hidden, weight, bias, scale, softcap, temperature) -> Tensor:
    u = scale * (hidden @ weight.T + (0 if bias is None else bias))
    u = u if softcap is None else softcap * torch.tanh(u / softcap)
    return u / temperature[:, None]


def compare(actual: Tensor, expected: Tensor, leaves: list, upstream: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-13)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    for _ in range(2):  # what is saved is not spent
        found = torch.autograd.grad(actual, wanted, upstream, retain_graph=True)
        exact = torch.autograd.grad(expected, wanted, upstream, retain_graph=True)
        for a, e in zip(found, exact, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-11 * max(1.0, float(e.abs().max())))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_equal_the_plain_formula(beta: float) -> None:
    """Student and teacher each have their own width, head, bias, softcap, scale and temperature a row."""
    for capped, train, masked in itertools.product((False, True), ("h", "hw", "hwb", "w", "b"), (False, True)):
        hidden, weight, bias = draw(13, 6), draw(37, 6), draw(37)
        for tensor, letter in ((hidden, "h"), (weight, "w"), (bias, "b")):
            tensor.requires_grad_(letter in train)
        teacher, head, teacher_bias = draw(13, 4), draw(37, 4), draw(37)
        temperature, second = torch.rand(2, 13).double() + 0.5
        cap, teacher_cap = (2.0, math.inf) if capped else (None, 3.0)
        mask = torch.rand(13) > 0.4 if masked else None
        actual = linear_jsd(
            hidden, weight, teacher, head, beta=beta, bias=bias, teacher_bias=teacher_bias, temperature=temperature,
            teacher_temperature=second, softcap=cap, teacher_softcap=teacher_cap, logit_scale=1.3,
            teacher_logit_scale=0.7, mask=mask,
        )  # fmt: skip
        u = logits(hidden, weight, bias, 1.3, cap, temperature)
        r = logits(teacher, head, teacher_bias, 0.7, None if capped else 3.0, second)
        expected = reference_logprob.jsd(u, r, beta)
        expected = expected if mask is None else torch.where(mask, expected, 0)
        upstream = draw(13)
        if mask is not None:
            expected, upstream = expected[mask], upstream.masked_fill(~mask, math.nan)
            assert not actual[~mask].any()
            (gradient,) = torch.autograd.grad(actual, [hidden] if "h" in train else [weight if "w" in train else bias],
                                              upstream, retain_graph=True)  # fmt: skip
            assert gradient.isfinite().all()
            actual, upstream = actual[mask], upstream[mask]
        compare(actual, expected, [hidden, weight, bias], upstream)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_ends_are_kl_and_what_the_teacher_shares_is_a_constant(beta: float) -> None:
    hidden, weight, teacher, bias = draw(2, 3, 6), draw(37, 6), draw(2, 3, 6), draw(37)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    actual = linear_jsd(hidden, weight, teacher, beta=beta, bias=bias)
    own = linear_jsd(hidden, weight, teacher, weight.detach(), beta=beta, bias=bias, teacher_bias=bias.detach())
    upstream = draw(2, 3)
    compare(actual, own, leaves, upstream)
    if beta in (0, 1):
        kl = linear_kl(hidden, weight, teacher, bias=bias, direction="reverse" if beta else "forward")
        assert torch.equal(actual, kl)


def test_small_beta_is_a_kl_times_beta() -> None:
    """JSD / (beta (1 - beta)) goes to the KLs: with 1e-12 as a share float32 keeps its digits, in the gradient too."""
    hidden, weight, teacher = (draw(*s, dtype=torch.float32, scale=0.7) for s in ((40, 8), (60, 8), (40, 8)))
    for beta, end in ((1e-12, 0.0), (1 - 1e-12, 1.0)):
        results = []
        for at, factor in ((beta, min(beta, 1 - beta)), (end, 1.0)):
            leaf = hidden.clone().requires_grad_()
            value = linear_jsd(leaf, weight, teacher, beta=at) / factor
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            results.append((value.detach(), gradient))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5 * float(e.abs().max()))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("beta", [1e-6, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_float32_keeps_its_digits_from_equal_to_peaked_models(scale: float, beta: float, frozen: bool) -> None:
    """`scale` is how far apart the models are, and how peaked."""
    hidden = torch.randn(64, 8)
    teacher = hidden + scale * torch.randn(64, 8)
    hidden = (hidden * max(1.0, scale)).requires_grad_()
    weight = torch.randn(37, 8).requires_grad_(not frozen)
    actual = linear_jsd(hidden, weight, teacher, beta=beta)
    wide = hidden.detach().double().requires_grad_()
    head = weight.detach().double()
    expected = reference_logprob.jsd(wide @ head.T, teacher.double() @ head.T, beta)
    upstream = torch.randn(64)
    (gradient,) = torch.autograd.grad(actual, hidden, upstream)
    (exact,) = torch.autograd.grad(expected, wide, upstream.double())
    # Products round logits by 1e-7 of their size, which a JSD (quadratic in the difference) hardly sees.
    size = float((hidden.detach().abs() @ weight.detach().abs().T).max())
    small = beta * (1 - beta)
    noise = 2e-7 * size * (scale + 2e-7 * size if scale < 1 else 1) * small + 1e-7 * expected.detach().abs()
    assert ((actual - expected).abs() <= 4 * noise + 1e-12 * small).all()
    assert float((gradient - exact).abs().max()) < 4 * small * max(2e-7 * size, 1e-5) * float(head.abs().max() * 8)
    assert (actual >= 0).all() and float(actual.detach().max()) <= math.log(2) + 1e-6


@pytest.mark.parametrize("beta", [0.0, 1e-7, 0.3, 0.5, 1.0])
def test_equal_models_have_no_divergence_and_no_gradient(beta: float) -> None:
    hidden, weight = draw(20, 8, dtype=torch.float32, scale=5.0).requires_grad_(), torch.randn(5000, 8)
    value = linear_jsd(hidden, weight, hidden.detach().clone(), beta=beta)
    value.sum().backward()
    assert hidden.grad is not None and (value == 0).all() and (hidden.grad == 0).all()


def test_disjoint_and_extreme_distributions_are_known() -> None:
    """Of disjoint supports JSD is the entropy of beta, whatever the logits; what both forbid does not matter."""
    inf = math.inf
    bias, other = torch.tensor([0.0, -inf, -inf]), torch.tensor([-inf, 0.0, -inf])
    hidden, weight = torch.zeros(1, 1), torch.zeros(3, 1)
    one, two = torch.tensor([[1e4], [-1e4]]), torch.tensor([[-1e4], [1e4]])
    for beta in (1e-3, 0.25, 0.5, 0.8):
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        leaf = hidden.clone().requires_grad_()
        found = linear_jsd(leaf, weight, hidden, weight, beta=beta, bias=bias, teacher_bias=other)
        found.sum().backward()
        assert leaf.grad is not None and not leaf.grad.any()
        torch.testing.assert_close(found, torch.tensor([entropy]))
        far = linear_jsd(torch.ones(1, 1), one, torch.ones(1, 1), two, beta=beta)
        torch.testing.assert_close(far, torch.tensor([entropy]))
    for beta in (0.0, 1.0):
        assert linear_jsd(hidden, weight, hidden, weight, beta=beta, bias=bias, teacher_bias=other).item() == inf
    assert linear_jsd(torch.randn(4, 2), torch.randn(1, 2), torch.randn(4, 2)).tolist() == [0.0] * 4  # one token
    assert linear_jsd(torch.randn(0, 2), torch.randn(5, 2), torch.randn(0, 2)).shape == (0,)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_tokens_that_one_model_forbids(beta: float) -> None:
    hidden, weight, teacher = draw(9, 5).requires_grad_(), draw(30, 5).requires_grad_(), draw(9, 5)
    bias, other = torch.zeros(2, 30).double()
    bias[[0, 1, 2, 3, 4, 5, 6, 7, 20, 29]] = -math.inf  # a whole tile among them
    other[[0, 3, 11, 12, 25]] = -math.inf
    actual = linear_jsd(hidden, weight, teacher, weight.detach(), beta=beta, bias=bias, teacher_bias=other)
    expected = reference_logprob.jsd(
        (hidden @ weight.T).where(bias > -math.inf, -math.inf), teacher @ weight.detach().T + other, beta
    )
    compare(actual, expected, [hidden, weight], draw(9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_sixteen_bit_operands_are_computed_in_float32(dtype: torch.dtype, frozen: bool) -> None:
    """The teacher may have another dtype than the student."""
    hidden, weight = torch.randn(9, 16).to(dtype).requires_grad_(), torch.randn(300, 16).to(dtype)
    weight.requires_grad_(not frozen)
    teacher, head = torch.randn(9, 24), torch.randn(300, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_jsd(hidden, weight, teacher, head)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = reference_logprob.jsd(wide[0] @ wide[1].T, teacher.double() @ head.double().T, 0.5)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)
    upstream = torch.randn(9)
    inputs = [hidden] if frozen else [hidden, weight]
    gradients = torch.autograd.grad(actual, inputs, upstream)
    exact = torch.autograd.grad(expected, wide[: len(inputs)], upstream.double())
    for a, e in zip(gradients, exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).abs().max() < 1.01 * (e.to(dtype).double() - e).abs().max() + 1e-5 * e.abs().max()


def test_a_frozen_head_keeps_directions_and_nothing_of_the_teacher() -> None:
    hidden, weight, teacher, head = draw(9, 6).requires_grad_(), draw(40, 6), draw(9, 4), draw(40, 4)
    value = linear_jsd(hidden, weight, teacher, head)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = linear_jsd(hidden, weight, teacher, head)
    assert sorted(tuple(t.shape) for t in kept) == [(9,), (9, 6)]
    with pytest.raises(NotImplementedError, match="linear_jsd has no second derivative"):
        (gradient,) = torch.autograd.grad(value.square().sum(), hidden, create_graph=True)
        gradient.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_operator_is_registered_for_the_compiler(frozen: bool) -> None:
    hidden, weight, mask = draw(5, 3).requires_grad_(), draw(9, 3).requires_grad_(not frozen), torch.arange(5) > 1
    ones = torch.ones(5).double()
    arguments = (hidden, weight, None, ones, draw(5, 4), draw(9, 4), None, ones, mask, [0.0, 1.0, 2.0, 1.0, 0.3])
    torch.library.opcheck(_linear_divergence, (*arguments, frozen, "linear_jsd"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_takes_it_whole() -> None:
    hidden, weight, teacher = draw(5, 3).requires_grad_(), draw(9, 3), draw(5, 3)
    ids, known = torch.tensor([[1, 2]] * 5), torch.full((5, 2), -2.0, dtype=torch.float64)

    def run(h: Tensor) -> Tensor:
        return linear_jsd(h, weight, teacher, beta=0.3) * linear_topk_jsd(h, weight, ids, known)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    upstream = draw(5)
    results = [(f(hidden), torch.autograd.grad(f(hidden), hidden, upstream)[0]) for f in (compiled, run)]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


def trl_loss(hidden, weight, teacher, head, mask, beta, **options) -> Tensor:
    trainer = pytest.importorskip("trl.trainer.distillation_trainer", reason="TRL 1.16's distillation trainer")
    if not hasattr(trainer, "_chunked_divergence_loss"):
        pytest.skip("this TRL has no chunked divergence")
    return trainer._chunked_divergence_loss(hidden, teacher, weight, head, mask, beta, **options)[0]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_trls_chunked_divergence(beta: float) -> None:
    hidden, weight, teacher, head = (draw(*s, dtype=torch.float32) for s in ((2, 5, 6), (50, 6), (2, 5, 8), (50, 8)))
    mask = torch.rand(2, 5) > 0.3
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    theirs = trl_loss(
        hidden, weight, teacher, head, mask, beta, student_final_logit_softcapping=3.0, teacher_logit_scale=0.8,
        temperature=0.9,
    )  # fmt: skip
    ours = linear_jsd(
        hidden, weight, teacher, head, beta=beta, softcap=3.0, teacher_softcap=math.inf, teacher_logit_scale=0.8,
        temperature=0.9, mask=mask,
    ).sum() / mask.sum()  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, e in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_ligers_fused_loss(beta: float) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger's kernels")
    hidden, weight, teacher, head = (draw(*s, dtype=torch.float32) for s in ((10, 6), (50, 6), (10, 8), (50, 8)))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    labels = torch.zeros(10, dtype=torch.long)
    loss = liger.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    theirs = loss(hidden, weight, teacher, head, labels)
    ours = linear_jsd(hidden, weight, teacher, head, beta=beta).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, e in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"teacher_hidden": torch.zeros(3, 4)}, ValueError, r"of the teacher they are \(3, 4\)"),
        ({"teacher_weight": torch.zeros(8, 4)}, ValueError, "rows and vocabularies must agree"),
        ({"teacher_hidden": torch.zeros(2, 5)}, ValueError, "of the teacher: hidden has shape"),
        ({"teacher_bias": torch.zeros(9)}, ValueError, "pass teacher_weight with it"),
        ({"mask": torch.ones(2)}, ValueError, "mask is torch.float32"),
        ({"beta": 1.5}, ValueError, "beta is 1.5"),
        ({"beta": math.nan}, ValueError, "beta is nan"),
        ({"beta": torch.tensor(0.5)}, TypeError, "beta is Tensor"),
        (
            {"teacher_temperature": torch.ones(2, requires_grad=True)},
            ValueError,
            "teacher_temperature wants a gradient",
        ),
        ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap is -1.0"),
        ({"softcap": math.inf}, ValueError, "softcap is inf"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type[Exception], message: str) -> None:
    given = dict(hidden=torch.zeros(2, 4), weight=torch.zeros(9, 4), teacher_hidden=torch.zeros(2, 4))
    with pytest.raises(error, match=message):
        linear_jsd(**{**given, **change})
