"""A cache of the arrays parsed from a file: valid as long as the file is unchanged, whole or absent.

It is a folder of NumPy's files, so that large arrays are mapped and not read into memory, with a checksum of each.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mopl._files import remove, remove_dead, write_folder
from mopl._records import check_file
from mopl.ranking import storage

VERSION = 2  # raise it when the meaning of the arrays changes
STAMP = "stamp.json"
_END_BYTES = 1 << 16
_BLOCK = 1 << 24


class ArrayCache:
    """Where the arrays parsed from one file are kept between runs.

    A cache is valid for the size, the modification time and both ends of the file. It is written under another name
    and renamed, so that a run that is killed, or another process, never leaves or sees half of one. `where` is as the
    `cache` of `read_letor`.
    """

    def __init__(self, path: Path, where: bool | str | os.PathLike[str]) -> None:
        key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        away = f"{path.name}.{key}"
        if where is True:
            user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mopl" / "letor"
            self.places = [path.with_name(f".{path.name}.mopl"), user / away]
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
                found = json.loads(check_file(place / STAMP, most=1 << 20).read_text(encoding="utf-8"))
                if found["stamp"] == self.stamp:
                    return {name: _read(place / f"{name}.npy", found["checksums"][name]) for name in names}
            except MemoryError:
                raise
            except Exception as error:  # a damaged file shows as whatever numpy stumbles over
                warnings.warn(f"{place}: this cache cannot be read ({error}); the data is parsed again", stacklevel=3)
        return None

    def save(self, arrays: dict[str, np.ndarray]) -> bool:
        """Write the arrays to the first place that can be written; warn, and return false, if none can."""
        failures = []

        def fill(folder: Path) -> None:
            for name, array in arrays.items():
                np.save(folder / f"{name}.npy", array)
            checksums = {name: _checksum(array) for name, array in arrays.items()}
            (folder / STAMP).write_text(json.dumps({"stamp": self.stamp, "checksums": checksums}), encoding="utf-8")

        for place in self.places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.is_file():
                    remove(place)
                write_folder(place, fill)
                remove(place.with_name(f"{place.name}.npz"))  # as earlier versions wrote it
                return True
            except OSError as error:
                said = str(error)
                failures.append(said if str(place) in said else f"{place}: {error.strerror or error}")
        if failures:
            warnings.warn(
                f"the data could not be cached and will be parsed again next time ({'; '.join(failures)}); "
                "give a folder that can be written as the cache",
                stacklevel=3,
            )
        return False


def _read(file: Path, checksum: int) -> np.ndarray:
    """Return the array of a file: mapped if it is large, private to this process."""
    large = check_file(file).stat().st_size > storage.LIMIT
    array = np.load(file, allow_pickle=False, mmap_mode="c" if large else None)
    if _checksum(array) != checksum:
        raise ValueError(f"{file.name} has another checksum")
    return array


def _checksum(array: np.ndarray) -> int:
    """Return the CRC-32 of an array's bytes."""
    flat, value = np.ascontiguousarray(array).reshape(-1), 0
    for start in range(0, len(flat), _BLOCK):
        value = zlib.crc32(flat[start : start + _BLOCK].data.cast("B"), value)
    return value


def _stamp(path: Path) -> str:
    """Return a text that changes when the file does."""
    status = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        digest.update(stream.read(_END_BYTES))
        stream.seek(max(status.st_size - _END_BYTES, 0))
        digest.update(stream.read())
    return json.dumps([VERSION, status.st_size, status.st_mtime_ns, digest.hexdigest()])
