"""Scores in mini-batches have the gradient of all scores at once: `mopl.training.gradient_cache`."""

import pytest
import torch
from launching import DISTRIBUTED, launch
from torch import nn

from mopl.losses import listwise_dpo
from mopl.training.gradient_cache import score_in_parts

ROWS = 7  # mini-batches of 3, 3 and 1


class Scorer(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.dropout, self.head = nn.Linear(5, 8), nn.Dropout(dropout), nn.Linear(8, 2)

    def forward(self, rows):
        return self.head(self.dropout(self.inner(rows).tanh()))


def loss_of(scores):  # (7, 2), one list for each column
    labels = torch.linspace(-1, 2, ROWS).expand(2, ROWS)
    return listwise_dpo(scores.T, labels, normalize="softmax", weights=torch.tensor([[0.3], [1.7]]), reduction="sum")


def gradients(model, score):
    model.zero_grad()
    loss = loss_of(score())
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.fixture
def rows():
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1))


def test_the_gradient_is_that_of_all_scores_at_once(rows):
    model = Scorer()
    value, expected = gradients(model, lambda: model(rows))
    for size in (1, 3, 7):
        found, given = gradients(model, lambda size=size: score_in_parts(model, rows.split(size), model))
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


def test_any_factor_on_the_loss_and_what_accumulates(rows):
    model = Scorer()
    _, once = gradients(model, lambda: model(rows))
    model.zero_grad()
    for factor in (0.25, -2.0):
        (factor * loss_of(score_in_parts(model, rows.split(3), model))).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [-1.75 * g for g in once], rtol=1e-5, atol=1e-6)


def test_both_passes_have_the_same_dropout_and_leave_the_generator_where_one_does(rows):
    model = Scorer(dropout=0.5).train()
    torch.manual_seed(3)
    value, expected = gradients(model, lambda: torch.cat([model(part) for part in rows.split(3)]))
    after = torch.rand(())
    torch.manual_seed(3)
    found, given = gradients(model, lambda: score_in_parts(model, rows.split(3), model))
    assert torch.rand(()) == after
    torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_the_backward_pass_has_the_autocast_of_the_forward_pass(rows, inside):
    """Inside of autocast too, where weights that were cast without a graph must not be taken again."""

    def gradients_of(score, cache):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            loss = loss_of(score().float())
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model = Scorer()
    # Without the cache every mini-batch has a cast of its own, and gradients of 16 bit are added in float32 there too.
    expected = gradients_of(lambda: torch.cat([model(part) for part in rows.split(3)]), cache=False)
    given = gradients_of(lambda: score_in_parts(model, rows.split(3), model), cache=True)
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing_inside(rows, reentrant):
    model = Scorer(dropout=0.5).train()

    def checkpointed(part):
        return torch.utils.checkpoint.checkpoint(model, part.requires_grad_(), use_reentrant=reentrant)

    torch.manual_seed(3)
    _, expected = gradients(model, lambda: torch.cat([model(part) for part in rows.split(3)]))
    torch.manual_seed(3)
    _, given = gradients(model, lambda: score_in_parts(checkpointed, rows.split(3), model))
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


def test_one_graph_at_a_time_is_alive(rows):
    """What autograd keeps for the backward pass is that of the largest mini-batch, not of all."""
    model, alive, most = Scorer(), [0], [0]

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            alive[0] -= len(g)
            return g

    def score(part):
        scores = Kept.apply(model(part))
        if scores.requires_grad:
            alive[0] += len(part)
            most[0] = max(most[0], alive[0])
        return scores

    loss_of(score_in_parts(score, rows.split(3), model)).backward()
    assert (alive[0], most[0]) == (0, 3)


def test_evaluation_runs_each_part_once(rows):
    model, calls = Scorer(), []
    with torch.no_grad():
        scores = score_in_parts(lambda part: calls.append(1) or model(part), rows.split(3), model)
    assert len(calls) == 3 and not scores.requires_grad
    torch.testing.assert_close(scores, model(rows))


def test_what_cannot_be_exact_is_refused(rows):
    model = Scorer()
    with pytest.raises(ValueError, match="parts is empty"):
        score_in_parts(model, [], model)
    with pytest.raises(RuntimeError, match="to not have been used in the graph"):
        torch.autograd.grad(loss_of(score_in_parts(model, rows.split(3), model)), list(model.parameters()))
    own = torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match="other scores than before"):
        random = lambda part: model(part) * torch.rand((), generator=own)  # noqa: E731
        loss_of(score_in_parts(random, rows.split(3), model)).backward()


def test_processes_add_their_gradients_once_whatever_their_numbers_of_parts():
    done = launch(2, str(DISTRIBUTED / "gradient_cache.py"))
    assert done.returncode == 0, done.stdout + done.stderr
