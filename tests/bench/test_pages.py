"""Tables and pictures of README and docs are those that the committed results of each GPU give."""

import json
from pathlib import Path

import pytest

from bench.goals import add_own, judge
from bench.measured import rows_of
from bench.pictures import LISTS, PICTURES, fingerprint
from bench.short_table import in_short
from bench.summary import section, summary, written

ROOT = Path(__file__).resolve().parents[2]
CARDS = sorted(path.parent for path in (ROOT / "bench/results").glob("*/stages.json"))
ANEW = "python -m bench.summary bench/results/{} --write README.md docs/performance.md"
HEAD = "16384x4096x128256"


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_pages_hold_what_the_results_say(folder: Path) -> None:
    for name in ("README.md", "docs/performance.md"):
        page = (ROOT / name).read_text(encoding="utf-8")
        assert page == written(page, folder), f"{name}: {ANEW.format(folder.name)}"
    assert (folder / "summary.md").read_text(encoding="utf-8") == summary(folder), ANEW.format(folder.name)


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_pictures_show_what_the_results_say(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, (choose, _) in PICTURES.items():
        path = ROOT / "docs/pictures" / f"{name}-{folder.name.removeprefix('nvidia-')}.png"
        drawn = choose(folder)
        assert path.exists() == bool(drawn), path
        if drawn:
            shown = image.open(path).info["Description"]
            assert shown == fingerprint(drawn), f"python -m bench.pictures bench/results/{folder.name}"


def results(**others: object) -> str:
    whole = {"command": "python -m bench.logprob --json x", "device": "NVIDIA H200", "date": "2026-11-27",
             "commit": "abc", "versions": {"torch": "2.11.0"}, "targets": []}  # fmt: skip
    return json.dumps(whole | others)


def head_rows(mode: str) -> list[dict]:
    """A peer that is faster, one that gives a sum, and one that failed."""
    size = f"{mode} {HEAD}"
    return [
        {"size": size, "variant": "its products alone", "ms": 9.0, "share": 0.9, "x mopl": 0.9},
        {"size": size, "variant": "mopl", "ms": 10.0, "share": 0.81, "x mopl": 1.0, "log p": 1e-4, "grad": 1e-3},
        {"size": size, "variant": "TRL chunked", "ms": 8.0, "share": 0.95, "x mopl": 0.8, "log p": 0.1, "grad": 2e-3},
        {"size": size, "variant": "Liger fused linear CE, sum", "ms": 50.0, "share": 0.16, "x mopl": 5.0},
        {"size": size, "variant": "CCE exact", "failed": "boo"},
    ]


def test_figures_of_two_cards_are_never_mixed(tmp_path: Path) -> None:
    (tmp_path / "logprob-head.json").write_text(results(results=head_rows("forward")))
    (tmp_path / "lists.json").write_text(results(device="NVIDIA H100", results=[]))
    for make in (summary, section, in_short, *(choose for choose, _ in PICTURES.values())):
        with pytest.raises(ValueError, match="several cards, NVIDIA H100 and NVIDIA H200: one folder each"):
            make(tmp_path)


def test_a_page_gets_the_figures_between_its_marks_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    (folder / "logprob-head.json").write_text(results(results=head_rows("forward")))
    page = "a\n<!-- bench.summary nvidia-h200, in short -->\nold\n<!-- end -->\nb\n<!-- bench.summary other -->\n"
    once = written(page, folder)
    assert once.startswith("a\n") and once.endswith("<!-- end -->\nb\n<!-- bench.summary other -->\n")
    assert "old" not in once and written(once, folder) == once
    assert "`python -m bench.logprob` (2026-11-27, commit abc)." in once
    assert "| **mopl** | 10.0 ms |" in once and "| TRL | × 0.80 |" in once, "a peer that is faster is shown so"
    with pytest.raises(ValueError, match="no <!-- bench"):
        written("nothing here", folder)


def test_goals_are_judged_by_the_products_alone() -> None:
    rows = head_rows("frozen")
    add_own(rows)
    judged = {goal.what: goal for goal in judge(rows)}
    assert judged["of its products alone"][2:] == (0.92, pytest.approx(0.9))
    assert judged["time of TRL chunked over mopl's"][2:] == (1.8, 0.8)
    assert not list(judge([]))


def test_a_row_that_two_stages_have_is_the_first_ones() -> None:
    ours, heavy = head_rows("trained"), [{"size": f"trained {HEAD}", "variant": "mopl", "ms": 11.0}]
    rows = rows_of({"logprob-head": {"results": ours}, "logprob-heavy": {"results": heavy}}, "logprob-")
    assert rows[f"trained {HEAD}", "mopl"]["ms"] == 10.0


def test_pictures_are_drawn_whoever_is_missing(tmp_path: Path) -> None:
    """One mode alone, a peer without errors, a loss without torch.compile."""
    pytest.importorskip("matplotlib")
    from bench.pictures import picture

    (tmp_path / "logprob-head.json").write_text(results(results=head_rows("frozen")))
    rows = [
        {"size": f"listnet m=1 K={k}", "variant": name, "ms": 1.0, "of bytes": 0.5}
        for name in ("mopl", "log_softmax") for k in (2, 8)
    ]  # fmt: skip
    assert PICTURES["lists"][0](tmp_path) is None, "nothing was measured"
    (tmp_path / "lists.json").write_text(results(results=rows))
    for choose, draw in PICTURES.values():
        drawn = choose(tmp_path)
        assert drawn and picture(draw(drawn), fingerprint(drawn)).startswith(b"\x89PNG")
    assert PICTURES["lists"][0](tmp_path)["listnet"] == {name: [(2, 0.5), (8, 0.5)] for name in ("mopl", "log_softmax")}


def test_pages_of_the_list_losses(tmp_path: Path) -> None:
    """Each peer has a goal and a multiple; a row that two stages have is that of the stage with the bytes."""
    rows = [
        {"size": f"plackett-luce m=1 K={k}", "variant": name, "ms": ms, "ns": ms / 10, "x mopl": x, "of bytes": share}
        for k, factor in ((2, 0.5), (64, 1.0))
        for name, ms, x, share in (
            ("mopl", 1.0, 1.0, 0.9 * factor), ("mopl, sorting", 2.0, 2.0, 0.4 * factor),
            ("cumsum (unsafe)", 0.5, 0.5, 0.9), ("allRank listMLE", 3.0, 1.5 * factor, 0.2),
        )
    ]  # fmt: skip
    compiled = [
        {"size": "plackett-luce m=1 K=64", "variant": name, "ms": 7.0, "ns": 0.7, "x mopl": 7.0}
        for name in ("mopl", "torch.compile of logcumsumexp")
    ]
    (tmp_path / "lists.json").write_text(results(results=rows))
    (tmp_path / "lists-compiled-pl.json").write_text(results(results=compiled))
    text = summary(tmp_path)
    assert "### Goals" in text and "goal" not in section(tmp_path).lower(), "goals are for those who develop"
    goals = [line for line in text.split("\n") if line.startswith("| Plackett–Luce: ")]
    assert goals == [
        "| Plackett–Luce: share of its bytes | ≥ 0.80 for K ≥ 32 | 0.90 at K=64, 0.90 at best | met |",
        "| Plackett–Luce: time of allRank listMLE over mopl's | ≥ 1.00 at every K | 0.75 at K=2, 1.50 at best "
        "| **missed** |",
        "| Plackett–Luce: time of torch.compile of logcumsumexp over mopl's | ≥ 1.00 at every K | 7.00 at K=64, "
        "7.00 at best | met |",
    ]
    for line in (
        "|  | K=2 | K=64 |", "| mopl, ns an item and objective | 0.1000 | 0.1000 |",
        "| mopl, share of its bytes | 0.45 | 0.90 |", "| mopl, sorting, share of its bytes | 0.20 | 0.40 |",
        "| cumsum (unsafe), × mopl | 0.50 | 0.50 |", "| torch.compile of logcumsumexp, × mopl |  | 7.00 |",
    ):  # fmt: skip
        assert line in text, line
    short = (
        "Plackett–Luce, forward + backward, lists of 2 to 64 items: 0.45 to 0.90 of the bytes. Times of the others, "
    )
    assert f"{short}as multiples: 7.00 to 7.00 torch.compile of logcumsumexp; 0.75 to 1.50 allRank" in in_short(
        tmp_path
    )


def test_the_list_losses_that_are_drawn_are_measured() -> None:
    from bench.lists import variants

    for loss, names in LISTS.items():
        assert set(names) <= set(variants(loss, 1)), loss
