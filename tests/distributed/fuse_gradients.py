"""Run by tests/language_models/test_fuse_distributed.py on two processes: gradients of fused scores, DDP and FSDP2.

Each rank has its own part of the batch; the loss is the mean over the whole batch, and gradients must equal those of
one process that sees all of it. tests/gpu/test_wrapped.py runs it on one GPU, in the dtypes that it names.
"""

import copy
import os
import sys

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import torch
import torch.distributed as dist
import transformers
from ending import leave
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mopl.alignment import fuse, score_sequences

torch.set_num_threads(1)
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
ROWS = 4


def build(tied: bool, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(DEVICE, dtype)


def batch_of(rows: slice) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (ROWS, 9), generator=generator).to(DEVICE)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 6:] = -100
    return {"input_ids": ids[rows], "labels": labels[rows]}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, f"{name} has no gradient"
        found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor], upstream: torch.Tensor) -> None:
    # A mean over the global batch: DDP and FSDP average over ranks, so each rank gives the mean over its own rows.
    (score_sequences(model, batch).scores * upstream).mean().backward()


def main() -> None:
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    share = ROWS // dist.get_world_size()
    mine = slice(share * dist.get_rank(), share * (dist.get_rank() + 1))
    upstream = torch.tensor([0.7, -1.3, 2.0, 0.2], device=DEVICE)
    failures = []
    for dtype in [getattr(torch, name) for name in sys.argv[1:]] or [torch.float32]:
        limit = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        for tied in (False, True):
            single = fuse(build(tied, dtype))
            step(single, batch_of(slice(0, ROWS)), upstream)
            expected = gradients(single)
            cases = {"ddp": None, "fsdp2, head in the root group": False}
            if not tied:
                cases["fsdp2, head in a group of its own"] = True
            for case, own_group in cases.items():
                model = fuse(build(tied, dtype))
                if own_group is None:
                    wrapped = DistributedDataParallel(copy.deepcopy(model))
                else:
                    for layer in model.model.layers:
                        fully_shard(layer)
                    if own_group:
                        fully_shard(model.lm_head)
                    wrapped = fully_shard(model)
                for _ in range(2):  # the second backward would show a hook that fires once
                    wrapped.zero_grad()
                    step(wrapped, batch_of(mine), upstream[mine])
                for name, grad in gradients(wrapped).items():
                    error = float((grad - expected[name]).abs().max() / expected[name].abs().max())
                    if not error <= limit:
                        failures.append(f"{dtype}, {case}, tied={tied}, {name}: relative error {error:.2e}")
    dist.barrier()
    dist.destroy_process_group()
    if failures:
        sys.exit("\n".join(failures))
    if mine.start == 0:
        print("all gradients equal")


if __name__ == "__main__":
    main()
    leave()
