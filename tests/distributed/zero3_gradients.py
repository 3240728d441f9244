"""Run by tests/language_models/test_fuse_distributed.py on two processes with DeepSpeed: fused scores under ZeRO-3.

As in `fuse_gradients.py`, each rank has half of the batch; gradients must equal those of one process with all of it.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [here, os.path.dirname(here)]

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
from deepspeed.utils import safe_get_full_grad
from deepspeed_site import without_compiled_ops
from ending import leave
from fuse_gradients import batch_of, build, gradients, step

from mopl.alignment import fuse, score_sequences

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
    },  # 0: cut even small ones
}


def engine_of(partitioned_first: bool, tied: bool):
    """Return an engine: `fuse` before ZeRO-3 cuts the parameters, or, as transformers loads large models, after."""
    if partitioned_first:
        with deepspeed.zero.Init(config_dict_or_path=CONFIG):
            model = build(tied, torch.float32)
        state = build(tied, torch.float32).state_dict()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                model.load_state_dict(state)
    else:
        model = build(tied, torch.float32)
    optimizer = torch.optim.SGD(fuse(model).parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    return engine


def main() -> None:
    if not torch.cuda.is_available():
        without_compiled_ops()
    deepspeed.init_distributed(None if torch.cuda.is_available() else "gloo")
    rank = torch.distributed.get_rank()
    mine = slice(2 * rank, 2 * rank + 2)
    upstream = torch.tensor([0.7, -1.3, 2.0, 0.2])
    failures = []
    for tied in (False, True):
        single = fuse(build(tied, torch.float32))
        step(single, batch_of(slice(0, 4)), upstream)
        expected = gradients(single)
        for partitioned_first in (False, True):
            engine = engine_of(partitioned_first, tied)
            batch = {name: value.to(engine.device) for name, value in batch_of(mine).items()}
            for _ in range(2):  # the parameters are gathered in another order from the second step on
                engine.backward((score_sequences(engine, batch).scores * upstream[mine].to(engine.device)).mean())
                for name, parameter in engine.module.named_parameters():
                    grad = safe_get_full_grad(parameter)
                    error = float((grad.cpu() - expected[name]).abs().max() / expected[name].abs().max())
                    if not error <= 1e-5:
                        failures.append(f"{partitioned_first=}, {tied=}, {name}: relative error {error:.2e}")
                engine.step()  # clears the gradients; its learning rate is 0
            engine.destroy()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if failures:
        sys.exit("\n".join(failures))
    if rank == 0:
        print("all gradients equal")


if __name__ == "__main__":
    main()
    leave()
