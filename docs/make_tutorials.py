"""Runs the tutorials as a reader does and writes what they print into the pages: python docs/make_tutorials.py PAGE ...

PAGE is the name of a page of docs/tutorials without .md. Its lines of `sh` and blocks of `python` run in their order in
an empty folder. `MODEL` in it is the folder of a language model (--model; by default the one that `mopl align --demo`
makes). Two comments of a page say what is taken from the run:

    <!-- output -->                        what the command or block above printed replaces the next block of text
    <!-- output: 12 lines -->              its first 12 lines, and a line that says how many follow
    <!-- output: last 12 lines -->         its last 12
    <!-- picture: FILE -> docs/pictures/NAME.png -->    copies a picture of the run to the pictures of the pages
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from doc_pages import SHELL, Block, Line, blocks_of, lines_of  # noqa: E402

OUTPUT = re.compile(r"<!-- output(?:: (?P<last>last )?(?P<count>\d+) lines)? -->")
PICTURE = re.compile(r"<!-- picture: (\S+) -> (docs/pictures/[\w.-]+\.png) -->")
SERVER = "http://127.0.0.1:8000"


class Tutorial:
    """A page that runs in a folder; `printed` is what its last command or block printed."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.names: dict = {"__name__": "__main__"}
        self.printed = ""
        self.servers: list[subprocess.Popen] = []
        # As a terminal of 80 columns shows it, without colours
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"}
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(self, block: Block) -> None:
        """Run a block; those of other languages are for reading."""
        if block.language == "python":
            self.python(block)
        elif block.language in SHELL:
            self.printed = "".join(self.shell(line) for line in lines_of(block))

    def shell(self, line: Line) -> str:
        """Run a command line and return what it prints."""
        print(f"{line.where}: {line.text}", flush=True)
        if line.text.startswith("mopl serve"):
            return self.serve(line)
        start = time.monotonic()
        done = subprocess.run(
            line.text, shell=True, cwd=self.folder, env=self.environment, text=True, stdout=-1, stderr=subprocess.STDOUT
        )
        if done.returncode:
            sys.exit(f"{line.where}: exit status {done.returncode}\n{done.stdout}")
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
        return done.stdout

    def serve(self, line: Line) -> str:
        """Start a server, which answers until the page ends; return what it prints first."""
        log = self.folder.parent / "server.txt"
        with open(log, "w", encoding="utf-8") as file:
            self.servers.append(
                subprocess.Popen(
                    ["exec " + line.text], shell=True, cwd=self.folder, env=self.environment, stdout=file, stderr=file
                )
            )
        for _ in range(240):
            if self.servers[-1].poll() is not None:
                sys.exit(f"{line.where}: {log.read_text(encoding='utf-8')}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{SERVER}/v1/models", timeout=5).close()
                break
            time.sleep(0.5)
        return log.read_text(encoding="utf-8")

    def python(self, block: Block) -> None:
        """Run a block of Python with the names of those before it."""
        print(block.where, flush=True)
        shown = io.StringIO()
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(shown):
                exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), self.names)
        finally:
            os.chdir(before)
        self.printed = shown.getvalue()

    def close(self) -> None:
        """Stop the servers."""
        for server in self.servers:
            server.terminate()
            server.wait(timeout=60)


def shortened(printed: str, mark: re.Match[str]) -> list[str]:
    """Return the lines of an output that a mark asks for."""
    lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
    count = int(mark["count"] or len(lines))
    if len(lines) <= count:
        return lines
    left = f"... {len(lines) - count} more lines"
    return [left, *lines[-count:]] if mark["last"] else [*lines[:count], left]


def make(page: Path, model: Path) -> None:
    """Run a page, then write it with its outputs; a page whose run fails stays as it was."""
    text = page.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / page.stem
        folder.mkdir()
        (folder / "MODEL").symlink_to(model.expanduser(), target_is_directory=True)
        tutorial = Tutorial(page, folder)
        new: dict[tuple[int, int], list[str]] = {}
        try:
            for block in blocks_of(page):
                start = block.line - 1
                above = text[start - 2] if start >= 2 else ""
                if (mark := OUTPUT.fullmatch(above.strip())) and block.language == "text":
                    lines = shortened(tutorial.printed, mark)
                    if any(place in line for line in lines for place in (name, str(Path.home()))):
                        sys.exit(f"{block.where}: the output names a folder of this machine\n" + "\n".join(lines))
                    indent = text[start - 1].partition("`")[0]  # of a fence in a list
                    new[start, start + block.text.count("\n")] = [indent + line if line else "" for line in lines]
                elif block.reason is None:
                    tutorial.run(block)
        finally:
            tutorial.close()
        for line in text:
            if mark := PICTURE.fullmatch(line.strip()):
                shutil.copyfile(folder / mark[1], ROOT / mark[2])
    for (start, end), lines in sorted(new.items(), reverse=True):
        text[start:end] = lines
    page.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", metavar="PAGE")
    parser.add_argument("--model", type=Path, default=Path("~/.cache/mopl/smollm2-135m-instruct"))
    options = parser.parse_args()
    for each in options.pages:
        make(ROOT / "docs" / "tutorials" / f"{each}.md", options.model)
