"""A tiny policy, two rewards that disagree, and trainers of them: what the tests of GRPO on weights share."""

import pytest
import torch

peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
pytest.importorskip("trl", minversion="1.15", reason="MultiObjectiveGRPOTrainer needs trl >= 1.15")

from tiny_language_models import build, tokenizer

from mopl.conditioning import HyperPrompt, HyperPromptModel, LoraMixture
from mopl.integrations.grpo import MultiObjectiveGRPOConfig, MultiObjectiveGRPOTrainer

PROMPTS = [f"w{i} w{i + 7}" + " w3" * (i % 3) for i in range(8)]
DATA = datasets.Dataset.from_dict({"prompt": PROMPTS})
CONFIG = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def low(completion_ids, **_):
    """Tokens with small ids are good."""
    return [-sum(ids) / 50 for ids in completion_ids]


def high(completion_ids, **_):
    """Tokens with large ids are good, and a long answer more so."""
    return [sum(ids) / 40 + 0.1 * len(ids) for ids in completion_ids]


def mixture(objectives=2, *, trained=True, seed=2, **options):
    """A mixture of adapters, by default away from its start."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**CONFIG, init_lora_weights=not trained)
    return LoraMixture(build(**options), objectives, config=config)


def prompted(positions="hf", **options):
    model = HyperPromptModel(build(**options), HyperPrompt(2, 3, 2, 32), positions=positions)
    with torch.no_grad():
        for parameter in model.hyper_prompt.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def arguments(folder, kind=MultiObjectiveGRPOConfig, **options):
    defaults = dict(
        num_generations=4, per_device_train_batch_size=8, per_device_eval_batch_size=8, max_completion_length=4,
        max_steps=1, report_to="none", use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
        learning_rate=1e-2, gradient_checkpointing=False, lr_scheduler_type="constant",
    )  # fmt: skip
    return kind(str(folder), **{**defaults, **options})


def trainer(
    folder, model, rewards=(low, high), kind=MultiObjectiveGRPOTrainer, args=MultiObjectiveGRPOConfig, **options
):
    own = {name: options.pop(name) for name in ("eval_dataset", "eval_weights", "processing_class") if name in options}
    own = {"processing_class": tokenizer(), "train_dataset": DATA, **own}
    return kind(model, list(rewards), arguments(folder, args, **options), **own)


def trained(one):
    """Return what a trainer trains, by name."""
    return {name: p.detach().clone() for name, p in one.model.named_parameters() if p.requires_grad}
