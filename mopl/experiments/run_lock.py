"""One process at a time writes into a run directory, for as long as it works.

The lock is a file beside the run, `.<name>.lock`: inside it would move with the run when `--overwrite` puts a new one
in its place, and there is none yet when a run begins. The system holds the lock and lets go of it when its process
ends, however that ends; so the file alone means nothing, and what a killed process leaves of it goes with the next one.
Where a file system has no such locks, filelock makes do with the file and the number of the process in it, and warns.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class RunInUse(OSError):
    """A run directory that another process writes into."""


def lock_file(path: str | os.PathLike[str]) -> Path:
    """Return where the lock of a run is; runs that are links share that of what they point to."""
    real = Path(os.path.realpath(path))
    return real.with_name(f".{real.name}.lock")


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep every other process out of a run directory, which need not be there yet, until the block ends.

    Raises:
        RunInUse: At once, if another process has it.
        OSError: If nothing can be written beside it.
    """
    file = lock_file(path)
    made = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path, file)
    except RunInUse:
        raise
    except OSError as error:
        said = type(error)(
            f"{path} cannot be locked against other processes: {file.parent} cannot be written "
            f"({error.strerror or error}); name another place"
        )
        said.errno = error.errno
        raise said from None
    try:
        _sign(file)
        yield
    finally:
        # Taken away while it is held: who opened it before finds that it is gone, and begins again.
        file.unlink(missing_ok=True)
        lock.release()
        for folder in made:  # nothing is left of a run that never began
            with suppress(OSError):
                folder.rmdir()


def _acquire(path: str | os.PathLike[str], file: Path) -> Any:
    """Return the lock, held."""
    from filelock import FileLock, Timeout

    lock = FileLock(file, timeout=0)
    for _ in range(5):
        try:
            lock.acquire()
            return lock
        except Timeout:
            if file.exists():
                raise RunInUse(
                    f"{path} is in use by {_holder(file)}, which may still write into it; wait until that has ended "
                    "or stop it"
                ) from None
    raise OSError("no file appears there")  # filelock takes this for a lock that has gone away just now


def _sign(file: Path) -> None:
    """Say in the lock whose it is, as filelock does where the file itself is the lock."""
    name = f"{os.getpid()}\n{socket.gethostname()}\n"
    if not file.read_text(encoding="utf-8", errors="replace").startswith(name):
        file.write_text(name, encoding="utf-8")


def _holder(file: Path) -> str:
    """Return who holds a lock, in words."""
    with suppress(OSError):
        process, host, *_ = [*file.read_text(encoding="utf-8", errors="replace").splitlines(), "", ""]
        if process.isdigit() and host:
            return f"process {process}" if host == socket.gethostname() else f"process {process} on {host}"
    return "another process"
