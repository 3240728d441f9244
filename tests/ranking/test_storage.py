"""Data too large for memory: in mapped files with the same numbers, and splits of many files."""

import errno
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from mopl.ranking import storage, svmlight
from mopl.ranking.letor import find_files, load_letor
from mopl.ranking.loading import load
from mopl.ranking.normalization import METHODS, FeatureNormalizer
from mopl.ranking.svmlight import LetorError


def lines(queries, first=1, columns=5, seed=0):
    """Lines of lists of 1 to 5 items, whose later queries have a column more."""
    draw, text = np.random.default_rng(seed), ""
    for query in range(first, first + queries):
        for _ in range(draw.integers(1, 6)):
            values = draw.normal(size=columns + (query == first + queries - 1)).round(3).tolist()
            text += f"{draw.integers(0, 5)} qid:{query} 1:{draw.integers(0, 9)} "
            text += " ".join(f"{c}:{value}" for c, value in enumerate(values, 2)) + "\n"
    return text


@pytest.mark.parametrize("limit", [0, 400])
def test_mapped_data_have_the_same_numbers(tmp_path, monkeypatch, limit):
    """Everything in small files and blocks, with and without a cache: bit for bit as in memory."""
    (tmp_path / "all.txt").write_text(lines(60))
    monkeypatch.setattr(svmlight, "_LINES_AT_ONCE", 7)
    plain = load(tmp_path / "all.txt", objectives="a=1", cache=False)
    names = [f"log1p+{name}" if name != "none" else name for name in METHODS]
    normalized = {n: load(tmp_path / "all.txt", objectives="a=1", normalization=n, cache=False)[0] for n in names}
    monkeypatch.setattr(storage, "LIMIT", limit)
    monkeypatch.setattr(storage, "_BLOCK", 40)
    for cache in (False, tmp_path / "cache", tmp_path / "cache"):
        for part, same in zip(load(tmp_path / "all.txt", objectives="a=1", cache=cache), plain, strict=True):
            assert torch.equal(part.features, same.features) and part.fingerprint == same.fingerprint
            chosen = torch.arange(len(part)).flip(0)
            assert torch.equal(part.batch(chosen).features, same.batch(chosen).features)
            assert torch.equal(part.subset(chosen).features, same.subset(chosen).features)
    for name, same in normalized.items():
        assert torch.equal(load(tmp_path / "all.txt", objectives="a=1", normalization=name)[0].features, same.features)


def test_rows_that_stand_side_by_side_are_not_copied():
    matrix = torch.arange(12.0).view(6, 2)
    view = storage.take(matrix, torch.arange(2, 5))
    assert view.data_ptr() == matrix[2].data_ptr() and torch.equal(view, matrix[2:5])
    for rows in ([0, 2], [3, 2], [1, 1], [0, 2, 2], []):
        assert torch.equal(storage.take(matrix, torch.tensor(rows, dtype=torch.int64)), matrix[rows])


def test_fewer_columns_at_once_where_rows_are_many(monkeypatch):
    features = torch.randn(500, 37, generator=torch.Generator().manual_seed(0)) * 100
    plain = FeatureNormalizer.fit("log1p+global", features)
    monkeypatch.setattr("mopl.ranking.normalization._NUMBERS_AT_ONCE", 1500)
    few = FeatureNormalizer.fit("log1p+global", features)
    torch.testing.assert_close((few.shift, few.scale), (plain.shift, plain.scale), rtol=1e-12, atol=1e-12)


def test_a_full_disk_is_an_error_that_says_where(monkeypatch):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"a temporary file of 4\.0 GiB .* cannot be written in .*set TMPDIR"):
        storage.empty((1 << 20, 1 << 10))


# ---------------------------------------------------------------- many files


def sharded(folder: Path, split: str, names: list[str]) -> None:
    for place, name in enumerate(names):
        text = lines(4, 100 * len(split) + 10 * place, columns=5, seed=place).encode()
        (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)


def test_a_split_of_many_files_is_their_rows_in_the_order_of_their_numbers(tmp_path):
    sharded(tmp_path, "train", [f"train-{n}.txt" for n in (8, 9, 10, 11)])
    sharded(tmp_path, "validation", ["valid-00000-of-00002.txt.gz", "valid-00001-of-00002.txt.gz"])
    (tmp_path / "test").mkdir()
    sharded(tmp_path / "test", "test", ["part-00000", "part-00001"])
    for name in ("README.md", "_SUCCESS", "part-00000.query"):
        (tmp_path / "test" / name).write_text("1\n")
    (tmp_path / "vali").mkdir()  # no split: nothing in it is numbered
    (tmp_path / "vali" / "notes.txt").write_text("read me")
    (tmp_path / "10²").write_text("a name with a digit that is none")
    found = find_files(tmp_path)
    assert [file.name for file in found["train"]] == ["train-8.txt", "train-9.txt", "train-10.txt", "train-11.txt"]
    parts = load_letor(tmp_path, objectives="a=1")
    for part, files in zip(parts, found.values(), strict=True):
        each = [load_letor([file, file, file], objectives="a=1")[0] for file in files]
        assert torch.equal(part.query_ids, torch.cat([one.query_ids for one in each]))
        assert torch.equal(part.raw_main, torch.cat([one.raw_main for one in each]))
        assert torch.equal(part.raw_auxiliary, torch.cat([one.raw_auxiliary for one in each]))
        assert torch.equal(part.lengths, torch.cat([one.lengths for one in each]))
        assert torch.equal(part.features, torch.cat([one.features for one in each]))
    assert parts[0].name == f"{tmp_path.name}/train-8.txt to train-11.txt" and len(parts[0]) == 16


def test_days_may_be_missing_between_files_that_are_numbered_by_dates(tmp_path):
    sharded(tmp_path, "train", ["train-20261130.txt", "train-20261201.txt"])
    sharded(tmp_path, "test", ["test.txt"])
    assert len(find_files(tmp_path)["train"]) == 2


def test_faults_of_many_files_name_the_file(tmp_path):
    sharded(tmp_path, "train", ["train-0.txt", "train-1.txt"])
    sharded(tmp_path, "test", ["test.txt"])
    (tmp_path / "train-2.txt").write_text("1 qid:510 1:1 2:3\n")
    with pytest.raises(LetorError, match=r"train-2\.txt: query 510 is in .*train-1\.txt as well; put all documents"):
        load_letor(tmp_path, objectives="a=1")
    (tmp_path / "train-2.txt").write_text("1 1:1 2:3\n")
    (tmp_path / "train-2.txt.query").write_text("1\n")
    with pytest.raises(LetorError, match=r"train-2\.txt: it has no query ids, but .*train-0\.txt has"):
        load_letor(tmp_path, objectives="a=1")
    (tmp_path / "train-2.txt").write_text("1 qid:-1 1:1 2:3\n")
    (tmp_path / "train-3.txt").write_text(f"1 qid:{2**63} 1:1 2:3\n")
    with pytest.raises(LetorError, match=r"query -1 does not go with 9223372036854775808 of .*renumber"):
        load_letor(tmp_path, objectives="a=1")
    (tmp_path / "train-3.txt").write_text("1 qid:3 1:1 2:x\n")
    with pytest.raises(LetorError, match=r"train-3\.txt:1: '2:x' has no number after the colon"):
        load_letor(tmp_path, objectives="a=1")
    (tmp_path / "train-3.txt").unlink()
    (tmp_path / "train.txt").write_text("1 qid:9 1:1 2:3\n")
    with pytest.raises(ValueError, match=r"has two files for train, .*; give the files, or number those of a split"):
        load_letor(tmp_path, objectives="a=1")


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (
            ["train-0.txt", "train-1.txt", "train-1.txt.gz"],
            r"one part of train twice, train-1.txt and train-1.txt.gz",
        ),
        (["train-0.txt", "train-00.txt"], "has one part of train twice"),
        (
            ["train-0-of-3.txt", "train-1-of-3.txt"],
            r"has 2 files for train, but the name of train-.-of-3.txt .* 3",
        ),
        (["train-0-of-2.txt", "train-1.txt"], "has files of several sets for train"),
        (["a.train-0.txt", "b.train-1.txt"], r"several sets for train, a\.train-0\.txt and b\.train-1\.txt; keep one"),
        (["train/part-0.txt", "train-1.txt"], r"several sets for train, train/part-0\.txt and train-1\.txt"),
        (["train-1.txt", "train-2.txt", "train-4.txt"], r"3 files for train, numbered from 1 to 4, but no number 3;"),
        (["train/part-0.txt", "train/part-1.txt", "train/scores.dat"], r"has scores\.dat among the numbered files"),
        (["train1.txt"], r"has no file for train .*train-00000\.txt"),
    ],
)
def test_files_that_do_not_make_up_a_split_are_refused(tmp_path, names, wrong):
    (tmp_path / "train").mkdir()
    sharded(tmp_path, "train", names)
    sharded(tmp_path, "test", ["test.txt"])
    with pytest.raises(ValueError, match=wrong):
        find_files(tmp_path)


def test_files_without_ids_are_numbered_on_and_label_files_are_for_one_file(tmp_path):
    for name, sizes in (("train-0", "1\n1\n"), ("train-1", "2\n"), ("test", "2\n")):
        (tmp_path / f"{name}.txt").write_text("1 1:1 2:3\n0 1:2 2:4\n")
        (tmp_path / f"{name}.txt.query").write_text(sizes)
    train, valid, _ = load_letor(tmp_path, objectives="a=1")
    assert sorted([*train.query_ids.tolist(), *valid.query_ids.tolist()]) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"objective 'a' has a label file, .* but train has 2 files, .*as a column"):
        load_letor(tmp_path, objectives="a=@{split}.a.txt")


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.claim)])
def test_one_of_several_processes_parses_and_all_train_as_one_does(tmp_path, processes):
    pytest.importorskip("accelerate")
    pytest.importorskip("moocore")
    from launching import DISTRIBUTED, launch, python
    from safetensors.torch import load_file

    found = {}
    for count in (1, processes):
        place = tmp_path / str(count)
        (place / "data").mkdir(parents=True)
        for split in ("train", "valid", "test"):
            sharded(place / "data", split, [f"{split}-{n}.txt" for n in range(4)])
        command = str(DISTRIBUTED / "rank_many_files.py"), str(place / "data"), str(place / "run")
        done = python(*command) if count == 1 else launch(count, *command)
        assert done.returncode == 0, done.stderr[-3000:]
        parsed = [file.name for file in place.glob("parsed-*")]
        assert len(parsed) == 12 and all(name.endswith("-by-0") for name in parsed), parsed
        found[count] = load_file(place / "run" / "model.safetensors")
    for name, value in found[1].items():
        torch.testing.assert_close(found[processes][name], value, rtol=1e-4, atol=5e-4)
