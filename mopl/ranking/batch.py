"""A padded batch of lists: `B` lists of at most `K` items with `F` features and `m` auxiliary objectives."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from mopl.training.batches import to_device


@dataclasses.dataclass(frozen=True)
class Batch:
    """Padded lists; masked places hold zeros.

    Attributes:
        features: (B, K, F) float32 inputs of the model.
        labels: (B, m, K) float32 gains of the auxiliary objectives: raw, but turned so that higher is better.
        targets: (B, m, K) float32, `labels` normalised by each objective's own rule to a distribution over the list
            (all zeros where a list has no mass): pass them to a loss with `normalize=None`.
        main: (B, K) float32 gains of the main objective.
        main_targets: (B, K) float32, `main` normalised.
        mask: (B, K) bool, true where an item exists.
        queries: (B,) int64, which lists of the data these are.
        order: (B, m, K) int64, items sorted by label, best first, equal labels in the order of the file, masked
            places last; None unless asked for.
    """

    features: Tensor  # (B, K, F)
    labels: Tensor  # (B, m, K)
    targets: Tensor  # (B, m, K)
    main: Tensor  # (B, K)
    main_targets: Tensor  # (B, K)
    mask: Tensor  # (B, K)
    queries: Tensor  # (B,)
    order: Tensor | None = None  # (B, m, K)

    def __len__(self) -> int:
        return self.mask.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`."""
        return Batch(**to_device(vars(self), device))
