"""Rewards by name, as a command line gives them: `sentiment`, `length:target=20`, `classifier:directory=D`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from mopl.rewards.classifier import classifier_rewards
from mopl.rewards.reward import Reward
from mopl.rewards.texts import Brevity, Length, Profanity, Readability, Rouge, Sentiment

_MAKERS: dict[str, Callable[..., Reward | Sequence[Reward]]] = {
    "sentiment": Sentiment,
    "brevity": Brevity,
    "length": Length,
    "readability": Readability,
    "profanity": Profanity,
    "rouge": Rouge,
    "classifier": classifier_rewards,
}


def register(name: str, maker: Callable[..., Reward | Sequence[Reward]]) -> None:
    """Make a reward known under a name.

    Args:
        name: What users type; without `:`, `,` and `=`.
        maker: A class or function that returns the reward, or a sequence of them; the options after the name are its
            keywords.

    Raises:
        ValueError: If the name is taken by another maker, or has one of these characters.
    """
    if not name or set(name) & set(":,="):
        raise ValueError(f"name is {name!r} but must be a word without ':', ',' and '='")
    if _MAKERS.get(name, maker) is not maker:
        raise ValueError(f"there is a reward {name} already; take another name")
    _MAKERS[name] = maker


def available() -> tuple[str, ...]:
    """Return the names of all rewards that `make` knows.

    Returns:
        Those that come with mopl, then those that were registered, in the order of their registration.
    """
    return tuple(_MAKERS)


def make(spec: str, **options: Any) -> Reward:
    """Make a reward from its name, with options after a colon.

    Args:
        spec: `NAME` or `NAME:OPTION=VALUE,OPTION=VALUE`; values are numbers, True, False, None, or else texts.
        **options: More options, which may be anything (references of ROUGE).

    Returns:
        The reward.

    Raises:
        ValueError: If there is no such reward, it has no such option, or the name stands for several.
        ImportError: If its package is not installed.
    """
    made = make_each(spec, **options)
    if len(made) != 1:
        raise ValueError(
            f"{spec!r} stands for {len(made)} rewards, {', '.join(reward.name for reward in made)}; say which as "
            "label, or take all of them with make_each or make_all"
        )
    return made[0]


def make_each(spec: str, **options: Any) -> tuple[Reward, ...]:
    """Make all rewards that a name stands for: one, or of a classifier with several outputs all of them; see `make`.

    Args:
        spec: `NAME` or `NAME:OPTION=VALUE,OPTION=VALUE`, as in `make`.
        **options: More options, which may be anything.

    Returns:
        The rewards, in the order of the outputs; one of every other reward.

    Raises:
        ValueError: If there is no such reward, or it has no such option.
        ImportError: If its package is not installed.
    """
    name, _, rest = spec.partition(":")
    if name not in _MAKERS:
        raise ValueError(f"there is no reward {name!r}; choose from {', '.join(_MAKERS)}")
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals or not option.strip():
            raise ValueError(f"{part!r} in {spec!r} is no option; write {name}:OPTION=VALUE")
        options[option.strip()] = _value(value.strip())
    try:
        made = _MAKERS[name](**options)
    except TypeError as error:
        # Only a wrong call, whose traceback ends here, is the user's; anything deeper is a fault of the reward.
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            known = inspect.signature(_MAKERS[name]).parameters
            strange = next((option for option in options if option not in known), None)
            if strange is not None and known:
                raise ValueError(
                    f"the reward {name} has no option {strange}; its options are {', '.join(known)}"
                ) from None
            raise ValueError(f"the reward {name} cannot be made of {options}: {error}") from None
        raise
    return tuple(made) if isinstance(made, Sequence) else (made,)


def make_all(specs: Sequence[str]) -> tuple[Reward, ...]:
    """Make several rewards; see `make_each`.

    Args:
        specs: Names with options, as in `make`; a name may stand for several rewards.

    Returns:
        All of them, one name after the other.

    Raises:
        ValueError: If there is no such reward, or it has no such option.
        ImportError: If a package is not installed.
    """
    return tuple(reward for spec in specs for reward in make_each(spec))


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
