"""Settings that name places, and settings of a run that goes on: what counts as the same."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Settings(Protocol):
    """A dataclass of settings, as `config.json` holds it."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """Read back the fields, normalised as when a run begins."""
        ...


Config = TypeVar("Config", bound=Settings)
# A path inside a longer text: a label file of an objective, the directory of a reward.
_INSIDE = re.compile(r"(?P<key>=@|[:,]directory=)(?P<path>[^:,]+)")


def located(path: str) -> str:
    """Return a path so that it is found from any folder: absolute, `~` expanded unless something is called that."""
    return str(Path(path if Path(path).exists() else os.path.expanduser(path)).absolute())


def located_if_there(name: str) -> str:
    """Return what exists as a path as an absolute one; anything else, such as a name on the hub, stays as it is."""
    return located(name) if Path(name).exists() or Path(os.path.expanduser(name)).exists() else name


def located_inside(text: str) -> str:
    """Return a text like `dwell=@dwell.txt` or `classifier:directory=D` with its path absolute, if it exists here."""

    def absolute(found: re.Match[str]) -> str:
        path = Path(found["path"])
        tried = path if path.exists() else Path(os.path.expanduser(path))
        # {split} stands for the name of each split.
        here = any(tried.parent.glob(tried.name.replace("{split}", "*"))) if tried.name else tried.exists()
        return f"{found['key']}{tried.absolute() if here else path}"

    return _INSIDE.sub(absolute, text)


def same(one: Any, other: Any) -> bool:
    """Say whether two values of a setting are the same; absolute paths are if they lead to the same place."""
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, str) and isinstance(other, str):
        return one == other or _real(one) == _real(other)
    return one == other


def _real(text: str) -> str:
    if os.path.isabs(text):
        return os.path.realpath(text)
    return _INSIDE.sub(
        lambda found: (
            found["key"] + (os.path.realpath(found["path"]) if os.path.isabs(found["path"]) else found["path"])
        ),
        text,
    )


def settings_to_resume(
    config: Config,
    recorded: Mapping[str, Any],
    changes: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    free: Collection[str],
    resolved: Mapping[str, Any] | None = None,
) -> Config:
    """Return the settings of a run to resume, with the free ones among `changes` applied.

    Args:
        config: The run's settings.
        recorded: The same as its `config.json` has them.
        changes: Settings that were given again, as a user gives them: what the run was begun with is no change.
        path: The run, for the message.
        free: Settings that may differ: they change what is written or where, not what is computed.
        resolved: By name the value that leaves a setting to the run, which keeps what it has chosen.

    Raises:
        ValueError: If a setting that matters differs.
    """
    left = resolved or {}
    again = {name: value for name, value in changes.items() if name not in left or value != left[name]}
    given = type(config).from_dict({**recorded, **again})
    differ = [
        f"{name} was {getattr(config, name)!r}, is {getattr(given, name)!r}"
        for name in again
        if name not in free and not same(getattr(config, name), getattr(given, name))
    ]
    if differ:
        raise ValueError(
            f"{path} was started with other settings ({'; '.join(differ)}); leave them out to resume it, or start "
            "another run"
        )
    return type(config).from_dict({**recorded, **{name: value for name, value in again.items() if name in free}})
