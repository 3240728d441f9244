"""The folder through which a server gets policies: what is written there is marked, and gone when it was read.

Each policy has a folder of its own, whose name ends in numbers and a random mark, with a file that says who wrote it.
The trainer holds a lock on that file from before the folder has its name, so what a killed trainer has left is known
by a file that nobody holds: the next trainer deletes it. Anything else there is not ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mopl._files import TEMPORARY, discard_folder, remove_dead, write_folder

try:
    import fcntl
except ImportError:  # Windows, where nothing is ever found dead
    fcntl = None

MARKER = "mopl-rollout.txt"
_NAME = re.compile(r"[^/\\]+-\d+-\d+-\d+-[0-9a-f]{8}")
_HALF = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]{16}-(.+)")


def policy_name(stage: str, step: int, part: int, number: int, mark: str) -> str:
    """Return what a policy is called there, and by the server.

    Args:
        stage: Name of the training.
        step: Which step of it.
        part: Which part of the step.
        number: How many this trainer has written before.
        mark: Eight random hexadecimal digits of the trainer's.
    """
    return f"{''.join(c if c.isalnum() or c in '._' else '-' for c in stage)}-{step}-{part}-{number}-{mark}"


@contextmanager
def written(folder: Path, fill: Callable[[Path], None]) -> Iterator[None]:
    """Have a folder, called as `policy_name` says, with what `fill` writes into it, inside a `with` block.

    Raises:
        OSError: If it cannot be written.
    """
    held: list[int] = []

    def write(path: Path) -> None:
        (path / MARKER).write_text(_said(folder.name), encoding="utf-8")
        if (lock := _lock(path / MARKER)) is not None:
            held.append(lock)
        fill(path)

    try:
        write_folder(folder, write)
        yield
    finally:
        try:
            with suppress(FileNotFoundError):
                discard_folder(folder)
        finally:
            for lock in held:
                os.close(lock)


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what killed trainers left in a folder of policies; return the names of what was there whole.

    What a trainer holds that lives, what is not marked, and links are left alone; so is all where locks are not known.
    """
    found = []
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    for name in names:
        path = folder / name
        if half := _HALF.fullmatch(name):
            if _NAME.fullmatch(half[1]):
                remove_dead(folder / half[1])
        elif _NAME.fullmatch(name) and path.is_dir() and not path.is_symlink():
            lock = _lock(path / MARKER)
            if lock is None:
                continue
            try:
                if os.read(lock, 1000).decode("utf-8", "replace") == _said(name):
                    with suppress(OSError):  # another user's, or another trainer was faster
                        discard_folder(path)
                        found.append(name)
            finally:
                os.close(lock)
    return found


def _said(name: str) -> str:
    return f"mopl clp wrote {name} here for its rollout server, and deletes it\n"


def _lock(file: Path) -> int | None:
    """Return a descriptor that holds a file, no link; None if another process does, or nobody can."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
