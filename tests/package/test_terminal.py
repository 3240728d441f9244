"""What reaches a terminal: no control characters of data, only letters that it has; work outlives its readers."""

import ast
import fcntl
import io
import json
import logging
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

import mopl
from mopl import _terminal
from mopl._terminal import Stream, json_line, one_line, printable, say, shell, spelled, terminal
from mopl.cli import main
from mopl.experiments import run_fronts
from mopl.report import print_table

TITLE, CLEAR, CSI, OVERRIDE = "\x1b]0;pwn\x07", "\x1b[2J", "\x9b31m", "\u202egnp"
HOSTILE = f"a{TITLE}{CLEAR}{CSI}{OVERRIDE}\u2066\u2028\x7f\r[red]x[/red]"
# Everything that may steer a terminal, but for the line ends that mopl prints itself.
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
TINY = [
    "--hidden", "8", "--base-hidden", "8", "--heads", "2", "--steps", "4", "--base-steps", "3", "--batch-size", "8",
    "--bootstrap", "10", "--points", "3",
]  # fmt: skip
DATA = ["--data", "synthetic:queries=60,items=6,features=8,objectives=2"]


def command(*arguments, **options):
    """Run `mopl` in a process of its own."""
    environment = {**os.environ, **options.pop("env", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, **options}
    return subprocess.run([sys.executable, "-m", "mopl.cli", *map(str, arguments)], env=environment, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("terminal") / "a run"
    assert main(["rank", "--run", str(path), *DATA, *TINY]) == 0
    return path


# ---------------------------------------------------------------- text


def test_control_characters_are_escaped_as_python_writes_them():
    assert printable(HOSTILE) == (
        r"a\x1b]0;pwn\x07\x1b[2J\x9b31m\u202egnp\u2066\u2028\x7f\r[red]x[/red]"
    )  # fmt: skip
    every = "".join(map(chr, range(0x3000))) + "\ud800\udfff"
    assert RAW.sub("", printable(every)) == printable(every).replace("\t", "")
    assert RAW.search(printable(every, keep="")) is None and "\n" not in printable(every, keep="")
    kept = [c for c in every if printable(c) == c]
    assert "é" in kept and "\u200d" in kept and "\u200f" in kept and "\\" in kept  # joiners and marks belong to words


def test_what_a_stream_cannot_hold_is_spelled():
    assert spelled("β ± – 東 é", "ascii") == r"beta +/- - \u6771 \xe9"
    assert spelled("β ± – 東 é", "latin-1") == r"beta ± - \u6771 é"
    assert spelled("β 東", "utf-8") == spelled("β 東", None) == "β 東"
    assert spelled("\ud83d", "utf-8") == r"\ud83d"


def test_every_character_that_mopl_prints_has_a_spelling():
    """Those of the texts that it composes; helps and tables are printed in ASCII below."""
    found = set()
    for file in Path(mopl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.update(*(part.value for part in node.values if isinstance(part, ast.Constant)))
    assert "±" in found
    assert {c for c in found if not c.isascii() and c not in _terminal._SPELLING} <= set(
        "\u200b\u05f3\u05f4"
    )  # of pictures and patterns


def test_say_keeps_a_text_on_its_line():
    out = io.StringIO()
    say("one\nmopl: forged", HOSTILE, file=out)
    assert out.getvalue() == "one\\nmopl: forged\n" + printable(HOSTILE, keep="") + "\n"
    say(file=out)
    assert out.getvalue().endswith("\n\n")
    assert one_line("a path  with blanks\n  second:\nthird") == "a path  with blanks; second: third"


@pytest.mark.parametrize(
    "word", ["runs/a", "my runs/it's", 'quo"te', "$HOME `ls`", f"x{CLEAR}y", "new\nline", "tab\t'", "\u202e", "é"]
)
def test_a_suggested_command_is_read_back_by_a_shell(word):
    line = shell("mopl", "steer", word)
    assert RAW.search(line) is None and "\n" not in line
    done = subprocess.run(["bash", "-c", f"printf '%s|' {line}"], capture_output=True)
    assert done.stdout.decode() == f"mopl|steer|{word}|"


def test_json_says_the_same_and_steers_nothing(monkeypatch):
    record = {"text": HOSTILE + "\ud83d é 東"}
    assert json.loads(json_line(record)) == record and RAW.search(json_line(record)) is None
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert "é 東" in json_line(record)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert json_line(record).isascii() and json.loads(json_line(record)) == record


# ---------------------------------------------------------------- streams


def test_whatever_is_printed_in_a_command_is_escaped(capsys):
    with terminal():
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        logging.getLogger("mopl.language_models.data").warning("rows of %s\nmopl: forged", HOSTILE)
        sys.stderr.write(warnings.formatwarning(f"{HOSTILE}\nmopl: forged", UserWarning, "x.py", 1))
    out, err = capsys.readouterr()
    assert out == printable(HOSTILE) + "\n"
    assert RAW.search(err) is None and err.count(r"\x1b[2J") == 3 and "\nmopl: forged" not in err
    assert not isinstance(sys.stdout, Stream) and not logging.getLogger("mopl").handlers


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bars_redraw_their_line_and_data_in_them_does_not(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with terminal(), _terminal.progress(HOSTILE, 3, "steps") as bar:
        for _ in range(3):
            bar.update(1, loss=0.5)
    shown = screen.getvalue()
    assert "\r" in shown and "0/3" in shown and RAW.search(shown.replace("\r", "")) is None
    assert shown.count("\n") == 0 and r"\x1b[2J" in shown


@pytest.mark.parametrize("term", [None, "dumb"])
def test_long_work_says_how_far_it_is_now_and_then_where_no_line_can_be_redrawn(monkeypatch, term):
    screen = io.StringIO() if term is None else Terminal()
    monkeypatch.setenv("TERM", term or "xterm")
    monkeypatch.setattr("sys.stderr", screen)
    now = [0.0]
    monkeypatch.setattr(_terminal, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    with _terminal.progress(f"stage{CLEAR}", 1000, "steps", start=100) as watched:
        for _ in range(900):
            now[0] += 0.1
            watched.update(1, loss=0.25)
    lines = screen.getvalue().splitlines()
    assert lines[0] == r"stage\x1b[2J: 151 of 1,000 steps, loss 0.2500, 5 s, about 85 s left"  # a first estimate soon
    assert lines[1].endswith("35 s, about 55 s left") and 3 <= len(lines) <= 4 and "\r" not in screen.getvalue()
    with _terminal.progress("nothing", 10, "steps", show=False) as silent:
        now[0] += 100
        silent.update(10)
    assert "nothing" not in screen.getvalue()


def test_bars_of_other_libraries_are_off_in_a_log_and_as_they_were_afterwards(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    with terminal():
        assert os.environ["TQDM_DISABLE"] == os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert os.environ["TQDM_DISABLE"] == "0" and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ


def test_a_writer_that_knows_nothing_of_terminals_is_written_to(run, monkeypatch):
    """Shells of editors and tests put writers with no more than these two in the place of the standard streams."""

    class Writer:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    out, err = Writer(), Writer()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    assert main(["report", str(run)]) == 0 and main(["report", "nowhere"]) == 2
    assert "hypervolume" in out.text and "no run at nowhere" in err.text
    print_table(run_fronts(run))
    with _terminal.progress("stage", 1, "steps") as watched:
        watched.update(1)
    assert (sys.stdout, sys.stderr) == (out, err) and out.text.count("hypervolume ↑") == 2


# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run on a file and with objectives whose names are escape sequences, and a second line in one of them."""
    folder = tmp_path_factory.mktemp("hostile")
    random = np.random.default_rng(0)
    file = folder / f"data{CLEAR}\nmopl forged.txt"
    with file.open("w") as stream:
        for query in range(1, 41):
            for _ in range(5):
                columns = " ".join(f"{c}:{x:.3f}" for c, x in enumerate(random.random(6), 1))
                stream.write(f"{random.integers(0, 3)} qid:{query} {columns}\n")
    return folder, file


def test_no_command_of_rankers_shows_a_control_character_of_data(hostile, capsys, monkeypatch):
    folder, file = hostile
    monkeypatch.chdir(folder)
    names = [f"{HOSTILE}=3", "second\nmopl forged=4"]
    path = f"run{CLEAR} it's"
    everything = []

    def shown(*arguments, status=0):
        found = main(list(map(str, arguments)))
        everything.append(capsys.readouterr())
        assert found == status, everything[-1]
        return everything[-1]

    out = shown("rank", "--data", file, "--objectives", *names, "--run", path, *TINY).out
    (hint,) = (line.strip() for line in out.splitlines() if line.startswith("  mopl steer"))
    read = subprocess.run(["bash", "-c", f"printf '%s\\0' {hint.split('    (')[0]}"], capture_output=True).stdout
    shown(*read.decode().split("\0")[1:-1])
    shown("steer", path, "--weights", 0.5, 0.5, "--json")
    shown("steer", path, "--weights", 0.5, 0.5, "--output", f"scores{CLEAR}.tsv")
    shown("report", path, path)
    err = shown("steer", path, "--weights", 1, status=2).err
    assert r"\x1b[2J" in err and err.count("\n") == 1
    shown("rank", "--data", file, "--objectives", f"{HOSTILE}=99", status=2)
    shown("rank", "--data", f"none{HOSTILE}", status=2)
    shown("report", f"none{HOSTILE}", status=2)
    for out, err in everything:
        assert RAW.search(out) is None and RAW.search(err) is None
        assert "\nmopl forged" not in out + err
    assert sum(r"\x1b]0;pwn\x07" in out + err for out, err in everything) >= 7
    for name in ("table.txt", "report.html", "front.json", "config.json", "log.jsonl"):
        assert RAW.search((folder / path / name).read_text("utf-8")) is None, name


def test_no_command_of_language_models_shows_a_control_character_of_data(tmp_path, capsys, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    from tiny_language_models import build, tokenizer

    words = tokenizer()
    build().save_pretrained("model")
    words.save_pretrained("model")
    file, run = f"data{CLEAR}.jsonl", f"run{CLEAR} it's"
    capsys.readouterr()
    random = np.random.default_rng(0)
    with open(file, "w", encoding="utf-8") as stream:
        for number in range(12):
            labels = {HOSTILE: random.random(2).tolist(), "second\nmopl: forged": random.random(2).tolist()}
            row = {"prompt": f"w{number} w2", "responses": [" w3", f" w{number + 4}"], "labels": labels}
            stream.write(json.dumps(row) + "\n")
    settings = [
        "--steps", "1", "--lists-per-batch", "4", "--points", "3", "--bootstrap", "5", "--samples", "1",
        "--sample-tokens", "3", "--device", "cpu", "--max-length", "32", "--held-out", "0.2",
    ]  # fmt: skip
    weights = ["--weights", "0.5", "0.5"]
    for status, *arguments in (
        (0, "align", "--model", "model", "--data", file, "--run", run, *settings),
        (0, "generate", run, *weights, "--max-new-tokens", "3", f"w1 {HOSTILE}", "w2"),
        (0, "generate", run, *weights, "--max-new-tokens", "3", "--json", f"w1 {HOSTILE}"),
        (0, "export", run, *weights, f"exported{CLEAR} it's"),
        (0, "report", run),
        (2, "generate", run, "--weights", "1", "w1"),
        (2, "align", "--model", "model", "--data", file, "--run", "another", "--objectives", f"x{CLEAR}", *settings),
        (2, "align", "--model", f"no{CLEAR}", "--data", file, "--run", "another", *settings),
    ):
        assert main(arguments) == status, capsys.readouterr()
        out, err = capsys.readouterr()
        assert RAW.search(out) is None and RAW.search(err) is None
        assert r"\x1b[2J" in out + err or ("--json" in arguments and r"\u001b[2J" in out)
        assert "\nmopl: forged" not in out + err and "it/s" not in err and err.count("\n") == (status == 2)
    for name in ("table.txt", "report.html", "samples.json"):
        assert RAW.search((Path(run) / name).read_text("utf-8")) is None, name


def test_a_traceback_and_a_usage_error_are_escaped_too(tmp_path):
    done = command("steer", f"none{HOSTILE}", "--weights", "1", "--debug")
    assert b"Traceback" in done.stderr and RAW.search(done.stderr.decode()) is None
    done = command("steer", f"--{CLEAR}\nforged", "--weights", "1")
    assert done.returncode == 2 and RAW.search(done.stderr.decode()) is None and done.stderr.count(b"\n") == 1


def on_a_terminal(*arguments, **env):
    """Run `mopl` with its output on a terminal; return what the terminal was sent."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", **env}
    process = subprocess.Popen(
        [sys.executable, "-m", "mopl.cli", *map(str, arguments)], stdin=there, stdout=there, stderr=there,
        env=environment,
    )  # fmt: skip
    os.close(there)
    sent = b""
    while True:
        try:
            part = os.read(here, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        sent += part
    os.close(here)
    assert process.wait(timeout=60) == 0, sent
    return sent.decode().replace("\r\n", "\n")


@pytest.mark.slow  # its own processes: a terminal is asked for at the start
def test_a_terminal_gets_colours_of_the_table_and_nothing_else(hostile, tmp_path):
    pytest.importorskip("rich")
    _, file = hostile
    names = [f"{HOSTILE}=3", "second=4"]
    sent = on_a_terminal("rank", "--data", file, "--objectives", *names, "--run", tmp_path / "run", *TINY)
    assert re.search(r"\x1b\[[\d;]*m", sent) and "\r" in sent  # the table and the bars
    assert RAW.search(re.sub(r"\x1b\[[\d;]*m|\x1b\[A|\r", "", sent)) is None
    assert RAW.search(on_a_terminal("report", tmp_path / "run", TERM="dumb")) is None


NARROW = [
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "cp1252"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]  # fmt: skip


@pytest.mark.parametrize("env", NARROW, ids=lambda env: next(iter(env.values())))
def test_every_help_is_readable_in_any_encoding(env):
    code = (
        "import sys; from mopl.cli import main\n"
        "for name in ['rank', 'align', 'generate', 'export', 'steer', 'report']:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, **env})
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    assert b"beta, one for each objective" in done.stdout and b"\\u" not in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_tables_are_readable_in_any_encoding_and_files_are_utf8(run, encoding, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", narrow)
    assert main(["report", str(run)]) == 0
    shown = narrow.buffer.getvalue().decode(encoding)
    assert "hypervolume ^" in shown and "\\u" not in shown
    assert "↑" in (run / "table.txt").read_text("utf-8")


# ---------------------------------------------------------------- nobody reads


# One process imports everything; each case is a copy of it with other streams: 0 is closed, 1 a pipe that nobody reads.
FORKS = """
import json, os, sys
from mopl.cli import main
main(json.loads(sys.argv[2]))
for number, (streams, arguments) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    os.dup2(os.open(f"{number}.err", os.O_CREAT | os.O_WRONLY), 2)
    for target, what in zip((1, 2), streams):
        if what == "closed":
            os.close(target)
            setattr(sys, ("stdin", "stdout", "stderr")[target], None)
        elif what == "unread":
            here, there = os.pipe()
            os.close(here)
            os.dup2(there, target)
        elif what == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), target)
    sys.exit(main(arguments))
"""
STREAMS = [("closed", ""), ("", "closed"), ("closed", "closed"), ("unread", "unread"), ("full", "")]
LOST = "mopl: not all of the output could be written: [Errno 28] No space left on device\n"


def in_streams(cases, folder):
    """Return (exit status, what came to standard error) of each case."""
    first = json.dumps(["rank", "--run", "first", *DATA, *TINY])  # imports everything
    script = [sys.executable, "-c", FORKS, json.dumps(cases), first]
    done = subprocess.run(script, capture_output=True, cwd=folder, text=True, timeout=300)
    statuses = [int(line) for line in done.stdout.splitlines() if line.removeprefix("-").isdigit()]
    return [(status, (folder / f"{number}.err").read_text()) for number, status in enumerate(statuses)]


@pytest.mark.slow
def test_a_training_goes_on_though_nobody_reads_and_a_command_that_only_prints_says_it_was_lost(run, tmp_path):
    trainings = [(streams, ["rank", "--run", f"run{n}", *DATA, *TINY]) for n, streams in enumerate(STREAMS)]
    steer = ["steer", str(run), "--weights", "0.5", "0.5"]
    prints = [(("unread", ""), steer), (("full", ""), steer), (("closed", ""), steer), (("unread", ""), ["--help"])]
    found = in_streams([*trainings, *prints], tmp_path)
    assert found[:5] == [(0, "")] * 4 + [(0, LOST)]
    assert len(list(tmp_path.glob("run?/report.html"))) == 5
    assert found[5:] == [(141, ""), (2, LOST), (0, ""), (0, "")]


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """Otherwise what a library writes to standard error lands in whatever was opened next."""
    code = (
        "import os; from mopl._terminal import terminal\n"
        f"with terminal(): file = open({str(tmp_path / 'weights')!r}, 'w'); os.write(2, b'a warning'); file.flush()\n"
    )
    subprocess.run(["bash", "-c", f"{shlex.join([sys.executable, '-c', code])} <&- >&- 2>&-"], check=True)
    assert (tmp_path / "weights").read_text() == ""


def test_a_folder_that_begins_with_a_dash_is_no_option_of_a_suggested_command():
    assert shell("mopl", "steer", Path("-x"), "--weights", "1") == "mopl steer ./-x --weights 1"
