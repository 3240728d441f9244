"""A reward model with a head for each objective, trained on lists; then its heads as rewards of one forward pass."""

import tempfile

import tiny
from transformers import LlamaForSequenceClassification

from mopl.integrations.scorers import RewardListConfig, RewardListTrainer
from mopl.rewards import Rewards, classifier_rewards

config = tiny.model().config
config.num_labels = 2
folder = tempfile.mkdtemp()
args = RewardListConfig(
    folder, list_loss="plackett_luce", mini_batch_size=4, learning_rate=1e-2, max_steps=20,
    per_device_train_batch_size=6, report_to="none", save_strategy="no", logging_steps=10, use_cpu=True,
    disable_tqdm=True,
)  # fmt: skip
model = LlamaForSequenceClassification(config)
trainer = RewardListTrainer(model, args, tiny.lists(), tiny.lists(), tiny.tokenizer())
trainer.train()
found = trainer.evaluate()
for name in trainer.objectives:
    print(f"accuracy of {name}: {found[f'eval_{name}_accuracy']:.0%}")

trainer.save_reward_model(folder)
rewards = Rewards(classifier_rewards(folder))  # --rewards classifier:directory=FOLDER of `mopl clp`
prompt = "how do i cook rice ? "
for text in ("please kindly boil rice gently and enjoy it", "boil rice"):
    print(
        text, "|", ", ".join(f"{n} {v:.1f}" for n, v in zip(rewards.names, rewards([text], [prompt])[0], strict=True))
    )
