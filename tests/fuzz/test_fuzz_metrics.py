"""NDCG of every convention, beside the mean over all rankings that the scores allow."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hostile import budget, laid_out, masks, poison
from hypothesis import given
from hypothesis import strategies as st

from mopl.pareto import bootstrap_means
from mopl.ranking.metrics import ndcg


@budget(120)
@given(st.data())
def test_ndcg_by_all_rankings(data: st.DataObject) -> None:
    batch, m, items = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(0, 5))
    g = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    values = data.draw(
        st.sampled_from([[0.0, 1.0], [0.0, -0.0, 1.0, -math.inf, math.inf], [1e30, 1e-30, 3.0, -2.0, 0.1]])
    )
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    scores = torch.from_numpy(g.choice(values, (batch, items))).to(dtype)
    labels = torch.from_numpy(g.choice([0.0, 1.0, 2.0, 4.0], (batch, m, items) if m > 1 else (batch, items)))
    labels = labels.to(data.draw(st.sampled_from([torch.float64, torch.float32, torch.int64, torch.float16])))
    mask = data.draw(masks(batch, items))
    options: dict[str, Any] = {
        "k": data.draw(st.sampled_from([None, 1, 2, 10])),
        "gain": data.draw(st.sampled_from(["linear", "exponential"])),
        "discount": data.draw(st.sampled_from(["log2", "mslr"])),
        "ties": data.draw(st.sampled_from(["average", "first", "worst"])),
        "empty": data.draw(st.sampled_from(["skip", 0, 1])),
        "short_lists": data.draw(st.sampled_from(["as_is", "zero"])),
    }
    found = ndcg(
        data.draw(laid_out(poison(scores, mask, 1))), data.draw(laid_out(poison(labels, mask, 2))), mask=mask, **options
    )
    assert found.values.dtype == torch.float64
    rows = labels if labels.ndim == 3 else labels[:, None]
    result = found.values if labels.ndim == 3 else found.values[:, None]
    for b, j in itertools.product(range(batch), range(rows.shape[1])):
        exists = [i for i in range(items) if mask is None or mask[b, i]]
        expected = by_definition(
            [float(scores[b, i]) for i in exists], [float(rows[b, j, i]) for i in exists], **options
        )
        assert float(result[b, j]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def by_definition(
    scores: list[float],
    labels: list[float],
    k: int | None,
    gain: str,
    discount: str,
    ties: str,
    empty: Any,
    short_lists: str,
) -> float:
    """Järvelin and Kekäläinen 2002: the sum of gains times discounts of their ranks, over that of the best ranking."""
    gains = [2**y - 1 if gain == "exponential" else y for y in labels]
    cut = len(gains) if k is None else k

    def dcg(order: Any) -> float:
        bases = (r + 1 if discount == "log2" else max(r, 2) for r in range(1, cut + 1))
        return math.fsum(gains[i] / math.log2(base) for i, base in zip(order, bases, strict=False))

    ideal = dcg(sorted(range(len(gains)), key=lambda i: -gains[i]))
    if ideal == 0:
        return math.nan if empty == "skip" else float(empty)
    if short_lists == "zero" and k is not None and len(gains) < k:
        return 0.0
    descending = sorted(scores, reverse=True)
    allowed = [o for o in itertools.permutations(range(len(gains))) if [scores[i] for i in o] == descending]
    if ties == "first":
        return dcg(min(allowed)) / ideal
    if ties == "worst":
        return dcg(min(allowed, key=lambda order: [gains[i] for i in order])) / ideal
    return math.fsum(map(dcg, allowed)) / len(allowed) / ideal


@budget(40)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**20))
def test_bootstrap_means_average_the_same_draws_for_every_column(queries: int, m: int, samples: int, seed: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=(queries, m)))
    means = bootstrap_means(values, samples, seed)
    again = bootstrap_means(torch.eye(queries, dtype=torch.float64), samples, seed)  # the shares of the queries
    assert torch.allclose(again.sum(1), torch.ones(samples, dtype=torch.float64))
    assert torch.allclose(means, again @ values, atol=1e-12)
    assert torch.allclose(again * queries, (again * queries).round())
