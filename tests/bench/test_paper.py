"""The papers' experiments as commands: from data in the public formats to table and picture, on tiny models."""

import json
import math
import shutil
from pathlib import Path

import pytest
import tiny_language_models as tiny
import torch
import transformers

pytest.importorskip("peft")
pytest.importorskip("moocore")
pytest.importorskip("matplotlib")
pytest.importorskip("rouge_score")

from bench.paper import clp_summary, estimate, mslr, samples, tables
from bench.paper.__main__ import build_parser, main, planned
from mopl import _terminal
from mopl.experiments.run import read_any, run_fronts
from mopl.experiments.run_lock import locked

TINY_RANKER = (
    "--hidden 8 --base-hidden 8 --layers 1 --base-layers 1 --heads 1 --steps 4 --base-steps 4 --bootstrap 0"
).split()
TINY_CLP = (
    "--steps 1 --prompts-per-step 2 --samples-per-prompt 2 --max-new-tokens 4 --eval-prompts 2 --normalize-prompts 2"
    " --points 2 --bootstrap 0 --samples 1 --words 30 --normalize none"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of the three data sets, and a language model that knows their letters."""
    folder = tmp_path_factory.mktemp("paper")
    samples.mslr(folder / "mslr", queries=6, items=6)
    samples.safe_rlhf(folder / "safe-rlhf.jsonl", pairs=40)
    samples.xsum(folder / "xsum.jsonl", documents=20)
    with (folder / "xsum.jsonl").open("a") as file:  # as some of XSum's are
        file.write(json.dumps({"document": " ", "summary": "Nothing.", "id": "1"}) + "\n")
    words = [*samples.PLAIN, *samples.DETAILED, *samples.CAREFUL, *samples.RASH, *samples.ASIDES, *samples.PLACES]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.merging(words, tiny.SPECIAL[:4]), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>",
    )  # fmt: skip
    tiny.build("gpt2", len(tokenizer), max_position_embeddings=256).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run the command; return its status and what it printed."""
    status = main([str(word) for word in words])
    found = capsys.readouterr()
    return status, found.out, found.err


def figures(out: Path, group: str) -> dict:
    """Return our figures, without the times."""
    found = json.loads((out / "table.json").read_text())["tables"][group]["figures"]
    return {row: {k: v for k, v in entry.items() if k != "seconds"} for row, entry in found.items()}


@pytest.fixture
def no_pictures_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes longer than these runs: the pictures of each of them."""
    pixel = tables.FIGURES.parents[2] / "docs/pictures/hypervolume.png"
    monkeypatch.setattr("mopl.report.plot_front", lambda fronts, path, **how: shutil.copy(pixel, path))


def test_mslr_goes_on_where_it_was_stopped_and_ends_with_the_same_figures(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_pictures_of_runs
) -> None:
    def words(out: str, *folds: int) -> list[object]:
        return ["mslr", data / "mslr", "--out", tmp_path / out, "--groups", "pair", "--folds", *folds, *TINY_RANKER]

    status, printed, _ = said(capsys, *words("whole", 1, 2))
    assert status == 0 and "2 of 2 runs to do: about" in printed

    told = _terminal.say

    def stop(*lines: str, **how: object) -> None:
        if any(line.startswith("modpo 0.3-0.7") for line in lines) and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        told(*lines, **how)

    monkeypatch.setattr(_terminal, "say", stop)
    status, _, complaint = said(capsys, *words("cut", 1))
    assert status == 130 and "the same command goes on" in complaint
    assert not (tmp_path / "cut/table.md").exists()
    half = tmp_path / "cut/runs/pair-fold1/dpo-ls/front.json"
    before = half.stat().st_mtime_ns
    assert said(capsys, *words("cut", 1))[0] == 0
    assert half.stat().st_mtime_ns == before, "what was finished is not done again"
    own, cut = figures(tmp_path / "whole", "pair"), figures(tmp_path / "cut", "pair")
    assert [entry["points"][0] for entry in own.values()] == [entry["points"][0] for entry in cut.values()]

    fronts = [run_fronts(tmp_path / f"whole/runs/pair-fold{fold}") for fold in (1, 2)]
    volumes = [next(f.hypervolume for f in each if f.method == "dpo-soup") for each in fronts]
    assert volumes[0] != volumes[1], "the folds are other data"
    assert own["dpo-soup"]["hypervolume"] == pytest.approx(sum(volumes) / 2)
    assert own["dpo-soup"]["hypervolume_spread"] == pytest.approx(abs(volumes[0] - volumes[1]) / 2)
    text = (tmp_path / "whole/table.md").read_text()
    assert "none is at hand" in text and "0.1444 and 0.1474" in text
    assert "30 queries in a fold, 2 of its folds" in text

    # A third time there is nothing to do, and with other options it is another experiment.
    status, printed, complaint = said(capsys, *words("whole", 1, 2), "--log-every", 3)
    assert status == 0 and "to do" not in printed and "run 1 of" not in printed, complaint
    for more, what in (
        (["--seed", 1], "seed was not given, is 1"), (["--points", 12], "points was not given, is 12"),
        (["--small"], "small was False, is True"),
    ):  # fmt: skip
        status, _, complaint = said(capsys, *words("whole", 1, 2), *more)
        assert status == 2 and "was begun otherwise" in complaint and what in complaint
    with (data / "mslr/Fold2/test.txt").open("a") as file:
        file.write(" \n")
    complaint = said(capsys, *words("whole", 1, 2))[2]
    assert "Fold2/test.txt is another file" in complaint


def test_mslr_with_five_objectives_stands_under_table_1(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_pictures_of_runs
) -> None:
    words = ["mslr", data / "mslr", "--out", tmp_path, "--groups", "five", "--folds", 1, *TINY_RANKER]
    assert said(capsys, *words)[0] == 0
    text = (tmp_path / "table.md").read_text()
    assert text.index("| weight-cos-dpo | 0.002039 | 0.432 ± 0.028 | 4,043 | 50,432 |") < text.index("| dpo-soup | 0.")
    assert "Figures of a sample, not of the paper's data" in text
    assert (tmp_path / "five.png").read_bytes()[:4] == b"\x89PNG"
    run = read_any(tmp_path / "runs/five-fold1")
    assert (len(run.objectives), len(run.grid), run.config.parametrisation) == (5, 11, "scratch")
    done = [f for f in run.path.rglob("training.json") if f.parent.name != "base"]
    plan = planned(build_parser().parse_args([str(word) for word in words]))
    assert estimate.trainings(plan.jobs[0], run) == len(done) == 24


def test_the_queries_of_a_sample_are_the_first_of_each_file(data: Path, tmp_path: Path) -> None:
    words = ["mslr", str(data / "mslr"), "--out", str(tmp_path / "out"), "--queries", "2", *TINY_RANKER]
    assert main([*words, "--plan", "--groups", "pair", "--folds", "1"]) == 0
    for name in ("train", "vali", "test"):
        whole = (data / f"mslr/Fold1/{name}.txt").read_text().splitlines()
        part = (tmp_path / f"out/data/Fold1/{name}.txt").read_text().splitlines()
        assert part == whole[: len(part)]
        assert len({line.split()[1] for line in part}) == 2 != len({line.split()[1] for line in whole[: len(part) + 1]})
    assert not (tmp_path / "out/runs").exists(), "--plan ends before the first run"
    words[words.index("2")] = "3"  # nothing is trained yet, so another number is no other experiment
    assert main([*words, "--plan", "--groups", "pair", "--folds", "1"]) == 0
    part = (tmp_path / "out/data/Fold1/test.txt").read_text().splitlines()
    assert len({line.split()[1] for line in part}) == 3


def test_missing_folds_and_files_are_named_before_anything_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "mslr"
    shutil.copytree(data / "mslr", broken)
    (broken / "Fold2/vali.txt").unlink()
    shutil.rmtree(broken / "Fold5")
    command = ["mslr", broken, "--out", tmp_path / "out"]
    status, _, complaint = said(capsys, *command)
    assert status == 2 and "lacks Fold2/vali.txt, Fold5" in complaint
    (broken / "Fold4/test.txt").write_text("2 qid:1 1:0.5 46:1\n")
    status, _, complaint = said(capsys, *command, "--folds", 1, 3, 4)
    assert status == 2 and "Fold4/test.txt has 46 columns in its first line but MSLR has 136" in complaint
    (broken / "Fold4/test.txt").write_text("1,2,3\n")
    assert "a line of MSLR is LABEL qid:QUERY" in said(capsys, *command, "--folds", 4)[2]
    assert not (tmp_path / "out").exists()


def test_safe_rlhf(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in (data / "safe-rlhf.jsonl").read_text().splitlines()]
    folder = tmp_path / "PKU-SafeRLHF/data"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    out = tmp_path / "out"
    status, printed, _ = said(
        capsys, "safe-rlhf", folder.parent, "--out", out, "--model", data / "model", "--steps", 1, "--points", 2,
        "--bootstrap", 0, "--max-length", 128, "--lists-per-batch", 4,
    )  # fmt: skip
    assert status == 0 and "1 of 1 runs to do" in printed
    run = read_any(out / "runs/all")
    assert run.objectives == ("helpful", "harmless")
    assert (run.config.beta, run.config.virtual_tokens, run.config.lora_rank) == ((0.1,), 8, 4)
    assert run.config.reference_point == (1.1, 1.1)
    own = figures(out, "safe-rlhf")
    assert own["base"]["hypervolume"] == pytest.approx((1.1 - math.log(2)) ** 2, rel=1e-4)
    text = (out / "table.md").read_text()
    assert "| weight-cos-dpo | 0.1942 | – | 1,397 | – |" in text and "0.1687" not in text
    assert "| weight-cos-dpo | 0.1942" in text.partition("Figures of a sample")[0]
    disagree = sum(row["better_response_id"] != row["safer_response_id"] for row in rows) / len(rows)
    train, test = (run.record["data"]["splits"][name]["lists"] for name in ("train", "test"))
    assert f"{train} pairs to train on and {test} held out of 40 ({disagree:.0%} of which" in text
    assert "model: model, where the paper's figures are of gpt2" in text
    assert (out / "safe-rlhf.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("safer_response_id"), "line 3 has no safer_response_id (it has prompt, response_0"),
        (lambda row: row.update(better_response_id=2), "row 3 has better_response_id 2 but it must be 0 or 1"),
        (lambda row: row.update(response_1=" "), "mend these rows, or pass --on-error skip"),
        (lambda row: row.update(response_1=None), "line 3: response_1 is 'None', which PKU-SafeRLHF cannot have"),
    ],
)
def test_a_row_that_is_wrong_is_named(
    change, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (data / "safe-rlhf.jsonl").read_text().splitlines()]
    change(rows[2])
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, complaint = said(capsys, "safe-rlhf", tmp_path, "--out", tmp_path / "out")
    assert status == 2 and message in complaint
    assert not (tmp_path / "out").exists()


def test_labels_that_never_disagree_have_no_trade_off(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (data / "safe-rlhf.jsonl").read_text().splitlines()]
    for row in rows:
        row["safer_response_id"] = row["better_response_id"]
    file = tmp_path / "same.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "there is no trade-off" in said(capsys, "safe-rlhf", file, "--out", tmp_path / "out")[2]


def test_clp_summary(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["clp-summary", data / "xsum.jsonl", "--out", out, "--model", data / "model", "--two", "rouge", "brevity"]
    status, printed, _ = said(capsys, *words, "--scopes", "attention", "--kl-weights", 0.05, 0.5, *TINY_CLP)
    assert status == 0 and "2 of 2 runs to do" in printed
    two, one = read_any(out / "runs/two-rewards-attention"), read_any(out / "runs/one-reward-attention")
    assert two.config.kl_weight == (0.01,) and two.objectives == ("rouge", "brevity")
    assert one.config.kl_weight == (0.05, 0.5) and one.objectives == ("rouge",)
    done = [f for f in two.path.rglob("training.json") if json.loads(f.read_text())["steps"]]
    options = build_parser().parse_args([*map(str, words), "--scopes", "attention", *TINY_CLP])
    assert estimate.trainings(planned(options).jobs[0], two) == len(done) == 4

    content = json.loads((out / "table.json").read_text())["tables"]
    assert [row[:2] for row in content["one-reward"]["ours"]] == [
        ["attn-CLP", "0.05"], ["attn-CLP", "0.5"], ["dera", "0.05"], ["dera", "0.5"], ["prompting", "0.05"],
        ["prompting", "0.5"], ["one expert", "0.05"], ["base", "–"],
    ]  # fmt: skip
    points = run_fronts(one.path)[1].points
    assert [each["kl"] for each in content["one-reward"]["figures"]["attn-CLP"]] == [point.main for point in points]
    assert [row[0] for row in content["two-rewards"]["ours"]] == [
        "attn-CLP", "rewarded-soups", "prompting", "logit-mixing", "base",
    ]  # fmt: skip
    text = (out / "table.md").read_text()
    assert text.count("none is at hand") == 2 and "The paper's figures (" not in text
    assert "18 documents to train on and 2 held out, cut to 30 words" in text
    assert "1 rows without a text" in text
    for group in ("two-rewards", "one-reward"):
        assert (out / f"{group}.png").is_file()

    # ROUGE compares with the summary of the document that was asked about.
    row = json.loads((data / "xsum.jsonl").read_text().splitlines()[3])
    asked = clp_summary.prompt_of(row["document"], 30)
    options = build_parser().parse_args([*map(str, words), "--words", "30"])
    rewards = clp_summary.rewards(("rouge",), options)
    assert rewards([row["summary"], "nothing alike"], [asked, asked])[:, 0].tolist() == [1.0, 0.0]


def test_nli_judges_the_document_and_not_the_prompt(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["clp-summary", str(data / "xsum.jsonl"), "--out", str(tmp_path), "--words", "5"]
    assert "--model is missing" in said(capsys, *words)[2]
    words += ["--model", str(data / "model")]
    assert "name one with --nli MODEL" in said(capsys, *words)[2]
    options = build_parser().parse_args([*words, "--nli", "JUDGE"])
    seen: dict[str, object] = {}

    def classifier(directory: str, **how: object):
        seen.update(directory=directory, **how)

        def judge(texts: list[str], documents: list[str]) -> torch.Tensor:
            seen["documents"] = list(documents)
            return torch.zeros(len(texts))

        return judge

    monkeypatch.setattr(clp_summary, "ClassifierReward", classifier)
    plan = planned(options)
    clp_summary.write_data(plan, options)
    row = json.loads((data / "xsum.jsonl").read_text().splitlines()[0])
    plan.jobs[0].rewards()(["text"], [clp_summary.prompt_of(row["document"], 5)])
    assert seen["documents"] == [row["document"]] and len(row["document"].split()) > 5
    assert (seen["directory"], seen["label"], seen["inputs"]) == ("JUDGE", "entailment", "pair")


def test_every_figure_of_a_paper_has_its_place_there() -> None:
    known = json.loads(tables.FIGURES.read_text())
    assert set(known["mslr"]) == set(mslr.GROUPS)
    for groups in known.values():
        for entry in groups.values():
            assert "arXiv" in entry["source"]
            assert bool(entry["rows"]) == ("table" in entry["source"]), "figures are read from tables"
            for row in entry["rows"].values():
                assert row.keys() <= {"hypervolume", "main", "main_spread", "seconds", "parameters"}
    assert not known["clp-summary"]["two-rewards"]["rows"], "no figure of CLP was at hand"


def test_what_the_experiment_sets_is_no_option(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["safe-rlhf", data / "safe-rlhf.jsonl", "--out", tmp_path / "out"]
    assert "--objectives is set by the experiment" in said(capsys, *command, "--objectives", "a", "b")[2]
    with locked(tmp_path / "out"):
        assert "is in use by" in said(capsys, *command, "--model", data / "model")[2]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("")
    status, _, complaint = said(capsys, *command, "--model", data / "model", "--plan")
    assert status == 2 and "holds files of something else" in complaint


def test_samples_are_in_the_public_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "sample", tmp_path / "new")[0] == 0
    assert set(mslr.check_folds(tmp_path / "new/mslr", mslr.FOLDS)) == set(mslr.FOLDS)
    assert "is not empty" in said(capsys, "sample", tmp_path / "new")[2]


def test_splits_of_mslr_may_be_in_parts(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for fold in (1, 2):
        folder = tmp_path / f"mslr/Fold{fold}"
        shutil.copytree(data / f"mslr/Fold{fold}", folder)
        lines = (folder / "train.txt").read_text().splitlines(keepends=True)
        cut = next(n for n, line in enumerate(lines) if line.split()[1] != lines[0].split()[1])
        (folder / "train.txt").unlink()
        (folder / "train").mkdir()
        (folder / "train/part-0.txt").write_text("".join(lines[:cut]))  # the first query alone
        (folder / "train/part-1.txt").write_text("".join(lines[cut:]))
    words = ["mslr", tmp_path / "mslr", "--out", tmp_path / "out", "--folds", 1, 2]
    options = build_parser().parse_args([*map(str, words), "--queries", "2"])
    plan = planned(options)
    plan.begin()
    names = json.loads((tmp_path / "out/experiment.json").read_text())["data"]
    assert {"Fold1/train/part-1.txt", "Fold2/train/part-1.txt", "Fold2/vali.txt"} < set(names) and len(names) == 8
    mslr.write_data(plan, options)
    part = (tmp_path / "out/data/Fold2/train.txt").read_text()
    assert part == "".join(lines[: part.count("\n")]) and len({line.split()[1] for line in part.splitlines()}) == 2

    second = tmp_path / "mslr/Fold2/train/part-1.txt"
    second.write_text("2 qid:9 1:0.5 46:1\n")
    assert "part-1.txt has 46 columns" in said(capsys, *words)[2]
    second.write_bytes(b"\xff" + second.read_bytes())
    assert "Fold2/train/part-1.txt:1: its byte 1 (0xff) is not UTF-8" in said(capsys, *words)[2]
    second.rename(second.with_suffix(".txt.gz"))
    assert "part-1.txt.gz: the compressed file" in said(capsys, *words)[2]
    (tmp_path / "mslr/Fold1/train.txt").write_text("2 qid:9 1:0.5\n")
    assert "two files for train" in said(capsys, *words)[2], "and not that it lacks them"


@pytest.mark.parametrize(
    "words",
    [
        ("mslr", "--folds", 1, 2, 1), ("mslr", "--groups", "five", "five"), ("clp-summary", "--scopes", "full", "full"),
        ("clp-summary", "--groups", "one-reward", "one-reward"), ("clp-summary", "--kl-weights", 1, 2, 1.0),
    ],
)  # fmt: skip
def test_nothing_is_counted_twice(words: tuple, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / ("mslr" if words[0] == "mslr" else "xsum.jsonl")
    complaint = said(capsys, words[0], path, "--out", tmp_path / "out", *words[1:])[2]
    assert f"{words[1]} names {words[-1]} more than once" in complaint


def test_one_reward_twice_is_no_two(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "clp-summary",
        data / "xsum.jsonl",
        "--out",
        tmp_path,
        "--model",
        data / "model",
        "--two",
        "rouge",
        "rouge",
    ]
    assert "--two names rouge twice" in said(capsys, *words, "--groups", "two-rewards")[2]


def test_all_rows_that_are_counted_are_those_that_train(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (data / "safe-rlhf.jsonl").read_text().splitlines(keepends=True)
    words = ["safe-rlhf", tmp_path, "--out", tmp_path / "out", "--limit", 8]
    (tmp_path / "train-0.jsonl").write_text("".join(lines[:20]))
    (tmp_path / "trainings.jsonl").write_text("".join(lines[20:]))  # which is no name of a split to `datasets`
    assert "has 40 rows in train-0.jsonl, trainings.jsonl, but 20 are read" in said(capsys, *words)[2]
    (tmp_path / "trainings.jsonl").rename(tmp_path / "train-1.jsonl")
    (job,) = planned(build_parser().parse_args([*map(str, words)])).jobs
    assert job.lists == 8
    (tmp_path / "train-2.parquet").write_bytes(b"junk")
    assert "has train-0.jsonl and train-2.parquet, files of two formats" in said(capsys, *words)[2]
    words[1] = tmp_path / "train-2.parquet"
    assert "train-2.parquet cannot be read as parquet" in said(capsys, *words)[2]


def test_labels_are_compared_as_they_are_read(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (data / "safe-rlhf.jsonl").read_text().splitlines()]
    for row in rows:
        row.update(better_response_id="1 ", safer_response_id=1)
    file = tmp_path / "same.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "there is no trade-off" in said(capsys, "safe-rlhf", file, "--out", tmp_path / "out")[2]


def test_line_separators_inside_a_text_end_no_row(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (data / "xsum.jsonl").read_text().splitlines()]
    rows[0]["summary"] += "\u2028more"
    rows[1]["document"] = "a\x1cb \x85" + rows[1]["document"]
    file = tmp_path / "xsum.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["clp-summary", file, "--out", tmp_path / "out", "--model", data / "model", "--two", "rouge", "brevity"]
    options = build_parser().parse_args([str(word) for word in words])
    plan = planned(options)
    clp_summary.write_data(plan, options)
    asked = clp_summary.prompt_of(rows[0]["document"], 250)
    assert clp_summary.rewards(("rouge",), options)([rows[0]["summary"]], [asked]).tolist() == [[1.0]]
    rows[2]["document"] += "\ud83d"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "xsum.jsonl line 3: document holds U+D83D" in said(capsys, *words)[2]


def test_what_a_finished_run_may_have_otherwise_is_no_setting_of_its_table(data: Path, tmp_path: Path) -> None:
    words = ["clp-summary", data / "xsum.jsonl", "--out", tmp_path / "out", "--model", data / "model", "--two", "rouge"]
    words += ["brevity", "--steps", 4]
    planned(build_parser().parse_args([*map(str, words)])).begin()
    (tmp_path / "out/runs").mkdir()
    plan = planned(build_parser().parse_args([*map(str, words), "--log-every", "2", "--log-samples", "1"]))
    plan.begin()
    assert tables.settings_given(plan) == [f"settings that were given: model {data / 'model'}, steps 4"]
