"""The command line: what it promises in its help, one-line errors, exit codes, and the same work under a launcher."""

import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from damage import error_of
from launching import launch_by_accelerate, launch_mopl

import mopl
from mopl.cli import as_flags, build_parser, main
from mopl.experiments import run_fronts
from mopl.ranking.methods import ListSource

DATA = "synthetic:queries=60,items=6,features=8,objectives=2"
TINY = [
    "--data", DATA, "--hidden", "8", "--base-hidden", "8", "--heads", "2", "--steps", "4", "--base-steps", "3",
    "--batch-size", "8", "--bootstrap", "10", "--points", "3", "--checkpoint-every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["rank", "--run", str(path), *TINY]) == 0
    return path


@pytest.mark.parametrize("command", ["rank", "steer", "report"])
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    examples = re.findall(r"^ {4}\S.*", out.split("examples:")[1].replace("\\\n", ""), re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example.replace("accelerate launch --num_processes 2 -m mopl", "mopl"))
        build_parser().parse_args(words[words.index("mopl") + 1 :])


@pytest.mark.parametrize("command", ["rank", "align", "clp"])
def test_help_shows_the_options_of_a_first_run_and_help_all_shows_every_one(command, capsys):
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            main([command, flag])
        assert stop.value.code == 0
        shown[flag] = set(re.findall(r"^  (--[\w-]+)", out := capsys.readouterr().out, re.MULTILINE))
        if flag == "--help":
            more = int(re.search(rf"^(\d+) more options: mopl {command} --help-all$", out, re.MULTILINE)[1])
    assert len(shown["--help"]) <= 25 and {"--data", "--steps", "--run", "--quiet"} <= shown["--help"]
    assert shown["--help"] < shown["--help-all"]
    assert len(shown["--help-all"] - shown["--help"]) in (more, more + 1)  # a command's options of one line


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"    {name} " in out for name in ("rank", "align", "clp", "generate", "serve", "doctor"))
    assert "mopl align --demo" in out and "https://" in out and max(map(len, out.splitlines())) <= 80


def test_version_and_help_do_not_import_torch():
    code = "import sys; from mopl.cli import build_parser; build_parser(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for module in ("mopl", "mopl.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
        assert done.stdout == f"mopl {mopl.__version__}\n" and done.returncode == 0


def test_the_command_is_installed_under_its_name():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="mopl")
    assert entry.load() is main


def test_rank_prints_the_table_and_what_to_do_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["rank", *TINY]) == 0
    out, err = capsys.readouterr()
    path = Path("runs/rank-synthetic-weight-cos-dpo-1")
    assert (path / "table.txt").read_text().splitlines()[0] in out
    assert "nats above the optimum" in out and "Traceback" not in err
    (hint,) = (line.strip() for line in out.splitlines() if line.startswith("  mopl steer"))
    assert out.splitlines()[-1] == f"open {path}/report.html in a browser: every trade-off of this run"
    assert main(hint.split("    ")[0].split()[1:]) == 0


def test_quiet_leaves_results_warnings_and_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["rank", *TINY, "--quiet"]) == 0
    out, err = capsys.readouterr()
    path = Path("runs/rank-synthetic-weight-cos-dpo-1")
    table = (path / "table.txt").read_text()
    assert out == f"{table}\nopen {path}/report.html in a browser: every trade-off of this run\n" and not err
    assert main(["rank", "--run", str(path), "--resume", "--steps", "7", "--quiet"]) == 2
    assert "was started with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rank", "--steps", "many"], "error: --steps is 'many' but must be a whole number; see mopl rank --help"),
        (["rank", "--learning-rate", "1e-3,"], "error: --learning-rate is '1e-3,' but must be a number; see"),
        (["rank", "--beta", "a", "b"], "--beta is 'a' but must be numbers; write nothing but them, such as --beta 0.7"),
        (["rank", "--beta-range", "1.5"], "argument --beta-range: expected 2 arguments"),
        (["rank", "--method", "ppo"], "error: --method is 'ppo' but must be one of weight-cos-dpo, temperature-cos"),
        (["rank", "--method", "weight-cosdpo"], "all (did you mean weight-cos-dpo?)"),
        (["rnak"], "mopl: error: there is no command 'rnak' (did you mean rank?); commands are rank, steer, "),
        (["steer", "x", "--weights", "a=0.7", "b=0.3"], "--weights is 'a=0.7' but must be numbers; write nothing but"),
        (["steer", "--weights", "runs/x"], "--weights is 'runs/x' but must be numbers; write nothing but them, such "),
        (["steer", "x", "--weights", "--quiet"], "argument --weights: expected at least one argument"),
        (["--quiet", "rank"], "mopl rank: error: --quiet belongs behind the command: mopl rank --quiet ..."),
        (["rank", "--stepz", "3"], "mopl rank: error: unrecognized arguments: --stepz 3 (did you mean --steps?)"),
        (["steer", "x", "--weights", "1", "--zzz"], "unrecognized arguments: --zzz; see mopl steer"),
        (["rank", "--data", "travle"], "travle: there is no such file or folder, nor an embedded data set"),
        (["rank", "--steps", "0"], "mopl rank: --steps is 0 but must be at least 1"),
        (["rank", "--base-steps", "0"], "mopl rank: --base-steps is 0 but must be at least 1"),
        (["align", "--steps", "0", "--model", "m", "--data", "d"], "mopl align: --steps is 0 but must be at least 1"),
        (["rank", "--empty", "2"], "'2' is not skip, 0 or 1"),
        (["rank", "--concentration", "-1"], "mopl rank: --concentration is -1 but must be positive and finite"),
        (["rank", "--resume"], "--resume needs the run to continue; name it with --run"),
        (["rank", "--run", "none", "--resume"], "there is no run at none: it has no config.json"),
        (["rank", "--data", "missing.txt"], "missing.txt"),
        (["rank", "--data", "synthetic:lists=3"], "has no option lists"),
        (["steer", "none", "--weights", "1"], "mopl steer: there is no run at none"),
        (["report", "none"], "mopl report: there is no run at none"),
        (["report", "none", "--png", "x.foo"], "x.foo cannot be the picture: .png is the only known"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_a_remedy_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(arguments, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written", ["0.7 0.3", "0.7,0.3", "'0.7 0.3'", "'0.7, 0.3'", "0.7, 0.3", "=0.7,0.3"])
def test_numbers_of_an_option_have_spaces_or_commas_between_them(written):
    def parsed(command, option, *more):
        words = shlex.split(f"{command} {option}{'' if written[0] == '=' else ' '}{written}")
        return build_parser().parse_args([*words, *more])

    asked = parsed("generate run", "--weights", "1, 2, 3, go", "4 5")
    assert asked.weights == [0.7, 0.3] and asked.prompts == ["1, 2, 3, go", "4 5"]
    assert parsed("steer", "--beta", "run", "--weights", "1").beta == [0.7, 0.3]
    assert parsed("rank", "--beta-range").beta_range == [0.7, 0.3] and parsed("rank", "--scales").scales == [0.7, 0.3]
    with pytest.warns(FutureWarning, match="is called --beta now"):
        assert parsed("serve", "--objective-temperature", "run").beta == [0.7, 0.3]


@pytest.mark.parametrize(
    ("words", "weights", "prompts"),
    [
        (["--weights", "0.7", "0.3", "1, 2, 3"], [0.7, 0.3], ["1, 2, 3"]),  # a prompt of numbers
        (["--weights", "0.7", "0.3", "1,2,3"], [0.7, 0.3], ["1,2,3"]),
        (["--weights=1", "42"], [1.0], ["42"]),  # what = gives ends there
        (["--weights=0.7,0.3", "42"], [0.7, 0.3], ["42"]),
        (["--weights", "0.7", ",", "0.3", "Hi"], [0.7, 0.3], ["Hi"]),
        (["--weights", "0.7", ",0.3", "Hi"], [0.7, 0.3], ["Hi"]),
        (["--weights", "1e0", "-0e-3", "Hi"], [1.0, 0.0], ["Hi"]),
        (["--weights", "0.7", "0.3", "--", "-5 degrees"], [0.7, 0.3], ["-5 degrees"]),
    ],
)
def test_numbers_end_where_a_prompt_begins(words, weights, prompts):
    asked = build_parser().parse_args(["generate", "run", *words])
    assert (asked.run, asked.weights, asked.prompts) == ("run", weights, prompts)


def test_negative_numbers_have_any_form_and_a_run_may_be_called_by_a_number():
    given = ["align", "--model", "m", "--data", "d"]
    for words in (["--reference-point=-1e3,-inf"], ["--reference-point", "-1e3", "-inf"]):
        assert build_parser().parse_args([*given, *words]).reference_point == [-1000.0, -float("inf")]
    assert build_parser().parse_args(["steer", "--beta=0.5", "2024", "--weights", "1"]).run == "2024"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("", "--weights is missing; pass one number for each objective: --weights 0.5 0.5 (aux1, aux2);"),
        (
            "--weights 1",
            "--weights has 1 number but there are 2 objectives: aux1, aux2; pass one for each",
        ),
        ("--weights 70 30", "--weights is 70 30, of the sum 100, but must sum to 1; pass --weights 0.7 0.3;"),
        ("--weights 1 2", "--weights is 1 2, of the sum 3, but must sum to 1; pass --weights 0.333 0.667;"),
        (
            "--weights 1.5,-0.5",
            "--weights is 1.5 -0.5 but must be shares of 1, none below 0; pass such as --weights 0.5",
        ),
        ("--weights nan 1", "--weights is nan 1 but must be shares of 1"),
        ("--weights 0 0", "--weights is 0 0 but must be shares of 1"),
    ],
)
def test_weights_that_are_no_trade_off_get_the_option_that_is_right(run, capsys, monkeypatch, weights, message):
    monkeypatch.setattr("mopl.ranking.runs.load_splits", lambda config: pytest.fail("data were read"))
    assert message.removesuffix(";") in error_of(["steer", str(run), *weights.split()], capsys)


def test_an_existing_run_is_an_error_that_names_the_three_ways_out(run, capsys):
    message = error_of(["rank", "--run", str(run), *TINY], capsys)
    assert "--resume" in message and "--overwrite" in message and "another with --run" in message


def test_debug_shows_where_an_error_came_from(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["rank", "--run", str(tmp_path / "none"), "--resume", "--debug"])


def test_a_fault_of_ours_is_named_as_one(run, capsys, monkeypatch):
    def fail(*_, **__):
        raise KeyError("weights")

    monkeypatch.setattr("mopl.ranking.steer.steer", fail)
    assert "mopl steer: KeyError: 'weights'" in error_of(["steer", str(run), "--weights", "1", "0"], capsys)


def test_ctrl_c_exits_with_130_and_the_command_that_continues(tmp_path, capsys, monkeypatch):
    path, calls, real = tmp_path / "run", iter(range(10**6)), ListSource.__call__

    def call(self, step, rank, world_size):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step, rank, world_size)

    with monkeypatch.context() as patch:
        patch.setattr(ListSource, "__call__", call)
        assert main(["rank", "--run", str(path), *TINY]) == 130
    err = capsys.readouterr().err
    assert err == f"mopl: stopped in 'weight-cos-dpo' after step 3; continue with: mopl rank --run {path} --resume\n"
    assert main(err.split("continue with: mopl ")[1].split()) == 0
    assert (path / "front.json").is_file()


def test_a_resumed_run_takes_its_own_settings_and_refuses_others(run, capsys):
    assert main(["rank", "--run", str(run), "--resume", "--log-every", "1"]) == 0
    capsys.readouterr()
    assert "steps was 4, is 9" in error_of(["rank", "--run", str(run), "--resume", "--steps", "9"], capsys)


def test_steer_prints_the_figures_and_writes_the_scores(run, tmp_path, capsys):
    arguments = ["steer", "--weights", "0.25", "0.75", str(run), "--scale", "2"]
    assert main([*arguments, "--output", str(tmp_path / "s.tsv")]) == 0
    title, header, base, trained, moved, written = capsys.readouterr().out.splitlines()
    assert (
        "weight-cos-dpo" in title and "NDCG@10" in title and header.split() == ["relevance", "(main)", "aux1", "aux2"]
    )
    assert base.startswith("base model") and trained.startswith("weights 0.25 0.75, scale 1 ") and "scale 2" in moved
    assert written.endswith("s.tsv") and (tmp_path / "s.tsv").is_file()
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["weights"] == [0.25, 0.75] and figures["scale"] == 2.0
    assert f"{figures['rows']['base model']['main']:.4f}" in base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "0.5", "0.5", "--scale", "-1"], "scale is -1 but must be positive"),
        (["--weights", "0.5", "0.5", "--beta", "1", "1"], "trained at one β; pass scale"),
        (["--weights", "0.5", "0.5", "--method", "dpo-ls"], "has no dpo-ls; it has weight-cos-dpo"),
    ],
)  # fmt: skip
def test_steer_refuses_what_makes_no_sense(run, capsys, arguments, message):
    assert message in error_of(["steer", str(run), *arguments], capsys)


def test_report_makes_a_runs_files_again(run, capsys):
    before = (run / "table.txt").read_bytes()
    for name in ("table.txt", "front.png", "report.html"):
        (run / name).unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == before.decode()
    assert (run / "table.txt").read_bytes() == before
    assert (run / "front.png").is_file() and (run / "report.html").is_file()


@pytest.mark.distributed
def test_two_processes_reach_the_front_of_one(run, tmp_path):
    command = ["rank", "--run", str(tmp_path / "two"), *TINY]
    done = launch_mopl(*command, start=launch_by_accelerate)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("nats above the optimum") == 1  # one process speaks
    for ours, theirs in zip(run_fronts(tmp_path / "two"), run_fronts(run), strict=True):
        assert ours.tensors()[1].tolist() == pytest.approx(theirs.tensors()[1].tolist(), abs=5e-3)
    again = launch_mopl(*command)
    assert again.returncode != 0 and "--overwrite" in again.stderr


def test_messages_name_options_as_the_command_line_writes_them():
    said = as_flags("rows 3; pass on_error='skip', max_length=56 or packing=False, or raise held_out", "align")
    assert said == "rows 3; pass --on-error skip, --max-length 56 or --no-packing, or raise --held-out"
    for kept in ("/data/max_length/x.jsonl", "'held_out' is no objective", "the loss is nan", "chat_template=..."):
        assert as_flags(kept, "align") == kept
    assert as_flags("objective_temperature is missing", "generate") == "--beta is missing"
    assert as_flags("max_length=5", "steer") == "max_length=5"
    said = as_flags("temperature is -1 but must be positive; leave out temperature", "generate")
    assert said == "--temperature is -1 but must be positive; leave out temperature"
    assert as_flags("average is 5 but steps is 3", "rank") == "--average is 5 but --steps is 3"
    for kept in ("the model is small", "labels of list 0 hold -1", "steps=x", "no run has steps"):
        assert as_flags(kept, "rank") == kept


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rank", "--steps", "-5"], "--steps is -5 but must be at least 1"),
        (["rank", "--base-steps", "-5"], "--base-steps is -5 but must be at least 1"),
        (["rank", "--weight-decay", "-1"], "--weight-decay is -1.0 but must be at least 0"),
        (["rank", "--k", "0"], "--k is 0 but must be at least 1"),
        (["rank", "--heads", "3", "--hidden", "8"], "--hidden is 8 but --heads is 3, which must divide it"),
        (["serve", "x", "--timeout", "0"], "--timeout is 0 but must be at least 0.001 and below 1e9, in seconds"),
        (["serve", "x", "--grace", "-1"], "--grace is -1 but must be at least 0 and below 1e9, in seconds"),
        (["serve", "x", "--port", "-1"], "--port is -1 but must be from 0 to 65535"),
    ],
)
def test_an_option_out_of_range_is_named_as_it_is_typed_with_a_bound_that_is_allowed(words, said, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err == f"mopl {words[0]}: {said}\n"


def test_what_is_no_run_of_rankers_is_named(run, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    assert main(["steer", str(tmp_path / "model"), "--weights", "1"]) == 2
    assert "is no run of mopl" in capsys.readouterr().err
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "config.json").write_text('{"kind": "align", "config": {}, "data": {}}')
    for command in (["steer", str(tmp_path / "chat"), "--weights", "1"], ["report", str(run), str(tmp_path / "chat")]):
        assert main(command) == 2
        assert "is a run of mopl align, not of mopl rank; name another run or use" in capsys.readouterr().err


def test_what_is_named_for_output_stays_what_it_is(run, tmp_path, capsys):
    (tmp_path / "link").symlink_to("scores.tsv")
    for place in ("/dev/null", str(tmp_path / "link")):
        assert main(["steer", str(run), "--weights", "0.5", "0.5", "--output", place]) == 0
    assert Path("/dev/null").is_char_device() and (tmp_path / "link").is_symlink()
    scores = (tmp_path / "scores.tsv").read_text()
    os.mkfifo(tmp_path / "pipe")
    for command in (
        ["steer", str(run), "--weights", "0.5", "0.5", "--output"],
        ["report", str(run), "--table"],
        ["report", str(run), "--html"],
    ):
        reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
        assert main([*command, str(tmp_path / "pipe")]) == 0
        got = reader.communicate(timeout=20)[0]
        assert got == scores.encode() if command[0] == "steer" else len(got) > 100
    assert (tmp_path / "pipe").is_fifo()


def test_places_that_cannot_be_written_are_named(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for command in (
        ["rank", *TINY, "--run", str(tmp_path / "file" / "run")],
        ["rank", *TINY, "--run", "/proc/self/run"],
        ["report", str(run), "--html", str(tmp_path / "file" / "page.html")],
        ["report", str(run), "--table", str(tmp_path)],
        ["steer", str(run), "--weights", "0.5", "0.5", "--output", str(tmp_path / "nowhere" / "scores.tsv")],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "Errno" not in said and ".writing" not in said and "name a" in said, said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_on_a_relative_path_is_resumed_with_the_same_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [f"{q % 3} qid:{q // 4} 1:{q % 5} 2:{q % 7} 3:{q % 2}" for q in range(80)]
    (tmp_path / "data.txt").write_text("\n".join(rows) + "\n")
    (tmp_path / "data.clicks.txt").write_text("\n".join(str(q % 4) for q in range(80)) + "\n")
    command = ["rank", "--data", "./data.txt", "--objectives", "clicks=@data.clicks.txt", "third=3", "--run", "run",
               "--steps", "1", "--base-steps", "1", "--bootstrap", "0", "--points", "2", "--scales", "--hidden", "8",
               "--base-hidden", "8", "--heads", "2"]  # fmt: skip
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0
    capsys.readouterr()


def test_help_never_breaks_a_name_at_its_hyphens(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("rank", "align", "clp", "generate", "export", "steer", "report"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        options = capsys.readouterr().out.split("options:")[1].split("examples:")[0]
        assert not [line for line in options.splitlines() if line.endswith("-")], command
