"""Prompts, rewards, settings and losses of small trainings of CLP."""

from pathlib import Path

import torch
from tiny_language_models import WORDS, build, tokenizer

from mopl.clp import ClpConfig
from mopl.clp.loss import ClpLoss, Guard
from mopl.clp.policies import Policy
from mopl.clp.prompts import split_prompts
from mopl.clp.rollout import RolloutStore, Sampler
from mopl.language_models.head import fuse
from mopl.language_models.tokenization import ListTokenizer
from mopl.rewards import FunctionReward, Rewards
from mopl.rewards.scale import RewardScale

PROMPTS = [f"w{i} w{i + 1}" for i in range(40)]
SCOPES = ("full", "attention", "logits", "lora-mixture", "hyper-prompt")
LENGTH = 6


def share(low: int, high: int, name: str) -> FunctionReward:
    """The share of words of a set in the longest possible response."""
    words = set(WORDS[low:high])
    return FunctionReward(lambda texts, prompts: [sum(w in words for w in t.split()) / LENGTH for t in texts], name)


def make_rewards() -> Rewards:
    return Rewards([share(0, 20, "first"), share(20, 40, "second")])


def settings(**options) -> ClpConfig:
    values = {
        "rewards": ("first", "second"), "max_new_tokens": LENGTH, "prompts_per_step": 4, "samples_per_prompt": 2,
        "learning_rate": 1e-2, "lora_rank": 2, "held_out": 0.3, "kl_weight": 0.05, "steps": 2, "bootstrap": 0,
        "normalize_prompts": 8, "points": 3, "samples": 0, "log_every": 1, "device": "cpu",
    }  # fmt: skip
    return ClpConfig("model", "prompts", **{**values, **options})


def language_model(**options):
    return fuse(build(initializer_range=0.1, **options).requires_grad_(False))


def parts(config: ClpConfig):
    placed = [(f"line {number}", prompt) for number, prompt in enumerate(PROMPTS, 1)]
    return split_prompts(placed, ListTokenizer(tokenizer(), max_length=None, append_eos=False), config)[0]


def make_loss(base, config: ClpConfig, folder: Path, rewards: Rewards | None = None) -> ClpLoss:
    checkpoints = folder / "checkpoints"
    return ClpLoss(
        config, Sampler(base, tokenizer(), config), rewards or make_rewards(),
        RewardScale(torch.zeros(2), torch.ones(2)), RolloutStore(folder / "rollouts", config.epochs, checkpoints),
        Guard(config, "clp", checkpoints), None, "clp",
    )  # fmt: skip


def disturbed(policy: Policy) -> Policy:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return policy
