"""The value head: what its regression trains."""

import pytest
import torch

from mopl.conditioning.value_head import ValueHead


@pytest.mark.parametrize("train_hidden", [False, True])
def test_the_regression_trains_the_policy_only_on_request(train_hidden: bool) -> None:
    head = ValueHead(4, 2, takes_kl_weight=False, train_hidden=train_hidden)
    with torch.no_grad():
        head.out.weight.normal_()  # it begins at 0, where no gradient passes
    hidden = torch.randn(3, 4, requires_grad=True)
    (head(hidden, torch.tensor([0.4, 0.6])) - 1).square().sum().backward()
    assert head.out.weight.grad.any()
    assert (hidden.grad is not None and bool(hidden.grad.any())) == train_hidden
