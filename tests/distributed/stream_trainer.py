"""Trainings on streams; run by tests/integrations/test_streams.py on two gloo processes, each with half of a batch."""

import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets
import tiny_language_models as tiny
import torch

from mopl.integrations.transformers import MultiObjectiveConfig, MultiObjectiveTrainer
from mopl.integrations.trl import MultiObjectiveDPOConfig


def pair_rows(count=13, **columns):
    return [
        {
            "prompt": f"w{number} w{number + 3}", "chosen": " ".join(f"w{number + k}" for k in range(2 + number % 3)),
            "rejected": f"w{2 * number % 40} w9", "helpful": 1.0 - number % 2 * 1.5, "harmless": 0.5 + number % 3,
            **{name: make(number) for name, make in columns.items()},
        }
        for number in range(count)
    ]  # fmt: skip


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def stream(rows):
    return datasets.IterableDataset.from_generator(functools.partial(iter, rows))


def make(folder, data, trainer=MultiObjectiveTrainer, model=None, **options):
    own = {name: options.pop(name) for name in ("eval_dataset", "on_error", "data_collator") if name in options}
    config = MultiObjectiveConfig if trainer is MultiObjectiveTrainer else MultiObjectiveDPOConfig
    defaults = dict(
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=3,
        per_device_eval_batch_size=4, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e6,
        logging_steps=1, max_steps=7, beta=0.5, dataloader_pin_memory=False, max_length=48, bf16=False,
        objectives=["helpful", "harmless"], train_sampling_strategy="sequential",
    )  # fmt: skip
    args = config(str(folder), **{**defaults, **options})
    return trainer(
        tiny.conditioned() if model is None else model,
        args=args,
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        **own,
    )


def trained(*args, **options):
    trainer = make(*args, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainable(trainer.model), losses


if __name__ == "__main__":
    from ending import leave  # beside the script, which a test imports as well

    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    parameters, _ = trained(target / "two", stream(pair_rows(24)), per_device_train_batch_size=2)
    torch.save(parameters, target / f"{os.environ['RANK']}.pt")
    leave()
