"""What the lists of a training step are trained for."""

import pytest
import torch

from mopl.conditioning import sample_weights
from mopl.conditioning.samplers import box_betas, dirichlet_weights, fixed, one_of


def test_one_vector_a_step_is_what_the_papers_algorithm_draws():
    drawn = dirichlet_weights(3, 7, concentration=1.0, per="step", seed=1)(4)
    assert drawn.shape == (7, 3) and (drawn == drawn[0]).all()
    for wrong in ("epoch", 0, -1, True):
        with pytest.raises(ValueError, match=f"weights_per is {wrong!r} but .* or a whole number above 0"):
            dirichlet_weights(3, 7, concentration=1.0, per=wrong, seed=1)


def test_lists_that_share_a_vector_stand_side_by_side():
    drawn = dirichlet_weights(2, 7, concentration=0.5, per=3, seed=1)(4)
    vectors = sample_weights(2, 3, 0.5, seed=1, step=4)
    assert torch.equal(drawn, vectors[[0, 0, 0, 1, 1, 2, 2]])
    each = dirichlet_weights(2, 7, concentration=0.5, per="list", seed=1)(4)
    assert torch.equal(dirichlet_weights(2, 7, concentration=0.5, per=9, seed=1)(4), each)
    assert len(set(each[:, 0].tolist())) == 7


def test_the_normalised_box_is_on_the_simplex_and_keeps_its_ratios():
    low, high = [0.5, 1.0], [1.0, 4.0]
    drawn = torch.cat([box_betas(2, 50, low=low, high=high, per="list", seed=1)(step) for step in range(20)])
    torch.testing.assert_close(drawn.sum(1), torch.ones(1000))
    ratio = drawn[:, 1] / drawn[:, 0]
    assert 1.0 <= ratio.min() < 1.3 and 6.0 < ratio.max() <= 8.0


def test_one_of_some_numbers_is_drawn_evenly_and_a_fixed_vector_stays():
    drawn = torch.cat([one_of([0.1, 0.2, 0.4], 100, per="list", seed=1)(step) for step in range(20)])
    shares = [(drawn == torch.tensor(value)).float().mean().item() for value in (0.1, 0.2, 0.4)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.04)
    assert torch.equal(fixed(torch.tensor([0.25, 0.75]), 2)(3), torch.tensor([[0.25, 0.75]] * 2))
