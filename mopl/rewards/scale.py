"""The scale in which rewards of different units enter one objective: fixed, or followed over the training.

Mean and deviation that are followed are those of all rewards so far, merged batch by batch (Chan, Golub & LeVeque 1979,
the form of Welford's method for batches). With a decay γ < 1 what was there counts γ times as much after each rollout:
an exponential mean over about 1/(1 - γ) rollouts, which forgets the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RewardScale:
    """R becomes (R - mean) / deviation, for each of m rewards."""

    mean: Tensor  # (m,)
    deviation: Tensor  # (m,)
    counts: Tensor | None = None  # (m,), rewards that both were computed from, where that is known

    def __call__(self, rewards: Tensor) -> Tensor:
        """Return the rewards (R, m) in the scale of the training."""
        return (rewards - self.mean) / self.deviation

    @classmethod
    def of(cls, rewards: Tensor, names: tuple[str, ...], *, constant: bool = False) -> RewardScale:
        """Return the scale in which rewards (R, m) have mean 0 and deviation 1; missing ones are left out.

        Args:
            rewards: (R, m), NaN where missing.
            names: Of the rewards.
            constant: Let a reward be the same everywhere; its deviation is then 1.

        Raises:
            ValueError: If a reward is missing or the same everywhere.
        """
        counts, mean, squares = moments(rewards)
        deviation = (squares / counts).sqrt()
        for name, count, spread in zip(names, counts.tolist(), deviation.tolist(), strict=True):
            if not count or not (spread > 0 or constant):
                raise ValueError(
                    f"the reward {name} is the same (or missing) for all answers of the untrained model, so it has no "
                    "scale; pass more normalize_prompts, normalize='none' (or 'running'), or another reward"
                )
        return cls(mean.float(), torch.where(deviation > 0, deviation, 1.0).float(), counts)


class RunningScale(nn.Module):
    """The scale of a training that follows its rewards. Its state is in buffers, so checkpoints hold it.

    Rewards are scaled by what was known before them (`forward`), then added (`update`): the scale is a constant for the
    policy gradient, which thus stays unbiased. A reward whose values have all been equal is centred and not divided.

    Args:
        start: The scale of the untrained model's answers, with their `counts`.
        decay: γ in (0, 1]; 1: all rewards so far count the same.
    """

    counts: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, start: RewardScale, decay: float = 1.0) -> None:
        super().__init__()
        if start.counts is None:
            raise ValueError("start does not say from how many rewards it is; make it with RewardScale.of")
        self.decay = decay
        counts = start.counts.double()
        self.register_buffer("counts", counts.clone())
        self.register_buffer("mean", start.mean.double().clone())
        self.register_buffer("squares", start.deviation.double().square() * counts)

    @property
    def deviation(self) -> Tensor:
        """(m,), 1 where all values have been equal."""
        found = (self.squares / self.counts).sqrt()
        return torch.where(found > 0, found, 1.0)

    def forward(self, rewards: Tensor) -> Tensor:
        """Return rewards (R, m) in the scale of now."""
        values = rewards.to(self.mean)
        return ((values - self.mean) / self.deviation).to(rewards)

    @torch.no_grad()
    def update(self, rewards: Tensor) -> None:
        """Add the rewards (R, m) of a rollout, and those that the other processes have in theirs; NaN is left out."""
        found = torch.stack(moments(rewards.to(self.mean)))
        parts = [found]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [torch.empty_like(found) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, found)
        self.add(*parts)

    @torch.no_grad()
    def add(self, *parts: Tensor) -> None:
        """Add rewards by their `moments`, (3, m) each: those of one rollout, and none twice."""
        self.counts *= self.decay
        self.squares *= self.decay
        for counts, mean, squares in parts:
            total = self.counts + counts
            share = total.clamp(min=1.0)  # a reward that nobody has had yet divides 0
            apart = mean - self.mean
            self.squares += squares + apart.square() * self.counts * counts / share
            self.mean += apart * counts / share
            self.counts.copy_(total)


def moments(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers, means and sums of squared distances from the mean of rewards (R, m), each (m,) float64.

    What is NaN is left out; a reward that is nowhere has the mean 0.
    """
    values = rewards.double()
    counts = (~values.isnan()).sum(0).double()
    mean = values.nanmean(0).nan_to_num(0.0)
    return counts, mean, (values - mean).square().nansum(0)
