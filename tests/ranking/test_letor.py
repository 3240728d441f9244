"""SVMlight/LETOR files: what is read, how it is cached, and what every fault is called."""

import bz2
import gzip
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mopl.ranking import storage, svmlight
from mopl.ranking.array_cache import ArrayCache
from mopl.ranking.letor import find_files, load_letor
from mopl.ranking.loading import load
from mopl.ranking.objectives import MSLR_OBJECTIVES, Objective
from mopl.ranking.svmlight import LetorError, read_label_file, read_letor

SMALL = b"""# a comment line
2 qid:10 1:0.5 3:-1.5 # docid = GX01
0 qid:10 2:4

1 qid:11\t1:1e-3\t4:7
0 qid:-3 1:1 2:2 3:3 4:4
"""


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def fault(path, **options):
    with pytest.raises(LetorError) as error:
        read_letor(path, cache=False, **options)
    return str(error.value).removeprefix(f"{path.parent}/")


def letor_text(queries, columns, *, seed=0, first_qid=1, with_ids=True):
    """Lines of random data, and the arrays that they hold."""
    rng = np.random.default_rng(seed)
    lines, features, labels, sizes = [], [], [], rng.integers(1, 7, queries)
    for q, size in enumerate(sizes):
        for _ in range(size):
            row = np.float32(np.round(rng.exponential(2, columns), 3)) * (rng.random(columns) < 0.7)
            label = int(rng.integers(0, 5))
            cells = " ".join(f"{c + 1}:{float(v)!r}" for c, v in enumerate(row) if v)
            lines.append(f"{label} " + (f"qid:{q + first_qid} " if with_ids else "") + cells)
            features.append(row)
            labels.append(label)
    return "\n".join(lines) + "\n", np.float32(features), np.array(labels), sizes


# --- reading --------------------------------------------------------------------------------------------------------


def test_small_file_is_read_as_it_stands(tmp_path):
    file = read_letor(write(tmp_path / "small.txt", SMALL))
    np.testing.assert_array_equal(
        file.features, np.float32([[0.5, 0, -1.5, 0], [0, 4, 0, 0], [1e-3, 0, 0, 7], [1, 2, 3, 4]])
    )
    np.testing.assert_array_equal(file.labels, [2, 0, 1, 0])
    np.testing.assert_array_equal(file.offsets, [0, 2, 3, 4])
    np.testing.assert_array_equal(file.query_ids, [10, 11, -3])
    assert [file.line_of(i) for i in range(4)] == [2, 3, 5, 6]


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress)])
@pytest.mark.parametrize("lines_at_once", [1, 7, 10**6])
def test_files_come_back_exactly_in_any_packing_and_chunking(tmp_path, monkeypatch, ending, pack, lines_at_once):
    monkeypatch.setattr(svmlight, "_LINES_AT_ONCE", lines_at_once)
    text, features, labels, sizes = letor_text(9, 12)
    file = read_letor(write(tmp_path / f"data.txt{ending}", pack(text.encode())), cache=False)
    np.testing.assert_array_equal(file.features, features)
    np.testing.assert_array_equal(file.labels, labels)
    np.testing.assert_array_equal(np.diff(file.offsets), sizes)
    assert file.features.dtype == np.float32


def test_a_file_that_ends_with_a_full_chunk_has_no_extra_items(tmp_path, monkeypatch):
    monkeypatch.setattr(svmlight, "_LINES_AT_ONCE", 2)
    assert len(read_letor(write(tmp_path / "a.txt", "1 qid:1 1:1\n0 qid:1 1:2\n1 qid:2 3:1\n0 qid:2\n")).labels) == 4


def test_lightgbm_example_agrees_with_lightgbm_group_sizes_and_sklearn(shared_data, tmp_path):
    """Group sizes from the side file; the matrix as scikit-learn reads it from the unpacked file."""
    from sklearn.datasets import load_svmlight_file

    folder = shared_data / "ltr_lightgbm"
    for split, items, queries in (("train", 3005, 201), ("test", 768, 50)):
        file = read_letor(folder / f"rank.{split}.gz", cache=tmp_path)
        matrix, labels = load_svmlight_file(str(folder / f"rank.{split}.gz"), zero_based=False)[:2]
        np.testing.assert_array_equal(file.features, matrix.toarray().astype(np.float32))
        np.testing.assert_array_equal(file.labels, labels)
        sizes = [int(s) for s in (folder / f"rank.{split}.query").read_text().split()]
        np.testing.assert_array_equal(np.diff(file.offsets), sizes)
        assert file.features.shape == (items, 300) and len(sizes) == queries


def test_the_lightgbm_folder_loads_as_a_data_set(shared_data, tmp_path):
    train, valid, test = load(
        shared_data / "ltr_lightgbm", objectives="a=10,b=300:min:softmax:scale=std", cache=tmp_path
    )
    assert len(train) + len(valid) == 201 and len(test) == 50  # validation queries are drawn from the training file
    assert len(valid) == 50  # a quarter, as 60 to 20
    assert train.num_features == 298 and "10" not in train.feature_names and "300" not in train.feature_names
    assert train.raw_auxiliary.shape == (train.num_items, 2)
    assert [o.direction for o in test.objectives] == ["max", "min"]
    assert test.objectives[1].scale == train.objectives[1].scale != 1.0
    totals = test.pad(test.targets, range(50)).sum(1)
    assert torch.allclose(totals[:, 1], torch.ones(50)) and bool(
        ((totals[:, 0] - 1).abs() < 1e-5).logical_or(totals[:, 0] == 0).all()
    )


# --- splits and files -----------------------------------------------------------------------------------------------


def mslr_fold(folder, columns=136):
    folder.mkdir()
    for i, name in enumerate(("train", "vali", "test")):
        write(
            folder / f"{name}.txt",
            letor_text((6, 3, 2)[i], columns, seed=i, first_qid=100 * i)[0] + "0 qid:9999 136:1\n",
        )
    return folder


def test_mslr_fold_has_131_inputs_and_five_named_objectives(tmp_path):
    train, valid, test = load_letor(mslr_fold(tmp_path / "Fold1"))
    assert (len(train), len(valid), len(test)) == (7, 4, 3)
    assert train.num_features == 131 and train.feature_names == tuple(str(c) for c in range(1, 132))
    assert {o.name: o.column for o in train.objectives} == {
        "query_url_clicks": 134, "url_clicks": 135, "url_dwell_time": 136, "quality": 132, "quality2": 133,
    }  # fmt: skip
    whole = read_letor(tmp_path / "Fold1" / "train.txt").features
    np.testing.assert_array_equal(train.raw_auxiliary.numpy(), whole[:, [133, 134, 135, 131, 132]])
    np.testing.assert_array_equal(train.features.numpy(), whole[:, :131])
    assert not MSLR_OBJECTIVES["quality2"].maximise  # it "measures the badness of a web page"


def test_two_named_mslr_objectives_still_leave_131_inputs(tmp_path):
    """The other three auxiliary columns would give the answer away; the paper's inputs are the first 131 whatever m."""
    train, _, _ = load_letor(mslr_fold(tmp_path / "Fold1"), objectives="quality,quality2")
    assert train.num_features == 131 and train.raw_auxiliary.shape[1] == 2


def test_plain_columns_leave_the_other_columns_in(tmp_path):
    train, _, _ = load_letor(mslr_fold(tmp_path / "Fold1"), objectives="mine=134,price=7:min", exclude=[1])
    assert train.num_features == 133


def test_one_file_is_split_by_query(tmp_path):
    text, *_ = letor_text(20, 6)
    path = write(tmp_path / "all.txt", text)
    parts = load_letor(path, objectives="a=1", seed=3)
    assert [len(p) for p in parts] == [12, 4, 4]
    ids = torch.cat([p.query_ids for p in parts])
    assert sorted(ids.tolist()) == list(range(1, 21))
    again, other = load_letor(path, objectives="a=1", seed=3), load_letor(path, objectives="a=1", seed=4)
    assert [p.fingerprint for p in again] == [p.fingerprint for p in parts] != [p.fingerprint for p in other]


def test_given_files_are_splits_in_their_order(tmp_path):
    files = [write(tmp_path / f"{n}.txt", letor_text(n, 5, seed=n)[0]) for n in (8, 3, 4)]
    assert [len(p) for p in load_letor(files, objectives="a=1")] == [8, 3, 4]
    assert [len(p) for p in load_letor(files[::2], objectives="a=1")] == [6, 2, 4]
    with pytest.raises(ValueError, match="there are 4 files; give 1, 2"):
        load_letor([*files, files[0]], objectives="a=1")


def test_a_column_that_one_split_never_uses_is_0_there(tmp_path):
    files = [
        write(tmp_path / "train.txt", "1 qid:1 1:1 2:1\n0 qid:2 1:3 2:1\n"),
        write(tmp_path / "test.txt", "1 qid:1 1:1 5:2\n"),
    ]
    train, _, test = load_letor([files[0], files[0], files[1]], objectives="a=5")
    assert (
        train.num_features == 4 and train.raw_auxiliary.tolist() == [[0], [0]] and test.raw_auxiliary.tolist() == [[2]]
    )


def test_folders_that_name_no_split_get_an_answer(tmp_path):
    (tmp_path / "Fold1").mkdir()
    with pytest.raises(ValueError, match=r"no file for train and test .*choose a fold, e\.g\. .*Fold1"):
        find_files(tmp_path)
    write(tmp_path / "train.txt", "")
    with pytest.raises(ValueError, match="no file for test"):
        find_files(tmp_path)
    write(tmp_path / "train.txt.gz", "")
    with pytest.raises(ValueError, match=r"two files for train, train\.txt and train\.txt\.gz"):
        find_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_letor([tmp_path / "nowhere.txt"], objectives="a=1")


# --- label files and objectives -------------------------------------------------------------------------------------


def test_label_files_are_found_by_split(tmp_path):
    fold = mslr_fold(tmp_path / "Fold1")
    rows = {name: len(read_letor(fold / f"{name}.txt").labels) for name in ("train", "vali", "test")}
    for i, (name, count) in enumerate(rows.items()):
        write(fold / f"{name}.dwell.txt", "".join(f"{i + j / 1000}\n" for j in range(count)))
    train, valid, test = load_letor(fold, objectives="dwell=@{split}.dwell.txt:softmax:scale=2")
    for i, part in enumerate((train, valid, test)):
        torch.testing.assert_close(part.raw_auxiliary[:, 0], i + torch.arange(part.num_items) / 1000)
    assert train.num_features == 136  # a label file takes no column out


def test_faults_of_label_files(tmp_path):
    data = write(tmp_path / "d.txt", SMALL)

    def load_with(text, spec="dwell=@dwell.txt"):
        write(tmp_path / "dwell.txt", text)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_letor(data, objectives=spec)
        return str(error.value).replace(f"{tmp_path}/", "")

    assert load_with("1\n2\n3\n") == (
        "dwell.txt: it has 3 lines but d.txt has 4 documents; write one label a document, in the order of that file"
    )
    assert load_with("1\n2\nx\n3\n") == "dwell.txt:3: 'x' is not a number"
    assert load_with("1\n2\n3\ninf\n").startswith("dwell.txt:4: the label is inf")
    assert load_with("1\n-2\n3\n4\n").startswith("dwell.txt:2: label -2 of objective 'dwell' is negative")
    assert "has no label file other.txt, neither here nor in" in load_with("", "dwell=@other.txt")
    with pytest.raises(ValueError, match=r"has the one label file dwell\.txt but the data has several files"):
        load_letor([data, data], objectives="dwell=@dwell.txt")


def test_negative_labels_name_their_line_under_l1_and_are_fine_otherwise(tmp_path):
    data = write(tmp_path / "d.txt", SMALL * 1)
    with pytest.raises(LetorError, match=r"d\.txt:2: label -1\.5 of objective 'a' is negative, .* add :softmax to"):
        load_letor([data] * 3, objectives="a=3")
    for spec in ("a=3:min", "a=3:softmax", "a=3:softmax:min"):
        train, _, _ = load_letor([data] * 3, objectives=spec)
        assert bool((train.labels >= 0).all())
    write(data, "-1 qid:1 1:1 2:1\n")
    with pytest.raises(LetorError, match=r"d\.txt:1: label -1 of objective 'relevance' is negative, .* add one number"):
        load_letor([data] * 3, objectives="a=1")
    load_letor([data] * 3, objectives="a=1", main=Objective("r", normalize="softmax"))


def test_a_label_that_is_no_number_is_not_to_be_left_out(tmp_path):
    data = write(tmp_path / "d.txt", SMALL + b"1 qid:9 1:1 3:nan\n")
    with pytest.raises(LetorError, match=r"the label of objective 'a', column 3 is nan; .* \(a column left out is the"):
        load_letor([data] * 3, objectives="a=3")
    with pytest.raises(LetorError, match=r"feature 3 is nan; .* or leave it out, which means 0"):
        load_letor([data] * 3, objectives="a=2")


def test_objectives_are_checked_before_files_are_read(tmp_path):
    data = write(tmp_path / "d.txt", "this is no data\n")
    for objectives, message in (
        ("a=1:minn", "unknown option 'minn'"),
        ("relevance=1", "both named"),
        ("a", "no source"),
    ):
        with pytest.raises(ValueError, match=message):
            load_letor([data] * 3, objectives=objectives)


def test_data_are_called_as_they_were_asked_for(tmp_path):
    data = write(tmp_path / "hotels.txt", SMALL)
    assert load_letor([data] * 3, objectives="a=1")[0].name == "hotels.txt"
    (tmp_path / "fold").mkdir()
    for split in ("train", "vali", "test"):
        write(tmp_path / "fold" / f"{split}.txt", SMALL)
    assert load_letor(tmp_path / "fold", objectives="a=1")[2].name == "fold/test.txt"


def test_unknown_columns_and_missing_objectives(tmp_path):
    data = write(tmp_path / "d.txt", SMALL)
    for objectives, message in (
        ("a=5", "column 5 of objective 'a' is unknown: .*d.txt has columns 1 to 4"),
        (None, "has 4 columns, not the 136 of MSLR, so the objectives must be named"),
        ("quality", "is column 132 of MSLR's 136, but .* has 4 columns; write quality=COLUMN"),
        ("a=1,b=2,c=3,d=4", "all 4 columns are objectives or excluded"),
        ("relevance=1", "both named 'relevance'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_letor([data] * 3, objectives=objectives)
    with pytest.raises(ValueError, match="column 9 in exclude is unknown"):
        load_letor([data] * 3, objectives="a=1", exclude=[9])
    with pytest.raises(ValueError, match="has no source"):
        load_letor([data] * 3, objectives=[Objective("a")])


# --- malformed files ------------------------------------------------------------------------------------------------

FINITE = "replace it by a number of float32's range or leave it out, which means 0"
BEYOND = "beyond 64 bits, -2^63 to 2^64 - 1; renumber the queries"
GOOD = "1 qid:1 1:1 2:1\n# comment\n\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x qid:1 1:1", "the label 'x' is not a number; a line is LABEL qid:ID 1:VALUE 2:VALUE ..."),
        ("nan qid:1 1:1", "the label is nan; replace it by a finite number"),
        ("inf qid:1 1:1", "the label is inf; replace it by a finite number"),
        ("1 qid:1 1:1 2", "'2' has no colon; write COLUMN:VALUE"),
        ("1 qid:1 1:1 2:", "'2:' has no number after the colon"),
        ("1 qid:1 1:1 2:abc", "'2:abc' has no number after the colon"),
        ("1 qid:1 1:1 x:2", "'x:2' has no column number before the colon"),
        ("1 qid:1 0:1", "column 0 is used but columns are counted from 1; add 1 to all"),
        ("1 qid:1 -4:1", "'-4:1' has no column number before the colon"),
        ("1 qid:1 2:1 1:1", "column 1 comes after column 2; columns must rise along the line"),
        ("1 qid:1 2:1 2:1", "column 2 comes after column 2; columns must rise along the line"),
        ("1 qid:1 1:nan", f"feature 1 is nan; {FINITE}"),
        ("1 qid:1 1:1 2:-inf", f"feature 2 is -inf; {FINITE}"),
        ("1 qid:1 2:1e39", f"feature 2 is inf; {FINITE}"),
        ("1 qid:1 200000:1", "column 200000 is above 100000, the most that is read; renumber it"),
        ("1 qid:1 99999999999:1", "column 99999999999 is above 100000, the most that is read; renumber it"),
        ("1 qid:a 1:1", "'qid:a' is no query id; write qid: and a whole number"),
        ("1 qid:1.0 1:1", "'qid:1.0' is no query id; write qid: and a whole number"),
        ("1 qid: 1:1", "'qid:' is no query id; write qid: and a whole number"),
        ("1 qid:² 1:1", "'qid:²' is no query id; write qid: and a whole number"),
        ("1 qid:99999999999999999999 1:1", f"'qid:99999999999999999999' is {BEYOND}"),
        ("1 qid:18446744073709551616 1:1", f"'qid:18446744073709551616' is {BEYOND}"),
        ("1 qid:-9223372036854775809 1:1", f"'qid:-9223372036854775809' is {BEYOND}"),
        ("1 qid:" + "9" * 5000 + " 1:1", f"'qid:{'9' * 56}' is {BEYOND}"),
        ("1 qid:01 1:1", "'qid:01' is query 1, which the line before writes as 'qid:1'; write each id in one way"),
        ("1 qid:1 ²:1", "'²:1' has no column number before the colon"),
        ("1 qid:1 " + "9" * 5000 + ":1", f"column {'9' * 60} is above 100000, the most that is read; renumber it"),
        ("1 qid:1 2147483649:1", "column 2147483649 is above 100000, the most that is read; renumber it"),
        ("1 qid:1 18446744073709551617:1",
         "column 18446744073709551617 is above 100000, the most that is read; renumber it"),
        ("1 qid:1 1:1e400", f"feature 1 is inf; {FINITE}"),
        ("1 qid:1 1:1_0", "'1:1_0' has no number after the colon"),
        ("1 qid:1 1_0:1", "'1_0:1' has no column number before the colon"),
        ("1_0 qid:1 1:1", "the label '1_0' is not a number; a line is LABEL qid:ID 1:VALUE 2:VALUE ..."),
        ("1 qid:1 1:1 2:1", "'1:1\\xa02:1' has no number after the colon"),
        ("1 1:1", "the line has no query id but earlier lines have a one; write qid:ID on all"),
        ("1", "the line has no query id but earlier lines have a one; write qid:ID on all"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lines_at_once", [1, 1000])
def test_malformed_lines_are_named(tmp_path, monkeypatch, line, message, lines_at_once):
    monkeypatch.setattr(svmlight, "_LINES_AT_ONCE", lines_at_once)
    path = write(tmp_path / "bad.txt", f"{GOOD}0 qid:1 1:2\n{line}\n0 qid:2 1:1\n")
    assert fault(path) == f"bad.txt:5: {message}"


def test_query_ids_have_64_bits_with_a_sign_or_without(tmp_path):
    """Ids are names: none may become another one, as floating point numbers and wrapped integers do."""
    ids = [2**63, 2**64 - 1, 2**64 - 2, 0, 2**53 + 1]
    path = write(tmp_path / "d.txt", "".join(f"1 qid:{i} 1:1\n0 qid:{i} 2:2\n" for i in ids))
    for _ in range(2):  # parsed, and from the cache
        file = read_letor(path)
        assert file.query_ids.dtype == np.uint64 and file.query_ids.tolist() == ids
    train, _, test = load_letor([path, path, path], objectives="a=1", main=Objective("r", normalize="softmax"))
    assert train.subset([1, 0]).query_ids.tolist() == [2**64 - 1, 2**63] and len(test.fingerprint) == 64
    assert train._where(2) == f"{train.name}, query {2**64 - 1}, item 1"
    signed = [-(2**63), 2**63 - 1, -1, 7]
    file = read_letor(write(tmp_path / "s.txt", "".join(f"1 qid:{i:+} 1:1\n" for i in signed)))
    assert file.query_ids.dtype == np.int64 and file.query_ids.tolist() == signed
    for first, second in ((-3, 2**63), (2**63, -3)):
        text = f"1 qid:{first} 1:1\n1 qid:{second} 1:1\n"
        assert fault(write(tmp_path / "m.txt", text)) == (
            f"m.txt:2: 'qid:{second}' does not go with the id {first} of an earlier line: ids are from -2^63 to 2^63 "
            "- 1, or from 0 to 2^64 - 1; renumber the queries"
        )
    assert fault(write(tmp_path / "z.txt", "1 qid:007 1:1\n1 qid:8 1:1\n1 qid:7 1:1\n")).startswith(
        "z.txt:3: query 7 comes back after other queries (it began on line 1)"
    )


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress)])
def test_a_byte_order_mark_and_other_ends_of_lines_change_nothing(tmp_path, ending, pack):
    plain = read_letor(write(tmp_path / "plain.txt", SMALL))
    odd = b"\xef\xbb\xbf" + SMALL[SMALL.index(b"2 qid") :].replace(b"\n", b"\r\n")
    file = read_letor(write(tmp_path / f"odd.txt{ending}", pack(odd)))
    for name in ("features", "labels", "offsets", "query_ids"):
        np.testing.assert_array_equal(getattr(file, name), getattr(plain, name))
    assert [file.line_of(i) for i in range(4)] == [1, 2, 4, 5]
    # What str.splitlines takes for an end of a line is white space, or a part of a comment.
    text = "1 qid:1\x0c1:1\x0b2:2\r3:3 # \u2028 0 qid:2 1:9 \x85\n".encode()
    np.testing.assert_array_equal(read_letor(write(tmp_path / "c.txt", text)).features, [[1, 2, 3]])
    assert fault(write(tmp_path / "u.txt", SMALL.decode().encode("utf-16"))) == (
        "u.txt is no UTF-8 text but begins like UTF-16; save it as UTF-8"
    )


def test_label_and_group_files_are_read_as_all_text(tmp_path):
    data, labels = write(tmp_path / "d.txt", "1 1:1\n0 1:2\n2 1:3\n"), tmp_path / "dwell.txt"
    write(tmp_path / "d.txt.query", b"\xef\xbb\xbf2\r\n1\r\n")
    write(labels, b"\xef\xbb\xbf1.5\r\n2\r\n3\r\n")
    assert read_letor(data).offsets.tolist() == [0, 2, 3]
    assert read_label_file(labels, 3, data).tolist() == [1.5, 2, 3]
    for content, message in (
        (b"1\n\xff\n3\n", "dwell.txt:2: its byte 1 (0xff) is not UTF-8"),
        (b"1\n1_0\n3\n", "dwell.txt:2: '1_0' is not a number"),
        (b"1\n2\x0c4\n3\n", "dwell.txt:2: '2\\x0c4' is not a number"),
        (b"1\n2\r4\n3\n", "dwell.txt:2: '2\\r4' is not a number"),
        ("1\u20282\n3\n".encode(), "dwell.txt: it has 2 lines but"),
    ):
        with pytest.raises(LetorError) as error:
            read_label_file(write(labels, content), 3, data)
        assert str(error.value).removeprefix(f"{tmp_path}/").startswith(message)
    for content, message in (
        ("²\n1\n", "d.txt.query:1: '²' is not the size of a group"),
        ("9" * 5000, "d.txt.query:1: no group has 999"),
        (b"\xff", "d.txt.query:1: its byte 1 (0xff) is not UTF-8"),
        (b"x\n\xff\n", "d.txt.query:1: 'x' is not the size of a group"),
    ):
        write(tmp_path / "d.txt.query", content)
        assert fault(data).startswith(message)


def test_a_query_in_two_places_is_named_with_both(tmp_path, monkeypatch):
    monkeypatch.setattr(svmlight, "_LINES_AT_ONCE", 2)
    path = write(tmp_path / "d.txt", "1 qid:1 1:1\n0 qid:2 1:1\n# x\n0 qid:3 1:1\n1 qid:2 1:1\n")
    assert fault(path) == (
        "d.txt:5: query 2 comes back after other queries (it began on line 2); "
        "put all documents of a query on consecutive lines"
    )


def test_faults_of_whole_files(tmp_path):
    assert fault(write(tmp_path / "empty.txt", "# nothing\n\n")) == "empty.txt: the file has no documents"
    assert "no line has a query id and there is no file plain.txt.query" in fault(
        write(tmp_path / "plain.txt", "1 1:1\n")
    )
    whole = gzip.compress(SMALL * 1)
    assert "ends early or is damaged" in fault(write(tmp_path / "cut.txt.gz", whole[:-12]))
    assert "ends early or is damaged" in fault(write(tmp_path / "no.txt.gz", b"1 qid:1 1:1\n"))
    damaged = whole[:20] + bytes([whole[20] ^ 255]) + whole[21:]
    assert "ends early or is damaged" in fault(write(tmp_path / "flip.txt.gz", damaged))
    assert fault(write(tmp_path / "binary.txt", bytes(range(256)))).startswith("binary.txt:")


def test_faults_of_group_files(tmp_path):
    path = write(tmp_path / "d.train", "1 1:1\n0 1:2\n0 2:1\n")
    side = tmp_path / "d.train.query"
    for text, message in (
        ("1\n3\n", "d.train.query: the sizes of 2 groups sum to 4 but "),
        ("1\n0\n2\n", "d.train.query:2: this query has no documents; remove the line"),
        ("1\nx\n", "d.train.query:2: 'x' is not the size of a group; write one whole number"),
        ("-1\n4\n", "d.train.query:1: '-1' is not the size of a group; write one whole number"),
    ):
        write(side, text)
        assert fault(path).startswith(message)
    write(side, "1\n2\n")
    np.testing.assert_array_equal(read_letor(path).offsets, [0, 1, 3])
    write(side, "2\n1\n")  # the groups are read anew although the matrix is cached
    np.testing.assert_array_equal(read_letor(path).offsets, [0, 2, 3])


def test_missing_scikit_learn_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn, .* run: pip install .*\[demo\]'"):
        read_letor(write(tmp_path / "d.txt", SMALL), cache=False)


# --- cache ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def parses(monkeypatch):
    """How often files were really parsed."""
    calls = []
    real = svmlight._parse
    monkeypatch.setattr(svmlight, "_parse", lambda path, names: calls.append(path) or real(path, names))
    return calls


def test_a_second_reading_comes_from_the_cache_and_is_equal(tmp_path, parses):
    path = write(tmp_path / "d.txt", SMALL)
    first, second = read_letor(path), read_letor(path)
    assert len(parses) == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == [".d.txt.mopl", "d.txt"]
    for name in ("features", "labels", "offsets", "query_ids"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype
    read_letor(path, cache=False)
    assert len(parses) == 2


def test_what_a_killed_writer_left_beside_a_valid_cache_goes(tmp_path, parses):
    path = write(tmp_path / "d.txt", SMALL)
    read_letor(path)
    (tmp_path / ".writing-0123456789abcdef-.d.txt.mopl").mkdir()  # killed after the rename
    read_letor(path)
    assert len(parses) == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == [".d.txt.mopl", "d.txt"]


def test_the_cache_notices_every_change_of_the_file(tmp_path, parses, monkeypatch):
    path = write(tmp_path / "d.txt", SMALL)
    read_letor(path)
    status = path.stat()
    changed = SMALL.replace(b"1:0.5", b"1:0.6")
    write(path, changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time: the ends tell
    assert read_letor(path).features[0, 0] == np.float32(0.6) and len(parses) == 2
    os.utime(path, ns=(0, 10**9))
    read_letor(path)
    assert len(parses) == 3
    monkeypatch.setattr("mopl.ranking.array_cache.VERSION", 99)
    read_letor(path)
    assert len(parses) == 4
    read_letor(path)
    assert len(parses) == 4


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("limit", [0, 1 << 28], ids=["mapped", "in memory"])
@pytest.mark.parametrize("file", ["features.npy", "labels.npy", "stamp.json"])
@pytest.mark.parametrize("damage", [flipped, lambda content: content[:-8]], ids=["another bit", "cut off"])
def test_a_damaged_cache_is_reported_and_written_anew(tmp_path, parses, monkeypatch, limit, file, damage):
    monkeypatch.setattr(storage, "LIMIT", limit)
    path = write(tmp_path / "d.txt", SMALL)
    read_letor(path)
    cached = tmp_path / ".d.txt.mopl" / file
    cached.write_bytes(damage(cached.read_bytes()))
    with pytest.warns(UserWarning, match="this cache cannot be read"):
        assert len(read_letor(path).labels) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_letor(path)
    assert len(parses) == 2


def test_the_cache_of_an_earlier_version_is_replaced(tmp_path):
    path = write(tmp_path / "d.txt", SMALL)
    (tmp_path / ".d.txt.mopl.npz").write_bytes(b"old")
    read_letor(path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".d.txt.mopl", "d.txt"]


def test_the_cache_goes_to_the_folder_asked_for(tmp_path, parses):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one, two = (write(tmp_path / f / "d.txt", SMALL) for f in "ab")
    for path in (one, two, one, two):
        read_letor(path, cache=tmp_path / "caches")
    assert len(parses) == 2 and len(list((tmp_path / "caches").iterdir())) == 2  # files of one name are kept apart
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["d.txt"]


def read_only(monkeypatch, *folders):
    """Refuse to make files in the folders (permissions do not stop a superuser)."""
    real = os.mkdir

    def mkdir(path, *mode):
        if Path(path).parent in folders:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *mode)

    monkeypatch.setattr("mopl._files.os.mkdir", mkdir)


def test_a_read_only_folder_is_cached_in_the_users_cache_folder(tmp_path, parses, monkeypatch):
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data" / "d.txt", SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    read_only(monkeypatch, path.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_letor(path), read_letor(path)
    assert len(parses) == 1
    assert [f.name for f in path.parent.iterdir()] == ["d.txt"]
    assert len(list((tmp_path / "home" / "mopl" / "letor").iterdir())) == 1
    read_only(monkeypatch, path.parent, tmp_path / "home" / "mopl" / "letor")
    write(path, SMALL + b"1 qid:5 1:1\n")
    with pytest.warns(UserWarning, match=r"could not be cached .*Permission denied.* give a folder"):
        assert len(read_letor(path).labels) == 5


def test_a_cache_is_whole_or_absent(tmp_path, monkeypatch):
    path = write(tmp_path / "d.txt", SMALL)

    def full_disk(file, array):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.warns(UserWarning, match="no space is left"):
        ArrayCache(path, tmp_path / "c").save({"a": np.zeros(3)})
    assert list((tmp_path / "c").iterdir()) == []


def test_the_front_door_reads_files_with_their_own_normalization(tmp_path):
    text, *_ = letor_text(20, 6)
    train, _, test = load(write(tmp_path / "all.txt", text), objectives="a=1", seed=1)
    assert train.normalizer.name == "log1p+global"
    torch.testing.assert_close(train.features.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.features.std(0, correction=0), torch.ones(5), atol=1e-5, rtol=0)
    assert not torch.allclose(test.features.mean(0), torch.zeros(5), atol=1e-2)
