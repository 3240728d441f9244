"""One GRPO run in TRL's loop for every balance of two rewards that disagree: polite answers, and short ones."""

import tempfile

import tiny
from datasets import Dataset
from peft import LoraConfig

from mopl.conditioning import LoraMixture
from mopl.integrations.grpo import MultiObjectiveGRPOConfig, MultiObjectiveGRPOTrainer

POLITE = {"please", "kindly", "gently", "enjoy"}


def polite(completions, **_):
    """The share of polite words, of eight that there is room for."""
    return [sum(word in POLITE for word in text.split()) / 8 for text in completions]


def brief(completions, **_):
    """The share of that room that is left."""
    return [1 - len(text.split()) / 8 for text in completions]


data = Dataset.from_list([{"prompt": row["prompt"]} for row in tiny.pairs()])
model = LoraMixture(tiny.model(), 2, config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
args = MultiObjectiveGRPOConfig(
    tempfile.mkdtemp(), num_generations=16, per_device_train_batch_size=96, max_completion_length=8, learning_rate=2e-2,
    max_steps=16, eval_points=3, num_generations_eval=16, per_device_eval_batch_size=96, report_to="none",
    save_strategy="no", logging_steps=20, bf16=False, use_cpu=True, disable_tqdm=True, gradient_checkpointing=False,
)  # fmt: skip
trainer = MultiObjectiveGRPOTrainer(
    model, [polite, brief], args, train_dataset=data, eval_dataset=data, processing_class=tiny.tokenizer()
)
trainer.train()

found = trainer.evaluate()
for weights in ("1.00,0.00", "0.50,0.50", "0.00,1.00"):
    reward = {name: found[f"eval_rewards/{name}@{weights}"] for name in trainer.objectives}
    print(f"weights {weights}: " + ", ".join(f"{value:.0%} {name}" for name, value in reward.items()))
