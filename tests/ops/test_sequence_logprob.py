"""Scores of sequences from log-probabilities of tokens."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mopl import reference_logprob
from mopl.ops import sequence_logprob


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Five sequences of 3, 0, 4, 1 and 0 tokens."""
    lengths = torch.tensor([3, 0, 4, 1, 0])
    logprob = torch.randn(8, dtype=torch.float64).requires_grad_()
    return logprob, torch.arange(5).repeat_interleave(lengths), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


@pytest.mark.parametrize("average", [False, True])
def test_the_three_ways_to_say_what_belongs_together_agree(average: bool) -> None:
    logprob, segment, cu_seqlens = packed()
    expected = reference_logprob.sequence_logprob(logprob, segment, 5, average=average)
    by_segment = sequence_logprob(logprob, segment, sequences=5, average=average)
    by_offsets = sequence_logprob(logprob, cu_seqlens=cu_seqlens.int(), average=average)
    mask = torch.arange(4) < cu_seqlens.diff()[:, None]
    padded = torch.full((5, 4), math.nan, dtype=torch.float64).masked_scatter(mask, logprob)
    by_mask = sequence_logprob(padded, mask=mask, average=average)
    upstream = torch.randn(5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected, logprob, upstream)
    for scores in (by_segment, by_offsets, by_mask):
        torch.testing.assert_close(scores, expected)
        torch.testing.assert_close(torch.autograd.grad(scores, logprob, upstream)[0], gradient)


@pytest.mark.parametrize("average", [False, True])
def test_an_empty_sequence_scores_zero(average: bool) -> None:
    logprob, segment, cu_seqlens = packed()
    for scores in (
        sequence_logprob(logprob, segment, sequences=5, average=average),
        sequence_logprob(logprob, cu_seqlens=cu_seqlens, average=average),
    ):
        assert scores[[1, 4]].tolist() == [0, 0]
    nothing = sequence_logprob(torch.full((2, 3), math.nan), mask=torch.zeros(2, 3, dtype=torch.bool), average=average)
    assert nothing.tolist() == [0, 0]
    assert sequence_logprob(torch.zeros(2, 0), average=average).tolist() == [0, 0]
    assert sequence_logprob(torch.zeros(0), cu_seqlens=torch.tensor([0]), average=average).shape == (0,)
    assert sequence_logprob(torch.zeros(0), torch.zeros(0, dtype=torch.long), average=average).shape == (0,)


def test_a_mask_goes_with_every_way() -> None:
    logprob, segment, cu_seqlens = packed()
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 1, 0], dtype=torch.bool)
    hidden = logprob.masked_fill(~mask, math.nan)
    expected = reference_logprob.sequence_logprob(logprob, torch.where(mask, segment, -1), 5, average=True)
    for scores in (
        sequence_logprob(hidden, segment, mask=mask, sequences=5, average=True),
        sequence_logprob(hidden, cu_seqlens=cu_seqlens, mask=mask, average=True),
        sequence_logprob(hidden, torch.where(mask, segment, -1), sequences=5, average=True),
    ):
        torch.testing.assert_close(scores, expected)
        assert torch.autograd.grad(scores.sum(), logprob, retain_graph=True)[0].isfinite().all()


def test_segments_in_any_order_and_shape() -> None:
    logprob, segment = torch.randn(4, 25), torch.randint(-1, 7, (4, 25))
    expected = reference_logprob.sequence_logprob(logprob.double(), segment, 7)
    torch.testing.assert_close(sequence_logprob(logprob, segment, sequences=7), expected.float())
    segment[0, 0] = 6
    assert sequence_logprob(logprob, segment).shape == (7,)


def test_tokens_outside_of_all_offsets_belong_to_no_sequence() -> None:
    logprob = torch.tensor([100.0, 1.0, 2.0, 4.0, 100.0])
    assert sequence_logprob(logprob, cu_seqlens=torch.tensor([1, 3, 4])).tolist() == [3.0, 4.0]


def test_long_sequences_lose_no_digits() -> None:
    logprob = -torch.rand(300_000)
    exact = logprob.double().view(3, -1).sum(1)
    scores = sequence_logprob(logprob, torch.arange(3).repeat_interleave(100_000), sequences=3)
    torch.testing.assert_close(scores, exact.float(), rtol=1e-7, atol=0)
    assert scores.dtype == torch.float32


def test_the_same_bits_at_every_call() -> None:
    logprob, segment = torch.randn(10_000), torch.randint(50, (10_000,))
    first = sequence_logprob(logprob, segment, sequences=50)
    assert all(torch.equal(first, sequence_logprob(logprob, segment, sequences=50)) for _ in range(3))


def test_a_segment_beyond_the_given_number_is_not_lost_silently() -> None:
    assert sequence_logprob(torch.ones(3), torch.tensor([0, 1, 2]), sequences=2).isnan().all()


def test_gradcheck() -> None:
    logprob, segment, cu_seqlens = packed()
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    for options in ({"segment": segment, "sequences": 5}, {"cu_seqlens": cu_seqlens}, {}):
        assert torch.autograd.gradcheck(
            lambda x, o=options: sequence_logprob(x, mask=mask, average=True, **o), (logprob,)
        )


def test_compiled_without_breaks() -> None:
    torch._dynamo.reset()
    step = torch.compile(
        lambda x, c: sequence_logprob(x, cu_seqlens=c, average=True), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in (6, 9):
        logprob, cu_seqlens = torch.randn(size), torch.tensor([0, 2, 2, size])
        torch.testing.assert_close(
            step(logprob, cu_seqlens), sequence_logprob(logprob, cu_seqlens=cu_seqlens, average=True)
        )


@pytest.mark.parametrize("sequences", [np.uint8(255), np.int8(127), torch.tensor(254, dtype=torch.uint8)])
def test_the_number_of_sequences_may_be_of_any_whole_type(sequences: np.integer | torch.Tensor) -> None:
    score = sequence_logprob(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0, 0, 1]), sequences=sequences)
    assert score.tolist() == [-3.0, -3.0] + [0.0] * (int(sequences) - 2)


def test_errors_name_the_argument_its_shape_and_the_remedy() -> None:
    logprob, segment = torch.zeros(4), torch.zeros(4, dtype=torch.long)
    cases = [
        ((segment,), {}, TypeError, "floating-point"),
        ((torch.zeros(()),), {}, ValueError, r"logprob\[None\]"),
        ((logprob, segment), {"cu_seqlens": segment}, ValueError, "one of them"),
        ((logprob,), {"sequences": 3}, ValueError, "with segment only"),
        ((logprob, segment), {"sequences": "2"}, TypeError, "sequences is '2' but must be an int, how many sequences"),
        ((logprob, segment), {"sequences": True}, TypeError, "sequences is True but must be an int, how many"),
        ((logprob, segment), {"sequences": 2.0}, TypeError, "sequences is 2.0 but must be an int, how many sequences"),
        ((logprob, segment), {"sequences": -1}, ValueError, "sequences is -1 but must not be negative; leave it out"),
        ((logprob, segment), {"sequences": np.int64(-1)}, ValueError, "sequences is -1 but must not be negative"),
        ((logprob, segment), {"sequences": torch.tensor(-1)}, ValueError, "sequences is -1 but must not be negative"),
        ((logprob, segment), {"sequences": torch.tensor([2, 2])}, TypeError, r"sequences is tensor\(\[2, 2\]\) but"),
        ((logprob, segment[:2]), {}, ValueError, r"segment has shape \(2,\)"),
        ((logprob, logprob), {}, TypeError, r"segment\.long\(\)"),
        ((logprob,), {"mask": torch.ones(4)}, TypeError, r"mask\.bool\(\)"),
        ((logprob,), {"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask has shape \(3,\)"),
        ((logprob[None],), {"cu_seqlens": segment}, ValueError, "pass mask instead"),
    ]
    for arguments, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            sequence_logprob(*arguments, **options)


@pytest.mark.parametrize("options", [{"segment": [0, 0, 1]}, {"cu_seqlens": [0, 2, 3]}])
def test_a_grouping_on_another_device_is_refused(options: dict) -> None:
    (name, numbers), *_ = options.items()
    with pytest.raises(ValueError, match=rf"{name} is on meta but logprob on cpu; pass {name}.to\(logprob.device\)"):
        sequence_logprob(torch.zeros(3), **{name: torch.tensor(numbers, device="meta")})
