"""Log-probabilities from logits on a CPU: the plain formulas, exactness, guards, the compiler."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mopl import reference_logprob
from mopl.ops import gathered_logprob, linear_logprob

ALL = dict(return_logsumexp=True, return_entropy=True)


def leaf(value: Tensor, wanted: bool = True) -> Tensor:
    return value.detach().clone().requires_grad_(wanted)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("elements", [25, 2**20], ids=["chunks of two rows", "one chunk"])
@pytest.mark.parametrize("targets", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_outputs_and_gradients_equal_the_plain_formulas(
    targets: int | None, softcap: float | None, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setattr(sys.modules["mopl.ops._gathered_logprob_cpu"], "ELEMENTS", elements)
    for masked, warm, inplace in itertools.product((False, True), repeat=3):
        logits, temperature = leaf(torch.randn(9, 11).double() * 3), leaf(torch.rand(9).double() + 0.5, warm)
        shape = (9,) if targets is None else (9, targets)
        target, mask = torch.randint(11, shape), torch.rand(shape) > 0.4 if masked else None
        options = dict(temperature=temperature, softcap=softcap, mask=mask)
        actual = gathered_logprob(logits * 1, target, inplace_backward=inplace, **options, **ALL)
        expected = reference_logprob.gathered_logprob(logits, target, **options)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)
        upstream, inputs = [torch.randn_like(a) for a in actual], (logits, temperature) if warm else (logits,)
        for chosen in ((1, 1, 1),) if inplace else ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
            gradients = []
            for outputs, again in ((actual, not inplace), (expected, True)):
                loss = sum((o * u).sum() for o, u, use in zip(outputs, upstream, chosen, strict=True) if use)
                gradients.append(torch.autograd.grad(loss, inputs, retain_graph=again))
            for a, e in zip(*gradients, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap: float | None) -> None:
    logits, temperature = leaf(torch.randn(5, 7).double()), leaf(torch.rand(5).double() + 0.5)
    target = torch.tensor([[0, 0, 3], [1, 6, 2], [5, 5, 5], [-100, 2, 1], [-100, -100, -100]])
    assert torch.autograd.gradcheck(
        lambda x, t: gathered_logprob(x, target, temperature=t, softcap=softcap, **ALL), (logits, temperature)
    )


def test_it_is_minus_the_cross_entropy_of_torch() -> None:
    logits, target = leaf(torch.randn(4, 6, 300) * 3), torch.randint(300, (4, 6))
    target[:, ::3] = -100
    upstream = torch.randn(4, 6)
    theirs = -F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(4, 6)
    ours = gathered_logprob(logits, target)
    torch.testing.assert_close(ours, theirs)
    for a, e in zip(*(torch.autograd.grad(x, logits, upstream) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("peak", [1.0, 15.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_that_of_float32_arithmetic(dtype: torch.dtype, peak: float) -> None:
    logits, target = (torch.randn(252, 507) * peak).to(dtype), torch.randint(507, (252,))
    target[::3] = logits.float().argmax(1)[::3]
    temperature, upstream = torch.rand(252) + 0.5, torch.randn(3, 252)
    exact, single, mine = leaf(logits.double()), leaf(logits.float()), leaf(logits)
    runs = []
    for values, run, warm in (
        (exact, reference_logprob.gathered_logprob, temperature.double()),
        (single, reference_logprob.gathered_logprob, temperature),
        (mine, lambda *a, **k: gathered_logprob(*a, **k, **ALL), temperature),
    ):
        outputs = run(values, target, temperature=warm)
        gradients = [
            torch.autograd.grad(o, values, u.to(o.dtype), retain_graph=True)[0]
            for o, u in zip(outputs, upstream, strict=True)
        ]
        runs.append([*outputs, *gradients])
    for e, s, m in zip(*runs, strict=True):
        s = s.to(m.dtype)
        assert relative(m, e) <= 2 * relative(s, e) + 1e-8
        assert (m.double() - e).norm() <= 2 * (s.double() - e).norm() + 1e-8 * e.norm()


def test_confident_rows_keep_every_digit() -> None:
    gap = torch.arange(5.0, 85.0, 5.0)
    logits = torch.cat([100 + gap[:, None], 100 + torch.randn(16, 30)], 1)
    target = torch.zeros(16, dtype=torch.long)
    exact = leaf(logits.double())
    truth = -(exact[:, 1:] - exact[:, :1]).exp().sum(1).log1p()
    mine = leaf(logits)
    logprob, entropy = gathered_logprob(mine, target, return_entropy=True)
    torch.testing.assert_close(logprob.double(), truth, rtol=1e-5, atol=0)
    p = (exact - exact.logsumexp(1, keepdim=True)).detach()
    entropy_truth = -(p[:, 1:].exp() * p[:, 1:]).sum(1) - truth * truth.exp()
    torch.testing.assert_close(entropy.double(), entropy_truth, rtol=1e-5, atol=1e-44)
    upstream = (1 / -truth).detach()
    a = torch.autograd.grad(logprob, mine, upstream.float().nan_to_num(posinf=0))[0]
    e = torch.autograd.grad(truth, exact, upstream.float().nan_to_num(posinf=0).double())[0]
    torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=0)


def test_extreme_and_infinite_logits() -> None:
    logits = torch.tensor(
        [[0.0, 300.0, -300.0], [-math.inf, 1.0, 2.0], [5.0, -math.inf, -math.inf], [1.0, 2.0, -math.inf]]
    )
    target = torch.tensor([2, 1, 0, 2])
    x = leaf(logits)
    logprob, logsumexp, entropy = gathered_logprob(x, target, **ALL)
    torch.testing.assert_close(logprob, torch.tensor([-600.0, -math.log1p(math.e), 0.0, -math.inf]))
    torch.testing.assert_close(logsumexp, logits.logsumexp(1))
    assert entropy.isfinite().all() and entropy[2] == 0
    gradient = torch.autograd.grad((logprob, logsumexp, entropy), x, (torch.ones(4), torch.ones(4), torch.ones(4)))[0]
    assert gradient.isfinite().all()
    # d logprob = onehot - p, also for a target that cannot be
    (gradient,) = torch.autograd.grad(gathered_logprob(x, target).sum(), x)
    torch.testing.assert_close(gradient, F.one_hot(target, 3) - logits.softmax(1))


@pytest.mark.parametrize("logit", [-2000.0, -89.0, 0.0, 89.0, 2000.0])
def test_one_allowed_token_is_certain_whatever_its_logit(logit: float) -> None:
    for token, target in ((2, 2), (2, 0)):
        x = leaf(torch.full((1, 5), -math.inf).index_fill(1, torch.tensor([token]), logit))
        temperature = leaf(torch.tensor([0.5]))
        outputs = gathered_logprob(x, torch.tensor([target]), temperature=temperature, **ALL)
        assert [float(o) for o in outputs] == [0.0 if token == target else -math.inf, 2 * logit, 0.0]
        # d logsumexp / d logit = 1 / T and d logsumexp / dT = -logit / T^2; nothing else moves.
        upstream = (torch.tensor([3.0 * (token == target)]), torch.ones(1), torch.tensor([7.0]))
        of_logits, of_temperature = torch.autograd.grad(outputs, (x, temperature), upstream)
        assert torch.equal(of_logits, torch.zeros(1, 5).index_fill(1, torch.tensor([token]), 2.0))
        assert float(of_temperature) == -4 * logit


def test_a_target_far_below_the_others_does_not_round_the_entropy() -> None:
    logits = torch.tensor([[0.3, -0.2, -2000.0], [0.3, -0.2, -math.inf], [1.5, -math.inf, -90.0]])
    entropy = gathered_logprob(logits, torch.tensor([2, 2, 2]), return_entropy=True)[1]
    p = logits.double().softmax(1)
    torch.testing.assert_close(entropy.double(), torch.special.entr(p).sum(1), rtol=2e-7, atol=1e-30)


def test_several_targets_share_a_row_and_duplicates_add_up() -> None:
    logits, target = leaf(torch.randn(4, 9)), torch.tensor([[1, 1, 2], [0, 8, 0], [3, 4, 5], [7, 7, 7]])
    upstream = torch.randn(4, 3)
    together = gathered_logprob(logits, target)
    alone = torch.stack([gathered_logprob(logits, target[:, j]) for j in range(3)], 1)
    torch.testing.assert_close(together, alone)
    for a, e in zip(*(torch.autograd.grad(x, logits, upstream) for x in (together, alone)), strict=True):
        torch.testing.assert_close(a, e)


def test_one_confident_target_among_several_keeps_its_gradient() -> None:
    logits = leaf(torch.tensor([[20.0, 0.0, 1.0, -1.0]]))
    logprob = gathered_logprob(logits, torch.tensor([[2, 0]]))
    exact = leaf(logits.detach().double())
    truth = reference_logprob.gathered_logprob(exact, torch.tensor([[2, 0]]))[0]
    a = torch.autograd.grad(logprob[0, 1], logits)[0].double()
    e = torch.autograd.grad(truth[0, 1], exact)[0]
    torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-15)


def test_rows_that_do_not_count_are_not_read() -> None:
    logits, temperature = torch.randn(6, 5), torch.ones(6)
    logits[[1, 4]], temperature[[1, 4]] = math.nan, math.nan
    logits, temperature = leaf(logits), leaf(temperature)
    target, mask = torch.tensor([0, 1, 2, 3, -5, 4]), torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool)
    outputs = gathered_logprob(logits, target, mask=mask, ignore_index=-5, temperature=temperature, **ALL)
    assert all(o.isfinite().all() and not o[[1, 4]].any() for o in outputs)
    upstream = torch.randn(3, 6).index_fill_(1, torch.tensor([1, 4]), math.nan)
    for gradient in torch.autograd.grad(outputs, (logits, temperature), tuple(upstream)):
        assert gradient.isfinite().all() and not gradient[[1, 4]].any() and gradient[[0, 2, 3, 5]].any()


def test_all_rows_masked_and_no_rows_at_all() -> None:
    for shape in ((3, 5), (0, 5)):
        for targets in ((), (2,)):
            logits = leaf(torch.full(shape, math.nan))
            target = torch.full((*shape[:1], *targets), -100)
            outputs = gathered_logprob(logits, target, **ALL)
            assert outputs[0].shape == target.shape and all(not o.any() for o in outputs)
            assert not torch.autograd.grad(sum(o.sum() for o in outputs), logits)[0].any()


def test_backward_twice_gives_the_same_bits_and_changes_nothing() -> None:
    values = torch.randn(30, 200)
    logits, target = leaf(values), torch.randint(200, (30, 2))
    runs = []
    for _ in range(2):
        logprob, entropy = gathered_logprob(logits, target, return_entropy=True)
        loss = (logprob * torch.linspace(-1, 1, 2)).sum() + entropy.square().sum()
        runs += [(logprob, entropy, *torch.autograd.grad(loss, logits, retain_graph=True)) for _ in range(2)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    assert torch.equal(logits, values)


def test_inplace_backward_uses_no_second_tensor_and_cannot_be_misused() -> None:
    source, target = leaf(torch.randn(6, 40)), torch.randint(40, (6,))
    logits = source * 1
    place = []
    logits.register_hook(lambda gradient: place.append(gradient.data_ptr()))
    logprob = gathered_logprob(logits, target, inplace_backward=True)
    logprob.sum().backward(retain_graph=True)
    assert place == [logits.data_ptr()]
    torch.testing.assert_close(source.grad, torch.autograd.grad(gathered_logprob(source, target).sum(), source)[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()
    # Something else that still needs the logits is refused by autograd, too.
    logits = source * 1
    loss = logits.square().sum() * 0.1 + gathered_logprob(logits, target, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_that_of_log_softmax() -> None:
    logits, target, direction = leaf(torch.randn(3, 4)), torch.tensor([0, 1, 2]), torch.randn(3, 4)
    found = []
    for value in (gathered_logprob(logits, target), logits.log_softmax(-1).gather(-1, target[:, None])):
        (gradient,) = torch.autograd.grad(value.square().sum(), logits, create_graph=True)
        found.append(torch.autograd.grad((gradient * direction).sum(), logits)[0])
    torch.testing.assert_close(*found)


def test_it_agrees_with_linear_logprob() -> None:
    hidden, weight, target = torch.randn(8, 6), torch.randn(30, 6), torch.randint(30, (8,))
    for a, b in zip(
        gathered_logprob(hidden @ weight.T, target, temperature=0.7, softcap=2.0, **ALL),
        linear_logprob(hidden, weight, target, temperature=0.7, softcap=2.0, **ALL),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_strided_logits() -> None:
    logits, target = leaf(torch.randn(7, 5, 3)), torch.randint(7, (5, 3))
    result = gathered_logprob(logits.movedim(0, -1), target)
    torch.testing.assert_close(result, gathered_logprob(logits.movedim(0, -1).contiguous(), target))
    assert torch.autograd.grad(result.sum(), logits)[0].shape == logits.shape


def test_rows_that_share_memory_have_their_own_gradients_whatever_may_be_overwritten() -> None:
    row, target = leaf(torch.randn(9)), torch.randint(9, (5,))
    results = [
        gathered_logprob(t, target, inplace_backward=True) for t in (row.expand(5, 9), row.repeat(5, 1))
    ]  # fmt: skip
    found, expected = (torch.autograd.grad(result.sum(), row)[0] for result in results)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("targets", [1, 3])
def test_opcheck(targets: int) -> None:
    for dtype, warm in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        logits, temperature = leaf(torch.randn(5, 9).to(dtype)), leaf(torch.rand(5) + 0.5, warm)
        target = torch.randint(9, (5, targets))
        target[1] = -1
        torch.library.opcheck(
            torch.ops.mopl.gathered_logprob.default, (logits, target, temperature, 2.0, True, warm, False, True)
        )


def test_compiled_without_breaks_and_no_recompiles_for_rows_temperature_or_mask() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(logits: Tensor, target: Tensor, mask: Tensor, temperature: float) -> Tensor:
        logprob, entropy = gathered_logprob(
            logits * 2, target, mask=mask, temperature=temperature, return_entropy=True, inplace_backward=True
        )
        return logprob + 0.1 * entropy

    for rows, temperature in ((8, 1.0), (13, 0.7), (40, 0.3)):
        logits, target, mask = leaf(torch.randn(rows, 19)), torch.randint(19, (rows,)), torch.rand(rows) > 0.3
        result = step(logits, target, mask, temperature)
        logprob, entropy = gathered_logprob(logits * 2, target, mask=mask, temperature=temperature, return_entropy=True)
        expected = logprob + 0.1 * entropy
        torch.testing.assert_close(result, expected)
        for a, e in zip(*(torch.autograd.grad(x.sum(), logits) for x in (result, expected)), strict=True):
            torch.testing.assert_close(a, e)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_export() -> None:
    class Scorer(torch.nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            result = gathered_logprob(logits, target, temperature=0.5)
            assert isinstance(result, Tensor)
            return result

    rows = torch.export.Dim("rows", min=2)
    example = torch.randn(4, 19), torch.randint(19, (4, 2))
    program = torch.export.export(Scorer(), example, dynamic_shapes=({0: rows}, {0: rows}))
    logits, target = torch.randn(11, 19), torch.randint(19, (11, 2))
    torch.testing.assert_close(program.module()(logits, target), Scorer()(logits, target))


def test_errors_name_the_argument_its_shape_and_the_remedy() -> None:
    logits, target = torch.randn(3, 7), torch.tensor([0, 1, 2])
    cases = [
        ((logits.long(), target), {}, TypeError, r"logits\.float\(\)"),
        ((torch.randn(3, 0), target), {}, ValueError, r"\(3, 0\)"),
        ((logits, target.float()), {}, TypeError, r"target\.long\(\)"),
        ((logits, target.tolist()), {}, TypeError, r"target is list .* pass torch\.tensor\(target\)"),
        ((logits, target[:2]), {}, ValueError, r"target has shape \(2,\).*\(3, 7\)"),
        ((logits, target + 5), {}, ValueError, "vocabulary size 7"),
        ((logits, target - 1), {}, ValueError, "ignore_index"),
        ((logits, target), {"mask": torch.ones(3)}, TypeError, r"mask\.bool\(\)"),
        ((logits, target), {"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask has shape \(2,\)"),
        ((logits, target), {"temperature": torch.ones(2)}, ValueError, r"temperature has shape \(2,\)"),
        ((logits, target), {"temperature": -1.0}, ValueError, "temperature is -1"),
        ((logits, target), {"softcap": 0.0}, ValueError, "softcap is 0"),
        ((logits, target.to("meta")), {}, ValueError, "target is on meta"),
    ]
    for arguments, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            gathered_logprob(*arguments, **options)


def test_unchecked_targets_outside_the_vocabulary_give_nan() -> None:
    logits = leaf(torch.randn(4, 7))
    logprob = gathered_logprob(logits, torch.tensor([0, 9, -3, 6]), check_targets=False)
    assert logprob.isnan().tolist() == [False, True, True, False]
    assert torch.autograd.grad(logprob.sum(), logits)[0].isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("offset", [300.0, 3e4, -3e4])
def test_the_gradient_of_logits_far_from_0_keeps_its_digits(offset: float) -> None:
    """exp(u - logsumexp) would be off by the rounding of the logsumexp, 2e-3 at 3e4."""
    logits = offset + torch.tensor([[0.0, 1.0, -2.0], [0.25, 0.5, 0.0]])
    target = torch.tensor([1, 2])
    found, expected = (
        torch.autograd.grad(gathered_logprob(leaf, target).sum(), leaf)[0]
        for leaf in (logits.clone().requires_grad_(), (logits.double() - offset).requires_grad_())
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
