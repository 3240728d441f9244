"""Results of an evaluation at the points of a grid of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopl._extras import require
from mopl.conditioning.sampling import check_weights
from mopl.integrations._objective import Measured, trl_metrics
from mopl.integrations._settings import TradeOffs
from mopl.pareto.grid import weight_grid


def evaluation_grid(trade_offs: TradeOffs, points: int | None, given: Any = None) -> Tensor:  # (n, m)
    """Return the points that an evaluation measures: of the grid, or the one that a model without weights trains for.

    Args:
        trade_offs: What the model takes and trains for.
        points: The number of points that was asked for, if any.
        given: The points themselves, if they were.

    Raises:
        ValueError: If there are several points for a model whose scores are the same at each.
    """
    m = trade_offs.objectives
    if not trade_offs.conditioned and points is None and given is None:
        assert trade_offs.fixed is not None
        return trade_offs.fixed.reshape(1, m)
    grid = weight_grid(m, points, density="coarse") if given is None else check_weights(given, m)
    grid = grid.float().reshape(-1, m)
    if not trade_offs.conditioned and len(grid) > 1:
        name = "eval_points" if given is None else "eval_weights"
        raise ValueError(
            f"{name} asks for {len(grid)} trade-offs, but the model takes no weights, so that it is the same model at "
            f"each of them; leave {name} out to measure it at those it trains for, or pass one point, or a model that "
            "takes weights, such as a HyperPromptModel"
        )
    return grid


class GridResults:
    """What one batch gave at each point, in one tensor that processes can gather: (B, n, 7 m + 1)."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def add(self, measured: Measured) -> None:
        """Add what the next point gave."""
        parts = [measured.vector, measured.correct, measured.pairs]
        parts += [*measured.rewards, *measured.logps, measured.value[:, None]]
        self._rows.append(torch.cat([part.float() for part in parts], 1))

    def read(self) -> Tensor:
        """Return the table."""
        return torch.stack(self._rows, 1)

    @staticmethod
    def metrics(prediction: Any, grid: Tensor, objectives: Sequence[str], user_metrics: Any = None) -> dict[str, float]:
        """Return means over lists by name.

        Args:
            prediction: An `EvalPrediction` of tables (L, n, 7 m + 1) and of which objectives count (L, m).
            grid: (n, m).
            objectives: Names.
            user_metrics: A `compute_metrics` to be called as well.
        """
        table, mask = np.asarray(prediction.predictions, dtype=np.float64), np.asarray(prediction.label_ids)
        m = len(objectives)
        loss, correct, pairs = (table[..., n * m : (n + 1) * m] for n in range(3))  # (L, n, m)
        count = np.maximum(mask.sum(0), 1)
        losses = loss.sum(0) / count  # (n, m)
        accuracies = correct.sum(0) / np.maximum(pairs.sum(0), 1)
        found: dict[str, float] = {"loss": float(table[..., -1].mean())}
        for j, name in enumerate(objectives):
            found[f"{name}_loss"] = float(losses[:, j].mean())
            found[f"{name}_accuracy"] = float(accuracies[:, j].mean())
        for n, point in enumerate(grid.tolist()):
            at = ",".join(f"{x:.2f}" for x in point)
            found[f"loss@{at}"] = float(table[:, n, -1].mean())
            for j, name in enumerate(objectives):
                found[f"{name}_loss@{at}"] = float(losses[n, j])
                found[f"{name}_accuracy@{at}"] = float(accuracies[n, j])
        found |= trl_metrics(pairs.sum(), correct.sum(), *(table[..., k * m : (k + 1) * m].sum() for k in range(3, 7)))
        if user_metrics is not None:
            require("transformers")
            from transformers import EvalPrediction

            each = np.divide(correct, pairs, out=np.zeros_like(correct), where=pairs > 0)
            tables: Any = (loss, each)
            found |= user_metrics(EvalPrediction(predictions=tables, label_ids=mask))
        return found
