"""Settings that name places: absolute once a run begins, and the same if they lead to the same place."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

# A path inside a longer text: a label file of an objective, the directory of a reward.
_INSIDE = re.compile(r"(?P<key>=@|[:,]directory=)(?P<path>[^:,]+)")


def _expanded(path: str) -> Path:
    return Path(path if Path(path).exists() else os.path.expanduser(path))


def located(path: str) -> str:
    """Return a path so that it is found from any folder: absolute, `~` expanded unless something is called that."""
    return str(_expanded(path).absolute())


def located_if_there(name: str) -> str:
    """Return what exists as a path as an absolute one; anything else, such as a name on the hub, stays as it is."""
    return located(name) if _expanded(name).exists() else name


def located_inside(text: str) -> str:
    """Return a text like `dwell=@dwell.txt` or `classifier:directory=D` with its path absolute, if it exists here."""

    def absolute(found: re.Match[str]) -> str:
        tried = _expanded(found["path"])
        # {split} stands for the name of each split.
        here = any(tried.parent.glob(tried.name.replace("{split}", "*"))) if tried.name else tried.exists()
        return f"{found['key']}{tried.absolute() if here else Path(found['path'])}"

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
