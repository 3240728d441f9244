"""A frozen large model that a small conditioned one guides, token by token."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mopl._arguments import shape_of
from mopl._counted import there_are
from mopl.conditioning.references import Reference
from mopl.conditioning.sampling import Weights
from mopl.conditioning.weighted import WeightedModel, causal_lm_of
from mopl.decoding._generating import generate_by, strength_of
from mopl.decoding.followers import Follower, copies_of, mask_so_far, on_vocabulary
from mopl.steering import guide


def guided(
    large: nn.Module,
    policy: nn.Module,
    weights: Weights | None,  # (m,) or (B, m)
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
    *,
    strength: float | Tensor = 1.0,  # number or (B,)
    beta: Weights | None = None,  # (m,) or (B, m)
    kl_weight: float | Tensor | None = None,  # number or (B,)
    reference: nn.Module | None = None,
    **kwargs: Any,
) -> Any:
    """Generate from p ∝ p_L (p_w / p0)^λ, token by token: a frozen large model, guided by a small conditioned one.

    Both have one tokenizer, which nothing here can check; `mopl.language_models.generate.generate` with `guided_model`
    can, and writes prompts, scores whole responses and stops where a turn ends. Embeddings may differ in size: a
    token that one of the models has not is impossible.

    Args:
        large: The model that is guided, p_L, whose `generate` runs.
        policy: The small model that was tuned, p: of any kind that takes weights, or a plain or PEFT model. Of a kind
            that decodes one trade-off at a time (`ParameterMixture`), each distinct trade-off is mixed at every token.
        weights: w on the simplex, (m,) or one vector a prompt (B, m); None for a model without.
        input_ids: (B, T), padded on the left.
        attention_mask: (B, T); may be left out where nothing is padded.
        strength: λ = 1/c, a number or one a prompt (B,): 0 the large model alone. From the optimum of the policy at β
            it gives the optimum at β/λ with p_L for reference.
        beta: β of a policy that is conditioned on it: λ is divided by its sum, as in `mopl.steering.beta_conditioned`.
        kl_weight: α of a policy that is conditioned on it.
        reference: p0; None: the policy itself with everything trained switched off.
        **kwargs: keywords of `generate` of transformers.

    Returns:
        What `generate` returns.

    Raises:
        ValueError: If weights or shapes do not fit, p0 is missing, or an option cannot go with a mixture.
    """
    share = strength_of(strength, input_ids, "0 is the large model, 1 all that the policy learned")
    share = share.expand(len(input_ids))
    conditions = _conditions_of(policy, weights, beta, kl_weight, len(input_ids))
    if "beta" in conditions:
        share = share / conditions["beta"].to(share).sum(-1)
    base = Reference(policy, reference)
    for one in (large, policy, base.model):
        rows = causal_lm_of(one).get_input_embeddings().weight.shape[0]
        if bool((input_ids >= rows).any()):
            raise ValueError(
                f"input_ids has token {int(input_ids.max())} but {type(one).__name__} has only {rows}; the models must "
                "share one tokenizer"
            )

    def processor(mask: Tensor) -> GuidedLogits:
        return GuidedLogits(_following(policy, conditions), base, share, mask)

    others = [policy] if base.own else [policy, base.model]
    return generate_by(processor, large, others, input_ids, attention_mask, kwargs)


class GuidedLogits:
    """A logits processor for `generate` of transformers: the generating model's scores, guided by a small model.

    Use one for one call of `generate`.

    Args:
        policy: What gives the scores of the tuned model, as a `Follower` does.
        reference: What it was tuned from, a `mopl.conditioning.references.Reference`.
        strength: λ, (B,) for the prompts.
        attention_mask: (B, T), of the prompts; padded on the left.
    """

    def __init__(self, policy: Any, reference: Reference, strength: Tensor, attention_mask: Tensor) -> None:
        self.mask, self.strength, self._policy = attention_mask.long(), strength, policy
        self._reference = Follower(reference.model, reference.active, last_only=True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return log-probabilities (rows, V) in the place of the generating model's scores.

        Args:
            input_ids: (rows, L), prompts and what was generated; rows are B, or B times beams or samples.
            scores: (rows, V), of the generating model.
        """
        mask, prompts = mask_so_far(self.mask, input_ids), len(self.mask)
        small = (one.scores(input_ids, mask, prompts).to(scores.device) for one in (self._policy, self._reference))
        tuned, base = (on_vocabulary(each, scores.shape[-1]) for each in small)
        return guide(tuned, base, scores, copies_of(self.strength, scores)).to(scores.dtype)


def _following(policy: Any, conditions: Mapping[str, Tensor]) -> Follower | _OneByOne:
    """Return what gives the scores of a policy that is told (B, ...) conditions."""
    if conditions and not policy.decodes_rows:
        return _OneByOne(policy, conditions)
    return Follower(policy, conditions=conditions)


class _OneByOne:
    """A policy that is one trade-off at a time, behind a generation: the rows of each distinct one have a cache."""

    def __init__(self, policy: Any, conditions: Mapping[str, Tensor]) -> None:
        told = torch.cat([value.double().cpu().reshape(len(value), -1) for value in conditions.values()], 1)
        of_row = torch.unique(told, dim=0, return_inverse=True)[1]
        self._parts: list[tuple[Tensor, Follower]] = []
        for group in range(int(of_row.max()) + 1):
            index = (of_row == group).nonzero()[:, 0]
            one = {name: value[index[0]] for name, value in conditions.items()}
            self._parts.append((index, Follower(policy, functools.partial(policy.at, **one))))

    def scores(self, tokens: Tensor, mask: Tensor, prompts: int) -> Tensor:
        """Return the scores of the next token, (rows, V), as `Follower.scores`."""
        copies, found = torch.arange(len(tokens) // prompts), []
        places = [(index[:, None] * len(copies) + copies).reshape(-1).to(tokens.device) for index, _ in self._parts]
        for place, (index, follower) in zip(places, self._parts, strict=True):
            found.append(follower.scores(tokens[place], mask[place], len(index)))
        return torch.cat(found)[torch.cat(places).argsort().to(found[0].device)]


def _conditions_of(policy: Any, weights: Any, beta: Any, kl_weight: Any, rows: int) -> dict[str, Tensor]:
    """Return what a policy is told of each of its rows, (B, ...)."""
    if not isinstance(policy, WeightedModel):
        if any(given is not None for given in (weights, beta, kl_weight)):
            raise ValueError(
                f"weights, beta or kl_weight were passed but a {type(policy).__name__} takes none; pass weights=None"
            )
        return {}
    given = policy.conditions(weights, beta, kl_weight)
    found = {name: torch.as_tensor(value) for name, value in given.items()}
    for name, value in found.items():
        count = value.ndim - (name != "kl_weight")  # of dimensions of rows
        if tuple(value.shape[:count]) not in ((), (1,), (rows,)):
            raise ValueError(
                f"{name} has shape {shape_of(value)} but {there_are(rows, 'prompt')}; pass one or one each"
            )
        found[name] = value.expand(rows, *value.shape[count:])
    return found
