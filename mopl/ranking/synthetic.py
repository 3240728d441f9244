"""The data set `synthetic`: MSLR-shaped lists whose best possible scores are known for every trade-off.

For each objective j a utility f_j(item, query) is fixed, partly linear and partly not, with directions that conflict
between the objectives, and p_j = softmax(f_j) over the list. A list has n_j labels in all: none with probability
1 - r_j, else a heavy-tailed number that does not depend on anything; these are dealt to the items by a multinomial
draw from p_j. So a list's l1-normalised labels have the expectation p_j, given that there are any, and the expected
loss at weights w and β = b (COS-DPO, eqs 8 and 11, a list without labels counting 0) is

    sum_j w_j r_j CE(p_j, softmax(b (s - s0)))    with CE(p, q) = -sum_i p_i log q_i.

It is least where softmax(b (s - s0)) = p_w, the mixture of the p_j by shares w_j r_j / sum_k w_k r_k. Hence

    s* = s0 + (1/b) log p_w  (up to a constant of the list),

and what any other scores lose is exactly (sum_j w_j r_j) KL(p_w || softmax(b (s - s0))).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mopl._arguments import check_choice
from mopl._counted import counted
from mopl._renamed import renamed_keywords
from mopl.ranking.data import RankingData, Truth
from mopl.ranking.objectives import Objective

MOST_NUMBERS = 2**34
LABEL_KINDS = ("counts", "dense")

# Shares of the grades 0..4 in MSLR-WEB10K, rounded.
_GRADE_SHARES = (0.52, 0.32, 0.13, 0.02, 0.01)
# Default standard deviation of the utilities over a list: p_j then puts about half its mass on a fifth of 20 items.
_SPREAD = 1.7
_WIDEST_SPREAD = 100.0  # one item of a list has all the mass long before
_LINEAR, _NONLINEAR = 0.8, 0.6  # their squares sum to 1
_MAIN_NOISE = 0.5  # the grade is the main utility plus this much noise: no ranker is perfect
# Cosines of the main direction with those of the objectives: some pull with the main objective, some against it.
_MAIN_ALIGNMENT = 0.45
_COUNT_SCALE, _COUNT_SPREAD = 3.0, 1.2  # labels a list: 1 + floor of a log-normal with this median and log-spread
_MOST_COUNTS = 100_000
_CONCENTRATION = 60.0  # of dense labels: pseudo-counts of the Dirichlet draw


def synthetic(
    queries: int = 4000,
    *,
    items: int = 20,
    features: int = 16,
    objectives: int = 5,
    labels: Literal["counts", "dense"] = "counts",
    spread: float = _SPREAD,
    conflict: float = 1.0,
    seed: int = 0,
) -> RankingData:
    """Generate a data set.

    Args:
        queries: Q, the number of lists, of all splits together. Counts are noisy labels: with 1,200 training lists a
            small transformer fits the noise within a few hundred steps, with 18,000 it comes steadily nearer to the
            optimum.
        items: mean number of items of a list; lengths are even between half and one and a half times that.
        features: F, at least 4; a quarter of them describe the query and are the same for all items of a list.
        objectives: m, from 1 to below 3/4 of `features`, named `aux1`, `aux2`, ...
        labels: `"counts"` for heavy-tailed, mostly-zero counts as described above; every second objective is sparser.
            `"dense"` for positive labels on all items of all lists (a Dirichlet draw around p_j): the rates are 1 and
            the targets less noisy.
        spread: sharpness of the truth, the standard deviation of each utility f_j over a list: near 0 every item is
            as good as every other, at 4 p_j puts most of its mass on one item. Above 0, at most 100.
        conflict: c from 0 to 1, the share of its own in the variance of each objective's utility; the rest is one
            utility that all objectives share. 1 is the widest conflict; at 0 all objectives want the same. Two of m
            utilities have a correlation of about 1 - c - 0.64 c / (m - 1), the cosine of the angle between them.
        seed: of everything; the same arguments give the same data.

    Returns:
        The data, with `truth`; the main objective `relevance` has grades 0 to 4.

    Raises:
        ValueError: if a number is out of range.
    """
    check_choice(labels, LABEL_KINDS, "labels")
    if queries < 1 or items < 2 or features < 4 or seed < 0:
        raise ValueError(
            f"queries, items, features, seed are {queries}, {items}, {features}, {seed}; "
            "they must be at least 1, 2, 4, 0"
        )
    if queries * items * features > MOST_NUMBERS:
        raise ValueError(
            f"queries x items x features is {queries} x {items} x {features} but must be at most {MOST_NUMBERS}, which "
            "are 64 GB; take fewer"
        )
    if not 0 < spread <= _WIDEST_SPREAD:
        raise ValueError(
            f"spread is {spread} but must be above 0 and at most {_WIDEST_SPREAD:g}; the default is {_SPREAD}"
        )
    if not 0 <= conflict <= 1:
        raise ValueError(f"conflict is {conflict} but must be from 0, none at all, to 1, the widest")
    of_query = features // 4
    of_item = features - of_query
    if not 1 <= objectives < of_item:
        raise ValueError(
            f"objectives is {objectives} but must be from 1 to {of_item - 1} with {counted(features, 'feature')}; "
            "give more features"
        )
    generator = np.random.Generator(np.random.Philox(seed))
    directions = _directions(generator, objectives, of_item)

    lengths = generator.integers(max(items // 2, 2), items + items // 2 + 1, size=queries)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    owner = np.repeat(np.arange(queries), lengths)
    context = generator.standard_normal((queries, of_query))[owner]
    inputs = generator.standard_normal((len(owner), of_item))

    utilities = _utilities(generator, inputs, context, directions)
    if conflict < 1:
        shared = _shared_utility(seed, inputs, context, directions[1:])
        utilities[:, 1:] = np.sqrt(conflict) * utilities[:, 1:] + np.sqrt(1 - conflict) * shared
    log_probs = np.stack([_log_softmax(spread * u, offsets) for u in utilities[:, 1:].T], axis=1)
    noisy = utilities[:, 0] + _MAIN_NOISE * generator.standard_normal(len(owner))
    grades = np.searchsorted(np.quantile(noisy, np.cumsum(_GRADE_SHARES)[:-1]), noisy)
    if labels == "counts":
        rates = np.where(np.arange(objectives) % 2 == 0, 0.9, 0.6)
        auxiliary = _counts(generator, log_probs, offsets, rates)
    else:
        rates = np.ones(objectives)
        auxiliary = generator.standard_gamma(_CONCENTRATION * np.exp(log_probs)) + np.finfo(np.float32).tiny
    return RankingData(
        features=torch.from_numpy(np.concatenate([inputs, context], axis=1)).float(),
        raw_main=torch.from_numpy(grades).float(),
        raw_auxiliary=torch.from_numpy(auxiliary).float(),
        offsets=torch.from_numpy(offsets),
        query_ids=torch.arange(queries),
        main=Objective("relevance"),
        objectives=tuple(Objective(f"aux{j + 1}") for j in range(objectives)),
        name="synthetic",
        feature_names=(*(f"item{i + 1}" for i in range(of_item)), *(f"query{i + 1}" for i in range(of_query))),
        truth=Truth(torch.from_numpy(log_probs), torch.from_numpy(rates)),
    )


def _directions(generator: np.random.Generator, objectives: int, size: int) -> np.ndarray:
    """Return unit directions (1 + m, size), the main one first, in a random orientation.

    Those of the objectives are the vertices of a regular simplex, each pair at the widest possible angle
    (cosine -1/(m - 1)); the main direction leans towards the odd vertices and away from the even ones.
    """
    basis = np.linalg.qr(generator.standard_normal((size, size)))[0].T
    vertices = np.eye(objectives) - (1 / objectives if objectives > 1 else 0)
    vertices /= np.linalg.norm(vertices, axis=1, keepdims=True)
    auxiliary = vertices @ basis[:objectives]
    lean = np.where(np.arange(objectives) % 2 == 0, 1.0, -1.0) @ auxiliary
    main = _MAIN_ALIGNMENT * lean / np.linalg.norm(lean) + np.sqrt(1 - _MAIN_ALIGNMENT**2) * basis[objectives]
    return np.concatenate([main[None], auxiliary])


def _utilities(
    generator: np.random.Generator, inputs: np.ndarray, context: np.ndarray, directions: np.ndarray
) -> np.ndarray:
    """Return utilities (N, 1 + m) of about unit variance: a linear part, and a bend whose sense the query decides."""
    count, size = directions.shape
    bends = generator.standard_normal((count, size))
    bends /= np.linalg.norm(bends, axis=1, keepdims=True)
    senses = generator.standard_normal((count, context.shape[1]))
    senses /= np.linalg.norm(senses, axis=1, keepdims=True)
    linear = inputs @ directions.T
    bent = np.tanh(1.5 * inputs @ bends.T) * np.tanh(1.5 * context @ senses.T)
    return _LINEAR * linear + _NONLINEAR * 2 * bent  # tanh(1.5 z) of a normal z has a standard deviation near 0.7


def _shared_utility(seed: int, inputs: np.ndarray, context: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return the utility (N, 1) that objectives agree on where their conflict is not the widest.

    Its linear part is at right angles to all of their directions (m, size). Its generator is its own, so that the
    data of one seed differ in nothing else between two conflicts.
    """
    generator = np.random.Generator(np.random.Philox([seed, 1]))
    direction = generator.standard_normal(directions.shape[1])
    direction -= np.linalg.pinv(directions) @ (directions @ direction)
    return _utilities(generator, inputs, context, (direction / np.linalg.norm(direction))[None])


def _log_softmax(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return log softmax of values (N,) within each list."""
    lengths = np.diff(offsets)
    shifted = values - np.repeat(np.maximum.reduceat(values, offsets[:-1]), lengths)
    return shifted - np.repeat(np.log(np.add.reduceat(np.exp(shifted), offsets[:-1])), lengths)


def _counts(
    generator: np.random.Generator, log_probs: np.ndarray, offsets: np.ndarray, rates: np.ndarray
) -> np.ndarray:
    """Deal heavy-tailed totals to the items: (N, m)."""
    lengths = np.diff(offsets)
    queries, width = len(lengths), lengths.max()
    # Lists are aligned at their ends: numpy gives the last category whatever rounding leaves over.
    places = np.arange(width) >= (width - lengths)[:, None]
    columns = []
    for j, rate in enumerate(rates):
        totals = 1 + np.exp(np.log(_COUNT_SCALE) + _COUNT_SPREAD * generator.standard_normal(queries)).astype(np.int64)
        totals = np.minimum(totals, _MOST_COUNTS) * (generator.random(queries) < rate)
        padded = np.zeros((queries, width))
        padded[places] = np.exp(log_probs[:, j])
        columns.append(generator.multinomial(totals, padded / padded.sum(1, keepdims=True))[places])
    return np.stack(columns, axis=1)


def true_mixture(data: RankingData, weights: Tensor) -> Tensor:
    """Return (N,) float64 log p_w, the log of what is optimal at weights (m,); errors as `true_scores`."""
    truth = _truth(data)
    shares = _shares(truth, weights)
    return torch.logsumexp(truth.log_probs + (shares / shares.sum()).log(), dim=1)


@renamed_keywords(temperature="beta")
def true_scores(data: RankingData, weights: Tensor, beta: float = 1.0, reference: Tensor | None = None) -> Tensor:
    """Return the scores (N,) float64 that minimise the expected loss: s0 + (1/b) log p_w, see the head of this file.

    A constant of each list is free. The data may be a subset or split, `beta` is b, common to all objectives, and
    `reference` (N,) are the scores s0 of the base model, 0 by default.

    Raises:
        ValueError: if the data has no known truth, or weights or reference have the wrong shape.
    """
    return _flat(data, reference, "reference") + true_mixture(data, weights) / beta


@renamed_keywords(temperature="beta")
def expected_losses(data: RankingData, scores: Tensor, beta: float = 1.0, reference: Tensor | None = None) -> Tensor:
    """Return (m,) float64, the expectation over labels of each objective's loss, averaged over lists, in nats.

    With `scores=true_scores(...)` these are the points of the true front. Arguments as of `true_scores`; lists of one
    item count 0.
    """
    truth = _truth(data)
    cross_entropy = -(truth.log_probs.exp() * _log_q(data, scores, beta, reference)[:, None]).sum(0) / len(data)
    return truth.rates * cross_entropy


@renamed_keywords(temperature="beta")
def distance_to_optimum(
    data: RankingData,
    scores: Tensor,
    weights: Tensor,
    beta: float = 1.0,
    reference: Tensor | None = None,
) -> float:
    """Return what scores (N,) lose against the optimum in expected weighted loss, in nats, averaged over lists.

    It is (sum_j w_j r_j) KL(p_w || softmax(b (s - s0))): 0 for `true_scores`, above 0 for all others. Arguments as of
    `true_scores`.
    """
    total = _shares(_truth(data), weights).sum()
    log_p = true_mixture(data, weights)
    divergence = (log_p.exp() * (log_p - _log_q(data, scores, beta, reference))).sum() / len(data)
    return max(float(total * divergence), 0.0)


def _truth(data: RankingData) -> Truth:
    if data.truth is None:
        raise ValueError(f"{data.name} was not generated, so its optimum is not known; use the data set synthetic")
    return data.truth


def _shares(truth: Truth, weights: Tensor) -> Tensor:
    """Return w_j r_j, (m,) float64."""
    weights = torch.as_tensor(weights, dtype=torch.float64).cpu()
    if weights.shape != truth.rates.shape or bool((weights < 0).any()) or not float(weights.sum()) > 0:
        raise ValueError(
            f"weights is {weights.tolist()} but must be {len(truth.rates)} numbers, none below 0 and one above"
        )
    return weights * truth.rates


def _flat(data: RankingData, values: Tensor | None, name: str) -> Tensor:
    if values is None:
        return torch.zeros(data.num_items, dtype=torch.float64)
    if tuple(values.shape) != (data.num_items,):
        raise ValueError(f"{name} has shape {tuple(values.shape)} but must be ({data.num_items},), one an item")
    return values.detach().double().cpu()


def _log_q(data: RankingData, scores: Tensor, beta: float, reference: Tensor | None) -> Tensor:
    """Return log softmax(b (s - s0)) within each list, (N,) float64."""
    moved = beta * (_flat(data, scores, "scores") - _flat(data, reference, "reference"))
    return torch.from_numpy(_log_softmax(moved.numpy(), data.offsets.numpy()))
