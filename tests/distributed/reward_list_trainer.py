"""Run by tests/integrations/test_scorers.py on two processes: one step on two lists each, in mini-batches."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

import torch
from ending import leave
from test_scorers import WEIGHTS, parameters, trained

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trainer = trained(folder, per_device_train_batch_size=2, mini_batch_size=3, **WEIGHTS)
    assert trainer.accelerator.num_processes == 2
    if trainer.is_world_process_zero():
        torch.save(parameters(trainer), folder / "trained.pt")
    leave()
