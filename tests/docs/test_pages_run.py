"""Every block of Python and every command line of README.md and docs/ runs as it stands, at small size.

The blocks of a page run in their order, with the names of those before them, in a folder that holds what the page
names (doc_folder.py). Trainings whose result nothing below them uses are tests of their own. What a block of Python
prints is compared with the block of text below it, where a comment does not say why it cannot be.
"""

import contextlib
import importlib
import io
import linecache
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("moocore")
pytest.importorskip("httpx")

from doc_commands import TRAININGS, Runner, values_of
from doc_folder import fill
from doc_outputs import differences
from doc_pages import PAGES, SHELL, Block, Line, blocks_of, lines_of, name_of, outputs_of

from mopl.conditioning.weighted import KINDS

PARSED = {"docs/settings.md"}  # its examples are those of other pages, and parts of commands
STEPS: dict[str, list[Block | Line]] = {}
OUTPUTS: dict[Block, Block] = {}
for page in PAGES:
    OUTPUTS |= outputs_of(page)
    steps: list[Block | Line] = []
    for block in blocks_of(page):
        if block.reason is not None:
            continue
        if block.language in SHELL:
            steps += lines_of(block)
        elif block.language == "python" or re.match(r"# [\w./-]+\.\w+\n", block.text):
            steps.append(block)
    if steps:
        STEPS[name_of(page)] = steps


def words_of(step: Block | Line) -> list[str]:
    """Return the words of mopl's command in a line, without `mopl`, also of one that accelerate launches."""
    if isinstance(step, Block):
        return []
    words = list(step.commands()[-1].words) if step.commands() else []
    if "-m" in words:
        return words[words.index("-m") + 2 :] if words[words.index("-m") + 1] == "mopl" else []
    return words[1:] if words[:1] == ["mopl"] else []


def is_alone(step: Block | Line, below: list[Block | Line]) -> bool:
    """Say whether a training makes nothing that is used below: it can be a test of its own."""
    words = words_of(step)
    if words[:1] not in [[each] for each in TRAININGS] or "--demo" in words or "--print-config" in words:
        return False
    needed = ("--config", "--resume", "--reference-store", "--base", "--teachers", "--rollout-server")
    if any(option in words for option in needed):
        return False
    text = "".join(each.text for each in below)
    run = values_of(words, "--run")
    return not re.search(rf"(?<![\w/]){re.escape(run[0])}\b" if run else r"\bruns/", text)


ALONE: list[Line] = []
TOGETHER: dict[str, list[Block | Line]] = {}
seen: set[str] = set()
for name, steps in STEPS.items():
    if name in PARSED:
        continue
    for number, step in enumerate(steps):
        if isinstance(step, Line) and is_alone(step, steps[number + 1 :]):
            key = " ".join(" ".join(command.words) for command in step.commands())
            if key not in seen:
                ALONE.append(step)
            seen.add(key)
        else:
            TOGETHER.setdefault(name, []).append(step)


@pytest.fixture
def runner(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> Iterator[Runner]:  # fmt: skip
    """A runner in a folder of its own, with what the text of the test names."""
    steps = request.param if isinstance(request.param, list) else [request.param]
    source = tmp_path_factory.getbasetemp() / "documented"
    source.mkdir(exist_ok=True)
    monkeypatch.chdir(source)
    fill(tmp_path, "".join(step.text + "\n" for step in steps), source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before, kinds = set(sys.modules), dict(KINDS)
    made = Runner(capsys)
    made.steps = steps
    try:
        yield made
    finally:
        made.stack.close()
        for name in set(sys.modules) - before:  # modules of the folder: another page has its own
            file = getattr(sys.modules[name], "__file__", None)
            if file and file.startswith(str(tmp_path)):
                del sys.modules[name]
        KINDS.clear()  # kinds of conditioning that a page writes
        KINDS.update(kinds)
        importlib.invalidate_caches()


def run_block(block: Block, names: dict, runner: Runner, below: str) -> None:
    """Run a block of Python so that a traceback shows the line of the page.

    A first comment `# FILE` makes it a file of the folder; where what stands below imports or runs that, it is no more.
    """
    text = block.text if runner.url is None else block.text.replace("http://127.0.0.1:8000", runner.url)
    if match := re.match(r"# ([\w./-]+\.\w+)\b.*\n", text):
        Path(match[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(match[1]).write_text(text, encoding="utf-8")
        if block.language != "python" or re.search(rf"\b{re.escape(Path(match[1]).stem)}\b", below):
            return
    linecache.checkcache()
    shown = OUTPUTS.get(block)
    with contextlib.nullcontext() if shown is None else contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("\n" * (block.line - 1) + text, str(block.page), "exec"), names)
    if shown is not None and (wrong := differences(shown.text, printed.getvalue())):
        raise AssertionError(f"{shown.where}: {wrong}")


def report(step: Block | Line, error: BaseException) -> str:
    """Say what failed where: the line of the page, and the error."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(step.page)]
    where = f"{name_of(step.page)}:{lines[-1] if lines else step.line}"
    shown = "".join(traceback.format_exception(error)[-6:]) if isinstance(step, Block) else str(error)
    return f"{where}: {shown}"


def run_steps(steps: list[Block | Line], runner: Runner) -> None:
    names: dict = {"__name__": "__main__"}
    failed = []
    for number, step in enumerate(steps):
        try:
            if isinstance(step, Line):
                runner.run(step)
            else:
                run_block(step, names, runner, "".join(f"{each.text}\n" for each in steps[number + 1 :]))
        except (KeyboardInterrupt, pytest.skip.Exception):
            raise
        except BaseException as error:
            failed.append(report(step, error))
    if failed:
        pytest.fail("\n\n".join(failed), pytrace=False)


@pytest.mark.parametrize("runner", list(TOGETHER.values()), ids=list(TOGETHER), indirect=True)
def test_the_blocks_and_lines_of_a_page_run(runner: Runner) -> None:
    run_steps(runner.steps, runner)
    if name_of(runner.steps[0].page) == "README.md":  # a checkpoint of a small model fills 1.6 GB
        assert not list(Path().rglob("optimizer.pt")), "a snippet to paste leaves a checkpoint"


@pytest.mark.parametrize("runner", ALONE, ids=[f"{step.where} {step.text[:60]}" for step in ALONE], indirect=True)
def test_a_training_of_a_page_runs(runner: Runner) -> None:
    run_steps(runner.steps, runner)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("0.587", "0.588", True),  # one unit of the last digit, as other machines round
        ("0.587", "0.589", False),
        ("0.587", "0.5870", False),
        ("[True, 41%]", "[True, 42%]", False),
        ("59,049 times", "59,050 times", False),
        ("0.554355263710022", "0.554355263710019", True),
        ("0.554355263710022", "0.5543", False),
        ("w = 1.0   x", "w = 1.0 x", True),
        ("w = 1.0 x", "w = 1.0 y", False),
        ("1.5\n2.5", "1.5", False),
        ("-0.25", "0.25", False),
        ("1.0e-04", "1.0e-05", False),
    ],
)
def test_what_counts_as_the_output_that_a_page_shows(shown: str, printed: str, same: bool) -> None:
    assert (differences(shown, printed) == "") is same
