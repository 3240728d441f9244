"""Figures of a head's rows that pass no gradient: beside the plain formulas in float64, and TRL's rule for ties."""

import pytest
import torch

from mopl import reference_logprob
from mopl.ops import head_statistics as module
from mopl.ops import linear_logprob
from mopl.ops.head_statistics import NAMES, head_statistics


def problem(dtype: torch.dtype = torch.float64, spread: float = 1.0, vocabulary: int = 37):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 8, generator=generator, dtype=torch.float64) * spread
    weight = torch.randn(vocabulary, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    target = torch.randint(0, vocabulary, (11,), generator=generator)
    target[::2] = (hidden @ weight.T + bias).argmax(-1)[::2]  # half of them likeliest
    target[[2, 5]] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), target


def found(hidden, weight, target, names=NAMES, **options):
    log_probs, logsumexp = linear_logprob(hidden, weight, target, return_logsumexp=True, **options)
    return head_statistics(hidden, weight, target, log_probs, logsumexp, names=names, **options)


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_they_are_those_of_the_logits(capped, dtype, spread, monkeypatch) -> None:
    monkeypatch.setitem(module.COLUMNS, "cpu", 5)  # several tiles, the last one short
    monkeypatch.setitem(module.ROWS, "cpu", 4)
    hidden, weight, bias, target = problem(dtype, spread)
    temperature = torch.linspace(0.5, 2.0, 11, dtype=torch.float64).to(torch.float32)
    options = {"temperature": temperature, "softcap": 3.0 * spread if capped else None, "logit_scale": 0.7}
    answer = found(hidden, weight, target, bias=bias, **options)
    wide = [t.double() for t in (hidden, weight)]
    expected = reference_logprob.head_statistics(*wide, target, bias=bias.double(), **options)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5 * max(1.0, spread)
    for name in NAMES:
        assert answer[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not answer[name].requires_grad
        torch.testing.assert_close(answer[name].double(), expected[name], rtol=tolerance, atol=tolerance)
        alone = found(hidden, weight, target, names=(name,), bias=bias, **options)[name]
        assert torch.equal(alone, answer[name])
    assert 0 < float(answer["is_top1"].sum()) < 9


def test_of_equal_tokens_the_first_is_the_likeliest(monkeypatch) -> None:
    monkeypatch.setitem(module.COLUMNS, "cpu", 2)
    hidden = torch.ones(6, 1)
    weight = torch.tensor([[0.0], [1.0], [1.0], [0.5], [1.0]])  # 1, 2 and 4 are equally likely, in three tiles
    target = torch.tensor([0, 1, 2, 3, 4, -100])
    assert found(hidden, weight, target)["is_top1"].tolist() == [0, 1, 0, 0, 0, 0]


def test_two_tokens_that_share_all_probability_are_not_both_the_likeliest() -> None:
    """p = 1/2 is where the short cut must not be taken."""
    hidden, weight = torch.full((2, 1), 50.0), torch.tensor([[1.0], [-1.0], [1.0]])
    assert found(hidden, weight, torch.tensor([0, 2]), names=("is_top1",))["is_top1"].tolist() == [1, 0]


def test_rows_that_do_not_count_are_not_read() -> None:
    hidden, weight, bias, target = problem()
    hidden[target == -100] = torch.nan
    for name, value in found(hidden, weight, target, bias=bias).items():
        assert bool(value.isfinite().all()), name
        assert bool((value[target == -100] == 0).all()), name
    nobody = found(hidden, weight, torch.full_like(target, -100), bias=bias)
    assert all(float(value.abs().sum()) == 0 for value in nobody.values())


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, _, target = problem()
    with pytest.raises(ValueError, match="'median'"):
        head_statistics(hidden, weight, target, target, target, names=("median",))
    with pytest.raises(ValueError, match="log_probs has shape"):
        head_statistics(hidden, weight, target, target[:1].double(), target.double(), names=("is_top1",))
