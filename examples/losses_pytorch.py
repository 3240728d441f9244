"""`mopl.losses` in a plain PyTorch loop: one ranker for every balance of two objectives that disagree."""

import torch

from mopl.conditioning import sample_weights
from mopl.losses import listwise_dpo

torch.manual_seed(0)
torch.set_num_threads(1)  # so small a model is slower with more
features = torch.randn(64, 10, 4)  # 64 lists of 10 items
labels = torch.stack([features[..., 0].sigmoid(), features[..., 1].sigmoid()], 1)  # (64, 2 objectives, 10)
ranker = torch.nn.Sequential(torch.nn.Linear(4 + 2, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.Adam(ranker.parameters(), lr=1e-2)


def scores(weights: torch.Tensor) -> torch.Tensor:  # (64, 2) -> (64, 10)
    return ranker(torch.cat([features, weights[:, None].expand(-1, 10, -1)], -1)).squeeze(-1)


for step in range(200):
    weights = sample_weights(2, 64, seed=0, step=step)  # one trade-off a list, the same in every run
    loss = listwise_dpo(scores(weights), labels, weights=weights, normalize="softmax")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

for first in (1.0, 0.5, 0.0):
    weights = torch.tensor([first, 1 - first]).expand(64, 2)
    vector = listwise_dpo(scores(weights), labels, normalize="softmax", reduction="none").mean(0).tolist()
    print(f"weights {first:.1f},{1 - first:.1f}: losses of the objectives {vector[0]:.4f}, {vector[1]:.4f}")
