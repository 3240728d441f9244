"""Listwise cross-entropy and Plackett–Luce on hostile lists, beside the textbook's sums in fifty digits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from hostile import agree, budget, laid_out
from hypothesis import given
from hypothesis import strategies as st
from list_losses import DENSE, RANKED, WEIGHTS, Lists, check_losses, lists
from mpmath import mp
from running import Real, arithmetic, exp, log, log1p, real, total, unit

from mopl.losses import listwise_dpo, normalize_labels, plackett_luce, presort

# ---------------------------------------------------------------- listwise cross-entropy


def cross_entropy(case: Lists, b: int, j: int, exists: list[int], x: list[Real], rate: float) -> Any:
    """COS-DPO, equation 8: -sum_i z_i log softmax_i(u), labels normalised as section 2.2 says.

    Its gradient, q_i (sum of z) - z_i, is written as q_i (sum of other z) - z_i (sum of other q), where little cancels.
    """
    labels = case.labels_of(b, j)
    mode = case.options["normalize"]
    y = {i: real(float(labels[i])) for i in exists}
    mass, sharpness = total(y.values()), case.options.get("label_temperature", 1.0)
    if mode == "l1":
        if not mass.value > 0:
            return real(0), {i: real(0) for i in exists}, {i: real(0) for i in exists}
        z = {i: y[i] / mass for i in exists}
    elif mode == "softmax":
        top = max(exists, key=lambda i: y[i].value)
        e = {i: exp(y[i] / sharpness - y[top] / sharpness) for i in exists}
        z = {i: e[i] / total(e.values()) for i in exists}
    else:
        z = y
    best = max(exists, key=lambda i: x[i].value)
    e = {i: exp(rate * (x[i] - x[best])) if i != best else real(1) for i in exists}
    rest = total(e[i] for i in exists if i != best)
    q = {i: e[i] / (1 + rest) for i in exists}
    surprise = {i: rate * (x[best] - x[i]) + log1p(rest) for i in exists}
    loss = total(z[i] * surprise[i] for i in exists if z[i].value)
    by_u = {
        i: q[i] * total(z[k] for k in exists if k != i) - z[i] * total(q[k] for k in exists if k != i) for i in exists
    }
    by_z = {
        "l1": lambda i: (surprise[i] - loss) / mass,
        "softmax": lambda i: z[i] * (surprise[i] - loss) / sharpness,
        None: lambda i: surprise[i],
    }[mode]
    return loss, by_u, {i: by_z(i) for i in exists}


@budget(60)
@given(lists(WEIGHTS))
def test_listwise_dpo_by_sums(case: Lists) -> None:
    case.options["normalize"] = "l1"
    check_losses(case, listwise_dpo, cross_entropy)


@budget(60)
@given(lists(DENSE), st.sampled_from(["softmax", None]), st.sampled_from([1.0, 0.5, 20.0]))
def test_listwise_dpo_of_dense_labels(case: Lists, mode: str | None, sharpness: float) -> None:
    case.options["normalize"] = mode
    if mode == "softmax":
        case.options["label_temperature"] = sharpness
    check_losses(case, listwise_dpo, cross_entropy)


# ---------------------------------------------------------------- Plackett–Luce


def ranking_likelihood(case: Lists, b: int, j: int, exists: list[int], x: list[Real], rate: float) -> Any:
    """Plackett 1975: each position's item chosen from all that are left, with the rules of Cox regression for ties.

    Breslow 1974, Efron 1977; Kalbfleisch and Prentice 1973 for "exact", here the sum over all orders of a tied group.
    """
    labels = case.labels_of(b, j)
    options = case.options
    groups: list[list[int]] = []
    for i in sorted(exists, key=lambda i: -float(labels[i])):
        if groups and labels[groups[-1][0]] == labels[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    weights = options.get("position_weights")
    if weights is not None:
        weights = (weights if weights.ndim == 1 else weights[b, j]).tolist()
    by_u = {i: real(0) for i in exists}
    terms, start = [], 0
    for g, group in enumerate(groups):
        places = range(start, start + len(group))
        below = [i for lower in groups[g + 1 :] for i in lower]
        weight = total(real(weights[p]) for p in places) / len(group) if weights is not None else real(1)
        uncharged = options.get("top_k") is not None and start >= options["top_k"]
        if uncharged or (options.get("last_group") == "free" and g == len(groups) - 1):
            weight = real(0)
        start += len(group)
        if options["ties"] == "exact" and len(group) > 1:
            cost, slopes = _any_order(group, below, x, rate)
        else:
            cost, slopes = _in_steps(group, below, x, rate, options["ties"])
        if weight.value:
            terms.append(weight * cost)
            for i, slope in slopes.items():
                by_u[i] = by_u[i] + weight * slope
    return total(terms), by_u, None


def _choice(chosen: int, shares: dict[int, float], x: list[Real], rate: float) -> tuple[Real, dict[int, Real]]:
    """Return log(sum_l c_l exp(u_l)) - u_chosen, and c_l exp(u_l) over that sum."""
    best = max(shares, key=lambda i: x[i].value)
    e = {i: (exp(rate * (x[i] - x[best])) if i != best else real(1)) * share for i, share in shares.items()}
    whole = total(e.values())
    p = {i: value / whole for i, value in e.items()}
    if best == chosen and shares[best] == 1:
        return log1p(total(e[i] for i in e if i != best)), p
    return rate * (x[best] - x[chosen]) + log(whole), p


def _in_steps(group: list[int], below: list[int], x: list[Real], rate: float, ties: str) -> Any:
    slopes = {i: real(0) for i in [*group, *below]}
    costs = []
    for r, chosen in enumerate(group):
        share = 1 - r / len(group) if ties == "efron" else 1.0
        cost, p = _choice(chosen, {i: share for i in group} | {i: 1.0 for i in below}, x, rate)
        costs.append(cost)
        for i in slopes:
            slopes[i] = slopes[i] + (-total(p[k] for k in p if k != i) if len(group) == 1 and i == chosen else p[i])
    if len(group) > 1:
        slopes |= {i: slopes[i] - 1 for i in group}
    return total(costs), slopes


def _any_order(group: list[int], below: list[int], x: list[Real], rate: float) -> Any:
    """Return -log of the probability that the group comes first in any order, by summing all orders in 400 digits.

    The tolerance is that of the rule of quadrature, which the op documents.
    """
    if not below:
        return real(0), {i: real(0) for i in group}
    with mp.workdps(400):
        best = max(x[i].value for i in [*group, *below])
        e = {i: mp.exp(rate * (x[i].value - best)) for i in [*group, *below]}
        rest = mp.fsum(e[i] for i in below)
        probability, slope = mp.mpf(0), {i: mp.mpf(0) for i in e}
        for order in itertools.permutations(group):
            p, left, by = mp.mpf(1), rest, {i: mp.mpf(0) for i in e}
            for i in reversed(order):
                left += e[i]
                p *= e[i] / left
                inside = [*order[order.index(i) :], *below]
                for k in inside:
                    by[k] += e[k] / left
                by[i] -= 1
            probability += p
            for k in by:
                slope[k] += p * by[k]
        cost = -mp.log(probability)
        slope = {k: v / probability for k, v in slope.items()}
        reach = float(max(abs(rate * (x[i].value - best)) for i in e))
    rule = 4e-11 if unit() < 1e-10 else 2e-7
    moved = rule + reach * unit() + abs(rate) * max(x[i].error for i in e)
    errors = float(sum(abs(v) for v in slope.values())) * moved
    return Real(+cost, float(cost) * rule + errors), {
        i: Real(+v, rule + abs(float(v)) * moved) for i, v in slope.items()
    }


@st.composite
def rankings(draw: st.DrawFn) -> Lists:
    case = draw(lists(RANKED, largest=5))
    batch, objectives, items = case.shape
    ties = draw(st.sampled_from(["breslow", "efron", "exact"]))
    case.options = {
        "ties": ties,
        "top_k": draw(st.none() | st.integers(1, 6)),
        "last_group": draw(st.sampled_from(["charged", "free"])),
    }
    g = np.random.default_rng(case.seed)
    shape = draw(st.sampled_from([None, (items,), (batch, objectives, items)]))
    if shape is not None:
        values = torch.from_numpy(g.choice([0.0, 1.0, 0.5, 3.0, 31.0], shape)).to(case.dtype)
        case.options["position_weights"] = draw(laid_out(values))
    if draw(st.booleans()):
        case.options["order"] = presort(case.labels, case.mask)
    return case


@budget(80)
@given(rankings())
def test_plackett_luce_by_choices(case: Lists) -> None:
    check_losses(case, plackett_luce, ranking_likelihood)


# ---------------------------------------------------------------- labels


@budget(40)
@given(lists(DENSE), st.sampled_from(["l1", "softmax"]))
def test_normalized_labels(case: Lists, mode: str) -> None:
    labels = case.labels.abs() if mode == "l1" and case.labels.dtype != torch.bool else case.labels
    found = normalize_labels(labels, mode, case.mask)
    dtype = found.dtype
    assert (dtype == torch.float64) == (labels.dtype == torch.float64) or not labels.is_floating_point()
    assert found.shape == labels.shape
    rows = labels if labels.ndim == 3 else labels[:, None]
    with arithmetic(dtype):
        for b, j in itertools.product(range(rows.shape[0]), range(rows.shape[1])):
            exists = case.items(b)
            y = {i: real(float(rows[b, j, i])) for i in exists}
            if mode == "softmax" and exists:
                top = max(exists, key=lambda i: y[i].value)
                y = {i: exp(y[i] - y[top]) for i in exists}
            mass = total(y.values())
            expected = [y[i] / mass if i in exists and mass.value > 0 else 0.0 for i in range(rows.shape[2])]
            agree((found if found.ndim == 3 else found[:, None])[b, j], expected, f"labels[{b}, {j}]")
