"""Trained methods of a run: what answers for some weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopl import steering
from mopl.conditioning import check_weights
from mopl.experiments.cos_dpo import model_folders, place_in_grid
from mopl.experiments.methods import TABLE
from mopl.language_models import models


def load_trained(path: Path, folder: Path, method: str, grid: Tensor, base: nn.Module) -> nn.Module:
    """Return the conditioned model of a method's folder in a run, around its fused base model, in evaluation mode.

    Of a baseline it is one of the models that the run has, which `set_weights` makes that of some weights.
    """
    place = folder / "model" if TABLE[method].conditioned else model_folders(path, method, grid)[0]
    return models.load_model(place, base)


def set_weights(model: Any, path: Path, method: str, grid: Tensor, weights: Sequence[float] | Tensor) -> None:
    """Let the model of a baseline be the one for weights (m,): one that was trained, or for soup their average.

    A soup averages all trained parameters, the two factors of each adapter apart.

    Raises:
        ValueError: If the method has no model for these weights.
    """
    w = check_weights(weights, grid.shape[1]).double()
    folders = model_folders(path, method, grid)
    if not TABLE[method].averages:
        model.load_weights(folders[place_in_grid(grid, w, method)])
        return
    experts = []
    for folder in folders:
        model.load_weights(folder)
        experts.append({name: value.clone() for name, value in model.trained_state().items()})
    own = model.trained_state()
    with torch.no_grad():
        for name, value in steering.soup(experts, w).items():
            own[name].copy_(value)
