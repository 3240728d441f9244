"""Rewards: `(texts, prompts) -> (B, m)`, batched, remembered, with errors that cost one value and not the run.

rewards = Rewards(make_all(["sentiment", "brevity", "readability"]))
rewards(["Great, thank you!"], ["How are you?"])        # (1, 3), higher is better in every column
"""

from mopl.rewards.classifier import ClassifierReward
from mopl.rewards.registry import available, make, make_all, register
from mopl.rewards.reward import FunctionReward, Prompt, Reward, RewardReport, Rewards, TextReward, prompt_key
from mopl.rewards.texts import Brevity, Length, Profanity, Readability, Rouge, Sentiment

__all__ = [
    "Reward",
    "Rewards",
    "RewardReport",
    "TextReward",
    "FunctionReward",
    "Sentiment",
    "Brevity",
    "Length",
    "Readability",
    "Profanity",
    "Rouge",
    "ClassifierReward",
    "make",
    "make_all",
    "register",
    "available",
    "Prompt",
    "prompt_key",
]
