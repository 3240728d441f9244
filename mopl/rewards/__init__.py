"""Rewards: `(texts, prompts) -> (B, m)`, batched, remembered, with errors that cost one value and not the run.

rewards = Rewards(make_all(["sentiment", "brevity", "readability"]))
rewards(["Great, thank you!"], ["How are you?"])        # (1, 3), higher is better in every column
"""

from mopl.rewards.classifier import ClassifierReward, classifier_rewards
from mopl.rewards.registry import available, make, make_all, make_each, register
from mopl.rewards.reward import FunctionReward, Prompt, Reward, RewardReport, Rewards, TextReward, prompt_key
from mopl.rewards.texts import Brevity, Length, Profanity, Readability, Rouge, Sentiment
from mopl.rewards.trl_functions import for_trl

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
    "classifier_rewards",
    "for_trl",
    "make",
    "make_each",
    "make_all",
    "register",
    "available",
    "Prompt",
    "prompt_key",
]
