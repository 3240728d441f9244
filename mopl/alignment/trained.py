"""Trained methods of a run: where the models of the baselines lie, and which of them answers for some weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mopl import steering
from mopl.alignment.config import CONDITIONED
from mopl.conditioning import HyperPromptModel, check_weights
from mopl.language_models import models


def vector_name(weights: Sequence[float] | Tensor) -> str:
    """Return weights as a part of a folder's name: `0.25-0.75`."""
    return "-".join(f"{float(w):.4g}" for w in weights)


def model_folder(path: Path, method: str, weights: Sequence[float] | Tensor) -> Path:
    """Return where the model of a baseline for these weights is."""
    return path / "models" / f"{'modpo' if method == 'mo-dpo' else 'w'}-{vector_name(weights)}"


def state_for(
    path: Path, method: str, objectives: Sequence[str], grid: Tensor, weights: Sequence[float] | Tensor
) -> dict[str, Tensor]:
    """Return what a baseline answers with for weights (m,): one of its models, or for soup their average.

    A soup averages all trained parameters, the two factors of each adapter apart.

    Raises:
        ValueError: If the method has no model for these weights.
    """
    w = check_weights(weights, len(objectives)).double()
    if method == "dpo-soup":
        experts = torch.eye(len(objectives), dtype=torch.float64)
        first = model_folder(path, method, experts[0])
        return steering.soup([models.read_state(model_folder(path, method, e), like=first) for e in experts], w)
    distance = (grid - w).abs().sum(1)
    nearest = int(distance.argmin())
    if distance[nearest] > 1e-4:
        known = " ".join(f"{x:.4g}" for x in grid[nearest].tolist())
        raise ValueError(
            f"{method} trained a model for each of {len(grid)} weight vectors, none for "
            f"{' '.join(f'{x:.4g}' for x in w.tolist())}; the nearest is {known}. Only weight-cos-dpo takes any"
        )
    return models.read_state(model_folder(path, method, grid[nearest]), like=model_folder(path, method, grid[0]))


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
    if method in CONDITIONED:
        return models.load_model(folder / "model", base)
    w = grid[0] if weights is None else weights
    first = torch.eye(len(objectives))[0] if method == "dpo-soup" else grid[0]
    model = models.load_model(model_folder(path, method, first), base)
    assert isinstance(model, HyperPromptModel)
    models.set_state(model, state_for(path, method, objectives, grid, w))
    return model
