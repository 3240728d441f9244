"""Every loss of pairs with every option, beside its paper's formula, which the chain rule differentiates."""

from __future__ import annotations

from typing import Any

import torch
from hostile import FLOATS, agree, broadcastable, budget, gradients, laid_out, spread, tensors, upstream
from hypothesis import given
from hypothesis import strategies as st
from list_losses import summed
from running import Dual, arithmetic, dual, real, total, unit

from mopl.losses import bradley_terry

SMOOTHED = ["sigmoid", "sigmoid_norm", "exo_pair", "robust", "dpop", "aot", "aot_unpaired"]
WITH_MARGIN = ["sigmoid", "sigmoid_norm", "hinge", "exo_pair", "robust", "discopop", "dpop", "bco_pair"]
WITH_DIVERGENCE = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
OTHERS = ["nca_pair", "sppo_hard", "apo_zero", "apo_down"]


def logistic(x: Dual, e: Dual | float) -> Dual:
    """-(1 - ε) log s(x) - ε log s(-x)."""
    return (1 - dual(e)) * (-x).softplus() + dual(e) * x.softplus()


def divergence(ratio: Dual, options: dict[str, Any]) -> Dual:
    """f' at the ratio of policy to reference, up to a constant (Wang et al. 2023, table 1).

    Exponents are cut, and pass no gradient on, where exp would overflow.
    """

    def cut(exponent: Dual) -> Dual:
        most = 80.0 if unit() > 1e-10 else 700.0
        return exponent if exponent.value.value <= most else dual(most)

    name = options.get("f_divergence", "reverse_kl")
    if name == "forward_kl":
        return -cut(-ratio).exp()
    if name == "js_divergence":
        return -(-ratio).softplus()
    if name == "alpha_divergence" and options["f_alpha"] != 1:
        power = options["f_alpha"] - 1
        return cut(power * ratio).expm1() / power
    return ratio


def formula(kind: str, a: dict[str, Dual], options: dict[str, Any]) -> Dual:
    """Return the loss of one pair; the sources are those of the table in `mopl.losses.pairwise`."""
    w, l = (a[n] - a[f"reference_{n}"] if f"reference_{n}" in a else a[n] for n in ("chosen", "rejected"))
    beta, margin, e = a["beta"], a.get("margin", dual(0)), a.get("label_smoothing", dual(0))
    d = divergence(w, options) - divergence(l, options)
    x = beta * d - margin
    if kind in ("sigmoid", "sigmoid_norm"):
        return logistic(x, e)
    if kind == "hinge":
        return (1 - x).relu()
    if kind == "ipo":
        return (d - 1 / (2 * beta)).square()
    if kind == "exo_pair":
        wins = x.sigmoid() * (-(-x).softplus() - (1 - e).log())
        return wins + (-x).sigmoid() * (-x.softplus() - e.log())
    if kind == "robust":  # -(1-ε) log s(x) + ε log s(-x) over 1 - 2ε, and log s(x) - log s(-x) = x
        return (-x).softplus() - e / (1 - 2 * e) * x
    if kind == "discopop":
        steep = x / options["discopop_tau"]
        return (-x).softplus() * (-steep).sigmoid() + (-(-steep).softplus() - x).exp()
    if kind == "dpop":
        return logistic(beta * (w - l - options["dpop_lambda"] * (-w).relu()) - margin, e)
    rw, rl = beta * w, beta * l
    if kind == "nca_pair":
        return (-rw).softplus() + 0.5 * rw.softplus() + 0.5 * rl.softplus()
    if kind == "bco_pair":
        return (-(rw - margin)).softplus() + (rl - margin).softplus()
    if kind == "sppo_hard":
        return (w - 1 / (2 * beta)).square() + (l + 1 / (2 * beta)).square()
    if kind == "apo_zero":
        return (-rw).sigmoid() + rl.sigmoid()
    if kind == "apo_down":
        return rw.sigmoid() + (beta * (l - w)).sigmoid()
    raise AssertionError(kind)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from([*WITH_DIVERGENCE, "dpop", "bco_pair", *OTHERS]))
    batch, objectives = draw(st.sampled_from([1, 2, 4, 0])), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(FLOATS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    names = ["chosen", "rejected"] + (["reference_chosen", "reference_rejected"] if draw(st.booleans()) else [])
    case: dict[str, Any] = {"loss_type": kind}
    for name in names:
        shape = (batch,) if objectives == 1 and draw(st.booleans()) else (batch, objectives)
        room = min(
            torch.finfo(wide).max / 4096, torch.finfo(dtype).max
        )  # for the factors: products beyond the dtype are NaN, which shows
        case[name] = draw(laid_out(draw(tensors(shape, dtype)).clamp(-room, room)))
    case["beta"] = draw(broadcastable(batch, objectives, [1.0, 0.1, 0.01, 3.0], wide))
    case["weights"] = draw(st.none() | broadcastable(batch, objectives, [1.0, 0.0, 0.3, 2.5], wide))
    if kind in WITH_MARGIN and draw(st.booleans()):
        case["margin"] = draw(broadcastable(batch, objectives, [0.5, -2.0, 30.0], wide))
    if kind == "exo_pair" or (kind in SMOOTHED and draw(st.booleans())):
        case["label_smoothing"] = draw(broadcastable(batch, objectives, [0.1, 1e-3, 0.4], wide))
    if kind in WITH_DIVERGENCE:
        case["f_divergence"] = draw(st.sampled_from(["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]))
        if case["f_divergence"] == "alpha_divergence":
            case["f_alpha"] = draw(st.sampled_from([0.5, 1.0, 0.9, 1.5, 2.0, -1.0]))
    if kind == "discopop":
        case["discopop_tau"] = draw(st.sampled_from([0.05, 1.0, 0.5]))
    if kind == "dpop":
        case["dpop_lambda"] = draw(st.sampled_from([50.0, 1.0, 5.0]))
    case["seed"] = draw(st.integers(0, 2**20))
    return case


LEAVES = ("chosen", "rejected", "reference_chosen", "reference_rejected", "beta", "margin", "label_smoothing")


@budget(150)
@given(cases())
def test_bradley_terry_by_formulas(case: dict[str, Any]) -> None:
    case = dict(case)
    seed, kind = case.pop("seed"), case["loss_type"]
    batch = len(case["chosen"])
    objectives = (
        max(t.shape[1] for t in case.values() if isinstance(t, torch.Tensor) and t.ndim == 2)
        if any(isinstance(t, torch.Tensor) and t.ndim == 2 for t in case.values())
        else 1
    )
    dtype = torch.float64 if case["chosen"].dtype == torch.float64 else torch.float32
    weight = upstream((batch, objectives), seed, dtype)
    leaves = {name: case.pop(name) for name in (*LEAVES, "weights") if name in case}
    found = gradients(bradley_terry, leaves, weight, reduction="none", **case)
    assert found["value"].dtype == dtype and found["value"].shape == (batch, objectives)
    with arithmetic(dtype):
        grids = {}
        for name in LEAVES:
            if name in leaves:
                value = leaves[name]
                flat = isinstance(value, torch.Tensor) and name in LEAVES[:4] and value.ndim == 1
                grids[name] = spread(value[:, None] if flat else value, batch, objectives)
        shares = spread(leaves.get("weights"), batch, objectives)
        results = [
            [formula(kind, {n: Dual.leaf(n, g[b][j]) for n, g in grids.items()}, case) for j in range(objectives)]
            for b in range(batch)
        ]
        agree(
            found["value"],
            [[r.value * s for r, s in zip(*rows, strict=True)] for rows in zip(results, shares, strict=True)],
            kind,
        )
        ups = weight.tolist()
        for name, leaf in leaves.items():
            if not isinstance(leaf, torch.Tensor):
                continue
            by = [
                [
                    real(ups[b][j])
                    * (
                        results[b][j].value
                        if name == "weights"
                        else shares[b][j] * results[b][j].slopes.get(name, real(0))
                    )
                    for j in range(objectives)
                ]
                for b in range(batch)
            ]
            if name in LEAVES[:4] and leaf.ndim == 1:
                expected = [total(row) for row in by]
            else:
                expected = summed(by, leaf.shape)
            agree(found.get(name, torch.zeros_like(leaf)), expected, f"{kind}: gradient of {name}")
