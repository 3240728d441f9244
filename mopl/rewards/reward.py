"""What a reward is, and several of them as one function of texts and prompts: `(texts, prompts) -> (B, m)`.

A reward is anything with a `name`, a direction (`maximise`) and a call

    reward(texts, prompts) -> Tensor (B,)        one finite number for each text, in the reward's own unit

`Rewards` puts m of them together for a trainer: higher is better in every column (columns of rewards that are to be
minimised change sign), each text is judged once, and a text that a reward cannot judge becomes NaN and is counted
instead of ending a run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mopl._arguments import check_choice, shape_of
from mopl._counted import counted, there_are
from mopl._lines import lone_surrogate

logger = logging.getLogger(__name__)

Prompt = str | Sequence[Mapping[str, Any]]  # a text, or chat messages
# By these names a function has prompts in the first place, or texts in the second, whatever it is given there.
PROMPTS = ("prompt", "prompts", "query", "queries", "question", "questions")
TEXTS = ("text", "texts", "response", "responses", "completion")
SHOWN = 3  # examples of a failure that a report keeps


@runtime_checkable
class Reward(Protocol):
    """A reward: `name`, `maximise`, and a call on texts and prompts.

    An attribute `cacheable = False` says that the same text may be judged differently another time; `Rewards` then
    never remembers its values. Without the attribute a reward is taken to be a function of (prompt, text).

    Attributes:
        name: What the reward is called in tables and as an objective; different for each reward of a `Rewards`.
        maximise: Whether higher values are better.
    """

    name: str
    maximise: bool

    def __call__(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Return one number for each text, float (B,).

        Args:
            texts: B responses.
            prompts: B prompts that they answer, each a text or chat messages.

        Returns:
            (B,), in the reward's own unit.
        """
        ...


class TextReward:
    """A reward that judges one text at a time; subclasses give `name`, `maximise` and `score`.

    Attributes:
        name: What the reward is called.
        maximise: Whether higher values are better.
    """

    name: str = ""
    maximise: bool = True

    def score(self, text: str, prompt: Prompt) -> float:
        """Return the reward of one text.

        Args:
            text: The response.
            prompt: What it answers, a text or chat messages.

        Returns:
            A finite number, in the reward's own unit. An error counts as a missing value of this text.
        """
        raise NotImplementedError(f"{type(self).__name__} has no score(text, prompt)")

    def __call__(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Return the rewards of B texts, float32 (B,).

        Args:
            texts: B responses.
            prompts: B prompts that they answer.
        """
        values = [float(self.score(text, prompt)) for text, prompt in zip(texts, prompts, strict=True)]
        return torch.tensor(values, dtype=torch.float32)


class FunctionReward:
    """A function as a reward.

    Args:
        function: `(texts, prompts) -> B numbers`, a tensor or a sequence; or in TRL's form, `(prompts, completions,
            **kwargs)` or `(completions, **kwargs)`, called by these names, where None is a missing value and
            completions are messages where the prompt is, lists both. It is in TRL's form if it has an argument
            `completions` and needs no other than these two: `(texts, prompts, completions=None)` is not.
        name: of the reward.
        maximise: whether higher values are better.
        cacheable: whether the function gives the same text the same value every time.

    Raises:
        ValueError: If it is no function, one that can be called in neither form, or one that takes anything,
            `(*args, **kwargs)`, as what a decorator without `functools.wraps` returns does.
    """

    def __init__(
        self,
        function: Callable[[Sequence[str], Sequence[Prompt]], Tensor | Sequence[float]],
        name: str,
        *,
        maximise: bool = True,
        cacheable: bool = True,
    ) -> None:
        if not callable(function):
            raise ValueError(
                f"the reward {name} is a {type(function).__name__} but must be a function of (texts, prompts)"
            )
        self.function, self.name, self.maximise, self.cacheable = function, name, maximise, cacheable
        self._keywords = _keywords_of(function, name)

    def __call__(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Return what the function returns, as a float32 tensor."""
        function: Any = self.function
        if not self._keywords:
            return torch.as_tensor(function(texts, prompts), dtype=torch.float32)
        said = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        asked = [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        given = {"prompts": asked, "completions": said}
        values = function(**{name: given[name] for name in self._keywords})
        missing = math.nan
        return torch.as_tensor([missing if value is None else value for value in values], dtype=torch.float32)


def _keywords_of(function: Callable[..., Any], name: str) -> tuple[str, ...]:
    """Return by which names a function in TRL's form is called, none for `(texts, prompts)`; raise for other forms."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise ValueError(f"the reward {name} is an async function, which is not awaited here; pass a plain one")
    try:
        # The call of a module takes anything, for its `forward`.
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # nothing is known of some functions in C
        return ()
    kinds, both = signature.parameters, ("prompts", "completions")
    if {each.kind for each in kinds.values()} == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        raise ValueError(
            f"the reward {name} takes ({', '.join(map(str, kinds.values()))}), from which it cannot be told whether it "
            "wants (texts, prompts) or TRL's (prompts, completions); name the arguments, or put "
            "functools.wraps(function) on what a decorator returns"
        )
    by_place = _binds(signature, 2)
    named = "completions" in kinds or not by_place
    keywords = next((names for names in (both, both[1:]) if named and _binds(signature, 0, names)), ())
    needed = "completions" in kinds and kinds["completions"].default is inspect.Parameter.empty
    first, second = [*kinds, "", ""][:2]
    if not keywords and (not by_place or needed or first in PROMPTS or second in TEXTS):
        raise ValueError(
            f"the reward {name} takes ({', '.join(map(str, kinds.values()))}) but must be a function of (texts, "
            "prompts), in this order, or in TRL's form of (prompts, completions, **kwargs), without other columns"
        )
    return keywords


def _binds(signature: inspect.Signature, places: int, names: Sequence[str] = ()) -> bool:
    try:
        signature.bind(*[None] * places, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def prompt_key(prompt: Prompt) -> str:
    """Return a text that is the same for the same prompt: the prompt itself, or its messages as JSON.

    Args:
        prompt: A text, or chat messages whose values JSON can hold.

    Returns:
        The text. The order of the keys in a message does not matter; a text and a chat that says it differ.

    Raises:
        TypeError: If a message holds what JSON cannot.
    """
    return prompt if isinstance(prompt, str) else json.dumps([dict(m) for m in prompt], sort_keys=True)


@dataclass
class RewardReport:
    """What a `Rewards` has done so far.

    Attributes:
        texts: texts that were asked about, repeated ones included.
        computed: for each reward how many texts it was run on.
        failures: for each reward, for each reason (the error's type, or "not finite"), how often it occurred.
        examples: for each reward and reason up to three errors with the beginnings of the texts.
    """

    texts: int = 0
    computed: dict[str, int] = field(default_factory=dict)
    failures: dict[str, dict[str, int]] = field(default_factory=dict)
    examples: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def failed(self, reward: str | None = None) -> int:
        """Return how many values are missing, of one reward or of all."""
        names = self.failures if reward is None else [reward]
        return sum(sum(self.failures.get(name, {}).values()) for name in names)

    def add(self, reward: str, reason: str, text: str, detail: str) -> None:
        """Count a failure."""
        reasons = self.failures.setdefault(reward, {})
        reasons[reason] = reasons.get(reason, 0) + 1
        examples = self.examples.setdefault((reward, reason), [])
        if len(examples) < SHOWN:
            shown = text if len(text) <= 60 else text[:57] + "..."
            examples.append(f"{detail} on {shown!r}")

    def __str__(self) -> str:
        failed = self.failed()
        lines = [f"{counted(self.texts, 'text')}; {counted(failed, 'reward')} {'is' if failed == 1 else 'are'} missing"]
        for reward, reasons in self.failures.items():
            for reason, count in reasons.items():
                lines.append(f"  {count} x {reward}: {reason} ({'; '.join(self.examples[reward, reason])})")
        return "\n".join(lines)


class Rewards:
    """Several rewards as one function `(texts, prompts) -> (B, m)`, higher better in every column.

    Args:
        rewards: m rewards with different names.
        batch_size: texts that a reward is given at once.
        cache_size: values that are remembered for each reward, by content; the oldest go first. 0 for none.
        on_error: `"nan"`: a text that a reward raises an error on, or gives no finite number, becomes NaN there and is
            counted in `report`; `"raise"`: the error ends the call.

    Attributes:
        names: of the m rewards.
        report: a `RewardReport` of everything since it was made.

    Raises:
        ValueError: If there is no reward, two have one name, or an option is out of range.
        TypeError: If something is not a reward.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        batch_size: int = 64,
        cache_size: int = 100_000,
        on_error: Literal["nan", "raise"] = "nan",
    ) -> None:
        check_choice(on_error, ("nan", "raise"), "on_error")
        self.rewards = tuple(rewards)
        for reward in self.rewards:
            if not isinstance(reward, Reward) or not callable(reward):
                raise TypeError(
                    f"{reward!r} is no reward: it needs a name, maximise and a call; "
                    "wrap a function as FunctionReward(function, name)"
                )
        self.names = tuple(reward.name for reward in self.rewards)
        if not self.rewards or len(set(self.names)) != len(self.names):
            raise ValueError(f"rewards are named {self.names} but must be at least one, with different names")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size} but must be at least 1")
        if cache_size < 0:
            raise ValueError(f"cache_size is {cache_size} but must be at least 0; 0 remembers nothing")
        self.batch_size, self.cache_size, self.on_error = batch_size, cache_size, on_error
        self.report = RewardReport(computed=dict.fromkeys(self.names, 0))
        self._caches: list[dict[bytes, float]] = [{} for _ in self.rewards]

    def __len__(self) -> int:
        return len(self.rewards)

    def __call__(self, texts: Sequence[str], prompts: Sequence[Prompt] | None = None) -> Tensor:  # (B, m)
        """Judge texts.

        Args:
            texts: B responses.
            prompts: B prompts, each a text or chat messages; None if no reward looks at them.

        Returns:
            float32 (B, m) on the CPU, NaN where a reward failed.

        Raises:
            ValueError: If the numbers of texts and prompts differ, or a reward returns another number of values.
            ImportError: If a reward's package is missing, whatever `on_error` says.
        """
        if isinstance(texts, str):
            raise TypeError("texts is one text but must be a sequence of them; pass [text]")
        if prompts is None:
            prompts = [""] * len(texts)
        if len(prompts) != len(texts):
            many = f"{there_are(len(texts), 'text')} but {counted(len(prompts), 'prompt')}"
            raise ValueError(f"{many}; pass one for each text")
        self.report.texts += len(texts)
        keys = [content_key(prompt, text) for text, prompt in zip(texts, prompts, strict=True)]
        columns = [self._column(index, keys, texts, prompts) for index in range(len(self))]
        return torch.tensor(columns, dtype=torch.float32).view(len(self), len(texts)).T.contiguous()

    def _column(self, index: int, keys: list[bytes], texts: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        reward, cache = self.rewards[index], self._caches[index]
        if not self.cache_size or not getattr(reward, "cacheable", True):
            # Equal texts may be judged differently: each is one of its own, and nothing is remembered.
            keys, cache = [str(place).encode() for place in range(len(keys))], {}
        first: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            if key not in cache:
                first.setdefault(key, place)
        todo, fresh = list(first.values()), {}
        for start in range(0, len(todo), self.batch_size):
            places = todo[start : start + self.batch_size]
            values = self._judge(reward, [texts[p] for p in places], [prompts[p] for p in places])
            fresh |= {keys[place]: value for place, value in zip(places, values, strict=True)}
        column = [fresh[key] if key in fresh else cache[key] for key in keys]
        # A failure may be a passing one: it is tried again next time.
        cache.update((key, value) for key, value in fresh.items() if value == value)
        for key in list(cache)[: max(len(cache) - self.cache_size, 0)]:
            del cache[key]
        return column

    def _judge(self, reward: Reward, texts: list[str], prompts: list[Prompt]) -> list[float]:
        """Run a reward on a batch; if that fails, on one text after the other. Return values with higher better."""
        self.report.computed[reward.name] += len(texts)
        try:
            values = self._run(reward, texts, prompts)
        except (ImportError, _WrongShape):
            raise
        except Exception as error:
            if self.on_error == "raise":
                raise
            if len(texts) == 1:
                self._fail(reward, type(error).__name__, texts[0], str(error) or type(error).__name__)
                return [float("nan")]
            self.report.computed[reward.name] -= len(texts)
            return [self._judge(reward, [t], [p])[0] for t, p in zip(texts, prompts, strict=True)]
        for place, value in enumerate(values):
            if value - value != 0:  # NaN and ±inf
                if self.on_error == "raise":
                    raise ValueError(f"the reward {reward.name} is {value} on {texts[place][:60]!r}")
                self._fail(reward, "not finite", texts[place], str(value))
                values[place] = float("nan")
        return values if reward.maximise else [-value for value in values]

    @staticmethod
    def _run(reward: Reward, texts: list[str], prompts: list[Prompt]) -> list[float]:
        for place, text in enumerate(texts):
            if fault := lone_surrogate(text):
                raise ValueError(f"text {place} {fault}")
        values = reward(texts, prompts)
        if not isinstance(values, Tensor) or values.shape != (len(texts),):
            got = shape_of(values) if isinstance(values, Tensor) else type(values).__name__
            raise _WrongShape(
                f"the reward {reward.name} returned {got} for {counted(len(texts), 'text')}; it must return a "
                "tensor (B,)"
            )
        return values.detach().to("cpu", torch.float32).tolist()

    def _fail(self, reward: Reward, reason: str, text: str, detail: str) -> None:
        first = reason not in self.report.failures.get(reward.name, {})
        self.report.add(reward.name, reason, text, detail)
        if first:  # once a kind, so that it is seen; the report has the rest
            logger.warning("the reward %s failed (%s): %s; it counts as missing", reward.name, reason, detail)


class _WrongShape(ValueError):
    """A fault of the reward's code and not of a text: never isolated."""


def content_key(prompt: Prompt, text: str) -> bytes:
    """Return what is the same for the same prompt and text only."""
    key = prompt_key(prompt).encode("utf-8", "surrogatepass")
    content = len(key).to_bytes(8, "little") + key + text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=16).digest()
