"""Options and values of options that have another name now: old ones are taken with one warning, in records without."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

# By option: the old value and the one that means the same today.
VALUES: dict[str, dict[str, str]] = {
    "gain": {"exp": "exponential"},
    "scope": {"lora": "lora-mixture", "prompt": "hyper-prompt"},
}


def warn_renamed(old: str, new: str, *, stacklevel: int, flags: bool = False) -> None:
    """Warn that an option has another name, once for a place that uses the old one.

    Args:
        old: Its name as it was given.
        new: Its name of today.
        stacklevel: How far up the caller is who gave it, as `warnings.warn` counts.
        flags: Whether it was given on the command line.
    """
    names = [f"--{name.replace('_', '-')}" if flags else name for name in (old, new)]
    warnings.warn(f"{names[0]} is called {names[1]} now; the old name will go", FutureWarning, stacklevel + 1)


def renamed(option: str, value: Any, *, stacklevel: int = 3) -> Any:
    """Return the value of an option under its name of today; an old name is warned of, once for a place that uses it.

    Args:
        option: Name of the option.
        value: Its value as given.
        stacklevel: How far up the caller is who gave it, as `warnings.warn` counts.
    """
    today = VALUES.get(option, {}).get(value) if isinstance(value, str) else None
    if today is None:
        return value
    warnings.warn(f"{option}={value!r} is called {today!r} now; the old name will go", FutureWarning, stacklevel)
    return today


def old_value(name: str, value: Any) -> Any:
    """Return the value of an option of an old name as today's option takes it: a switch is an entry of a list now."""
    return value if not isinstance(value, bool) else (name,) if value else ()


def up_to_date(settings: Any, names: Mapping[str, str]) -> Any:
    """Return recorded settings with names and values of today, without a warning: nobody can change them.

    Args:
        settings: By name; anything else is returned as it is.
        names: By old names those of today. Where both are there, the old one is left out.
    """
    if not isinstance(settings, Mapping):
        return settings
    today = {
        names.get(name, name): old_value(name, value) if name in names else value
        for name, value in settings.items()
        if names.get(name, name) == name or names[name] not in settings
    }
    return {
        name: VALUES[name].get(value, value) if name in VALUES and isinstance(value, str) else value
        for name, value in today.items()
    }
