"""TRL's own trainers with their log-probabilities by mopl: the same losses, undone by one call."""

import tempfile

import tiny
import torch
import transformers
import trl.trainer.utils
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import mopl

COMMON = dict(
    max_steps=3, logging_steps=1, per_device_train_batch_size=6, learning_rate=1e-3, bf16=False, report_to="none",
    save_strategy="no", gradient_checkpointing=False, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip
PAIRS = tiny.pairs()


def polite(completions: list[str], **_: object) -> list[float]:
    """Reward answers that ask nicely."""
    return [float(sum(word in text.split() for word in ("please", "kindly", "gently"))) for text in completions]


def grpo() -> GRPOTrainer:
    """Make a trainer of GRPO, with an answer's reward from `polite`."""
    args = GRPOConfig(tempfile.mkdtemp(), num_generations=6, max_completion_length=8, temperature=0.9, **COMMON)
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS])
    return GRPOTrainer(tiny.model(), polite, args=args, train_dataset=rows, processing_class=tiny.tokenizer())


def sft() -> SFTTrainer:
    """Make a trainer of supervised fine-tuning."""
    args = SFTConfig(tempfile.mkdtemp(), **COMMON)
    rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])
    return SFTTrainer(tiny.model(), args=args, train_dataset=rows, processing_class=tiny.tokenizer())


make = {"GRPO": grpo}
if hasattr(trl.trainer.utils, "add_fused_lm_head"):
    make["SFT"] = sft  # from TRL 1.15 on
for name, build in make.items():
    losses = []
    for patched in (False, True):
        transformers.set_seed(0)
        trainer = build()
        if patched:
            mopl.patch_trl(trainer)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses.append([float(entry["loss"]) + float(entry["entropy"]) for entry in log])
    mopl.unpatch_trl(trainer)
    difference = (torch.tensor(losses[0]) - torch.tensor(losses[1])).abs().max()
    print(f"{name}: loss + entropy of the last step by TRL {losses[0][-1]:.6f}, by mopl {losses[1][-1]:.6f}")
    print(f"{name}: three steps equal to {float(difference):.0e}")
