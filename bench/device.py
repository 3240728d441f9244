"""Everything that needs a GPU, in one command: `python -m bench.device` at the root of a checkout.

Runs in stages of under two minutes, each in a process of its own, and writes what each printed and measured to
`bench/results/<device>/`. It can be cut off at any time and started again: finished stages are skipped (`--again` runs
them anew), and every file is complete or absent. A stage that fails does not stop the next.

    python -m bench.device                  # all stages that are not done
    python -m bench.device --list           # the stages, and which are done
    python -m bench.device tests limits     # only these
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 115


@dataclass(frozen=True)
class Stage:
    """One process: `{out}` in its command is the path without suffix to which it may write files."""

    name: str
    what: str
    command: tuple[str, ...]


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def _tests(*files: str) -> tuple[str, ...]:
    return _python("-m", "pytest", "-m", "gpu", "-q", "--maxfail=20", "-p", "no:cacheprovider", *files)


def _logprob(command: str, what: str) -> Stage:
    return Stage(f"logprob-{command}", what, _python("-m", "bench.logprob", command, "{out}.json"))


_LOGPROB = "tests/test_gpu_logprob.py"
STAGES = (
    Stage("limits", "copy bandwidth and matrix-product rate of this GPU", _python("-m", "bench.limits", "{out}.json")),
    Stage("tests-lists", "list kernels against float64, real sizes", _tests("tests/test_gpu_list_kernels.py")),
    Stage("tests-gathered", "gathered log-probabilities against float64", _tests(_LOGPROB, "-k", "gathered")),
    Stage("tests-linear-errors", "errors of linear_logprob", _tests(_LOGPROB, "-k", "linear_errors")),
    Stage("tests-linear", "everything else of linear_logprob", _tests(_LOGPROB, "-k", "linear and not linear_errors")),
    Stage(
        "lists",
        "ListNet and Plackett–Luce beside the peers and the copy limit",
        _python("bench/bench_listwise.py", "--rounds", "20", "--json", "{out}.json"),
    ),
    _logprob("tune", "choice of the algorithm that scores"),
    _logprob("gathered", "log-probabilities from logits"),
    _logprob("forward", "scoring without gradient"),
    _logprob("frozen", "frozen head"),
    _logprob("trained", "trained head"),
    _logprob("error", "errors beside the peers'"),
)


def _device_name() -> str:
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU here: torch.cuda.is_available() is False. Everything in this command needs one.")
    return re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-").lower()


def _run(stage: Stage, folder: Path) -> bool:
    """Run a stage, keep its output, and mark it done if it succeeded; say whether it did."""
    out = folder / stage.name
    command = [part.replace("{out}", str(out)) for part in stage.command]
    shown = " ".join(["python", *command[1:]]).replace(str(out), f"bench/results/{folder.name}/{stage.name}")
    print(f"== {stage.name}: {stage.what}\n   {shown}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log = folder / f"{stage.name}.txt.part"
    with open(log, "w") as file:
        file.write(f"{shown}\n")
        file.flush()
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT_S
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    seconds = time.monotonic() - start
    text = log.read_text()
    print("   " + "\n   ".join(text.splitlines()[-25:]), flush=True)
    verdict = "done" if code == 0 else "cut off after its limit" if code == -1 else f"failed with exit status {code}"
    print(f"   {verdict} in {seconds:.0f} s", flush=True)
    os.replace(log, folder / f"{stage.name}.txt")
    if code == 0:
        mark = folder / "done.json.part"
        done = _done(folder) | {stage.name: round(seconds, 1)}
        mark.write_text(json.dumps(done, indent=1) + "\n")
        os.replace(mark, folder / "done.json")
    return code == 0


def _done(folder: Path) -> dict[str, float]:
    path = folder / "done.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> int:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(s.name for s in STAGES)}")
    parser.add_argument("--list", action="store_true", help="list the stages")
    parser.add_argument("--again", action="store_true", help="also run stages that are done")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="where results go")
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - {s.name for s in STAGES}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; see --list")
    if arguments.list:
        for stage in STAGES:
            print(f"{stage.name:18s} {stage.what}")
        return 0
    folder = arguments.out / _device_name()
    folder.mkdir(parents=True, exist_ok=True)
    done = _done(folder)
    failed = []
    for stage in STAGES:
        if arguments.stages and stage.name not in arguments.stages:
            continue
        if stage.name in done and not arguments.again:
            print(f"== {stage.name}: done before ({done[stage.name]} s)")
        elif not _run(stage, folder):
            failed.append(stage.name)
    print(f"results in {folder}" + (f"; not done: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
