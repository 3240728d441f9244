"""Kill runs with SIGKILL wherever they are and see that what they become is, bit for bit, what they would have become.

    python tests/kill_runs.py --kills 200 --seed 0               # rank, align and CLP in turn
    python tests/kill_runs.py --kills 30 --only rank --keep DIR  # look at what is left where something differs

A run is begun, killed, resumed, killed again (up to four times), and resumed to its end. Then everything in its folder
and beside it must be what an undisturbed run has left: the same names, permissions and bytes. The clock that runs
measure themselves with stands still, so seconds are no exception; the only one is the order of the metadata in the head
of a safetensors file, which that library leaves to chance. Half of the kills come at random times; the other half just
before a random one of the operations on files that Python announces (opening for writing, renaming, deleting, making
folders).

Every run is a fork of one process that has imported everything, or most of the time would go into imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # threads do not survive a fork
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
sys.dont_write_bytecode = True

OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
LIMIT = 300  # seconds of a run; a hang is a failure
STATISTICS, WORK = "statistics.json", "work"
REWARDS = """
def first(texts, prompts):
    return [sum(word < "w2" for word in text.split()) / 4 for text in texts]

def second(texts, prompts):
    return [sum("w2" <= word < "w4" for word in text.split()) / 4 for text in texts]
"""
BOTH = "--points 2 --bootstrap 5 --device cpu --log-every 1 --checkpoint-every 1 --scales"
RANK = (
    f"rank --data synthetic:queries=30,items=4,features=4,objectives=2 {BOTH} --hidden 8 --base-hidden 8 --heads 2 "
    "--steps 3 --base-steps 3 --batch-size 8 --run run"
)
ALIGN = (
    f"align --model INPUTS/model --data INPUTS/lists.jsonl {BOTH} --steps 3 --lists-per-batch 6 --samples 1 "
    "--sample-tokens 3 --held-out 0.2 --max-length 32 --run run"
)
CLP = (
    "align --model INPUTS/model --data INPUTS/prompts.jsonl --rewards tiny_rewards:first tiny_rewards:second "
    f"{BOTH.removesuffix(' --scales')} --steps 4 --prompts-per-step 2 --samples-per-prompt 2 --max-new-tokens 3 "
    "--normalize-prompts 3 --eval-prompts 3 --held-out 0.2 --kl-weight 0.05 --samples 1 --lora-rank 2 --run run"
)


@dataclass(frozen=True)
class Case:
    """A run to kill: the command; for `--overwrite` the seed of a finished run that is there before; or data there."""

    name: str
    command: str
    overwrites: int | None = None
    data: str | None = None


CASES = {
    "rank": [
        Case("rank-all", f"{RANK} --method all"),
        Case("rank-overwrite", f"{RANK} --overwrite", overwrites=1),
        Case("rank-letor", f"{RANK} --data data.txt --objectives a=3 b=4", data="data.txt"),  # leaves a cache beside it
    ],
    "align": [
        Case("align-all", f"{ALIGN} --method all"),
        Case("align-mixture", f"{ALIGN} --conditioning lora-mixture"),
        Case("align-text", f"{ALIGN} --conditioning text"),
    ],
    "clp": [
        Case("clp-all", f"{CLP} --method clp-all --scope lora-mixture"),
        Case(
            "clp-epochs",
            f"{CLP} --method clp --scope full --epochs 2 --clip 0.2 --normalize running --checkpoint-every 2",
        ),
    ],
}


def make_inputs(folder: Path, *, models: bool) -> None:
    """Write a model, lists, prompts and rewards, if there are language models to train."""
    folder.mkdir()
    if not models:
        return
    from tiny_language_models import build, tokenizer
    from tqdm import tqdm

    # By default the lock of progress bars is one for all forks, and who is killed with it lets nobody draw a bar again.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    (folder / "tiny_rewards.py").write_text(REWARDS)
    build(initializer_range=0.1).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    drawn = random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"w{drawn.randrange(50)}" for _ in range(words))

    lists = []
    for _ in range(20):
        responses = [f" {text(3)}" for _ in range(2)]
        labels = {name: [drawn.random() for _ in responses] for name in ("low", "high")}
        lists.append({"prompt": text(3), "responses": responses, "labels": labels})
    (folder / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    prompts = [{"prompt": f"w{i} w{i + 1}"} for i in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


def start(folder: Path, command: str, kill_before: int | None = None) -> int:
    """Run a command of mopl in `folder` in a fork, which kills itself before an operation; return its number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        os.chdir(folder)
        with open(folder.parent / f"{folder.name}.txt", "a") as log:
            log.write(f"\n$ mopl {command}   # killed before operation {kill_before}\n")
            log.flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        signal.alarm(LIMIT)
        time.perf_counter = lambda: 0.0
        from mopl.experiments import run_directory

        run_directory._commit = lambda: None  # somebody may work in the checkout meanwhile
        sys.path.insert(0, str(folder.parent / "inputs"))
        seen = 0

        def count(event: str, values: Any) -> None:
            nonlocal seen
            writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in OPERATIONS:
                seen += 1
                if seen == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        from mopl.cli import main

        status = main(command.split())
        if kill_before is None:
            figures = {"operations": seen, "modules": sorted(sys.modules)}
            (folder.parent / f"{folder.name}.{STATISTICS}").write_text(json.dumps(figures))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(process: int, folder: Path) -> None:
    """Wait for a process that nobody kills."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status != 0:
        raise AssertionError(f"exit status {status}:\n{(folder.parent / f'{folder.name}.txt').read_text()[-3000:]}")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return permissions and bytes of everything in a folder, by name."""
    return {
        str(entry.relative_to(folder)): (
            stat.S_IMODE(entry.lstat().st_mode),
            in_order(entry) if entry.is_file() else b"",
        )
        for entry in sorted(folder.rglob("*"))
    }


def in_order(file: Path) -> bytes:
    """Return the bytes of a file, of safetensors with the head in the order of its names."""
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        return content
    size = int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode() + content[8 + size :]


def differences(one: Path, two: Path) -> list[str]:
    """Return the names of what two folders do not have alike."""
    left, right = contents(one), contents(two)
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


@dataclass
class Undisturbed:
    """What a case leaves and takes when nobody kills it."""

    folder: Path
    before: Path  # what is there before
    seconds: float
    operations: int


def undisturbed(case: Case, home: Path) -> Undisturbed:
    """Run a case twice: the first time it imports what the parent has not, which is imported here for all others."""
    from mopl.experiments.run_directory import check_new_run

    before = home / f"{case.name}-before"
    before.mkdir()
    if case.data is not None:
        drawn = random.Random(0)
        rows = [[q, *(drawn.randrange(3) for _ in range(4))] for q in range(30) for _ in range(4)]
        lines = ("{1} qid:{0} 1:{2} 2:{3} 3:{4} 4:{1}\n".format(*row) for row in rows)
        (before / case.data).write_text("".join(lines))
    if case.overwrites is not None:
        finish(start(before, f"{case.command} --seed {case.overwrites}"), before)
    folders = [home / f"{case.name}-{name}" for name in ("first", "whole")]
    began, seconds = 0.0, 0.0
    for kept in folders:
        folder = home / WORK  # always the same, for runs remember paths
        shutil.copytree(before, folder, symlinks=True)
        began = time.monotonic()
        finish(start(folder, case.command), folder)
        seconds = time.monotonic() - began
        folder.rename(kept)
        found = json.loads((home / f"{folder.name}.{STATISTICS}").read_text())
        for name in found["modules"]:
            if name not in sys.modules and name != "tiny_rewards":
                with suppress(Exception):
                    importlib.import_module(name)
    check_new_run(folders[1] / "run", overwrite=True)  # nothing in it is taken for a person's
    if differ := differences(*folders):
        raise AssertionError(f"{case.name}: two undisturbed runs differ in {', '.join(differ)}")
    return Undisturbed(folders[1], before, seconds, found["operations"])


def next_command(case: Case, folder: Path) -> str:
    """Return what a person would type: the command again, or to resume the run that it has made."""
    record = folder / "run" / "config.json"
    if record.is_file() and (case.overwrites is None or json.loads(record.read_text())["config"]["seed"] == 0):
        trust = " --trust-rewards" * ("--rewards" in case.command)  # its rewards are a module of the inputs
        return f"{case.command.split()[0]} --resume --run run{trust}"
    return case.command


def trial(case: Case, whole: Undisturbed, folder: Path, drawn: random.Random, kills: int) -> int:
    """Kill a run up to `kills` times, let it finish, compare; return how often it was killed."""
    shutil.copytree(whole.before, folder, symlinks=True)
    killed = 0
    for number in range(kills):
        left = 1 if number == 0 else 0.5  # a resumed run has less to do
        by_time = drawn.random() < 0.5
        operation = drawn.randint(1, max(1, int(left * whole.operations)))
        wait = drawn.uniform(0, left * whole.seconds)
        process = start(folder, next_command(case, folder), None if by_time else operation)
        deadline = time.monotonic() + wait
        done, status = 0, 0
        while not done:
            done, status = os.waitpid(process, os.WNOHANG)
            if not done and by_time and time.monotonic() >= deadline:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                done, status = os.waitpid(process, 0)
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise AssertionError(f"exit status {code}:\n{(folder.parent / f'{folder.name}.txt').read_text()[-3000:]}")
        killed += 1
    finish(start(folder, next_command(case, folder)), folder)
    if differ := differences(whole.folder, folder):
        raise AssertionError(f"after {killed} kills these differ: {', '.join(differ)}")
    return killed


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Kill until there are enough kills; return 1 if a run came out another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the places (default: 0)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="(default: all)")
    parser.add_argument("--cases", nargs="+", help="names of single cases")
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    given = parser.parse_args(arguments)
    home = given.keep or Path(tempfile.mkdtemp(prefix="mopl-kills-"))
    home.mkdir(parents=True, exist_ok=True)
    cases = [case for name in given.only for case in CASES[name] if not given.cases or case.name in given.cases]
    cases = [replace(case, command=case.command.replace("INPUTS", str(home.resolve() / "inputs"))) for case in cases]
    make_inputs(home / "inputs", models=any("--model" in case.command for case in cases))
    wholes = {}
    for case in cases:
        wholes[case.name] = whole = undisturbed(case, home)
        say(f"{case.name}: {whole.operations} operations on files, {whole.seconds:.1f} s undisturbed")
    drawn, total, runs, failures = random.Random(given.seed), 0, 0, []
    tally = dict.fromkeys(wholes, 0)
    while total < given.kills:
        case = cases[runs % len(cases)]
        folder, kept = home / WORK, home / f"{case.name}-{runs:03d}"
        try:
            killed = trial(case, wholes[case.name], folder, drawn, min(drawn.randint(1, 4), given.kills - total))
            folder.rename(kept) if given.keep else shutil.rmtree(folder)
        except AssertionError as error:
            failures.append(str(error))
            say(f"FAILED, kept as {kept}: {error}")
            folder.rename(kept)
            killed = 1
        total, runs = total + killed, runs + 1
        tally[case.name] += killed
        say(
            f"{case.name}: {killed} kills; {total} of {given.kills} in {runs} runs, {len(failures)} runs came out other"
        )
    say(", ".join(f"{name} {count}" for name, count in tally.items()))
    if not given.keep and not failures:
        shutil.rmtree(home)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
