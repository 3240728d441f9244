"""Rewards by name, or as functions of modules beside the user's data: `module:function`."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from pathlib import Path
from typing import Any

from mopl.rewards import FunctionReward, Reward, Rewards, available, make_each


def make_rewards(specs: tuple[str, ...]) -> Rewards:
    """Make rewards from names of `mopl.rewards`, with options, or from `module:function`.

    Raises:
        ValueError: If there is no such reward, module or function.
    """
    # A classifier with several outputs is a reward for each, so there may be more of them than names.
    return Rewards([reward for spec in specs for reward in _rewards(spec)])


def is_module(spec: str) -> bool:
    """Say whether a reward is a function of a module, `module:function`, and not one of `mopl.rewards`."""
    name, _, rest = spec.partition(":")
    return name not in available() and rest.replace(".", "_").isidentifier()


def _rewards(spec: str) -> tuple[Reward, ...]:
    return (_of_module(spec),) if is_module(spec) else make_each(spec)


def _of_module(spec: str) -> Reward:
    name, _, rest = spec.partition(":")
    where = str(Path.cwd())
    sys.path.insert(0, where)  # a module beside the user's data, as python -m would find it
    try:
        found: Any = importlib.import_module(name)
        for part in rest.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the reward {spec!r} is neither one of {', '.join(available())} nor a function of a module that can be "
            f"imported here: {error}"
        ) from error
    finally:
        sys.path.remove(where)
    if isinstance(found, type):
        found = found()
    if isinstance(found, Reward):
        return found
    return FunctionReward(found, rest.split(".")[-1])


def place_of(spec: str) -> str:
    """Return the module that a reward's name would import and where it is, without importing anything."""
    name = spec.partition(":")[0].partition(".")[0]
    found = importlib.machinery.PathFinder.find_spec(name, [str(Path.cwd()), *sys.path])
    return f"the module {name}" + (f" ({found.origin})" if found is not None and found.origin else "")
