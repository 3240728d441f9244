"""Every op and loss as a function of the tensors that it is differentiable in, with what is promised about it: `CASES`.

What is in `mopl.ops`, `mopl.losses` or among the registered ops and in no case fails `test_derivatives.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from mopl import losses, ops, reference, reference_logprob, steering
from mopl.losses import scalarize

F64 = torch.float64
B, M, K = 5, 2, 6
MASK = torch.tensor(
    [[1] * 6, [1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0] * 6], dtype=torch.bool
)  # ragged lists of 6, 4, 2, 1 and 0 items
LABELS = torch.tensor([[[3, 1, 1, 0, 2, 1], [0, 0, 1, 1, 2, 2]]] * B) + (torch.arange(B * M).view(B, M, 1) % 3 == 0)
ORDER = torch.where(MASK[:, None], LABELS, -1).argsort(dim=-1, descending=True, stable=True)

Function = Callable[..., Tensor]


@dataclass
class Case:
    """A function of differentiable float64 tensors, and what has been promised about its derivatives."""

    function: Function
    shapes: dict[str, tuple[int, ...]]  # the differentiable arguments
    oracle: Function | None = None  # the same function in plain loops
    positive: tuple[str, ...] = ("beta", "temperature", "labels", "kl_weight")
    refused: bool = False  # everything beyond the first derivative in reverse mode is an error
    surrogate: bool = False  # a loss that holds parts of itself constant, as documented: no derivative of its value
    reads_values: bool = False  # checks values, which PyTorch refuses under vmap

    def leaves(self, seed: int = 0, scale: float = 1.5) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        values = []
        for name, shape in self.shapes.items():
            value = torch.randn(shape, dtype=F64, generator=generator)
            values.append(value.abs() + 0.3 if name in self.positive else scale * value)
        return tuple(values)

    def __call__(self, *leaves: Tensor) -> Tensor:
        return self.function(**dict(zip(self.shapes, leaves, strict=True)))


LIST = {"scores": (B, K), "reference": (B, K), "beta": (B, M), "weights": (B, M)}
COMMON = LIST | {"beta": (B, 1)}


def case(loss: Function, plain: Function | None, shapes: dict | None = None, **options) -> Case:
    """Return a case of a list loss; its oracle is a plain formula on scores - reference with betas (B, m)."""
    shapes = shapes or LIST
    constants = {"labels": LABELS.double()} if "labels" not in shapes else {}
    oracle = None
    if plain is not None:

        def oracle(scores, reference, beta, weights, **more):
            return weights * plain(scores - reference, beta=beta, mask=MASK, **constants, **more)

    return Case(partial(loss, mask=MASK, reduction="none", **constants, **options), shapes, oracle)


def plackett_luce(shapes: dict | None = None, **options) -> Case:
    plain = {k: v for k, v in options.items() if k != "last_group"}
    plain["last_group_free"] = options.get("last_group") == "free"
    return case(losses.plackett_luce, partial(reference.plackett_luce_nll, **plain), shapes, **options)


def lambda_loss(**options) -> Case:
    return case(losses.lambda_loss, partial(reference.lambda_loss, **options), **options)


TOKENS = {"logprob": (3, 4)}
TARGET = torch.tensor([[1, 4], [0, -100], [-100, -100], [2, 2]])
ROWS = {"logits": (4, 5), "temperature": (4,)}
HEAD = {"hidden": (3, 4), "weight": (7, 4), "bias": (7,)}
TOKEN_MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)


def all_of(function: Function, **options) -> Function:
    """Return a log-probability op with its three results in one tensor."""

    def joined(**leaves) -> Tensor:
        results = function(**leaves, **options, return_logsumexp=True, return_entropy=True)
        return torch.cat([part.reshape(-1) for part in results])

    return joined


def all_of_oracle(**leaves) -> Tensor:
    results = reference_logprob.gathered_logprob(leaves.pop("logits"), TARGET, **leaves, softcap=2.0)
    return torch.cat([part.reshape(-1) for part in results])


def pairs(chosen: Tensor, rejected: Tensor, beta: Tensor, **options) -> Tensor:
    return losses.bradley_terry(chosen, rejected, beta=beta, reduction="none", **options)


CASES = {
    "listwise_dpo": case(
        losses.listwise_dpo, reference.listwise_cross_entropy, LIST | {"labels": (B, M, K)}
    ),
    "listwise_dpo-common": case(losses.listwise_dpo, reference.listwise_cross_entropy, COMMON),
    "listwise_dpo-unnormalized": case(
        losses.listwise_dpo,
        partial(reference.listwise_cross_entropy, normalize=False),
        LIST | {"labels": (B, M, K)},
        normalize=None,
    ),
    "listwise_dpo-softmax": case(losses.listwise_dpo, None, LIST | {"labels": (B, M, K)}, normalize="softmax"),
    "plackett_luce": plackett_luce(ties="breslow"),
    "plackett_luce-common": plackett_luce(COMMON, top_k=2),
    "plackett_luce-free": plackett_luce(last_group="free", position_weights=torch.rand(K, dtype=F64) + 0.1),
    "plackett_luce-efron": plackett_luce(ties="efron", position_weights=torch.rand(B, M, K, dtype=F64)),
    "plackett_luce-efron-order": plackett_luce(ties="efron", order=ORDER),
    "plackett_luce-exact": plackett_luce(ties="exact"),
    "pairwise_logistic": case(losses.pairwise_logistic, reference.pairwise_logistic, LIST | {"margin": (B, M)}),
    "pairwise_logistic-common": case(losses.pairwise_logistic, reference.pairwise_logistic, COMMON),
    "lambda_loss": lambda_loss(),
    "lambda_loss-ndcg": lambda_loss(normalize=True, top_k=2, top_k_rule="both", gain="linear"),
    "approx_ndcg": case(losses.approx_ndcg, reference.approx_ndcg),
    "approx_ndcg-labels": case(losses.approx_ndcg, None, LIST | {"labels": (B, M, K)}),
    "normalize_labels": Case(partial(losses.normalize_labels, mode="l1", mask=MASK), {"labels": (B, M, K)}),
    "bradley_terry": Case(pairs, {"chosen": (B, M), "rejected": (B, M), "beta": (B, M)}),
    "bradley_terry-hyperbolic": Case(
        partial(pairs, loss_type="discopop", f_divergence="js_divergence"),
        {"chosen": (B, M), "rejected": (B, M), "beta": (B, M)},
    ),
    "DPOLoss": Case(
        lambda chosen, rejected: losses.DPOLoss(0.5)(chosen, rejected, torch.ones(B), torch.zeros(B))[0],
        {"chosen": (B,), "rejected": (B,)},
    ),
    "policy_gradient": Case(
        lambda logprob: losses.policy_gradient(
            logprob, torch.ones(3, 2), torch.tensor([0.4, 0.6]), kl_weight=0.3, reference=torch.zeros(3, 4, dtype=F64),
            behaviour=torch.full((3, 4), -0.1, dtype=F64), mask=TOKEN_MASK, reduction="none",
        ).loss,
        TOKENS,
        surrogate=True,
    ),
    "policy_gradient-credit": Case(
        lambda logprob: losses.policy_gradient(
            logprob, torch.arange(24.0, dtype=F64).view(3, 2, 4) / 9, torch.tensor([0.4, 0.6]), kl_weight=0.0,
            behaviour=torch.full((3, 4), -0.1, dtype=F64), mask=TOKEN_MASK, reduction="none",
            token_weights=torch.arange(12.0, dtype=F64).view(3, 4) / 5, ratio_level="sequence_mean",
        ).loss,
        TOKENS,
        surrogate=True,
    ),
    "kl_estimate": Case(
        partial(losses.kl_estimate, reference=torch.zeros(3, 4, dtype=F64), mask=TOKEN_MASK, estimator="k3"),
        TOKENS,
        surrogate=True,
    ),
    "value_loss": Case(
        lambda values: losses.value_loss(values, torch.zeros(3, 4, dtype=F64), mask=TOKEN_MASK, reduction="none"),
        {"values": (3, 4)},
    ),
    "group_mean": Case(partial(losses.group_mean, group=2, leave_one_out=True), {"values": (4,)}),
    "scalarize": Case(
        lambda vector, weights: torch.stack(
            [
                scalarize.linear(vector, weights.abs()),
                scalarize.chebyshev(vector, weights.abs(), rho=0.1),
                scalarize.smooth_chebyshev(vector, weights.abs(), mu=0.5),
                scalarize.cosine_penalty(vector, weights.abs()),
            ]
        ),
        {"vector": (B, M), "weights": (B, M)},
    ),
    "sequence_logprob": Case(
        lambda logprob: ops.sequence_logprob(
            logprob, torch.tensor([0, 1, 1, -1, 2, 0]), sequences=3, average=True
        ),
        {"logprob": (6,)},
    ),
    "sequence_logprob-padded": Case(partial(ops.sequence_logprob, mask=TOKEN_MASK), TOKENS),
    "gathered_logprob": Case(
        all_of(ops.gathered_logprob, target=TARGET, softcap=2.0), ROWS, all_of_oracle
    ),
    "gathered_logprob-plain": Case(
        partial(ops.gathered_logprob, target=TARGET[:, 0]),
        ROWS,
        lambda **leaves: reference_logprob.gathered_logprob(target=TARGET[:, 0], **leaves)[0],
    ),
    "gathered_logprob-inplace": Case(
        lambda logits: ops.gathered_logprob(logits * 1, TARGET[:, 0], inplace_backward=True),
        {"logits": (4, 5)},
        lambda logits: reference_logprob.gathered_logprob(logits, TARGET[:, 0])[0],
    ),
    "linear_logprob": Case(all_of(ops.linear_logprob, target=torch.tensor([1, 2, 6])), HEAD, refused=True),
    "linear_logprob-frozen": Case(
        partial(ops.linear_logprob, weight=torch.randn(7, 4).double(), target=torch.tensor([1, 2, 6])),
        {"hidden": (3, 4), "temperature": (3,)},
        refused=True,
    ),
    "linear_kl": Case(
        partial(ops.linear_kl, reference_hidden=torch.randn(3, 4).double(),
                reference_weight=torch.randn(7, 4).double()),
        HEAD,
        refused=True,
    ),
    "linear_jsd": Case(
        partial(ops.linear_jsd, teacher_hidden=torch.randn(3, 5).double(), teacher_weight=torch.randn(7, 5).double(),
                beta=0.3),
        HEAD,
        refused=True,
    ),
    "linear_jsd-frozen": Case(
        partial(ops.linear_jsd, weight=torch.randn(7, 4).double(), teacher_hidden=torch.randn(3, 4).double()),
        {"hidden": (3, 4)},
        refused=True,
    ),
    "linear_topk_jsd": Case(
        partial(ops.linear_topk_jsd, teacher_ids=torch.tensor([[0, 3], [6, -100], [2, 1]]),
                teacher_logprobs=torch.tensor([[0.5, 0.2], [0.1, 0.0], [0.3, 0.3]]).double().log(), softcap=2.0),
        HEAD,
        refused=True,
    ),
    "listwise_cross_entropy": Case(
        partial(ops.listwise_cross_entropy, mask=MASK),
        {"scores": (B, K), "labels": (B, M, K), "beta": (B, M)},
        partial(reference.listwise_cross_entropy, mask=MASK),
    ),
    "plackett_luce_nll": Case(
        partial(ops.plackett_luce_nll, labels=LABELS, mask=MASK),
        {"scores": (B, K), "beta": (B, M)},
        partial(reference.plackett_luce_nll, labels=LABELS, mask=MASK),
    ),
    "steering": Case(
        lambda scores, reference, strength: torch.stack(
            [
                steering.realign(scores, reference, strength),
                steering.rescale(scores, reference, strength.exp(), normalize=True),
                steering.mix_experts([scores, reference], torch.tensor([0.3, 0.7])),
            ]
        ),
        {"scores": (B, K), "reference": (B, K), "strength": (B,)},
        reads_values=True,
    ),
}  # fmt: skip

# Not functions of tensors with a derivative: orders, records, a module of functions that are in the case "scalarize".
WITHOUT = {"presort", "PolicyGradient", "ImportanceWeights", "importance_weights", "balance_weights"}

# Scores (B, K) of lists.
EXTREMES = {
    "ties": torch.zeros(B, K),
    "far apart": torch.tensor([1e4, -1e4, 0.0, 5.0, -5.0, 1e4]).repeat(B, 1),
    "impossible items": torch.tensor([0.0, -math.inf, 1.0, -math.inf, 2.0, 0.5]).repeat(B, 1),
    "nothing possible": torch.full((B, K), -math.inf),
}

every = pytest.mark.parametrize("name", CASES)
derivable = pytest.mark.parametrize("name", [name for name, c in CASES.items() if not c.refused])
refused = pytest.mark.parametrize("name", [name for name, c in CASES.items() if c.refused])
with_oracle = pytest.mark.parametrize("name", [name for name, c in CASES.items() if c.oracle is not None])


def tracked(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)


def contractions(function: Function, leaves: tuple[Tensor, ...], orders: int) -> list[tuple[Tensor, ...]]:
    """Return gradients of increasing order, each the gradient of a random contraction of the one before.

    The upstream gradient of the function is an argument too.
    """
    generator = torch.Generator().manual_seed(7)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=F64, generator=generator).to(like.dtype)

    leaves = tracked(leaves)
    value = function(*leaves)
    upstream = random(value).requires_grad_()
    total, inputs, found = (value * upstream).sum(), (*leaves, upstream), []
    for _ in range(orders):
        gradients = torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True)
        found.append(tuple(g.detach() for g in gradients))
        total = sum((g * random(g)).sum() for g in gradients)
    return found
