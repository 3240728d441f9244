"""Distillation: a teacher for each objective, one student for every trade-off.

The loss of objective j is the divergence D_j between its teacher and the student at weights w, averaged over the tokens
of a response and over the responses of a list; a list's loss is Σ_j w_j D_j, with w drawn as for `weight-cos-dpo`. D is
the generalised Jensen-Shannon divergence of `mopl.ops.linear_jsd` (Agarwal et al., On-policy distillation of language
models, ICLR 2024, with TRL's ends), on the responses of the data, or in a share of the steps on the student's own
answers (`on_policy.py`), through whose sampling nothing is differentiated. A student that can be anything has its
optimum, in each context, where

    β = 0      p = Σ_j w_j p_j                       the arithmetic mixture of the teachers
    β = 1      p ∝ Π_j p_j^{w_j}                     their geometric mixture, which mixes logits
    between    p ∝ Π_j (β p_j + (1 - β) p)^{w_j}     for then Σ_j w_j log(p / M_j) is the same for every token

since the derivative of D by the student's probabilities is (1 - β) log(p / M_j), M_j = β p_j + (1 - β) p, up to the
normaliser 1 / (β (1 - β)) that the ends have as limits.

The teachers' forward passes run without gradient; what their heads get goes to the student's fused head, so that no
logits are held, and one forward and backward pass of the student serves all teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mopl.alignment.methods import AlignBatch
from mopl.alignment.on_policy import OwnAnswers
from mopl.alignment.teachers import Teacher
from mopl.experiments.cos_dpo import StepLoss, scalarized
from mopl.language_models.collate import ListBatch, ListCollator, to_lists
from mopl.language_models.divergences import Distillation, divergences
from mopl.language_models.scoring import Conditions
from mopl.language_models.tokenization import TokenizedList
from mopl.training.parallel import unwrapped


class Distilling:
    """The divergences of a student to the teachers of a run.

    Args:
        teachers: One for each objective.
        how: Which divergence.
        accelerator: accelerate's `Accelerator`, for the precision of the teachers.
    """

    def __init__(self, teachers: Sequence[Teacher], how: Distillation, accelerator: Any) -> None:
        self.teachers, self.how, self.accelerator = tuple(teachers), how, accelerator

    def divergence(
        self,
        model: nn.Module,
        batch: ListBatch,
        plain: ListBatch,
        weights: Tensor,
        beta: Tensor | None,
        *,
        scores: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mean divergence over the tokens of each response to each teacher, (B, K, m), 0 in masked places.

        Args:
            model: The student.
            batch: The lists as it reads them.
            plain: The same lists as the teachers read them, without weights in words.
            weights: w, (m,) or (B, m).
            beta: β, of a student that takes it.
            scores: Also return the summed log-probabilities (B, K), else None.
        """
        with self.accelerator.autocast():
            states = [teacher.states(plain) for teacher in self.teachers]
        given = Conditions.of(unwrapped(model)).keywords(batch, weights, beta)
        found, logprob = divergences(model, batch.inputs, states, self.how, scores=scores, **given)
        columns = [to_lists(column, batch) for column in found.unbind(-1)]
        return torch.stack(columns, -1), None if logprob is None else to_lists(logprob, batch)

    def loss(
        self,
        names: Sequence[str],
        *,
        answers: OwnAnswers | None = None,
        penalty: float = 0.0,
        penalty_sign: Literal["as_printed", "cosmos"] = "as_printed",
    ) -> StepLoss:
        """Return the training loss of a student.

        Args:
            names: Names of the objectives.
            answers: Gives some steps the student's own answers in the place of the data's responses.
            penalty: As in `mopl.experiments.cos_dpo.scalarized`; so is the next.
            penalty_sign: Of the penalty.
        """

        def step_loss(model: nn.Module, batch: AlignBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            if answers is not None and answers.has(step):
                batch = answers.answered(model, batch, step)
            found, _ = self.divergence(model, batch.lists, batch.read_by_teachers, batch.weights, batch.beta)
            vector = found.sum(1) / batch.lists.mask.sum(1, keepdim=True)
            value = scalarized(vector, batch.weights, penalty=penalty, penalty_sign=penalty_sign)
            logs = {f"loss/{name}": mean for name, mean in zip(names, vector.detach().mean(0), strict=True)}
            return value.mean(), logs

        return step_loss

    def score(
        self, lists: Sequence[TokenizedList], collator: ListCollator, weights: Tensor, beta: Tensor
    ) -> Callable[[nn.Module, ListBatch], Tensor]:
        """Return what gives `score_lists` 1 + m columns for each response: its log-probability, its divergences.

        Args:
            lists: The lists as the teachers read them.
            collator: Makes their batches.
            weights: w, (m,).
            beta: β, (m,), of a student that takes it.
        """
        known = {item.index: item for item in lists}

        def score(model: nn.Module, batch: ListBatch) -> Tensor:
            device = batch.mask.device
            plain = collator([known[number] for number in batch.lists.tolist()]).to(device)
            found, scores = self.divergence(
                model, batch, plain, weights.float().to(device), beta.float().to(device), scores=True
            )
            assert scores is not None
            return torch.cat([scores[..., None], found], -1)

        return score
