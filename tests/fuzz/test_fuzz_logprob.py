"""Log-probabilities, entropies and KL divergences of hostile logits, beside softmax by its definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hostile import FLOATS, TAME, agree, budget, gradients, laid_out, tensors, upstream
from hypothesis import given
from hypothesis import strategies as st
from running import Real, arithmetic, exp, log1p, real, size, tanh, total, unit
from torch import Tensor

from mopl.ops import gathered_logprob, linear_kl, linear_logprob, sequence_logprob


class Softmax:
    """One row's distribution: u = softcap tanh(scale a / softcap) / T, p = exp(u - logsumexp)."""

    def __init__(self, logits: list[Real | None], temperature: float, softcap: float | None, scale: float) -> None:
        """`logits` are None where they are -inf, which a softcap makes -softcap."""
        self.possible = [v for v, a in enumerate(logits) if a is not None or softcap]
        self.temperature = temperature
        bent = {
            v: None if not softcap else tanh(scale * a / softcap) if (a := logits[v]) else real(-1)
            for v in self.possible
        }
        capped = {v: softcap * bent[v] if softcap else logits[v] * scale for v in self.possible}
        self.slope = {
            v: (1 - bent[v]) * (1 + bent[v]) * scale / temperature if softcap else real(scale) / temperature
            for v in self.possible
        }
        # The ops divide the logits, and not their differences, by the temperature.
        self.u = capped if temperature == 1 else {v: c / temperature for v, c in capped.items()}
        self.top = top = max(self.possible, key=lambda v: capped[v].value)
        away = {v: self.u[v] - self.u[top] for v in self.possible}
        rest = total(exp(away[v]) for v in self.possible if v != top)
        self.mass = log1p(rest)
        self.logp = {v: away[v] - self.mass if v != top else -self.mass for v in self.possible}
        self.logsumexp = self.u[top] + self.mass
        self.p = {v: exp(away[v]) / (1 + rest) for v in self.possible}
        self.entropy = total(-(self.p[v] * self.logp[v]) for v in self.possible)

    def seen_from(self, targets: list[int]) -> None:
        """Let the entropy be as exact as sums about the likeliest target are, which the ops leave out of their sums."""
        near = min((size(self.logp[y].value) for y in targets if y in self.logp), default=0.0)
        self.entropy = Real(self.entropy.value, self.entropy.error + unit() * (1 + min(near, 50.0)))
        # Backward passes take p relative to the likeliest target's, or as exp(u - logsumexp), rounded likewise.
        self.round(max(min(near, size(self.logsumexp.value)), 64.0))
        self.logsumexp = Real(self.logsumexp.value, self.logsumexp.error + unit())

    def round(self, exponent: float) -> None:
        """Let every p be as exact as exp of a number of this size."""
        self.p = {v: Real(p.value, p.error + size(p.value) * unit() * exponent) for v, p in self.p.items()}

    def others(self, v: int) -> Real:
        """Return 1 - p_v."""
        return total(self.p[k] for k in self.possible if k != v)

    def by_u(self, targets: dict[int, Real], g_lse: Real, g_entropy: Real) -> dict[int, Real]:
        """Return the gradient by u of sum g log p(target) + g_lse logsumexp + g_entropy H."""
        result = {}
        for v in self.possible:
            terms = [g_lse * self.p[v], -(g_entropy * self.p[v] * (self.logp[v] + self.entropy))]
            terms += [g * self.others(v) if y == v else -(g * self.p[v]) for y, g in targets.items()]
            result[v] = total(terms)
        return result

    def by_temperature(self, targets: dict[int, Real], g_lse: Real, g_entropy: Real) -> Real:
        """d/dT, from d logprob/dT = -(u - E[u])/T + ... = -(log p + H)/T, d lse/dT = -E[u]/T, dH/dT = Var(u)/T."""
        variance = total(
            self.p[v] * (self.logp[v] + self.entropy) * (self.logp[v] + self.entropy) for v in self.possible
        )
        terms = [-(g * (self.logp[y] + self.entropy)) for y, g in targets.items()]
        return total([*terms, -(g_lse * (self.logsumexp - self.entropy)), g_entropy * variance]) / self.temperature


@st.composite
def vocabularies(draw: st.DrawFn) -> dict[str, Any]:
    rows, size = draw(st.sampled_from([1, 2, 3, 0])), draw(st.sampled_from([2, 3, 5, 9, 1]))
    dtype = draw(st.sampled_from(FLOATS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = draw(tensors((rows, size), dtype)).clamp(
        -1e36 if dtype != torch.float16 else -6e4, 1e36 if dtype != torch.float16 else 6e4
    )
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    forbidden = draw(st.sampled_from([0.0, 0.3, 0.9]))
    if forbidden:
        gone = torch.from_numpy(g.random((rows, size)) < forbidden)
        gone[:, :1] = False
        logits = logits.masked_fill(gone, -math.inf)
    several = draw(st.sampled_from([None, 1, 3]))
    shape = (rows,) if several is None else (rows, several)
    target = torch.from_numpy(np.asarray(g.integers(0, size, shape)))
    target[torch.from_numpy(np.asarray(g.random(shape) < draw(st.sampled_from([0.0, 0.4]))))] = -100
    temperature: Any = draw(st.sampled_from([1.0, 0.5, 2.0, 0.01]))
    if draw(st.booleans()):
        temperature = torch.from_numpy(g.choice([1.0, 0.3, 2.0, 0.01], draw(st.sampled_from([(), (rows,)])))).to(wide)
        temperature = torch.as_tensor(temperature, dtype=wide)
    return {
        "logits": draw(laid_out(logits)),
        "target": target,
        "temperature": temperature,
        "mask": draw(st.none() | st.just(torch.from_numpy(np.asarray(g.random(shape) < 0.7)))),
        "softcap": draw(st.sampled_from([None, 30.0, 1.0])),
        "seed": draw(st.integers(0, 2**20)),
        "outputs": draw(st.sampled_from([(True, True), (False, False), (True, False), (False, True)])),
    }


def check_values(
    found: dict[str, Tensor], case: dict[str, Any], rows: list[list[Real | None]], scale: float, weights: list[Tensor]
) -> list[dict[int, Real]]:
    """Compare values and temperature's gradient; return the gradient of each row's logits, before the scale's chain."""
    target, mask = case["target"], case["mask"]
    flat = target if target.ndim == 2 else target[:, None]
    keep = flat != -100
    if mask is not None:
        keep = keep & (mask if mask.ndim == 2 else mask[:, None])
    temperatures = torch.as_tensor(case["temperature"], dtype=torch.float64).expand(len(rows)).tolist()
    values, by_logits, by_temperature = [], [], []
    for n, logits in enumerate(rows):
        counted = [(k, int(flat[n, k])) for k in range(flat.shape[1]) if keep[n, k]]
        if not counted:
            values.append([real(0)] * (flat.shape[1] + 2))
            by_logits.append({})
            by_temperature.append(real(0))
            continue
        row = Softmax(logits, temperatures[n], case["softcap"], scale)
        row.seen_from([y for _, y in counted])
        logprob: list[Any] = [real(0)] * flat.shape[1]
        by_target: dict[int, Real] = {}
        for k, y in counted:
            logprob[k] = row.logp[y] if y in row.logp else -math.inf
            if y in row.logp:
                by_target[y] = by_target.get(y, real(0)) + float(weights[0].reshape(flat.shape)[n, k])
        impossible = any(y not in row.logp for _, y in counted)
        g_lse, g_entropy = (real(float(w[n])) for w in weights[1:])
        by_u = row.by_u(by_target, g_lse, g_entropy)
        values.append([*logprob, row.logsumexp, row.entropy])
        by_logits.append({} if impossible else {v: g * row.slope[v] for v, g in by_u.items()})
        if impossible:
            by_logits[-1] = None
        by_temperature.append(None if impossible else row.by_temperature(by_target, g_lse, g_entropy))
    j = flat.shape[1]
    agree(found["value"].reshape(flat.shape), [v[:j] for v in values], "logprob")
    if "logsumexp" in found:
        agree(found["logsumexp"], [v[j] for v in values], "logsumexp")
    if "entropy" in found:
        agree(found["entropy"], [v[j + 1] for v in values], "entropy")
    if "temperature" in found:
        some = None if any(t is None for t in by_temperature) else total(by_temperature)
        agree(found["temperature"], by_temperature if found["temperature"].ndim else some, "gradient of temperature")
    return by_logits


def called(
    function: Any, leaves: dict[str, Any], case: dict[str, Any], **options: Any
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return values and gradients, and the upstream gradients."""
    lse, entropy = case["outputs"]
    given = {
        n: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in leaves.items()
    }
    options = {n: case[n] for n in ("mask", "softcap")} | options
    results = function(**given, **options, return_logsumexp=lse, return_entropy=entropy)
    results = results if isinstance(results, tuple) else (results,)
    names = ["value", *(["logsumexp"] if lse else []), *(["entropy"] if entropy else [])]
    found = {n: r.detach() for n, r in zip(names, results, strict=True)}
    ups = {n: upstream(r.shape, case["seed"] + i, r.dtype) for i, (n, r) in enumerate(zip(names, results, strict=True))}
    wanted = {n: v for n, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
    by = torch.autograd.grad(results, list(wanted.values()), [ups[n] for n in names], allow_unused=True)
    found |= {n: torch.zeros_like(wanted[n]) if g is None else g for n, g in zip(wanted, by, strict=True)}
    rows = results[0].shape[0] if results[0].ndim else 0
    weights = [ups["value"], *(ups.get(n, torch.zeros(max(rows, 64))) for n in ("logsumexp", "entropy"))]
    return found, weights


def _exact_rows(logits: Tensor) -> list[list[Real | None]]:
    return [[None if a == -math.inf else real(a) for a in row] for row in logits.tolist()]


@budget(100)
@given(vocabularies())
def test_gathered_logprob_by_softmax(case: dict[str, Any]) -> None:
    dtype = torch.float64 if case["logits"].dtype == torch.float64 else torch.float32
    leaves = {n: case[n] for n in ("logits", "target", "temperature")}
    found, weights = called(gathered_logprob, leaves, case)
    assert found["value"].dtype == dtype
    with arithmetic(dtype):
        by = check_values(found, case, _exact_rows(case["logits"]), 1.0, weights)
        size = case["logits"].shape[1]
        expected = [[None] * size if row is None else [row.get(v, real(0)) for v in range(size)] for row in by]
        agree(found["logits"], expected, "gradient of logits")


@budget(80)
@given(vocabularies(), st.integers(1, 3), st.booleans(), st.sampled_from([1.0, 0.25, 3.0]), st.data())
def test_linear_logprob_by_softmax(case: dict[str, Any], width: int, biased: bool, scale: float, data: Any) -> None:
    rows, size = case["logits"].shape
    dtype = case["logits"].dtype
    hidden = data.draw(tensors((rows, width), dtype, TAME))
    weight = data.draw(tensors((size, width), dtype, ("integers", "normal", "confident")))
    bias = data.draw(tensors((size,), dtype, ("integers", "normal", "offset"))) if biased else None
    room = 1e4
    hidden, weight = hidden.clamp(-room, room), weight.clamp(-room, room)
    flat = case["target"] if case["target"].ndim == 2 else case["target"][:, None]
    case = dict(case)
    leaves: dict[str, Any] = {
        "hidden": data.draw(laid_out(hidden)),
        "weight": data.draw(laid_out(weight)),
        "bias": bias,
    }
    options: dict[str, Any] = {"logit_scale": scale}
    if case["target"].ndim == 2:
        options["row"] = torch.arange(rows)[:, None].expand(flat.shape)
    if data.draw(st.booleans()):
        options["workspace"] = 0
    leaves |= {n: case[n] for n in ("target", "temperature")}
    found, weights = called(linear_logprob, leaves, case, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with arithmetic(wide):
        h, w = hidden.tolist(), weight.tolist()
        b = [0.0] * size if bias is None else bias.tolist()
        logits = [
            [total([real(x) * y for x, y in zip(row, col, strict=True)]) + c for col, c in zip(w, b, strict=True)]
            for row in h
        ]
        by = check_values(found, case, logits, scale, weights)
        agree(
            found["hidden"],
            [[total(g * w[v][i] for v, g in row.items()) for i in range(width)] for row in by],
            "gradient of hidden",
        )
        agree(
            found["weight"],
            [
                [total(row[v] * h[n][i] for n, row in enumerate(by) if v in row) for i in range(width)]
                for v in range(size)
            ],
            "gradient of weight",
        )
        if bias is not None:
            agree(found["bias"], [total(row[v] for row in by if v in row) for v in range(size)], "gradient of bias")


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    rows, size, width = (
        draw(st.sampled_from([1, 2, 3, 0])),
        draw(st.sampled_from([2, 3, 5, 1])),
        draw(st.integers(1, 3)),
    )
    dtype = draw(st.sampled_from(FLOATS))
    kinds = ("integers", "normal", "confident")

    def head(name: str) -> dict[str, Any]:
        return {
            f"{name}hidden": draw(laid_out(draw(tensors((rows, width), dtype, kinds)).clamp(-300, 300))),
            f"{name}weight": draw(laid_out(draw(tensors((size, width), dtype, kinds[:2])))),
            f"{name}bias": draw(st.none() | tensors((size,), dtype, (*kinds[:2], "offset"))),
        }

    case = head("") | head("reference_")
    if draw(st.booleans()):  # the reference shares the head
        case |= {"reference_weight": None, "reference_bias": None}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("temperature", "reference_temperature"):
        case[name] = draw(st.sampled_from([1.0, 0.5, 2.0]))
        if draw(st.booleans()):
            case[name] = torch.full((rows,), case[name], dtype=wide)
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    case |= {
        "softcap": draw(st.sampled_from([None, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25])),
        "mask": draw(st.sampled_from([None, torch.from_numpy(np.asarray(g.random(rows) < 0.6))])),
        "direction": draw(st.sampled_from(["reverse", "forward"])),
        "seed": draw(st.integers(0, 2**20)),
    }
    return case


@budget(60)
@given(policies())
def test_linear_kl_by_sums(case: dict[str, Any]) -> None:
    """KL(p from q) = sum p (log p - log q), and its gradients by the logits: p (log p - log q - KL), or p - q."""
    case = dict(case)
    seed = case.pop("seed")
    dtype = torch.float64 if case["hidden"].dtype == torch.float64 else torch.float32
    weight = upstream((len(case["hidden"]),), seed, dtype)
    leaves = {n: case.pop(n) for n in ("hidden", "weight", "bias", "reference_hidden", "reference_weight")}
    found = gradients(linear_kl, leaves, weight, **case)
    case |= leaves
    assert found["value"].dtype == dtype
    rows, size, width = len(case["hidden"]), len(case["weight"]), case["hidden"].shape[1]
    with arithmetic(dtype):

        def distributions(name: str, shared: str) -> list[Softmax]:
            head, bias = case[f"{shared}weight"].tolist(), case[f"{shared}bias"]
            bias = [0.0] * size if bias is None else bias.tolist()
            temperatures = torch.as_tensor(case[f"{name}temperature"], dtype=torch.float64).expand(rows).tolist()
            logits = [
                [
                    total(real(x) * y for x, y in zip(row, column, strict=True)) + c
                    for column, c in zip(head, bias, strict=True)
                ]
                for row in case[f"{name}hidden"].tolist()
            ]
            return [
                Softmax(row, t, case["softcap"], case["logit_scale"])
                for row, t in zip(logits, temperatures, strict=True)
            ]

        ps = distributions("", "")
        qs = distributions("reference_", "" if case["reference_weight"] is None else "reference_")
        values, by_logits = [], []
        for n, (p, q) in enumerate(zip(ps, qs, strict=True)):
            for one in (p, q):
                one.round(float(abs(one.logsumexp.value)))
            if case["mask"] is not None and not case["mask"][n]:
                values.append(real(0))
                by_logits.append({v: real(0) for v in p.possible})
                continue
            first, second = (p, q) if case["direction"] == "reverse" else (q, p)
            # Log-probabilities as u - logsumexp, rounded to the size of the logits.
            gap = {v: (first.u[v] - first.logsumexp) - (second.u[v] - second.logsumexp) for v in p.possible}
            kl = total(first.p[v] * gap[v] for v in p.possible)
            values.append(kl)
            by_u = {v: p.p[v] * (gap[v] - kl) if first is p else p.p[v] - q.p[v] for v in p.possible}
            by_logits.append({v: float(weight[n]) * g * p.slope[v] for v, g in by_u.items()})
        agree(found["value"], values, "KL")
        h, w = case["hidden"].tolist(), case["weight"].tolist()
        expected = {
            "hidden": [[total(g * w[v][i] for v, g in row.items()) for i in range(width)] for row in by_logits],
            "weight": [
                [total(row[v] * h[n][i] for n, row in enumerate(by_logits)) for i in range(width)] for v in range(size)
            ],
            "bias": [total(row[v] for row in by_logits) for v in range(size)],
        }
        for name, value in expected.items():
            if name in found:
                agree(found[name], value, f"gradient of {name}")


@budget(40)
@given(st.data())
def test_sequence_logprob_by_sums(data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from([5, 1, 9, 0]))
    values = data.draw(tensors((tokens,), data.draw(st.sampled_from(FLOATS)), TAME))
    g = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    mask = torch.from_numpy(np.asarray(g.random(tokens) < 0.7)) if data.draw(st.booleans()) else None
    average, sequences = data.draw(st.booleans()), data.draw(st.integers(1, 4))
    place = (
        np.sort(g.integers(-1, sequences, tokens)) if data.draw(st.booleans()) else g.integers(-1, sequences, tokens)
    )
    options: dict[str, Any] = {"segment": torch.from_numpy(place), "sequences": sequences}
    if data.draw(st.booleans()):
        ends = np.sort(g.integers(0, tokens + 1, sequences + 1))
        options = {"cu_seqlens": torch.from_numpy(ends)}
        place = np.array([next((s for s in range(sequences) if ends[s] <= t < ends[s + 1]), -1) for t in range(tokens)])
    values = values if mask is None else values.masked_fill(~mask, math.nan)
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    weight = upstream((sequences,), 1, dtype)
    found = gradients(sequence_logprob, {"logprob": values}, weight, mask=mask, average=average, **options)
    with arithmetic(dtype):
        expected, by = [], [real(0)] * tokens
        for s in range(sequences):
            own = [t for t in range(tokens) if place[t] == s and (mask is None or mask[t])]
            count = len(own) if average and own else 1
            expected.append(total(real(float(values[t])) for t in own) / count)
            for t in own:
                by[t] = real(float(weight[s])) / count
        agree(found["value"], expected, "score")
        agree(found["logprob"], by, "gradient of logprob")
