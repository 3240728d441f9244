"""A cache of the arrays parsed from a file: valid as long as the file is unchanged, whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mopl._files import remove_dead, write_file
from mopl._records import check_file

VERSION = 1  # raise it when the meaning of the arrays changes
_END_BYTES = 1 << 16


class ArrayCache:
    """Where the arrays parsed from one file are kept between runs.

    A cache is valid for the size, the modification time and both ends of the file. It is written under another name
    and renamed, so that a run that is killed, or another process, never leaves or sees half of one. `where` is as the
    `cache` of `read_letor`.
    """

    def __init__(self, path: Path, where: bool | str | os.PathLike[str]) -> None:
        key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        away = f"{path.name}.{key}.npz"
        if where is True:
            user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mopl" / "letor"
            self.places = [path.with_name(f".{path.name}.mopl.npz"), user / away]
        else:
            self.places = [] if where is False else [Path(where) / away]
        self.stamp = _stamp(path) if self.places else ""

    def load(self, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """Return the named arrays, or None if there is no valid cache. A damaged cache is reported and passed over."""
        for place in self.places:
            remove_dead(place)  # a valid cache is not written again, which would do it
            if not place.exists():
                continue
            try:
                check_file(place)
                with np.load(place, allow_pickle=False) as archive:
                    if str(archive["stamp"]) == self.stamp:
                        return {name: archive[name] for name in names}
            except MemoryError:
                raise
            except Exception as error:  # a damaged archive shows as whatever numpy and zipfile stumble over
                warnings.warn(f"{place}: this cache cannot be read ({error}); the data is parsed again", stacklevel=3)
        return None

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        """Write the arrays to the first place that can be written; warn if none can."""
        failures = []
        for place in self.places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_file(place, lambda file: np.savez(file, stamp=np.array(self.stamp), **arrays))  # type: ignore[arg-type]
                return
            except OSError as error:
                said = str(error)
                failures.append(said if str(place) in said else f"{place}: {error.strerror or error}")
        if failures:
            warnings.warn(
                f"the data could not be cached and will be parsed again next time ({'; '.join(failures)}); "
                "give a folder that can be written as the cache",
                stacklevel=3,
            )


def _stamp(path: Path) -> str:
    """Return a text that changes when the file does."""
    status = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        digest.update(stream.read(_END_BYTES))
        stream.seek(max(status.st_size - _END_BYTES, 0))
        digest.update(stream.read())
    return json.dumps([VERSION, status.st_size, status.st_mtime_ns, digest.hexdigest()])
