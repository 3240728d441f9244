"""Arrays too large to be held in memory: in temporary files that have no name, of which the system maps what is used.

What is smaller than `LIMIT` is in memory as ever. Files are in the folder of temporary files (`TMPDIR`), are reserved
before they are written, and are gone with the array, however the process ends.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

LIMIT = 1 << 28  # bytes: 256 MiB
_BLOCK = 1 << 24  # numbers that are handled at once


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor for large data, without values.

    Raises:
        OSError: If the disk has no room for it; the message says where and how much was wanted.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= LIMIT:
        return torch.empty(shape, dtype=dtype)
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    with _file(size) as file:
        # Shared, so that what is written goes to the file and not into memory.
        return torch.from_numpy(np.memmap(file, kind, "r+", shape=shape))


def rows_at_once(columns: int) -> int:
    """Return how many rows of a matrix make a block."""
    return max(1, _BLOCK // max(columns, 1))


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices that cover the rows of a matrix, a block each."""
    size = rows_at_once(columns)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def take(matrix: Tensor, rows: Tensor) -> Tensor:
    """Return rows (n,) of a matrix (N, F): a view where they stand side by side, else a copy."""
    n = len(rows)
    if n and int(rows[-1]) - int(rows[0]) == n - 1 and bool((rows.diff() == 1).all()):
        return matrix[int(rows[0]) : int(rows[0]) + n]
    out = empty((n, *matrix.shape[1:]), matrix.dtype)
    for part in blocks(n, matrix[:1].numel()):
        out[part] = matrix[rows[part]]
    return out


class Rows:
    """The rows of a float32 matrix that come block by block, some with fewer columns than others (0 there)."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._file: Any = None
        self._shapes: list[tuple[int, int]] = []

    def append(self, block: np.ndarray) -> None:
        """Add a block (n, F)."""
        self._shapes.append(block.shape)  # type: ignore[arg-type]
        self._blocks.append(block)
        if self._file is None and 4 * sum(math.prod(shape) for shape in self._shapes) > LIMIT:
            self._file = tempfile.TemporaryFile()
        if self._file is not None:
            try:
                while self._blocks:
                    self._file.write(np.ascontiguousarray(self._blocks.pop(0)).data)
                self._file.flush()
            except OSError as error:
                raise _no_room(error, None) from error

    def matrix(self) -> np.ndarray:
        """Return all rows (N, F) with as many columns as the widest block has; the object is used up."""
        rows, width = sum(n for n, _ in self._shapes), max(f for _, f in self._shapes)
        if self._file is not None and all(f == width for _, f in self._shapes):
            with self._file as file:
                return np.memmap(file, np.float32, "c", shape=(rows, width))
        out, start, read = empty((rows, width)).numpy(), 0, 0
        for n, f in self._shapes:
            if self._file is None:
                block = self._blocks.pop(0)  # each is let go as soon as it is copied
            else:
                block = np.memmap(self._file, np.float32, "r", offset=read, shape=(n, f))
            out[start : start + n, :f], out[start : start + n, f:] = block, 0
            start, read = start + n, read + 4 * n * f
        if self._file is not None:
            self._file.close()
        return out


def _file(size: int) -> Any:
    """Return a file without a name that has room for so many bytes."""
    file = tempfile.TemporaryFile()
    try:
        if hasattr(os, "posix_fallocate"):  # a write to a mapping that finds no room would kill the process
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as error:
        file.close()
        raise _no_room(error, size) from error
    return file


def _no_room(error: OSError, size: int | None) -> OSError:
    wanted = "" if size is None else f" of {size / 2**30:.1f} GiB"
    return OSError(
        error.errno,
        f"a temporary file{wanted} for the data cannot be written in {tempfile.gettempdir()} ({error.strerror}); make "
        "room there, or set TMPDIR to a folder on a larger disk",
    )
