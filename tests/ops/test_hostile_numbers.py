"""Numbers and memory that are unusual but allowed: any strides, any padding, any dtype give what plain ones give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mopl import steering
from mopl.losses import approx_ndcg, lambda_loss, listwise_dpo, pairwise_logistic, plackett_luce, presort
from mopl.ops import gathered_logprob, linear_kl, linear_logprob, sequence_logprob

LOSSES: dict[str, Callable[..., Tensor]] = {
    "listwise l1": listwise_dpo,
    "listwise softmax": lambda *a, **k: listwise_dpo(*a, normalize="softmax", **k),
    "plackett-luce": plackett_luce,
    "plackett-luce efron": lambda *a, **k: plackett_luce(*a, ties="efron", **k),
    "plackett-luce ordered": lambda s, y, **k: plackett_luce(s, y, order=presort(y, k.get("mask")), **k),
    "pairwise": pairwise_logistic,
    "lambda": lambda_loss,
    "approx-ndcg": approx_ndcg,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())

# Views with the values of a tensor and another memory under them.
MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed dimensions": lambda t: t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim))),
    "every second place": lambda t: torch.stack([t, torch.ones_like(t)], -1).flatten(-2)[..., ::2],
    "an offset and gaps": lambda t: torch.cat([torch.ones_like(t), t, torch.ones_like(t)], -1)[
        ..., t.shape[-1] : 2 * t.shape[-1]
    ],
    "expanded and flipped": lambda t: t.flip(-1)[None].expand(3, *t.shape)[1].flip(-1),
}


def gradients(value: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return d(value · fixed random numbers)/d(each), 0 where it does not depend on it."""
    upstream = torch.rand(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(value.dtype)
    found = torch.autograd.grad((value * upstream).sum(), list(of.values()), allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(of.items(), found, strict=True)}


@every_loss
@pytest.mark.parametrize("view", MEMORY.values(), ids=MEMORY.keys())
def test_the_memory_order_of_an_argument_does_not_matter(loss: Callable[..., Tensor], view: Callable) -> None:
    torch.manual_seed(0)
    values = {
        "scores": torch.randn(4, 5), "labels": torch.randint(0, 3, (4, 2, 5)).float(), "reference": torch.randn(4, 5),
        "beta": torch.rand(4, 2) + 0.5, "weights": torch.rand(4, 2),
    }  # fmt: skip
    mask = torch.arange(5) < torch.tensor([5, 3, 2, 4])[:, None]

    def run(arrange: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        given = {name: arrange(leaf) for name, leaf in leaves.items()}
        value = loss(given.pop("scores"), given.pop("labels"), mask=arrange(mask), reduction="none", **given)
        return value.detach(), gradients(value, leaves)

    expected, expected_gradients = run(lambda t: t)
    found, found_gradients = run(view)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("view", MEMORY.values(), ids=MEMORY.keys())
def test_position_weights_and_orders_may_lie_anyhow(view: Callable[[Tensor], Tensor]) -> None:
    scores, labels, weights = torch.randn(4, 5), torch.rand(4, 2, 5), torch.rand(4, 2, 5)
    order = presort(labels)
    expected = plackett_luce(scores, labels, order=order, position_weights=weights, reduction="none")
    found = plackett_luce(scores, labels, order=view(order), position_weights=view(weights), reduction="none")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("view", MEMORY.values(), ids=MEMORY.keys())
def test_the_memory_order_of_logits_and_heads_does_not_matter(view: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    logits, hidden, weight = torch.randn(2, 3, 7), torch.randn(2, 3, 4), torch.randn(7, 4)
    target, mask = torch.randint(0, 7, (2, 3)), torch.rand(2, 3) < 0.8
    segment = torch.tensor([[0, 0, 1], [1, 2, 2]])

    def run(arrange: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (logits, hidden, weight)]
        u, h, w = map(arrange, leaves)
        y, m, temperature = arrange(target), arrange(mask), arrange(torch.tensor([[0.5, 1.0, 2.0], [1.0, 1.5, 1.0]]))
        results = [
            *gathered_logprob(u, y, mask=m, temperature=temperature, return_logsumexp=True, return_entropy=True),
            *linear_logprob(h, w, y, mask=m, temperature=temperature, return_logsumexp=True, return_entropy=True),
            linear_kl(h, w, 2 * h.detach(), mask=m, temperature=temperature),
            sequence_logprob(gathered_logprob(u, y, mask=m), arrange(segment), sequences=3),
        ]  # fmt: skip
        return [*results, *torch.autograd.grad(sum(r.square().sum() for r in results), leaves)]  # type: ignore[union-attr]

    for found, expected in zip(run(view), run(lambda t: t), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_logits_that_share_their_memory_get_no_gradient_written_over_them() -> None:
    row, target = torch.randn(1, 7), torch.tensor([1, 4, 1])
    found = []
    for inplace in (False, True):
        leaf = row.clone().requires_grad_()
        logits = (leaf * 1).expand(3, 7)
        gathered_logprob(logits, target, inplace_backward=inplace).sum().backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    assert torch.equal(*found)


def differentiable(loss: Callable[..., Tensor], values: dict[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    """Return the losses (B, m) and the gradient in every argument."""
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    given = dict(leaves)
    value = loss(given.pop("scores"), given.pop("labels"), mask=mask, reduction="none", **given)
    return {"loss": value.detach(), **gradients(value, leaves)}


@every_loss
@pytest.mark.parametrize("filling", [0.0, 7.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
def test_nothing_depends_on_padding_or_on_what_it_holds(loss: Callable[..., Tensor], filling: float) -> None:
    torch.manual_seed(3)
    labels = torch.tensor([[[2.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 3.0]], [[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 1.0]]])
    values = {
        "scores": torch.randn(2, 4), "labels": labels, "reference": torch.randn(2, 4),
        "beta": torch.rand(2, 2) + 0.5, "weights": torch.rand(2, 2),
    }  # fmt: skip
    plain = differentiable(loss, values, None)
    for place in ([1, 2, 4, 6], [0, 1, 2, 3], [3, 4, 5, 6]):  # where the items stand among seven places
        mask = torch.zeros(2, 7, dtype=torch.bool)
        mask[:, place] = True
        wide = dict(values)
        for name in ("scores", "labels", "reference"):
            wide[name] = torch.full((*values[name].shape[:-1], 7), filling)
            wide[name][..., place] = values[name]
        padded = differentiable(loss, wide, mask)
        for name, expected in plain.items():
            found = padded[name]
            if found.shape != expected.shape:
                assert not found[..., ~mask[0]].any(), f"{name} of padding is not 0"
                found = found[..., place]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=f"{name} at {place}")


# ---------------------------------------------------------------- digits


@pytest.mark.parametrize("offset", [0.0, -3000.0, 1e6])
def test_normalised_mixtures_keep_the_digits_of_close_scores_far_from_zero(offset: float) -> None:
    near = torch.tensor([[0.0, -0.5, -1.25], [0.25, -2.0, 0.5]])  # exact at every offset here
    scores, reference = near + offset, near.flip(1) + offset
    mixed = steering.log_mix(scores, 0.3, reference=reference, normalize=True)
    exact = (0.3 * near.double() + 0.7 * near.flip(1).double()).log_softmax(-1)
    torch.testing.assert_close(mixed.double(), exact, rtol=3e-7, atol=1e-7)
    experts = steering.mix_experts([scores, reference], [0.3, 0.7])
    torch.testing.assert_close(experts.double(), exact, rtol=3e-7, atol=1e-7)
    alone = steering.rescale(scores, reference, 1.0, normalize=True)
    torch.testing.assert_close(alone, scores.log_softmax(-1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modpo_takes_differences_of_sixteen_bit_scores_in_float32(dtype: torch.dtype) -> None:
    scores, reference, expert = (torch.tensor([[value]], dtype=dtype) for value in (-100.0, -31.25, -64.5))
    found = steering.modpo_reward(scores, reference, [None, expert], (0.5, 0.5))
    given = [t.double() for t in (scores, reference, expert)]
    assert found.dtype == torch.float32
    assert float(found) == float(2 * (given[0] - given[1] - 0.5 * (given[2] - given[1])))


def test_modpo_names_what_does_not_fit_and_keeps_the_impossible_impossible() -> None:
    scores = torch.tensor([[0.5, -torch.inf, 1.0]])
    found = steering.modpo_reward(scores, scores, [None, scores], (0.5, 0.5))
    assert found.tolist() == [[0.0, -torch.inf, 0.0]]
    with pytest.raises(ValueError, match=r"experts\[1\] has shape \(1, 2\) but must be \(..., K\) = \(1, 3\)"):
        steering.modpo_reward(scores, scores, [None, scores[:, :2]], (0.5, 0.5))
    with pytest.raises(ValueError, match=r"reference has shape \(3,\)"):
        steering.modpo_reward(scores, scores[0], [None, scores], (0.5, 0.5))


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.float32, torch.bfloat16, torch.float64])
def test_softmax_targets_have_the_digits_of_the_scores(label_dtype: torch.dtype) -> None:
    scores, labels = torch.randn(3, 4, dtype=torch.float64), torch.randint(0, 5, (3, 4)).to(label_dtype)
    found = listwise_dpo(scores, labels, normalize="softmax")
    exact = -(labels.double().softmax(-1) * scores.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("loss", [pairwise_logistic, plackett_luce], ids=["pairwise", "plackett-luce"])
def test_labels_that_float32_cannot_tell_apart_still_rank(loss: Callable[..., Tensor]) -> None:
    scores, rank = torch.randn(4, 5), torch.rand(4, 2, 5).argsort(-1)
    expected = loss(scores, rank, reduction="none")
    for labels in (rank + 1_700_000_000, (rank + 1_700_000_000).int(), 1 + 1e-12 * rank.double()):
        assert torch.equal(loss(scores, labels, reduction="none"), expected)


@pytest.mark.parametrize("loss", [pairwise_logistic, lambda_loss, approx_ndcg], ids=["pairwise", "lambda", "approx"])
@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(
    "scores", [(1e3, 0.3, -0.3), (-1e5, 0.3, -0.3), (1e7, 0.3, -0.3), (-300.1, -300.2, -900.0), (0.1, 0.2, -1e4, 0.3)]
)
def test_one_large_score_costs_the_differences_of_the_others_no_digit(loss, scores, beta) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = torch.tensor([scores]).to(dtype).requires_grad_()
        rate = torch.tensor([[beta]]).to(dtype).requires_grad_()
        value = loss(leaf, torch.arange(len(scores))[None].flip(1), beta=rate)
        found.append((value.detach(), *torch.autograd.grad(value, (leaf, rate))))
    near_one = 1e-7 if loss is approx_ndcg else 0  # which is 1 minus what it computes
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()) + near_one)


@pytest.mark.parametrize("loss", [pairwise_logistic, lambda_loss], ids=["pairwise", "lambda"])
def test_scores_of_two_sizes_are_rounded_by_no_more_than_their_own_last_digits(loss) -> None:
    scores = torch.tensor([[1000.5, 1000.25, 0.1, 0.2, 0.3]], requires_grad=True)
    wide = scores.detach().double().requires_grad_()
    for beta in (0.1, 3.0):
        pairs = [loss(s, torch.arange(5)[None].flip(1), beta=beta) for s in (scores, wide)]
        torch.testing.assert_close(pairs[0].double(), pairs[1], rtol=1e-5, atol=0)
        ours, exact = (torch.autograd.grad(value, leaf)[0] for value, leaf in zip(pairs, (scores, wide), strict=True))
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
