"""`linear_kl` on a GPU against float64, and against what whole logits in float32 give.

`tests/interpreter/test_gpu_linear_kl_small.py` runs the same tests on a CPU at toy sizes: they prove nothing there
about a GPU, but no mistake in this file waits for one.
"""

import math

import pytest
import torch
from gpu_problems import DEVICE, DTYPES, GPU, SLACK, capped, error, normal, size, wide_product
from torch import Tensor

from mopl.ops import _divergence_blocks as chunks
from mopl.ops import linear_kl

NEEDS = {"frozen": ("hidden",), "trained": ("hidden", "weight")}

pytestmark = pytest.mark.gpu


def policies(dtype: torch.dtype, rows: int, width: int, vocabulary: int) -> dict[str, Tensor]:
    """A policy that moved away from its reference, the last rows far; one row does not count."""
    weight = normal(vocabulary, width, scale=width**-0.5)
    hidden = normal(rows, width)
    strength = torch.logspace(-2, 1, rows, device=DEVICE)[:, None]
    p = {
        "hidden": (hidden + strength * normal(rows, width)).to(dtype),
        "weight": (weight + 0.1 * normal(vocabulary, width, scale=width**-0.5)).to(dtype),
        "reference_hidden": hidden.to(dtype),
        "reference_weight": weight.to(dtype),
        "temperature": torch.rand(rows, device=DEVICE) + 0.5,
        "mask": torch.arange(rows, device=DEVICE) != rows // 3,
        "upstream": normal(rows),
    }
    for name in ("hidden", "reference_hidden"):
        p[name][rows // 3] = math.nan  # a row that does not count may hold anything
    return p


def formula(p: dict[str, Tensor], direction: str, softcap: float | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return values and gradients on whole logits, in float32 or float64."""
    live = p["mask"]
    temperature = p["temperature"].to(dtype)[:, None]

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return capped(wide_product(hidden.masked_fill(~live[:, None], 0), weight.T, dtype), softcap)

    u = logits(p["hidden"], p["weight"])
    log_p = (u / temperature).log_softmax(-1)
    log_q = (logits(p["reference_hidden"], p["reference_weight"]) / temperature).log_softmax(-1)
    apart = log_p - log_q
    if direction == "reverse":
        value = (log_p.exp() * apart).sum(-1)
        du = log_p.exp() * (apart - value[:, None])
    else:
        value = -(log_q.exp() * apart).sum(-1)
        du = log_p.exp() - log_q.exp()
    du *= (p["upstream"].to(dtype) * live)[:, None] / temperature
    if softcap is not None:
        du *= 1 - (u / softcap).square()
    hidden = p["hidden"].masked_fill(~live[:, None], 0)
    return {
        "value": value.where(live, 0),
        "hidden": du @ p["weight"].to(dtype),
        "weight": du.T @ hidden.to(dtype),
    }


@pytest.mark.parametrize("mode", list(NEEDS))
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_at_most_twice_those_of_float32_logits(
    dtype: torch.dtype, direction: str, softcap: float | None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = "else" if GPU else "cpu"
    monkeypatch.setitem(chunks.ROWS, where, size(512, 5))  # several chunks of rows, too
    p = policies(dtype, size(1200, 13), size(512, 16), size(20_001, 60))
    exact, plain = (formula(p, direction, softcap, kind) for kind in (torch.float64, torch.float32))
    leaves = {k: p[k].detach().clone().requires_grad_(k in NEEDS[mode]) for k in ("hidden", "weight")}
    value = linear_kl(
        leaves["hidden"], leaves["weight"], p["reference_hidden"], p["reference_weight"],
        temperature=p["temperature"], mask=p["mask"], softcap=softcap, direction=direction,  # type: ignore[arg-type]
    )  # fmt: skip
    assert not bool(value[~p["mask"]].any()) and bool((value >= 0).all())
    apart, allowed = ((x.double() - exact["value"]).abs() for x in (value, plain["value"]))
    assert float((apart - 3e-6 * exact["value"]).max()) <= SLACK * float(allowed.max()) + 1e-6
    gradients = torch.autograd.grad(value, [leaves[k] for k in NEEDS[mode]], p["upstream"])
    for name, gradient in zip(NEEDS[mode], gradients, strict=True):
        assert gradient.dtype == dtype
        assert error(gradient, exact[name]) <= SLACK * error(plain[name].to(dtype), exact[name]) + 1e-6, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_policies_are_exactly_0_apart(dtype: torch.dtype) -> None:
    p = policies(dtype, size(300, 7), size(256, 16), size(10_001, 60))
    leaves = [p[k].detach().clone().requires_grad_() for k in ("hidden", "weight")]
    value = linear_kl(*leaves, p["hidden"], p["weight"], temperature=p["temperature"], mask=p["mask"])
    gradients = torch.autograd.grad(value, leaves, p["upstream"])
    assert not bool(value.any()) and not any(bool(gradient.any()) for gradient in gradients)
