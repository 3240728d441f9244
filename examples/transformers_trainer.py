"""The same with `transformers.Trainer`'s arguments, on lists of three responses and Plackett-Luce."""

import tempfile

import tiny
from peft import LoraConfig, get_peft_model

from mopl.conditioning import HyperPrompt, HyperPromptModel
from mopl.integrations.transformers import MultiObjectiveConfig, MultiObjectiveTrainer
from mopl.language_models import load_preferences

model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules="all-linear", exclude_modules="lm_head"))
model = HyperPromptModel(model, HyperPrompt(objectives=2, virtual_tokens=4, rank=2, hidden=64))
args = MultiObjectiveConfig(
    tempfile.mkdtemp(), list_loss="plackett_luce", beta=0.1, learning_rate=2e-2, max_steps=40, eval_points=3,
    per_device_train_batch_size=6, report_to="none", save_strategy="no", logging_steps=20, use_cpu=True,
    disable_tqdm=True,
)  # fmt: skip
data = load_preferences(tiny.lists())
trainer = MultiObjectiveTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tiny.tokenizer())
trainer.train()

found = trainer.evaluate()
for weights in ("1.00,0.00", "0.50,0.50", "0.00,1.00"):
    accuracy = {name: found[f"eval_{name}_accuracy@{weights}"] for name in trainer.objectives}
    print(f"weights {weights}: " + ", ".join(f"{value:.0%} as {name} wants" for name, value in accuracy.items()))
