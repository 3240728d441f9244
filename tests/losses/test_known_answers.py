"""Other people's answers: published tables, documented values of other libraries, and statistics packages beside ours.

Each test names where its numbers come from. Nothing here compares `mopl` with itself.
"""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mopl.losses import approx_ndcg, bradley_terry, listwise_dpo, pairwise_logistic, plackett_luce

F64 = torch.float64


def minimise(parameters: Tensor, objective: Callable[[], Tensor]) -> float:
    """Run L-BFGS to float64 convergence on a convex objective; return its value."""
    optimizer = torch.optim.LBFGS(
        [parameters], lr=1, max_iter=1000, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    with torch.no_grad():
        return float(objective())


def pad(rankings: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return item ids (B, K) best first, labels that fall with the rank, and the mask of lists of different length."""
    longest = max(map(len, rankings))
    items = torch.zeros(len(rankings), longest, dtype=torch.long)
    mask = torch.zeros(len(rankings), longest, dtype=torch.bool)
    for row, ranking in enumerate(rankings):
        items[row, : len(ranking)] = torch.tensor(ranking)
        mask[row, : len(ranking)] = True
    labels = torch.arange(longest, 0, -1.0, dtype=F64).expand(len(rankings), longest)
    return items, labels, mask


# ---------------------------------------------------------------- Plackett–Luce, fitted


def test_nascar_2002_has_the_published_worths_and_likelihood(shared_data: Path) -> None:
    """Hunter (2004), MM algorithms for generalized Bradley–Terry models, Annals of Statistics 32(1), table 2."""
    season = json.loads((shared_data / "pl_bt" / "nascar2002.json").read_text())
    drivers = 83  # the other four came only last, so that their maximum-likelihood worth is zero
    races = [[d - 1 for d in race if d <= drivers] for race in season["orderings"]]
    items, labels, mask = pad(races)
    worth = torch.zeros(drivers, dtype=F64, requires_grad=True)
    nll = minimise(worth, lambda: plackett_luce(worth[items], labels, mask=mask, reduction="sum"))

    assert -nll == pytest.approx(season["computed_here"]["loglik"], abs=1e-7)
    relative = (worth - worth[0]).detach()
    names = season["drivers"]
    for name, published in season["published"].items():
        if name in names:
            assert float(relative[names.index(name)]) == pytest.approx(published, abs=0.0051), name
    ours = relative.numpy()
    # L-BFGS stops where the likelihood is flat to rounding; the reference was computed by another algorithm.
    np.testing.assert_allclose(ours, season["computed_here"]["log_worth_minus_driver1"], atol=2e-5)


@pytest.mark.parametrize("case", ["rankings-1", "rankings-2", "pairwise-1", "pairwise-2", "top1-1", "top1-2"])
def test_choix_cases(shared_data: Path, case: str) -> None:
    """The test cases of the package choix: full and partial rankings, pairs, and choices of one out of several."""
    data = json.loads((shared_data / "pl_bt" / f"choix_testcase-{case}.json").read_text())
    top_k = None
    if case.startswith("top1"):
        rankings, top_k = [[winner, *others] for winner, others in data["data"]], 1
    else:
        rankings = data["data"]
    items, labels, mask = pad(rankings)
    theta = torch.zeros(data["n_items"], dtype=F64, requires_grad=True)
    minimise(theta, lambda: plackett_luce(theta[items], labels, mask=mask, top_k=top_k, reduction="sum"))
    centred = theta.detach().numpy() - theta.detach().numpy().mean()
    expected = np.array(data["ml_est"])
    # The stored estimates of "rankings-2" stopped early: their likelihood's gradient is 2e-5, ours is 0 to rounding.
    np.testing.assert_allclose(centred, expected - expected.mean(), atol=5e-5 if case == "rankings-2" else 1e-6)


# ---------------------------------------------------------------- Bradley–Terry, fitted


def test_baseball_1987_has_agrestis_estimates(shared_data: Path) -> None:
    """Agresti (2002), Categorical Data Analysis, table 10.11, without the home advantage."""
    reference = json.loads((shared_data / "pl_bt" / "reference_values.json").read_text())["bradley_terry"]
    published = reference["baseball 1987 (Agresti 2002 Table 10.11 col 3)"]
    with open(shared_data / "pl_bt" / "baseball_agresti2002.csv") as file:
        rows = list(csv.DictReader(file))
    teams = ["Baltimore", *(name for name in published if name != "ref")]
    home = torch.tensor([teams.index(r["home.team"]) for r in rows])
    away = torch.tensor([teams.index(r["away.team"]) for r in rows])
    wins = torch.tensor([[float(r["home.wins"]), float(r["away.wins"])] for r in rows], dtype=F64)
    ability = torch.zeros(len(teams), dtype=F64, requires_grad=True)

    def nll() -> Tensor:
        chosen = torch.cat([ability[home], ability[away]])
        rejected = torch.cat([ability[away], ability[home]])
        return bradley_terry(chosen, rejected, weights=wins.T.reshape(-1, 1), reduction="sum")

    minimise(ability, nll)
    for team, value in published.items():
        if team != "ref":
            ours = float(ability[teams.index(team)] - ability[0])
            assert ours == pytest.approx(value, abs=6e-5), team


def test_citations_have_the_published_abilities_and_deviance(shared_data: Path) -> None:
    """Stigler (1994); Agresti (2002) p. 448; Turner and Firth (2012), Journal of Statistical Software 48(9)."""
    reference = json.loads((shared_data / "pl_bt" / "reference_values.json").read_text())["bradley_terry"]
    published = reference["citations (Stigler 1994; Agresti 2002 p448; BradleyTerry2 JSS 48(9))"]
    with open(shared_data / "pl_bt" / "citations_stigler1994.csv") as file:
        rows = list(csv.reader(file))
    journals, counts = rows[0][1:], np.array([row[1:] for row in rows[1:]], dtype=float)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    winner, loser = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    times = torch.tensor([counts[i, j] for i, j in pairs], dtype=F64)
    ability = torch.zeros(4, dtype=F64, requires_grad=True)
    nll = minimise(
        ability, lambda: bradley_terry(ability[winner], ability[loser], weights=times[:, None], reduction="sum")
    )
    for journal in journals[1:]:
        ours = float(ability[journals.index(journal)] - ability[0])
        assert ours == pytest.approx(published[journal], abs=6e-5), journal
    saturated = sum(-counts[i, j] * math.log(counts[i, j] / (counts[i, j] + counts[j, i])) for i, j in pairs)
    assert 2 * (nll - saturated) == pytest.approx(published["residual_deviance"], abs=6e-4)


# ---------------------------------------------------------------- survival analysis


@pytest.mark.parametrize("ties", ["breslow", "efron"])
@pytest.mark.parametrize("ranked", ["all", "top", "tied"])
def test_statsmodels_cox_partial_likelihood(ties: str, ranked: str) -> None:
    """Strata are lists, times are ranks, censored items are unranked: the partial likelihood and its score are ours."""
    phreg = pytest.importorskip("statsmodels.duration.hazard_regression").PHReg
    generator = np.random.default_rng({"all": 1, "top": 2, "tied": 3}[ranked])
    lists, items, top = 6, 7, 3
    for _ in range(5):
        scores = generator.normal(size=(lists, items)) * 2
        if ranked == "tied":
            rank = generator.integers(0, 3, size=(lists, items))
        else:
            rank = np.stack([generator.permutation(items) for _ in range(lists)])
        event = rank < top if ranked == "top" else np.ones_like(rank, dtype=bool)
        model = phreg(
            rank.reshape(-1) + 1.0,
            np.eye(lists * items),
            status=event.reshape(-1).astype(float),
            strata=np.repeat(np.arange(lists), items),
            ties=ties,
        )
        ours = torch.tensor(scores, requires_grad=True)
        loss = plackett_luce(
            ours, torch.tensor(-rank.astype(float)), ties=ties, top_k=top if ranked == "top" else None, reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, ours)
        # PHReg drops strata without an event and orders rows within a stratum; the parameters are unaffected.
        assert -float(loss) == pytest.approx(model.loglike(scores.reshape(-1)), rel=1e-12)
        np.testing.assert_allclose(-gradient.numpy().reshape(-1), model.score(scores.reshape(-1)), atol=1e-11)


@pytest.mark.parametrize(
    ("ties", "estimate", "loglikelihood"), [("breslow", 1.475285, -3.824750), ("efron", 1.676857, -3.358975)]
)
def test_therneaus_validation_data(ties: str, estimate: float, loglikelihood: float) -> None:
    """Therneau and Grambsch (2000), Modeling Survival Data, appendix E, test data 1: closed forms worked by hand.

    Times 1 1+ 6 6 8+ 9 with covariate x = 1 1 1 0 0 0; Breslow's log-likelihood is 2b - log(3r + 3) - 2 log(r + 3) with
    r = exp(b). A subject who is censored leaves the risk set, so each event time is a list of its own.
    """
    beta = torch.zeros((), dtype=F64, requires_grad=True)
    first = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]], dtype=F64)  # time 1: one death among all six
    second = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=F64)  # time 6: two tied deaths (x = 1 and 0) among four

    def nll() -> Tensor:
        one = plackett_luce(beta * first, torch.tensor([[1.0, 0, 0, 0, 0, 0]]), top_k=1, ties=ties, reduction="sum")
        two = plackett_luce(beta * second, torch.tensor([[1.0, 1, 0, 0]]), top_k=2, ties=ties, reduction="sum")
        return one + two

    assert float(nll()) == pytest.approx(
        math.log(6) + (2 * math.log(4) if ties == "breslow" else math.log(4) + math.log(3)), rel=1e-12
    )
    assert -minimise(beta, nll) == pytest.approx(loglikelihood, abs=1e-6)
    assert float(beta) == pytest.approx(estimate, abs=1e-6)


# ---------------------------------------------------------------- documented values of other libraries


@pytest.mark.parametrize("loss", [listwise_dpo, plackett_luce, pairwise_logistic])
def test_tensorflow_rankings_documented_two_item_value(loss: Callable[..., Tensor]) -> None:
    """TF-Ranking documents 0.7981389 for SoftmaxLoss, ListMLELoss, UniqueSoftmaxLoss and PairwiseLogisticLoss."""
    value = loss(torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]]))
    assert float(value) == pytest.approx(0.7981389, abs=2e-7)


def test_tensorflow_rankings_documented_ragged_values() -> None:
    """TF-Ranking documents SoftmaxLoss 0.83911896 and ApproxNDCGLoss -0.655107 and -0.80536866 (beta 0.1)."""
    scores = torch.tensor([[0.6, 0.8, math.nan], [0.5, 0.8, 0.4]])
    labels = torch.tensor([[1.0, 0.0, math.nan], [0.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert float(listwise_dpo(scores, labels, mask=mask)) == pytest.approx(0.83911896, abs=1e-7)
    smooth = approx_ndcg(scores, labels, mask=mask, beta=10.0, reduction="none")[:, 0]
    shift = 1.0 if float(smooth.detach()[0]) > 0 else 0.0  # a loss may be written as 1 - NDCG or as -NDCG
    assert float(smooth[0]) - shift == pytest.approx(-0.655107, abs=1e-6)
    assert float(smooth.mean()) - shift == pytest.approx(-0.80536866, abs=1e-6)


def test_tensorflow_rankings_documented_list_mle_is_one_of_the_tie_orders() -> None:
    """TF-Ranking documents ListMLELoss 1.1613163 for two lists, the second with a tie that it breaks at random."""
    second = 2 * 1.1613163 - 0.7981389
    scores = torch.tensor([[0.5, 0.8, 0.4]])
    orders = [float(plackett_luce(scores, torch.tensor([tie]))) for tie in ([1.0, 2.0, 0.0], [0.0, 2.0, 1.0])]
    # Twice the documented digits of a float32 value: 2e-6 is its rounding. The other order is 0.1 away.
    assert min(abs(value - second) for value in orders) < 3e-6


def test_raxs_softmax_and_pairwise_values() -> None:
    """The closed forms of rax's own tests, `rax/_src/losses_test.py`."""
    scores, labels = torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    total = sum(math.exp(s) for s in (0, 3, 1, 2))
    softmax = -(0.5 * math.log(math.exp(2) / total) + 0.5 * math.log(math.exp(1) / total))
    assert float(listwise_dpo(scores, labels)) == pytest.approx(softmax, rel=1e-6)
    pairs = sum(math.log1p(math.exp(-d)) for d in (1, -2, -1, 2))
    assert float(pairwise_logistic(scores, labels, reduction="sum")) == pytest.approx(pairs, rel=1e-6)


def test_raxs_extreme_scores_stay_finite() -> None:
    """Rax tests scores of ±1e26 to 1e37, where every `log(softmax + eps)` fails."""
    scores = torch.tensor([[0.0, -2.1e26, 3.4e37, 42.0]], requires_grad=True)
    loss = listwise_dpo(scores, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    loss.backward()
    assert float(loss) == pytest.approx(0.5 * 3.4e37, rel=1e-6)
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0, -0.5, 0.5, 0.0]]))


def test_allranks_hard_coded_list_mle_value() -> None:
    """allRank's own test; it adds 1e-10 inside the logarithm, which is below the digits compared here."""
    value = plackett_luce(torch.tensor([[0.5, 0.3]]), torch.tensor([[1.0, 0.0]]))
    assert float(value) == pytest.approx(0.5981389284133911, abs=1e-7)


def test_confident_lists_keep_every_digit() -> None:
    """A list that the model already ranks right by wide margins: allRank's formula gives 20 times the loss."""
    scores = torch.tensor([[60.0, 40.0, 20.0, 0.0]], requires_grad=True)
    loss = plackett_luce(scores, torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    loss.backward()
    exact = sum(
        math.log1p(sum(math.exp(b - a) for b in tail)) for a, tail in ((60, (40, 20, 0)), (40, (20, 0)), (20, (0,)))
    )
    assert float(loss) == pytest.approx(exact, rel=1e-6)
    assert float(scores.grad[0, 0]) == pytest.approx(-math.exp(-20), rel=1e-5)
