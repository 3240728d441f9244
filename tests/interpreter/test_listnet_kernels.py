"""The kernels of listwise cross-entropy, through the whole public op, against the plain formula in float64."""

import math
from dataclasses import replace

import pytest
import torch
from interpreting import far_apart
from list_problems import Problem, check, compare, curvature, in_float64, make, padded, poisoned, results
from torch import Tensor

from mopl import reference
from mopl.kernels import listnet as kernels
from mopl.ops.listnet import listwise_cross_entropy
from mopl.ops.listnet.function import _listwise_cross_entropy

pytestmark = pytest.mark.usefixtures("careful_memory")


def whole_lists(scores: Tensor, labels: Tensor, beta: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    """Return the loss without the oracle's loop over items, whose cost is quadratic."""
    u = beta[:, :, None] * scores[:, None]
    z = labels.to(u.dtype)
    if mask is not None:
        u, z = u.masked_fill(~mask[:, None], -torch.inf), z.masked_fill(~mask[:, None], 0)
    log_q = (u - u.logsumexp(-1, keepdim=True)).masked_fill(u == -torch.inf, 0)
    loss = -(z * log_q).sum(-1)
    return loss / z.sum(-1) if normalize else loss


@pytest.fixture(params=["whole lists", "blocks of a list"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with lists in registers, and again with small blocks in every kernel."""
    if request.param == "blocks of a list":
        monkeypatch.setattr(kernels, "registers_limit", lambda itemsize: 0)
        monkeypatch.setattr(kernels, "forward_tile", lambda *_: {"LISTS": 1, "BLOCK": 8, "num_warps": 4})
        monkeypatch.setattr(kernels, "backward_tile", lambda *_: {"LISTS": 2, "BLOCK": 8, "num_warps": 4})
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "objectives", "items", "common", "normalize"),
    [
        (5, 3, 7, False, True),
        (4, 1, 2, True, False),
        (3, 5, 1, True, True),
        (6, 2, 8, True, True),
        (4, 2, 9, False, False),
        (3, 3, 33, True, False),
    ],
)
def test_loss_and_gradients_equal_the_formula(
    batch: int, objectives: int, items: int, common: bool, normalize: bool, dtype: torch.dtype, path: str
) -> None:
    label_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    problem = make(
        batch, objectives, items, dtype=dtype, scale=2, label_dtype=label_dtype, common=common, normalize=normalize
    )
    check(listwise_cross_entropy, reference.listwise_cross_entropy, problem, with_labels=True)


def test_more_short_lists_than_one_program_holds() -> None:
    lists = kernels.forward_tile(2, 4)["LISTS"]
    problem = make(2 * lists + 3, 2, 2, normalize=True)
    check(listwise_cross_entropy, reference.listwise_cross_entropy, problem, with_labels=True)


@pytest.mark.parametrize("items", [300, 2048])
def test_long_lists(items: int) -> None:
    for common in (True, False):
        problem = make(3, 2, items, common=common, scale=3, masked=False, normalize=True)
        problem.mask = torch.rand(3, items) < 0.8
        check(listwise_cross_entropy, whole_lists, problem, with_labels=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_sides_of_the_register_limit(dtype: torch.dtype) -> None:
    limit = kernels.registers_limit(dtype.itemsize)
    for items in (limit, limit + 1):
        common = dtype == torch.float32
        problem = make(2, 2, items, dtype=dtype, label_dtype=dtype, common=common, masked=False, normalize=True)
        check(listwise_cross_entropy, whole_lists, problem, with_labels=True)


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.float64])
def test_labels_of_any_dtype(label_dtype: torch.dtype, path: str) -> None:
    problem = make(4, 2, 9, levels=2 if label_dtype == torch.bool else 5, label_dtype=label_dtype, normalize=True)
    check(listwise_cross_entropy, reference.listwise_cross_entropy, problem)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_scores(scale: float, path: str) -> None:
    check(listwise_cross_entropy, reference.listwise_cross_entropy, make(5, 2, 12, scale=scale, normalize=True))


def test_negative_betas_turn_the_list_around(path: str) -> None:
    problem = make(5, 4, 9, scale=3, normalize=True)
    problem.beta *= torch.tensor([1.0, -1.0, -1.0, 1.0])
    check(listwise_cross_entropy, reference.listwise_cross_entropy, problem, with_labels=True)


@pytest.mark.parametrize("gap", [1.0, 10.0, 40.0, 85.0])
def test_confident_lists_keep_every_digit_of_every_gradient(gap: float, path: str) -> None:
    scores = torch.tensor([[0.0, -gap, -gap - 1, -gap - 0.5, -gap]])
    labels = torch.tensor([[[1.0, 0.0, 0.0, 0.0, 0.0]]])
    problem = Problem(
        scores, labels, torch.ones(1, 1), None, torch.ones(1, 1, dtype=torch.float64), {"normalize": True}
    )
    found = results(listwise_cross_entropy, problem)
    expected = results(reference.listwise_cross_entropy, in_float64(problem))
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value, rtol=1e-6, atol=0), name


def test_a_common_offset_of_the_scores_changes_nothing(path: str) -> None:
    problem = make(5, 2, 9, masked=False, normalize=True)
    problem.scores = (problem.scores * 256).round() / 256  # so that the offset is exact
    plain = results(listwise_cross_entropy, problem)
    problem.scores = problem.scores + 1e4
    for name, value in results(listwise_cross_entropy, problem).items():
        assert torch.equal(value, plain[name]), name


def test_scores_of_minus_infinity(path: str) -> None:
    inf = math.inf
    scores = torch.tensor([[1.0, -inf, 0.5], [1.0, -inf, 0.5], [-inf, -inf, -inf]])
    labels = torch.tensor([[[1.0, 0.0, 2.0]], [[1.0, 1.0, 0.0]], [[0.0, 2.0, 1.0]]])
    problem = Problem(scores, labels, torch.ones(3, 1), None, torch.ones(3, 1), {"normalize": True})
    found = results(listwise_cross_entropy, problem)
    # A label of 0 costs nothing even at a score of -inf.
    assert found["loss"][0] == pytest.approx(math.log1p(math.exp(-0.5)) + 2 / 3 * 0.5)
    assert found["loss"][1] == inf
    assert found["loss"][2] == pytest.approx(math.log(3))
    assert found["scores"][1].isfinite().all()
    assert found["scores"][0, 1] == 0 and found["scores"][1, 1] == -0.5


def test_nan_stays_in_its_list(path: str) -> None:
    problem = make(4, 2, 9, masked=False, normalize=True)
    plain = results(listwise_cross_entropy, problem, with_labels=True)
    problem.scores[1, 4] = math.nan
    found = results(listwise_cross_entropy, problem, with_labels=True)
    others = torch.tensor([0, 2, 3])
    for name, value in found.items():
        assert torch.equal(value[others], plain[name][others]), name
    assert found["loss"][1].isnan().all() and found["scores"][1].isnan().any()


def test_lists_without_labels_or_with_fewer_than_two_items_contribute_nothing(path: str) -> None:
    problem = make(4, 2, 9, normalize=True)
    problem.labels[3] = 0
    found = results(listwise_cross_entropy, problem, with_labels=True)
    for index in (1, 2, 3):  # no item, one item, no label
        for name, value in found.items():
            assert torch.equal(value[index], torch.zeros_like(value[index])), (index, name)


def test_only_the_gradients_that_are_asked_for(path: str) -> None:
    problem = make(4, 2, 9, normalize=True)
    expected = results(listwise_cross_entropy, problem, with_labels=True)
    inputs = {"scores": problem.scores, "labels": problem.labels, "beta": problem.beta}
    for name, value in inputs.items():
        leaf = value.clone().requires_grad_()
        loss = listwise_cross_entropy(**{**inputs, name: leaf}, mask=problem.mask, normalize=True)
        (gradient,) = torch.autograd.grad((loss * problem.upstream.to(loss.dtype)).sum(), leaf)
        assert torch.equal(gradient, expected[name]), name


def test_backward_twice_gives_the_same_bits(path: str) -> None:
    problem = make(4, 3, 9, normalize=True)
    scores = problem.scores.clone().requires_grad_()
    loss = listwise_cross_entropy(scores, problem.labels, problem.beta, problem.mask)
    first = torch.autograd.grad(loss.sum(), scores, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss.sum(), scores)[0])


@pytest.mark.parametrize("apart", [("scores", "labels", "mask"), ("beta",)], ids=" ".join)
def test_offsets_past_2_to_the_31(apart: tuple[str, ...], path: str) -> None:
    problem = make(4, 1, 9, dtype=torch.bfloat16, levels=3, label_dtype=torch.uint8, normalize=True)
    plain = results(listwise_cross_entropy, problem)
    far = {name: far_apart(getattr(problem, name)) for name in apart}
    for name, value in results(listwise_cross_entropy, replace(problem, **far)).items():
        assert torch.equal(value, plain[name]), name


def test_expanded_and_permuted_inputs() -> None:
    problem = make(5, 3, 6, masked=False, normalize=True)
    labels = problem.labels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    beta = torch.tensor(0.7).expand(5, 3)
    scores = padded(problem.scores)[::1]
    plain = listwise_cross_entropy(problem.scores, problem.labels, beta.contiguous())
    assert torch.equal(listwise_cross_entropy(scores, labels, beta), plain)
    one = listwise_cross_entropy(problem.scores, problem.labels[:, :1].expand(5, 3, 6), beta)
    assert torch.equal(one[:, 0], one[:, 2]) and torch.equal(one[:, 0], plain[:, 0])


@pytest.mark.parametrize(("batch", "objectives", "items"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_empty_batches(batch: int, objectives: int, items: int) -> None:
    scores = torch.zeros(batch, items, requires_grad=True)
    loss = listwise_cross_entropy(scores, torch.zeros(batch, objectives, items), torch.ones(batch, objectives))
    assert torch.equal(loss, torch.zeros(batch, objectives))
    loss.sum().backward()
    assert torch.equal(scores.grad, torch.zeros(batch, items))


@pytest.mark.parametrize("common", [False, True])
def test_second_derivatives(common: bool) -> None:
    problem = make(6, 2, 5, common=common, normalize=True)
    expected = curvature(reference.listwise_cross_entropy, in_float64(problem))
    compare(curvature(listwise_cross_entropy, poisoned(problem)), expected, 2e-5)


def test_opcheck() -> None:
    problem = make(4, 2, 5)
    leaves = [t.requires_grad_() for t in (problem.scores, problem.labels, problem.beta)]
    torch.library.opcheck(_listwise_cross_entropy, (*leaves, problem.mask, True))


@pytest.mark.parametrize("common", [True, False])
def test_only_lists_beyond_the_registers_save_statistics(common: bool, path: str) -> None:
    """Of short lists they would be more bytes than anything else that the ops move, but for scores and labels."""
    problem = make(4, 2, 5, common=common)
    _, *saved = _listwise_cross_entropy(problem.scores, problem.labels, problem.beta, problem.mask, True)
    shared, own = ((4, 1) if common else (4, 2)), (4, 2)
    expected = [shared, shared, own, own] if path == "blocks of a list" else [(0,)] * 4
    assert [tuple(x.shape) for x in saved] == [*expected, (0,)]


@pytest.mark.parametrize("rate", [1.0, -1.0])
def test_items_that_share_the_peak(rate: float, path: str) -> None:
    scores = rate * torch.tensor([[3.0, 3.0, -40.0, 3.0], [2.0, 2.0, 2.0, 2.0], [-60.0, 5.0, 5.0, -1.0]])
    labels = torch.tensor([[[1.0, 0.0, 2.0, 0.5]], [[0.0, 3.0, 0.0, 1.0]], [[0.0, 1.0, 1.0, 0.0]]])
    problem = Problem(scores, labels, torch.full((3, 1), rate), None, torch.ones(3, 1, dtype=torch.float64), {})
    check(listwise_cross_entropy, reference.listwise_cross_entropy, problem, with_labels=True)


def test_compare_can_fail() -> None:
    problem = make(4, 2, 7, normalize=True)
    expected = results(reference.listwise_cross_entropy, in_float64(problem))
    found = results(listwise_cross_entropy, problem)
    compare(found, expected, 2e-6)
    found["scores"][0, 3] += 1e-5 * found["scores"][0].abs().max()
    with pytest.raises(AssertionError, match="scores of list 0 is off"):
        compare(found, expected, 2e-6)


@pytest.mark.parametrize("common", [True, False])
def test_a_negative_label_makes_its_losses_and_gradients_nan(common: bool, path: str) -> None:
    """On a GPU nothing waits to read it, and no number may pass for a loss."""
    problem = make(4, 2, 19, common=common, masked=False, normalize=True)
    bad = torch.zeros(4, 2, dtype=torch.bool)
    bad[2, 1] = True
    fine = results(listwise_cross_entropy, problem, with_labels=True)
    problem.labels[2, 1, 3] = -0.01
    found = results(listwise_cross_entropy, problem, with_labels=True)
    for name in ("loss", "labels"):
        assert found[name][bad].isnan().all(), name
        assert torch.equal(found[name][~bad], fine[name][~bad]), name
    assert found["scores"][2].isnan().all() and torch.equal(found["scores"][:2], fine["scores"][:2])
    assert found["beta"][2, -1].isnan() and torch.equal(found["beta"][:2], fine["beta"][:2])
    problem.options["normalize"] = False  # as they are, labels of either sign count
    compare(
        results(listwise_cross_entropy, problem), results(reference.listwise_cross_entropy, in_float64(problem)), 2e-6
    )
