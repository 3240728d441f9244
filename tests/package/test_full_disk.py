"""A full disk is said in a line that names the file and the remedy, and costs a run nothing that was finished."""

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from mopl import _disk
from mopl._files import write_file, write_files, write_folder
from mopl.cli import main

TINY = [
    "--data", "synthetic:queries=60,items=6,features=8,objectives=2", "--hidden", "32", "--base-hidden", "32",
    "--heads", "2", "--steps", "6", "--base-steps", "3", "--batch-size", "8", "--bootstrap", "10", "--points", "3",
    "--checkpoint-every", "2",
]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 220 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=220k", "tmpfs", str(folder)]
    if os.name != "posix" or shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def of_torch(file):
    torch.save({"a": torch.zeros(100_000)}, file)


def of_torch_to_a_file(file):
    with file.open("wb") as stream:
        torch.save({"a": torch.zeros(100_000)}, stream)


def of_safetensors(file):
    save_file({"a": torch.zeros(100_000)}, file)


def of_text(file):
    file.write_text("x" * 400_000, encoding="utf-8")


@pytest.mark.parametrize("fill", [of_torch, of_torch_to_a_file, of_safetensors, of_text])
def test_every_writer_says_the_same_of_a_full_disk_and_leaves_what_was_there(small_disk, fill):
    file = small_disk / "weights"
    write_file(file, "the old")
    for write in (
        lambda: write_file(file, fill),
        lambda: write_folder(small_disk / "weights.d", lambda folder: fill(folder / "x")),
        lambda: write_files(small_disk / "weights.e", lambda folder: fill(folder / "x"), last="x"),
    ):
        with pytest.raises(OSError, match=r"no space is left on the device while writing \S*weights\S*; free") as error:
            write()
        assert error.value.errno == errno.ENOSPC
    assert file.read_text() == "the old"
    assert not [path for path in small_disk.rglob("*") if path.is_file() and path != file]


def test_what_is_no_full_disk_is_not_called_one(tmp_path):
    assert not _disk.is_full(
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0"), tmp_path
    )
    assert not _disk.is_full(OSError(errno.EIO, "Input/output error"), tmp_path)
    assert _disk.is_full(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path)

    def fail(file):
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match=r"^another$"):
        write_file(tmp_path / "x", fail)


def test_a_full_disk_names_the_way_to_continue_and_the_continued_run_is_bit_for_bit_the_whole_one(
    small_disk, tmp_path, capsys
):
    path = small_disk / "run"
    assert main(["rank", "--run", str(path), *TINY]) == 2
    assert main(["rank", "--run", str(path), "--resume"]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(f"mopl rank: no space is left on the device while writing {path}/"), line
        assert line.endswith(f"free some space, then continue the run {path} with --resume: nothing that was finished "
                             "is lost")  # fmt: skip
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert main(["rank", "--run", str(path), "--resume"]) == 0
    whole = tmp_path / "whole"
    assert main(["rank", "--run", str(whole), *TINY]) == 0
    assert (path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    points = [json.loads((run / "front.json").read_text("utf-8"))["points"] for run in (path, whole)]
    assert points[0] == points[1]


def test_a_log_that_cannot_grow_is_said_too(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mopl.training.logs.RunLog.write", full)
    assert main(["rank", "--run", str(tmp_path / "run"), *TINY]) == 2
    line = capsys.readouterr().err
    assert f"no space is left on the device while writing {tmp_path / 'run'}; free some space, then continue" in line
