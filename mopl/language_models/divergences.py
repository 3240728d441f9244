"""Divergences between teachers and a student over the responses of a batch, without the logits of either.

A teacher's forward pass gives what its head would multiply at the tokens of the responses (`states_of`); one forward
pass of the student then gives its divergence to every teacher by `mopl.ops.linear_jsd` (`divergences`). A teacher may
read the same responses behind other prompts than the student, who has the weights of objectives in its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopl.language_models._head_scores import Distillation, FusedOutput, HeadStates
from mopl.language_models._target_rows import TargetRows

__all__ = ["Distillation", "HeadStates", "divergences", "states_of"]


@torch.no_grad()
def states_of(model: nn.Module, batch: Mapping[str, Any], **model_kwargs: Any) -> HeadStates:
    """Return what a model's head gets where the tokens of responses are predicted, and the head.

    Args:
        model: A fused model, or anything that wraps one.
        batch: As in `score_sequences`.
        **model_kwargs: Keywords of the model's forward, such as the weights of a `WeightedModel`.

    Returns:
        `HeadStates`, of S targets in the order of the batch: `hidden` (S, H) and the head's `weight` (V, H). There is
        no graph.

    Raises:
        ValueError: If the model is not fused, or as `score_sequences`.
    """
    rows = TargetRows.of(batch)
    rows.check(model)
    found = model(**rows.inputs, targets=rows.targets, return_states=True, **model_kwargs)
    if not isinstance(found, HeadStates):
        raise ValueError("the teacher is not fused: call mopl.alignment.fuse(model) on the causal language model first")
    return found


def divergences(
    model: nn.Module,
    batch: Mapping[str, Any],
    teachers: Sequence[HeadStates],
    how: Distillation,
    *,
    scores: bool = False,
    **model_kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the mean divergence to each teacher over the tokens of each response, in one forward pass of the student.

    Args:
        model: The student: a fused model, or anything that wraps one.
        batch: As in `score_sequences`.
        teachers: m, what `states_of` gave for the same responses in the same order.
        how: Which divergence.
        scores: Also give the summed log-probabilities, which cost a product with the head more.
        **model_kwargs: Keywords of the student's forward.

    Returns:
        (N, m) float32, in nats, a column for each teacher; and (N,) scores, or None.

    Raises:
        ValueError: If a teacher predicts other tokens or has another vocabulary, or as `score_sequences`.
    """
    rows = TargetRows.of(batch)
    rows.check(model)
    output = model(
        **rows.inputs, targets=rows.targets, teachers=tuple(teachers), distillation=how, return_log_probs=scores,
        **model_kwargs,
    )  # fmt: skip
    if not isinstance(output, FusedOutput):
        raise ValueError("the model is not fused: call mopl.alignment.fuse(model) on the causal language model first")
    found = torch.stack([rows.total(each, average=True)[0] for each in output.divergences], -1)
    return found, rows.total(output.log_probs)[0] if scores else None
