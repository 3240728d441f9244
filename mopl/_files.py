"""Files and folders that are whole or absent: made in a folder of another name beside their place, flushed, renamed.

The other name, `.writing-<random>-<name>`, cannot be foreseen and is made exclusively, so nobody's link is followed and
two processes never write into one another's file. What a killed process leaves is taken away by the next one that
writes there, which sees by a lock on the folder that nobody is at work in it. (Packages for this end at one file of
text; weights and pictures are written by functions that take a path and bring temporary files of their own, which is
why the temporary thing is a folder.)
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mopl._disk import is_full, no_room

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".writing-"
CARD = "README.md"
_DESCRIPTORS = re.compile(r"/dev/fd|/proc/(\d+)/(?:task/\d+/)?fd")  # where a name stands for an open file
_LINKS = 40  # most links one after another, as Linux has it


def write_file(path: str | os.PathLike[str], content: str | bytes | Callable[[Path], None]) -> None:
    """Write a file all at once: into a temporary name in the same folder, flushed, then renamed.

    A link stays a link and what it points to is replaced. A device, a pipe and an open file such as /dev/stdout cannot
    be replaced: the content is written into them. An existing file keeps its permissions.

    Args:
        path: The file; an existing one is replaced.
        content: Text, bytes, or a function that writes the file at the path that it is given.

    Raises:
        OSError: If there is no such folder, a folder of that name, or something that is not written into.
    """
    path = Path(path)
    with _naming(path, path):
        target, descriptor = _destination(path)
    with _naming(path, target):
        if descriptor is not None:
            _write_through(descriptor, content, path.name)
            return
        if not target.parent.is_dir():
            raise NotADirectoryError(f"{path} cannot be written: {path.parent} is no folder; name another place")
        if target.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file in it")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(f"{path} cannot be written: it is read-only; name another place")
        with _folder_beside(target) as temporary:
            # The file has its own name there: writers choose the format by it, and put it into archives.
            file = temporary / target.name
            _fill(file, content)
            _settle(file, stat.S_IMODE(temporary.stat().st_mode) & 0o666)
            if target.exists():
                _set_mode(file, stat.S_IMODE(target.stat().st_mode))
            os.replace(file, target)


def write_folder(final: str | os.PathLike[str], fill: Callable[[Path], None], *, replace: bool = True) -> None:
    """Make the folder `final` with what `fill` writes, all of it or nothing.

    Args:
        final: The folder.
        fill: Writes into the folder that it is given.
        replace: Replace a folder that is there, which stays until the new one is whole; whether it may be deleted is
            the caller's to know. False takes the place of an empty folder only.

    Raises:
        FileExistsError: If something is there that is not to be replaced.
        OSError: If the folder cannot be made.
    """
    final = Path(final)
    make_parents(final)
    target = Path(os.path.realpath(final))
    with suppress(FileNotFoundError):  # asked once: another process may take it away between two questions
        if not stat.S_ISDIR(target.stat().st_mode):
            raise NotADirectoryError(f"{final} cannot be written: it is a file; name another place")
    with _naming(final, target), _folder_beside(target) as temporary:
        new = temporary / target.name
        new.mkdir()
        fill(new)
        _settle_all(new)
        if not replace:
            with suppress(OSError):
                target.rmdir()  # which takes an empty folder only
        while True:
            old = temporary / secrets.token_hex(8)
            try:
                if replace:
                    with suppress(FileNotFoundError):
                        os.replace(target, old)
                os.replace(new, target)
                break
            except BaseException as error:  # Ctrl-C, too, must not come between the two and lose both
                there = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
                if there and not replace:
                    raise FileExistsError(f"{final} exists and is not empty; name another place") from None
                if not there:  # else another process has put its own there in the meantime
                    if old.exists() and not target.exists():
                        os.replace(old, target)
                    raise
        flush(target.parent)


def write_files(folder: str | os.PathLike[str], fill: Callable[[Path], None], *, last: str) -> None:
    """Write what `fill` writes into a folder, which may hold other things or be made: each file whole or not at all.

    The file `last` comes last: where it is, all are there and of one version.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{folder} cannot be written: a file is in the way; name another place") from None
    with _naming(folder, folder / "files"), _folder_beside(folder / "files") as temporary:
        if (folder / CARD).is_file():  # PEFT and transformers add to the one that is there, which may be a person's
            shutil.copy(folder / CARD, temporary / CARD)
        fill(temporary)
        files = _settle_all(temporary)
        (folder / last).unlink(missing_ok=True)
        for file in sorted(files, key=lambda file: file == temporary / last):
            place = folder / file.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)


def discard_folder(path: str | os.PathLike[str]) -> None:
    """Delete a folder so that no reader ever sees a part of it under its own name; of a link, the link alone.

    Args:
        path: The folder, or a file or link.

    Raises:
        FileNotFoundError: If nothing is there.
        OSError: If it cannot be deleted.
    """
    path = Path(path)
    with _folder_beside(path) as temporary:
        os.replace(path, temporary / path.name)


def make_parents(path: str | os.PathLike[str]) -> None:
    """Make the folder that `path` will be in; a `NotADirectoryError` if a file is in the way."""
    parent = Path(path).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path} cannot be written: {parent} is no folder; name another place") from None


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Delete what killed processes left half-written or half-deleted: of a folder beside it, and anywhere in it.

    Only for a folder that no other process writes at the time.
    """
    path = Path(path)
    for entry in _leftovers(path, old=True):
        remove(entry)
    for folder, folders, files in os.walk(path):
        for name in [name for name in (*folders, *files) if name.startswith(TEMPORARY)]:
            remove(Path(folder) / name)
        folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]


def remove_dead(path: Path) -> None:
    """Delete what dead processes left beside `path` when they wrote it; what a living one writes stays."""
    for entry in _leftovers(path):
        if (held := _hold(entry)) is not None:
            shutil.rmtree(entry, ignore_errors=True)
            os.close(held)


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Ask the operating system to put a file or a folder entry on the disk."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(name: str) -> str:
    """Return a name, or where it leaves no room for more (names have at most 255 bytes) its digest."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 200 else hashlib.sha256(encoded).hexdigest()


def _leftovers(path: Path, *, old: bool = False) -> list[Path]:
    """Return what has a temporary name of `path`, or one that older versions gave, beside it."""
    token, name = "[0-9a-f]{16}-", re.escape(_short(path.name))
    names = re.compile(re.escape(TEMPORARY) + (f"(?:deleted-)?(?:{token})?{name}" if old else f"{token}{name}"))
    try:
        return [path.parent / name for name in os.listdir(path.parent) if names.fullmatch(name)]
    except OSError:
        return []


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` that is gone after the block; those of dead processes go with it."""
    remove_dead(path)
    held = None
    while held is None:  # until no other process has taken it for a dead one's before it was held
        temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{_short(path.name)}")
        os.mkdir(temporary)
        held = _hold(temporary, own=True)
    try:
        yield temporary
    except Exception as error:
        if is_full(error, temporary):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(held)


def _hold(folder: Path, *, own: bool = False) -> int | None:
    """Return a descriptor that shows others that a folder's process lives; None if another's does, or it is gone."""
    if fcntl is None:  # without such locks one's own folder is held, and any other a living process's
        return os.open(os.devnull, os.O_RDONLY) if own else None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError:
        if own:
            raise
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = folder.exists()
    except BlockingIOError:
        held = False
    except OSError:
        held = own
    if held:
        return descriptor
    os.close(descriptor)
    return None


def _fill(file: Path, content: str | bytes | Callable[[Path], None]) -> None:
    if callable(content):
        content(file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content, encoding="utf-8")


def _settle(file: Path, mode: int) -> None:
    """Give a file at least the permissions that any new file has here (safetensors makes private ones); flush it."""
    _set_mode(file, stat.S_IMODE(file.stat().st_mode) | mode)
    flush(file)


def _set_mode(file: Path, mode: int) -> None:
    if stat.S_IMODE(file.stat().st_mode) != mode:  # some file systems have one mode for all and refuse any other
        os.chmod(file, mode)


def _settle_all(folder: Path) -> list[Path]:
    """Settle every file in a folder; return them."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    for file in files:
        _settle(file, mode)
    flush(folder)
    return files


def _destination(path: Path) -> tuple[Path, int | None]:
    """Return the file that a path means at the end of its links, and a descriptor to write to where it is none.

    Links are followed one by one: the last one of /dev/stdout and its like says "pipe:[123]", which is no path.
    """
    target = path
    for _ in range(_LINKS):
        match = _DESCRIPTORS.fullmatch(os.path.realpath(target.parent))
        if match is not None and target.name.isdigit():
            if match[1] in (None, str(os.getpid())):
                print(end="", flush=True)  # else what was printed before would come after
                return target, os.dup(int(target.name))  # opened again, a file would be written from its start
            return target, os.open(target, os.O_WRONLY | os.O_APPEND)
        if not target.is_symlink():
            break
        target = target.parent / os.readlink(target)
    else:
        raise OSError(f"{path} cannot be written: its links go in a circle; name another place")
    target = Path(os.path.realpath(target)) if target is not path else path
    mode = target.stat().st_mode if target.exists() else stat.S_IFREG
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return target, os.open(target, os.O_WRONLY)
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(f"{path} cannot be written: it is a disk or a socket; name a file")
    return target, None


def _write_through(descriptor: int, content: str | bytes | Callable[[Path], None], name: str) -> None:
    """Write into what cannot be replaced."""
    with os.fdopen(descriptor, "wb") as stream, tempfile.TemporaryDirectory() as folder:
        _fill(Path(folder) / name, content)
        with (Path(folder) / name).open("rb") as made:
            shutil.copyfileobj(made, stream)


@contextmanager
def _naming(path: Path, target: Path) -> Iterator[None]:
    """Say of an error about a temporary name, or about none, the name that was asked for."""
    try:
        yield
    except OSError as error:
        if error.strerror is not None and is_full(error, target.parent) and not target.is_char_device():
            raise no_room(path) from None
        here = error.filename is not None and os.fspath(error.filename).startswith(f"{target.parent / TEMPORARY}")
        if error.errno is None or not (here or error.filename is None):
            raise
        said = type(error)(f"{path} cannot be written: {error.strerror}; name another place")
        said.errno = error.errno
        raise said from None
