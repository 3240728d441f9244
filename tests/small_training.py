"""A training of a few weights on drawn lists, which the tests of the loop run in their process and in others."""

import math

import numpy as np
import torch
from torch import nn

from mopl.training import TrainingConfig, part_of_batch, shuffled_indices

LISTS, BATCH = 20, 8


class Source:
    """Lists with random features and targets, and per-list weights drawn for the whole batch."""

    def __init__(self, batch_size=BATCH, poison_at=None):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(LISTS, 5, generator=generator)
        self.y = torch.randn(LISTS, 1, generator=generator)
        self.batch_size, self.poison_at = batch_size, poison_at

    def __call__(self, step, rank, world_size):
        rows = part_of_batch(self.batch_size, rank, world_size)
        index = torch.from_numpy(shuffled_indices(LISTS, self.batch_size, seed=3, step=step))[rows]
        drawn = torch.from_numpy(np.random.default_rng([3, step]).random((self.batch_size, 1), dtype=np.float32))[rows]
        y = self.y[index] * (math.nan if step == self.poison_at else 1.0)
        return {"x": self.x[index], "y": y, "w": drawn}


def squared_error(model, batch, step):
    error = (batch["w"] * (model(batch["x"]) - batch["y"]) ** 2).mean()
    return error, {"error": error}


def network(dropout=0.0):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1))


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def config(**changes):
    return TrainingConfig(**{"steps": 20, "learning_rate": 0.05, "log_every": 5, "checkpoint_every": 5, **changes})
