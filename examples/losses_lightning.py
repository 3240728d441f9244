"""`mopl.losses` in a LightningModule: the loop of losses_pytorch.py with Lightning's trainer."""

import lightning
import torch

from mopl.conditioning import sample_weights
from mopl.losses import listwise_dpo

lightning.seed_everything(0, verbose=False)
torch.set_num_threads(1)  # so small a model is slower with more
features = torch.randn(64, 10, 4)  # 64 lists of 10 items
labels = torch.stack([features[..., 0].sigmoid(), features[..., 1].sigmoid()], 1)  # (64, 2 objectives, 10)


class Ranker(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4 + 2, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([x, weights[:, None].expand(-1, x.shape[1], -1)], -1)).squeeze(-1)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        weights = sample_weights(2, len(x), seed=0, step=self.global_step, rank=self.global_rank).to(self.device)
        return listwise_dpo(self(x, weights), y, weights=weights, normalize="softmax")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


ranker = Ranker()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, labels), batch_size=32, shuffle=True)
trainer = lightning.Trainer(
    max_epochs=60, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(ranker, loader)

for first in (1.0, 0.5, 0.0):
    weights = torch.tensor([first, 1 - first]).expand(64, 2)
    vector = listwise_dpo(ranker(features, weights), labels, normalize="softmax", reduction="none").mean(0).tolist()
    print(f"weights {first:.1f},{1 - first:.1f}: losses of the objectives {vector[0]:.4f}, {vector[1]:.4f}")
