"""A full disk, said in words: writers of tensors report it in theirs, and torch's does not name it at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)  # no space, and no more of it for this user
_LEAST = 1 << 16  # bytes; a disk with less is full: file systems keep the last blocks back


def is_full(error: BaseException | None, folder: str | os.PathLike[str]) -> bool:
    """Say whether an error of writing into `folder`, or what it was raised from, says that there was no room there.

    To be asked before anything is deleted.
    """
    while error is not None:
        said = str(error)
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(f"(os error {number})" in said for number in _FULL):  # safetensors, which is written in Rust
            return True
        # torch.save only sees that fewer bytes were written than it gave.
        if "inline_container" in said and shutil.disk_usage(folder).free < _LEAST:
            return True
        error = error.__cause__ or error.__context__
    return False


def no_room(path: str | os.PathLike[str], also: str = "") -> OSError:
    """Return the error of a full disk, with what to do after space was made."""
    error = OSError(f"no space is left on the device while writing {path}; free some space{also}")
    error.errno = errno.ENOSPC
    return error


def with_resume(error: OSError, run: Path) -> OSError:
    """Return the error of a full disk in the middle of a run with what to do about the run; any other as it is."""
    if error.errno not in _FULL:
        return error
    also = f", then continue the run {run} with --resume: nothing that was finished is lost"
    if error.strerror is None:  # said in words already
        said = OSError(f"{error}{also}")
        said.errno = error.errno
        return said
    return no_room(error.filename or run, also)
