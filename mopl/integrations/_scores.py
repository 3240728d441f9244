"""Scores of a batch's responses, and what else a forward pass gives that TRL's options ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from mopl.conditioning.causal_lm import text_config
from mopl.conditioning.weighted import causal_lm_of
from mopl.integrations._options import default_of
from mopl.language_models.collate import ListBatch, to_lists
from mopl.language_models.head import IGNORE_INDEX, SequenceScores, score_sequences
from mopl.language_models.scoring import Conditions, response_lengths


@dataclass(frozen=True)
class Scored:
    """What one forward pass over a batch gave."""

    scores: Tensor  # (B, K) sums over tokens of log-probabilities in nats, weighted if `ld_alpha` is set
    lengths: Tensor  # (B, K) numbers of tokens that are scored
    tokens: Tensor  # (B, K) of all tokens; the first of a response that nothing stands before has no score
    likelihood: Tensor | None = None  # (B, K) the sums without weights, where the scores have some
    confidence: Tensor | None = None  # (B, 1) by what the losses of a pair are multiplied (WPO)
    router: Tensor | None = None  # the auxiliary loss of a mixture of experts
    router_coefficient: float = 0.0  # its factor in the loss


@dataclass(frozen=True)
class Scoring:
    """How a batch is scored."""

    # Weight of the tokens of a pair's longer response that the shorter one has no counterpart for (LD-DPO, 2409.06411).
    ld_alpha: float | None = None
    weighting: bool = False  # whether to weigh pairs by the policy's confidence (WPO, 2406.11827, equation 2)
    router: float = 0.0  # coefficient of the auxiliary loss of a mixture of experts; 0 for none

    @classmethod
    def of(cls, args: Any, model: Any) -> Scoring:
        """Read it off a trainer's arguments and the model; raise where options exclude one another."""
        ld_alpha, weighting = getattr(args, "ld_alpha", None), getattr(args, "use_weighting", False)
        if ld_alpha is not None:
            if not 0 <= ld_alpha <= 1:
                raise ValueError(f"ld_alpha is {ld_alpha} but must lie in [0, 1]; 1 weighs all tokens alike")
            for name in ("padding_free", "length_normalized"):
                if getattr(args, name, False):
                    raise ValueError(f"ld_alpha is {ld_alpha} and {name} is True; leave one of them out")
        for noise, remedy in (
            (not getattr(args, "disable_dropout", True), "pass disable_dropout=True"),
            (getattr(args, "neftune_noise_alpha", None), "leave neftune_noise_alpha out"),
        ):
            if weighting and noise:
                raise ValueError(f"use_weighting is True, which needs a second, equal forward pass; {remedy}")
        return cls(ld_alpha, weighting, router_coefficient(args, causal_lm_of(model)))

    @property
    def pairs_only(self) -> str | None:
        """The name of an option that is for pairs."""
        return "ld_alpha" if self.ld_alpha is not None else "use_weighting" if self.weighting else None

    def __call__(
        self,
        model: nn.Module,
        batch: ListBatch,
        conditions: Conditions | None = None,
        weights: Tensor | None = None,  # (B, m)
        beta: Tensor | None = None,  # (B, m)
    ) -> Scored:
        """Score a batch with a model, which is called as it is given: DDP, FSDP and the like see their own forward."""
        keywords = {} if conditions is None else conditions.keywords(batch, weights, beta)
        asked = {"output_router_logits": True} if self.router else {}
        found = score_sequences(model, batch.inputs, **keywords, **asked)
        scores, lengths = self._weighed(found, batch)
        confidence = router = None
        if self.weighting:
            # log Σ p² = lse(2 z) - 2 lse(z) and log p = z - lse(z), so log p - log Σ p² is the log-probability at
            # temperature 1/2 less that at 1: no other quantity of the head is needed.
            with torch.no_grad():
                sharp = score_sequences(model, batch.inputs, temperature=0.5, **keywords)
                mean = (sharp.scores - found.scores) / found.lengths.clamp(min=1)
                confidence = to_lists(mean, batch).sum(-1, keepdim=True).exp()
        if self.router:
            auxiliary = getattr(found.output.model_output, "aux_loss", None)
            if auxiliary is None:
                raise ValueError(
                    "the model returned no auxiliary loss (aux_loss), though its config has output_router_logits; pass "
                    "router_aux_loss_coef=0.0 to train without it"
                )
            router = auxiliary.to(scores.device)
        plain = None if self.ld_alpha is None else to_lists(found.scores, batch)
        return Scored(scores, lengths, response_lengths(batch).to(lengths), plain, confidence, router, self.router)

    def reference(self, model: nn.Module, batch: ListBatch, **keywords: Any) -> Tensor:
        """Return the scores (B, K) of a reference; `keywords` are its conditions, where it has some."""
        return self._weighed(score_sequences(model, batch.inputs, **keywords), batch)[0]

    def _weighed(self, found: SequenceScores, batch: ListBatch) -> tuple[Tensor, Tensor]:  # (B, K), (B, K)
        """Return scores and lengths."""
        lengths = to_lists(found.lengths.to(found.scores.dtype), batch)
        if self.ld_alpha is None:
            return to_lists(found.scores, batch), lengths
        log_probs = found.output.log_probs  # (N, T)
        shared = torch.where(batch.mask, lengths, torch.inf).amin(-1)[batch.index[:, 0]]  # (N,)
        counted = torch.zeros_like(log_probs)
        counted[:, :-1] = batch.inputs["labels"][:, 1:] != IGNORE_INDEX
        beyond = counted.cumsum(-1) > shared[:, None]
        kept = torch.where(beyond, self.ld_alpha, 1.0) * counted
        return to_lists((log_probs * kept).sum(-1), batch), lengths


def router_coefficient(args: Any, model: Any) -> float:
    """Return the coefficient of a mixture of experts' auxiliary loss, 0 where there is none to be added.

    With `router_aux_loss_coef` in the arguments (TRL's) it is that, or the config's where it is None; else it is the
    config's where that asks for the loss (`output_router_logits`), as in transformers.
    """
    config = text_config(model)
    own = getattr(config, "router_aux_loss_coef", None) or 0.0
    if not hasattr(args, "router_aux_loss_coef"):
        return own if getattr(config, "output_router_logits", False) else 0.0
    given = args.router_aux_loss_coef
    if not hasattr(config, "output_router_logits"):
        usual = {entry.name: default_of(entry) for entry in fields(args)}["router_aux_loss_coef"]
        if given and given != usual:  # TRL before 1.14 has a default, which does nothing for other models
            raise ValueError(
                f"router_aux_loss_coef is {given} but {type(model).__name__} is no mixture of experts that returns its "
                "router's logits; leave it out"
            )
        return 0.0
    return own if given is None else given
