"""Files and folders are whole or absent, links and devices stay what they are, nobody's file is followed."""

from __future__ import annotations

import gzip
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mopl import _files
from mopl._files import discard_folder, remove_leftovers, write_file, write_files, write_folder


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=["text", "bytes", "function"])
def content(request):
    return {"text": "new", "bytes": b"new", "function": lambda path: path.write_text("new")}[request.param]


def test_a_file_gets_the_permissions_of_any_new_file_and_keeps_those_that_it_had(tmp_path, content):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", content)
        write_file(tmp_path / "private", lambda path: os.close(os.open(path, os.O_CREAT, 0o600)))  # as safetensors does
        write_folder(tmp_path / "folder", lambda folder: os.close(os.open(folder / "f", os.O_CREAT, 0o600)))
    finally:
        os.umask(before)
    for file in ("a", "private", "folder/f"):
        assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    (tmp_path / "a").chmod(0o604)
    write_file(tmp_path / "a", content)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o604 and (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a", "folder", "private"]


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path, content):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "one").symlink_to("there/file")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (tmp_path / "dangling").symlink_to("there/made")
    for link in ("two", "dangling"):
        write_file(tmp_path / link, content)
        assert (tmp_path / link).is_symlink() and (tmp_path / link).read_text() == "new"
    assert names(tmp_path / "there") == ["file", "made"] and names(tmp_path) == ["dangling", "one", "there", "two"]
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="circle cannot be written: its links go in a circle"):
        write_file(tmp_path / "circle", content)


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to("real")
    write_folder(tmp_path / "link", lambda folder: (folder / "new").touch())
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["new"]
    assert names(tmp_path) == ["link", "real"]
    discard_folder(tmp_path / "link")  # what it points to may be anywhere
    assert names(tmp_path) == ["real"] and names(tmp_path / "real") == ["new"]


def test_a_pipe_is_written_through(tmp_path, content):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_file(tmp_path / "pipe", content)
    reader.join(10)
    assert found == ["new"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_device_is_written_through(content):
    before = os.lstat("/dev/null")
    write_file("/dev/null", content)
    assert stat.S_ISCHR(os.lstat("/dev/null").st_mode) and os.lstat("/dev/null").st_ino == before.st_ino


SAY = """
import sys
from mopl._files import write_file
print("before")
write_file(sys.argv[1], "new\\n")
print("after")
"""


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/1", "link"])
def test_what_is_printed_and_what_is_written_to_stdout_stay_in_order(tmp_path, place):
    (tmp_path / "link").symlink_to("/dev/stdout")
    place = str(tmp_path / "link") if place == "link" else place
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", SAY, place], check=True, stdout=out, cwd=tmp_path)
    assert (tmp_path / "out").read_text() == "before\nnew\nafter\n"
    done = subprocess.run([sys.executable, "-c", SAY, place], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "before\nnew\nafter\n" and names(tmp_path) == ["link", "out"]


def test_an_open_descriptor_is_written_to(tmp_path, content):
    reading, writing = os.pipe()
    write_file(f"/dev/fd/{writing}", content)  # as a shell passes >(command)
    os.close(writing)
    assert os.read(reading, 10) == b"new"
    os.close(reading)
    with pytest.raises(OSError, match=rf"^/dev/fd/{writing} cannot be written: .*; name another place$"):
        write_file(f"/dev/fd/{writing}", content)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_named(content):
    with pytest.raises(OSError, match=r"^/dev/full cannot be written: No space left on device; name another place$"):
        write_file("/dev/full", content)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    write_file(tmp_path / "a", "old")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # writing fails in the middle, as on a full disk
    try:
        for write, what in (
            (lambda: write_file(tmp_path / "a", "x" * 5000), "a"),
            (lambda: write_file(tmp_path / "a", lambda file: file.write_bytes(b"x" * 5000)), "a"),
            (lambda: write_folder(tmp_path / "f", lambda folder: (folder / "x").write_bytes(b"x" * 5000)), "f"),
            (
                lambda: write_files(tmp_path, lambda folder: (folder / "x").write_bytes(b"x" * 5000), last="x"),
                tmp_path.name,
            ),
        ):
            with pytest.raises(OSError, match=f"{what} cannot be written: File too large; name another place"):
                write()
        with pytest.raises(RuntimeError):
            write_file(tmp_path / "a", lambda file: torch.save(torch.zeros(5000), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_what_may_not_be_replaced_is_refused(tmp_path, content, monkeypatch):
    import socket

    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        write_file(tmp_path, content)
    with pytest.raises(NotADirectoryError, match="is no folder; name another place"):
        write_file(tmp_path / "no" / "file", content)
    (tmp_path / "file").write_text("old")
    with pytest.raises(NotADirectoryError, match="it is a file; name another place"):
        write_folder(tmp_path / "file", lambda folder: None)
    with pytest.raises(NotADirectoryError, match="file/in cannot be written: a file is in the way; name another place"):
        write_files(tmp_path / "file" / "in", lambda folder: None, last="x")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(OSError, match="socket cannot be written: it is a disk or a socket"):
            write_file("socket", content)
    monkeypatch.setattr(_files.os, "access", lambda path, mode: False)  # permissions do not stop a superuser
    with pytest.raises(PermissionError, match="it is read-only; name another place"):
        write_file(tmp_path / "file", content)
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file", "socket"]


def test_links_at_foreseeable_names_are_not_followed(tmp_path, content):
    (tmp_path / "victim").write_text("mine")
    for trap in (".writing-a", "a.part", ".a.part", "a.tmp"):
        (tmp_path / trap).symlink_to("victim")
    write_file(tmp_path / "a", content)
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "a").read_text() == "new"


def test_a_foreseen_name_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "victim").mkdir()
    monkeypatch.setattr(_files.secrets, "token_hex", lambda n: "0" * 2 * n)
    (tmp_path / ".writing-0000000000000000-a").symlink_to("victim")
    for write in (lambda: write_file(tmp_path / "a", "x"), lambda: write_folder(tmp_path / "a", lambda folder: None)):
        with pytest.raises(FileExistsError):
            write()
    assert names(tmp_path / "victim") == []


def test_processes_that_write_one_file_or_folder_at_once_publish_one_of_the_versions(tmp_path):
    errors = []

    def write(text):
        try:
            for _ in range(30):
                write_file(tmp_path / "file", text * 10_000)
                write_folder(tmp_path / "folder", lambda folder: [(folder / n).write_text(text) for n in "xy"])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() in {text * 10_000 for text in "abc"}
    assert (tmp_path / "folder" / "x").read_text() == (tmp_path / "folder" / "y").read_text()


def test_a_file_keeps_its_own_name_while_it_is_written(tmp_path):
    """Archives hold the name of their file: with the temporary one no two of them would be equal."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_file(tmp_path / folder / "a.pt", lambda path: torch.save(torch.zeros(3), path))
        write_file(tmp_path / folder / "a.gz", lambda path: gzip.open(path, "wb", 9).close())
    assert (tmp_path / "one" / "a.pt").read_bytes() == (tmp_path / "two" / "a.pt").read_bytes()
    assert b"a\0" in (tmp_path / "one" / "a.gz").read_bytes()[:14]


def test_a_name_as_long_as_names_may_be_is_written(tmp_path, content):
    write_file(tmp_path / ("n" * 255), content)
    write_folder(tmp_path / ("ü" * 120), lambda folder: None)
    assert len(names(tmp_path)) == 2


def test_files_are_written_into_a_folder_beside_what_is_there(tmp_path):
    (tmp_path / "model" / "checkpoints").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("old")

    def fill(folder):
        (folder / "config.json").write_text("new")
        assert (folder / "README.md").read_text() == "mine"  # PEFT and transformers add to it
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_text("w")

    (tmp_path / "model" / "README.md").write_text("mine")
    write_files(tmp_path / "model", fill, last="config.json")
    assert names(tmp_path / "model") == ["README.md", "adapter", "checkpoints", "config.json"]
    assert (tmp_path / "model" / "config.json").read_text() == "new"
    assert (tmp_path / "model" / "adapter" / "weights").read_text() == "w"


def test_a_kill_between_two_files_leaves_a_folder_that_says_so(tmp_path, monkeypatch):
    def fill(folder):
        for name in ("a", "b", "model.safetensors", "z"):
            (folder / name).write_text("new")

    write_files(tmp_path, fill, last="model.safetensors")
    real = os.replace

    def fail(source, target):
        if Path(target).name == "z":
            raise OSError("killed")
        real(source, target)

    monkeypatch.setattr(_files.os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        write_files(tmp_path, fill, last="model.safetensors")
    assert names(tmp_path) == ["a", "b", "z"]


def test_a_folder_that_is_not_to_be_replaced_is_not(tmp_path):
    (tmp_path / "new").mkdir()

    def fill(folder):
        (folder / "a").touch()
        (tmp_path / "new" / "theirs").touch()  # comes while the folder is made

    with pytest.raises(FileExistsError, match="new exists and is not empty; name another place"):
        write_folder(tmp_path / "new", fill, replace=False)
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == ["theirs"]
    (tmp_path / "new" / "theirs").unlink()
    write_folder(tmp_path / "new", lambda folder: (folder / "a").touch(), replace=False)
    assert names(tmp_path / "new") == ["a"]


@pytest.mark.parametrize("moved", [0, 1])
def test_ctrl_c_while_a_folder_is_replaced_leaves_one_of_the_two(tmp_path, monkeypatch, moved):
    folder, replace, moves = tmp_path / "folder", os.replace, []
    write_folder(folder, lambda place: (place / "f").write_text("old"))

    def stop_once(*places):
        if len(moves) == moved:
            moves.append(places)
            raise KeyboardInterrupt
        moves.append(places)
        replace(*places)

    monkeypatch.setattr(os, "replace", stop_once)
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, lambda place: (place / "f").write_text("new"))
    assert (folder / "f").read_text() == "old" and names(tmp_path) == ["folder"]


def test_leftovers_of_a_folder_go_and_those_of_others_stay(tmp_path):
    token = "0123456789abcdef"
    for own in (f".writing-{token}-run", f".writing-deleted-{token}-run", ".writing-run", ".writing-deleted-run",
                f"run/.writing-{token}-a", f"run/sub/.writing-deleted-{token}-b/x"):  # fmt: skip
        (tmp_path / own).mkdir(parents=True)
    others = [f".writing-{token}-run-2", f".writing-{token}-my-run", ".writing-other"]
    for other in others:
        (tmp_path / other).mkdir()
    (tmp_path / "run" / "sub" / ".writing-link").symlink_to(tmp_path / ".writing-other")
    (tmp_path / "run" / "kept").touch()
    remove_leftovers(tmp_path / "run")
    assert names(tmp_path) == sorted([*others, "run"]) and names(tmp_path / "run") == ["kept", "sub"]
    assert names(tmp_path / "run" / "sub") == []
    long = tmp_path / ("n" * 250)
    with _files._folder_beside(long):
        remove_leftovers(long)
        assert names(tmp_path) == sorted([*others, "run"])


@pytest.mark.parametrize("write", [write_file, lambda path, text: write_folder(path, lambda folder: None)])
def test_the_next_one_that_writes_takes_away_what_a_dead_process_left_and_nothing_of_a_living_one(tmp_path, write):
    token = "0123456789abcdef"
    (tmp_path / f".writing-{token}-a" / "half").mkdir(parents=True)
    (tmp_path / f".writing-{token}-b").mkdir()
    with _files._folder_beside(tmp_path / "a") as living:
        assert not (tmp_path / f".writing-{token}-a").exists()
        write(tmp_path / "a", "text")
        assert names(tmp_path) == sorted([f".writing-{token}-b", living.name, "a"])
    write(tmp_path / "a", "text")
    assert names(tmp_path) == [f".writing-{token}-b", "a"]


def test_where_there_are_no_locks_nothing_of_others_is_deleted(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(95, "not supported")

    (tmp_path / ".writing-0123456789abcdef-a").mkdir()
    monkeypatch.setattr(_files.fcntl, "flock", fail)
    write_file(tmp_path / "a", "text")
    assert names(tmp_path) == [".writing-0123456789abcdef-a", "a"] and (tmp_path / "a").read_text() == "text"
