"""Runs the command lines of the pages at small size, in this process where they are mopl's."""

import contextlib
import io
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from doc_checks import Failed, address_of, parse
from doc_folder import SMALL_ALIGN, SMALL_RANK, SMALL_REWARDS
from doc_pages import ROOT, Command, Line
from launching import launch, started

from mopl.cli import main

TRAININGS = ("rank", "align", "clp")
REWARDED = {"clp", "clp-all", "rewarded-soups", "prompting", "dera", "logit-mixing"}


def values_of(words: list[str], option: str) -> list[str] | None:
    """Return the values of an option, none if it is a switch, or None if it is not given."""
    for at, word in enumerate(words):
        if word.partition("=")[0] == option:
            rest = [word.partition("=")[2]] if "=" in word else []
            for each in words[at + 1 :]:
                if each.startswith("--"):
                    break
                rest.append(each)
            return rest
    return None


def small(words: list[str]) -> list[str]:
    """Return a command of mopl with small sizes: what a run costs, not what it does."""
    command = words[0]
    if command in TRAININGS and "--resume" not in words and "--print-config" not in words:
        method = (values_of(words, "--method") or [""])[0]
        if command == "rank":
            more = SMALL_RANK
            data = (values_of(words, "--data") or [""])[0]
            if data.startswith("synthetic"):
                objectives = re.search(r"objectives=\d+", data)
                more = [
                    "--data",
                    f"synthetic:queries=60,items=6,features=8{(objectives and ',' + objectives[0]) or ''}",
                    *more,
                ]
            if not {"--hidden", "--base-hidden", "--base", "--config"} & set(words):
                more = [*more, "--hidden", "8", "--base-hidden", "8", "--heads", "2"]
        elif command == "clp" or method in REWARDED or "--rewards" in words:
            more = SMALL_REWARDS  # answers of three tokens may all have one reward, which then has no scale
            if "--normalize" not in words:
                more = [*more, "--normalize", "none"]
        else:
            more = SMALL_ALIGN
            if values_of(words, "--reference-point") is not None or "--scales" in words:
                more = [each for each in more if each != "--scales"]
        run = values_of(words, "--run")
        if run and Path(run[0]).exists():  # a name such as RUN or DIR: what the page makes takes its place
            more = [*more, "--overwrite"]
        return [*words, *more]
    if command == "generate":
        return [*words, "--max-new-tokens", "3"]
    return words


def named(words: list[str]) -> list[str]:
    """Return a command with the names of things that are another's in the folder."""
    if words[0] == "steer" or words[0] == "rank":
        words = ["RANKING_RUN" if word == "RUN" else word for word in words]
    return [re.sub(r"^classifier:directory=[A-Z]+\b", "classifier:directory=REWARD_MODEL", word) for word in words]


class Runner:
    """Runs lines in the folder of a page; a server that a line starts answers until the page ends."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.url: str | None = None  # of the server that was started last
        self.stack = contextlib.ExitStack()
        self.output = ""

    def run(self, line: Line) -> None:
        for command in line.commands():
            self._run(command)

    def _run(self, command: Command) -> None:
        words = list(command.words)
        if words[0] == "mopl":
            self._mopl(words[1:], command)
        elif words[0] == "accelerate":
            self._accelerate(words)
        elif words[0] in ("python", "python3"):
            self._python(words[1:])
        elif words[0] == "curl":
            self._curl(words[1:])

    # ------------------------------------------------------------ mopl

    def _mopl(self, words: list[str], command: Command) -> None:
        if "--demo" in words:  # which downloads a model and trains it for minutes
            return parse(words)
        if words[:1] == ["serve"]:
            return self._serve(named(words), dict(command.environment))
        words = small(named(words)) if words else words
        if self.url is not None:
            words = [word.replace("http://127.0.0.1:8000", self.url) for word in words]
        if words[:1] == ["export"]:
            clear_placeholder(words)
        given = self.output if command.piped else Path(command.read).read_text() if command.read else ""
        self.capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(given))
            for name, value in command.environment:
                patch.setenv(name, value)
            try:
                status = main(words)
            except SystemExit as ended:
                status = ended.code
        self.output, err = self.capsys.readouterr()
        if status:
            raise Failed(f"mopl {' '.join(words)}: exit status {status}: {err.strip() or self.output[-400:]}")
        if command.written:
            Path(command.written).write_text(self.output, encoding="utf-8")

    def _serve(self, words: list[str], environment: dict[str, str]) -> None:
        parse(words)
        if "0.0.0.0" in words:  # in the test, others are not let in
            words[words.index("0.0.0.0")] = "127.0.0.1"
        given = ["-m", "mopl.cli", *words, "--port", "0", "--device", "cpu"]
        environment = {"PYTHONPATH": str(ROOT), **environment}
        self.stack.close()
        self.url = self.stack.enter_context(serving(given, environment))
        key = {"Authorization": f"Bearer {environment['MOPL_API_KEY']}"} if "MOPL_API_KEY" in environment else {}
        answer = httpx.get(f"{self.url}/v1/models", headers=key, timeout=30)
        if answer.status_code != 200 or not answer.json()["data"]:
            raise Failed(f"GET /v1/models of mopl {' '.join(words)}: {answer.status_code} {answer.text}")

    def _curl(self, words: list[str]) -> None:
        """Ask a server of mopl that runs what curl would ask it."""
        address, port, _ = address_of(words)
        if port != "8000":
            return
        if self.url is None:
            raise Failed(f"curl {address}: no line above starts mopl serve")
        body = values_of(words, "-d") or values_of(words, "--data")
        url = address.replace("http://127.0.0.1:8000", self.url)
        content = {"content": body[0].encode(), "headers": {"Content-Type": "application/json"}} if body else {}
        answer = httpx.request("POST" if body else "GET", url, timeout=60, **content)  # type: ignore[arg-type]
        if answer.status_code != 200:
            raise Failed(f"curl {address}: {answer.status_code} {answer.text}")

    # ------------------------------------------------------------ other programs

    def _accelerate(self, words: list[str]) -> None:
        """Do what accelerate's launcher does, with processes that have torch already."""
        at = words.index("-m")
        if launched_before("fsdp" in " ".join(words[:at])):
            return
        environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if "--use_fsdp" in words else {}
        command = small(named(words[at + 2 :]))
        done = launch(2, "-m", "mopl", *command, PYTHONPATH=str(ROOT), **environment)
        if done.returncode:
            raise Failed(f"{' '.join(words)}: {done.stderr[-2000:]}")

    def _python(self, words: list[str]) -> None:
        """Run what is small: a text, mopl itself, or a script that the page wrote."""
        if words[:2] == ["-m", "mopl"]:
            self._mopl(words[2:], Command(()))
        elif words[:1] == ["-c"]:
            exec(compile(words[1], "-c", "exec"), {"__name__": "__main__"})
        elif words[0] != "-m" and not (ROOT / words[0]).exists():
            exec(compile(Path(words[0]).read_text(), words[0], "exec"), {"__name__": "__main__"})


_LAUNCHED: set[bool] = set()


def launched_before(kind: bool) -> bool:
    """Say whether this process has launched such processes: one of each kind is enough."""
    if kind in _LAUNCHED:
        return True
    _LAUNCHED.add(kind)
    return False


@contextlib.contextmanager
def serving(given: list[str], environment: dict[str, str]) -> Iterator[str]:
    """Start `mopl serve` as a process of its own, yield its address, and stop it as Ctrl-C does."""
    with started(*given, **environment) as (number, out, err, wait):
        end = time.monotonic() + 60
        while (match := re.search(r"at (http://\S+?)[ ,(]", out.read_text() if out.exists() else "")) is None:
            status = wait(0.05)
            if status is not None or time.monotonic() > end:
                raise Failed(f"{' '.join(given[1:])}: exit status {status}: {err.read_text()}")
        yield match[1]
        os.kill(number, signal.SIGINT)
        if wait(60) not in (0, 130):
            raise Failed(f"{' '.join(given[1:])} did not stop: {err.read_text()}")


def clear_placeholder(words: list[str]) -> None:
    """Remove the folder DIR of an earlier line: a page writes one name for any folder."""
    import shutil

    for word in words:
        if re.fullmatch(r"DIR|FOLDER|OUT", word) and Path(word).is_dir():
            shutil.rmtree(word)
