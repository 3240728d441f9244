"""The policy gradient with every option, beside its definition token by token in fifty digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hostile import FLOATS, agree, budget, laid_out, tensors
from hypothesis import assume, given
from hypothesis import strategies as st
from running import Dual, Real, arithmetic, dual, dual_total, exp, expm1, real, sqrt, total
from torch import Tensor

from mopl.losses import policy_gradient, value_loss


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    group, groups, tokens, m = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 1, 2, 0])),
        draw(st.sampled_from([2, 3, 1, 2, 3, 0])),
        draw(st.integers(1, 3)),
    )
    rows = group * groups
    dtype = draw(st.sampled_from(FLOATS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = ("integers", "normal", "offset")
    g = np.random.default_rng(draw(st.integers(0, 2**20)))

    def close(to: Tensor) -> Tensor:
        return to + torch.from_numpy(g.normal(size=tuple(to.shape)) * 0.3).to(to.dtype)

    logprob = draw(tensors((rows, tokens), dtype, kinds))
    mask = draw(st.sampled_from([None, torch.from_numpy(g.random((rows, tokens)) < 0.7)]))
    case: dict[str, Any] = {
        "rewards": torch.from_numpy(g.choice([0.0, 1.0, -2.0, 0.3, 1e4], (rows, m))).to(wide),
        "weights": torch.from_numpy(g.dirichlet([1.0] * m, draw(st.sampled_from([None, rows])))).to(wide),
        "mask": mask,
        "kl_form": draw(st.sampled_from(["complement", "penalty"])),
        "kl_in": draw(st.sampled_from(["reward", "loss"])),
        "kl_estimator": draw(st.sampled_from(["k1", "k2", "k3", "exact", "k1", "k3"])),
        "kl_level": draw(st.sampled_from(["sequence", "token"])),
        "reference": draw(st.sampled_from([close(logprob), None, close(logprob), close(logprob)])),
        "to_go": draw(st.booleans()),
        "kl_weight": draw(st.sampled_from([0.1, 0.9, 0.5, 0.0])),
        "baseline": draw(st.sampled_from([None, "leave_one_out", "group", "values"])),
        "ratio_level": "token",
        "token_weights": draw(
            st.sampled_from([None, torch.from_numpy(g.choice([0.0, 1.0, 0.3, 2.0], (rows, tokens))).to(wide)])
        ),
    }
    if draw(st.booleans()):
        case["rewards"] = torch.from_numpy(g.choice([0.0, 1.0, -2.0, 0.3, 1e2], (rows, m, tokens))).to(wide)
    if case["reference"] is None and case["kl_estimator"] != "exact":
        case["kl_weight"] = 0.0
    elif draw(st.booleans()):
        case["kl_weight"] = torch.full((rows,), case["kl_weight"], dtype=wide)
    if case["kl_estimator"] == "exact":
        case["exact_kl"] = torch.from_numpy(g.gamma(1.0, 0.3, (rows, tokens))).to(wide)
    if case["baseline"] in ("leave_one_out", "group"):
        case["group"] = group if draw(st.booleans()) else torch.arange(rows) // group
        case["standardize"] = case["baseline"] == "group" and draw(st.booleans())
    elif case["baseline"] == "values":
        case["baseline"] = torch.from_numpy(g.normal(size=(rows,))).to(wide)
    if draw(st.integers(0, 2)):
        case["behaviour"] = close(logprob)
        case["clip"] = draw(st.sampled_from([None, 0.2, (0.1, 0.3)]))
        case["ratio_level"] = draw(st.sampled_from(["token", "sequence", "token", "sequence_mean"]))
        if case["ratio_level"] != "token":
            case["to_go"] = False
    return {"logprob": draw(laid_out(logprob)), "g": g, **case}


def estimator(x: Real, kind: str) -> Real:
    """Schulman 2020, "Approximating KL divergence"."""
    return {"k1": lambda: x, "k2": lambda: 0.5 * (x * x), "k3": lambda: expm1(-x) + x}[kind]()


@budget(200)
@given(batches())
def test_policy_gradient_by_definition(case: dict[str, Any]) -> None:
    case = dict(case)
    g = case.pop("g")
    logprob = case["logprob"].detach()
    rows, tokens = logprob.shape
    wide = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    leaf = logprob.requires_grad_()
    exact, c = case.get("exact_kl"), case["token_weights"]
    leaves = [leaf] if exact is None else [leaf, exact.requires_grad_()]
    found = policy_gradient(**{**case, "logprob": leaf}, reduction="none")
    up = torch.from_numpy(g.normal(size=rows)).to(wide)
    by = torch.autograd.grad((found.loss * up).sum(), leaves, allow_unused=True)
    with arithmetic(wide):
        there = [[t for t in range(tokens) if case["mask"] is None or case["mask"][b, t]] for b in range(rows)]
        kl_weight = torch.as_tensor(case["kl_weight"], dtype=torch.float64).expand(rows).tolist()
        w = case["weights"].double().expand(rows, -1).tolist()
        policy = [[real(v) for v in row] for row in logprob.detach().tolist()]
        returns, penalties, x = [], [], []
        for b in range(rows):
            by_token = case["rewards"].ndim == 3
            rewards = case["rewards"][b].T.tolist() if by_token else [case["rewards"][b].tolist()] * tokens
            share = 1 - real(kl_weight[b]) if case["kl_form"] == "complement" else real(1)
            gains = {t: share * total(real(a) * r for a, r in zip(w[b], rewards[t], strict=True)) for t in there[b]}
            earned = total(gains.values()) if by_token else next(iter(gains.values()), real(0))
            if exact is not None:
                kl = {t: real(float(exact[b, t].detach())) for t in there[b]}
            elif case["reference"] is None:
                kl = {}
            else:
                ratio = {t: policy[b][t] - float(case["reference"][b, t]) for t in there[b]}
                if case["kl_level"] == "sequence":
                    ratio = {None: total(ratio.values())}
                kl = {t: estimator(r, case["kl_estimator"]) for t, r in ratio.items()}
                x.append(ratio)
            penalties.append(kl)
            counted = kl if case["kl_in"] == "reward" else {}
            whole = earned - kl_weight[b] * total(counted.values())
            later = {
                t: (total(v for s, v in gains.items() if s >= t) if by_token else earned)
                - kl_weight[b] * total(k for s, k in counted.items() if s is None or s >= t)
                if case["to_go"]
                else whole
                for t in there[b]
            }
            returns.append((whole, later))
        agree(found.sequence_returns, [r[0] for r in returns], "returns")
        advantages = [
            {t: v - c for t, v in later.items()}
            for (_, later), c in zip(returns, baselines(case, returns, there), strict=True)
        ]
        if case.get("standardize"):
            scale = deviations(case, returns, there)
            advantages = [{t: v / (s + 1e-6) for t, v in row.items()} for row, s in zip(advantages, scale, strict=True)]
        credit = [{t: real(1 if c is None else float(c[b, t])) for t in there[b]} for b in range(rows)]
        weighed = [{t: credit[b][t] * v for t, v in row.items()} for b, row in enumerate(advantages)]
        agree(found.advantages, [[row.get(t, real(0)) for t in range(tokens)] for row in weighed], "advantages")
        losses = []
        for b in range(rows):
            own = {t: Dual.leaf(f"policy{t}", policy[b][t]) for t in there[b]}
            loss, importance = surrogate(case, b, own, advantages[b], credit[b])
            if loss is None:
                assume(False)
            losses.append(loss + kl_term(case, b, own, importance, penalties[b], x[b] if x else {}, kl_weight[b]))
        agree(found.loss.detach(), [loss.value for loss in losses], "loss")
        for name, gradient in zip(("policy", "exact"), by, strict=False):
            expected = [
                [float(up[b]) * loss.slopes.get(f"{name}{t}", real(0)) for t in range(tokens)]
                for b, loss in enumerate(losses)
            ]
            like = leaves[0] if name == "policy" else leaves[1]
            agree(torch.zeros_like(like) if gradient is None else gradient, expected, f"gradient of {name}")


def members(case: dict[str, Any], b: int, there: list[list[int]], leave_out: bool) -> list[int]:
    size = case["group"]
    number = (torch.arange(len(there)) // size if isinstance(size, int) else size).tolist()
    return [k for k in range(len(there)) if number[k] == number[b] and there[k] and not (leave_out and k == b)]


def baselines(case: dict[str, Any], returns: Any, there: list[list[int]]) -> list[Real]:
    kind = case["baseline"]
    if kind is None:
        return [real(0)] * len(there)
    if isinstance(kind, Tensor):
        return [real(v) for v in kind.tolist()]
    groups = [members(case, b, there, kind == "leave_one_out") for b in range(len(there))]
    return [mean([returns[k][0] for k in group]) for group in groups]


def mean(values: list[Real]) -> Real:
    return total(values) / len(values) if values else real(0)


def deviations(case: dict[str, Any], returns: Any, there: list[list[int]]) -> list[Real]:
    result = []
    for b in range(len(there)):
        values = [returns[k][0] for k in members(case, b, there, False)]
        centre = mean(values)
        result.append(sqrt(mean([(v - centre) * (v - centre) for v in values])))
    return result


def surrogate(
    case: dict[str, Any], b: int, own: dict[int, Dual], advantages: dict[int, Real], credit: dict[int, Real]
) -> Any:
    """Return the loss of a response, None at a kink, and the ratios of its tokens or its own.

    PPO, 1707.06347; GSPO and GSPO-token, 2507.18071.
    """
    behaviour, level, clip = case.get("behaviour"), case["ratio_level"], case.get("clip")
    if level == "token":
        advantages = {t: credit[t] * v for t, v in advantages.items()}
    if behaviour is None:
        return dual_total(-(dual(advantages[t]) * own[t]) for t in own), {t: real(1) for t in own}
    log_ratio = {t: own[t] - float(behaviour[b, t]) for t in own}
    if level != "token":
        slopes = {n: s * credit[t] for t, r in log_ratio.items() for n, s in r.slopes.items()}
        whole = Dual(dual_total(log_ratio.values()).value, slopes)
        if level == "sequence_mean":
            whole = whole / max(len(own), 1)
        advantages = {None: next(iter(advantages.values()), real(0))}
        log_ratio = {None: whole}
    terms = []
    for t, r in log_ratio.items():
        ratio, a = r.exp(), advantages[t]
        if clip is not None:
            low, high = clip if isinstance(clip, tuple) else (clip, clip)
            bound = 1 + high if a.value > 0 else 1 - low
            if abs(ratio.value.value - bound) <= 8 * ratio.value.error + 1e-6 or abs(a.value) <= 8 * a.error:
                return None, {}
            beyond = ratio.value.value > bound if a.value > 0 else ratio.value.value < bound
            ratio_used = (
                dual(real(bound) + Real(0, 1e-7 * (case["logprob"].dtype != torch.float64))) if beyond else ratio
            )
        else:
            ratio_used = ratio
        terms.append(-(ratio_used * dual(a)))
    return dual_total(terms), {t: exp(r.value) for t, r in log_ratio.items()}


def kl_term(
    case: dict[str, Any],
    b: int,
    own: dict[int, Dual],
    importance: dict[Any, Real],
    kl: dict[Any, Real],
    x: dict[Any, Real],
    kl_weight: float,
) -> Dual:
    """Return kl_weight times the KL in the loss: the estimate with the gradient x grad log pi, times the ratio."""
    exact = case.get("exact_kl")
    if exact is not None:
        terms = dual_total(Dual.leaf(f"exact{t}", float(exact[b, t].detach())) for t in own)
        return dual(kl_weight) * (terms * dual(importance[None]) if None in importance else terms)
    if case["kl_in"] != "loss" or case["reference"] is None:
        return dual(0)
    policy = own if None not in kl else {None: dual_total(own.values())}
    terms = {t: Dual(kl[t], {n: s * x[t] for n, s in policy[t].slopes.items()}) for t in kl}
    if None in importance:
        return dual(kl_weight) * dual_total(terms.values()) * dual(importance[None])
    if None in terms:
        whole = real(1)
        for ratio in importance.values():
            whole = whole * ratio
        return dual(kl_weight) * terms[None] * dual(whole)
    return dual(kl_weight) * dual_total(terms[t] * dual(importance[t]) for t in terms)


@budget(40)
@given(st.data())
def test_value_loss_by_definition(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(2, 3), (1, 1), (0, 2), (3, 0)]))
    dtype = data.draw(st.sampled_from(FLOATS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = data.draw(tensors(shape, dtype, ("integers", "normal", "offset"))).requires_grad_()
    returns = data.draw(tensors(shape, dtype, ("integers", "normal", "offset")))
    g = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    mask = torch.from_numpy(g.random(shape) < 0.7)
    loss = value_loss(values, returns, mask=mask, reduction="none")
    up = torch.from_numpy(g.normal(size=shape[0])).to(wide)
    (by,) = torch.autograd.grad((loss * up).sum(), values)
    with arithmetic(wide):
        expected, slopes = [], []
        for b in range(shape[0]):
            gap = {t: real(float(values[b, t])) - float(returns[b, t]) for t in range(shape[1]) if mask[b, t]}
            expected.append(0.5 * total(d * d for d in gap.values()) / max(len(gap), 1))
            slopes.append([float(up[b]) * gap[t] / len(gap) if t in gap else real(0) for t in range(shape[1])])
        agree(loss.detach(), expected, "loss")
        agree(by, slopes, "gradient of values")
