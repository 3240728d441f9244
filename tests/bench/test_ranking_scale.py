"""The benchmark of ranking data at scale: what it generates is in MSLR's shape, and its table has every figure."""

import numpy as np
import pytest

from bench.ranking_scale import COLUMNS, LIST, READERS, STAGES, generate, main, stage, table


def test_what_is_generated_is_in_the_shape_of_mslr(tmp_path):
    pytest.importorskip("sklearn")
    from mopl.ranking.svmlight import read_letor

    generate(tmp_path / "all.txt", 3 * LIST + 1)
    found = read_letor(tmp_path / "all.txt", cache=False)
    assert found.features.shape == (3 * LIST + 1, COLUMNS)
    assert np.diff(found.offsets).tolist() == [LIST, LIST, LIST, 1]
    assert found.query_ids.tolist() == [1, 2, 3, 4]
    assert set(found.labels) <= {0, 1, 2, 3, 4}


def test_blocks_are_repeated_under_new_query_ids(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.ranking_scale.BLOCK", LIST)
    generate(tmp_path / "all.txt", 2 * LIST)
    lines = [line.split(" ", 2) for line in (tmp_path / "all.txt").read_text().splitlines()]
    assert [line[1] for line in lines] == ["qid:1"] * LIST + ["qid:2"] * LIST
    assert [line[2] for line in lines[:LIST]] == [line[2] for line in lines[LIST:]]


def test_every_stage_is_measured_and_stands_in_the_table(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr("bench.ranking_scale.STEPS", 1)
    generate(tmp_path / "all.txt", 20 * LIST)
    found = {name: stage(name, tmp_path / "all.txt", tmp_path / "cache") for name in STAGES}
    assert all(figures["GB"] > 0 and figures["wall s"] > 0 for figures in found.values())
    assert any((tmp_path / "cache").iterdir())
    head, _, line = table([{"rows": 2400, "MB": 3.0, "speed": 0.9, **found}]).splitlines()
    assert head.count("|") == line.count("|") == 4 + 2 * len(STAGES)
    assert READERS == STAGES[: len(READERS)]


@pytest.mark.parametrize("arguments", [["--folder", "gone"], ["--json", "gone/figures.json"]])
def test_a_folder_that_is_not_there_is_named_before_anything_is_measured(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--rows", "1200"])
    assert stopped.value.code == 2
    assert (
        f"{arguments[0]} needs the folder gone, which is not there; make it, or name another" in capsys.readouterr().err
    )
