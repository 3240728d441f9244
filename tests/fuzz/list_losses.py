"""Random arguments of the losses of lists, and the comparison of a loss with a textbook's formula for one list."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hostile import FLOATS, TAME, agree, broadcastable, gradients, laid_out, masks, poison, spread, tensors, upstream
from hypothesis import strategies as st
from running import Real, arithmetic, real, size, total
from torch import Tensor

LABELS = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@dataclass
class Lists:
    """The arguments of a loss of lists."""

    scores: Tensor
    labels: Tensor
    reference: Tensor | None
    beta: float | Tensor
    weights: float | Tensor | None
    mask: Tensor | None
    seed: int
    margin: float | Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        both = (self.scores, self.scores if self.reference is None else self.reference)
        return torch.float64 if any(t.dtype == torch.float64 for t in both) else torch.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        objectives = 1 if self.labels.ndim == 2 else self.labels.shape[1]
        return len(self.scores), objectives, self.scores.shape[1]

    def items(self, b: int) -> list[int]:
        """Return the items of list b that exist."""
        return [i for i in range(self.shape[2]) if self.mask is None or self.mask[b, i]]

    def labels_of(self, b: int, j: int) -> list[float]:
        """Return the labels of list b for objective j."""
        return (self.labels if self.labels.ndim == 3 else self.labels[:, None])[b, j].tolist()

    def differences(self, b: int) -> list[Real]:
        """Return scores - reference of list b."""
        row = [real(s) for s in self.scores[b].tolist()]
        return row if self.reference is None else [s - r for s, r in zip(row, self.reference[b].tolist(), strict=True)]


@st.composite
def lists(draw: st.DrawFn, label_values: dict[str, list[float]], largest: int = 6, kinds: Any = None) -> Lists:
    batch, objectives = draw(st.sampled_from([1, 2, 3, 0])), draw(st.integers(1, 3))
    items = draw(st.sampled_from([*range(2, largest + 1), 1, 0]))
    dtype = draw(st.sampled_from(FLOATS))
    scores = draw(tensors((batch, items), dtype) if kinds is None else tensors((batch, items), dtype, kinds))
    reference = None
    if draw(st.booleans()):
        reference = draw(tensors((batch, items), draw(st.sampled_from([dtype, torch.float32, torch.float64])), TAME))
    label_dtype = draw(st.sampled_from(LABELS))
    shape = (batch, objectives, items) if objectives > 1 or draw(st.booleans()) else (batch, items)
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    values = g.choice(label_values[draw(st.sampled_from(list(label_values)))], shape)
    if not label_dtype.is_floating_point:
        values = np.abs(values).clip(0, 200).round()
    top = torch.finfo(label_dtype).max if label_dtype.is_floating_point else math.inf
    labels = torch.from_numpy(np.asarray(values)).clamp(-top, top).to(label_dtype)
    option = [1.0, 0.5, 3.0, 0.01, 100.0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    beta = draw(broadcastable(batch, objectives, option, wide))
    weights = draw(st.none() | broadcastable(batch, objectives, [1.0, 0.0, 0.3, 2.5, -1.0], wide))
    mask = draw(masks(batch, items))
    seed = draw(st.integers(0, 2**20))
    return Lists(
        draw(laid_out(poison(scores, mask, seed))),
        draw(laid_out(poison(labels, mask, seed + 1))),
        None if reference is None else draw(laid_out(poison(reference, mask, seed + 2))),
        beta,
        weights,
        None if mask is None else draw(laid_out(mask)),
        seed,
    )


def check_losses(case: Lists, loss: Callable[..., Tensor], one_list: Callable[..., Any]) -> None:
    """Compare a loss, and its gradients for a random upstream gradient, with `one_list(case, b, j)`.

    That returns the loss, its gradients by u = beta * (scores - reference) and by the labels of each existing
    item, the latter None where it is not judged, and the gradient by the margin.
    """
    batch, objectives, items = case.shape
    weight = upstream((batch, objectives), case.seed, case.dtype)
    leaves = {name: getattr(case, name) for name in ("scores", "labels", "reference", "beta", "weights", "margin")}
    if case.margin is None:
        del leaves["margin"]
    found = gradients(loss, leaves, weight, mask=case.mask, reduction="none", **case.options)
    assert found["value"].dtype == case.dtype
    rates, shares = spread(case.beta, batch, objectives), spread(case.weights, batch, objectives)
    # Where beta * scores is beyond the dtype, NaN is an answer too; a number must still be right.
    limit = torch.finfo(case.dtype).max / 2
    with arithmetic(case.dtype):
        beyond = [
            any(
                size(x.value) * max(1.0, *map(abs, rates[b])) > limit
                for i, x in enumerate(case.differences(b))
                if i in case.items(b)
            )
            for b in range(batch)
        ]
        value, by_weight, by_rate, by_margin = ([[real(0)] * objectives for _ in range(batch)] for _ in range(4))
        by_score = [[real(0)] * items for _ in range(batch)]
        by_label: Any = [[[real(0)] * items for _ in range(objectives)] for _ in range(batch)]
        for b in range(batch):
            exists, x = case.items(b), case.differences(b)
            if len(exists) < 2:
                continue
            for j in range(objectives):
                result, by_u, by_z, *more = one_list(case, b, j, exists, x, rates[b][j])
                up = real(float(weight[b, j]))
                value[b][j] = shares[b][j] * result
                by_weight[b][j] = up * result
                by_rate[b][j] = up * shares[b][j] * _moment(by_u, x)
                by_margin[b][j] = up * shares[b][j] * (more[0] if more else real(0))
                for i in exists:
                    by_score[b][i] = by_score[b][i] + up * shares[b][j] * (rates[b][j] * by_u[i])
                    by_label[b][j][i] = None if by_z is None else by_z[i] and up * shares[b][j] * by_z[i]
        agree(found["value"], value, "loss", beyond)
        zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        agree(found.get("scores", zeros["scores"]), by_score, "gradient of scores", beyond)
        if case.reference is not None:
            minus = [[-g for g in row] for row in by_score]
            agree(found.get("reference", zeros["reference"]), minus, "gradient of reference", beyond)
        if "labels" in found:
            expected = by_label if case.labels.ndim == 3 else [row[0] for row in by_label]
            agree(found["labels"], expected, "gradient of labels", beyond)
        for name, expected in (("beta", by_rate), ("weights", by_weight), ("margin", by_margin)):
            if isinstance(leaves.get(name), Tensor):
                some = beyond if leaves[name].ndim == 2 else any(beyond)
                agree(found.get(name, zeros[name]), summed(expected, leaves[name].shape), f"gradient of {name}", some)


def _moment(by_u: dict[int, Real], x: list[Real]) -> Real:
    """Return sum_i G_i x_i; G sums to 0, so any origin serves, and the error is that of the farthest from it."""
    best = max(by_u, key=lambda i: x[i].value)
    apart = {i: x[i] - x[best] for i in by_u}
    moment = total(by_u[i] * apart[i] for i in by_u)
    spread = max(size(d.value) for d in apart.values())
    return Real(moment.value, moment.error + spread * sum(g.error for g in by_u.values()))


def summed(values: list[list[Real]], shape: torch.Size) -> Any:
    """Return (B, m) numbers summed to a shape that broadcasts to it."""
    columns = range(len(values[0])) if values else range(shape[-1] if shape else 0)
    if shape == ():
        return total(v for row in values for v in row)
    if len(shape) == 1:
        sums = [total(row[j] for row in values) for j in columns]
        return sums if shape[0] == len(sums) else [total(sums)]
    if shape[1] == 1 and len(columns) != 1:
        return [[total(row)] for row in values]
    return values


WEIGHTS = {
    "binary": [0.0, 1.0],
    "grades": [0.0, 1.0, 2.0, 3.0, 4.0],
    "shares": [0.0, 0.1, 0.25, 1 / 3, 0.9],
    "any size": [0.0, 1e-30, 1e-3, 1.0, 1e4, 1e30],
}
DENSE = WEIGHTS | {
    "signed": [-3.0, -0.5, 0.0, 0.7, 2.0],
    "offset": [1e4, 1e4 + 1, 1e4 + 8],
    "wide": [-100.0, 0.0, 88.0],
}
RANKED = DENSE | {"extreme": [-3e38, 3e38, 0.0, 1e-45, -1e-45, 65504.0], "tied": [1.0]}
