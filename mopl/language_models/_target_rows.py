"""Which tokens of a batch are predicted, at which positions, and how what is known of each becomes one number a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopl._rows import check_sequences
from mopl.conditioning.weighted import active_adapters, check_packed, check_padding
from mopl.language_models._head_scores import IGNORE_INDEX
from mopl.ops import sequence_logprob


@dataclass(frozen=True, eq=False)
class TargetRows:
    """A batch of `score_sequences` as a fused model takes it.

    Attributes:
        inputs: what the model's own forward takes.
        targets: (N, T), shifted: aligned with the positions that predict them; -100 elsewhere.
        segment: (1, T) of a packed row, the number of each token's sequence; else None.
        sequences: how many sequences a packed row has, if that was told.
    """

    inputs: dict[str, Any]
    targets: Tensor
    segment: Tensor | None
    sequences: Any

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> TargetRows:
        """Read a batch; arguments and errors are those of `score_sequences`."""
        inputs = dict(batch)
        if "input_ids" not in inputs:
            raise ValueError(f"batch has no input_ids (N, T); it has {sorted(inputs)}")
        input_ids = inputs["input_ids"]
        labels, response_mask = inputs.pop("labels", None), inputs.pop("response_mask", None)
        if labels is None:
            if response_mask is None:
                raise ValueError("batch has neither labels (-100 on prompt and padding) nor response_mask (N, T)")
            labels = input_ids.masked_fill(~response_mask.bool(), IGNORE_INDEX)
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels has shape {tuple(labels.shape)} but input_ids {tuple(input_ids.shape)}")
        segment, sequences = inputs.pop("segment", None), inputs.pop("sequences", None)

        targets = torch.full_like(labels, IGNORE_INDEX)
        targets[:, :-1] = labels[:, 1:]
        if (kept := inputs.get("attention_mask")) is not None and kept.shape == targets.shape:
            # Padding on the left predicts nothing: a row's first token has no score, as in the row alone.
            targets = targets.masked_fill(kept == 0, IGNORE_INDEX)
        if segment is not None:
            if segment.shape != input_ids.shape:
                raise ValueError(f"segment has shape {tuple(segment.shape)} but input_ids {tuple(input_ids.shape)}")
            if inputs.get("position_ids") is None:
                raise ValueError(
                    "batch has segment but no position_ids, without which a model takes a packed row for one text; "
                    "pass positions (1, T) that start again at 0 with each sequence"
                )
            check_sequences(segment, inputs["position_ids"])
        # The last token of one sequence must not predict the first of the next.
        if (crosses := _crosses(segment, inputs)) is not None:
            targets[:, :-1] = targets[:, :-1].masked_fill(crosses.to(targets.device), IGNORE_INDEX)
        return cls(inputs, targets, segment, sequences)

    def check(self, model: Any) -> None:
        """Raise where an adapter of PEFT around the model, or what is wrapped around it, would misread such rows."""
        if not active_adapters(model):
            return
        if self.packed:
            check_packed(model)
        check_padding(model, self.inputs.get("attention_mask"), "pad on the right (padding_side='right')")

    @property
    def packed(self) -> bool:
        """Whether a row holds several sequences."""
        if self.segment is not None:
            return True
        crosses = _crosses(None, self.inputs)
        return crosses is not None and bool(crosses.any())

    def total(self, values: Tensor, *, average: bool = False) -> tuple[Tensor, Tensor]:
        """Return the sum of values (N, T), or their mean, over the targets of each sequence, and how many there are."""
        counted = (self.targets != IGNORE_INDEX).to(values.device)
        if self.segment is None:
            return sequence_logprob(values, mask=counted, average=average), counted.sum(-1)
        count = int(self.sequences) if self.sequences is not None else int(self.segment.max()) + 1
        flat, keep = self.segment.reshape(-1).to(values.device), counted.reshape(-1)
        lengths = torch.zeros(count, dtype=torch.long, device=flat.device).index_add_(0, flat.clamp(min=0), keep.long())
        return sequence_logprob(values.reshape(-1), flat, mask=keep, sequences=count, average=average), lengths


def _crosses(segment: Tensor | None, inputs: Mapping[str, Any]) -> Tensor | None:  # (N, T - 1)
    """Return before which tokens a packed row begins another sequence; None of rows that are not packed."""
    if segment is not None:
        return segment[:, :-1] != segment[:, 1:]
    positions = inputs.get("position_ids")
    if inputs.get("attention_mask") is not None or positions is None or positions.ndim != 2:
        return None
    return positions[:, 1:] == 0
