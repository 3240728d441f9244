"""Rewards in the shape that TRL's trainers call: `f(prompts, completions, **kwargs) -> list[float | None]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from mopl.rewards.reward import Reward, Rewards

TrlFunction = Callable[..., list[float | None]]


@overload
def for_trl(reward: Reward) -> TrlFunction: ...
@overload
def for_trl(reward: Rewards | Sequence[Reward]) -> list[TrlFunction]: ...
def for_trl(reward: Reward | Rewards | Sequence[Reward]) -> TrlFunction | list[TrlFunction]:
    """Return rewards as TRL's `reward_funcs`: `GRPOTrainer(reward_funcs=for_trl(rewards), ...)`.

    Higher is better in every function: those of rewards that are to be minimised change sign. A text that a reward
    cannot judge is None, which TRL leaves out of its sum. Of a conversation the reward sees the last answer of the
    assistant, and the prompt as its messages. Rewards that are outputs of one model (`classifier_rewards`) share its
    forward pass here as everywhere.

    Args:
        reward: One reward, or several: a sequence, or a `Rewards`, whose batch size, cache and way with errors are
            kept.

    Returns:
        A function with the reward's name as `__name__`, by which TRL logs it, and its `Rewards` as `rewards`, whose
        `report` says what failed; of several rewards a list of functions.

    Raises:
        TypeError: If something is not a reward.
        ValueError: If two rewards have one name.
    """
    if isinstance(reward, Rewards):
        options = {"batch_size": reward.batch_size, "cache_size": reward.cache_size, "on_error": reward.on_error}
        return [_function(Rewards([each], **options)) for each in reward.rewards]  # type: ignore[arg-type]
    if isinstance(reward, Sequence):
        return for_trl(Rewards(reward))
    return _function(Rewards([reward]))


def _function(rewards: Rewards) -> TrlFunction:
    def judge(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
        values = rewards([_answer(completion) for completion in completions], prompts)[:, 0].tolist()
        return [value if value == value else None for value in values]

    judge.__name__ = judge.__qualname__ = rewards.names[0]
    judge.rewards = rewards  # type: ignore[attr-defined]
    return judge


def _answer(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a completion: of messages the last one of the assistant, after tools have been called."""
    if isinstance(completion, str):
        return completion
    said = [message.get("content") for message in completion if message.get("role", "assistant") == "assistant"]
    last = (said or [None])[-1]
    if isinstance(last, Sequence) and not isinstance(last, str):  # parts, of which some may be images
        return "".join(part.get("text") or "" for part in last)
    return last or ""
