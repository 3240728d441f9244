"""Run by tests/integrations/test_trl_heads.py on two gloo processes: DPO by TRL, patched and not, in DDP and FSDP2.

Gradients of a batch (each rank has its own) and the weights that a training ends at must be those of TRL.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import peft
import torch
import torch.distributed as dist
import trl
from ending import leave
from tiny_language_models import build, tokenizer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mopl

torch.set_num_threads(1)
CHOSEN = ["w3 w4", "w8 w9 w10", "w1", "w5 w6 w7 w8"]
ROWS = [{"prompt": f"w{n} w{n + 1} ", "chosen": text, "rejected": f"w{n + 9} w2"} for n, text in enumerate(CHOSEN)]
ROOT, OWN, LATE = "fsdp2, head in the root group", "fsdp2, head in a group of its own", "fsdp2, adapters"
CASES = ("ddp, adapters", ROOT, OWN, LATE)


def made(folder: str, adapters: bool = False):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapters else None
    arguments = trl.DPOConfig(
        folder, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=2,
        bf16=False, gradient_checkpointing=adapters, dataloader_pin_memory=False, max_steps=2, logging_steps=1,
        learning_rate=1e-2,
    )  # fmt: skip
    reference = {} if adapters else {"ref_model": build(initializer_range=0.25)}
    trainer = trl.DPOTrainer(
        build(), args=arguments, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer(),
        peft_config=config, **reference,
    )  # fmt: skip
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return trainer


def wrapped(trainer, case: str):
    model = trainer.model
    if case.startswith("ddp"):
        return DistributedDataParallel(model)
    inner = model.get_base_model() if "adapters" in case else model
    for layer in inner.model.layers:
        fully_shard(layer)
    if "own" in case:
        fully_shard(inner.lm_head)
    return fully_shard(model)


def gradients(trainer, model, inputs) -> dict[str, torch.Tensor]:
    for _ in range(2):  # the second backward would show a hook that fires once
        model.zero_grad()
        trainer.compute_loss(model, dict(inputs)).backward()
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in found.items()}


def both(folder: str, case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients by TRL's head, and by the one that is in front of it: patched before, or after wrapping."""
    trainer = made(folder, "adapters" in case)
    late = case == LATE
    if not late:
        mopl.patch_trl(trainer)
    model = wrapped(trainer, case)
    rank = dist.get_rank()
    inputs = trainer.data_collator([trainer.train_dataset[2 * rank + number] for number in range(2)])
    model.train()
    heads = [] if late else trainer._mopl_trl_heads
    for head in heads:
        head.active = False
    theirs = gradients(trainer, model, inputs)
    if late:
        mopl.patch_trl(trainer)
    calls = []
    for head in trainer._mopl_trl_heads:
        head.active, scored = True, head.fused.score
        head.fused.score = lambda *args, _scored=scored, **kwargs: calls.append(1) or _scored(*args, **kwargs)
    ours = gradients(trainer, model, inputs)
    assert len(calls) == 4  # policy and reference
    return theirs, ours


def trained(folder: str, patched: bool) -> dict[str, torch.Tensor]:
    trainer = made(folder)
    if patched:
        mopl.patch_trl(trainer)
    trainer.train()
    return {n: p.detach() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def main(folder: str) -> None:
    failures = []
    runs = {"training": (trained(folder, patched=False), trained(folder, patched=True))}
    runs |= {case: both(folder, case) for case in CASES}
    # TRL gathers a head that lies in a group of its own without summing its gradient over the ranks.
    runs[OWN] = runs[ROOT][0], runs[OWN][1]
    for case, (theirs, ours) in runs.items():
        if theirs.keys() != ours.keys() or not theirs:
            failures.append(f"{case}: gradients of {sorted(theirs.keys() ^ ours.keys())} are there once")
            continue
        largest = max(float(value.abs().max()) for value in theirs.values())
        limit = 1e-4 if case == "training" else 1e-5  # Adam divides by small gradients
        for name, value in theirs.items():
            error = float((ours[name] - value).abs().max()) / largest
            if not error <= limit:
                failures.append(f"{case}, {name}: relative error {error:.2e}")
    dist.barrier()
    dist.destroy_process_group()
    if failures:
        sys.exit("\n".join(failures))
    print("all equal")


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
