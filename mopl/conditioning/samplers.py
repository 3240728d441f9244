"""What each list of a training step is trained for: samplers of weights and of β, functions of the step.

A sampler draws for the whole batch of a step, which is cut afterwards, so that no list's trade-off depends on how many
processes share the batch; see `mopl.conditioning.sampling` for the draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mopl.conditioning.sampling import sample_betas, sample_weights

Sampler = Callable[[int], Tensor]  # step -> (B, m)
Per = Literal["list", "step"] | int


def fixed(value: Tensor, batch_size: int) -> Sampler:
    """Return a sampler that gives every list of every step the same (m,) vector."""
    rows = value.float().expand(batch_size, -1)
    return lambda step: rows


def dirichlet_weights(
    objectives: int, batch_size: int, *, concentration: float, per: Per, seed: int, balanced: bool = False
) -> Sampler:
    """Return a sampler of weights w ~ Dirichlet(concentration), on the simplex, for the lists of a step.

    One vector is drawn `per` "list"; one per "step", as in algorithm 1 of Ren et al. (COS-DPO, UAI 2025); or `per` is
    how many different vectors a step has, each of them for lists that stand side by side. `balanced` as in
    `sample_weights`.
    """
    count = _draws(per, batch_size)

    def draw(step: int) -> Tensor:
        rows = sample_weights(objectives, count, concentration, seed=seed, step=step, balanced=balanced)
        return _spread(rows, batch_size)

    return draw


def box_betas(
    objectives: int, batch_size: int, *, low: Sequence[float], high: Sequence[float], per: Per, seed: int
) -> Sampler:
    """Return a sampler of β / ‖β‖₁ with β uniform in the box from `low` to `high`, (m,) each; see `dirichlet_weights`.

    Equation (16) of Ren et al., COS-DPO, UAI 2025.
    """
    count = _draws(per, batch_size)
    return lambda step: _spread(sample_betas(objectives, count, low, high, seed=seed, step=step).normalized, batch_size)


def one_of(values: Sequence[float], batch_size: int, *, per: Per, seed: int, stream: int = 0) -> Sampler:
    """Return a sampler of one of some numbers, all as likely, for each list, (B,); `per` as in `dirichlet_weights`.

    Draws of another `stream` are independent.
    """
    choices, count = torch.tensor(values), _draws(per, batch_size)

    def draw(step: int) -> Tensor:
        uniform = sample_betas(1, count, 1.0, 2.0, seed=seed, step=step, rank=stream).beta[:, 0] - 1
        return _spread(choices[(uniform * len(choices)).long().clamp(max=len(choices) - 1)], batch_size)

    return draw


def _draws(per: Per, batch_size: int) -> int:
    """Return how many vectors a step draws."""
    if isinstance(per, int) and not isinstance(per, bool) and per > 0:
        return min(per, batch_size)
    if per not in ("list", "step"):
        raise ValueError(f"weights_per is {per!r} but must be 'list', 'step' or a whole number above 0")
    return batch_size if per == "list" else 1


def _spread(rows: Tensor, batch_size: int) -> Tensor:
    """Give each row to as many lists as the others, side by side."""
    if len(rows) == 1:
        return rows.expand(batch_size, *rows.shape[1:])
    return rows if len(rows) == batch_size else rows[torch.arange(batch_size) * len(rows) // batch_size]
