"""The policy gradient on unusual numbers: no rows, no tokens, groups anywhere, returns of any size and dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mopl.losses.policy_gradient import group_mean, kl_estimate, policy_gradient, value_loss


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else (result,)
        self.elements = max(self.elements, *(t.numel() for t in made if isinstance(t, Tensor)), 0)
        return result


def mean_by_loops(values: Tensor, group: Tensor, valid: Tensor, leave_one_out: bool) -> list[float]:
    rows = range(len(values))
    found = []
    for i in rows:
        others = [
            float(values[j]) for j in rows if valid[j] and group[j] == group[i] and not (leave_one_out and i == j)
        ]
        found.append(sum(others) / len(others) if others else 0.0)
    return found


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_group_means_are_those_of_loops(dtype: torch.dtype, leave_one_out: bool) -> None:
    torch.manual_seed(0)
    for rows in (1, 2, 7, 40):
        values = (torch.randn(rows) * 10).to(dtype)
        group = torch.randint(-3, 4, (rows,)) * 10**12  # numbers of any size, groups that lie apart
        valid = torch.rand(rows) < 0.8
        values[~valid] = torch.nan
        found = group_mean(values, group, leave_one_out=leave_one_out, valid=valid)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = torch.tensor(mean_by_loops(values, group, valid, leave_one_out), dtype=torch.float64)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        if rows == 40:
            consecutive = torch.arange(40) // 5
            found = group_mean(values, 5, leave_one_out=leave_one_out, valid=valid)
            expected = torch.tensor(mean_by_loops(values, consecutive, valid, leave_one_out), dtype=torch.float64)
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_sixteen_bits_do_not_overflow_in_a_group_and_a_large_return_costs_the_others_no_digit() -> None:
    values = torch.full((8,), 6e4, dtype=torch.float16)
    assert group_mean(values, 8, leave_one_out=False).tolist() == [float(values[0])] * 8
    returns = torch.tensor([1e7, 0.1, 0.2, 0.4])
    mean = group_mean(returns, torch.zeros(4, dtype=torch.long), leave_one_out=True)
    torch.testing.assert_close(mean[0], torch.tensor(0.7 / 3), rtol=2e-7, atol=0)


def test_a_group_of_equal_returns_has_exactly_that_mean() -> None:
    values = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.1])
    group = torch.tensor([7, -1, 7, -1, 7])
    for leave_one_out in (True, False):
        assert torch.equal(group_mean(values, group, leave_one_out=leave_one_out), values)
        # Nor does what stands in another group, however large it is, round it.
        beside = torch.tensor([1e17, 1e17, 0.1, 0.1, 0.1], dtype=torch.float64)
        apart = torch.tensor([3, 3, 1, 1, 1])
        assert torch.equal(group_mean(beside, apart, leave_one_out=leave_one_out), beside)


@pytest.mark.parametrize("group", [4000, torch.zeros(4000, dtype=torch.long), torch.arange(4000) % 1000])
@pytest.mark.parametrize("baseline", ["leave_one_out", "group"])
def test_memory_is_linear_in_the_batch(baseline, group) -> None:
    logprob = torch.randn(4000, 3, requires_grad=True)
    with Largest() as made:
        policy_gradient(
            logprob, torch.randn(4000, 2), torch.full((2,), 0.5), kl_weight=0.1, reference=logprob.detach(),
            baseline=baseline, group=group, standardize=baseline == "group",
        ).loss.backward()  # fmt: skip
    assert made.elements <= 3 * 4000


@pytest.mark.parametrize(("rows", "tokens"), [(0, 0), (0, 3), (2, 0), (1, 1)])
def test_a_batch_without_rows_or_tokens_costs_nothing(rows: int, tokens: int) -> None:
    options = ({}, {"clip": 0.2}, {"ratio_level": "sequence"}, {"ratio_level": "sequence_mean", "clip": 0.1},
               {"to_go": True}, {"kl_in": "loss", "kl_estimator": "k3"}, {"kl_level": "sequence"})  # fmt: skip
    baselines = (
        {}, {"baseline": "leave_one_out", "group": 1}, {"baseline": torch.zeros(rows)},
        {"baseline": "group", "group": torch.zeros(rows, dtype=torch.long), "standardize": True},
    )  # fmt: skip
    logprob = torch.zeros(rows, tokens, requires_grad=True)
    same = logprob.detach()
    mask = torch.zeros(rows, tokens, dtype=torch.bool)
    for option, baseline in itertools.product(options, baselines):
        behaviour = same if {"clip", "ratio_level"} & option.keys() else None
        found = policy_gradient(
            logprob, torch.ones(rows, 2), torch.full((2,), 0.5), kl_weight=0.1, reference=same, behaviour=behaviour,
            mask=mask, **option, **baseline,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(found.loss, logprob)
        assert found.loss == 0 and not gradient.any() and found.advantages.shape == (rows, tokens)
    assert kl_estimate(logprob, same).shape == (rows,)
    assert value_loss(logprob, same) == 0


@pytest.mark.parametrize("group", [2, torch.tensor([0, 1, 0, 1])])
def test_groups_compile_to_one_graph(group) -> None:
    def loss(logprob: Tensor) -> Tensor:
        return policy_gradient(
            logprob, torch.arange(8.0).view(4, 2), torch.full((2,), 0.5), kl_weight=0.0, baseline="leave_one_out",
            group=group,
        ).loss  # fmt: skip

    logprob = torch.randn(4, 3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logprob), loss(logprob))
