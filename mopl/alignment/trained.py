"""Trained methods of a run: what answers for some weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from mopl import steering
from mopl.conditioning import HyperPromptModel, check_weights
from mopl.experiments.cos_dpo import model_folders, place_in_grid
from mopl.experiments.methods import TABLE
from mopl.language_models import models


def state_for(
    path: Path, method: str, objectives: Sequence[str], grid: Tensor, weights: Sequence[float] | Tensor
) -> dict[str, Tensor]:
    """Return what a baseline answers with for weights (m,): one of its models, or for soup their average.

    A soup averages all trained parameters, the two factors of each adapter apart.

    Raises:
        ValueError: If the method has no model for these weights.
    """
    w = check_weights(weights, len(objectives)).double()
    folders = model_folders(path, method, grid)
    if TABLE[method].averages:
        return steering.soup([models.read_state(folder, like=folders[0]) for folder in folders], w)
    return models.read_state(folders[place_in_grid(grid, w, method)], like=folders[0])


def load_trained(
    path: Path,
    folder: Path,
    method: str,
    objectives: Sequence[str],
    grid: Tensor,
    base: nn.Module,
    weights: Sequence[float] | Tensor | None = None,
) -> nn.Module:
    """Return a trained method of a run around its fused base model, in evaluation mode.

    Args:
        path: The run.
        folder: The method's folder in it.
        method: Name of the method.
        objectives: Names of the objectives.
        grid: (n, m) weights of the run's grid.
        base: The base model.
        weights: (m,), for a baseline; by default the first of the grid, to be replaced by `models.set_state`.

    Raises:
        ValueError: As `state_for`.
    """
    if TABLE[method].conditioned:
        return models.load_model(folder / "model", base)
    w = grid[0] if weights is None else weights
    model = models.load_model(model_folders(path, method, grid)[0], base)
    assert isinstance(model, HyperPromptModel)
    models.set_state(model, state_for(path, method, objectives, grid, w))
    return model
