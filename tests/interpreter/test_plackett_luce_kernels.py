"""The kernels of Plackett-Luce, through the whole public op, against the plain formula in float64."""

import math
from dataclasses import replace

import pytest
import torch
from interpreting import far_apart
from list_problems import Problem, best_first, check, compare, curvature, in_float64, make, padded, poisoned, results

from mopl import _arguments, reference
from mopl.kernels import plackett_luce_plan as plans
from mopl.ops.plackett_luce import Lists, Rule, plackett_luce_nll
from mopl.ops.plackett_luce.function import _plackett_luce_nll

pytestmark = pytest.mark.usefixtures("careful_memory")
PATHS = ["pairs", "pairs in rows", "fused", "fused over threads", "fused over warps", "steps"]
SERVED = [(path, "breslow") for path in PATHS]
SERVED += [("pairs", "efron"), ("pairs in rows", "efron"), ("steps", "efron"), ("steps", "exact")]
TILES = {
    "pairs in rows": {"LISTS": 2, "ROWS": 4, "BLOCK": 32, "num_warps": 4},
    "fused over threads": {"ROWS": 2, "LISTS": 2, "LANES": 8, "num_warps": 4},
    "fused over warps": {"ROWS": 1, "LISTS": 1, "LANES": 64, "num_warps": 4},
}


def take_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send lists of any length down one path, with blocks so small that lists of ten items fill several.

    What a path does not serve takes the path that it would.
    """
    real = plans.plan

    def plan(items: int, itemsize: int, ties: str, weighted: bool, ordered: bool, label_itemsize: int) -> plans.Plan:
        found = real(items, itemsize, ties, weighted, ordered, label_itemsize)
        if name.startswith("pairs") and ties != "exact":
            tile = TILES.get(name) or plans.pairwise_tile(items, itemsize)
            return plans.Plan("pairs", "given" if ordered else "nobody", tile)
        if name in TILES and found.kernel == "fused":
            found = found._replace(tile=TILES[name], sort=found.sort if ordered else "kernel")
        if name == "steps":
            found = plans.Plan("steps", "given" if ordered else "argsort", plans.scan_tile(items))
        if found.sort == "kernel" and label_itemsize > 4:
            found = found._replace(sort="argsort")
        return found

    monkeypatch.setattr(plans, "plan", plan)
    if name == "steps":
        monkeypatch.setattr(plans, "scan_tile", lambda items: {"BLOCK": 8, "num_warps": 4})
        tile = plans.group_tile
        small = {"SPAN": 4, "MEMBERS": 4}
        monkeypatch.setattr(plans, "group_tile", lambda items, exact: {**tile(items, exact), **small})
    if name != "pairs":
        monkeypatch.setattr(plans, "backward_tile", lambda items: {"LISTS": 2, "BLOCK": 8, "num_warps": 4})


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take_path(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=SERVED, ids=" ".join)
def ties(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take every path with every tie rule that it serves; return the rule."""
    take_path(request.param[0], monkeypatch)
    return request.param[1]


def check_all(problem: Problem, tolerance: float | None = None) -> None:
    check(plackett_luce_nll, reference.plackett_luce_nll, problem, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_and_gradients_equal_the_formula(ties: str, dtype: torch.dtype) -> None:
    check_all(make(4, 2, 5, dtype=dtype, levels=3, scale=2, ties=ties))


def test_lists_that_fill_several_blocks(ties: str) -> None:
    check_all(make(1, 2, 11, levels=6, common=True, masked=False, ties=ties))


@pytest.mark.parametrize("items", [1, 2, 3])
def test_short_lists(items: int, ties: str) -> None:
    check_all(make(4, 1, items, levels=2, ties=ties))


@pytest.mark.parametrize(("top_k", "last_group_free"), [(1, False), (3, True), (100, True)])
def test_partial_rankings(top_k: int, last_group_free: bool, ties: str) -> None:
    masked = top_k == 3
    problem = make(4 if masked else 1, 1, 10, levels=4, masked=masked, top_k=top_k, ties=ties)
    problem.options["last_group_free"] = last_group_free
    check_all(problem)


@pytest.mark.parametrize("each", [False, True], ids=["shared weights", "weights of each list"])
def test_position_weights(each: bool, ties: str) -> None:
    objectives = 2 if each else 1
    problem = make(2, objectives, 9, levels=4, ties=ties, top_k=7, masked=False)
    problem.mask = torch.rand(2, 9) < 0.9
    problem.options["position_weights"] = torch.rand(2, 2, 9) if each else torch.rand(9)
    check_all(problem)


def test_a_given_order_decides_the_ranking(ties: str) -> None:
    problem = make(2, 1, 9, levels=4, ties=ties, masked=False)
    problem.mask = torch.rand(2, 9) < 0.9
    problem.options["order"] = best_first(problem).to(torch.int16)
    check_all(problem)
    # Random orders: labels then say only which neighbours are tied.
    shuffled = torch.rand(2, 1, 9).masked_fill(~problem.mask[:, None], -1).argsort(-1, descending=True)
    problem.options["order"] = shuffled
    check_all(problem)


def test_all_items_tied_and_all_different(ties: str) -> None:
    problem = make(2, 2, 6, levels=1, masked=False, ties=ties)
    problem.labels[:, 1] = torch.arange(6)
    check_all(problem)


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("path", ["pairs", "fused", "fused over threads"])
def test_labels_of_any_dtype(label_dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_path(path, monkeypatch)
    check_all(make(3, 2, 7, levels=2 if label_dtype == torch.bool else 5, label_dtype=label_dtype))


def test_labels_are_compared_in_their_own_dtype(path: str) -> None:
    """2^24 and 2^24 + 1 are one number in float32."""
    problem = make(3, 1, 6, levels=3, label_dtype=torch.int64, masked=False)
    problem.labels += 2**24
    check_all(problem)


@pytest.mark.parametrize(("top_k", "last_group_free"), [(None, False), (3, False), (100, True)])
def test_lists_without_ties(top_k: int | None, last_group_free: bool, path: str) -> None:
    """`fused_kernel` has a way of their own for programs all of whose lists are so."""
    masked = top_k is not None  # the first list is full all the same
    problem = make(4, 2, 11, scale=3, masked=masked, top_k=top_k, last_group_free=last_group_free)
    problem.labels = torch.rand(4, 2, 11).argsort(-1).float()
    problem.beta *= torch.tensor([1.0, -1.0])
    check_all(problem)
    problem.options["order"] = best_first(problem)
    check_all(problem)


@pytest.mark.parametrize(
    ("path", "levels", "ordered"),
    [("fused", 4, True), ("fused", 1000, False)]  # the one path with a way of its own for lists without ties
    + [(path, levels, ordered) for path in PATHS for levels, ordered in ((4, False), (1000, True))],
)
def test_a_label_of_nan_makes_its_list_nan_alone(path: str, levels: int, ordered: bool, monkeypatch) -> None:
    take_path(path, monkeypatch)
    monkeypatch.setattr(_arguments, "readable", lambda tensor: False)  # as on a GPU: a label of NaN is not refused
    problem = make(4, 2, 9, levels=levels, scale=2)
    problem.mask[1] = True
    problem.labels[:, :, 3].masked_fill_(~problem.mask[:, None, 3], math.nan)
    if ordered:
        problem.options["order"] = best_first(problem)
    plain = results(plackett_luce_nll, problem)
    assert plain["loss"].isfinite().all()
    problem.labels[1, 0, 5] = math.nan
    found = results(plackett_luce_nll, problem)
    plain["loss"][1, 0], plain["beta"][1, 0] = math.nan, 0
    few = replace(problem, upstream=problem.upstream * torch.tensor([0.0, 1.0]), labels=problem.labels.nan_to_num())
    plain["scores"][1] = results(plackett_luce_nll, few)["scores"][1]
    compare(found, {name: value.double() for name, value in plain.items()}, 2e-6)


def test_items_that_an_order_leaves_out_have_no_gradient(path: str) -> None:
    problem = make(3, 2, 9, levels=1000, masked=False)
    order = best_first(problem)
    order[:, :, 2], order[:, :, 5:] = -1, 99
    ranked = order[:, :, [0, 1, 3, 4]]
    left = torch.ones(3, 2, 9, dtype=torch.bool).scatter_(-1, ranked, False).all(1)
    scores = problem.scores.clone().requires_grad_()
    loss = plackett_luce_nll(scores, problem.labels, problem.beta, order=order)
    gradient = torch.autograd.grad(loss.sum(), scores)[0]
    assert left.any() and torch.equal(gradient[left], torch.zeros(int(left.sum())))


def test_choices_without_a_chance_add_up() -> None:
    """The last of a ranking is certain to be chosen before each of the others, which no rounding may wear off.

    A product of rest / mass over the choices would lose a unit a choice where the division is an approximation.
    """
    items = 600
    scores = torch.randn(1, items)
    scores[0, -1] = 40.0
    problem = Problem(scores, torch.arange(items, 0, -1.0)[None, None], torch.ones(1, 1), None, torch.ones(1, 1))
    found = results(plackett_luce_nll, problem)
    assert found["scores"][0, -1].item() == pytest.approx(items - 1, rel=1e-6)


def test_extreme_scores(ties: str) -> None:
    problem = make(3, 1, 10, levels=6, scale=1e4, masked=False, ties=ties)
    problem.scores[0] /= 100
    check_all(problem)


def test_negative_betas_turn_the_scores_around(ties: str) -> None:
    problem = make(2, 2, 9, levels=4, scale=3, masked=False, ties=ties)
    problem.beta *= torch.tensor([1.0, -1.0])
    check_all(problem)


def test_a_beta_of_0_makes_all_items_equal(ties: str) -> None:
    problem = make(3, 2, 9, levels=4, ties=ties)
    problem.beta *= torch.tensor([0.0, 1.0])
    problem.mask[1, :6] = True
    check_all(problem)


@pytest.mark.parametrize("gap", [1.0, 10.0, 40.0, 80.0])
def test_confident_rankings_keep_every_digit_of_every_gradient(gap: float, path: str) -> None:
    scores = torch.arange(7, 0, -1.0)[None] * gap
    scores = scores[:, torch.tensor([3, 0, 6, 1, 5, 2, 4])]
    problem = Problem(scores, scores[:, None], torch.ones(1, 1), None, torch.ones(1, 1, dtype=torch.float64))
    found = results(plackett_luce_nll, problem)
    expected = results(reference.plackett_luce_nll, in_float64(problem))
    assert torch.allclose(found["loss"].double(), expected["loss"], rtol=1e-6, atol=0)
    assert torch.allclose(found["beta"].double(), expected["beta"], rtol=1e-5, atol=0)
    top, *_, bottom = scores[0].argsort(descending=True).tolist()
    for item in (top, bottom):  # the others are differences of two equal chances in the formula itself
        assert torch.allclose(found["scores"][0, item].double(), expected["scores"][0, item], rtol=1e-6, atol=0)
    size = float(expected["scores"].abs().max())
    assert float((found["scores"].double() - expected["scores"]).abs().max()) < 1e-6 * size


def test_a_tiny_loss_of_tied_items_in_any_order_keeps_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    take_path("steps", monkeypatch)
    scores = torch.tensor([[30.0, 31.0, 0.0, -1.0], [80.0, 30.0, 0.0, 1.0]])
    problem = make(2, 1, 4, masked=False, ties="exact")
    problem.scores, problem.beta = scores, torch.ones(2, 1)
    problem.labels = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(2, 1, 4)
    # Far above the rest, each item loses to it by chance: the loss is about the sum of the odds against.
    expected = [(1 + math.exp(-1)) * (math.exp(-30) + math.exp(-31)), (1 + math.e) * math.exp(-30)]
    found = results(plackett_luce_nll, problem)
    assert found["loss"][:, 0].tolist() == pytest.approx(expected, rel=2e-6)
    assert -found["scores"][0, 0].item() == pytest.approx((1 + math.exp(-1)) * math.exp(-30), rel=2e-6)


@pytest.mark.parametrize(("tied", "below"), [(2, 1), (5, 3), (90, 60)])
def test_equal_scores_in_any_order_are_counted_by_combinations(tied: int, below: int) -> None:
    """With equal scores every set of `tied` items out of all is equally likely to be on top."""
    labels = torch.cat([torch.ones(tied), torch.zeros(below)])[None, None]
    scores = torch.full((1, tied + below), 0.3, requires_grad=True)
    loss = plackett_luce_nll(scores, labels, torch.ones(1, 1), ties="exact")
    assert loss.item() == pytest.approx(math.log(math.comb(tied + below, tied)), rel=1e-6)
    loss.backward()
    gradient = scores.grad[0]
    assert torch.allclose(gradient[:tied], gradient[0]) and torch.allclose(gradient[tied:], gradient[-1])
    assert abs(float(gradient.sum())) < 1e-5 * float(gradient.abs().max())


def test_scores_of_minus_infinity(path: str) -> None:
    inf = math.inf
    scores = torch.tensor([[1.0, 0.5, -inf], [-inf, 0.5, 1.0], [1.0, -inf, -inf]])
    labels = torch.tensor([[[3.0, 2.0, 1.0]]]).expand(3, 1, 3)
    problem = Problem(scores, labels, torch.ones(3, 1), None, torch.ones(3, 1))
    found = results(plackett_luce_nll, problem)
    assert found["loss"][0].item() == pytest.approx(math.log1p(math.exp(-0.5)))  # at the bottom it costs nothing
    assert found["loss"][1] == inf
    assert found["scores"][1, 0] == -1 and found["scores"][1].isfinite().all()
    assert found["loss"][2].item() == pytest.approx(math.log(2))  # two equal scores


def test_an_item_that_cannot_win_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    take_path("steps", monkeypatch)
    scores = torch.tensor([[1.0, -math.inf, 0.5]])
    problem = Problem(scores, torch.tensor([[[1.0, 1.0, 0.0]]]), torch.ones(1, 1), None, torch.ones(1, 1))
    problem.options["ties"] = "exact"
    found = results(plackett_luce_nll, problem)
    assert found["loss"].item() == math.inf and found["scores"].isfinite().all()
    assert found["scores"][0, 1].item() == pytest.approx(-1)


def test_nan_stays_in_its_list(ties: str) -> None:
    problem = make(3, 1, 6, levels=4, masked=False, ties=ties)
    plain = results(plackett_luce_nll, problem)
    problem.scores[1, 4] = math.nan
    found = results(plackett_luce_nll, problem)
    others = torch.tensor([0, 2])
    for name, value in found.items():
        assert torch.equal(value[others], plain[name][others]), name
    assert found["loss"][1].isnan() and found["scores"][1].isnan().any()


def test_lists_with_fewer_than_two_items_contribute_nothing(ties: str) -> None:
    found = results(plackett_luce_nll, make(3, 1, 6, levels=3, ties=ties))
    for name, value in found.items():
        assert torch.equal(value[1:], torch.zeros_like(value[1:])), name


def test_the_loss_without_gradients_is_the_same(ties: str) -> None:
    problem = make(2, 1, 9, levels=4, masked=False, ties=ties)
    arguments = (problem.scores, problem.labels, problem.beta, problem.mask)
    alone = plackett_luce_nll(*arguments, ties=ties)
    assert torch.equal(alone, results(plackett_luce_nll, problem)["loss"])


def test_an_order_that_leaves_masked_items_out(path: str) -> None:
    problem = make(3, 2, 9, levels=4)
    plain = results(plackett_luce_nll, problem)
    order = best_first(problem)
    problem.options["order"] = torch.where(problem.mask[:, None].expand_as(order).gather(-1, order), order, -1)
    found = results(plackett_luce_nll, problem)
    for name, value in found.items():
        assert torch.allclose(value, plain[name], rtol=1e-5, atol=1e-7), name


def test_backward_twice_gives_the_same_bits(path: str) -> None:
    problem = make(3, 2, 9, levels=4)
    scores = problem.scores.clone().requires_grad_()
    loss = plackett_luce_nll(scores, problem.labels, problem.beta, problem.mask)
    first = torch.autograd.grad(loss.sum(), scores, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss.sum(), scores)[0])


def test_expanded_and_permuted_inputs(path: str) -> None:
    problem = make(4, 3, 6, levels=4, masked=False)
    labels = problem.labels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    beta = torch.tensor(0.7).expand(4, 3)
    plain = plackett_luce_nll(problem.scores, problem.labels, beta.contiguous())
    assert torch.equal(plackett_luce_nll(padded(problem.scores), labels, beta), plain)


@pytest.mark.parametrize(("batch", "objectives", "items"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_empty_batches(batch: int, objectives: int, items: int, path: str) -> None:
    scores = torch.zeros(batch, items, requires_grad=True)
    loss = plackett_luce_nll(scores, torch.zeros(batch, objectives, items), torch.ones(batch, objectives))
    assert torch.equal(loss, torch.zeros(batch, objectives))
    loss.sum().backward()
    assert torch.equal(scores.grad, torch.zeros(batch, items))


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
def test_second_derivatives(ties: str) -> None:
    problem = make(6, 2, 5, levels=3, ties=ties)
    expected = curvature(reference.plackett_luce_nll, in_float64(problem))
    compare(curvature(plackett_luce_nll, poisoned(problem)), expected, 2e-5)


def test_opcheck() -> None:
    problem = make(3, 2, 5, levels=3)
    leaves = (problem.scores.requires_grad_(), problem.labels, problem.beta.requires_grad_())
    torch.library.opcheck(_plackett_luce_nll, (*leaves, problem.mask, None, None, 3, "efron", True, True))


# ---------------------------------------------------------------- the real sizes, and where the paths change


def test_more_short_lists_than_one_program_holds(path: str) -> None:
    lists = plans.plan(2, 4, "breslow", False, False, 4).tile["LISTS"] if path != "steps" else 3
    check_all(make(lists + 3, 2, 2, levels=2))


@pytest.mark.parametrize("label_dtype", [torch.float32, torch.int64], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("items", [2, 3, 4, 8, 9, 16, 17, 31, 33, 128, 129])
def test_lists_of_every_plan(items: int, label_dtype: torch.dtype) -> None:
    check_all(make(2, 2 if items < 33 else 1, items, levels=items // 2 + 1, scale=2, label_dtype=label_dtype))


def test_lists_whose_last_index_fills_a_byte() -> None:
    """Every index of 8 bits is that of an item, and none says that there is no item, as in lists beyond the last."""
    assert plans.plan(256, 4, "breslow", False, False, 4).tile["LISTS"] > 1
    check_all(make(1, 1, 256, levels=1000, masked=False))


@pytest.mark.parametrize("items", [16, 17, 300])
def test_partial_rankings_of_every_plan(items: int) -> None:
    problem = make(2, 1, items, levels=9, scale=2, top_k=items // 3, last_group_free=True)
    check_all(problem)
    problem.options["order"] = best_first(problem).to(torch.int32)
    check_all(problem)


@pytest.mark.parametrize("items", [plans.PAIRWISE_ITEMS, plans.PAIRWISE_ITEMS + 1, 40, 128])
def test_efron_on_both_sides_of_the_pairwise_limit(items: int) -> None:
    check_all(make(2, 1, items, levels=9, scale=2, ties="efron"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [0, 1])
def test_both_sides_of_the_fused_limit(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    items = 2048 + more
    monkeypatch.setattr(plans, "fused_limit", lambda itemsize: 2048)  # the real one takes twice the time
    problem = make(1, 1, items, levels=200, scale=3, masked=False)
    problem.mask = torch.rand(1, items) < 0.9
    check_all(problem, tolerance=4e-6)


# ---------------------------------------------------------------- the order


def sorted_by_kernel(labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    from mopl.ops.plackett_luce.gpu import _sorted

    order = _sorted(labels, mask).long()
    assert torch.equal(order.sort(-1).values, torch.arange(labels.shape[-1]).expand(labels.shape))
    return order


@pytest.mark.parametrize("items", [2, 5, 40])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool],
    ids=str,
)
def test_the_order_of_labels_of_any_dtype(dtype: torch.dtype, items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their extremes, too: first what is largest, equal labels as they came, masked items last."""
    tile = plans.order_tile
    monkeypatch.setattr(plans, "order_tile", lambda items: {**tile(items), "LISTS": 4})
    if dtype == torch.bool:
        labels = torch.rand(3, 2, items) < 0.5
    elif dtype.is_floating_point:
        info = torch.finfo(dtype)
        labels = torch.randn(3, 2, items).to(dtype)
        labels[0, 0, :2] = torch.tensor([info.tiny, -info.tiny])
        labels[0, 1, :2] = torch.tensor([-math.inf, info.min])
        labels[1, 0, :2] = torch.tensor([info.max, math.inf])
        labels[1, 1, :2] = torch.tensor([0.0, math.nan])
    else:
        info = torch.iinfo(dtype)
        labels = torch.randint(info.min, info.max, (3, 2, items), dtype=dtype)
        labels[0, 0, :2] = torch.tensor([info.min, info.max])
        labels[2] = torch.randint(0, 3, (2, items)).to(dtype)
    comparable = labels.double()
    assert torch.equal(sorted_by_kernel(labels), comparable.argsort(dim=-1, descending=True, stable=True))
    mask = torch.rand(3, items) < 0.7
    mask[0] = False
    hidden = torch.where(mask[:, None], -comparable.nan_to_num(math.inf, math.inf, -math.inf), math.inf)
    found = sorted_by_kernel(labels, mask)
    real = mask[:, None].expand_as(found).gather(-1, found)
    assert torch.equal(real.sort(-1, descending=True).values, real), "a masked item before a real one"
    values = hidden.gather(-1, found)
    assert (values[..., 1:] >= values[..., :-1]).all()


def test_the_lowest_label_comes_before_masked_items(path: str) -> None:
    labels = torch.tensor([[[-math.inf, 1.0, torch.finfo(torch.float32).min, 0.0]]])
    problem = Problem(
        torch.randn(1, 4), labels, torch.ones(1, 1), torch.tensor([[True, True, True, False]]), torch.ones(1, 1)
    )
    if path == "steps":
        problem.labels[..., 2] = -3.0  # PyTorch's sort is told -inf by the lowest finite label
    expected = results(
        reference.plackett_luce_nll, in_float64(replace(problem, labels=torch.tensor([[[1.0, 3, 2, 0]]])))
    )
    found = results(plackett_luce_nll, problem)
    compare(found, expected, 2e-6)


# ---------------------------------------------------------------- more programs than one dimension of a grid holds


class Recorder:
    """Stands for a kernel: takes its launches down instead of running them."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *_, **__: self.grids.append(grid)


@pytest.mark.parametrize(("items", "ties"), [(2, "exact"), (20, "efron"), (2, "efron"), (2, "breslow")])
def test_no_dimension_of_a_grid_reaches_2_to_the_31(items: int, ties: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mopl.ops.plackett_luce import gpu as launcher

    recorder = Recorder()
    for module, name in (
        (launcher.fused, "fused_kernel"), (launcher.scans, "suffix_kernel"), (launcher.scans, "chain_kernel"),
        (launcher.groups, "group_kernel"), (launcher.list_order, "order_kernel"),
        (launcher.pairwise, "pairwise_kernel"), (launcher.pairwise, "backward_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, recorder)
    batch, objectives = 2**31 + 5, 2
    scores = torch.empty(batch, items, device="meta")
    labels = torch.empty(batch, objectives, items, device="meta")
    beta = torch.empty(batch, objectives, device="meta")
    lists = Lists(scores, labels, beta, None, None, None, Rule(None, ties, False))
    loss, gradient, _ = launcher.forward(lists, True)
    launcher.backward(loss, beta, gradient)
    assert len(recorder.grids) >= 2
    assert all(grid[0] < 2**31 and (len(grid) == 1 or grid[1] < 2**16) for grid in recorder.grids)
    if ties == "exact":
        assert all(grid[0] * grid[1] >= batch * objectives for grid in recorder.grids[-4:-1])


@pytest.mark.parametrize("ties", ["breslow", "efron", "exact"])
def test_a_grid_of_several_rows(ties: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_path("steps", monkeypatch)
    folded = plans.folded
    monkeypatch.setattr(plans, "folded", lambda programs: folded(programs, 3))
    check_all(make(2, 2, 9, levels=4, ties=ties))


@pytest.mark.parametrize("apart", [("scores", "labels", "mask"), ("order",), ("beta",)], ids=" ".join)
def test_offsets_past_2_to_the_31(apart: tuple[str, ...], ties: str) -> None:
    problem = make(4, 1, 9, dtype=torch.bfloat16, levels=3, ties=ties, label_dtype=torch.uint8)
    order = best_first(problem).short() if "order" in apart else None
    problem.options["order"] = order
    plain = results(plackett_luce_nll, problem)
    if order is None:
        problem = replace(problem, **{name: far_apart(getattr(problem, name)) for name in apart})
    else:
        problem.options["order"] = far_apart(order)
    for name, value in results(plackett_luce_nll, problem).items():
        assert torch.equal(value, plain[name]), name


# ---------------------------------------------------------------- the plan


def test_the_plan() -> None:
    def chosen(*arguments) -> tuple[str, str]:
        return plans.plan(*arguments)[:2]

    for items in range(2, 17):
        alone = "nobody" if items <= 8 else "argsort"
        assert chosen(items, 4, "breslow", False, False, 8) == ("fused", alone), items
        assert chosen(items, 4, "efron", False, False, 4) == chosen(items, 4, "breslow", True, False, 4)
    for items in (9, 17, 120, 4096):
        assert chosen(items, 4, "breslow", False, True, 8) == ("fused", "given")
        assert chosen(items, 4, "breslow", False, False, 4) == ("fused", "kernel")
        assert chosen(items, 4, "breslow", False, False, 8) == ("fused", "argsort")  # keys hold 33 bits of a label
        assert chosen(items, 4, "efron", False, False, 2) == (
            ("steps", "kernel") if items > 16 else ("pairs", "nobody")
        )
    assert chosen(4097, 4, "breslow", False, False, 4) == ("steps", "argsort")
    assert chosen(4096, 8, "breslow", False, True, 8) == ("steps", "given")
    assert chosen(16, 4, "efron", True, False, 4) == ("pairs", "nobody")
    assert chosen(2, 4, "exact", False, False, 4) == ("steps", "kernel")


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("items", [1, 2, 3, 16, 17, 32, 33, 256, 257, 1000, 2048, 4096])
def test_a_fused_tile_holds_a_list_and_no_thread_is_idle(items: int, itemsize: int) -> None:
    tile = plans.fused_tile(items, itemsize)
    assert items <= tile["ROWS"] * tile["LANES"] < 2 * max(items, 2)
    assert tile["LISTS"] * tile["LANES"] == 32 * tile["num_warps"] <= 1024
    assert tile["ROWS"] <= 8  # 16 rows compile for more than 10 s
