"""Control after training and scalarisers, beside their formulas in fifty digits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hostile import FLOATS, TAME, agree, budget, gradients, laid_out, masks, poison, spread, tensors, upstream
from hypothesis import given
from hypothesis import strategies as st
from list_losses import summed
from running import Dual, Real, arithmetic, dual_total, exp, log1p, real, total
from torch import Tensor

from mopl.losses import scalarize
from mopl.steering import beta_conditioned, log_mix, mix_experts, modpo_reward, realign, rescale


def rows_of(values: Tensor) -> list[list[Real]]:
    return [[real(v) for v in row] for row in values.tolist()]


def mixture(
    parts: list[Tensor], shares: list[list[float]], reference: Tensor | None, mask: Tensor | None, normalize: bool
) -> list[list[Any]]:
    """s0 + sum_e c_e (s_e - s0), or sum_e c_e s_e; normalised, minus the logsumexp over what exists."""
    results = []
    for b in range(len(parts[0])):
        row: list[Any] = []
        for i in range(parts[0].shape[1]):
            at = [float(p[b, i]) for p in parts]
            start = None if reference is None else float(reference[b, i])
            if (
                (mask is not None and not mask[b, i])
                or start == -math.inf
                or any(s == -math.inf and c[b] for s, c in zip(at, shares, strict=True))
            ):
                row.append(None)
                continue
            kept = [(c[b], s) for c, s in zip(shares, at, strict=True) if s != -math.inf]
            if start is None:
                row.append(total(real(c) * s for c, s in kept))
            else:
                # Shares first: with c = 1 the score itself is the result.
                rest = 1 - total(real(c) for c, _ in kept)
                row.append(total([rest * start, *(real(c) * s for c, s in kept)]))
        finite = [r for r in row if r is not None]
        if normalize and finite:
            top = max(finite, key=lambda r: r.value)
            mass = total(exp(r - top) for r in finite)
            row = [None if r is None else (r - top) - log1p(mass - 1) for r in row]
        results.append([-math.inf if r is None else r for r in row])
    return results


@st.composite
def mixtures(draw: st.DrawFn, most: int = 3) -> dict[str, Any]:
    batch, items, experts = (
        draw(st.sampled_from([1, 2, 0])),
        draw(st.sampled_from([2, 3, 1, 5])),
        draw(st.integers(1, most)),
    )
    dtype = draw(st.sampled_from(FLOATS))
    mask = draw(masks(batch, items))
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    impossible = draw(st.sampled_from([0.0, 0.3]))

    def scores() -> Tensor:
        values = draw(tensors((batch, items), dtype, TAME))
        values = values.masked_fill(torch.from_numpy(g.random((batch, items)) < impossible), -math.inf)
        return draw(laid_out(poison(values, mask, 1)))

    return {
        "parts": [scores() for _ in range(experts)],
        "reference": scores() if draw(st.booleans()) else None,
        "mask": mask,
        "normalize": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
        "g": g,
    }


@budget(80)
@given(mixtures(), st.booleans())
def test_log_mix_by_formula(case: dict[str, Any], per_list: bool) -> None:
    parts, batch = case["parts"], len(case["parts"][0])
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    choices = [1.0, 0.0, 0.5, -1.0, 2.0, 1 / 3, 30.0]
    shares = [case["g"].choice(choices, batch if per_list else ()) for _ in parts]
    given = [torch.from_numpy(np.asarray(s)).to(wide) if per_list else float(s) for s in shares]
    found = log_mix(parts, given, reference=case["reference"], normalize=case["normalize"], mask=case["mask"])
    assert found.dtype == wide
    with arithmetic(wide):
        exact = [torch.as_tensor(s, dtype=wide).double().expand(batch).tolist() for s in given]
        agree(found, mixture(parts, exact, case["reference"], case["mask"], case["normalize"]), "mixture")


@budget(60)
@given(mixtures(1), st.sampled_from(["rescale", "realign", "temperature"]), st.sampled_from([1.0, 0.5, 4.0, 0.1]))
def test_rescaling_by_formula(case: dict[str, Any], kind: str, c: float) -> None:
    scores, reference = case["parts"][0], case["reference"]
    reference = torch.zeros_like(scores) if reference is None else reference
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    options = {"normalize": case["normalize"], "mask": case["mask"]}
    if kind == "rescale":
        found, share = rescale(scores, reference, c, **options), 1 / c
    elif kind == "realign":
        found, share = realign(scores, reference, c, **options), c
    else:
        found, share = (
            beta_conditioned(scores, reference, [c / 4, 3 * c / 4], **options),
            1 / (c / 4 + 3 * c / 4),
        )
    share = float(torch.tensor(share, dtype=wide))
    with arithmetic(wide):
        agree(found, mixture([scores], [[share] * len(scores)], reference, case["mask"], case["normalize"]), kind)


@budget(60)
@given(mixtures(), st.booleans())
def test_mix_experts_by_formula(case: dict[str, Any], per_list: bool) -> None:
    parts, batch = case["parts"], len(case["parts"][0])
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    w = torch.from_numpy(case["g"].dirichlet([1.0] * len(parts), batch if per_list else None)).to(wide)
    found = mix_experts(parts, w, normalize=case["normalize"], mask=case["mask"])
    with arithmetic(wide):
        shares = w.double().expand(batch, len(parts)).T.tolist()
        agree(found, mixture(parts, shares, None, case["mask"], case["normalize"]), "mixture")


@budget(60)
@given(st.data(), st.integers(1, 3))
def test_modpo_reward_by_formula(data: st.DataObject, m: int) -> None:
    """MODPO, COS-DPO equation 17: r = (s - s0 - sum over j != i of w_j (s_j - s0)) / w_i."""
    batch, items = data.draw(st.sampled_from([1, 2, 0])), data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from(FLOATS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores, reference = (data.draw(tensors((batch, items), dtype, TAME)) for _ in "sr")
    anchor = data.draw(st.integers(0, m - 1))
    experts = [None if j == anchor else data.draw(tensors((batch, items), dtype, TAME)) for j in range(m)]
    w = np.random.default_rng(data.draw(st.integers(0, 2**20))).dirichlet([1.0] * m)
    found = modpo_reward(scores, reference, experts, w.tolist(), anchor)
    assert found.dtype == wide
    with arithmetic(wide):
        expected = []
        for b in range(batch):
            row = []
            for i in range(items):
                s0 = float(reference[b, i])
                terms = [(real(float(scores[b, i])) - s0) / float(w[anchor])]
                terms += [
                    -((real(float(e[b, i])) - s0) * (real(float(w[j])) / float(w[anchor])))
                    for j, e in enumerate(experts)
                    if e is not None
                ]
                row.append(total(terms))
            expected.append(row)
        agree(found, expected, "reward")


@budget(80)
@given(st.data(), st.sampled_from(["linear", "chebyshev", "smooth_chebyshev", "cosine_penalty"]))
def test_scalarisers_by_formula(data: st.DataObject, kind: str) -> None:
    """The formulas of Miettinen 1999, Lin et al. 2024 (2402.19078) and COS-DPO, equation 18."""
    batch, m = data.draw(st.sampled_from([1, 2, 3, 0])), data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from(FLOATS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    losses = data.draw(
        laid_out(data.draw(tensors((batch, m), dtype, ("integers", "normal", "confident", "offset", "tiny"))))
    )
    g = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    shape = data.draw(st.sampled_from([(m,), (batch, m)]))
    weights = torch.from_numpy(g.choice([0.0, 1.0, 0.25, 1e-3], shape)).to(wide)
    leaves: dict[str, Any] = {"loss_vector": losses, "weights": weights}
    options: dict[str, Any] = {}
    if kind in ("chebyshev", "smooth_chebyshev"):
        leaves["ideal"] = torch.from_numpy(g.choice([0.0, -1.0, 0.5], data.draw(st.sampled_from([(), (m,)])))).to(wide)
        leaves["ideal"] = torch.as_tensor(leaves["ideal"], dtype=wide)
    if kind == "chebyshev":
        options["rho"] = data.draw(st.sampled_from([0.0, 0.05]))
    if kind == "smooth_chebyshev":
        options["mu"] = data.draw(st.sampled_from([0.01, 1.0]))
    if kind == "cosine_penalty":
        options["sign"] = data.draw(st.sampled_from(["as_printed", "cosmos"]))
    weight = upstream((batch,), 5, wide)
    found = gradients(getattr(scalarize, kind), leaves, weight, **options)
    with arithmetic(wide):
        w, ideal = spread(weights, batch, m), spread(leaves.get("ideal"), batch, m, 0.0)
        values, slopes = [], {name: [] for name in leaves}
        for b in range(batch):
            L = [Dual.leaf(f"loss_vector{j}", v) for j, v in enumerate(losses[b].tolist())]
            W = [Dual.leaf(f"weights{j}", v) for j, v in enumerate(w[b])]
            Z = [Dual.leaf(f"ideal{j}", v) for j, v in enumerate(ideal[b])]
            value = scalarised(kind, L, W, Z, options)
            values.append(value.value)
            for name in leaves:
                slopes[name].append([float(weight[b]) * value.slopes.get(f"{name}{j}", real(0)) for j in range(m)])
        agree(found["value"], values, kind)
        for name, leaf in leaves.items():
            agree(
                found.get(name, torch.zeros_like(leaf)), summed(slopes[name], leaf.shape), f"{kind}: gradient of {name}"
            )


def scalarised(kind: str, L: list[Dual], W: list[Dual], Z: list[Dual], options: dict[str, Any]) -> Dual:
    weighted = dual_total(w * v for w, v in zip(W, L, strict=True))
    if kind == "linear":
        return weighted
    if kind == "cosine_penalty":
        squares = [dual_total(x.square() for x in side) for side in (L, W)]
        if not all(s.value.value for s in squares):
            return Dual(real(0))
        cosine = weighted / squares[0].sqrt() / squares[1].sqrt()
        return cosine if options["sign"] == "as_printed" else -cosine
    terms = [w * (v - z) for w, v, z in zip(W, L, Z, strict=True)]
    top = max(terms, key=lambda t: t.value.value)
    if kind == "smooth_chebyshev":
        mu = options["mu"]
        return top + mu * dual_total(((t - top) / mu).exp() for t in terms).log()
    best = top + options["rho"] * weighted
    near = [t for t in terms if abs(t.value.value - top.value.value) <= 8 * (t.value.error + top.value.error)]
    if len(near) > 1:  # they share the gradient, which is not judged
        return Dual(best.value, {name: Real(0, math.inf) for t in [best, *near] for name in t.slopes})
    return best
