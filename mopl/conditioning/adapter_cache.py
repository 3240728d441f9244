"""Adapters of trade-offs that a server has asked for, on the disk: made once, bounded in number, kept while in use.

A server loads an adapter from its folder, puts it out of its memory when others come, and loads it again weeks later,
so a folder that has been handed out must stay as long as the server lives: taking it away would break a request, and
some engines with it. What nobody uses any more goes when room is needed, the longest unused first. Processes share one
cache: a lock lets one at a time look, make and take away, and each living process holds the lock of a file beside the
list of what it was given, so that a killed one holds nothing.

    CACHE/<digest of the adapters>/w=0.7,0.3/     an adapter of PEFT; other adapters have another digest
    CACHE/.users/<random>.lock, <random>.json     a process, and what it was given
    CACHE/.lock                                   one at a time
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mopl._files import discard_folder, write_file
from mopl._records import read_json
from mopl.conditioning.adapter_files import AdapterFolder, name_and_weights, write_merged_adapter
from mopl.conditioning.sampling import Weights
from mopl.conditioning.saved_models import ADAPTER_CONFIG, ADAPTER_FILE

MAX_CACHED = 256
_LOCK, _USERS = ".lock", ".users"
_WAIT = 300  # seconds; one adapter of a large model is made in a few
_REMEDY = "end the servers that share this cache, and delete it"


class CacheFull(ValueError):
    """All adapters that a cache may hold are in use by processes that live."""


class AdapterCache:
    """Folders of merged adapters for the trade-offs of one folder of adapters; safe for threads and processes.

    Args:
        adapters: The folder of `mopl export --adapters`. If it is written anew, later trade-offs are of the new one.
        folder: The folder of the cache, made where there is none; other caches of mopl may share it, other things not.
        max_cached: The most adapters in it at a time, 1 or more, over all processes that share it.

    Raises:
        ValueError: If max_cached is no positive integer.
        OSError: If the folder cannot be made.
    """

    def __init__(
        self, adapters: AdapterFolder, folder: str | os.PathLike[str], *, max_cached: int = MAX_CACHED
    ) -> None:
        if isinstance(max_cached, bool) or not isinstance(max_cached, int) or max_cached < 1:
            raise ValueError(f"max_cached is {max_cached!r} but must be an integer of at least 1")
        self.adapters, self.folder, self.max_cached = adapters, Path(folder).absolute(), max_cached
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is no folder; name another place for the cache")
        (self.folder / _USERS).mkdir(parents=True, exist_ok=True)
        self._begin()
        if hasattr(os, "register_at_fork"):
            mine = weakref.WeakMethod(self._begin)
            os.register_at_fork(after_in_child=lambda: (begin := mine()) and begin())

    def _begin(self) -> None:
        """Begin with nothing given. A fork does, too: what its parent has is its parent's, which gets more meanwhile.

        Locks that a thread of the parent may hold are not taken over; those of files are the parent's (filelock 4).
        """
        self._turn = threading.Lock()
        self._given: set[str] = set()
        self._user: tuple[Any, Path] | None = None  # this process's lock, and its list

    def get(self, weights: Weights) -> Path:
        """Return the folder of a trade-off's adapter, made if there is none; it stays until `close` or the end.

        Trade-offs of one name (`weights_name`) share a folder, whose adapter is that of the digits in the name.

        Raises:
            CacheFull: If there is no room, and none that could be taken away.
            ValueError, OSError: As `write_merged_adapter`.
            TimeoutError: If another process has held the cache for minutes.
        """
        name, exact = name_and_weights(weights)
        with self._turn, self._alone():
            place = f"{self.adapters.digest()}/{name}"
            path = self.folder / place
            if not all((path / file).is_file() for file in (ADAPTER_CONFIG, ADAPTER_FILE)):
                if not (damaged := path.is_dir()):
                    self._make_room()
                write_merged_adapter(self.adapters, exact, path, replace=damaged)
            self._hold(place)
            os.utime(path)  # the longest unused goes first
            return path

    def close(self) -> None:
        """Let go of all that was handed out."""
        with self._turn:
            if self._user is not None:
                lock, listed = self._user
                self._user = None
                self._given.clear()
                listed.unlink(missing_ok=True)
                lock.release()
                Path(lock.lock_file).unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        try:
            lock = FileLock(self.folder / _LOCK, timeout=_WAIT)
            lock.acquire()
        except Timeout:
            raise TimeoutError(
                f"{self.folder / _LOCK} has been held by another process for {_WAIT} seconds; end the one that hangs"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _hold(self, place: str) -> None:
        """Note in this process's list that it was given an adapter."""
        from filelock import FileLock

        if self._user is None:
            stem = self.folder / _USERS / secrets.token_hex(8)
            lock = FileLock(stem.with_suffix(".lock"))
            lock.acquire()
            self._user = lock, stem.with_suffix(".json")
        if place not in self._given:
            write_file(self._user[1], json.dumps(sorted({*self._given, place})))
            self._given.add(place)

    def _in_use(self) -> set[str]:
        """Return what living processes were given, and forget the dead ones."""
        from filelock import FileLock, Timeout

        used = set(self._given)
        for file in (self.folder / _USERS).glob("*.lock"):
            listed = file.with_suffix(".json")
            if self._user is not None and listed == self._user[1]:
                continue
            lock = FileLock(file, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                used |= set(read_json(listed, list[str], remedy=_REMEDY)) if listed.exists() else set()
                continue
            listed.unlink(missing_ok=True)
            lock.release()
            file.unlink(missing_ok=True)
        return used

    def _make_room(self) -> None:
        """Take away what is unused, the longest unused first, until there is room for one more."""
        folders = [path for path in self.folder.glob("*/w=*") if path.is_dir() and path.parent.name != _USERS]
        excess = len(folders) - self.max_cached + 1
        if excess <= 0:
            return
        used = self._in_use()
        unused = [path for path in folders if f"{path.parent.name}/{path.name}" not in used]
        if len(unused) < excess:
            raise CacheFull(
                f"{len(folders)} trade-offs are in use and {self.folder} may hold {self.max_cached}; ask for one of "
                "these, allow more, or end the servers that no longer need theirs"
            )
        for path in sorted(unused, key=lambda path: path.stat().st_mtime_ns)[:excess]:
            discard_folder(path)
            with suppress(OSError):
                path.parent.rmdir()  # of other adapters than today's, once it is empty
