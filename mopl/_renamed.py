"""Values of options that have another name now: the old ones are taken, with one warning; those of old runs without."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

# By option: the old value and the one that means the same today.
VALUES: dict[str, dict[str, str]] = {"gain": {"exp": "exponential"}}


def renamed(option: str, value: Any, *, stacklevel: int = 3) -> Any:
    """Return the value of an option under its name of today; an old name is warned of, once for a place that uses it.

    Args:
        option: Name of the option.
        value: Its value as given.
        stacklevel: How far up the caller is who gave it, as `warnings.warn` counts.
    """
    today = VALUES[option].get(value) if isinstance(value, str) else None
    if today is None:
        return value
    warnings.warn(f"{option}={value!r} is called {today!r} now; the old name will go", FutureWarning, stacklevel)
    return today


def up_to_date(settings: Any) -> Any:
    """Return recorded settings with values under their names of today, without a warning: nobody can change them."""
    if not isinstance(settings, Mapping):
        return settings
    return {
        name: VALUES[name].get(value, value) if name in VALUES and isinstance(value, str) else value
        for name, value in settings.items()
    }
